"""Every family of papers' networks, converted: all solvers, learned ones, comparison, geometry."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

import fewstep
from fewstep.cli.run import run
from fewstep.models import PictureModel
from fewstep.models.convert import convert
from fewstep.noise import key
from fewstep.sampling.generate import load_images
from fewstep.solver.registry import names
from tests.models.test_adm import CM, GUIDED, SAID, TEACHER, UNET_SAID, checkpoint, saved
from tests.support.adm_files import tensors
from tests.support.edm_files import write_edm, write_edm2

Made = tuple[Path, dict[str, Any]]  # the file, and what must be said of it
DHARIWAL: dict[str, Any] = {"model_type": "DhariwalUNet", "model_channels": 64}
NCSNPP: dict[str, Any] = {"embedding_type": "fourier", "channel_mult_noise": 2}
NCSNPP |= {"encoder_type": "residual", "resample_filter": [1, 3, 3, 1]}


def state(folder: Path, settings: dict[str, Any], config: dict[str, Any]) -> Made:
    return saved(folder / "net.pt", tensors(settings)), {"config": config}


def latent(folder: Path) -> Made:
    checkpoint(folder / "net.ckpt")
    return folder / "net.ckpt", {"config": UNET_SAID}


FAMILIES: dict[str, Callable[[Path], Made]] = {
    "edm-ddpmpp": lambda folder: (write_edm(folder / "net.pkl")[0], {}),
    "edm-ncsnpp": lambda folder: (write_edm(folder / "net.pkl", "VEPrecond", **NCSNPP)[0], {}),
    "edm-dhariwal": lambda folder: (write_edm(folder / "net.pkl", label_dim=3, **DHARIWAL)[0], {}),
    "edm2": lambda folder: (write_edm2(folder / "net.pkl", label_dim=3)[0], {}),
    "guided-diffusion": lambda folder: state(folder, GUIDED, SAID),
    "guided-diffusion-classes": lambda folder: state(folder, {**GUIDED, "num_classes": 7}, SAID),
    "consistency-teacher": lambda folder: state(folder, CM, TEACHER),
    "consistency-student": lambda folder: state(folder, CM, {**TEACHER, "distillation": True}),
    "latent-diffusion": latent,
}
FEW = ["--trajectories", "4", "--batch", "2", "--validation-seeds", "2", "--dtype", "float32"]
ASKED = (("0-3", "all"), ("3", str(key(3, "label") % 7)))
METHODS = {"amed": "4", "amed-plugin": "4", "tuned": "3"}


def some(*everyday: str) -> list[Any]:
    return [f if f in everyday else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]


def converted(family: str, folder: Path) -> PictureModel:
    path, said = FAMILIES[family](folder)
    convert(path, folder / "model", draws=1, **said)
    return cast("PictureModel", fewstep.load(folder / "model"))


@pytest.mark.parametrize("family", some("edm-ddpmpp", "guided-diffusion-classes"))
def test_every_solver_samples_a_converted_network(family: str, tmp_path: Path) -> None:
    model = converted(family, tmp_path)
    label = 1 if model.card.classes else None
    students = [one for one in names(consistency=True) if one != "consistency-pca"]
    for solver in [*names(), *students]:  # that one needs a folder with statistics
        how: dict[str, Any] = {"solver": solver, "nfe": 6, "end": "sigma_min"}
        images = fewstep.sample(model, seeds=[0], label=label, **how).images
        assert images.shape == (1, *model.picture), solver
    with pytest.raises(ValueError, match="take consistency-kappa"):
        fewstep.sample(model, seeds=[0], label=label, solver="consistency-pca", nfe=6)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_solvers_are_learned_and_compared_on_a_converted_network(
    family: str, tmp_path: Path
) -> None:
    model, folder = converted(family, tmp_path), tmp_path / "model"
    label = ["--label", "1"] if model.card.classes else []
    trained = {}
    for method, nfe in METHODS.items():
        out = tmp_path / method
        words = ["train", "solver", str(folder), "--out", str(out), "--method", method]
        words += ["--nfe", nfe, "--not-fallback", "--grid", "karras", *FEW, *label]
        assert run(words) == 0, method
        trained[method] = str(out)
        settings = json.loads((out / "solver.json").read_text())["settings"]
        if method != "tuned":  # the paper's predictor reads what the network's middle shows
            assert settings["features"], method
        words = ["sample", str(folder), "--solver", str(out), "--seeds", "0-1", *label]
        assert run([*words, "--out", str(tmp_path / f"{method}-pictures")]) == 0, method

    label = ["--label", "all"] if label else []
    solvers = ",".join(["ddim", trained["tuned"], trained["amed"]])
    words = ["compare", str(folder), "--solvers", solvers, "--nfe", "3,4", "--seeds", "0-3"]
    words += ["--features", "none", "--no-plots", "--cache", str(tmp_path / "cache"), *label]
    words += ["--reference-nfe", "16", "--screen", "2"]
    assert run([*words, "--out", str(tmp_path / "compared")]) == 0
    rows = json.loads((tmp_path / "compared" / "comparison.json").read_text())["rows"]
    assert all(np.isfinite(row["error"]) for row in rows)
    label = ["--label", "1"] if label else []
    words = ["geometry", str(folder), "--seeds", "0-1", "--points", "6", "--no-plots", *label]
    assert run([*words, "--out", str(tmp_path / "geometry")]) == 0


def test_a_class_is_wanted_and_may_be_drawn_by_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    converted("guided-diffusion-classes", tmp_path)
    words = ["sample", str(tmp_path / "model"), "--solver", "ddim", "--nfe", "2"]
    for command in (words, ["compare", *words[1:2]], ["geometry", *words[1:2]]):
        assert run([*command, "--out", str(tmp_path / "none")]) == 2
        assert "wants a class; give label (--label), from 0 to 6" in capsys.readouterr().err
        assert not (tmp_path / "none").exists()
    for seeds, label in ASKED:
        out = ["--out", str(tmp_path / label)]
        assert run([*words, "--seeds", seeds, "--label", label, *out]) == 0
    a, b = (load_images(next((tmp_path / label).glob("*3.png")), 16, 16, 3) for _, label in ASKED)
    assert np.abs(a.astype(int) - b).max() <= 1  # batches of 4 and 1 round apart
