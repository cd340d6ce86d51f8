"""``dprandp status --check``: check this machine and the files of a run. Repairs nothing.

No pixel of a data set is read, only whether its files are present.
"""

from __future__ import annotations

import os
import platform
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from dprandp.data import list_datasets
from dprandp.dpsgd.budget import read_plan_file
from dprandp.errors import DprandpError, InputError, StorageError
from dprandp.release import load_model
from dprandp.runs import directory
from dprandp.runs.directory import STAGES, Record, RunDir, Table
from dprandp.runs.directory import read as read_table
from dprandp.runs.files import file_sha256
from dprandp.runs.ledger import open_run_ledger

OK, WARN, FAIL = "ok", "warn", "fail"

LIBRARIES = (
    "torch", "torchvision", "numpy", "safetensors", "opacus", "dp-accounting", "prv-accountant", "medmnist",
    "scikit-learn",
)  # fmt: skip
OLDEST_TORCH = (2, 10)
"""In older versions a file could run code through ``torch.load``, which other libraries may still call."""

DISK_WARN, DISK_FAIL = 5e9, 2e8
"""Bytes: a run of size small needs about 1 GB, one of size paper 30 GB."""

ENVIRONMENT_CODE = InputError.exit_code
"""Exit code for a missing library."""


@dataclass(frozen=True)
class Check:
    """One line: the name, ok | warn | fail, the finding, and the exit code of a failure (else 0)."""

    name: str
    state: str
    found: str
    code: int = 0


def examine(run: Path, data_dir: Path, device: str = "auto") -> list[Check]:
    """All checks. The run directory need not exist.

    Args:
        run: the run directory. data_dir: the data root. device: as ``--device``; the one that computes.

    Raises:
        UsageError: there is no such device.
    """
    checks = [*_environment(), *_arithmetic(device), *_disk(run), *_data(data_dir)]
    if not run.exists():
        return [*checks, Check("run", OK, f"{run} does not exist yet")]
    if not (run / "run.json").exists():
        return [*checks, *_attempt("run", lambda: [Check("run", OK, _nothing_made(run))])]
    return [*checks, *_run(run)]


def exit_code(checks: list[Check]) -> int:
    """0 without a failure; else that of the first (1 arithmetic, 3 library missing, 4 file corrupt, 6 disk or lock)."""
    return next((check.code for check in checks if check.state == FAIL), 0)


def as_result(run: Path, checks: list[Check]) -> dict[str, Any]:
    """Plain values: run, state (the worst of all), exit_code, checks."""
    states = {check.state for check in checks}
    worst = next(state for state in (FAIL, WARN, OK) if state in states)
    plain = [{key: value for key, value in asdict(check).items() if key != "code"} for check in checks]
    return {"run": str(run), "state": worst, "exit_code": exit_code(checks), "checks": plain}


def lines(checks: list[Check]) -> str:
    """``examine`` for people."""
    return "\n".join(f"{check.state:<4}  {check.name:<12}  {check.found}" for check in checks)


# -------------------------------------------------------------------------------------------------- around the run


def _environment() -> Iterator[Check]:
    yield Check("python", OK if sys.version_info >= (3, 11) else FAIL, platform.python_version(), ENVIRONMENT_CODE)
    versions, missing = {}, []
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        yield Check("libraries", FAIL, f"missing: {', '.join(missing)}; pip install dprandp", ENVIRONMENT_CODE)
    else:
        yield Check("libraries", OK, ", ".join(f"{name} {version}" for name, version in versions.items()))
    import torch

    number = tuple(int(part) for part in torch.__version__.split(".")[:2])
    found = f"{torch.__version__}, {torch.get_num_threads()} threads on {cores()} cores"
    if number < OLDEST_TORCH:
        yield Check("torch", FAIL, f"{found}; older than {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}", ENVIRONMENT_CODE)
    elif torch.get_num_threads() < cores():
        yield Check("torch", WARN, f"{found}: OMP_NUM_THREADS limits it; unset it to use all cores")
    else:
        yield Check("torch", OK, found)
    try:
        import torchvision.ops  # its compiled part fails if torchvision does not fit torch

        torchvision.ops.nms(torch.zeros(0, 4), torch.zeros(0), 0.5)
        yield Check("torchvision", OK, torchvision.__version__)
    except (ImportError, RuntimeError, AttributeError) as error:
        why = f"does not fit this torch ({type(error).__name__}); install both from one place"
        yield Check("torchvision", FAIL, why, ENVIRONMENT_CODE)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    yield Check("accelerator", OK, torch.cuda.get_device_name(0) if count else "none: --device auto is the CPU")


def _arithmetic(device: str) -> Iterator[Check]:
    """One forward pass and one private step, compared with stored numbers."""
    from dprandp.inspection.self_check import compare
    from dprandp.runs.context import prepare_device

    chosen = prepare_device(device)
    apart, where, said = compare(chosen)
    found = f"forward pass and private step on {chosen} ({said})"
    if apart <= 1:
        yield Check("arithmetic", OK, f"{found}: as stored")
    else:
        why = f"{found}: {where} is {apart:.2g} times its tolerance from the stored number"
        yield Check("arithmetic", FAIL, f"{why}; do not train here: reinstall torch, or use another --device", 1)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


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


