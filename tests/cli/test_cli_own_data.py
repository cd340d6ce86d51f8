"""The commands of docs/own-data.md run, as they stand there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from cli_process import Dprandp
from own_data import make_own_data

PAGE = Path(__file__).resolve().parents[2] / "docs/own-data.md"


def test_the_commands_of_the_page(dprandp: Dprandp, tmp_path: Path) -> None:
    make_own_data(tmp_path)
    fences = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    commands = [shlex.split(line, comments=True) for fence in fences for line in fence.splitlines()]
    assert len(commands) >= 3
    for program, *arguments in commands:
        assert program == "dprandp"
        done = dprandp(*arguments, folder=tmp_path)
        assert done.code == 0, (arguments, done.err)
        assert done.out
