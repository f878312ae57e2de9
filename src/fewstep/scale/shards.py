"""Shards of pictures: what one is made of, and the work that makes it.

A shard has the same bytes wherever and however often it is made, at equal batches. Its pictures are
those that `fewstep sample` makes of the same seeds; their PNG files are equal to the byte.
"""

from __future__ import annotations

import io
import json
import socket
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fewstep.data.images import png_bytes
from fewstep.data.sources import array_images
from fewstep.evaluate.parts import gather_part, write_part
from fewstep.sampling.choose import identify
from fewstep.sampling.folder import Facts
from fewstep.sampling.generate import Run
from fewstep.sampling.request import Request
from fewstep.sampling.settings import Settings
from fewstep.scale.manifest import Job, Line, shard_files
from fewstep.scale.stores import open_store
from fewstep.scale.work import Place, device_at

if TYPE_CHECKING:
    from fewstep.evaluate.clip import ClipScorer
    from fewstep.evaluate.features import Extractor
    from fewstep.models import Model

__all__ = ["Looks", "Shard", "SampleWork", "Source", "Task", "png_names", "tar_bytes"]


@dataclass(frozen=True)
class Shard:
    """Some of a job's pictures.

    task: which of the work's tasks it belongs to
    number: of the shard
    seeds, names: of its pictures; names without suffix, those of the seeds where left out
    given: conditions that have one value per picture
    """

    task: int
    number: int
    seeds: Sequence[int]
    names: tuple[str, ...] | None = None
    given: tuple[tuple[str, tuple[Any, ...]], ...] = ()


@dataclass(frozen=True)
class Source:
    """A model by name, and how it is loaded."""

    name: str
    device: str = "cpu"
    dtype: str = "float32"
    compile: bool = False
    options: tuple[tuple[str, Any], ...] = ()

    def load(self, place: Place | None = None) -> Model:
        """On the device of a worker; without one on the CPU, to be asked what it is."""
        from fewstep.models import load

        device = "cpu" if place is None else device_at(self.device, place)
        compiled = self.compile and place is not None
        options = dict(self.options)
        return load(self.name, device=device, dtype=self.dtype, compile=compiled, **options)


@dataclass(frozen=True)
class Looks:
    """What looks at the pictures while they are made: the name of a feature network, and a CLIP
    model with the pictures' prompts for captions."""

    features: str | None = None
    trust: tuple[str, ...] = ()
    clip: str | None = None

    def open(self, device: str, shape: tuple[int, int, int]) -> Judges:
        from fewstep.evaluate.clip import load_clip
        from fewstep.evaluate.features import resolve_features

        extractor = None
        if self.features is not None:
            extractor = resolve_features(self.features, device, shape, self.trust)
        return Judges(extractor, load_clip(self.clip, device) if self.clip else None)


@dataclass(frozen=True)
class Judges:
    extractor: Extractor | None = None
    clip: ClipScorer | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(one.name for one in (self.extractor, self.clip) if one is not None)


@dataclass(frozen=True)
class Task:
    """A job as a worker needs it.

    place: of the store
    request: conditions that all pictures share; its seeds are some of them
    """

    job: Job
    place: str
    source: Source
    settings: Settings
    request: Request
    looks: Looks = Looks()


@dataclass(frozen=True)
class SampleWork:
    """Makes shards of some tasks, and writes them.

    loaded: the model of the first task and its judges, where this process has them
    """

    tasks: tuple[Task, ...]
    loaded: tuple[Model, Judges] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"tasks": self.tasks, "loaded": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)

    def open(self, place: Place) -> Callable[[Shard], Line]:
        first = self.tasks[0]
        models: dict[Source, Model] = {}
        judges: dict[Looks, Judges] = {}
        makers: dict[int, _Maker] = {}
        if self.loaded is not None:
            models[first.source], judges[first.looks] = self.loaded
        else:
            models[first.source] = first.source.load(place)

        def make(shard: Shard) -> Line:
            task = self.tasks[shard.task]
            if shard.task not in makers:
                if task.source not in models:
                    models.clear()  # one at a time: shards of a model follow each other
                    makers.clear()
                    models[task.source] = task.source.load(place)
                model = models[task.source]
                if task.looks not in judges:
                    device = device_at(task.source.device, place)
                    judges[task.looks] = task.looks.open(device, picture_of(model))
                makers[shard.task] = _Maker(task, model, judges[task.looks])
            return makers[shard.task].make(shard)

        return make