def _data(data_dir: Path) -> Iterator[Check]:
    rows = list_datasets(data_dir)
    here = [row.name for row in rows if row.available]
    yield Check("data", OK, f"present in {data_dir}: {', '.join(here)} ({len(rows) - len(here)} known sets are not)")


# ------------------------------------------------------------------------------------------------------ inside the run


def _attempt(name: str, look: Callable[[], list[Check]]) -> list[Check]:
    """The checks of ``look``; an error is a failure with the error's own exit code."""
    try:
        return look()
    except DprandpError as error:
        return [Check(name, FAIL, error.problem, error.exit_code)]


def _nothing_made(run: Path) -> str:
    RunDir.open(run, create=False)  # refuses a folder of other things
    return f"{run} holds no finished stage yet"


def _run(run: Path) -> list[Check]:
    checks = _attempt("lock", lambda: [_lock(run)])
    try:
        table = read_table(run / "run.json")
    except DprandpError as error:
        return [*checks, Check("run.json", FAIL, error.problem, error.exit_code), *_privacy(run)]
    for stage in STAGES:
        record = table.stages.get(stage)
        if record is not None:
            checks += _attempt(stage, lambda stage=stage, record=record: [_stage(run, table, stage, record)])
    checks += _privacy(run)
    if (run / "model").is_dir() and any((run / "model").iterdir()):
        checks += _attempt("model", lambda: [_model(run)])
    leftovers = [path.name for path in run.rglob(".*") if ".partial" in path.name or path.name.startswith(".trash-")]
    if leftovers:
        found = f"{len(leftovers)} temporary files of a stopped command; the next one removes them"
        checks.append(Check("leftovers", WARN, found))
    return checks


def _lock(run: Path) -> Check:
    path = run / ".lock"
    if not path.exists():
        return Check("lock", OK, "free")
    try:
        directory.release(directory.acquire(path, run))
    except StorageError as error:
        return Check("lock", WARN, f"{error.problem}; files that it is writing may look broken below")
    return Check("lock", OK, "free")


def _stage(run: Path, table: Table, stage: str, record: Record) -> Check:
    if record.state == "partial":
        return Check(stage, WARN, "begun but not finished; the same command continues it")
    folder = run / STAGES[stage]
    for name, digest in record.outputs.items():
        if not (folder / name).is_file():
            return Check(stage, FAIL, f"{folder / name} is missing", 4)
        if file_sha256(folder / name) != digest:
            return Check(stage, FAIL, f"{folder / name} has changed: its sha256 differs", 4)
    if stage == "generate":
        from dprandp.generate import load_images

        load_images(folder, 1)  # compares every shard with the manifest
    reasons = table.stale_because(stage)
    if reasons:
        return Check(stage, WARN, f"stale: {'; '.join(reasons)}")
    return Check(stage, OK, f"done, {len(record.outputs)} outputs as recorded")


def _privacy(run: Path) -> list[Check]:
    """Ledger, plan, and the mode of ``private/``."""
    checks = []
    checks += _attempt("ledger", lambda: _ledger(RunDir.open(run, create=False)))
    checks += _attempt("plan", lambda: _plan(RunDir.open(run, create=False)))
    private = run / "private"
    if private.is_dir():
        mode = stat.S_IMODE(private.stat().st_mode)
        state, found = (OK, "private/ is closed to others") if mode == 0o700 else (
            WARN, f"private/ has mode {mode:o}, so others may read it: chmod 700 {private}"
        )  # fmt: skip
        checks.append(Check("private", state, found))
    return checks


def _ledger(rundir: RunDir) -> list[Check]:
    said: list[str] = []
    ledger = open_run_ledger(rundir, warn=said.append)
    if ledger is None:
        return []
    steps = sum(charge.steps for charge in ledger.charges)
    stamp = "" if ledger.private else "; NOT PRIVATE: steps without noise, or with noise from a seed"
    found = f"whole, {steps} steps charged; the results in run.json agree with it{stamp}"
    return [Check("ledger", WARN, said[0]) if said else Check("ledger", WARN if stamp else OK, found)]


def _plan(rundir: RunDir) -> list[Check]:
    document, ledger = read_plan_file(rundir), open_run_ledger(rundir, warn=lambda text: None)
    if ledger is None:
        return []
    if document is None:
        return [Check("plan", OK, "none yet, and nothing was charged")]
    if document["examples"] != ledger.examples:
        return [Check("plan", FAIL, "budget and ledger are of different data: their N differ", 4)]
    spent = ledger.spent(document["delta"]).upper
    found = f"ε = {spent:.4g} spent of {document['epsilon']:g} at δ = {document['delta']:g}"
    within = spent <= document["epsilon"]
    return [Check("plan", OK, found) if within else Check("plan", FAIL, found, 5)]


def _model(run: Path) -> Check:
    reason = load_model(run / "model").not_private_because
    if reason is not None:
        return Check("model", WARN, f"whole, and NOT PRIVATE: {reason}")
    return Check("model", OK, "whole: hashes and shapes as described")
