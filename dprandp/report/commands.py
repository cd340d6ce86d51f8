"""The command lines that repeat a run with the settings that it recorded."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from dprandp.config import schema, toml
from dprandp.config.schema import (
    DATA_SETTINGS,
    MODULE,
    STAGE_CONFIGS,
    WITHOUT_PHASE_ONE,
    public_arch,
    public_data_name,
)
from dprandp.config.settings import settings_of, text
from dprandp.errors import DprandpError
from dprandp.runs.directory import StageRow

SETTINGS_FILE = "settings.toml"
INHERITED = (*DATA_SETTINGS, "epsilon", "delta", "noise")
"""What a fine-tune takes from the run's probe."""


def changed_settings(row: StageRow) -> dict[str, Any]:
    """Settings of a stage that differ from its size's defaults, by name."""
    recorded, default = row.config or {}, defaults_of(row)
    return {name: value for name, value in recorded.items() if name != "size" and value != default.get(name)}


DECIDING = ("arch", "layers", "init", "init_source", "source", "recipe", "epsilon")
"""Settings on which other settings' defaults depend."""


def defaults_of(row: StageRow) -> dict[str, Any]:
    """The defaults of a stage at the run's size, with its network and recipe; none for an unknown size."""
    recorded = row.config or {}
    size, chosen = recorded.get("size", "tiny"), {name: recorded[name] for name in DECIDING if name in recorded}
    if recorded.get("source") not in (None, *WITHOUT_PHASE_ONE) and row.stage == "finetune":
        chosen.pop("arch", None)
    try:
        plain, fitting = (schema.as_dict(schema.resolve(row.stage, size, None, given)) for given in ({}, chosen))
    except DprandpError:
        return {}
    return fitting | {name: plain.get(name) for name in chosen}


def commands(name: str, rows: Sequence[StageRow]) -> str:
    """Lines for a shell: a settings file, where one is needed, and a command for each stage that the run has begun.

    Folders of data and of weights are left out, as in all that may be published.

    Args:
        name: of the run's folder.
    """
    begun = {row.stage: row for row in rows if row.config is not None}
    prior = begun["pretrain"].config.get("prior") if "pretrain" in begun else None
    if prior:  # its stages are made by the first one after them
        begun = {stage: row for stage, row in begun.items() if stage not in ("generate", "pretrain")} or {
            "pretrain": begun["pretrain"]
        }
    code = any(str(row.config.get("arch")).startswith(MODULE) for row in begun.values())
    lines, tables = [], {}
    for index, (stage, row) in enumerate(begun.items()):
        changed = {} if prior and stage == "pretrain" else _own_settings(row, begun)
        declared = settings_of(STAGE_CONFIGS[stage])
        flags = {k: v for k, v in changed.items() if k in declared and declared[k].flag and v is not False}
        tables[stage] = {key: value for key, value in changed.items() if key not in flags and key != "prior"}
        words = ["dprandp", stage, "--run", f"runs/{name}", *(["--prior", prior] if prior and index == 0 else [])]
        if (size := row.config.get("size", "tiny")) != "tiny":
            words += ["--size", size]
        words += ["--config", SETTINGS_FILE] if tables[stage] else []
        words += ["--trust-code"] if code and stage != "generate" else []
        for key, value in flags.items():
            words += [declared[key].flag, *([] if value is True else [text(published(key, value))])]
        lines.append(shlex.join(words))
    written = {stage: table for stage, table in tables.items() if table}
    if written:
        lines = [f"cat > {SETTINGS_FILE} <<'END'", toml.dumps(written).rstrip("\n"), "END", *lines]
    return "\n".join(lines)


def _own_settings(row: StageRow, begun: Mapping[str, StageRow]) -> dict[str, Any]:
    """What a stage's command has to say: what the run has not said before it."""
    changed = changed_settings(row)
    if row.stage == "finetune" and "probe" in begun and row.config.get("source") not in WITHOUT_PHASE_ONE:
        said = begun["probe"].config
        changed = {key: value for key, value in changed.items() if key not in INHERITED or said.get(key) != value}
    return changed


def published(key: str, value: Any) -> Any:
    """A setting's value, as recorded, without the folder of a user's file."""
    if not isinstance(value, str):
        return value
    if key in ("data", "public"):
        return public_data_name(value)
    if key == "arch":
        return public_arch(value)
    return os.path.basename(value) if key == "init" else value
