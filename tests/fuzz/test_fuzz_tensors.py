"""Checkpoints and safetensors files of all kinds: what was saved, or a refusal with exit code 4."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from fuzzing import attempt, dice, explore, mutated, mutated_bytes, sizes

from dprandp.runs import checkpoint
from dprandp.runs.checkpoint import tensors_from_bytes, tensors_to_bytes

TENSORS = {"conv.weight": torch.arange(12.0).reshape(3, 4), "bias": torch.zeros(3, dtype=torch.float16)}


@sizes(60, 1500)
def test_safetensors(cases: int, record_property) -> None:
    """Headers that lie about lengths, offsets, shapes and types; bytes of all kinds."""
    whole = tensors_to_bytes(TENSORS)
    length = int.from_bytes(whole[:8], "little")
    header, body = json.loads(whole[8 : 8 + length]), whole[8 + length :]

    def check(draw: random.Random) -> None:
        if draw.random() < 0.4:
            content = mutated_bytes(draw, whole)
        else:
            text = json.dumps(mutated(draw, header)).encode()
            told = draw.choice([len(text), len(text), len(text), 0, 2**40, 2**63, len(text) - 1])
            content = told.to_bytes(8, "little") + text + draw.choice([body, body[:-3], body + b"x", b""])
        error = attempt(lambda: tensors_from_bytes(content, "a.safetensors"))
        if error is not None:
            assert error.exit_code == 4
            assert "a.safetensors" in error.problem

    record_property("cases tried", explore(dice, check, cases, cases < 500))


@sizes(40, 1000)
def test_checkpoints(tmp_path: Path, cases: int, record_property) -> None:
    """Any file of a folder of two checkpoints damaged: the newest whole one comes back, of one piece, or a refusal."""
    for value in (1, 2):
        tensors = {name: tensor + value for name, tensor in TENSORS.items()}
        checkpoint.save(tmp_path, f"step-{value}", tensors, {"value": value})
    whole = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def check(draw: random.Random) -> None:
        path = draw.choice(sorted(whole))
        content = mutated_bytes(draw, whole[path])
        if path.suffix == ".safetensors" and draw.random() < 0.7:
            size = int.from_bytes(whole[path][:8], "little")
            header = json.loads(whole[path][8 : 8 + size])
            said = mutated(draw, json.loads(header["__metadata__"][checkpoint.KEY]))
            header["__metadata__"] = {checkpoint.KEY: json.dumps(said)}
            text = json.dumps(header).encode()
            content = len(text).to_bytes(8, "little") + text + whole[path][8 + size :]
        path.write_bytes(content)

        def load() -> None:
            loaded = checkpoint.resume(tmp_path, warn=lambda text: None)
            value = 1 + float(loaded.tensors["bias"][0]) - 1
            assert loaded.name == f"step-{value:g}"
            loaded.entry("value", int)

        error = attempt(load)
        path.write_bytes(whole[path])
        assert error is None or error.exit_code in (4, 6)

    record_property("cases tried", explore(dice, check, cases, cases < 500))
