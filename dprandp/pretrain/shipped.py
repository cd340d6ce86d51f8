"""A shipped prior in place of ``generate`` and ``pretrain``, and the list of priors.

With a prior, ``pretrain`` copies the shipped extractor into the run. A probe also needs the whitener, the statistics of
synthetic features. It depends on declared facts of the data (colour, size, mirror images), and for 1600 filters it has
190 MB, so it is not shipped but computed from the images that the prior's own run would have taken: ``generate`` makes
only these (``GenerateConfig.sample``), from the process and the seed on the card. On the processor
and the versions of the card the bytes are the same; elsewhere they may differ in the last bit of a pixel. The run
records the hash of the images, and of the whitener that came of them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from dprandp import priors
from dprandp.config.schema import PretrainConfig, StageConfig, as_dict
from dprandp.errors import CheckpointError, DprandpError, UsageError
from dprandp.models.extractor import build_extractor, load_weights
from dprandp.priors import Card, load_prior, prior_names, read_card
from dprandp.runs.files import size_text


def public_stages(name: str, statistics_images: int | None = None) -> dict[str, StageConfig]:
    """Configurations of ``generate`` and ``pretrain`` for a prior.

    Args:
        name: of the prior.
        statistics_images: how many images a probe's statistics are computed from; None: all that there were.

    Raises:
        UsageError: there is no such prior. CheckpointError: its files are damaged.
    """
    card, _ = load_prior(name)  # refuses damaged tensors before making images
    images = card.generate
    if statistics_images is not None and statistics_images < images.count:
        images = replace(images, sample=statistics_images)
    return {"generate": images, "pretrain": replace(card.pretrain, prior=name)}


def shipped_extractor(config: PretrainConfig) -> tuple[nn.Module, dict[str, Any], dict[str, str]]:
    """The extractor of the prior that a configuration names.

    Returns:
        The extractor; what the result of ``pretrain`` says about it; the stage's input, for ``RunDir.begin``.

    Raises:
        UsageError: no such prior, or settings other than those of its card.
        CheckpointError: its files are damaged, or not those of its card.
    """
    card, tensors = load_prior(config.prior)
    wanted, made = as_dict(config), as_dict(replace(card.pretrain, prior=config.prior))
    other = sorted(key for key in wanted | made if wanted.get(key) != made.get(key))
    if other:
        raise UsageError(
            f"the prior {config.prior} was made with other settings: {other[0]} = {made.get(other[0])!r}",
            fix="leave the settings of pretrain out: a prior has its own",
        )
    network = build_extractor(config)
    try:
        load_weights(network, tensors)
    except CheckpointError as error:
        raise CheckpointError(
            f"the prior {config.prior} does not fit its card: {error.problem}", fix=error.fix
        ) from error
    known = {key: value for key, value in card.result.items() if key not in ("seconds", "views_per_second")}
    facts = {
        **known,
        "views_per_second": None,
        "prior": card.name,
        "prior_sha256": card.sha256,
        "prior_images": card.generate.count,
    }
    return network, facts, {f"prior/{card.name}": card.sha256}


def table() -> list[dict[str, Any]]:
    """The priors that ship.

    Returns:
        A row each: name, process, images, size, arch, filters (patchnet), bytes, feature_dim, knn_accuracy, probes,
        licence, sha256, and problem: None, or what is wrong with its files.
    """
    rows = []
    for name in prior_names():
        row: dict[str, Any] = {"name": name, "problem": None}
        rows.append(row)
        try:
            card = read_card(name)
            row |= {
                "process": card.generate.process,
                "images": card.generate.count,
                "size": card.pretrain.size,
                "arch": card.pretrain.arch,
                "bytes": card.bytes,
                "feature_dim": card.result["feature_dim"],
                "knn_accuracy": card.result["knn_accuracy"],
                "probes": card.probes,
                "licence": card.licence,
                "sha256": card.sha256,
            }
            shipped_extractor(replace(card.pretrain, prior=name))
        except DprandpError as error:
            row["problem"] = error.problem
    return rows


def check(rows: list[dict[str, Any]]) -> None:
    """Refuse a table with a damaged prior.

    Raises:
        CheckpointError: names the first one.
    """
    for row in rows:
        if row["problem"] is not None:
            raise CheckpointError(row["problem"], fix="install dprandp again: its files have changed")


def lines(rows: list[dict[str, Any]]) -> str:
    """``table`` for people."""
    head = f"{'name':<19} {'process':<20} {'images':>7} {'features':>8} {'bytes':>7}  {'licence':<8} results"
    said = [head]
    for row in rows:
        if "process" not in row:
            said.append(f"{row['name']:<19} DAMAGED: {row['problem']}")
            continue
        stamp = "" if row["problem"] is None else f"  DAMAGED: {row['problem']}"
        said.append(
            f"{row['name']:<19} {row['process']:<20} {row['images']:>7} {row['feature_dim']:>8} "
            f"{size_text(row['bytes']):>7}  {row['licence']:<8} {_results(row)}{stamp}"
        )
    said.append(f"cards: {priors.FOLDER}; use one with: dprandp probe --prior NAME --data DATA --eps 1")
    return "\n".join(said)


def card_text(card: Card) -> str:
    """A card in Markdown, with the figures of the card."""
    result, images = card.result, card.generate
    public = {key: value for key, value in result.items() if type(value) is float}
    measured = [
        f"| {probe['data']} | {probe['size']} | {probe['epsilon']:g} | {probe['delta']:g} | "
        f"{_measured_accuracy(probe)} | {probe['seeds']} |"
        for probe in card.probes
    ]
    probes = ["| data | size | ε | δ | test accuracy, % | seeds |", "|---|---|---|---|---|---|", *measured]
    took = ", ".join(f"{stage} {seconds / 3600:.3f} h ({seconds:.0f} s)" for stage, seconds in card.seconds.items())
    where = ", ".join(f"{key} {value}" for key, value in card.hardware.items())
    return "\n".join([
        f"# Prior {card.name}",
        "",
        f"A feature extractor ({result['arch']}, {result['feature_dim']} features, {result['parameters']} parameters) "
        f"learned from {images.count} images of the random process {images.process} at {images.resolution} px, seed "
        f"{images.seed}. No data of anybody's went into it: it has no privacy cost. It needs the statistics of "
        "synthetic features, which `dprandp probe --prior` makes again from the process and the seed.",
        "",
        "Made by",
        "",
        "```bash",
        *card.commands,
        "```",
        "",
        f"* time: {took}",
        f"* hardware and versions: {where}, dprandp {card.version}",
        f"* file: {card.name}.safetensors, {card.bytes} bytes, sha256 `{card.sha256}`",
        f"* licence: {card.licence}",
        "",
        "Public evaluation, on synthetic images alone:",
        "",
        *(f"* {key.replace('_', ' ')}: {value:.4g}" for key, value in public.items()),
        "",
        "Private probes with it (`--share 1`; mean ± sample standard deviation over seeds), by "
        "`scripts/results_table.py`:" if measured else "No private probe was measured with this file.",
        *(["", *probes] if measured else []),
        "",
    ])  # fmt: skip


def _measured_accuracy(probe: dict[str, Any]) -> str:
    spread = "" if probe["deviation"] is None else f" ± {100 * probe['deviation']:.1f}"
    return f"{100 * probe['accuracy']:.1f}{spread}"


def _results(row: dict[str, Any]) -> str:
    neighbours = "" if row["knn_accuracy"] is None else f"k-NN {100 * row['knn_accuracy']:.0f} % (synthetic)"
    measured = [
        f"{probe['data']} {100 * probe['accuracy']:.1f} % at ε = {probe['epsilon']:g}"
        for probe in row["probes"]
    ]
    return "; ".join([*([neighbours] if neighbours else []), *measured])
