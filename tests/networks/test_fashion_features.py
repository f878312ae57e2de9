"""The built-in feature networks: the shipped files, the function they are, and their recipe."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from scipy.linalg import sqrtm
from scipy.ndimage import gaussian_filter
from scipy.special import erf, expit
from torch import Tensor

from fewstep.networks.features import (
    Clamped,
    feature_networks,
    load_feature_folder,
    load_feature_network,
    reference_path,
)
from fewstep.train.order import batch_indices
from recipes.fashion_features import RECIPES, Student, folded, main, vicreg

NAMES = ["fashion-a", "fashion-b"]
ROOT = Path(__file__).parents[2]


def pictures(count: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Float64 pictures [count, 1, 32, 32] in [0, 1] and labels."""
    with np.load(ROOT / "tests/data/fashion-256.npz", allow_pickle=False) as file:
        images, labels = file["images"][:count], file["labels"][:count]
    return np.pad(images, ((0, 0), (2, 2), (2, 2)))[:, None] / 255, labels


def unit(x: np.ndarray) -> Tensor:
    return torch.from_numpy(2 * x - 1).float()


# ---------------------------------------------------------------- the shipped files


def test_the_networks_that_ship():
    assert feature_networks() == [*NAMES, "garments-a", "garments-b"]


@pytest.mark.parametrize("name", NAMES)
def test_cards_hold_for_the_files_beside_them(name):
    folder = reference_path(name).parent
    card = json.loads((folder / "card.json").read_text())
    for key, file in (("weights", "model.safetensors"), ("reference", "reference.npz")):
        assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == card[f"{key}_sha256"]
    net = load_feature_network(name)
    assert (net.name, net.dim) == (card["name"], card["dim"]) == (name, 128)
    assert sum(w.numel() for w in net.trunk.parameters()) == card["parameters"]


def test_the_shipped_networks_stay_small():
    files = [p for name in NAMES for p in reference_path(name).parent.iterdir()]
    assert sum(p.stat().st_size for p in files) < 4e6


@pytest.mark.parametrize("name, least", [("fashion-a", 0.92), ("fashion-b", 0.88)])
def test_accuracy_on_a_stored_sample_is_that_of_the_card(name, least):
    x, labels = pictures()
    net = load_feature_network(name)
    stated = net.card.about["accuracy"]["test"]
    assert stated >= least
    found = (net.logits(unit(x)).argmax(1).numpy() == labels).mean()
    # four standard deviations of a share of 256
    assert abs(found - stated) < 4 * math.sqrt(stated * (1 - stated) / len(x))


@pytest.mark.parametrize("name", NAMES)
def test_reference_statistics_are_of_standardised_features(name):
    with np.load(reference_path(name), allow_pickle=False) as file:
        mu, sigma = file["mu"], file["sigma"]
        assert file["count"] == 60_000
        assert str(file["extractor"]) == load_feature_network(name).full_name
    assert np.abs(mu).max() < 1e-4
    assert np.abs(np.diag(sigma) - 1).max() < 1e-4
    assert np.array_equal(sigma, sigma.T)
    assert np.linalg.eigvalsh(sigma).min() > 0
    f = load_feature_network(name)(unit(pictures()[0])).double().numpy()
    assert np.abs(f.mean(0)).max() < 5 / math.sqrt(len(f))  # five standard errors
    assert 0.8 < f.var(0).mean() < 1.2


def frechet(f: np.ndarray, mu: np.ndarray, sigma: np.ndarray) -> float:
    ours = np.cov(f, rowvar=False)
    cross = np.real(np.asarray(sqrtm(sigma @ ours)))
    return float(((f.mean(0) - mu) ** 2).sum() + np.trace(sigma + ours - 2 * cross))


DISTORTIONS = {
    "blur": ([0.3, 0.5, 0.8, 1.2], lambda x, s, z: gaussian_filter(x, (0, 0, s, s))),
    "noise": ([0.02, 0.05, 0.1], lambda x, s, z: x + s * z),
    "contrast": ([0.1, 0.2, 0.4], lambda x, s, z: (1 - s) * x),
    "grey": ([0.05, 0.1, 0.2], lambda x, s, z: s + (1 - s) * x),
}


