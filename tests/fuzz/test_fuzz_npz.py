"""npz files of all kinds: a data set within its declaration comes out, or a refusal that tells nothing private."""

from __future__ import annotations

import io
import random
import struct
import zipfile
from pathlib import Path

import numpy as np
from fuzzing import attempt, dice, explore, mutated_bytes, sizes
from hypothesis import strategies as st

from dprandp.data import open_dataset

SECRET = 173
"""A label that is out of range; no message may hold it."""

DTYPES = [
    "|u1", "|b1", "|i1", "<u2", ">u2", "<i4", ">i8", "<u8", "<f2", "<f4", ">f8", "<c8", "<U3", "|S2", "<U0", "|S0",
    "<M8[s]", "<m8[D]", "|V3", "|V0",
]  # fmt: skip
SIDES = st.sampled_from([0, 1, 2, 3, 4, 5, 33])
SHAPES = st.one_of(
    st.tuples(st.sampled_from([6, 6, 6, 0, 1, 5]), SIDES, SIDES, st.sampled_from([1, 3, 3, 4, 0])),
    st.tuples(st.sampled_from([6, 6, 4]), SIDES, SIDES),
    st.lists(SIDES, max_size=6).map(tuple),
)
NAMES = ["x_train", "y_train", "x_test", "y_test", "classes", "num_classes", "other", "../../x", "/etc/x", "x_train/y"]


def plain() -> dict[str, np.ndarray]:
    made: dict[str, np.ndarray] = {"num_classes": np.array(3)}
    for split, count in (("train", 6), ("test", 4)):
        made[f"x_{split}"] = np.arange(count * 75, dtype=np.uint8).reshape(count, 5, 5, 3)
        made[f"y_{split}"] = np.arange(count) % 3
    return made


def read(path: Path, num_classes: int | None = None) -> None:
    dataset = open_dataset(f"npz:{path}", path.parent, num_classes=num_classes)
    for name, split in (("train", dataset.train()), ("test", dataset.test())):
        assert split.images.shape == (dataset.spec.examples(name), *dataset.spec.image_shape)
        assert split.images.dtype == np.uint8
        assert 0 <= split.labels.min() <= split.labels.max() < len(dataset.spec.classes)


@sizes(60, 1800)
def test_arrays(tmp_path: Path, cases: int, record_property) -> None:
    """Shapes, types and values of all kinds under the right names, or right ones under others."""
    path = tmp_path / "a.npz"

    def check(drawn: tuple[list[tuple[str, str, tuple[int, ...], int]], list[str], bool, int | None]) -> None:
        changes, removed, compressed, declared = drawn
        made = plain()
        for name, dtype, shape, fill in changes:
            array = np.zeros(shape, np.dtype(dtype))
            kind = array.dtype.kind
            if kind == "f":
                array[...] = [np.nan, np.inf, -1.0, 0.5][fill % 4]
            elif kind in "iu" and name.startswith("y"):
                secret = SECRET % 128 if array.itemsize == 1 else SECRET
                array[...] = [0, 1, 2, secret, -1 if kind == "i" else 255][fill % 5]
            elif kind in "US" and array.size and array.itemsize:
                array[...] = ["a", "\x1b[", " ", "é"][fill % 4] if kind == "U" else b"\xff"
                array.flat[0] = "b" if kind == "U" else b"b"
            made[name] = array
        for name in removed:
            made.pop(name, None)
        (np.savez_compressed if compressed else np.savez)(path, **made)
        assert str(SECRET) not in str(attempt(lambda: read(path, declared)))

    change = st.tuples(st.sampled_from(NAMES), st.sampled_from(DTYPES[:1] * 12 + DTYPES), SHAPES, st.integers(0, 20))
    strategy = st.tuples(
        st.lists(change, max_size=3),
        st.lists(st.sampled_from(NAMES), max_size=1),
        st.booleans(),
        st.sampled_from([None, None, 3, 2, 0, -1, 10**30]),
    )
    record_property("cases tried", explore(strategy, check, cases, cases < 500))


