"""Checkpoints: what is saved comes back, bit by bit or not at all; errors name the file and the tensor."""

from __future__ import annotations

import json
import logging
import os
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dprandp.errors import CheckpointError, StorageError
from dprandp.runs import checkpoint
from dprandp.runs.checkpoint import DamagedCheckpointError, check_tensors, tensors_from_bytes, tensors_to_bytes

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


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
)
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
    for name in ("step-2.safetensors", "step-2.json", "LATEST"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_keeps_the_newest_by_number_and_drops_an_abandoned_future(tmp_path: Path) -> None:
    for step in (8, 9, 10, 11):
        checkpoint.save(tmp_path, f"step-{step}", shifted(step), {})
    assert checkpoint.available(tmp_path) == ["step-11", "step-10"]
    checkpoint.save(tmp_path, "step-12", shifted(12), {}, keep=3)
    assert checkpoint.available(tmp_path) == ["step-12", "step-11", "step-10"]
    checkpoint.save(tmp_path, "step-11", shifted(11), {}, keep=2)  # the run went back and came here again
    assert checkpoint.available(tmp_path) == ["step-11", "step-10"]
    assert sorted(os.listdir(tmp_path)) == [
        "LATEST",
        "step-10.json",
        "step-10.safetensors",
        "step-11.json",
        "step-11.safetensors",
    ]


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "LATEST", "a b"])
def test_bad_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="bad checkpoint name"):
        checkpoint.save(tmp_path, name, {}, {})


def damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def damage_remove(path: Path) -> None:
    path.unlink()


