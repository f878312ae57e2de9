"""The share of a 5-evaluation run of Stable Diffusion that is spent outside its networks.

The time inside is that of the U-Net's, the autoencoder's and the text encoder's own calls; all the
rest of a call of `fewstep.sample` counts as outside: tokens, noise, solver, guidance, conversion of
pictures. The U-Net is smaller than the real one, so that a call takes some hundred milliseconds on
one CPU thread; on the real one the share is smaller. Beside it stand the pipeline's own call with
FewstepScheduler, and with diffusers' own scheduler. Each round runs all three, one after the other;
the figures are medians over rounds.

    python -m benchmarks.pipeline_overhead --rounds 7
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import fewstep
from benchmarks.stable_diffusion import stable_diffusion
from fewstep.models.formats.diffusers import from_pipe

MOST = 0.02  # of the run, outside the networks
NFE, GUIDANCE, PROMPT = 5, 7.5, "a lighthouse on a cliff in the fog"
CHANNELS, SIDE = (64, 128, 128), 32


class Clock:
    """Seconds and calls inside the networks that it watches."""

    def __init__(self) -> None:
        self.seconds, self.calls = 0.0, 0

    def watch(self, network: Any, method: str) -> None:
        call = getattr(network, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - begun
                self.calls += 1

        setattr(network, method, timed)


def routes(pipe: Any) -> dict[str, Callable[[], Any]]:
    """What makes one picture of the same prompt, by name."""
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    from fewstep.integrations.diffusers import FewstepScheduler

    pipe.set_progress_bar_config(disable=True)
    model, config = from_pipe(pipe), pipe.scheduler.config
    mine = FewstepScheduler.from_config(config, solver="dpmpp-2m")
    other = DPMSolverMultistepScheduler.from_config(config)

    def ours() -> None:
        run = {"prompt": PROMPT, "guidance": GUIDANCE, "seeds": [0]}
        fewstep.sample(model, solver="dpmpp-2m", grid="trailing", end="zero", nfe=NFE, **run)

    def theirs(scheduler: Any) -> None:
        pipe.scheduler = scheduler
        generator = torch.Generator().manual_seed(0)
        pipe(PROMPT, num_inference_steps=NFE, guidance_scale=GUIDANCE, generator=generator)

    return {
        "fewstep.sample": ours,
        "FewstepScheduler": lambda: theirs(mine),
        "DPMSolverMultistepScheduler": lambda: theirs(other),
    }


def measure(rounds: int) -> list[dict[str, Any]]:
    """Per route: seconds of a run, of a call of the U-Net, and the share outside the networks."""
    pipe, clock, unet = stable_diffusion(CHANNELS, SIDE), Clock(), Clock()
    unet.watch(pipe.unet, "forward")
    clock.watch(pipe.unet, "forward")
    clock.watch(pipe.vae, "decode")
    clock.watch(pipe.text_encoder, "forward")
    found: dict[str, list[tuple[float, float, float]]] = {}
    for turn in range(rounds + 1):
        for name, run in routes(pipe).items():
            clock.seconds, unet.seconds, unet.calls = 0.0, 0.0, 0
            begun = time.perf_counter()
            run()
            wall = time.perf_counter() - begun
            assert unet.calls == NFE  # guidance is one batched call
            if turn:  # the first round warms up
                row = (wall, unet.seconds / NFE, 1 - clock.seconds / wall)
                found.setdefault(name, []).append(row)
    return [
        {
            "route": name,
            "run_s": statistics.median(wall for wall, _, _ in rows),
            "unet_call_s": statistics.median(call for _, call, _ in rows),
            "outside": statistics.median(share for _, _, share in rows),
        }
        for name, rows in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="The share of a run outside the networks.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--check", action="store_true", help=f"fail above {MOST:.0%}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(options.rounds)
    for row in rows:
        print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}))
    if options.check and rows[0]["outside"] > MOST:
        raise SystemExit(
            f"{rows[0]['outside']:.1%} of a run is outside the networks, over {MOST:.0%}"
        )


if __name__ == "__main__":
    main()
