"""The four stages by name, one after another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dprandp import continual, finetune, generate, pretrain, probe
from dprandp.config.schema import (
    PRETRAINED,
    FinetuneConfig,
    ProbeConfig,
    StageConfig,
    as_dict,
    build,
    input_size_of,
)
from dprandp.dpsgd.stage import name_private_stage, open_private_stage
from dprandp.errors import UsageError
from dprandp.models.torchvision import code_is_trusted, trust_code
from dprandp.report import page
from dprandp.report.disclosure import epsilon_text, interval_text, model_warnings
from dprandp.runs.console import Console
from dprandp.runs.context import Context, device_of_rank
from dprandp.runs.directory import RunDir, frozen
from dprandp.runs.ledger import ledger_file
from dprandp.runs.parallel import Ranks
from dprandp.runs.results import (
    ContinueResult,
    FinetuneResult,
    GenerateResult,
    PretrainResult,
    PrivateResult,
    ProbeResult,
    StageResult,
)
from dprandp.runs.signals import graceful_stop

RUNNERS: dict[str, Callable[[Any, Context], StageResult | None]] = {
    "generate": generate.run,
    "pretrain": pretrain.run,
    "continue": continual.run,
    "probe": probe.run,
    "finetune": finetune.run,
}


def run_stage(name: str, config: StageConfig, context: Context) -> StageResult:
    """Run one stage, on all ranks, or return the recorded result of a finished one."""
    facts = {"run": str(context.rundir.path), "data_dir": str(context.data_dir), "device": context.device.type}
    facts |= {"stage": name, "config": as_dict(config), "microbatch": context.microbatch}
    facts["trust_code"] = code_is_trusted()
    context.ranks.announce(facts)
    result = RUNNERS[name](config, context)
    context.ranks.stage_done()
    return result


def as_json(name: str, result: StageResult) -> dict[str, Any]:
    """A stage's result as ``--json`` prints it: it begins with ``stage``; that of a model ends with ``warnings``."""
    warnings = {"warnings": model_warnings(result)} if isinstance(result, PrivateResult) else {}
    return {"stage": name, **frozen(result), **warnings}


def run_announced(stage: dict[str, Any], ranks: Ranks, console: Console) -> None:
    """Run the stage that rank 0 announced in ``run_stage``, as one of the other ranks."""
    if stage["trust_code"]:
        trust_code()
    context = Context(
        rundir=RunDir.open(stage["run"], create=False),
        console=console,
        device=device_of_rank(stage["device"]),
        data_dir=Path(stage["data_dir"]),
        microbatch=stage["microbatch"],
        ranks=ranks,
    )
    RUNNERS[stage["stage"]](build(stage["stage"], stage["config"]), context)


def adopt(public: dict[str, StageConfig], context: Context) -> None:
    """Put a shipped prior into a run: its images, then its extractor. Finished stages are skipped.

    ``overwrite`` is meant for the probe; it restarts these two stages only if they differ.

    Raises:
        UsageError: the run has images or an extractor of its own.
    """
    for name, config in public.items():
        recorded = context.rundir.row(name).config
        other = recorded is not None and recorded != as_dict(config)
        if other and not context.overwrite and not recorded.keys() & {"sample", "prior"}:
            raise UsageError(
                f"{context.rundir.path} has made its own {'images' if name == 'generate' else 'extractor'}, so that no "
                "shipped prior fits in",
                fix="start a new --run for the prior, or leave --prior out",
            )
        restart = context.overwrite and other
        result = run_stage(name, config, replace(context, overwrite=restart))
        context.console.say(stage_line(name, result))


@dataclass(frozen=True)
class Made:
    """What ``run`` has made."""

    report: Path
    results: dict[str, StageResult]  # by stage

    @property
    def last(self) -> ProbeResult | FinetuneResult:
        """The result of the last private stage."""
        return self.results.get("finetune") or self.results["probe"]

    def as_json(self) -> dict[str, Any]:
        """As ``--json`` prints it: the last result, with ``report`` (path) and ``results`` (one per stage)."""
        results = {name: as_json(name, result) for name, result in self.results.items()}
        return {**results[self.last.stage], "report": str(self.report), "results": results}


