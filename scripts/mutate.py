"""Do the tests notice mistakes in the privacy kernel? Each mutation of ``mutations.py`` is one; a test must fail on it.

    python scripts/mutate.py                           # all of them, on all cores
    python scripts/mutate.py --sample 0.2 --seed 3     # a random fifth
    python scripts/mutate.py --only "half the noise"   # by name; --list prints the names

The working tree is only read. A copy of it is made in a temporary folder; each mutation changes one place of another
copy of that, and the tests named for it run there with ``pytest -x``, in a process of their own. First the same tests
run without any mutation.

    killed     a test failed: good
    survived   all passed: the tests do not see this mistake
    lost       the text to be replaced is not there exactly once: mend the entry of the table
    broken     pytest did not come to run the tests: the mutation is no code, or a test was renamed

Exit code: 0 where all were killed, else 1; 2 where the tests fail without a mutation.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import py_compile
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from mutations import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, TESTS = "dprandp", "tests"
IGNORED = (".*", "__pycache__", "*.egg-info")
NOT_NEEDED = {"data", "runs", "build", "dist"}
"""Folders of the project itself; the package has some of these names too."""
LIMIT = 300
"""Seconds after which the tests of one mutation are taken to hang: it is noticed, then."""

SERVER = """
import importlib, json, os, signal, sys, time
for name in sys.argv[2:]:
    importlib.import_module(name)

def child(folder, arguments):
    os.setsid()
    os.chdir(folder)
    with open(os.devnull) as nothing, open("printed", "wb", 0) as printed:
        os.dup2(nothing.fileno(), 0), os.dup2(printed.fileno(), 1), os.dup2(printed.fileno(), 2)
    os.environ["PYTHONPATH"] = folder
    sys.path.insert(0, folder)
    package = __import__(sys.argv[1])
    if not os.path.realpath(package.__file__).startswith(os.path.realpath(folder) + os.sep):
        print("the tests would import", package.__file__)
        return 4
    import pytest
    return int(pytest.main(arguments))

for line in sys.stdin:
    asked = json.loads(line)
    begun, process = time.monotonic(), os.fork()
    if process == 0:
        code = 3
        try:
            code = child(asked["folder"], asked["arguments"])
        finally:
            sys.stdout.flush()
            os._exit(code)
    done, status = os.waitpid(process, os.WNOHANG)
    while not done and time.monotonic() - begun < asked["limit"]:
        time.sleep(0.05)
        done, status = os.waitpid(process, os.WNOHANG)
    if not done:
        os.killpg(process, signal.SIGKILL)
        os.waitpid(process, 0)
    sys.__stdout__.write(json.dumps(os.waitstatus_to_exitcode(status) if done else None) + chr(10))
    sys.__stdout__.flush()
"""
"""A process that has loaded what takes long, and runs pytest in a fork of itself, where the package is the copy's."""


PRELOADED = (
    "pytest", "hypothesis", "numpy", "torch", "torchvision", "scipy.optimize", "scipy.stats", "opacus.accountants",
    "prv_accountant", "dp_accounting.pld",
)  # fmt: skip
"""What takes long, and is not the package's."""


class Server:
    """One of the processes in which tests run, one after another. ``SERVER`` says how."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", SERVER, PACKAGE, *PRELOADED],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    def run(self, folder: Path, paths: Sequence[str]) -> tuple[int, str]:
        """Exit code of ``pytest -x`` in a copy, and what it printed; 1 where it took longer than ``LIMIT``."""
        options = ["-x", "-q", "--tb=no", "-rfE", "-m", "not slow", "-p", "no:cacheprovider", "--rootdir", str(folder)]
        arguments = [*options, "--basetemp", str(folder / "tmp"), *paths]
        asked = {"folder": str(folder), "arguments": arguments, "limit": LIMIT}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        code = json.loads(self._process.stdout.readline())
        printed = (folder / "printed").read_text(encoding="utf-8", errors="replace")
        return (1, f"FAILED more than {LIMIT} seconds") if code is None else (code, printed)

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()


class Servers:
    """As many servers as there are workers, made when they are needed."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._mine = threading.local()
        self._all: list[Server] = []

    def run(self, folder: Path, paths: Sequence[str]) -> tuple[int, str]:
        """``Server.run`` by this thread's own."""
        if not hasattr(self._mine, "server"):
            self._mine.server = Server()
            self._all.append(self._mine.server)
        return self._mine.server.run(folder, paths)

    def close(self) -> None:
        """End them all."""
        for server in self._all:
            server.close()


@dataclass(frozen=True)
class Outcome:
    """What became of one mutation: a word of the table above, seconds, the test that failed or what went wrong."""

    word: str
    seconds: float
    said: str


def places_of(text: str, root: Path) -> list[Path]:
    """The files of the package that hold a text, each as often as it does."""
    files = sorted((root / PACKAGE).rglob("*.py"))
    return [path for path in files for _ in range(path.read_text(encoding="utf-8").count(text))]


def paths_of(names: Iterable[str], root: Path) -> list[str]:
    """``test_x.py::test_y`` as pytest wants it, wherever the file lies; a whole file stands for its single tests.

    Raises:
        ValueError: there is no such file, or more than one.
    """
    whole = {name for name in names if "::" not in name}
    paths = []
    for name in dict.fromkeys(names):
        file, _, test = name.partition("::")
        found = sorted((root / TESTS).rglob(file))
        if len(found) != 1:
            raise ValueError(f"{len(found)} test files are called {file}")
        if not test or file not in whole:
            paths.append(str(found[0].relative_to(root)) + (f"::{test}" if test else ""))
    return paths


