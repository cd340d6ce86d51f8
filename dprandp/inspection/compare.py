"""``dprandp compare`` and ``status --runs``: runs side by side, and what those about the same data cost together.

Of the results of a ``sweep`` (``results.jsonl``) the table has a line for all seeds together, with mean and deviation.

The ε of a run counts that run alone. Runs about the same data add up: anybody who sees two of their models has seen
both. Which images a run is about is known by the hashes in its ``private/``, never by a name. Runs that have an image
in common are composed: for an image that only one of them has, the result is an upper bound as well.

*How they are composed.* All stages of all ledgers go through the accountant that composes the stages of one run
(``privacy/adaptive.py``): a stage of another run is one more stage. As within a run, the number and budgets of the runs
must not follow from their results. Private tuning is composed so only where it came before any other use of the data,
which the ledgers of several runs cannot show: with tuning, basic composition adds up the ε and the δ of the runs (Dwork
& Roth 2014, theorem 3.16), and is named. A copy of a run counts as a run of its own: it may have gone on, with other
noise.
"""

from __future__ import annotations

import csv
import io
import math
import os
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from dprandp.config.declared import without_size
from dprandp.config.schema import public_data_name, same_data_name
from dprandp.dpsgd.budget import read_budget
from dprandp.dpsgd.training_data import hashes_of, public_images, units_of
from dprandp.errors import CheckpointError, DprandpError, InputError, UsageError
from dprandp.privacy.ledger import Ledger
from dprandp.report.disclosure import epsilon_text, interval_text, number, percent
from dprandp.report.page import table_page
from dprandp.runs.console import duration
from dprandp.runs.directory import OWN_FOLDERS, RunDir, looks_like_a_run
from dprandp.runs.files import from_json, read_record, storage_errors
from dprandp.runs.ledger import combined_ledgers, open_run_ledger
from dprandp.runs.results import ONE_IMAGE, PrivateResult

RESULTS = "results.jsonl"
"""The file of a sweep's results."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run; None where it has nothing to show yet."""

    run: str  # path
    stage: str | None = None  # the last finished one that made a model
    data: str | None = None
    accuracy: float | None = None  # of the test split, like the next three
    accuracy_interval: tuple[float, float] | None = None  # 95 %
    majority_accuracy: float | None = None
    auc: float | None = None
    epsilon: float | None = None  # spent by the whole run, unfinished stages too
    epsilon_total: float | None = None  # its budget
    delta: float | None = None
    private: bool | None = None
    unit: str | None = None  # of privacy
    examples: int | None = None  # N
    seconds: float | None = None  # of all finished stages
    problem: str | None = None  # why the run cannot be read
    ledger_head: str | None = None  # hash of the last line of its ledger
    system: str | None = None  # of a sweep, like the next two
    size: str | None = None
    seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs of a sweep that differ in their seed alone; figures are means over these."""

    system: str
    data: str
    size: str
    epsilon_total: float  # of each run
    epsilon: float  # largest that a run has spent
    delta: float
    private: bool
    seeds: int
    accuracy: float
    accuracy_std: float | None  # sample standard deviation; None for one seed
    majority_accuracy: float
    auc: float | None
    seconds: float
    runs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Together:
    """What runs about the same data have spent in all."""

    runs: tuple[str, ...]
    epsilon: float | None  # upper bound, or inf; None where their ε cannot be composed
    delta: float | None
    method: str  # in words


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Of several runs."""

    runs: list[Row]
    together: list[Together]
    data_unknown: list[str] = field(default_factory=list)  # runs that spent budget and do not say on which data
    exposed: list[str] = field(default_factory=list)  # images that are public in one run and private in another
    groups: list[Group] = field(default_factory=list)  # of the results of a sweep
    notes: list[str] = field(default_factory=list)  # about these results


# ------------------------------------------------------------------------------------------------------------ the rows


def compare(paths: Sequence[Path]) -> Comparison:
    """Runs side by side, or the results of sweeps.

    Raises:
        InputError: one is not there. UsageError: it is no run directory; runs and results.
        CheckpointError: a file of it is damaged, or contradicts another.
    """
    files = [path for path in paths if path.is_file()]
    if files and len(files) < len(paths):
        raise UsageError(
            f"results files such as {files[0]} and run directories cannot be compared with each other",
            fix="give only run directories, or only results files",
        )
    if files:
        return collected(files)
    once = {path.resolve(): path for path in reversed(paths)}
    opened = [RunDir.open(path, create=False) for path in reversed(once.values())]
    return _compared([_row(rundir) for rundir in opened], opened)


