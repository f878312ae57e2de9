"""Bodies of requests. The fields of OpenAI's Images API keep their names; further ones are named as
other servers name them. What a field may be stands here, with its bounds."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

__all__ = ["SIZE", "STRENGTHS", "Edit", "Generation", "Preview", "Refinement", "Variation"]

MOST_SEED = 2**63 - 1
SIZE = r"^(auto|[0-9]{1,5}x[0-9]{1,5})$"
STRENGTHS = {"near": 0.15, "some": 0.35, "far": 0.6}  # of "more like this"

Seed = Annotated[int, Field(ge=0, le=MOST_SEED, strict=True)]
Prompt = Annotated[str, StringConstraints(max_length=32_000)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Solver = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9+_. =,:-]{0,99}$")]
Budget = Annotated[int, Field(ge=1, le=200, strict=True)]
Whole = Annotated[int, Field(strict=True)]
Format = Literal["png", "jpeg", "webp"]


class Body(BaseModel):
    """Unknown fields are refused: a field that is misspelt would be lost without a word."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Output(Body):
    """How pictures come back."""

    output_format: Format = "png"
    output_compression: Annotated[int, Field(ge=0, le=100, strict=True)] = 90
    response_format: Literal["b64_json", "url"] = "b64_json"
    stream: bool = False


class How(Output):
    """The sampler, and what every endpoint takes.

    nfe: network evaluations; num_inference_steps is another name of it
    """

    model: Name | None = None
    nfe: Budget | None = None
    num_inference_steps: Budget | None = None
    solver: Solver = "auto"
    guidance_scale: Annotated[float, Field(ge=0, le=100)] | None = None


class Generation(How):
    """POST /v1/images/generations."""

    prompt: Prompt = ""
    n: Annotated[int, Field(ge=1, le=1000, strict=True)] = 1
    size: Annotated[str, StringConstraints(pattern=SIZE)] | None = None
    partial_images: Annotated[int, Field(ge=0, le=3, strict=True)] = 0
    seed: Seed | Annotated[list[Seed], Field(min_length=1, max_length=1000)] | None = None
    negative_prompt: Prompt | None = None
    label: Annotated[str, StringConstraints(max_length=200)] | Whole | None = None
    progress: bool = Field(False, description="Also a partial image after every evaluation.")
    # taken and not used: there is one quality, and no background to be left out
    user: Annotated[str, StringConstraints(max_length=512)] | None = None
    safety_identifier: Annotated[str, StringConstraints(max_length=512)] | None = None
    quality: Annotated[str, StringConstraints(max_length=20)] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    style: Literal["natural", "vivid"] | None = None


class Edit(Generation):
    """POST /v1/images/edits, without the files.

    strength: how far to leave the picture; 0.8 without a mask, 1 with one
    """

    strength: Annotated[float, Field(gt=0, le=1)] | None = None
    input_fidelity: Literal["high", "low"] | None = None


class Preview(How):
    """POST /v1/previews."""

    prompt: Prompt = ""
    prompts: Annotated[list[Prompt], Field(min_length=1, max_length=100)] | None = None
    label: Annotated[str, StringConstraints(max_length=200)] | Whole | None = None
    n: Annotated[int, Field(ge=1, le=1000, strict=True)] = 4
    size: Annotated[str, StringConstraints(pattern=SIZE)] | None = None
    seed: Seed | Annotated[list[Seed], Field(min_length=1, max_length=1000)] | None = None
    negative_prompt: Prompt | None = None
    nfe: Annotated[int, Field(ge=1, le=4, strict=True)] | None = None
    num_inference_steps: Annotated[int, Field(ge=1, le=4, strict=True)] | None = None
    stream: bool = True
    progress: bool = True


class Refinement(Output):
    """POST /v1/images/{id}/refine."""

    nfe: Budget | None = None
    solver: Solver = "auto"
    progress: bool = False


class Variation(Output):
    """POST /v1/images/{id}/variations: pictures like this one."""

    n: Annotated[int, Field(ge=1, le=1000, strict=True)] = 4
    strength: Literal["near", "some", "far"] | Annotated[float, Field(gt=0, le=1, strict=True)] = (
        "some"
    )
    seed: Seed | Annotated[list[Seed], Field(min_length=1, max_length=1000)] | None = None
    nfe: Budget | None = None
    solver: Solver | None = None
    progress: bool = False
