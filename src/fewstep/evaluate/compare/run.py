"""Samplers side by side on one model: which to use, with numbers that can be made again.

For each solver and budget, the setting (grid, analytic first step, end) is screened on validation
seeds; the chosen one runs on the test seeds. A row of the result has

    error       root mean square distance to the same seed's reference solve, [-1, 1] pixel units
    psnr        10 log10(4 / mean squared error), in dB
    fd          Frechet distance of its pictures to a population of reference solves of the same
                network from other seeds, in each feature network's space
    excess      fd less that of the reference solves of the same seeds: 0 is a perfect sampler
    fd_data     Frechet distance to the statistics of data that come with the feature network
    agreement   mean cosine of the features of its picture and of the same seed's by the same
                sampler at its largest budget: 1 means that a preview is the picture
    seconds     wall time per picture, sampling and decoding, of one batch; median of ROUNDS rounds
                in which every row has its turn, so that all are taken in the same minutes

A student, distilled from the model, is one more sampler: it runs by its own network, and is held to
the references and the population of its teacher.

Everything slow is kept in a folder as it is made, under names that have a hash of all that it
depends on: pictures and errors of each run by CHUNK seeds, features of each run. So an interrupted
comparison goes on where it stopped, and a new solver or feature network is added to an old one at
its own cost; only the times of all rows are taken again. Evaluations that samplers share are kept
in memory.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.evaluate.compare.bench import CHUNK, Judge, Workbench
from fewstep.evaluate.compare.design import Design
from fewstep.evaluate.compare.pieces import Do, prepare
from fewstep.evaluate.compare.records import check_protocol, merge, protocol
from fewstep.evaluate.compare.rows import CHECKED, agreements, make_row, times
from fewstep.evaluate.compare.screening import all_candidates, screened
from fewstep.evaluate.statistics import Statistics, paired_frechet
from fewstep.learned.solver import trained_on
from fewstep.models import Model, is_model, load, read_card, students_of
from fewstep.models.formats.loras import DIFFUSERS
from fewstep.models.formats.sources import INDEX_FILE
from fewstep.models.students import as_lcm
from fewstep.provenance import machine
from fewstep.records import as_slug
from fewstep.solving import is_folder

__all__ = ["LCM", "Comparison", "compare", "compare_beside", "load_students"]

LCM, SAFE = "lcm", ".safetensors"
SHOWN = 16  # pictures of each sampler that are kept for the report


@dataclass(frozen=True)
class Comparison:
    """The result: `record` is JSON-ready; strips has the first pictures of each sampler.

    record: facts once, and "rows", one for each sampler and budget
    strips: names of rows ("" is the exact solution) and pictures uint8 [k, h, w, c]
    """

    record: dict[str, Any]
    strips: dict[str, np.ndarray]


def compare(
    workbench: Workbench,
    design: Design,
    judges: Sequence[Judge],
    *,
    command: str = "",
    do: Do | None = None,
) -> Comparison:
    """Screen, run and measure.

    A budget that a solver cannot spend is left out, and the record says why.

    Args:
        do: has what will be needed done by workers, see `prepare`; without it this process does it

    Raises:
        ValueError: before any work, where no solver can spend any budget, choose_by names no judge,
            a solver is not known, or there are too few seeds for a distance.
    """
    by_label = {judge.label: judge for judge in judges}
    if how := workbench.model.card.distilled:
        raise ValueError(
            f"{workbench.model.card.name} is a student of {how.teacher}, which it is held to; "
            f"name it beside solvers: fewstep compare {how.teacher} --solvers dpmpp-2m,FOLDER"
        )
    if design.choose_by != "error" and design.choose_by not in by_label:
        raise ValueError(
            f"choose_by must be error or one of {', '.join(by_label) or 'no feature networks'}, "
            f"got {design.choose_by!r}"
        )
    if judges and min(len(design.seeds), design.population) < 2:
        raise ValueError("a distance needs at least 2 seeds and a population of 2, got 1")
    candidates, left_out = all_candidates(workbench, design)
    if do is not None:
        prepare(workbench, design, by_label, candidates, do)
    populations = {judge.label: workbench.population(judge, design) for judge in judges}
    exact = {
        judge.label: workbench.features(judge, *workbench.exact(design.seeds)) for judge in judges
    }
    digests: list[str] = []
    rows, ran, strips = [], [], {"": workbench.exact(design.seeds[:CHUNK])[0][:SHOWN]}
    for (nfe, solver), settings in candidates.items():
        own = workbench.of(solver)
        chosen, how_chosen = screened(own, design, by_label, settings)
        run = own.run(chosen, design.seeds)
        row = make_row(own, solver, chosen, run, design)
        row["screened"] = how_chosen
        for judge in judges:
            features = workbench.features(judge, run.images, run.digest)
            row["fd"][judge.label] = paired_frechet(
                features, exact[judge.label], populations[judge.label], design.resamples
            )
            if judge.data is not None:
                ours = Statistics.of(features, extractor=judge.name)
                row["fd_data"][judge.label] = ours.frechet(judge.data)
        rows.append(row)
        digests.append(run.digest)
        ran.append((own, chosen))
        strips[f"{solver}@{nfe}"] = run.images[:SHOWN]
    for row, spent in zip(rows, times(ran, design.seeds[: workbench.batch]), strict=True):
        row["seconds"] = spent
    for judge in judges:
        agreements(rows, [workbench.features_at(judge, digest) for digest in digests], judge.label)
    floor = {}
    for judge in judges:
        ours = Statistics.of(exact[judge.label], extractor=judge.name)
        floor[judge.label] = {"fd": ours.frechet(populations[judge.label])}
        if judge.data is not None:
            floor[judge.label]["fd_data"] = ours.frechet(judge.data)
    source = {
        "command": command,
        "made": time.strftime("%Y-%m-%d"),
        "dtype": str(workbench.model.dtype).removeprefix("torch."),
        "machine": machine(),
    }
    record = {**protocol(workbench, design, judges), "sources": [source], "floor": floor}
    own_error = workbench.references.error(design.seeds[:CHECKED])
    record["references"]["own_error"] = own_error
    record |= {"left_out": left_out, "rows": rows}
    return Comparison(json.loads(json.dumps(record)), strips)


def compare_beside(
    workbench: Workbench,
    design: Design,
    judges: Sequence[Judge],
    earlier: dict[str, Any] | None = None,
    *,
    command: str = "",
    note: Callable[[str], None] = lambda text: None,
    do: Do | None = None,
) -> Comparison:
    """`compare`, with the rows of an earlier comparison.

    Args:
        workbench, design, judges, command, do: as of `compare`
        earlier: a record of the same protocol
        note: called with what takes long, before it begins

    Raises:
        ValueError: as of `compare`, and where the protocols differ: before any work.
    """
    if earlier is not None:
        check_protocol(protocol(workbench, design, judges), earlier)
    if forecast := workbench.forecast(design, judges):
        note(forecast)
    result = compare(workbench, design, judges, command=command, do=do)
    if earlier is None:
        return result
    return Comparison(merge(result.record, earlier), result.strips)


def load_students(
    model: Model,
    solvers: Sequence[str],
    base: str = "",
    preset: str | None = None,
    guidance: float | None = None,
    **options: Any,
) -> dict[str, Model]:
    """Those of the solvers that are models or adapters, by the name given: students of this one. So
    is a learned solver whose network is one that ships, or is named beside it.

    A published latent consistency model does not say what it came from. It is taken where it makes
    the same states by the same class of network.

    Args:
        base: name or path of the model, to which adapters are added
        preset: lcm: adapters that say nothing of themselves are an LCM-LoRA
        guidance: that of the comparison, which such adapters are held to have built in
        options: of `load`

    Raises:
        ValueError: for a model that was not distilled from this one, weights and all.
    """
    students: dict[str, Model] = {}
    for name in solvers:
        if is_model(name):
            student, card = None, read_card(name)
        else:
            student = _published(name, base, preset, guidance, options)
            if student is None:
                continue  # a solver
            card = student.card
        how = card.distilled
        if how is None or how.teacher_weights not in ("", model.card.weights_sha256):
            what = f"distilled from {how.teacher}" if how else "no student"
            raise ValueError(
                f"{name} is {what}, so it has no place beside samplers of {model.card.name} "
                f"({model.card.weights_sha256[:8]}); compare it on the weights that it came from"
                + ("" if how or is_model(name) else "; adapters called LCM-LoRA need --preset lcm")
            )
        student = student or load(name, **options)
        classes = [one.card.network.get("class") for one in (student, model)]
        if not how.teacher_weights and (student.shape != model.shape or classes[0] != classes[1]):
            raise ValueError(
                f"{name} makes states {list(student.shape)} by {classes[0]}, and "
                f"{model.card.name} {list(model.shape)} by {classes[1]}; give a student of this one"
            )
        students[name] = student
    known = {one.card.weights_sha256: one for one in students.values()}
    for name in solvers:
        if name in students or model.card.shipped(name) or not is_folder(name):
            continue
        network, teacher = trained_on(Path(name))
        if teacher != model.card.weights_sha256:
            continue
        for other in students_of(model.card):
            if network not in known and read_card(other).weights_sha256 == network:
                known[network] = load(other, **options)
        if network not in known:
            raise ValueError(
                f"{name} was trained on a student of {model.card.name} that does not come with "
                "fewstep; name its folder beside it: --solvers STUDENT,SOLVER"
            )
        students[name] = known[network]
    return students


def _published(
    name: str, base: str, preset: str | None, guidance: float | None, options: dict[str, Any]
) -> Any:
    """A pipeline without a card, or the base with adapters; None where the name is of neither."""
    path = Path(name)
    if (path / INDEX_FILE).is_file():
        return load(name, **options)
    if not (path / DIFFUSERS).is_file() and not (path.suffix == SAFE and path.is_file()):
        return None
    student: Any = load(base, loras=[(name, 1.0)], **options)
    if student.card.distilled is None and preset == LCM:
        card = as_lcm(student.card, student.process.schedule)
        assert card.distilled is not None
        known = replace(card.distilled, guidance=guidance)
        student = replace(student, card=replace(card, name=as_slug(path.stem), distilled=known))
    return student
