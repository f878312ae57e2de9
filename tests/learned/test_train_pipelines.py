"""Solvers learned on small real pipelines of diffusers: prompts, ends, resuming, where they run.

What a run gives is compared with diffusers' own pipelines, with solves written out here, and with
itself after it was killed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fewstep
from fewstep.denoiser import Wrapper
from fewstep.integrations.diffusers import FewstepScheduler
from fewstep.learned import LearnedSolver, choices, prompted, train
from fewstep.learned.method import Lesson
from fewstep.learned.teacher import Frozen, whole_grid
from fewstep.learned.teacher import Path as Way
from fewstep.learned.tuned import Tuned
from fewstep.models.process import Shifted
from fewstep.models.texts import TextCache
from fewstep.schedule import VP, Flow
from tests.support import pipelines
from tests.support.command import command
from tests.support.testbed import Mixture

TEXTS = [f"{'a cat' if i % 2 else 'mat'} {i}" for i in range(40)]
TRAINING, VALIDATION = range(2_000_000, 2_000_400), range(1_000_000, 1_000_400)
SHORT = {"trajectories": 4, "batch": 2, "validation_seeds": 1, "validate_every": 1}
SHORT |= {"fallback": False}


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("trained")
    return {name: pipelines.saved(name, base / name) for name in ("ddim", *pipelines.TEXT)}


@pytest.fixture(scope="session")
def models(folders) -> dict[str, Any]:
    return {name: pipelines.load(folder) for name, folder in folders.items()}


@pytest.fixture
def quick(monkeypatch) -> None:
    """Solves that pass for fine ones, where it does not matter how good the solver is."""
    monkeypatch.setattr(choices, "REFERENCE_INTERVALS", 4)


def learned(pipeline: Any, conditions: Any = None, **options: Any) -> LearnedSolver:
    """A short run on a pipeline; options as of `train`."""
    bound = conditions or (lambda seeds: pipeline.denoiser())
    run = {**SHORT, "inner": 3, **options}
    return train(bound(range(1)), pipeline.shape, conditions=bound, prior=pipeline.prior, **run)


# -- prompts ----------------------------------------------------------------------------------


class Listening:
    """A model that notes what it is asked to say."""

    def __init__(self) -> None:
        self.card = SimpleNamespace(kind="pipeline", name="toy")
        self.said: list[str] = []

    def denoiser(self, prompt: list[str], **more: Any) -> None:
        self.said = prompt


def test_a_prompt_is_a_function_of_its_seed_and_validation_has_its_own():
    model = Listening()
    conditions = prompted(model, TEXTS)

    def said(seeds: Any) -> list[str]:
        conditions(seeds)
        return model.said

    together = said(TRAINING)
    assert together == [said([seed])[0] for seed in TRAINING]
    assert set(said(VALIDATION)) == set(TEXTS[9::10])
    assert set(together) == set(TEXTS) - set(TEXTS[9::10])
    few = prompted(model, ["one", "two", "two"])
    few(VALIDATION)
    assert set(model.said) == {"one", "two"}


@pytest.mark.parametrize("negative", [None, "on"])
@pytest.mark.parametrize("name", pipelines.TEXT)
def test_remembered_texts_say_what_texts_say(name, negative, models):
    model = models[name]
    texts, x = ["a cat", "mat", "a cat"], pipelines.noise(3, *model.shape)
    sigma = torch.full((3,), 3.0)
    model = replace(model, texts=TextCache())
    for guidance in (None, 4.0):
        asked = {"guidance": guidance, "negative": negative if guidance else None}
        plain = replace(model, texts=TextCache(limit=0)).denoiser(prompt=texts, **asked)
        model.denoiser(prompt=texts, **asked)
        remembered = model.denoiser(prompt=texts, **asked)
        with torch.no_grad():
            # a text alone and texts in a batch differ by the order of float32 sums
            ours, theirs = remembered(x, sigma), plain(x, sigma)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def test_each_text_is_encoded_once_alone_and_within_the_bound(models):
    model, read = models["sd"], []
    hook = model.pipe.text_encoder.register_forward_pre_hook(
        lambda module, inputs: read.append(len(inputs[0]))
    )
    model = replace(model, texts=TextCache())
    try:
        first = model.denoiser(prompt=["a cat", "mat"], guidance=3.0)
        assert set(read) == {1}
        once = len(read)
        texts = ["mat", "a cat", "mat"]
        second = model.denoiser(prompt=texts, guidance=3.0)
        assert len(read) == once
        one = first.cond["encoder_hidden_states"].nbytes // 2
        assert model.texts.size == 3 * one  # the third is the empty text
        narrow = replace(model, texts=TextCache(limit=one))
        for text in TEXTS:
            narrow.denoiser(prompt=text)
            assert (narrow.texts.size, len(narrow.texts.kept)) == (one, 1)
        known = len(read)
        narrow.denoiser(prompt=TEXTS[-1])  # the last to leave
        assert len(read) == known
        again = narrow.denoiser(prompt=["a cat", "mat"], guidance=3.0)
    finally:
        hook.remove()
    for name, other in (("cond", again), ("uncond", again), ("uncond", second)):
        ours, theirs = getattr(first, name), getattr(other, name)
        assert torch.equal(ours["encoder_hidden_states"], theirs["encoder_hidden_states"])
    rows = second.cond["encoder_hidden_states"]
    assert torch.equal(rows[[1, 0]], first.cond["encoder_hidden_states"])
    assert len(first.uncond["encoder_hidden_states"]) == 1  # one row for all


def test_what_is_too_long_is_said_once(models):
    model = replace(models["sd"], texts=TextCache())
    texts = [f"a cat sat on a mat and a mat and {i} more mats" for i in range(3)]
    with pytest.warns(UserWarning, match="does not see") as caught:
        model.denoiser(prompt=[*texts, *texts])
    assert len(caught) == 3  # one for each text
    model.denoiser(prompt=texts)  # and a warning here would fail the test


# -- where a grid ends ------------------------------------------------------------------------


class Guided:
    """The mixture as a guided network of a process: D + w (D - D_u), D_u at half the means."""

    def __init__(self, schedule: Any, w: float) -> None:
        self.schedule, self.w, self.inner = schedule, w, Mixture()
        self.sigma_min, self.sigma_max = schedule.sigma_min, schedule.sigma_max

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        sigma = sigma.clamp(self.sigma_min, self.sigma_max)  # a network knows no level below
        cond = self.inner(x, sigma)
        return cond + self.w * (cond - x / (1 + sigma[:, None] ** 2))

    def prior(self, seeds: Any) -> Tensor:
        return fewstep.noise.normal(seeds, (3,), "prior") / self.schedule.alpha(self.sigma_max)


SCHEDULES = {"vp": VP.scaled_linear(), "ddpm": VP.linear(), "flow": Shifted(Flow(), 3.0)}


def to_zero(denoiser: Guided, x: Tensor) -> Tensor:
    """A solve of many steps to sigma_min, and D there: dx = (x - D) dlog sigma, by midpoints."""
    x = x.double()
    levels = torch.logspace(
        math.log10(denoiser.sigma_max), math.log10(denoiser.sigma_min), 801, dtype=torch.float64
    )
    full = torch.ones(len(x), dtype=torch.float64)
    for cur, nxt in pairwise(levels):
        mid, h = (cur * nxt).sqrt(), torch.log(cur / nxt)
        half = torch.exp(-h / 2)
        at_mid = half * x + (1 - half) * denoiser(x, cur * full)
        x = torch.exp(-h) * x - torch.expm1(-h) * denoiser(at_mid, mid * full)
    return denoiser(x, levels[-1] * full)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_reference_reaches_zero(name):
    denoiser = Guided(SCHEDULES[name], 2.0)
    x = denoiser.prior(range(8))
    ends = denoiser.sigma_max, denoiser.sigma_min
    levels = whole_grid(40, *ends, 0.0, denoiser.schedule)
    assert (len(levels), levels[0], levels[-2], levels[-1]) == (41, *ends, 0.0)
    ours = fewstep.solve(denoiser, x, "deis-4", grid=levels)
    torch.testing.assert_close(ours.double(), to_zero(denoiser, x), rtol=0, atol=0.01)


@pytest.mark.parametrize("name", SCHEDULES)
def test_tuned_ends_at_zero_and_learns_to(name):
    denoiser = Guided(SCHEDULES[name], 1.0)
    solver = train(
        *(denoiser, (3,)),
        nfe=3,
        prior=denoiser.prior,
        trajectories=1200,
        batch=40,
        inner=15,
        validation_seeds=16,
        fallback=False,
    )
    assert (solver.sigmas[-1], solver.method.base) == (0.0, "dpmpp-2m")
    assert solver.training["grid"] == "trailing"
    assert solver.plan().ops[-1].sigma == 0
    x = denoiser.prior(VALIDATION[:16])
    exact = to_zero(denoiser, x)

    def error(x: Tensor) -> float:
        return (x - exact).square().flatten(1).mean(1).sqrt().mean().item()

    untrained = fewstep.solve(denoiser, x, "dpmpp-2m", 3, grid="trailing", end="zero")
    assert error(fewstep.solve(denoiser, x, solver)) < 0.9 * error(untrained)
    assert abs(solver.validation["error"] - error(fewstep.solve(denoiser, x, solver))) < 0.01
    assert abs(solver.validation["error_untrained"] - error(untrained)) < 0.01


@pytest.mark.parametrize("base", ["dpmpp-2m", "ipndm-3", "heun", "deis-3"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_an_untrained_table_to_zero_is_its_base(name, base):
    denoiser = Guided(SCHEDULES[name], 1.0)
    grid = (*fewstep.grid.trailing(5, denoiser.schedule)[:-1], 0.0)
    x = denoiser.prior(range(4)).double()
    ours = fewstep.solve(denoiser, x, Tuned.start(base, grid, "none"))
    theirs = fewstep.solve(denoiser, x, base, grid=grid)
    # the base's eps of a flow is a difference of numbers of 1e5
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8)


def test_the_end_can_be_chosen_and_amed_ends_above_zero():
    denoiser = Guided(SCHEDULES["vp"], 1.0)
    run = {**SHORT, "prior": denoiser.prior, "nfe": 4}
    assert train(denoiser, (3,), end="sigma_min", **run).sigmas[-1] == denoiser.sigma_min
    amed = train(denoiser, (3,), method="amed", **run)
    assert amed.sigmas == fewstep.grid.discrete(3, denoiser.schedule)
    for refused in ({"end": "zero"}, {"grid": (14.0, 1.0, 0.0)}):
        with pytest.raises(ValueError, match="must end above 0"):
            train(denoiser, (3,), method="amed", **refused, **run)


# -- where they run ---------------------------------------------------------------------------


def pipeline_latents(pipe: Any, solver: LearnedSolver, z: Tensor, **text: Any) -> Tensor:
    plan = solver.plan()
    pipe.scheduler = FewstepScheduler.from_plan(pipe.scheduler.config, plan)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        return pipe(
            num_inference_steps=len(plan.sigmas) - 1, latents=z, output_type="latent", **text
        ).images


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "name, options",
    [
        ("sd", {"method": "tuned", "nfe": 3}),
        ("sd", {"method": "amed-plugin", "base": "dpmpp-2m", "nfe": 4, "scale_time": 0.2}),
        pytest.param("sdxl", {"method": "tuned", "nfe": 3}, marks=pytest.mark.slow),
        pytest.param("sd3", {"method": "tuned", "nfe": 3}, marks=pytest.mark.slow),
        ("sd3", {"method": "amed-plugin", "base": "dpmpp-2m", "nfe": 4, "scale_time": 0.2}),
    ],
)
def test_a_learned_plan_in_the_pipeline_of_diffusers_gives_the_same(name, options, models):
    model, asked = models[name], {"guidance": 3.0, "negative": "on"}
    extra = {} if options["method"] == "tuned" else {"features": False}
    solver = learned(model, prompted(model, TEXTS, **asked), lr=0.05, **options, **extra)
    z, texts = pipelines.noise(2, *model.shape), ["a cat", "mat"]
    x = z / model.process.schedule.alpha(model.process.sigma_max)
    with torch.no_grad():
        ours = fewstep.solve(model.denoiser(prompt=texts, **asked), x, solver)
    theirs = pipeline_latents(
        pipelines.MAKERS[name](),
        solver,
        z,
        prompt=texts,
        negative_prompt=["on", "on"],
        guidance_scale=3.0,
    )
    if options["method"] != "tuned":  # a pipeline ends with x_t, at sigma_min
        theirs = theirs / model.process.schedule.alpha(solver.sigmas[-1])
    size = max(1.0, float(theirs.abs().max()))
    torch.testing.assert_close(ours / size, theirs / size, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "name, method",
    [
        ("sd", "amed"),
        pytest.param("sdxl", "amed", marks=pytest.mark.slow),
        ("sd3", "amed-plugin"),
    ],
)
def test_amed_reads_the_middle_of_the_network(name, method, models):
    model = models[name]
    base = None if method == "amed" else "dpmpp-2m"
    conditions = prompted(model, TEXTS, guidance=2.0)
    solver = learned(model, conditions, method=method, base=base, nfe=4, lr=0.05)
    found: Any = solver.method
    assert found.predictor.features == 16  # 4 x 4 places of the middle of 8 x 8 latents
    samples = fewstep.sample(model, solver=solver, seeds=[0, 1], prompt="a cat", guidance=3.0)
    assert samples.nfe == 4
    with pytest.raises(ValueError, match="differ between samples"):
        solver.plan()


class Watched(Wrapper):
    """Notes the dtypes of states, D's and text."""

    def __init__(self, denoiser: Any, seen: list[Any]) -> None:
        self.denoiser, self.seen = denoiser, seen

    def evaluate(self, inner: Any, x: Tensor, sigma: Tensor) -> tuple[Tensor, Any]:
        out, features = inner(x, sigma)
        said = self.denoiser.cond["encoder_hidden_states"]
        self.seen.append((x.dtype, out.dtype, said.dtype))
        return out, features


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "dtype",
    ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)],  # slow on a CPU
)
def test_networks_in_half_precision_keep_states_in_single(dtype, folders):
    model = pipelines.load(folders["sd"], dtype=dtype)
    seen: list[Any] = []
    inner: Any = prompted(model, TEXTS, guidance=2.0)

    def conditions(seeds: Any) -> Any:
        denoiser = inner(seeds)

        return Watched(denoiser, seen)

    solver = learned(model, conditions, nfe=3)
    assert set(seen) == {(torch.float32, torch.float32, getattr(torch, dtype))}
    assert math.isfinite(solver.validation["error"])


