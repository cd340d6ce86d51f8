"""The command line's options, made from declarations: the settings of ``config/schema.py``, and ``Options`` below.

``None`` always means "not given": ``schema.resolve`` then takes the value of the size, or of the run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from dprandp.config.declared import Publication
from dprandp.config.schema import STAGE_CONFIGS, default_text
from dprandp.config.settings import (
    DATA,
    OUTPUT,
    PERFORMANCE,
    PRIVACY,
    TRAINING,
    choices_of,
    plain_type,
    setting,
    settings_of,
    types_of,
)

DEFAULT_RUN = Path("runs/default")
MAIN = "Main"
PANELS = (MAIN, DATA, PRIVACY, TRAINING, PERFORMANCE, OUTPUT)

FIRST = ("data", "epsilon", "eps", "unit_column", "system", "size", "prior", "run", "out", "plan")
"""What most calls give, in the first panel of the help text, in this order, whatever their own panel is."""


@dataclass(frozen=True)
class Options:
    """Options of a command that are not settings of a stage: paths, output, and speed."""

    data_dir: Path = setting(Path("data"), "Folder with the files of the known data sets.", True, panel=DATA,
                             metavar="DIR")  # fmt: skip
    download: bool = setting(False, "Fetch a known data set's files where they are missing. Default: nothing is "
                             "fetched.", True, panel=DATA)  # fmt: skip
    insecure_seed: int | None = setting(None, "Seed the noise, for tests. The run is stamped NOT PRIVATE.", True,
                                        panel=PRIVACY)  # fmt: skip
    prior: str | None = setting(
        None, "Use a shipped extractor (see `dprandp priors`) instead of making one. Default: none, or the run's.",
        True, metavar="NAME",
    )  # fmt: skip
    size: str | None = setting(
        None, "Sets all other defaults: tiny (minutes on 2 cores), small (half an hour), paper. Default: that of "
        "the stage before, else tiny.", True, metavar="tiny|small|paper",
    )  # fmt: skip
    trust_code: bool = setting(
        False, "Run the Python file of a network module:FILE.py:NAME. It can do whatever you can: read it first.", True,
    )  # fmt: skip
    config: Path | None = setting(None, "TOML with a table per stage; flags override it.", True, metavar="FILE")
    device: str = setting("auto", "auto, cpu, cuda or cuda:i.", True, panel=PERFORMANCE)
    workers: int | None = setting(None, "Processes that make images. Default: one per core. Never changes the images.",
                                  True, panel=PERFORMANCE)  # fmt: skip
    microbatch: str = setting(
        "auto", "Examples whose gradients are in memory together: auto or n. Never changes the result.", True,
        panel=PERFORMANCE, metavar="auto|n",
    )  # fmt: skip
    run: Path = setting(DEFAULT_RUN, "Run directory.", True, panel=OUTPUT, metavar="DIR")
    plan: bool = setting(False, "Print what would run and what ε it would cost; read no data.", True, panel=OUTPUT)
    resume: bool = setting(False, "Keep the recorded settings; use the last good checkpoint.", True, panel=OUTPUT)
    overwrite: bool = setting(False, "Restart the stage. The privacy budget already spent stays spent.", True,
                              panel=OUTPUT)  # fmt: skip
    json: bool = setting(False, "One JSON object on stdout.", True, panel=OUTPUT)
    quiet: bool = setting(False, "Nothing but errors on stderr.", True, panel=OUTPUT)
    debug: bool = setting(False, "Tracebacks and private details of errors; not for publication.", True, panel=OUTPUT)


RUN = ("run", "json", "debug")
TALKING = (*RUN, "quiet")
STAGE = (*TALKING, "size", "config", "plan", "resume", "overwrite")
PRIVATE_STAGE = (*STAGE, "data_dir", "download", "device", "insecure_seed", "trust_code")


@dataclass(frozen=True)
class Call:
    """What a command was given.

    Attributes:
        given: stage -> setting -> value; None where a flag was not given.
        options: those that the command does not have are at their defaults.
    """

    given: dict[str, dict[str, Any]]
    options: Options


@dataclass(frozen=True)
class Flag:
    """One option of a command; it sets (stage, setting) pairs or, without any, a field of ``Options``."""

    parameter: inspect.Parameter
    targets: tuple[tuple[str, str], ...] = ()


def option(help: str, panel: str, flag: str | None = None, metavar: str | None = None) -> Any:
    """A typer option in a panel of the help text; ``flag`` None: named like its parameter."""
    return typer.Option(*([flag] if flag else []), help=help, rich_help_panel=panel, metavar=metavar)


def _parameter(name: str, kind: Any, made: Any, default: Any = None) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, made])


def _of_options(names: Sequence[str]) -> list[Flag]:
    """The flags of some fields of ``Options``, in the order of their declaration."""
    kinds = types_of(Options)
    return [
        Flag(_parameter(name, kinds[name], option(made.help, made.panel, made.flag, made.metavar),
                        getattr(Options, name)))
        for name, made in settings_of(Options).items() if name in names
    ]  # fmt: skip


def of_settings(*stages: str, names: Sequence[str] | None = None, prefix: str = "", says: str = "") -> list[Flag]:
    """The flags of some stages' settings.

    Args:
        stages: each flag sets the setting of its name in all of these; the first one's declaration is used.
        names: of the settings; None: all that have a flag.
        prefix: of parameter and option, such as 'probe-'.
        says: put before the help, such as 'Of the probe: '.
    """
    kind, flags = STAGE_CONFIGS[stages[0]], []
    for name, made in settings_of(kind).items():
        if made.flag is None or (names is not None and name not in names):
            continue
        hint = types_of(kind)[name]
        metavar = made.metavar or "|".join(map(str, choices_of(hint))) or None
        text = says + made.help[0].lower() + made.help[1:] if says else made.help
        defaults = {stage: default_text(stage, name) for stage in stages}
        default = defaults[stages[0]]
        if len(set(defaults.values())) > 1:
            default = ", ".join(f"{value} ({stage})" for stage, value in defaults.items())
        text += "" if default is None else f" Default: {default}."
        shown = option(text, made.panel, f"--{prefix}{made.flag.removeprefix('--')}", metavar)
        parameter = _parameter(prefix.replace("-", "_") + name, plain_type(hint) | None, shown)
        flags.append(Flag(parameter, tuple((stage, name) for stage in stages)))
    return flags


def of_publication() -> list[Flag]:
    """The flags of ``export`` by which a publisher describes a model; given under the name ``publication``."""
    return [
        Flag(_parameter(name, str | None, option(f"{made.help} Default: {made.otherwise}.", made.panel, made.flag,
                                                 made.metavar)), (("publication", name),))
        for name, made in settings_of(Publication).items()
    ]  # fmt: skip


def command(
    app: typer.Typer, panel: str, flags: Sequence[Flag] = (), options: Sequence[str] = RUN, name: str | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a command. Its first parameter is a ``Call``; the others are flags as typer reads them.

    Args:
        panel: of the list of commands.
        flags: of settings.
        options: names of fields of ``Options``.
        name: of the command; None: the function's.
    """
    made = [*flags, *_of_options(options)]

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(function).parameters.values())[1:]
        hints = get_type_hints(function, include_extras=True)

        def called(**values: Any) -> None:
            given: dict[str, dict[str, Any]] = {}
            told = {}
            for flag in made:
                value = values[flag.parameter.name]
                for stage, setting_name in flag.targets:
                    given.setdefault(stage, {})[setting_name] = value
                if not flag.targets:
                    told[flag.parameter.name] = value
            function(Call(given, Options(**told)), **{each.name: values[each.name] for each in own})

        parameters = [each.replace(annotation=hints[each.name], kind=inspect.Parameter.KEYWORD_ONLY) for each in own]
        parameters += [flag.parameter for flag in made]
        for each in parameters:
            if each.name in FIRST:
                each.annotation.__metadata__[0].rich_help_panel = MAIN
        parameters.sort(key=_place_in_help)
        called.__name__, called.__doc__ = function.__name__, function.__doc__
        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        called.__annotations__ = {each.name: each.annotation for each in parameters}
        app.command(name, rich_help_panel=panel)(called)
        return function

    return decorate


def _place_in_help(parameter: inspect.Parameter) -> tuple[int, int]:
    """The panel's place, and in the first panel that of the flag; the order of declaration decides the rest."""
    panel = PANELS.index(parameter.annotation.__metadata__[0].rich_help_panel)
    return panel, FIRST.index(parameter.name) if parameter.name in FIRST else 0
