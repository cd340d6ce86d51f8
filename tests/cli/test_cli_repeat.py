"""The commands in a report, run as they stand there, make a run with the same settings."""

from __future__ import annotations

import html
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cli_process import Dprandp, RunAfter, good

STAGES = ("generate", "pretrain", "continue", "probe", "finetune")


def commands_of(run: Path) -> str:
    page = (run / "report.html").read_text(encoding="utf-8")
    found = re.search(r'<section id="repeat">.*?<code>(.*?)</code>', page, re.S)
    return html.unescape(found[1])


def settings_of(run: Path) -> dict[str, dict]:
    stages = json.loads((run / "run.json").read_text(encoding="utf-8"))["stages"]
    return {name: stages[name]["config"] for name in STAGES if name in stages}


def repeat_in_a_shell(commands: str, folder: Path) -> None:
    """With a program dprandp that is this package."""
    program = folder / "bin/dprandp"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m dprandp "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    script = f"set -e\nPATH={program.parent}:$PATH\n{commands}\n"
    done = subprocess.run(["sh", "-c", script], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def repeat_by_hand(dprandp: Dprandp, commands: str, folder: Path) -> None:
    """The same in seconds: the file written, and the commands run, by this process."""
    start, rest = commands.split("\n", 1)
    assert start == "cat > settings.toml <<'END'"
    table, lines = rest.split("\nEND\n")
    (folder / "settings.toml").write_text(table, encoding="utf-8")
    for line in lines.splitlines():
        program, *arguments = shlex.split(line)
        assert program == "dprandp"
        done = dprandp(*arguments, folder=folder)
        assert done.code == 0, done.err


@pytest.mark.slow
@pytest.mark.parametrize("shell", [False, True])
def test_a_run_is_made_again(
    dprandp: Dprandp, run_after: RunAfter, folder: Path, tmp_path: Path, shell: bool
) -> None:
    run = run_after("finetune")
    assert dprandp("report", "--run", run).code == 0
    commands = commands_of(run)
    assert str(folder) not in commands
    shutil.copy(folder / "tiny.npz", tmp_path)
    if shell:
        repeat_in_a_shell(commands, tmp_path)
    else:
        repeat_by_hand(dprandp, commands, tmp_path)
    again = settings_of(tmp_path / "runs" / run.name)
    assert again == settings_of(run)


@pytest.mark.slow
def test_a_prior_is_named_and_not_made_again(dprandp: Dprandp, folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "tiny.npz", tmp_path)
    (tmp_path / "quick.toml").write_text("[probe]\nstatistics_images = 50\ndims = 64\n", encoding="utf-8")
    settings = ("--config", "quick.toml", "--data", "npz:tiny.npz", "--eps", 3, "--steps", 4)
    good(dprandp("probe", "--prior", "patchnet-tiny", *settings, "--run", "runs/a", "--json", folder=tmp_path))
    assert dprandp("report", "--run", "runs/a", folder=tmp_path).code == 0
    lines = re.sub(" --precision [a-z0-9]+", "", commands_of(tmp_path / "runs/a")).splitlines()
    assert lines[:2] == ["cat > settings.toml <<'END'", "[probe]"]
    assert sorted(lines[2:4]) == ["dims = 64", "statistics_images = 50"]
    said = "--prior patchnet-tiny --config settings.toml --data npz:tiny.npz --eps 3 --steps 4"
    assert lines[4:] == ["END", f"dprandp probe --run runs/a {said}"]
