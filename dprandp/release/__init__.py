"""A released model: load it from ``model/``, classify images with it, export it for others.

Only the three files of ``model/`` are read: a released model works without the run that made it.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dprandp.config import schema as configuration
from dprandp.config.declared import Decoding, Publication
from dprandp.config.presets import INPUT_SIZE
from dprandp.config.settings import checked
from dprandp.data import brought_to
from dprandp.dpsgd.release import MODEL_FILES, MODEL_FORMAT
from dprandp.errors import CheckpointError, DprandpError, InputError, UsageError, nearest
from dprandp.losses import probabilities
from dprandp.models.classifier import Classifier
from dprandp.models.extractor import build_extractor, layout_device
from dprandp.models.precision import BFLOAT16, FLOAT32, dtype_of
from dprandp.models.whitening import PooledOnly, Whitener
from dprandp.privacy.accounting import rounded_up
from dprandp.report.card import published
from dprandp.report.disclosure import why_not_private
from dprandp.runs.checkpoint import check_tensors, tensors_from_bytes
from dprandp.runs.directory import RunDir, result_digest
from dprandp.runs.files import atomic_write, from_json, read_record, storage_errors, to_json
from dprandp.runs.ledger import open_run_ledger
from dprandp.runs.results import PrivateResult, kind_of, read_result, wrong_entry
from dprandp.runs.tuning import TUNE
from dprandp.vision.images import to_input

MAX_CONFIG_BYTES = 64 * 2**20
RESTORE = "restore the folder from a copy"


@dataclass(frozen=True)
class ReleasedModel:
    """A released model, ready to use.

    Attributes:
        network: on the CPU, in evaluation mode.
        classes: names; score i is that of ``classes[i]``.
        shape: height, width, channels of the images it was trained on, before they were resized for the network.
        mirror: whether features are averaged over an image and its mirror image.
        decoding: the rules by which image files are read.
        result: of the stage that made the model: test metrics and the privacy disclosure.
        content: name -> bytes of the files, as they were verified.
        run_epsilon: what its run has spent by now, where that is more than the result states; None where it is not, or
            where no run stands behind the model.
    """

    network: Classifier
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    mirror: bool
    decoding: Decoding
    result: PrivateResult
    content: dict[str, bytes]
    run_epsilon: float | None = None

    @property
    def spent_since(self) -> str | None:
        """What whoever uses the model should know of its run's ε; None where nothing was spent since."""
        if self.run_epsilon is None:
            return None
        return (
            f"this model's ε = {rounded_up(self.result.epsilon)} is its own; the run has spent "
            f"ε = {rounded_up(self.run_epsilon)} by now, in a stage that is not finished"
        )

    @property
    def sha256(self) -> str:
        """Of the weights, ``model.safetensors``."""
        return hashlib.sha256(self.content["model.safetensors"]).hexdigest()

    @property
    def multi_label(self) -> bool:
        """Whether classes are labels of which an image may have several."""
        return self.result.multi_label is True

    @property
    def not_private_because(self) -> str | None:
        """The reason for the stamp NOT PRIVATE; None for a private model."""
        return why_not_private(self.result)

    def probabilities(self, images: np.ndarray) -> torch.Tensor:
        """Class probabilities, float32 [N, classes], of images, uint8 [N, height, width, channels] of ``shape``.

        Each image is computed independently. Rows sum to 1: the softmax of the scores, which is not calibrated. Where
        images have several labels, each probability is that of its label alone: the sigmoid of its score.
        """
        pixels = to_input(images, self.network.extractor.input_size)
        return probabilities(self.network.predict(pixels, mirror=self.mirror), self.multi_label)

    def predict(self, images: Path | str | Sequence[Path | str] | np.ndarray) -> list[dict[str, Any]]:
        """``predict`` for image files and folders, or uint8 [height, width, channels] or [N, height, width, channels].

        Raises:
            InputError: a file is missing or damaged, or an array holds no images.
        """
        if isinstance(images, np.ndarray):
            from dprandp.release.predictions import classified

            pixels = brought_to(images, self.shape)
            return classified(self, [f"[{index}]" for index in range(len(pixels))], pixels)
        paths = [images] if isinstance(images, Path | str) else images
        return predict(self, [Path(path) for path in paths])


