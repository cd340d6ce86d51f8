"""A setting is declared once, as a dataclass field with its help, unit, range, choices, default and flag.

The command line's options (``cli/flags.py``), the checks of configuration files, what a run records and the tables of
``docs/settings.md`` are made from these declarations. A new setting is one line in ``schema.py``.
"""

from __future__ import annotations

import dataclasses
import types
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from dprandp.errors import UsageError, nearest

DATA, PRIVACY, TRAINING, PERFORMANCE, OUTPUT = "Data", "Privacy", "Training", "Performance", "Output"
"""Panels of the command line's help."""

LARGEST = 2**63 - 1
"""Upper limit of every whole number, as in TOML and for seeds of the random generators."""

LONGEST_TEXT = 500
"""Most characters of a setting that is free text."""

SLIP = 1000
"""An upper limit at or above this one only catches typing errors, so messages do not call it a range."""

_KEY = "setting"


@dataclass(frozen=True)
class Setting:
    """Everything about a setting except its name, type and default.

    Attributes:
        help: one or two sentences, with units and the meaning of special values. panel: of the help text that lists it.
        flag: its option on the command line; None where only a configuration file sets it.
        metavar: name of its value there; None: its type or choices.
        otherwise: the default in words, where the value alone does not show it.
        inherited: whether a later stage takes it from the run.
        above, low, below, most: value > above, value >= low, value < below, value <= most.
        wrong: the words for a value out of range; fix: what to give instead.
        infinite: whether inf is a value. line: whether it is one short line of text.
        of: the only kind of extractor it is for, such as 'patchnet'; None: all.
        learning: whether it only concerns how weights are learned, so has no effect on random ones.
    """

    help: str
    flag: str | None = None
    panel: str = TRAINING
    metavar: str | None = None
    otherwise: str | None = None
    inherited: bool = False
    above: float | None = None
    low: float | None = None
    below: float | None = None
    most: float | None = None
    wrong: str | None = None
    fix: str | None = None
    infinite: bool = False
    line: bool = False
    of: str | None = None
    learning: bool = False


def setting(default: Any, help: str, flag: str | bool | None = None, **facts: Any) -> Any:
    """A field of a configuration; ``flag`` True stands for the field's own name."""
    return dataclasses.field(default=default, metadata={_KEY: Setting(help, flag, **facts)})  # type: ignore[arg-type]


@cache
def settings_of(kind: type) -> Mapping[str, Setting]:
    """The settings of a configuration, by name, in the order of their declaration."""
    found = {}
    for field in dataclasses.fields(kind):
        made: Setting = field.metadata[_KEY]
        if made.flag is True:
            made = dataclasses.replace(made, flag="--" + field.name.replace("_", "-"))
        found[field.name] = made
    return types.MappingProxyType(found)


@cache
def types_of(kind: type) -> Mapping[str, Any]:
    """Name -> type of a configuration's fields."""
    hints = get_type_hints(kind)
    return types.MappingProxyType({field.name: hints[field.name] for field in dataclasses.fields(kind)})


def plain_type(hint: Any) -> type:
    """int, float, bool or str: the type of a value that is not None."""
    for each in _alternatives(hint):
        return type(get_args(each)[0]) if get_origin(each) is Literal else each
    raise TypeError(f"{hint} has no plain type")


def choices_of(hint: Any) -> tuple[Any, ...]:
    """The values that a Literal type allows; () for other types."""
    return tuple(value for each in _alternatives(hint) if get_origin(each) is Literal for value in get_args(each))


def _alternatives(hint: Any) -> list[Any]:
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return [part for part in parts if part is not type(None)]


def text(value: Any) -> str:
    """A value as help texts show it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.15g}" if isinstance(value, float) else str(value)


def checked(stage: str, kind: type, values: Mapping[str, Any]) -> Any:
    """A configuration of a kind from plain values, each checked against its declaration; ``stage`` is for messages.

    Raises:
        UsageError: an unknown name, a wrong type, or a value out of its range; naming it.
    """
    from pydantic import ValidationError

    declared, hints = settings_of(kind), types_of(kind)
    for name, value in values.items():
        if name not in declared:
            raise UsageError(f"[{stage}] has no setting {name!r}", fix=nearest(name, declared))
        if isinstance(value, int) and abs(value) > LARGEST:
            raise UsageError(f"[{stage}] {name} has more than 64 bits", fix=f"give a {name} of at most {LARGEST}")
        if not isinstance(value, str):
            continue
        if declared[name].line and not (value.isprintable() and 0 < len(value) <= LONGEST_TEXT):
            problem = f"{name} is not one line of 1 to {LONGEST_TEXT} printable characters"
            raise UsageError(problem, fix="give one short line of text")
        if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in value):
            raise UsageError(f"[{stage}] {name} = {value!r} cannot be printed", fix=f"give a plain {name}")
    try:
        return kind(**vars(_model(kind).model_validate(dict(values))))
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise _refusal(stage, name, values[name], hints[name], declared[name], first["type"]) from None


@cache
def _model(kind: type) -> Any:
    """The pydantic model of a configuration, which checks types strictly, and ranges."""
    from pydantic import ConfigDict, Field, create_model

    fields: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        made, hint = settings_of(kind)[field.name], types_of(kind)[field.name]
        limits = {"gt": made.above, "ge": made.low, "lt": made.below, "le": made.most}
        limits["allow_inf_nan"] = made.infinite if plain_type(hint) is float else None
        given = {key: value for key, value in limits.items() if value is not None}
        fields[field.name] = (Annotated[hint, Field(**given)], field.default)
    return create_model(kind.__name__, __config__=ConfigDict(strict=True, extra="forbid"), **fields)


def _refusal(stage: str, name: str, value: Any, hint: Any, made: Setting, kind: str) -> UsageError:
    """The error for a value that pydantic refused, by the kind of its error."""
    if kind == "literal_error" and isinstance(value, str):
        return UsageError(f"[{stage}] {name} = {value!r} is unknown", fix=nearest(value, choices_of(hint)))
    if kind not in ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number"):
        expected = plain_type(hint).__name__
        return UsageError(f"[{stage}] {name} = {value!r} is not of type {expected}", fix=f"give {name} as {expected}")
    slip = made.most is not None and made.most >= SLIP
    if kind == "less_than_equal" and slip:
        return UsageError(f"{name} = {value} is too large", fix=f"give a {name} of at most {made.most:.0f}")
    if made.above == 0 and made.below is None and (made.most is None or slip):
        wrong, fix = "is not a positive number", f"give a {name} above 0"
    else:
        lowest = f"({made.above:g}" if made.above is not None else "[-inf" if made.low is None else f"[{made.low:g}"
        highest = f"{made.below:g})" if made.below is not None else "inf)" if made.most is None else f"{made.most:g}]"
        wrong, fix = f"lies outside {lowest}, {highest}", f"choose a {name} in that range"
    return UsageError(f"{name} = {value!r} {made.wrong or wrong}", fix=made.fix or fix)
