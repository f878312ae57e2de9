"""Screened settings in a card."""

from __future__ import annotations

import json

from fewstep.models import BUILTIN
from studies.ship_settings import card_text


def test_the_shipped_card_is_written_with_a_line_for_each_setting() -> None:
    text = (BUILTIN / "fashion-mnist" / "card.json").read_text(encoding="utf-8")
    card = json.loads(text)
    assert card_text(card, card["screened"]) == text
    assert sum(map(len, card["screened"].values())) == text.count('{"solver": ')
