"""Files of the ADM family as models: what they are, their D, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

import fewstep
from fewstep.cli.run import run
from fewstep.models.adm import Classifier
from fewstep.models.adm_spec import card_of, spec_of
from fewstep.models.card import Card
from fewstep.models.formats.adm import examine, open_source
from fewstep.models.formats.adm_settings import PRESETS, of_shapes, read_config
from fewstep.models.formats.contents import recognise
from fewstep.networks.adm_config import AutoencoderConfig
from fewstep.networks.autoencoder import Autoencoder
from tests.networks.test_adm import GD, SMALL, drawn, gap
from tests.support.adm_files import forward, tensors

CM = {**SMALL, "legacy": False, "four_dimensions": True}
GUIDED = {**GD, "legacy": True}
SAID = {"num_head_channels": 16, "noise_schedule": "linear", "use_new_attention_order": False}
TEACHER = {"num_head_channels": 16, "distillation": False}


def saved(path: Path, weights: dict[str, Tensor]) -> Path:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file({n: t.contiguous() for n, t in weights.items()}, path)
    else:
        torch.save(weights, path)
    return path


def refused(path: Path, match: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        fewstep.load(path, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@torch.no_grad()
def test_d_of_guided_diffusion_is_x_minus_sigma_eps_of_the_first_channels(
    tmp_path, ending, schedule
):
    weights = tensors(GUIDED)
    path = saved(tmp_path / f"x{ending}", weights)
    model: Any = fewstep.load(path, config={**SAID, "noise_schedule": schedule})
    t, gen = torch.tensor([3, 400, 900]), torch.Generator().manual_seed(0)
    sigma = torch.tensor(model.schedule.sigmas, dtype=torch.float64)[t].float()
    root = torch.sqrt(1 + sigma**2)[:, None, None, None]
    x = root * torch.randn(3, 3, 16, 16, generator=gen)
    eps = forward(weights, GUIDED, x / root, t)[:, :3]
    ours = model.denoiser()(x, sigma)
    assert gap(ours, x - sigma[:, None, None, None] * eps) < 2e-5
    assert model.card.picture == (16, 16, 3)
    clipped = fewstep.load(path, config={**SAID, "clip_denoised": True, "noise_schedule": schedule})
    assert torch.equal(clipped.denoiser()(x, sigma), ours.clamp(-1, 1))


@pytest.mark.parametrize("student", [False, True])
@torch.no_grad()
def test_d_of_consistency_models_has_their_scalings(tmp_path, student):
    weights = tensors(CM)
    path = saved(tmp_path / "x.pt", weights)
    model: Any = fewstep.load(path, config={**TEACHER, "distillation": student})
    sigma, gen = torch.tensor([0.002, 1.0, 80.0]), torch.Generator().manual_seed(0)
    x = (1 + sigma)[:, None, None, None] * torch.randn(3, 3, 16, 16, generator=gen)
    s = sigma.double()[:, None, None, None]
    c_in = 1 / torch.sqrt(s**2 + 0.25)
    raw = forward(weights, CM, (c_in * x).float(), 250 * torch.log(sigma))
    from_end = s - 0.002 if student else s
    expected = 0.25 / (from_end**2 + 0.25) * x + from_end * 0.5 * c_in * raw
    assert gap(model.denoiser()(x, sigma).double(), expected) < 2e-5
    if student:
        assert torch.equal(model.denoiser()(x, sigma)[0], x[0])  # the boundary


@torch.no_grad()
def test_a_student_is_sampled_at_its_published_indices(tmp_path):
    path = saved(tmp_path / "x.pt", tensors(CM))
    model: Any = fewstep.load(path, config={**TEACHER, "distillation": True})
    levels = fewstep.grid.karras(40, 80.0, 0.002)
    assert model.card.auto["2"].grid == pytest.approx((80.0, levels[22], 0.0))
    denoiser, x = model.denoiser(), model.prior([1])
    one = fewstep.sample(model, seeds=[1], nfe=1)
    expected = model.decode(denoiser(x, torch.tensor([80.0])))
    assert np.array_equal(one.images, expected)
    two = fewstep.sample(model, seeds=[1], nfe=2, solver="consistency")
    assert two.nfe == 2
    other = fewstep.load(path, config={**TEACHER, "distillation": True, "steps": 5, "ts": "0,2,4"})
    levels = fewstep.grid.karras(5, 80.0, 0.002)
    assert other.card.auto["2"].grid == pytest.approx((80.0, levels[2], 0.0))


def test_the_begin_of_a_name_tells_teacher_from_student_where_nothing_else_does(tmp_path):
    weights, said = tensors(CM), {"num_head_channels": 16}
    for begin, role in (("edm_", "edm"), ("cd_", "consistency"), ("ct_", "consistency")):
        model: Any = fewstep.load(saved(tmp_path / f"{begin}x.pt", weights), config=said)
        assert spec_of(model.card).role == role
    refused(saved(tmp_path / "x.pt", weights), "teacher .edm. or a student", config=said)


def test_what_the_file_does_not_say_must_be_said(tmp_path):
    path = saved(tmp_path / "x.pt", tensors(GUIDED))
    for name, words in (
        ("num_head_channels", "how many heads"),
        ("use_new_attention_order", "in which order"),
        ("noise_schedule", "noise schedule"),
    ):
        refused(path, words, config={k: v for k, v in SAID.items() if k != name})
    refused(path, "how many heads .* name a preset")


def test_a_file_that_leaves_something_unsaid_is_still_described(tmp_path, capsys):
    weights = tensors({**GUIDED, "num_classes": 7})
    path = saved(tmp_path / "x.pt", weights)
    assert run(["models", str(path), "--json"]) == 0
    known = json.loads(capsys.readouterr().out)
    assert known["kind"] == "guided-diffusion"
    assert known["parameters"] == sum(value.numel() for value in weights.values())
    assert (known["classes"], known["widths"]) == (7, [32, 64])
    assert "how many heads" in known["unsaid"]
    assert "imagenet64-adm" in known["presets"]
    assert run(["models", str(path)]) == 0
    assert "imagenet64-adm" in capsys.readouterr().out
    config = tmp_path / "said.json"
    config.write_text(json.dumps(SAID))
    assert run(["models", str(path), "--config", str(config), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["classes"]) == 7
    assert run(["models", str(path), "--preset", "imagenet64-adm"]) == 2
    assert "says num_channels = 192" in capsys.readouterr().err


CONTRADICTIONS = {
    "num_channels": (64, "config says num_channels = 64, and the weights have 32"),
    "num_res_blocks": (3, "num_res_blocks = 3, and the weights have 1"),
    "channel_mult": ("1,1", "so widths .32, 32., and the weights have"),
    "attention_resolutions": ("16", "so attention at levels .0,., and the weights have it at .1,."),
    "use_scale_shift_norm": (False, "use_scale_shift_norm = False"),
    "resblock_updown": (False, "resblock_updown = False"),
    "class_cond": (True, "class_cond = True"),
    "learn_sigma": (False, "learn_sigma = False"),
    "kind": ("latent-diffusion", "is of guided-diffusion, and config says kind"),
    "num_head_channels": (24, "head_width=24 does not divide"),
    "noise_schedule": ("quadratic", "noise_schedule must be linear or cosine"),
    "image_size": ("64", "image_size must be int"),
    "num_chanels": (32, "there is no setting 'num_chanels'; did you mean num_channels"),
    "predict_xstart": (True, "predict_xstart must be False here"),
    "rescale_timesteps": (True, "rescale_timesteps must be False here"),
    "parameterization": ("x0", "parameterization must be 'eps' here"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_setting_that_the_weights_contradict_is_refused_by_name(tmp_path, name):
    value, words = CONTRADICTIONS[name]
    refused(saved(tmp_path / "x.pt", tensors(GUIDED)), words, config={**SAID, name: value})


def test_heads_of_the_decoder_are_those_of_the_encoder(tmp_path):
    path = saved(tmp_path / "x.pt", tensors(GUIDED))
    said = {**SAID, "num_head_channels": -1, "num_heads": 4, "num_heads_upsample": 2}
    refused(path, "num_heads_upsample must be num_heads, 4, or -1, got 2", config=said)


def test_a_preset_that_the_weights_contradict_is_refused_by_name(tmp_path):
    path = saved(tmp_path / "x.pt", tensors(GUIDED))
    refused(path, "preset imagenet64-adm says num_channels = 192", preset="imagenet64-adm")
    refused(path, "is of guided-diffusion, and preset vq4-ldm is of latent", preset="vq4-ldm")
    refused(path, "no preset is called 'imagenet64'; did you mean imagenet64-", preset="imagenet64")


def test_all_settings_of_the_published_commands_are_taken(tmp_path):
    flags = {"num_heads": 4, "num_heads_upsample": -1, "dropout": 0.1, "class_cond": False}
    flags |= {"use_checkpoint": False, "use_scale_shift_norm": True, "resblock_updown": True}
    flags |= {"use_fp16": False, "learn_sigma": True, "diffusion_steps": 1000, "use_kl": False}
    flags |= {"timestep_respacing": "", "predict_xstart": False, "rescale_timesteps": False}
    flags |= {"rescale_learned_sigmas": False, "image_size": 16, "num_channels": 32}
    flags |= {"num_res_blocks": 1, "channel_mult": "1,2", "attention_resolutions": "8", **SAID}
    path = tmp_path / "flags.json"
    path.write_text(json.dumps(flags))
    file = saved(tmp_path / "x.pt", tensors(GUIDED))
    by_file, by_table = fewstep.load(file, config=path), fewstep.load(file, config=flags)
    assert spec_of(by_file.card) == spec_of(by_table.card)
    assert spec_of(by_file.card).unet.head_width == 16  # the width goes before the number


@pytest.mark.parametrize(
    "text", ["a: &a [1]\nb: [*a, *a]\n", "[", "3", "model: 3", "model: {params: {unet_config: 1}}"]
)
def test_yaml_that_is_no_table_of_settings_is_refused(tmp_path, text):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"YAML|table|setting"):
        read_config(path)


def test_presets_are_told_by_their_shapes_and_agree_with_themselves():
    from fewstep.networks.adm import ADM
    from fewstep.networks.adm_config import ADMConfig

    with torch.device("meta"):
        config = ADMConfig(64, 192, (192, 384, 576, 768), 3, (1, 2, 3), 0, 64, 3, 6, 1000)
        net = ADM(config)
    weights = {
        n: t[..., None] if n.endswith(("qkv.weight", "proj_out.weight")) else t
        for n, t in net.state_dict().items()
    }
    assert sum(t.numel() for t in weights.values()) == 295_904_454  # of the published file
    assert len(weights) == 541
    found = examine(weights, {}, "64x64_diffusion.pt")
    assert found.spec.unet == config
    assert found.spec.schedule[0] == "cosine"
    assert found.unet_rows is None
    assert found.preset == "imagenet64-adm"
    assert "imagenet64-adm" in found.spec.how
    assert all(values["kind"] for values in PRESETS.values())


def test_a_class_conditional_network_without_a_null_class_wants_a_label(tmp_path):
    s = {**GD, "legacy": False, "num_classes": 7}
    weights = tensors(s)
    config = {**SAID, "use_new_attention_order": True}
    model: Any = fewstep.load(saved(tmp_path / "x.pt", weights), config=config)
    assert model.card.classes == tuple("0123456")
    with pytest.raises(
        ValueError, match=r"always wants a class; give label \(--label\), from 0 to 6"
    ):
        model.denoiser()
    with pytest.raises(ValueError, match="cannot be used without a class"):
        model.denoiser(label=3, guidance=2.0)
    x, sigma = model.prior([1, 2]), torch.tensor([10.0, 10.0])
    assert not torch.equal(model.denoiser(3)(x, sigma), model.denoiser(4)(x, sigma))


def test_a_file_that_is_no_classifier_or_does_not_fit_is_refused(tmp_path):
    path = saved(tmp_path / "x.pt", tensors(GUIDED))
    refused(path, "is no noisy classifier", config=SAID, classifier=path)
    s = {**SMALL, "legacy": True, "pooled": 5, "image_size": 16, "num_res_blocks": 2}
    guide = saved(tmp_path / "c.pt", tensors(s))
    config = {**SAID, "classifier_width": 64}
    refused(path, "num_channels = 64, and the weights have 32", config=config, classifier=guide)
    small = saved(tmp_path / "s.pt", tensors({**s, "image_size": 8}))
    refused(path, "of 8 pixels, and the network has 3 of 16", config=SAID, classifier=small)
    refused(guide, "is a classifier; give it beside a network")
    student = saved(tmp_path / "cm.pt", tensors(CM))
    refused(student, "goes with guided-diffusion", config=TEACHER, classifier=guide)


@torch.no_grad()
def test_guidance_by_a_classifier_adds_its_gradient(tmp_path):
    path = saved(tmp_path / "x.pt", tensors(GUIDED))
    s = {**SMALL, "legacy": True, "pooled": 5, "image_size": 16, "num_res_blocks": 2}
    guide = tensors(s, seed=1)
    file = saved(tmp_path / "c.pt", guide)
    config = {**SAID, "classifier_width": 32, "classifier_num_head_channels": 16}
    model: Any = fewstep.load(path, config=config, classifier=file)
    assert model.card.classes == tuple("01234")
    x, sigma = model.prior([1, 2]), torch.tensor([5.0, 5.0])
    plain = model.denoiser()(x, sigma)
    assert isinstance(model.classifier, Classifier)
    gradient = model.classifier.gradient(x, sigma, torch.tensor([3, 3]))
    for scale in (None, 1.0, 4.0):
        guided = model.denoiser(3, guidance=scale)
        assert guided.calls_per_eval == 2
        expected = plain + (scale or 1.0) * 25.0 * gradient
        assert gap(guided(x, sigma), expected) < 1e-5
        assert guided.with_features(x, sigma)[1].shape == (2, 64, 8, 8)
    assert torch.equal(model.denoiser(3, guidance=0)(x, sigma), plain)
    with torch.inference_mode():
        assert gap(model.denoiser(3, guidance=4.0)(x, sigma), plain + 100 * gradient) < 1e-5


# -- latent diffusion -------------------------------------------------------------------------

LATENT = {**SMALL, "resblock_updown": False, "use_scale_shift_norm": False, "legacy": True}
UNET_SAID = {"num_head_channels": 16}


def stage_of(kind: str) -> Autoencoder:
    torch.manual_seed(0)
    codes = 12 if kind == "vq" else 0
    net = Autoencoder(AutoencoderConfig((32, 64), 1, 3, 3, 3, codes, (1,), (1,)))
    for value in net.parameters():
        torch.nn.init.normal_(value, std=0.5 / max(1, value[0].numel()) ** 0.5)
    return net


def checkpoint(path: Path, kind: str = "vq", ema: bool = True, **more: Any) -> dict[str, Any]:
    s = {**LATENT, **more.pop("unet", {})}
    weights, averaged = tensors(s, seed=0), tensors(s, seed=1)
    stage = stage_of(kind)
    state: dict[str, Tensor] = {f"model.diffusion_model.{n}": t for n, t in weights.items()}
    if ema:
        names = {n: f"model_ema.diffusion_model{n.replace('.', '')}" for n in averaged}
        state |= {names[n]: t for n, t in averaged.items()}
        state["model_ema.decay"] = torch.tensor(0.9999)
    state |= {f"first_stage_model.{n}": t.detach() for n, t in stage.state_dict().items()}
    state["first_stage_model.loss.logvar"] = torch.zeros(1)
    roots = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64)
    state["betas"] = (roots**2).float()
    state |= more
    torch.save({"epoch": 3, "state_dict": state, "optimizer_states": [{"state": {}}]}, path)
    return {"weights": averaged if ema else weights, "stage": stage, "s": s}


@pytest.mark.parametrize("kind", ["vq", "kl"])
@pytest.mark.parametrize("ema", [True, False])
@torch.no_grad()
def test_a_latent_diffusion_is_sampled_with_averaged_weights_and_decoded(tmp_path, kind, ema):
    path = tmp_path / "model.ckpt"
    made = checkpoint(path, kind, ema, scale_factor=torch.tensor(0.5))
    known: Any = recognise(path)[0]
    assert known.name == "a latent diffusion of CompVis"
    model: Any = fewstep.load(path, config=UNET_SAID)
    assert model.shape == (3, 16, 16)
    assert model.picture == (32, 32, 3)
    assert spec_of(model.card).schedule == ("scaled_linear", 1000, 0.0015, 0.0195)
    x, t, _ = drawn(made["s"], 16)
    assert gap(model.net(x, t), forward(made["weights"], made["s"], x, t)) < 2e-5
    z = torch.randn(9, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    pictures = torch.cat([made["stage"].decode(one[None] / 0.5) for one in z])
    expected = (pictures.clamp(-1, 1) * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1)
    decoded = torch.as_tensor(model.decode(z))
    assert decoded.shape == (9, 32, 32, 3)
    assert (decoded.int() - expected.int()).abs().max() <= 1
    found, sigma = model.start(decoded[:1].numpy(), [0], 0.5)
    assert found.shape == (1, 3, 16, 16)
    assert sigma > 0


@torch.no_grad()
def test_decoding_takes_the_nearest_code_and_encoding_does_not():
    stage: Any = stage_of("vq")
    z = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    table = stage.quantize["embedding"].weight
    far = (z.permute(0, 2, 3, 1)[..., None, :] - table).square().sum(-1)
    assert torch.equal(stage.codes(z), far.argmin(-1))
    nearest = F.embedding(far.argmin(-1), table).permute(0, 3, 1, 2)
    expected = stage.decoder(stage.post_quant_conv(nearest))
    assert gap(stage.decode(z), expected) < 2e-5
    picture = torch.rand(1, 3, 8, 8)
    assert torch.equal(stage.encode(picture), stage.quant_conv(stage.encoder(picture)))


@torch.no_grad()
def test_a_kl_first_stage_is_that_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.AutoencoderKL(
        block_out_channels=(32, 64),
        layers_per_block=1,
        latent_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()
    ours = Autoencoder(AutoencoderConfig((32, 64), 1, 3, 3))
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    original = {f"first_stage_model.{n}": t for n, t in ours.state_dict().items()}
    theirs.load_state_dict(convert_ldm_vae_checkpoint(original, theirs.config))
    picture = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    latents = theirs.encode(picture).latent_dist.mean
    assert gap(ours.encode(picture), latents) < 2e-5
    assert gap(ours.decode(latents), theirs.decode(latents).sample) < 2e-5


def test_classes_of_a_latent_diffusion_go_in_by_cross_attention(tmp_path):
    path = tmp_path / "model.ckpt"
    table = torch.randn(1001, 8, generator=torch.Generator().manual_seed(0))
    more: dict[str, Any] = {"cond_stage_model.embedding.weight": table}
    checkpoint(path, unet={"context_dim": 8}, **more)
    model: Any = fewstep.load(path, config=UNET_SAID)
    assert len(model.card.classes) == 1000
    x, sigma = model.prior([1]), torch.tensor([3.0])
    plain, one, two = (model.denoiser(label)(x, sigma) for label in (None, 3, 4))
    assert not torch.equal(one, two)
    guided = model.denoiser(3, guidance=2.0)(x, sigma)
    assert gap(guided, plain + 2 * (one - plain)) < 1e-5


def test_a_context_without_a_table_of_classes_is_refused(tmp_path):
    path = tmp_path / "model.ckpt"
    made = checkpoint(path, unet={"context_dim": 8})
    assert made["s"]["context_dim"] == 8
    refused(path, "attends to a context of 8 numbers", config=UNET_SAID)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"betas": torch.ones(3)}, "betas must be numbers in"),
        ({"scale_factor": torch.tensor(-1.0)}, "scale_factor must be positive"),
        ({"model_ema.diffusion_modeltime_embed0weight": None}, "averaged weights .* but none for"),
        ({"first_stage_model.quant_conv.weight": torch.ones(1)}, "quant_conv.weight must have"),
        ({"first_stage_model.encoder.conv_in.weight": None}, "first stage lacks"),
        ({"model.diffusion_model.extra.weight": torch.ones(1)}, "but none for 'extra.weight'"),
    ],
)
def test_a_damaged_latent_diffusion_is_refused_in_one_line(tmp_path, change, words):
    path = tmp_path / "model.ckpt"
    checkpoint(path)
    values = torch.load(path, weights_only=True)
    for name, value in change.items():
        values["state_dict"].pop(name, None)
        if value is not None:
            values["state_dict"][name] = value
    torch.save(values, path)
    refused(path, words, config=UNET_SAID)


def test_a_card_says_what_the_file_is_without_its_weights(tmp_path):
    path = saved(tmp_path / "x.pt", tensors(GUIDED))
    source = open_source(path, config=SAID)
    card = source.card
    assert source.parameters == sum(t.numel() for t in tensors(GUIDED).values())
    loaded = fewstep.load(path, config=SAID).card
    ends = {"sigma_min": card.sigma_min, "sigma_max": card.sigma_max}  # without torch's last digits
    assert ends == pytest.approx({name: getattr(loaded, name) for name in ends}, rel=1e-12)
    assert card == replace(loaded, **ends)
    assert spec_of(Card(**json.loads(json.dumps(card.to_dict())))) == spec_of(card)
    broken = {**card.network, "size": 3}
    with pytest.raises(ValueError, match="size and channels do not go"):
        spec_of(Card(name="x", network=broken))


@pytest.mark.parametrize("name", ["x", "pt"])
def test_features_are_those_of_the_middle(tmp_path, name):
    model: Any = fewstep.load(saved(tmp_path / f"{name}.pt", tensors(CM)), config=TEACHER)
    x, sigma = model.prior([1, 2]), torch.tensor([5.0, 5.0])
    denoised, features = model.denoiser().with_features(x, sigma)
    assert features.shape == (2, 64, 8, 8)
    assert torch.equal(denoised, model.denoiser()(x, sigma))


def test_bfloat16_and_compiled_are_the_same_network_nearly(tmp_path):
    path = saved(tmp_path / "x.pt", tensors(CM))
    plain, half = (fewstep.load(path, config=TEACHER, dtype=d) for d in ("float32", "bfloat16"))
    assert half.dtype == torch.bfloat16
    x, sigma = plain.prior([1]), torch.tensor([2.0])
    ours, other = half.denoiser()(x, sigma), plain.denoiser()(x, sigma)
    assert ours.dtype == torch.float32
    assert 0 < gap(ours, other) < 0.05


def test_shapes_that_belong_to_no_such_network_are_refused():
    with pytest.raises(ValueError, match="it lacks"):
        of_shapes({"time_embed.0.weight": (4, 1)})
    weights = {n: tuple(t.shape) for n, t in tensors(GUIDED).items()}
    weights = {n: s for n, s in weights.items() if not n.startswith("output_blocks.3")}
    with pytest.raises(ValueError, match="in the encoder and 3 in the decoder"):
        of_shapes(weights)


def test_the_card_of_a_spec_needs_no_file():
    spec = spec_of(card_of(spec_of_small(), "x"))
    assert spec.unet.size == 16


def spec_of_small() -> Any:
    return examine(tensors(GUIDED), {}, "x.pt", config=SAID).spec