def load_model(folder: Path | str) -> ReleasedModel:
    """Read a ``model/`` folder, or an exported copy of one: check its bytes, build its network and fill it.

    Raises:
        InputError: there is no model. CheckpointError: a file is missing, damaged, not the one that was released, of a
            newer format, or describes a network that does not fit the weights.
    """
    folder = Path(folder)
    if not folder.is_dir() or not (folder / "config.json").exists():
        raise InputError(
            f"there is no model in {folder}", fix="finish a probe or a fine-tune first, or check --run or --model"
        )
    content = {}
    for name in MODEL_FILES:
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise CheckpointError(f"{path} is missing, or a link", fix=RESTORE)
        with storage_errors(path, "read"):
            content[name] = path.read_bytes()
    config = _config(folder / "config.json", content["config.json"])
    for name, digest in config["sha256"].items():
        if hashlib.sha256(content[name]).hexdigest() != digest:
            raise CheckpointError(
                f"{folder / name} is not the file that was released: its sha256 differs from that in config.json",
                fix=RESTORE,
            )
    classes, shape = tuple(config["classes"]), tuple(config["input"]["shape"])
    network = _network(config, len(classes), content["model.safetensors"], folder / "model.safetensors")
    result = read_result(config["result"]["stage"], config["result"])
    decoding, since = _decoding(config), _run_epsilon(config)
    return ReleasedModel(network, classes, shape, config["input"]["mirror"], decoding, result, content, since)


def run_of(folder: Path) -> Path | None:
    """The run whose ``model`` folder this is; None for a model from elsewhere."""
    folder = folder.resolve()
    return folder.parent if folder.name == "model" and (folder.parent / "run.json").is_file() else None


def load_run_model(rundir: RunDir) -> ReleasedModel:
    """The model of a run, compared with the run's ledger and results.

    Raises:
        As ``load_model`` and ``open_run_ledger``. CheckpointError: the model was not made in this run, or
            contradicts run.json.
    """
    model, ledger = load_model(rundir.model_dir), open_run_ledger(rundir)
    sealed = [] if ledger is None else [seal for stage, seal in ledger.seals.items() if stage != TUNE]
    if not sealed or (sealed[-1].stage, sealed[-1].digest) != (model.result.stage, result_digest(model.result)):
        raise CheckpointError(
            f"{rundir.model_dir} holds a model that is not the one of the run's last finished stage: the privacy "
            "ledger has the hash of another result",
            fix="run the stage that was stopped again, or restore the run's model folder from a copy; --model names a "
            "model from elsewhere",
        )
    weights = hashlib.sha256(model.content["model.safetensors"]).hexdigest()
    if model.result.model_sha256 != weights:
        raise CheckpointError(
            f"the weights in {rundir.model_dir} are not those of its result: their hash is another",
            fix="restore the run's model folder from a copy",
        )
    spent = ledger.spent(model.result.delta).upper
    return replace(model, run_epsilon=spent) if spent > model.result.epsilon * (1 + 1e-6) else model


