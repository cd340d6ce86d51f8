"""report.html: accuracy and privacy of a run, and their meaning, on one page, from the run's public files.

``page.html.j2`` lays out and escapes what this module computes. The page is self-contained: its style, drawings and
pictures are inside. It runs no script and loads nothing, and its content security policy forbids both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from dprandp import __version__
from dprandp.config import toml
from dprandp.config.schema import public_data_name
from dprandp.report.card import MOST_CLASSES
from dprandp.report.disclosure import (
    class_figures,
    disclosure,
    epsilon_text,
    figures,
    interval_text,
    model_warnings,
    number,
    percent,
    privacy_sentence,
    why_not_private,
)
from dprandp.report.figures import accuracy_points, curve, heat_picture, preview_image
from dprandp.report.run import Measured, Run, changed_settings, commands, published, read_run
from dprandp.runs import faults
from dprandp.runs.console import duration
from dprandp.runs.directory import OPTIONAL_STAGES, PRIVATE_STAGES, REPORT, RunDir
from dprandp.runs.files import atomic_write
from dprandp.runs.results import (
    ContinueResult,
    GenerateResult,
    PretrainResult,
    PrivateResult,
    ProbeResult,
    StageResult,
)

TABLE_CLASSES = 20
"""Most classes of a confusion matrix that is shown as a table."""

WORST_CONFUSIONS = 10

PHASES = {
    "generate": "synthetic images",
    "pretrain": "feature extractor",
    "continue": "public, then private steps on the extractor",
    "probe": "private head",
    "finetune": "private fine-tune",
}

CURVES = {
    "loss": ("loss", "loss on synthetic images"),
    "similarity": ("similarity", "mean projection of whitened synthetic patches on their dictionary atom"),
    "knn_accuracy": ("accuracy", "held-out synthetic images recognised by the nearest neighbour of another crop"),
    "linear_accuracy": ("accuracy", "held-out synthetic images recognised by a linear classifier of another crop"),
    "alignment": ("distance²", "alignment: mean squared distance of two crops of a held-out synthetic image"),
    "uniformity": ("log mean", "uniformity of held-out synthetic images on the sphere; lower is more spread"),
    "effective_rank": ("rank", "effective rank of the features of held-out synthetic images"),
    "public_loss": ("loss", "loss of held-out public images"),
    "slowdown": ("ratio", "the decelerator over the other terms, on public images"),
}
"""Quantities of metrics.jsonl that are shown, all of them public -> label of the axis, meaning."""


def write(rundir: RunDir) -> Path:
    """Write ``report.html`` into the run directory, and return its path.

    Raises:
        InputError: no stage is finished; the fix is the command to run.
        CheckpointError: a file of the run is corrupt, or a result lacks what must be disclosed.
        StorageError: the disk refuses.
    """
    path = rundir.path / REPORT
    atomic_write(path, page(read_run(rundir)))
    faults.point("report-written")
    return path


def page(run: Run) -> str:
    """The page of a run."""
    result, reason = run.final, not_private_reason(run)
    values: dict[str, Any] = {}
    if result is not None:
        classes = result.classes
        shown_as_table = len(classes) <= TABLE_CLASSES and result.confusion is not None
        values = {
            "data": public_data_name(result.data),
            "notes": _notes(run, result),
            "warnings": model_warnings(result),
            "interval": interval_text(result.interval("accuracy")),
            "figures": figures(result),
            "class_figures": class_figures(result)[: 1 + MOST_CLASSES],
            "meaning": privacy_sentence(result, run.spending.epsilon),
            "matrix": _matrix(result) if shown_as_table else None,
        }
        if not shown_as_table and result.confusion is not None:
            title = f"Confusion matrix of {len(classes)} classes"
            values["heat"] = heat_picture("confusion", result.confusion, title)
            values["confusions"] = _worst_confusions(result)
    preview, filters = None, None
    if run.preview is not None:
        title = f"Contact sheet of synthetic images of the process {run.results['generate'].process}"
        preview = preview_image(run.preview, title)
    if run.filters is not None:
        filters = preview_image(run.filters, "The filters of the extractor's first layer, as coloured tiles", "PNG")
    environment = run.environment | {f"device of {stage}": run.results[stage].device for stage in run.private_stages}
    return _TEMPLATES.get_template("page.html.j2").render(
        run=run,
        spent=run.spending,
        result=result,
        reason=reason,
        rows=[row for row in run.rows if row.state != "missing" or row.stage not in _not_planned(run)],
        preview=preview,
        filters=filters,
        by_epsilon=_accuracy_by_epsilon(run),
        curves=_curves(run),
        marks=_marks(run),
        audited=[(found.name, found) for found in run.audit.mechanisms] if run.audit else [],
        facts=_facts(run),
        environment=list(environment.items()),
        commands=commands(run.name, run.rows),
        **values,
    )


def _not_planned(run: Run) -> tuple[str, ...]:
    """Stages that a finished run may lack."""
    probe = run.results.get("probe")
    whole = isinstance(probe, ProbeResult) and probe.share == 1
    return (*OPTIONAL_STAGES, "finetune") if whole else OPTIONAL_STAGES


def table_page(head: Sequence[str], rows: Sequence[Sequence[str]], warnings: Sequence[str]) -> str:
    """A page with a table of runs, and what must be said beside it."""
    return _TEMPLATES.get_template("compare.html.j2").render(head=head, rows=rows, warnings=warnings)


def not_private_reason(run: Run) -> str | None:
    """Why the run's result is not private; None if it is."""
    if run.final is not None and (reason := why_not_private(run.final)) is not None:
        return reason
    if math.isinf(run.spending.epsilon):
        return "The ledger holds steps without noise (ε = ∞): there is no guarantee at all."
    if run.spending.insecure:
        return "The ledger holds steps whose noise came from a seed (--insecure-seed), so the computed ε is void."
    return None


