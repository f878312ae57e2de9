"""Records that come from files: JSON that is bounded, and types that check themselves.

A file may come from anywhere. `parse` and `read_json` refuse what no record needs: text that is
too long or too deep, a key that stands twice, NaN and infinity, control characters. `record` makes
a frozen dataclass whose fields are checked by pydantic; a fault is one line, a ValueError that
names the field, the rule and the value.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Callable
from dataclasses import field
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, TypeVar, dataclass_transform

import pydantic
from pydantic import AfterValidator, Field, Strict, StringConstraints

__all__ = [
    "Digest",
    "Int",
    "Levels",
    "Real",
    "Slug",
    "Text",
    "check_slug",
    "parse",
    "read_json",
    "record",
    "shown",
    "as_slug",
]

T = TypeVar("T")

LARGEST = 16 * 2**20  # bytes of a JSON file: a plan of 1,000 evaluations of depth 1,000
DEEPEST = 32  # levels of nesting
LONGEST = 4096  # characters of one line of text
BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
JOINERS = "\u200c\u200d"  # of Persian, Hindi and emoji
SLUG = r"^[^\W_][\w.+-]{0,127}$"
DIGEST = r"^[0-9A-Za-z]{0,64}$"
SLUG_RULE = "must be letters, digits and . _ + -, at most 128, a letter or digit first"


def shown(value: Any) -> str:
    """A value in a message: escaped, in one line, and not too long."""
    text = ascii(value) if isinstance(value, bytes) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def unprintable(text: str) -> str | None:
    """The first character that could act on a terminal or hide text; None where there is none."""
    for character in text:
        if character.isprintable() or character in "\n\t":
            if character not in BIDI:
                continue
        elif unicodedata.category(character) == "Zs" or character in JOINERS:
            continue
        return character
    return None


def as_slug(text: str) -> str:
    """A name made of any text: what is not a letter, digit or one of . _ + - becomes a dash."""
    kept = "".join(c if c.isalnum() or c in "._+-" else "-" for c in text)
    return kept.lstrip("._+-")[:128] or "unnamed"


def check_slug(name: str, value: Any) -> str:
    """The value.

    Raises:
        ValueError: it names the argument where it is not a slug.
    """
    try:
        return pydantic.TypeAdapter(Slug).validate_python(value)
    except pydantic.ValidationError:
        raise ValueError(f"{name} {SLUG_RULE}, got {shown(value)}") from None


def parse(text: str | bytes, what: str = "the text") -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: where it is not JSON, a key stands twice, a number is not finite, text has
            control characters, or it is longer or deeper than any record needs.
    """
    if len(text) > LARGEST:
        raise ValueError(f"{what} must have at most {LARGEST} bytes, got {len(text)}")
    try:
        plain = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(
            plain, object_pairs_hook=_once, parse_constant=_no_constant, parse_float=_finite
        )
    except RecursionError:
        raise ValueError(f"{what} is nested more than {DEEPEST} deep") from None
    except UnicodeDecodeError:
        raise ValueError(f"{what} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{what} is not JSON, or was cut short: {error}") from None
    _check_tree(value, what)
    return value


def read_json(path: Path | str, what: str = "a record") -> dict[str, Any]:
    """The object in a JSON file, as `parse` reads it.

    Raises:
        OSError: where it cannot be read.
        ValueError: that names the file.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            value = parse(file.read(LARGEST + 1), "it")
        if not isinstance(value, dict):
            raise ValueError(f"it must be a table, got {shown(value)}")
    except ValueError as error:
        raise ValueError(f"{path} is not {what}: {error}") from None
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shown(key)} stands twice")
        found[key] = value
    return found


def _no_constant(text: str) -> float:
    raise ValueError(f"numbers must be finite, got {text}")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"numbers must be finite, got {text}")
    return value


def _check_tree(value: Any, what: str) -> None:
    """Raise ValueError where a tree is too deep, or a text in it is not plain."""
    level: list[Any] = [value]
    for _ in range(DEEPEST + 1):
        inner: list[Any] = []
        for node in level:
            if isinstance(node, str) and (character := unprintable(node)) is not None:
                raise ValueError(f"{what} has the control character {character!a}")
            if isinstance(node, dict):
                inner += node.keys()
            if isinstance(node, dict | list):
                inner += node.values() if isinstance(node, dict) else node
        level = inner
        if not level:
            return
    raise ValueError(f"{what} is nested more than {DEEPEST} deep")


def _plain(text: str) -> str:
    if (character := unprintable(text)) is not None:
        raise ValueError(f"must have no control characters, got {character!a}")
    return text


def _falling(levels: tuple[float, ...]) -> tuple[float, ...]:
    for i, (current, following) in enumerate(pairwise(levels)):
        if not current > following:
            raise ValueError(f"must strictly decrease, got {current} and {following} at {i}")
    return levels


Int = Annotated[int, Strict()]
Real = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Text = Annotated[str, Strict(), StringConstraints(max_length=LONGEST), AfterValidator(_plain)]
Slug = Annotated[str, Strict(), StringConstraints(pattern=SLUG)]
Digest = Annotated[str, Strict(), StringConstraints(pattern=DIGEST)]
Levels = Annotated[
    tuple[Annotated[Real, Field(ge=0)], ...], Field(max_length=10_001), AfterValidator(_falling)
]

# pydantic's kinds of faults, in our words
RULES: dict[str, str] = {
    "string_type": "must be text",
    "int_type": "must be an integer",
    "int_from_float": "must be an integer",
    "float_type": "must be a finite number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "dict_type": "must be a table",
    "dataclass_type": "must be a table",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "path_type": "must be a path",
    "is_instance_of": "must be a {class}",
    "literal_error": "must be {expected}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be less than {lt}",
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be greater than {gt}",
    "string_too_long": "must have at most {max_length} characters",
    "too_long": "must have at most {max_length} entries",
    "too_short": "must have at least {min_length} entries",
}
PATTERNS = {
    SLUG: SLUG_RULE,
    DIGEST: "must be a hash, of at most 64 letters and digits",
}


def fault(error: pydantic.ValidationError) -> str:
    """The first fault that pydantic found, in one line."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"] if part != "[key]")
    kind, context = first["type"], first.get("ctx", {})
    if kind == "missing" or kind == "missing_argument":
        return f"it lacks {where}"
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"it has an unknown field {shown(where)}"
    if kind == "value_error":
        text = str(context["error"])
        return f"{where} {text}" if where and text.startswith("must ") else text
    if kind == "string_pattern_mismatch":
        rule = PATTERNS.get(context["pattern"], f"must be like {context['pattern']}")
    else:
        rule = RULES[kind].format(**context) if kind in RULES else first["msg"]
    return f"{where} {rule}, got {shown(first['input'])}"


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def record(cls: type[T]) -> type[T]:
    """A frozen dataclass whose fields are checked: unknown ones are refused, and a fault is a
    ValueError of one line. `dataclasses.replace` and `asdict` work as on any other."""
    config = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True)
    made: Any = pydantic.dataclasses.dataclass(frozen=True, config=config)(cls)
    plain: Callable[..., None] = made.__init__

    @wraps(plain)
    def init(self: Any, *args: Any, **values: Any) -> None:
        try:
            plain(self, *args, **values)
        except pydantic.ValidationError as error:
            raise ValueError(fault(error)) from None

    made.__init__ = init
    return made