def copied(root: Path, folder: Path) -> Path:
    """A copy of what tests need, whose bytecode is believed for equal sources alone."""
    copy = folder / "whole"
    anywhere = shutil.ignore_patterns(*IGNORED)

    def ignored(folder: str, names: list[str]) -> set[str]:
        return anywhere(folder, names) | (NOT_NEEDED & set(names) if Path(folder) == root else set())

    shutil.copytree(root, copy, ignore=ignored, symlinks=True)
    compileall.compile_dir(copy / PACKAGE, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)
    return copy


def tried(mutation: Mutation, whole: Path, servers: Servers) -> Outcome:
    """Apply one mutation to a copy of the copy, and run its tests there."""
    begun = time.monotonic()

    def outcome(word: str, said: str) -> Outcome:
        return Outcome(word, time.monotonic() - begun, said)

    places = places_of(mutation.old, whole)
    if len(places) != 1:
        return outcome("lost", f"the text is there {len(places)} times")
    with tempfile.TemporaryDirectory(prefix="mutate-") as temporary:
        folder = Path(temporary) / "copy"
        shutil.copytree(whole, folder, symlinks=True)
        path = folder / places[0].relative_to(whole)
        path.write_text(path.read_text(encoding="utf-8").replace(mutation.old, mutation.new), encoding="utf-8")
        try:
            code, printed = servers.run(folder, paths_of(mutation.tests, folder))
        except ValueError as error:
            return outcome("broken", str(error))
    failed = re.search(r"^(?:FAILED|ERROR) (.*)$", printed, re.M)
    if code == 0:
        return outcome("survived", "")
    if code == 1 and failed:
        return outcome("killed", failed[1].partition(" - ")[0].rpartition("/")[2])
    return outcome("broken", " ".join(printed.split())[-300:])


def unmutated(mutations: Sequence[Mutation], whole: Path, pool: ThreadPoolExecutor, servers: Servers) -> list[str]:
    """What fails, or is broken, without a mutation; each file's tests in one go."""
    files: dict[str, list[str]] = {}
    for path in paths_of([name for mutation in mutations for name in mutation.tests], whole):
        files.setdefault(path.partition("::")[0], []).append(path)
    with tempfile.TemporaryDirectory(prefix="mutate-") as temporary:

        def run(number: int, paths: list[str]) -> tuple[int, str]:
            folder = Path(temporary) / str(number)
            shutil.copytree(whole, folder, symlinks=True)
            return servers.run(folder, paths)

        results = list(pool.map(run, range(len(files)), files.values()))
    return [
        f"{name}: exit code {code}\n{printed[-2000:]}"
        for name, (code, printed) in zip(files, results, strict=True)
        if code
    ]


def chosen_of(mutations: Sequence[Mutation], only: Sequence[str] | None, sample: float, seed: int) -> list[Mutation]:
    """Those that are asked for, in the order of the table.

    Raises:
        SystemExit: a name that is none.
    """
    if only:
        unknown = set(only) - {mutation.name for mutation in mutations}
        if unknown:
            raise SystemExit(f"no such mutation: {', '.join(sorted(unknown))}")
        mutations = [mutation for mutation in mutations if mutation.name in only]
    count = max(1, round(sample * len(mutations)))
    places = sorted(random.Random(seed).sample(range(len(mutations)), min(count, len(mutations))))
    return [mutations[place] for place in places]


def run(mutations: Sequence[Mutation], root: Path, workers: int) -> int:
    """Try all of them and print the table; returns the exit code."""
    begun = time.monotonic()
    words: Counter[str] = Counter()
    width = max(len(mutation.name) for mutation in mutations)
    servers = Servers(workers)
    with tempfile.TemporaryDirectory(prefix="mutate-") as temporary, ThreadPoolExecutor(workers) as pool:
        try:
            whole = copied(root, Path(temporary))
            failing = unmutated(mutations, whole, pool, servers)
            if failing:
                print("without a mutation these tests fail:", *failing, sep="\n")
                return 2
            print(f"without a mutation all tests pass ({time.monotonic() - begun:.0f} s)", flush=True)
            results = {pool.submit(tried, mutation, whole, servers): mutation for mutation in mutations}
            for result in as_completed(results):
                mutation, outcome = results[result], result.result()
                words[outcome.word] += 1
                line = f"{mutation.name:{width}}  {outcome.word:8}  {outcome.seconds:5.1f} s  {outcome.said}"
                print(line.rstrip(), flush=True)
        finally:
            servers.close()
    counted = ", ".join(f"{count} {word}" for word, count in words.most_common())
    print(f"{len(mutations)} mutations: {counted}; {time.monotonic() - begun:.0f} s")
    return int(words["killed"] < len(mutations))


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="mutations by name")
    parser.add_argument("--sample", type=float, default=1.0, metavar="FRACTION", help="a random part of them")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="at a time (default: cores)")
    parser.add_argument("--list", action="store_true", help="print names and tests, run nothing")
    asked = parser.parse_args()
    mutations = chosen_of(MUTATIONS, asked.only, asked.sample, asked.seed)
    if asked.list:
        for mutation in mutations:
            print(f"{mutation.name}: {' '.join(mutation.tests)}")
        return 0
    return run(mutations, ROOT, max(1, asked.workers))


if __name__ == "__main__":
    sys.exit(main())
