"""``dprandp status --check``: check this machine and the files of a run. Repairs nothing.

No pixel of a data set is read, only whether its files are present.

The arithmetic is checked by itself: a forward pass and a private step of small networks are compared with stored
numbers. Weights, images and noise come from a seed; no data set and no run is read. The stored numbers were computed in
float32. A broken library, a wrong instruction set or a faulty device shows here in a second, before hours of training.
"""

from __future__ import annotations

import math
import os
import platform
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dprandp.config.schema import PretrainConfig
from dprandp.data import list_datasets
from dprandp.dpsgd.budget import read_plan_file
from dprandp.dpsgd.clipped_sums import Batch, ClippedSums, SumSettings
from dprandp.dpsgd.training_data import hashes_of, units_of
from dprandp.errors import AuditError, BudgetError, CheckpointError, DprandpError, InputError, StorageError
from dprandp.inspection import FAIL, OK, WARN, Check, attempt, exit_code
from dprandp.models.classifier import Classifier
from dprandp.models.extractor import build_extractor, extract
from dprandp.models.precision import AUTO, BFLOAT16, FLOAT32, decide
from dprandp.models.whitening import Whitener
from dprandp.privacy.accounting import rounded_up
from dprandp.privacy.clipping import clipped_softmax_sum
from dprandp.privacy.mechanism import PrivatePlan, PrivateStep
from dprandp.privacy.randomness import InsecureSeed
from dprandp.release import load_model
from dprandp.report.run import report_state
from dprandp.runs import directory
from dprandp.runs.directory import STAGES, Record, RunDir, Table
from dprandp.runs.files import file_sha256
from dprandp.runs.ledger import open_run_ledger

LIBRARIES = (
    "torch", "torchvision", "numpy", "safetensors", "opacus", "dp-accounting", "prv-accountant", "medmnist",
    "scikit-learn",
)  # fmt: skip
OLDEST_TORCH = (2, 10)
"""In older versions a file could run code through ``torch.load``, which other libraries may still call."""

DISK_WARN, DISK_FAIL = 5e9, 2e8
"""Bytes: a run of size small needs about 1 GB, one of size paper 30 GB."""


def examine(run: Path, data_dir: Path, device: str = "auto") -> list[Check]:
    """All checks. The run directory need not exist.

    Args:
        run: the run directory. data_dir: the data root. device: as ``--device``; the one that computes.

    Raises:
        UsageError: there is no such device.
    """
    rows = list_datasets(data_dir)
    here = [row.name for row in rows if row.available]
    data = f"present in {data_dir}: {', '.join(here)} ({len(rows) - len(here)} known sets are not)"
    checks = [*_environment(), _arithmetic(device), *_disk(run), Check("data", OK, data)]
    if not run.exists():
        return [*checks, Check("run", OK, f"{run} does not exist yet")]
    if not (run / "run.json").exists():
        return [*checks, *attempt("run", lambda: _nothing_made(run))]
    return [*checks, *_run(run)]


def as_json(run: Path, checks: list[Check]) -> dict[str, Any]:
    """What ``--json`` prints: run, state (the worst of all), exit_code, checks."""
    states = {check.state for check in checks}
    worst = next(state for state in (FAIL, WARN, OK) if state in states)
    plain = [{"name": check.name, "state": check.state, "found": check.found} for check in checks]
    return {"run": str(run), "state": worst, "exit_code": exit_code(checks), "checks": plain}


def lines(checks: list[Check]) -> str:
    """``examine`` for people."""
    return "\n".join(f"{check.state:<4}  {check.name:<12}  {check.found}" for check in checks)


# -------------------------------------------------------------------------------------------------- around the run


