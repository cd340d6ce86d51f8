"""Run directories that were damaged, edited, or made by another version: refused with exit code 4, or read aright."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fuzzing import Told, attempt, command, dice, explore, mutated, mutated_bytes, sizes, tree
from tiny_run import FINETUNE, GENERATE, PRETRAIN, PROBE, TRAIN

from dprandp import pipeline, release
from dprandp.cli import session
from dprandp.cli.flags import Options
from dprandp.config import toml
from dprandp.config.schema import StageConfig
from dprandp.errors import DprandpError
from dprandp.inspection import overview
from dprandp.pipeline import plan as planning
from dprandp.privacy.ledger import FIRST_PREVIOUS, Ledger, seal
from dprandp.runs import checkpoint
from dprandp.runs.console import Console
from dprandp.runs.context import Context
from dprandp.runs.directory import OPTIONAL_STAGES, STAGES, RunDir
from dprandp.runs.files import to_json

Copy = Callable[[Path], Path]

LOOKING = [("status",), ("status", "--json"), ("probe", "--plan"), ("finetune", "--plan")]
FINISHED = [("generate",), ("pretrain",), ("probe",), ("finetune",), ("finetune", "--json")]
"""Stages that the run has finished: they return what was recorded, or refuse."""

FULL = {"batch_size": TRAIN}
SETTINGS = {"generate": GENERATE, "pretrain": PRETRAIN, "probe": PROBE | FULL, "finetune": FINETUNE | FULL}


@pytest.fixture
def settings_file(tmp_path: Path) -> Path:
    path = tmp_path / "settings.toml"
    path.write_text("".join(f"[{stage}]\n{toml.dumps(values)}" for stage, values in SETTINGS.items()))
    return path


class Damaged:
    """A run some of whose files are damaged for a command, and then put back."""

    def __init__(self, run: Path, settings_file: Path, data: str) -> None:
        self.run, self.settings_file, self.data = run, settings_file, data
        self.whole = tree(run)

    def arguments(self, name: tuple[str, ...]) -> list[object]:
        flags: list[object] = [*name, "--run", self.run]
        if name[0] in ("generate", "pretrain", "probe", "finetune"):
            flags += ["--config", self.settings_file]
        if name[0] in ("probe", "finetune"):
            flags += ["--data", self.data]
        return flags

    def asked(self, changes: dict[str, bytes], *name: str) -> Told:
        """A command on the run with these files in place of its own; refused, it must leave everything as it is."""
        for file, content in changes.items():
            (self.run / file).write_bytes(content)
        before = self.whole | changes
        try:
            told = command(*self.arguments(name))
            after = tree(self.run)
            leftovers = [path for path in after if ".partial" in path or ".trash" in path]
            assert leftovers == []
            if told.code:
                assert {k for k in after if after[k] != before.get(k)} | (before.keys() - after.keys()) == set(), told
        finally:
            for path in sorted(tree(self.run).keys() - self.whole.keys(), reverse=True):
                (self.run / path).rmdir() if (self.run / path).is_dir() else (self.run / path).unlink()
            for path, content in self.whole.items():
                file = self.run / path
                if isinstance(content, bytes) and not (file.is_file() and file.read_bytes() == content):
                    file.write_bytes(content)
        return told

    def looked(self, changes: dict[str, bytes], kind: str) -> DprandpError | None:
        """The same without a command line, many times as fast: what a reader of the run makes of it."""
        for file, content in changes.items():
            (self.run / file).write_bytes(content)
        try:
            return attempt(lambda: LOOKS[kind](self))
        finally:
            for file in changes:
                (self.run / file).write_bytes(self.whole[file])

    def stage(self, name: str, act: Callable[[StageConfig, Context], object]) -> None:
        """A stage's configuration and context, as the command line makes them."""
        with session.opened(self.run) as rundir:
            given = {"data": self.data} if name in ("probe", "finetune") else {}
            config = session.resolve(rundir, name, Options(config=self.settings_file), given)
            act(config, session.context(rundir, Console(quiet=True), Options(device="cpu")))

    def look_at_all(self) -> None:
        table = overview.status(RunDir.open(self.run, create=False))
        to_json(table).encode()
        overview.status_lines(table).encode()

    def skip(self, name: str) -> None:
        self.stage(name, lambda config, context: pipeline.stage_line(name, pipeline.run_stage(name, config, context)))

    def plan(self, name: str) -> None:
        self.stage(name, lambda config, context: planning.plan_lines(planning.plan(name, config, context)))


