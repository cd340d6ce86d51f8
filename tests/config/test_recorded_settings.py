"""What a run records, and its report shows: the settings that had a say, all of them and no others."""

from __future__ import annotations

from typing import Any

import pytest

from dprandp.config.schema import as_dict, build, resolve
from dprandp.errors import UsageError

LEARNING_OF_WRN = {"steps", "batch_size", "optimizer", "schedule", "projection_hidden"}
LEARNING_OF_PATCHNET = {"dictionary_patches", "dictionary_iterations"}

WITHOUT_A_SAY = [
    ("pretrain", {}, LEARNING_OF_WRN | {"layers"}),
    ("pretrain", {"random_init": True}, LEARNING_OF_PATCHNET | LEARNING_OF_WRN),
    ("pretrain", {"arch": "wrn-16-4"}, {"filters", "patch_size"}),
    ("pretrain", {"arch": "wrn-16-4", "random_init": True}, {"filters"} | LEARNING_OF_WRN),
    ("finetune", {}, {"arch"}),
    ("finetune", {"refit_steps": 0}, {"arch", "refit_part"}),
    ("finetune", {"source": "scratch"}, {"refit_part"}),
]

WITH_A_SAY = [
    ("pretrain", {}, LEARNING_OF_PATCHNET | {"filters", "colour", "arch"}),
    ("pretrain", {"random_init": True}, {"filters", "patch_size", "colour", "arch", "seed"}),
    ("pretrain", {"arch": "wrn-16-4"}, LEARNING_OF_WRN | {"feature_stages"}),
    ("pretrain", {"arch": "wrn-16-4", "random_init": True}, {"feature_stages", "layer_order"}),
    ("finetune", {}, {"refit_part", "clip_norm", "views", "ema", "source"}),
    ("finetune", {"source": "scratch"}, {"arch", "ema"}),
    ("finetune", {"source": "scratch", "refit_steps": 5}, {"arch", "refit_part"}),
]


@pytest.mark.parametrize(("stage", "given", "names"), WITHOUT_A_SAY)
def test_a_setting_without_a_say_is_not_recorded(stage: str, given: dict[str, Any], names: set[str]) -> None:
    assert not names & as_dict(build(stage, given)).keys()


@pytest.mark.parametrize(("stage", "given", "names"), WITH_A_SAY)
def test_a_setting_with_a_say_is_recorded(stage: str, given: dict[str, Any], names: set[str]) -> None:
    assert names <= as_dict(build(stage, given)).keys()


@pytest.mark.parametrize("stage", ["generate", "pretrain", "continue", "probe", "finetune"])
def test_what_is_recorded_is_enough_to_build_the_same_again(stage: str) -> None:
    for given in [{}, *(given for name, given, _ in WITHOUT_A_SAY if name == stage)]:
        recorded = as_dict(build(stage, given))
        assert as_dict(build(stage, recorded)) == recorded


def test_an_architecture_is_refused_where_it_would_have_no_say() -> None:
    with pytest.raises(UsageError, match="--arch sets a new network, but --from probe continues an existing one"):
        resolve("finetune", "tiny", None, {"arch": "wrn-16-4"})
    assert resolve("finetune", "tiny", None, {"arch": "wrn-10-1", "source": "scratch"}).arch == "wrn-10-1"
