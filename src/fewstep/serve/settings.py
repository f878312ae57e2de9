"""The service's settings: every input has its bound here. No torch: the command reads them off."""

from __future__ import annotations

from dataclasses import dataclass, fields

__all__ = ["Limits", "Replicas"]


@dataclass(frozen=True)
class Limits:
    """Bounds of requests and of what is kept.

    Attributes:
        most_images: Pictures of one request.
        most_evaluations: Network evaluations of one picture.
        most_requests: Requests at a time, of all clients.
        pixels: Pixels of one picture.
        prompt_bytes: Bytes of a prompt, in UTF-8.
        upload_bytes: Bytes of a request with pictures.
        upload_pixels: Pixels of an uploaded picture.
        most_streams: Requests of one client at a time.
        most_waiting: Pictures in the queue.
        kept: Pictures that can be refined later.
        kept_bytes: Bytes of these.
        kept_seconds: How long they are kept.
        send_seconds: How long a client may take to read what is ready.
    """

    most_images: int = 10
    most_evaluations: int = 50
    most_requests: int = 1000
    pixels: int = 4_194_304
    prompt_bytes: int = 8_000
    upload_bytes: int = 16_000_000
    upload_pixels: int = 16_777_216
    most_streams: int = 64
    most_waiting: int = 256
    kept: int = 2_000
    kept_bytes: int = 256_000_000
    kept_seconds: int = 3600
    send_seconds: int = 30

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True)
class Replicas:
    """Replicas of the service on a Ray cluster.

    Attributes:
        replicas: The least of them.
        most_replicas: The most, as requests need them. Default: no more than the least.
        cpus_per_replica: CPUs that Ray reserves for each.
        gpus_per_replica: GPUs that Ray reserves for each; 0.5: two share one.
        ongoing: Requests of one replica at a time; others wait for a replica.
        wanted: Requests of one replica for which another one is started.
        queued: Requests that wait for a replica; further ones are refused.
    """

    replicas: int = 1
    most_replicas: int | None = None
    cpus_per_replica: float = 1.0
    gpus_per_replica: float = 0.0
    ongoing: int = 32
    wanted: int = 4
    queued: int = 256

    def __post_init__(self) -> None:
        _check(self)
        for name, value in (("cpus", self.cpus_per_replica), ("gpus", self.gpus_per_replica)):
            if not 0 <= value <= 1024:
                raise ValueError(f"{name}_per_replica must lie in [0, 1024], got {value:g}")
        if self.most < self.replicas:
            raise ValueError(
                f"most_replicas must be at least replicas, got {self.most} and {self.replicas}"
            )

    @property
    def most(self) -> int:
        """The most replicas."""
        return self.replicas if self.most_replicas is None else self.most_replicas


def _check(settings: Limits | Replicas) -> None:
    """Whole numbers are at least 1. Errors: ValueError that names the field."""
    for one in fields(settings):
        value = getattr(settings, one.name)
        whole = one.type.startswith("int") if isinstance(one.type, str) else False
        if whole and value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{one.name} must be a whole number from 1 on, got {value!r}")