LOOKS: dict[str, Callable[[Damaged], None]] = {
    "status": Damaged.look_at_all,
    "plan probe": lambda made: made.plan("probe"),
    "plan finetune": lambda made: made.plan("finetune"),
    **{f"skip {name}": lambda made, name=name: made.skip(name) for name in STAGES if name not in OPTIONAL_STAGES},
}
ABOUT_THE_BUDGET = [kind for kind in LOOKS if "generate" not in kind and "pretrain" not in kind]
COMMANDED = 0.05
"""Part of the cases that go through the command line, with the whole tree compared before and after."""


@pytest.fixture
def damaged(copy_of: Copy, finished: Path, settings_file: Path, data: str) -> Damaged:
    return Damaged(copy_of(finished), settings_file, data)


def test_an_untouched_run_is_fine(damaged: Damaged) -> None:
    """The control: what is refused below is refused for what was done to it."""
    for name in LOOKING + FINISHED:
        assert damaged.asked({}, *name).code == 0, name
    for kind in LOOKS:
        assert damaged.looked({}, kind) is None, kind


def try_on(damaged: Damaged, draw: random.Random, changes: dict[str, bytes], kinds: list[str]) -> None:
    """One case: mostly a reader alone, now and then a command."""
    if draw.random() < COMMANDED:
        damaged.asked(changes, *draw.choice(LOOKING + FINISHED))
    else:
        damaged.looked(changes, draw.choice(kinds))


def text_of(value: object) -> bytes:
    return json.dumps(value).encode()


@sizes(40, 1000)
def test_run_json(damaged: Damaged, cases: int, record_property) -> None:
    """Fields missing, of other types, unknown; the format and the version of others; bytes flipped."""
    content = (damaged.run / "run.json").read_bytes()
    document = json.loads(content)

    def check(draw: random.Random) -> None:
        kind = draw.randrange(6)
        if kind == 0:
            changed = mutated_bytes(draw, content)
        elif kind == 1:
            version = draw.choice([2, 99, 0, -1, "1", 1.0, None, True, 10**30])
            changed = text_of(document | {"format": version, "dprandp": draw.choice(["0.0.1", "9.9", None, 3])})
        elif kind == 2:
            stages = dict(document["stages"])
            stage = draw.choice(list(stages))
            part = draw.choice(["config", "result", "inputs", "outputs"])
            stages[stage] = stages[stage] | {part: mutated(draw, stages[stage][part], 1)}
            changed = text_of(document | {"stages": stages})
        else:
            changed = text_of(mutated(draw, document))
        try_on(damaged, draw, {"run.json": changed}, list(LOOKS))

    record_property("cases tried", explore(dice, check, cases, cases < 400))


