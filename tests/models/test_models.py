"""Model folders, cards, devices and features: what is refused, and what must come out the same."""

from __future__ import annotations

import hashlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import fewstep
from fewstep.models import BUILTIN, read_card
from fewstep.models.card import Card
from fewstep.models.formats.native import load_folder, save_folder
from fewstep.models.network import NetworkModel
from fewstep.networks.device import check_device
from fewstep.networks.unet import UNet
from fewstep.networks.unet_config import UNetConfig

TINY = UNetConfig(size=8, widths=(16, 16), blocks=1, embedding=16, classes=3)


def statistics() -> dict[str, torch.Tensor]:
    basis = torch.eye(64)[:4].expand(4, 4, 64)
    far_mean, mean = torch.zeros(4, 1, 8, 8), torch.zeros(4, 64)
    variances, rest = torch.ones(4, 4), torch.ones(4)
    return {
        "far_mean": far_mean,
        "mean": mean,
        "basis": basis,
        "variances": variances,
        "rest": rest,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder with random weights, whose card names no hash, so that tests may edit it."""
    torch.manual_seed(0)
    net = UNet(TINY)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    names = ("a", "b", "c")
    card = Card("tiny", {**vars(TINY), "widths": list(TINY.widths)}, classes=names)
    save_folder(tmp_path, card, net, statistics())
    edit(tmp_path, weights_sha256="")
    return tmp_path


def edit(folder: Path, **fields: Any) -> None:
    path = folder / "card.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def load(folder: Path) -> NetworkModel:
    return load_folder(folder)


def test_features_are_the_middle_and_leave_d_as_it_is(folder: Path) -> None:
    model = load(folder)
    x, sigma = model.prior((0, 1)), torch.full((2,), 80.0)
    denoised, features = model.denoiser(label=1).with_features(x, sigma)
    assert torch.equal(denoised, model.denoiser(label=1)(x, sigma))
    seen = []
    model.net.middle.register_forward_hook(lambda module, args, out: seen.append(out))
    model.denoiser(label=1)(x, sigma)
    assert torch.equal(features, seen[0])


def test_threads_on_one_model_get_their_own_features(folder: Path) -> None:
    model = load(folder)
    denoiser = model.denoiser()
    inputs = [(model.prior((i,)), torch.tensor([80.0 / (1 + i)])) for i in range(4)]
    alone = [denoiser.with_features(*one) for one in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            together = pool.map(lambda one: denoiser.with_features(*one), inputs)
            for ours, expected in zip(together, alone, strict=True):
                assert all(map(torch.equal, ours, expected))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_a_compiled_model_gives_the_same_pictures_and_features(folder: Path) -> None:
    plain, compiled = load(folder), load_folder(folder, compile=True)
    x, sigma = plain.prior((0, 1)), torch.full((2,), 3.0)
    theirs = compiled.denoiser(label=2).with_features(x, sigma)
    for ours, other in zip(plain.denoiser(label=2).with_features(x, sigma), theirs, strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=1e-3)  # fused float32 kernels
    ends = [fewstep.solve(m.denoiser(), x, "dpmpp-2m", 3) for m in (plain, compiled)]
    torch.testing.assert_close(*ends, rtol=0, atol=1e-3)


def test_loading_leaves_the_random_state_and_gives_the_weights_of_the_file(folder: Path) -> None:
    before = torch.get_rng_state()
    net = load(folder).net
    assert torch.equal(before, torch.get_rng_state())
    for name, value in safetensors.torch.load_file(folder / "model.safetensors").items():
        if not name.startswith("stats."):
            assert torch.equal(net.state_dict()[name], value.float())
    assert torch.equal(net.frequencies, UNet(TINY).frequencies)
    assert not any(p.requires_grad or p.is_meta for p in net.parameters())


@pytest.mark.parametrize("name", ["far_mean", "mean", "basis", "variances", "rest"])
@pytest.mark.parametrize("damage", ["absent", "another shape", "no shape"])
def test_statistics_that_do_not_go_with_the_card_are_named(
    folder: Path, name: str, damage: str
) -> None:
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    value = tensors.pop(f"stats.{name}")
    if damage != "absent":
        shape = (*value.shape[:-1], value.shape[-1] + 1) if damage == "another shape" else ()
        tensors[f"stats.{name}"] = torch.zeros(shape)
    path.write_bytes(safetensors.torch.save(tensors))
    # a wrong number of variances shows as a wrong basis
    with pytest.raises(ValueError, match=rf"stats\.({name}|basis) must have shape"):
        load(folder)


def test_a_missing_weights_file_is_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        fewstep.load(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "transformer"}, "'transformer', this version knows: unet"),
        ({"auto": {"5": "ddim"}}, "auto.5 must be a table"),
        ({"auto": {"five": {"solver": "ddim"}}}, "auto.five must be keyed by a number"),
        ({"auto": {"5": {"grid": "karras"}}}, "it lacks auto.5.solver"),
        ({"auto": {"5": {"solver": "ddim", "afs": 3}}}, "auto.5.afs must be text, got 3"),
        ({"auto": ["5"]}, "auto must be"),
        ({"classes": "abc"}, "classes must be a list"),
        ({"classes": ["a", "b"]}, "2 class names for 3 classes"),
        ({"name": 3}, "name must be text"),
        ({"sigma_data": 0.0}, "sigma_data"),
        ({"sigma_max": float("inf")}, "must be finite, got Infinity"),
        ({"feature_module": "encoder"}, "feature_module"),
        ({"network": {}}, "does not go with its card"),
        ({"network": {"layers": 3}}, "does not go with its card"),
        ({"network": {"widths": [4096] * 8, "blocks": 64, "size": 4096}}, "go with its card"),
    ],
)
def test_bad_cards_are_one_clear_line(folder: Path, fields: dict, message: str) -> None:
    edit(folder, **fields)
    with pytest.raises(ValueError, match=message) as caught:
        fewstep.load(folder)
    assert "\n" not in str(caught.value)


def test_a_card_needs_neither_kind_nor_network(folder: Path) -> None:
    path = folder / "card.json"
    fields = json.loads(path.read_text())
    del fields["kind"], fields["network"]
    path.write_text(json.dumps({**fields, "auto": {"5": {"solver": "ddim", "afs": "mean"}}}))
    card = read_card(folder)
    assert (card.kind, card.network) == ("unet", {})
    assert read_card(BUILTIN / "fashion-mnist").kind == "unet"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"widths": (16, 208)}, "3 attention heads"),
        ({"widths": ()}, "widths"),
        ({"widths": (16, 24)}, "multiples of 16"),
        ({"widths": (16, 0)}, "widths"),
        ({"widths": (16, -16)}, "widths"),
        ({"widths": (8192,)}, "up to 4096"),
        ({"widths": "64"}, "widths"),
        ({"widths": (16,) * 9}, "1 to 8"),
        ({"blocks": 0}, "blocks"),
        ({"blocks": 65}, "blocks"),
        ({"blocks": 2.0}, "blocks"),
        ({"patch": 0}, "patch"),
        ({"size": 0}, "size"),
        ({"size": 30}, "multiple of 4"),
        ({"channels": 0}, "channels"),
        ({"embedding": 10**9}, "embedding"),
        ({"classes": -1}, "classes"),
        ({"classes": 10**9}, "classes"),
    ],
)
def test_networks_that_cannot_be_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNetConfig(**fields)


def test_208_channels_above_the_attention_are_fine() -> None:
    UNet(UNetConfig(size=8, widths=(208, 16), blocks=1, embedding=16))


@pytest.mark.parametrize("name", ["toaster", "cuda:99", "meta", "hpu", ""])
def test_devices_that_are_not_to_be_had_are_named(folder: Path, name: Any) -> None:
    with pytest.raises(ValueError, match=f"device '{name}' is not available: .") as caught:
        fewstep.load(folder, device=name)
    assert "\n" not in str(caught.value)
    assert check_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("label", [np.int64(2), np.uint8(2), np.array(2), "2", "c"])
def test_one_label_may_be_a_numpy_integer(folder: Path, label: Any) -> None:
    model = load(folder)
    x, sigma = model.prior((0,)), torch.tensor([5.0])
    assert torch.equal(model.denoiser(label)(x, sigma), model.denoiser(2)(x, sigma))
    assert torch.equal(model.denoiser([label])(x, sigma), model.denoiser(2)(x, sigma))


@pytest.mark.parametrize("label", [-1, 3, np.int64(-1), np.int64(3), "²", 1.5])
def test_labels_outside_the_table_say_what_there_is(folder: Path, label: Any) -> None:
    with pytest.raises(ValueError, match="this model has: 0 a, 1 b, 2 c"):
        load(folder).denoiser(label)


@pytest.mark.parametrize("guidance", [-1.0, float("nan"), float("inf")])
def test_guidance_must_be_finite_and_not_negative(folder: Path, guidance: float) -> None:
    with pytest.raises(ValueError, match="guidance must be finite"):
        load(folder).denoiser(1, guidance=guidance)


def test_the_file_of_weights_has_the_bytes_that_safetensors_writes(tmp_path: Path) -> None:
    """So equal weights have equal hashes, whoever wrote them."""
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Conv2d(1, 5, 3))
    mean = torch.randn(3)
    card = save_folder(tmp_path, Card("toy"), net, {"mean": mean})
    values = {**net.state_dict(), "stats.mean": mean}
    wanted = safetensors.torch.save({name: value.half() for name, value in values.items()})
    assert (tmp_path / "model.safetensors").read_bytes() == wanted
    assert card.weights_sha256 == hashlib.sha256(wanted).hexdigest()
