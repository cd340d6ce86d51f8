"""``dprandp sweep``: many runs, one for each data set, system, ε and seed, with shared public stages and one table.

    shared/KEY/             images, extractor, whiteners, and (in its private/) features: shared by runs by hard links
    DATA-SYSTEM-epsE-sS/    a run like any other
    results.jsonl           a line for each finished run, and one for what all private runs on the same data cost

A sweep has no state of its own: which runs are finished, the run directories say. So a sweep that was killed goes on
where it was, at the last checkpoint of the stage that it was in.

Several runs on one private data set add up. Their ε together is computed before the first one begins, from their plans,
and at the end, from their ledgers.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dprandp import pipeline
from dprandp.config.presets import SIZES
from dprandp.config.schema import (
    PRETRAINED,
    PrivateConfig,
    StageConfig,
    as_dict,
    fraction_of,
    images_of_run,
    public_data_name,
    resolve,
    same_data_name,
)
from dprandp.dpsgd.budget import read_budget
from dprandp.dpsgd.features import PUBLIC_FOLDER
from dprandp.errors import DprandpError, InputError, UsageError, nearest
from dprandp.inspection import compare
from dprandp.inspection.compare import RESULTS, Comparison, Together, collected
from dprandp.pipeline.plan import plan_after
from dprandp.privacy.adaptive import Stage
from dprandp.report import page
from dprandp.report.disclosure import epsilon_text, number
from dprandp.runs.console import Console
from dprandp.runs.context import Context
from dprandp.runs.directory import RunDir, looks_like_a_run
from dprandp.runs.files import atomic_write, to_json
from dprandp.runs.ledger import combined, open_run_ledger

COMMON = "shared"
SHARED = ("generate", "pretrain")

SYSTEMS: dict[str, dict[str, dict[str, Any]]] = {
    "probe": {"generate": {}, "pretrain": {}, "probe": {"share": 1.0}},
    "dp-randp": {"generate": {}, "pretrain": {}, "probe": {"share": 0.3}, "finetune": {}},
    "de2022": {"finetune": {"source": "scratch", "arch": "wrn-10-1"}},
    "pruning": {
        "generate": {}, "pretrain": {}, "probe": {}, "finetune": {"source": "probe", "freeze": "random", "keep": 0.1},
    },
    "continual": {
        "generate": {}, "pretrain": {"arch": "vit-4-64-4", "random_init": True},
        "continue": {"public": "fraction:0.1"}, "probe": {}, "finetune": {"source": "probe"},
    },
}  # fmt: skip
"""Name -> its stages, each with the settings that make the system. A configuration file overrides them."""

PUBLISHED = {"de2022": {"finetune": {"arch": "wrn-16-4", "recipe": "de2022"}}}
"""What they are at size paper: hours of a GPU. dp-randp's recipe is the size's own."""


@dataclass(frozen=True)
class Asked:
    """What a sweep goes over."""

    data: Sequence[str]
    systems: Sequence[str]
    epsilons: Sequence[float]
    seeds: int  # 0 ... n - 1
    size: str
    file: Path | None  # configuration


@dataclass(frozen=True)
class Cell:
    """One run."""

    path: Path
    facts: dict[str, Any]  # data, system, size, epsilon_total, seed
    configs: dict[str, StageConfig]  # in the order of the stages

    @property
    def private(self) -> dict[str, PrivateConfig]:
        """The stages that may read private images."""
        return {name: config for name, config in self.configs.items() if name not in SHARED}

    def finished(self) -> bool:
        """Whether the last stage is done."""
        if not (self.path / "run.json").exists():
            return False
        return RunDir.open(self.path, create=False).row(list(self.configs)[-1]).state == "done"


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """What would run."""

    stage: str = "sweep"
    folder: str
    runs: list[dict[str, Any]]  # one a run: its facts, action (fresh, resume, skip) and epsilon_after
    public: int  # different Phases I
    together: list[Together] = field(default_factory=list)  # of the private runs on the same data, when all are done
    not_private: int = 0  # runs without privacy, which promise nothing
    gone: int = 0  # private runs of earlier sweeps in this folder
    exposed: list[str] = field(default_factory=list)  # data of which one run declares a part public that others protect


def cells(asked: Asked, folder: Path) -> list[Cell]:
    """All runs, those on the same data next to each other.

    Raises:
        UsageError: an unknown system or size, a setting out of range, or the same run twice.
    """
    for system in asked.systems:
        if system not in SYSTEMS:
            raise UsageError(f"there is no system called {system!r}", fix=nearest(system, SYSTEMS))
    if asked.size not in SIZES:
        raise UsageError(f"unknown size {asked.size!r}", fix=f"choose one of {', '.join(SIZES)}")
    if asked.seeds < 1:
        raise UsageError(f"--seeds {asked.seeds} asks for no run", fix="give 1 or more")
    made = {}
    for data in asked.data:
        for seed in range(asked.seeds):
            for system in asked.systems:
                for epsilon in asked.epsilons:
                    cell = _cell(asked, folder, data, system, float(epsilon), seed)
                    if cell.path in made and made[cell.path] != cell:
                        raise UsageError(f"two runs of this sweep would be called {cell.path.name}",
                                         fix="sweep over data of the same name in two folders (--out)")  # fmt: skip
                    made[cell.path] = cell
    return list(made.values())


def _cell(asked: Asked, folder: Path, data: str, system: str, epsilon: float, seed: int) -> Cell:
    configs: dict[str, StageConfig] = {}
    for stage, settings in SYSTEMS[system].items():
        common = {"seed": seed} | ({} if stage in SHARED else {"data": data, "epsilon": epsilon})
        published = PUBLISHED.get(system, {}).get(stage, {}) if asked.size == "paper" else {}
        configs[stage] = resolve(stage, asked.size, asked.file, common, settings | published)
    if "probe" in configs and "finetune" in configs and configs["finetune"].source == PRETRAINED:
        del configs["probe"]  # at size paper the recipe has none
    if "pretrain" in configs:
        configs["generate"] = images_of_run(configs["generate"], configs["pretrain"])
    shown = "".join(letter if letter.isalnum() or letter in "-._" else "-" for letter in public_data_name(data))
    facts = {"data": data, "system": system, "size": asked.size, "epsilon_total": epsilon, "seed": seed}
    return Cell(folder / f"{shown}-{system}-{asked.size}-eps{epsilon:g}-s{seed}", facts, configs)


# ------------------------------------------------------------------------------------------------------------ the plan


def plan(chosen: Sequence[Cell], folder: Path, context: Callable[[RunDir], Context]) -> SweepPlan:
    """All runs, and what the private ones will have cost together, from public facts: reads no pixel, writes nothing.

    Args:
        context: makes the context of a run.

    Raises:
        As the stages, before they read data: nothing is begun unless all of it can run. InputError: files are missing.
    """
    runs, costs = [], {}
    for cell in chosen:
        with tempfile.TemporaryDirectory() as empty:
            rundir = RunDir.open(cell.path if cell.path.exists() else Path(empty), create=False)
            try:
                made, stages = plan_after(cell.configs, replace(context(rundir), console=Console(quiet=True)))
            except DprandpError as error:
                error.problem = f"{cell.path.name}: {error.problem}"
                raise
            ledger = open_run_ledger(rundir)
            whole = [*([] if ledger is None else ledger.stages()), *stages]
        done = cell.finished()
        action = "skip" if done else "resume" if (cell.path / "run.json").exists() else "fresh"
        arch = cell.configs.get("pretrain", cell.configs.get("finetune")).arch
        last = f"{made.stage} ({arch}): T = {made.steps}, B = {made.sample_rate * made.examples:.0f}, K = {made.views}"
        facts = {"action": action, "epsilon_after": made.epsilon_after, "missing": made.missing, "last": last}
        runs.append({"run": str(cell.path), **cell.facts, **facts})
        if math.isfinite(made.epsilon_after):
            costs.setdefault(cell.facts["data"], []).append((str(cell.path), whole, made.delta))
    for data, path, stages, delta in _earlier(chosen, folder):
        for named in costs:
            if same_data_name(data, named):
                costs[named].append((str(path), stages, delta))
    return SweepPlan(
        folder=str(folder),
        runs=runs,
        public=len({key for cell in chosen if (key := public_key(cell)) is not None}),
        together=[_together(each) for each in costs.values() if len(each) > 1],
        exposed=_exposed(chosen),
        not_private=sum(math.isinf(cell.facts["epsilon_total"]) for cell in chosen),
        gone=len(compare.earlier_rows(folder / RESULTS)[1]),
    )


def _earlier(chosen: Sequence[Cell], folder: Path) -> Iterator[tuple[str, Path, list[Stage], float]]:
    """Data, path, mechanisms and δ of the private runs of earlier sweeps in a folder."""
    paths = {cell.path.resolve() for cell in chosen}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.resolve() not in paths and looks_like_a_run(path):
            rundir = RunDir.open(path, create=False)
            budget, ledger = read_budget(rundir), open_run_ledger(rundir)
            if budget is not None and budget.private and ledger is not None and ledger.events():
                yield budget.data, path, ledger.stages(), budget.delta


def _exposed(chosen: Sequence[Cell]) -> list[str]:
    parts: dict[str, set[str | None]] = {}
    for cell in chosen:
        config = cell.configs.get("continue")
        part = None if config is None or fraction_of(config.public) is None else f"{config.public}, seed {config.seed}"
        parts.setdefault(cell.facts["data"], set()).add(part)
    return [public_data_name(data) for data, found in parts.items() if len(found) > 1]


def _together(runs: Sequence[tuple[str, Sequence[Stage], float]]) -> Together:
    found = combined([(stages, delta) for _, stages, delta in runs])
    return Together(runs=tuple(name for name, _, _ in runs), **vars(found))


def plan_lines(made: SweepPlan) -> str:
    """``plan`` for people."""
    said = {"fresh": "", "resume": " (begun before: continues)", "skip": " (finished: nothing to do)"}
    names = [Path(run["run"]).name for run in made.runs]
    width = max(map(len, names))
    lines = [
        f"{name:<{width}}  ε = {epsilon_text(run['epsilon_after'])}; {run['last']}{said[run['action']]}"
        for name, run in zip(names, made.runs, strict=True)
    ]
    times = "once" if made.public == 1 else f"{made.public} times"
    lines.append(f"sweep: {len(made.runs)} runs in {made.folder}; generate and pretrain {times}, shared by the runs")
    missing = {run["missing"] for run in made.runs} - {None}
    return "\n".join([*lines, *cost_lines(made), *(f"warning: {what}" for what in missing)])


def cost_lines(made: SweepPlan) -> list[str]:
    """What the private runs on the same data cost together, which nobody should miss."""
    lines = []
    for each in made.together:
        if each.epsilon is None:
            lines.append(f"warning: {len(each.runs)} private runs are about {each.method}")
            continue
        what = f"ε = {epsilon_text(each.epsilon)} at δ = {number(each.delta)} ({each.method})"
        lines.append(f"warning: {len(each.runs)} private runs on the same data cost together {what}")
    lines += [
        f"warning: some runs declare a part of {data} public that others protect: together they give no privacy "
        "guarantee for these images"
        for data in made.exposed
    ]
    if made.gone:
        lines.append(f"warning: {made.gone} private runs of earlier sweeps in this folder are gone; what they have "
                     f"spent comes on top, see {RESULTS}")  # fmt: skip
    if made.not_private:
        lines.append(f"warning: {made.not_private} runs without privacy (ε = ∞) promise nothing: do not release them")
    return lines


# ------------------------------------------------------------------------------------------------------------ the runs


def run(chosen: Sequence[Cell], folder: Path, context: Callable[[RunDir], Context], console: Console) -> Comparison:
    """Make all runs that are not finished, and ``results.jsonl``; returns what it holds, for ``compare``'s table."""
    for position, cell in enumerate(chosen, 1):
        if not cell.finished():
            console.say(f"run {position} of {len(chosen)}: {cell.path.name}")
            _make(cell, folder, context, console)
            _write_results(chosen, folder)
    for cell in chosen:  # each report names the runs beside it, of which there are more now
        rundir = RunDir.open(cell.path, create=True)
        with rundir.lock():
            page.write(rundir)
    return _write_results(chosen, folder)


