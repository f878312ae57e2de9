"""Students of pipelines: their data, their training, their files, whole or as adapters."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import fewstep
from fewstep.distillation import distill
from fewstep.distillation.encoded import EncodedTexts, encoded, encoded_texts
from fewstep.distillation.recipe import Encoding
from fewstep.distillation.sets import claimed, make_room
from fewstep.distillation.students import Examination
from fewstep.distillation.validation import read_judges
from fewstep.evaluate.agreement import agreement
from fewstep.evaluate.compare.run import load_students
from fewstep.files import alike
from fewstep.integrations.diffusers import FewstepScheduler
from fewstep.models.formats.loras import DIFFUSERS, KOHYA
from fewstep.networks.lora import TARGETS, adapted_modules
from fewstep.sampling.choose import plan_for
from fewstep.sampling.settings import Settings
from tests.support import pipelines

TEXTS = ("a cat", "a mat", "sat")
TINY: dict[str, Any] = {"pictures": 16, "batch": 8, "dtype": "float32", "lr": 1e-2}
QUIET: dict[str, Any] = {"validation_seeds": 0, "checkpoint_every": 1}
FEW = {"train": "lora", "rank": 2, "targets": ("to_q", "conv1", "proj_in")}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def data(folder: Path, count: int = 6) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(TEXTS[i % 3])
    return folder


def model(folder: Path, name: str = "sd", **options: Any) -> Any:
    return fewstep.load(pipelines.saved(name, folder, **options))


def count_calls(monkeypatch: pytest.MonkeyPatch, loaded: Any) -> dict[str, int]:
    """How many pictures and texts the autoencoder and the text encoder see."""
    seen = {"pictures": 0, "texts": 0}
    vae, text = loaded.pipe.vae, loaded.pipe.text_encoder
    encode, forward = vae.encode, text.forward

    def pictures(x: torch.Tensor, *args: Any, **options: Any) -> Any:
        seen["pictures"] += len(x)
        return encode(x, *args, **options)

    def texts(*args: Any, **options: Any) -> Any:
        seen["texts"] += 1
        return forward(*args, **options)

    monkeypatch.setattr(vae, "encode", pictures)
    monkeypatch.setattr(text, "forward", texts)
    return seen


# --- the cache -------------------------------------------------------------------------------


def test_the_second_epoch_runs_neither_autoencoder_nor_text_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, folder = model(tmp_path / "sd"), data(tmp_path / "data")
    seen = count_calls(monkeypatch, loaded)
    at: list[dict[str, int]] = []
    run = {**TINY, "pictures": 24, "batch": 3}
    distill(loaded, folder, report=lambda step: at.append(dict(seen)), **run, **QUIET)
    assert len(at) == 8  # steps: four epochs of six pictures
    assert at[0] == at[-1] == {"pictures": 6, "texts": 4}  # three texts, and none
    distill(loaded, folder, **run, **QUIET)  # another run, or one that resumes
    assert seen["pictures"] == 6


def test_a_folder_of_another_run_is_refused_before_anything_is_encoded(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, folder = model(tmp_path / "sd"), data(tmp_path / "data")
    out, how = tmp_path / "out", {**TINY, **QUIET, **FEW}
    distill(loaded, folder, out=out, **how)
    shutil.rmtree(cache)
    seen = count_calls(monkeypatch, loaded)
    files = {one.name: one.read_bytes() for one in out.iterdir() if one.is_file()}
    cases = [({"rank": 3}, r"with rank=2 \(now 3\)"), ({"pictures": 8}, "is at step 2, past the 1")]
    for other, words in cases:
        with pytest.raises(ValueError, match=words):
            distill(loaded, folder, out=out, **{**how, **other})
    (out / "checkpoint.safetensors").unlink()
    with pytest.raises(ValueError, match="so it is another's"):
        distill(loaded, folder, out=out, **how)
    assert seen["pictures"] == 0
    del files["checkpoint.safetensors"]
    assert {one.name: one.read_bytes() for one in out.iterdir() if one.is_file()} == files


def test_rows_are_those_of_the_autoencoder_and_the_text_encoder(tmp_path: Path) -> None:
    loaded, folder = model(tmp_path / "sdxl", "sdxl"), data(tmp_path / "data")
    found = encoded(folder, loaded, Encoding())
    x_0, condition = found.batch(torch.tensor([4, 0]))
    picture = np.array(Image.open(folder / "4.png"))[:, 2:22]
    from fewstep.data.images import fit_picture

    ours = loaded.encode(np.stack([fit_picture(picture, 16, 16)]))
    torch.testing.assert_close(x_0[:1], ours, rtol=2e-3, atol=2e-3)  # float16
    theirs = loaded.condition([TEXTS[1], TEXTS[0]])
    text = condition["encoder_hidden_states"], theirs["encoder_hidden_states"]
    torch.testing.assert_close(*text, rtol=2e-3, atol=2e-3)
    sizes = (one["added_cond_kwargs"]["time_ids"] for one in (condition, theirs))
    assert torch.equal(*sizes)


def test_a_cache_that_was_cut_short_ends_in_the_same_bytes(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fewstep.distillation.encoded.ROWS", 2)
    loaded, folder = model(tmp_path / "sd"), data(tmp_path / "data")
    whole = encoded(folder, loaded, Encoding())
    files = {one.name: one.read_bytes() for one in whole.folder.glob("*.safetensors")}
    assert len(files) == 5
    for name in ("pictures-00001.safetensors", "texts-00001.safetensors"):
        (whole.folder / name).unlink()
    cut = whole.folder / "pictures-00002.safetensors"
    cut.write_bytes(cut.read_bytes()[:-7])
    again = encoded(folder, loaded, Encoding())
    assert again.digest == whole.digest
    assert {one.name: one.read_bytes() for one in again.folder.glob("*.safetensors")} == files


def test_unreadable_samples_are_counted_named_and_left_out(tmp_path: Path) -> None:
    loaded, folder = model(tmp_path / "sd"), data(tmp_path / "data")
    (folder / "1.png").write_bytes(b"no picture")
    Image.new("RGB", (9, 9)).save(folder / "3.png")
    with pytest.warns(UserWarning, match=r"2 samples are left out: 1.png: .*; 3.png: .*fewer"):
        found = encoded(folder, loaded, Encoding())
    assert len(found) == 4
    with pytest.raises(ValueError, match=r"2 samples cannot be read, and most_bad is 1: 1\.png"):
        encoded(folder, loaded, Encoding(most_bad=1))


def test_no_usable_sample_is_an_error_before_the_first_step(tmp_path: Path) -> None:
    loaded, folder = model(tmp_path / "sd"), data(tmp_path / "data", count=1)
    (folder / "0.png").write_bytes(b"no picture")
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(ValueError, match="no sample that can be used"),
    ):
        distill(loaded, folder, out=tmp_path / "out", **TINY, **QUIET)
    assert not (tmp_path / "out").exists()


def test_the_cache_is_bounded_and_the_oldest_sets_make_room(tmp_path: Path, cache: Path) -> None:
    loaded = model(tmp_path / "sd")
    first = encoded(data(tmp_path / "one"), loaded, Encoding())
    size = sum(one.stat().st_size for one in first.folder.iterdir())
    with pytest.raises(ValueError, match="raise it, or give fewer"):
        encoded(data(tmp_path / "two"), loaded, Encoding(cache_gib=1e-6))
    tight = Encoding(cache_gib=1.2 * size / 2**30)
    again = encoded(tmp_path / "one", loaded, Encoding())  # a second run with the same set
    for _ in range(2):
        with pytest.raises(ValueError, match=r"of which sets in use have .* wait until the others"):
            encoded(tmp_path / "two", loaded, tight)
        first = again
        assert len(first.batch(torch.arange(6))[0]) == 6
    del first, again
    second = encoded(tmp_path / "two", loaded, tight)
    assert {one.name for one in (cache / "latents").iterdir()} == {second.folder.name}


HOLDS = """
import fcntl, sys
file = open(sys.argv[1], "w")
file.write("using")
file.flush()
fcntl.flock(file, fcntl.LOCK_SH)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_set_that_another_process_uses_stays_until_that_ends(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    home, other = tmp_path / "new", tmp_path / "old"
    home.mkdir()
    other.mkdir()
    (other / "pictures-00000.safetensors").write_bytes(bytes(600))
    room = 1000 / 2**30
    run = [sys.executable, "-S", "-c", HOLDS, str(other / ".claim")]
    with subprocess.Popen(run, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="sets in use have"):
            make_room(home, 900, room, "new numbers")
        assert (other / "pictures-00000.safetensors").stat().st_size == 600
        process.kill()
    make_room(home, 900, room, "new numbers")
    assert not other.exists()


def test_a_set_that_is_removed_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "set"
    home.mkdir()
    monkeypatch.setattr("fewstep.distillation.sets.WAIT", 0.001)
    with alike(home, "removing"), pytest.raises(ValueError, match="another process removes"):
        claimed(home)
    with claimed(home), claimed(home):
        assert [one.name for one in home.iterdir()] == [".claim"]
    assert not list(home.iterdir())


@pytest.mark.slow
def test_without_pictures_the_starts_are_the_teachers_own(tmp_path: Path) -> None:
    loaded, texts = model(tmp_path / "sd"), tmp_path / "texts.csv"
    texts.write_text("prompt\na cat\na mat\n")
    with pytest.raises(ValueError, match="give a file of captions"):
        distill(loaded, None, **TINY, **QUIET)
    how = Encoding(captions=texts, starts=3)
    found = encoded(None, loaded, how)
    x_0, condition = found.batch(torch.arange(3))
    denoiser = loaded.denoiser(prompt=["a cat", "a mat", "a cat"])
    x = loaded.prior(range(2_000_000, 2_000_003))
    ends = fewstep.solve(denoiser, x, "dpmpp-2m", nfe=25, grid="trailing", end="zero")
    torch.testing.assert_close(x_0, ends, rtol=2e-3, atol=2e-3)
    assert torch.equal(condition["encoder_hidden_states"][0], condition["encoder_hidden_states"][2])
    student = distill(loaded, None, encoding=how, guidance=2.0, **TINY, **QUIET)
    assert student.card.built_in_guidance == 2.0


@pytest.mark.parametrize("pictures", [False, True])
def test_texts_alone_are_those_of_the_encoder_and_nothing_is_solved_or_encoded(
    pictures: bool, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fewstep.distillation.encoded.ROWS", 2)
    loaded, file = model(tmp_path / "sd"), tmp_path / "texts.csv"
    file.write_text("prompt\n" + "\n".join(TEXTS))
    where = data(tmp_path / "data") if pictures else None
    how = Encoding() if pictures else Encoding(captions=file, starts=5)
    seen = count_calls(monkeypatch, loaded)
    monkeypatch.setattr(loaded.net, "forward", None)  # not called
    found = encoded_texts(where, loaded, how)
    assert isinstance(found, EncodedTexts)
    assert seen == {"pictures": 0, "texts": 3}  # one row, for its size, and two shards
    assert (len(found), tuple(found.known_texts)) == (6 if pictures else 5, TEXTS)
    x_0, condition = found.batch(torch.tensor([4, 0, 2]))
    assert x_0.shape == (3, *loaded.shape)
    pipe = pipelines.diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "sd")
    words = [TEXTS[1], TEXTS[0], TEXTS[2]]
    tokens = pipe.tokenizer(words, padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        theirs = pipe.text_encoder(tokens.input_ids)[0]
    assert isinstance(condition, dict)
    torch.testing.assert_close(condition["encoder_hidden_states"], theirs, rtol=2e-3, atol=2e-3)
    before = seen["texts"]
    again = encoded_texts(where, loaded, how)
    assert (again.digest, seen["texts"]) == (found.digest, before)
    assert [one.suffix for one in found.folder.iterdir() if one.name != ".claim"] == [
        ".safetensors"
    ] * 2


def test_without_text_what_starts_from_noise_needs_no_set(tmp_path: Path, cache: Path) -> None:
    loaded = model(tmp_path / "ldm", "ldm")
    found = encoded_texts(None, loaded, Encoding())
    assert found.batch(torch.arange(2))[0].shape == (2, *loaded.shape)
    assert not cache.exists()
    with pytest.raises(ValueError, match="takes no text; leave out captions"):
        encoded_texts(None, loaded, Encoding(captions=tmp_path / "texts.csv"))


# --- training --------------------------------------------------------------------------------

WAYS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "epsilon": ("sd", {}, {"guidance": 3.0}),
    "v": ("sd", {"prediction_type": "v_prediction"}, {"method": "lcm"}),
    "zero snr": (
        "sd",
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        {"guidance": (2.0, 4.0)},
    ),
    "as published": ("sd", {}, {"tell": "gamma", "points": 51, "teacher": "ddim", "substeps": 1}),
    "xl": ("sdxl", {}, {"checkpointing": True}),
    "flow": ("sd3", {}, {"guidance": 2.0}),
    "flow adapters": ("sd3", {}, {"train": "lora", "rank": 2}),
    "adapters": ("sd", {}, {**FEW, "guidance": 3.0, "checkpointing": True}),
}


EVERYDAY = ("epsilon", "flow", "adapters")


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[] if way in EVERYDAY else pytest.mark.slow) for way in WAYS]
)
def test_a_student_comes_back_from_its_files_and_samples(way: str, tmp_path: Path) -> None:
    name, scheduler, settings = WAYS[way]
    loaded = model(tmp_path / "teacher", name, **scheduler)
    out = tmp_path / "student"
    student = distill(loaded, data(tmp_path / "data"), out=out, **TINY, **QUIET, **settings)
    if settings.get("train") == "lora":
        again = fewstep.load(tmp_path / "teacher", loras=[(out, 1.0)])
    else:
        again = fewstep.load(out)
    assert again.card.distilled == student.card.distilled != None  # noqa: E711
    assert again.card.auto == student.card.auto
    asked = {"seeds": range(2), "prompt": "a cat", "nfe": 2}
    ours, theirs = (fewstep.sample(one, **asked) for one in (student, again))
    assert (ours.nfe, ours.network_calls) == (2, 2)
    difference = np.abs(ours.images.astype(int) - theirs.images)
    assert difference.max() <= 3  # float16 in the files
    plain = fewstep.sample(fewstep.load(tmp_path / "teacher"), **{**asked, "solver": "ddim"})
    assert not np.array_equal(plain.images, theirs.images)
    if student.card.built_in_guidance or "gamma" in student.card.told:
        with pytest.raises(ValueError, match="leave guidance out"):
            again.denoiser(prompt="a cat", guidance=5.0)


