"""The shapes of the ADM U-Net, and of the first stages of latent diffusion.

It imports no torch: what a file is can be told without its network.
"""

from __future__ import annotations

from collections.abc import Mapping

from fewstep.records import Int, record

__all__ = ["GROUPS", "ADMConfig", "AutoencoderConfig"]

GROUPS = 32
LIMITS = {
    "size": (1, 4096),
    "channels": (1, 64),
    "outputs": (1, 128),
    "width": (2, 8192),
    "blocks": (1, 64),
    "heads": (0, 1024),
    "head_width": (0, 8192),
    "classes": (0, 1_000_000),
    "context": (0, 65_536),
    "context_rows": (0, 1_000_000),
    "depth": (1, 64),
}
MOST_LEVELS, WIDEST = 12, 16_384


@record
class ADMConfig:
    """Shape of an `ADM`; everything needed to build one.

    size, channels: of the state; outputs: channels of the raw output, 2 channels where it has a
        learned variance
    width: of the sinusoidal embedding; all embeddings are four times as wide
    widths: channels at each level
    attention: the levels that attend
    heads, head_width: how many heads each attention has, or how wide each is; the other is 0
    classes: rows of the class embedding, 0 for none
    scale_shift, resample_blocks: see the module's docstring
    context, depth: width of the context that is attended to, 0 for none; blocks per transformer
    context_rows: rows of the table in which each class has its context; 0: the caller gives it

    Errors: ValueError for what no network can have.
    """

    size: Int
    width: Int
    widths: tuple[Int, ...]
    blocks: Int
    attention: tuple[Int, ...] = ()
    heads: Int = 0
    head_width: Int = 0
    channels: Int = 3
    outputs: Int = 3
    classes: Int = 0
    scale_shift: bool = True
    resample_blocks: bool = True
    context: Int = 0
    depth: Int = 1
    context_rows: Int = 0

    def __post_init__(self) -> None:
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} must be an integer from {low} to {high}, got {value!r}")
        if self.width % 2:
            raise ValueError(f"width must be even, got {self.width}")
        if not 1 <= len(self.widths) <= MOST_LEVELS:
            raise ValueError(f"widths must be 1 to {MOST_LEVELS} numbers, got {len(self.widths)}")
        for width in self.widths:
            if not 0 < width <= WIDEST or width % GROUPS:
                raise ValueError(
                    f"widths must be multiples of {GROUPS} up to {WIDEST}, got {self.widths}"
                )
        if not set(self.attention) <= set(range(len(self.widths))):
            raise ValueError(f"attention must name levels of {self.widths}, got {self.attention}")
        if (self.heads > 0) == (self.head_width > 0):
            raise ValueError(
                f"give heads or head_width, one of them, got {self.heads} and {self.head_width}"
            )
        for width in self.attending:
            if width % (self.heads or self.head_width):
                what = f"heads={self.heads}" if self.heads else f"head_width={self.head_width}"
                raise ValueError(f"{what} does not divide an attention of {width} channels")
        if self.size % 2 ** (len(self.widths) - 1):
            raise ValueError(
                f"size must be a multiple of {2 ** (len(self.widths) - 1)}, got {self.size}"
            )

    @property
    def attending(self) -> tuple[int, ...]:
        """Channels of the attentions."""
        return *(self.widths[level] for level in self.attention), self.widths[-1]

    def heads_of(self, channels: int) -> int:
        return self.heads or channels // self.head_width


@record
class AutoencoderConfig:
    """Shape of an `Autoencoder`.

    channels: of pictures; latent, embedded: of the decoder's input, and of the state
    widths: channels at each level, full size first; blocks: residual blocks per level
    encoder_attention, decoder_attention: levels that attend
    codes: entries of the codebook, 0 for a KL autoencoder

    Errors: ValueError for what no autoencoder can have.
    """

    widths: tuple[Int, ...]
    blocks: Int
    latent: Int
    embedded: Int
    channels: Int = 3
    codes: Int = 0
    encoder_attention: tuple[Int, ...] = ()
    decoder_attention: tuple[Int, ...] = ()

    def __post_init__(self) -> None:
        limits = {"blocks": 64, "latent": 1024, "embedded": 1024, "channels": 64}
        for name, most in limits.items():
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(
                    f"{name} must be an integer from 1 to {most}, got {getattr(self, name)}"
                )
        if not 0 <= self.codes <= 2**22:
            raise ValueError(f"codes must be from 0 to {2**22}, got {self.codes}")
        if not 1 <= len(self.widths) <= MOST_LEVELS:
            raise ValueError(f"widths must be 1 to {MOST_LEVELS} numbers, got {len(self.widths)}")
        for width in self.widths:
            if not 0 < width <= WIDEST or width % GROUPS:
                raise ValueError(
                    f"widths must be multiples of {GROUPS} up to {WIDEST}, got {self.widths}"
                )

    @property
    def factor(self) -> int:
        """Pixels to a side of one element of the state."""
        return 2 ** (len(self.widths) - 1)

    @classmethod
    def of_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> AutoencoderConfig:
        """From the names and shapes of its parameters. Errors: ValueError where they lack one."""

        def level(half: str, i: int, part: str) -> bool:
            return any(name.startswith(f"{half}.{i}.{part}") for name in shapes)

        def count(pattern: str) -> int:
            found = 0
            while found < 64 and any(n.startswith(pattern.format(found)) for n in shapes):
                found += 1
            return found

        levels, blocks = count("encoder.down.{}."), count("encoder.down.0.block.{}.")
        try:
            last = f"block.{blocks - 1}.conv2.weight"
            return cls(
                tuple(shapes[f"encoder.down.{i}.{last}"][0] for i in range(levels)),
                blocks,
                shapes["decoder.conv_in.weight"][1],
                shapes["post_quant_conv.weight"][1],
                shapes["encoder.conv_in.weight"][1],
                shapes.get("quantize.embedding.weight", (0,))[0],
                tuple(i for i in range(levels) if level("encoder.down", i, "attn.")),
                tuple(i for i in range(levels) if level("decoder.up", i, "attn.")),
            )
        except (KeyError, IndexError) as error:
            raise ValueError(f"the first stage lacks {error}") from None
