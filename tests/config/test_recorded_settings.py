"""What a run records, and its report shows: the settings that had a say, all of them and no others."""

from __future__ import annotations

from typing import Any

import pytest

from dprandp.config.schema import as_dict, build, resolve
from dprandp.errors import UsageError

OF_WRN = {"steps", "batch_size", "optimizer", "schedule", "projection_hidden"}
OF_PATCHNET = {"dictionary_patches", "dictionary_iterations"}


@pytest.mark.parametrize(
    ("stage", "given", "without", "having"),
    [
        ("generate", {}, {"sample"}, {"process", "seed"}),
        ("pretrain", {}, OF_WRN, OF_PATCHNET | {"filters", "colour", "arch", "layers", "second_filters"}),
        ("pretrain", {"layers": 1}, OF_WRN | {"second_filters"}, OF_PATCHNET | {"filters", "layers"}),
        ("pretrain", {"random_init": True}, OF_PATCHNET | OF_WRN, {"filters", "patch_size", "colour", "arch", "seed"}),
        ("pretrain", {"arch": "wrn-16-4"}, {"filters", "patch_size"}, OF_WRN | {"feature_stages", "momentum"}),
        ("pretrain", {"arch": "wrn-16-4", "optimizer": "adamw"}, {"momentum"}, OF_WRN),
        ("pretrain", {"arch": "wrn-16-4", "random_init": True}, {"filters"} | OF_WRN, {"layer_order"}),
        ("continue", {}, {"delta"}, {"public", "switch"}),
        ("probe", {}, {"delta"}, {"clip_norm", "dims"}),
        ("finetune", {}, {"arch"}, {"refit_part", "clip_norm", "views", "ema", "source"}),
        ("finetune", {"refit_steps": 0}, {"arch", "refit_part"}, {"ema"}),
        ("finetune", {"source": "scratch"}, {"refit_part"}, {"arch", "ema"}),
        ("finetune", {"source": "scratch", "refit_steps": 5}, set(), {"arch", "refit_part"}),
    ],
)
def test_exactly_the_settings_with_a_say_are_recorded(
    stage: str, given: dict[str, Any], without: set[str], having: set[str]
) -> None:
    recorded = as_dict(build(stage, given))
    assert not without & recorded.keys()
    assert having <= recorded.keys()
    assert as_dict(build(stage, recorded)) == recorded  # enough to build the same again


def test_an_architecture_is_refused_where_it_would_have_no_say() -> None:
    with pytest.raises(UsageError, match="--arch sets a new network, but --from probe continues an existing one"):
        resolve("finetune", "tiny", None, {"arch": "wrn-16-4"})
    assert resolve("finetune", "tiny", None, {"arch": "wrn-10-1", "source": "scratch"}).arch == "wrn-10-1"