def _environment() -> Iterator[Check]:
    """A missing or old library has the exit code of a missing input."""
    broken = InputError.exit_code
    yield Check("python", OK if sys.version_info >= (3, 11) else FAIL, platform.python_version(), broken)
    versions, missing = [], []
    for name in LIBRARIES:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        yield Check("libraries", FAIL, f"missing: {', '.join(missing)}; pip install dprandp", broken)
    else:
        yield Check("libraries", OK, ", ".join(versions))
    import torch

    cores = len(os.sched_getaffinity(0))
    found = f"{torch.__version__}, {torch.get_num_threads()} threads on {cores} cores"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        yield Check("torch", FAIL, f"{found}; older than {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}", broken)
    elif torch.get_num_threads() < cores:
        yield Check("torch", WARN, f"{found}: OMP_NUM_THREADS limits it; unset it to use all cores")
    else:
        yield Check("torch", OK, found)
    try:
        import torchvision.ops  # its compiled part fails if torchvision does not fit torch

        torchvision.ops.nms(torch.zeros(0, 4), torch.zeros(0), 0.5)
        yield Check("torchvision", OK, torchvision.__version__)
    except (ImportError, RuntimeError, AttributeError) as error:
        why = f"does not fit this torch ({type(error).__name__}); install both from one place"
        yield Check("torchvision", FAIL, why, broken)
    found = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none: --device auto is the CPU"
    yield Check("accelerator", OK, found)


def _arithmetic(device: str) -> Check:
    """One forward pass and one private step, compared with stored numbers."""
    from dprandp.runs.context import prepare_device

    chosen = prepare_device(device)
    apart, where, precisions = compare(chosen)
    found = f"forward pass and private step on {chosen} ({precisions})"
    if apart <= 1:
        return Check("arithmetic", OK, f"{found}: as stored")
    found += f": {where} is {apart:.2g} times its tolerance from the stored number"
    advice = "do not train here: reinstall torch, or use another --device"
    return Check("arithmetic", FAIL, f"{found}; {advice}", AuditError.exit_code)


def _disk(run: Path) -> Iterator[Check]:
    folder = run.absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        yield Check("disk", FAIL, f"{folder} is a file, not a folder", StorageError.exit_code)
        return
    free = shutil.disk_usage(folder).free
    state = FAIL if free < DISK_FAIL else WARN if free < DISK_WARN else OK
    yield Check("disk", state, f"{free / 1e9:.1f} GB free at {folder}", StorageError.exit_code)
    trial = folder / f".check-{secrets.token_hex(4)}"
    try:
        trial.touch()
        trial.unlink()
        yield Check("writing", OK, f"{folder} can be written")
    except OSError as error:
        yield Check("writing", FAIL, f"{folder} cannot be written: {error.strerror}", StorageError.exit_code)


# ------------------------------------------------------------------------------------------------------ inside the run


def _nothing_made(run: Path) -> str:
    RunDir.open(run, create=False)  # refuses a folder of other things
    return f"{run} holds no finished stage yet"


def _run(run: Path) -> list[Check]:
    checks = attempt("lock", lambda: _lock(run))
    rundir = RunDir(run, create=False)
    try:
        table = directory.read(run / "run.json")
    except DprandpError as error:
        return [*checks, Check("run.json", FAIL, error.problem, error.exit_code), *_privacy(rundir)]
    for stage, record in ((stage, table.stages[stage]) for stage in STAGES if stage in table.stages):
        checks += attempt(stage, lambda stage=stage, record=record: _stage(run / STAGES[stage], table, stage, record))
    checks += _privacy(rundir)
    if (run / "model").is_dir() and any((run / "model").iterdir()):
        checks += attempt("model", lambda: _model(run))
    leftovers = [path.name for path in run.rglob(".*") if ".partial" in path.name or path.name.startswith(".trash-")]
    if leftovers:
        found = f"{len(leftovers)} temporary files of a stopped command; the next one removes them"
        checks.append(Check("leftovers", WARN, found))
    return checks


def _lock(run: Path) -> Check | str:
    path = run / ".lock"
    if path.exists():
        try:
            directory.release(directory.acquire(path, run))
        except StorageError as error:
            return Check("lock", WARN, f"{error.problem}; files that it is writing may look broken below")
    return "free"


