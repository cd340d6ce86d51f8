"""The mutation check itself: its table fits the package, and its verdicts are right on a package of one function."""

from __future__ import annotations

import ast
from collections import Counter
from functools import cache
from pathlib import Path

import mutate
import pytest
from mutations import MUTATIONS, Mutation

SOURCES = sorted((mutate.ROOT / mutate.PACKAGE).rglob("*.py"))
TESTS = sorted((mutate.ROOT / mutate.TESTS).rglob("test_*.py"))


@cache
def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def complaint(mutation: Mutation) -> str | None:
    """What is wrong with an entry: its text is not there once, it makes no Python, or a test that it names is gone."""
    places = [path for path in SOURCES for _ in range(text_of(path).count(mutation.old))]
    if len(places) != 1:
        return f"its text is there {len(places)} times"
    mutated = text_of(places[0]).replace(mutation.old, mutation.new)
    try:
        if mutated == text_of(places[0]) or not ast.parse(mutated):
            return "it changes nothing"
    except SyntaxError as error:
        return f"it is no Python: {error}"
    for name in mutation.tests:
        file, _, test = name.partition("::")
        found = [path for path in TESTS if path.name == file]
        if len(found) != 1 or (test and f"\ndef {test.partition('[')[0]}(" not in text_of(found[0])):
            return f"{name} is not there"
    return None if mutation.tests else "it names no test"


def test_every_mutation_fits_the_package() -> None:
    assert {mutation.name: complaint(mutation) for mutation in MUTATIONS if complaint(mutation)} == {}


def test_an_entry_that_fits_no_more_is_complained_about() -> None:
    old, tests = "def add_gaussian_noise(", ("test_plan.py::test_the_divisor_is_public",)
    assert complaint(Mutation("", old, "def noise(", tests)) is None
    assert "no Python" in complaint(Mutation("", old, "def (", tests))
    assert "0 times" in complaint(Mutation("", "no such text", "", tests))
    assert "nothing" in complaint(Mutation("", old, old, tests))
    assert "test_gone is not there" in complaint(Mutation("", old, "def noise(", ("test_plan.py::test_gone",)))


def test_names_are_unique_and_a_sample_is_the_same_for_the_same_seed() -> None:
    assert max(Counter(mutation.name for mutation in MUTATIONS).values()) == 1
    assert len({(mutation.old, mutation.new) for mutation in MUTATIONS}) == len(MUTATIONS) >= 60
    names, again, other = (
        [mutation.name for mutation in mutate.chosen_of(MUTATIONS, None, 0.2, seed)] for seed in (3, 3, 4)
    )
    assert names == again != other
    assert len(names) == round(0.2 * len(MUTATIONS))
    assert [each.name for each in mutate.chosen_of(MUTATIONS, [names[1], names[0]], 1.0, 0)] == names[:2]
    with pytest.raises(SystemExit, match="no such mutation: nonsense"):
        mutate.chosen_of(MUTATIONS, ["nonsense"], 1.0, 0)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A package with one function and its test."""
    root = tmp_path / "project"
    for name, text in {
        "dprandp/__init__.py": "",
        "dprandp/kernel.py": "def noise(scale):\n    return 2 * scale\n\n\ndef spent(steps):\n    return steps\n",
        "tests/deep/test_kernel.py": (
            "from dprandp.kernel import noise, spent\n\n"
            "def test_noise():\n    assert noise(3) == 6\n\n"
            "def test_spent():\n    assert spent(1) > 0\n"
        ),
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_verdicts(project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutate, "LIMIT", 5)
    monkeypatch.setattr(mutate, "PRELOADED", ("pytest",))
    rows = [
        Mutation("half", "2 * scale", "1 * scale", ("test_kernel.py::test_noise",)),
        Mutation("unseen", "return steps\n", "return steps - 0.5\n", ("test_kernel.py::test_spent",)),
        Mutation("twice", "return", "yield", ("test_kernel.py",)),
        Mutation("no code", "2 * scale", "2 * (scale", ("test_kernel.py",)),
        Mutation("endless", "    return steps\n", "    while True:\n        pass\n", ("test_kernel.py::test_spent",)),
    ]
    before = contents(project)
    assert mutate.run(rows, project, 2) == 1
    printed = capsys.readouterr().out
    words = {line[:8].strip(): line[8:].split()[0] for line in printed.splitlines()[1:-1]}
    assert words == {"half": "killed", "unseen": "survived", "twice": "lost", "no code": "broken", "endless": "killed"}
    assert "test_kernel.py::test_noise" in printed
    assert "5 mutations: 2 killed" in printed
    assert contents(project) == before
    assert mutate.run([rows[0]], project, 1) == 0
    (project / "tests/deep/test_kernel.py").write_text("def test_noise():\n    assert False\n")
    assert mutate.run([rows[0]], project, 1) == 2
    assert "without a mutation these tests fail" in capsys.readouterr().out
