"""Trainings: of a network here; what every training needs."""
