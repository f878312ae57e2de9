"""A solver's training on a loaded model: its conditions, its first step, its cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fewstep.cache import cache_folder
from fewstep.learned.kinds import kind_of
from fewstep.learned.prompts import prompted
from fewstep.learned.settings import Settings
from fewstep.learned.solver import LearnedSolver
from fewstep.learned.training import known_of, train
from fewstep.learned.validation import Conditions, Imitated
from fewstep.loop import starts_at
from fewstep.models import Model
from fewstep.models.labels import by_seed
from fewstep.models.students import own_levels, phased

__all__ = ["train_on_model"]

# a student's sampler in place of the solvers that improve on an ODE's; AMED has none
CHORD = "consistency-ode"  # all that students in segments have
BASES = {"tuned": "consistency-kappa", "amed-plugin": CHORD}
INNER = 30  # points that a student's teacher adds between its few levels, in all, for AMED


def train_on_model(
    model: Model,
    *,
    label: str | None = None,
    texts: Sequence[str] = (),
    digest: str = "",
    negative: str | None = None,
    guidance: float | None = None,
    loss: str = "pixels",
    teacher_model: Model | None = None,
    **given: Any,
) -> LearnedSolver:
    """Train a solver for one model and one budget, see `fewstep.learned.train`.

    Args:
        model: what is sampled
        label: class name or index; several, with commas, take turns among the seeds; all: draw one
        texts: each picture draws one; every tenth is for validation alone
        digest: of the file that the texts are from, for the record
        negative, guidance: as in `model.denoiser`
        loss: where ends are compared: pixels, or the name of a feature network
        teacher_model: of a student, which it imitates; see `fewstep.models.teacher_of`
        given: the other arguments of `train`

    Raises:
        ValueError: for what cannot be trained, before any work.
    """
    model = phased(model, Settings.of(given).nfe)
    place = model.prior([0]).device
    network = None
    if loss != "pixels":
        from fewstep.networks.features import Clamped, load_feature_network

        network = Clamped(load_feature_network(loss, str(place)))
    about = {
        "name": model.card.name,
        "weights": model.card.weights_sha256,
        "dtype": str(model.dtype).removeprefix("torch."),
        "label": label,
        "prompt": texts[0] if texts and not digest else None,
        "guidance": guidance,
        **({"prompts": digest} if digest else {}),
        **({} if negative is None else {"negative": negative}),
        **known_of(model),
    }

    def bind(one: Model, scale: float | None) -> Conditions:
        if texts:
            return prompted(one, texts, negative=negative, guidance=scale)
        return by_seed(one, label, None, scale)

    conditions, imitated = bind(model, guidance), None
    bound = conditions([0])
    if model.card.distilled is not None:
        if teacher_model is None:
            raise ValueError(f"{model.card.name} is a student; name its teacher too")
        imitated = _imitated(
            model, bind(teacher_model, _guidance(model, label, texts, guidance)), given
        )
        about["teacher"] = {
            "name": teacher_model.card.name,
            "weights": teacher_model.card.weights_sha256,
            **known_of(teacher_model),
        }
    afs, grid = given.pop("afs", None), given.get("grid")
    if afs is None and imitated is None and given.get("method", "tuned") in ("tuned", "grid"):
        # the mean, where it is known and holds
        top = grid is None or isinstance(grid, str) or starts_at(grid[0], model.card.sigma_max)
        afs = "mean" if top and getattr(bound, "far_mean", None) is not None else "none"
    return train(
        bound,
        model.shape,
        conditions=conditions,
        prior=model.prior,
        imitated=imitated,
        device=place,
        model=about,
        loss_features=network,
        cache=cache_folder() if about["weights"] else None,
        afs=afs,
        **given,
    )


def _imitated(student: Model, teacher: Conditions, given: dict[str, Any]) -> Imitated:
    """What a student's solver imitates. Fills in, where nothing is given, what goes with students:
    their sampler for a base, and their levels."""
    settings = Settings.of(given)
    method = settings.method
    kind = kind_of(method)
    if settings.base is None and method in BASES:
        given["base"] = CHORD if student.card.in_segments else BASES[method]
    if method not in ("tuned", "grid") and settings.inner is None:
        given["inner"] = INNER // max(1, settings.nfe // 2)
    levels = own_levels(student.card, settings.nfe)
    if settings.grid is None and method != "grid":
        free = method == "tuned"
        end = "zero" if free else None
        recipe = kind.recipe(given.get("base"), settings.nfe, settings.afs, end, False)
        grid = own_levels(student.card, recipe.intervals)
        given["grid"] = grid if free else (*grid[:-1], student.card.sigma_min)
    return Imitated(teacher, tuple(levels))


def _guidance(
    student: Model, label: str | None, texts: Sequence[str], guidance: float | None
) -> float | None:
    """The scale of the teacher: the student's, which may have it built in."""
    built_in = student.card.built_in_guidance
    return built_in if guidance is None and (label is not None or texts) else guidance
