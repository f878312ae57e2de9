"""Pipelines from the command line and in `fewstep.sample`: prompts, prompts files, pictures.

The pipelines are the small real ones of `pipelines.py`, so the pictures are noise; what is checked
is what they are made of. Captions are from MS COCO (Lin et al. 2014, arXiv:1405.0312), CC BY 4.0.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import fewstep
from fewstep.cli import main
from fewstep.data.captions import Captions, match_captions, read_captions
from fewstep.data.images import fit_picture, read_metadata, read_picture, read_png
from fewstep.models.texts import TextCache
from tests.support import pipelines

# image_id, caption, seed: the first rows of a list of 30,000
COCO = [
    ("000000203564", "A bicycle replica with a clock as the front wheel.", 41337),
    ("000000179765", "A black Honda motorcycle parked in front of a garage.", 63155),
    ("000000322141", "A room with blue walls and a white sink and door.", 12),
    ("000000016977", "A car that seems to be parked illegally behind a legally parked car", 12),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A folder with pipelines `sd` and `ddpm`, the weights of `sd` in one file, and captions."""
    folder = tmp_path_factory.mktemp("base")
    for name in ("sd", "ddpm"):
        pipelines.saved(name, folder / name)
    weights = pipelines.original_keys(pipelines.sd())
    safetensors.torch.save_file(weights, folder / "single.safetensors")
    write_captions(folder / "coco.csv", COCO)
    return folder


@pytest.fixture(scope="module")
def model(base) -> Any:
    return pipelines.load(base / "sd")


def write_captions(path: Path, rows: list[tuple[str, str, int]]) -> Path:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image_id", "source", "prompt", "evaluation_seed"])
        writer.writerows((name, "coco", text, seed) for name, text, seed in rows)
    return path


def command(*arguments: Any) -> list[str]:
    return [sys.executable, "-W", "ignore::FutureWarning", "-m", "fewstep", *map(str, arguments)]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}


def in_process(*arguments: Any) -> int:
    """The command without a process of its own: its exit code."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("default")
        patch.setattr(warnings, "showwarning", warnings.showwarning)
        patch.setattr(sys, "argv", ["fewstep", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    return ended.value.code or 0  # type: ignore[return-value]


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def near(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal to one grey level: float32 sums in another order."""
    return a.shape == b.shape and int(np.abs(a.astype(int) - b.astype(int)).max()) <= 1


def metadata(path: Path) -> dict[str, Any]:
    found = read_metadata(path)
    assert found is not None
    return found


# --- from the command line -----------------------------------------------------------------------