def _make(cell: Cell, folder: Path, context: Callable[[RunDir], Context], console: Console) -> None:
    public = None
    if (key := public_key(cell)) is not None:
        public = folder / COMMON / key
        shared = RunDir.open(public, create=True)
        with shared.lock():
            for name in SHARED:
                _stage(name, cell.configs[name], context(shared), console)
            start_from(public, cell.path)
    rundir = RunDir.open(cell.path, create=True)
    with rundir.lock():
        for name, config in cell.configs.items():
            _stage(name, config, context(rundir), console)
            if public is not None and name == "probe" and "continue" not in cell.configs:
                with RunDir.open(public, create=True).lock():
                    keep_features(cell.path, public)
        page.write(rundir)


def _stage(name: str, config: StageConfig, context: Context, console: Console) -> None:
    if context.rundir.row(name).state != "done":
        console.say(pipeline.stage_line(name, pipeline.run_stage(name, config, context)))


def public_key(cell: Cell) -> str | None:
    """Of the images and the extractor that a run begins with: equal where their settings are; None without Phase I."""
    if not all(name in cell.configs for name in SHARED):
        return None
    settings = json.dumps([as_dict(cell.configs[name]) for name in SHARED], sort_keys=True)
    return f"{cell.configs['pretrain'].arch}-{hashlib.sha256(settings.encode()).hexdigest()[:12]}"


