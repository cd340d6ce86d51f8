"""Promise 20: which images form one unit of privacy, as the data's owner declares it; the private check of a set."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dprandp.data import check_data, open_dataset
from dprandp.data.units import make_units
from dprandp.errors import InputError, UsageError

PATIENTS = np.array(["b", "a", "b", "c", "a", "b"])


def arrays(**more: np.ndarray) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "x_train": random.integers(0, 256, (6, 8, 8), dtype=np.uint8),
        "y_train": np.array([0, 1, 0, 1, 0, 1]),
        "x_test": random.integers(0, 256, (2, 8, 8), dtype=np.uint8),
        "y_test": np.array([0, 1]),
        "num_classes": np.array(2),
        **more,
    }


@pytest.fixture
def npz(tmp_path: Path) -> Callable[..., str]:
    def save(**more: np.ndarray) -> str:
        np.savez(tmp_path / "set.npz", **arrays(**more))
        return f"npz:{tmp_path / 'set.npz'}"

    return save


def named(name: str, column: str | None = None) -> Any:
    return open_dataset(name, Path("data"), unit_column=column)


@pytest.mark.parametrize(
    ("values", "asked"),
    [(PATIENTS, "patient"), (np.array([7, 3, 7, 9, 3, 7]), "patient"), (PATIENTS.astype("S3"), "patient_train"),
     (PATIENTS[:, None], "patient"), (np.array(["b", " a", "b ", "c", "a ", "b"]), "patient")],
)  # fmt: skip
def test_images_with_equal_values_are_one_unit(npz, values, asked):
    dataset = named(npz(patient_train=values), asked)
    units = dataset.grouping()
    assert units.of_image.tolist() == [1, 0, 1, 2, 0, 1]
    assert units.of_image.dtype == np.int64
    assert (units.count, dataset.spec.train_units, dataset.spec.train_examples) == (3, 3, 6)
    assert dataset.spec.unit == "one patient (column patient_train)"


def test_one_name_in_two_spellings_of_unicode_is_one_unit(npz):
    composed, apart = unicodedata.normalize("NFC", "Mü"), unicodedata.normalize("NFD", "Mü")
    assert composed != apart
    units = make_units("p", np.array([composed, apart, "Mu", f" {apart}"]), np.array([apart]), "x")
    assert (units.count, units.of_image.tolist(), units.shared_with_test) == (2, [1, 1, 0, 1], 1)


def test_groups_train_is_used_unless_each_image_is_asked_for(npz):
    name = npz(groups_train=PATIENTS)
    assert named(name).spec.unit == "one group (column groups_train)"
    each = named(name, "image")
    assert (each.spec.unit, each.spec.train_units, each.grouping()) == ("one image", 6, None)
    assert named(npz()).spec.unit == "one image"


BAD: dict[str, tuple[np.ndarray, str]] = {
    "nan": (np.full(6, np.nan), "must be integers or text"),
    "truth values": (np.zeros(6, bool), "must be integers or text"),
    "too short": (np.arange(5), r"int64 \[5\] for 6 images"),
    "two columns": (np.zeros((6, 2), int), r"\[6, 2\] for 6 images"),
    "objects": (PATIENTS.astype(object), "object array"),
    "minus one": (np.array([1, 2, 3, -1, 2, 3]), "missing values"),
    "text nan": (np.array(["a", "nan", "b", "c", "a", "b"]), "missing values"),
    "empty text": (np.array(["a", " ", "b", "c", "a", "b"]), "missing values"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_column_that_cannot_say_it_is_refused(npz, kind):
    values, words = BAD[kind]
    with pytest.raises(InputError, match=words) as caught:
        named(npz(patient_train=values), "patient")
    assert caught.value.fix
    assert "position" not in str(caught.value)  # which image it is stays private


def test_two_arrays_of_one_name_are_refused(npz):
    name = npz(patient=PATIENTS, patient_train=PATIENTS[::-1])
    with pytest.raises(InputError, match="two arrays that may say"):
        named(name, "patient")
    assert named(name, "patient_train").spec.unit == "one patient (column patient_train)"


def test_a_column_that_is_not_there_or_has_no_plain_name_is_refused(npz):
    with pytest.raises(InputError, match="no array 'doctor'"):
        named(npz(patient_train=PATIENTS), "doctor")
    for strange in ("", "a/b", "<b>", "x" * 80, "a\nb"):
        with pytest.raises(UsageError, match="no plain name"):
            named(npz(patient_train=PATIENTS), strange or " ")
    with pytest.raises(UsageError, match="does not apply"):
        named("digits", "patient")
    assert named("digits", "image").spec.unit == "one image"


def test_other_units_are_other_data(npz):
    prints = [
        named(npz(p_train=values), column).fingerprint()
        for values, column in ((PATIENTS, "p"), (PATIENTS[::-1], "p"), (PATIENTS, "image"))
    ]
    assert len(set(prints)) == 3
    assert prints[0] == named(npz(p_train=np.array([2, 1, 2, 3, 1, 2])), "p").fingerprint()  # only names differ


# ---------------------------------------------------------------- folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random = np.random.default_rng(1)
    for place in ("train/cat/a-1", "train/cat/b-1", "train/dog/a-2", "test/cat/c-1", "test/dog/a-3"):
        path = tmp_path / "pets" / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    return tmp_path / "pets"


LINES = "file,unit,owner\ntrain/cat/a-1.png,a,x\ntrain/cat/b-1.png,b,x\ntrain/dog/a-2.png,a,y\n"


def test_units_csv_is_used_where_it_is(folder):
    name = f"folder:{folder}"
    assert named(name).spec.unit == "one image"
    (folder / "units.csv").write_text(LINES)
    assert named(name).spec.unit == "one unit (column unit)"
    assert named(name).grouping().of_image.tolist() == [0, 1, 0]
    assert named(name, "owner").grouping().of_image.tolist() == [0, 0, 1]
    assert named(name, "image").grouping() is None
    assert named(name).grouping().shared_with_test is None
    (folder / "units.csv").write_text(LINES + "test/cat/c-1.png,c,x\ntest/dog/a-3.png,a,z\n")
    assert named(name).grouping().shared_with_test == 1


def test_units_csv_in_a_folder_with_a_list_of_test_files(folder):
    for path in (folder / "test").rglob("*.png"):
        path.rename(folder / "train" / path.relative_to(folder / "test"))
    flat = (folder / "train").rename(folder.parent / "flat")
    (flat / "test.txt").write_text("cat/c-1.png\ndog/a-3.png\n")
    (flat / "units.csv").write_text("unit,file\nu,cat/a-1.png\nu,cat/b-1.png\nv,dog/a-2.png\n")
    assert named(f"folder:{flat}").grouping().of_image.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name,unit\n", "no single column 'file'"),
        ("file,owner\n", "no single column 'unit'"),
        ("file,unit,unit\n", "no single column 'unit'"),
        ("", "no single column 'file'"),
        (LINES + "train/cat/a-1.png,c,x\n", "more than once"),
        (LINES + "train/cat/none.png,c,x\n", "do not exist"),
        (LINES.replace("train/dog/a-2.png,a,y\n", ""), "no line for some"),
        (LINES + "train/cat\n", "other lengths"),
        (LINES.replace(",b,", ",,"), "missing values"),
        ('file,unit\n"' + "x" * 200_000, "no table|other lengths"),
    ],
)
def test_a_units_csv_that_does_not_fit_is_refused(folder, text, words):
    (folder / "units.csv").write_text(text)
    with pytest.raises(InputError, match=words) as caught:
        named(f"folder:{folder}")
    assert "a-1" not in str(caught.value)  # file names are private
    assert "a-2" not in str(caught.value)


def test_a_units_csv_that_is_not_there_or_not_text_is_refused(folder):
    with pytest.raises(InputError, match=r"no .*units\.csv"):
        named(f"folder:{folder}", "patient")
    (folder / "units.csv").write_bytes(b"file,unit\n\xff\xfe")
    with pytest.raises(InputError, match="UTF-8"):
        named(f"folder:{folder}")


# ---------------------------------------------------------------- the private check


def test_duplicates_are_counted(npz):
    clean = check_data(named(npz(patient_train=PATIENTS), "patient"))
    assert clean.repeated_images == clean.across_units == clean.in_test == clean.contradicting_labels == 0
    assert (clean.largest_unit, clean.largest_copies, clean.units_in_test) == (3, 1, None)
    made = arrays()
    train, test = made["x_train"], made["x_test"]
    train[2] = train[0]  # the same patient, the same label
    train[3] = train[1]  # another patient
    train[4] = train[1]
    test[0] = train[5]
    found = check_data(
        named(npz(x_train=train, x_test=test, patient_train=PATIENTS, patient_test=np.array(["c", "z"])), "patient")
    )
    assert found.repeated_images == 3
    assert found.across_units == 3
    assert found.largest_copies == 2  # of the three copies two belong to patient a
    assert found.contradicting_labels == 1
    assert (found.in_test, found.units_in_test) == (1, 1)
    assert check_data(named(npz(x_train=train))).largest_copies == 3


def test_units_that_only_look_alike_are_counted(npz):
    """An invisible character, a wide letter, another case, a number written in two ways. The control: other names."""
    count = len(PATIENTS)
    for names, alike in (
        (["ann", "a\u200bnn", "ＡＮＮ", "bob", "Bob ", "bo b"], 4), (["1", "1.0", "01", "2", "10", "1.5"], 2),
        (["ann", "anne", "bob", "bo-b", "1", "11"], 0),
    ):  # fmt: skip
        patients = np.array([names[place % len(names)] for place in range(count)])
        assert check_data(named(npz(patient_train=patients), "patient")).units_alike == alike
    assert check_data(named(npz())).units_alike is None