def collected(files: Sequence[Path]) -> Comparison:
    """The results of sweeps, from their ``results.jsonl``.

    What private runs have spent, alone and together, is read from the runs where they are still there; a run is known
    by its ledger, not by its path. Of files whose runs are not there, it is what the sweep has written down, and
    nothing is known about runs of several files together.

    Raises:
        CheckpointError: a line is not one of these, or a run is damaged.
    """
    rows: list[Row] = []
    together: list[Together] = []
    exposed: list[str] = []
    notes: list[str] = []
    opened: dict[Path, RunDir] = {}
    for path in files:
        own, stored, public = read_results(path)
        private = [row for row in own if row.private]
        runs = {row.run: _run_of(row, path) for row in private}
        if None in runs.values():
            apart = list({row.ledger_head or row.run: row for row in private}.values())
            together += stored
            together += [each for each in with_lost([], apart, []) if not any(
                len(one.runs) >= len(each.runs) and {*each.runs} <= {*one.runs} for one in stored)]  # fmt: skip
            exposed += public
            notes.append(f"not all runs of {path} are there: what they have spent is what the sweep has written down")
            if len(files) > 1:
                notes[-1] += ", and not what they and those of the other files have spent together"
        else:
            opened |= {run.path.resolve(): run for run in [*runs.values(), *_beside(path, own)]}
            budgets = {name: read_budget(run) for name, run in runs.items()}
            spent = {name: 0.0 if budget is None else budget.spent for name, budget in budgets.items()}
            for place, row in enumerate(own):
                if row.private and spent[row.run] > row.epsilon * (1 + 1e-6):
                    notes.append(f"{row.run} has spent ε = {epsilon_text(spent[row.run])} by now, more than when "
                                 f"{path} was written")  # fmt: skip
                    own[place] = replace(row, epsilon=spent[row.run])
        rows += own
    found = _compared([], list(opened.values()))
    cells: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.accuracy is not None:
            cells.setdefault((row.data, row.system, row.size, row.epsilon_total, row.delta), []).append(row)
    return Comparison(
        runs=rows,
        together=_widest([*together, *found.together]),
        data_unknown=found.data_unknown,
        exposed=list(dict.fromkeys([*exposed, *found.exposed])),
        groups=[_group(each) for each in cells.values()],
        notes=notes,
    )


def _run_of(row: Row, results: Path) -> RunDir | None:
    """The run of a line: beside the file, also where a whole sweep was moved, or where it was made; None if neither.

    Another run may stand in its place, so the ledger must have the line that it ended with when the row was written.
    """
    for path in (results.parent / Path(row.run).name, Path(row.run)):
        if row.ledger_head is not None and (path / "run.json").is_file():
            rundir = RunDir.open(path, create=False)
            ledger = open_run_ledger(rundir)
            if ledger is not None and ledger.includes(row.ledger_head):
                return rundir
    return None


def earlier_rows(path: Path) -> tuple[list[Row], list[Row], list[Together]]:
    """The lines of a ``results.jsonl``, maybe not there; of these, the ones about private runs that are gone; and, if
    there are such, what all had spent then."""
    rows, together, _ = read_results(path) if path.exists() else ([], [], [])
    lost = [row for row in rows if row.private and _run_of(row, path) is None]
    return rows, lost, together if lost else []


GONE = "ε and δ added up, since some of these runs are gone"


