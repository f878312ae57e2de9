"""A model's card: what a folder holds beside its weights, in one JSON file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["CARD_FILE", "WEIGHTS_FILE", "Card"]

CARD_FILE, WEIGHTS_FILE = "card.json", "model.safetensors"
FORMAT = "fewstep-model/1"


@dataclass(frozen=True)
class Card:
    """Facts about a model, JSON-ready.

    network: the configuration of its `UNet`
    classes: their names, in order
    feature_module: dotted name of the module whose output feature taps read
    weights_sha256: hash of the weights file
    auto: for each budget (as a string) the best known solver, grid and first step
    about: recipe, data, licence and figures, for people
    """

    name: str
    network: dict[str, Any]
    summary: str = ""
    classes: tuple[str, ...] = ()
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    feature_module: str = "middle"
    weights_sha256: str = ""
    auto: dict[str, dict[str, Any]] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    format: str = FORMAT

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                f"need 0 < sigma_min < sigma_max, got {self.sigma_min}, {self.sigma_max}"
            )

    def to_dict(self) -> dict[str, Any]:
        return {"format": self.format, **asdict(self)}

    @classmethod
    def read(cls, folder: Path) -> Card:
        """The card of a model folder. Errors: ValueError where it is not one, or a newer one."""
        path = folder / CARD_FILE
        try:
            values = json.loads(path.read_text())
            if values["format"] != FORMAT:
                raise ValueError(
                    f"{path} has format {values['format']!r}, this version reads {FORMAT!r}; "
                    "update fewstep"
                )
            return cls(**values)
        except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a model card of fewstep: {error!r}") from None
