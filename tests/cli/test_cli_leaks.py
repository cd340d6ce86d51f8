"""Promise 21: whatever goes wrong in a private stage, no pixel, label, index or single file path is printed.

Commands run in processes of their own; stdout and stderr are searched for what must not be there. With ``--debug`` the
same is shown: the control that there was something to hide.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cli_process import Done, Dprandp, RunAfter, subprocess_dprandp
from PIL import Image

SECRETS = ("patient-4711", "61826", "0.618267", "class-of-shame")
"""A file name, an index or label, a pixel value and a class, in every exception that is thrown below."""

MESSAGE = "pixel 0.618267 of /data/scans/patient-4711.png, label 61826, class-of-shame"

# Where, and how it is broken. Executed before the command; ``broken`` raises with all that must not be told.
BREAK = """
class Told(Exception):
    def __str__(self): return {message!r}
def broken(*arguments, **options):
    import torch
    label, pixel, path = 61826, 0.618267, "/data/scans/patient-4711.png"
    raise {error}
"""
PLACES = {
    "features": "from dprandp.dpsgd import features; features.features_of_blocks = broken",
    "views": "from dprandp.dpsgd import features; features.to_input = broken",
    "labels": "from dprandp.data import base; base.check_split = broken; "
    "import dprandp.data.base as b; b.Dataset.train = broken",
    "fingerprint": "from dprandp.data import Dataset; Dataset.fingerprint = broken",
    "gradient of the head": "from dprandp.probe import head; head.clipped_softmax_sum = broken",
    "sampler": "from dprandp.privacy.randomness import PoissonSampler; PoissonSampler.draw = broken",
    "noise": "from dprandp.privacy import mechanism; mechanism.add_gaussian_noise = broken",
    "test metrics": "from dprandp.dpsgd import release; release.classification_metrics = broken",
    "a thread": "from dprandp.models.patchnet import PatchNet; PatchNet.extract = broken",
}
IN_FINETUNE = {
    "gradient of everything": "from dprandp.dpsgd import clipped_sums; clipped_sums.patchnet_gradients = broken",
    "private views": "from dprandp.dpsgd import clipped_sums; clipped_sums.private_views = broken",
    "sum": "from dprandp.dpsgd import clipped_sums; clipped_sums.sum_of_clipped = broken",
}
ERRORS = {
    "value": "ValueError(f'pixel {pixel} of {path}, label {label}, class-of-shame')",
    "key": "KeyError(path)",
    "index": "IndexError(f'index {label} is out of bounds for {path}')",
    "system": "OSError(5, f'Input/output error {pixel}', path)",
    "memory": "MemoryError(f'{path} {label}')",
    "assertion": "AssertionError(torch.full((3,), pixel), path)",
    "own": "Told(path)",
    "unicode": "UnicodeDecodeError('utf-8', path.encode(), 0, 1, f'{label}')",
    "group": "ExceptionGroup(path, [ValueError(f'{label}'), KeyError(pixel)])",
}


def breaking(place: str, error: str) -> str:
    places = PLACES | IN_FINETUNE
    return BREAK.format(message=MESSAGE, error=ERRORS[error]) + places[place] + "\n"


def assert_tells_nothing(done: Done, *more: str) -> None:
    said = done.out + done.err
    assert done.code not in (0, -6, -11), said
    assert "error: " in done.err
    assert "fix: " in done.err
    assert "Traceback" not in said
    for secret in (*SECRETS, *more):
        assert secret not in said, said


def probe(run: Path, data: str = "npz:tiny.npz") -> list[object]:
    return ["probe", "--config", "small.toml", "--run", run, "--data", data]


def slow(*cases: tuple) -> list:
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]


TURNS = [(place, list(ERRORS)[(n + turn) % len(ERRORS)]) for n, place in enumerate(PLACES) for turn in (0, 4, 7)]


@pytest.mark.parametrize(
    ("place", "error", "flags"),
    [
        ("features", "own", []),
        ("labels", "key", ["--json"]),
        ("test metrics", "system", ["--quiet"]),
        *slow(*((place, error, []) for place, error in TURNS)),
    ],
)
def test_21_an_exception_in_the_probe(
    dprandp: Dprandp, run_after: RunAfter, place: str, error: str, flags: list[str]
) -> None:
    run = run_after("pretrain")
    done = dprandp(*probe(run), *flags, before=breaking(place, error))
    assert_tells_nothing(done)
    assert done.code == (6 if error == "system" else 1)
    for path in run.rglob("*"):  # nor does a file of the run hold it
        if path.is_file() and path.stat().st_size < 10**6:
            assert b"patient-4711" not in path.read_bytes(), path


@pytest.mark.parametrize(
    ("place", "error"),
    [("gradient of everything", "index"),
     *slow(*((place, "own") for place in (*IN_FINETUNE, "gradient of the head", "noise")))],
)  # fmt: skip
def test_21_an_exception_in_the_finetune(dprandp: Dprandp, run_after: RunAfter, place: str, error: str) -> None:
    done = dprandp("finetune", "--config", "small.toml", "--run", run_after("probe"), before=breaking(place, error))
    assert_tells_nothing(done)
    assert done.code == 1


def test_21_debug_shows_it(dprandp: Dprandp, run_after: RunAfter) -> None:
    """The control: the secrets were there to be told."""
    done = dprandp(*probe(run_after("pretrain")), "--debug", before=breaking("gradient of the head", "value"))
    assert done.code == 1
    assert "Traceback" in done.err
    for secret in SECRETS:
        assert secret in done.err


# ------------------------------------------------------------------------------------------------ folders of images


def png(size: int = 24) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def many_samples() -> bytes:
    """A TIFF that claims more samples per pixel than Pillow decodes, about which it would talk to stderr."""
    stream = io.BytesIO()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(stream, "TIFF")
    content = bytearray(stream.getvalue())
    place = content.index(b"\x15\x01\x03\x00\x01\x00\x00\x00\x03\x00")  # SamplesPerPixel, one short, 3
    content[place + 8 : place + 10] = (61826).to_bytes(2, "little")
    return bytes(content)


BAD_IMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: path.write_bytes(png()[:-700]),
    "garbage": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n0.618267"),
    "16 bits": lambda path: Image.fromarray(np.full((9, 9), 61826, np.uint16)).save(path, "PNG"),
    "many samples": lambda path: path.write_bytes(many_samples()),
    "link": lambda path: path.symlink_to("/nonexistent/patient-4711-elsewhere.png"),
    "pipe": os.mkfifo,
}
"""What else is refused by name alone, or once it is decoded: tests/data."""


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """A good folder of twelve images in two classes."""
    for split in ("train", "test"):
        for label in ("benign", "class-of-shame"):
            folder = tmp_path / "scans" / split / label
            folder.mkdir(parents=True)
            for index in range(3):
                (folder / f"patient-471{index}.png").write_bytes(png())
    return tmp_path / "scans"


def test_21_a_bad_file_in_the_middle_of_a_folder(dprandp: Dprandp, run_after: RunAfter, scans: Path) -> None:
    """Exit code 3 says that one image is bad, of which split and in what way; which one, only --debug says."""
    run, victim = run_after("pretrain"), scans / "train/class-of-shame/patient-4711.png"
    for make in BAD_IMAGES.values():
        victim.unlink()
        make(victim)
        done = dprandp(*probe(run, f"folder:{scans}"))
        assert_tells_nothing(done)
        assert done.code == 3, done.err
        assert str(scans) in done.err  # the folder as a whole was named by the user
    victim.unlink()
    victim.write_bytes(b"no image")
    shown = dprandp(*probe(run, f"folder:{scans}"), "--debug")
    assert shown.code == 3
    assert "do not publish" in shown.err
    assert "patient-4711.png" in shown.err
    assert not (run / "privacy" / "ledger.jsonl").exists()
    victim.write_bytes(png())
    (scans / "test/benign/patient-4711.png").write_bytes(b"no image")
    assert_tells_nothing(dprandp(*probe(run, f"folder:{scans}")))


def test_21_a_folder_that_changes_while_it_is_read(dprandp: Dprandp, run_after: RunAfter, scans: Path) -> None:
    """A file that is listed and gone when it is read."""
    vanish = (
        "import os\nfrom dprandp.data import files\nread = files.decode_all\n"
        "def late(paths, *rest):\n    os.unlink(paths[3])\n    return read(paths, *rest)\nfiles.decode_all = late\n"
    )
    done = dprandp(*probe(run_after("pretrain"), f"folder:{scans}"), before=vanish)
    assert_tells_nothing(done)
    assert done.code == 3


# ------------------------------------------------------------------------------------------------- a process of its own

@pytest.mark.parametrize(
    ("place", "error"),
    slow(("features", "own"), *((place, "value") for place in PLACES)),
)
def test_21_in_a_real_process(run_after: RunAfter, folder: Path, place: str, error: str) -> None:
    """Nothing on the way out of the interpreter tells it either."""
    arguments = probe(run_after("pretrain"))
    assert_tells_nothing(subprocess_dprandp(*arguments, folder=folder, before=breaking(place, error)))


WARN = """
import logging, warnings
from dprandp.dpsgd import features
extract = features.features_of_blocks
def talkative(*arguments, **options):
    warnings.warn("pixel 0.618267 of patient-4711", UserWarning)
    logging.getLogger("PIL.TiffImagePlugin").warning("pixel %s of patient-4711", 0.618267)
    return extract(*arguments, **options)
features.features_of_blocks = talkative
"""


def test_21_warnings_of_libraries_are_not_quoted(dprandp: Dprandp, run_after: RunAfter) -> None:
    run = run_after("pretrain")
    done = dprandp(*probe(run), before=WARN)
    assert done.code == 0, done.err
    shutil.rmtree(run)
    assert "UserWarning in" in done.err
    for secret in SECRETS:
        assert secret not in done.out + done.err
    shown = dprandp(*probe(run_after("pretrain")), "--debug", before=WARN).err
    assert "UserWarning: pixel 0.618267 of patient-4711" in shown, shown
