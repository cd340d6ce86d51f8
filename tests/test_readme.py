"""README and docs are true: their commands parse, and run in the order in which they stand, in an empty folder."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from own_data import make_own_data
from PIL import Image

from dprandp.cli import app
from dprandp.synth import PROCESSES

ROOT = Path(__file__).resolve().parents[1]
PAGES = {path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
FENCES = [fence for page in PAGES.values() for fence in re.findall(r"^```bash\n(.*?)^```", page, re.M | re.S)]
COMMANDS = [shlex.split(line, comments=True) for fence in FENCES for line in fence.splitlines() if line.strip()]
OURS = [command[1:] for command in COMMANDS if command[0] == "dprandp"]
UNDER_TORCHRUN = [command for command in COMMANDS if command[0] == "torchrun"]
SCRIPTS = [command[1:] for command in COMMANDS if command[0] == "python"]


def test_there_are_commands_of_four_kinds_and_no_others() -> None:
    assert {command[0] for command in COMMANDS} == {"dprandp", "python", "make", "torchrun"}
    assert len(OURS) >= 10


def test_every_command_parses() -> None:
    """Flags exist and take such values; a flag that does not exist is the control."""
    group = typer.main.get_command(app)
    for command in [*OURS, *(command[command.index("dprandp") + 1 :] for command in UNDER_TORCHRUN)]:
        group.commands[command[0]].make_context(command[0], command[1:])
        with pytest.raises(Exception, match="No such option"):
            group.commands[command[0]].make_context(command[0], [*command[1:], "--no-such-flag"])


@pytest.mark.parametrize("script", sorted({command[0] for command in SCRIPTS}))
def test_every_script_knows_its_flags(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {word for command in SCRIPTS if command[0] == script for word in command[1:] if word.startswith("--")}
    monkeypatch.syspath_prepend(ROOT / "scripts")
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert not end.value.code
    assert flags <= set(re.findall(r"--[a-z-]+", capsys.readouterr().out))


def test_every_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in {word for command in COMMANDS if command[0] == "make" for word in command[1:]}:
        assert re.search(rf"^{target}:", makefile, re.M), target


def anchors(page: Path) -> set[str]:
    """What a heading is linked by."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_link_and_picture_is_there() -> None:
    for page in (*PAGES, ROOT / "scripts/README.md", ROOT / "data/README.md"):
        text = page.read_text(encoding="utf-8")
        for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", text):
            there = (page.parent / target).resolve() if target else page
            assert there.exists(), (page.name, target)
            assert not anchor or anchor in anchors(there), (page.name, anchor)


@pytest.mark.slow
def test_the_example_in_python_runs(tmp_path: Path) -> None:
    [example] = re.findall(r"^```python\n(.*?)^```", PAGES[ROOT / "README.md"], re.M | re.S)
    Image.fromarray(np.full((8, 8), 128, np.uint8)).save(tmp_path / "scan.png")
    setup = "import numpy as np\nfeatures, labels = np.eye(10)[np.arange(500) % 10], np.arange(500) % 10\n"
    checks = "assert images.shape == (16, 64, 64, 3) and 40 < sigma < 42 and head.epsilon <= 1\n"
    checks += "assert result['accuracy'] > 0.88 and (head.predict(features).numpy() == labels).mean() > 0.9\n"
    done = subprocess.run(
        [sys.executable, "-c", setup + example + checks], cwd=tmp_path, env=environment(), text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in [str(digit) for digit in range(10)]


def test_the_first_page_is_short_and_leads_to_all_others() -> None:
    readme = PAGES[ROOT / "README.md"]
    assert len(readme.splitlines()) <= 200
    assert [path.name for path in PAGES if path.parent.name == "docs" and f"](docs/{path.name})" not in readme] == []


def test_every_test_file_of_the_promise_table_is_there() -> None:
    promises = PAGES[ROOT / "docs/privacy.md"]
    rows = [line for line in promises.splitlines() if re.match(r"\| (\d+|\+) \|.*\| (severe.*|medium|low|–) \|$", line)]
    assert len(rows) >= 28
    known = {path.relative_to(ROOT / "tests").as_posix() for path in (ROOT / "tests").rglob("*")}
    names = {path.rsplit("/", 1)[-1] for path in known}
    for row in rows:
        for cited in re.findall(r"`([a-z_/]+(?:\.py|/))`", row.split("|")[3]):
            assert cited.rstrip("/") in known or cited in names, cited


def test_every_process_of_the_table_is_known() -> None:
    section = PAGES[ROOT / "docs/processes.md"]
    shown = set(re.findall(r"^\| `([a-z][a-z-]*)[ `]", section, re.M))
    assert shown == set(PROCESSES) - {"dead-leaves-shapes"}


@pytest.mark.slow
def test_the_commands_run_in_an_empty_folder(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "scan.png")
    make_own_data(tmp_path)
    ours = [["-m", "dprandp", *command] for command in OURS]
    together = [["-m", "torch.distributed.run", *command[1:]] for command in UNDER_TORCHRUN]
    for command in [*ours, *together]:
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, check=False, env=environment()
        )
        assert done.returncode == 0, (command, done.stderr)
        assert done.stdout.strip() or "datasets" in command


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_the_process_of_ten_lines_is_one() -> None:
    """Pasted from the page: uint8 images, and a smaller count is a prefix of a larger."""
    page = PAGES[ROOT / "docs/processes.md"]
    source = re.search(r"^```python\n# dprandp/synth/stripes.py\n(.*?)^```", page, re.M | re.S).group(1)
    module: dict = {}
    exec(source, module)
    few, many = (module["render"](np.random.default_rng(0), count, 32) for count in (2, 5))
    assert many.shape == (5, 32, 32, 3)
    assert many.dtype == np.uint8
    assert many.std() > 10
    assert np.array_equal(few, many[:2])
