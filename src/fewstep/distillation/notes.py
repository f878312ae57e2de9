"""What lies beside a pipeline's student for people and for other programs: a preset, a model card.

preset.json    for each budget its levels and the network's own times, guidance and sampler
README.md      the model card, in Markdown
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from fewstep.files import write_json, write_whole
from fewstep.models.card import Card
from fewstep.models.students import a_budget, own_levels
from fewstep.schedule import Schedule
from fewstep.text import clean

__all__ = ["write_notes"]

PRESET, README = "preset.json", "README.md"


def write_notes(folder: Path, card: Card, schedule: Schedule, adapters: bool) -> None:
    """Write both into a student's folder, nothing of another card. Raises: OSError."""
    if card.distilled is None:
        return
    write_json(folder / PRESET, preset(card, schedule))
    write_whole(folder / README, model_card(card, adapters).encode())


def preset(card: Card, schedule: Schedule) -> dict[str, Any]:
    """How a student is sampled, JSON-ready."""
    known = card.distilled
    assert known is not None
    budgets = {}
    for nfe, choice in card.auto.items():
        levels = own_levels(card, int(nfe))
        times = [round(schedule.t(level), 4) for level in levels[:-1]]
        how = {"sampler": choice.solver, "sigmas": list(levels), "times": times}
        if choice.phases:  # in diffusers the input is told guidance_scale - 1
            how |= {"phases": choice.phases, "guidance_scale": 1 + math.log2(choice.phases)}
        budgets[nfe] = how
    told = isinstance(known.guidance, tuple)
    return {
        "budgets": budgets,
        "guidance": list(known.guidance) if told else 1.0,
        "built_in_guidance": card.built_in_guidance,
        "diffusers": {
            "scheduler": "LCMScheduler",
            "original_inference_steps": len(known.levels) - 1,
            "guidance_scale": None if told else 1.0,
        }
        if known.boundary == "discrete" and not card.in_segments
        else {"scheduler": "FewstepScheduler"},
    }


def model_card(card: Card, adapters: bool) -> str:
    """Markdown. What comes from elsewhere stands in code, where no markup counts."""
    known, about = card.distilled, card.about
    assert known is not None
    teacher, data = about.get("teacher") or {}, about.get("data") or {}
    recipe = about.get("recipe") or {}
    licence = teacher.get("licence", "that of the teacher's weights; look there")
    figures = about.get("validation") or {}
    use = f"fewstep sample {known.teacher} --lora ." if adapters else "fewstep sample ."
    rows = {
        "teacher": known.teacher,
        "SHA-256 of its weights": known.teacher_weights,
        "method": f"{known.method}, {known.teacher_step}",
        "guidance that is built in": card.built_in_guidance or "none",
        "told": ", ".join(card.told) or "the level alone",
        "trained": "adapters" if adapters else "the whole network",
        "data": f"{data.get('pictures')} samples, SHA-256 {data.get('sha256')}",
        "fewstep": about.get("fewstep"),
        "licence": licence,
    }
    lines = [f"# {code(card.name)}", ""]
    budgets = ", ".join(card.auto)
    lines += [f"A student of {code(known.teacher)}, by fewstep. Evaluations: {budgets}.", ""]
    some = a_budget(card)
    lines += ["```sh", f'{use} --prompt "..." --nfe {some}', "```", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {code(value)} |" for name, value in rows.items()]
    for title, values in (("Recipe", recipe), ("Last validation", figures)):
        if values:
            lines += ["", f"## {title}", "", "| | |", "|---|---|"]
            lines += [f"| {code(name)} | {code(value)} |" for name, value in values.items()]
    lines += ["", "What the data are, and whose, must be added by hand.", ""]
    return "\n".join(lines)


def code(value: Any) -> str:
    """A value as a code span, in one line and without what would end it."""
    text = clean(value, 200).replace("`", "'").replace("|", "/").replace("\n", " ").strip()
    return f"`{text or '-'}`"
