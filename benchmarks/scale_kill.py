"""Whether a run on Ray survives: workers and drivers are killed, and the result is compared.

    python -m benchmarks.scale_kill --pictures 10000 --out FOLDER

Three runs make the same pictures of the built-in model, with features: one process; Ray,
undisturbed; and Ray with one worker killed by SIGKILL every so many seconds, and the driver with
all that it started killed and started again, so many times. Then shards, statistics and what is
left over are compared, and the times are printed as JSON. `--overhead` instead times two workers of
Ray against two plain processes that share the seeds, in pairs, and prints the median ratio.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

COMMAND = (sys.executable, "-m", "fewstep")


def sample(out: Path, pictures: range, shards: int, nfe: int, *more: str) -> list[str]:
    """The command that makes some pictures in shards, and their features."""
    seeds = f"{pictures.start}-{pictures.stop - 1}"
    given = ["--seeds", seeds, "--nfe", str(nfe), "--shards", str(shards), "--out", str(out)]
    return [*COMMAND, "sample", *given, "--features", "fashion-a", *more]


def finished(out: Path) -> int:
    """Lines of all manifests."""
    found = (out / "manifest").glob("*.jsonl")
    return sum(path.read_bytes().count(b"\n") for path in found)


def workers_of(driver: int) -> list[psutil.Process]:
    """Processes of Ray's actors under a driver."""
    try:
        below = psutil.Process(driver).children(recursive=True)
        return [one for one in below if "FewstepWorker" in " ".join(one.cmdline()[:1])]
    except psutil.NoSuchProcess:
        return []


def disturbed(
    command: Sequence[str], out: Path, shards: int, every: float, kills: int
) -> dict[str, Any]:
    """Run the command; kill a worker every so many seconds, and the driver `kills` times."""
    begun, killed, drivers = time.monotonic(), 0, 0
    started: list[psutil.Process] = []
    at = [shards * (k + 1) // (kills + 1) for k in range(kills)]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    last = time.monotonic()
    while process.poll() is None:
        time.sleep(0.5)
        if drivers < kills and finished(out) >= at[drivers]:
            started += psutil.Process(process.pid).children(recursive=True)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            drivers += 1
            process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
            last = time.monotonic()
        elif time.monotonic() - last > every and (found := workers_of(process.pid)):
            last = time.monotonic()
            found[killed % len(found)].kill()
            killed += 1
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}")
    seconds = round(time.monotonic() - begun, 1)
    _, left = psutil.wait_procs(started, timeout=30)
    return {
        "seconds": seconds,
        "workers_killed": killed,
        "drivers_killed": drivers,
        "processes_left_over": [one.pid for one in left],
    }


def timed(*commands: Sequence[str]) -> float:
    """Seconds until all of some commands, started together, have ended."""
    begun = time.monotonic()
    running = [subprocess.Popen(one, stdout=subprocess.DEVNULL) for one in commands]
    for one in running:
        if one.wait():
            raise SystemExit(f"{one.args} ended with {one.returncode}")
    return round(time.monotonic() - begun, 1)


def shard_hashes(out: Path) -> dict[str, str]:
    found = sorted((out / "shards").iterdir())
    return {one.name: hashlib.sha256(one.read_bytes()).hexdigest() for one in found}


def merged(out: Path) -> list[np.ndarray]:
    """Moments of all pictures, as `fewstep evaluate` saves them."""
    path = out.with_suffix(".npz")
    how = ["--features", "fashion-a", "--resamples", "0", "--save-statistics", str(path)]
    subprocess.run([*COMMAND, "evaluate", str(out), *how], check=True, stdout=subprocess.DEVNULL)
    with np.load(path) as values:
        return [values[name] for name in ("mu", "sigma", "rows")]


def survives(args: argparse.Namespace) -> dict[str, Any]:
    seeds, shards = range(args.pictures), args.shards
    ray = ("--executor", "ray", "--workers", str(args.workers))
    one, calm, hard = (args.out / name for name in ("one", "calm", "hard"))
    found: dict[str, Any] = {"pictures": args.pictures, "shards": shards, "nfe": args.nfe}
    found["one_process"] = timed(sample(one, seeds, shards, args.nfe))
    found["undisturbed"] = timed(sample(calm, seeds, shards, args.nfe, *ray))
    command = sample(hard, seeds, shards, args.nfe, *ray)
    found |= {"disturbed": disturbed(command, hard, shards, args.every, args.kills)}
    found["ratio"] = round(found["disturbed"]["seconds"] / found["undisturbed"], 3)
    found["shards_equal"] = shard_hashes(one) == shard_hashes(calm) == shard_hashes(hard)
    ours, theirs = merged(one), merged(hard)
    found["statistics_equal"] = all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    left = [str(path) for path in hard.rglob("*") if path.name.startswith(".")]
    found["files_left_over"] = left
    return found


def overhead(args: argparse.Namespace) -> dict[str, Any]:
    """Two plain processes that share the seeds, against two workers of Ray; in turns."""
    half, shards = args.pictures // 2, max(2, args.shards)
    seeds, ratios, of_work, pairs = range(args.pictures), [], [], []
    for turn in range(args.pairs):
        plain = args.out / f"plain-{turn}"
        both = (
            sample(plain / "a", range(half), shards // 2, args.nfe),
            sample(plain / "b", range(half, args.pictures), shards // 2, args.nfe),
        )
        spread = sample(args.out / f"ray-{turn}", seeds, shards, args.nfe, "--executor", "ray")
        spread += ["--workers", "2"]
        order = [lambda b=both: timed(*b), lambda s=spread: timed(s)]
        first = [order[i]() for i in ((0, 1) if turn % 2 == 0 else (1, 0))]
        pair = first if turn % 2 == 0 else first[::-1]
        work = worked(plain / "a", plain / "b"), worked(args.out / f"ray-{turn}")
        pairs.append({"plain": pair[0], "ray": pair[1], "plain_work": work[0], "ray_work": work[1]})
        ratios.append(pair[1] / pair[0])
        of_work.append(work[1] / work[0])
        print(json.dumps(pairs[-1]), file=sys.stderr)
    return {
        "pairs": pairs,
        "ratio": round(statistics.median(ratios), 3),
        "ratio_of_work": round(statistics.median(of_work), 3),
    }


def worked(*places: Path) -> float:
    """Seconds from the beginning of the first shard to the end of the last: without the start of
    processes, libraries and models."""
    paths = [path for place in places for path in (place / "manifest").glob("*.jsonl")]
    lines = [json.loads(text) for path in paths for text in path.read_text().splitlines()]
    begun = min(line["at"] - line["seconds"] for line in lines)
    return round(max(line["at"] for line in lines) - begun, 1)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--shards", type=int, default=80)
    parser.add_argument("--nfe", type=int, default=1)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--every", type=float, default=20.0, help="seconds between two kills")
    parser.add_argument("--kills", type=int, default=2, help="of the driver")
    parser.add_argument("--overhead", action="store_true")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    if any(args.out.iterdir()):  # what is there would be skipped, in no time
        parser.error(f"{args.out} has something in it; name a new folder with --out")
    print(json.dumps(overhead(args) if args.overhead else survives(args), indent=1))


if __name__ == "__main__":
    main()
