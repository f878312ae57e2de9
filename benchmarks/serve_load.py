"""What `fewstep serve` does under load, against the bare sampler and against naive serving.

    python benchmarks/serve_load.py --seconds 8 --overload 60

It prints a line for each thing that is asked of the service, with pass or FAIL, in about 4
minutes. It starts a service of the built-in model on loopback and ends it. All figures are of this
machine: the clients run on the same cores. The bare sampler and naive serving run in this process
while the service idles; naive is one request after the other, each by `fewstep.sample`.

    saturation     evaluations a second of closed-loop clients, over the bare sampler's best
    mixed          the same with budgets from 1 to 8 and one picture a request, over naive
    latency        p95 at 80 % of capacity, over the bare sampler's p95 for the same 4 pictures;
                   with the least mean latency that any order of evaluations could have there
    first preview  its time over that of the last picture
    overload       requests at 10 times the capacity: answers by status, memory, and afterwards
    vanished       evaluations that were done for clients that had gone
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import fewstep
from fewstep.provenance import machine_line

MODEL, LABEL, PICTURES, NFE = "fashion-mnist", "sneaker", 4, 5
PATH = "/v1/images/generations"


class Service:
    """A service in a process of its own."""

    def __init__(self, *options: str) -> None:
        command = [sys.executable, "-m", "fewstep", "serve", MODEL, "--port", "0", "--quiet"]
        self.begun = time.perf_counter()
        self.process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        if found is None:
            raise OSError(f"the service did not start: {line!r}")
        self.port, self.seconds = int(found[1]), time.perf_counter() - self.begun

    @property
    def memory(self) -> int:
        """Resident bytes."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", text)[0]) * 1024

    def stop(self) -> float:
        """Seconds that a stop takes."""
        begun = time.perf_counter()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)
        return time.perf_counter() - begun


class Client:
    """A few lines of HTTP/1.1: a full client would take as much of the machine as the service."""

    def __init__(self, port: int) -> None:
        self.port = port

    async def ask(self, path: str, body: Any = None, leave: float | None = None) -> Answer:
        """One request on a connection of its own; `leave`: close it after so many seconds."""
        begun = time.perf_counter()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            data = b"" if body is None else json.dumps(body).encode()
            verb = "GET" if body is None else "POST"
            head = f"{verb} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
            head += f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
            writer.write(head.encode() + data)
            await writer.drain()
            if leave is not None:
                await asyncio.sleep(leave)
                return Answer(0, b"", time.perf_counter() - begun, None, {})
            first, parts = None, []
            while part := await reader.read(65_536):
                if first is None and b"partial_image" in part:
                    first = time.perf_counter() - begun
                parts.append(part)
            head_bytes, _, rest = b"".join(parts).partition(b"\r\n\r\n")
            lines = head_bytes.decode("latin-1").split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in lines[1:])
            status = int(lines[0].split()[1])
            return Answer(status, rest, time.perf_counter() - begun, first, headers)
        finally:
            writer.close()


class Answer:
    def __init__(
        self, status: int, body: bytes, seconds: float, first: float | None, headers: dict[str, str]
    ) -> None:
        self.status, self.body, self.seconds = status, body, seconds
        self.first, self.headers = first, headers


def request(draw: random.Random, n: int = PICTURES, nfe: int = NFE, **more: Any) -> dict[str, Any]:
    return {"prompt": LABEL, "n": n, "nfe": nfe, "seed": draw.randrange(10**6), **more}


def threads() -> tuple[int, ...]:
    """Numbers of threads at which the bare sampler and naive serving are shown: the best counts."""
    return tuple(sorted({1, torch.get_num_threads()}))


def bare(seconds: float, batch: int, nfe: int = NFE) -> list[float]:
    """Seconds of each call of the sampler, with the number of threads that suits it best."""
    found, total = [], torch.get_num_threads()
    for count in threads():
        torch.set_num_threads(count)
        found.append(calls(seconds / len(threads()), batch, nfe))
    torch.set_num_threads(total)
    return min(found, key=statistics.median)


