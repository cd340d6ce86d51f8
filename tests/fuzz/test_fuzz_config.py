"""Configuration files and flags of all kinds: a configuration within its ranges comes out, or a refusal in words."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path

from fuzzing import JUNK, attempt, command, dice, explore, mutated_bytes, sizes, tree
from hypothesis import strategies as st

from dprandp.config import schema

WHOLE = """size = "tiny"
[generate]
count = 120
process = "dead-leaves"
[pretrain]
filters = 32
layers = 1
arch = "patchnet"
[probe]
data = "npz:tiny.npz"
epsilon = 2.0
steps = 5
[finetune]
steps = 3
ema = 0.9
"""

WORDS = sorted({field.name for kind in schema.STAGE_CONFIGS.values() for field in dataclasses.fields(kind)})
NAMES = st.sampled_from([*WORDS, *WORDS, "unknown", "", "a b", "__class__", "self", "\u0661"])
SCALARS = st.one_of(
    st.sampled_from([value for value in JUNK if isinstance(value, bool | int | float | str)]),
    st.integers(),
    st.integers(-3, 300),
    st.floats(allow_nan=True, allow_infinity=True),
    st.floats(1e-6, 10),
    st.text(max_size=12),
    st.sampled_from([*schema.SIZES, "wrn-16-4", "wrn-10-1", "wrn-99999-1", "wrn-16-99999999", "wrn--1-1", "patchnet"]),
    st.sampled_from(["rgb", "cosine", "probe", "scratch", "npz:x.npz", "folder:x", "cifar10", "dead-leaves"]),
)
VALUES = st.one_of(
    SCALARS, SCALARS, SCALARS, st.lists(SCALARS, max_size=3), st.dictionaries(st.text(max_size=3), SCALARS, max_size=2)
)
TABLES = st.dictionaries(NAMES, VALUES, max_size=5)
DOCUMENTS = st.dictionaries(
    st.sampled_from([*schema.STAGE_CONFIGS, "generate", "probes", "size"]),
    st.one_of(TABLES, TABLES, VALUES),
    max_size=4,
)


def toml_of(value: object) -> str:
    """TOML of any value, unlike the package's own writer also of nested ones; None as a word that is no TOML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key_of(key)} = {toml_of(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_of, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def key_of(key: str) -> str:
    return json.dumps(key, ensure_ascii=False).replace("\x7f", "\\u007f")


def check_in_range(stage: str, made: schema.StageConfig) -> None:
    assert type(made) is schema.STAGE_CONFIGS[stage]
    for key, value in dataclasses.asdict(made).items():
        if isinstance(value, float):
            assert not math.isnan(value), key
    assert getattr(made, "epsilon", 1) > 0
    assert 0 < (getattr(made, "delta", None) or 0.5) < 1


def resolved(stage: str, file: Path, size: str) -> None:
    check_in_range(stage, schema.resolve(stage, size, file, {}))


@sizes(30, 1500)
def test_documents(tmp_path: Path, cases: int, record_property) -> None:
    file = tmp_path / "a.toml"

    def check(drawn: tuple[dict, str, str]) -> None:
        document, stage, size = drawn
        file.write_bytes(
            "".join(f"{key_of(k)} = {toml_of(v)}\n" for k, v in document.items()).encode("utf-8", "surrogatepass")
        )
        attempt(lambda: resolved(stage, file, size))

    strategy = st.tuples(DOCUMENTS, st.sampled_from(list(schema.STAGE_CONFIGS)), st.sampled_from(schema.SIZES))
    record_property("cases tried", explore(strategy, check, cases, cases < 1000))


@sizes(30, 1000)
def test_damaged_files(tmp_path: Path, cases: int, record_property) -> None:
    file = tmp_path / "a.toml"

    def check(draw: random.Random) -> None:
        file.write_bytes(mutated_bytes(draw, WHOLE.replace('size = "tiny"\n', "").encode()))
        attempt(lambda: resolved(draw.choice(list(schema.STAGE_CONFIGS)), file, "tiny"))

    record_property("cases tried", explore(dice, check, cases, cases < 1000))


PRIVATE_FLAGS = [
    "--data", "--classes", "--eps", "--delta", "--clip", "--steps", "--batch-size", "--lr", "--views", "--seed",
    "--size", "--device",
]  # fmt: skip
FLAGS = {
    "generate": ["--process", "--count", "--resolution", "--seed", "--size", "--workers"],
    "pretrain": ["--arch", "--steps", "--batch-size", "--lr", "--colour", "--data", "--seed", "--size", "--device"],
    "probe": [*PRIVATE_FLAGS, "--data-dir", "--share", "--insecure-seed"],
    "finetune": [*PRIVATE_FLAGS, "--from", "--arch", "--microbatch"],
    "account": ["--eps", "--noise-multiplier", "--delta", "--steps"],
    "status": [],
    "datasets": ["--data-dir"],
}


@sizes(20, 700)
def test_flags(finished: Path, data: str, tmp_path: Path, cases: int, record_property) -> None:
    """Stages are asked for a plan, or of a run in which they are finished: nothing here trains."""
    command("report", "--run", finished)
    before = tree(finished)

    def check(drawn: tuple[str, list[tuple[int, object]], bool, object]) -> None:
        name, flags, other_run, value = drawn
        arguments: list[object] = [name]
        for place, given in flags:
            if FLAGS[name]:
                arguments += [FLAGS[name][place % len(FLAGS[name])], str(given).replace("\0", "")]
        if name in ("probe", "finetune"):
            arguments += ["--plan"]
        if name not in ("account", "datasets"):
            run = str(tmp_path / str(value).replace("\0", "").replace("/", "_")[:300]) if other_run else str(finished)
            arguments += ["--run", run]
            if name == "generate" and not other_run:
                pass
            elif name in ("generate", "pretrain"):
                arguments += ["--resume", "--overwrite"]  # never both: whatever else is fine is refused at the end
        told = command(*arguments)
        if told.code:
            assert tree(finished) == before

    flag = st.tuples(st.integers(0, 20), SCALARS)
    strategy = st.tuples(st.sampled_from(list(FLAGS)), st.lists(flag, max_size=4), st.booleans(), SCALARS)
    record_property("cases tried", explore(strategy, check, cases, cases < 500))


def test_odd_files(tmp_path: Path) -> None:
    for content in (
        b"", b"\xef\xbb\xbf", b"\xff\xfe", b"[" * 50_000, b"a." * 20_000 + b"b = 1",
        b"a = " + b"[" * 5000 + b"]" * 5000, b"a = " + b"9" * 10_000, b"[probe]\n" * 2,
    ):  # fmt: skip
        (tmp_path / "a.toml").write_bytes(content)
        attempt(lambda: resolved("probe", tmp_path / "a.toml", "tiny"))