def _config(path: Path, data: bytes) -> dict[str, Any]:
    """Parse and check config.json, for every field that the network is built from."""
    why = "it is not valid JSON"
    try:
        config = from_json(data if len(data) <= MAX_CONFIG_BYTES else b"")
        why = "it does not describe a model"
        if isinstance(config, dict) and type(config.get("format")) is int and config["format"] != MODEL_FORMAT:
            newer = config["format"] > MODEL_FORMAT
            raise CheckpointError(
                f"{path} has format {config['format']}; this version reads {MODEL_FORMAT}",
                fix="upgrade dprandp" if newer else "use the version of dprandp that made it, or make the model again",
            )
        shape, classes, result = config["input"]["shape"], config["classes"], config["result"]
        fits = (
            config["format"] == MODEL_FORMAT
            and isinstance(config["extractor"], dict)
            and config["input"]["size"] == (config["extractor"].get("input_size") or INPUT_SIZE)
            and type(config["input"]["mirror"]) is bool
            and isinstance(_decoding(config), Decoding)
            and config["precision"] in (FLOAT32, BFLOAT16)
            and len(shape) == 3
            and all(type(side) is int and 1 <= side <= 10_000 for side in shape)
            and shape[2] in (1, 3)
            and len(classes) >= 2
            and all(isinstance(name, str) for name in classes)
            and not math.isnan(_run_epsilon(config) or 0)
            and set(config["sha256"]) == {name for name in MODEL_FILES if name != "config.json"}
            and wrong_entry(result["stage"], result) is None
            and isinstance(read_record(kind_of(result["stage"], result), result), PrivateResult)
        )
        if not fits:
            raise ValueError("a value out of its range")
        return config
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError, UsageError) as error:
        raise CheckpointError(f"{path} cannot be used: {why}", fix=RESTORE) from error


def _run_epsilon(config: dict[str, Any]) -> float | None:
    """What the run of an exported model had spent, where that was more than the model's ε. Raises ValueError."""
    return float(config["run_epsilon"]) if "run_epsilon" in config else None


def _decoding(config: dict[str, Any]) -> Decoding:
    """The rules by which image files are read; a model of before there were rules has none. Raises UsageError."""
    return checked("decoding", Decoding, config["input"].get("decoding", {}))


