"""The stages as commands: flags to configuration to one stage. No logic of a stage lives here."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dprandp.cli import flags, session
from dprandp.cli.flags import DATA, DEFAULT_RUN, OUTPUT, PRIVACY, TRAINING, Call, of_settings, option
from dprandp.config.schema import (
    DATA_SETTINGS,
    DEFAULT_DATA,
    DEFAULT_SHARE,
    PRETRAINED,
    SIZES,
    WITHOUT_PHASE_ONE,
    StageConfig,
    images_of_run,
    probe_of_run,
)
from dprandp.errors import UsageError
from dprandp.runs.directory import OPTIONAL_STAGES, STAGES, RunDir
from dprandp.runs.results import ContinueResult, PrivateContinueResult

if TYPE_CHECKING:
    from dprandp.runs.context import Context

app = typer.Typer()


@flags.command(app, "Stages", of_settings("generate"), (*flags.STAGE, "workers"))
def generate(call: Call) -> None:
    """Phase I: make images with a random process; no data, no privacy cost.

    [dim]dprandp generate[/dim]
    [dim]dprandp generate --process dead-leaves --count 20000 --resolution 64 --run runs/leaves[/dim]
    """
    on_cpu = Call(call.given, replace(call.options, device="cpu"))
    session.stage_command("generate", on_cpu, lambda result: "pretrain", create=True)


@flags.command(app, "Stages", of_settings("pretrain"), (*flags.STAGE, "prior", "device", "trust_code"))
def pretrain(
    call: Call,
    data: Annotated[str | None, option("Learn only for the declared colour of this data set; reads none of its files.",
                                       DATA, metavar="NAME")] = None,
) -> None:  # fmt: skip
    """Phase I: learn a feature extractor from those images; no data, no privacy cost.

    [dim]dprandp pretrain[/dim]
    [dim]dprandp pretrain --arch wrn-16-4 --steps 2000[/dim]
    [dim]dprandp pretrain --data fashion-mnist --run runs/grey[/dim]
    [dim]dprandp pretrain --prior patchnet-tiny --run runs/quick[/dim]
    [dim]dprandp pretrain --arch torchvision:resnet18 --init resnet18.safetensors --init-source "ImageNet-1k"[/dim]
    """
    prior = call.options.prior
    if prior is not None:
        session.refuse_made(prior, data=data, **call.given["pretrain"])
    following, fitting = "probe --data NAME --eps 1", session.colour_of(data)
    session.stage_command("pretrain", call, lambda result: following, create=prior is not None, fitting=fitting)


@flags.command(app, "Stages", of_settings("probe"), (*flags.PRIVATE_STAGE, "prior"))
def probe(call: Call) -> None:
    """Phase II: fit a linear head on the frozen features with DP-SGD.

    [dim]dprandp probe --eps 1[/dim]
    [dim]dprandp probe --prior patchnet-tiny-grey --run runs/quick[/dim]
    [dim]dprandp probe --data npz:scans.npz --classes 3 --eps 2 --share 1[/dim]
    """
    create = call.options.prior is not None
    session.stage_command(
        "probe", call, lambda result: "report" if result.share == 1 else "finetune", create=create
    )


@flags.command(app, "Stages", of_settings("finetune"), (*flags.PRIVATE_STAGE, "microbatch"))
def finetune(call: Call) -> None:
    """Phase III: train all parameters with DP-SGD, on the remaining budget; or the part that --train names.

    [dim]dprandp finetune[/dim]
    [dim]dprandp finetune --train last:1[/dim]
    [dim]dprandp finetune --from scratch --recipe de2022 --data cifar10 --eps 8 --run runs/scratch[/dim]
    """
    given = call.given["finetune"]
    if given["source"] is None and given["init"] is not None:
        given["source"] = "init"
    session.stage_command("finetune", call, lambda result: "report", create=given["source"] in WITHOUT_PHASE_ONE)


@flags.command(app, "Stages", of_settings("continue"), (*flags.PRIVATE_STAGE, "microbatch"), name="continue")
def continue_extractor(call: Call) -> None:
    """Between Phases I and II: train the extractor further, on public images, then privately (Bu et al. 2024).

    [dim]dprandp continue --public fraction:0.1 --data digits --eps 2[/dim]
    [dim]dprandp continue --switch decelerator --mix step --plan[/dim]
    """

    def following(result: ContinueResult) -> str:
        return "report" if isinstance(result, PrivateContinueResult) and result.share == 1 else "probe"

    session.stage_command("continue", call, following)


DIAGNOSED = (
    *DATA_SETTINGS, "epsilon", "delta", "seed", "public", "instances", "share", "switch", "steps",
    "batch_size", "public_batch_size", "public_lr",
)  # fmt: skip


@flags.command(app, "About a run", of_settings("continue", names=DIAGNOSED),
               (*flags.TALKING, "data_dir", "download", "device", "size", "config", "trust_code"))  # fmt: skip
def diagnose(call: Call) -> None:
    """Estimate what privacy costs a step of `continue`, term by term, on public images; nothing is charged.

    [dim]dprandp diagnose --public fraction:0.1 --data digits --eps 2[/dim]
    [dim]dprandp diagnose --steps 500 --batch-size 512 --json[/dim]
    """
    console = session.console(call.options)
    from dprandp.continual import diagnose as stage

    with session.opened(call.options.run) as rundir:
        settings = session.resolve(rundir, "continue", call.options, call.given["continue"])
        result = stage.run(settings, session.context(rundir, console, call.options))
    console.result(result, stage.line(result))


# ---------------------------------------------------------------------------------------------------------- all stages

TUNING = ("steps", "batch_size", "lr", "views")
RUN_FLAGS = (
    *of_settings("generate", "pretrain", "probe", "finetune", names=("seed",)),
    *of_settings("pretrain", "probe", "finetune", names=("precision",)),
    *of_settings("probe", "finetune", names=(*DATA_SETTINGS, "epsilon", "delta", "noise")),
    *of_settings("probe", "finetune", names=("clip_norm",)),
    *of_settings("generate", names=("process", "count", "resolution")),
    *of_settings("pretrain", names=("arch", "random_init", "init", "init_source", "norm", "input_size")),
    *of_settings("pretrain", names=("steps",), prefix="pretrain-", says="Of the pretraining: "),
    *of_settings("probe", names=("share",)),
    *of_settings("finetune", names=("recipe",)),
    *of_settings("probe", names=TUNING, prefix="probe-", says="Of the probe: "),
    *of_settings("finetune", names=TUNING, says="Of the fine-tune: "),
)
"""Flags of steps, batch size, learning rate and views without a prefix set the fine-tune."""


@flags.command(app, "Stages", RUN_FLAGS, (*flags.PRIVATE_STAGE, "prior", "workers", "microbatch"), name="run")
def run_all(call: Call) -> None:
    """Run generate, pretrain, probe and the report, and with --share below 1 a fine-tune; skip what is finished.

    [dim]dprandp run --data digits --eps 1[/dim]
    [dim]dprandp run --data cifar10 --eps 8 --size small --run runs/cifar --plan[/dim]
    """
    options, given = call.options, call.given
    console = session.console(options)
    facts = {name: given["probe"][name] for name in ("data", "classes", "colour")}
    fitting = {"pretrain": session.colour_of(data_dir=options.data_dir, **facts)}
    with session.directory(options, create=True) as rundir:
        public: dict[str, StageConfig] = {}
        if options.prior is not None:
            pretraining = {"pretrain_steps": given["pretrain"]["steps"]} | given["pretrain"] | given["generate"]
            session.refuse_made(options.prior, **{key: value for key, value in pretraining.items() if key != "steps"})
            public = session.public_stages(rundir, options, given["probe"])
        context = session.context(rundir, console, options)

        def resolve(stage: str, planned: Mapping[str, StageConfig] | None = None) -> Any:
            if stage in public:
                return public[stage]
            config = session.resolve(rundir, stage, options, given[stage], planned, fitting.get(stage))
            if stage == "generate" and given[stage]["resolution"] is None:
                config = images_of_run(config, resolve("pretrain", planned))
            if stage == "probe":
                config = probe_of_run(config, resolve("pretrain", planned).arch, rundir.row("probe").config)
            return config

        # Every configuration is checked before the first stage runs, so that no wrong value fails hours later.
        configs: dict[str, Any] = {}
        for stage in (name for name in STAGES if name not in OPTIONAL_STAGES):
            configs[stage] = resolve(stage, configs)
        whole = configs["finetune"].source == PRETRAINED
        if whole and (unused := [f"--{'' if name == 'share' else 'probe-'}{name.replace('_', '-')}" for name in
                                 ("share", *TUNING) if given["probe"][name] is not None]):  # fmt: skip
            raise UsageError(
                f"{', '.join(unused)} set the probe, and the recipe dp-randp trains without one",
                fix="leave it out, or give --recipe ours",
            )
        probe, recorded = configs["finetune" if whole else "probe"], rundir.row("probe").config
        if options.resume and recorded and not whole:  # as recorded, but data are known by content, not by path
            probe = type(probe)(**recorded | {"data": probe.data})
        unused = [f"--{name.replace('_', '-')}" for name in TUNING if given["finetune"][name] is not None]
        if not whole and probe.share == 1 and unused:
            raise UsageError(
                f"{', '.join(unused)} set the fine-tune, but the probe has the whole budget",
                fix=f"give --probe-{unused[0].removeprefix('--')} for the probe, or --share {DEFAULT_SHARE:g} for a "
                "probe and a fine-tune",
            )
        if options.plan:
            from dprandp.pipeline import plan as planning

            made = planning.plan_run(resolve, context)
            return console.result(made, planning.plan_lines(made))
        session.require_data(probe, options)
        from dprandp import pipeline

        result = pipeline.run(resolve, context)
    return console.result(result.as_json(), pipeline.line(result))


@flags.command(app, "Stages", options=("json", "debug", "quiet", "size", "config", "plan", "data_dir", "download",
                                       "device", "workers", "microbatch"))  # fmt: skip
def sweep(
    call: Call,
    data: Annotated[list[str], option("A data set, as for `run`; give it several times for several.", DATA,
                                      metavar="NAME")] = (DEFAULT_DATA,),
    eps: Annotated[list[float], option("ε of a run; give it several times for several.", PRIVACY,
                                       "--eps")] = (1.0,),
    system: Annotated[list[str], option("probe (the whole budget), or a published system: dp-randp, de2022, pruning, "
                                        "continual; give it several times for several.", TRAINING,
                                        metavar="NAME")] = ("probe",),
    seeds: Annotated[int, option("Runs of each kind: seeds 0 to n - 1.", TRAINING)] = 3,
    out: Annotated[Path, option("Folder of the runs and of results.jsonl, for `dprandp compare`. The same command "
                                "continues a sweep that was stopped.", OUTPUT, metavar="DIR")] = Path("runs/sweep"),
) -> None:  # fmt: skip
    """Run systems on data sets at several ε and seeds, share their public stages, and say what all of it costs in ε.

    [dim]dprandp sweep --data digits --eps 1 --eps 8 --system probe --system dp-randp --plan[/dim]
    [dim]dprandp sweep --data digits --eps 1 --seeds 3 --out runs/digits-sweep[/dim]
    [dim]dprandp compare runs/sweep/results.jsonl --latex table.tex[/dim]
    """
    console, options = session.console(call.options), call.options
    from dprandp import sweep as sweeping
    from dprandp.inspection import compare as comparing

    asked = sweeping.Asked(data, system, eps, seeds, options.size or SIZES[0], options.config)
    chosen = sweeping.cells(asked, out)

    def context(rundir: RunDir) -> Context:
        return session.context(rundir, console, options)

    made = sweeping.plan(chosen, out, context)
    if options.plan:
        return console.result(made, sweeping.plan_lines(made))
    if not options.download:
        sweeping.require_data(made)
    for line in sweeping.cost_lines(made):
        console.say(line)
    found = sweeping.run(chosen, out, context, console)
    console.result(found, comparing.lines(found))
    return console.next(f"dprandp compare {shlex.quote(str(out / sweeping.RESULTS))} --html table.html")


# ------------------------------------------------------------------------------------------------------- tune and audit


TUNED = (*DATA_SETTINGS, "epsilon", "delta", "share", "clip_norm", "steps", "lr", "seed")


@flags.command(app, "Stages", of_settings("probe", names=TUNED),
               (*flags.TALKING, "data_dir", "insecure_seed", "size", "config", "device", "overwrite",
                "trust_code"))  # fmt: skip
def tune(
    call: Call,
    on: Annotated[str, option("synthetic: the run's own images, no cost. NAME: data that you declare public, no cost. "
                              "private: the private data, charged to the budget. Default: synthetic.", PRIVACY,
                              metavar="synthetic|NAME|private")] = "synthetic",
    spend: Annotated[float, option("With --on private: fraction of the probe's ε for tuning.", PRIVACY)] = 0.3,
    held_out: Annotated[float, option("With --on private: chance that a trial scores on an image instead of fitting "
                                      "it.", PRIVACY)] = 0.2,
    trials: Annotated[int, option("Settings to try; with --on private the expected number (the real one is random and "
                                  "secret).", TRAINING)] = 12,
) -> None:  # fmt: skip
    """Choose learning rate, steps and dimensions for the probe; writes tuned.toml. By default no privacy cost.

    [dim]dprandp tune --data digits --eps 1[/dim]
    [dim]dprandp tune --data pneumoniamnist --eps 2 --on fashion-mnist[/dim]
    """
    console, run = session.console(call.options), call.options.run
    from dprandp import tune as stage
    from dprandp.tune import TuneConfig

    asked = TuneConfig(on=on, trials=trials, spend=spend, held_out=held_out)
    with session.opened(run) as rundir:
        probe = session.resolve(rundir, "probe", call.options, call.given["probe"])
        result = stage.run(probe, asked, session.context(rundir, console, call.options))
    console.result(stage.as_json(result), stage.line(result))
    console.next(session.command("probe", run) + f" --config {shlex.quote(str(run / 'tuned.toml'))}")


@flags.command(app, "About a run", of_settings("generate", names=("seed",)),
               (*flags.TALKING, "data_dir", "device", "trust_code"))  # fmt: skip
def audit(
    call: Call,
    examples: Annotated[int | None, option("With --eps: records N. Default 10000.", DATA)] = None,
    with_data: Annotated[bool, option("Also make the paired run on the run's private data; publishes only passed or "
                                      "failed.", DATA, "--with-data")] = False,
    eps: Annotated[float | None, option("Audit the plan of this ε instead of a run. Default: audit the run.", PRIVACY,
                                        "--eps")] = None,
    delta: Annotated[float | None, option("With --eps: δ. Default: 1e-5, or 0.1/N (one digit, rounded down) where that "
                                          "is smaller.", PRIVACY)] = None,
    sample_rate: Annotated[float | None, option("With --eps: q in (0, 1]. Default 1, full batch.", PRIVACY)] = None,
    noise: Annotated[str | None, option("With --eps: gaussian or discrete. Default gaussian.", PRIVACY)] = None,
    trials: Annotated[int | None, option("Trials of the distinguishing game, with the record and as many without. "
                                         "Default: as many as the claim needs.", PRIVACY)] = None,
    canaries: Annotated[int | None, option("Canaries of the one-run test. Default: as many as the game has trials, at "
                                           "most 200000.", PRIVACY)] = None,
    black_box: Annotated[bool, option("Play the game on released heads alone too.", PRIVACY, "--black-box")] = False,
    controls: Annotated[bool, option("Inject known faults, which must be flagged.", PRIVACY,
                                     "--controls/--no-controls")] = True,
    steps: Annotated[int | None, option("With --eps: noisy steps T. Default 120.", TRAINING)] = None,
) -> None:  # fmt: skip
    """Try to contradict the claimed ε by experiment. A clean audit is no proof; a contradiction ends with exit code 1.

    [dim]dprandp audit[/dim]
    [dim]dprandp audit --run runs/cifar --trials 20000 --black-box[/dim]
    [dim]dprandp audit --eps 1 --steps 875 --sample-rate 0.08192 --examples 50000[/dim]
    """
    console, run = session.console(call.options), call.options.run
    plan_only = {"--delta": delta, "--sample-rate": sample_rate, "--steps": steps, "--examples": examples,
                 "--noise": noise}  # fmt: skip
    given = [name for name, value in plan_only.items() if value is not None]
    if eps is None and given:
        raise UsageError(f"{given[0]} describes a plan, which needs --eps", fix="give --eps too, or only --run")
    if eps is not None and (run != DEFAULT_RUN or with_data):
        raise UsageError(
            "--eps audits a plan without a run; --run and --with-data need a run", fix="leave out one of them"
        )
    from dprandp import audit as stage
    from dprandp.audit.bounds import AuditSettings

    settings = AuditSettings(trials, canaries, controls, call.given["generate"]["seed"] or 0, with_data, black_box)
    if eps is not None:
        result = stage.audit_plan(
            eps, delta, 1.0 if sample_rate is None else sample_rate, 120 if steps is None else steps,
            10_000 if examples is None else examples, settings, console, noise or "gaussian",
        )  # fmt: skip
    else:
        with session.opened(run) as rundir:
            context = session.context(rundir, console, call.options)
            result = stage.audit_run(settings, context)
    console.result(result, stage.line(result))
    stage.raise_unless_passed(result)
