"""The service behind the HTTP interface: models, the engine, and pictures on their way."""

from __future__ import annotations

import asyncio
import base64
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fewstep.models import Model
from fewstep.sampling.request import Request
from fewstep.sampling.settings import Settings
from fewstep.serve.engine import Engine, Event, Job
from fewstep.serve.errors import ApiError, as_api_error
from fewstep.serve.order import Mix, Order, order
from fewstep.serve.pictures import encode
from fewstep.serve.previews import Shown, shown_by
from fewstep.serve.settings import Limits
from fewstep.serve.store import Kept, Made, Store
from fewstep.text import clean

__all__ = ["Asked", "Service", "Work", "noise_of"]


@dataclass(frozen=True, eq=False)
class Asked:
    """What a request wants, in the library's words.

    Attributes:
        model: its name, one of the service's
        given: label, prompt, negative, guidance, strength and size
        settings: the sampler
        noise: of each picture
        owner: who asks
        kind, compression: of the files
        link: whether a picture comes back as its address
        partial: previews of a picture, spread over its evaluations; None for one after each
        image, mask: of an edit
    """

    model: str
    given: Mapping[str, Any]
    settings: Settings
    noise: tuple[Mix, ...]
    owner: str = "local"
    kind: str = "png"
    compression: int = 90
    link: bool = False
    partial: int | None = 0
    image: np.ndarray | None = None
    mask: np.ndarray | None = None


@dataclass(eq=False)
class Work:
    """A request on its way.

    Attributes:
        asked, order: what it wants
        events: that were not read yet
        job: in the engine
        latest: where a preview comes after each evaluation, the newest of each picture: a client
            that reads slowly gets fewer, and takes no more memory
        shown: how many previews of each picture were given
    """

    asked: Asked
    order: Order
    events: asyncio.Queue[Event]
    job: Job | None = None
    latest: dict[int, Event] = field(default_factory=dict)
    shown: dict[int, int] = field(default_factory=dict)

    def add(self, event: Event) -> None:
        """Something has happened; called in the event loop."""
        if event.kind != "preview" or self.asked.partial is not None:
            self.events.put_nowait(event)
            return
        waits = event.index in self.latest
        self.latest[event.index] = event
        if not waits:
            self.events.put_nowait(event)

    @property
    def count(self) -> int:
        return len(self.order.seeds)