@sizes(30, 500)
def test_ledger(damaged: Damaged, cases: int, record_property) -> None:
    """Also lines that were edited and sealed anew, which the chain of hashes cannot tell from real ones.

    Whatever is accepted without a word, and was not sealed anew, is what was written.
    """
    content = (damaged.run / "privacy/ledger.jsonl").read_bytes()
    records = [json.loads(line) for line in content.splitlines()]
    charges = Ledger.open(damaged.run / "privacy/ledger.jsonl", read_only=True).charges

    def check(draw: random.Random) -> None:
        kind = draw.randrange(4)
        if kind == 0:
            changed = mutated_bytes(draw, content)
        elif kind == 1:
            lines = content.splitlines(keepends=True)
            a, b = draw.randrange(len(lines)), draw.randrange(len(lines))
            lines[a], lines[b] = lines[b], lines[a] if draw.random() < 0.8 else b""
            changed = b"".join(lines)
        else:
            changed, previous = b"", FIRST_PREVIOUS
            made = mutated(draw, records, 1)
            for record in made if isinstance(made, list) else [made]:
                if isinstance(record, dict):
                    record = {key: value for key, value in record.items() if key not in ("previous", "hash")}
                    try:
                        line, previous = seal(record, previous)
                    except ValueError:  # NaN and infinity have no place in a ledger line
                        line = text_of(record) + b"\n"
                    changed += line
                else:
                    changed += text_of(record) + b"\n"
        try_on(damaged, draw, {"privacy/ledger.jsonl": changed}, ABOUT_THE_BUDGET)
        (damaged.run / "privacy/ledger.jsonl").write_bytes(changed)
        said: list[str] = []
        try:
            ledger = Ledger.open(damaged.run / "privacy/ledger.jsonl", read_only=True, warn=said.append)
        except DprandpError:
            return
        finally:
            (damaged.run / "privacy/ledger.jsonl").write_bytes(content)
        if kind < 2 and not content.startswith(changed.rstrip(b"\n")):  # whole lines cut off are found by the plan
            assert said or ledger.charges == charges
            # After lines that were cut off, anything may follow.
            same = next((i for i, (a, b) in enumerate(zip(content, changed, strict=False)) if a != b), len(content))
            assert len(ledger.charges) >= content[:same].count(b'"charge"') - 1
            longest = max(map(len, content.splitlines()))
            assert len(changed) - changed.rfind(b"\n") < 2 * longest  # one torn line, not two

    record_property("cases tried", explore(dice, check, cases, cases < 400))


OTHERS = [
    "env.json", "1-generate/manifest.json", "1-generate/shard-00000.npy", "1-generate/config.toml",
    "2-pretrain/extractor.safetensors", "2-pretrain/LATEST", "2-pretrain/config.toml",
    "3-probe/head.safetensors", "3-probe/LATEST", "3-probe/metrics.jsonl",
    "private/inputs-probe.json", "private/inputs-finetune.json", "private/features.key",
    "model/config.json", "model/model.safetensors", "model/MODEL_CARD.md",
]  # fmt: skip


def altered(draw: random.Random, file: str, content: bytes) -> bytes:
    """Bytes changed, or entries of a JSON file."""
    if file.endswith(".json") and draw.random() < 0.65:
        return text_of(mutated(draw, json.loads(content)))
    return mutated_bytes(draw, content)


@pytest.mark.parametrize(
    ("files", "kinds"), [(["privacy/plan.json"], ABOUT_THE_BUDGET), (OTHERS, list(LOOKS))], ids=["plan", "others"]
)
@sizes(25, 500)
def test_other_files(
    damaged: Damaged, files: list[str], kinds: list[str], cases: int, record_property
) -> None:
    def check(draw: random.Random) -> None:
        file = draw.choice(files)
        try_on(damaged, draw, {file: altered(draw, file, (damaged.run / file).read_bytes())}, kinds)

    record_property("cases tried", explore(dice, check, cases, cases < 400))


@sizes(30, 600)
def test_model_folders(damaged: Damaged, cases: int, record_property) -> None:
    """A released model with damaged weights, another description, or one that was hashed anew: refused, or it works."""
    folder = damaged.run / "model"
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    pixels = np.zeros((1, 16, 16, 3), np.uint8)
    scores = release.load_model(folder).probabilities(pixels)
    assert scores.shape == (1, 3)

    def use() -> None:
        model = release.load_model(folder)
        _ = model.not_private_because
        if np.prod(model.shape) < 10**6:
            model.probabilities(np.zeros((1, *model.shape), np.uint8))

    def check(draw: random.Random) -> None:
        path = draw.choice(sorted(whole))
        content = altered(draw, path.name, whole[path])
        if path.suffix != ".json" and draw.random() < 0.5:  # hashed anew
            record = json.loads(whole[folder / "config.json"])
            record["sha256"][path.name] = hashlib.sha256(content).hexdigest()
            (folder / "config.json").write_bytes(text_of(record))
        path.write_bytes(content)
        error = attempt(use)
        assert error is None or error.exit_code in (3, 4), error
        for path, before in whole.items():
            path.write_bytes(before)

    record_property("cases tried", explore(dice, check, cases, cases < 400))


