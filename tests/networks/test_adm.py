"""The ADM U-Net against its published layout computed once more, for all its settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.models.adm import Classifier
from fewstep.models.formats.adm import open_source
from fewstep.networks.adm import Transformer, cast_torso, time_waves
from fewstep.networks.adm_config import ADMConfig
from tests.support.adm_files import forward, tensors

SMALL: dict[str, Any] = {"num_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1}
SMALL |= {"attention": [1], "head_width": 16}
GD = {**SMALL, "outputs": 6, "noise_schedule": "linear"}
CASES: dict[str, dict[str, Any]] = {
    "guided, legacy order": {**GD, "legacy": True},
    "guided, new order, classes": {**GD, "legacy": False, "num_classes": 7},
    "two blocks, three levels": {
        **GD,
        "legacy": True,
        "num_res_blocks": 2,
        "channel_mult": [1, 2, 1],
        "attention": [1, 2],
        "head_width": 32,
    },
    "first level narrower than the embedding": {
        **GD,
        "legacy": True,
        "num_channels": 64,
        "channel_mult": [0.5, 1],
    },
    "attention in the middle alone": {**GD, "legacy": True, "attention": []},
    "one level": {**GD, "legacy": False, "channel_mult": [1], "attention": []},
    "consistency": {**SMALL, "legacy": False, "four_dimensions": True},
    "consistency, added embedding": {
        **SMALL,
        "legacy": False,
        "four_dimensions": True,
        "use_scale_shift_norm": False,
        "channel_mult": [2, 1],
    },
}


def config_of(s: dict[str, Any]) -> dict[str, Any]:
    """What a user has to say beside such a file."""
    said = {"num_head_channels": s["head_width"]}
    if s.get("four_dimensions"):
        return {**said, "distillation": False}
    return {**said, "noise_schedule": "linear", "use_new_attention_order": not s["legacy"]}


def network(folder: Path, weights: dict[str, Tensor], config: dict[str, Any]) -> Any:
    """The raw network of a file with these weights."""
    torch.save(weights, folder / "x.pt")
    return open_source(folder / "x.pt", config=config).model().net


def classifier_of(folder: Path, weights: dict[str, Tensor]) -> Classifier:
    """The classifier of a file with these weights, beside a network of 8 pixels."""
    torch.save(weights, folder / "c.pt")
    s = {**GD, "legacy": True}
    torch.save(tensors(s), folder / "x.pt")
    config = {**config_of(s), "image_size": 8, "classifier_num_head_channels": 16}
    model = open_source(folder / "x.pt", config=config, classifier=folder / "c.pt").model()
    assert isinstance(model.classifier, Classifier)
    return model.classifier


def drawn(s: dict[str, Any], size: int = 8) -> tuple[torch.Tensor, ...]:
    gen = torch.Generator().manual_seed(1)
    x = torch.randn(3, 3, size, size, generator=gen)
    label = torch.tensor([0, 3, 6]) if s.get("num_classes") else None
    return x, torch.tensor([0.0, 417.3, 999.0]), label  # type: ignore[return-value]


def gap(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_raw_output_is_that_of_the_published_layout(tmp_path, name):
    s = CASES[name]
    weights = tensors(s)
    net = network(tmp_path, weights, config_of(s))
    x, t, label = drawn(s)
    assert gap(net(x, t, label), forward(weights, s, x, t, label)) < 2e-5  # float32


@torch.no_grad()
def test_another_order_of_the_rows_is_another_network(tmp_path):
    s = CASES["guided, legacy order"]
    weights, (x, t, _) = tensors(s), drawn(s)
    config = {**config_of(s), "use_new_attention_order": True}
    wrong = network(tmp_path, weights, config)(x, t)
    assert gap(wrong, forward(weights, s, x, t)) > 0.01


@torch.no_grad()
def test_convolutions_instead_of_blocks_halve_and_double(tmp_path):
    s = {**SMALL, "resblock_updown": False, "use_scale_shift_norm": False, "legacy": True}
    weights, (x, t, _) = tensors(s), drawn(s)
    config = {**config_of(s), "use_new_attention_order": False}
    net = network(tmp_path, weights, config)
    assert not net.config.resample_blocks
    assert not net.config.scale_shift
    assert gap(net(x, t), forward(weights, s, x, t)) < 2e-5


@torch.no_grad()
def test_the_classifier_pools_by_attention(tmp_path):
    s = {**SMALL, "legacy": True, "pooled": 5, "image_size": 8, "num_res_blocks": 2}
    weights, (x, t, _) = tensors(s), drawn(s)
    classifier = classifier_of(tmp_path, weights)
    assert classifier.net.config.blocks == 2
    assert gap(classifier.net(x, t), forward(weights, s, x, t)) < 2e-5


def test_a_classifier_that_halves_by_convolutions(tmp_path):
    s = {**SMALL, "legacy": True, "pooled": 5, "image_size": 8, "resblock_updown": False}
    weights, (x, t, _) = tensors(s), drawn(s)
    classifier = classifier_of(tmp_path, weights)
    with torch.no_grad():
        assert gap(classifier.net(x, t), forward(weights, s, x, t)) < 2e-5


def test_the_gradient_of_the_classifier_is_that_of_log_p_in_edm_units(tmp_path):
    s = {**SMALL, "legacy": True, "pooled": 5, "image_size": 8, "num_res_blocks": 2}
    weights = tensors(s)
    classifier = classifier_of(tmp_path, weights)
    x, label = 2 * drawn(s)[0], torch.tensor([0, 1, 4])
    sigma = torch.tensor([0.5, 3.0, 20.0])
    found = classifier.gradient(x, sigma, label)
    moved = x.double().requires_grad_()
    wide = {name: value.double() for name, value in weights.items()}
    alpha = torch.rsqrt(1 + sigma.double() ** 2)[:, None, None, None]
    t = classifier.schedule.t(sigma.double())
    logits = forward(wide, s, moved * alpha, t)
    logits.log_softmax(-1)[range(3), label].sum().backward()
    assert moved.grad is not None
    assert gap(found.double(), moved.grad) < 2e-4  # float32 against float64


@torch.no_grad()
def test_a_transformer_is_that_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.Transformer2DModel(
        4, 16, in_channels=64, num_layers=2, cross_attention_dim=24, norm_num_groups=32
    ).eval()
    for value in theirs.parameters():
        value.copy_(torch.randn_like(value) / max(1, value[0].numel()) ** 0.5)
    ours = Transformer(64, 24, 4, 2)
    weights = {
        name: value.flatten(1) if name in ("proj_in.weight", "proj_out.weight") else value
        for name, value in theirs.state_dict().items()
    }
    ours.load_state_dict(weights)
    x, context = torch.randn(2, 64, 4, 4), torch.randn(2, 3, 24)
    expected = theirs(x, encoder_hidden_states=context, return_dict=False)[0]
    assert gap(ours(x, x, context), expected) < 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_casts_the_torso_and_keeps_embeddings_and_ends(tmp_path, dtype):
    s = CASES["guided, new order, classes"]
    weights, (x, t, label) = tensors(s), drawn(s)
    net = network(tmp_path, weights, config_of(s))
    expected = net(x, t, label)
    cast_torso(net, dtype)
    assert next(net.parameters()).dtype == dtype
    kept = {p.dtype for part in ("time_embed", "out") for p in getattr(net, part).parameters()}
    assert kept == {torch.float32}
    out = net(x, t, label)
    assert out.dtype == torch.float32
    assert 0 < gap(out, expected) < 0.05  # 8 bits of bfloat16


def test_waves_are_cosines_then_sines_divided_by_half():
    waves = time_waves(torch.tensor([1.0]), 8)
    assert waves[0, 0] == torch.cos(torch.tensor(1.0))
    torch.testing.assert_close(waves[0, 5], torch.sin(torch.tensor(10_000.0**-0.25)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": (30,)}, "widths must be multiples of 32"),
        ({"head_width": 24}, "does not divide"),
        ({"heads": 2}, "give heads or head_width"),
        ({"size": 7, "widths": (32, 32)}, "size must be a multiple of 2"),
        ({"attention": (3,)}, "attention must name levels"),
        ({"blocks": 0}, "blocks must be an integer"),
        ({"width": 31}, "width must be even"),
    ],
)
def test_a_configuration_that_no_network_has_is_refused(change, message):
    plain = {"size": 8, "width": 32, "widths": (32,), "blocks": 1, "head_width": 16}
    with pytest.raises(ValueError, match=message):
        ADMConfig(**{**plain, **change})
