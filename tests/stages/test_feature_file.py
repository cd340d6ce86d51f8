"""Features of private images: computed anew where anything that they are made from changed, and never all in memory."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rank_processes import process_of
from tiny_run import blobs, context
from torch import Tensor

from dprandp.config.schema import PretrainConfig
from dprandp.data import open_dataset
from dprandp.dpsgd import features as features_module
from dprandp.dpsgd.units import UnitRows
from dprandp.errors import UsageError
from dprandp.models.extractor import build_extractor
from dprandp.models.whitening import Whitener
from dprandp.privacy.clipping import clipped_softmax_sum
from dprandp.runs.arrays import ArrayFile
from dprandp.runs.context import Context


def small_extractor(seed: int = 0, **settings: object) -> torch.nn.Module:
    built = PretrainConfig(**{"filters": 8, "layers": 1} | settings)
    return build_extractor(built, torch.Generator().manual_seed(seed)).eval()


def small_whitener(extractor: torch.nn.Module, seed: int = 0) -> Whitener:
    whitener = Whitener(extractor.feature_dim, 6, extractor.parts)
    whitener.projection.normal_(generator=torch.Generator().manual_seed(seed))
    return whitener


def whitened(given: Context, data: str, facts: dict) -> Tensor:
    """Features as a stage would have them."""
    dataset = open_dataset(data, given.data_dir, unit_column=facts.get("unit_column"))
    stage = SimpleNamespace(dataset=dataset, spec=dataset.spec, context=given)
    extractor = facts.get("extractor") or small_extractor()
    whitener = facts.get("whitener") or small_whitener(extractor)
    options = {name: facts.get(name, usual) for name, usual in {"mirror": False, "views": 2, "seed": 0}.items()}
    rows, labels = features_module.private_features(stage, extractor, whitener, **options)
    assert torch.equal(labels, torch.from_numpy(dataset.train().labels))
    return rows.clone()


CHANGES: dict[str, dict] = {
    "one pixel": {"x_train": lambda images: np.where(np.arange(images.size).reshape(images.shape) == 99, 7, images)},
    "the order of the images": {"x_train": lambda images: images[::-1]},
    "labels": {"y_train": lambda labels: np.roll(labels, 1)},
    "units": {"patient_train": lambda patients: np.roll(patients, 1)},
    "mirrored": {"mirror": True},
    "one view": {"views": 1},
    "other views": {"seed": 1},
    "another extractor": {"extractor": small_extractor(1)},
    "an extractor of another form": {"extractor": small_extractor(0, stride=2)},
    "another whitener": {"whitener": small_whitener(small_extractor(), 1)},
}


@pytest.mark.parametrize("change", CHANGES)
def test_features_are_computed_anew_where_anything_that_they_are_made_from_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """And read where nothing has changed."""
    arrays = blobs(train=12, test=4) | {"patient_train": np.arange(12) // 2}
    data, usual = f"npz:{tmp_path / 'set.npz'}", {"unit_column": "patient"}
    with context(tmp_path / "run") as given:
        np.savez(tmp_path / "set.npz", **arrays)
        first = whitened(given, data, usual)
        monkeypatch.setattr(features_module, "features_of_blocks", None)
        assert torch.equal(whitened(given, data, usual), first)
        changed = {name: made(arrays[name]) for name, made in CHANGES[change].items() if name in arrays}
        np.savez(tmp_path / "set.npz", **arrays | changed)
        with pytest.raises(TypeError):
            whitened(given, data, usual | CHANGES[change])


def test_blocks_are_whole_batches_that_do_not_grow_with_the_features() -> None:
    for views, dims in ((1, 1024), (1, 36_864), (16, 4096), (1, 8)):
        rows = features_module.rows_at_once(views, dims)
        assert rows % features_module.BATCH == 0
        assert 1 <= rows // features_module.BATCH <= 16
        assert rows == features_module.BATCH or rows * views * dims * 4 <= features_module.BLOCK_BYTES


def test_copies_beyond_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_module, "available_memory", lambda: 10**9)
    features_module.require_room(10**9, "this")
    with pytest.raises(UsageError, match=r"this would take 1\.5 GB of memory, but 1 GB are available"):
        features_module.require_room(3 * 10**9 // 2, "this")


# --------------------------------------------------------------------------------------------------------- memory


def steps(sender: Connection, folder: Path, rows: int, dims: int, how: str) -> None:
    """Send the sums of a step, in a process that may have 60 MB more than it begins with."""
    torch.set_num_threads(1)
    labels, weight = torch.zeros(rows, dtype=torch.int64), torch.ones(dims, 3)
    clipped_softmax_sum(torch.ones(600, dims), labels[:600], weight, 1.0)  # what the libraries load, they load now
    status = Path("/proc/self/status").read_text().splitlines()
    [has] = [1024 * int(line.split()[1]) for line in status if line.startswith("VmData")]
    resource.setrlimit(resource.RLIMIT_DATA, (has + 60_000_000, -1))

    def blocks(begun: int) -> Iterator[np.ndarray]:
        for start in range(0, rows, 1024):
            yield np.full((min(1024, rows - start), dims), dims**-0.5)

    features = torch.from_dlpack(ArrayFile(folder, "features", rows, np.float16).written("key", blocks, print))
    if how == "drawn":
        total = clipped_softmax_sum(features, labels, weight, 1.0, rows=torch.arange(0, rows, 1))
    elif how == "units":
        whose = UnitRows(np.arange(rows)[::-1].copy(), np.arange(0, rows + 1, 2))
        total = 2 * whose.clipped_softmax_sum(features, labels, np.arange(rows // 2), weight, 1.0, precise=False)
    else:
        try:
            total = clipped_softmax_sum(features.clone(), labels, weight, 1.0)
        except (RuntimeError, MemoryError) as error:
            return sender.send(str(error))
    sender.send(total.double().sum(0).tolist())


@pytest.mark.skipif(sys.platform != "linux", reason="limits and /proc of Linux")
@pytest.mark.parametrize("how", ["units", "copied", pytest.param("drawn", marks=pytest.mark.slow)])
def test_steps_on_features_beyond_a_memory_limit(tmp_path: Path, how: str) -> None:
    """128 MB of features, and the process may have 60 MB more than it begins with. Control: a copy is too much."""
    rows, dims = 32_768, 1024
    process, receiver = process_of(steps, tmp_path, rows, dims, how)
    found = receiver.recv()
    process.join()
    if how == "copied":
        assert "alloc" in found or "memory" in found.lower()
        return
    part = dims**0.5 / 3  # of a record: its features' sum times softmax - one-hot, not clipped
    assert found == pytest.approx([-2 * part * rows, part * rows, part * rows], rel=1e-3)