def _network(config: dict[str, Any], classes: int, data: bytes, path: Path) -> Classifier:
    """Build the network that the configuration describes, and fill it.

    It is first built without memory and compared with the file, so that a hostile description cannot exhaust memory.
    """
    tensors = tensors_from_bytes(data, path)
    projection = tensors.get("whitener.projection")
    if projection is not None and projection.ndim != 2:
        raise CheckpointError(f"{path} holds a whitener that is not a matrix", fix=RESTORE)

    def build() -> Classifier:
        extractor = build_extractor(configuration.build("pretrain", config["extractor"]))
        extractor.precision = config["precision"]
        width = extractor.feature_dim
        whitener = PooledOnly(width)
        if projection is not None:
            whitener = Whitener(width, projection.shape[1], extractor.parts, dtype_of(extractor))
        return Classifier(extractor, whitener, classes)

    try:
        with layout_device(str(config["extractor"].get("arch"))):
            layout = build().state_dict()
    except (DprandpError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        if isinstance(error, DprandpError) and str(config["extractor"].get("arch")).startswith(configuration.MODULE):
            raise  # about a user's code: where it is missing, not allowed, or another
        raise CheckpointError(
            f"{path.parent / 'config.json'} describes a network that this version cannot build",
            fix="restore the folder from a copy, or upgrade dprandp",
        ) from error
    try:
        check_tensors(tensors, layout, path)
    except CheckpointError as error:
        raise CheckpointError(error.problem, fix=RESTORE) from error
    network = build()
    network.load_state_dict(tensors)
    return network.eval()


# -------------------------------------------------------------------------------------------------------------- export

EXPORTED_FILES = (*MODEL_FILES, "example.py")
"""The allow-list of an export."""

EXAMPLE = '''"""Classify images with the model in this folder: python example.py IMAGE...

Needs dprandp (pip install dprandp).{stamp}"""

import sys
from pathlib import Path

from dprandp.release import load_model, predict

model = load_model(Path(__file__).parent)  # checks the files' hashes; they hold numbers and text, no code
for row in predict(model, [Path(name) for name in sys.argv[1:]]):
    print(row["image"], {shown})
'''

SHOWN = {False: 'row["class"], round(row["probability"], 4)', True: '*row["labels"]'}
"""What the example prints of one class an image, and of several labels."""



SUFFIXES = {"safetensors": ".zip", "torch-export": ".pt2", "onnx": ".onnx"}
"""The formats of an export, and how a file of each is called; safetensors may be a folder too."""


@dataclass(frozen=True)
class Export:
    """What ``export`` has written."""

    export: str  # path
    format: str
    files: tuple[str, ...]
    bytes: int  # in all
    private: bool
    epsilon: float
    delta: float
    sha256: str  # of the model's weights, in its metadata too
    largest_difference: float | None  # of a probability between a graph and the model in float32, on synthetic images
    evaluated_difference: float | None  # the same of the model in the precision in which it was evaluated
    run_epsilon: float | None  # of the run by now, where it has spent more than the model's ε


def export(
    model: ReleasedModel,
    target: Path,
    *,
    format: str = "safetensors",
    about: Publication | None = None,
    allow_not_private: bool = False,
) -> Export:
    """Write a verified model for others.

    Args:
        model: see ``load_model``; its bytes in memory are written, so nothing can change in between.
        target: for safetensors, a folder that is new or empty, or a new file ending in ``.zip``; for torch-export and
            onnx, a new file ending in ``.pt2`` and ``.onnx``.
        format: safetensors, a copy of the model's files; torch-export or onnx, one graph from pixels to probabilities
            (``graph.py``).
        about: what you say about the model, for its card and the metadata of a graph; None: nothing.
        allow_not_private: consent to export a model without a guarantee. It stays stamped NOT PRIVATE.

    Guarantee:
        Of safetensors nothing but ``EXPORTED_FILES`` is written. All bytes of every format are releasable. A graph was
        compared with the model before it is written.

    Raises:
        UsageError: the target exists or is called like another format's, a library is missing, or the model is not
            private and no consent was given. CheckpointError: a model that is not private has a card that does not say
            so. StorageError: the disk refuses.
    """
    _refuse_target(target, format)
    reason = model.not_private_because
    if reason is not None and not allow_not_private:
        raise UsageError(
            f"this model is NOT PRIVATE: {reason}",
            fix="make a private one with a finite --eps, or give --allow-not-private and handle the export as you "
            "handle the training images",
        )
    if reason is not None and b"NOT PRIVATE" not in model.content["MODEL_CARD.md"]:
        raise CheckpointError(
            "the model is NOT PRIVATE, but its MODEL_CARD.md does not say so", fix="restore model/ from a copy"
        )
    apart = evaluated = None
    if format == "safetensors":
        stamp = "" if reason is None else f"\n\nNOT PRIVATE. {reason}\n"
        example = EXAMPLE.format(stamp=stamp, shown=SHOWN[model.multi_label])
        content = {**_described(model, about), "example.py": example.encode("utf-8")}
        files = _write_files(content, target)
        size = sum(map(len, content.values()))
    else:
        from dprandp.release.graph import graph_of

        data, apart, evaluated = graph_of(model, format, about or Publication())
        with storage_errors(target.parent, "create"):
            target.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(target, data)
        files, size = (target.name,), len(data)
    result = model.result
    return Export(
        str(target), format, files, size, reason is None, result.epsilon, result.delta, model.sha256, apart, evaluated,
        model.run_epsilon,
    )


def _described(model: ReleasedModel, about: Publication | None) -> dict[str, bytes]:
    """The model's files; where there is something to say, with it in config.json and on the card."""
    said, since = {} if about is None else about.said(), model.spent_since
    if not said and since is None:
        return model.content
    card = model.content["MODEL_CARD.md"].decode("utf-8")
    if said:
        card = published(card, model.result, about)
    config = from_json(model.content["config.json"]) | ({"publication": said} if said else {})
    if since is not None:
        sentence = f"{since[0].upper()}{since[1:]}. That is what all that the run has released costs together."
        card += "" if sentence in card else f"\n{sentence}\n"  # it is there in the export of an export
        config["run_epsilon"] = str(model.run_epsilon)  # maybe infinite
    card = card.encode("utf-8")
    config["sha256"] |= {"MODEL_CARD.md": hashlib.sha256(card).hexdigest()}
    return {**model.content, "MODEL_CARD.md": card, "config.json": (to_json(config, indent=1) + "\n").encode("utf-8")}


def _refuse_target(target: Path, format: str) -> None:
    """Refuse an unknown format, a name that another format or none has, and whatever exists."""
    if format not in SUFFIXES:
        raise UsageError(f"there is no format {format!r}", fix=nearest(format, SUFFIXES))
    suffix, wanted = target.suffix.lower(), SUFFIXES[format]
    may_be_folder = format == "safetensors" and not FILE_SUFFIX.fullmatch(suffix)
    if suffix != wanted and not may_be_folder and not (format == "safetensors" and target.is_dir()):
        other = next((name for name, its in SUFFIXES.items() if its == suffix), None)
        kind = f"is called like a file of --format {other}" if other else f"does not end in {wanted}"
        folder = ", or a folder without an ending" if format == "safetensors" else ""
        raise UsageError(
            f"{target} {kind}, and --format is {format}",
            fix=f"give a name ending in {wanted}{folder}" + (f", or --format {other}" if other else ""),
        )
    if suffix == wanted and target.exists():
        raise UsageError(f"{target} exists", fix="give another name, or delete it first")


FILE_SUFFIX = re.compile(r"\.[a-z]\w*|\.7z")
"""The ending of a file's name; that of a folder may be a number, as in ``scans-v1.2``."""


def _write_files(content: dict[str, bytes], target: Path) -> tuple[str, ...]:
    if target.suffix.lower() == ".zip":
        with storage_errors(target.parent, "create"):
            target.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(target, _zipped(content, target.stem))
        return EXPORTED_FILES
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target} exists and is not empty", fix="give a new folder, or a name ending .zip")
    with storage_errors(target, "create"):
        target.mkdir(parents=True, exist_ok=True)
    for name in EXPORTED_FILES:
        atomic_write(target / name, content[name])
    return EXPORTED_FILES