# -- memory -----------------------------------------------------------------------------------


def test_what_a_loss_keeps_is_states_whatever_the_budget(models):
    model = models["sd"]
    denoiser = model.denoiser(prompt="a cat", guidance=2.0)
    x = model.prior([0, 1])

    def kept(nfe: int) -> int:
        """Bytes that a loss holds for its gradient before it goes back."""
        grid = (*fewstep.grid.trailing(nfe + 1, model.schedule)[:-1], 0.0)
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        table = Tuned.start("dpmpp-2m", grid, "none")
        for value in table.learned.values():
            value.requires_grad_()
        lesson = Lesson(denoiser, x, Way((x, torch.zeros_like(x)), ()), None)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = next(table.losses(lesson)).value
        assert loss.requires_grad
        return sum(sizes.values())

    few, many = kept(3), kept(6)
    assert many - few < 3 * 8 * x.nbytes  # a few states for each evaluation
    sizes: list[int] = []
    with (
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(
            lambda t: (sizes.append(t.nbytes), t)[1], lambda t: t
        ),
    ):
        Frozen(denoiser)(x.clone().requires_grad_(), torch.ones(2))
    assert many < sum(sizes) / 4  # what one call without a checkpoint keeps


# -- the command ------------------------------------------------------------------------------


def run(*arguments: Any) -> str:
    result = command(*arguments)
    if result.exit_code:
        raise ValueError(result.stderr.strip())
    return result.stdout


