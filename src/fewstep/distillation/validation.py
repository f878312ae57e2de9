"""What a training is validated by: networks and texts, read before any work, and its pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from fewstep.data.captions import read_captions
from fewstep.distillation.recipe import Recipe
from fewstep.distillation.students import Examination
from fewstep.distillation.subject import Subject
from fewstep.evaluate.agreement import judge_of
from fewstep.evaluate.agreement import prompts as own_prompts
from fewstep.evaluate.clip import load_clip
from fewstep.models import Model
from fewstep.models.card import Card
from fewstep.networks.features import load_feature_folder

__all__ = ["SHEETS", "examination", "examined", "read_judges"]

SHEETS = "validation"
PROMPTS_FROM = 1_000_000  # of a model's own prompts: those below are for final results


def read_judges(
    model: Model, features: Path | None, clip: Path | None, prompts: Path | None, count: int
) -> dict[str, Any]:
    """What validation goes by, read before any work. Raises: ValueError, OSError.

    A model that comes with a judge of prompt agreement has prompts of its own where none are given.
    """
    takes_text = getattr(getattr(model, "family", None), "encode", None) is not None
    given = {"validation_prompts": prompts, "clip_model": clip}
    if not takes_text and (named := [name for name, one in given.items() if one is not None]):
        raise ValueError(f"{model.card.name} takes no text; leave out {' and '.join(named)}")
    judge = judge_of(model.card.name) if takes_text and prompts is None and count else None
    asked = own_prompts(count, PROMPTS_FROM) if judge is not None else []
    return {
        "judge": judge,
        "asked": asked,
        "prompts": read_captions(prompts).texts if prompts else [one.text for one in asked],
        "features": None if features is None else load_feature_folder(features),
        "clip": None if clip is None else load_clip(clip),
    }


def examination(model: Model, recipe: Recipe, count: int, **judges: Any) -> Examination | None:
    """With the mean of the guidance scales and all classes in turn where there is guidance, or
    where the student never sees pictures without a class; else without a class."""
    if count == 0:
        return None
    low, high = recipe.scales
    classes = len(model.card.classes)
    labelled = classes and (high > 1 or recipe.dropout == 0)
    guided = (labelled or judges["prompts"]) and (low, high) != (1.0, 1.0)
    judges["prompts"] = judges["prompts"][:count]
    return Examination(
        model,
        count,
        labels=tuple(range(classes)) if labelled else (None,),
        guidance=(low + high) / 2 if guided else None,
        **judges,
    )


def examined(
    examine: Examination, known: Subject, card: Card, recipe: Recipe, folder: Path | None
) -> Callable[[nn.Module, int], dict[str, float]]:
    """Figures of a student, its pictures on a sheet in the folder."""

    def figures(net: nn.Module, step: int) -> dict[str, float]:
        sheet = None if folder is None else folder / SHEETS / f"{step:07d}.png"
        return examine(known.bind(net, card), "guidance" in recipe.told, sheet)

    return figures
