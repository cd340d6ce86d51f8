"""Flags of ``dprandp finetune`` alone: recipes, public weights, the network's shape, ingredients of the update."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dprandp.cli.flags import TRAINING

Source = Annotated[
    str | None,
    typer.Option("--from", help="Start from the probe; from scratch, a random network without Phase I or II (De et al. "
                 "2022); or, init, from the public weights of --init. Default: probe, or init where --init is given.",
                 rich_help_panel=TRAINING, metavar="probe|scratch|init"),
]  # fmt: skip
Arch = Annotated[
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
Optimizer = Annotated[
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
