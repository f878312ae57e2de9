"""The recipe of garments: its words, an exact resume, and the folder that it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fewstep
from fewstep.data.garments import WORDS, Garments, caption
from fewstep.evaluate.agreement import prompts
from fewstep.networks.features import load_feature_folder
from recipes import garments, garments_features
from recipes.garments_parts import library, make_tokenizer, merges, tokens_of
from studies import garments_students, garments_teacher
from tests.support.clothes import write_clothes

SMALL = ["--batch", "4", "--scenes", "24", "--checkpoint-every", "1"]


def run(*arguments: object) -> None:
    assert garments.main([*map(str, arguments)]) == 0


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_clothes(tmp_path_factory.mktemp("clothes"))


@pytest.fixture(scope="module")
def encoded(data, tmp_path_factory) -> Path:
    """A run with an autoencoder of two steps and its latents."""
    out = tmp_path_factory.mktemp("run")
    run("autoencoder", "--data", data, "--out", out, "--pictures", 8, *SMALL)
    run("latents", "--data", data, "--out", out, *SMALL)
    return out


def test_every_word_of_the_captions_is_one_token():
    tokenizer = make_tokenizer()
    texts = [caption("train", i)[0] for i in range(3000)]
    words = {word for text in texts for word in text.replace(",", " ,").replace("-", " - ").split()}
    assert all(len(tokenizer.tokenize(word)) == 1 for word in words)
    tokens = tokens_of(tokenizer, ["", *texts])
    assert tokens.shape == (3001, WORDS)
    assert tokens[0].tolist() == [tokenizer.bos_token_id] + [tokenizer.eos_token_id] * (WORDS - 1)
    assert (tokens[:, -1] == tokenizer.eos_token_id).all()  # none is cut
    assert len(set(merges())) == len(merges())


def test_words_that_are_not_of_the_captions_fall_into_pieces():
    tokenizer = make_tokenizer()
    assert len(tokenizer.tokenize("zebra")) > 1
    assert tokenizer.tokenize("RED") == tokenizer.tokenize("red")
    assert tokenizer.unk_token_id not in tokenizer("zebra, 12!", add_special_tokens=False).input_ids


@pytest.mark.slow
@pytest.mark.parametrize("part", ["autoencoder", "decoder", "unet"])
def test_a_run_in_two_parts_is_the_run_in_one(part, data, encoded, tmp_path):
    files = []
    for name, lengths in (("one", [12]), ("two", [8, 12])):
        out = tmp_path / name
        out.mkdir()
        if part != "autoencoder":
            (out / "autoencoder").symlink_to(encoded / "autoencoder")
            (out / garments.LATENTS).symlink_to(encoded / garments.LATENTS)
        for pictures in lengths:
            given = [] if part == "unet" else ["--data", data]
            # the rate of the shorter run must not fall before its end
            with pytest.MonkeyPatch.context() as patch:
                for recipe in ("AUTOENCODER_RECIPE", "DECODER_RECIPE", "UNET_RECIPE"):
                    flat = garments.replace(getattr(garments, recipe), cooldown=0.0)
                    patch.setattr(garments, recipe, flat)
                run(part, *given, "--out", out, "--pictures", pictures, *SMALL)
        files.append((out / part / "checkpoint.safetensors").read_bytes())
    assert files[0] == files[1]


@pytest.mark.slow
def test_the_folder_that_it_writes_is_a_pipeline(data, encoded, tmp_path):
    run("decoder", "--data", data, "--out", encoded, "--pictures", 4, *SMALL)
    run("unet", "--out", encoded, "--pictures", 4, *SMALL)
    to = tmp_path / "garments"
    run("export", "--out", encoded, "--to", to)
    assert sum(path.stat().st_size for path in to.rglob("*") if path.is_file()) < 12e6
    model: Any = fewstep.load(to)
    assert (model.card.name, model.shape, model.picture) == ("garments", (4, 8, 8), (32, 32, 3))
    assert model.card.about["recipe"]["unet"]["steps"] == 1
    made = fewstep.sample(model, prompt="a red dress", guidance=2.0, nfe=2, seeds=[0, 1])
    assert made.images.shape == (2, 32, 32, 3)

    pipe: Any = library("diffusers").StableDiffusionPipeline.from_pretrained(to)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe("a red dress", num_inference_steps=2, output_type="np").images
    assert theirs.shape == (1, 32, 32, 3)


@pytest.mark.slow
def test_judges_are_trained_and_written_and_judge(data, encoded, tmp_path, monkeypatch):
    for name, value in (("FITTED", 300), ("REFERENCE", 300), ("EXAMINED", 200), ("SCENES", 64)):
        monkeypatch.setattr(garments_features, name, value)
    for network in ("a", "b"):
        out, to = tmp_path / f"run-{network}", tmp_path / "judges" / f"garments-{network}"
        common = ["--data", str(data), "--network", network, "--batch", "16", "--out", str(out)]
        assert garments_features.main([*common, "--pictures", "32", "--export", str(to)]) == 0
        assert load_feature_folder(to)(torch.zeros(2, 3, 32, 32)).shape == (2, 128)
        card = json.loads((to / "card.json").read_text())
        assert set(card["accuracy"]) >= {"garment", "colour", "background"}

    asked = prompts(300)
    real = Garments(data, "test").pictures(range(300)).permute(0, 2, 3, 1).numpy()
    judges = garments_teacher.Judges.load(tmp_path / "judges")
    right, wrong = judges.row(real, asked), judges.row(255 - real, asked)
    assert right["count"] == 300
    assert wrong["frechet"] > right["frechet"]

    run("decoder", "--data", data, "--out", encoded, "--pictures", 4, *SMALL)
    run("unet", "--out", encoded, "--pictures", 4, *SMALL)
    run("export", "--out", encoded, "--to", tmp_path / "garments")
    given = ["--model", tmp_path / "garments", "--judges", tmp_path / "judges"]
    options = ["--count", 3, "--nfe", 2, "--guidance", 1, 2, "--out", tmp_path / "rows.json"]
    rows = garments_teacher.main([*map(str, [*given, *options])])
    assert [row["guidance"] for row in rows] == [1, 2]
    assert json.loads((tmp_path / "rows.json").read_text())["rows"] == rows
    options = ["--count", 3, "--nfe", 1, 2, "--rows", "ddim", "--out", tmp_path / "students.json"]
    rows = garments_students.main([*map(str, [*given, *options])])
    assert [(row["row"], row["nfe"]) for row in rows] == [("ddim", 1), ("ddim", 2)]
    assert garments_students.main([*map(str, [*given, *options])]) == rows  # none is made again


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["autoencoder", "--out", "x"], "--data is missing"),
        (["export", "--out", "x"], "--to is missing"),
        (["unet", "--out", "x", "--batch", "0"], "batch"),
        (["latents", "--data", "x", "--out", "nowhere"], "run the part before this one first"),
    ],
)
def test_what_cannot_be_done_is_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert garments.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
