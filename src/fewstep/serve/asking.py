"""From the body of a request to what the library is asked."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request

from fewstep.data.images import fit_picture
from fewstep.models import Model
from fewstep.sampling.settings import Settings
from fewstep.serve.errors import ApiError
from fewstep.serve.order import mixed
from fewstep.serve.pictures import read_mask, read_upload
from fewstep.serve.schema import STRENGTHS, Edit, Generation, How, Preview, Refinement, Variation
from fewstep.serve.service import Asked, Service, noise_of
from fewstep.serve.store import Made
from fewstep.solver import get
from fewstep.text import clean

__all__ = ["edited", "generated", "invalid", "previewed", "read_form", "refined", "varied"]

PREVIEW_NFE = 2
AS_TEXT = {  # of a form; what else stands there may be a number
    *("prompt", "negative_prompt", "model", "size", "solver", "label"),
    *("user", "safety_identifier", "quality"),
}


def invalid(error: ValidationError | Any) -> ApiError:
    """What a client is told of a body that is not as it must be."""
    first = error.errors()[0]
    where = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is not JSON", code="invalid_json")
    if first["type"] == "extra_forbidden":
        name = clean(".".join(where), 80)
        return ApiError(400, f"unknown parameter: {name!r}", param=name, code="unknown_parameter")
    name = where[0] if where else None
    message = f"{name}: {first['msg']}" if name else first["msg"]
    return ApiError(422, message, param=name, code="invalid_type")


def generated(service: Service, body: Generation, owner: str) -> Asked:
    """Raises ApiError."""
    name, model = service.model(body.model)
    given = _conditions(service, model, body.prompt, body.label)
    given |= _further(service, model, body, body.negative_prompt, body.size)
    _check_count(service, body.n)
    partial = None if body.progress else body.partial_images if body.stream else 0
    return Asked(
        name,
        given,
        _settings(service, model, body.solver, _budget(body)),
        noise_of(body.seed, body.n),
        owner,
        partial=partial if body.stream else 0,
        **_output(body),
    )


def previewed(service: Service, body: Preview, owner: str) -> Asked:
    """n pictures of a prompt, or of each of several, with seeds of their own. Raises ApiError."""
    name, model = service.model(body.model)
    prompts = [body.prompt] if body.prompts is None else body.prompts
    if body.prompts is not None and (body.prompt or body.label is not None):
        raise ApiError(400, "prompts has the texts; leave out prompt and label", param="prompts")
    total = body.n * len(prompts)
    _check_count(service, total)
    each = [_conditions(service, model, text, body.label) for text in prompts]
    given: dict[str, Any] = {}
    for key, first in each[0].items():
        alike = all(one[key] == first for one in each)
        given[key] = first if alike else [one[key] for one in each for _ in range(body.n)]
    given |= _further(service, model, body, body.negative_prompt, body.size)
    nfe = _budget(body) or PREVIEW_NFE
    return Asked(
        name,
        given,
        _settings(service, model, body.solver, nfe),
        noise_of(body.seed, total),
        owner,
        partial=None if body.progress and body.stream else 0,
        **_output(body),
    )


def edited(
    service: Service, body: Edit, images: list[bytes], mask: bytes | None, owner: str
) -> Asked:
    """From a picture, or within its mask. Raises ApiError."""
    if len(images) != 1:
        raise ApiError(400, f"image must be one picture, got {len(images)}", param="image")
    asked = generated(service, body, owner)
    model = service.models[asked.model]
    size, picture = asked.given["size"], getattr(model, "picture", None)
    if picture is None or not hasattr(model, "start"):
        raise ApiError(400, f"{asked.model} cannot start from a picture", param="image")
    height, width = size or picture[:2]
    most = service.limits.upload_pixels
    try:
        image = fit_picture(read_upload(images[0], most), height, width, picture[2])
        region = None if mask is None else read_mask(mask, height, width, most)
    except ValueError as error:
        raise ApiError(400, str(error), param="image", code="invalid_image") from None
    strength = body.strength
    if strength is None:
        strength = 0.8 if region is None else 1.0
    given = {**asked.given, "strength": strength}
    return replace(asked, given=given, image=image, mask=region)


def refined(service: Service, body: Refinement, made: Made) -> Asked:
    """The same picture with more evaluations. Raises ApiError."""
    _, model = service.model(made.model)
    before = int(made.about["nfe"])
    nfe = body.nfe or min(max(2 * before, 8), service.limits.most_evaluations)
    settings = _settings(service, model, body.solver, nfe)
    return _again(made, body, settings, (made.noise,))


def varied(service: Service, body: Variation, made: Made) -> Asked:
    """Pictures from nearby noise. Raises ApiError."""
    _, model = service.model(made.model)
    _check_count(service, body.n)
    strength = body.strength
    share = STRENGTHS[strength] if isinstance(strength, str) else strength
    new = noise_of(body.seed, body.n)
    try:
        noise = tuple(mixed(made.noise, mix[0][0], share) for mix in new)
    except ValueError as error:
        raise ApiError(400, str(error), param="seed", code="invalid_value") from None
    nfe = body.nfe or int(made.about["nfe"])
    if body.solver is None:
        settings = replace(made.settings, nfe=nfe)
        _check_budget(service, nfe)
    else:
        settings = _settings(service, model, body.solver, nfe)
    return _again(made, body, settings, noise)


def _again(made: Made, body: Refinement | Variation, settings: Settings, noise: Any) -> Asked:
    return Asked(
        made.model,
        made.given,
        settings,
        noise,
        made.owner,
        partial=None if body.progress and body.stream else 0,
        image=made.image,
        mask=made.mask,
        **_output(body),
    )


async def read_form(request: Request, most: int) -> tuple[Edit, list[bytes], bytes | None]:
    """The fields, the pictures and the mask of a form. Raises ApiError."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ApiError(400, "edits take multipart/form-data", code="invalid_form")
    try:
        form = await request.form(max_files=4, max_fields=40, max_part_size=64_000)
    except ApiError:
        raise
    except Exception:  # parsers raise their own kinds
        raise ApiError(400, "the form cannot be read", code="invalid_form") from None
    async with form_closed(form):
        images: list[bytes] = []
        mask, fields = None, {}
        for name, value in form.multi_items():
            if name in ("image", "image[]", "mask"):
                data = await value.read(most) if isinstance(value, UploadFile) else None
                if data is None:
                    raise ApiError(422, f"{name} must be a file", param=name, code="invalid_type")
                if name == "mask":
                    mask = data
                else:
                    images.append(data)
            elif isinstance(value, UploadFile):
                raise ApiError(422, f"{name} must be no file", param=clean(name, 80))
            else:
                name = name.removesuffix("[]")
                fields[name] = value if name in AS_TEXT else _value(value)
    if not images:
        raise ApiError(400, "give a picture: image", param="image", code="missing_image")
    try:
        return Edit.model_validate(fields), images, mask
    except ValidationError as error:
        raise invalid(error) from None


