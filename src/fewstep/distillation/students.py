"""A trained student as a model: the levels on which it is sampled, its card, its examination."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewstep.cache import cache_folder, recall
from fewstep.data.idx import to_unit
from fewstep.data.images import contact_sheet, write_png
from fewstep.evaluate import frechet_distance
from fewstep.evaluate.agreement import Prompt, agreement
from fewstep.evaluate.clip import ClipScorer
from fewstep.evaluate.references import References
from fewstep.models import Model
from fewstep.models.card import Card, Distilled
from fewstep.models.students import SAMPLERS, choices, student_levels
from fewstep.networks.features import FeatureNetwork, load_feature_network
from fewstep.provenance import VERSION
from fewstep.sampling.choose import identify
from fewstep.sampling.generate import sample

__all__ = ["Examination", "student_card", "student_levels"]

EXAMINED = (1, 2, 4)
FURTHER = 8  # for students in segments
NOISE, CHORD = "consistency", "consistency-ode"
MARKS = {NOISE: "", CHORD: "_ode"}  # of the samplers' figures
FIRST_SEED = 1_000_000  # of those for validation
FEATURES, LEAST = "fashion-a", 250  # a training metric, never the judge; pictures for a covariance
SHOWN = 12  # pictures of each kind on a sheet
FINE, FINE_NFE = "dpmpp-2m", 50  # of the teacher's pictures of texts


def student_card(
    card: Card,
    levels: Sequence[float],
    facts: dict[str, Any],
    run: dict[str, Any],
    name: str,
    sampler: str | None = None,
) -> Card:
    """The card of a student: `auto` names its sampler with the levels for each budget.

    Args:
        facts: how it was distilled; run: all settings, and its data
        sampler: one of `SAMPLERS`; the first, with fresh noise at every level, where left out, and
            the second, the only one, in segments

    Raises:
        ValueError: for another sampler.
    """
    phases = facts["phases"]
    usual = CHORD if phases not in ((), (1,)) else NOISE
    sampler = usual if sampler is None else sampler
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
    if usual == CHORD and sampler != CHORD:
        raise ValueError(f"a student in segments has {CHORD} for its sampler, got {sampler}")
    return replace(
        card,
        name=name,
        summary=f"{facts['teacher']} distilled by {facts['method']}, {len(levels)} levels",
        auto=choices(levels, sampler, phases),
        screened={},
        distilled=Distilled(**facts, levels=tuple(levels)),
        about={"fewstep": VERSION, **run, "teacher": card.about},
        folder=None,
    )


class Examination:
    """Pictures of a student beside the teacher's fine solutions.

    teacher: the model that is imitated
    count: of pictures; as many of other seeds are what their distribution is compared with
    labels, guidance: conditions of the pictures, the labels in turn; guidance is that of the
        teacher, and of a student that is told it
    prompts: texts of the pictures, in turn, for models that take them
    features: the network of the distances; fashion-a for its pictures where left out
    clip: a CLIP model, for scores of pictures against their texts
    judge, asked: what tells whether pictures show what their prompts name, one for each picture
    """

    def __init__(
        self,
        teacher: Model,
        count: int,
        *,
        labels: Sequence[int | None] = (None,),
        guidance: float | None = None,
        prompts: Sequence[str] = (),
        features: FeatureNetwork | None = None,
        clip: ClipScorer | None = None,
        judge: FeatureNetwork | None = None,
        asked: Sequence[Prompt] = (),
    ) -> None:
        self.teacher, self.guidance, self.labels = teacher, guidance, labels
        self.judge, self.asked = judge, asked
        self.prompts = tuple(prompts)
        self.network, self.clip = features, clip
        self.seeds = range(FIRST_SEED, FIRST_SEED + count)
        self.others = range(self.seeds.stop, self.seeds.stop + count)

    @cached_property
    def reference(self) -> np.ndarray:
        """The teacher's fine solutions of the same seeds, uint8 [n, h, w, c]."""
        return self._fine(self.seeds)

    @cached_property
    def distance(self) -> Callable[[np.ndarray], float] | None:
        """Frechet distance of pictures to fine solutions of other seeds, in the features of the
        network, or of fashion-a; None for pictures that it does not know, or too few.

        Of other seeds, since with those of its own a sampler that keeps to its path would be nearer
        than one with fresh noise, whichever pictures are better.
        """
        known = self.network is not None or self.reference.shape[1:] == (32, 32, 1)
        if not known or len(self.seeds) < LEAST:
            return None
        network = self.network or load_feature_network(FEATURES)

        def features(images: np.ndarray) -> np.ndarray:
            return network(to_unit(torch.from_numpy(images)).permute(0, 3, 1, 2)).numpy()

        others = features(self._fine(self.others))
        return lambda images: float(frechet_distance(features(images), others))

    def _fine(self, seeds: range) -> np.ndarray:
        """From the cache, or solved now: the same solves that comparisons are made with."""
        if self.prompts:
            return self._texts_solved(seeds)
        pictures: dict[int, np.ndarray] = {}
        for i, label in enumerate(self.labels):
            mine = seeds[i :: len(self.labels)]
            if len(mine):
                solved = References(self.teacher, label=label, guidance=self.guidance)
                ends = torch.from_numpy(solved.endpoints(mine)[:, 0])
                pictures |= zip(mine, self.teacher.decode(ends), strict=True)
        return np.stack([pictures[seed] for seed in seeds])

    def _texts_solved(self, seeds: range) -> np.ndarray:
        """The teacher's pictures of the prompts, by a fine solve."""
        how = {"solver": FINE, "nfe": FINE_NFE, "guidance": self.guidance}
        facts = getattr(self.teacher, "facts", dict)()
        key = {
            **facts,
            **identify(self.teacher),
            **how,
            "texts": self.prompts,
            "seeds": list(seeds),
        }
        shape = (len(seeds), *self.teacher.picture)  # type: ignore[attr-defined]

        def solve() -> torch.Tensor:
            made = sample(self.teacher, seeds=seeds, prompt=self._texts(seeds), **how)
            return torch.from_numpy(made.images).float()

        made = recall(cache_folder() / "references", key, shape, solve)
        return made.numpy().astype(np.uint8)

    def _texts(self, seeds: Sequence[int]) -> list[str] | None:
        texts = self.prompts
        return [texts[i % len(texts)] for i in range(len(seeds))] if texts else None

    def __call__(self, student: Model, guided: bool, sheet: Path | None) -> dict[str, float]:
        """Distances of the student's pictures at each of `EXAMINED` nfe.

        Args:
            guided: whether the student is told the guidance scale
            sheet: where to write the teacher's pictures and the student's, row by row, those of its
                own sampler

        Returns:
            For each nfe rmse_*, root mean square of the difference from the fine solution of the
            same seed in pixels of [-1, 1], and, where `distance` has it, fd_*; rmse_ode_* and
            fd_ode_* are those of consistency-ode, clip_* and agreement_* scores against the texts
            where there are such judges, and fd_fine is the distance of the fine solutions
            themselves, the least that can be expected. With another sampler it has figures too, as
            rmse_kappa_*. Beyond one evaluation the fresh noise of the
            other sampler is in its rmse.
        """
        figures: dict[str, float] = {}
        rows = [self.reference[:SHOWN]]
        turns = [self.labels[i % len(self.labels)] for i in range(len(self.seeds))]
        segments = student.card.in_segments
        own = next(iter(student.card.auto.values())).solver
        shown = (
            {CHORD: ""} if segments else {**MARKS, own: MARKS.get(own, f"_{own.split('-')[-1]}")}
        )
        for nfe in (*EXAMINED, FURTHER) if segments else EXAMINED:
            if str(nfe) not in student.card.auto:
                continue
            for sampler, mark in shown.items():
                if nfe == 1 and mark:
                    continue  # one evaluation is the same with both
                images = sample(
                    student,
                    solver=sampler,
                    nfe=nfe,
                    seeds=self.seeds,
                    label=None if None in turns else turns,
                    prompt=self._texts(self.seeds),
                    guidance=self.guidance if guided else None,
                ).images
                difference = (images.astype(np.float64) - self.reference) / 127.5
                figures[f"rmse{mark}_{nfe}"] = float(np.sqrt(np.mean(difference**2)))
                if self.distance is not None:
                    figures[f"fd{mark}_{nfe}"] = self.distance(images)
                figures |= self._scores(images, f"{mark}_{nfe}")
                if nfe == 1 or sampler == student.card.auto[str(nfe)].solver:
                    rows.append(images[:SHOWN])
        if self.distance is not None:
            figures["fd_fine"] = self.distance(self.reference)
        figures |= self._scores(self.reference, "_fine")
        if sheet is not None:
            pictures = np.concatenate(rows)
            write_png(sheet, contact_sheet(list(pictures), columns=len(rows[0])), figures)
        return figures

    def _scores(self, images: np.ndarray, mark: str) -> dict[str, float]:
        """Of pictures with their texts, by the judges that there are."""
        found: dict[str, float] = {}
        if self.clip is not None:
            texts = self._texts(self.seeds) or []
            found[f"clip{mark}"] = float(self.clip(images, texts).mean())
        if self.judge is not None:
            found[f"agreement{mark}"] = agreement(images, self.asked, self.judge).all
        return found
