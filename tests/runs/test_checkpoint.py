"""Checkpoints: what is saved comes back, bit by bit or not at all; errors name the file and the tensor."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch

from dprandp.errors import CheckpointError, StorageError
from dprandp.runs import checkpoint
from dprandp.runs.checkpoint import DamagedCheckpointError, check_tensors, tensors_to_bytes

TENSORS = {"conv.weight": torch.arange(12.0).reshape(3, 4), "conv.bias": torch.zeros(3), "step": torch.tensor(7)}


def shifted(by: float) -> dict[str, torch.Tensor]:
    return {name: tensor + by for name, tensor in TENSORS.items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def test_round_trip(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, "step-1", TENSORS, {"step": 1, "sizes": (2, 3), "epsilon": float("inf")})
    assert path == tmp_path / "step-1.safetensors"
    loaded = checkpoint.load(tmp_path)
    assert same(loaded.tensors, TENSORS)
    assert loaded.meta == {"step": 1, "sizes": [2, 3], "epsilon": "inf"}
    assert (loaded.path, loaded.name) == (path, "step-1")
    assert (tmp_path / "LATEST").read_text() == "step-1\n"
    loaded.tensors["step"] += 1  # may be changed in place


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.uint8, torch.bool])
def test_awkward_tensors(tmp_path: Path, dtype: torch.dtype) -> None:
    base = (torch.arange(48).reshape(1, 3, 4, 4) % 2).to(dtype)
    shared = torch.ones(4, 4)
    tensors = {
        "channels_last": base.contiguous(memory_format=torch.channels_last),
        "transposed": base[0, 0].t(),
        "empty": base[:0],
        "scalar": base[0, 0, 0, 1],
        "shared": shared,
        "tied": shared,
        "view": shared[1:],
        "grad": torch.ones(2, requires_grad=True),
    }
    checkpoint.save(tmp_path, "a", tensors, {})
    assert same(checkpoint.load(tmp_path).tensors, tensors)


def test_same_state_same_bytes(tmp_path: Path) -> None:
    """Not only the same values: neither the order of the dict, the strides nor what was saved before shows."""
    for folder, order in (("a", list(TENSORS)), ("b", list(TENSORS)[::-1])):
        (tmp_path / folder).mkdir()
        if folder == "b":
            checkpoint.save(tmp_path / folder, "step-1", shifted(5), {})
            checkpoint.save(tmp_path / folder, "step-2", shifted(6), {"other": 1})
        tensors = {name: TENSORS[name] for name in order}
        tensors["conv.weight"] = tensors["conv.weight"].t().contiguous().t()
        checkpoint.save(tmp_path / folder, "step-2", tensors, {"step": 2})
    for name in ("step-2.safetensors", "LATEST"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_keeps_the_newest_by_number_and_drops_an_abandoned_future(tmp_path: Path) -> None:
    for step in (8, 9, 10, 11):
        checkpoint.save(tmp_path, f"step-{step}", shifted(step), {})
    assert checkpoint.available(tmp_path) == ["step-11", "step-10"]
    checkpoint.save(tmp_path, "step-12", shifted(12), {}, keep=3)
    assert checkpoint.available(tmp_path) == ["step-12", "step-11", "step-10"]
    checkpoint.save(tmp_path, "step-11", shifted(11), {}, keep=2)  # the run went back and came here again
    assert checkpoint.available(tmp_path) == ["step-11", "step-10"]
    assert sorted(os.listdir(tmp_path)) == ["LATEST", "step-10.safetensors", "step-11.safetensors"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, empty, flip, Path.unlink])
def test_damage_is_noticed_and_the_last_good_one_used_aloud(tmp_path: Path, damage) -> None:
    checkpoint.save(tmp_path, "step-1", shifted(1), {"step": 1})
    checkpoint.save(tmp_path, "step-2", shifted(2), {"step": 2})
    damage(tmp_path / "step-2.safetensors")
    with pytest.raises(DamagedCheckpointError, match=r"step-2\.safetensors") as caught:
        checkpoint.load(tmp_path)
    assert caught.value.exit_code == 4
    assert "--resume" in caught.value.fix
    said: list[str] = []
    assert same(checkpoint.resume(tmp_path, warn=said.append).tensors, shifted(1))
    assert len(said) == 1
    assert "step-2.safetensors" in said[0]
    assert "continuing with the checkpoint step-1" in said[0]
    damage(tmp_path / "step-1.safetensors")
    with pytest.raises(CheckpointError, match="no whole checkpoint is left") as caught:
        checkpoint.resume(tmp_path, warn=said.append)
    assert "--overwrite" in caught.value.fix
    # and the folder can be used again
    checkpoint.save(tmp_path, "step-2", shifted(2), {})
    assert same(checkpoint.load(tmp_path).tensors, shifted(2))


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, "a", TENSORS, {"step": 100, "spent": 0.25})
    draw = random.Random(0)
    path = tmp_path / "a.safetensors"
    whole = path.read_bytes()
    bits = [bit for bit in range(8 * len(whole)) if whole[bit // 8] not in b" \n"]  # the header's padding says nothing
    for bit in draw.sample(bits, 500):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises(CheckpointError):
            checkpoint.load(tmp_path)
    path.write_bytes(whole)
    assert same(checkpoint.load(tmp_path).tensors, TENSORS)


@pytest.mark.parametrize("content", [b"", b"\xff", b"../../etc/passwd\n", b"step-7\n"])
def test_damaged_pointer(tmp_path: Path, content: bytes) -> None:
    checkpoint.save(tmp_path, "step-1", TENSORS, {})
    (tmp_path / "LATEST").write_bytes(content)
    with pytest.raises(CheckpointError):
        checkpoint.load(tmp_path)
    said: list[str] = []
    assert checkpoint.resume(tmp_path, warn=said.append).name == "step-1"
    assert said


def test_nothing_to_resume(tmp_path: Path) -> None:
    assert checkpoint.resume(tmp_path, warn=pytest.fail) is None
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        checkpoint.load(tmp_path)
    with pytest.raises(CheckpointError, match=r"step-3\.safetensors is missing"):
        checkpoint.load(tmp_path, "step-3")
    (tmp_path / "step-1.safetensors").write_bytes(tensors_to_bytes(TENSORS))  # no checkpoint, but tensors
    assert checkpoint.resume(tmp_path, warn=pytest.fail) is None


@pytest.mark.parametrize(
    ("expect", "words"),
    [
        ({"conv.bias": (4,)}, r"'conv.bias' with shape \(3,\).* needs \(4,\)"),
        ({"head": (1,)}, "has no tensor 'head'"),
        ({"step": None}, "'step', which the configuration does not have"),
        ({"conv.bias": torch.zeros(3, dtype=torch.float16)}, r"'conv.bias' as torch.float32; .* needs torch.float16"),
    ],
)
def test_tensors_of_something_else_are_refused_by_name(expect: dict, words: str) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    check_tensors(TENSORS, TENSORS, "x")
    check_tensors(TENSORS, shapes, "x")
    wanted = {name: shape for name, shape in (shapes | expect).items() if shape is not None}
    with pytest.raises(CheckpointError, match=r"^model\.safetensors .*" + words) as caught:
        check_tensors(TENSORS, wanted, "model.safetensors")
    assert not isinstance(caught.value, DamagedCheckpointError)


def test_newer_format(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, "a", TENSORS, {})
    path = tmp_path / "a.safetensors"
    path.write_bytes(path.read_bytes().replace(rb'\"format\": 2', rb'\"format\": 3'))
    with pytest.raises(CheckpointError, match="format 3; this version reads 2"):
        checkpoint.resume(tmp_path, warn=pytest.fail)


@pytest.mark.parametrize("failing", range(1, 5))
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    """Each of the four fsyncs of ``save`` (two files, twice the folder) fails in turn."""
    checkpoint.save(tmp_path, "step-1", shifted(1), {})
    real, calls = os.fsync, []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == failing:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr("dprandp.runs.files.os.fsync", fsync)
    with pytest.raises(StorageError, match="disk is full"):
        checkpoint.save(tmp_path, "step-2", shifted(2), {})
    monkeypatch.undo()
    loaded = checkpoint.load(tmp_path)
    assert same(loaded.tensors, shifted(int(loaded.name[-1])))
    assert loaded.name == ("step-2" if failing == 4 else "step-1")
    assert not [name for name in os.listdir(tmp_path) if "partial" in name]
