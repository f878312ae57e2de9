"""The settings of a network's training. It imports no torch: the command reads its options."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fewstep.networks.unet_config import UNetConfig

__all__ = ["Recipe"]


@dataclass(frozen=True)
class Recipe:
    """What decides the trained weights, to the bit, on one kind of machine.

    The command shows these lines as its help.

    Attributes:
        pictures: Length of the run in pictures, rounded up to whole batches.
        batch: Pictures per step, an even number.
        lr: Learning rate of Adam.
        warmup: Pictures until the learning rate is reached.
        cooldown: Last share of the run, over which it falls to 0.
        label_dropout: Share of pictures shown without class.
        sigma_min: Lowest noise level.
        sigma_max: Highest noise level.
        sigma_data: Standard deviation of the data, of EDM's preconditioning.
        dtype: Arithmetic of the network: bfloat16 or float32; weights stay float32.
        seed: Decides weights, data order and noise.
        network: The network's shape.

    Raises:
        ValueError: a number is outside its range.
    """

    pictures: int = 1_500_000
    batch: int = 128
    lr: float = 1e-3
    warmup: int = 20_000
    cooldown: float = 0.3
    label_dropout: float = 0.2
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    dtype: str = "bfloat16"
    seed: int = 0
    network: UNetConfig = UNetConfig()

    def __post_init__(self) -> None:
        if self.pictures < 1 or self.batch < 2 or self.batch % 2:
            raise ValueError(
                "pictures must be positive and batch even, "
                f"got pictures={self.pictures}, batch={self.batch}"
            )
        if self.dtype not in ("bfloat16", "float32"):
            raise ValueError(f"dtype must be bfloat16 or float32, got {self.dtype}")
        for name, fine, rule in (
            ("lr", 0 < self.lr < math.inf, "positive"),
            ("warmup", self.warmup >= 0, "at least 0"),
            ("cooldown", 0 <= self.cooldown <= 1, "between 0 and 1"),
            ("label_dropout", 0 <= self.label_dropout <= 1, "between 0 and 1"),
            ("sigma_min", 0 < self.sigma_min < self.sigma_max, "positive and below sigma_max"),
            ("sigma_max", self.sigma_max < math.inf, "finite"),
            ("sigma_data", 0 < self.sigma_data < math.inf, "positive"),
            ("seed", -(2**63) <= self.seed < 2**63, "a 64-bit integer"),
        ):
            if not fine:
                raise ValueError(f"{name} must be {rule}, got {getattr(self, name)}")

    @property
    def total_steps(self) -> int:
        return math.ceil(self.pictures / self.batch)

    def lr_at(self, step: int) -> float:
        """Learning rate of the update after `step` earlier ones."""
        rise = (step + 1) * self.batch / self.warmup if self.warmup else 1.0
        fall = (self.total_steps - step) / (self.cooldown * self.total_steps + 1)
        return self.lr * min(1.0, rise, fall)
