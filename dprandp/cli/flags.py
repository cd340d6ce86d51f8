"""The command line's flags: names, units, defaults and help, each declared once and shared by the commands.

``None`` always means "not given": ``schema.resolve`` then takes the value of the size, or of the run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dprandp.config.schema import DEFAULT_DATA, SIZES

DATA, PRIVACY, TRAINING, PERFORMANCE, OUTPUT = "Data", "Privacy", "Training", "Performance", "Output"

Run = Annotated[Path, typer.Option("--run", help="Run directory.", rich_help_panel=OUTPUT, metavar="DIR")]
Model = Annotated[
    Path | None,
    typer.Option(help="A model/ folder or an export. Default: the run's.", rich_help_panel=DATA, metavar="DIR"),
]
Size = Annotated[
    str | None,
    typer.Option(help="One dial for everything else: tiny (minutes on 2 cores), small (half an hour), paper. "
                 "Default: that of the stage before, else tiny.", rich_help_panel=TRAINING, metavar="|".join(SIZES)),
]  # fmt: skip
Config = Annotated[
    Path | None,
    typer.Option(help="TOML with a table per stage; flags win over it.", rich_help_panel=TRAINING, metavar="FILE"),
]
Seed = Annotated[
    int | None, typer.Option(help="Public randomness only; never the noise. Default: 0.", rich_help_panel=TRAINING)
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:i.", rich_help_panel=PERFORMANCE)]
Precision = Annotated[
    str | None,
    typer.Option(help="Products of the network: float32, bfloat16, or auto: bfloat16 for a wrn or vit where the device "
                 "multiplies it faster, else float32. Decided when the stage begins, and recorded. Default: auto.",
                 rich_help_panel=PERFORMANCE, metavar="auto|float32|bfloat16"),
]  # fmt: skip
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Keep the recorded settings; use the last good checkpoint.", rich_help_panel=OUTPUT),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Start the stage afresh. What was spent on privacy stays spent.", rich_help_panel=OUTPUT
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.", rich_help_panel=OUTPUT)]
Quiet = Annotated[bool, typer.Option("--quiet", help="Nothing but errors on stderr.", rich_help_panel=OUTPUT)]
Debug = Annotated[
    bool,
    typer.Option("--debug", help="Tracebacks and private details of errors; not for publication.",
                 rich_help_panel=OUTPUT),
]  # fmt: skip
Plan = Annotated[
    bool,
    typer.Option("--plan", help="Print what would run and what ε it would cost; read no data.", rich_help_panel=OUTPUT),
]
DataName = Annotated[
    str | None,
    typer.Option("--data", help=f"Name of a data set (see `dprandp datasets`), npz:PATH or folder:PATH. "
                 f"Default: the run's, else {DEFAULT_DATA}.", rich_help_panel=DATA, metavar="NAME"),
]  # fmt: skip
DataDir = Annotated[
    Path, typer.Option(help="Folder with the files of the known data sets.", rich_help_panel=DATA, metavar="DIR")
]
Download = Annotated[
    bool,
    typer.Option("--download", help="Fetch a known data set's files where they are missing. "
                 "Default: nothing is fetched.", rich_help_panel=DATA),
]  # fmt: skip
Classes = Annotated[
    int | None,
    typer.Option(help="Number of classes, for npz: files that do not declare it.", rich_help_panel=DATA, metavar="C"),
]
UnitColumn = Annotated[
    str | None,
    typer.Option("--unit-column", help="What must be hidden as a whole: images with equal values in this array of npz: "
                 "data (patient or patient_train), or column of units.csv in folder: data, are one unit of privacy. "
                 "Default: groups_train, or unit, where the data have it; else each image. image: each image.",
                 rich_help_panel=PRIVACY, metavar="NAME"),
]  # fmt: skip
Noise = Annotated[
    str | None,
    typer.Option("--noise", help="gaussian, or discrete: sums and noise on a lattice, without the gaps of floating "
                 "point. Default: gaussian.", rich_help_panel=PRIVACY, metavar="gaussian|discrete"),
]  # fmt: skip
Epsilon = Annotated[
    float | None,
    typer.Option("--eps", help="Total ε for everything this run releases about the data; inf = NOT PRIVATE. "
                 "Default: the run's, else 1.", rich_help_panel=PRIVACY),
]  # fmt: skip
Delta = Annotated[
    float | None,
    typer.Option(help="δ, the chance that ε fails. Default: the run's, else 1e-5, or 0.1/N (one digit, rounded down) "
                 "where that is smaller; 1e-5 for cifar10, cifar100, mnist and fashion-mnist, as in published results.",
                 rich_help_panel=PRIVACY),
]  # fmt: skip
Share = Annotated[
    float | None,
    typer.Option(help="Part of ε for the probe, in (0, 1]; 1: all that is left, and nothing for finetune. "
                 "Default: 0.3.", rich_help_panel=PRIVACY),
]  # fmt: skip
Clip = Annotated[
    float | None,
    typer.Option("--clip", help="Clip norm C: largest L2 norm of an example's gradient. Default: 0.5 for the probe, 1 "
                 "for the fine-tune.", rich_help_panel=PRIVACY),
]  # fmt: skip
Clipping = Annotated[
    str | None,
    typer.Option(help="norm: gradients longer than C are cut to C; automatic: all are scaled to just below C, so that "
                 "C need not be tuned; rescaled: norm, then divided by C. Default: norm.", rich_help_panel=PRIVACY),
]  # fmt: skip
Freeze = Annotated[
    str | None,
    typer.Option(help="Train a part of the extractor's weights, chosen once: random or magnitude; with --scope block "
                 "also last. Needs --keep. Default: all are trained.",
                 rich_help_panel=TRAINING, metavar="HOW"),
]  # fmt: skip
Select = Annotated[
    str | None,
    typer.Option(help="The same, chosen anew every --every steps. Default: all are trained.",
                 rich_help_panel=TRAINING, metavar="HOW"),
]  # fmt: skip
Keep = Annotated[
    float | None,
    typer.Option(help="The part that --freeze or --select trains, such as 0.1; head, norms and biases always are. "
                 "Default: all are trained.", rich_help_panel=TRAINING),
]  # fmt: skip
Prune = Annotated[
    str | None,
    typer.Option(help="What --freeze does to the other weights: hold or zero. Default: hold.",
                 rich_help_panel=TRAINING),
]  # fmt: skip
Every = Annotated[
    int | None, typer.Option(help="Steps between two choices of --select. Default: 10.", rich_help_panel=TRAINING)
]
Scope = Annotated[
    str | None,
    typer.Option(help="--keep is a part of all weights (global), of each tensor (layer), or, with --freeze, of whole "
                 "blocks (block), which saves time and memory. Default: global.", rich_help_panel=TRAINING),
]  # fmt: skip
InsecureSeed = Annotated[
    int | None,
    typer.Option(help="Seed the noise, for tests. The run is stamped NOT PRIVATE.", rich_help_panel=PRIVACY),
]
Views = Annotated[
    int | None,
    typer.Option(help="Augmented views K of each example, averaged before the clip. Default: 1.",
                 rich_help_panel=TRAINING),
]  # fmt: skip
BatchSize = Annotated[
    int | None,
    typer.Option(help="Expected batch B = qN of Poisson sampling. Default: N (every example, q = 1).",
                 rich_help_panel=TRAINING),
]  # fmt: skip
Steps = Annotated[
    int | None,
    typer.Option(help="Updates T. Default: 120 (tiny), 200 (small), 100 (paper).", rich_help_panel=TRAINING),
]
Lr = Annotated[
    float | None,
    typer.Option("--lr", help="Learning rate. Default: set by the noise and the data's size.",
                 rich_help_panel=TRAINING),
]  # fmt: skip
FinetuneViews = Annotated[
    int | None,
    typer.Option("--views", help="Augmented views K of each example, averaged before the clip. "
                 "Default: 1, or 16 (paper).", rich_help_panel=TRAINING),
]  # fmt: skip
FinetuneBatchSize = Annotated[
    int | None,
    typer.Option("--batch-size", help="Expected batch B = qN of Poisson sampling. Default: 0.02 N (patchnet), "
                 "0.082 N (wrn), 4096 (paper).", rich_help_panel=TRAINING),
]  # fmt: skip
FinetuneSteps = Annotated[
    int | None,
    typer.Option("--steps", help="Updates T. Default: 8 (patchnet), 40 (wrn), 100 (from scratch), 779 (paper).",
                 rich_help_panel=TRAINING),
]  # fmt: skip
FinetuneLr = Annotated[
    float | None,
    typer.Option("--lr", help="Learning rate. Default: 4 (patchnet), 0.4 (wrn), 2 (from scratch).",
                 rich_help_panel=TRAINING),
]  # fmt: skip
TunedOn = Annotated[
    str | None,
    typer.Option(help="What these settings were tuned on, if you tuned elsewhere; stored and shown. Default: nothing.",
                 rich_help_panel=OUTPUT, metavar="TEXT"),
]  # fmt: skip
Microbatch = Annotated[
    str,
    typer.Option(help="Examples whose gradients are in memory together: auto or n. Never changes the result.",
                 rich_help_panel=PERFORMANCE, metavar="auto|n"),
]  # fmt: skip
Workers = Annotated[
    int | None,
    typer.Option(help="Processes that make images. Default: one per core. Never changes the images.",
                 rich_help_panel=PERFORMANCE),
]  # fmt: skip
Process = Annotated[
    str | None,
    typer.Option("--process", help="stylegan-oriented (default), stylegan-random, stylegan-highfreq, stylegan-sparse, "
                 "dead-leaves (or dead-leaves-shapes), dead-leaves-squares, dead-leaves-oriented, "
                 "dead-leaves-textures, spectrum, spectrum-color, wmm, spectrum-color-wmm, fractal, perlin; over any "
                 "of them kml:NAME, kml-mixup:NAME, mixture:NAME,NAME,...", rich_help_panel=DATA, metavar="NAME"),
]  # fmt: skip
Count = Annotated[
    int | None,
    typer.Option(help="Number of images to make. Default: 4000 (tiny), 24000 (small), 105000 (paper).",
                 rich_help_panel=DATA),
]  # fmt: skip
Resolution = Annotated[
    int | None,
    typer.Option(help="Their width and height in pixels. Default: 64, or 256 (paper).", rich_help_panel=DATA),
]
Prior = Annotated[
    str | None,
    typer.Option("--prior", help="Use a shipped extractor (see `dprandp priors`) instead of making one. "
                 "Default: none, or the run's.", rich_help_panel=TRAINING, metavar="NAME"),
]  # fmt: skip
Arch = Annotated[
    str | None,
    typer.Option(help="patchnet, wrn-DEPTH-WIDTH such as wrn-16-4, or vit-DEPTH-WIDTH-PATCH such as vit-4-64-4. "
                 "Default: patchnet, or wrn-16-4 (paper).", rich_help_panel=TRAINING),
]  # fmt: skip
Layers = Annotated[
    int | None,
    typer.Option(help="Layers of a patchnet, 1 or 2. Default: 1, or 2 (small, paper).", rich_help_panel=TRAINING),
]
RandomInit = Annotated[
    bool | None, typer.Option("--random-init", help="Keep the random weights: a control.", rich_help_panel=TRAINING)
]

PretrainSteps = Annotated[
    int | None,
    typer.Option(help="Steps of a wrn. Default: 100 (tiny), 600 (small), 82000 (paper).", rich_help_panel=TRAINING),
]
PretrainBatchSize = Annotated[
    int | None,
    typer.Option(help="Images of a wrn's step, two views of each. Default: 32 (tiny), 64 (small), 256 (paper).",
                 rich_help_panel=TRAINING),
]  # fmt: skip
PretrainLr = Annotated[
    float | None,
    typer.Option("--lr", help="Learning rate of a wrn. Default: 0.03, or 0.12 (paper); 0.001 for adamw.",
                 rich_help_panel=TRAINING),
]  # fmt: skip
Optimizer = Annotated[
    str | None,
    typer.Option(help="Of a wrn: sgd or adamw. Default: sgd.", rich_help_panel=TRAINING, metavar="NAME"),
]
FeatureStages = Annotated[
    str | None,
    typer.Option(help="Features of a wrn: averages of its last stage's map, or of all three stages'. Costs no time. "
                 "Default: all, or last (paper).", rich_help_panel=TRAINING, metavar="last|all"),
]  # fmt: skip

# ------------------------------------------------------------------- `run` alone: what goes to one of its four stages
# Steps, batch size, learning rate and views without a prefix go to the fine-tune, which they come from.

RunSteps = Annotated[
    int | None,
    typer.Option("--steps", help="Updates T of the fine-tune. Default: 8 (patchnet), 40 (wrn), 779 (paper).",
                 rich_help_panel=TRAINING),
]  # fmt: skip
RunBatchSize = Annotated[
    int | None,
    typer.Option("--batch-size", help="Expected batch B = qN of the fine-tune. Default: 0.02 N (patchnet), "
                 "0.082 N (wrn), 4096 (paper).", rich_help_panel=TRAINING),
]  # fmt: skip
RunLr = Annotated[
    float | None,
    typer.Option("--lr", help="Learning rate of the fine-tune. Default: 4 (patchnet), 0.4 (wrn).",
                 rich_help_panel=TRAINING),
]  # fmt: skip
RunViews = Annotated[
    int | None,
    typer.Option("--views", help="Augmented views K of each example in the fine-tune, averaged before the clip. "
                 "Default: 1, or 16 (paper).", rich_help_panel=TRAINING),
]  # fmt: skip
ProbeSteps = Annotated[
    int | None,
    typer.Option("--probe-steps", help="Updates T of the probe. Default: 120 (tiny), 200 (small), 100 (paper).",
                 rich_help_panel=TRAINING),
]  # fmt: skip
ProbeBatchSize = Annotated[
    int | None,
    typer.Option("--probe-batch-size", help="Expected batch B = qN of the probe. Default: N (every example, q = 1).",
                 rich_help_panel=TRAINING),
]  # fmt: skip
ProbeLr = Annotated[
    float | None,
    typer.Option("--probe-lr", help="Learning rate of the probe. Default: set by the noise and the data's size.",
                 rich_help_panel=TRAINING),
]  # fmt: skip
ProbeViews = Annotated[
    int | None,
    typer.Option("--probe-views", help="Augmented views K of each example in the probe. Default: 1.",
                 rich_help_panel=TRAINING),
]  # fmt: skip
RunPretrainSteps = Annotated[
    int | None,
    typer.Option("--pretrain-steps", help="Pretraining steps of a wrn. Default: 100 (tiny), 600 (small), "
                 "82000 (paper).", rich_help_panel=TRAINING),
]  # fmt: skip


# ------------------------------------------------------------------------------------------------------ finetune flags
#
# Flags of ``dprandp finetune`` alone: recipes, public weights, the network's shape, ingredients of the update.

Source = Annotated[
    str | None,
    typer.Option("--from", help="Start from the probe; from scratch, a random network without Phase I or II (De et al. "
                 "2022); or, init, from the public weights of --init. Default: probe, or init where --init is given.",
                 rich_help_panel=TRAINING, metavar="probe|scratch|init"),
]  # fmt: skip
ScratchArch = Annotated[
    str | None,
    typer.Option(help="With --from scratch or --init: wrn-DEPTH-WIDTH, or nf-resnet-50. Default: wrn-16-4.",
                 rich_help_panel=TRAINING),
]  # fmt: skip
Recipe = Annotated[
    str | None,
    typer.Option(help="de2022: batch, steps, learning rate, views and network as De et al. publish them for --arch and "
                 "--eps; σ is always calibrated. Flags win over it. Default: none.",
                 rich_help_panel=TRAINING, metavar="de2022"),
]  # fmt: skip
Init = Annotated[
    Path | None,
    typer.Option("--init", help="safetensors file with public weights of --arch. That they are public is yours to "
                 "declare, with --init-source. Default: none.", rich_help_panel=TRAINING, metavar="FILE"),
]  # fmt: skip
InitSource = Annotated[
    str | None,
    typer.Option(help="What the weights of --init were learned from; stored and shown. Default: none, needed with "
                 "--init.", rich_help_panel=TRAINING, metavar="TEXT"),
]  # fmt: skip
LayerOrder = Annotated[
    str | None,
    typer.Option(help="What comes before a convolution of a wrn made here: relu-norm-conv, norm-relu-conv, "
                 "norm-relu-conv+relu-norm-skip, relu-norm-conv+norm-relu-skip. Default: relu-norm-conv.",
                 rich_help_panel=TRAINING, metavar="ORDER"),
]  # fmt: skip
Padding = Annotated[
    str | None,
    typer.Option(help="Of its convolutions with stride 2: symmetric, or same (De et al.). Default: symmetric.",
                 rich_help_panel=TRAINING, metavar="symmetric|same"),
]  # fmt: skip
Pooling = Annotated[
    str | None,
    typer.Option(help="Grids that its features are averaged over: 1, 4 or 1+4. Default: 1+4, or 1 (nf-resnet-50).",
                 rich_help_panel=TRAINING, metavar="GRIDS"),
]  # fmt: skip
PrivateOptimizer = Annotated[
    str | None,
    typer.Option(help="What is done with noisy gradients: sgd or adam. Default: sgd.", rich_help_panel=TRAINING,
                 metavar="sgd|adam"),
]  # fmt: skip
Momentum = Annotated[
    float | None,
    typer.Option(help="Of the optimizer, in [0, 1). Default: 0 (sgd), 0.9 (adam).", rich_help_panel=TRAINING),
]
Ema = Annotated[
    float | None,
    typer.Option(help="Decay in [0, 1) of the moving average of the parameters that is released; 0 releases the last "
                 "ones. Default: 0.9999, less in the first steps.", rich_help_panel=TRAINING),
]  # fmt: skip