@sizes(60, 1500)
def test_bytes(tmp_path: Path, cases: int, record_property) -> None:
    path = tmp_path / "a.npz"
    contents = []
    for save in (np.savez, np.savez_compressed):
        save(path, **plain())
        contents.append(path.read_bytes())

    def check(draw: random.Random) -> None:
        path.write_bytes(mutated_bytes(draw, draw.choice(contents)))
        attempt(lambda: read(path))

    record_property("cases tried", explore(dice, check, cases, cases < 500))


def npy(draw: random.Random) -> bytes:
    """An array file whose header was tampered with."""
    stream = io.BytesIO()
    np.save(stream, plain()[draw.choice(["x_train", "y_train"])])
    content = stream.getvalue()
    header = draw.choice(
        [
            b"{'descr': '|u1', 'fortran_order': False, 'shape': (6, 5, 5, 3), }",
            b"{'descr': '|u1', 'fortran_order': False, 'shape': (6, 5, -5, 3), }",
            b"{'descr': '|u1', 'fortran_order': False, 'shape': (999999999999, 99999, 3), }",
            b"{'descr': '|u1', 'fortran_order': False, 'shape': (6.0, 5, 5, 3), }",
            b"{'descr': '|u1', 'fortran_order': False, 'shape': (True, 5, 5, 3), }",
            b"{'descr': '|O', 'fortran_order': False, 'shape': (6,), }",
            b"{'descr': [('a', '|u1'), ('b', '|O')], 'fortran_order': False, 'shape': (6,), }",
            b"{'descr': '|u1', 'fortran_order': 3, 'shape': (6, 5, 5, 3), }",
            b"{'descr': '|u1', 'fortran_order': False, 'shape': (6, 5, 5, 3), 'more': 1}",
            b"{'descr': '|u1', 'fortran_order': False, 'shape': " + b"(" * 300 + b")" * 300 + b", }",
            b"__import__('os').system('false')",
            b"[" * 5000,
            b"1" * 5000,
            b"{'descr': '|u1'}",
            b"",
            b"\xff\xfe",
            b" " * 70_000,
        ]
    )
    version = draw.choice([b"\x01\x00", b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x00"])
    if version == b"\x01\x00":
        size = struct.pack("<H", min(len(header), 65535))
    else:
        size = struct.pack("<I", draw.choice([len(header), len(header), 2**32 - 1]))
    return b"\x93NUMPY" + version + size + header + draw.choice([content[128:], b"", bytes(450)])


@sizes(40, 900)
def test_zips(tmp_path: Path, cases: int, record_property) -> None:
    """Archives with tampered array headers, odd names, members twice, lying lengths, bombs and comments."""
    path = tmp_path / "a.npz"

    def check(draw: random.Random) -> None:
        members = {f"{name}.npy": io.BytesIO() for name in plain()}
        for name, array in plain().items():
            np.save(members[f"{name}.npy"], array)
        with zipfile.ZipFile(
            path, "w", draw.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
        ) as archive:
            for name, stream in members.items():
                content = stream.getvalue()
                if draw.random() < 0.35:
                    content = draw.choice([npy(draw), mutated_bytes(draw, content), b"", content + bytes(300)])
                if draw.random() < 0.05:
                    name = draw.choice(["../" + name, "/" + name, name.upper(), name[:-4], "a" * 3000, "x_train.npy/"])
                archive.writestr(name, content)
            if draw.random() < 0.1:
                archive.writestr("bomb.npy", bytes(2 * 10**6))
            archive.comment = draw.randbytes(draw.choice([0, 0, 5, 300]))
        if draw.random() < 0.3:
            content = bytearray(path.read_bytes())
            offset = draw.choice([8, 10, 20, 24, 28, 42])  # flags, method, lengths, offset
            place = content.rfind(b"PK\x01\x02") + offset
            content[place] ^= 1 << draw.randrange(8)
            path.write_bytes(content)
        attempt(lambda: read(path))

    record_property("cases tried", explore(dice, check, cases, cases < 500))
