"""From a model to pictures: reproducibility, conditions, the prior, loading, bad input."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import fewstep
from fewstep.denoiser import calls_per_eval
from fewstep.models import BUILTIN, Model
from fewstep.models.formats.native import load_folder
from fewstep.models.network import NetworkModel
from fewstep.sampling.choose import locate

SEEDS = (3, 11, 4, 1_000_003)


@pytest.fixture(scope="module")
def model() -> NetworkModel:
    return load_folder(BUILTIN / "fashion-mnist")


def near(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal but for pixels that float32 rounding carries over the edge between two grey levels."""
    off = np.abs(a.astype(int) - b.astype(int))
    return off.max() <= 1 and (off > 0).mean() < 2e-3


def test_pictures_depend_on_their_seed_alone(model: Model) -> None:
    together = fewstep.sample(model, solver="dpmpp-2m", nfe=3, seeds=SEEDS).images
    again = fewstep.sample(model, solver="dpmpp-2m", nfe=3, seeds=SEEDS).images
    reverse = fewstep.sample(model, solver="dpmpp-2m", nfe=3, seeds=SEEDS[::-1], batch=3).images
    alone = [fewstep.sample(model, solver="dpmpp-2m", nfe=3, seeds=[s]).images[0] for s in SEEDS]
    np.testing.assert_array_equal(together, again)
    assert near(together, reverse[::-1])
    assert near(together, np.stack(alone))


def test_the_prior_has_the_same_bits_whatever_the_batch(model: Model) -> None:
    together = model.prior(SEEDS)
    assert torch.equal(together.flip(0), model.prior(SEEDS[::-1]))
    for seed, row in zip(SEEDS, together, strict=True):
        assert torch.equal(model.prior([seed])[0], row)
    many = model.prior(range(400)) / 80
    assert many.mean().abs() < 5 / (400 * 1024) ** 0.5  # five standard errors
    assert many.std().item() == pytest.approx(1, abs=5e-3)


def test_stochastic_solvers_are_keyed_by_seed_too(model: Model) -> None:
    for solver in fewstep.solvers(stochastic=True):
        both = fewstep.sample(model, solver=solver, nfe=4, seeds=(5, 6)).images
        one = fewstep.sample(model, solver=solver, nfe=4, seeds=(6,)).images
        assert near(both[1:], one)
        assert not near(both[:1], one)


def test_samples_report_what_was_spent(model: Model) -> None:
    plain = fewstep.sample(model, solver="heun", nfe=4, seeds=[0])
    guided = fewstep.sample(model, solver="heun", nfe=4, seeds=[0], label=3, guidance=2.0)
    assert (plain.nfe, plain.network_calls) == (4, 4)
    assert (guided.nfe, guided.network_calls) == (4, 8)
    assert plain.images.shape == (1, 32, 32, 1)
    assert plain.images.dtype == np.uint8
    assert json.loads(json.dumps(guided.provenance)) == guided.provenance
    assert guided.provenance["guidance"] == 2.0


def test_labels_by_name_index_or_one_per_seed(model: Model) -> None:
    def pictures(label):
        return fewstep.sample(model, nfe=3, seeds=(0, 1), label=label).images

    np.testing.assert_array_equal(pictures("trouser"), pictures(1))
    mixed = pictures(["trouser", 8])
    assert near(mixed[:1], pictures(1)[:1])
    assert near(mixed[1:], pictures("bag")[1:])
    assert not near(pictures(1), pictures(8))


def test_guidance_0_is_the_unconditional_prediction_evaluated_once(model: NetworkModel) -> None:
    x, sigma = model.prior([1, 2]), torch.full((2,), 80.0)
    for label in (2, [2, 5]):
        denoiser = model.denoiser(label, guidance=0)
        assert calls_per_eval(denoiser) == 1
        assert torch.equal(denoiser(x, sigma), model.denoiser()(x, sigma))
        assert torch.equal(denoiser.far_mean, model.denoiser().far_mean)  # type: ignore[arg-type]
    run = {"solver": "ddim", "nfe": 3, "seeds": [1]}
    nothing = fewstep.sample(model, label=2, guidance=0.0, **run)  # type: ignore[arg-type]
    assert nothing.network_calls == 3
    assert np.array_equal(nothing.images, fewstep.sample(model, **run).images)  # type: ignore[arg-type]
    twice = model.denoiser(2, guidance=torch.zeros(2))  # one per picture: others may be guided
    torch.testing.assert_close(twice(x, sigma), model.denoiser()(x, sigma), rtol=0, atol=1e-5)