DAMAGES = [damage_truncate, damage_empty, damage_flip, damage_remove]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("suffix", ["safetensors", "json"])
def test_damage_is_noticed_and_the_last_good_one_used_aloud(tmp_path: Path, damage, suffix: str) -> None:
    checkpoint.save(tmp_path, "step-1", shifted(1), {"step": 1})
    checkpoint.save(tmp_path, "step-2", shifted(2), {"step": 2})
    damage(tmp_path / f"step-2.{suffix}")
    with pytest.raises(DamagedCheckpointError, match=rf"step-2\.{suffix}") as caught:
        checkpoint.load(tmp_path)
    assert caught.value.exit_code == 4
    assert "--resume" in caught.value.fix
    said: list[str] = []
    loaded = checkpoint.load(tmp_path, fallback=True, warn=said.append)
    assert same(loaded.tensors, shifted(1))
    assert len(said) == 1
    assert f"step-2.{suffix}" in said[0]
    assert "continuing with the checkpoint step-1" in said[0]
    assert checkpoint.resume(tmp_path, warn=said.append).name == "step-1"
    damage(tmp_path / f"step-1.{suffix}")
    for call in (lambda: checkpoint.load(tmp_path, fallback=True), lambda: checkpoint.resume(tmp_path)):
        with pytest.raises(CheckpointError, match="no whole checkpoint is left") as caught:
            call()
        assert "--overwrite" in caught.value.fix
    # and the folder can be used again
    checkpoint.save(tmp_path, "step-2", shifted(2), {})
    assert same(checkpoint.load(tmp_path).tensors, shifted(2))


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, "a", TENSORS, {"step": 100, "spent": 0.25})
    draw = random.Random(0)
    for name in ("a.safetensors", "a.json"):
        whole = (tmp_path / name).read_bytes()
        # the description's own whitespace is the one thing that may change unnoticed
        bits = [bit for bit in range(8 * len(whole)) if whole[bit // 8] not in b" \n"]
        for bit in draw.sample(bits, 150):
            data = bytearray(whole)
            data[bit // 8] ^= 1 << bit % 8
            (tmp_path / name).write_bytes(data)
            with pytest.raises(CheckpointError):
                checkpoint.load(tmp_path)
        (tmp_path / name).write_bytes(whole)
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


def test_warns_through_logging_by_default(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("dprandp"), "propagate", True)  # a console of another test may have ended it
    checkpoint.save(tmp_path, "step-1", TENSORS, {})
    checkpoint.save(tmp_path, "step-2", TENSORS, {})
    damage_flip(tmp_path / "step-2.safetensors")
    checkpoint.load(tmp_path, fallback=True)
    assert "step-2.safetensors is damaged" in caplog.text


def test_nothing_to_resume(tmp_path: Path) -> None:
    assert checkpoint.resume(tmp_path) is None
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        checkpoint.load(tmp_path)
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        checkpoint.load(tmp_path, fallback=True)
    with pytest.raises(CheckpointError, match=r"step-3\.safetensors is missing"):
        checkpoint.load(tmp_path, "step-3")
    (tmp_path / "step-1.safetensors").write_bytes(tensors_to_bytes(TENSORS))  # killed before its description
    assert checkpoint.resume(tmp_path) is None


def test_load_by_name_falls_back_to_older_ones_alone(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, f"step-{step}", shifted(step), {}, keep=3)
    assert checkpoint.load(tmp_path, "step-2").name == "step-2"
    damage_flip(tmp_path / "step-2.safetensors")
    assert checkpoint.load(tmp_path, "step-2", fallback=True).name == "step-1"


@pytest.mark.parametrize(
    ("expect", "words"),
    [
        ({"conv.weight": (3, 4), "conv.bias": (4,), "step": ()}, r"'conv.bias' with shape \(3,\).* needs \(4,\)"),
        ({"conv.weight": (3, 4), "conv.bias": (3,), "step": (), "head": (1,)}, "has no tensor 'head'"),
        ({"conv.weight": (3, 4), "conv.bias": (3,)}, "'step', which the configuration does not have"),
        (
            {"conv.weight": TENSORS["conv.weight"], "conv.bias": torch.zeros(3, dtype=torch.float16), "step": ()},
            r"'conv.bias' as torch.float32; the configuration needs torch.float16",
        ),
    ],
)
def test_a_checkpoint_of_something_else_is_refused_by_tensor(tmp_path: Path, expect: dict, words: str) -> None:
    checkpoint.save(tmp_path, "step-1", TENSORS, {})
    checkpoint.save(tmp_path, "step-2", TENSORS, {})
    for fallback in (False, True):  # an older one of the same run would not fit either: no walking back
        with pytest.raises(CheckpointError, match=words) as caught:
            checkpoint.load(tmp_path, expect=expect, fallback=fallback)
        assert not isinstance(caught.value, DamagedCheckpointError)
        assert str(tmp_path / "step-2.safetensors") in caught.value.problem
    checkpoint.load(tmp_path, expect=TENSORS)
    checkpoint.load(tmp_path, expect={name: tuple(tensor.shape) for name, tensor in TENSORS.items()})


def test_newer_format(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, "a", TENSORS, {})
    record = json.loads((tmp_path / "a.json").read_text())
    (tmp_path / "a.json").write_text(json.dumps(record | {"format": 2}))
    with pytest.raises(CheckpointError, match="format 2; this version reads up to 1"):
        checkpoint.load(tmp_path, fallback=True)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_no_checkpoint(data: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        tensors_from_bytes(data, "x.safetensors")


def test_hostile_headers() -> None:
    whole = tensors_to_bytes({"a": torch.zeros(4)})
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])

    def build(entry: dict) -> bytes:
        text = json.dumps({"a": entry}).encode()
        return len(text).to_bytes(8, "little") + text + whole[8 + size :]

    assert same(tensors_from_bytes(build(header["a"]), "x"), {"a": torch.zeros(4)})  # the builder itself is right
    for change in (
        {"shape": [2**40]},
        {"data_offsets": [0, 2**40]},
        {"data_offsets": [8, 4]},
        {"dtype": "OBJECT"},
        {"shape": [-1]},
    ):
        with pytest.raises(CheckpointError):
            tensors_from_bytes(build(header["a"] | change), "x")


def test_check_tensors_serves_other_files() -> None:
    with pytest.raises(CheckpointError, match=r"^model\.safetensors has no tensor 'b'"):
        check_tensors({"a": torch.zeros(1)}, {"a": (1,), "b": (2,)}, "model.safetensors")


@pytest.mark.parametrize("failing", range(1, 7))
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    """Each of the six fsyncs of ``save`` (three files, three times the folder) fails in turn."""
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
    assert loaded.name == ("step-2" if failing == 6 else "step-1")
    assert not [name for name in os.listdir(tmp_path) if "partial" in name]