@pytest.mark.parametrize("kind", DISTORTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_the_distance_grows_with_every_distortion(name, kind):
    levels, distort = DISTORTIONS[kind]
    x, z = pictures()[0], np.random.default_rng(0).standard_normal((256, 1, 32, 32))
    net = load_feature_network(name)
    with np.load(reference_path(name), allow_pickle=False) as file:
        mu, sigma = file["mu"], file["sigma"]
    distorted = [x, *(distort(x, level, z).clip(0, 1) for level in levels)]
    distances = [frechet(net(unit(y)).double().numpy(), mu, sigma) for y in distorted]
    assert all(np.diff(distances) > 0), distances
    assert distances[-1] > 1.3 * distances[0]


# ---------------------------------------------------------------- the function


def convolved(
    x: np.ndarray, weights: dict[str, np.ndarray], name: str, stride: int = 1
) -> np.ndarray:
    """A convolution [b, c, h, w] by sliding windows."""
    w, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    side = 0 if stride == w.shape[-1] else w.shape[-1] // 2
    x = np.pad(x, ((0, 0), (0, 0), (side, side), (side, side)))
    windows = np.lib.stride_tricks.sliding_window_view(x, w.shape[2:], (2, 3))
    windows = windows[:, :, ::stride, ::stride]  # [b, c, h, w, k, k]
    return np.einsum("bchwij,ocij->bohw", windows, w, optimize=True) + bias[:, None, None]


def by_hand_a(x: np.ndarray, w: dict[str, np.ndarray]) -> np.ndarray:
    def silu(x: np.ndarray) -> np.ndarray:
        return x * expit(x)

    def block(x: np.ndarray, name: str) -> np.ndarray:
        inner = silu(convolved(x, w, f"trunk.layers.{name}.first"))
        return silu(x + convolved(inner, w, f"trunk.layers.{name}.second"))

    def halved(x: np.ndarray) -> np.ndarray:
        return x.reshape(*x.shape[:2], x.shape[2] // 2, 2, x.shape[3] // 2, 2).mean((3, 5))

    x = np.concatenate([x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)], 1)
    x = block(silu(convolved(x, w, "trunk.layers.1")), "3")
    x = block(silu(convolved(halved(x), w, "trunk.layers.5")), "7")
    return block(silu(convolved(halved(x), w, "trunk.layers.9")), "11").mean((2, 3))


def by_hand_b(x: np.ndarray, w: dict[str, np.ndarray]) -> np.ndarray:
    def gelu(x: np.ndarray) -> np.ndarray:
        return x * (1 + erf(x / math.sqrt(2))) / 2

    x = gelu(convolved(x, w, "trunk.layers.0", stride=4))
    for i in (2, 3):
        name = f"trunk.layers.{i}"
        x = x + convolved(gelu(convolved(x, w, f"{name}.first")), w, f"{name}.second")
    x = gelu(convolved(x, w, "trunk.layers.4")).reshape(len(x), -1)  # channels, then places
    return x @ w["trunk.layers.7.weight"].T + w["trunk.layers.7.bias"]


@pytest.mark.parametrize("name, by_hand", [("fashion-a", by_hand_a), ("fashion-b", by_hand_b)])
def test_features_equal_a_forward_pass_by_hand(name, by_hand):
    x = 2 * pictures(3)[0] - 1
    path = reference_path(name).parent / "model.safetensors"
    w = {n: v.astype(np.float64) for n, v in safetensors.numpy.load_file(path).items()}
    theirs = (by_hand(x, w) - w["shift"]) * w["scale"]
    ours = load_feature_network(name).double()(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)
    theirs = theirs @ w["head.weight"].T + w["head.bias"]
    ours = load_feature_network(name).double().logits(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_features_do_not_depend_on_the_batch_or_the_mode(name):
    x = unit(pictures(9)[0])
    net = load_feature_network(name)
    together = net(x)
    assert torch.equal(together, net(x))
    assert torch.equal(together, net.train()(x))
    alone = torch.cat([net(one) for one in x.split(1)])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-4)  # float32 sums, reordered


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_in_x_is_the_slope(name):
    net = load_feature_network(name).double()
    assert not any(w.requires_grad for w in net.parameters())
    gen = torch.Generator().manual_seed(0)
    x = unit(pictures(2)[0]).double().requires_grad_()
    towards = torch.randn(x.shape, generator=gen, dtype=x.dtype)
    mix = torch.randn(net.dim, generator=gen, dtype=x.dtype)
    (gradient,) = torch.autograd.grad((net(x) @ mix).sum(), x)
    with torch.no_grad():
        h = 1e-5
        slope = ((net(x + h * towards) - net(x - h * towards)) @ mix).sum() / (2 * h)
    assert gradient.isfinite().all()
    torch.testing.assert_close((gradient * towards).sum(), slope, rtol=1e-6, atol=1e-6)


def test_a_loss_sees_of_endpoints_what_a_picture_shows():
    net, x = load_feature_network("fashion-a"), 1.5 * unit(pictures(4)[0])
    inside = x.abs() <= 1
    assert 0.05 < inside.float().mean() < 0.95  # both kinds of pixel are there
    x.requires_grad_()
    seen = Clamped(net)(x)
    assert torch.equal(seen, net(torch.from_numpy(np.clip(x.detach().numpy(), -1, 1))))
    assert Clamped(net).name == "fashion-a"
    seen.square().sum().backward()
    assert x.grad is not None
    assert x.grad[inside].abs().sum() > 0
    assert not x.grad[~inside].any()


@pytest.mark.parametrize(
    "x",
    [torch.zeros(1, 1, 32, 32, dtype=torch.uint8), torch.zeros(1, 1, 28, 28), torch.zeros(32, 32)],
)
def test_pictures_of_another_kind_are_refused(x):
    with pytest.raises(ValueError, match=r"fashion-a takes float pictures \[n, 1, 32, 32\]"):
        load_feature_network("fashion-a")(x)


# ---------------------------------------------------------------- damaged folders


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="there is no feature network 'fashion-c'; there are: fa"):
        load_feature_network("fashion-c")


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(reference_path("fashion-a").parent, tmp_path / "copy"))