def test_a_pipeline_without_text_learns_from_pictures_alone(tmp_path: Path) -> None:
    loaded, folder = model(tmp_path / "ldm", "ldm"), data(tmp_path / "data")
    for one in folder.glob("*.txt"):
        one.unlink()
    student = distill(loaded, folder, out=tmp_path / "out", **TINY, **QUIET)
    assert fewstep.sample(student, seeds=[0], nfe=1).nfe == 1
    with pytest.raises(ValueError, match="has no effect"):
        distill(loaded, tmp_path / "data", guidance=2.0, **TINY, **QUIET)


def test_adapters_leave_their_teacher_as_it_is_and_share_its_network(tmp_path: Path) -> None:
    loaded, folder = model(tmp_path / "sd"), data(tmp_path / "data")
    before = {name: value.clone() for name, value in loaded.net.state_dict().items()}
    asked = {"seeds": range(2), "prompt": "a cat", "nfe": 2, "solver": "ddim"}
    plain = fewstep.sample(loaded, **asked)
    student: Any = distill(loaded, folder, **TINY, **QUIET, **FEW)
    assert student.net is loaded.net
    after = loaded.net.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert np.array_equal(fewstep.sample(loaded, **asked).images, plain.images)
    changed = fewstep.sample(student, **{**asked, "solver": "auto"})
    assert not np.array_equal(changed.images, plain.images)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_of_a_base_in_bfloat16_train_in_its_arithmetic(
    checkpointing: bool, tmp_path: Path
) -> None:
    base = fewstep.load(pipelines.saved("sd", tmp_path / "sd"), dtype="bfloat16")
    assert base.dtype == torch.bfloat16  # type: ignore[attr-defined]
    how = {**TINY, **QUIET, **FEW, "checkpointing": checkpointing}
    student: Any = distill(base, data(tmp_path / "data"), **how)
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    down, up = student.forward.tensors()[layer]
    assert (down.dtype, up.dtype) == (torch.float32, torch.float32)
    with torch.no_grad(), student.forward.switch.on(student.forward):
        ours = base.net.get_submodule(layer)(x)  # type: ignore[attr-defined]
    weight = base.net.get_submodule(layer).weight  # type: ignore[attr-defined]
    theirs = x @ weight.T + (x @ down.bfloat16().T) @ up.bfloat16().T
    assert float(up.abs().max()) > 0
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)  # 2^-8 of each sum
    asked = {"seeds": range(2), "prompt": "a cat", "nfe": 2}
    assert np.isfinite(fewstep.sample(student, **asked).images).all()