@pytest.fixture
def captions(tmp_path) -> Path:
    path = tmp_path / "captions.csv"
    path.write_text("image_id,prompt\n" + "\n".join(f"{i},{t}" for i, t in enumerate(TEXTS)))
    return path


RECIPE = (
    *("--method", "amed-plugin", "--base", "dpmpp-2m", "--grid", "discrete"),
    *("--scale-dir", 0, "--scale-time", 0.2, "--teacher", "dpmpp-2m", "--inner", 2),
    *("--guidance", 7.5, "--nfe", 4),
)
TINY = (
    *("--trajectories", 4, "--batch", 2, "--validation-seeds", 1, "--validate-every", 1),
    "--not-fallback",
)


@pytest.mark.usefixtures("quick")
def test_the_published_recipe_and_its_record(folders, captions, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "solver"
    told = run(
        *("train", "solver", folders["sd"], "--prompts", captions, "--negative", "on"),
        *("--out", out, *RECIPE, *TINY),
    )
    assert re.search(r"amed-plugin on dpmpp-2m \w+, 4 evaluations, error [\d.]+", told)
    assert f"--solver {out} --prompt 'mat 0' --guidance 7.5" in told
    record = json.loads((out / "solver.json").read_text())
    weights = folders["sd"] / "unet" / "diffusion_pytorch_model.safetensors"
    model = record["model"]
    assert model["weights"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert model["prompts"] == hashlib.sha256("\0".join(TEXTS).encode()).hexdigest()
    assert (model["guidance"], model["negative"]) == (7.5, "on")
    training = record["training"]
    assert (training["grid"], training["teacher"], training["inner"]) == ("discrete", "dpmpp-2m", 2)
    assert (record["settings"]["scale_dir"], record["settings"]["scale_time"]) == (0, 0.2)
    # the same run on other prompts, or guided otherwise, is another
    captions.write_text("prompt\na mat\n")
    with pytest.raises(ValueError, match=r"is of a run with prompts=\w+ \(now \w+\)"):
        run(
            *("train", "solver", folders["sd"], "--prompts", captions, "--negative", "on"),
            *("--out", out, *RECIPE, *TINY),
        )


@pytest.mark.usefixtures("quick")
def test_other_prompts_and_guidance_work_and_other_weights_are_warned_of(
    models, folders, tmp_path, recwarn
):
    model = models["sd"]
    facts = {"name": "sd", "weights": model.card.weights_sha256}
    solver = learned(model, prompted(model, TEXTS, guidance=2.0), nfe=3, model=facts, out=tmp_path)
    asked = {"seeds": [0], "solver": str(tmp_path), "prompt": "at a mat", "guidance": 5.0}
    assert fewstep.sample(model, **asked).provenance["solver"].endswith(solver.digest)
    assert not [w for w in recwarn if "trained on" in str(w.message)]
    other = pipelines.load(pipelines.saved("sd", tmp_path / "other", unet={"layers_per_block": 2}))
    with pytest.warns(UserWarning, match="trained on other weights than those of other"):
        fewstep.sample(other, **asked)


class Stop(Exception):
    pass


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("method", ["tuned", "amed-plugin"])
def test_a_run_under_prompts_that_was_stopped_ends_where_the_other_does(method, models, tmp_path):
    model = models["sd"]
    base = "dpmpp-2m" if method == "amed-plugin" else None

    def again(out: str, report: Any = lambda progress: None) -> None:
        conditions = prompted(model, TEXTS, guidance=2.0)  # with an empty memory
        settings = {"method": method, "base": base, "nfe": 2, "trajectories": 6}
        learned(
            model, conditions, out=tmp_path / out, report=report, checkpoint_every=1, **settings
        )

    def stop(progress: Any) -> None:
        if progress.step == 2:
            raise Stop

    again("whole")
    with pytest.raises(Stop):
        again("cut", stop)
    again("cut")
    for name in ("solver.json", "log.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("method", [("--method", "tuned", "--nfe", 4), RECIPE])
def test_the_command_killed_half_way_ends_in_the_same_file(method, folders, captions, tmp_path):
    def train_into(out: Path, kill_at: int | None = None) -> None:
        command = [sys.executable, "-m", "fewstep", "train", "solver", folders["sd"]]
        command += ["--prompts", captions, "--out", out, *TINY, *method, "--guidance", 3]
        command += ["--trajectories", 16, "--checkpoint-every", 1, "--dtype", "float32"]
        environment = {**os.environ, "XDG_CACHE_HOME": str(out.parent / f"cache-{out.name}")}
        with subprocess.Popen([str(part) for part in command], env=environment) as process:
            while kill_at is not None and process.poll() is None:
                lines = (out / "log.jsonl").read_text() if (out / "log.jsonl").exists() else ""
                if len(lines.splitlines()) > kill_at:
                    os.kill(process.pid, signal.SIGKILL)
                    break
                time.sleep(0.01)
            process.wait()

    train_into(tmp_path / "whole")
    for at in (2, 5):
        train_into(tmp_path / "cut", at)
        assert not (tmp_path / "cut" / "solver.json").exists()
    train_into(tmp_path / "cut")
    for file in (tmp_path / "whole").iterdir():
        if file.name != "checkpoint.safetensors":
            assert file.read_bytes() == (tmp_path / "cut" / file.name).read_bytes(), file.name


@pytest.mark.parametrize(
    "model, arguments, message",
    [
        ("ddim", ("--prompts", "FILE"), "ddim takes no text; leave out prompt"),
        ("fashion-mnist", ("--prompts", "FILE"), "fashion-mnist takes no text; leave out prompts"),
        ("sd", ("--guidance", 7.5), "guidance needs a prompt"),
        ("sd", ("--prompts", "EMPTY"), "EMPTY.csv has no captions"),
        ("sd", ("--prompts", "FILE", "--prompt", "mat"), "leave out --prompt"),
        ("sd", ("--negative", "mat"), "leave out --negative"),
        ("sd", ("--prompts", "FILE", "--label", 3), "leave out --label"),
        ("sd", ("--prompt", "mat", "--method", "amed", "--end", "zero"), "must end above 0"),
        ("sd", ("--prompt", "mat", "--loss", "fashion-a"), "takes float pictures [n, 1, 32, 32]"),
        ("sd3", ("--prompt", "mat", "--method", "amed"), "take amed-plugin on dpmpp-2m, or tuned"),
        ("fashion-mnist", ("--grid", "discrete"), "take karras, log-snr or time-uniform"),
    ],
)
def test_what_cannot_be_trained_is_one_line(model, arguments, message, folders, captions, tmp_path):
    (tmp_path / "EMPTY.csv").write_text("")
    files = {"FILE": captions, "EMPTY": tmp_path / "EMPTY.csv"}
    given = [files.get(argument, argument) for argument in arguments]
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        run("train", "solver", folders.get(model, model), "--out", out, *given, *TINY)
    assert "\n" not in str(caught.value)
    assert not out.exists()


def test_a_network_of_nan_is_one_line(folders, tmp_path):
    model = pipelines.load(folders["sd"])
    with torch.no_grad():
        model.net.conv_out.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="NaN or infinity at sigma 14"):
        learned(model, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