def examine_data(config: ProbeConfig | FinetuneConfig, size: int, context: Context) -> None:
    """Find everything that is wrong with a user's own data, before minutes of public stages.

    ``size`` is the side of the input of the extractor to come: image files are decoded for it.

    Raises:
        As the stage, before it charges anything; BudgetError before a pixel is read.
    """
    if ":" in config.data and not ledger_file(context.rundir).exists():
        name = "probe" if isinstance(config, ProbeConfig) else "finetune"
        open_private_stage(name, config, context, write=False)
        stage = name_private_stage(name, config, context)
        stage.dataset.for_input(size)
        stage.examine()


def stages_of_run(config: FinetuneConfig) -> tuple[str, ...]:
    """The stages of ``run``: without a probe where the fine-tune starts from the pretrained extractor."""
    return ("generate", "pretrain", *(() if config.source == PRETRAINED else ("probe",)), "finetune")


def run(resolve: Callable[[str], StageConfig], context: Context) -> Made:
    """Run all stages and write the report; ``resolve`` is asked for a stage's configuration when its turn comes.
    """
    results: dict[str, StageResult] = {}
    stages = stages_of_run(resolve("finetune"))
    if "probe" not in stages:
        finetune.choices(resolve("finetune"), context, resolve("pretrain").arch)  # refuses a patchnet
    examine_data(resolve(stages[2]), input_size_of(resolve("pretrain")), context)
    with graceful_stop() as stop:
        for name in stages:
            if name == "finetune" and "probe" in results and results["probe"].share == 1:
                context.console.say("finetune: none, since the probe has the whole budget; --share 0.3 leaves it 70 %")
                continue
            results[name] = run_stage(name, resolve(name), context)
            context.console.say(stage_line(name, results[name]))
            stop.raise_if_requested()
    return Made(page.write(context.rundir), results)


def line(made: Made) -> str:
    """The last line of ``dprandp run``."""
    return f"{stage_line(made.last.stage, made.last)}; report: {made.report}"


def stage_line(name: str, result: StageResult) -> str:
    """One line for people, from a stage's result."""
    seconds = f"{result.seconds:.0f} s"
    if isinstance(result, GenerateResult):
        return f"generate: {result.count} images of {result.process} at {result.resolution} px in {seconds}"
    if isinstance(result, PretrainResult):
        if result.prior:
            return f"pretrain: the prior {result.prior} ({result.arch}, {result.feature_dim} features)"
        quality = "" if result.knn_accuracy is None else f", k-NN {100 * result.knn_accuracy:.0f} % (synthetic)"
        apart = "" if result.grey is None else ", one extractor for colour and one for grey data"
        apart += "" if result.replaced is None else f", replaced: {result.replaced}"
        return f"pretrain: {result.arch}, {result.feature_dim} features{quality}{apart}, in {seconds}"
    if isinstance(result, ContinueResult):
        done = result.public_training
        said = f"continue: {result.arch}, {done.images}; {done.switch}"
        if not isinstance(result, PrivateResult):
            return f"{said}; nothing private was read, in {seconds}"
        name = f"{said}; then"
    privacy = f"{_spent(result)}, δ = {result.delta:g}" if result.private else "NOT PRIVATE"
    seen = f", images seen at {result.input_size} × {result.input_size} pixels" if result.input_size else ""
    said = f"{name}: {result.data} test accuracy {_accuracy(result)} at {privacy}{seen}, in {seconds}"
    return "; WARNING: ".join([said, *model_warnings(result)])


def _spent(result: PrivateResult) -> str:
    """Such as ``ε = 1``; of a probe with a part of the run's ε, whose the rest is."""
    said = f"ε = {epsilon_text(result.epsilon)}"
    if not isinstance(result, ProbeResult) or result.share == 1:
        return said
    return f"{said} of {result.epsilon_total:g} (the probe's share is {result.share:g}; the rest is for finetune)"


def _accuracy(result: PrivateResult) -> str:
    """Such as ``86.11 % (95 %: 82.1 to 89.4; most frequent class 10.3 %)``, with the AUC of two classes or of several
    labels, and the kappa of grades."""
    beside = f"95 %: {interval_text(result.interval('accuracy'))}"
    usual = f"more frequent answer to each of {len(result.classes)} labels"
    usual = usual if result.multi_label else "most frequent class"
    beside += f"; {usual} {100 * result.majority_accuracy:.1f} %"
    if (result.multi_label or len(result.classes) == 2) and result.auc is not None:
        beside += f"; {'mean AUC' if result.multi_label else 'AUC'} {result.auc:.3f}"
    if result.kappa is not None:
        beside += f"; weighted kappa {result.kappa:.3f}"
    return f"{100 * result.accuracy:.2f} % ({beside})"
