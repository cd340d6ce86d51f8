"""Several labels an image, labels that are text, grades and shares: what is declared, what is read, what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dprandp.config.declared import Layout
from dprandp.config.schema import build
from dprandp.data import KNOWN, UnusableData, check_data, open_dataset
from dprandp.data import known as known_sets
from dprandp.errors import InputError, UsageError

NAMES = np.array(["mass", "nodule", "edema"])
LABELS = np.array([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0], [0, 0, 1], [1, 0, 1]])


def save(path: Path, **changes: object) -> Path:
    random = np.random.default_rng(0)
    content = {f"x_{split}": random.integers(0, 256, (6, 5, 5), dtype=np.uint8) for split in ("train", "test")}
    content |= {"y_train": LABELS, "y_test": LABELS[::-1], "classes": NAMES} | changes
    np.savez(path, **{name: value for name, value in content.items() if value is not None})
    return path


def opened(path: Path, layout: Layout = Layout(), **options: object):  # noqa: B008
    return open_dataset(f"npz:{path}", path.parent, layout=layout, **options)


@pytest.mark.parametrize("kind", ["u1", "i8", "?"])
def test_several_labels_of_an_npz_file(tmp_path: Path, kind: str) -> None:
    path = save(tmp_path / "set.npz", y_train=LABELS.astype(kind), y_test=LABELS[::-1].astype(kind))
    dataset = opened(path)
    assert (dataset.spec.multi_label, dataset.spec.classes) == (True, tuple(NAMES))
    assert dataset.spec.label_rule == "3 labels an image"
    assert dataset.train().labels.dtype == np.int64
    np.testing.assert_array_equal(dataset.train().labels, LABELS)
    np.testing.assert_array_equal(dataset.test().labels, LABELS[::-1])
    assert opened(save(path, classes=None)).spec.classes == ("0", "1", "2")  # the header says how many


def test_the_order_of_labels_is_part_of_the_datas_identity(tmp_path: Path) -> None:
    one, other = (save(tmp_path / f"{i}.npz", y_train=labels) for i, labels in enumerate((LABELS, LABELS[:, ::-1])))
    assert opened(one).fingerprint() != opened(other).fingerprint()


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"classes": NAMES[:2]}, "contradictory"), ({"y_test": LABELS[:, :2]}, "labels of one kind"),
     ({"y_test": np.arange(6) % 3}, "labels of one kind"), ({"y_train": LABELS / 1}, "labels must be"),
     ({"y_train": LABELS[None]}, "labels must be"), ({"y_train": LABELS.astype(str)}, "labels must be"),
     ({"y_train": LABELS[:5]}, "labels must be")],
)  # fmt: skip
def test_headers_that_do_not_fit_are_refused(tmp_path: Path, changes: dict, says: str) -> None:
    with pytest.raises(InputError) as caught:
        opened(save(tmp_path / "set.npz", **changes))
    assert says in f"{caught.value.problem} {caught.value.fix}"


def test_a_label_that_is_neither_0_nor_1_is_refused_without_saying_where(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="hold values outside 0…1") as caught:
        opened(save(tmp_path / "set.npz", y_train=LABELS + 76 * (LABELS == 1))).train()
    assert "77" not in caught.value.problem + caught.value.fix


def test_an_owners_check_counts_labels(tmp_path: Path) -> None:
    labels = LABELS.copy()
    labels[:, 1] = 0
    path = save(tmp_path / "set.npz", y_train=labels)
    images = opened(path).train().images.copy()
    images[1] = images[0]
    found = check_data(opened(save(path, y_train=labels, x_train=images[..., 0])))
    assert (found.empty_classes, found.repeated_images, found.contradicting_labels) == (["nodule"], 1, 1)


@pytest.mark.parametrize("kind", ["U", "S"])
def test_text_labels_of_an_npz_file(tmp_path: Path, kind: str) -> None:
    names = NAMES[np.arange(6) % 3]
    path = save(tmp_path / "set.npz", y_train=names.astype(kind), y_test=names[::-1, None].astype(kind))
    dataset = opened(path)
    assert not dataset.spec.multi_label
    assert dataset.train().labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert dataset.test().labels.tolist() == [2, 1, 0, 2, 1, 0]
    secret = np.array(["mass", "secret", "edema"])[np.arange(6) % 3]
    with pytest.raises(InputError, match="not among the declared classes") as caught:
        opened(save(path, y_train=secret.astype(kind), y_test=names.astype(kind))).train()
    assert "secret" not in caught.value.problem + caught.value.fix
    with pytest.raises(InputError, match="does not say which"):
        opened(save(path, y_train=names, y_test=names, classes=None), num_classes=3)
    with pytest.raises(InputError, match="y_test is int64"):
        opened(save(path, y_train=names, y_test=np.arange(6) % 3))


def test_several_labels_of_a_table(tmp_path: Path) -> None:
    cells = ["mass|edema", "", "edema | nodule|mass", "nodule", "edema", "mass|mass"]
    lines = ["path,label,split"]
    for index, cell in enumerate(cells):
        Image.fromarray(np.full((32, 32), 40 * index, np.uint8)).save(tmp_path / f"{index}.png")
        lines.append(f"{index}.png,{cell},{'test' if index == 4 else 'train'}")
    (tmp_path / "table.csv").write_text("\n".join(lines))
    names = "mass,nodule,edema"
    dataset = open_dataset(
        f"csv:{tmp_path}/table.csv", tmp_path, layout=Layout(class_names=names, label_separator="|")
    )
    assert dataset.spec.multi_label
    assert dataset.train().labels.tolist() == [[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0], [1, 0, 0]]
    assert dataset.test().labels.tolist() == [[0, 0, 1]]
    for layout in (Layout(class_names="mass,nodule", label_separator="|"), Layout(class_names=names)):
        with pytest.raises(UnusableData, match="a label that was not declared"):
            open_dataset(f"csv:{tmp_path}/table.csv", tmp_path, layout=layout)


def test_chestmnist_and_retinamnist_are_what_medmnist_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = KNOWN["chestmnist"].spec()
    assert (spec.multi_label, spec.ordinal, len(spec.classes), spec.train_examples) == (True, False, 14, 78_468)
    assert (spec.classes[0], spec.classes[13]) == ("atelectasis", "hernia")
    retina = KNOWN["retinamnist"].spec()
    assert (retina.ordinal, retina.multi_label, retina.label_rule) == (True, False, "classes are grades")
    info = known_sets._medmnist("chestmnist") | {"n_samples": {"train": 6, "test": 6}}
    monkeypatch.setattr(known_sets, "_medmnist", lambda flag: info)
    known_sets._medical_spec.cache_clear()
    random = np.random.default_rng(0)
    made = {}
    for split in ("train", "val", "test"):
        made[f"{split}_images"] = random.integers(0, 256, (6, 28, 28), dtype=np.uint8)
        made[f"{split}_labels"] = random.integers(0, 2, (6, 14), dtype=np.uint8)
    np.savez(tmp_path / "chestmnist.npz", **made)
    dataset = open_dataset("chestmnist", tmp_path)
    np.testing.assert_array_equal(dataset.train().labels, made["train_labels"])
    np.savez(tmp_path / "chestmnist.npz", **made | {"train_labels": made["train_labels"][:, :1]})
    with pytest.raises(InputError, match=r"not integers \[6, 14\]"):
        open_dataset("chestmnist", tmp_path).train()
    known_sets._medical_spec.cache_clear()


def test_shares_that_the_clipping_would_undo_are_refused() -> None:
    with pytest.raises(UsageError, match="no effect with --clipping automatic"):
        build("finetune", {"class_shares": "0.9,0.1", "clipping": "automatic"})


def test_what_is_declared_about_labels(tmp_path: Path) -> None:
    path = save(tmp_path / "set.npz")
    shares = Layout(class_shares="0.5, 0.01,0.2")  # of several labels they need not add up to 1
    assert opened(path, shares).spec.class_shares == (0.5, 0.01, 0.2)
    assert opened(path, shares).spec.label_rule == "3 labels an image, loss weighted by declared class shares"
    with pytest.raises(UsageError, match="--ordinal is for one class"):
        opened(path, Layout(ordinal=True))
    one = save(tmp_path / "one.npz", y_train=np.arange(6) % 3, y_test=np.arange(6) % 3)
    assert opened(one, Layout(ordinal=True)).spec.ordinal
    with pytest.raises(UsageError, match=r"add up to 0\.71, not to 1"):
        opened(one, shares)
    with pytest.raises(UsageError, match="2 shares for 3 classes"):
        opened(one, Layout(class_shares="0.5,0.5"))
    for text in ("0.5,x", "1,0", "nan,0.5", ""):
        with pytest.raises(UsageError, match="not numbers between 0 and 1"):
            Layout(class_shares=text)
    assert open_dataset("digits", tmp_path, layout=Layout(class_shares=",".join(["0.1"] * 10))).spec.class_shares
    for layout in (Layout(ordinal=True), Layout(label_separator="|")):
        with pytest.raises(UsageError, match="no effect on digits"):
            open_dataset("digits", tmp_path, layout=layout)
