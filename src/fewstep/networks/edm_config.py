"""The shapes of the networks of EDM and EDM2, by the published names.

It imports no torch: what a file is can be told without its network.
"""

from __future__ import annotations

from fewstep.records import Int, Real, Text, record

__all__ = ["EDM2Config", "EDMConfig"]

# What these admit is built without memory, on the meta device; what is allocated then is what the
# weights file holds.
LIMITS = {
    "img_resolution": (1, 8192),
    "img_channels": (1, 64),
    "out_channels": (1, 128),
    "label_dim": (0, 1_000_000),
    "augment_dim": (0, 65_536),
    "model_channels": (2, 16_384),
    "channel_mult_emb": (1, 64),
    "channel_mult_noise": (1, 64),
    "num_blocks": (0, 64),
}
LIMITS2 = {
    "img_resolution": (1, 8192),
    "img_channels": (1, 64),
    "label_dim": (0, 1_000_000),
    "model_channels": (1, 16_384),
    "num_blocks": (0, 64),
    "channels_per_head": (1, 8192),
    "channel_mult_noise": (0, 64),
    "channel_mult_emb": (0, 64),
    "logvar_channels": (1, 16_384),
}
CHOICES = {
    "model_type": ("SongUNet", "DhariwalUNet"),
    "embedding_type": ("positional", "fourier"),
    "encoder_type": ("standard", "skip", "residual"),
    "decoder_type": ("standard", "skip"),
}
MOST_LEVELS, WIDEST, MOST_TAPS = 12, 65_536, 16


@record
class EDMConfig:
    """Shape of an `EDMUNet`, by the published names.

    out_channels: of the raw output
    label_dim, augment_dim: classes, and numbers of the augmentation; 0 for none
    attn_resolutions: sides of the maps that are attended to, in pixels
    resample_filter: taps of the filter by which maps are resized

    Raises:
        ValueError: for what no network can have.
    """

    img_resolution: Int
    img_channels: Int
    out_channels: Int
    model_type: Text = "SongUNet"
    label_dim: Int = 0
    augment_dim: Int = 0
    model_channels: Int = 128
    channel_mult: tuple[Int, ...] = (1, 2, 2, 2)
    channel_mult_emb: Int = 4
    num_blocks: Int = 4
    attn_resolutions: tuple[Int, ...] = (16,)
    embedding_type: Text = "positional"
    channel_mult_noise: Int = 1
    encoder_type: Text = "standard"
    decoder_type: Text = "standard"
    resample_filter: tuple[Real, ...] = (1.0, 1.0)

    def __post_init__(self) -> None:
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} must be an integer from {low} to {high}, got {value!r}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be {' or '.join(choices)}, got {getattr(self, name)!r}"
                )
        if not 1 <= len(self.channel_mult) <= MOST_LEVELS or min(self.channel_mult) < 1:
            raise ValueError(f"channel_mult must be 1 to {MOST_LEVELS} factors of at least 1")
        if max(self.channel_mult) * self.model_channels > WIDEST:
            raise ValueError(f"a level must have at most {WIDEST} channels")
        if not 1 <= len(self.resample_filter) <= MOST_TAPS or sum(self.resample_filter) == 0:
            raise ValueError(f"resample_filter must be 1 to {MOST_TAPS} taps whose sum is not 0")
        if self.img_resolution % 2 ** (len(self.channel_mult) - 1):
            raise ValueError(
                f"img_resolution must be a multiple of {2 ** (len(self.channel_mult) - 1)}, got "
                f"{self.img_resolution}"
            )
        width = self.model_channels * self.channel_mult_noise
        if width % 2 or width < (4 if self.song else 2):
            raise ValueError(f"the noise embedding must be even and at least 4 wide, got {width}")

    @property
    def song(self) -> bool:
        return self.model_type == "SongUNet"

    @property
    def levels(self) -> list[tuple[int, int]]:
        """(side, channels) of each level."""
        return [
            (self.img_resolution >> level, mult * self.model_channels)
            for level, mult in enumerate(self.channel_mult)
        ]


@record
class EDM2Config:
    """Shape of an `EDM2UNet`, by the published names; 0 for a factor that the published network
    leaves out.

    logvar_channels: of the uncertainty, which only training used

    Raises:
        ValueError: for what no network can have.
    """

    img_resolution: Int
    img_channels: Int
    label_dim: Int = 0
    model_channels: Int = 192
    channel_mult: tuple[Int, ...] = (1, 2, 3, 4)
    channel_mult_noise: Int = 0
    channel_mult_emb: Int = 0
    num_blocks: Int = 3
    attn_resolutions: tuple[Int, ...] = (16, 8)
    channels_per_head: Int = 64
    label_balance: Real = 0.5
    concat_balance: Real = 0.5
    res_balance: Real = 0.3
    attn_balance: Real = 0.3
    clip_act: Real = 256.0
    logvar_channels: Int = 128
    resample_filter: tuple[Real, ...] = (1.0, 1.0)

    def __post_init__(self) -> None:
        for name, (low, high) in LIMITS2.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} must be an integer from {low} to {high}, got {value!r}")
        for name in ("label_balance", "concat_balance", "res_balance", "attn_balance"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if not self.clip_act >= 0:
            raise ValueError(f"clip_act must be at least 0, got {self.clip_act}")
        if not 1 <= len(self.channel_mult) <= MOST_LEVELS or min(self.channel_mult) < 1:
            raise ValueError(f"channel_mult must be 1 to {MOST_LEVELS} factors of at least 1")
        if max(self.channel_mult) * self.model_channels > WIDEST:
            raise ValueError(f"a level must have at most {WIDEST} channels")
        if self.img_resolution % 2 ** (len(self.channel_mult) - 1):
            raise ValueError(
                f"img_resolution must be a multiple of {2 ** (len(self.channel_mult) - 1)}, got "
                f"{self.img_resolution}"
            )
        if not 1 <= len(self.resample_filter) <= MOST_TAPS or sum(self.resample_filter) == 0:
            raise ValueError(f"resample_filter must be 1 to {MOST_TAPS} taps whose sum is not 0")
        for side, wide in self.levels:
            if side in self.attn_resolutions and wide % max(wide // self.channels_per_head, 1):
                raise ValueError(f"channels_per_head {self.channels_per_head} does not fit {wide}")

    @property
    def levels(self) -> list[tuple[int, int]]:
        """(side, channels) of each level."""
        return [
            (self.img_resolution >> level, mult * self.model_channels)
            for level, mult in enumerate(self.channel_mult)
        ]

    @property
    def noise(self) -> int:
        """Width of the noise embedding."""
        return self.model_channels * (self.channel_mult_noise or self.channel_mult[0])

    @property
    def embedding(self) -> int:
        return self.model_channels * (self.channel_mult_emb or max(self.channel_mult))
