"""--download: nothing is fetched unless asked for; then through the publisher's own downloader, once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cli_process import Dprandp, RunAfter, good, refused

from dprandp.data import KNOWN
from dprandp.errors import UsageError
from dprandp.inspection import overview

# torchvision's MNIST, with 60 + 20 images and no network
FAKE = """
import dataclasses
import numpy as np, torchvision
from pathlib import Path
from dprandp.data import KNOWN

spec = dataclasses.replace(KNOWN["mnist"].spec(), train_examples=60, test_examples=20)
KNOWN["mnist"] = dataclasses.replace(KNOWN["mnist"], spec=lambda: spec)

class MNIST:
    def __init__(self, root, train=True, download=False):
        if not download:
            raise SystemExit("the fake can only download")
        print("chatter of a library")
        folder = Path(root) / "MNIST/raw"
        folder.mkdir(parents=True)
        random = np.random.default_rng(0)
        for part, count in (("train", 60), ("t10k", 20)):
            images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
            head = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in images.shape)
            (folder / f"{part}-images-idx3-ubyte").write_bytes(head + images.tobytes())
            head = bytes([0, 0, 8, 1]) + count.to_bytes(4, "big")
            (folder / f"{part}-labels-idx1-ubyte").write_bytes(head + bytes(i % 10 for i in range(count)))

torchvision.datasets.MNIST = MNIST
"""
NO_NETWORK = """
import urllib.error, urllib.request
def refuse(*arguments, **options): raise urllib.error.URLError("no route to host")
urllib.request.urlopen = refuse
"""


def test_probe_fetches_only_when_told(dprandp: Dprandp, run_after: RunAfter, tmp_path: Path) -> None:
    run, data = run_after("pretrain"), tmp_path / "data"
    probe = ("probe", "--config", "small.toml", "--run", run, "--data", "mnist", "--data-dir", data, "--eps", 2)
    done = dprandp(*probe, before=FAKE)
    refused(done, 3, f"mnist is not in {data}: MNIST/raw/train-images-idx3-ubyte", "put the four", "--download")
    assert good(dprandp(*probe, "--plan", "--download", "--json", before=FAKE))["examples"] == 60
    assert not data.exists()
    done = dprandp(*probe, "--download", "--json", before=FAKE)
    assert done.code == 0, done.err
    assert (done.json["data"], done.json["train_examples"]) == ("mnist", 60)
    assert "chatter of a library" in done.err
    assert len(list(data.rglob("*-ubyte"))) == 4


def test_datasets_fetches_one(dprandp: Dprandp, tmp_path: Path) -> None:
    command = ("datasets", "--data-dir", tmp_path, "--download", "--data")
    rows = good(dprandp(*command, "mnist", "--json", before=FAKE))["datasets"]
    assert [(row["name"], row["available"]) for row in rows] == [("mnist", True)]
    again = dprandp(*command, "mnist", before=FAKE)  # the fake would stumble over its folder
    assert (again.code, again.err) == (0, "")
    done = dprandp(*command, "pathmnist", before=NO_NETWORK)
    refused(done, 3, "pathmnist could not be downloaded", "check the network", f"into {tmp_path}, put")


def test_run_looks_for_the_data_before_it_makes_an_image(dprandp: Dprandp, tmp_path: Path) -> None:
    run = ("run", "--config", "small.toml", "--run", tmp_path / "run", "--data", "svhn", "--data-dir", tmp_path)
    refused(dprandp(*run), 3, "svhn is not in", "train_32x32.mat", "--download")
    refused(dprandp(*run, "--download", before=NO_NETWORK), 3, "svhn could not be downloaded")
    assert not (tmp_path / "run" / "1-generate").exists()


def test_download_that_makes_no_sense(tmp_path: Path, folder: Path) -> None:
    for name, said in ((None, "needs the name of one data set"), (f"npz:{folder}/tiny.npz", "nothing to download")):
        with pytest.raises(UsageError, match=said):
            overview.datasets(tmp_path, name, download=True)
    with pytest.raises(UsageError, match="not a known set"):
        overview.datasets(tmp_path, f"npz:{folder}/tiny.npz")
    assert [row.name for row in overview.datasets(tmp_path, "digits", download=True)] == ["digits"]
    assert len(overview.datasets(tmp_path)) == len(KNOWN)


def test_medmnist_through_its_own_address_and_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from medmnist import INFO
    from torchvision.datasets import utils

    asked = []

    def download_url(url: str, root: str, filename: str, md5: str) -> None:
        asked.append((url, md5))
        np.savez(Path(root) / filename, train_images=np.zeros(1))

    monkeypatch.setattr(utils, "download_url", download_url)
    (row,) = overview.datasets(tmp_path, "breastmnist", download=True)
    assert row.available
    assert asked == [(INFO["breastmnist"]["url"], INFO["breastmnist"]["MD5"])]
    overview.datasets(tmp_path, "breastmnist", download=True)
    assert len(asked) == 1