def with_lost(rows: Sequence[Row], lost: Sequence[Row], together: Sequence[Together]) -> list[Together]:
    """What private runs that are gone have spent, with those that are there, for each data set that one was about.

    Args:
        rows: of runs that are there. lost: of runs that are not. together: of those that are there.
    """
    found = []
    for name in dict.fromkeys(without_size(row.data) for row in lost):
        gone, there = ([row for row in some if row.private and same_data_name(row.data, name)] for some in (lost, rows))
        names = {row.run for row in there}
        composed = next((each for each in together if names <= {*each.runs}), None)
        parts = [(row.epsilon, row.delta) for row in gone]
        if composed is not None and len(there) > 1:
            parts.append((composed.epsilon, composed.delta))
        else:
            parts += [(row.epsilon, row.delta) for row in there]
        runs = tuple(row.run for row in (*gone, *there))
        if len(runs) > 1 and any(None in part for part in parts):
            found.append(Together(runs=runs, epsilon=None, delta=None, method=f"{GONE}: one says no ε"))
        elif len(runs) > 1:
            epsilon, delta = (math.fsum(values) for values in zip(*parts, strict=True))
            found.append(Together(runs=runs, epsilon=epsilon, delta=delta, method=GONE))
    return found


def _widest(together: Sequence[Together]) -> list[Together]:
    """Without what runs have spent that are counted with others, too: whoever reads one line reads the largest ε."""
    counts = [Counter(each.runs) for each in together]
    return [
        each for each, count in zip(together, counts, strict=True)
        if not any(count < more for other, more in zip(together, counts, strict=True) if other.epsilon is not None)
    ]  # fmt: skip


def _beside(results: Path, rows: Sequence[Row]) -> list[RunDir]:
    """Private runs in a sweep's folder that have no line in its results: of an earlier sweep, or not finished."""
    listed = {Path(row.run).name for row in rows}
    found = [RunDir.open(path, create=False) for path in sorted(results.parent.iterdir())
             if path.name not in listed and looks_like_a_run(path)]  # fmt: skip
    return [run for run in found if (budget := read_budget(run)) is not None and budget.private]


def read_results(path: Path) -> tuple[list[Row], list[Together], list[str]]:
    """The lines of a ``results.jsonl``: runs, what they had spent together, images both public and private."""
    rows: list[Row] = []
    together: list[Together] = []
    exposed: list[str] = []
    with storage_errors(path, "read"):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for place, line in enumerate(lines, 1):
        try:
            entry = from_json(line)
            if isinstance(entry, dict) and "together" in entry:
                together.append(read_record(Together, entry["together"]))
            elif isinstance(entry, dict) and "exposed" in entry:
                exposed.append(str(entry["exposed"]))
            else:
                rows.append(read_record(Row, entry))
        except ValueError as error:
            raise CheckpointError(
                f"{path} is no valid results file of a sweep: line {place}: {error}",
                fix="run the same `dprandp sweep` again: it writes the file from the runs",
            ) from error
    return rows, together, exposed


def _group(rows: Sequence[Row]) -> Group:
    def mean(name: str) -> float | None:
        values = [getattr(row, name) for row in rows]
        return None if None in values else statistics.fmean(values)

    first, accuracies = rows[0], [row.accuracy for row in rows]
    return Group(
        **{name: getattr(first, name) for name in ("system", "data", "size", "epsilon_total", "delta", "private")},
        epsilon=max(row.epsilon for row in rows),
        runs=tuple(row.run for row in rows),
        seeds=len(rows),
        accuracy_std=statistics.stdev(accuracies) if len(rows) > 1 else None,
        **{name: mean(name) for name in ("accuracy", "majority_accuracy", "auc", "seconds")},
    )