def test_changed_weights_are_refused(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="SHA-256 differs"):
        load_feature_folder(folder)


def test_missing_weights_are_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        load_feature_folder(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format": "fewstep-features/9"}, "update fewstep"),
        ({"network": {"kind": "transformer"}}, "kind must be one of residual, patches"),
        ({"network": {"kind": "residual", "widths": [8, 8], "blocks": 1}}, "does not go with"),
        ({"network": {"kind": "residual", "depth": 3}}, "does not go with"),
        ({"network": 3}, "not a card"),
    ],
)
def test_a_card_of_another_network_is_refused(folder, change, message):
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps({**card, **change}))
    with pytest.raises(ValueError, match=message):
        load_feature_folder(folder)


# ---------------------------------------------------------------- the recipe


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The stored sample as a folder of idx files: 192 pictures to train, 64 to test."""
    folder = tmp_path_factory.mktemp("data")
    with np.load(ROOT / "tests/data/fashion-256.npz", allow_pickle=False) as file:
        images, labels = file["images"], file["labels"]
    for prefix, part in (("train", slice(0, 192)), ("t10k", slice(192, 256))):
        for kind, array in (("images-idx3", images[part]), ("labels-idx1", labels[part])):
            header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            (folder / f"{prefix}-{kind}-ubyte").write_bytes(header + array.tobytes())
    return folder


def arguments(data: Path, out: Path, network: str = "a", *more: object) -> list[str]:
    size = ["--pictures", "320", "--batch", "16", "--checkpoint-every", "1"]
    given = ["--data", data, "--network", network, "--out", out, *size, *more]
    return [str(a) for a in given]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("network", ["a", "b"])
def test_folding_the_norms_changes_nothing(network):
    from fewstep.networks.features import make_trunk

    net = Student(RECIPES[network])
    x = unit(pictures(32)[0])
    net.train()
    for _ in range(3):  # so that the norms have seen something
        net.trunk(x)
    with torch.no_grad():
        for norm in (m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-0.5, 0.5)
        plain = make_trunk(RECIPES[network].network).double()
        plain.load_state_dict(folded(net.trunk.state_dict()))
        theirs = net.eval().trunk.double()
        torch.testing.assert_close(plain(x.double()), theirs(x.double()), rtol=0, atol=1e-12)


def test_vicreg_equals_its_definition():
    rng = np.random.default_rng(0)
    z = rng.standard_normal((2, 7, 5))
    expected = 25 * ((z[0] - z[1]) ** 2).mean()
    for part in z:
        cov = np.cov(part, rowvar=False)
        for i in range(5):
            expected += 12.5 * max(0.0, 1 - math.sqrt(part[:, i].var(ddof=1) + 1e-4)) / 5
            expected += sum(cov[i, j] ** 2 for j in range(5) if j != i) / 5
    ours = vicreg(*torch.from_numpy(z))
    assert math.isclose(ours.item(), expected, rel_tol=1e-12)


def test_an_epoch_sees_every_picture_once():
    first, second = (
        torch.cat([batch_indices(66, 8, 0, 8 * epoch + i, whole=True) for i in range(8)])
        for epoch in (0, 1)
    )
    assert len(set(first.tolist())) == len(set(second.tolist())) == 64
    assert first.tolist() != second.tolist()


@pytest.mark.parametrize(
    "more, message",
    [
        (["--batch", "500"], "batch must be at most the 192 pictures, got 500"),
        (["--pictures", "0"], "pictures must be positive"),
        (["--checkpoint-every", "0"], "checkpoint-every must be positive, got 0"),
        (["--data", "/nowhere"], "/nowhere has no train-images-idx3-ubyte"),
    ],
)
def test_bad_input_is_one_line(more, message, data, tmp_path, capsys):
    assert main([*arguments(data, tmp_path / "out"), *more]) == 2
    captured = capsys.readouterr().err
    assert message in captured
    assert captured.count("\n") == 1


def test_a_checkpoint_of_another_run_is_refused(data, tmp_path, capsys):
    short = ["--pictures", "16"]
    assert main([*arguments(data, tmp_path), *short]) == 0
    assert main([*arguments(data, tmp_path), *short, "--seed", "1"]) == 2
    assert "seed=0 (now 1)" in capsys.readouterr().err
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert main([*arguments(data, tmp_path), *short]) == 2
    assert "remove it to start again" in capsys.readouterr().err
