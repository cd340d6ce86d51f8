"""Answers that train nothing: status, the account calculator, the list of data sets, and ``--plan``."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dprandp.config import StageConfig
from dprandp.datasets import check_data, list_datasets, open_dataset
from dprandp.privacy.accounting import GaussianEvent, calibrate, compose
from dprandp.privacy.gaussian_dp import equivalent_mu
from dprandp.privacy.group import compose_group
from dprandp.rundir import RunDir
from dprandp.stages import finetune
from dprandp.stages.budget import read_budget
from dprandp.stages.context import Context
from dprandp.stages.private import open_private_stage


def status(rundir: RunDir) -> dict[str, Any]:
    """Stage table and budget of a run.

    Returns:
        run (path), stages (rows of ``RunDir.status``), budget (epsilon, delta, spent, private) or None.
    """
    return {"run": str(rundir.path), "stages": rundir.status(), "budget": read_budget(rundir)}


def status_lines(table: dict[str, Any]) -> str:
    """``status`` for people."""
    lines = [f"run {table['run']}"]
    for row in table["stages"]:
        accuracy = (row["result"] or {}).get("accuracy")
        extra = f"  test accuracy {100 * accuracy:.2f} %" if accuracy is not None else ""
        why = f"  ({'; '.join(row['reasons'])})" if row["reasons"] else ""
        lines.append(f"  {row['stage']:<9} {row['state']:<8}{extra}{why}")
    budget = table["budget"]
    if budget is not None:
        stamp = "" if budget["private"] else "  NOT PRIVATE"
        lines.append(
            f"  budget    ε = {budget['epsilon']:g} at δ = {budget['delta']:g}, spent {budget['spent']:.4g}{stamp}"
        )
    return "\n".join(lines)


def account(
    epsilon: float | None, noise_multiplier: float | None, sample_rate: float, steps: int, delta: float
) -> dict[str, Any]:
    """σ for an ε, or ε for a σ.

    Returns:
        noise_multiplier, sample_rate, steps, delta, epsilon (upper bound), epsilon_lower, epsilon_estimate,
        accountant, equivalent_mu (of Gaussian DP; None without privacy), adjacency.

    Raises:
        UsageError: a value out of its range. BudgetError: no noise is enough.
    """
    if noise_multiplier is None:
        noise_multiplier = calibrate(epsilon, delta, sample_rate, steps)
    bound = compose([GaussianEvent(noise_multiplier, sample_rate, steps)], delta)
    finite = math.isfinite(bound.upper)
    return {
        "noise_multiplier": noise_multiplier,
        "sample_rate": sample_rate,
        "steps": steps,
        "delta": delta,
        "epsilon": bound.upper,
        "epsilon_estimate": bound.estimate,
        "epsilon_lower": bound.lower,
        "accountant": bound.accountant,
        "equivalent_mu": equivalent_mu(bound.upper, delta) if finite else None,
        "adjacency": "add/remove one record",
    }


def account_group(result: dict[str, Any]) -> dict[str, Any]:
    """ε of ``group_size`` records together, for what ``account`` answered; empty for a size of 1.

    Returns:
        group_epsilon (upper bound at the same δ; infinite where no bound was found), group_accountant.

    Raises:
        UsageError: the size is below 1.
    """
    if result["group_size"] == 1:
        return {}
    event = GaussianEvent(result["noise_multiplier"], result["sample_rate"], result["steps"])
    bound = compose_group([event], result["delta"], result["group_size"])
    return {"group_epsilon": bound.upper, "group_accountant": bound.accountant}


def account_lines(result: dict[str, Any]) -> str:
    """``account`` for people."""
    sampling = "full batch" if result["sample_rate"] == 1 else f"Poisson q = {result['sample_rate']:g}"
    mu = "" if result["equivalent_mu"] is None else f"; as Gaussian DP: μ = {result['equivalent_mu']:.4g}"
    return (
        f"σ = {result['noise_multiplier']:.6g}, {sampling}, T = {result['steps']}: "
        f"ε = {result['epsilon']:#.5g} at δ = {result['delta']:g} "
        f"({result['adjacency']}; {result['accountant']}{mu}){_group_line(result)}"
    )


def _group_line(result: dict[str, Any]) -> str:
    if "group_epsilon" not in result:
        return ""
    size, epsilon = result["group_size"], result["group_epsilon"]
    return f"\n{size} records together: ε = {epsilon:#.5g} at the same δ ({result['group_accountant']})"


def datasets(data_dir: Path) -> list[dict[str, Any]]:
    """The known data sets as plain rows."""
    return [asdict(row) for row in list_datasets(data_dir)]


def dataset_lines(rows: list[dict[str, Any]]) -> str:
    """``datasets`` for people."""
    lines = [f"{'name':<16} {'N':>7} {'classes':>7}  {'size':<10} here"]
    lines += [
        f"{row['name']:<16} {row['train_examples']:>7} {row['classes']:>7}  {row['size']:<10} "
        + ("yes" if row["available"] else f"no: {row['how_to_get']}")
        for row in rows
    ]
    lines.append("also: npz:PATH (x_train, y_train, x_test, y_test) and folder:PATH (train/CLASS/*, test/CLASS/*)")
    return "\n".join(lines)


def check_dataset(name: str, data_dir: Path, classes: int | None, unit_column: str | None) -> dict[str, Any]:
    """Duplicates and units of a data set: see ``check_data``. Private, and ``private_output`` says so."""
    dataset = open_dataset(name, data_dir, num_classes=classes, unit_column=unit_column)
    return {"private_output": True, **check_data(dataset)}


def check_lines(found: dict[str, Any]) -> str:
    """``check_dataset`` for people."""
    lines = [
        f"{found['data']}: {found['train_examples']} training images, {found['train_units']} units of privacy, each "
        f"{found['unit']}; PRIVATE from here on",
        f"  images of the largest unit                          {found['largest_unit']}",
        f"  images that repeat an earlier one exactly           {found['repeated_images']}",
        f"  images with a copy in another unit                  {found['across_units']}",
        f"  units that hold one and the same image, at most     {found['largest_copies']}",
        f"  distinct images with contradicting labels           {found['contradicting_labels']}",
        f"  training images with a copy in the test split       {found['in_test']}",
    ]
    if found["units_in_test"] is not None:
        lines.append(f"  units with images in both splits                    {found['units_in_test']}")
    if found["across_units"]:
        lines.append(
            f"An image in {found['largest_copies']} units is protected as a group of so many (dprandp account "
            f"--group-size {found['largest_copies']}). Remove the copies, or give them one unit (--unit-column)."
        )
    if found["in_test"] or found["units_in_test"]:
        lines.append("The test split is not protected: its metrics are published without noise. Keep the splits apart.")
    return "\n".join(lines)


def plan(name: str, config: StageConfig, context: Context) -> dict[str, Any]:
    """What a private stage would run, from public facts alone: no pixel is read and nothing is written.

    Returns:
        the plan's fields, data, unit, train_examples (images), and epsilon_after (the run's ε when it is done).
    """
    if name == "finetune":
        stage = finetune.open_stage(config, context, write=False)
    else:
        stage = open_private_stage(name, config, context, write=False)
    budget = read_budget(context.rundir)
    spent = stage.ledger.events_besides(name, stage.attempt) if budget else []
    after = compose([*spent, stage.plan.event], stage.plan.delta)
    spec = stage.spec
    facts = {"data": spec.name, "unit": spec.unit, "train_examples": spec.train_examples}
    return {**stage.plan.to_dict(), **facts, "epsilon_after": after.upper}


def plan_lines(result: dict[str, Any]) -> str:
    """``plan`` for people."""
    size = f"N = {result['examples']}"
    if result["unit"] != "one image":
        size += f" units, each {result['unit']}, {result['train_examples']} images"
    noise = ", discrete noise" if result["noise"] == "discrete" else ""
    return (
        f"{result['stage']} on {result['data']} ({size}): T = {result['steps']} steps, "
        f"q = {result['sample_rate']:.4g}, σ = {result['noise_multiplier']:.4g}, C = {result['clip_norm']:g}, "
        f"K = {result['views']}{noise}; the run's ε afterwards: {result['epsilon_after']:.4f} "
        f"at δ = {result['delta']:g}"
    )
