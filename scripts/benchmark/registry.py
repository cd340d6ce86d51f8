"""Every pair by its name."""

from __future__ import annotations

from benchmark import accounting, finetuning, generator, patchnet, predicting, pretraining, probe
from benchmark.pairs import Pair

PAIRS: dict[str, Pair] = {
    pair.name: pair
    for pair in (
        Pair("generator", "stylegan-oriented against a dense StyleGAN2", generator.dense_case),
        Pair("processes", "every random process against stylegan-oriented", generator.processes_case),
        Pair("pretraining", "a contrastive step against forward and backward alone", pretraining.case),
        Pair("patchnet", "patchnet's features against ordinary layers", patchnet.features_case),
        Pair("two-layers", "features of two layers against those of before", patchnet.two_layers_case),
        Pair("probe", "a step of the probe against Opacus", probe.case),
        Pair("finetune", "a step of 16 views against a non-private one", finetuning.plain_case("finetune", 1.15, 1.5)),
        Pair("finetune-opacus", "a step of 16 views against Opacus", finetuning.opacus_case("finetune-opacus", 3)),
        Pair("one-view", "a step of 1 view against a non-private one", finetuning.plain_case("one-view", 2, None)),
        Pair("one-view-opacus", "a step of 1 view against Opacus", finetuning.opacus_case("one-view-opacus", None)),
        Pair("patchnet-gradients", "its per-example gradients against autograd", patchnet.gradients_case),
        Pair("predict", "predict on a folder against loops over its files", predicting.case),
        Pair("accountant", "cold calibration at ε = 1", accounting.case(accounting.SETTINGS)),
        Pair("accountant-eps8", "cold calibration at ε = 8", accounting.case(accounting.LARGER_BUDGET)),
    )
}
