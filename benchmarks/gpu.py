"""Seconds of a picture on a device, and where they go: one command, one JSON, one table.

    python -m benchmarks.gpu --device cuda --minutes 8 --out results/gpu.json
    python -m benchmarks.gpu --table results/gpu.json        # the table of docs/speed.md
    python -m benchmarks.gpu --device cpu --networks sd15 --share        # of one evaluation

Networks have the published sizes and random weights. For each, in this order: eager at batch 1;
the ways to run a network (see `WAYS`) at batch 1; then larger batches, budgets and no guidance, all
in the fastest way. Beside each setting of batch 1 stands diffusers' own pipeline with its
DPM-Solver++ at the same number of evaluations. Rows are written as they come, so a run that is cut
short keeps what it has, and cases that would begin after --minutes are left out and named.

A time is that of `fewstep.sample`, text and decoding among it, the median of several runs after
warm-up. "outside" is the share of it that no network ran in. "waits" counts how often the host
waited for the device between the first evaluation and the last.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

import fewstep
from benchmarks.real_sizes import SIZES, build
from fewstep.files import write_whole
from fewstep.models.formats.diffusers import from_pipe
from fewstep.models.texts import TextCache

PROMPT = "a lighthouse on a cliff in the fog"
GUIDANCE = 7.5
WAYS = ("eager", "channels-last", "compile", "compile-overhead", "graph")
BATCHES = (2, 4, 8, 16, 32)
BUDGETS = (1, 2, 5, 8)  # beside 4
SOLVER: dict[str, Any] = {"solver": "dpmpp-2m", "grid": "trailing", "end": "zero"}


@dataclass(frozen=True)
class Case:
    """One setting to time.

    network: of `SIZES`
    way: of `WAYS`, or "diffusers", its own pipeline
    nfe, guidance, batch, dtype: as the user would give them
    """

    network: str
    way: str = "eager"
    nfe: int = 4
    guidance: float | None = GUIDANCE
    batch: int = 1
    dtype: str = "float16"


class Graph:
    """A network as one CUDA graph for each set of shapes: replayed, and its output cloned.

    Inputs are copied into the memory that the graph reads. Only tensors may change between calls.
    """

    def __init__(self, network: Callable[..., Any]) -> None:
        self.network = network
        self.kept: dict[Any, tuple[Any, list[torch.Tensor], torch.Tensor]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, tree = pytree.tree_flatten((args, kwargs))
        inputs = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        plain = [leaf for leaf in leaves if not isinstance(leaf, torch.Tensor)]
        key = str(tree), str(plain), tuple((tuple(one.shape), one.dtype) for one in inputs)
        if key not in self.kept:
            self.kept[key] = self._capture(leaves, tree)
        graph, places, output = self.kept[key]
        for place, one in zip(places, inputs, strict=True):
            place.copy_(one)
        graph.replay()
        return (output.clone(),)

    def _capture(self, leaves: list[Any], tree: Any) -> Any:
        fixed = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(fixed, tree)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):  # libraries choose their kernels before the capture
                self.network(*args, **kwargs)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = self.network(*args, **kwargs)[0]
        places = [leaf for leaf in fixed if isinstance(leaf, torch.Tensor)]
        return graph, places, output


class Clock:
    """Milliseconds inside the networks that it watches, by the device's own clock."""

    def __init__(self, device: str) -> None:
        self.on_device = device == "cuda"
        self.spans: list[Any] = []

    def watch(self, owner: Any, name: str) -> None:
        call = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = self._now()
            result = call(*args, **kwargs)
            self.spans.append((begun, self._now()))
            return result

        setattr(owner, name, timed)

    def _now(self) -> Any:
        if not self.on_device:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> float:
        """Since the last call of this."""
        spans, self.spans = self.spans, []
        if self.on_device:
            torch.cuda.synchronize()
            return sum(begun.elapsed_time(ended) for begun, ended in spans) / 1000
        return sum(ended - begun for begun, ended in spans)