def calls(seconds: float, batch: int, nfe: int) -> list[float]:
    model = fewstep.load(MODEL)
    taken: list[float] = []
    fewstep.sample(model, seeds=range(batch), nfe=nfe, label=LABEL, batch=batch)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken) < 3:
        begun = time.perf_counter()
        fewstep.sample(model, seeds=range(batch), nfe=nfe, label=LABEL, batch=batch)
        taken.append(time.perf_counter() - begun)
    return taken


def naive(seconds: float, pictures: int) -> float:
    """Evaluations a second of one request after the other, with budgets from 1 to 8, with the
    number of threads that suits it best."""
    found, total = [], torch.get_num_threads()
    for count in threads():
        torch.set_num_threads(count)
        found.append(one_by_one(seconds / len(threads()), pictures))
    torch.set_num_threads(total)
    return max(found)


def one_by_one(seconds: float, pictures: int) -> float:
    model, draw, spent = fewstep.load(MODEL), random.Random(0), 0
    begun = time.perf_counter()
    while time.perf_counter() < begun + seconds:
        nfe = draw.randint(1, 8)
        seeds = [draw.randrange(10**6) for _ in range(pictures)]
        for image in fewstep.sample(model, seeds=seeds, nfe=nfe, label=LABEL).images:
            Image.fromarray(image[..., 0]).save(io.BytesIO(), "PNG")
        spent += pictures * nfe
    return spent / (time.perf_counter() - begun)


async def closed(
    client: Client, seconds: float, clients: int, rate: float | None = None, mixed: bool = False
) -> tuple[float, list[float]]:
    """(evaluations a second, latencies) of clients that ask again once they are answered.

    rate: requests a second of all together, with random pauses; who is late asks again at once
    """
    taken: list[float] = []
    spent = 0
    begun = time.perf_counter()

    async def one(number: int) -> None:
        nonlocal spent
        draw = random.Random(number)
        due = time.perf_counter()
        while time.perf_counter() < begun + seconds:
            n, nfe = (1, draw.randint(1, 8)) if mixed else (PICTURES, NFE)
            answer = await client.ask(PATH, request(draw, n, nfe))
            if answer.status != 200:
                raise OSError(f"the service answered {answer.status}")
            spent += n * nfe
            taken.append(answer.seconds)
            if rate is not None:
                due += draw.uniform(0.5, 1.5) * clients / rate
                await asyncio.sleep(max(0.0, due - time.perf_counter()))

    await asyncio.gather(*(one(i) for i in range(clients)))
    return spent / (time.perf_counter() - begun), taken


async def previews(client: Client, count: int) -> list[float]:
    """Time to the first preview over that to the last picture."""
    draw, shares = random.Random(1), []
    for _ in range(count):
        answer = await client.ask(PATH, request(draw, stream=True, progress=True))
        shares.append((answer.first or answer.seconds) / answer.seconds)
    return shares


async def overload(
    client: Client, service: Service, seconds: float, rate: float
) -> tuple[Counter[int], int, list[int], float]:
    """(answers by status, refusals without Retry-After, memory each second, the longest answer)."""
    answers: Counter[int] = Counter()
    without, longest, memory = 0, 0.0, []
    tasks: set[asyncio.Task[None]] = set()
    draw = random.Random(2)

    async def one() -> None:
        nonlocal without, longest
        try:
            answer = await client.ask(PATH, request(draw))
        except OSError:
            answers[-1] += 1
            return
        answers[answer.status] += 1
        without += answer.status in (429, 503) and "retry-after" not in answer.headers
        longest = max(longest, answer.seconds)

    begun, sent = time.perf_counter(), 0
    while (now := time.perf_counter() - begun) < seconds:
        while sent < now * rate:
            task = asyncio.create_task(one())
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            sent += 1
        if len(memory) < now:
            memory.append(service.memory)
        await asyncio.sleep(0.02)
    await asyncio.gather(*tasks)
    return answers, without, memory, longest


