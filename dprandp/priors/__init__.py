"""Priors that ship: finished extractors, learned from images of random processes, and a card beside each.

    NAME.safetensors   the extractor's tensors
    NAME.json          the card: hash, configurations, commands, hardware, seconds, results
    NAME.md            the card for people, written from NAME.json

``scripts/make_prior.py`` makes all three from a finished run. Nothing here is trusted: a file whose hash is not its
card's is refused.

With a prior, ``pretrain`` copies the shipped extractor into the run. A probe also needs the whitener, the statistics of
synthetic features. It depends on declared facts of the data (colour, size, mirror images) and is large (190 MB for
1,600 filters), so it is computed from the images that the prior's own run would have taken: ``generate`` makes only
these (``GenerateConfig.sample``), from the process and the seed on the card. On the processor and the versions of the
card the bytes are the same; elsewhere they may differ in the last bit of a pixel.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PlainValidator
from torch import Tensor, nn

from dprandp.config.schema import GenerateConfig, PretrainConfig, StageConfig, as_dict, build, extractors_of
from dprandp.errors import CheckpointError, DprandpError, UsageError, nearest
from dprandp.models.extractor import build_extractor, load_weights
from dprandp.runs.checkpoint import tensors_from_bytes
from dprandp.runs.files import from_json, read_record, size_text, storage_errors
from dprandp.runs.results import Extractor

FOLDER = Path(__file__).parent
FORMAT = 1
MOST_BYTES = 12 * 2**20
"""Of a prior's tensors."""

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_INSTALL = "install dprandp again: its files are not as they were published"


class Probe(BaseModel, frozen=True, strict=True):
    """Accuracy of private probes with a prior, and its deviation over seeds (None where there was one)."""

    data: str
    size: str
    epsilon: float
    delta: float
    accuracy: float
    deviation: float | None
    seeds: int


class Card(BaseModel, frozen=True, strict=True):
    """NAME.json: what is known about a prior."""

    format: Literal[1]
    name: str  # as given to --prior
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]  # of NAME.safetensors
    bytes: int  # its size
    generate: Annotated[GenerateConfig, PlainValidator(partial(build, "generate"))]
    pretrain: Annotated[PretrainConfig, PlainValidator(partial(build, "pretrain"))]
    result: Annotated[Extractor, PlainValidator(partial(read_record, Extractor))]  # of its pretraining
    commands: list[str]  # that make it again
    seconds: dict[str, float]  # of the two stages, by name
    hardware: dict[str, Any]  # where it was made
    probes: list[Probe]  # measured with it
    licence: str  # of the tensors
    version: str  # of dprandp that made it


def prior_names() -> list[str]:
    """Names of the priors that ship, in alphabetical order."""
    return sorted(path.stem for path in FOLDER.glob("*.json") if _NAME.fullmatch(path.stem))


def read_card(name: str) -> Card:
    """The card of a prior.

    Raises:
        UsageError: there is no such prior. CheckpointError: its card is damaged, or of a newer version.
    """
    path = FOLDER / f"{name}.json"
    if not _NAME.fullmatch(name) or not path.is_file():
        raise UsageError(f"there is no prior called {name!r}", fix=nearest(name, prior_names()))
    with storage_errors(path, "read"):
        content = path.read_bytes()
    try:
        return parse(name, from_json(content))
    except (ValueError, UsageError) as error:
        raise CheckpointError(f"the card {path} is damaged, or of a newer version", fix=_INSTALL) from error


def parse(name: str, content: Any) -> Card:
    """A card from plain values, checked field by field.

    Raises:
        ValueError, UsageError: a field is missing, or not what its name says.
    """
    card = Card.model_validate(content)
    if card.name != name:
        raise ValueError("the card is of another prior")
    if len(extractors_of(card.pretrain)) > 1:
        raise ValueError("a prior is one extractor")
    return card


