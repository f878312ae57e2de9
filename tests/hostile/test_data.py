"""Files that mean harm, or are merely broken: pictures, archives, arrays, captions, folders.

Of each: nothing runs, nothing is written, no other error than ValueError or OSError comes out, its
message is one printable line, and the process that reads all of them stays under 1 GiB.
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

GIB = 1 << 30
PROBE = Path(__file__).with_name("probe.py")
Make = Callable[[Path], Any]
CASES: dict[str, tuple[str, Make]] = {}  # by name: the reader, and what makes its file


def case(name: str, *readers: str) -> Callable[[Make], Make]:
    """A case for each reader; its maker writes at the path that it is given, or returns another."""

    def kept(make: Make) -> Make:
        for reader in readers:
            CASES[f"{reader}: {name}"] = (reader, make)
        return make

    return kept


def data_case(name: str, data: Callable[[], bytes] | bytes, *readers: str) -> None:
    case(name, *readers)(lambda path: path.write_bytes(data() if callable(data) else data))


# Pictures


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int = 8,
    height: int = 8,
    *more: bytes,
    depth: int = 8,
    colour: int = 2,
    data: bytes | None = None,
) -> bytes:
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    row = b"\0" + bytes((min(width, 64) * channels * depth + 7) // 8)
    packed = zlib.compress(row * min(height, 64)) if data is None else data
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [png_chunk(b"IHDR", head), *more, png_chunk(b"IDAT", packed), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def saved(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (16, 16)).save(buffer, kind, **options)
    return buffer.getvalue()


GHOSTSCRIPT = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(%pipe%touch x) (w) file\n"
)
WMF = b"\xd7\xcd\xc6\x9a\0\0" + struct.pack("<4hH", 0, 0, 99, 99, 72) + bytes(60)
FITS = b"SIMPLE  =                    T" + b" " * 50 + b"BITPIX  =                    8" + b" " * 50
for kind, data in {
    "EPS that opens a pipe": GHOSTSCRIPT,
    "WMF": WMF,
    "EMF": b"\1\0\0\0" + bytes(36) + b" EMF" + bytes(80),
    "FITS": FITS.ljust(2880),
    "Postscript in a DOS header": b"\xc5\xd0\xd3\xc6" + bytes(28) + GHOSTSCRIPT,
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(90),
    "GRIB": b"GRIB" + bytes(3) + b"\1" + bytes(90),
    "MPEG": b"\0\0\1\xb3" + bytes(90),
    "Photoshop": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 9, 9, 8, 3) + bytes(99),
    "HTML": b"<!doctype html><script>alert(1)</script>",
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
    "nothing": b"",
    "one byte": b"\x89",
}.items():
    data_case(f"{kind} named .png", data, "picture", "folder")
for kind in ("PDF", "PCX", "TGA", "ICO", "DDS", "SGI", "IM", "ICNS"):
    data_case(f"{kind} named .png", lambda kind=kind: saved(kind), "picture")
data_case("XBM named .png", lambda: saved("XBM", "1"), "picture")

BOMB = png(30_000, 30_000, data=zlib.compress(bytes(1 << 20)))
data_case("900 megapixels", BOMB, "picture", "folder", "png", "metadata")
data_case("80 megapixels", png(9000, 9000), "picture")
data_case("4 thousand million pixels", png(65_535, 65_535), "picture", "metadata")
data_case("no pixels", png(0, 0), "picture")
data_case(
    "GIF of 65535 x 65535", b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes(9), "picture"
)
data_case(
    "BMP of 2^31 rows", saved("BMP")[:18] + struct.pack("<ii", 9, 2**31 - 1) + bytes(99), "picture"
)
data_case("PPM of 10^9 columns", b"P6 999999999 999999999 255\n" + bytes(99), "picture")
data_case("PPM that ends in its header", b"P6 9", "picture")
data_case("PPM comment without end", b"P6 #" + b"x" * 99, "picture")
NOISE = zlib.compress(np.random.default_rng(0).bytes(64 * 193))
data_case("PNG cut short", png(64, 64, data=NOISE)[:2000], "picture", "folder", "png")
data_case("PNG with noise as pixels", png(data=bytes(range(256))), "picture")
data_case("JPEG cut short", lambda: saved("JPEG")[:200], "picture")
data_case("GIF cut short", lambda: saved("GIF")[:20], "picture")
data_case(
    "TIFF whose directory is itself", b"II*\0\x08\0\0\0" + b"\0\0" + struct.pack("<I", 8), "picture"
)
data_case("WebP cut short", lambda: saved("WEBP")[:30], "picture")
TEXT = b"a\0\0" + zlib.compress(bytes(200 << 20), 9)
data_case("PNG text that unpacks to 200 MB", lambda: png(8, 8, png_chunk(b"zTXt", TEXT)), "picture")
NEST = b"fewstep\0" + b"[" * 100_000
data_case("PNG metadata 100,000 deep", png(8, 8, png_chunk(b"tEXt", NEST)), "metadata")
data_case("PNG metadata that is a list", png(8, 8, png_chunk(b"tEXt", b"fewstep\0[1]")), "metadata")
PALETTE = png_chunk(b"PLTE", bytes(768))
for name, value in {
    "16-bit RGB": png(depth=16),
    "16-bit RGBA": png(depth=16, colour=6),
    "16-bit grey": png(depth=16, colour=0),
    "16-bit grey and alpha": png(depth=16, colour=4),
    "tRNS on grey": png(8, 8, png_chunk(b"tRNS", b"\0\0"), colour=0),
    "tRNS on 4-bit grey": png(8, 8, png_chunk(b"tRNS", b"\0\x0f"), colour=0, depth=4),
    "tRNS on RGB": png(8, 8, png_chunk(b"tRNS", bytes(6))),
    "tRNS on a palette": png(8, 8, PALETTE, png_chunk(b"tRNS", b"\0"), colour=3),
    "transparent RGBA": png(colour=6),
    "16-bit PPM": b"P6 2 2 65535\n" + bytes(24),
    "12-bit PPM": b"P6 2 2 4095\n" + bytes(24),
    "16-bit plain PPM": b"P3 1 1 65535\n1 2 3\n",
    "16-bit PGM": b"P5 2 2 65535\n" + bytes(8),
    "floating-point PFM": b"Pf 2 2 -1.0\n" + bytes(16),
}.items():
    data_case(name, value, "picture")
data_case("TIFF of 32-bit numbers", lambda: saved("TIFF", "F"), "picture")


# Archives and arrays


def zeros(size: int, wbits: int = -15) -> bytes:
    """`size` zero bytes, deflated; made in no time from one piece, many times over."""
    packer = zlib.compressobj(9, zlib.DEFLATED, wbits)
    first = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    again = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return first + again * ((size >> 20) - 1) + packer.flush()


def zip_of(*members: tuple[str, bytes, int | None], method: int = zipfile.ZIP_STORED) -> bytes:
    """An archive of (name, data, size); with a size the data are deflated already."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data, _ in members:
            archive.writestr(name, data)
    out = bytearray(buffer.getvalue())
    for name, _, size in members:
        if size is not None:
            for head, method_at, size_at in ((b"PK\3\4", 8, 22), (b"PK\1\2", 10, 24)):
                at = entry_of(out, head, name.encode())
                out[at + method_at : at + method_at + 2] = struct.pack("<H", 8)
                out[at + size_at : at + size_at + 4] = struct.pack("<I", size)
    return bytes(out)


