"""Distillation of a network into one that samples in 1 to 8 evaluations: SPLAM, and LCM.

student = fewstep.splam.distill(fewstep.load("fashion-mnist"), "data", out="student")
samples = fewstep.sample(student, nfe=2, seeds=range(16))
"""

from __future__ import annotations

from fewstep.splam.data import Data, Pictures
from fewstep.splam.recipe import Recipe
from fewstep.splam.students import student_levels
from fewstep.splam.training import distill

__all__ = ["Data", "Pictures", "Recipe", "distill", "student_levels"]
