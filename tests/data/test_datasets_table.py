"""csv:PATH, also as Parquet: columns, classes, splits by group; and what folder: data may declare of the same."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dprandp.config.declared import Layout
from dprandp.data import UnusableData, open_dataset
from dprandp.errors import InputError, UsageError

NAMES = Layout(class_names="healthy,ill")
SECRET = "patient-4711"


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def rows(count: int = 24) -> list[dict[str, str]]:
    """Three images a patient."""
    return [
        {"path": f"images/{index}.png", "label": ("healthy", "ill")[index % 2],
         "split": "test" if index >= 18 else "train", "group": f"p{index // 3}"}
        for index in range(count)
    ]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for index in range(24):
        Image.fromarray(picture(index)).save(tmp_path / f"images/{index}.png")
    return tmp_path


def write(path: Path, table: list[dict[str, str]]) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    return path


def opened(path: Path, layout: Layout = NAMES, **options):
    return open_dataset(f"csv:{path}", path.parent, layout=layout, **options)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_pixels_labels_splits_and_groups(folder: Path, suffix: str) -> None:
    path = write(folder / "table.csv", rows())
    if suffix == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        path = folder / "table.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(rows()), path)
    dataset = opened(path)
    assert (dataset.spec.train_examples, dataset.spec.test_examples, dataset.spec.train_units) == (18, 6, 6)
    assert dataset.spec.unit == "one group (column group)"
    train, test = dataset.train(), dataset.test()
    np.testing.assert_array_equal(train.images, [picture(index) for index in range(18)])
    np.testing.assert_array_equal(test.images, [picture(index) for index in range(18, 24)])
    assert train.labels.tolist() == [0, 1] * 9
    assert dataset.grouping().of_image.tolist() == np.repeat(range(6), 3).tolist()
    assert dataset.grouping().shared_with_test == 0
    assert opened(path, unit_column="image").spec.train_units == 18


def test_columns_of_other_names_and_numbers_as_labels(folder: Path) -> None:
    table = [
        {"file": row["path"], "finding": str(index % 2), "fold": row["split"].upper(), "who": row["group"]}
        for index, row in enumerate(rows())
    ]
    path = write(folder / "table.csv", table)
    layout = Layout(columns="path=file, label=finding,split=fold")
    dataset = opened(path, layout, num_classes=2, unit_column="who")
    expected = opened(write(folder / "usual.csv", rows()))
    assert dataset.fingerprint() == expected.fingerprint()
    assert dataset.spec.classes == ("0", "1")
    with pytest.raises(InputError, match="no column 'path'") as caught:
        opened(path)
    assert "--columns path=NAME" in caught.value.fix


def test_whole_groups_are_drawn_and_each_by_itself(folder: Path) -> None:
    table = [{key: row[key] for key in ("path", "label", "group")} for row in rows()]
    path = write(folder / "table.csv", table)
    found = set()
    for seed in range(6):
        layout = Layout(class_names="healthy,ill", split_by="group", test_fraction=0.4, split_seed=seed)
        try:
            dataset = opened(path, layout)
        except InputError:  # every group on one side
            continue
        assert dataset.grouping().shared_with_test == 0
        assert f"each group in the test split with chance 0.4, by the public seed {seed}" in dataset.spec.split_rule
        files = dataset.examine().files.listings
        tested = {int(file.stem) // 3 for file in files["test"].paths}
        assert {int(file.stem) // 3 for file in files["train"].paths} == set(range(8)) - tested
        smaller = opened(write(folder / "smaller.csv", table[:21]), layout)  # without the last group
        again = {int(file.stem) // 3 for file in smaller.examine().files.listings["test"].paths}
        assert again == tested - {7}
        found.add(frozenset(tested))
    assert len(found) >= 3
    with pytest.raises(InputError, match=r"test split .* holds no image") as caught:
        opened(path, Layout(class_names="healthy,ill", split_by="group", test_fraction=1e-9))
    assert "--split-seed" in caught.value.fix
    images = opened(path, Layout(class_names="healthy,ill", split_by="image", test_fraction=0.4))
    assert images.grouping().shared_with_test > 0  # the control: single images tear groups apart


def test_the_chance_is_the_fraction(folder: Path) -> None:
    from dprandp.data.table import _drawn

    layout = Layout(split_by="group", test_fraction=0.2)
    assert abs(np.mean([_drawn(f"p{index}", layout) for index in range(20_000)]) - 0.2) < 0.01


def test_all_wrong_lines_are_named_at_once(folder: Path) -> None:
    table = rows()
    table[0]["label"] = SECRET
    table[1]["split"] = "val"
    table[2]["path"] = f"images/{SECRET}.png"
    table[3]["path"] = table[4]["path"]
    table[5]["path"] = "table.csv"
    table[6]["group"] = "nan"
    table[7]["path"] = f"./images/../{table[8]['path']}"  # another spelling of the same file, and a link to one
    (folder / "images/link.png").hardlink_to(folder / table[9]["path"])
    table[10]["path"] = "images/link.png"
    path = write(folder / "table.csv", table)
    with pytest.raises(UnusableData) as caught:
        opened(path)
    said = str(caught.value)
    for fragment in (
        "1 of the lines: a label that was not declared", "1 of the lines: a split that is neither",
        "1 of the lines: a file that is not there", "6 of the lines: a file that is listed more than once",
        "1 of the lines: no image by its name", "missing values", "--val train",
    ):  # fmt: skip
        assert fragment in said
    assert SECRET not in said
    assert f"line 4: images/{SECRET}.png" in caught.value.private_detail
    table = rows()
    table[20]["split"] = "val"
    path = write(folder / "table.csv", table)
    as_train = opened(path, Layout(class_names="healthy,ill", val="train"))
    assert (as_train.spec.train_examples, as_train.spec.split_rule) == (19, "validation images taken for train")


def test_classes_and_splits_are_declared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(folder / "table.csv", rows())
    for options in ({"layout": Layout()}, {"num_classes": 2}):
        with pytest.raises(UsageError, match="classes declared, once"):
            opened(path, **options)
    with pytest.raises(UsageError, match="another split"):
        opened(path, Layout(class_names="healthy,ill", split_by="group", test_fraction=0.2))
    for row in (table := rows()):
        del row["split"]
    with pytest.raises(InputError, match="no column 'split'") as caught:
        opened(write(folder / "table.csv", table))
    assert "--split-by group --test-fraction 0.2" in caught.value.fix
    for wrong in ({"split_by": "group"}, {"test_fraction": 0.2}, {"split_seed": 3}, {"columns": "path"},
                  {"columns": "image=x"}):  # fmt: skip
        with pytest.raises(UsageError):
            Layout(**wrong)
    for name in ("digits", "npz:a.npz"):
        with pytest.raises(UsageError, match="--class-names has no effect"):
            open_dataset(name, folder, layout=NAMES)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (folder / "table.parquet").touch()
    with pytest.raises(InputError, match="needs pyarrow") as caught:
        opened(folder / "table.parquet")
    assert "dprandp[parquet]" in caught.value.fix


@pytest.mark.parametrize("content", ["", "path,label,split\n", "path,path\na,b\n", "path,label,split\na,b\n", "\0"])
def test_damaged_tables(folder: Path, content: str) -> None:
    (folder / "table.csv").write_text(content)
    with pytest.raises(InputError):
        opened(folder / "table.csv")
    (folder / "table.parquet").write_text(content)
    if "pyarrow" in sys.modules or pytest.importorskip("pyarrow"):
        with pytest.raises(InputError, match="Parquet"):
            opened(folder / "table.parquet")


def test_a_bare_path_is_asked_about(folder: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder / "table.csv", rows())
    monkeypatch.chdir(folder)
    for name, meant in (("table.csv", "csv:table.csv"), (str(root), f"folder:{root}")):
        with pytest.raises(UsageError) as caught:
            open_dataset(name, folder)
        assert f"did you mean {meant}?" in caught.value.fix


# ---------------------------------------------------------------------------------------------- folder: the same


def test_a_validation_folder_is_declared_or_refused(root: Path) -> None:
    before = open_dataset(f"folder:{root}", root)
    for name in ("owl", "wren"):
        (root / "val" / name).mkdir(parents=True)
    Image.fromarray(picture(77)).save(root / "val/owl/9.png")
    with pytest.raises(InputError, match="third split, val/") as caught:
        open_dataset(f"folder:{root}", root)
    assert "--val train" in caught.value.fix
    for split in ("train", "test"):
        dataset = open_dataset(f"folder:{root}", root, layout=Layout(val=split))
        assert dataset.spec.examples(split) == before.spec.examples(split) + 1
        made = getattr(dataset, split)()
        np.testing.assert_array_equal(made.images[-1], picture(77))
        assert made.labels[-1] == 0
    (root / "val").rename(root.parent / "val")
    with pytest.raises(InputError, match="no folder val/"):
        open_dataset(f"folder:{root}", root, layout=Layout(val="test"))


def test_sub_folders_are_units_where_declared(root: Path) -> None:
    for split in ("train", "test"):
        for path in sorted((root / split).glob("*/*.png")):
            patient = path.parent / f"p{int(path.stem) % 2}"
            patient.mkdir(exist_ok=True)
            path.rename(patient / path.name)
    with pytest.raises(UnusableData, match="--unit-column folder"):
        open_dataset(f"folder:{root}", root)
    dataset = open_dataset(f"folder:{root}", root, unit_column="folder")
    assert (dataset.spec.train_examples, dataset.spec.train_units, dataset.spec.unit) == (
        6, 2, "one folder (column folder)",
    )  # fmt: skip
    assert dataset.grouping().of_image.tolist() == [0, 0, 1, 0, 0, 1]  # one patient in both classes is one unit
    assert dataset.grouping().shared_with_test == 1
    assert dataset.train().labels.tolist() == [0, 0, 0, 1, 1, 1]
    Image.fromarray(picture(1)).save(root / f"train/owl/{SECRET}.png")
    with pytest.raises(UnusableData, match="in no sub-folder") as caught:
        open_dataset(f"folder:{root}", root, unit_column="folder")
    assert SECRET not in str(caught.value)