def entry_of(archive: bytes | bytearray, head: bytes, name: bytes) -> int:
    at = archive.index(head)
    while name not in archive[at : at + 60 + len(name)]:
        at = archive.index(head, at + 1)
    return at


def npy(shape: str, dtype: str = "|u1", fortran: str = "False", data: bytes = b"") -> bytes:
    head = f"{{'descr': '{dtype}', 'fortran_order': {fortran}, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(head)) + head + data


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def encrypted(data: bytes) -> bytes:
    out = bytearray(data)
    for head, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        place = out.index(head) + at
        out[place] |= 1
    return bytes(out)


HUGE = npy("(3000000, 32, 32, 1)") + bytes(100)
PNG_3GB = zip_of(("a.png", zeros(3 << 30), 3 << 30))
for method, kind in ((zipfile.ZIP_BZIP2, "bzip2"), (zipfile.ZIP_LZMA, "LZMA")):
    bomb = zip_of(("a.png", bytes(64 << 20), None), method=method)
    data_case(f"zip packed by {kind}", bomb, "images")
data_case("zip bomb of 3 GB", PNG_3GB, "images", "training", "evaluate")
data_case(
    "zip of 200 MB of zeros as a picture",
    lambda: zip_of(("a.png", zeros(200 << 20), 200 << 20)),
    "images",
)
data_case(
    "zip whose picture says another size", lambda: zip_of(("a.png", zeros(1 << 20), 99)), "images"
)
data_case("encrypted zip", lambda: encrypted(zip_of(("a.png", png(), None))), "images", "evaluate")
data_case("zip cut short", lambda: zip_of(("a.png", png(), None))[:50], "images", "evaluate")
data_case("zip without pictures", lambda: zip_of(("../../x.sh", b"#!/bin/sh", None)), "images")
data_case("zip that begins well and is noise", b"PK\3\4" + bytes(range(256)), "images")
data_case(
    "zip with pictures of 900 megapixels",
    lambda: zip_of(("a.png", BOMB, None)),
    "images",
    "evaluate",
)
data_case("zip with EPS named .png", lambda: zip_of(("/a.png", GHOSTSCRIPT, None)), "images")
data_case(
    "zip with escapes in a name",
    lambda: zip_of(("\x1b[2J\n.png", b"x", None)),
    "images",
    "evaluate",
)


