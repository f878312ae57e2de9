"""Options of commands, read off the dataclasses of the settings that they fill.

    @command(app, "plan", Take(Settings, SOLVER, only=("nfe", "grid")))
    def plan(model: ModelArgument, **given): ...

The name, the type and the default of an option are the field's; its help is the field's line in the
class's docstring. Text becomes a value before the command runs.
"""

from __future__ import annotations

import functools
import inspect
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Group, Parameter
from docstring_parser import DocstringStyle, parse

from fewstep.cli.parsing import PARSERS, words

__all__ = [
    "CHOICE",
    "LEARNING",
    "MACHINE",
    "PICTURE",
    "SOLVER",
    "SPREAD",
    "TEXT",
    "Condition",
    "Machine",
    "ModelArgument",
    "Take",
    "command",
    "flag",
    "option",
]

# the headings of the help, in their order
SOLVER, TEXT, PICTURE = (
    Group(name, sort_key=place)
    for place, name in enumerate(("Solver", "Text and class", "From a picture"), start=2)
)
LEARNING, MACHINE = Group("Learning", sort_key=5), Group("Machine", sort_key=9)
CHOICE, SPREAD = Group("Choice of settings", sort_key=6), Group("Many machines", sort_key=8)

ModelArgument = Annotated[
    str,
    Parameter(
        help="A built-in model's name, a model folder, a network file of a paper, or a diffusers "
        "pipeline: its folder, one Stable Diffusion file, or OWNER/NAME on the hub."
    ),
]


def option(help: str, group: Group | None = None, least: float | None = None) -> Parameter:
    """An option that belongs to no settings; `least` is the lowest number that it takes."""

    def check(kind: Any, value: Any) -> None:
        if value is not None and least is not None and not value >= least:
            raise ValueError(f"must be at least {least}, got {value}")

    return Parameter(help=help, validator=check, **_under(group))


def _under(group: Group | None) -> dict[str, Any]:
    return {} if group is None else {"group": group}


def flag(help: str, name: str | None = None, off: str = "") -> Parameter:
    """An option without a value; `off` is the one that says the opposite."""
    return Parameter(name=name, help=help, negative=off, show_default=False)


@dataclass(frozen=True)
class Machine:
    """Where and how the network runs.

    Attributes:
        device: A torch device: cpu, cuda, cuda:1.
        dtype: The network's arithmetic: float32, bfloat16, float16.
        compile: Use torch.compile: faster for many pictures.
        batch: Pictures at a time. Default: 64, fewer of large ones.
        config: For a Stable Diffusion in one file: a diffusers folder of its class.
        slicing: Decode latents one picture at a time: less memory.
        tiling: Decode latents in tiles: less memory still.
    """

    device: str = "cpu"
    dtype: str = "float32"
    compile: bool = False
    batch: int | None = None
    config: Path | None = None
    slicing: bool = False
    tiling: bool = False


@dataclass(frozen=True)
class Condition:
    """What every picture shows.

    Attributes:
        label: Class name or index, for all pictures.
        prompt: Text, for models that take one.
        guidance: Scale of classifier-free guidance; needs a prompt or a label.
    """

    label: str | None = None
    prompt: str | None = None
    guidance: float | None = None


