"""FewstepPipeline: a solver that reads features in a pipeline that is in memory, with the results
of `fewstep.solve` and `fewstep.sample` on the same pipeline read from its files."""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fewstep
from fewstep.integrations.diffusers import FewstepPipeline, FewstepScheduler
from fewstep.learned.amed import Amed
from fewstep.learned.predictor import Predictor, feature_count
from fewstep.learned.solver import LearnedSolver
from fewstep.models.formats.diffusers import from_pipe
from tests.support import pipelines
from tests.support.pipelines import diffusers

PROMPTS = ["a cat", "mat"]
NAMES = pipelines.TEXT


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Any]:
    base = tmp_path_factory.mktemp("models")
    return {name: pipelines.load(pipelines.saved(name, base / name)) for name in NAMES}


@pytest.fixture(scope="module")
def pipes() -> dict[str, Any]:
    made = {name: pipelines.MAKERS[name]() for name in NAMES}
    for pipe in made.values():
        pipe.set_progress_bar_config(disable=True)
    return made


def learned(model: Any, base: str | None = None, reads: bool = True) -> LearnedSolver:
    """AMED on a model, its heads moved off zero so that pictures differ in what they choose."""
    count = 0
    if reads:
        x = model.prior([0])
        sigma = torch.tensor([model.card.sigma_max])
        count = feature_count(model.denoiser().with_features(x, sigma)[1])
    fresh = Predictor.fresh(count, 0.05, 0.2, 0, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: 0.5 * torch.randn(value.shape, generator=generator)
        if name.startswith("head")
        else value
        for name, value in fresh.weights.items()
    }
    top = min(model.card.sigma_max, 80.0)
    sigmas = (model.card.sigma_max, *([top] if top < model.card.sigma_max else []), 3.0, 0.4)
    kind = "amed" if base is None else "amed-plugin"
    return LearnedSolver(Amed(kind, base, sigmas, "none", Predictor(count, 0.05, 0.2, weights)))


def assert_close(ours: Any, other: Any, tolerance: float = 1e-5) -> None:
    size = max(1.0, float(other.abs().max()))
    torch.testing.assert_close(ours / size, other / size, rtol=0, atol=tolerance)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("base", [None, "dpmpp-2m"])
@pytest.mark.parametrize("name", NAMES)
def test_latents_are_those_of_our_own_route(name, base, guidance, models, pipes):
    model = models[name]
    solver = learned(model, base)
    z = pipelines.noise(2, *model.shape)
    run = {"latents": z, "output_type": "latent", "guidance_scale": guidance}
    found = FewstepPipeline(pipes[name], solver)(PROMPTS, negative_prompt="on", **run).images
    negative = "on" if guidance > 1 else None
    denoiser = model.denoiser(prompt=PROMPTS, negative=negative, guidance=guidance)
    with torch.no_grad():
        x = z / model.process.schedule.alpha(model.card.sigma_max)
        ours = fewstep.solve(denoiser, x, solver)
        other = fewstep.solve(denoiser, x, learned(model, base, reads=False))
    assert_close(found, ours)
    assert float((ours - other).abs().max()) > 1e-3  # the features say something


def test_seeds_give_the_pictures_of_sample(models, pipes, tmp_path):
    model = models["sd"]
    learned(model).save(tmp_path / "solver")
    fast = FewstepPipeline(pipes["sd"], tmp_path / "solver")
    pictures = fast("mat", guidance_scale=3.0, seeds=[4, 5], num_images_per_prompt=2).images
    ours = fewstep.sample(
        model, solver=tmp_path / "solver", seeds=[4, 5], prompt="mat", guidance=3.0
    )
    off = np.stack([np.asarray(p) for p in pictures]).astype(int) - ours.images.astype(int)
    assert abs(off).max() <= 1


