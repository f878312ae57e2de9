"""Writing a pipeline of diffusers whose network is a student, with its card."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from fewstep.files import write_json
from fewstep.models.card import CARD_FILE, Card
from fewstep.models.components import quiet
from fewstep.models.formats.diffusers import weights_hash
from fewstep.models.formats.sources import INDEX_FILE, Source
from fewstep.models.pipeline import PipelineModel

__all__ = ["save_pipeline"]

LCM = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")  # that run with its scheduler


def save_pipeline(model: PipelineModel, folder: Path) -> Card:
    """Write the pipeline of a student, its network in float16, and the card; returns the card with
    the weights' hash. What is there is replaced part by part, the index last.

    The scheduler is diffusers' own for latent consistency models, at the student's levels, where
    the pipeline runs with it; a student in segments keeps its teacher's.

    Raises:
        OSError: where the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    network = model.family.network
    pipe = copy.copy(model.pipe)
    half = copy.deepcopy(model.net).half()
    pipe.register_modules(**{network: half, "scheduler": scheduler_of(model)})
    for left in folder.glob(".student.*"):  # of a process that was killed
        shutil.rmtree(left)
    beside = Path(tempfile.mkdtemp(dir=folder, prefix=".student."))
    try:
        with quiet():
            pipe.save_pretrained(beside, safe_serialization=True)
        parts = sorted(one.name for one in beside.iterdir() if one.name != INDEX_FILE)
        (folder / INDEX_FILE).unlink(missing_ok=True)
        for name in (*parts, INDEX_FILE):
            if (folder / name).is_dir():
                shutil.rmtree(folder / name)
            os.replace(beside / name, folder / name)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    digest = weights_hash(Source(folder.name, folder), model.family, "float32")
    card = replace(model.card, weights_sha256=digest, folder=folder)
    write_json(folder / CARD_FILE, card.to_dict())
    return card


def scheduler_of(model: PipelineModel) -> Any:
    """The scheduler that goes with a student."""
    usual, known = model.pipe.scheduler, model.card.distilled
    if known is None or model.card.in_segments or type(model.pipe).__name__ not in LCM:
        return usual
    from diffusers.schedulers.scheduling_lcm import LCMScheduler

    return LCMScheduler.from_config(
        usual.config,
        original_inference_steps=len(known.levels) - 1,
        timestep_spacing="leading",
        set_alpha_to_one=True,
    )
