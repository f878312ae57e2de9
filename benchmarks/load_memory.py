"""Peak memory of `fewstep.load` on a diffusers folder of safetensors, beside its weights.

A process of its own loads a small pipeline, which brings in the libraries, notes its peak, loads
the large one, reads every weight once so that what is mapped counts, and notes the peak again. The
difference over the bytes of the weights is the figure. The peak is Linux's VmHWM: ru_maxrss of a
new process begins with that of the one that started it.

    python -m benchmarks.load_memory
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.stable_diffusion import stable_diffusion, weight_bytes
from fewstep.models.pipeline import quiet

ROOT = Path(__file__).parent.parent
MOST = 1.1  # times the weights
SMALL, LARGE = (32, 64), (192, 384, 384)  # channels of the U-Net's levels


def peak() -> int:
    """The most memory that this process has held, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def load(small: str, large: str, dtype: str) -> int:
    """Bytes by which the peak rises: what the process of its own does."""
    import torch

    import fewstep

    fewstep.load(small, dtype=dtype)
    before = peak()
    model = fewstep.load(large, dtype=dtype)
    for part in model.pipe.components.values():  # type: ignore[attr-defined]
        for weight in part.parameters() if isinstance(part, torch.nn.Module) else ():
            weight.sum()
    return peak() - before


def measure(folder: Path, dtype: str = "float32") -> dict[str, float]:
    """Megabytes of weights and of peak, and their ratio."""
    import torch

    weights = 0
    for name, channels in {"small": SMALL, "large": LARGE}.items():
        with quiet():
            pipe = stable_diffusion(channels, side=32)
            pipe.to(dtype=getattr(torch, dtype))
            pipe.save_pretrained(folder / name, safe_serialization=True)
        weights = weight_bytes(pipe)
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.load_memory", "--dtype", dtype]
    command += ["--load", str(folder / "small"), str(folder / "large")]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    rise = int(run.stdout.split()[-1])
    return {"weights_mb": weights / 1e6, "peak_mb": rise / 1e6, "ratio": rise / weights}


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of loading a pipeline.")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--check", action="store_true", help=f"fail above {MOST}")
    parser.add_argument("--load", nargs=2, metavar=("SMALL", "LARGE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        small, large = options.load
        print(load(small, large, options.dtype))
        return
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), options.dtype)
    print(json.dumps({"dtype": options.dtype, **{k: round(v, 3) for k, v in figures.items()}}))
    if options.check and figures["ratio"] > MOST:
        raise SystemExit(f"loading takes {figures['ratio']:.2f} times the weights, over {MOST}")


if __name__ == "__main__":
    main()
