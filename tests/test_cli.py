"""The command as a user types it: in a subprocess, by exit code, output and files."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fewstep.cli import main
from fewstep.cli.options import parse_seeds
from fewstep.pictures import contact_sheet, read_png, write_png


def fewstep(*arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fewstep", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
        timeout=120,
    )


def in_process(*arguments: Any) -> int:
    """The same command without a process of its own, which costs seconds: its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fewstep", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    return ended.value.code or 0  # type: ignore[return-value]


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_sample_writes_skips_and_refuses_to_mix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    first = fewstep("sample", "--out", out, "--seeds", "0-2", "--nfe", 3, "--solver", "ddim")
    assert first.returncode == 0, first.stderr
    before = hashes(out)
    assert set(before) == {"000000.png", "000001.png", "000002.png", "sheet.png"}
    picture, metadata = read_png(out / "000001.png")
    assert picture.shape == (32, 32, 1)
    assert metadata is not None
    known = {key: metadata[key] for key in ("seed", "solver", "nfe")}
    assert known == {"seed": 1, "solver": "ddim", "nfe": 3}
    assert len(metadata["weights"]) == 64

    base = ("sample", "--out", out, "--seeds", "0-3", "--solver", "ddim")
    assert in_process(*base, "--nfe", 3, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["skipped"] == 3
    assert result["network_calls"] == 3
    assert [Path(p).name for p in result["files"]] == [f"00000{i}.png" for i in range(4)]
    after = hashes(out)
    assert all(after[name] == before[name] for name in before if name != "sheet.png")

    assert in_process(*base, "--nfe", 4) == 2
    assert "nfe=3 (now 4)" in capsys.readouterr().err
    assert hashes(out) == after


def test_running_twice_gives_the_same_files(tmp_path: Path) -> None:
    more = ("--seeds", "7,9", "--label", "bag,1", "--guidance", 2)
    for name in "ab":
        assert fewstep("sample", "--out", tmp_path / name, *more).returncode == 0
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def test_a_lost_picture_alone_is_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("sample", "--out", tmp_path, "--seeds", "0-3", "--nfe", 2)
    assert in_process(*arguments) == 0
    before, lost = hashes(tmp_path), read_png(tmp_path / "000002.png")[0]
    (tmp_path / "000002.png").unlink()
    capsys.readouterr()
    assert in_process(*arguments, "--json") == 0
    assert json.loads(capsys.readouterr().out)["skipped"] == 3
    kept = {k: v for k, v in before.items() if k not in ("000002.png", "sheet.png")}
    assert {k: hashes(tmp_path)[k] for k in kept} == kept
    # alone in its batch now: equal to float32 rounding, one grey level
    made = read_png(tmp_path / "000002.png")[0]
    assert np.abs(made.astype(int) - lost.astype(int)).max() <= 1


def test_batches_and_processes_give_the_same_pictures(tmp_path: Path) -> None:
    base = ("sample", "--nfe", 3, "--solver", "dpmpp-2m-sde")
    assert in_process(*base, "--out", tmp_path / "one", "--seeds", "0-5") == 0
    for seeds, batch in (("3-5", 2), ("0-2", 1)):
        done = fewstep(*base, "--out", tmp_path / "two", "--seeds", seeds, "--batch", batch)
        assert done.returncode == 0, done.stderr
    for seed in range(6):
        a, b = (read_png(tmp_path / n / f"{seed:06d}.png")[0].astype(int) for n in ("one", "two"))
        assert np.abs(a - b).max() <= 1  # one grey level: float32 rounding


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sample", "nope"], ["nope", "fewstep models"]),
        (["sample", "fashion-mnits"], ["fashion-mnist"]),
        (["sample", "--solver", "dpmp"], ["dpmp", "dpmpp-2m"]),
        (["sample", "--solver", "heun", "--nfe", "5", "--first", "none"], ["heun", "4, 6"]),
        (["sample", "--seeds", "9-1"], ["seeds", "9-1"]),
        (["sample", "--seeds", "a"], ["seeds", "0-63"]),
        (["sample", "--seeds", "0-99999999999"], ["at most"]),
        (["sample", "--grid", "80,1,2"], ["decreas"]),
        (["sample", "--grid", "8,x"], ["80,9,1"]),
        (["sample", "--label", "hat"], ["hat", "boot"]),
        (["sample", "--guidance", "2"], ["label"]),
        (["sample", "--device", "cuda:9"], ["cuda:9"]),
        (["sample", "--device", "toaster"], ["toaster"]),
        (["sample", "--dtype", "int8"], ["int8", "bfloat16"]),
        (["sample", "--out", "/proc/nowhere"], ["/proc/nowhere"]),
        (["plan", "unknown-solver"], ["unknown-solver"]),
        (["plan", "dpm-solver-3", "--nfe", "4"], ["3, 6"]),
        (["plan", "ddim", "--sigma-max", "0.001"], ["sigma_max"]),
        (["models", "nope"], ["nope"]),
        (["train", "network", "--data", "nowhere", "--out", "x"], ["train-images-idx3"]),
        (["demo", "--model", "nope"], ["nope"]),
        (["demo", "--seeds", "x"], ["seeds"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert in_process(*arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("fewstep: ")
    assert all(word in error for word in words), error
    assert not list(tmp_path.rglob("*.png"))


def test_an_error_leaves_no_traceback_in_a_real_process() -> None:
    done = fewstep("sample", "--seeds", "9-1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "fewstep: seeds must rise and stay below 2^63, got '9-1'\n"


def test_a_file_in_the_way_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "000000.png").write_bytes(b"my holiday")
    assert in_process("sample", "--out", tmp_path, "--seeds", "0") == 2
    assert "000000.png" in capsys.readouterr().err
    assert (tmp_path / "000000.png").read_bytes() == b"my holiday"


def test_plan_shows_the_coefficients(capsys: pytest.CaptureFixture[str]) -> None:
    in_process("plan", "dpmpp-2m", "--nfe", 3)
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert rows.count("eval") == rows.count("combine") == 3
    in_process("plan", "ddim", "--grid", "80,8,1", "--json")
    plan = json.loads(capsys.readouterr().out)
    combine = [op for op in plan["ops"] if op["op"] == "combine"]
    assert [op["a"] for op in combine] == pytest.approx([0.1, 0.125])
    assert [op["b"][0] for op in combine] == pytest.approx([0.9, 0.875])


def test_plan_lists_every_solver(capsys: pytest.CaptureFixture[str]) -> None:
    in_process("plan", "--list")
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert {"ddim", "unipc-3-bh1", "dpmpp-2m-sde"} <= listed


def test_models_lists_the_built_in_network(capsys: pytest.CaptureFixture[str]) -> None:
    in_process("models")
    assert "fashion-mnist" in capsys.readouterr().out
    in_process("models", "fashion-mnist")
    assert json.loads(capsys.readouterr().out)["classes"][9] == "boot"


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, fewstep.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    for command in ("sample", "plan", "models", "demo"):
        assert command in fewstep("--help").stdout


def test_seeds_are_kept_in_order_and_once() -> None:
    assert parse_seeds("5,0-2,1") == [5, 0, 1, 2]


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
