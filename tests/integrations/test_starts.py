"""Starts from a picture by every kind of solver, and published levels of Stable Diffusion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.integrations.diffusers import FewstepScheduler
from tests.support import pipelines
from tests.support.command import command
from tests.support.pipelines import diffusers

# the levels of Sabour et al. 2024 (Align Your Steps, arXiv:2404.14507) for Stable Diffusion 1.5
AYS = "14.615,6.475,3.861,2.697,1.886,1.396,0.963,0.652,0.399,0.152,0.029"
PICTURE = Image.fromarray(np.arange(768, dtype=np.uint32).reshape(16, 16, 3).astype(np.uint8))


def from_picture(solver: str, steps: int, strength: float) -> Any:
    parts = pipelines.sd().components
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = FewstepScheduler.from_config(pipe.scheduler.config, solver=solver)
    run = {"image": PICTURE, "strength": strength, "num_inference_steps": steps}
    generator = torch.Generator().manual_seed(0)
    return pipe("a cat", **run, output_type="latent", generator=generator).images


@pytest.mark.parametrize("steps", [2, 3])
@pytest.mark.parametrize("solver", ["churn", "dpm-solver-3", "dpm-solver-2", "heun", "unipc-3"])
def test_a_start_from_a_picture_works_or_says_to_raise_strength(solver, steps):
    assert torch.isfinite(from_picture(solver, steps, 0.5)).all()
    with pytest.raises(ValueError, match="no timestep is left to start from; raise strength"):
        from_picture(solver, steps, 0.3)


def test_published_levels_are_taken(tmp_path: Path):
    folder = pipelines.saved("sd", tmp_path / "sd")
    line = ("sample", folder, "--prompt", "a cat", "--seeds", 0, "--solver", "dpmpp-2m")
    for i, grid in enumerate((AYS, f"{AYS},0", "14.615,2,0")):
        found = command(*line, "--grid", grid, "--out", tmp_path / str(i))
        assert (found.exit_code, found.stderr) == (0, "")
    found = command(*line, "--grid", "14.5,2,0", "--out", tmp_path / "other")
    assert found.exit_code == 2
    assert "the grid starts at sigma 14.5, but sampling at 14.61" in found.stderr
