"""What one client may ask for. Every input of the service has a bound here."""

from __future__ import annotations

from dataclasses import dataclass, fields

__all__ = ["Limits"]


@dataclass(frozen=True)
class Limits:
    """Bounds of requests and of what is kept.

    Attributes:
        most_images: Pictures of one request.
        most_evaluations: Network evaluations of one picture.
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
        for one in fields(self):
            value = getattr(self, one.name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{one.name} must be a whole number from 1 on, got {value!r}")
