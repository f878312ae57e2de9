"""The pipelines that fewstep runs, by their class in diffusers: a line here, and a file of data.

A condition is what the network is given besides x_t and t, as a tree of tensors with one row, or
one row per picture: the keyword arguments of its forward call. Text goes through the pipeline's
own `encode_prompt`, so a condition is what diffusers would have given the same network.
"""

from __future__ import annotations

from fewstep.models.families.family import Condition, Family
from fewstep.models.families.sd import SD
from fewstep.models.families.sd3 import SD3
from fewstep.models.families.sdxl import SDXL
from fewstep.models.families.unconditional import LATENTS, PIXELS

__all__ = ["FAMILIES", "Condition", "Family"]

FAMILIES: dict[str, Family] = {
    "DDPMPipeline": PIXELS,
    "DDIMPipeline": PIXELS,
    "LDMPipeline": LATENTS,
    "StableDiffusionPipeline": SD,
    "LatentConsistencyModelPipeline": SD,
    "StableDiffusionXLPipeline": SDXL,
    "StableDiffusion3Pipeline": SD3,
}