@sizes(1, 30)
def test_reports(damaged: Damaged, cases: int, record_property) -> None:
    """A report of damaged records is refused, or shows what they hold."""
    files = ["run.json", "run.json", "env.json", "3-probe/metrics.jsonl", "2-pretrain/metrics.jsonl",
             "1-generate/preview.png", "privacy/plan.json", "privacy/ledger.jsonl"]  # fmt: skip

    def check(draw: random.Random) -> None:
        file = draw.choice(files)
        content = (damaged.run / file).read_bytes()
        changed = mutated_bytes(draw, content)
        if draw.random() < 0.8 and file.endswith(("json", "jsonl")):
            lines = content.splitlines() if file.endswith("jsonl") else [content]
            place = draw.randrange(len(lines))
            lines[place] = text_of(mutated(draw, json.loads(lines[place]), 1))
            changed = b"\n".join(lines)
        damaged.asked({file: changed}, "report")

    record_property("cases tried", explore(dice, check, cases, cases < 30))


def resealed(content: bytes, draw: random.Random) -> bytes:
    """A checkpoint whose description was changed and hashed again: whole, but of something else."""
    tensors, size = checkpoint.tensors_from_bytes(content, "x"), int.from_bytes(content[:8], "little")
    description = json.loads(json.loads(content[8 : 8 + size])["__metadata__"][checkpoint.KEY])
    meta = mutated(draw, description["meta"], 1)
    sealed = {"format": checkpoint.FORMAT, "sha256": checkpoint._digest(tensors, meta), "meta": meta}
    return checkpoint.tensors_to_bytes(tensors, {checkpoint.KEY: json.dumps(sealed)})


NEEDED = [
    ("2-pretrain/extractor.safetensors", "probe"),
    ("3-probe/statistics/whitener.safetensors", "finetune"),
    ("3-probe/head.safetensors", "finetune"),
    ("2-pretrain/extractor.safetensors", "finetune"), ("1-generate/manifest.json", "pretrain"),
    ("1-generate/shard-00000.npy", "pretrain"), ("3-probe/LATEST", "finetune"), ("run.json", "finetune"),
    ("run.json", "probe"), ("run.json", "pretrain"),
]  # fmt: skip


@sizes(2, 40)
def test_a_stage_on_damaged_results_of_others(
    probed: Path, copy_of: Copy, settings_file: Path, data: str, cases: int, record_property
) -> None:
    """A stage that reads a damaged file of an earlier one is refused, charges nothing and leaves no part of a file."""

    def check(draw: random.Random) -> None:
        file, stage = draw.choice(NEEDED)
        run = copy_of(probed)
        content = (run / file).read_bytes()
        try:
            tensors = file.endswith(".safetensors") and draw.random() < 0.8
            (run / file).write_bytes(resealed(content, draw) if tensors else altered(draw, file, content))
        except (ValueError, TypeError):
            return
        before = (run / "privacy/ledger.jsonl").read_bytes().count(b"\n")
        made = Damaged(run, settings_file, data)
        told = command(*made.arguments((stage,)), *(["--overwrite"] if stage != "finetune" else []))
        after = tree(run)
        assert not [path for path in after if ".partial" in path or ".trash" in path]
        if told.code:
            assert (run / "privacy/ledger.jsonl").read_bytes().count(b"\n") == before

    record_property("cases tried", explore(dice, check, cases, cases < 30))
