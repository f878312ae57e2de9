"""Evaluations: numbers against scipy on hand-made features, resuming, records, the command."""

from __future__ import annotations

import io
import json
import sys
import time
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from torch import Tensor, nn

from fewstep.cli import main
from fewstep.data.captions import Captions, match_captions, read_captions
from fewstep.data.images import Picture, write_png
from fewstep.data.sources import Entry, Images, array_images, open_images
from fewstep.evaluate.features import (
    Extractor,
    Preprocessing,
    module_features,
    resolve_features,
)
from fewstep.evaluate.gather import gather, open_reference
from fewstep.evaluate.measure import evaluate
from fewstep.evaluate.statistics import Statistics, read_statistics
from fewstep.files import file_hash
from fewstep.networks.features import feature_networks


class Corners(nn.Module):
    """The four corners of the first channel, and their products."""

    def forward(self, x: Tensor) -> Tensor:
        corners = x[:, 0, ::3, ::3].flatten(1)
        return torch.cat([corners, corners.square()], dim=1)


def corners_by_hand(images: np.ndarray) -> np.ndarray:
    x = images[:, ::3, ::3, 0].reshape(len(images), -1) / 127.5 - 1
    return np.concatenate([x, np.square(x)], axis=1)


def pictures(n: int, seed: int = 0, dark: float = 1.0, c: int = 3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.integers(0, 256, (n, 4, 4, c)) * dark).astype(np.uint8)


def by_scipy(x: np.ndarray, y: np.ndarray) -> float:
    s, t = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    cross = np.trace(sqrtm(s @ t)).real
    return float(np.square(x.mean(0) - y.mean(0)).sum() + np.trace(s) + np.trace(t) - 2 * cross)


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image.squeeze()).save(buffer, "PNG")
    return buffer.getvalue()


def folder_of(path: Path, images: np.ndarray) -> Path:
    path.mkdir()
    for i, image in enumerate(images):
        (path / f"{i:06d}.png").write_bytes(png(image))
    return path


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return module_features(Corners(), "corners", shape=(4, 4, 3))


def test_the_distance_is_scipys_on_hand_made_features(extractor, tmp_path):
    ours, theirs = pictures(300), pictures(400, 1, 0.9)
    reference = open_reference(folder_of(tmp_path / "r", theirs), extractor)
    result = evaluate(array_images(ours), reference, extractor, metrics=("fd",), batch=37)
    (row,) = result.record["metrics"]
    exact = by_scipy(corners_by_hand(ours), corners_by_hand(theirs))
    assert row["value"] == pytest.approx(exact, rel=1e-6)  # features are float32
    assert row["metric"] == "FD-corners"
    assert (row["count"], row["reference_count"]) == (300, 400)
    assert 0 < row["error"] < row["value"]


@pytest.mark.parametrize("batch, every", [(1, 1000), (7, 50), (1000, 1000)])
def test_numbers_do_not_depend_on_batches(batch, every, extractor):
    images = array_images(pictures(200))
    usual = gather(images, extractor)
    other = gather(images, extractor, batch=batch, save_every=every)
    assert usual.statistics is not None
    assert other.statistics is not None
    assert np.abs(usual.statistics.mean - other.statistics.mean).max() < 1e-12
    assert np.abs(usual.statistics.covariance - other.statistics.covariance).max() < 1e-12


class Cut(Exception):
    pass


class Breaking:
    """A source that is cut off after some pictures."""

    left_out: dict[str, int] = {}  # noqa: RUF012

    def __init__(self, inner: Images, after: int):
        self.inner, self.after = inner, after
        self.name, self.names, self.digest = inner.name, inner.names, inner.digest

    def stream(self, start: int = 0):
        for i, entry in enumerate(self.inner.stream(start), start):
            if i == self.after:
                raise Cut
            yield entry


