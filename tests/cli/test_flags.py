"""Flags are made from declarations: what help texts state is so, and a new setting is one line."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from dprandp.cli import app, flags
from dprandp.config import schema
from dprandp.config.presets import SIZES
from dprandp.config.schema import STAGE_CONFIGS, build, default_text, lr_of, resolve
from dprandp.config.settings import plain_type, setting, settings_of, text, types_of
from dprandp.data import KNOWN
from dprandp.dpsgd.budget import default_delta
from dprandp.dpsgd.masks import rule_of
from dprandp.errors import UsageError
from dprandp.finetune import network_config
from dprandp.models.optimizers import DEFAULT_MOMENTUM

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))
import settings_page

EVERY = [(stage, name) for stage, kind in STAGE_CONFIGS.items() for name in settings_of(kind)]


def test_a_stated_default_is_what_every_size_resolves_to() -> None:
    for stage, name in EVERY:
        stated, made = default_text(stage, name), settings_of(STAGE_CONFIGS[stage])[name]
        sizes = ("tiny",) if name == "size" else SIZES
        found = [getattr(resolve(stage, size, None, {}), name) for size in sizes]
        if stated is None:
            assert not any(found), (stage, name)
        elif made.otherwise is None:
            assert all(text(value) in stated for value in found), (stage, name)


def test_defaults_that_are_stated_in_words_are_those_of_the_code() -> None:
    """Where a stage decides by public facts, its declaration says how; here is what decides."""
    stated = {(stage, name): settings_of(STAGE_CONFIGS[stage])[name].otherwise for stage, name in EVERY}
    sgd = [lr_of(build("pretrain", {"size": size})) for size in SIZES]
    adamw = {lr_of(build("pretrain", {"optimizer": "adamw", "size": size})) for size in SIZES}
    assert sgd[0] == sgd[1]
    assert stated["pretrain", "lr"] == f"{sgd[0]:g}, or {sgd[2]:g} (paper); {adamw.pop():g} for adamw"
    assert stated["finetune", "momentum"] == ", ".join(f"{beta:g} ({name})" for name, beta in DEFAULT_MOMENTUM.items())
    masked = rule_of(build("finetune", {"keep": 0.1, "freeze": "random"}))
    assert stated["finetune", "prune"] == ("zero" if masked.zero else "hold")
    assert stated["finetune", "scope"] == masked.scope
    assert stated["finetune", "every"] == str(rule_of(build("finetune", {"keep": 0.1, "select": "random"})).every)
    network = network_config(build("finetune", {"source": "scratch"}))
    assert stated["finetune", "layer_order"] == network.layer_order
    assert (network.padding, stated["finetune", "padding"]) == (None, "symmetric")
    published = {name: made.spec().published_delta for name, made in KNOWN.items()}
    named = [name for name, value in published.items() if value is not None]
    assert {default_delta(KNOWN[name].spec().train_units, published[name]) for name in named} == {1e-5}
    assert all(name in str(stated["probe", "delta"]) for name in named)
    assert [default_delta(count) for count in (10, 10_000, 21_600)] == [1e-5, 1e-5, 4e-6]  # 1e-5, or .1/N


def test_a_new_setting_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its flag with help and default, its place in a file, its range, what is recorded, and the documentation."""

    @dataclasses.dataclass(frozen=True)
    class Longer(schema.ProbeConfig):
        patience: int = setting(7, "Steps without progress.", True, above=0, most=50)

    monkeypatch.setitem(STAGE_CONFIGS, "probe", Longer)
    commands, seen = typer.Typer(), []

    @flags.command(commands, "Stages", flags.of_settings("probe", names=("patience", "steps")))
    def probe(call: flags.Call) -> None:
        """A stage."""
        seen.append(call.given["probe"])

    runner = CliRunner()
    shown = runner.invoke(commands, ["--help"], env={"COLUMNS": "200"}).output
    assert "--patience" in shown
    assert "Steps without progress. Default: 7." in shown
    assert runner.invoke(commands, ["--patience", "9"]).exit_code == 0
    assert seen == [{"patience": 9, "steps": None}]
    assert runner.invoke(commands, ["--patience", "nine"]).exit_code == 2
    file = tmp_path / "settings.toml"
    file.write_text("[probe]\npatience = 8\n")
    assert resolve("probe", "tiny", file, {}).patience == 8
    assert schema.as_dict(resolve("probe", "tiny", file, seen[0]))["patience"] == 9
    with pytest.raises(UsageError, match="patience = 51"):
        build("probe", {"patience": 51})
    assert "| `patience` | `--patience` | whole number, above 0, at most 50 | 7 | Steps without" in settings_page.page()


def test_the_page_of_settings_is_up_to_date() -> None:
    written = (Path(__file__).resolve().parents[2] / "docs/settings.md").read_text(encoding="utf-8")
    assert written == settings_page.page(), "python scripts/settings_page.py > docs/settings.md"


def test_every_setting_with_a_flag_is_an_option_of_its_stage() -> None:
    group = typer.main.get_command(app)
    for stage, kind in STAGE_CONFIGS.items():
        options = {text for option in group.commands[stage].params for text in option.opts}
        wanted = {str(made.flag) for made in settings_of(kind).values() if made.flag}
        assert wanted <= options, stage
        assert "--size" in options


def test_every_declaration_is_whole() -> None:
    """A sentence of help, a type with one plain meaning, and a default that its own declaration allows."""
    for stage, name in EVERY:
        kind = STAGE_CONFIGS[stage]
        assert settings_of(kind)[name].help.endswith((".", "...")), name
        assert plain_type(types_of(kind)[name]) in (int, float, bool, str)
        assert getattr(build(stage, {}), name) == getattr(kind, name)
