"""Rows of a study's file: which of them are of the same sampler."""

from __future__ import annotations

from typing import Any

from fewstep.models import Card

__all__ = ["chosen", "same"]


def chosen(card: Card, nfe: int) -> dict[str, Any]:
    """How a student spends a budget where that was chosen after its training, as a field of a row;
    the weights say it of others."""
    if "levels" not in card.about or str(nfe) not in card.auto:
        return {}
    known = card.auto[str(nfe)].given()
    return {"chosen": {name: _plain(value) for name, value in known.items()}}


def same(row: dict[str, Any], known: dict[str, Any], fields: tuple[str, ...]) -> bool:
    """Whether a row has just what is known of a sampler in these fields, and lacks what that
    lacks."""
    return all(row.get(name) == known.get(name) for name in fields)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
