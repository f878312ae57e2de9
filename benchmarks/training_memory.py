"""Peak memory of training a solver on a pipeline, by budget and by number of prompts.

Each run is `fewstep train solver` in a process of its own; what is shown is the most memory that it
ever had resident. It is not to grow with either number. (glibc is told to give back what is freed;
on its own it keeps holes, more of them the more it was asked for.)

    python benchmarks/training_memory.py PIPELINE --captions coco_30k.csv --prompts 100 30000
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from fewstep.data.captions import read_captions


def peak(pipeline: str, captions: Path, nfe: int, trajectories: int, batch: int) -> float:
    """MiB."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fewstep", "train", "solver", pipeline]
        command += ["--prompts", str(captions), "--guidance", "7.5", "--nfe", str(nfe)]
        command += ["--trajectories", str(trajectories), "--batch", str(batch)]
        command += ["--validation-seeds", str(batch), "--dtype", "float32", "--inner", "3"]
        environment = {**os.environ, "XDG_CACHE_HOME": folder, "MALLOC_MMAP_THRESHOLD_": "65536"}
        process = subprocess.Popen(
            [*command, "--out", f"{folder}/out"],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"failed: {' '.join(command)}")
        return usage.ru_maxrss / 1024  # KiB on Linux


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("pipeline")
    parser.add_argument("--captions", type=Path, required=True)
    parser.add_argument("--prompts", type=int, nargs="+", default=[100, 30_000])
    parser.add_argument("--nfe", type=int, nargs="+", default=[3, 10])
    parser.add_argument("--trajectories", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()
    texts = read_captions(args.captions).texts
    with tempfile.TemporaryDirectory() as folder:
        for count in args.prompts:
            some = Path(folder) / f"{count}.csv"
            with some.open("w", newline="") as file:
                csv.writer(file).writerows([["prompt"], *([text] for text in texts[:count])])
            for nfe in args.nfe:
                found = peak(args.pipeline, some, nfe, args.trajectories, args.batch)
                print(json.dumps({"prompts": count, "nfe": nfe, "peak_mib": round(found)}))


if __name__ == "__main__":
    main()
