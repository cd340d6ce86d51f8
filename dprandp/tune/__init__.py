"""Choose settings of the probe: free of charge on public images, or on the private data, charged.

    --on synthetic   (default) a task made of the run's own synthetic images       public.py
    --on NAME        a data set that you declare public                            public.py
    --on private     the private data; the cost is charged to the run's budget     private.py

It writes ``tune.json`` and ``tuned.toml`` (see ``runs/tuning.py``).
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from dprandp.config.schema import ProbeConfig, as_dict, same_data_name
from dprandp.errors import UsageError
from dprandp.pretrain import EXTRACTOR_STAGES, require_extractor
from dprandp.privacy.accounting import rounded_up
from dprandp.runs.context import Context
from dprandp.runs.directory import frozen
from dprandp.runs.tuning import (
    PRIVATE,
    PrivateTuning,
    Tuning,
    hide_duration,
    read_tuning,
    refuse_other_tuning,
    seal_tuning,
    write_tuning,
)
from dprandp.tune.private import choose_privately
from dprandp.tune.public import choose_publicly
from dprandp.tune.settings import TuneConfig, private_data

STAGE = "tune"


def run(config: ProbeConfig, tune: TuneConfig, context: Context) -> Tuning:
    """Choose settings of this probe and write ``tune.json`` and ``tuned.toml``; returns the record.

    Raises:
        UsageError: settings that are not simulated, or other tuning than the run has.
        CheckpointError: the run's ledger does not bear out what private tuning recorded before.
        InputError: no extractor yet, or missing data. BudgetError: private tuning does not fit (no pixel was read).
    """
    if config.batch_size is not None or config.views > 1:
        raise UsageError("tune works only for full batches of single views", fix="leave out batch_size and views")
    if same_data_name(tune.on, config.data):
        raise private_data(tune.on)
    require_extractor(context, STAGE)
    inputs = context.rundir.inputs_from(*EXTRACTOR_STAGES)
    asked = frozen({**asdict(tune), "probe": as_dict(config), "inputs": inputs})
    before = read_tuning(context.rundir) if not context.overwrite else None
    if before is not None:
        if _alike(before.asked, asked):
            if tune.on == PRIVATE:
                refuse_other_tuning(context.rundir, before)
            return before
        raise UsageError(
            f"this run was tuned before, on {before.on}, for other settings",
            fix="use its tuned.toml, or give --overwrite to tune again; what was spent stays spent",
        )
    choose = choose_privately if tune.on == PRIVATE else choose_publicly
    record = choose(config, tune, context, asked)
    kept = {key: value for key, value in as_dict(config).items() if key not in ("size", "tuned_on")}
    if tune.on == PRIVATE:
        seal_tuning(context.rundir, record)
    write_tuning(context.rundir, record, kept | vars(record.chosen))
    if tune.on == PRIVATE:
        hide_duration(context.rundir)
    return record


def _alike(before: dict[str, Any], asked: dict[str, Any]) -> bool:
    """Whether the request is the same; spellings of a path may differ."""
    old, new = before.get("probe"), asked["probe"]
    if not isinstance(old, dict):
        return False
    for ours, theirs, key in ((old, new, "data"), (before, asked, "on")):
        if not same_data_name(str(ours.get(key)), theirs[key]):
            return False
    return {**before, "on": asked["on"], "probe": {**old, "data": new["data"]}} == asked


def as_json(result: Tuning) -> dict[str, Any]:
    """The result as ``--json`` prints it: it begins with ``stage``."""
    return {"stage": STAGE, **frozen(result)}


def line(result: Tuning) -> str:
    """The result for people."""
    chosen = ", ".join(f"{name} = {value:.4g}" for name, value in vars(result.chosen).items())
    if isinstance(result, PrivateTuning):
        how = f"private data, {result.trials} trials expected, ε = {rounded_up(result.charged_epsilon)} charged"
    else:
        how = (
            f"{result.on}, {len(result.tried)} settings tried, {100 * result.accuracy:.1f} % against "
            f"{100 * result.default_accuracy:.1f} % of the default, nothing charged"
        )
    return f"tune: {chosen} ({how})"