class Service:
    """Makes pictures for requests.

    Attributes:
        models: by name; the first is the default
        engine: what evaluates
        store: pictures that can be refined
        limits: bounds
    """

    def __init__(
        self,
        models: Mapping[str, Model],
        engine: Engine,
        limits: Limits,
        store: Kept | None = None,
        tiny: Any = None,
    ) -> None:
        """
        Args:
            models, engine, limits: see the class
            store: where pictures are kept; in this process where left out
            tiny: a tiny autoencoder by which latents are shown, see `read_tiny`

        Raises:
            ValueError: there is no model, or the autoencoder is of other latents.
        """
        if not models:
            raise ValueError("a service needs at least one model")
        self.models, self.engine, self.limits = dict(models), engine, limits
        self.store: Kept = Store(limits) if store is None else store
        self.created = int(time.time())
        # one at a time: what texts become is kept without a lock
        self._preparing = ThreadPoolExecutor(1, "prepare")
        self._encoding = ThreadPoolExecutor(2, "encode")
        self._shown: dict[str, Shown] = {}
        if tiny is not None:
            self._shown = {name: shown_by(model, tiny) for name, model in self.models.items()}

    def model(self, name: str | None) -> tuple[str, Model]:
        """A model by name, the first one where none is named. Raises ApiError 404."""
        name = next(iter(self.models)) if name is None else name
        if name not in self.models:
            have = ", ".join(self.models)
            raise ApiError(
                404,
                f"there is no model {clean(name, 80)!r}; there are: {have}",
                param="model",
                code="model_not_found",
            )
        return name, self.models[name]

    async def warm_up(self) -> None:
        """Make a first picture with every model, so that no client waits for it."""
        for name in self.models:
            noise = (((1, 1.0),),)
            asked = Asked(name, {}, Settings(), noise)
            async for _ in self.watch(await self.submit(asked)):
                pass

    async def submit(self, asked: Asked) -> Work:
        """Check a request and queue it. Raises ApiError."""
        loop = asyncio.get_running_loop()
        try:
            self.engine.check_room(len(asked.noise))
            found = await loop.run_in_executor(self._preparing, self._order, asked)
        except Exception as error:
            raise as_api_error(error) from error
        work = Work(asked, found, asyncio.Queue())

        def listen(event: Event) -> None:
            loop.call_soon_threadsafe(work.add, event)

        try:
            work.job = self.engine.submit(found, listen, _shown_at(asked.partial, found.nfe))
        except Exception as error:
            raise as_api_error(error) from error
        return work

    def cancel(self, work: Work) -> None:
        """Let go of a request."""
        if work.job is not None:
            self.engine.cancel(work.job)

    async def watch(self, work: Work) -> AsyncIterator[dict[str, Any]]:
        """What comes of a request: facts with the keys `kind` ("queued", "partial", "picture"),
        `index` and so on. Leaving it cancels what is not done.

        Raises ApiError.
        """
        assert work.job is not None
        ended, place = False, -1
        try:
            while not ended:
                event = await self._next(work)
                if event is None:
                    now, seconds = self.engine.place(work.job)
                    if work.job.started is None and now != place:
                        place = now
                        yield {"kind": "queued", "position": now, "seconds": round(seconds, 2)}
                elif event.kind == "preview":
                    yield await self._partial(work, event)
                elif event.kind == "picture":
                    yield await self._picture(work, event)
                elif event.kind == "failed":
                    assert event.error is not None
                    raise as_api_error(event.error)
                else:
                    ended = True
        finally:
            if not ended:
                self.cancel(work)

    async def _next(self, work: Work) -> Event | None:
        """The next event; None after a while without any."""
        try:
            async with asyncio.timeout(0.5 if work.job and work.job.started is None else 10):
                event = await work.events.get()
        except TimeoutError:
            return None
        return work.latest.pop(event.index, event) if event.kind == "preview" else event

    def _order(self, asked: Asked) -> Order:
        """By the thread that prepares. Raises ValueError."""
        name, model = asked.model, self.models[asked.model]
        if name not in self._shown:
            self._shown[name] = shown_by(model)
        seeds = tuple(mix[-1][0] for mix in asked.noise)
        plain = all(len(mix) == 1 for mix in asked.noise)
        request = Request(seeds, image=asked.image, **asked.given)
        mixes = None if plain else asked.noise
        return order(name, model, request, asked.settings, mixes, asked.mask)

    async def _partial(self, work: Work, event: Event) -> dict[str, Any]:
        number = work.shown.get(event.index, 0)
        work.shown[event.index] = number + 1
        file = await self._file(work, lambda: self._preview_file(work, event))
        return {
            "kind": "partial",
            "index": event.index,
            "number": number,
            "nfe": event.nfe,
            "seed": work.order.seeds[event.index],
            "b64_json": base64.b64encode(file).decode(),
        }

    async def _picture(self, work: Work, event: Event) -> dict[str, Any]:
        made = self._made(work, event)
        key = await self.store.put(made)
        fact: dict[str, Any] = {
            "kind": "picture",
            "index": event.index,
            "nfe": event.nfe,
            "seed": work.order.seeds[event.index],
            "id": key,
            "pixels": event.pixels,
        }
        if work.asked.link:
            return {**fact, "url": f"/v1/images/{key}"}
        asked = work.asked
        file = await self._file(
            work, lambda: encode(event.pixels, asked.kind, asked.compression, made.about)
        )
        return {**fact, "b64_json": base64.b64encode(file).decode()}

    async def _file(self, work: Work, make: Any) -> bytes:
        begun = time.perf_counter()
        file = await asyncio.get_running_loop().run_in_executor(self._encoding, make)
        self.engine.stats.encoded(time.perf_counter() - begun)
        return file

    def _preview_file(self, work: Work, event: Event) -> bytes:
        asked, picture = work.asked, work.order.run.model.picture  # type: ignore[attr-defined]
        pixels = self._shown[asked.model].pixels(event.pixels, picture)
        region = work.order.region
        if region is not None:
            pixels = np.where(region.mask[..., None], pixels, region.image)
        return encode(pixels, asked.kind, min(asked.compression, 80))

    def _made(self, work: Work, event: Event) -> Made:
        asked, run = work.asked, work.order.run
        mix = asked.noise[event.index]
        given = {
            name: value[event.index] if name in run.each else value
            for name, value in asked.given.items()
        }
        record = run.record()
        about = {
            name: value[event.index] if name in run.each and isinstance(value, list) else value
            for name, value in record.items()
        }
        about |= {"seed": work.order.seeds[event.index], "nfe": event.nfe}
        if len(mix) > 1:
            about["noise"] = [list(pair) for pair in mix]
        if asked.mask is not None:
            about["mask"] = True
        return Made(
            asked.owner,
            asked.model,
            event.pixels,
            given,
            asked.settings,
            mix,
            asked.image,
            asked.mask,
            about,
        )

    def refuse(self) -> None:
        """Take no new work from now on."""
        self.engine.refuse()

    def close(self, seconds: float) -> bool:
        """Finish what runs, within so many seconds; whether all was finished."""
        done = self.engine.stop(seconds)
        self._preparing.shutdown(wait=False, cancel_futures=True)
        return done


def noise_of(seed: int | Sequence[int] | None, count: int) -> tuple[Mix, ...]:
    """The noise of `count` pictures: of one seed and those after it, of the seeds of a list, or of
    new ones. Raises ApiError for a list of another length."""
    if isinstance(seed, list):
        if len(seed) != count:
            raise ApiError(
                400,
                f"seed must be one, or one for each of {count} pictures, got {len(seed)}",
                param="seed",
                code="invalid_value",
            )
        seeds = list(seed)
    elif isinstance(seed, int):
        seeds = [(seed + i) % 2**63 for i in range(count)]
    else:
        first = secrets.randbelow(2**31)
        seeds = [first + i for i in range(count)]
    return tuple(((one, 1.0),) for one in seeds)


def _shown_at(partial: int | None, nfe: int) -> tuple[int, ...]:
    """After which evaluations a preview is wanted; the last one has none, the picture follows."""
    if partial is None:
        return tuple(range(1, nfe))
    chosen = {round(nfe * (i + 1) / (partial + 1)) for i in range(partial)}
    return tuple(sorted(chosen & set(range(1, nfe))))