@pytest.mark.parametrize("after", [0, 29, 30, 31, 64, 95])
def test_an_interrupted_run_goes_on_to_the_same_numbers(after, extractor, tmp_path):
    folder = folder_of(tmp_path / "p", pictures(96))
    (folder / "000012.png").write_bytes(b"broken")
    source, state = open_images(folder), tmp_path / "state.npz"
    options: dict[str, Any] = {"batch": 8, "save_every": 30, "skip_corrupt": True}
    whole = gather(source, extractor, **options)
    with pytest.raises(Cut):
        gather(Breaking(source, after), extractor, state=state, **options)
    assert state.exists() == (after >= 30)
    seen = []
    resumed = gather(
        source,
        extractor,
        state=state,
        report=lambda what, done, total: seen.append(done),
        **options,
    )
    assert seen[0] == after // 30 * 30  # not begun again
    assert (resumed.count, resumed.skipped) == (95, ("000012.png",))
    for one in (resumed, gather(source, extractor, state=state, **options)):
        assert whole.statistics is not None
        assert one.statistics is not None
        assert np.abs(one.statistics.mean - whole.statistics.mean).max() < 1e-10
        assert np.abs(one.statistics.m2 - whole.statistics.m2).max() < 1e-10
        assert whole.rows is not None
        assert one.rows is not None
        assert np.array_equal(one.rows.index, whole.rows.index)
        assert np.array_equal(one.rows.features, whole.rows.features)


def test_a_state_of_other_pictures_or_another_network_is_refused(extractor, tmp_path):
    state, source = tmp_path / "s.npz", array_images(pictures(10))
    gather(source, extractor, state=state)
    other = module_features(Corners(), "other", shape=(4, 4, 3))
    with pytest.raises(ValueError, match=r"another evaluation \(extractor differ\)"):
        gather(source, other, state=state)
    with pytest.raises(ValueError, match=r"another evaluation \(pictures differ\)"):
        gather(array_images(pictures(10, 1)), extractor, state=state)
    with pytest.raises(ValueError, match="total"):
        gather(source, extractor, state=state, limit=5)
    state.write_bytes(b"something else")
    with pytest.raises(ValueError, match="not the state of an evaluation"):
        gather(source, extractor, state=state)


def test_mixed_sizes_are_refused_with_the_file_and_both_sizes(extractor, tmp_path):
    folder = folder_of(tmp_path / "p", pictures(5))
    (folder / "000003.png").write_bytes(png(np.zeros((6, 5, 3), np.uint8)))
    with pytest.raises(ValueError, match=r"000003\.png is 5x6, but 000000\.png is 4x4"):
        gather(open_images(folder), extractor)


def test_a_corrupt_picture_stops_the_run_unless_it_is_to_be_skipped(extractor, tmp_path):
    images = pictures(12)
    folder = folder_of(tmp_path / "p", images)
    (folder / "000007.png").write_bytes(png(images[7])[:60])
    with pytest.raises(ValueError, match=r"000007\.png cannot be read .*--skip-corrupt"):
        gather(open_images(folder), extractor)
    reference = open_reference(folder_of(tmp_path / "r", pictures(12, 1)), extractor)
    record = evaluate(open_images(folder), reference, extractor, skip_corrupt=True, batch=5).record
    assert record["images"]["count"] == 11
    assert record["images"]["skipped"] == {"count": 1, "names": ["000007.png"]}
    exact = by_scipy(
        corners_by_hand(np.delete(images, 7, axis=0)), corners_by_hand(pictures(12, 1))
    )
    assert record["metrics"][0]["value"] == pytest.approx(exact, rel=1e-5)
    assert any("1 pictures could not be read" in text for text in record["warnings"])


def test_grey_pictures_among_coloured_ones_are_repeated(extractor):
    images = pictures(10)
    images[4] = images[4][..., :1]
    mixed = array_images(images)

    class Grey:
        name, names, left_out, digest = "grey", mixed.names, {}, "x"

        def stream(self, start: int = 0):
            for i, entry in enumerate(mixed.stream(start), start):
                picture = Picture(images[i][..., : 1 if i == 4 else 3])
                yield Entry(entry.name, lambda picture=picture: picture)

    found, exact = gather(Grey(), extractor), Statistics.of(corners_by_hand(images))
    assert found.statistics is not None
    assert np.abs(found.statistics.covariance - exact.covariance).max() < 1e-6