def npz_cases() -> None:
    three = zip_of(("arr_0.npy", zeros(3 << 30), 3 << 30))
    readers = ("images", "training", "arrays", "state", "evaluate")
    data_case("npz of 3 MB that unpacks to 3 GB", three, *readers)
    data_case(
        "statistics that unpack to 3 GB", zip_of(("mu.npy", zeros(3 << 30), 3 << 30)), "statistics"
    )
    for name, head in {
        "says 10^14 numbers": npy("(100000000000000,)"),
        "says 10^14 pictures": npy("(100000000000000, 8, 8, 3)"),
        "says 10^400 numbers": npy("(1" + "0" * 400 + ",)"),
        "has negative sides": npy("(-1, 8, 8, 3)", data=bytes(192)),
        "has objects": npy("(1, 8, 8, 3)", "|O", data=b"cos\nsystem\n(S'touch x'\ntR."),
        "has records": npy("(1,)", "|V999999999"),
        "has a header that is code": npy("__import__('os').system('touch x')"),
        "has a header 9,000 deep": npy("(" * 4000 + ")" * 4000),
        "has no header": b"\x93NUMPY",
        "is of format 9": b"\x93NUMPY\x09\0" + bytes(99),
        "has a header of 4 GB": b"\x93NUMPY\2\0\xff\xff\xff\xff{",
        "is text": b"hello",
    }.items():
        data_case(f"npz that {name}", zip_of(("arr_0.npy", head, None)), "images", "arrays")
        data_case(f"npy that {name}", head, "images")
    good = npz(arr_0=np.zeros((2, 32, 32, 1), np.uint8), labels=np.zeros(2, np.int64))
    data_case("encrypted npz", encrypted(good), "images", "arrays", "statistics", "evaluate")
    data_case("npz cut short", good[:300], "images", "arrays", "evaluate")
    data_case(
        "npz with a damaged checksum", good.replace(bytes(64), b"x" * 64, 1), "arrays", "images"
    )
    data_case(
        "npz in Fortran order",
        zip_of(("arr_0.npy", npy("(2, 4, 4, 1)", fortran="True", data=bytes(32)), None)),
        "images",
    )
    data_case("npz without pictures", npz(x=np.zeros(3)), "images", "statistics", "state")
    data_case(
        "labels that unpack to 3 GB",
        zip_of(
            ("arr_0.npy", npy("(2, 32, 32, 1)", data=bytes(2048)), None),
            ("labels.npy", zeros(3 << 30), 3 << 30),
        ),
        "training",
    )
    data_case(
        "labels of floats",
        npz(arr_0=np.zeros((2, 32, 32, 1), np.uint8), labels=np.zeros(2)),
        "training",
    )
    data_case(
        "labels of classes that are not there",
        npz(arr_0=np.zeros((2, 32, 32, 1), np.uint8), labels=[0, 9]),
        "training",
    )
    for name, values in {
        "of NaN": {"mu": [np.nan], "sigma": [[1.0]]},
        "of text": {"mu": ["a"], "sigma": [["b"]]},
        "that do not fit": {"mu": [0.0], "sigma": np.eye(3)},
        "that are not symmetric": {"mu": [0.0, 0.0], "sigma": [[1.0, 2.0], [3.0, 1.0]]},
        "of -5 pictures": {"mu": [0.0], "sigma": [[1.0]], "count": -5},
        "with rows of another network": {
            "mu": [0.0],
            "sigma": [[1.0]],
            "row_index": [0],
            "most": 9,
            "rows": np.zeros((1, 5)),
        },
    }.items():
        data_case(f"statistics {name}", npz(**values), "statistics")
    deep = np.array("[" * 100_000)
    data_case("state 100,000 deep", npz(facts=deep, plain=deep), "state")
    data_case("state of lists", npz(facts=np.array("[]"), plain=np.array("{}")), "state")


