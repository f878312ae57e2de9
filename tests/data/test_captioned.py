"""Pictures with captions, in every form in which they come."""

from __future__ import annotations

import csv
import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fewstep.data.captioned import open_captioned
from fewstep.data.images import Unreadable

TEXTS = {"a": "a cat", "b": "a mat, red", "c": "sat  on a 'mat'"}


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(made := io.BytesIO(), "png")
    return made.getvalue()


def pictures(folder: Path, inside: str = "") -> Path:
    (folder / inside).mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate((*TEXTS, "without")):
        (folder / inside / f"{name}.png").write_bytes(png(seed))
    return folder


def beside(folder: Path) -> Path:
    for name, text in TEXTS.items():
        (pictures(folder) / f"{name}.txt").write_text(text)
    return folder


def archive(folder: Path) -> Path:
    inside = beside(folder / "in")
    with zipfile.ZipFile(folder / "all.zip", "w") as file:
        for one in inside.iterdir():
            file.write(one, one.name)
    return folder / "all.zip"


def jsonl(folder: Path) -> Path:
    lines = [{"file_name": f"in/{n}.png", "text": t} for n, t in TEXTS.items()]
    (pictures(folder, "in") / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def table(folder: Path) -> Path:
    with open(pictures(folder) / "captions.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file_name", "caption"])
        rows.writerows([f"{name}.png", text] for name, text in TEXTS.items())
        rows.writerow(["../../etc/passwd", "a name is never a path"])
    return folder / "captions.csv"


def tar(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / "00.tar", "w") as file:
        members = {f"{name}.png": png(seed) for seed, name in enumerate((*TEXTS, "without"))}
        members |= {f"{name}.txt": text.encode() for name, text in list(TEXTS.items())[:2]}
        members["c.json"] = json.dumps({"caption": TEXTS["c"]}).encode()
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return folder


def parquet(folder: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    writer = pytest.importorskip("pyarrow.parquet")

    folder.mkdir(exist_ok=True)
    rows = [{"bytes": png(seed), "path": None} for seed in range(4)]
    values = {"image": rows, "text": [*TEXTS.values(), ""]}
    writer.write_table(pyarrow.table(values), folder / "0.parquet", row_group_size=2)
    return folder / "0.parquet"


KINDS: dict[str, Callable[[Path], Path]] = {
    "texts beside": beside,
    "zip": archive,
    "metadata.jsonl": jsonl,
    "csv": table,
    "tar": tar,
    "parquet": parquet,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_form_gives_the_same_pictures_and_texts(kind: str, tmp_path: Path) -> None:
    found = open_captioned(KINDS[kind](tmp_path / "data"))
    assert list(found.texts) == [" ".join(text.split()) for text in TEXTS.values()]
    assert len(found.images.names) == 3
    theirs = [np.asarray(Image.open(io.BytesIO(png(seed)))) for seed in range(3)]
    ours = [entry.read() for entry in found.images.stream()]
    assert all(np.array_equal(one, other) for one, other in zip(ours, theirs, strict=True))
    last = next(found.images.stream(2))  # from the middle on, as work that resumes reads them
    assert np.array_equal(last.read(), theirs[2])
    assert sum(found.images.left_out.values()) >= 1  # the picture without a caption
    again = open_captioned(
        tmp_path / "data"
        if kind not in ("zip", "csv", "parquet")
        else {
            "zip": tmp_path / "data/all.zip",
            "csv": tmp_path / "data/captions.csv",
            "parquet": tmp_path / "data/0.parquet",
        }[kind]
    )
    assert again.digest == found.digest


def test_captions_of_a_file_of_their_own_go_by_the_names_of_pictures(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "data")
    (folder / "without.png").unlink()
    file = tmp_path / "captions.csv"
    file.write_text('image_id,caption\nc,"sat"\na,"a cat"\nb,"a mat"\n')
    assert open_captioned(folder, file).texts == ("a cat", "a mat", "sat")


def test_a_damaged_member_is_found_when_it_is_read(tmp_path: Path) -> None:
    folder = tar(tmp_path / "data")
    data = bytearray((folder / "00.tar").read_bytes())
    data[512 + 8 : 512 + 40] = bytes(32)  # in the first picture
    (folder / "00.tar").write_bytes(data)
    entries = list(open_captioned(folder).images.stream())
    with pytest.raises(Unreadable, match=r"00.tar/a cannot be read"):
        entries[0].read()
    entries[1].read()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.tar", b"no tar", "not a whole .tar"),
        ("x.csv", b"name,caption\na,b\n", "no file_name"),
        ("x.parquet", b"no", "cannot be read"),
    ],
)
def test_bad_files_are_one_line(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    pictures(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words) as told:
        open_captioned(tmp_path / name)
    assert "\n" not in str(told.value)


def test_no_captions_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no picture with a caption; it has 4 picture without"):
        open_captioned(pictures(tmp_path))
