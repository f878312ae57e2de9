"""Pictures: what is read, how it lies, and what is refused by name."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fewstep.data.images import (
    FORMATS,
    SUFFIXES,
    contact_sheet,
    decode,
    read_picture,
    read_png,
    write_png,
)
from fewstep.data.sources import open_images, picture_shape, told
from fewstep.data.training import Pictures, read_data
from tests.distillation.test_distill import tiny_model

ORIENTATION = 0x0112
SQUARES = np.kron(np.arange(0, 240, 40, dtype=np.uint8).reshape(2, 3), np.ones((8, 8), np.uint8))


def saved(image: np.ndarray, kind: str = "PNG", turn: int = 1, **options: Any) -> bytes:
    """A file of the picture; `turn`: Exif's orientation."""
    buffer = io.BytesIO()
    exif = Image.Exif()
    if turn != 1:
        exif[ORIENTATION] = turn
        options["exif"] = exif
    Image.fromarray(image).save(buffer, kind, **options)
    return buffer.getvalue()


def frames(kind: str, count: int = 3) -> bytes:
    buffer = io.BytesIO()
    first, *more = (Image.fromarray(np.full((8, 8, 3), 60 * i, np.uint8)) for i in range(count))
    first.save(buffer, kind, save_all=True, append_images=more, lossless=True)
    return buffer.getvalue()


def by_hand(image: np.ndarray, turn: int) -> np.ndarray:
    """As the Exif standard says where row 0 and column 0 of the stored picture are shown."""
    rows_first = image if turn < 5 else image.T
    flips = {1: (), 2: (1,), 3: (0, 1), 4: (0,), 5: (), 6: (1,), 7: (0, 1), 8: (0,)}[turn]
    return np.flip(rows_first, flips)


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_pictures_stand_upright_as_exif_says(kind, turn):
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100}}.get(kind, {})
    data = saved(SQUARES, kind, turn, **options)
    found = decode(data).pixels[..., 0].astype(int)
    assert np.abs(found - by_hand(SQUARES, turn)).max() <= 2 * (kind in ("JPEG", "WEBP"))
    stored = decode(data, upright=False)
    if kind != "TIFF":  # which Pillow itself turns
        assert np.abs(stored.pixels[..., 0].astype(int) - SQUARES).max() <= 2
        assert (stored.turned, stored.askew) == (False, turn != 1)
        assert decode(data).turned == (turn != 1)


@pytest.mark.parametrize("turn", [3, 6, 8])
def test_every_reader_of_pictures_turns_them(turn, tmp_path):
    square = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(saved(square, turn=turn))
    upright = by_hand(square, turn)
    assert np.array_equal(read_picture(tmp_path / "a" / "x.png")[..., 0], upright)
    (entry,) = open_images(tmp_path).stream()
    assert np.array_equal(entry.read()[..., 0], upright)
    (entry,) = open_images(tmp_path, upright=False).stream()
    assert np.array_equal(entry.read()[..., 0], square)
    data = read_data(tmp_path, tiny_model(), 0.5)
    assert isinstance(data, Pictures)
    assert np.array_equal(data.images[0, 0].numpy(), upright)
    assert open_images(tmp_path).digest != open_images(tmp_path, upright=False).digest


