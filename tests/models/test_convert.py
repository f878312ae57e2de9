"""Model folders of papers' network files: what they say, and that they answer as the file does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fewstep
from fewstep.cli.run import run
from fewstep.distillation import distill
from fewstep.files import file_hash
from fewstep.models.convert import convert
from tests.models.test_adm import GUIDED, SAID, saved
from tests.networks.test_adm import SMALL
from tests.support.adm_files import tensors
from tests.support.edm_files import write_edm, write_edm2

FAMILIES: dict[str, Any] = {
    "song": lambda path: write_edm(path, label_dim=3)[0],
    "dhariwal": lambda path: write_edm(path, model_type="DhariwalUNet", model_channels=64)[0],
    "iddpm": lambda path: write_edm(path, "iDDPMPrecond", M=6)[0],
    "edm2": lambda path: write_edm2(path, label_dim=3)[0],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_answers_as_its_file(family: str, tmp_path: Path) -> None:
    path = FAMILIES[family](tmp_path / "net.pkl")
    card = convert(path, tmp_path / "out", draws=2)
    ours: Any = fewstep.load(tmp_path / "out")
    theirs: Any = fewstep.load(path)
    x, sigma = torch.randn(2, *ours.shape), torch.tensor([0.5, 9.0])
    label = 1 if card.classes else None
    with torch.no_grad():
        assert torch.equal(ours.denoiser(label)(x, sigma), theirs.denoiser(label)(x, sigma))
        out, features = ours.denoiser(label).with_features(x, sigma)
        mean = ours.denoiser(label).far_mean
    assert out.shape == x.shape
    assert features.ndim == 4
    assert mean.shape == (1, *ours.shape)
    assert card.about["source_sha256"] == file_hash(path)
    sampled = fewstep.sample(ours, solver="ddim", nfe=2, afs="mean", seeds=[0], label=label)
    assert sampled.images.shape == (1, 8, 8, 3)


def test_float16_is_half_as_large_and_near(tmp_path: Path) -> None:
    path = write_edm(tmp_path / "net.pkl", embedding_type="fourier")[0]
    for dtype in ("float32", "float16"):
        convert(path, tmp_path / dtype, dtype=dtype, draws=0)
    sizes = [(tmp_path / d / "model.safetensors").stat().st_size for d in ("float32", "float16")]
    assert 1.6 < sizes[0] / sizes[1] < 2
    a, b = fewstep.load(tmp_path / "float32"), fewstep.load(tmp_path / "float16")
    x, sigma = torch.randn(2, *a.shape), torch.tensor([0.5, 9.0])
    with torch.no_grad():
        ours, wanted = b.denoiser()(x, sigma), a.denoiser()(x, sigma)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=0.01 * float(wanted.abs().max()))


def test_guides_lie_in_the_folder(tmp_path: Path) -> None:
    path, guide = (
        write_edm2(tmp_path / f"{i}.pkl", seed=i, label_dim=3 - 3 * i)[0] for i in (0, 1)
    )
    convert(path, tmp_path / "out", guide=guide, draws=0)
    ours, theirs = fewstep.load(tmp_path / "out"), fewstep.load(path, guide=guide)
    x, sigma = torch.randn(2, *ours.shape), torch.tensor([0.5, 9.0])
    with torch.no_grad():
        wanted = theirs.denoiser(1, guidance=2.0)(x, sigma)
        assert torch.equal(ours.denoiser(1, guidance=2.0)(x, sigma), wanted)
        assert not torch.equal(ours.denoiser(1)(x, sigma), wanted)


def test_a_classifier_lies_in_the_folder(tmp_path: Path) -> None:
    path = saved(tmp_path / "net.pt", tensors(GUIDED))
    s = {**SMALL, "legacy": True, "pooled": 5, "image_size": 16, "num_res_blocks": 2}
    guide = saved(tmp_path / "guide.pt", tensors(s, seed=1))
    config = {**SAID, "classifier_width": 32, "classifier_num_head_channels": 16}
    convert(path, tmp_path / "out", classifier=guide, config=config, draws=0)
    ours = fewstep.load(tmp_path / "out")
    theirs = fewstep.load(path, classifier=guide, config=config)
    x, sigma = torch.randn(2, *ours.shape), torch.tensor([0.5, 9.0])
    with torch.no_grad():
        plain = ours.denoiser()(x, sigma)
        for label in (0, 4):
            found = ours.denoiser(label, guidance=2.0)(x, sigma)
            assert torch.equal(found, theirs.denoiser(label, guidance=2.0)(x, sigma))
            assert not torch.equal(found, plain)


def test_latents_want_their_autoencoder(tmp_path: Path) -> None:
    settings = {"encoder": "StabilityVAEEncoder", "img_channels": 4}
    path = write_edm2(tmp_path / "net.pkl", **settings)[0]
    model: Any = fewstep.load(path)
    assert model.shape == (4, 8, 8)
    with pytest.raises(ValueError, match="its states are latents: give the autoencoder"):
        fewstep.sample(model, solver="ddim", nfe=1, seeds=[0])
    with pytest.raises(ValueError, match="makes pictures without an autoencoder"):
        fewstep.load(write_edm2(tmp_path / "rgb.pkl")[0], vae=tmp_path)


def test_latents_with_an_autoencoder(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
    )
    vae.save_pretrained(tmp_path / "vae")
    settings = {"encoder": "StabilityVAEEncoder", "img_channels": 4}
    path = write_edm2(tmp_path / "net.pkl", **settings)[0]
    card = convert(path, tmp_path / "out", vae=tmp_path / "vae", draws=0)
    model: Any = fewstep.load(tmp_path / "out")
    assert card.picture == model.picture == (64, 64, 3)
    x = torch.randn(1, 4, 8, 8)
    raw = x / 0.5 * torch.tensor([4.17, 4.62, 3.71, 3.28])[:, None, None]
    raw = raw + torch.tensor([5.81, 3.25, 0.12, -2.15])[:, None, None]
    with torch.no_grad():
        wanted = vae.decode(raw).sample
        torch.testing.assert_close(model.first_stage.decode(x), wanted, rtol=0, atol=1e-5)
    assert fewstep.sample(model, solver="ddim", nfe=1, seeds=[0]).images.shape == (1, 64, 64, 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "float8"}, "dtype must be float32 or float16"),
        ({"draws": -1}, "draws must be at least 0"),
        ({"config": {}}, "has no such options; it has preset, vae, guide"),
        ({"preset": "x"}, "no preset"),
        ({"guide": __file__}, "cannot be read"),
    ],
)
def test_refusals_leave_no_folder(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = write_edm2(tmp_path / "net.pkl")[0]
    with pytest.raises(ValueError, match=words):
        convert(path, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["song", "edm2"])
def test_a_folder_is_distilled(family: str, tmp_path: Path) -> None:
    convert(FAMILIES[family](tmp_path / "net.pkl"), tmp_path / "out", draws=1)
    teacher = fewstep.load(tmp_path / "out")
    pictures = torch.randint(0, 256, (24, 3, 8, 8), dtype=torch.uint8), torch.arange(24) % 3
    small: dict[str, Any] = {"pictures": 16, "batch": 8, "points": 5, "dtype": "float32"}
    distill(teacher, pictures, out=tmp_path / "s", method="lcm", validation_seeds=2, **small)
    student = fewstep.load(tmp_path / "s")
    x, sigma = torch.randn(2, *teacher.shape), torch.tensor([0.5, 9.0])
    with torch.no_grad():
        a, b = student.denoiser(1)(x, sigma), teacher.denoiser(1)(x, sigma)
    assert 0 < (a - b).abs().max() < 0.1 * b.abs().max()  # two small steps away
    sampled = fewstep.sample(student, solver="consistency", nfe=2, seeds=[0], label=1)
    assert sampled.images.shape == (1, 8, 8, 3)


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_edm(tmp_path / "net.pkl", label_dim=3)[0]
    assert run(["models", str(path), "--json"]) == 0
    known = json.loads(capsys.readouterr().out)
    model: Any = fewstep.load(path)
    weights = sum(p.numel() for p in model.net.parameters())
    assert (known["kind"], known["preset"], known["parameters"]) == ("edm", None, weights)
    assert (known["sigma_min"], known["sigma_max"], len(known["classes"])) == (0.002, 80.0, 3)
    assert run(["models", str(path)]) == 0
    assert "SongUNet" in capsys.readouterr().out
    assert run(["convert", str(path), "--out", str(tmp_path / "m"), "--draws", "1"]) == 0
    words = ["sample", str(tmp_path / "m"), "--seeds", "0-1", "--label", "2", "--nfe", "2"]
    assert run([*words, "--solver", "ddim", "--out", str(tmp_path / "s")]) == 0
    assert run(["convert", str(path), "--out", str(tmp_path / "m")]) == 2
    assert "holds a model already" in capsys.readouterr().err