async def vanish(client: Client, count: int) -> dict[str, float]:
    """What is counted after clients that go away while their pictures are made."""
    draw = random.Random(3)
    before = await counts(client)
    for _ in range(count):
        body = request(draw, 10, 40, stream=True, solver="ddim")
        await client.ask(PATH, body, leave=draw.uniform(0.1, 0.4))
    await asyncio.sleep(1.0)
    after = await counts(client)
    return {name: after[name] - before[name] for name in after}


async def counts(client: Client) -> dict[str, float]:
    text = (await client.ask("/metrics")).body.decode()
    names = ("requests_cancelled", "late_evaluations", "evaluations", "batches")
    return {
        name: float(re.findall(rf"^fewstep_{name}_total (\S+)", text, re.MULTILINE)[0])
        for name in names
    }


def p95(taken: Sequence[float]) -> float:
    return sorted(taken)[max(0, round(0.95 * len(taken)) - 1)]


async def latency(client: Client, seconds: float, saturated: float) -> dict[str, Any]:
    """p95 at 80 % of capacity, of as few clients as can ask for that much, and its bound.

    Without pauses, k clients have X(k) requests a second. So at X at least k* with X(k*) = X are in
    the service on average, and their mean latency is at least k* / X (Little).
    """
    near = 0.97  # of a rate that is asked for: a few seconds do not tell it better
    wanted, reached = 0.8 * saturated / (PICTURES * NFE), {0: 0.0}
    for clients in (1, 2, 3, 4, 6, 8):
        rate, _ = await closed(client, seconds / 3, clients)
        reached[clients] = rate / (PICTURES * NFE)
        if reached[clients] >= near * wanted:
            break
    last, before = list(reached)[-1], list(reached)[-2]
    rise = (wanted - reached[before]) / max(reached[last] - reached[before], 1e-9)
    inside = before + (last - before) * min(max(rise, 0.0), 1.0)
    alone = bare(seconds, PICTURES)
    rate, taken = await closed(client, 2 * seconds, last, wanted)
    return {
        "reached_by_clients": {k: x / wanted * 0.8 for k, x in reached.items() if k},
        "bare_p50": statistics.median(alone),
        "bare_p95": p95(alone),
        "clients": last,
        "load": rate / saturated,
        "p95": p95(taken),
        "p95_over_bare": p95(taken) / p95(alone),
        "least_mean_over_bare": max(inside, 0.8) / wanted / statistics.median(alone),
    }


def verdicts(found: dict[str, Any]) -> list[str]:
    """What is asked of the service, a line each."""

    def line(holds: bool, text: str) -> str:
        return f"{'pass' if holds else 'FAIL'}  {text}"

    gone = found["vanished"]
    batches = max(1.0, gone["requests_cancelled"])
    lines = [
        line(found["start_seconds"] < 5, f"starts in {found['start_seconds']:.1f} s; under 5"),
        line(
            found["p95_over_bare"] <= 1.3,
            f"p95 at {found['load']:.0%} of capacity is {found['p95_over_bare']:.2f} times the "
            f"bare sampler's, with {found['clients']} clients; at most 1.3. (The mean of any order "
            f"of evaluations is at least {found['least_mean_over_bare']:.2f} times its median.)",
        ),
        line(
            found["saturation"] >= 0.9,
            f"throughput is {found['saturation']:.2f} of the bare sampler's at its best batch; at "
            "least 0.9",
        ),
        line(
            found["first_preview"] < 0.3,
            f"the first preview comes after {found['first_preview']:.2f} of the time (p95 "
            f"{found['first_preview_p95']:.2f}); under 0.3",
        ),
        line(
            found["mixed_over_naive"] >= 1.5,
            f"mixed budgets: {found['mixed_over_naive']:.2f} times naive serving; at least 1.5",
        ),
        line(
            gone["late_evaluations"] <= 10 * batches,
            f"{gone['requests_cancelled']:.0f} clients of 10 pictures vanished: "
            f"{gone['late_evaluations']:.0f} late evaluations; at most one batch each",
        ),
    ]
    if "overload" in found:
        over = found["overload"]
        odd = {s: n for s, n in over["answers"].items() if s not in (200, 429, 503)}
        clean = not odd and not over["refused_without_retry_after"]
        lines += [
            line(clean, f"10 times the capacity: {over['answers']}; pictures and 429 or 503 alone"),
            line(
                over["memory_grows_by"] < 0.1,
                f"memory after the first 10 s grows by {over['memory_grows_by']:.1%}; flat",
            ),
            line(
                over["speed_after_over_before"] > 0.85,
                f"afterwards {over['speed_after_over_before']:.2f} of the speed before; as before",
            ),
        ]
    return lines


