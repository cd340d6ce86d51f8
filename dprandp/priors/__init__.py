"""Priors that ship: finished extractors, learned from images of random processes, and a card beside each.

    NAME.safetensors   the extractor's tensors
    NAME.json          the card: hash, configurations, commands, hardware, seconds, results
    NAME.md            the card for people, written from NAME.json

``scripts/make_prior.py`` makes all three from a finished run. What else a probe needs, the statistics of synthetic
features, is not shipped: it is made again from the process and the seed on the card (``pretrain/shipped.py``).

Nothing here is trusted: a file whose hash is not its card's is refused.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dprandp.config.schema import GenerateConfig, PretrainConfig, build, extractors_of
from dprandp.errors import CheckpointError, UsageError, nearest
from dprandp.runs.checkpoint import tensors_from_bytes
from dprandp.runs.files import from_json, storage_errors
from dprandp.runs.results import wrong_entry

FOLDER = Path(__file__).parent
FORMAT = 1
MOST_BYTES = 12 * 2**20
"""Of a prior's tensors."""

_PROBE = {"data", "size", "epsilon", "delta", "accuracy", "deviation", "seeds"}
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Card:
    """What is known about a prior.

    Attributes:
        name: as given to ``--prior``.
        sha256: of NAME.safetensors, in hexadecimal.
        bytes: its size.
        generate, pretrain: configurations of the stages that made it.
        result: of its pretraining (``pretrain/__init__.py``): arch, feature_dim, parameters, steps, evaluation.
        commands: that make it again.
        seconds: of the two stages, by name.
        hardware: where it was made.
        probes: measured with it: data, size, epsilon, delta, accuracy and its deviation over seeds (None where there
            was one). May be empty.
        licence: of the tensors.
        version: of dprandp that made it.
    """

    name: str
    sha256: str
    bytes: int
    generate: GenerateConfig
    pretrain: PretrainConfig
    result: dict[str, Any]
    commands: list[str]
    seconds: dict[str, float]
    hardware: dict[str, Any]
    probes: list[dict[str, Any]]
    licence: str
    version: str


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
        card = from_json(content)
        if isinstance(card, dict) and type(card.get("format")) is int and card["format"] > FORMAT:
            raise CheckpointError(f"{path} has format {card['format']}; this version reads {FORMAT}", fix=_INSTALL)
        return parse(name, card)
    except (ValueError, KeyError, TypeError, UsageError) as error:
        raise CheckpointError(f"the card {path} is damaged", fix=_INSTALL) from error


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


_INSTALL = "install dprandp again: its files are not as they were published"


def parse(name: str, card: dict[str, Any]) -> Card:
    """A card from plain values, checked field by field.

    Raises:
        ValueError, KeyError, TypeError, UsageError: a field is missing, or not what its name says.
    """
    kinds = {
        "sha256": str, "bytes": int, "result": dict, "commands": list, "seconds": dict, "hardware": dict,
        "probes": list, "licence": str, "version": str,
    }  # fmt: skip
    for key, kind in kinds.items():
        if type(card[key]) is not kind:
            raise TypeError(f"{key} has another type")
    needed = {"arch", "feature_dim", "parameters", "steps", "loss", "knn_accuracy"}
    if card["format"] != FORMAT or card["name"] != name or not _HASH.fullmatch(card["sha256"]):
        raise ValueError("the card is of another prior or format")
    if not needed <= card["result"].keys() or wrong_entry(card["result"]) is not None:
        raise ValueError("the result is not one of a pretraining")
    if any(not isinstance(value, str) for value in card["commands"]):
        raise TypeError("a command is no text")
    if any(type(value) not in (int, float) for value in card["seconds"].values()):
        raise TypeError("a time is no number")
    for probe in card["probes"]:
        if wrong_entry(probe) is not None or _PROBE - probe.keys():
            raise ValueError("a result of a probe lacks entries")
        if (probe["deviation"] is None) != (probe["seeds"] == 1):
            raise ValueError("one seed has no deviation, and several have one")
    pretrain = build("pretrain", card["pretrain"])
    if len(extractors_of(pretrain)) > 1:
        raise ValueError("a prior is one extractor")
    return Card(
        name=name,
        generate=build("generate", card["generate"]),
        pretrain=pretrain,
        **{key: card[key] for key in kinds},
    )
