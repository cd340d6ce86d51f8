"""The command run: all four stages and the report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from dprandp.cli import flags, session
from dprandp.cli.session import DEFAULT_RUN
from dprandp.config import StageConfig
from dprandp.errors import UsageError
from dprandp.rundir import OPTIONAL_STAGES, STAGES, RunDir

app = typer.Typer()


@app.command("run", rich_help_panel="Stages")
def run_all(
    data: flags.DataName = None,
    data_dir: flags.DataDir = Path("data"),
    download: flags.Download = False,
    classes: flags.Classes = None,
    unit_column: flags.UnitColumn = None,
    process: flags.Process = None,
    count: flags.Count = None,
    resolution: flags.Resolution = None,
    eps: flags.Epsilon = None,
    delta: flags.Delta = None,
    share: flags.Share = None,
    clip: flags.Clip = None,
    noise: flags.Noise = None,
    insecure_seed: flags.InsecureSeed = None,
    prior: flags.Prior = None,
    arch: flags.Arch = None,
    random_init: flags.RandomInit = None,
    pretrain_steps: flags.RunPretrainSteps = None,
    probe_steps: flags.ProbeSteps = None,
    probe_batch_size: flags.ProbeBatchSize = None,
    probe_lr: flags.ProbeLr = None,
    probe_views: flags.ProbeViews = None,
    steps: flags.RunSteps = None,
    batch_size: flags.RunBatchSize = None,
    lr: flags.RunLr = None,
    views: flags.RunViews = None,
    size: flags.Size = None,
    config: flags.Config = None,
    seed: flags.Seed = None,
    device: flags.Device = "auto",
    precision: flags.Precision = None,
    workers: flags.Workers = None,
    microbatch: flags.Microbatch = "auto",
    run: flags.Run = DEFAULT_RUN,
    plan: flags.Plan = False,
    resume: flags.Resume = False,
    overwrite: flags.Overwrite = False,
    json: flags.Json = False,
    quiet: flags.Quiet = False,
    debug: flags.Debug = False,
) -> None:
    """Run all four stages and the report, skipping what is finished; with --share 1 there is no fine-tune.

    [dim]dprandp run --data digits --eps 1[/dim]
    [dim]dprandp run --data cifar10 --eps 8 --size small --run runs/cifar --plan[/dim]
    """
    console = session.console(json=json, quiet=quiet, debug=debug)
    private = {
        "data": data, "classes": classes, "unit_column": unit_column, "epsilon": eps, "delta": delta,
        "clip_norm": clip, "noise": noise,
    }  # fmt: skip
    tuning = {"steps": steps, "batch_size": batch_size, "lr": lr, "views": views}
    given = {
        "generate": {"process": process, "count": count, "resolution": resolution},
        "pretrain": {
            "arch": arch, "steps": pretrain_steps, "random_init": random_init,
        },
        "probe": private | {
            "share": share, "steps": probe_steps, "batch_size": probe_batch_size, "lr": probe_lr, "views": probe_views,
        },
        "finetune": private | tuning,
    }  # fmt: skip
    colour = session.colour_of(data, data_dir, classes)
    fitting = {"pretrain": {"colour": colour}} if colour else {}
    with (session.looked_at if plan else session.opened)(run, create=True) as rundir:
        public: dict[str, StageConfig] = {}
        if prior is not None:
            session.refuse_made(
                prior, process=process, count=count, resolution=resolution, arch=arch, random_init=random_init,
                pretrain_steps=pretrain_steps,
            )  # fmt: skip
            public = session.public_stages(rundir, prior, size, config, given["probe"])
        context = session.context(
            rundir, console, device=device, data_dir=data_dir, download=download, workers=workers,
            insecure_seed=insecure_seed, microbatch=session.microbatch(microbatch), resume=resume, overwrite=overwrite,
        )  # fmt: skip

        def resolve(stage: str, planned: Mapping[str, StageConfig] | None = None):
            if stage in public:
                return public[stage]
            flags_of_stage = given[stage] | {"seed": seed} | ({} if stage == "generate" else {"precision": precision})
            return session.resolve(rundir, stage, size, config, flags_of_stage, planned, fitting.get(stage))

        configs = _all_stages(resolve, rundir, resume)
        if configs["probe"].share == 1:
            _refuse_unused(tuning)
        if plan:
            from dprandp.stages import planning

            made = planning.plan_run(resolve, context)
            return console.result(made, planning.plan_lines(made))
        probe = configs["probe"]
        session.require_data(
            probe.data, data_dir, classes=probe.classes, unit_column=probe.unit_column, download=download
        )
        from dprandp.stages import pipeline

        result = pipeline.run(resolve, context)
    console.result(result, pipeline.line(result))
    return None


def _all_stages(resolve, rundir: RunDir, resume: bool) -> dict[str, Any]:
    """Every stage's configuration before the first one runs: a wrong value is refused at once, not hours later.

    With ``resume`` the settings that the run has recorded stand.
    """
    configs: dict[str, Any] = {}
    for stage in STAGES:
        if stage in OPTIONAL_STAGES:
            continue
        configs[stage] = resolve(stage, configs)
    if resume:
        for row in rundir.status():
            if row["config"] and row["stage"] in configs:
                now = configs[row["stage"]]
                moved = {"data": now.data} if "data" in row["config"] else {}  # known by content, wherever they lie now
                configs[row["stage"]] = type(now)(**row["config"] | moved)
    return configs


def _refuse_unused(tuning: dict[str, Any]) -> None:
    """Flags of the fine-tune where there is none: passing over them would look like obeying them."""
    unused = [f"--{name.replace('_', '-')}" for name, value in tuning.items() if value is not None]
    if unused:
        raise UsageError(
            f"{', '.join(unused)} set the fine-tune, and with --share 1 there is none",
            fix=f"give --probe-{unused[0].removeprefix('--')} for the probe, or a smaller --share",
        )