@pytest.mark.parametrize("generators", [1, 2])
def test_a_generator_draws_what_diffusers_draws(generators, models, pipes):
    model, solver = models["sdxl"], learned(models["sdxl"], reads=False)
    pipe = pipes["sdxl"]

    def fresh() -> Any:
        made = [torch.Generator().manual_seed(i) for i in range(generators)]
        return made if generators == 2 else made[0]

    run = {"prompt": PROMPTS, "guidance_scale": 3.0, "output_type": "latent"}
    ours = FewstepPipeline(pipe, solver)(**run, generator=fresh()).images
    parts = pipelines.sdxl().components
    other = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    other.set_progress_bar_config(disable=True)
    other.scheduler = FewstepScheduler.from_config(pipe.scheduler.config, solver=solver)
    alpha = model.process.schedule.alpha(solver.sigmas[-1])  # theirs ends at x_t
    found = other(**run, generator=fresh(), num_inference_steps=2).images
    assert_close(ours, found / alpha)


@pytest.mark.parametrize("output", ["pil", "np", "pt"])
def test_outputs_are_those_of_the_pipeline(output, models, pipes):
    model, pipe = models["sd"], pipes["sd"]
    z = pipelines.noise(1, *model.shape)
    fast = FewstepPipeline(pipe, learned(model))
    images = fast("mat", latents=z, output_type=output, return_dict=False)[0]
    x = fast("mat", latents=z, output_type="latent").images
    decoded = pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample.detach()
    expected = pipe.image_processor.postprocess(decoded, output_type=output)
    if output == "pil":
        assert np.array_equal(np.asarray(images[0]), np.asarray(expected[0]))
    else:
        torch.testing.assert_close(torch.as_tensor(images), torch.as_tensor(expected))


def test_the_default_guidance_is_the_pipelines(models, pipes):
    z = pipelines.noise(1, *models["sdxl"].shape)
    fast = FewstepPipeline(pipes["sdxl"], learned(models["sdxl"]))
    call = inspect.signature(type(pipes["sdxl"]).__call__).parameters
    own = call["guidance_scale"].default
    run = {"latents": z, "output_type": "latent"}
    assert torch.equal(fast("mat", **run).images, fast("mat", guidance_scale=own, **run).images)


def test_a_flagged_picture_is_black(models):
    pipe = pipelines.sd()
    pipe.set_progress_bar_config(disable=True)
    pipe.safety_checker = lambda images, clip_input: (torch.zeros_like(images), [True])
    pipe.feature_extractor = lambda pictures, return_tensors: _Read()
    fast = FewstepPipeline(pipe, learned(models["sd"]))
    assert not np.asarray(fast("mat", seeds=[1]).images[0]).any()


class _Read:
    pixel_values = torch.zeros(1, 3, 4, 4)

    def to(self, device: Any) -> _Read:
        return self