@dataclass(frozen=True)
class Take:
    """Fields of a settings dataclass that become options.

    Attributes:
        settings: the dataclass; its docstring has a line for each field, under "Attributes:"
        group: the heading in the help
        only: names of the fields; all where left out
        without: names of fields that are not options
        defaults: in place of the fields' own, as text where text is parsed
        helps: in place of the docstring's
        types: in place of the fields' own, where the command takes less
        names: of options that are called otherwise than their fields
        parsers: from text to value by field; those of `PARSERS` by the field's name, else words
    """

    settings: type
    group: Group | None = None
    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    helps: Mapping[str, str] = field(default_factory=dict)
    types: Mapping[str, Any] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    parsers: Mapping[str, Callable[[str], Any]] = field(default_factory=dict)

    def options(self) -> dict[str, tuple[inspect.Parameter, Callable[[str], Any] | None]]:
        """Parameter and parser of each option, by its name."""
        found = {one.name: one for one in fields(self.settings)}
        helps = {**_helps(self.settings), **self.helps}
        kinds = {**typing.get_type_hints(self.settings), **self.types}
        made = {}
        for name in self.only or [name for name in found if name not in self.without]:
            kind, default = kinds[name], found[name].default
            plain = all(a in PLAIN for a in typing.get_args(kind) or (kind,))
            called = self.names.get(name, name)
            parser = self.parsers.get(name)
            if parser is None and not plain:
                parser = PARSERS.get(name) or partial(words, what=called)
            if default is MISSING:
                default = inspect.Parameter.empty
            if isinstance(default, tuple):
                default = ",".join(map(str, default)) or None
            default = self.defaults.get(name, default)
            kind = str | None if parser else kind | None if default is None else kind
            yes_no = bool in (kind, *typing.get_args(kind))
            off = f"--{'no' if default is None else 'not'}-{name}" if default is not False else ""
            shown = Parameter(
                help=helps[name],
                **_under(self.group),
                negative=off if yes_no else None,
                show_default=default is not None and not isinstance(default, bool),
            )
            parameter = inspect.Parameter(
                called,
                inspect.Parameter.KEYWORD_ONLY,
                default=default,
                annotation=Annotated[kind, shown],
            )
            made[called] = (parameter, parser)
        return made

    def take(self, given: dict[str, Any]) -> dict[str, Any]:
        """The fields' values, taken out of what a command was given; what was left out is left to
        the settings."""
        called = {name: self.names.get(name, name) for name in self.only or _names(self.settings)}
        taken = {name: given.pop(one) for name, one in called.items() if one in given}
        return {name: value for name, value in taken.items() if value is not None}


PLAIN = (str, int, float, bool, Path, type(None))


def _strict(annotation: Any) -> Any:
    """The same, where it is a whole number taken in digits alone: cyclopts rounds 2.5 to 2."""
    kind = typing.get_args(annotation)[0] if hasattr(annotation, "__metadata__") else annotation
    if int not in (kind, *typing.get_args(kind)):
        return annotation
    return Annotated[annotation, Parameter(converter=_whole)]


def _whole(_kind: Any, tokens: Any) -> int:
    text = tokens[0].value
    if not re.fullmatch(r"[+-]?[0-9]{1,19}", text):
        raise ValueError(f"must be a whole number, got {text!r:.40}")
    return int(text)


def _names(settings: type) -> list[str]:
    return [one.name for one in fields(settings)]


def _helps(settings: type) -> dict[str, str]:
    """The lines of a class's docstring by field."""
    found = parse(settings.__doc__ or "", DocstringStyle.GOOGLE)
    return {one.arg_name: " ".join((one.description or "").split()) for one in found.params}


def command(
    app: App, name: str, *sources: Take
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command; it has the options of these settings in place of its `**given`."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        every = {name: one for source in sources for name, one in source.options().items()}

        @functools.wraps(function)
        def run(*arguments: Any, **given: Any) -> None:
            for name, (parameter, parser) in every.items():
                value = given.setdefault(name, parameter.default)
                if parser and isinstance(value, str):
                    given[name] = parser(value)
            function(*arguments, **given)

        signature = inspect.signature(function, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        theirs = [parameter for parameter, _ in every.values()]
        parameters = [*own, *sorted(theirs, key=lambda one: one.default is not one.empty)]
        parameters = [one.replace(annotation=_strict(one.annotation)) for one in parameters]
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in parameters}
        paragraphs = inspect.cleandoc(function.__doc__ or "").split("\n\n")
        run.__doc__ = "\n\n".join(" ".join(one.split()) for one in paragraphs)
        app.command(run, name=name)
        return run

    return decorate
