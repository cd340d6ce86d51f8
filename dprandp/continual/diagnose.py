"""``diagnose``: the cost of privacy in a step of ``continue``, estimated on public images before anything is charged.

    diagnose/terms.json   the loss terms along the public training, what they mean, the plan that they are for
    diagnose/terms.png    the three terms and the loss of held-out public images, over the steps

It runs the public half of ``continue`` in memory, with the same extractor, images, steps and seed, and estimates the
loss terms of a private step (``switching.py``) at every evaluation. σ and B are those of the plan of ``continue``.
Only the declared facts of the private data are used, except that a public set of as many images is compared with them,
and refused if equal. Nothing is charged.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dprandp.config.schema import ContinueConfig, as_dict
from dprandp.continual import open_stage, switching
from dprandp.continual.public import make_task, make_training
from dprandp.continual.switching import LossTerms
from dprandp.errors import UsageError
from dprandp.runs.context import Context, with_precision
from dprandp.runs.files import atomic_path, atomic_write, to_json
from dprandp.runs.signals import graceful_stop

STAGE = "diagnose"
ENOUGH = 2.0
"""Largest B/B* or B*/B at which the batch is called about right: a factor of two changes a step little."""

TERMS = {
    "along_gradient": ("GᵀHG: curvature", "#1b9e77"),
    "sampling": ("tr(HΣ)/B: the batch", "#1f6fb5"),
    "decelerator": ("σ² tr(H)/(c²B²): privacy", "#d95f02"),
}


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """terms.json."""

    stage: str
    data: str
    arch: str
    images: str  # public ones, in words
    epsilon: float  # of the plan
    noise_multiplier: float  # σ
    batch: float  # B, expected
    private_steps: int  # at most
    config: dict[str, Any]  # settings of ``continue``
    terms: list[dict[str, float]]  # at each look: step, loss, and ``LossTerms.to_dict``
    rules: dict[str, int | None]  # rule -> step at which it would begin private steps; None: not before the latest
    latest: int  # step
    meaning: list[str]  # sentences
    seconds: float


def draw(result: Diagnosis, path: Path) -> None:
    """Draw the result of ``diagnose.run`` as a PNG file.

    Raises:
        StorageError: the disk refuses.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [row["step"] for row in result.terms]
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for name, (label, colour) in TERMS.items():  # negative estimates are gaps on a logarithmic scale
        values = [row[name] if row[name] > 0 else math.nan for row in result.terms]
        left.plot(steps, values, color=colour, label=label, marker="o", markersize=3)
    left.set_yscale("log")
    left.set_title("terms of the denominator of ΔL*", fontsize=10)
    left.legend(fontsize=8)
    right.plot(steps, [row["loss"] for row in result.terms], color="#1c2127", marker="o", markersize=3)
    right.set_title("loss of held-out public images", fontsize=10)
    for rule, step in result.rules.items():
        if step is not None:
            for axes in (left, right):
                axes.axvline(step, color="#7570b3", linewidth=0.8, linestyle="--" if rule == "plateau" else ":")
            right.annotate(f"{rule}: {step}", (step, 0.02 + 0.08 * (rule == "plateau")), fontsize=8,
                           xycoords=("data", "axes fraction"))  # fmt: skip
    for axes in (left, right):
        axes.set_xlabel("public steps")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def run(config: ContinueConfig, context: Context) -> Diagnosis:
    """Train on the public images up to the latest switch, and estimate the loss terms on the way.

    Raises:
        As ``continue`` before it reads private data; UsageError: no private step is wanted.
    """
    if config.mix in ("public", "private"):
        raise UsageError(
            f"mix = {config.mix!r} has no switch to diagnose", fix="give --mix step, cosine or ratio"
        )
    stage = open_stage(config, context, write=False)
    task = make_task(config, context, stage.spec)
    started = time.perf_counter()
    decided = with_precision("continue", config, context)
    training, built_from = make_training(decided, context, stage.spec, task)
    plan = stage.plan
    rows: list[dict[str, float]] = []
    found: list[LossTerms] = []
    last = max(config.check_every, switching.latest_switch(config))
    with graceful_stop() as stop, context.console.progress(last, "public steps") as progress:
        for step in range(last + 1):
            if step % config.check_every == 0 or step == last:
                terms = training.terms(step, plan.noise_multiplier, plan.expected_batch)
                found.append(terms)
                rows.append({"step": step, "loss": training.held_out_loss(), **terms.to_dict()})
            if step < last:
                training.update(training.public_gradient(step), config.public_lr)
                progress.advance(1)
            stop.raise_if_requested()
    rules = _rules(config, rows)
    result = Diagnosis(
        stage=STAGE,
        data=stage.spec.name,
        arch=built_from.arch,
        images=task.title,
        epsilon=plan.epsilon_target,
        noise_multiplier=plan.noise_multiplier,
        batch=plan.expected_batch,
        private_steps=plan.steps,
        config=as_dict(config),
        terms=rows,
        rules=rules,
        latest=switching.latest_switch(config),
        meaning=meaning(found, [row["step"] for row in rows], rules),
        seconds=round(time.perf_counter() - started, 2),
    )
    folder = context.rundir.path / STAGE
    folder.mkdir(exist_ok=True)
    draw(result, folder / "terms.png")
    atomic_write(folder / "terms.json", to_json(result, indent=1) + "\n")
    return result