npz_cases()


# idx


def idx(*shape: int, data: bytes = b"", kind: int = 8) -> bytes:
    return bytes((0, 0, kind, len(shape))) + struct.pack(f">{len(shape)}I", *shape) + data


def idx_cases() -> None:
    xz = lzma.compress(idx(3_000_000, 32, 32) + bytes(32 << 20), preset=0)
    gz = idx(3_000_000, 32, 32)
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    packed = packer.compress(gz) + packer.flush(zlib.Z_FULL_FLUSH) + zeros(3 << 30)[:3_000_000]
    for name, data in {
        "xz of 3 GB": xz,
        "gzip of 3 GB": packed,
        "says 10^13 pictures": idx(2**32 - 1, 60, 60, data=bytes(99)),
        "gzip that says 10^28 numbers": gzip.compress(idx(*[2**32 - 1] * 3)),
        "cut short": idx(9, 9, 9, data=bytes(9)),
        "too long": idx(1, 2, 2, data=bytes(9)),
        "without numbers": idx(4_000_000_000, 0, 0),
        "of floats": idx(1, 2, 2, data=bytes(16), kind=13),
        "of 255 dimensions": bytes((0, 0, 8, 255)) + bytes(9),
        "cut short in its header": idx(9, 9)[:7],
        "gzip cut short": gzip.compress(idx(2, 2, 2, data=bytes(8)))[:20],
        "gzip that is noise": b"\x1f\x8b\x08" + bytes(range(99)),
        "xz that is noise": b"\xfd7zXZ\0" + bytes(range(99)),
        "nothing": b"",
        "HTML": b"<html>not found</html>",
    }.items():
        data_case(name, data, "idx")


@case("one pixel, 60 million times", "idx folder")
def _(path: Path) -> None:
    path.mkdir()
    (path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(60_000_000, 1, 1)))
    (path / "train-labels-idx1-ubyte").write_bytes(idx(2, data=bytes(2)))


idx_cases()


# Captions, and other texts

