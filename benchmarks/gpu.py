"""Seconds of a picture on a device, and where they go: one command, one JSON, one table.

    python -m benchmarks.gpu --device cuda --minutes 8 --out results/gpu.json
    python -m benchmarks.gpu --table results/gpu.json        # the table of docs/speed.md
    python -m benchmarks.gpu --device cpu --networks sd15 --share        # of one evaluation

Networks have the published sizes and random weights. For each: the ways to run it (see
`gpu_ways.WAYS`) at batch 1; then, in the fastest of them, larger batches, decoders, budgets and no
guidance; beside them diffusers' own pipeline with its DPM-Solver++ at the same number of
evaluations, and the engine of `fewstep serve`. What torch.compile makes comes last, for all
networks, since it takes minutes.

The record is written after each case. A case that fails, or takes longer than its share of the
time, is one line in it, and the next one follows. Cases that would begin after --minutes are named.

A time is that of all pictures of a case, text and decoding among it: the median of several runs
after warm-up. "outside" is the share of it that no network ran in. "waits" counts how often the
host waited for the device between the first evaluation and the last.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import fewstep
from benchmarks.gpu_ways import GUIDANCE, LOOSE, WAYS, Case, running, waits
from benchmarks.real_sizes import SIZES, build
from fewstep.files import write_whole

BATCHES = (2, 4, 8, 16, 32)
BUDGETS = (1, 2, 5, 8)  # beside 4
GROUP = 8  # pictures at a time where it is not the batch that is looked at
COMPILES = 3.0  # times the seconds that a case may take, where torch.compile has to work first
GOALS = {"alone": 0.10, "batches": 40.0}  # seconds of a picture; pictures a second; of sd15


class Late(BaseException):
    """A case took too long. No Exception, which compilers catch on their way."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Inside, Late is raised after so many seconds. In the main thread only."""

    def ring(*_: Any) -> None:
        raise Late(f"took longer than {seconds:g} s")

    begun, handler = time.monotonic(), signal.signal(signal.SIGALRM, ring)
    left, every = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # until it gets through
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(0.1, left - (time.monotonic() - begun)), every)


class Clock:
    """Seconds inside the networks that it watches, by the device's own clock."""

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
    """What is timed, the most telling first."""
    cuda = device == "cuda"
    dtype = "float16" if cuda else "float32"
    group = max([one for one in batches if one <= GROUP], default=1)
    compiled = [name for name, way in WAYS.items() if way.compile]
    for network in networks:
        first = Case(network, dtype=dtype)
        yield first
        yield replace(first, by="diffusers")
        for way in WAYS if cuda else LOOSE:
            if way not in (first.way, *compiled):
                yield replace(first, way=way)
        fast = replace(first, way="fastest")
        for batch in batches:
            yield replace(fast, batch=batch)
        yield replace(fast, decoder="tiny")
        if group > 1:
            for decoder in ("slices", "tiny"):
                yield replace(fast, batch=group, decoder=decoder)
            for by in ("sample", "serve", "diffusers"):
                way = first.way if by == "diffusers" else "loose"
                yield replace(first, way=way, by=by, batch=group)
        for nfe in BUDGETS:
            yield replace(fast, nfe=nfe)
            yield replace(first, by="diffusers", nfe=nfe)
        yield replace(fast, guidance=None)
        if cuda:
            yield replace(fast, dtype="bfloat16")
    if cuda:
        for network in networks:
            for batch in (1, group) if group > 1 else (1,):
                for way in compiled:
                    yield Case(network, way=way, batch=batch, dtype=dtype)


def measure(pipe: Any, case: Case, device: str, rounds: int) -> dict[str, Any]:
    """A row: seconds of a run, pictures a second, peak memory, and for the first case of a network
    the share outside the networks and the profile."""
    cuda = device == "cuda"
    with running(pipe, case) as run:
        begun = time.perf_counter()
        run.make()  # compiles, captures, chooses kernels
        warm = time.perf_counter() - begun
        run.make()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(rounds):
            begun = time.perf_counter()
            run.make()
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
            if case.by == "sample":
                row["waits"] = waits(run)
        if case == Case(case.network, dtype=case.dtype):
            row["profile"] = profile(run.make, device)
    if "profile" in row:
        row["outside"] = outside(pipe, case, device, rounds)
    return row


def outside(pipe: Any, case: Case, device: str, rounds: int) -> float:
    """The share of a run in which no network runs."""
    clock = Clock(device)
    watched = {"unet": "forward", "transformer": "forward", "vae": "decode"}
    watched |= {name: "forward" for name in pipe.components if name.startswith("text_enc")}
    parts = [(pipe.components.get(part), name) for part, name in watched.items()]
    kept = [(owner, name) for owner, name in parts if owner is not None]
    for owner, name in kept:
        clock.watch(owner, name)
    try:
        with running(pipe, case) as run:
            run.make()
            shares = []
            for _ in range(rounds):
                clock.seconds()
                begun = time.perf_counter()
                run.make()
                inside = clock.seconds()
                shares.append(1 - inside / (time.perf_counter() - begun))
    finally:
        for owner, name in kept:
            delattr(owner, name)  # the class's own again
    return statistics.median(shares)