@pytest.mark.parametrize("base", [None, "ipndm-2"])
def test_callbacks_see_each_state_and_can_change_and_end_the_run(base, models, pipes):
    model, pipe, seen = models["sd"], pipes["sd"], []
    solver = learned(model, base)
    fast = FewstepPipeline(pipe, solver)
    z = pipelines.noise(2, *model.shape)
    run = {"latents": z, "guidance_scale": 1.0, "output_type": "latent"}

    def note(owner: Any, index: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        assert owner is pipe
        seen.append((index, t, tensors["latents"]))
        return {}

    plain = fast(PROMPTS, **run, callback_on_step_end=note).images
    states = 2 if base is None else 4
    assert [index for index, _, _ in seen] == list(range(states))
    times = [float(t.reshape(-1)[0]) for _, t, _ in seen]
    assert all(one > two for one, two in pairwise([1000.0, *times]))
    assert times[0] == pytest.approx(999.0)
    if base is not None:
        assert seen[1][1].shape == (2,)  # a level of its own for each picture
    assert_close(plain * model.process.schedule.alpha(solver.sigmas[-1]), seen[-1][2])

    changed = fast(PROMPTS, **run, callback_on_step_end=lambda p, i, t, d: {"latents": 0 * z})
    assert float((changed.images - plain).abs().max()) > 0.1

    def stop(owner: Any, index: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        owner._interrupt = True
        return tensors

    level = solver.sigmas[1] if base is None else None
    stopped = fast(PROMPTS, **run, callback_on_step_end=stop).images
    if level is not None:
        assert_close(stopped * model.process.schedule.alpha(level), seen[0][2])
    assert torch.equal(fast(PROMPTS, **run).images, plain)  # nothing is left of it


def test_the_parts_are_shared_and_left_as_they_are(pipes, models):
    pipe = pipelines.sd()
    pipe.unet.train()
    model = from_pipe(pipe)
    assert model.net is pipe.unet
    assert pipe.unet.training
    assert all(weight.requires_grad for weight in pipe.unet.parameters())
    assert from_pipe(pipe, size=(32, 24)).shape == (4, 16, 12)
    pipe.unet.eval()
    ours, other = (
        m.denoiser(prompt="mat")(models["sd"].prior([1]), torch.tensor([5.0]))
        for m in (model, models["sd"])
    )
    torch.testing.assert_close(ours, other)
    with pytest.raises(ValueError, match="pipe is a UNet2DConditionModel; fewstep runs DDPM"):
        from_pipe(pipe.unet)


def test_pictures_of_another_size(models, pipes):
    fast = FewstepPipeline(pipes["sd"], learned(models["sd"], reads=False))
    assert fast("mat", seeds=[1], height=32, width=24).images[0].size == (24, 32)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"num_inference_steps": 5}, "its own 2 intervals"),
        ({"output_type": "jpg"}, "output_type must be"),
        ({"seeds": [1, 2]}, "one per picture, got 2 for 1"),
        ({"generator": [torch.Generator()] * 3}, "one per picture, got 3 for 1"),
        ({"seeds": [1], "latents": torch.zeros(1)}, "given once, got seeds and latents"),
        ({"latents": torch.zeros(1, 4, 9, 9)}, r"latents must be \[1, 4, 8, 8\]"),
        ({"height": 32}, "height and width, or neither"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "latents alone"),
    ],
)
def test_what_does_not_fit_is_refused(options, words, models, pipes):
    fast = FewstepPipeline(pipes["sd"], learned(models["sd"]))
    with pytest.raises(ValueError, match=words):
        fast("mat", **options)


def test_what_needs_no_pipeline_or_has_no_text_is_refused(models, pipes):
    with pytest.raises(ValueError, match=r"set pipe\.scheduler = Fewstep"):
        FewstepPipeline(pipes["sd"], "dpmpp-2m")
    with pytest.raises(ValueError, match="takes no text"):
        FewstepPipeline(pipelines.ddpm(), learned(models["sd"]))


def test_a_scheduler_takes_learned_solvers_that_read_nothing(models, pipes, tmp_path):
    config = pipes["sd"].scheduler.config
    solver = learned(models["sd"], reads=False)
    solver.save(tmp_path / "solver")
    made = [
        FewstepScheduler.from_config(config, solver=one)
        for one in (solver, tmp_path / "solver", str(tmp_path / "solver"), solver.plan())
    ]
    assert all(one.config["plan"] == made[0].config["plan"] for one in made)
    again = FewstepScheduler.from_config(made[0].config, solver="unipc-2")
    assert again.config["plan"] is None  # a name does away with it
    assert FewstepScheduler.from_config(made[0].config).config["plan"] == made[0].config["plan"]
    with pytest.raises(ValueError, match=r"reads the network's features.*FewstepPipeline"):
        FewstepScheduler.from_config(config, solver=learned(models["sd"]))


# --- encoded prompts, skipped layers, pictures ----------------------------------------------------


def encoded(pipe: Any, name: str, **options: Any) -> dict[str, Any]:
    """What diffusers' own encoder makes of the prompts, as arguments of a call."""
    more = {"prompt_2": None, "prompt_3": None} if name == "sd3" else {}
    found = pipe.encode_prompt(
        prompt=PROMPTS,
        **more,
        device="cpu",
        num_images_per_prompt=1,
        do_classifier_free_guidance=True,
        negative_prompt=["on", "a"],
        **options,
    )
    names = ["prompt_embeds", "negative_prompt_embeds"]
    names += ["pooled_prompt_embeds", "negative_pooled_prompt_embeds"] if len(found) == 4 else []
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("name", NAMES)
def test_encoded_prompts_are_those_of_the_texts(name, guidance, models, pipes):
    fast = FewstepPipeline(pipes[name], learned(models[name]))
    run = {"guidance_scale": guidance, "seeds": [3, 4], "output_type": "latent"}
    plain = fast(PROMPTS, negative_prompt=["on", "a"], **run).images
    found = fast(**encoded(pipes[name], name), **run).images
    assert_close(found, plain)


