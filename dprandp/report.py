"""report.html: one page that says what a run reached, what it cost in privacy, and what that means.

Written from the run's public files alone, whatever stages there are. The page needs nothing beside itself: its style,
drawings and pictures are inside, it runs no script, and its content security policy forbids both.
"""

from __future__ import annotations

from pathlib import Path

from dprandp import __version__, faults
from dprandp.files import atomic_write
from dprandp.reporting import sections
from dprandp.reporting.headline import headline
from dprandp.reporting.markup import Markup, raw, tag, text
from dprandp.reporting.runfiles import Run, read_run
from dprandp.reporting.style import CSS
from dprandp.rundir import RunDir

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write(rundir: RunDir) -> Path:
    """Write ``report.html`` into the run directory.

    Returns:
        The page's path.

    Raises:
        InputError: no stage is finished; the fix is the command to run.
        CheckpointError: a file of the run is corrupt, or a result lacks what must be disclosed.
        StorageError: the disk refuses.
    """
    path = rundir.path / "report.html"
    atomic_write(path, page(read_run(rundir)))
    faults.point("report-written")
    return path


def page(run: Run) -> Markup:
    """The page of a run."""
    body = [
        headline(run),
        tag(
            "main",
            sections.timeline(run),
            sections.synthetic(run),
            sections.curves(run),
            sections.budget(run),
            sections.audit(run),
            sections.confusion(run),
            sections.disclosures(run),
            sections.configuration(run),
            sections.environment(run),
        ),
        tag("footer", tag("p", f"Made by dprandp {__version__} from the files of run {run.name}.")),
    ]
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"dprandp: {run.name}"),
        tag("style", raw(CSS)),
    ]
    document = tag("html", tag("head", head), "\n", tag("body", body), lang="en")
    return Markup(f"<!DOCTYPE html>\n{text(document)}\n")
