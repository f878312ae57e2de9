"""The shape of the built-in U-Net. It imports no torch: commands read it for their options."""

from __future__ import annotations

from fewstep.records import Int, Text, record

__all__ = ["NORM_GROUPS", "TOLD", "UNetConfig", "attention_heads"]

TOLD = ("gamma", "guidance", "phases")  # further numbers, see `fewstep.networks.conditioning`
NORM_GROUPS = 16
# A card may come from anywhere. What these admit is built without memory, on the meta device; what
# is allocated then is what the weights file holds.
LIMITS = {
    "size": (1, 4096),
    "channels": (1, 64),
    "patch": (1, 64),
    "blocks": (1, 64),
    "embedding": (1, 16_384),
    "classes": (0, 1_000_000),
}
MOST_WIDTHS, WIDEST = 8, 4096


@record
class UNetConfig:
    """Shape of a `UNet`; everything needed to build one.

    size and channels describe the picture, patch the unshuffle factor of the stem; widths has one
    entry per resolution, each half the one before; classes=0 makes an unconditional network; told
    names the further numbers that it is told (see `fewstep.networks.conditioning`).

    Raises:
        ValueError: for what no network can have: numbers outside LIMITS, widths that the norm's
            groups or the attention's heads do not divide, a size that cannot be halved so often.
    """

    size: Int = 32
    channels: Int = 1
    patch: Int = 2
    widths: tuple[Int, ...] = (64, 128)
    blocks: Int = 2
    embedding: Int = 128
    classes: Int = 10
    told: tuple[Text, ...] = ()

    def __post_init__(self) -> None:
        if len(set(self.told)) < len(self.told) or not set(self.told) <= set(TOLD):
            raise ValueError(f"told must be from {', '.join(TOLD)}, each once, got {self.told}")
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} must be an integer from {low} to {high}, got {value!r}")
        if not 1 <= len(self.widths) <= MOST_WIDTHS:
            raise ValueError(f"widths must be 1 to {MOST_WIDTHS} numbers, got {len(self.widths)}")
        for width in self.widths:
            if width % NORM_GROUPS or not 0 < width <= WIDEST:
                raise ValueError(
                    f"widths must be multiples of {NORM_GROUPS} up to {WIDEST}, got {self.widths}"
                )
        if self.widths[-1] % attention_heads(self.widths[-1]):
            raise ValueError(
                f"the last of widths must be a multiple of its {attention_heads(self.widths[-1])} "
                f"attention heads (one per 64 channels), got {self.widths[-1]}"
            )
        smallest = self.patch * 2 ** (len(self.widths) - 1)
        if self.size % smallest:
            raise ValueError(f"size must be a multiple of {smallest}, got {self.size}")


def attention_heads(channels: int) -> int:
    """One per 64 channels, at least one."""
    return max(1, channels // 64)
