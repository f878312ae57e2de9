"""What a caller of `FewstepPipeline` gives in place of a prompt, and pictures to start from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.loop import starts_at
from fewstep.models.families import Condition
from fewstep.models.pipeline import PipelineModel
from fewstep.plan import Program
from fewstep.sampling.generate import load_images

__all__ = ["Embedded", "clean_states", "check_start"]

POOLED = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")


@dataclass(frozen=True)
class Embedded:
    """Texts that are encoded already, and how many layers of CLIP the others skip; as diffusers
    names them."""

    prompt_embeds: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    pooled_prompt_embeds: Tensor | None = None
    negative_pooled_prompt_embeds: Tensor | None = None
    clip_skip: int | None = None

    def given(self) -> dict[str, Any]:
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        values["clip_skip"] = values["clip_skip"] or None  # none is skipped at 0
        return {name: value for name, value in values.items() if value is not None}

    def check(self, model: PipelineModel, prompt: Any, negative: Any) -> None:
        """Raise ValueError for what does not go together."""
        given, pools = self.given(), model.family.pooled
        if (prompt is None) == (self.prompt_embeds is None):
            raise ValueError("give prompt or prompt_embeds, one of the two")
        if negative is not None and self.negative_prompt_embeds is not None:
            raise ValueError("give negative_prompt or negative_prompt_embeds, one of the two")
        for name in POOLED:
            if name in given and not pools:
                raise ValueError(f"{name} is of pipelines with two text encoders; leave it out")
            plain = name.replace("pooled_", "")
            if pools and (name in given) != (plain in given):
                raise ValueError(f"this pipeline needs {plain} and {name}; give both or neither")
        skip = self.clip_skip
        if skip is not None and (type(skip) is not int or skip < 0):
            raise ValueError(f"clip_skip must be a number of layers, at least 0, got {skip!r}")
        for name, value in given.items():
            if name == "clip_skip":
                continue
            dims = 2 if name in POOLED else 3
            if not isinstance(value, Tensor) or value.ndim != dims or not len(value):
                raise ValueError(f"{name} must be a tensor of {dims} dimensions, got {value!r:.80}")
            like = getattr(self, name.replace("negative_", ""))
            if like is not None and value.shape != like.shape:
                raise ValueError(
                    f"{name} must have the shape of {name.replace('negative_', '')}, "
                    f"{list(like.shape)}, got {list(value.shape)}"
                )

    def conditions(
        self,
        model: PipelineModel,
        prompt: list[str] | None,
        negative: Any,
        copies: int,
        guided: bool,
        sizes: dict[str, tuple[int, int]],
    ) -> tuple[Condition, Condition | None]:
        """The network's conditions by the pipeline's own `encode_prompt`: with and without text.

        Args:
            copies: pictures of each prompt
            guided: whether there is a second one
            sizes: of SDXL: original_size, crops_coords_top_left, target_size
        """
        pipe, family, given = model.pipe, model.family, self.given()
        assert family.conditioned is not None  # what takes a prompt has it
        if not family.pooled and (skip := given.pop("clip_skip", None)):
            # its encode_prompt looks for a part of the encoder that transformers 5 has moved
            if prompt is not None:
                prompt, given["prompt_embeds"] = None, _skipping(pipe, prompt, skip)
            if guided and "negative_prompt_embeds" not in given:
                texts = [negative or ""] if isinstance(negative, str | None) else list(negative)
                rows = _skipping(pipe, texts, skip)
                count = len(given["prompt_embeds"])
                given["negative_prompt_embeds"] = rows.expand(count, -1, -1)
                negative = None
        found = pipe.encode_prompt(
            prompt=prompt,
            **dict.fromkeys(family.more_prompts),
            device=model.device,
            num_images_per_prompt=copies,
            do_classifier_free_guidance=guided,
            negative_prompt=negative if guided else None,
            **given,
        )
        text, empty, *summaries = found
        summary, plain = summaries or (None, None)
        cond = family.conditioned(pipe, text, summary, sizes)
        return cond, family.conditioned(pipe, empty, plain, sizes) if guided else None


def _skipping(pipe: Any, texts: list[str], skip: int) -> Tensor:
    """What the text encoder of Stable Diffusion says without its last layers."""
    texts, encoder = pipe.maybe_convert_prompt(texts, pipe.tokenizer), pipe.text_encoder
    fitted = {"padding": "max_length", "max_length": pipe.tokenizer.model_max_length}
    read = pipe.tokenizer(texts, **fitted, truncation=True, return_tensors="pt").to(pipe.device)
    mask = read.attention_mask if getattr(encoder.config, "use_attention_mask", False) else None
    states = encoder(read.input_ids, mask, output_hidden_states=True).hidden_states
    if skip >= len(states):
        raise ValueError(f"clip_skip must be below {len(states)} for this encoder, got {skip}")
    return getattr(encoder, "text_model", encoder).final_layer_norm(states[-1 - skip])


def check_start(model: PipelineModel, program: Program, image: Any, strength: float | None) -> None:
    """Raise ValueError where the solver's grid begins elsewhere than sampling would: at sigma_max
    from noise, at the level of `strength` from a picture."""
    first, top = program.sigmas[0], model.process.sigma_max
    if image is None:
        if strength is not None:
            raise ValueError("strength is of a picture; give image too, or leave it out")
        if not starts_at(first, top):
            raise ValueError(
                f"{program.name} starts at sigma {first:g}, and the pipeline at {top:g}; train a "
                "solver on this pipeline, or give the image to start from"
            )
        return
    schedule = model.schedule
    own = (schedule.t(first) - schedule.t_clean) / (schedule.t_max - schedule.t_clean)
    if strength is not None and not starts_at(first, model.level(strength)):
        raise ValueError(
            f"{program.name} has its own grid, which starts at the level of strength={own:.6g}, "
            f"got {strength}; leave strength out, or train a solver on a grid from sigma "
            f"{model.level(strength):g}"
        )


@torch.no_grad()
def clean_states(model: PipelineModel, image: Any, count: int) -> Tensor:
    """Clean states of pictures: a file, uint8 [h, w, c], a PIL picture, or one of these for each.

    Raises:
        ValueError: for what is neither, and for another number.
        OSError: there is no such file.
    """
    many: list[Any] = (
        list(image) if isinstance(image, Sequence) and not isinstance(image, str) else [image]
    )
    plain = [np.asarray(one.convert("RGB")) if hasattr(one, "convert") else one for one in many]
    pictures = np.concatenate([load_images(one, *model.picture) for one in plain])
    if len(pictures) not in (1, count):
        raise ValueError(f"image must be one, or one per picture, got {len(pictures)} for {count}")
    return model.encode(pictures)
