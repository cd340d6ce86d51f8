"""A released model as one graph in one file, which other programs run without dprandp: torch-export, or ONNX.

The graph goes from pixels to class probabilities: resize, grey to three channels, ``normalise``, ``features``, the
average with the mirror image, whitening, head, softmax (sigmoid where an image may have several labels). It takes the
differentiable way to the features, as other devices do; compiled loops (``models/patchnet.py``) cannot be exported.
"""

from __future__ import annotations

import copy
import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional

from dprandp import __version__, losses
from dprandp.config.declared import Publication
from dprandp.data import brought_to
from dprandp.errors import DprandpError, UsageError
from dprandp.models.precision import FLOAT32, precision_of
from dprandp.synth import render_block
from dprandp.vision.images import colour_of

if TYPE_CHECKING:
    from dprandp.release import ReleasedModel

INPUT, OUTPUT, BATCH = "pixels", "probabilities", "N"
"""Names of the graph's input and output, and of the dimension that may have any size."""

METADATA = "dprandp"
"""Key of the metadata, one JSON object: in an ONNX file's ``metadata_props``, in a torch-export file's extra files."""

TOLERANCE = 1e-3
"""Largest accepted difference of a probability between the graph and the model. Differences are usually below 1e-6;
one in the rounding of a single resized pixel may be 1e-4."""

CHECKED_IMAGES = 6

OPSET = 20
"""Version of ONNX's operators."""


class PixelsToProbabilities(nn.Module):
    """The whole of a released model: uint8 [N, height, width, channels] to float32 [N, classes]."""

    def __init__(self, model: ReleasedModel) -> None:
        super().__init__()
        network = copy.deepcopy(model.network).float().requires_grad_(False)
        self.extractor, self.whitener, self.head = network.extractor, network.whitener, network.head
        self.mirror, self.multi_label = model.mirror, model.multi_label
        height, width, self.channels = model.shape
        side = network.extractor.input_size
        self.resizes = (height, width) != (side, side)
        self.register_buffer("down", resizing(height, side))
        self.register_buffer("across", resizing(width, side).t().contiguous())

    def forward(self, pixels: Tensor) -> Tensor:
        x = pixels.permute(0, 3, 1, 2)
        if self.resizes:
            x = self.down @ (x.to(torch.float32) @ self.across)
            x = x.round().clamp(0, 255).to(torch.uint8)
        if self.channels == 1:
            x = x.expand(-1, 3, -1, -1)
        features = self._features(x)
        if self.mirror:
            features = (features + self._features(x.flip(-1))) / 2
        return losses.probabilities(self.whitener(features) @ self.head, self.multi_label)

    def _features(self, x: Tensor) -> Tensor:
        return self.extractor.features(self.extractor.normalise(x))


def resizing(side: int, size: int) -> Tensor:
    """The bilinear, antialiased resize of ``vision.images.resize`` along one side, as a matrix [size, side].

    Exact, and the same everywhere: not every program that runs ONNX has the antialiased resize.
    """
    each = torch.eye(side)[None, None]
    return functional.interpolate(each, size=(size, side), mode="bilinear", antialias=True)[0, 0]


def graph_of(model: ReleasedModel, format: str, about: Publication) -> tuple[bytes, float, float]:
    """The file of a model in a format of ``WRITERS``, checked against the model.

    Returns:
        The file, and the largest difference of a probability between its graph and the model, on synthetic images: of
        the model in float32, as the graph computes, and in the precision in which it was evaluated.

    Raises:
        UsageError: a library that the format needs is missing. DprandpError: the graph contradicts the model (a bug).
    """
    graph = PixelsToProbabilities(model).eval()
    with torch.no_grad():
        example = torch.zeros(2, *model.shape, dtype=torch.uint8)
        program = torch.export.export(graph, (example,), dynamic_shapes={INPUT: {0: Dim(BATCH)}})
    program.example_inputs = None  # the only part of a torch-export file that would be a pickle
    for part in program.graph_module.modules():  # a block with its own autocast has a graph of its own
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            for key in ("stack_trace", "nn_module_stack", "torch_fn", "source_fn_stack"):
                node.meta.pop(key, None)  # paths and lines of source files on this machine
    data, run = WRITERS[format](program, json.dumps(metadata(model, about), ensure_ascii=False))
    return data, *checked(model, run, format)


