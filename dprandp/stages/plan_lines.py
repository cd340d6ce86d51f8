"""A plan in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dprandp.files import size_text
from dprandp.runresults import ONE_IMAGE

ACTIONS = {"fresh": "", "resume": " (begun before: goes on)", "skip": " (finished: nothing to do)"}


def line_of(made: Mapping[str, Any]) -> str:
    """One stage's plan, a dictionary of ``planning.plan``, in one line."""
    action = ACTIONS[made["action"]]
    if made["stage"] == "generate":
        size = size_text(made["disk_bytes"])
        return f"generate: {made['count']} images of {made['process']} at {made['resolution']} px, {size}{action}"
    if made["stage"] == "pretrain":
        if "prior" in made:
            return f"pretrain: the prior {made['prior']} ({made['arch']}, {made['feature_dim']} features){action}"
        how = _dictionary(made) if "filters" in made else f"{made['steps']} steps of {made['batch_size']} images"
        how = "random weights" if made["random_init"] else how
        return f"pretrain: {made['arch']}, {how}, {made['feature_dim']} features{action}"
    if "epsilon_after" not in made:
        return f"continue: {made['steps']} steps on public images alone ({made['public']}), no cost in ε{action}"
    refit = made["refit"]
    then = "" if refit is None else f", then the head alone: T = {refit['steps']}, σ = {refit['noise_multiplier']:.4g}"
    size = f"N = {made['examples']}"
    if made["unit"] != ONE_IMAGE:
        size += f" units, each {made['unit']}, {made['train_examples']} images"
    noise = ", discrete noise" if made["noise"] == "discrete" else ""
    if made["stage"] == "continue":
        noise += ", after public ones" if made["public_steps"] else ""
        noise += "; T and σ at most these: the switch decides" if made["switch"] else ""
    return (
        f"{made['stage']} on {made['data']} ({size}): T = {made['steps']} steps, "
        f"q = {made['sample_rate']:.4g}, σ = {made['noise_multiplier']:.4g}, C = {made['clip_norm']:g}, "
        f"K = {made['views']}{noise}{then}; the run's ε afterwards: {made['epsilon_after']:.4f} at "
        f"δ = {made['delta']:g}{action}"
    )


def _dictionary(made: Mapping[str, Any]) -> str:
    return f"{made['filters']} filters" + (" each for colour and for grey data" if made["extractors"] > 1 else "")
