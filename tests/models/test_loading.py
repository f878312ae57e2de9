"""Reading pipelines: what is recognised, what is refused in one clear line; no file ever runs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import fewstep
from benchmarks import load_memory, pipeline_overhead
from fewstep.models.families import FAMILIES
from tests.support import pipelines


@pytest.fixture(scope="module")
def sd_folder(tmp_path_factory) -> Path:
    return pipelines.saved("sd", tmp_path_factory.mktemp("sd") / "tiny-sd")


@pytest.fixture(scope="module")
def models(tmp_path_factory, sd_folder) -> dict[str, Any]:
    base = tmp_path_factory.mktemp("models")
    folders = {
        name: pipelines.saved(name, base / name) for name in pipelines.MAKERS if name != "sd"
    }
    return {name: pipelines.load(path) for name, path in (folders | {"sd": sd_folder}).items()}


def refused(path: Any, **options: Any) -> str:
    """The message of a refusal, which has to be one line."""
    with pytest.raises(ValueError, match=r"\w") as caught:
        pipelines.load(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def edit_index(folder: Path, **changes: Any) -> None:
    path = folder / "model_index.json"
    index = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in index.items() if v is not ...}))


@pytest.fixture
def copy(sd_folder, tmp_path) -> Path:
    return Path(shutil.copytree(sd_folder, tmp_path / "copy"))


class Hostile:
    """Unpickled by a careless reader, it makes the file `mark`."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def test_the_card_says_what_the_pipeline_is(models):
    card = models["sd"].card
    assert (card.name, card.kind) == ("tiny-sd", "pipeline")
    assert card.about["pipeline"] == "StableDiffusionPipeline"
    assert card.sigma_max == pytest.approx(14.6146, abs=1e-3)
    assert len(card.weights_sha256) == 64
    assert models["sd3"].card.sigma_max == pytest.approx(99999, rel=1e-6)


@pytest.mark.parametrize("name", pipelines.MAKERS)
def test_the_prior_has_unit_variance_in_the_pipelines_own_units(name, models):
    model = models[name]
    x = model.prior(range(200))
    x_t = x * model.process.schedule.alpha(model.card.sigma_max)
    assert x.dtype == torch.float32
    assert float(x_t.std()) == pytest.approx(1, abs=0.02)
    assert abs(float(x_t.mean())) < 0.02
    assert torch.equal(model.prior([7]), x[7:8])


@pytest.mark.parametrize("ending", [".safetensors", ".ckpt"])
def test_a_single_file_with_a_configuration_folder_is_the_same_model(
    ending, sd_folder, models, tmp_path
):
    weights = pipelines.original_keys(pipelines.sd())
    file = tmp_path / f"model{ending}"
    if ending == ".ckpt":
        torch.save({"state_dict": weights}, file)
    else:
        safetensors.torch.save_file(weights, file)
    config = tmp_path / "config"
    shutil.copytree(sd_folder, config, ignore=shutil.ignore_patterns("*.safetensors"))
    single, folder = pipelines.load(file, config=config), models["sd"]
    x, sigma = folder.prior([1]), torch.tensor([5.0])
    ours, other = (m.denoiser(prompt="a cat", guidance=3.0)(x, sigma) for m in (single, folder))
    assert torch.equal(ours, other)
    clean = x / 15
    assert np.array_equal(single.decode(clean), folder.decode(clean))


def test_a_single_file_is_sampled_as_its_keys_say(sd_folder, tmp_path):
    """Where the configuration says nothing else, else it is refused."""
    weights = pipelines.original_keys(pipelines.sd())
    file, config = tmp_path / "model.safetensors", tmp_path / "config"
    safetensors.torch.save_file({**weights, "v_pred": torch.zeros(0)}, file)
    shutil.copytree(sd_folder, config, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ValueError, match="says prediction_type = v_prediction, and the conf"):
        pipelines.load(file, config=config)
    path = config / "scheduler" / "scheduler_config.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps({n: v for n, v in said.items() if n != "prediction_type"}))
    assert pipelines.load(file, config=config).process.prediction == "v"


def test_a_hostile_checkpoint_runs_nothing(tmp_path, sd_folder):
    mark = tmp_path / "mark"
    file = tmp_path / "hostile.ckpt"
    torch.save({"state_dict": {"weight": Hostile(mark)}}, file)
    assert "is no data and is never run" in refused(file, config=sd_folder)
    file.write_bytes(pickle.dumps(Hostile(mark)))
    assert str(file) in refused(file, config=sd_folder)
    assert not mark.exists()


@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model", "text_encoder/pytorch_model"])
def test_hostile_weights_in_a_folder_run_nothing(part, copy, tmp_path):
    mark, folder = tmp_path / "mark", copy / part.partition("/")[0]
    for file in folder.glob("*.safetensors"):
        file.unlink()
    torch.save({"weight": Hostile(mark)}, copy / f"{part}.bin")
    assert str(copy) in refused(copy)
    assert not mark.exists()