@pytest.mark.slow
def test_a_folder_and_a_single_file_give_the_same_pictures(base, tmp_path, capsys):
    text = ("--prompt", "a cat", "--negative", "mat", "--guidance", 7.5, "--seeds", "3-4")
    rest = ("--solver", "dpmpp-2m", "--nfe", 5)
    line = command("sample", base / "sd", *text, *rest, "--out", tmp_path / "folder")
    done = subprocess.run(line, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    said = done.stdout.splitlines()[0]
    for words in (
        "2 pictures: dpmpp-2m on the trailing grid, end=zero, prompt 'a cat', negative 'mat'",
        "guidance 7.5, 5 evaluations each (10 network calls)",
    ):
        assert words in said

    single = ("sample", base / "single.safetensors", "--config", base / "sd", *text, *rest)
    assert in_process(*single, "--out", tmp_path / "single", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["nfe"], result["network_calls"]) == (5, 10)
    for name in ("000003.png", "000004.png"):
        folder, file = tmp_path / "folder" / name, tmp_path / "single" / name
        assert np.array_equal(read_png(folder)[0], read_png(file)[0])
        assert (metadata(folder)["prompt"], metadata(folder)["negative"]) == ("a cat", "mat")


@pytest.mark.slow
def test_a_file_of_captions_killed_half_way_and_resumed_leaves_the_same_bytes(base, tmp_path):
    rows = [(f"{i:012d}", COCO[i % 4][1], 5 + i // 3) for i in range(100, 132)]
    file = write_captions(tmp_path / "many.csv", rows)
    line = ["sample", base / "sd", "--prompts", file, "--guidance", 3, "--nfe", 5, "--batch", 5]

    def run(out: Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command(*line, "--out", out), env=ENVIRONMENT, stderr=subprocess.DEVNULL, text=True
        )

    killed = run(tmp_path / "killed")
    wanted = [tmp_path / "killed" / f"{name}.png" for name, _, _ in rows]
    while not wanted[12].exists() and killed.poll() is None:
        time.sleep(0.001)
    killed.kill()
    killed.wait()
    assert 12 < sum(path.exists() for path in wanted) < 32
    # a batch that was cut in the middle, as a kill between two files leaves it
    assert wanted[11].exists()
    wanted[11].unlink()
    assert in_process(*line, "--out", tmp_path / "killed") == 0
    assert in_process(*line, "--out", tmp_path / "whole") == 0
    found = {n: h for n, h in hashes(tmp_path / "killed").items() if not n.endswith(".partial")}
    assert found == hashes(tmp_path / "whole")
    assert len(found) == 33  # a contact sheet too
    for (name, text, seed), path in zip(rows, wanted, strict=True):
        own = metadata(path)
        assert (path.stem, own["prompt"], own["seed"]) == (name, text, seed)


def test_evaluate_finds_the_caption_of_every_picture_again(base, tmp_path):
    captions = read_captions(base / "coco.csv")
    plain = tmp_path / "plain.json"
    plain.write_text(json.dumps([text for _, text, _ in COCO]))
    for file, how in ((base / "coco.csv", "image_id"), (plain, "row")):
        out = tmp_path / how
        line = ["sample", base / "sd", "--prompts", file, "--nfe", 1, "--out", out]
        assert in_process(*line, "--rows", "3,1") == 0
        names = [path.name for path in sorted(out.glob("*.png")) if path.name != "sheet.png"]
        texts, matched = match_captions(read_captions(file), names)
        assert matched == how
        assert [metadata(out / name)["prompt"] for name in names] == list(texts)
        assert set(texts) == {captions.texts[1], captions.texts[3]}
    # rows done elsewhere may join
    assert in_process(*line, "--rows", "0") == 0
    assert len(list(out.glob("row-*.png"))) == 3


def test_names_of_captions_tell_their_pictures_apart():
    texts = ("a", "b")
    assert Captions("c", texts, ("7", "9")).files == ("7", "9")
    rows = ("row-000000", "row-000001")
    for ids in ((), ("7", "007"), ("../x", "y"), ("a", "A"), ("sheet", "b"), (".a", "b")):
        captions = Captions("c", texts, ids)
        assert captions.files == rows
        names = [f"{name}.png" for name in rows[::-1]]
        assert match_captions(captions, names) == (("b", "a"), "row")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{ddpm}", "--prompt", "x"], "ddpm takes no text; leave out prompt"),
        (["fashion-mnist", "--prompt", "x"], "no text input; use label instead of prompt"),
        (["fashion-mnist", "--negative", "x"], "no text input; use label instead of negative"),
        (["fashion-mnist", "--prompts", "{coco}"], "no text input"),
        (["{sd}", "--guidance", "7.5"], "guidance needs a prompt"),
        (["{sd}", "--prompt", "x", "--negative", "y"], "negative acts through guidance"),
        (["{sd}", "--prompt", "x", "--prompts", "{coco}"], "leave out --prompt"),
        (["{sd}", "--prompt", "x", "--rows", "1"], "leave out --rows"),
        (["{sd}", "--prompts", "{coco}", "--rows", "2-9"], "has rows 0 to 3, and --rows wants 9"),
        (["{sd}", "--prompts", "{coco}", "--rows", "x"], "rows are written like 0-63"),
        (["{sd}", "--prompts", "{coco}", "--seeds", "1,2"], "one for all 4 texts, or one for each"),
        (["{sd}", "--prompts", "{empty}"], "has no captions"),
        (["{sd}", "--image", "{photo}", "--strength", "1.5"], "strength must lie in (0, 1]"),
        (["{sd}", "--image", "{photo}", "--strength", "0"], "strength must lie in (0, 1]"),
        (["{sd}", "--image", "{photo}", "--strength", "nan"], "strength must lie in (0, 1]"),
        (["{sd}", "--strength", "0.5"], "give image too"),
        (["{sd}", "--image", "{empty}"], "cannot be read as a picture (it is of no format"),
        (["{sd}", "--image", "nowhere.png"], "nowhere.png"),
        (
            ["{sd}", "--image", "{photo}", "--afs", "zero"],
            "afs is for a start from noise alone",
        ),
        (
            ["{sd}", "--image", "{photo}", "--head-start", "2"],
            "head_start is for a start from noise",
        ),
        (["{sd}", "--image", "{photo}", "--grid", "9,1"], "the grid starts at sigma 9"),
        (["{sd}", "--head-start", "2"], "leave out head_start"),
        (["{sd}", "--afs", "mean"], "needs denoiser.far_mean"),
        (["{sd}", "--label", "3"], "has no classes"),
        (["{sd}", "--size", "15x16"], "multiples of 2"),
        (["{sd}", "--size", "wide"], "HEIGHTxWIDTH"),
        (["{sd}", "--config", "{sd}"], "leave out config"),
        (["fashion-mnist", "--size", "32"], "has no such options"),
    ],
)
def test_what_does_not_fit_is_one_line_and_leaves_no_folder(
    arguments, words, base, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(base / "photo.png")
    (base / "empty.csv").write_text("prompt\n")
    there = {name: base / name for name in ("sd", "ddpm")}
    there |= {name: base / f"{name}.csv" for name in ("coco", "empty")}
    there["photo"] = base / "photo.png"
    line = [one.format(**there) for one in arguments]
    assert in_process("sample", *line, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error
    assert not list(tmp_path.iterdir())


def test_what_is_cut_of_a_prompt_is_said_once(base, tmp_path, capsys):
    text = "a cat sat on a mat a cat sat on a mat"
    line = ["sample", base / "sd", "--prompt", text, "--seeds", "0-5", "--batch", 2, "--nfe", 1]
    assert in_process(*line, "--out", tmp_path / "out") == 0
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("fewstep: the prompt 'a cat sat on a mat")
    assert said[0].endswith("it does not see 'on a mat'")


def test_large_pictures_make_a_small_sheet(base, tmp_path, monkeypatch):
    monkeypatch.setattr("fewstep.sampling.folder.SHEET_PIXELS", 3 * 32 * 24)
    line = ["sample", base / "sd", "--seeds", "0-4", "--size", "32x24", "--nfe", 1]
    assert in_process(*line, "--out", tmp_path / "out") == 0
    assert read_png(tmp_path / "out" / "000004.png")[0].shape == (32, 24, 3)
    assert metadata(tmp_path / "out" / "sheet.png")["seeds"] == [0, 1, 2]


# --- fewstep.sample ------------------------------------------------------------------------------

RUN = {"solver": "dpmpp-2m", "nfe": 3}


def test_a_picture_depends_on_its_seed_and_its_texts_alone(model):
    prompts, negatives, scales = ["a cat", "mat", "a cat"], ["on", "sat", "on"], [2.0, 7.5, 4.0]
    given = {"prompt": prompts, "negative": negatives, "guidance": scales}
    together = fewstep.sample(model, seeds=[1, 2, 3], **given, **RUN)
    parts = fewstep.sample(model, seeds=[1, 2, 3], **given, **RUN, batch=2)
    assert near(together.images, parts.images)
    for i in range(3):
        own = {name: value[i] for name, value in given.items()}
        alone = fewstep.sample(model, seeds=[i + 1], **own, **RUN)
        assert near(together.images[i : i + 1], alone.images)
    assert together.provenance["negative"] == negatives
    assert json.loads(json.dumps(together.provenance)) == together.provenance
    other = fewstep.sample(model, seeds=[1], prompt="a cat", negative="sat", guidance=2.0, **RUN)
    assert not near(other.images, together.images[:1])
    with pytest.raises(ValueError, match="negative must be one or one per seed, got 2 for 3"):
        fewstep.sample(model, seeds=[1, 2, 3], **{**given, "negative": ["a", "b"]}, **RUN)


@pytest.mark.parametrize("negative", [None, "sat"])
def test_guidance_0_is_the_negative_or_empty_text_evaluated_once(model, negative):
    text = {} if negative is None else {"negative": negative}
    nothing = fewstep.sample(model, seeds=[1], prompt="a cat", guidance=0, **text, **RUN)
    assert nothing.network_calls == nothing.nfe == RUN["nfe"]
    plain = fewstep.sample(model, seeds=[1], prompt=negative or "", **RUN)
    assert np.array_equal(nothing.images, plain.images)


def test_each_text_is_encoded_once_and_alone(model):
    model = replace(model, texts=TextCache())
    rows: list[int] = []
    handle = model.pipe.text_encoder.register_forward_pre_hook(
        lambda encoder, args: rows.append(len(args[0]))
    )
    prompts = ["a cat", "mat", "mat", "mat", "sat", "on", "cat", "cat"]
    try:
        run = {"seeds": range(8), "guidance": 2.0, "batch": 4, **RUN}
        fewstep.sample(model, prompt=prompts, negative="sat", **run)
        assert rows == [1] * 5  # sat, a cat, mat, on, cat
        rows.clear()
        fewstep.sample(model, prompt="a cat", **run)
        assert rows == [1]  # no negative text; "a cat" is known to the model
    finally:
        handle.remove()


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_no_negative_is_what_the_pipeline_itself_leads_away_from(name, tmp_path):
    """SDXL's own unconditional half is zeros, not the empty text."""
    model, pipe = pipelines.load(pipelines.saved(name, tmp_path / name)), pipelines.MAKERS[name]()
    found = pipe.encode_prompt(
        "mat", prompt_2="mat", **({"prompt_3": "mat"} if name == "sd3" else {})
    )
    denoiser = model.denoiser(prompt=["mat", "mat"], guidance=3.0)
    while not hasattr(denoiser, "uncond"):
        denoiser = denoiser.denoiser
    theirs = found[1]
    torch.testing.assert_close(denoiser.uncond["encoder_hidden_states"], theirs, rtol=0, atol=1e-5)
    assert bool((theirs == 0).all()) == (name == "sdxl")


def test_a_named_solver_has_the_cards_grid_and_end(model):
    named = fewstep.sample(model, seeds=[1], solver="unipc", nfe=5).provenance
    auto = fewstep.sample(model, seeds=[1]).provenance
    for made in (named, auto):
        assert (made["grid"], made["end"], made["nfe"]) == ("trailing", "zero", 5)
    assert auto["solver"] == "dpmpp-2m"
    told = fewstep.sample(model, seeds=[1], solver="ddim", nfe=2, grid="karras", end="sigma_min")
    assert (told.provenance["grid"], told.provenance["end"]) == ("karras", "sigma_min")
    last = fewstep.sample(model, seeds=[1], solver="ddim", nfe=2, final=True).provenance
    assert (last["end"], last["final"]) == ("sigma_min", True)


# --- from a picture ------------------------------------------------------------------------------


def photograph(height: int = 40, width: int = 60) -> np.ndarray:
    ramps = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([*ramps, 255 - ramps[0]], axis=-1).astype(np.uint8)


def test_image_to_image_is_a_loop_over_the_denoiser_from_the_noised_picture(model, tmp_path):
    photo = photograph()
    Image.fromarray(photo).save(tmp_path / "photo.png")
    made = fewstep.sample(
        model, seeds=[5, 6], prompt="mat", guidance=3.0, solver="ddim", nfe=4,
        image=tmp_path / "photo.png", strength=0.6,
    )  # fmt: skip
    assert (made.nfe, made.network_calls) == (4, 8)

    # the middle square, resized, encoded, noised; times 0.6 of the way up the table, four equal
    # intervals of what is left, the last one to sigma = 0
    square = Image.fromarray(photo[:, 10:50]).resize((16, 16), Image.Resampling.BICUBIC)
    clean = torch.from_numpy(np.asarray(square) / 127.5 - 1).float().permute(2, 0, 1)[None]
    vae, denoiser = model.pipe.vae, model.denoiser(prompt="mat", guidance=3.0)
    with torch.no_grad():
        clean = vae.encode(clean).latent_dist.mode() * vae.config.scaling_factor
        start = -1 + 0.6 * 1000
        table = [float(model.schedule.sigma(start - i / 4 * (start + 1))) for i in range(4)]
        z = model.prior([5, 6]) / (1 + model.card.sigma_max**2) ** 0.5
        x = clean + table[0] * z
        for sigma, lower in zip(table, [*table[1:], 0.0], strict=True):
            denoised = denoiser(x, torch.full((2,), sigma))
            x = denoised + lower / sigma * (x - denoised)
    assert near(made.images, model.decode(x))


def test_one_picture_for_all_or_one_per_seed(model):
    photos = np.stack([photograph(16, 16), 255 - photograph(16, 16)])
    run = {"strength": 0.5, "prompt": "mat", **RUN}
    both = fewstep.sample(model, seeds=[1, 2], image=photos, **run)
    for i in range(2):
        alone = fewstep.sample(model, seeds=[i + 1], image=photos[i], **run)
        assert near(both.images[i : i + 1], alone.images)
        assert both.provenance["image"][i] == alone.provenance["image"]
    assert json.loads(json.dumps(both.provenance)) == both.provenance
    with pytest.raises(ValueError, match="image must be one or one per seed, got 2 for 3"):
        fewstep.sample(model, seeds=[1, 2, 3], image=photos, **run)
    with pytest.raises(ValueError, match="image must be a file or uint8"):
        fewstep.sample(model, seeds=[1], image=photos[0] / 255, **run)


def test_a_folder_of_pictures_from_one_picture(base, tmp_path, capsys):
    Image.fromarray(photograph()).save(tmp_path / "photo.jpg")
    line = ["sample", base / "sd", "--image", tmp_path / "photo.jpg", "--prompt", "mat", "--nfe", 2]
    line += ["--seeds", "0-1", "--out", tmp_path / "out"]
    assert in_process(*line, "--strength", 0.4) == 0
    assert "strength 0.4, 2 evaluations each (2 network calls)" in capsys.readouterr().out
    own = metadata(tmp_path / "out" / "000001.png")
    assert (own["strength"], len(own["image"])) == (0.4, 64)
    assert in_process(*line, "--strength", 0.5) == 2
    assert "strength=0.4 (now 0.5)" in capsys.readouterr().err


def test_the_built_in_network_starts_from_pictures_too():
    network: Any = fewstep.load("fashion-mnist")
    boot = fewstep.sample(network, seeds=[0], label="boot").images[0]
    slight, strong = (
        fewstep.sample(network, seeds=[1, 2], label="boot", image=boot, strength=strength, nfe=4)
        for strength in (0.2, 1.0)
    )
    far, near_by = (np.abs(made.images.astype(float) - boot).mean() for made in (strong, slight))
    assert near_by < 0.5 * far
    assert slight.provenance["afs"] == "none"
    coloured = fewstep.sample(network, seeds=[1], image=photograph(), strength=0.5, nfe=2)
    assert coloured.images.shape == (1, 32, 32, 1)


def test_pictures_are_turned_cut_in_the_middle_and_resized(tmp_path):
    photo = photograph()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    Image.fromarray(photo).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_picture(tmp_path / "turned.png"), np.rot90(photo, -1))
    assert np.array_equal(fit_picture(photo, 40, 60), photo)
    assert np.array_equal(fit_picture(photo, 40, 30), photo[:, 15:45])
    assert np.array_equal(fit_picture(photo, 20, 60), photo[10:30])
    assert fit_picture(photo, 8, 8, 1).shape == (8, 8, 1)
    assert fit_picture(photo[..., :1], 8, 16, 3).shape == (8, 16, 3)