def export_line(made: Export) -> str:
    """``export`` for people."""
    size = f"{len(made.files)} file{'s' * (len(made.files) > 1)}, {made.bytes / 1e6:.1f} MB"
    stamp = f"ε = {rounded_up(made.epsilon)}, δ = {made.delta:g}" if made.private else "NOT PRIVATE"
    checked = ""
    if made.largest_difference is not None:
        checked = f"; equal to the model in float32 within {made.largest_difference:.0e} on synthetic images"
        if made.evaluated_difference > 10 * made.largest_difference:
            checked += f", to the model as it was evaluated, in bfloat16, within {made.evaluated_difference:.0e}"
    return f"export: {made.export} ({size}; {stamp}{checked})"


def _zipped(content: dict[str, bytes], folder: str) -> bytes:
    """A zip with one folder; the same bytes for the same content."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in EXPORTED_FILES:
            archive.writestr(zipfile.ZipInfo(f"{folder}/{name}"), content[name], zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------------------- predict


def predict(
    model: ReleasedModel,
    images: Sequence[Path] = (),
    data: str | None = None,
    on_skipped: Callable[[dict[str, int]], object] = lambda kinds: None,
) -> list[dict[str, Any]]:
    """The most probable class of each image; ``predictions.predictions`` goes on past an image that cannot be read.

    Args:
        images: image files of any size, and folders of them.
        data: further images, ``npz:PATH`` or ``folder:PATH``.
        on_skipped: called with the number of files of each kind that were skipped, where there are any.

    Returns:
        One row per image: image (its name), class, probability (of that class), probabilities (class -> number). Of
        several labels an image: image, labels (those more probable than not), probabilities.

    Raises:
        InputError: an image is missing or damaged. UsageError: there is none.
    """
    from dprandp.release.predictions import predictions

    return [row for block in predictions(model, images, data, on_skipped, strict=True) for row in block]