def test_code_beside_the_weights_is_refused(copy):
    (copy / "unet" / "mine.py").write_text("raise SystemExit('executed')")
    edit_index(copy, unet=["mine", "UNet"])
    assert "unet is of module 'mine'" in refused(copy)


def test_weights_in_a_pickle_of_tensors_alone_are_read(copy, models):
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(file)
    file.unlink()
    torch.save(weights, file.with_suffix(".bin"))
    x, sigma = models["sd"].prior([1]), torch.tensor([5.0])
    ours, other = (m.denoiser()(x, sigma) for m in (pipelines.load(copy), models["sd"]))
    assert torch.equal(ours, other)


def test_the_half_precision_variant_alone_is_found(copy):
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(copy / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert pipelines.load(copy).dtype == torch.float32


def test_unknown_classes_name_those_that_run(copy):
    edit_index(copy, _class_name="KandinskyPipeline")
    message = refused(copy)
    assert "KandinskyPipeline" in message
    assert "StableDiffusionXLPipeline" in message


def test_a_class_that_the_installed_diffusers_lacks_says_so(copy, monkeypatch):
    family = FAMILIES["StableDiffusionPipeline"]
    monkeypatch.setitem(FAMILIES, "StableDiffusion9Pipeline", family)
    edit_index(copy, _class_name="StableDiffusion9Pipeline")
    assert "StableDiffusion9Pipeline, which diffusers" in refused(copy)


@pytest.mark.parametrize("part", ["vae", "tokenizer", "scheduler"])
def test_a_missing_component_is_named(part, copy):
    shutil.rmtree(copy / part)
    assert f"has no {part} (there is no folder" in refused(copy)
    edit_index(copy, **{part: ...})
    assert f"has no {part} (its index names none)" in refused(copy)


def test_missing_and_damaged_weights_are_refused(copy):
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert f"{file} cannot be read" in refused(copy)
    file.unlink()
    assert "has no weights" in refused(copy)


def test_a_folder_that_is_no_pipeline_says_what_one_holds(tmp_path):
    assert "model_index.json" in refused(tmp_path)
    (tmp_path / "model_index.json").write_text("[1]")
    assert "is not the index of a pipeline" in refused(tmp_path)


def test_a_hub_name_without_a_network_says_how_to_give_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    message = refused("nobody/no-such-model-of-fewstep")
    assert "give its folder" in message


def test_a_single_file_without_a_configuration_says_how_to_give_one(tmp_path):
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_file(pipelines.original_keys(pipelines.sd()), file)
    assert "config=FOLDER" in refused(file)
    (tmp_path / "model.txt").write_text("?")
    assert "neither safetensors, nor of torch.save" in refused(tmp_path / "model.txt")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"rescale_betas_zero_snr": True}, "zero terminal SNR"),
        ({"prediction_type": "score"}, "'score'"),
        ({"thresholding": True, "sample_max_value": 1.5}, "sample_max_value"),
    ],
)
def test_processes_that_cannot_be_sampled_are_refused(changes, words, copy):
    path = copy / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    assert words in refused(copy)


@pytest.mark.parametrize(
    "unet, words",
    [({"in_channels": 9}, "in-painting"), ({"num_class_embeds": 3}, "class labels")],
)
def test_networks_that_want_other_inputs_are_refused(unet, words, tmp_path):
    assert words in refused(pipelines.saved("sd", tmp_path / "other", unet=unet))


def test_options_belong_to_pipelines(models):
    assert "a model folder of fewstep has no such options" in refused(
        "fashion-mnist", size=(32, 32)
    )
    assert "colour" in refused(pipelines.__file__, colour="red")


LONG = "a cat sat on a mat a cat sat on a mat"  # 14 tokens ("on" is two) where 10 are read


def test_text_that_is_cut_is_said(models):
    with pytest.warns(UserWarning, match="it does not see 'on a mat'"):
        models["sd"].denoiser(prompt=LONG)


def test_text_that_fits_is_not_cut(models):
    models["sd"].denoiser(prompt="a cat sat on a mat")  # a warning would be an error