def test_what_is_kept_of_adapters_is_the_adapters(tmp_path: Path) -> None:
    from safetensors import safe_open

    loaded = model(tmp_path / "sd")
    distill(loaded, data(tmp_path / "data"), out=tmp_path / "out", **TINY, **QUIET, **FEW)
    with safe_open(tmp_path / "out" / "checkpoint.safetensors", "pt") as file:
        sizes = {name: file.get_tensor(name).numel() for name in file.keys()}  # noqa: SIM118
    small = sum(n for name, n in sizes.items() if name.startswith("weights."))
    whole = sum(value.numel() for value in loaded.net.parameters())
    assert sum(sizes.values()) < 5.1 * small < whole


def test_validation_shows_texts_beside_the_teacher(tmp_path: Path) -> None:
    loaded, out = model(tmp_path / "sd"), tmp_path / "out"
    how = {**QUIET, "validation_seeds": 3, "validate_every": 2}
    distill(loaded, data(tmp_path / "data"), out=out, guidance=2.0, **TINY, **how)
    assert (out / "validation" / "0000002.png").is_file()
    line = (out / "log.jsonl").read_text()
    assert '"rmse_1"' in line
    assert '"rmse_ode_4"' in line


def test_what_comes_with_a_judge_is_judged_by_prompts_of_its_own(tmp_path: Path) -> None:
    loaded, other = fewstep.load("garments"), model(tmp_path / "sd")
    found = read_judges(loaded, None, None, None, 3)
    assert found["judge"].name == "garments-a"
    assert [one.text for one in found["asked"]] == found["prompts"] != []
    for one, count in ((loaded, 0), (other, 3)):
        assert read_judges(one, None, None, None, count)["judge"] is None
    pictures = np.zeros((3, 32, 32, 3), dtype=np.uint8)
    told = {"judge": found["judge"], "asked": found["asked"], "prompts": found["prompts"]}
    scores = Examination(loaded, 3, **told)._scores(pictures, "_2")
    assert scores == {"agreement_2": agreement(pictures, found["asked"], found["judge"]).all}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train": "lora", "tell": "gamma"}, "adapters cannot be told"),
        ({"train": "lora", "guidance": (2.0, 3.0)}, "adapters cannot be told"),
        ({"train": "lora", "targets": ("to_x",)}, "targets must end the names .* got to_x"),
        ({"rank": 4}, "rank=4 is of adapters"),
        ({"train": "lora", "compile": True}, "compile does not go with"),
        ({"tell": "gamma", "guidance": (2.0, 3.0)}, "has one input for gamma, guidance"),
        ({"lora_format": "kohya"}, "kohya needs train lora"),
        ({"features": Path("nowhere")}, "nowhere"),
        ({"clip_model": Path("nowhere")}, "nowhere is not a CLIP model"),
        ({"encoding": Encoding(starts=4)}, "starts is for training without pictures"),
    ],
)
def test_settings_that_cannot_be_are_one_line(
    settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    loaded, folder = model(tmp_path / "sd"), data(tmp_path / "data")
    with pytest.raises((ValueError, OSError), match=words) as told:
        distill(loaded, folder, out=tmp_path / "out", **{**TINY, **QUIET, **settings})
    assert "\n" not in str(told.value)
    assert not (tmp_path / "out").exists()


# --- files that others read ------------------------------------------------------------------


def drawn(pipe: Any, **options: Any) -> np.ndarray:
    """Pictures of a diffusers pipeline from our noise of two seeds."""
    from fewstep.noise import normal

    x = normal([0, 1], (4, 8, 8), "prior")
    made = pipe(
        prompt=["a cat", "a cat"], latents=x, guidance_scale=1.0, output_type="np", **options
    )
    return np.round(made.images * 255).astype(int)


def test_a_folder_runs_in_diffusers_with_the_scheduler_of_lcm(tmp_path: Path) -> None:
    loaded, out = model(tmp_path / "sd"), tmp_path / "out"
    distill(loaded, data(tmp_path / "data"), out=out, guidance=3.0, **TINY, **QUIET)
    pipe = pipelines.diffusers.StableDiffusionPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.scheduler).__name__ == "LCMScheduler"
    theirs = drawn(pipe, num_inference_steps=1)
    ours = fewstep.sample(fewstep.load(out), nfe=1, seeds=[0, 1], prompt="a cat").images
    assert np.abs(theirs - ours).max() <= 1
    pipe.scheduler.set_timesteps(4)
    found: Any = fewstep.load(out)
    schedule = found.process.schedule
    levels = found.card.auto["4"].grid[:-1]
    assert pipe.scheduler.timesteps.tolist() == [round(schedule.t(level)) for level in levels]
    plan = plan_for(Settings("consistency-ode", 2), fewstep.load(out))  # no noise on the way
    pipe.scheduler = FewstepScheduler.from_config(pipe.scheduler.config, solver=plan)
    theirs = drawn(pipe, num_inference_steps=2)
    asked = {"seeds": [0, 1], "prompt": "a cat", "solver": "consistency-ode", "nfe": 2}
    assert np.abs(theirs - fewstep.sample(fewstep.load(out), **asked).images).max() <= 1


