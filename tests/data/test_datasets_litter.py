"""Litter is ignored in every folder that is listed; what else is no image is refused or counted, never passed over."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dprandp.data import BARE, LINKED, SPECIAL, image_files, open_dataset, skipped_text
from dprandp.data.decode import is_litter
from dprandp.errors import InputError

FILES = (".DS_Store", "._0.png", "Thumbs.db", "ehthumbs.db", "desktop.ini", "Icon\r", "~$notes.docx", "0.png~")
FOLDERS = (".ipynb_checkpoints", ".git", "__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "#recycle",
           "lost+found")  # fmt: skip


def scatter(folder: Path) -> None:
    """Put every kind of litter into a folder and into those below it; the folders hold copies of images."""
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for place in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        for name in FILES:
            (place / name).write_bytes(b"\x00\x05\x16\x07")  # how an AppleDouble file begins
        for name in FOLDERS:
            (place / name / "below").mkdir(parents=True)
            Image.fromarray(picture).save(place / name / "0-checkpoint.png")
            Image.fromarray(picture).save(place / name / "below/0.png")


@pytest.fixture
def flat(root: Path) -> Path:
    """The other layout: classes and a list of test files."""
    folder = root.parent / "flat"
    for split in ("train", "test"):
        for path in sorted((root / split).glob("*/*")):
            target = folder / path.parent.name / f"{split}-{path.name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    (folder / "test.txt").write_text("owl/test-0.png\nwren/test-0.png\n")
    return folder


@pytest.mark.parametrize("layout", ["root", "flat"])
def test_litter_changes_neither_count_nor_content(layout: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(layout)
    before = open_dataset(f"folder:{folder}", folder)
    expected = before.fingerprint()
    scatter(folder)
    (folder / ".Trash").symlink_to(folder.parent)  # leaves the folder, and is not followed
    after = open_dataset(f"folder:{folder}", folder)
    assert after.spec == before.spec
    assert (after.spec.train_examples, after.spec.test_examples, after.spec.classes) == (6, 2, ("owl", "wren"))
    assert after.fingerprint() == expected


def test_plain_names_are_no_litter() -> None:
    assert not any(map(is_litter, ("scan.png", "scan.png.part", "a~b.png", "eaDir", "thumbs", "Thumbs.db.png", "lost")))


def test_new_images_without_litter_and_a_count_of_what_is_skipped(root: Path) -> None:
    clean, skipped = image_files(root)
    assert (len(clean), skipped) == (8, {})
    scatter(root)
    assert image_files(root) == (clean, {})  # litter is not mentioned
    for name in ("x.svs", "train/Y.SVS", "notes.txt", "test/README"):
        (root / name).write_text("?")
    (root / "again").symlink_to(root / "train")
    (root / "gone.png").symlink_to(root / "nowhere.png")
    names, skipped = image_files(root)
    assert names == clean
    assert skipped == {".svs": 2, ".txt": 1, LINKED: 1, BARE: 1, SPECIAL: 1}
    assert skipped_text(skipped).startswith("skipped 6 files that are not images by name: .svs (2), .txt (1), ")
    assert " .jpeg " in skipped_text(skipped)


def test_a_folder_with_nothing_but_other_files_says_so(tmp_path: Path) -> None:
    (tmp_path / "x.svs").write_text("?")
    (tmp_path / "._x.png").write_text("?")
    with pytest.raises(InputError, match=r"holds no image: skipped 1 file that is not an image by name: \.svs \(1\)"):
        image_files(tmp_path)


def test_jfif_is_jpeg_under_another_name(root: Path) -> None:
    picture = Image.open(root / "train/owl/0.png")
    picture.save(root / "train/owl/a.jpg", format="JPEG")
    (root / "train/owl/a.JFIF").write_bytes((root / "train/owl/a.jpg").read_bytes())
    train = open_dataset(f"folder:{root}", root).train()
    assert len(train.images) == 8
    np.testing.assert_array_equal(train.images[3], train.images[4])
    picture.convert("CMYK").save(root / "train/owl/a.JFIF", format="JPEG")
    with pytest.raises(InputError, match="in CMYK"):
        open_dataset(f"folder:{root}", root).train()
