"""Settings chosen on the private data, charged: the best of a random number of private fits.

Each fit is scored by a noisy count on private records that it was not fitted on; only the best setting and its score
come out. ``privacy/selection.py`` shows that one fit is a Gaussian mechanism, ``privacy/tuning.py`` the cost of the
best.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from dprandp.config.schema import ProbeConfig
from dprandp.dpsgd.features import placed, private_features, require_room
from dprandp.dpsgd.stage import name_private_stage
from dprandp.errors import UsageError
from dprandp.privacy.accounting import compose
from dprandp.privacy.adaptive import calibrate_stage
from dprandp.privacy.clipping import clipped_softmax_sum
from dprandp.privacy.selection import PrivateSelection, Trial, make_selection_plan
from dprandp.probe import public_part
from dprandp.probe.head import HeadSettings, begin_head, lr_at, released_head, update_head
from dprandp.runs.context import Context
from dprandp.runs.results import ONE_IMAGE
from dprandp.runs.tuning import Chosen, PrivateTuning
from dprandp.tune.settings import TuneConfig, as_probe, probe_epsilon, settings_for

STAGE = "tune"

ETA = 0.0
"""Logarithmic number of private trials, one of Papernot & Steinke's distributions with low cost for its mean."""

ROWS_AT_ONCE = 1024


def choose_privately(
    config: ProbeConfig, tune: TuneConfig, context: Context, asked: dict[str, Any]
) -> PrivateTuning:
    """Try settings on the private data by ``privacy/selection.py``, and record only its result."""
    warn = context.console.warn
    stage = name_private_stage(STAGE, config, context)
    spec, budget, spent = stage.spec, stage.budget, stage.spent
    if spec.unit != ONE_IMAGE:
        raise UsageError(
            f"tuning on private data counts single images, but one unit of these data is {spec.unit}",
            fix="tune with --on synthetic or on a public set; the probe then protects whole units",
        )
    extractor, mirror, whitener = public_part(as_probe(config, context), context, spec)
    whitener = whitener.to(context.device)
    settings = settings_for(config, whitener.components)
    epsilon = probe_epsilon(config)
    plan = make_selection_plan(
        stage=STAGE, epsilon=budget.epsilon, delta=budget.delta, epsilon_target=tune.spend * epsilon, spent=spent,
        examples=spec.train_examples, mean_trials=tune.trials, eta=ETA, held_out=tune.held_out,
        clip_norm=config.clip_norm, steps=[setting.steps for setting in settings], warn=warn,
    )  # fmt: skip
    # plan the probe now, to refuse too small a budget before charging
    sigma = calibrate_stage(epsilon, budget.delta, 1.0, config.steps, [*spent, [plan.event]], warn)
    probe_mu = math.sqrt(config.steps) / sigma
    stage = replace(stage, plan=plan).fix_plan()
    selection = PrivateSelection(plan, stage.ledger, stage.random_source(), stage.attempt, warn)
    # ------------------------------------------------------------------------------------------------ private from here
    features, labels = private_features(stage, extractor, whitener, mirror=mirror, views=1, seed=config.seed)
    require_room(features.numel() * features.element_size() // 2, "tune's candidates with half the dimensions")
    features, labels = placed(features, labels, len(spec.classes), context.device)
    context.console.say("tune: running a random, secret number of private trials")

    def one_trial(trial: Trial) -> None:
        setting = settings[trial.setting]
        default = config.lr or lr_at(plan.mu, round(trial.expected_fitted), config.steps, plan.clip_norm)
        rule = HeadSettings(setting.lr_factor * default, config.momentum, config.released)
        fitted, held_out = torch.from_numpy(trial.fitted), torch.from_numpy(trial.held_out)
        seen = whitener.cut(features, setting.dims)
        state = begin_head(torch.zeros(seen.shape[1], len(spec.classes), device=context.device))
        for number in range(trial.steps):
            clipped = clipped_softmax_sum(seen, labels, state["head"], plan.clip_norm, rows=fitted)
            update_head(state, trial.release(clipped), rule, number, trial.steps)
        head = released_head(state, rule)
        parts = held_out.split(ROWS_AT_ONCE)  # in blocks, to bound memory
        answers = [(seen[part].to(head) @ head).argmax(dim=1) for part in parts]
        trial.score(torch.cat(answers) == labels[held_out])

    best, score = selection.run(one_trial)
    stage.keep_head()
    # ------------------------------------------------------------------------------------------ from here on: charged
    default = config.lr or lr_at(probe_mu, spec.train_examples, config.steps, config.clip_norm)
    return PrivateTuning(
        on=tune.on,
        trials=tune.trials,
        chosen=Chosen(default * settings[best].lr_factor, settings[best].steps, settings[best].dims),
        noisy_right_answers=score,
        noise_std=plan.score_std,
        held_out_examples_expected=plan.held_out * plan.examples,
        charged_epsilon=compose([plan.event], plan.delta).upper,
        epsilon=stage.ledger.spent(plan.delta).upper,
        delta=plan.delta,
        plan=plan.to_dict(),
        settings=tuple(settings),
        private=stage.ledger.private,
        asked=asked,
    )