def cases(networks: list[str], device: str, batches: tuple[int, ...]) -> Iterator[Case]:
    """What is timed, the most telling first; "fastest" stands for a way that is known by then."""
    dtype = "float16" if device == "cuda" else "float32"
    ways = WAYS if device == "cuda" else WAYS[:2]
    for network in networks:
        first = Case(network, dtype=dtype)
        yield first
        yield replace(first, way="diffusers")
        for way in ways[1:]:
            yield replace(first, way=way)
        fast = replace(first, way="fastest")
        for batch in batches:
            yield replace(fast, batch=batch)
        for nfe in BUDGETS:
            yield replace(fast, nfe=nfe)
            yield replace(first, way="diffusers", nfe=nfe)
        yield replace(fast, guidance=None)
        if device == "cuda":
            yield replace(first, dtype="bfloat16")


def prepared(pipe: Any, way: str) -> Any:
    """The model of a pipeline, its network run in one of `WAYS`."""
    model = replace(from_pipe(pipe), texts=TextCache())
    net = model.net
    net.to(memory_format=torch.channels_last if way == "channels-last" else torch.contiguous_format)
    modes = {"compile": "max-autotune-no-cudagraphs", "compile-overhead": "reduce-overhead"}
    if way in modes:
        compiled = torch.compile(net, mode=modes[way])
        if way == "compile":
            return replace(model, forward=compiled)
        # its output lives in memory of the graph, which the next call writes to
        return replace(model, forward=lambda *a, **k: (compiled(*a, **k)[0].clone(),))
    return replace(model, forward=Graph(net) if way == "graph" else net)


def runner(pipe: Any, case: Case) -> Callable[[], Any]:
    """One run of a case, to call again and again."""
    if case.way == "diffusers":
        diffusers: Any = __import__("diffusers")
        if "Flow" not in type(pipe.scheduler).__name__:
            kind = diffusers.DPMSolverMultistepScheduler
            pipe.scheduler = kind.from_config(pipe.scheduler.config)
        scale = 1.0 if case.guidance is None else case.guidance

        def theirs() -> Any:
            generators = [torch.Generator().manual_seed(i) for i in range(case.batch)]
            return pipe(
                [PROMPT] * case.batch,
                num_inference_steps=case.nfe,
                guidance_scale=scale,
                generator=generators,
                output_type="np",
            )

        return theirs
    model = prepared(pipe, case.way)
    named = SOLVER if case.nfe > 1 else {**SOLVER, "solver": "ddim"}

    def ours() -> Any:
        return fewstep.sample(
            model,
            **named,
            nfe=case.nfe,
            seeds=range(case.batch),
            batch=case.batch,
            prompt=PROMPT,
            guidance=case.guidance,
        )

    return ours


def waits(run: Callable[[], Any], case: Case) -> int:
    """How often the host waits for the device between the first evaluation and the last."""
    counted: list[int] = []
    solve = fewstep.loop.Stepper.tell

    def told(stepper: Any, *args: Any, **kwargs: Any) -> None:
        solve(stepper, *args, **kwargs)
        counted.append(len(seen))

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fewstep.loop.Stepper.tell = told  # type: ignore[method-assign]
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
            fewstep.loop.Stepper.tell = solve  # type: ignore[method-assign]
    return counted[-1] - counted[0] if case.way != "diffusers" and counted else 0


def measure(pipe: Any, case: Case, device: str, rounds: int) -> dict[str, Any]:
    """A row: seconds of a run, pictures a second, the share outside the networks, peak memory."""
    cuda = device == "cuda"
    run = runner(pipe, case)
    begun = time.perf_counter()
    run()  # compiles, captures, chooses kernels
    warm = time.perf_counter() - begun
    run()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    seconds = statistics.median(times)
    row = {
        **asdict(case),
        "seconds": seconds,
        "pictures_per_second": case.batch / seconds,
        "warm_up_seconds": warm,
    }
    if cuda:
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        row["waits"] = waits(run, case)
    return row


def outside(pipe: Any, case: Case, device: str, rounds: int) -> float:
    """The share of a run in which no network runs."""
    clock = Clock(device)
    kept = []
    for part, name in ((pipe, "unet"), (pipe, "transformer"), (pipe, "vae")):
        network = getattr(part, name, None)
        if network is not None:
            kept.append((network, "decode" if name == "vae" else "forward"))
    kept += [(pipe.components[n], "forward") for n in pipe.components if n.startswith("text_enc")]
    kept = [(owner, name) for owner, name in kept if owner is not None]
    for owner, name in kept:
        clock.watch(owner, name)
    try:
        run = runner(pipe, case)
        run()
        shares = []
        for _ in range(rounds):
            clock.seconds()
            begun = time.perf_counter()
            run()
            inside = clock.seconds()
            shares.append(1 - inside / (time.perf_counter() - begun))
    finally:
        for owner, name in kept:
            delattr(owner, name)  # the class's own again
    return statistics.median(shares)