def _notes(run: Run, result: PrivateResult) -> list[str]:
    notes = []
    row = run.row(result.stage)
    if row.state == "stale":
        notes.append(
            f"Stage {result.stage} is stale: {'; '.join(row.reasons)}. The public stages shown below may not be "
            "those it was made from."
        )
    begun = [row.stage for row in run.rows if row.stage in PRIVATE_STAGES and row.state == "partial"]
    if begun:
        notes.append(f"Stage {begun[-1]} was begun but is not finished.")
    if run.spending.unfinished:
        notes.append(
            f"ε counts the whole ledger, including steps that no finished stage reports: "
            f"{epsilon_text(run.spending.epsilon)} instead of {epsilon_text(result.epsilon)}."
        )
    return notes


def _curves(run: Run) -> list[tuple[str, Markup]]:
    """Titles and drawings of the public quantities with two values or more."""
    drawn = []
    for stage, lines in run.metrics.items():
        lines = [line for line in lines if _is_number(line.get("step"))]
        for key, (label, meaning) in CURVES.items():
            points = [(line["step"], line[key] if _is_number(line[key]) else None) for line in lines if key in line]
            if sum(value is not None for _, value in points) > 1:
                title = f"{stage}: {meaning}"
                steps, values = zip(*points, strict=True)
                drawn.append((title, curve(f"{stage}-{key}", steps, values, title=title, label=label)))
    return drawn


def _accuracy_by_epsilon(run: Run) -> Markup | None:
    """Test accuracy against ε, of the private stages and of the runs beside this one; None for a single point."""
    results = [run.results[stage] for stage in run.private_stages if math.isfinite(run.results[stage].epsilon)]
    own = [Measured(each.stage, each.epsilon, each.accuracy, each.interval("accuracy")) for each in results]
    others = run.others.measured if run.others else ()
    return accuracy_points("accuracy", own, others) if len(own) + len(others) > 1 else None


PARTS = {
    "tune": "private tuning", "continue": "continue", "probe": "probe", "finetune": "fine-tune",
    "finetune.head": "refit of the head", "lost": "lost to crashes, restarts and unfinished stages", "left": "left",
}  # fmt: skip
"""Parts of the budget's bar, in words."""


def _marks(run: Run) -> list[tuple[str, str, float, float, float]]:
    """The parts of the budget's bar: style, name, ε before and after, width in %. Nothing without a finite budget."""
    spent, total = run.spending, run.spending.total
    if total is None or math.inf in (total, spent.epsilon):
        return []
    marks, before = [], 0.0
    for name, epsilon in (*spent.parts, ("lost", spent.epsilon), ("left", total)):
        if epsilon > before * (1 + 1e-6):
            style, width = name.replace(".", "-"), 100 * (epsilon - before) / max(total, spent.epsilon)
            marks.append((style, PARTS.get(name, name), before, epsilon, width))
            before = epsilon
    return marks


