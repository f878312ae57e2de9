"""Pipelines of diffusers as models: unconditional, latent, Stable Diffusion 1, 2, XL and 3.

    model = fewstep.load("path/to/stable-diffusion")
    denoiser = model.denoiser(prompt="a cat", negative="blurry", guidance=7.5)
    x = fewstep.solve(denoiser, model.prior([0]), "dpmpp-2m", nfe=5, grid="discrete", end="zero")
    picture = model.decode(x)[0]

Needs `pip install 'fewstep[diffusers]'`.
"""

from __future__ import annotations

from fewstep.models.families import FAMILIES
from fewstep.models.formats.diffusers import INDEX_FILE, from_pipe, load_pipeline
from fewstep.models.pipeline import PipelineModel
from fewstep.models.process import Process, Shifted, read_process

__all__ = [
    "FAMILIES",
    "INDEX_FILE",
    "PipelineModel",
    "Process",
    "Shifted",
    "from_pipe",
    "load_pipeline",
    "read_process",
]
