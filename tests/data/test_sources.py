"""Sources of pictures: what they give, in which order, and what they refuse."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fewstep.data import archives, sources
from fewstep.data import images as images_module
from fewstep.data.images import write_png
from fewstep.data.sources import Images, Unreadable, array_images, open_images

SHAPES = [(5, 4, 1), (5, 4, 3)]


def random_images(n: int, shape: tuple[int, ...] = (5, 4, 3), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def png(image: np.ndarray, mode: str | None = None, **options) -> bytes:
    buffer = io.BytesIO()
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    (picture if mode is None else picture.convert(mode)).save(buffer, "PNG", **options)
    return buffer.getvalue()


def all_of(source: Images, start: int = 0) -> np.ndarray:
    return np.stack([entry.read() for entry in source.stream(start)])


def folder_of(path: Path, images: np.ndarray) -> Path:
    for i, image in enumerate(images):
        file = path / ("b" if i % 2 else "a") / f"{i:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(image))
    return path


def zip_of(path: Path, images: np.ndarray) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for i in reversed(range(len(images))):  # stored in another order
            archive.writestr(f"{i // 4:02d}/{i:03d}.PNG", png(images[i]))
        archive.writestr("dataset.json", "{}")
        archive.writestr("__MACOSX/00/._000.png", b"no picture")
    return path


def npz_of(path: Path, images: np.ndarray, key: str = "arr_0", packed: bool = False) -> Path:
    (np.savez_compressed if packed else np.savez)(path, **{key: images, "labels": np.zeros(3)})
    return path


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["zip", "npz", "packed npz", "images", "npy", "memory", "folder"])
def test_every_source_gives_the_pictures_in_order_from_any_start(kind, shape, tmp_path):
    images = random_images(9, shape)
    path = tmp_path / "p"
    match kind:
        case "zip":
            source = open_images(zip_of(path.with_suffix(".zip"), images))
        case "npz":
            source = open_images(npz_of(path.with_suffix(".npz"), images))
        case "packed npz":
            source = open_images(npz_of(path.with_suffix(".npz"), images, packed=True))
        case "images":
            source = open_images(npz_of(path.with_suffix(".npz"), images, "images"))
        case "npy":
            np.save(path.with_suffix(".npy"), images)
            source = open_images(path.with_suffix(".npy"))
        case "memory":
            source = array_images(images)
        case "folder":
            source = open_images(folder_of(path, images))
            assert source.names[:2] == ("a/000.png", "a/002.png")
            images = np.concatenate([images[::2], images[1::2]])
    assert len(source.names) == 9
    assert np.array_equal(all_of(source), images)
    assert np.array_equal(all_of(source, 4), images[4:])
    assert [entry.name for entry in source.stream(7)] == list(source.names[7:])


def test_grey_arrays_without_a_channel_have_one(tmp_path):
    images = random_images(3, (4, 4))
    source = open_images(npz_of(tmp_path / "p.npz", images))
    assert np.array_equal(all_of(source)[..., 0], images)


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_contact_sheets_of_fewstep_are_left_out_and_named(kind, tmp_path):
    folder = folder_of(tmp_path / "f", random_images(2))
    write_png(folder / "sheet.png", random_images(1)[0], {"seeds": [0, 1]})
    write_png(
        folder / "a" / "sheet.png", random_images(1)[0], {"seed": 3}
    )  # a picture of that name
    path = folder
    if kind == "zip":
        path = tmp_path / "f.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for file in folder.rglob("*.png"):
                archive.write(file, file.relative_to(folder).as_posix())
    source = open_images(path)
    assert source.left_out == {"contact sheet": 1}
    assert source.names == ("a/000.png", "a/sheet.png", "b/001.png")


@pytest.mark.parametrize("mode", ["P", "CMYK", "RGB", "RGBA", "L", "1", "LA"])
def test_modes_become_grey_or_rgb(mode, tmp_path):
    image = np.full((4, 4, 3), 255, np.uint8)
    image[:2] = 0
    picture = Image.fromarray(image).convert(mode)
    suffix = "tif" if mode == "CMYK" else "png"
    picture.save(tmp_path / f"p.{suffix}")
    found = all_of(open_images(tmp_path))[0]
    grey = mode in ("L", "1", "LA")
    assert np.array_equal(found, image[..., :1] if grey else image)


def test_what_has_no_one_way_to_eight_bits_is_refused(tmp_path):
    Image.fromarray(np.arange(16, dtype=np.uint16).reshape(4, 4) * 4000).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png has more than 8 bits"):
        all_of(open_images(tmp_path))
    see_through = np.zeros((4, 4, 4), np.uint8)
    Image.fromarray(see_through, "RGBA").save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png has transparent pixels"):
        all_of(open_images(tmp_path))


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize("damage", ["cut short", "no picture", "flipped"])
def test_a_broken_file_is_named_and_the_rest_is_read(kind, damage, tmp_path):
    images = random_images(3, (40, 40, 3))
    files = {f"{i}.png": png(image) for i, image in enumerate(images)}
    files["1.png"] = {
        "cut short": files["1.png"][:200],
        "no picture": b"<html>not found</html>",
        "flipped": files["1.png"][:500] + bytes(200) + files["1.png"][700:],
    }[damage]
    if kind == "zip":
        path = tmp_path / "p.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    else:
        path = tmp_path
        for name, data in files.items():
            (path / name).write_bytes(data)
    entries = open_images(path).stream()
    assert np.array_equal(next(entries).read(), images[0])
    with pytest.raises(Unreadable, match=r"1\.png cannot be read"):
        next(entries).read()
    assert np.array_equal(next(entries).read(), images[2])


def test_a_damaged_member_of_an_archive_is_named(tmp_path):
    path = zip_of(tmp_path / "p.zip", random_images(2, (30, 30, 3)))
    data = bytearray(path.read_bytes())
    place = data.index(b"IDAT")  # in the first member: 001.PNG
    data[place + 10 : place + 20] = bytes(10)
    path.write_bytes(bytes(data))
    entries = open_images(path).stream()
    assert next(entries).read().shape == (30, 30, 3)
    with pytest.raises(Unreadable, match=r"001\.PNG cannot be read"):
        next(entries).read()


def test_decompression_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(images_module, "MOST_PIXELS", 1000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1700)
    (tmp_path / "a.png").write_bytes(png(np.zeros((40, 40, 3), np.uint8)))  # above our limit
    (tmp_path / "b.png").write_bytes(png(np.zeros((60, 60, 3), np.uint8)))  # above twice Pillow's
    for entry in open_images(tmp_path).stream():
        with pytest.raises(Unreadable, match=f"{entry.name} cannot be read.*pixels"):
            entry.read()
    for module in (archives, sources):
        monkeypatch.setattr(module, "MOST_BYTES", 500)
    noise = zip_of(tmp_path / "p.zip", random_images(1, (20, 20, 3)))
    with pytest.raises(Unreadable, match=r"unpacks to \d+ bytes, more than 500"):
        all_of(open_images(noise))
    with pytest.raises(ValueError, match="bytes, over 500"):
        open_images(npz_of(tmp_path / "p.npz", random_images(1, (20, 20, 3))))


@pytest.mark.parametrize(
    "array",
    [np.zeros((2, 4, 4, 3)), np.zeros((2, 3, 4, 4), np.uint8), np.zeros((0, 4, 4, 3), np.uint8)],
    ids=["float", "nchw", "none"],
)
def test_arrays_that_are_no_pictures_are_refused_with_their_shape(array, tmp_path):
    path = npz_of(tmp_path / "p.npz", array)
    with pytest.raises(ValueError, match=r"must hold pictures uint8 \[n, h, w, 1 or 3\]"):
        open_images(path)


def test_other_files_are_refused_in_one_line(tmp_path):
    for name, data in {"a.npz": b"x", "b.zip": b"x", "c.txt": b"x", "d.npy": b"x"}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=name) as raised:
            open_images(tmp_path / name)
        assert "\n" not in str(raised.value)
    np.savez(tmp_path / "e.npz", mu=np.zeros(3))
    with pytest.raises(ValueError, match=r"no pictures under arr_0 or images; it has mu"):
        open_images(tmp_path / "e.npz")
    with pytest.raises(ValueError, match="has no pictures"):
        open_images(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_images(tmp_path / "missing")
    whole = npz_of(tmp_path / "f.npz", random_images(4)).read_bytes()
    (tmp_path / "f.npz").write_bytes(whole[:200])
    with pytest.raises(ValueError, match=r"f\.npz is not a whole \.npz"):
        open_images(tmp_path / "f.npz")
    np.save(tmp_path / "g.npy", random_images(4))
    (tmp_path / "g.npy").write_bytes((tmp_path / "g.npy").read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"g\.npy cannot be read as \.npy: it is cut short"):
        open_images(tmp_path / "g.npy")


def test_fitted_pictures_are_the_middle_square_resized(tmp_path):
    wide, tall = random_images(1, (8, 12, 3))[0], random_images(1, (13, 9, 3), seed=1)[0]
    (tmp_path / "a.png").write_bytes(png(wide))
    (tmp_path / "b.png").write_bytes(png(tall))
    found = all_of(open_images(tmp_path, fit=4))
    for image, square in ((found[0], wide[:, 2:10]), (found[1], tall[2:11])):
        exact = Image.fromarray(square).resize((4, 4), Image.Resampling.BICUBIC)
        assert np.array_equal(image, np.asarray(exact))
    assert np.array_equal(all_of(open_images(tmp_path, fit=8))[0], wide[:, 2:10])


@pytest.mark.parametrize("kind", ["folder", "zip", "npz"])
def test_the_digest_tells_sets_apart_without_reading_them(kind, tmp_path):
    maker = {"folder": folder_of, "zip": zip_of, "npz": npz_of}[kind]
    suffix = {"folder": "", "zip": ".zip", "npz": ".npz"}[kind]
    paths = [
        maker(tmp_path / f"{name}{suffix}", random_images(3, (4, 4, 3), seed))
        for name, seed in (("x", 0), ("y", 1))
    ]
    digests = [open_images(path).digest for path in paths]
    assert digests[0] != digests[1]
    assert open_images(paths[0]).digest == digests[0]
    assert open_images(paths[0], fit=2).digest != digests[0]