def _matrix(result: PrivateResult) -> list[tuple[str, list[tuple[int, float]], str, int]]:
    """Rows of the confusion matrix: class, (count, share of the class) of each predicted one, recall, number."""
    rows = []
    for true, (name, counts) in enumerate(zip(result.classes, result.confusion, strict=True)):
        total = sum(counts)
        cells = [(count, count / total if total else 0.0) for count in counts]
        rows.append((name, cells, percent(cells[true][1]) if total else "–", true))
    return rows


def _worst_confusions(result: PrivateResult) -> list[tuple[str, str, int, str]]:
    """True class, predicted class, images, share of the class of the largest shares."""
    classes = result.classes
    wrong = [
        (count / sum(counts), count, classes[true], classes[predicted])
        for true, counts in enumerate(result.confusion)
        for predicted, count in enumerate(counts)
        if true != predicted and count
    ]
    worst = sorted(wrong, reverse=True)[:WORST_CONFUSIONS]
    return [(true, predicted, count, percent(share)) for share, count, true, predicted in worst]


def _facts(run: Run) -> list[tuple[str, list[str]]]:
    """The disclosure of all private stages: label, and a value for each stage or one for all."""
    columns = [
        disclosure(run.results[stage], run.results.get("pretrain"), run.results.get("generate"),
                   None if stage == "continue" else run.results.get("continue"),
                   changed=changed_settings(run.row(stage)))
        for stage in run.private_stages
    ]  # fmt: skip
    facts = []
    for same_label in zip(*columns, strict=True):
        values = [value for _, value in same_label]
        facts.append((same_label[0][0], values[:1] if len(set(values)) == 1 else values))
    if facts and run.spending.opinions:
        said = f"for the run's ledger, with parameters fixed beforehand: {'; '.join(run.spending.opinions)}"
        facts.append(("Other accountants", [said]))
    return facts


def _outcome(result: StageResult) -> str:
    """The result of a stage in a line."""
    if isinstance(result, GenerateResult):
        return f"{result.count} images of {result.process}, {result.resolution} px"
    if isinstance(result, PretrainResult):
        learned = "random" if result.random_init else "learned"
        if result.prior:
            learned = f"the shipped prior {result.prior}"
        if result.init_sha256:
            learned = "public weights from a file"
        said = f"{result.arch}, {learned}, {number(result.feature_dim)} features"
        if result.knn_accuracy is not None:
            said += f", k-NN {percent(result.knn_accuracy)} on synthetic classes"
        if _is_number(result.effective_rank):
            said += f", effective rank {number(round(result.effective_rank))}"
        return said + ("" if result.grey is None else " (of the extractor for colour; grey data have their own)")
    before = ""
    if isinstance(result, ContinueResult):
        public = result.public_training
        before = f"{result.arch}; {public.steps} steps on {public.images}; {public.switch}; "
        if not isinstance(result, PrivateResult):
            return before + "nothing private was read"
    privacy = f"ε = {epsilon_text(result.epsilon)}" if result.private else "NOT PRIVATE"
    area = f"mean AUC {result.auc:.3f}, " if result.multi_label and result.auc is not None else ""
    return f"{before}{area}test accuracy {percent(result.accuracy)}, {privacy}, {result.steps} steps"


def _moment(stamp: str) -> str:
    """``2026-03-01T00:00:00+00:00`` as ``2026-03-01``."""
    return f"{datetime.fromisoformat(stamp).astimezone(UTC):%Y-%m-%d}"


def _power(value: float) -> Markup:
    """``1e-05`` as 10⁻⁵."""
    if value >= 0.01:
        return Markup("<span>{}</span>").format(number(value))
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    factor = "" if float(mantissa) == 1 else f"{float(mantissa):g}·"
    return Markup("<span>{}10<sup>−{}</sup></span>").format(factor, abs(int(exponent)))


def _is_number(value: object) -> bool:
    """Whether a value is a finite number, and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("dprandp.report", "."),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters |= {
    "changed": changed_settings,
    "duration": duration,
    "epsilon": epsilon_text,
    "moment": _moment,
    "number": number,
    "outcome": _outcome,
    "percent": percent,
    "power": _power,
    "toml": lambda config: toml.dumps({key: published(key, value) for key, value in config.items()}),
}
_TEMPLATES.tests["finite"] = _is_number
_TEMPLATES.globals |= {"infinity": math.inf, "phases": PHASES, "version": __version__}