class _Maker:
    """Makes shards of one task with a loaded model."""

    def __init__(self, task: Task, model: Model, judges: Judges) -> None:
        self.task, self.judges = task, judges
        self.store = open_store(task.place)
        self.run: Run | None = None
        self.model = model
        self.identity: dict[str, Any] = {}

    def make(self, shard: Shard) -> Line:
        begun = time.monotonic()
        images, facts, batch = self._pictures(shard)
        names = shard.names or png_names(shard.seeds)
        files = self._files(shard, images, facts, names)
        for name, data in files:
            self.store.write(name, data)
        job = self.task.job
        one_by_one = names if job.keep == "png" else ()
        return Line.of(job, shard.number, files, batch=batch, begun=begun, names=one_by_one)

    def _pictures(self, shard: Shard) -> tuple[np.ndarray, Facts, int]:
        """The pictures; where memory runs out, all of them again with half the batch."""
        import torch

        batch = self.task.job.batch
        while True:
            try:
                run = self._run_of(shard, batch)
                parts = [run.make(i, batch).images for i in range(0, len(shard.seeds), batch)]
                return np.concatenate(parts), Facts.of(run, self.identity), batch
            except torch.OutOfMemoryError:
                if batch == 1:
                    raise
                batch //= 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _run_of(self, shard: Shard, batch: int) -> Run:
        """The solver is found and planned once, for the first shard.

        Raises:
            ValueError: the model here is not that of the job.
        """
        request = replace(self.task.request, seeds=tuple(shard.seeds), **dict(shard.given))
        if self.run is None:
            run = Run.of(self.model, request, self.task.settings, batch)
            self.identity = identify(run.model)
            self._check(Facts.of(run, self.identity).common)
            self.run = run
        changed = {"seeds": request.seeds, **dict(shard.given)}
        return replace(self.run, request=replace(self.run.request, **changed))

    def _check(self, common: dict[str, Any]) -> None:
        wanted = self.task.job.facts
        ours = json.loads(json.dumps(common))
        apart = sorted(name for name in ours if wanted.get(name) != ours[name])
        if apart:
            raise ValueError(
                f"the model {self.task.source.name} on {socket.gethostname()} is not that of the "
                f"job ({', '.join(apart)[:200]} differ); put the same files on all machines"
            )

    def _files(
        self, shard: Shard, images: np.ndarray, facts: Facts, names: Sequence[str]
    ) -> list[tuple[str, bytes]]:
        job = self.task.job
        inside = {name.rpartition(".")[2]: name for name in shard_files(job, shard.number)}
        files = []
        if job.keep != "none":
            rows = [facts.metadata(i) for i in range(len(names))]
            pngs = [png_bytes(image, row) for image, row in zip(images, rows, strict=True)]
            if job.keep == "tar":
                files.append((inside["tar"], tar_bytes(names, pngs, rows)))
            else:
                files += [(f"{name}.png", png) for name, png in zip(names, pngs, strict=True)]
        if job.features:
            texts: tuple[str, ...] = ()
            if self.judges.clip is not None:
                prompts = dict(shard.given).get("prompt") or (self.task.request.prompt,)
                texts = tuple(map(str, prompts)) * (len(names) // len(prompts))
            start = job.part(shard.number).start
            extractor, clip = self.judges.extractor, self.judges.clip
            found = gather_part(array_images(images, names[0]), extractor, clip, texts, start)
            files.append((inside["npz"], write_part(found)))
        return files


def picture_of(model: Model) -> tuple[int, int, int]:
    """(h, w, c) of its pictures."""
    return getattr(model, "picture", None) or model.card.picture or (32, 32, 3)


def png_names(seeds: Sequence[int]) -> tuple[str, ...]:
    """As `fewstep sample` names pictures."""
    return tuple(f"{seed:06d}" for seed in seeds)


def tar_bytes(names: Sequence[str], pngs: Sequence[bytes], rows: Sequence[dict[str, Any]]) -> bytes:
    """A tar in webdataset's layout: NAME.png and NAME.json for each picture. The bytes depend on
    the arguments alone."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, png, row in zip(names, pngs, rows, strict=True):
            for end, data in (("png", png), ("json", json.dumps(row, sort_keys=True).encode())):
                member = tarfile.TarInfo(f"{name}.{end}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()