async def measure(args: argparse.Namespace, service: Service) -> dict[str, Any]:
    client, seconds = Client(service.port), args.seconds

    def note(text: str) -> None:
        print(f"{time.perf_counter() - service.begun:7.1f} s  {text}", file=sys.stderr, flush=True)

    found: dict[str, Any] = {"machine": machine_line(), "load_before": os.getloadavg()[0]}
    found["start_seconds"] = service.seconds
    await closed(client, 1, 4)
    best, saturated = 0.0, 0.0
    note("saturation")
    for batch in args.batches:  # by turns, since a machine has other work to do
        taken = bare(seconds / len(args.batches), batch)
        best = max(best, batch * NFE / statistics.median(taken))
        rate, _ = await closed(client, seconds / len(args.batches), args.clients)
        saturated = max(saturated, rate)
    found |= {"bare_best": best, "saturated": saturated, "saturation": saturated / best}
    note("naive, mixed budgets")
    for pictures in (1, PICTURES):
        found[f"naive_{pictures}"] = naive(seconds, pictures)
    mixed, _ = await closed(client, seconds, 3 * args.clients, mixed=True)
    found |= {"mixed": mixed, "mixed_over_naive": mixed / found["naive_1"]}
    found["saturated_over_naive_4"] = saturated / found["naive_4"]
    note("latency")
    found |= await latency(client, seconds, saturated)
    capacity = saturated / (PICTURES * NFE)
    note("previews")
    shares = await previews(client, 20)
    found |= {"first_preview": statistics.median(shares), "first_preview_p95": p95(shares)}
    note("clients that go away")
    found["vanished"] = await vanish(client, 10)
    if args.overload:
        note("overload")
        before, _ = await closed(client, 3, args.clients)
        answers, without, memory, longest = await overload(
            client, service, args.overload, 10 * capacity
        )
        after, _ = await closed(client, 3, args.clients)
        late = memory[min(10, len(memory) - 1) :]
        found["overload"] = {
            "answers": dict(answers),
            "refused_without_retry_after": without,
            "longest_answer": longest,
            "memory_at_10_s": late[0],
            "memory_grows_by": late[-1] / late[0] - 1,
            "speed_after_over_before": after / before,
        }
    found["load_after"] = os.getloadavg()[0]
    return found


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--overload", type=float, default=60.0, help="seconds of it; 0: none")
    parser.add_argument("--clients", type=int, default=8, help="at saturation")
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    args = parser.parse_args(arguments)
    if not 0 < args.seconds <= 600 or not 0 <= args.overload <= 600 or not 0 < args.clients <= 64:
        parser.error("seconds and overload go up to 600, clients up to 64")
    service = Service("--most-streams", "2000")
    try:
        found = asyncio.run(measure(args, service))
    finally:
        stopped = service.stop()
    found["stop_seconds"] = stopped
    print(json.dumps(found, indent=1))
    print("\n".join(verdicts(found)))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