def test_saved_statistics_are_a_reference_with_all_that_the_pictures_give(extractor, tmp_path):
    ours, theirs = array_images(pictures(60)), array_images(pictures(70, 1, 0.8))
    evaluate(theirs, None, extractor, metrics=()).save_statistics(tmp_path / "r.npz")
    np.savez(tmp_path / "p.npz", images=pictures(70, 1, 0.8))
    rows = []
    for name in ("r.npz", "p.npz"):
        reference = open_reference(tmp_path / name, extractor)
        result = evaluate(ours, reference, extractor, metrics=("fd", "kid", "pr"))
        rows.append(result.record["metrics"])
    assert [row["metric"] for row in rows[0]] == [
        "FD-corners",
        "KID-corners",
        "precision-corners",
        "recall-corners",
    ]
    for saved, made in zip(*rows, strict=True):
        assert saved["value"] == pytest.approx(made["value"], rel=1e-10)
        assert saved["error"] == pytest.approx(made["error"], rel=1e-8)


def test_a_reference_of_another_network_is_refused_with_both_names(extractor, tmp_path):
    other = module_features(Corners(), "other", shape=(4, 4, 3))
    made = evaluate(array_images(pictures(20)), None, other, metrics=())
    made.save_statistics(tmp_path / "r.npz")
    with pytest.raises(ValueError, match=r"made by 'other native'.*seen by 'corners native'"):
        open_reference(tmp_path / "r.npz", extractor)
    reference = open_reference(tmp_path / "r.npz", other)
    with pytest.raises(ValueError, match=r"made by 'other native'.*seen by 'corners native'"):
        evaluate(array_images(pictures(20)), reference, extractor)


def inception_like() -> Extractor:
    """2048 features, called Inception."""
    spread = torch.linspace(-1, 1, 2048 * 8).reshape(8, 2048)
    net = Corners()
    out = module_features(lambda x: net(x) @ spread, "i", Preprocessing(channels="rgb"), dim=2048)
    return replace(out, label="inception", is_inception=True)


@pytest.mark.slow
def test_edms_statistics_are_taken_for_inceptions_alone(extractor, tmp_path):
    mu, sigma = np.zeros(2048), np.eye(2048)
    np.savez(tmp_path / "edm.npz", mu=mu, sigma=sigma)
    with pytest.raises(ValueError, match="does not say which network made its 2048 features"):
        open_reference(tmp_path / "edm.npz", extractor)
    judge = inception_like()
    reference = open_reference(tmp_path / "edm.npz", judge)
    assert reference.assumed
    np.savez(tmp_path / "small.npz", mu=mu[:8], sigma=sigma[:8, :8])
    with pytest.raises(ValueError, match="its 8 features"):
        open_reference(tmp_path / "small.npz", judge)
    record = evaluate(array_images(pictures(5)), reference, judge, resamples=0).record
    (row,) = record["metrics"]
    assert row["metric"] == "FID"
    assert row["reference_count"] is None
    texts = " ".join(record["warnings"])
    assert "taken for Inception's" in texts
    assert "5 pictures for 2048 features: their covariance is singular" in texts
    with pytest.raises(ValueError, match="kid compares pictures with pictures"):
        evaluate(array_images(pictures(5)), reference, judge, metrics=("kid",))


def test_pictures_with_moments_beside_them_are_pictures_to_other_networks(extractor, tmp_path):
    images = pictures(30)
    np.savez(tmp_path / "v.npz", arr_0=images, mu=np.zeros(2048), sigma=np.eye(2048))
    found = open_reference(tmp_path / "v.npz", extractor)
    assert (found.kind, found.statistics.dim) == ("pictures", 8)
    assert open_reference(tmp_path / "v.npz", inception_like()).kind == "statistics"


def test_the_record_says_what_the_numbers_depend_on(extractor, tmp_path):
    folder = folder_of(tmp_path / "p", pictures(40))
    write_png(folder / "sheet.png", pictures(1)[0], {"seeds": [0]})
    reference = open_reference(folder_of(tmp_path / "r", pictures(50, 1)), extractor)
    result = evaluate(open_images(folder), reference, extractor, command="fewstep evaluate p")
    record = json.loads(json.dumps(result.record))
    assert record["images"]["left_out"] == {"contact sheet": 1}
    assert record["images"]["size"] == [4, 4]
    assert record["extractor"]["name"] == "corners native"
    assert record["reference"]["count"] == 50
    assert len(record["reference"]["sha256"]) == 64
    assert record["command"] == "fewstep evaluate p"
    assert record["machine"]["torch"] == torch.__version__
    assert record["protocol"] is None
    (row,) = record["metrics"]
    assert "bootstrap over pictures" in row["error_kind"]