class form_closed:
    """Closes the files of a form."""

    def __init__(self, form: FormData) -> None:
        self.form = form

    async def __aenter__(self) -> None: ...

    async def __aexit__(self, *_: object) -> None:
        await self.form.close()


def _value(text: str) -> Any:
    """Numbers, booleans and lists of a form, which stand as text."""
    try:
        return json.loads(text) if len(text) <= 100_000 else text
    except (ValueError, RecursionError):
        return text


def _conditions(service: Service, model: Model, prompt: str, label: Any) -> dict[str, Any]:
    """Label and prompt: of a model with classes, a prompt that names a class means that class."""
    if len(prompt.encode("utf-8", "replace")) > service.limits.prompt_bytes:
        most = service.limits.prompt_bytes
        raise ApiError(400, f"prompt must have at most {most} bytes", param="prompt")
    classes = model.card.classes
    if not classes:
        return {"label": label, "prompt": prompt.strip() or None}
    if label is not None or not prompt.strip():
        return {"label": label, "prompt": None}
    found = class_in(prompt, classes)
    if found is None:
        raise ApiError(
            400,
            f"prompt must name a class of {model.card.name}: {', '.join(classes)}",
            param="prompt",
            code="unknown_class",
        )
    return {"label": found, "prompt": None}


def class_in(prompt: str, classes: tuple[str, ...]) -> str | None:
    """The class that a text names first; a plural in -s or -es counts."""
    text, found = prompt.casefold(), []
    for name in classes:
        pattern = rf"(?<!\w){re.escape(name.casefold())}(s|es)?(?!\w)"
        if match := re.search(pattern, text):
            found.append((match.start(), -len(name), name))
    return min(found)[2] if found else None


def _further(
    service: Service, model: Model, body: How, negative: str | None, size: str | None
) -> dict[str, Any]:
    if negative is not None and len(negative.encode("utf-8", "replace")) > (
        most := service.limits.prompt_bytes
    ):
        raise ApiError(
            400, f"negative_prompt must have at most {most} bytes", param="negative_prompt"
        )
    return {
        "negative": negative or None,
        "guidance": body.guidance_scale,
        "size": _size(service, model, size),
    }


def _size(service: Service, model: Model, size: str | None) -> tuple[int, int] | None:
    """(height, width) where it is not the model's own."""
    if size in (None, "auto"):
        return None
    width, height = (int(side) for side in size.split("x"))
    picture = getattr(model, "picture", None)
    if picture is not None and (height, width) == tuple(picture[:2]):
        return None
    if not hasattr(model, "with_size"):
        own = f"{picture[1]}x{picture[0]}" if picture else "none"
        raise ApiError(400, f"size must be {own} or auto, got {size}", param="size")
    if height * width > service.limits.pixels:
        raise ApiError(
            400, f"size must have at most {service.limits.pixels} pixels, got {size}", param="size"
        )
    return height, width


def _budget(body: How) -> int | None:
    nfe, steps = body.nfe, body.num_inference_steps
    if nfe is not None and steps is not None and nfe != steps:
        raise ApiError(400, "nfe and num_inference_steps are one; leave one out", param="nfe")
    return steps if nfe is None else nfe


def _settings(service: Service, model: Model, solver: str, nfe: int | None) -> Settings:
    """A solver by name: a registered one, or one that comes with the model; never a folder."""
    if nfe is not None:
        _check_budget(service, nfe)
    if solver == "auto" or model.card.shipped(solver):
        return Settings(solver, nfe)
    try:
        return Settings(get(solver), nfe)
    except ValueError as error:
        raise ApiError(400, str(error), param="solver", code="unknown_solver") from None


def _check_budget(service: Service, nfe: int) -> None:
    most = service.limits.most_evaluations
    if nfe > most:
        raise ApiError(400, f"nfe must be at most {most}, got {nfe}", param="nfe")


def _check_count(service: Service, count: int) -> None:
    most = service.limits.most_images
    if count > most:
        raise ApiError(400, f"at most {most} pictures in a request, got {count}", param="n")


def _output(body: Any) -> dict[str, Any]:
    return {
        "kind": body.output_format,
        "compression": body.output_compression,
        "link": body.response_format == "url",
    }