def runs_in(folder: Path) -> Comparison:
    """The runs below a folder, at any depth, by name. One that cannot be read is listed with the reason, and one that
    the results of a sweep name there, and that is gone, in a note.

    Raises:
        InputError: there is no such folder, or no run in it.
    """
    found = [folder] if looks_like_a_run(folder) else []
    files: list[Path] = []

    def unreadable(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise InputError(
                f"{error.filename} cannot be read, so it is unknown which runs are in it", fix="correct its permissions"
            ) from error

    for path, folders, _ in os.walk(folder, onerror=unreadable):
        found += [Path(path, name) for name in folders if looks_like_a_run(Path(path, name))]
        if (results := Path(path, RESULTS)).is_file():
            files.append(results)
        if looks_like_a_run(Path(path)):
            folders[:] = [name for name in folders if name not in OWN_FOLDERS]
    found.sort()
    if not found:
        what = "no run below it" if folder.is_dir() else "no folder"
        raise InputError(f"{folder}: there is {what}", fix="name the folder that holds run directories, such as runs")
    rows, opened = [], []
    for path in found:
        try:
            rundir = RunDir.open(path, create=False)
            rows.append(_row(rundir))
            opened.append(rundir)
        except DprandpError as error:
            rows.append(Row(run=str(path), problem=error.problem))
    made = _compared(rows, opened)
    for file in files:
        try:
            _, lost, together = earlier_rows(file)
        except CheckpointError as error:
            made = replace(made, notes=[*made.notes, f"runs that are gone are not counted: {error.problem}"])
            continue
        beside = [row for row in rows if file.parent in Path(row.run).parents]
        gone = with_lost(beside, lost, [*made.together, *together])
        notes = [f"{row.run}, which had spent ε = {epsilon_text(row.epsilon)} by {file}, is gone" for row in lost]
        made = replace(made, together=_widest([*made.together, *gone]), notes=[*made.notes, *notes])
    return made


def _row(rundir: RunDir) -> Row:
    results, budget = rundir.results(), read_budget(rundir)
    states = {row.stage: row.state for row in rundir.status()}
    models = {stage: result for stage, result in results.items() if isinstance(result, PrivateResult)}
    fresh = [stage for stage in models if states[stage] == "done"]
    spent = {} if budget is None else {
        "data": public_data_name(budget.data), "epsilon": budget.spent, "epsilon_total": budget.epsilon,
        "delta": budget.delta, "private": budget.private, "unit": budget.unit, "examples": budget.examples,
        "ledger_head": rundir.ledger_head,
    }  # fmt: skip
    seconds = math.fsum(result.seconds for result in results.values()) if results else None
    if not models:
        return Row(run=str(rundir.path), seconds=seconds, **spent)
    stage = (fresh or list(models))[-1]
    made = models[stage]
    return Row(
        run=str(rundir.path),
        stage=stage,
        accuracy=made.accuracy,
        accuracy_interval=made.interval("accuracy"),
        majority_accuracy=made.majority_accuracy,
        auc=made.auc,
        seconds=seconds,
        **spent,
    )


# --------------------------------------------------------------------------------------------- several runs, one budget


@dataclass(frozen=True)
class _Spent:
    """A run that has charged something."""

    run: str
    ledger: Ledger
    delta: float
    unit: str
    name: str  # of the data
    data: str  # hash of everything in order
    images: frozenset[bytes]
    units: dict[bytes, frozenset[int]] | None  # ``units_of``

    def protects_alike(self, other: _Spent) -> bool:
        """Whether all that a unit of one run has in both is one unit of the other: then their ε can be composed."""
        if ONE_IMAGE in (self.unit, other.unit):
            return self.unit == other.unit
        if self.data == other.data:
            return True
        if self.units is None or other.units is None:
            return False
        pairs = {
            (own, theirs)
            for digest in self.units.keys() & other.units.keys()
            for own in self.units[digest]
            for theirs in other.units[digest]
        }
        return len(pairs) == len({own for own, _ in pairs}) == len({theirs for _, theirs in pairs})


def _compared(rows: list[Row], opened: Sequence[RunDir]) -> Comparison:
    spent, unknown = [], []
    for rundir in opened:
        budget, ledger, hashes = read_budget(rundir), open_run_ledger(rundir), hashes_of(rundir)
        if budget is None or ledger is None or not ledger.events():
            continue
        if hashes is None:
            unknown.append(str(rundir.path))
        else:
            facts = ledger, budget.delta, budget.unit, budget.data
            spent.append(_Spent(str(rundir.path), *facts, *hashes, units_of(rundir)))
    together = []
    for same in _by_images(spent):
        # other labels, sizes and colours, or another order, make no other records; other units do
        by_records: list[list[_Spent]] = []
        for each in same:
            fitting = (parts for parts in by_records if all(each.protects_alike(other) for other in parts))
            if (parts := next(fitting, None)) is None:
                by_records.append([each])
            else:
                parts.append(each)
        together += [_together(parts) for parts in by_records if len(parts) > 1]
        if len(by_records) > 1:
            names = tuple(each.run for each in same)
            units = ", ".join(sorted({each.unit for each in same}))
            kinds = f"different units of privacy, or with other units ({units})"
            method = f"the same images under {kinds}, whose ε cannot be composed"
            together.append(Together(runs=names, epsilon=None, delta=None, method=method))
    exposed = [
        f"{rundir.path} has used images as public data that are private in {each.run}"
        for rundir in opened
        for each in spent
        if not public_images(rundir).isdisjoint(each.images)
    ]
    return Comparison(runs=rows, together=together, data_unknown=unknown, exposed=exposed)


def _by_images(spent: Sequence[_Spent]) -> list[list[_Spent]]:
    """Runs that have images in common, with each other or by way of a third; MedMNIST's have some in every size."""
    groups: list[list[_Spent]] = []

    def alike(one: _Spent, other: _Spent) -> bool:
        known = ":" not in one.name and without_size(one.name) == without_size(other.name)
        return known or not one.images.isdisjoint(other.images)

    for each in spent:
        near = [group for group in groups if any(alike(each, other) for other in group)]
        groups = [group for group in groups if group not in near]
        groups.append([other for group in near for other in group] + [each])
    return groups


def _together(parts: Sequence[_Spent]) -> Together:
    found = combined_ledgers([(each.ledger, each.delta) for each in parts])
    return Together(runs=tuple(each.run for each in parts), **vars(found))


# -------------------------------------------------------------------------------------------------------------- output

GROUP_HEAD = (
    "system", "data", "size", "test accuracy", "seeds", "most frequent class", "ε of each run", "δ", "time of each",
)  # fmt: skip
HEAD = ("run", "stage", "data", "test accuracy", "95 % interval", "most frequent class", "ε", "δ", "time")


def _cells(row: Row) -> tuple[str, ...]:
    if row.problem is not None:
        return row.run, "cannot be read", *["–"] * (len(HEAD) - 2)
    spent = "–" if row.epsilon is None else f"{epsilon_text(row.epsilon)} of {number(row.epsilon_total)}"
    if row.private is False:
        spent = "NOT PRIVATE"
    return (
        row.run,
        row.stage or "no model",
        row.data or "–",
        "–" if row.accuracy is None else percent(row.accuracy).replace("\u00a0", " "),
        interval_text(row.accuracy_interval),
        "–" if row.majority_accuracy is None else percent(row.majority_accuracy).replace("\u00a0", " "),
        spent,
        "–" if row.delta is None else number(row.delta),
        "–" if row.seconds is None else duration(row.seconds),
    )


def _mean_accuracy(group: Group) -> str:
    """In per cent, with the deviation over seeds where there are several."""
    spread = "" if group.accuracy_std is None else f" ± {100 * group.accuracy_std:.1f}"
    return f"{100 * group.accuracy:.1f}{spread}"


def _seeds_of(groups: Sequence[Group]) -> list[str]:
    """What the figures of a table by ε are, in words; nothing without groups."""
    seeds = sorted({group.seeds for group in groups})
    counts = " to ".join(str(each) for each in sorted({seeds[0], seeds[-1]})) if seeds else ""
    return [f"test accuracy in %, mean ± sample standard deviation, seeds: {counts}"] if seeds else []


def _group_cells(group: Group) -> tuple[str, ...]:
    accuracy = _mean_accuracy(group)
    spent = f"{epsilon_text(group.epsilon)} of {number(group.epsilon_total)}" if group.private else "NOT PRIVATE"
    frequent = f"{100 * group.majority_accuracy:.1f} %"
    return (group.system, group.data, group.size, f"{accuracy} %", str(group.seeds), frequent, spent,
            number(group.delta), duration(group.seconds))  # fmt: skip


def _table(found: Comparison) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and rows."""
    if found.groups:
        return GROUP_HEAD, [_group_cells(group) for group in found.groups]
    return HEAD, [_cells(row) for row in found.runs]


MOST_NAMES = 6


def _names(runs: Sequence[str]) -> str:
    names = [name if times == 1 else f"{name} ({times} times)" for name, times in Counter(runs).items()]
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more


def warnings(found: Comparison) -> list[str]:
    """What must be said beside the table."""
    said = [f"{row.run} cannot be read: {row.problem}" for row in found.runs if row.problem is not None]
    for each in found.together:
        names = _names(each.runs)
        if each.epsilon is None:
            said.append(f"{names} are about {each.method}")
        else:
            total = f"ε = {epsilon_text(each.epsilon)} at δ = {number(each.delta)}"
            said.append(f"{names} are about the same data: together they have spent {total} ({each.method})")
    for run in found.data_unknown:
        said.append(f"{run} has no private/training-images.npy, so it is unknown which other runs are about its images")
    return said + found.exposed + found.notes


def lines(found: Comparison) -> str:
    """The comparison for people."""
    head, cells = _table(found)
    table = [head, *cells]
    widths = [max(len(row[column]) for row in table) for column in range(len(head))]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join([*rows, *(f"warning: {text}" for text in warnings(found))])


CSV_COLUMNS = (
    "run", "stage", "data", "accuracy", "accuracy_low", "accuracy_high", "majority_accuracy", "auc", "epsilon",
    "epsilon_total", "delta", "private", "unit", "examples", "seconds", "together_epsilon", "together_delta",
)  # fmt: skip


def as_csv(found: Comparison) -> str:
    """A line for each run (``together_…``: of all runs about its data, empty where there is no other), or for each
    group of a sweep."""
    text = io.StringIO()
    if found.groups:
        names = [each.name for each in fields(Group) if each.name != "runs"]
        writer = csv.DictWriter(text, [*names, *CSV_COLUMNS[-2:]], lineterminator="\n")
        writer.writeheader()
        for group in found.groups:
            writer.writerow({name: getattr(group, name) for name in names} | _shared(found, group.runs))
        return text.getvalue()
    writer = csv.DictWriter(text, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in found.runs:
        low, high = row.accuracy_interval or (None, None)
        values = {name: getattr(row, name) for name in CSV_COLUMNS if hasattr(row, name)}
        writer.writerow(values | {"accuracy_low": low, "accuracy_high": high} | _shared(found, [row.run]))
    return text.getvalue()


def _shared(found: Comparison, runs: Sequence[str]) -> dict[str, float]:
    """The columns ``together_…`` of some runs; none where no other run is about their data."""
    names = {Path(run).resolve() for run in runs}
    for each in found.together:
        if each.epsilon is not None and not names.isdisjoint(Path(run).resolve() for run in each.runs):
            return {"together_epsilon": each.epsilon, "together_delta": each.delta}
    return {}


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "ε": r"$\varepsilon$", "δ": r"$\delta$", "∞": r"$\infty$",
    "–": "--", "μ": r"$\mu$", "σ": r"$\sigma$", "é": r"\'e", "±": r"$\pm$",
}  # fmt: skip


def _by_epsilon(groups: Sequence[Group]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and rows of a table with a column of accuracies for each ε, as papers print it."""
    budgets = sorted({group.epsilon_total for group in groups})
    head = ("system", "data", "size", *(f"ε = {number(each)}" for each in budgets))
    found: dict[tuple[str, str, str], dict[float, list[str]]] = {}
    for group in groups:
        row = found.setdefault((group.system, group.data, group.size), {})
        row.setdefault(group.epsilon_total, []).append(_mean_accuracy(group))
    return head, [(*names, *(" / ".join(row.get(each, ["–"])) for each in budgets)) for names, row in found.items()]


def as_latex(found: Comparison) -> str:
    """A ``tabular`` without packages, of a sweep with a column for each ε; the warnings follow as comments."""

    def plain(text: str) -> str:
        return "".join(_LATEX.get(letter, letter) for letter in text)

    head, cells = _by_epsilon(found.groups) if found.groups else _table(found)
    rows = [" & ".join(map(plain, row)) + r" \\" for row in (head, *cells)]
    table = [r"\begin{tabular}{" + "l" * len(head) + "}", r"\hline", rows[0], r"\hline", *rows[1:], r"\hline"]
    said = [*_seeds_of(found.groups), *warnings(found)]
    return "\n".join([*table, r"\end{tabular}", *(f"% {' '.join(text.split())}" for text in said)]) + "\n"


def as_html(found: Comparison) -> str:
    """A page of its own, with the style of the report."""
    return table_page(*_table(found), warnings(found))


def refuse_existing(*files: Path | None, overwrite: bool) -> None:
    """Raise UsageError for a file that would be replaced unasked."""
    for path in files:
        if path is not None and path.exists() and not overwrite:
            raise UsageError(f"{path} exists", fix="give another name, or --overwrite")
