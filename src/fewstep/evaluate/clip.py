"""The CLIP score of pictures against captions: 100 max(cos(picture, caption), 0), the mean.

Source: Hessel et al. 2021, arXiv:2104.08718.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fewstep.data.bounds import read_bytes
from fewstep.evaluate.features import quiet
from fewstep.extras import needs
from fewstep.networks.device import check_device
from fewstep.text import clean

__all__ = ["ClipScorer", "load_clip"]


@dataclass(frozen=True, eq=False)
class ClipScorer:
    """100 max(cos(picture, caption), 0) for each picture and its caption.

    name: the model's folder or id
    most_tokens: captions are cut there
    """

    name: str
    model: Any
    processor: Any
    device: torch.device
    most_tokens: int

    @torch.inference_mode()
    def __call__(self, images: np.ndarray, captions: Sequence[str]) -> np.ndarray:
        """Scores float64 [n] of uint8 [n, h, w, c] and n captions."""
        if len(images) != len(captions):
            raise ValueError(
                f"each picture needs a caption, got {len(captions)} captions for {len(images)}"
            )
        rgb = [image.repeat(3, axis=2) if image.shape[2] == 1 else image for image in images]
        inputs = self.processor(
            images=[Image.fromarray(image) for image in rgb],
            text=list(captions),
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=self.most_tokens,
        ).to(self.device)
        out = self.model(**inputs)
        picture, text = (
            torch.nn.functional.normalize(embeds.double(), dim=-1)
            for embeds in (out.image_embeds, out.text_embeds)
        )
        scores = 100 * (picture * text).sum(dim=-1).clamp(min=0)
        if not math.isfinite(float(scores.sum())):
            raise ValueError(f"{self.name} gave NaN or infinity; is its folder whole?")
        return scores.cpu().numpy()


def load_clip(name: Path | str, device: str | torch.device = "cpu") -> ClipScorer:
    """A CLIP model with its processor, from a folder or by its id on the Hugging Face hub.

    Weights are read from safetensors only, and no code of the model's is ever run.

    Raises:
        ValueError: transformers or the model are missing, or the model wants code of its own.
    """
    place = check_device(device)
    _refuse_code(Path(name))
    with needs("evaluate", "the CLIP score"):
        from transformers import CLIPModel, CLIPProcessor
    try:
        with quiet():
            model: Any = CLIPModel.from_pretrained(
                str(name), use_safetensors=True, trust_remote_code=False
            )
            processor = CLIPProcessor.from_pretrained(str(name), trust_remote_code=False)
    except Exception as error:  # transformers raises a dozen kinds on files that do not fit
        raise ValueError(
            f"{name} is not a CLIP model that can be read ({_first_line(error)}); give the "
            "folder of one with config, safetensors, tokenizer and preprocessor_config"
        ) from None
    most = int(model.config.text_config.max_position_embeddings)
    return ClipScorer(str(name), model.to(place).eval(), processor, place, most)


def _refuse_code(folder: Path) -> None:
    """Raises ValueError where a configuration in the folder names Python of its own to be run."""
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        if path.name.endswith("config.json") and b"auto_map" in read_bytes(path):
            raise ValueError(
                f"{clean(path)} has an auto_map: the model wants to run Python of its own, which "
                "fewstep never does; take a model of transformers' own classes"
            )


def _first_line(error: Exception) -> str:
    return clean((str(error).strip().splitlines() or [type(error).__name__])[0])[:200]