def _stage(folder: Path, table: Table, stage: str, record: Record) -> Check | str:
    if record.state == "partial":
        return Check(stage, WARN, "begun but not finished; the same command continues it")
    for name, digest in record.outputs.items():
        if not (folder / name).is_file():
            return Check(stage, FAIL, f"{folder / name} is missing", CheckpointError.exit_code)
        if file_sha256(folder / name) != digest:
            return Check(stage, FAIL, f"{folder / name} has changed: its sha256 differs", CheckpointError.exit_code)
    if stage == "generate":
        from dprandp.generate import load_images

        load_images(folder, 1)  # compares every shard with the manifest
    reasons = table.stale_because(stage)
    if reasons:
        return Check(stage, WARN, f"stale: {'; '.join(reasons)}")
    return f"done, {len(record.outputs)} outputs as recorded"


def _privacy(rundir: RunDir) -> list[Check]:
    """Ledger, plan, and the mode of ``private/``."""
    checks = attempt("ledger", lambda: _ledger(rundir)) + attempt("plan", lambda: _plan(rundir))
    checks += attempt("data record", lambda: _data(rundir))
    checks += attempt("report", lambda: _report(rundir))
    private = rundir.path / "private"
    if private.is_dir():
        mode = stat.S_IMODE(private.stat().st_mode)
        open_to_others = f"private/ has mode {mode:o}, so others may read it: chmod 700 {private}"
        closed = Check("private", OK, "private/ is closed to others")
        checks.append(closed if mode == 0o700 else Check("private", WARN, open_to_others))
    return checks


def _ledger(rundir: RunDir) -> Check | str | None:
    said: list[str] = []
    ledger = open_run_ledger(rundir, warn=said.append)
    if ledger is None:
        return None
    steps = sum(charge.steps for charge in ledger.charges)
    found = f"whole, {steps} steps charged; the results in run.json agree with it"
    if not ledger.private:
        said.append(f"{found}; NOT PRIVATE: steps without noise, or with noise from a seed")
    return Check("ledger", WARN, said[0]) if said else found


def _report(rundir: RunDir) -> Check | str | None:
    try:
        return report_state(rundir)
    except CheckpointError as error:
        return Check("report", WARN, error.problem)


def _data(rundir: RunDir) -> str | None:
    found = hashes_of(rundir)
    units_of(rundir)
    return None if found is None else "the record of the run's images is the one that its budget was fixed with"


def _plan(rundir: RunDir) -> Check | str | None:
    planned, ledger = read_plan_file(rundir), open_run_ledger(rundir, warn=lambda text: None)
    if ledger is None:
        return None
    if planned is None:
        return "none yet, and nothing was charged"
    if planned.budget.examples != ledger.examples:
        found = "budget and ledger are of different data: their N differ"
        return Check("plan", FAIL, found, CheckpointError.exit_code)
    budget = planned.budget
    spent = ledger.spent(budget.delta).upper
    found = f"ε = {rounded_up(spent)} spent of {budget.epsilon:g} at δ = {budget.delta:g}"
    return found if spent <= budget.epsilon else Check("plan", FAIL, found, BudgetError.exit_code)


def _model(run: Path) -> Check | str:
    reason = load_model(run / "model").not_private_because
    if reason is not None:
        return Check("model", WARN, f"whole, and NOT PRIVATE: {reason}")
    return "whole: hashes and shapes as described"


# ------------------------------------------------------------------------------------------------------- the arithmetic

ARCHITECTURES = ("patchnet", "wrn-10-1")
EXAMPLES, CLASSES, VIEWS, DIMS = 4, 3, 2, 16
CLIP_NORM, NOISE_MULTIPLIER = 0.5, 1.0

TOLERANCE = {
    "patchnet": {FLOAT32: 1e-3, BFLOAT16: 5e-3},
    "wrn-10-1": {FLOAT32: 1e-3, BFLOAT16: 0.05},
}
"""Largest difference from the stored numbers, relative to the length of the vector."""