def profile(make: Callable[[], Any], device: str) -> list[dict[str, Any]]:
    """The three largest lines of the profile: name and share of the device's time."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        make()
    field = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    lines = sorted(profiler.key_averages(), key=lambda one: -getattr(one, field))
    total = sum(getattr(one, field) for one in lines) or 1
    return [{"name": one.key[:80], "share": getattr(one, field) / total} for one in lines[:3]]


@dataclass
class Sweep:
    """All cases that fit into the time.

    rows, failed and left_out of the record are written after each case.
    """

    options: argparse.Namespace
    pipe: Any = None
    held: tuple[str, str] | None = None  # network and dtype of the pipeline
    record: dict[str, Any] = field(default_factory=dict)

    def run(self) -> dict[str, Any]:
        options, cuda = self.options, self.options.device == "cuda"
        stop = time.monotonic() + 60 * options.minutes
        self.record = {
            "device": torch.cuda.get_device_name() if cuda else platform.machine(),
            "torch": torch.__version__,
            "fewstep": fewstep.__version__,
            "threads": torch.get_num_threads(),
            "rows": [],
            "failed": [],
            "left_out": [],
        }
        for asked in cases(options.networks, options.device, tuple(options.batches)):
            case = replace(asked, way=self._way(asked))
            left = stop - time.monotonic()
            if left <= 0:
                self.record["left_out"].append(asdict(case))
                continue
            each = options.seconds * (COMPILES if WAYS[case.way].compile else 1)
            self._case(case, min(each, left))
            self.write()
        self.write()
        return self.record

    def write(self) -> None:
        if self.options.out:
            write_whole(self.options.out, json.dumps(self.record, indent=1).encode())

    def _case(self, case: Case, seconds: float) -> None:
        device = self.options.device
        try:
            with at_most(seconds):
                if self.held != (case.network, case.dtype):
                    self.pipe = self.held = None  # first the memory, then the next
                    self.pipe = build(case.network, device, getattr(torch, case.dtype))
                    self.held = (case.network, case.dtype)
                row = measure(self.pipe, case, device, self.options.rounds)
        except (Exception, Late) as error:  # of torch, compilers and drivers: anything
            lines = str(error).strip().splitlines() or [""]
            why = f"{type(error).__name__}: {lines[0][:200]}"
            self.record["failed"].append({**asdict(case), "why": why})
            print(f"failed: {json.dumps(self.record['failed'][-1])}", flush=True)
        else:
            self.record["rows"].append(row)
            shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
            print(json.dumps(shown), flush=True)
        if device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def _way(self, case: Case) -> str:
        """The way of a case; "fastest" and "loose" by what its network took so far at batch 1."""
        if case.way in WAYS:
            return case.way
        able = LOOSE if case.way == "loose" else tuple(WAYS)
        taken = {
            row["way"]: row["seconds"]
            for row in self.record["rows"]
            if row["network"] == case.network and row["way"] in able and _is_plain(row)
        }
        return min(taken, key=taken.__getitem__) if taken else LOOSE[0]


def _is_plain(row: dict[str, Any]) -> bool:
    """Whether a row differs from the first case of its network by the way alone."""
    plain = asdict(Case(row["network"], way=row["way"]))
    return all(row[name] == value for name, value in plain.items() if name != "dtype")


def table(record: dict[str, Any]) -> str:
    """The record in Markdown."""
    lines = [
        f"{record['device']}, torch {record['torch']}",
        "",
        "| network | by | way | decoder | nfe | guidance | batch | seconds | pictures a second | "
        "outside | waits | GiB |",
        "|---" * 12 + "|",
    ]
    for row in record["rows"]:
        share = f"{row['outside']:.2%}" if "outside" in row else ""
        memory = f"{row['peak_gib']:.1f}" if "peak_gib" in row else ""
        lines.append(
            f"| {row['network']}, {row['dtype']} | {row['by']} | {row['way']} | {row['decoder']} "
            f"| {row['nfe']} | {row['guidance'] or 'none'} | {row['batch']} | {row['seconds']:.3f} "
            f"| {row['pictures_per_second']:.1f} | {share} | {row.get('waits', '')} | {memory} |"
        )
    return "\n".join([*lines, "", *verdicts(record)])


def verdicts(record: dict[str, Any]) -> list[str]:
    """The goals, met or not, with what the device did most, and what did not run; a line each."""
    lines = []
    asked = {"network": "sd15", "by": "sample", "nfe": 4, "guidance": GUIDANCE, "decoder": "whole"}
    rows = [r for r in record["rows"] if all(r[name] == asked[name] for name in asked)]
    if alone := [row for row in rows if row["batch"] == 1]:
        best = min(alone, key=lambda row: row["seconds"])
        met = "met" if best["seconds"] <= GOALS["alone"] else "not met"
        lines.append(
            f"- sd15, a picture alone: {best['seconds']:.3f} s by {best['way']}, {best['dtype']}; "
            f"the goal of {GOALS['alone']:.2f} s is {met}."
        )
        best = max(rows, key=lambda row: row["pictures_per_second"])
        met = "met" if best["pictures_per_second"] >= GOALS["batches"] else "not met"
        lines.append(
            f"- sd15, in batches: {best['pictures_per_second']:.1f} pictures a second by "
            f"{best['way']} at {best['batch']}; the goal of {GOALS['batches']:.0f} is {met}."
        )
    for row in record["rows"]:
        if "profile" in row:
            most = ", ".join(f"`{one['name']}` {one['share']:.0%}" for one in row["profile"])
            lines.append(f"- {row['network']}, the largest lines of the profile: {most}.")
    for name, what in (("failed", "Failed"), ("left_out", "No time was left for")):
        if record[name]:
            lines.append(f"- {what}: {len(record[name])} cases, named in the record.")
    return lines


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Seconds of a picture on a device.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--networks", nargs="+", choices=tuple(SIZES), default=["sd15", "sdxl"])
    parser.add_argument("--batches", type=int, nargs="*", default=list(BATCHES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=8.0, help="of all cases")
    parser.add_argument("--seconds", type=float, default=45.0, help="of a case at most")
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
    print(table(Sweep(options).run()))


if __name__ == "__main__":
    main()