class Letters:
    """Scores that tell which caption came with which picture."""

    name = "letters"

    def __call__(self, images: np.ndarray, captions: list[str]) -> np.ndarray:
        return np.array(
            [float(ord(text) - 97 + image[0, 0, 0]) for text, image in zip(captions, images)]  # noqa: B905
        )


def test_captions_stay_with_their_pictures_when_some_are_skipped(extractor, tmp_path):
    images = np.zeros((6, 4, 4, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(6) * 10
    folder = folder_of(tmp_path / "p", images)
    (folder / "000002.png").write_bytes(b"broken")
    captions = Captions("c", tuple("abcdefgh"))
    letters: Any = Letters()
    result = evaluate(
        open_images(folder),
        metrics=("clip",),
        clip=letters,
        captions=captions,
        batch=2,
        save_every=3,
        skip_corrupt=True,
    )
    scores = [11 * i for i in range(6) if i != 2]
    (row,) = result.record["metrics"]
    assert row["value"] == pytest.approx(np.mean(scores))
    assert row["error"] == pytest.approx(np.std(scores, ddof=1) / 5**0.5)
    assert result.record["captions"]["matched_by"] == "number"


@pytest.mark.parametrize(
    "name, text",
    [
        ("c.csv", 'image_id,source,prompt,evaluation_seed\n007,x,"one, two",5\n9,x,three,6\n'),
        ("c.tsv", "caption\timage_id\tseed\none, two\t7\t5\nthree\t9\t6\n"),
        ("c.json", '[{"prompt": "one, two", "image_id": 7, "seed": 5},'
                   ' {"caption": "three", "image_id": 9, "seed": 6}]'),
        ("c.jsonl", '{"prompt": "one, two", "image_id": 7, "seed": 5}\n\n'
                    '{"prompt": "three", "image_id": 9, "seed": 6}\n'),
        ("coco.json", '{"annotations": [{"image_id": 7, "caption": "one, two", "seed": 5},'
                      ' {"image_id": 9, "caption": "three", "seed": 6}]}'),
    ],
)  # fmt: skip
def test_captions_are_read_from_every_format(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    found = read_captions(tmp_path / name)
    assert found.texts == ("one, two", "three")
    assert found.seeds == (5, 6)
    assert match_captions(found, ["9.png", "a/000007.jpg"]) == (("three", "one, two"), "image_id")
    assert match_captions(found, ["0.png", "1.png"]) == (("one, two", "three"), "number")
    with pytest.raises(ValueError, match="has 2 for 3 pictures"):
        match_captions(found, ["0.png", "1.png", "2.png"])


@pytest.mark.parametrize(
    "name, text, message",
    [
        (
            "c.csv",
            "text,seed\na,1\n",
            r"line 2 \(row 0\) has no prompt or caption; it has text, seed",
        ),
        ("c.csv", "prompt\na\n  \n", r"line 3 \(row 1\) has no prompt"),
        ("c.csv", "prompt\n", r"has no captions"),
        ("c.json", "{", r"cannot be read as captions"),
        ("c.json", '"a"', r"a list, or has one under annotations"),
    ],
)
def test_files_without_captions_are_refused(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_captions(tmp_path / name)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"metrics": ("fid",)}, "metrics are fd, kid, pr, clip, got 'fid'"),
        ({"metrics": ("fd",)}, "fd needs a reference"),
        ({"metrics": ("clip",)}, "needs a CLIP model and captions"),
        ({"metrics": ()}, "ask for a metric"),
    ],
)
def test_requests_that_lack_something_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(array_images(pictures(5)), **options)


# The command


def run(*arguments: Any) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fewstep", *map(str, arguments)])
        patch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as ended:
            main()
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("net") / "corners.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and what such files are
        torch.jit.script(Corners()).save(str(path))  # type: ignore[union-attr]
    return path


