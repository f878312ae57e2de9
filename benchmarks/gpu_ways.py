"""The ways in which `benchmarks.gpu` makes pictures: a case in, a call that can be timed out."""

from __future__ import annotations

import importlib
import queue
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

import fewstep
from benchmarks.real_sizes import tiny_decoder
from fewstep.models.formats.diffusers import from_pipe
from fewstep.models.texts import TextCache
from fewstep.sampling.request import Request
from fewstep.sampling.settings import Settings
from fewstep.serve.engine import Engine, Event
from fewstep.serve.order import order

__all__ = ["GUIDANCE", "LOOSE", "WAYS", "Case", "Graph", "Heard", "Run", "Way", "running", "waits"]

PROMPT = "a lighthouse on a cliff in the fog"
GUIDANCE = 7.5
SOLVER: dict[str, Any] = {"solver": "dpmpp-2m", "grid": "trailing", "end": "zero"}
WAITED = "called a synchronizing CUDA operation"  # torch's own warning


@dataclass(frozen=True)
class Way:
    """How a network is run.

    channels_last: its weights lie so
    compile: the mode of torch.compile, if any
    graph: one CUDA graph for each set of shapes
    """

    channels_last: bool = False
    compile: str | None = None
    graph: bool = False


WAYS = {
    "eager": Way(),
    "channels-last": Way(channels_last=True),
    "graph": Way(channels_last=True, graph=True),
    "compile": Way(compile="max-autotune-no-cudagraphs"),
    "compile-overhead": Way(compile="reduce-overhead"),
}
LOOSE = ("eager", "channels-last")  # take any batch at once; the others prepare for each size


@dataclass(frozen=True)
class Case:
    """One setting to time.

    network: of `benchmarks.real_sizes.SIZES`
    way: of `WAYS`; "fastest" or "loose" stand for one that is known when the case is run
    by: sample (`fewstep.sample`), serve (the engine, one request a picture), diffusers
    nfe, guidance, batch, dtype: as the user would give them
    decoder: whole, slices (one picture at a time) or tiny (AutoencoderTiny)
    """

    network: str
    way: str = "eager"
    by: str = "sample"
    nfe: int = 4
    guidance: float | None = GUIDANCE
    batch: int = 1
    dtype: str = "float16"
    decoder: str = "whole"


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
        # contiguous: a condition that is the same for all pictures comes as one row, expanded
        fixed = [
            leaf.clone(memory_format=torch.contiguous_format)
            if isinstance(leaf, torch.Tensor)
            else leaf
            for leaf in leaves
        ]
        args, kwargs = pytree.tree_unflatten(fixed, tree)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):  # libraries choose their kernels before the capture
                self.network(*args, **kwargs)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # other threads may go on using the device meanwhile
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = self.network(*args, **kwargs)[0]
        places = [leaf for leaf in fixed if isinstance(leaf, torch.Tensor)]
        return graph, places, output