def profile(run: Callable[[], Any], device: str) -> list[dict[str, Any]]:
    """The three largest lines of the profile: name and share of the device's time."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        run()
    field = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    lines = sorted(profiler.key_averages(), key=lambda one: -getattr(one, field))
    total = sum(getattr(one, field) for one in lines) or 1
    return [{"name": one.key[:80], "share": getattr(one, field) / total} for one in lines[:3]]


def sweep(options: argparse.Namespace) -> dict[str, Any]:
    """All cases that fit into the time; written after each."""
    stop = time.monotonic() + 60 * options.minutes
    record: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "fewstep": fewstep.__version__,
        "threads": torch.get_num_threads(),
        "rows": [],
        "left_out": [],
        "failed": [],
    }
    pipe, held, fastest = None, None, ("eager", float("inf"))
    for case in cases(options.networks, options.device, tuple(options.batches)):
        if time.monotonic() > stop:
            record["left_out"].append(asdict(case))
            continue
        if held is None or held[0] != case.network:
            fastest = ("eager", float("inf"))
        if held != (case.network, case.dtype):
            pipe = None  # first the memory, then the next
            pipe = build(case.network, options.device, getattr(torch, case.dtype))
            held = (case.network, case.dtype)
        case = replace(case, way=fastest[0]) if case.way == "fastest" else case
        try:
            row = measure(pipe, case, options.device, options.rounds)
            if case == Case(case.network, dtype=case.dtype):
                row["outside"] = outside(pipe, case, options.device, options.rounds)
                row["profile"] = profile(runner(pipe, case), options.device)
        except (RuntimeError, ValueError) as error:  # out of memory, a compiler's faults
            record["failed"].append({**asdict(case), "why": str(error).splitlines()[0][:200]})
            if options.device == "cuda":
                torch.cuda.empty_cache()
            continue
        if case.way in WAYS and case.batch == 1 and case.nfe == 4 and row["seconds"] < fastest[1]:
            fastest = (case.way, row["seconds"])
        record["rows"].append(row)
        print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}))
        if options.out:
            write_whole(options.out, json.dumps(record, indent=1).encode())
    return record


def table(record: dict[str, Any]) -> str:
    """The record in Markdown."""
    lines = [
        f"{record['device']}, torch {record['torch']}",
        "",
        "| network | way | nfe | guidance | batch | seconds | pictures a second | outside | GiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        share = f"{row['outside']:.2%}" if "outside" in row else ""
        memory = f"{row['peak_gib']:.1f}" if "peak_gib" in row else ""
        lines.append(
            f"| {row['network']}, {row['dtype']} | {row['way']} | {row['nfe']} | "
            f"{row['guidance'] or 'none'} | {row['batch']} | {row['seconds']:.3f} | "
            f"{row['pictures_per_second']:.1f} | {share} | {memory} |"
        )
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Seconds of a picture on a device.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--networks", nargs="+", choices=tuple(SIZES), default=["sd15", "sdxl"])
    parser.add_argument("--batches", type=int, nargs="*", default=list(BATCHES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--share", action="store_true", help="only the share outside the networks, one evaluation"
    )
    parser.add_argument("--table", type=Path, help="only print the table of this record")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.table:
        print(table(json.loads(options.table.read_text(encoding="utf-8"))))
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "there is no CUDA device here; --device cpu --networks tiny tries the code"
        )
    if options.share:
        for network in options.networks:
            dtype = "float16" if options.device == "cuda" else "float32"
            case = Case(network, nfe=1, dtype=dtype)
            pipe = build(network, options.device, getattr(torch, dtype))
            share = outside(pipe, case, options.device, options.rounds)
            print(f"{network}, 1 evaluation: {share:.2%} of the time is outside the networks")
        return
    print(table(sweep(options)))


if __name__ == "__main__":
    main()