@torch.no_grad()
def skipping(pipe: Any) -> dict[str, Any]:
    """The same of Stable Diffusion 1 without the last layer, whose encode_prompt does not work."""
    encoder, made = pipe.text_encoder, []
    for texts in (PROMPTS, ["on", "a"]):
        read = pipe.tokenizer(texts, padding="max_length", max_length=12, return_tensors="pt")
        states = encoder(read.input_ids, output_hidden_states=True).hidden_states
        assert len(states) == encoder.config.num_hidden_layers + 1
        made.append(getattr(encoder, "text_model", encoder).final_layer_norm(states[-2]))
    return {"prompt_embeds": made[0], "negative_prompt_embeds": made[1]}


@pytest.mark.parametrize("name", NAMES)
def test_clip_skip_is_that_of_diffusers(name, models, pipes):
    fast = FewstepPipeline(pipes[name], learned(models[name]))
    run = {"guidance_scale": 3.0, "seeds": [3, 4], "output_type": "latent"}
    found = fast(PROMPTS, negative_prompt=["on", "a"], clip_skip=1, **run).images
    given = skipping(pipes["sd"]) if name == "sd" else encoded(pipes[name], name, clip_skip=1)
    assert_close(found, fast(**given, **run).images)
    assert (found - fast(PROMPTS, negative_prompt=["on", "a"], **run).images).abs().max() > 1e-4


def test_a_picture_is_where_the_grid_begins(models, pipes):
    model = models["sd"]
    sigma = model.level(0.5)
    plan = fewstep.solver.get("dpmpp-2m").plan((sigma, sigma / 4, 0.0))
    fast = FewstepPipeline(pipes["sd"], plan)
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    run = {"guidance_scale": 3.0, "seeds": [3, 4], "output_type": "latent"}
    found = fast(PROMPTS, image=picture, strength=0.5, **run).images
    x, level = model.start(picture[None], [3, 4], 0.5)
    assert level == sigma
    denoiser = model.denoiser(prompt=PROMPTS, guidance=3.0)
    with torch.no_grad():
        assert_close(found, fewstep.solve(denoiser, x, plan))
    assert_close(fast(PROMPTS, image=Image.fromarray(picture), **run).images, found)
    with pytest.raises(ValueError, match=r"starts at the level of strength=0\.5, got 0\.7"):
        fast(PROMPTS, image=picture, strength=0.7, **run)
    with pytest.raises(ValueError, match="or give the image to start from"):
        fast(PROMPTS, **run)
    with pytest.raises(ValueError, match="strength is of a picture"):
        fast(PROMPTS, strength=0.5, **run)
    with pytest.raises(ValueError, match="image must be one, or one per picture, got 3 for 2"):
        fast(PROMPTS, image=[picture] * 3, **run)


@pytest.mark.parametrize(
    "name, given, words",
    [
        ("sd", {}, "give prompt or prompt_embeds"),
        ("sd", {"prompt": "a", "prompt_embeds": torch.zeros(1, 12, 32)}, "give prompt or prompt_"),
        ("sd", {"prompt": "a", "clip_skip": -1}, "clip_skip must be a number of layers"),
        ("sd", {"prompt_embeds": torch.zeros(12, 32)}, "must be a tensor of 3 dimensions"),
        ("sd", {"prompt": "a", "pooled_prompt_embeds": torch.zeros(1, 32)}, "two text encoders"),
        ("sdxl", {"prompt_embeds": torch.zeros(1, 12, 64)}, "and pooled_prompt_embeds; give both"),
        (
            "sd",
            {
                "prompt_embeds": torch.zeros(1, 12, 32),
                "negative_prompt_embeds": torch.zeros(2, 12, 32),
            },
            r"must have the shape of prompt_embeds, \[1, 12, 32\], got \[2, 12, 32\]",
        ),
    ],
)
def test_encoded_prompts_that_do_not_fit_are_refused(name, given, words, models, pipes):
    with pytest.raises(ValueError, match=words):
        FewstepPipeline(pipes[name], learned(models[name]))(**given)
