"""The Python API: the pieces of the command line for a notebook."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dprandp import pipeline, release
from dprandp.config.schema import StageConfig, images_of_run, probe_of_run, resolve
from dprandp.errors import BudgetError, InputError, UsageError
from dprandp.models.torchvision import trust_code as allow_code
from dprandp.privacy import accounting
from dprandp.privacy.clipping import clipped_softmax_sum
from dprandp.privacy.ledger import Ledger
from dprandp.privacy.mechanism import PrivateMechanism, make_plan, validate_budget
from dprandp.privacy.randomness import SystemRandom
from dprandp.probe.head import HeadSettings, begin_head, default_lr, released_head, update_head
from dprandp.release import ReleasedModel
from dprandp.runs.console import Console
from dprandp.runs.context import Context, prepare_device
from dprandp.runs.directory import RunDir, thawed
from dprandp.synth import process_named, render_block

# --------------------------------------------------------------------------------------------- images from nothing


class RandomImages(torch.utils.data.Dataset):
    """Images of a random process, generated on access; the same for the same arguments.

    >>> images = RandomImages("perlin", count=10, resolution=16)
    >>> len(images), images[3].shape, images[3].dtype
    (10, torch.Size([3, 16, 16]), torch.uint8)

    Images are made in blocks (400 of most processes), of which the last is cached: read them in order, or shuffle
    within blocks. No data are read, so this costs no privacy.

    Args:
        process: a name that ``dprandp generate --process`` takes.
        count: number of images, 1 or more.
        resolution: their side in pixels: 8, 16, 32, 64, 128, 256 or 512.
        seed: public.
        transform: applied to each image, a uint8 tensor [3, resolution, resolution].

    Raises:
        UsageError: an unknown process, or an argument out of its range.
    """

    def __init__(
        self,
        process: str = "stylegan-oriented",
        *,
        count: int,
        resolution: int = 64,
        seed: int = 0,
        transform: Callable[[Tensor], Any] | None = None,
    ) -> None:
        if count < 1:
            raise UsageError(f"count is {count}", fix="give a count of 1 or more")
        self.process, self.count, self.resolution, self.seed = process_named(process), count, resolution, seed
        self.transform = transform
        self._block, self._images = -1, np.empty(0, np.uint8)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        if not -self.count <= index < self.count:
            raise IndexError(f"image {index} of {self.count}")
        block, place = divmod(index % self.count, self.process.block_size)
        if block != self._block:
            self._images, self._block = self._made(block), block
        image = torch.from_numpy(self._images[place]).permute(2, 0, 1)
        return image if self.transform is None else self.transform(image)

    def _made(self, block: int) -> np.ndarray:
        size = min(self.process.block_size, self.count - block * self.process.block_size)
        return render_block(self.process.name, self.seed, block, size, self.resolution)


def random_images(
    process: str = "stylegan-oriented", *, count: int, resolution: int = 64, seed: int = 0
) -> np.ndarray:
    """Images of a random process, uint8 [count, resolution, resolution, 3]; arguments and errors of ``RandomImages``.

    >>> random_images("dead-leaves", count=4, resolution=32, seed=1).dtype
    dtype('uint8')

    They are equal to those of ``dprandp generate`` with the same arguments. No data are read: they cost no privacy.
    """
    made = RandomImages(process, count=count, resolution=resolution, seed=seed)
    blocks = -(-count // made.process.block_size)
    return np.concatenate([made._made(block) for block in range(blocks)])


# ---------------------------------------------------------------------------------------------------- noise and budget


def noise_multiplier(epsilon: float, delta: float, *, steps: int, sample_rate: float = 1.0) -> float:
    """The smallest noise multiplier σ (the noise's standard deviation over the clip norm) found for a budget.

    >>> round(noise_multiplier(1.0, 1e-5, steps=120), 1)
    40.9

    Args:
        epsilon: ε above 0, inf for none. delta: δ in (0, 1).
        steps: T, updates of DP-SGD.
        sample_rate: q in (0, 1], the probability of a record to be in a batch (Poisson sampling); 1: full batches.

    Guarantee:
        ``epsilon(result, delta, ...) <= epsilon`` for zero-out of one record.

    Raises:
        UsageError: a value out of its range. BudgetError: no noise is enough.
    """
    return accounting.calibrate(epsilon, delta, sample_rate, steps)


def epsilon(noise_multiplier: float, delta: float, *, steps: int, sample_rate: float = 1.0) -> float:
    """An upper bound on the ε of DP-SGD with Gaussian noise, for zero-out of one record; inverse of
    ``noise_multiplier``, with its arguments.

    >>> epsilon(41.0, 1e-5, steps=120) < 1.01
    True

    Raises:
        UsageError: a value out of its range.
    """
    event = accounting.GaussianEvent(noise_multiplier, sample_rate, steps)
    return accounting.compose([event], delta).upper


# ------------------------------------------------------------------------------------- a head on one's own features


@dataclass(frozen=True)
class PrivateHead:
    """A privately fitted linear softmax head; it may be released.

    Attributes:
        weights: float32 [d, classes].
        epsilon: upper bound on what the ledger has spent since it was begun, this head included.
        delta: δ of that bound.
        noise_multiplier: σ of the fit.
    """

    weights: Tensor
    epsilon: float
    delta: float
    noise_multiplier: float

    def scores(self, features: Tensor | np.ndarray) -> Tensor:
        """float32 [N, classes] of features [N, d]; rows are scaled to unit length first, as in the fit."""
        return unit_rows(features, self.weights.shape[0]) @ self.weights

    def predict(self, features: Tensor | np.ndarray) -> Tensor:
        """int64 [N]: the most probable class of each row of features [N, d]."""
        return self.scores(features).argmax(dim=1)


def fit_private_head(
    features: Tensor | np.ndarray,
    labels: Tensor | np.ndarray | Sequence[int],
    *,
    classes: int,
    epsilon: float,
    ledger: Path | str,
    delta: float | None = None,
    share: float = 1.0,
    steps: int = 120,
    clip_norm: float = 0.5,
    lr: float | None = None,
    momentum: float = 0.9,
) -> PrivateHead:
    """A linear head on features that you computed, fitted with full-batch DP-SGD: the probe without a run directory.

    >>> head = fit_private_head(features, labels, classes=10, epsilon=1.0, ledger="ledger.jsonl")    # doctest: +SKIP
    >>> (head.predict(test_features) == test_labels).float().mean()                                  # doctest: +SKIP

    Args:
        features: float [N, d], one row per record, each computed from that record and public inputs only; scaled to
            length 1 here, and to zero where a value is not finite. Do not subtract statistics of the private features,
            such as their mean: ε would not cover them.
        labels: whole numbers [N] in 0 … classes − 1.
        classes: their declared number; never count it in the labels.
        epsilon: total ε of everything that will ever be in the ledger. The first fit fixes it, with δ: a total that
            is chosen after a head was seen would not be covered.
        ledger: file that records the spent budget of these N records; created if it does not exist. A second fit on the
            same records must name the same ledger, and gets the remaining budget.
        delta: None: 1e-5, or 0.1/N where that is smaller.
        share: fraction of ε, in (0, 1], that the ledger may have spent after this fit; 1 leaves nothing for another.
        steps: updates T. clip_norm: C, the largest L2 norm of a record's gradient.
        lr: None: set by the noise and N. momentum: of the noisy gradients, in [0, 1).

    Guarantee:
        The head is (ε, δ)-private for zero-out of one record, together with every other head of the same ledger; N is
        taken to be public. Features and labels enter only through sums of gradients of sensitivity C, which are charged
        to the ledger, then made noisy with randomness from the operating system. Where two processes begin a ledger, or
        charge it, at the same time, one of them is refused.

    Raises:
        UsageError: shapes that do not fit, or a value out of its range. BudgetError: too little is left in the ledger,
        or it was begun with another budget. CheckpointError: the ledger is damaged. StorageError: it cannot be written,
        another process writes to it, or it was removed or replaced during the fit: then there is no head.
    """
    if not isinstance(ledger, str | os.PathLike):
        raise UsageError(f"ledger is {ledger!r}", fix="name a file: without a ledger nobody knows what was spent")
    rows, targets = unit_rows(features, None), np.asarray(labels)
    if targets.dtype.kind not in "iu" or targets.shape != (len(rows),) or not rows.numel():
        raise UsageError(
            f"labels of shape {list(targets.shape)} and type {targets.dtype} do not fit features of {list(rows.shape)}",
            fix="give one whole number per row",
        )
    for name, value, least in (("classes", classes, 2), ("steps", steps, 1)):
        if type(value) is not int or value < least:
            raise UsageError(f"{name} is {value!r}", fix=f"give a whole number of at least {least}")
    ranges = {"epsilon": (epsilon, math.inf), "delta": (delta, 1), "share": (share, 1), "lr": (lr, 1e300),
              "clip_norm": (clip_norm, 1e300)}  # fmt: skip
    for name, (value, most) in ranges.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and 0 < value <= most):
            raise UsageError(f"{name} is {value!r}", fix=f"give a number above 0, at most {most:g}")
    if isinstance(momentum, bool) or not isinstance(momentum, int | float) or not 0 <= momentum < 1:
        raise UsageError(f"momentum is {momentum!r}", fix="give a number from 0 to below 1")
    if bool(((targets < 0) | (targets >= classes)).any()):  # reveals something about the labels, to their owner only
        raise InputError("a label lies outside 0 … classes - 1", fix="declare the right number of classes")
    examples = len(rows)
    delta = accounting.advised_delta(examples) if delta is None else float(delta)
    validate_budget(epsilon, delta, examples)
    budget = {"unit": "one row of features", "delta": delta, "examples": examples,
              "epsilon": "inf" if math.isinf(epsilon) else float(epsilon)}  # fmt: skip
    opened = _head_ledger(Path(ledger), budget) if Path(ledger).exists() else None
    plan = make_plan(
        stage="head", epsilon=epsilon, delta=delta, epsilon_target=share * epsilon, examples=examples, steps=steps,
        spent=[] if opened is None else opened.stages(), sample_rate=1.0, clip_norm=clip_norm,
    )  # fmt: skip
    alone = accounting.compose([plan.event], delta).upper
    rate = default_lr(alone, delta, examples, steps, clip_norm) if lr is None else lr
    settings = HeadSettings(rate, momentum, "average")
    state, targets = begin_head(torch.zeros(rows.shape[1], classes)), torch.from_numpy(targets.astype(np.int64))
    opened = opened or Ledger.create(Path(ledger), examples, budget=budget)
    mechanism = PrivateMechanism(
        plan, opened, SystemRandom(), attempt=opened.last_attempt("head") + 1, charge_block=steps
    )
    for step in mechanism.steps():
        clipped = clipped_softmax_sum(rows, targets, state["head"], clip_norm)
        update_head(state, step.release({"head": clipped})["head"], settings, step.number, steps)
    opened.require_in_place()
    return PrivateHead(released_head(state, settings), opened.spent(delta).upper, delta, plan.noise_multiplier)


def _head_ledger(path: Path, budget: dict[str, Any]) -> Ledger:
    """A ledger of heads that was begun with this budget.

    Raises:
        BudgetError: it was begun with another ε, δ or N, or is not one of heads alone. CheckpointError: it is damaged.
    """
    opened = Ledger.open(path)
    if opened.budget != budget:
        said = ", ".join(f"{name} = {value}" for name, value in (opened.budget or {}).items()) or "no budget"
        asked = ", ".join(f"{name} = {value}" for name, value in budget.items())
        raise BudgetError(
            f"the ledger {path} was begun with {said}, and this fit is of {asked}",
            fix="give the same total ε and δ, and a share of it for each head; another run's ledger cannot be used",
        )
    return opened


def unit_rows(features: Tensor | np.ndarray, width: int | None) -> Tensor:
    """float32 [N, d] whose rows have length 1; a row that is not finite becomes zero.

    Raises:
        UsageError: not a dense array of real numbers with two dimensions, or another width than ``width``.
    """
    if isinstance(features, Tensor):
        features = features.detach()
        usable = features.layout == torch.strided and not features.is_complex()
    else:
        features = np.ascontiguousarray(features)
        usable = features.dtype.kind in "biuf" and features.dtype.itemsize <= 8
    if not usable:
        raise UsageError(f"features are {features.dtype}", fix="give a dense array of real numbers, such as float32")
    rows = torch.as_tensor(features).to(torch.float32)
    if rows.ndim != 2 or (width is not None and rows.shape[1] != width):
        wanted = "[N, d]" if width is None else f"[N, {width}]"
        raise UsageError(f"features have the shape {list(rows.shape)}", fix=f"give {wanted}")
    finite = rows.isfinite().all(dim=1, keepdim=True)
    return functional.normalize(torch.where(finite, rows, torch.zeros(())), dim=1)


# --------------------------------------------------------------------------------------------------- runs and models


def run(
    data: str = "digits",
    *,
    epsilon: float = 1.0,
    directory: Path | str = "runs/default",
    size: str = "tiny",
    share: float | None = None,
    data_dir: Path | str = "data",
    device: str = "auto",
    quiet: bool = True,
    trust_code: bool = False,
    **settings: dict[str, Any],
) -> dict[str, Any]:
    """All stages and the report, as ``dprandp run``; finished stages are skipped.

    >>> run("digits", epsilon=1.0, directory="runs/digits")["accuracy"]                                # doctest: +SKIP

    Args:
        data, epsilon, directory, size, share, data_dir, device: as the flags of ``dprandp run``.
        quiet: print nothing.
        trust_code: run the Python file of an ``arch`` of ``module:FILE.py:NAME``, here and from now on in this process.
        settings: stage -> settings, such as ``generate={"count": 8000}``; see ``docs/settings.md``.

    Returns:
        What ``dprandp run --json`` prints: accuracy, epsilon, delta, report, results and more.

    Raises:
        UsageError, InputError, BudgetError: as the stages do.
    """
    if trust_code:
        allow_code()
    for stage, values in settings.items():
        if doubled := sorted({"data", "epsilon", "size", "share"} & values.keys()):
            raise UsageError(
                f"{stage} = {{{doubled[0]!r}: ...}} sets what {doubled[0]} of run sets",
                fix=f"give {doubled[0]}= to run, for all stages",
            )
    budget = {"data": data, "epsilon": epsilon}
    asked = {"generate": {}, "pretrain": {}, "probe": budget | {"share": share}, "finetune": budget}
    for stage, values in settings.items():
        if stage not in asked:
            raise UsageError(f"there is no stage {stage!r} in a run", fix=f"settings are of {', '.join(asked)}")
        asked[stage] = asked[stage] | values
    configs: dict[str, StageConfig] = {stage: resolve(stage, size, None, values) for stage, values in asked.items()}
    if "resolution" not in asked["generate"]:
        configs["generate"] = images_of_run(configs["generate"], configs["pretrain"])
    rundir = RunDir.open(Path(directory), create=True)
    with rundir.lock():
        begun = rundir.row("probe").config
        configs["probe"] = probe_of_run(configs["probe"], configs["pretrain"].arch, begun)
        context = Context(rundir, Console(quiet=quiet), prepare_device(device), Path(data_dir))
        return thawed(pipeline.run(configs.__getitem__, context).as_json())


def load_model(path: Path | str, *, trust_code: bool = False) -> ReleasedModel:
    """A released model, from a run directory, its ``model/`` folder, or an export; ``trust_code`` as for ``run``.

    >>> model = load_model("runs/digits")                                                              # doctest: +SKIP
    >>> model.predict("scan.png")[0]["class"]                                                          # doctest: +SKIP

    Raises:
        InputError: there is none. CheckpointError: it is damaged, or contradicts the run's ledger.
    """
    if trust_code:
        allow_code()
    path = Path(path)
    run = path if (path / "run.json").exists() else release.run_of(path)
    model = release.load_model(path) if run is None else release.load_run_model(RunDir.open(run, create=False))
    if model.spent_since is not None:
        warnings.warn(model.spent_since, stacklevel=2)
    return model