for name, text in {
    "an unquoted comma": "prompt,seed\na cat, sitting,1\n",
    "a field too few": "prompt,seed\na cat\n",
    "a column twice": "prompt,prompt\na,b\n",
    "a NUL byte": "prompt\na\0b\n",
    "a quote without end": 'prompt\n"a\n',
    "a field of a megabyte": "prompt\n" + "x" * (1 << 20) + "\n",
    "the seed 701.0": "prompt,seed\na,1\nb,701.0\n",
    "a blank seed": "prompt,seed\na,1\nb,\n",
    "the seed -1": "prompt,seed\na,1\nb,-1\n",
    "the seed 10^30": f"prompt,seed\na,1\nb,{10**30}\n",
    "the seed 2^63": f"prompt,seed\na,{2**63}\n",
    "a seed in other digits": "prompt,seed\na,\u0663\n",
    "a blank image_id": "prompt,image_id\na,1\nb,\n",
    "no header": "a cat\na dog\n",
    "escapes in its header": "\x1b[31m\n1\n",
    "no row": "prompt\n",
}.items():
    case(f"csv with {name}", "captions")(
        lambda path, text=text: (path := path.with_suffix(".csv")).write_text(text) and path
    )
for name, text in {
    "100,000 deep": "[" * 100_000,
    "a number": "1",
    "half a character": '["\\ud800"]',
    "a NUL": '["a\\u0000b"]',
    "a key twice": '[{"prompt": "a", "prompt": "b"}]',
    "a seed of 1.5": '[{"prompt": "a", "seed": 1.5}]',
    "the seed true": '[{"prompt": "a", "seed": true}]',
    "a seed of 5,000 digits": '[{"prompt": "a", "seed": ' + "9" * 5000 + "}]",
    "a list for a caption": '[["a"]]',
    "an id of objects": '[{"prompt": "a", "image_id": {"x": 1}}]',
    "nothing": "",
}.items():
    case(f"json with {name}", "captions")(
        lambda path, text=text: (
            (path.with_suffix(".json").write_text(text) and None) or path.with_suffix(".json")
        )
    )
case("jsonl cut short", "captions")(
    lambda path: (path := path.with_suffix(".jsonl")).write_text('"a"\n{"prompt":\n') and path
)
data_case("captions in Latin-1", "prompt\ncaf\xe9\n".encode("latin-1"), "captions")
data_case("captions that are a picture", png(), "captions")
data_case("plan 100,000 deep", b"[" * 100_000, "plan")
data_case("plan of objects 100,000 deep", b'{"a":' * 100_000, "plan")
data_case("plan with NaN", b'{"sigmas": [NaN], "ops": []}', "plan")
data_case("TorchScript that nobody trusts", lambda: zip_of(("n/code/x.py", b"x", None)), "features")
data_case("a pickle", b"cos\nsystem\n(S'touch x'\ntR.", "features", "images", "captions")


@case("a CLIP model with code of its own", "clip")
def _(path: Path) -> None:
    path.mkdir()
    (path / "config.json").write_text('{"auto_map": {"AutoModel": "evil.Model"}}')
    (path / "evil.py").write_text("raise SystemExit")


@case("a CLIP model whose tokenizer has code of its own", "clip")
def _(path: Path) -> None:
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.T", null]}}')


@case("one stray picture beside its captions", "matching")
def _(path: Path) -> Path:
    path.mkdir()
    for name in ("0.png", "1.png", "notes.png"):
        (path / name).write_bytes(png())
    file = path.with_suffix(".json")
    file.write_text('["a", "b", "c"]')
    return file


# Folders


def harmless() -> None:
    """Cases that must be taken, or the others would show nothing."""
    data_case("harmless", png(), "picture", "folder", "png")
    data_case("harmless zip", zip_of(("/b/a.png", png(), None)), "images")
    pictures = np.zeros((2, 32, 32, 1), np.uint8)
    data_case("harmless npz", npz(arr_0=pictures, labels=np.array([0, 1])), "images", "training")
    data_case("harmless statistics", npz(mu=[0.0], sigma=[[1.0]]), "statistics", "arrays")
    data_case("harmless idx", gzip.compress(idx(1, 2, 2, data=bytes(4))), "idx")
    data_case("harmless captions", b"prompt,seed\na cat,1\n", "captions")