@pytest.mark.parametrize("name", [DIFFUSERS, KOHYA])
@pytest.mark.parametrize("kind", ["sd", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_adapters_give_in_diffusers_the_picture_that_they_give_here(
    kind: str, name: str, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    loaded, out = model(tmp_path / kind, kind), tmp_path / "out"
    how = {**FEW, "targets": None, "lora_format": "kohya"}
    distill(loaded, data(tmp_path / "data"), out=out, **TINY, **QUIET, **how)
    pipe = pipelines.diffusers.DiffusionPipeline.from_pretrained(tmp_path / kind)
    pipe.set_progress_bar_config(disable=True)
    before = drawn(pipe, num_inference_steps=1)
    pipe.load_lora_weights(out, weight_name=name)
    pipe.scheduler = pipelines.diffusers.LCMScheduler.from_config(
        pipe.scheduler.config, original_inference_steps=10
    )
    theirs = drawn(pipe, num_inference_steps=1)
    assert np.abs(theirs - before).max() > 1
    student = fewstep.load(tmp_path / kind, loras=[(out / name, 1.0)])
    ours = fewstep.sample(student, nfe=1, seeds=[0, 1], prompt="a cat").images
    assert np.abs(theirs - ours).max() <= 1


ALONE = """
import sys
import numpy as np
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline
torch.set_num_threads(1)
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1])
pipe.load_lora_weights(sys.argv[2], weight_name=sys.argv[3])
pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, original_inference_steps=10)
x = torch.from_numpy(np.load(sys.argv[4] + "/noise.npy"))
made = pipe(prompt=["a cat"] * 2, latents=x, guidance_scale=1.0, num_inference_steps=1,
            output_type="np")
np.save(sys.argv[4] + "/made.npy", made.images)
assert not [name for name in sys.modules if name.startswith("fewstep")]
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", [DIFFUSERS, KOHYA])
def test_adapters_give_the_same_picture_in_a_process_without_fewstep(
    name: str, tmp_path: Path
) -> None:
    from fewstep.noise import normal

    pytest.importorskip("peft")
    loaded, out = model(tmp_path / "sd"), tmp_path / "out"
    distill(loaded, data(tmp_path / "data"), out=out, lora_format="kohya", **TINY, **QUIET, **FEW)
    np.save(tmp_path / "noise.npy", normal([0, 1], (4, 8, 8), "prior").numpy())
    files = [str(one) for one in (tmp_path / "sd", out, name, tmp_path)]
    run = [sys.executable, "-c", ALONE, *files]
    subprocess.run(run, check=True, capture_output=True, cwd=tmp_path, env={"PATH": ""})
    theirs = np.round(np.load(tmp_path / "made.npy") * 255).astype(int)
    student = fewstep.load(tmp_path / "sd", loras=[(out / name, 1.0)])
    ours = fewstep.sample(student, nfe=1, seeds=[0, 1], prompt="a cat").images
    assert np.abs(theirs - ours).max() <= 1


def test_adapters_that_do_not_fit_are_refused_by_their_first_key(tmp_path: Path) -> None:
    folder = pipelines.saved("sd", tmp_path / "sd")
    cases = {
        "unet.mid_block.nowhere.lora_A.weight": "key 'unet.mid_block.nowhere.lora_A.weight' has no",
        "lora_unet_mid.dora_scale": "is of no kind of LoRA",
        "unet.mid_block.resnets.0.conv1.lora_A.weight": "without its other half",
    }
    for i, (key, words) in enumerate(cases.items()):
        save_file({key: torch.zeros(2, 32)}, tmp_path / f"{i}.safetensors")
        with pytest.raises(ValueError, match=words) as told:
            fewstep.load(folder, loras=[(tmp_path / f"{i}.safetensors", 1.0)])
        assert "\n" not in str(told.value)
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    wrong = {f"{key}.lora_A.weight": torch.zeros(2, 7), f"{key}.lora_B.weight": torch.zeros(32, 2)}
    save_file(wrong, tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match=r"has shape \[2, 7\]"):
        fewstep.load(folder, loras=[(tmp_path / "wrong.safetensors", 1.0)])


@pytest.mark.slow
def test_the_scale_of_adapters_is_a_factor_and_is_recorded(tmp_path: Path) -> None:
    loaded, out = model(tmp_path / "sd"), tmp_path / "out"
    distill(loaded, data(tmp_path / "data"), out=out, **TINY, **QUIET, **FEW)
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    before = loaded.net.get_submodule(layer).weight
    changes = []
    for scale in (1.0, 0.5):
        found: Any = fewstep.load(tmp_path / "sd", loras=[(out, scale)])
        changes.append(found.net.get_submodule(layer).weight - before)
        assert found.facts()["loras"][0]["scale"] == scale
    torch.testing.assert_close(changes[0], 2 * changes[1], rtol=1e-4, atol=1e-7)
    with pytest.raises(ValueError, match="two of the LoRAs are students"):
        fewstep.load(tmp_path / "sd", loras=[(out, 1.0), (out, 1.0)])


def test_a_published_latent_consistency_model_is_a_student(tmp_path: Path) -> None:
    pipelines.saved("sd", tmp_path / "lcm", unet={"time_cond_proj_dim": 8})
    loaded: Any = fewstep.load(tmp_path / "lcm")
    times = [round(loaded.process.schedule.t(level)) for level in loaded.card.auto["4"].grid[:-1]]
    assert times == [999, 759, 499, 259]
    made = fewstep.sample(loaded, nfe=4, seeds=[0], prompt="a cat", guidance=8.0)
    assert (made.network_calls, made.provenance["solver"]) == (4, "consistency")
    with pytest.raises(ValueError, match="distilled already"):
        distill(loaded, tmp_path, **TINY, **QUIET)
    plain = fewstep.load(pipelines.saved("sd", tmp_path / "sd"), preset="lcm")
    assert plain.card.auto == loaded.card.auto


def lcm_lora(file: Path, net: Any, rank: int = 4, alpha: float = 8.0) -> Path:
    """Adapters as LCM-LoRA is published: kohya's names, its layers, float16, an alpha for each, and
    no word of what they are."""
    values: dict[str, torch.Tensor] = {}
    for i, (name, layer) in enumerate(adapted_modules(net, TARGETS)):
        gen = torch.Generator().manual_seed(i)
        weight: Any = layer.weight
        out, into, *kernel = weight.shape
        key = "lora_unet_" + name.replace(".", "_")
        down = torch.randn(rank, into, *kernel, generator=gen) / (10 * into**0.5)
        up = torch.randn(out, rank, *[1] * len(kernel), generator=gen) / rank
        values |= {f"{key}.lora_down.weight": down.half(), f"{key}.lora_up.weight": up.half()}
        values[f"{key}.alpha"] = torch.tensor(alpha)
    save_file(values, file)
    return file


def test_a_published_lcm_lora_gives_the_picture_that_it_gives_in_diffusers(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    loaded = model(tmp_path / "sd")
    file = lcm_lora(tmp_path / "lora.safetensors", loaded.net)
    pipe = pipelines.diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "sd")
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = pipelines.diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    before = drawn(pipe, num_inference_steps=1)
    pipe.load_lora_weights(tmp_path, weight_name=file.name)
    theirs = drawn(pipe, num_inference_steps=1)
    assert np.abs(theirs - before).max() > 5
    student = fewstep.load(tmp_path / "sd", loras=[(file, 1.0)], preset="lcm")
    assert student.card.auto["4"].solver == "consistency"
    ours = fewstep.sample(student, nfe=1, seeds=[0, 1], prompt="a cat").images
    assert np.abs(theirs - ours).max() <= 1


def test_published_students_stand_beside_solvers(tmp_path: Path) -> None:
    folders = {name: pipelines.saved(name, tmp_path / name) for name in ("sd", "lcm", "sdxl")}
    loaded: Any = fewstep.load(folders["sd"])
    lora = str(lcm_lora(tmp_path / "lora.safetensors", loaded.net))
    solvers, base = ["ddim", lora, str(folders["lcm"])], str(folders["sd"])
    with pytest.raises(ValueError, match=r"is no student, .* need --preset lcm"):
        load_students(loaded, solvers, base)
    found = load_students(loaded, solvers, base, "lcm", 2.0)
    assert list(found) == solvers[1:]
    asked = {"seeds": [0], "prompt": "a cat", "nfe": 2}
    scales = {lora: None, solvers[2]: 2.0}  # of the first it is built in, the second is told it
    for name, student in found.items():
        assert student.card.built_in_guidance == (2.0 if name == lora else None)
        made = fewstep.sample(student, guidance=scales[name], **asked)
        assert (made.network_calls, made.provenance["solver"]) == (2, "consistency")
    other = fewstep.load(folders["sdxl"])
    small = other.with_size(32, 32)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="give a student of this one"):
        load_students(small, solvers[2:], str(folders["sdxl"]))
    with pytest.raises(ValueError, match="is no student"):
        load_students(other, [base], str(folders["sdxl"]))


@pytest.mark.slow
def test_from_the_command_line_to_pictures(tmp_path: Path) -> None:
    from tests.support.command import command

    pipelines.saved("sd", tmp_path / "sd")
    folder = data(tmp_path / "data")
    out = tmp_path / "out"
    run = ["--pictures", "8", "--batch", "4", "--train", "lora", "--rank", "2", "--targets", "to_q"]
    run += ["--guidance", "2", "--validation-seeds", "0", "--lora-format", "kohya"]
    ran = command(
        "distill", "splam", str(tmp_path / "sd"), "--data", str(folder), "--out", str(out), *run
    )
    assert ran.exit_code == 0, ran.output
    assert "--lora" in ran.stdout
    told = (out / "preset.json").read_text()
    assert '"original_inference_steps": 10' in told
    assert "| teacher | `sd` |" in (out / "README.md").read_text()
    for name in (DIFFUSERS, KOHYA):
        shutil.rmtree(tmp_path / "samples", ignore_errors=True)
        asked = ["--lora", f"{out / name}:0.9", "--prompt", "a cat", "--nfe", "2", "--seeds", "0-1"]
        ran = command("sample", str(tmp_path / "sd"), *asked, "--out", str(tmp_path / "samples"))
        assert ran.exit_code == 0, ran.output
        assert len(list((tmp_path / "samples").glob("*.png"))) == 3


@pytest.mark.slow
@pytest.mark.parametrize("train", ["full", "lora"])
def test_two_processes_give_the_student_of_one_in_the_same_parts(
    train: str, tmp_path: Path
) -> None:
    """To the bit, the cache that they share included."""
    pipelines.saved("sd", tmp_path / "sd")
    folder = data(tmp_path / "data")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    asked = ["--data", str(folder), "--pictures", "12", "--batch", "4", "--dtype", "float32"]
    asked += ["--lr", "1e-3", "--guidance", "2", "--train", train, "--validation-seeds", "2"]
    asked += ["--rank", "2"] if train == "lora" else []
    made = []
    for name, launch, more in (("both", torchrun, []), ("parts", [], ["--accumulate", "2"])):
        out = tmp_path / name
        run = ["-m", "fewstep", "distill", "splam", str(tmp_path / "sd"), "--out", str(out), *asked]
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "FEWSTEP_CACHE": str(tmp_path / f"{name}-cache"),
        }
        done = subprocess.run(
            [sys.executable, *launch, *run, *more], capture_output=True, text=True, env=env
        )
        assert done.returncode == 0, done.stderr
        made.append(load_file(out / "checkpoint.safetensors"))
    both, parts = made
    assert both.keys() == parts.keys()
    assert all(torch.equal(both[name], parts[name]) for name in both)


@pytest.mark.slow
def test_a_student_and_adapters_stand_beside_solvers_on_texts(tmp_path: Path) -> None:
    import json

    from tests.support.command import command

    loaded, folder = model(tmp_path / "sd"), data(tmp_path / "data")
    for name, more in (("whole", {}), ("adapters", FEW)):
        distill(loaded, folder, out=tmp_path / name, guidance=2.0, **TINY, **QUIET, **more)
    texts = tmp_path / "texts.csv"
    texts.write_text("prompt\na cat\na mat\nsat\n")
    solvers = f"ddim,{tmp_path / 'whole'},{tmp_path / 'adapters'}"
    asked = ["--prompts", str(texts), "--guidance", "2", "--nfe", "2", "--seeds", "0-5"]
    asked += ["--screen", "0", "--features", "none", "--no-plots", "--solvers", solvers]
    ran = command("compare", str(tmp_path / "sd"), *asked, "--out", str(tmp_path / "cmp"), "--json")
    assert ran.exit_code == 0, ran.output
    found = json.loads(ran.stdout)
    assert found["condition"]["prompt"].startswith("3 texts, SHA-256")
    errors = [row["error"] for row in found["rows"]]
    assert len(set(errors)) == len(errors) == 3