@pytest.mark.parametrize("name", pipelines.TEXT)
def test_guidance_is_one_batched_call_with_a_scale_per_sample(name, models):
    model = models[name]
    sizes = []
    handle = model.net.register_forward_pre_hook(
        lambda net, args, kwargs: sizes.append(len(args[0])), with_kwargs=True
    )
    x, sigma = model.prior([1, 2]), torch.tensor([3.0, 9.0])
    prompts, negatives = ["a cat", "mat"], ["on", "sat"]

    def run(**conditions: Any) -> torch.Tensor:
        return model.denoiser(**conditions)(x, sigma)

    try:
        both = run(prompt=prompts, negative=negatives, guidance=[2.0, 6.0])
        assert sizes == [4]
        cond, uncond = run(prompt=prompts), run(prompt=negatives)
        assert sizes == [4, 2, 2]
    finally:
        handle.remove()
    scale = torch.tensor([2.0, 6.0]).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(both, uncond + scale * (cond - uncond), rtol=0, atol=1e-4)
    assert float((cond - uncond).abs().max()) > 1e-3  # the text says something


def test_a_prompt_for_all_is_a_prompt_for_each(models):
    model = models["sdxl"]
    x, sigma = model.prior([1, 2]), torch.tensor([3.0, 9.0])
    ours, other = (
        model.denoiser(prompt=prompt, guidance=3.0)(x, sigma) for prompt in ("mat", ["mat"] * 2)
    )
    torch.testing.assert_close(ours, other, rtol=0, atol=1e-4)


def test_the_size_conditioning_of_sdxl_reaches_the_network(models):
    model = models["sdxl"]
    x, sigma = model.prior([1]), torch.tensor([3.0])
    plain, own, other = (
        model.denoiser(prompt="mat", **sizes)(x, sigma)
        for sizes in ({}, {"original_size": (16, 16)}, {"crops_coords_top_left": (8, 4)})
    )
    assert torch.equal(plain, own)
    assert not torch.equal(plain, other)


@pytest.mark.parametrize("name", pipelines.MAKERS)
def test_features_come_at_no_other_denoised_picture_and_leave_no_hook(name, models):
    model = models[name]
    text = {"prompt": "mat", "guidance": 3.0} if name in pipelines.TEXT else {}
    denoiser = model.denoiser(**text)
    x, sigma = model.prior([1, 2]), torch.tensor([3.0, 9.0])
    denoised, features = denoiser.with_features(x, sigma)
    assert torch.equal(denoised, denoiser(x, sigma))
    assert features.ndim == 4
    assert len(features) == 2
    assert not model.net.get_submodule(model.card.feature_module)._forward_hooks
    # the first picture's features do not depend on the second
    alone = model.denoiser(**text).with_features(x[:1], sigma[:1])[1]
    # at the largest sigma they are thousands, and float32 sums in another order in a batch
    torch.testing.assert_close(features[:1], alone, rtol=1e-5, atol=1e-4)


def test_a_network_that_is_told_its_guidance_costs_one_call(tmp_path):
    folder = pipelines.saved("sd", tmp_path / "lcm", unet={"time_cond_proj_dim": 16})
    model, pipe = pipelines.load(folder), pipelines.sd(unet={"time_cond_proj_dim": 16})
    x, sigma = model.prior([1]), torch.tensor([5.0])
    made = model.denoiser(prompt="mat", guidance=8.0)
    told = pipe.get_guidance_scale_embedding(torch.tensor([7.0]), embedding_dim=16)
    text = pipe.encode_prompt(["mat"], "cpu", 1, False)[0]
    t = model.schedule.t(sigma)
    eps = pipe.unet(x * model.schedule.alpha(5.0), t, text, timestep_cond=told).sample
    torch.testing.assert_close(made(x, sigma), x - 5 * eps, rtol=0, atol=1e-4)
    assert not hasattr(made, "calls_per_eval")
    with pytest.raises(ValueError, match="takes no negative prompt"):
        model.denoiser(prompt="mat", negative="on", guidance=8.0)


@pytest.mark.parametrize(
    "name, conditions, words",
    [
        ("ddpm", {"prompt": "mat"}, "takes no text"),
        ("ddpm", {"guidance": 3.0}, "leave out guidance"),
        ("sd", {"label": 1}, "has no classes"),
        ("sd", {"guidance": 3.0}, "guidance needs a prompt"),
        ("sd", {"prompt": "mat", "guidance": -1.0}, "at least 0"),
        ("sd", {"prompt": "mat", "negative": "on"}, "give guidance"),
        ("sd", {"prompt": ["a", "b", "c"], "negative": ["a", "b"], "guidance": 2.0}, "one per"),
        ("sd", {"prompt": [1]}, "must be a text"),
    ],
)
def test_conditions_that_a_model_does_not_take_are_refused(name, conditions, words, models):
    with pytest.raises(ValueError, match=words):
        models[name].denoiser(**conditions)


def test_prompts_that_do_not_go_with_the_pictures_are_refused(models):
    denoiser = models["sd"].denoiser(prompt=["a", "cat"])
    with pytest.raises(ValueError, match="2 prompts do not go with 3 pictures"):
        denoiser(models["sd"].prior([1, 2, 3]), torch.full((3,), 2.0))