harmless()


@case("nothing but a loop of links", "images", "training", "evaluate")
def _(path: Path) -> None:
    path.mkdir()
    (path / "a").symlink_to(path)
    (path / "b").symlink_to(path / "b")
    (path / "c.png").symlink_to(path / "nowhere")


@case("nothing but a pipe and a device", "images", "evaluate")
def _(path: Path) -> None:
    path.mkdir()
    os.mkfifo(path / "a.png")
    (path / "b.png").symlink_to("/dev/zero")


@case("a pipe as metadata", "metadata")
def _(path: Path) -> None:
    os.mkfifo(path)


@case("a device without end", "picture", "captions", "images")
def _(path: Path) -> Path:
    return Path("/dev/zero")


@case("escapes in a name", "images", "training", "evaluate")
def _(path: Path) -> None:
    path.mkdir()
    (path / "\x1b[2J\n\x07.png").write_bytes(b"x")


@case("a name that is not UTF-8", "images", "evaluate")
def _(path: Path) -> None:
    path.mkdir()
    Path(os.fsdecode(os.fsencode(path) + b"/\xff.png")).write_bytes(b"x")


@case("a folder named like a picture", "picture", "images", "captions")
def _(path: Path) -> None:
    path = path.with_suffix(".png")
    (path / "b.png").mkdir(parents=True)


@case("pictures beside one of 900 megapixels", "training", "evaluate")
def _(path: Path) -> None:
    (path / "a").mkdir(parents=True)
    (path / "a" / "x.png").write_bytes(png(32, 32, colour=0))
    (path / "a" / "y.png").write_bytes(BOMB)


data_case("that starts a program", b"", "start")
data_case("that writes", b"", "write")
OURS = {name for name in CASES if "harmless" in name or name.startswith(("start", "write"))}
MAY_BE_TAKEN = {"metadata"}  # reads None: a picture that is not ours


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("hostile")
    listed, made = [], {}
    for i, (name, (reader, make)) in enumerate(CASES.items()):
        if make not in made:
            path = folder / f"case-{i}" / "x.png"
            path.parent.mkdir()
            found = make(path)
            made[make] = found if isinstance(found, Path) else path
        listed.append((name, reader, str(made[make])))
    (folder / "cases.json").write_text(json.dumps(listed))
    before = sorted(folder.rglob("*"))
    environment = os.environ | {"FEWSTEP_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, PROBE, folder / "cases.json"],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        check=False,
        timeout=300,
    )
    assert sorted(folder.rglob("*")) == before, "something was made"
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(CASES), f"it ended after {len(found)}: {done.stderr[-2000:]}"
    return {one["name"]: one for one in found}


@pytest.mark.parametrize("name", sorted(CASES.keys() - OURS))
def test_a_hostile_file_is_refused_in_one_line_and_does_nothing(name, outcomes):
    found = outcomes[name]
    assert not found["events"]
    if CASES[name][0] in MAY_BE_TAKEN and found["error"] is None:
        assert found["none"]
        return
    assert found["error"] in ("ValueError", "OSError"), found
    assert found["message"].isprintable(), found
    assert len(found["message"]) < 2000
    assert "Traceback" not in found["message"]
    assert found["seconds"] < 5


def test_the_probe_sees_what_is_done_and_harmless_files_are_taken(outcomes):
    for name in OURS:
        found = outcomes[name]
        assert found["error"] is None, found
        assert bool(found["events"]) == name.startswith(("start", "write"))


def test_all_together_stay_under_a_gibibyte(outcomes):
    over = [one["name"] for one in outcomes.values() if one["mib"] > 1024]
    assert not over[:1]


def test_there_are_enough_of_them():
    assert len(CASES.keys() - OURS) >= 200