def load_prior(name: str) -> tuple[Card, dict[str, Tensor]]:
    """A prior's card and tensors, float32 on the CPU.

    Raises:
        UsageError: there is no such prior.
        CheckpointError: the tensors are missing, or not those that the card describes.
    """
    card = read_card(name)
    path = FOLDER / f"{name}.safetensors"
    if not path.is_file():
        raise CheckpointError(f"the prior {path} is missing", fix=_INSTALL)
    with storage_errors(path, "read"):
        data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != card.sha256:
        raise CheckpointError(
            f"the prior {path} is not the one that its card describes: its sha256 differs", fix=_INSTALL
        )
    return card, tensors_from_bytes(data, path)


def public_stages(name: str, statistics_images: int | None = None) -> dict[str, StageConfig]:
    """Configurations of ``generate`` and ``pretrain`` for a prior.

    ``statistics_images`` is how many images a probe's statistics are computed from; None: all that there were.

    Raises:
        UsageError: there is no such prior. CheckpointError: its files are damaged.
    """
    card, _ = load_prior(name)  # refuses damaged tensors before making images
    images = card.generate
    if statistics_images is not None and statistics_images < images.count:
        images = replace(images, sample=statistics_images)
    return {"generate": images, "pretrain": replace(card.pretrain, prior=name)}


def shipped_extractor(config: PretrainConfig) -> tuple[nn.Module, Card, dict[str, str]]:
    """The extractor of the prior that a configuration names.

    Returns:
        The extractor, its card, and the stage's input for ``RunDir.begin``.

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
    return network, card, {f"prior/{card.name}": card.sha256}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A prior in the table of ``dprandp priors``; of one whose card cannot be read only the first two are known."""

    name: str
    problem: str | None  # what is wrong with its files
    process: str | None = None
    images: int | None = None  # that it was learned from
    size: str | None = None
    arch: str | None = None
    bytes: int | None = None
    feature_dim: int | None = None
    knn_accuracy: float | None = None
    probes: list[dict[str, Any]] | None = None  # see ``Probe``
    licence: str | None = None
    sha256: str | None = None


def table() -> list[Row]:
    """The priors that ship."""
    return [_row(name) for name in prior_names()]


def _row(name: str) -> Row:
    row = Row(name=name, problem=None)
    try:
        card = read_card(name)
        row = Row(
            name=name,
            problem=None,
            process=card.generate.process,
            images=card.generate.count,
            size=card.pretrain.size,
            arch=card.pretrain.arch,
            bytes=card.bytes,
            feature_dim=card.result.feature_dim,
            knn_accuracy=card.result.knn_accuracy,
            probes=[probe.model_dump() for probe in card.probes],
            licence=card.licence,
            sha256=card.sha256,
        )
        shipped_extractor(replace(card.pretrain, prior=name))
    except DprandpError as error:
        return replace(row, problem=error.problem)
    return row


def check(rows: list[Row]) -> None:
    """Refuse (CheckpointError) a table with a damaged prior, naming the first one."""
    for row in rows:
        if row.problem is not None:
            raise CheckpointError(row.problem, fix="install dprandp again: its files have changed")


def lines(rows: list[Row]) -> str:
    """``table`` for people."""
    said = [f"{'name':<19} {'process':<20} {'images':>7} {'features':>8} {'bytes':>7}  {'licence':<8} results"]
    for row in rows:
        stamp = "" if row.problem is None else f"  DAMAGED: {row.problem}"
        if row.probes is None:
            said.append(f"{row.name:<18}{stamp}")
            continue
        results = [] if row.knn_accuracy is None else [f"k-NN {100 * row.knn_accuracy:.0f} % (synthetic)"]
        results += [
            f"{probe['data']} {100 * probe['accuracy']:.1f} % at ε = {probe['epsilon']:g}" for probe in row.probes
        ]
        said.append(
            f"{row.name:<19} {row.process:<20} {row.images:>7} {row.feature_dim:>8} "
            f"{size_text(row.bytes):>7}  {row.licence:<8} {'; '.join(results)}{stamp}"
        )
    said.append(f"cards: {FOLDER}; use one with: dprandp run --prior NAME --data DATA --eps 1")
    return "\n".join(said)
