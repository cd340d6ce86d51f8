"""The defaults that help texts state are those of the configuration: for every flag, size and recipe."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, get_args, get_origin

import pytest

from dprandp.cli import flags, stages
from dprandp.config.presets import SIZES
from dprandp.config.schema import DEFAULT_DATA, FinetuneConfig, build, lr_of, resolve
from dprandp.data import KNOWN
from dprandp.dpsgd.budget import default_delta
from dprandp.dpsgd.masks import rule_of
from dprandp.dpsgd.optimizers import OptimizerSettings
from dprandp.dpsgd.stage import DEFAULT_SHARE
from dprandp.finetune import RECIPES
from dprandp.finetune.start import network_config

MODULES = {"flags": flags, "continue": stages}


def text(value: Any) -> str:
    return f"{value:.15g}" if isinstance(value, float) else str(value)


def by_size(stage: str, setting: str) -> str:
    """As help texts state it: the value of all sizes; one and those that differ; or one for each."""
    values = {size: text(getattr(resolve(stage, size, None, {}), setting)) for size in SIZES}
    first = values["tiny"]
    others = [size for size in SIZES if values[size] != first]
    if not others:
        return first
    if len({values[size] for size in others}) == 1:
        return f"{first}, or {values[others[0]]} ({', '.join(others)})"
    return ", ".join(f"{value} ({size})" for size, value in values.items())


def of_recipes(field: str, *names: str, form: str = "{:g}") -> str:
    words = {"scratch": "from scratch"}
    return ", ".join(f"{form.format(getattr(RECIPES[name], field))} ({words.get(name, name)})" for name in names)


def paper(setting: str) -> str:
    assert {getattr(resolve("finetune", size, None, {}), setting) for size in ("tiny", "small")} == {None}
    return f"{getattr(resolve('finetune', 'paper', None, {}), setting)} (paper)"


def pretrain_lr() -> str:
    sgd = [lr_of(build("pretrain", {"size": size})) for size in SIZES]
    adamw = {lr_of(build("pretrain", {"optimizer": "adamw", "size": size})) for size in SIZES}
    assert (sgd[0], len(adamw)) == (sgd[1], 1)
    return f"{sgd[0]:g}, or {sgd[2]:g} (paper); {adamw.pop():g} for adamw"


def delta() -> str:
    assert [default_delta(count) for count in (10, 10_000, 21_600)] == [1e-5, 1e-5, 4e-6]
    return "1e-5, or 0.1/N (one digit, rounded down) where that is smaller"


def run_delta() -> str:
    published = {name: made.spec().published_delta for name, made in KNOWN.items()}
    named = [name for name, value in published.items() if value is not None]
    assert {default_delta(KNOWN[name].spec().train_units, published[name]) for name in named} == {1e-5}
    return f"the run's, else {delta()}; 1e-5 for {', '.join(named[:-1])} and {named[-1]}, as in published results"


def full_batch() -> str:
    assert {resolve("probe", size, None, {}).batch_size for size in SIZES} == {None}
    return "N (every example, q = 1)"


def unset(stage: str, setting: str, says: str) -> str:
    """``says``, of a setting that no size sets."""
    assert {getattr(resolve(stage, size, None, {}), setting) for size in SIZES} == {None}, setting
    return says


def masked(**given: Any) -> Any:
    return rule_of(build("finetune", {"keep": 0.1, **given}))


def momenta() -> str:
    return ", ".join(f"{OptimizerSettings(name).beta:g} ({name})" for name in ("sgd", "adam"))


def network(setting: str) -> str:
    made = network_config(build("finetune", {"source": "scratch"}))
    return getattr(made, setting) or {"padding": "symmetric"}[setting]


EXPECTED: dict[str, Callable[[], str]] = {
    "flags.Precision": lambda: by_size("probe", "precision"),
    "flags.Seed": lambda: by_size("generate", "seed"),
    "flags.DataName": lambda: f"the run's, else {DEFAULT_DATA}",
    "flags.Noise": lambda: by_size("finetune", "noise"),
    "flags.Epsilon": lambda: f"the run's, else {by_size('probe', 'epsilon')}",
    "flags.Delta": run_delta,
    "flags.Share": lambda: unset("probe", "share", f"{DEFAULT_SHARE:g}"),
    "flags.Clip": lambda: f"{by_size('probe', 'clip_norm')} for the probe, {by_size('finetune', 'clip_norm')} for the "
                          "fine-tune",
    "flags.Clipping": lambda: by_size("finetune", "clipping"),
    "flags.Freeze": lambda: unset("finetune", "freeze", "all are trained"),
    "flags.Select": lambda: unset("finetune", "select", "all are trained"),
    "flags.Keep": lambda: unset("finetune", "keep", "all are trained"),
    "flags.Prune": lambda: {False: "hold", True: "zero"}[masked(freeze="random").zero],
    "flags.Every": lambda: str(masked(select="random").every),
    "flags.Scope": lambda: masked(freeze="random").scope,
    "flags.Views": lambda: by_size("probe", "views"),
    "flags.BatchSize": full_batch,
    "flags.Steps": lambda: by_size("probe", "steps"),
    "flags.Lr": lambda: unset("probe", "lr", "set by the noise and the data's size"),
    "flags.FinetuneViews": lambda: by_size("finetune", "views"),
    "flags.FinetuneBatchSize": lambda: of_recipes("batch_part", "patchnet", "wrn", form="{:.2g} N") + ", "
                                       + paper("batch_size"),
    "flags.FinetuneSteps": lambda: of_recipes("steps", "patchnet", "wrn", "scratch") + ", " + paper("steps"),
    "flags.FinetuneLr": lambda: unset("finetune", "lr", of_recipes("lr", "patchnet", "wrn", "scratch")),
    "flags.TunedOn": lambda: unset("probe", "tuned_on", "nothing"),
    "flags.Count": lambda: by_size("generate", "count"),
    "flags.Resolution": lambda: by_size("generate", "resolution"),
    "flags.Prior": lambda: unset("pretrain", "prior", "none, or the run's"),
    "flags.Arch": lambda: by_size("pretrain", "arch"),
    "flags.Layers": lambda: by_size("pretrain", "layers"),
    "flags.PretrainSteps": lambda: by_size("pretrain", "steps"),
    "flags.PretrainBatchSize": lambda: by_size("pretrain", "batch_size"),
    "flags.PretrainLr": pretrain_lr,
    "flags.Optimizer": lambda: by_size("pretrain", "optimizer"),
    "flags.FeatureStages": lambda: by_size("pretrain", "feature_stages"),
    "flags.RunSteps": lambda: of_recipes("steps", "patchnet", "wrn") + ", " + paper("steps"),
    "flags.RunBatchSize": lambda: of_recipes("batch_part", "patchnet", "wrn", form="{:.2g} N") + ", "
                                  + paper("batch_size"),
    "flags.RunLr": lambda: unset("finetune", "lr", of_recipes("lr", "patchnet", "wrn")),
    "flags.RunViews": lambda: by_size("finetune", "views"),
    "flags.ProbeSteps": lambda: by_size("probe", "steps"),
    "flags.ProbeBatchSize": full_batch,
    "flags.ProbeLr": lambda: unset("probe", "lr", "set by the noise and the data's size"),
    "flags.ProbeViews": lambda: by_size("probe", "views"),
    "flags.RunPretrainSteps": lambda: by_size("pretrain", "steps"),
    "flags.Source": lambda: f"{by_size('finetune', 'source')}, or init where --init is given",
    "flags.ScratchArch": lambda: by_size("finetune", "arch"),
    "flags.Recipe": lambda: unset("finetune", "recipe", "none"),
    "flags.Init": lambda: unset("finetune", "init", "none"),
    "flags.InitSource": lambda: unset("finetune", "init_source", "none, needed with --init"),
    "flags.LayerOrder": lambda: network("layer_order"),
    "flags.Padding": lambda: network("padding"),
    "flags.PrivateOptimizer": lambda: unset("finetune", "optimizer", "sgd"),
    "flags.Momentum": momenta,
    "flags.Ema": lambda: f"{by_size('finetune', 'ema')}, less in the first steps",
    "continue.Public": lambda: by_size("continue", "public"),
    "continue.Instances": lambda: by_size("continue", "instances"),
    "continue.ContinueShare": lambda: by_size("continue", "share"),
    "continue.Switch": lambda: by_size("continue", "switch"),
    "continue.Mix": lambda: by_size("continue", "mix"),
    "continue.ContinueSteps": lambda: by_size("continue", "steps"),
    "continue.ContinueBatchSize": lambda: f"{RECIPES['wrn'].batch_part:.2g} N, "
                                          f"{resolve('continue', 'paper', None, {}).batch_size} (paper)",
    "continue.PublicBatchSize": lambda: by_size("continue", "public_batch_size"),
    "continue.ContinueLr": lambda: by_size("continue", "lr"),
    "continue.PublicLr": lambda: by_size("continue", "public_lr"),
    "continue.ContinueViews": lambda: by_size("continue", "views"),
}  # fmt: skip

NO_SETTING = {
    "flags.Model", "flags.Size", "flags.Download", "flags.UnitColumn", "flags.Workers",
    "flags.Pooling",  # by the extractor's class: 1+4, or 1 for nf-resnet-50
}  # fmt: skip
"""Defaults that no configuration holds: of what the run or the machine has."""


def stated() -> dict[str, str]:
    """Flag -> the default that its help states, without the full stop."""
    found = {}
    for kind, module in MODULES.items():
        for name, value in vars(module).items():
            if get_origin(value) is not Annotated:
                continue
            helped = next((each.help for each in get_args(value)[1:] if getattr(each, "help", None)), "")
            if match := re.search(r"Default:? (.+?)\.(?: |$)", helped):
                found[f"{kind}.{name}"] = match.group(1)
    return found


def test_every_stated_default_is_compared() -> None:
    """A new flag whose help states a default has to be entered above."""
    assert stated().keys() == EXPECTED.keys() | NO_SETTING
    assert not EXPECTED.keys() & NO_SETTING


@pytest.mark.parametrize("flag", EXPECTED)
def test_a_help_text_states_the_default_of_the_configuration(flag: str) -> None:
    assert stated()[flag] == EXPECTED[flag]()


def test_the_default_process_is_named_as_such() -> None:
    helped = get_args(flags.Process)[1].help
    assert f"{by_size('generate', 'process')} (default)" in helped


def test_settings_that_are_off_are_off() -> None:
    """What 'unset' stands for above: every weight is trained, and by plain sgd."""
    config = FinetuneConfig()
    assert (config.optimizer or "sgd") == "sgd"
    assert rule_of(config) is None