def test_the_command_measures_writes_and_shows(network, tmp_path, capsys):
    ours, theirs = pictures(80), pictures(90, 1, 0.9)
    folder, archive = folder_of(tmp_path / "p", ours), tmp_path / "r.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for i, image in enumerate(theirs):
            file.writestr(f"{i:03d}.png", png(image))
    trust = ("--trust", file_hash(network)[:12])
    base = ("evaluate", folder, "--reference", archive, "--features", network, *trust)
    out, saved = tmp_path / "deep" / "result.json", tmp_path / "s.npz"
    assert run(*base, "--metrics", "fd,kid,pr", "--out", out, "--save-statistics", saved) == 0
    shown = capsys.readouterr().out
    record = json.loads(out.read_text())
    exact = by_scipy(corners_by_hand(ours), corners_by_hand(theirs))
    assert record["metrics"][0]["value"] == pytest.approx(exact, rel=1e-6)
    assert record["metrics"][0]["metric"] in shown
    assert "none" in shown  # the protocol, beside the number
    assert record["extractor"]["name"] in shown
    assert sorted(path.name for path in out.parent.iterdir()) == ["result.json"]  # no state left
    assert read_statistics(saved)[0].count == 80

    assert run(*base, "--reference", saved, "--json", "--limit", 80) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["metrics"][0]["value"] < 1e-8  # the same pictures
    assert again["command"].startswith("fewstep evaluate")


def test_the_command_keeps_a_state_that_it_was_told_to(network, tmp_path, capsys):
    folder = folder_of(tmp_path / "p", pictures(20))
    state = tmp_path / "state.npz"
    trust = ("--trust", file_hash(network))
    base = ("evaluate", folder, "--features", network, *trust, "--metrics", "none")
    base += ("--state", state)
    assert run(*base, "--save-statistics", tmp_path / "a.npz") == 0
    assert state.exists()
    assert run(*base, "--save-statistics", tmp_path / "b.npz") == 0
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    write_png(folder / "x.png", pictures(1)[0])
    assert run(*base) == 2
    assert "state of another evaluation" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "name the pictures"),
        (("{p}", "--metrics", "fid"), "metrics must be some of fd, kid, pr, clip, or none alone"),
        (("{p}", "--metrics", "clip"), "--metrics clip and --captions FILE go together"),
        (("{p}", "--protocol", "cifar100"), "there are cifar10-50k"),
        (("{p}", "--protocol", "cifar10-50k"), "needs 50,000 pictures, got 20"),
        (("{p}", "--protocol", "coco-5k", "--limit", "3"), "fixes these: leave out --limit"),
        (("{p}", "--protocol", "coco-5k", "--captions", "c"), "needs 5,000 pictures, got 20"),
        (
            ("{p}", "--features", "{net}"),
            "corners.pt is a program (TorchScript) that can write files",
        ),
        (("{p}", "--features", "{net}", "--trust", "abc"), "at least its first 12 digits"),
        (("{p}", "--features", "{net}", "--trust", "{hash}"), "comes with no reference"),
        (("{p}/missing", "--features", "{net}"), "missing: not there"),
        (
            ("{p}", "--features", "{net}", "--trust", "{hash}", "--reference", "{net}"),
            "corners.pt has no pictures",
        ),
    ],
)
def test_what_a_user_can_mend_is_one_line(arguments, message, network, tmp_path, capsys):
    folder = folder_of(tmp_path / "p", pictures(20))
    filled = [one.format(p=folder, net=network, hash=file_hash(network)) for one in arguments]
    assert run("evaluate", *filled) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(not feature_networks(), reason="the built-in networks are not there")
def test_five_thousand_pictures_take_less_than_a_minute(network, tmp_path, capsys):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "p.npz", arr_0=rng.integers(0, 256, (5000, 32, 32, 1), dtype=np.uint8))
    begun = time.perf_counter()
    judge = resolve_features("fashion-b")
    reference = open_reference(None, judge)
    evaluate(open_images(tmp_path / "p.npz"), reference, judge, metrics=("fd",))
    assert time.perf_counter() - begun < 60