def test_guidance_is_the_published_combination(model: NetworkModel) -> None:
    x, sigma = model.prior(SEEDS[:2]) / 20, torch.tensor([4.0, 0.5])
    cond, uncond = model.denoiser(label=2)(x, sigma), model.denoiser()(x, sigma)
    guided = model.denoiser(label=2, guidance=3.0)(x, sigma)
    # one call of four pictures against two of two: float32 rounding
    torch.testing.assert_close(guided, uncond + 3 * (cond - uncond), rtol=0, atol=2e-5)


def test_far_mean_is_the_mean_of_d_at_sigma_max(model: NetworkModel) -> None:
    for label in (None, 7):
        denoiser = model.denoiser(label=label)
        x = model.prior(range(5_000, 5_128))
        mean = denoiser(x, torch.full((128,), 80.0)).mean(0)
        error = (mean - denoiser.far_mean[0]).square().mean().sqrt()
        assert error < 0.01  # standard error of 128 and of 512 draws, and float16 in the file


def test_d_at_sigma_max_is_the_data_mean(model: NetworkModel) -> None:
    far, mean = model.stats["far_mean"][-1].flatten(), model.stats["mean"][-1]
    assert (far - mean).square().mean().sqrt() < 0.02


def test_features_come_from_the_module_that_the_card_names(model: NetworkModel) -> None:
    x, sigma = model.prior((0, 1)), torch.full((2,), 80.0)
    denoised, features = model.denoiser(label=1).with_features(x, sigma)
    assert features.shape == (2, 128, 8, 8)
    torch.testing.assert_close(denoised, model.denoiser(label=1)(x, sigma), rtol=0, atol=0)
    _, guided = model.denoiser(label=1, guidance=2.0).with_features(x, sigma)
    torch.testing.assert_close(guided, features, rtol=0, atol=1e-4)


def test_head_start_is_the_closed_form_flow_of_a_gaussian(model: NetworkModel) -> None:
    x, start = model.prior(SEEDS), model.prior(SEEDS, sigma=20.0)
    flat, mean = x.flatten(1).double(), model.stats["mean"][-1].double()
    basis = torch.linalg.qr(model.stats["basis"][-1].double().T).Q
    rest, variances = model.stats["rest"][-1].double(), model.stats["variances"][-1].double()

    def shrink(variance):
        return ((variance + 20.0**2) / (variance + 80.0**2)).sqrt()

    along = (flat - mean) @ basis
    across = flat - mean - along @ basis.T
    expected = mean + (along * shrink(variances)) @ basis.T + across * shrink(rest)
    torch.testing.assert_close(start.flatten(1).double(), expected, rtol=0, atol=1e-3)
    pictures = fewstep.sample(model, nfe=4, seeds=SEEDS, head_start=20.0)
    assert pictures.provenance["head_start"] == 20.0


def test_half_precision_networks_keep_a_float32_state() -> None:
    half = load_folder(BUILTIN / "fashion-mnist", dtype="bfloat16")
    assert (half.dtype, half.net.frequencies.dtype) == (torch.bfloat16, torch.float32)
    x = fewstep.solve(half.denoiser(), half.prior((0, 1)), "dpmpp-2m", 3)
    assert x.dtype == torch.float32
    full = load_folder(BUILTIN / "fashion-mnist")
    reference = fewstep.solve(full.denoiser(), full.prior((0, 1)), "dpmpp-2m", 3)
    assert (x - reference).square().mean().sqrt() < 0.05


def test_auto_takes_the_best_that_the_card_knows(model: NetworkModel) -> None:
    entries = {
        "3": {"solver": "ipndm-2", "grid": "log-snr", "afs": "mean"},
        "6": {"solver": "heun"},
    }
    knowing = replace(model, card=replace(model.card, auto=entries))

    def chosen(nfe: int, **more: Any) -> tuple[str, str, str]:
        made = fewstep.sample(knowing, solver="auto", nfe=nfe, seeds=[0], **more).provenance
        return made["solver"], made["grid"], made["afs"]

    assert chosen(2) == ("dpmpp-2m", "karras", "none")  # nothing known that low
    assert chosen(3) == chosen(5) == ("ipndm-2", "log-snr", "mean")
    assert chosen(3, grid="karras", afs="none") == ("ipndm-2", "karras", "none")
    assert chosen(6) == ("heun", "karras", "none")
    assert chosen(7) == ("dpmpp-2m", "karras", "none")  # heun cannot spend 7