@dataclass
class Heard:
    """A network that says when a call begins and ends."""

    network: Callable[..., Any]
    listen: Callable[[], None] = field(default=lambda: None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.listen()
        found = self.network(*args, **kwargs)
        self.listen()
        return found


@dataclass(frozen=True)
class Run:
    """A case, ready.

    make: makes the pictures [n, h, w, c] once, to be called again and again
    heard: the network that it calls; None for diffusers' own pipeline
    """

    make: Callable[[], np.ndarray]
    heard: Heard | None = None


@contextmanager
def running(pipe: Any, case: Case) -> Iterator[Run]:
    """A case, ready to run on a pipeline; afterwards the pipeline is as it was."""
    with ExitStack() as stack:
        _decode_by(pipe, case.decoder, stack)
        if case.by == "diffusers":
            yield Run(_theirs(pipe, case, stack))
            return
        heard = Heard(_network(_net(pipe), WAYS[case.way], stack))
        model = replace(from_pipe(pipe), texts=TextCache(), forward=heard)
        make = _ours if case.by == "sample" else _served
        yield Run(make(model, case, stack), heard)


def waits(run: Run) -> int:
    """How often the host waits for the device between the first evaluation and the last."""
    if run.heard is None:
        raise ValueError("only runs of fewstep say when an evaluation begins and ends")
    marks: list[int] = []
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run.heard.listen = lambda: marks.append(sum(WAITED in str(one.message) for one in seen))
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run.make()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            run.heard.listen = lambda: None
    return marks[-1] - marks[0]


def _net(pipe: Any) -> Any:
    return pipe.components.get("unet") or pipe.components["transformer"]


def _network(net: Any, way: Way, stack: ExitStack) -> Callable[..., Any]:
    """A network, run in one of the ways."""
    _lay(net, way.channels_last)
    stack.callback(_lay, net, False)
    if way.graph:
        return Graph(net)
    if way.compile is None:
        return net
    torch._dynamo.reset()  # what was compiled for other shapes would make these dynamic
    stack.callback(torch._dynamo.reset)
    compiled = torch.compile(net, mode=way.compile)
    # its output may live in memory of a graph, which the next call writes to
    return lambda *args, **kwargs: (compiled(*args, **kwargs)[0].clone(),)


def _lay(net: Any, channels_last: bool) -> None:
    net.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _decode_by(pipe: Any, decoder: str, stack: ExitStack) -> None:
    """Set what decodes."""
    vae = pipe.vae
    if decoder == "slices":
        vae.enable_slicing()
        stack.callback(vae.disable_slicing)
    elif decoder == "tiny":
        pipe.vae = tiny_decoder(vae)
        stack.callback(setattr, pipe, "vae", vae)


def _settings(case: Case) -> dict[str, Any]:
    # of one evaluation, where the second order has nothing to look back on
    return {**SOLVER, "solver": "ddim" if case.nfe == 1 else SOLVER["solver"], "nfe": case.nfe}


def _ours(model: Any, case: Case, stack: ExitStack) -> Callable[[], np.ndarray]:
    """The plain sampler, all pictures at once."""

    def make() -> np.ndarray:
        model.texts.clear()  # diffusers encodes the text each time too
        return fewstep.sample(
            model,
            **_settings(case),
            seeds=range(case.batch),
            batch=case.batch,
            prompt=PROMPT,
            guidance=case.guidance,
        ).images

    return make


def _served(model: Any, case: Case, stack: ExitStack) -> Callable[[], np.ndarray]:
    """The engine of `fewstep serve`: one request a picture, all sent at once."""
    engine = Engine(rows=case.batch * (1 if case.guidance is None else 2), workers=1)
    stack.callback(engine.stop)

    def make() -> np.ndarray:
        model.texts.clear()
        events: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
        settings = Settings(**_settings(case))
        for seed in range(case.batch):
            request = Request((seed,), prompt=PROMPT, guidance=case.guidance)
            asked = order(case.network, model, request, settings)
            engine.submit(asked, lambda event, at=seed: events.put((at, event)))
        pictures: dict[int, np.ndarray] = {}
        while len(pictures) < case.batch:
            at, event = events.get()
            if event.error is not None:
                raise event.error
            if event.kind == "picture":
                pictures[at] = event.pixels
        return np.stack([pictures[at] for at in sorted(pictures)])

    return make


def _theirs(pipe: Any, case: Case, stack: ExitStack) -> Callable[[], np.ndarray]:
    """diffusers' own pipeline, with its DPM-Solver++ where the model is no flow."""
    diffusers: Any = importlib.import_module("diffusers")
    scheduler = pipe.scheduler
    stack.callback(setattr, pipe, "scheduler", scheduler)
    if "Flow" not in type(scheduler).__name__:
        pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(scheduler.config)
    _lay(_net(pipe), False)

    def make() -> np.ndarray:
        return pipe(
            [PROMPT] * case.batch,
            num_inference_steps=case.nfe,
            guidance_scale=1.0 if case.guidance is None else case.guidance,
            generator=[torch.Generator().manual_seed(i) for i in range(case.batch)],
            output_type="np",
        ).images

    return make
