"""A model of one's own network: sampled, compared by features, and learned on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fewstep
from fewstep.denoiser import Predicted
from fewstep.schedule import VP


class Small(nn.Module):
    """D(x, sigma[, label]) of pictures 4x4, with a module to read features from."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(1, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        s = sigma.reshape(-1, 1, 1, 1)
        h = torch.tanh(self.body(x / (1 + s)))
        shift = 0.0 if label is None else 0.1 * label.reshape(-1, 1, 1, 1)
        return x / (1 + s**2) + self.head(h) / (1 + s) + shift


@pytest.fixture
def net() -> Small:
    torch.manual_seed(0)
    return Small().eval().requires_grad_(False)


def test_a_module_is_a_model_by_itself(net: Small) -> None:
    model = fewstep.models.of(net, name="mine", shape=(1, 4, 4), sigma_max=40.0)
    made = fewstep.sample(model, solver="dpmpp-2m", nfe=4, seeds=range(2))
    x = fewstep.solve(net, model.prior(range(2)), "dpmpp-2m", 4, sigma_max=40.0)
    assert made.images.shape == (2, 4, 4, 1)
    assert (made.images == model.decode(x)).all()
    assert model.card.weights_sha256 == fewstep.models.fingerprint({"network": net})


def test_the_hash_changes_with_any_weight(net: Small) -> None:
    before = fewstep.models.fingerprint({"network": net})
    net.head.weight.data.add_(1e-7)
    assert fewstep.models.fingerprint({"network": net}) != before


def test_classes_and_guidance(net: Small) -> None:
    model = fewstep.models.of(net, name="mine", shape=(1, 4, 4), classes=("a", "b"))
    x, sigma = model.prior(range(2)), torch.full((2,), 3.0)
    rows = torch.tensor([1, 1])
    assert torch.equal(model.denoiser("b")(x, sigma), net(x, sigma, rows))
    guided, none = model.denoiser("b", guidance=2.0)(x, sigma), net(x, sigma, rows + 1)
    wanted = none + 2 * (net(x, sigma, rows) - none)
    torch.testing.assert_close(guided, wanted, rtol=0, atol=1e-5)  # sums in another order


def test_features_come_from_any_module(net: Small) -> None:
    model = fewstep.models.of(net, name="mine", shape=(1, 4, 4), feature_module="body")
    x, sigma = model.prior(range(2)), torch.full((2,), 3.0)
    denoised, features = model.denoiser().with_features(x, sigma)
    assert torch.equal(denoised, net(x, sigma))
    assert torch.equal(features, net.body(x / 4.0))
    with pytest.raises(ValueError, match="feature_module 'middle' is not a module"):
        fewstep.models.of(net, name="mine", shape=(1, 4, 4), feature_module="middle")
    with pytest.raises(AttributeError):
        _ = fewstep.models.of(net, name="mine", shape=(1, 4, 4)).denoiser().with_features


def test_a_schedule_of_its_own_gives_its_grids() -> None:
    schedule = VP.linear()
    denoiser = Predicted(lambda x, t: x * 0.1, schedule, "eps")
    model = fewstep.models.of(denoiser, name="mine", shape=(1, 4, 4), schedule=schedule)
    assert (model.card.sigma_max, model.card.grid) == (schedule.sigma_max, "trailing")
    made = fewstep.sample(model, solver="ddim", nfe=3, seeds=[0])
    x = fewstep.solve(denoiser, model.prior([0]), "ddim", 3, grid="trailing", end="zero")
    assert (made.images == model.decode(x)).all()


def test_a_solver_is_learned_on_a_model(net: Small) -> None:
    model = fewstep.models.of(net, name="mine", shape=(1, 4, 4))
    solver = fewstep.learned.train(
        model.denoiser(),
        model.shape,
        nfe=3,
        method="tuned",
        trajectories=4,
        batch=2,
        validation_seeds=2,
        validate_every=1,
        model=model,
    )
    assert solver.model["name"] == "mine"
    assert solver.program().learned_on == model.card.weights_sha256


def test_points_are_samples_and_no_pictures() -> None:
    model = fewstep.models.of(lambda x, sigma: x * 0.5, name="points", shape=(2,))
    x = fewstep.solve(model.denoiser(), model.prior(range(3)), "heun", 4)
    assert x.shape == (3, 2)
    with pytest.raises(ValueError, match="has no pictures"):
        model.decode(x)


def test_sampling_points_is_refused_before_the_network_is_called() -> None:
    def never(x: Tensor, sigma: Tensor) -> Tensor:
        raise AssertionError("it was called")

    model = fewstep.models.of(never, name="points", shape=(2,))
    with pytest.raises(ValueError, match=r"has no pictures.* solve\(model.denoiser"):
        fewstep.sample(model, nfe=2, seeds=[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "../x"}, "name must be letters"),
        ({"shape": ()}, "shape must be positive integers"),
        ({"shape": (1, 0, 4)}, "shape must be positive integers"),
        ({"shape": 2}, "shape must be positive integers"),
        ({"shape": "2"}, "shape must be positive integers"),
        ({"net": "weights.pt"}, "net must be the torch module"),
        ({"sigma_min": 80.0}, "need 0 < sigma_min < sigma_max"),
        ({"far_mean": torch.zeros(3)}, "far_mean must have shape"),
    ],
)
def test_what_does_not_fit_is_refused(net: Small, options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fewstep.models.of(net, **{"name": "mine", "shape": (1, 4, 4), **options})


@pytest.mark.parametrize("denoiser", ["unet.safetensors", None, torch.zeros(2)])
def test_what_cannot_be_called_is_no_denoiser(denoiser: object) -> None:
    with pytest.raises(ValueError, match="denoiser must be callable as"):
        fewstep.models.of(denoiser, name="mine", shape=(2,))  # type: ignore[arg-type]
