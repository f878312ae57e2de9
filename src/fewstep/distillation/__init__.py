"""Distillation of a network into one that samples in 1 to 8 evaluations: SPLAM, and LCM.

student = fewstep.distillation.distill(fewstep.load("fashion-mnist"), "data", out="student")
samples = fewstep.sample(student, nfe=2, seeds=range(16))
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fewstep._lazy import lazily

if TYPE_CHECKING:
    from fewstep.data.training import Data, Pictures
    from fewstep.distillation.recipe import Recipe
    from fewstep.distillation.students import student_levels
    from fewstep.distillation.training import distill

__all__ = ["Data", "Pictures", "Recipe", "distill", "student_levels"]

__getattr__ = lazily(
    __name__,
    {
        "fewstep.data.training": ("Data", "Pictures"),
        "fewstep.distillation.recipe": ("Recipe",),
        "fewstep.distillation.students": ("student_levels",),
        "fewstep.distillation.training": ("distill",),
    },
)