STORED = {
    "patchnet": {
        "features": (4.79798, -0.470288),
        "clipped sum": (0.526746, 0.123001),
        "head's clipped sum": (0.38988, -0.177565),
        "noisy update": (3.00693, -0.291011),
    },
    "wrn-10-1": {
        "features": (5.63149, -0.926572),
        "clipped sum": (0.991613, 0.323435),
        "head's clipped sum": (0.832247, -0.200685),
        "noisy update": (34.8275, 7.67221),
    },
}
"""Architecture -> quantity -> length of the vector, and its component along a fixed direction."""


def measure(arch: str, device: torch.device, precision: str) -> dict[str, tuple[float, float]]:
    """L2 norm, and component along a fixed direction, of the vectors of ``STORED``, as this machine computes them."""
    extractor = build_extractor(PretrainConfig(arch=arch, filters=8, layers=1, precision=precision))
    model = Classifier(extractor, Whitener(extractor.feature_dim, DIMS, extractor.parts), CLASSES)
    _fill(model)
    model = model.to(device).eval()
    words = InsecureSeed(1).words(EXAMPLES * 3 * 32 * 32 // 8)
    images = torch.from_numpy(words.astype("<u8").view(np.uint8).reshape(EXAMPLES, 3, 32, 32).copy())
    labels = torch.arange(EXAMPLES) % CLASSES

    features = extract(extractor, images, mirror=True)
    unit = model.whitener(features.to(device))
    head_sum = clipped_softmax_sum(unit, labels.to(device), model.head.detach(), CLIP_NORM)
    parameters = {name: value.detach().clone() for name, value in model.named_parameters()}
    sums = ClippedSums(model, SumSettings(1.0, VIEWS, 0, True, CLIP_NORM))
    clipped = sums.of(parameters, 0, Batch(images, labels, torch.arange(EXAMPLES)))
    plan = PrivatePlan(
        "finetune", 10 * EXAMPLES, 0.1, 1, NOISE_MULTIPLIER, CLIP_NORM, VIEWS, epsilon_target=1.0, delta=1e-5
    )
    released = PrivateStep(0, np.arange(EXAMPLES), plan, InsecureSeed(2)).release(clipped)
    vectors = {
        "features": features,
        "clipped sum": _flat(clipped),
        "head's clipped sum": head_sum,
        "noisy update": _flat(released),
    }
    return {name: _seen(value) for name, value in vectors.items()}


def compare(device: torch.device) -> tuple[float, str, str]:
    """Measure every architecture in the precision that a stage would choose, and compare.

    Returns:
        The largest difference as a fraction of its tolerance (above 1: this machine computes something else), its
        place, and the precisions in words.
    """
    worst, where, said = 0.0, "", []
    for arch in ARCHITECTURES:
        precision = decide(AUTO, device.type)
        said.append(f"{arch} in {precision}")
        found = measure(arch, device, precision)
        for name, (length, along) in STORED[arch].items():
            apart = max(abs(found[name][0] - length), abs(found[name][1] - along)) / length
            apart /= TOLERANCE[arch][precision]
            apart = math.inf if math.isnan(apart) else apart
            if apart >= worst:
                worst, where = apart, f"{name} of {arch}"
    return worst, where, ", ".join(said)


def _fill(model: nn.Module) -> None:
    """Give every matrix and filter weights of unit gain, from a seed."""
    random = InsecureSeed(0)
    with torch.no_grad():
        for _, value in sorted(model.state_dict().items()):
            if value.ndim > 1:
                value.copy_(random.gaussian(value.shape) / math.sqrt(value[0].numel()))


def _flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten().double().cpu() for name in sorted(tensors)])


def _seen(value: Tensor) -> tuple[float, float]:
    flat = value.flatten().double().cpu()
    direction = InsecureSeed(3).gaussian(flat.shape)
    return float(flat.norm()), float(flat @ direction / direction.norm() * math.sqrt(len(flat)) / 3)