def checked(model: ReleasedModel, run: Callable[[np.ndarray], np.ndarray], format: str) -> tuple[float, float]:
    """The largest difference between a graph and the model on one synthetic image and on several, as ``graph_of``.

    Raises:
        DprandpError: it is above ``TOLERANCE``, or a number is missing.
    """
    network = copy.deepcopy(model.network).float()
    network.extractor.precision = FLOAT32
    original = replace(model, network=network)
    images = brought_to(render_block("dead-leaves", 0, 0, CHECKED_IMAGES, 64), model.shape)
    largest = evaluated = 0.0
    for some in (images, images[:1]):
        expected, found = original.probabilities(some).numpy(), run(some)
        apart = np.abs(found - expected).max() if found.shape == expected.shape else np.nan
        if not apart <= TOLERANCE:
            raise DprandpError(
                f"the {format} graph contradicts the model: probabilities of {len(some)} synthetic images differ by "
                f"{apart:.3g}, accepted is {TOLERANCE:g}; nothing was written",
                fix="export with --format safetensors, and report this with the versions of torch and onnxruntime",
            )
        largest = max(largest, float(apart))
        evaluated = max(evaluated, float(np.abs(found - model.probabilities(some).numpy()).max()))
    return largest, evaluated


def metadata(model: ReleasedModel, about: Publication) -> dict[str, Any]:
    """What a user of the file has to know: how to make its input, what its output is, and the privacy disclosure."""
    height, width, channels = model.shape
    result, reason = model.result, model.not_private_because
    return {
        "made_by": f"dprandp {__version__}",
        **about.said(),
        "input": {
            "name": INPUT,
            "type": "uint8",
            "layout": "[N, height, width, channels]",
            "height": height,
            "width": width,
            "channels": channels,
            "colour": colour_of(channels),
            "decoding": "RGB or grey, 0 to 255, not normalised; an image of another size: its largest centred part of "
            "these proportions, resized bicubically",
            "rules": model.decoding.as_dict(),  # for ambiguous files, which are refused where none is named
        },
        "output": {"name": OUTPUT, "type": "float32", "layout": "[N, classes]"},
        "classes": list(model.classes),
        "multi_label": model.multi_label,
        "precision": FLOAT32,
        "precision_of_the_model": precision_of(model.network.extractor),
        "private": reason is None,
        **({} if reason is None else {"NOT PRIVATE": reason}),
        "epsilon": result.epsilon if np.isfinite(result.epsilon) else "inf",
        **({} if model.run_epsilon is None else {"run_epsilon": str(model.run_epsilon)}),
        "delta": result.delta,
        "unit": result.unit,
        "adjacency": result.adjacency,
        "data": result.data,
        "model_sha256": model.sha256,
    }


# -------------------------------------------------------------------------------------------------------- file formats


def _torch_export(program: ExportedProgram, about: str) -> tuple[bytes, Callable[[np.ndarray], np.ndarray]]:
    """Weights and JSON in a zip, without pickles.

    The program in memory is checked: torch's reader unpickles whatever a file asks it to, so this package never calls
    it. The weights are those bytes, and the JSON is written from the program.
    """
    stream = io.BytesIO()
    torch.export.save(program, stream, extra_files={METADATA: about})
    data = stream.getvalue()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        inside = [entry.filename for entry in archive.infolist() if archive.read(entry)[:4] == b"PK\3\4"]
    if inside:
        raise DprandpError(
            f"this version of torch ({torch.__version__}) would write pickles: {', '.join(inside)}",
            fix="export with --format onnx, or with torch 2.14",
        )
    module = program.module()
    return data, lambda images: module(torch.from_numpy(images)).numpy()


def _onnx(program: ExportedProgram, about: str) -> tuple[bytes, Callable[[np.ndarray], np.ndarray]]:
    """The very bytes are checked, in onnxruntime."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  torch.onnx needs it
    except ImportError as error:
        raise UsageError(
            f"--format onnx needs the library {error.name}", fix="pip install 'dprandp[onnx]'"
        ) from error
    made = torch.onnx.export(
        program, dynamo=True, verbose=False, opset_version=OPSET, input_names=[INPUT], output_names=[OUTPUT],
        dynamic_shapes={INPUT: {0: BATCH}},
    )  # fmt: skip
    proto = made.model_proto
    del proto.metadata_props[:]
    proto.metadata_props.add(key=METADATA, value=about)
    proto.producer_name, proto.producer_version = "dprandp", __version__
    for part in (proto.graph, *proto.graph.node, *proto.graph.value_info, *proto.graph.initializer):
        del part.metadata_props[:]  # names of modules and functions
    data = proto.SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return data, lambda images: session.run([OUTPUT], {INPUT: images})[0]


WRITERS: dict[str, Callable[[ExportedProgram, str], tuple[bytes, Callable[[np.ndarray], np.ndarray]]]] = {
    "torch-export": _torch_export,
    "onnx": _onnx,
}