@pytest.mark.parametrize(
    "suffix, kind",
    [
        *[(".png", "PNG"), (".apng", "PNG"), (".jpg", "JPEG"), (".JPEG", "JPEG"), (".jpe", "JPEG")],
        *[(".jfif", "JPEG"), (".webp", "WEBP"), (".bmp", "BMP"), (".tif", "TIFF")],
        *[(".tiff", "TIFF"), (".gif", "GIF"), (".ppm", "PPM"), (".pnm", "PPM"), (".pgm", "PPM")],
        (".png", "JPEG"),  # by content, whatever the name
        (".jpg", "WEBP"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_every_kind_of_picture_is_found_and_read(suffix, kind, packed, tmp_path):
    data = saved(SQUARES, kind)
    (tmp_path / f"a{suffix}").write_bytes(data)
    path = tmp_path
    if packed:
        path = tmp_path / "p.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"a{suffix}", data)
    (entry,) = open_images(path).stream()
    assert np.abs(entry.read()[..., 0].astype(int) - SQUARES).max() < 12


def test_the_list_of_suffixes_has_all_that_pillow_gives_these_formats():
    Image.init()
    theirs = {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}
    assert theirs - set(SUFFIXES) <= {".pfm"}  # numbers, not pixels


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_animations_the_first_frame_is_taken_and_counted(kind, tmp_path):
    found = decode(frames(kind))
    assert found.more
    assert np.abs(found.pixels.astype(int)).max() <= 2
    assert not decode(frames(kind, 1)).more


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "LA"])
def test_transparency_that_hides_nothing_is_taken(mode):
    image = Image.fromarray(SQUARES).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    assert np.array_equal(decode(buffer.getvalue()).pixels[..., 0], SQUARES)


def test_large_pictures_are_converted_in_strips_to_the_same_pixels(monkeypatch):
    image = np.random.default_rng(0).integers(0, 256, (50, 30, 3), dtype=np.uint8)
    for mode in ("RGB", "P", "CMYK", "L", "RGBA"):
        picture = Image.fromarray(image).convert(mode)
        buffer = io.BytesIO()
        picture.save(buffer, "TIFF")
        whole = decode(buffer.getvalue()).pixels
        with monkeypatch.context() as patch:
            patch.setattr("fewstep.data.images.STRIP", 7 * 30)
            assert np.array_equal(decode(buffer.getvalue()).pixels, whole)


# Folders


def folder(path: Path, count: int) -> Path:
    path.mkdir(parents=True)
    for i in range(count):
        (path / f"{i}.png").write_bytes(saved(SQUARES + np.uint8(i)))
    return path


def test_links_to_folders_and_files_are_followed_once_each(tmp_path):
    elsewhere = folder(tmp_path / "elsewhere", 3)
    root = folder(tmp_path / "root" / "a", 2).parent
    (root / "b").symlink_to(elsewhere)
    (root / "c.png").symlink_to(elsewhere / "1.png")
    expected = ("a/0.png", "a/1.png", "b/0.png", "b/1.png", "b/2.png", "c.png")
    assert open_images(root).names == expected
    assert open_images(root).left_out == {}
    (root / "a" / "up").symlink_to(root)
    (elsewhere / "back").symlink_to(root / "a")
    (root / "broken.png").symlink_to(root / "nowhere")
    found = open_images(root)
    assert found.names == expected  # a real folder comes before the links to it
    assert found.left_out == {"link to a folder that was read already": 2, "broken link": 1}


def test_what_is_no_picture_is_counted_aloud(tmp_path):
    root = folder(tmp_path / "p", 2)
    for name in ("a.heic", "b.HEIC", "c.avif", "notes", ".d.png"):
        (root / name).write_bytes(b"x")
    expected = {".heic": 2, ".avif": 1, "without suffix": 1, "hidden": 1}
    assert open_images(root).left_out == expected
    (line,) = told(open_images(root))
    assert "1 .avif, 2 .heic, 1 hidden, 1 without suffix" in line
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        for path in root.iterdir():
            archive.write(path, path.name)
    assert open_images(tmp_path / "p.zip").left_out == expected
    for path in root.glob("[01].png"):
        path.unlink()
    with pytest.raises(ValueError, match=r"has no pictures .*; it has 1 \.avif, 2 \.heic"):
        open_images(root)


def test_training_warns_of_what_it_left_out(tmp_path):
    square = np.zeros((8, 8), np.uint8)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jfif").write_bytes(saved(square, "JPEG"))
    (tmp_path / "a" / "y.heic").write_bytes(b"x")
    with pytest.warns(UserWarning, match=r"left out of .*: 1 \.heic"):
        read_data(tmp_path, tiny_model(), 0.5)


def test_pictures_of_an_archive_can_be_read_after_their_stream_is_gone(tmp_path):
    path = tmp_path / "p.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", saved(SQUARES))
    entry = next(open_images(path).stream())
    assert np.array_equal(entry.read()[..., 0], SQUARES)
    assert picture_shape(open_images(path)) == (16, 24, 1)


def test_a_contact_sheet_holds_every_picture_in_place() -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (32, 32, 1), dtype=np.uint8) for _ in range(5)]
    sheet = contact_sheet(images, columns=3, gap=2)
    assert sheet.shape == (2 * 66 + 2, 3 * 66 + 2, 1)
    for i, image in enumerate(images):
        top, left = 2 + (i // 3) * 66, 2 + (i % 3) * 66
        np.testing.assert_array_equal(sheet[top : top + 64 : 2, left : left + 64 : 2], image)


def test_png_metadata_round_trips_and_pictures_open_elsewhere(tmp_path: Path) -> None:
    colour = np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8)
    write_png(tmp_path / "a.png", colour, {"seed": 1, "grid": [80.0, 0.002]})
    image, metadata = read_png(tmp_path / "a.png")
    np.testing.assert_array_equal(image, colour)
    assert metadata == {"seed": 1, "grid": [80.0, 0.002]}
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), colour)
