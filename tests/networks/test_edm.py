"""The networks of EDM and EDM2, read from files in their format, against plain references."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import fewstep
from fewstep.denoiser import calls_per_eval
from fewstep.models.edm_spec import tap
from fewstep.networks.edm2 import EDM2UNet
from fewstep.networks.edm_config import EDMConfig
from fewstep.networks.preconditioning import IDDPM, VE, VP
from tests.support.edm_files import Reference, write_edm, write_edm2

SONG: dict[str, Any] = {"model_type": "SongUNet"}
NCSN: dict[str, Any] = {"embedding_type": "fourier", "channel_mult_noise": 2}
DHARIWAL: dict[str, Any] = {"model_type": "DhariwalUNet", "model_channels": 64}
SKIPS: dict[str, Any] = {"encoder_type": "skip", "decoder_type": "skip"}
VARIANTS: dict[str, dict[str, Any]] = {
    "ddpmpp": {},
    "ddpmpp with classes": {"label_dim": 4, "augment_dim": 9},
    "three levels": {"channel_mult": [2, 1, 3], "num_blocks": 2, "attn_resolutions": [8, 2]},
    "no attention": {"attn_resolutions": []},
    "no blocks": {"num_blocks": 0},
    "wider embedding": {"channel_mult_emb": 2, "channel_mult_noise": 3, "img_channels": 1},
    "smooth filter": {"resample_filter": [1, 3, 3, 1]},
    "skew filter": {"resample_filter": [1, 2, 4, 1]},
    "ncsnpp": {**NCSN, "encoder_type": "residual", "resample_filter": [1, 3, 3, 1]},
    "ncsnpp box": {**NCSN, "encoder_type": "residual", "label_dim": 3},
    "skips": {**NCSN, **SKIPS},
    "skips smooth": {
        "encoder_type": "skip",
        "decoder_type": "skip",
        "resample_filter": [1, 3, 3, 1],
    },
    "dhariwal": {**DHARIWAL, "label_dim": 5},
    "dhariwal of two heads": {**DHARIWAL, "channel_mult": [1, 2], "attn_resolutions": [8, 4]},
    "dhariwal without heads": {**DHARIWAL, "model_channels": 32, "channel_mult": [1, 1]},
}
PRECONDITIONS: dict[str, dict[str, Any]] = {
    "VPPrecond": {"beta_d": 12.0},
    "VEPrecond": {},
    "iDDPMPrecond": {"M": 6, "C_1": 0.001},
    "EDMPrecond": {"sigma_data": 1.5},
}


def inputs(model: Any, count: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, *model.shape, generator=generator), torch.tensor([0.7, 3.0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_raw_network_is_its_reference(variant: str, tmp_path: Path) -> None:
    path, weights, settings = write_edm(tmp_path / "a.pkl", **VARIANTS[variant])
    model: Any = fewstep.load(path)
    x, level = inputs(model)
    classes = settings.get("label_dim", 0)
    label = torch.tensor([1, classes])
    one_hot = torch.eye(classes + 1)[label][:, :-1] if classes else None
    with torch.no_grad():
        raw = model.net(x, level, label)
        wanted = Reference(weights, settings | {"model_type": model.net.config.model_type})(
            x.double(), level.double(), None if one_hot is None else one_hot.double()
        )
    # float32 against float64
    torch.testing.assert_close(raw.double(), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("outer", PRECONDITIONS)
def test_a_denoiser_is_by_the_table_of_the_paper(outer: str, tmp_path: Path) -> None:
    given = PRECONDITIONS[outer]
    path, weights, settings = write_edm(tmp_path / "a.pkl", outer, **given)
    model: Any = fewstep.load(path)
    x, sigma = inputs(model)
    reference = Reference(weights, {**settings, "model_type": "SongUNet"})
    s, sd = sigma.double()[:, None, None, None], given.get("sigma_data", 0.5)
    if outer == "EDMPrecond":
        c_skip, c_out = sd**2 / (s**2 + sd**2), s * sd / (s**2 + sd**2).sqrt()
        c_in, noise = 1 / (s**2 + sd**2).sqrt(), sigma.double().log() / 4
    elif outer == "VPPrecond":
        # sigma^2 + 1 = exp(b_d t^2 / 2 + b_min t), solved for t by the quadratic formula
        a, b, c = 12.0 / 2, 0.1, -(sigma.double() ** 2 + 1).log()
        c_skip, c_out, c_in = 1.0, -s, 1 / (s**2 + 1).sqrt()
        noise = 999 * (-b + (b**2 - 4 * a * c).sqrt()) / (2 * a)
    elif outer == "VEPrecond":
        c_skip, c_out, c_in, noise = 1.0, s, 1.0, (sigma.double() / 2).log()
    else:  # the table is 80 20 5 1 0.1 0.01 0: 0.7 is nearest to 1, 3 to 5
        c_skip, c_out, c_in = 1.0, -s, 1 / (s**2 + 1).sqrt()
        noise = torch.tensor([5.0 - 3, 5 - 2]).double()
    with torch.no_grad():
        raw = reference(c_in * x.double(), noise)[:, :3]
        found = model.denoiser()(x, sigma)
    wanted = c_skip * x + c_out * raw
    atol = 1e-5 * float(wanted.abs().max())
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=atol)


def test_the_ranges_of_levels(tmp_path: Path) -> None:
    ends = {}
    for outer in PRECONDITIONS:
        card = fewstep.load(write_edm(tmp_path / f"{outer}.pkl", outer, M=6)[0]).card
        ends[outer] = card.sigma_min, card.sigma_max
    assert ends["EDMPrecond"] == (0.002, 80.0)
    assert ends["VEPrecond"] == (0.02, 80.0)
    assert ends["iDDPMPrecond"] == (pytest.approx(0.01), 80.0)  # float32 in the file
    assert ends["VPPrecond"] == (0.002, 80.0)


def magnitude_preserving(w: dict[str, torch.Tensor], s: dict[str, Any], x: Any, level: Any) -> Any:
    """The raw network of EDM2 without classes and with one block a level, in float64."""
    w = {name: value.double() for name, value in w.items()}

    def conv(name: str, x: torch.Tensor, gain: Any = 1.0) -> torch.Tensor:
        rows = w[f"{name}.weight"]
        flat = rows.flatten(1)
        flat = flat / (1e-4 + flat.square().mean(1, keepdim=True).sqrt())
        rows = (flat * gain / math.sqrt(flat.shape[1])).reshape(rows.shape)
        if rows.ndim == 2:
            return x @ rows.T
        return torch.nn.functional.conv2d(x, rows, padding=rows.shape[-1] // 2)

    def silu(x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(x) / 0.596

    def mix(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
        return ((1 - t) * a + t * b) / math.hypot(1 - t, t)

    def unit(x: torch.Tensor, dim: int) -> torch.Tensor:
        return x / (1e-4 + x.square().mean(dim, keepdim=True).sqrt())

    def block(name: str, x: torch.Tensor, encoder: bool) -> torch.Tensor:
        if name.endswith("_down"):
            x = x.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))
        if name.endswith("_up"):
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        skip = f"{name}.conv_skip.weight" in w
        if encoder:
            x = unit(conv(f"{name}.conv_skip", x) if skip else x, 1)
        y = conv(f"{name}.conv_res0", silu(x))
        told = 1 + conv(f"{name}.emb_linear", emb, w[f"{name}.emb_gain"])
        y = conv(f"{name}.conv_res1", silu(y * told[:, :, None, None]))
        x = mix(conv(f"{name}.conv_skip", x) if skip and not encoder else x, y, 0.3)
        if f"{name}.attn_qkv.weight" in w:
            b, c, h, wide = x.shape
            heads = c // s["channels_per_head"]
            y = conv(f"{name}.attn_qkv", x).reshape(b, heads, c // heads, 3, h * wide)
            q, k, v = unit(y, 2).unbind(3)
            share = (q.mT @ k / math.sqrt(c // heads)).softmax(-1)
            x = mix(x, conv(f"{name}.attn_proj", (v @ share.mT).reshape(x.shape)), 0.3)
        return x.clamp(-256, 256)

    emb = (
        math.sqrt(2)
        * (torch.outer(level, w["unet.emb_fourier.freqs"]) + w["unet.emb_fourier.phases"]).cos()
    )
    emb = silu(conv("unet.emb_noise", emb))
    x = torch.cat((x, torch.ones_like(x[:, :1])), 1)
    skips = []
    names = list(dict.fromkeys(n.split(".")[2] for n in w if n.startswith("unet.enc.")))
    for name in names:
        conv_only = name.endswith("_conv")
        x = conv(f"unet.enc.{name}", x) if conv_only else block(f"unet.enc.{name}", x, True)
        skips.append(x)
    for name in dict.fromkeys(n.split(".")[2] for n in w if n.startswith("unet.dec.")):
        if "_block" in name:
            a, b = x, skips.pop()
            total = math.sqrt((a.shape[1] + b.shape[1]) / 0.5) / 2
            x = torch.cat((a * total / a.shape[1] ** 0.5, b * total / b.shape[1] ** 0.5), 1)
        x = block(f"unet.dec.{name}", x, False)
    return conv("unet.out_conv", x, w["unet.out_gain"])


@pytest.mark.parametrize("settings", [{}, {"channel_mult": [1, 2, 1], "attn_resolutions": [2, 8]}])
def test_a_magnitude_preserving_network_is_its_reference(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    path, weights, own = write_edm2(tmp_path / "a.pkl", **settings)
    model: Any = fewstep.load(path)
    x, level = inputs(model)
    with torch.no_grad():
        raw = model.net(x, level, torch.zeros(2, dtype=torch.long))
    wanted = magnitude_preserving(weights, own, x.double(), level.double())
    torch.testing.assert_close(raw.double(), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_weights_that_were_readied_come_back(tmp_path: Path) -> None:
    weights = write_edm2(tmp_path / "net.pkl")[1]
    model: Any = fewstep.load(tmp_path / "net.pkl")
    net = model.net
    assert isinstance(net, EDM2UNet)
    ready = {name: value.clone() for name, value in net.state_dict().items()}
    for name, value in net.restore().state_dict().items():
        torch.testing.assert_close(value, weights[name].float(), rtol=1e-6, atol=0)
    for name, value in net.prepare(torch.float32).state_dict().items():
        torch.testing.assert_close(value, ready[name], rtol=1e-6, atol=0)


def test_guidance_by_a_second_network(tmp_path: Path) -> None:
    path = write_edm2(tmp_path / "a.pkl", label_dim=3)[0]
    plain = write_edm2(tmp_path / "b.pkl", seed=1, model_channels=16)[0]
    weak = write_edm2(tmp_path / "c.pkl", seed=2, label_dim=3)[0]
    for other in (plain, weak):
        model, guide = fewstep.load(path, guide=other), fewstep.load(other)
        x, sigma = inputs(model)
        with torch.no_grad():
            d = fewstep.load(path).denoiser(2)(x, sigma)
            ref = guide.denoiser(2 if guide.card.classes else None)(x, sigma)
            found = model.denoiser(2, guidance=1.5)(x, sigma)
            assert torch.equal(model.denoiser(2)(x, sigma), d)
            assert torch.equal(model.denoiser(2, guidance=0)(x, sigma), ref)
        counts = {by: calls_per_eval(model.denoiser(2, guidance=by)) for by in (0, 1, 1.5)}
        assert counts == {0: 1, 1: 1, 1.5: 2}
        torch.testing.assert_close(found, ref + 1.5 * (d - ref), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["song", "dhariwal", "edm2"])
def test_half_precision_is_near(kind: str, dtype: str, tmp_path: Path) -> None:
    if kind == "edm2":
        path = write_edm2(tmp_path / "a.pkl")[0]
    else:
        path = write_edm(tmp_path / "a.pkl", **(DHARIWAL if kind == "dhariwal" else SONG))[0]
    whole, half = fewstep.load(path), fewstep.load(path, dtype=dtype)
    x, sigma = inputs(whole)
    with torch.no_grad():
        a, b = whole.denoiser()(x, sigma), half.denoiser()(x, sigma)
    assert half.dtype is getattr(torch, dtype)
    assert b.dtype is torch.float32
    assert 0 < (a - b).abs().max() < 0.05 * a.abs().max()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"surprise": 3}, "has the setting 'surprise', which is not known"),
        ({"num_blocks": 10**6}, "num_blocks must be an integer from 0 to 64"),
        ({"channel_mult": [1, 2, 4, 8, 16]}, "img_resolution must be a multiple of"),
        ({"model_type": "Other"}, "model_type must be SongUNet or DhariwalUNet"),
        ({"encoder_type": "x\x1b"}, "encoder_type must have no control characters"),
        ({"encoder_type": "x"}, "encoder_type must be standard or skip or residual"),
        ({"resample_filter": [0, 0]}, "whose sum is not 0"),
        ({"model_channels": "8"}, "model_channels must be an integer"),
        ({"sigma_data": -1.0}, "sigma_data and beta_d must be positive"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    from tests.support import nvlabs

    path = write_edm(tmp_path / "a.pkl")[0]
    given = {"img_resolution": 8, "img_channels": 3, "model_channels": 8, "channel_mult": [1, 2]}
    given |= {"num_blocks": 1, "attn_resolutions": [4], "model_type": "SongUNet", **settings}
    inner = nvlabs.Persistent(given["model_type"], {"_init_args": (), "_init_kwargs": {}})
    state = {"_init_args": (), "_init_kwargs": given, "_modules": {"model": inner}}
    nvlabs.write(path, {"ema": nvlabs.Persistent("EDMPrecond", state)})
    with pytest.raises(ValueError, match=words) as caught:
        fewstep.load(path)
    assert str(caught.value).isprintable()


def test_weights_of_other_shapes_are_refused_by_name(tmp_path: Path) -> None:
    path = write_edm(tmp_path / "a.pkl")[0]
    data = path.read_bytes().replace(b"\x8c\nnum_blocks\x94K\x01", b"\x8c\nnum_blocks\x94K\x02")
    path.write_bytes(data)
    with pytest.raises(ValueError, match="must have shape"):
        fewstep.load(path)


def test_presets_are_held_against_the_file(tmp_path: Path) -> None:
    path = write_edm(tmp_path / "a.pkl")[0]
    with pytest.raises(ValueError, match=r"preset cifar10-ddpmpp says .* has"):
        fewstep.load(path, preset="cifar10-ddpmpp")
    with pytest.raises(ValueError, match="is of edm, and preset edm2-img64-s is not"):
        fewstep.load(path, preset="edm2-img64-s")
    with pytest.raises(ValueError, match=r"no preset .* is called 'cifar'"):
        fewstep.load(path, preset="cifar")


def test_preconditions_are_values() -> None:
    assert VP() == VP(19.9, 0.1, 1000)
    assert VE() == VE()
    assert IDDPM((2.0, 1.0, 0.0)) == IDDPM((2.0, 1.0, 0.0))


@pytest.mark.parametrize(
    ("classes", "blocks", "block"),
    [(0, 4, "block3"), (10, 4, "block2"), (10, 3, "block2"), (0, 2, "block1"), (0, 0, "down")],
)
def test_features_are_of_the_block_that_amed_reads(classes: int, blocks: int, block: str) -> None:
    config = EDMConfig(16, 3, 3, label_dim=classes, num_blocks=blocks, channel_mult=(1, 2))
    assert tap(config) == f"enc.8x8_{block}"