@pytest.mark.parametrize("name", ["ddpm", "sd", "sd3"])
def test_encoding_is_what_the_pipelines_preprocessing_gives(name, models):
    model = models[name]
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 * 2 - 1
    vae = model.autoencoder
    if vae is not None:
        latents = vae.encode(x).latent_dist.mean
        x = (latents - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
    torch.testing.assert_close(model.encode(images), x, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="images must be uint8"):
        model.encode(images[:, :8])


def test_pixels_decode_to_what_was_encoded(models):
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
    assert np.array_equal(models["ddpm"].decode(models["ddpm"].encode(images)), images)


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_image_to_image_starts_at_the_picture_plus_noise(name, models):
    model = models[name]
    images = np.zeros((1, 16, 16, 3), np.uint8)
    x, sigma = model.start(images, [1, 2], strength=0.5)
    z = (x - model.encode(images)) / sigma
    unit = model.prior([1, 2]) * model.process.schedule.alpha(model.process.sigma_max)
    torch.testing.assert_close(z, unit, rtol=0, atol=1e-4)
    # half of the network's time: 499 of 0..999, or u = 1/2, shifted by 3
    assert sigma == pytest.approx({"sd": model.schedule.sigma(499.0), "sd3": 3.0}[name], rel=1e-4)
    with pytest.raises(ValueError, match="strength"):
        model.start(images, [1], strength=0.0)


def test_latents_decode_the_same_in_slices_and_tiles(sd_folder, models):
    sliced = pipelines.load(sd_folder, slicing=True, tiling=True)
    assert sliced.autoencoder.use_slicing
    assert sliced.autoencoder.use_tiling
    x = pipelines.noise(3, *sliced.shape)
    assert np.array_equal(sliced.decode(x), models["sd"].decode(x))  # smaller than one tile


def test_a_size_is_in_pixels_and_a_multiple_of_the_latents_side(sd_folder, models):
    assert pipelines.load(sd_folder, size=(32, 24)).shape == (4, 16, 12)
    wide = models["sd"].with_size(16, 48)
    assert wide.decode(wide.prior([1]) / 15).shape == (1, 16, 48, 3)
    with pytest.raises(ValueError, match="multiples of 2"):
        models["sd"].with_size(15, 16)


@pytest.mark.parametrize("kind", ["sdxl", "sd"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_keeps_the_state_in_float32(dtype, kind, models, tmp_path):
    half = pipelines.load(pipelines.saved(kind, tmp_path / "half"), dtype=dtype)
    assert half.dtype == getattr(torch, dtype)
    seen = []
    first = half.autoencoder.post_quant_conv
    first.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    x, sigma = half.prior([1]), torch.tensor([5.0])
    ours, full = (m.denoiser(prompt="mat")(x, sigma) for m in (half, models[kind]))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, full, rtol=0, atol=0.3)
    assert half.decode(ours).dtype == np.uint8
    assert half.autoencoder.config.force_upcast  # which diffusers heeds for SDXL alone
    wide = dtype == "float16" and kind == "sdxl"
    assert seen == [torch.float32 if wide else getattr(torch, dtype)]
    assert next(half.autoencoder.parameters()).dtype == half.dtype


def test_sampling_reports_calls_and_repeats(models):
    run = {"prompt": "mat", "guidance": 3.0, "nfe": 3}
    one, two = (fewstep.sample(models["sd"], seeds=[1, 2], **run, batch=b) for b in (1, 2))
    assert (one.nfe, one.network_calls) == (3, 6)
    assert abs(one.images.astype(int) - two.images.astype(int)).max() <= 1
    assert one.provenance["prompt"] == "mat"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own count")
def test_loading_takes_little_more_memory_than_the_weights(tmp_path):
    figures = load_memory.measure(tmp_path)
    assert figures["weights_mb"] > 200
    assert 0.9 < figures["ratio"] < load_memory.MOST


@pytest.mark.slow
def test_little_of_a_run_is_spent_outside_the_networks():
    rows = pipeline_overhead.measure(rounds=3)
    assert rows[0]["route"] == "fewstep.sample"
    assert rows[0]["outside"] < pipeline_overhead.MOST


@pytest.mark.parametrize("part", ["unet", "scheduler"])
def test_code_beside_weights_is_refused_and_not_run(part, tmp_path):
    folder = pipelines.saved("sd", tmp_path / "sd")
    (folder / part / "diffusers.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match="is code beside weights, which is not executed"):
        fewstep.load(folder)
    assert not (tmp_path / "ran").exists()


def test_a_pipeline_for_a_component_is_refused(tmp_path):
    folder = pipelines.saved("sd", tmp_path / "sd")
    index = json.loads((folder / "model_index.json").read_text())
    index["unet"] = ["diffusers", "StableDiffusionPipeline"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="unet is a pipeline of its own"):
        fewstep.load(folder)