def meaning(found: list[LossTerms], steps: list[int], rules: dict[str, int | None]) -> list[str]:
    """The meaning of the terms (at least one) after these steps, in sentences; ``rules`` as in ``run``."""
    if found[0].noise_multiplier == 0:
        return ["There is no noise (ε = ∞), so privacy costs nothing: the decelerator is 0."]
    said = [_cost(found[0], f"After {steps[0]} public steps")]
    if len(found) > 1:
        said.append(_cost(found[-1], f"After {steps[-1]}"))
    first, last = found[0].slowdown, found[-1].slowdown
    if len(found) > 1 and first > 0 and last > 0:
        if last < first / ENOUGH:
            said.append(f"Public steps make private ones cheaper: the ratio has fallen {first / last:.3g} times.")
        else:
            said.append("Public steps have not made private ones much cheaper on these images.")
    for rule in ("decelerator", "plateau"):
        when = "before the latest step" if rules[rule] is None else f"at step {rules[rule]}"
        said.append(f"--switch {rule} would {'not ' if rules[rule] is None else ''}begin private steps {when}.")
    said.append(_batch(found[-1]))
    said.append(
        "The terms are those of gradient descent, to second order, with this σ: another batch size or number of steps "
        "has another σ, and AdamW another metric. They compare steps of one training and do not predict accuracy."
    )
    return said


def line(result: Diagnosis) -> str:
    """The result for people."""
    names = ("GᵀHG", "tr(HΣ)/B", "privacy", "ratio", "B*", "ΔL*")
    head = f"{'step':>6} {'loss':>8}" + "".join(f" {name:>10}" for name in names)
    lines = [
        f"diagnose: {result.arch} on {result.images}; σ = {result.noise_multiplier:.4g}, "
        f"B = {result.batch:.4g}, at most {result.private_steps} private steps",
        head,
    ]
    for row in result.terms:
        shown = [row[name] for name in (*TERMS, "slowdown", "best_batch")]
        numbers = "".join(f" {value:>10.3g}" for value in shown)
        lines.append(f"{row['step']:>6} {row['loss']:>8.4f}{numbers} {row['improvement']:>10.2g}")
    return "\n".join([*lines, *result.meaning])


def _rules(config: ContinueConfig, rows: list[dict[str, float]]) -> dict[str, int | None]:
    """The step at which each rule would begin private steps; None if not before the latest step."""
    looks = [switching.Look(row["step"], row["loss"], row["slowdown"]) for row in rows]
    found: dict[str, int | None] = dict.fromkeys(("plateau", "decelerator"))
    for count, look in enumerate(looks, 1):
        if look.step >= switching.latest_switch(config):
            break
        if found["plateau"] is None and switching.plateau([seen.loss for seen in looks[:count]]):
            found["plateau"] = look.step
        if found["decelerator"] is None and switching.few(looks[:count]):
            found["decelerator"] = look.step
    return found


def _cost(terms: LossTerms, when: str) -> str:
    ratio = terms.slowdown
    if math.isnan(ratio):
        return (
            f"{when} the estimated curvature is not positive (GᵀHG = {terms.along_gradient:.3g}, tr(H) = "
            f"{terms.trace:.3g}), so the second-order estimate is not valid."
        )
    return (
        f"{when} privacy's term is {ratio:.3g} times the other two: a private step can lower the loss by "
        f"{100 / (1 + ratio):.3g} % of what the same step without noise could."
    )


def _batch(terms: LossTerms) -> str:
    best, batch = terms.best_batch, terms.batch
    if math.isnan(best):
        return "There is no estimate of the best batch size where a curvature is not positive."
    if best > ENOUGH * batch:
        return (
            f"B* = {best:.3g} for this σ, above the planned B = {batch:.4g}: noise dominates, and a larger "
            "--batch-size improves each step."
        )
    if best < batch / ENOUGH:
        return f"B* = {best:.3g} for this σ, below the planned B = {batch:.4g}: the batch is larger than necessary."
    return f"B* = {best:.3g} for this σ: the planned B = {batch:.4g} is about right."
