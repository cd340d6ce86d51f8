"""Missing files are named, and there is no network without being asked."""

from __future__ import annotations

import dataclasses
import errno
import socket
import urllib.request

import pytest

from dprandp.data import KNOWN, list_datasets, open_dataset
from dprandp.errors import InputError, StorageError

FETCHED = [name for name in KNOWN if name != "digits"]


@pytest.mark.parametrize("name", FETCHED)
def test_files_are_missing_and_there_is_no_network(tmp_path, name, monkeypatch, capsys):
    before = socket.getdefaulttimeout()
    with pytest.raises(InputError, match="could not be downloaded") as caught:
        open_dataset(name, tmp_path / "new", download=True).require()
    assert "check the network" in caught.value.fix
    assert capsys.readouterr().out == ""
    assert socket.getdefaulttimeout() == before
    monkeypatch.setattr(urllib.request, "urlopen", lambda *args, **kwargs: pytest.fail("nobody asked for a download"))
    dataset = open_dataset(name, tmp_path)
    for ask in (dataset.require, dataset.train, dataset.test, dataset.fingerprint):
        with pytest.raises(InputError, match=r" missing\n") as caught:
            ask()
        assert str(tmp_path) in str(caught.value)
        assert KNOWN[name].missing(tmp_path)[0] in caught.value.problem
        assert len(caught.value.fix) > 40


def test_missing_test_file_is_noticed_before_training(tmp_path, small_sets):
    spec = small_sets.register("mnist")
    small_sets.write_idx(tmp_path / "MNIST/raw", spec)
    (tmp_path / "MNIST/raw/t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(InputError, match="t10k-labels-idx1-ubyte missing"):
        open_dataset("mnist", tmp_path).train()


def test_download_fetches_then_reads(tmp_path, monkeypatch, capsys, small_sets):
    spec = small_sets.register("mnist")
    asked = []

    def fetch(data_dir):
        asked.append(data_dir)
        assert socket.getdefaulttimeout() is not None
        print("chatter of a library")
        small_sets.write_idx(data_dir / "MNIST/raw", spec)

    monkeypatch.setitem(KNOWN, "mnist", dataclasses.replace(KNOWN["mnist"], download=fetch))
    dataset = open_dataset("mnist", tmp_path, download=True)
    assert not asked  # naming is free
    small_sets.check(dataset, spec)
    dataset.require()
    assert asked == [tmp_path]  # once; afterwards the files are there
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("error", "kind"),
    [(OSError(errno.ENOSPC, "No space left"), StorageError), (TimeoutError("timed out"), InputError),
     (RuntimeError("File not found or corrupted."), InputError), (KeyboardInterrupt(), KeyboardInterrupt),
     (ZeroDivisionError(), ZeroDivisionError)],
)  # fmt: skip
def test_what_can_go_wrong_in_a_download(tmp_path, monkeypatch, error, kind):
    def fetch(data_dir):
        raise error

    monkeypatch.setitem(KNOWN, "svhn", dataclasses.replace(KNOWN["svhn"], download=fetch))
    with pytest.raises(kind):
        open_dataset("svhn", tmp_path, download=True).train()


def test_list(tmp_path):
    (tmp_path / "cifar10.npz").touch()
    rows = {row.name: row for row in list_datasets(tmp_path)}
    assert list(rows) == list(KNOWN)
    assert [name for name, row in rows.items() if row.available] == ["digits", "cifar10"]
    assert (rows["cifar10"].size, rows["cifar10"].train_examples, rows["cifar10"].classes) == ("32×32×3", 50000, 10)