def test_a_folder_with_a_name_that_comes_with_the_model_is_told_of(
    model: NetworkModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    comes = model.card.shipped("tuned")
    assert comes is not None
    shutil.copytree(comes / "4", "tuned")
    with pytest.warns(UserWarning, match="folder of that name here is ./tuned"):
        theirs: Any = locate(model, "tuned", 5)
    ours: Any = locate(model, "./tuned", 4)
    assert (theirs.nfe, ours.nfe) == (5, 4)
    Path("empty").mkdir()
    with pytest.raises(ValueError, match="empty is not a learned solver"):
        locate(model, "empty", 4)


def test_the_shipped_card_knows_every_small_budget(model: NetworkModel) -> None:
    assert set(map(str, range(1, 9))) <= set(model.card.auto)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "dpmp-2m"}, "dpmpp-2m"),
        ({"solver": "heun", "nfe": 5, "afs": "none"}, "4, 6"),
        ({"grid": "karass"}, "karras"),
        ({"grid": [80.0, 1.0, 2.0]}, "decreas"),
        ({"label": "hat"}, "boot"),
        ({"label": 10}, "boot"),
        ({"label": [1, 2, 3]}, "one per seed"),
        ({"guidance": 2.0}, "label"),
        ({"prompt": "a boot"}, "label"),
        ({"seeds": []}, "seeds"),
        ({"afs": "maen"}, "mean"),
        ({"solver": "ddim-eta", "afs": "zero"}, "stochastic"),
        ({"solver": "ddim-eta:sigma=2"}, "eta"),
        ({"solver": "ddim-eta:eta=x"}, "key=number"),
        ({"head_start": 100.0}, "head_start"),
    ],
)
def test_bad_arguments_say_what_to_do(model: Model, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fewstep.sample(model, **{"seeds": [0], **arguments})


def test_unknown_model_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="fashion-mnist"):
        fewstep.load("fashion-mnits")


def test_nan_from_the_network_names_step_and_seeds(model: NetworkModel) -> None:
    class Broken:
        """The model, but its network answers NaN for the second picture once sigma is below 10."""

        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

        def denoiser(self, *arguments: Any) -> Any:
            inner = model.denoiser(*arguments)

            def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
                out = inner(x, sigma)
                out[1:] *= torch.nan if sigma[0] < 10 else 1.0
                return out

            return denoise

    with pytest.raises(FloatingPointError, match=r"step 3, .* seeds 7;"):
        fewstep.sample(Broken(), solver="dpmpp-2m", nfe=5, seeds=[6, 7])  # type: ignore[arg-type]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BUILTIN / "fashion-mnist", tmp_path / "model"))


def test_a_folder_loads_by_path(copy: Path, model: NetworkModel) -> None:
    theirs = fewstep.load(copy)
    a = fewstep.sample(theirs, nfe=3, seeds=[5]).images
    np.testing.assert_array_equal(a, fewstep.sample(model, nfe=3, seeds=[5]).images)


@pytest.mark.parametrize("damage", ["cut", "swapped", "pickle", "no card", "foreign card", "newer"])
def test_damaged_and_foreign_folders_are_refused(copy: Path, damage: str) -> None:
    weights, card = copy / "model.safetensors", copy / "card.json"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:100_000])
    elif damage == "swapped":
        weights.write_bytes(safetensors.torch.save({"a": torch.zeros(3)}))
        fields = json.loads(card.read_text())
        card.write_text(json.dumps({**fields, "weights_sha256": ""}))
    elif damage == "pickle":
        torch.save({"a": torch.zeros(3)}, weights)
    elif damage == "no card":
        card.unlink()
    elif damage == "foreign card":
        card.write_text('{"model_type": "unet"}')
    else:
        card.write_text(card.read_text().replace("fewstep-model/1", "fewstep-model/2"))
    with pytest.raises(ValueError, match=r"model\.safetensors|card\.json|card") as caught:
        fewstep.load(copy)
    assert "\n" not in str(caught.value)


def test_the_loop_reads_no_value_off_a_tensor() -> None:
    """On the meta device nothing has a value, so a host sync would raise."""
    x_T = torch.empty(2, 1, 8, 8, device="meta")
    for name in fewstep.solvers(stochastic=False):
        nfe = {"dpm-solver-3": 6}.get(name, 4)
        out = fewstep.solve(lambda x, sigma: x * 0.5, x_T, name, nfe)
        assert out.device.type == "meta"