def start_from(public: Path, run: Path) -> None:
    """Begin a run with the stages and features of another one, by hard links: files are replaced, never changed."""
    if run.exists():
        return
    copied = run.with_name(f".{run.name}.copy")
    shutil.rmtree(copied, ignore_errors=True)
    shutil.copytree(public, copied, copy_function=os.link, ignore=shutil.ignore_patterns(".lock"))
    os.rename(copied, run)


def keep_features(run: Path, public: Path) -> None:
    """Let later runs reuse whiteners and private features; a key says what these were computed from."""
    for statistics in (run / PUBLIC_FOLDER).iterdir():
        kept = public / PUBLIC_FOLDER / statistics.name
        if not kept.exists():
            shutil.copytree(statistics, kept, copy_function=os.link)
    private = public / "private"
    private.mkdir(mode=0o700, exist_ok=True)
    for name in ("features", "test-features"):
        key = run / "private" / f"{name}.key"
        if key.exists():
            (private / key.name).unlink(missing_ok=True)  # before the features that it would vouch for
            for file in (f"{name}.npy", key.name):
                (private / file).unlink(missing_ok=True)
                os.link(run / "private" / file, private / file)


def _write_results(chosen: Sequence[Cell], folder: Path) -> Comparison:
    """``results.jsonl`` of the finished runs, and of those of earlier sweeps that it has already; returns all these."""
    keys = ("system", "size", "seed")
    rows, lost, spent_then = compare.earlier_rows(folder / RESULTS)
    finished = {cell.path: {key: cell.facts[key] for key in keys} for cell in chosen if cell.finished()}
    for row in rows:
        path = folder / Path(row.run).name
        if looks_like_a_run(path):
            finished.setdefault(path, {key: getattr(row, key) for key in keys})
    found, facts = compare.compare(list(finished)), finished.values()
    private = [row.run for row in found.runs if row.private]
    together = compare.compare([Path(name) for name in private]).together if private else []
    gone = compare.with_lost(found.runs, lost, together)
    spent_then = [each for each in spent_then if each.method != compare.GONE]
    lines = [to_json({**vars(row), **own}) for row, own in zip(found.runs, facts, strict=True)]
    lines += [to_json(vars(row)) for row in lost]  # what they have released stays released
    lines += [to_json({"together": vars(each)}) for each in dict.fromkeys([*spent_then, *together, *gone])]
    lines += [to_json({"exposed": each}) for each in found.exposed]
    atomic_write(folder / RESULTS, "".join(line + "\n" for line in lines))
    return collected([folder / RESULTS])


def require_data(made: SweepPlan) -> None:
    """Raise InputError where a run's data are not there, before hours of public stages."""
    for entry in made.runs:
        if entry["missing"] is not None and entry["action"] != "skip":
            raise InputError(entry["missing"], fix="put the files there, or add --download where there is a network")

