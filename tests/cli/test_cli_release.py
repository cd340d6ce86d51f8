"""predict and export: what a released model does without its run, and what is refused."""

from __future__ import annotations

import csv
import json
import runpy
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cli_process import Dprandp, arrays, good, refused, state_of
from PIL import Image

from dprandp import api
from dprandp.config.declared import Publication
from dprandp.dpsgd.release import MODEL_FORMAT
from dprandp.errors import CheckpointError, DprandpError, StorageError, UsageError
from dprandp.privacy.accounting import rounded_up
from dprandp.release import EXPORTED_FILES, export, graph, load_model, predict

RunAfter = Callable[[str], Path]
PICTURE = "first.png"


@pytest.fixture
def model_alone(stages: dict[str, Path], tmp_path: Path) -> Path:
    """The model/ folder of the finished run, away from the run."""
    return Path(shutil.copytree(stages["finetune"] / "model", tmp_path / "alone"))


# ------------------------------------------------------------------------------------------------------------- predict


def test_predictions_on_the_test_images_are_those_that_were_measured(
    dprandp: Dprandp, run_after: RunAfter, folder: Path, tmp_path: Path
) -> None:
    """The oracle: accuracy, confusion and loss that the stage reported, from the predictions and the labels. And
    nothing is read but model/."""
    tuned, run, longer = run_after("probe"), tmp_path / "run", tmp_path / "longer.toml"
    longer.write_text((folder / "small.toml").read_text().replace("refit_steps = 6", "refit_steps = 120"))
    result = good(dprandp("finetune", "--run", tuned, "--config", longer, "--json"))
    shutil.copytree(tuned / "model", run / "model")
    before = state_of(run)
    done = dprandp("predict", "--model", run / "model", "--data", "npz:tiny.npz", "--json")
    assert sorted(path.name for path in run.iterdir()) == ["model"]
    assert state_of(run) == before
    assert done.code == 0, done.err
    assert (done.json["private"], done.json["data"]) == (True, "npz:tiny.npz")
    rows = done.json["predictions"]
    labels, names = arrays()["y_test"], [str(name) for name in arrays()["classes"]]
    assert [row["image"] for row in rows] == [f"tiny.npz[{index}]" for index in range(len(labels))]
    found = np.array([names.index(row["class"]) for row in rows])
    table = np.array([[row["probabilities"][name] for name in names] for row in rows])
    np.testing.assert_allclose(table.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose([row["probability"] for row in rows], table.max(1))
    assert (found == labels).mean() == pytest.approx(result["accuracy"])
    assert len(set(found)) > 1  # a model that always says the same would agree with anything
    confusion = np.zeros((3, 3), int)
    np.add.at(confusion, (labels, found), 1)
    assert confusion.tolist() == result["confusion"]
    assert -np.log(table[range(len(labels)), labels]).mean() == pytest.approx(result["loss"], rel=1e-4)


def test_predict_files_of_any_size(
    model_alone: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    images = arrays()["x_test"][:3]
    inside = Path("new/below")
    inside.mkdir(parents=True)
    for index, image in enumerate(images):
        Image.fromarray(image).save(inside / f"{index}.png")  # the size of the training images
    Image.fromarray(images[0]).convert("RGB").save("colour.png")
    wide = np.full((12, 40), 255, np.uint8)
    wide[:, 14:26] = images[1]  # only the centre counts
    Image.fromarray(wide).save("wide.png")
    np.savez("tall.npz", images=wide.T[None])
    np.savez("wide.npz", images=np.repeat(wide[None, :, :, None], 3, axis=3))
    Image.fromarray(images[2]).resize((120, 120), Image.Resampling.NEAREST).save("large.png")
    model = load_model(model_alone)
    model.network.head.data.div_(model.network.head.norm(dim=0))  # its noise would make any difference large
    exact = predict(model, data=f"npz:{folder}/tiny.npz")
    files = [Path(f"{name}.png") for name in ("colour", "wide", "large")]
    rows = {row["image"]: row["probabilities"] for row in predict(model, files, "folder:new")}
    rows |= {row["image"]: row["probabilities"] for row in predict(model, data="npz:wide.npz")}
    assert list(rows) == [
        "colour.png", "wide.png", "large.png", *(f"new/below/{index}.png" for index in range(3)), "wide.npz[0]"
    ]  # fmt: skip
    for index in range(3):
        assert rows[f"new/below/{index}.png"] == pytest.approx(exact[index]["probabilities"], abs=1e-6)
    assert rows["colour.png"] == pytest.approx(exact[0]["probabilities"], abs=1e-6)
    for name in ("wide.png", "wide.npz[0]"):
        assert rows[name] == pytest.approx(exact[1]["probabilities"], abs=1e-6)
    assert rows["large.png"] == pytest.approx(exact[2]["probabilities"], abs=0.15)
    assert rows["wide.png"] != pytest.approx(exact[2]["probabilities"], abs=1e-3)
    upright = predict(model, data="npz:tall.npz")[0]["probabilities"]
    Image.fromarray(images[1].T).save("turned.png")
    assert upright == pytest.approx(predict(model, [Path("turned.png")])[0]["probabilities"], abs=1e-6)


def test_predict_writes_csv(dprandp: Dprandp, stages: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "answers.csv"
    Image.fromarray(arrays()["x_test"][0]).save(tmp_path / PICTURE)
    command = ("predict", "--run", stages["finetune"], "--data", "npz:tiny.npz", "--out", out)
    assert dprandp(*command).out == f"predict: 30 images, written to {out}\n"
    rows = list(csv.DictReader(out.open()))
    assert list(rows[0]) == ["image", "class", "probability", "dark", "grey", "bright", "error"]
    assert all(float(row[row["class"]]) == float(row["probability"]) for row in rows)
    refused(dprandp(*command), 2, "answers.csv exists", "--overwrite")
    refused(dprandp("predict", "--run", tmp_path / "no", "x.png"), 3, "there is no run at")
    refused(dprandp(*command[:-1], "answers.txt"), 2, "its name ends in .txt", ".csv or .json")
    line = dprandp("predict", "--model", stages["finetune"] / "model", PICTURE, "--overwrite", folder=tmp_path).out
    assert line == f"{PICTURE}  {rows[0]['class']}  {float(rows[0]['probability']):.4f}\n"


def test_predict_goes_on_past_an_image_that_cannot_be_read(
    dprandp: Dprandp, model_alone: Path, tmp_path: Path
) -> None:
    scans, out = tmp_path / "scans", tmp_path / "answers.json"
    (scans / "deep").mkdir(parents=True)
    for index in range(2):
        Image.fromarray(arrays()["x_test"][index]).save(scans / "deep" / f"{index}.png")
    (scans / "broken.png").write_text("no image")
    command = ("predict", "--model", model_alone, "scans", "none.png")
    done = dprandp(*command, folder=tmp_path)
    assert done.code == 3
    assert "2 of 4 images cannot be read" in done.err
    lines = done.out.splitlines()
    assert [line.split()[0] for line in lines] == [
        "scans/broken.png", "scans/deep/0.png", "scans/deep/1.png", "none.png"
    ]  # fmt: skip
    assert "error: scans/broken.png is damaged or not an image" in lines[0]
    assert "error: there is no file or folder none.png" in lines[3]
    done = dprandp(*command, "--json", folder=tmp_path)
    assert (done.code, done.json["images"], done.json["unreadable"]) == (3, 4, 2)
    written = dprandp(*command, "--json", "--out", out, folder=tmp_path)
    assert (written.code, written.json) == (3, done.json | {"out": str(out), "predictions": None})
    assert json.loads(out.read_text())["predictions"] == done.json["predictions"]
    assert dprandp("predict", "--model", model_alone, "scans/deep", folder=tmp_path).code == 0


def test_predict_refuses(model_alone: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "two.npz", x=np.zeros((1, 4, 4), np.uint8), images=np.zeros((1, 4, 4), np.uint8))
    np.savez(tmp_path / "float.npz", x=np.zeros((1, 4, 4)))
    np.savez(tmp_path / "object.npz", x=np.array([{}], dtype=object))
    model = load_model(model_alone)
    for images, data, code, *fragments in (
        ([], None, 2, "there is no image to classify", "--data npz:PATH"),
        (["none.png"], None, 3, "there is no file", "none.png"),
        (["text.png"], None, 3, "text.png is damaged or not an image"),
        ([], "cifar10", 2, "--data 'cifar10' names no images", "npz:PATH"),
        ([], "folder:{}/none", 3, "there is no folder", "none"),
        ([], "folder:{}/empty", 3, "empty holds no image", ".png"),
        ([], "npz:{}/none.npz", 3, "there is no file", "none.npz"),
        ([], "npz:{}/two.npz", 3, "holds images and x", "one of these names"),
        ([], "npz:{}/float.npz", 3, "x is float64 [1, 4, 4]", "0…255"),
        ([], "npz:{}/object.npz", 3, "object array", "not read"),
    ):
        with pytest.raises(DprandpError) as caught:
            predict(model, [tmp_path / name for name in images], data and data.format(tmp_path))
        assert caught.value.exit_code == code
        for fragment in fragments:
            assert fragment in str(caught.value)


def changed_config(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def flip(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[-5] ^= 1
        (folder / name).write_bytes(data)

    return damage


def linked(folder: Path) -> None:
    (folder / "MODEL_CARD.md").rename(folder.parent / "elsewhere")
    (folder / "MODEL_CARD.md").symlink_to(folder.parent / "elsewhere")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights": (flip("model.safetensors"), "model.safetensors is not the file that was released"),
    "card": (flip("MODEL_CARD.md"), "MODEL_CARD.md is not the file that was released"),
    "no card": (lambda folder: (folder / "MODEL_CARD.md").unlink(), "MODEL_CARD.md is missing"),
    "a link": (linked, "MODEL_CARD.md is missing, or a link"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be used"),
    "a list": (lambda folder: (folder / "config.json").write_text("[]"), "config.json cannot be used"),
    "no hashes": (changed_config(lambda c: c.pop("sha256")), "config.json cannot be used"),
    "newer": (changed_config(lambda c: c.update(format=MODEL_FORMAT + 1)), f"has format {MODEL_FORMAT + 1}"),
    "older": (changed_config(lambda c: c.update(format=MODEL_FORMAT - 1)), f"has format {MODEL_FORMAT - 1}"),
    "bomb": (changed_config(lambda c: c["extractor"].update(filters=10**15)), "describes a network"),
    "other architecture": (changed_config(lambda c: c["extractor"].update(arch="wrn-16-4")), "has no tensor"),
    "unknown architecture": (changed_config(lambda c: c["extractor"].update(arch="vit")), "describes a network"),
    "unknown setting": (changed_config(lambda c: c["extractor"].update(colours=3)), "describes a network"),
    "a class too many": (changed_config(lambda c: c["classes"].append("more")), "'head' with shape"),
    "odd shape": (changed_config(lambda c: c["input"].update(shape=[12, 12, 2])), "config.json cannot be used"),
    "no extractor": (changed_config(lambda c: c.update(extractor=None)), "config.json cannot be used"),
    "privacy unknown": (changed_config(lambda c: c["result"].pop("private")), "config.json cannot be used"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_model_is_refused(model_alone: Path, name: str) -> None:
    load_model(model_alone)
    damage, said = DAMAGES[name]
    damage(model_alone)
    with pytest.raises(CheckpointError) as caught:
        load_model(model_alone)
    assert said in caught.value.problem
    assert any(what in caught.value.fix for what in ("restore", "upgrade", "make the model again"))


# -------------------------------------------------------------------------------------------------------------- export


def test_export_to_a_folder_that_works_by_itself(
    dprandp: Dprandp,
    run_after: RunAfter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    run, out = run_after("finetune"), tmp_path / "out"
    (run / "model" / "notes.txt").write_text("not releasable")
    before = state_of(run)
    done = dprandp("export", "--run", run, "--out", out, "--json")
    assert done.code == 0, done.err
    assert state_of(run) == before
    assert EXPORTED_FILES == ("model.safetensors", "config.json", "MODEL_CARD.md", "example.py")
    assert sorted(path.name for path in out.iterdir()) == sorted(EXPORTED_FILES)
    assert done.json["files"] == list(EXPORTED_FILES)
    assert done.json["bytes"] == sum(path.stat().st_size for path in out.iterdir())
    assert done.json["private"] is True
    assert 0 < done.json["epsilon"] <= 2
    for name in EXPORTED_FILES[:3]:
        assert (out / name).read_bytes() == (run / "model" / name).read_bytes()
    Image.fromarray(arrays()["x_test"][0]).save(tmp_path / "new.png")
    monkeypatch.setattr(sys, "argv", ["example.py", str(tmp_path / "new.png")])
    runpy.run_path(str(out / "example.py"), run_name="__main__")
    path, answer, probability = capsys.readouterr().out.split()
    row = predict(load_model(out), [tmp_path / "new.png"])[0]
    assert (path, answer) == (str(tmp_path / "new.png"), row["class"])
    assert float(probability) == pytest.approx(row["probability"], abs=1e-4)


def test_export_says_what_its_publisher_says(dprandp: Dprandp, run_after: RunAfter, tmp_path: Path) -> None:
    run, out = run_after("finetune"), tmp_path / "out"
    before = state_of(run)
    said = ("--title", "Shades", "--license", "mit", "--contact", "a@example.org", "--intended-use", "Telling shades.")
    done = dprandp("export", "--run", run, "--out", out, *said)
    assert done.code == 0, done.err
    assert state_of(run) == before
    assert json.loads((out / "config.json").read_text())["publication"] == {
        "title": "Shades", "license": "mit", "contact": "a@example.org", "intended_use": "Telling shades."
    }  # fmt: skip
    card = (out / "MODEL_CARD.md").read_text()
    assert card.startswith('---\nlicense: "mit"\n')
    assert "resized to 12 × 12 pixels" in card
    load_model(out)
    done = dprandp("export", "--run", run, "--out", tmp_path / "other", "--contact", "two\nlines")
    refused(done, 2, "contact is not one line")


@pytest.mark.slow
@pytest.mark.parametrize(("format", "suffix"), [("torch-export", "pt2"), ("onnx", "onnx")])
def test_export_as_a_graph(
    dprandp: Dprandp, stages: dict[str, Path], tmp_path: Path, format: str, suffix: str
) -> None:
    out = tmp_path / f"tiny.{suffix}"
    done = dprandp("export", "--run", stages["finetune"], "--format", format, "--out", out)
    assert done.code == 0, done.err
    assert done.err == ""
    assert "equal to the model in float32 within" in done.out
    assert local_paths(tmp_path, [str(stages["finetune"]), str(tmp_path), str(Path(__file__).parents[2])]) == []
    refused(dprandp("export", "--run", stages["finetune"], "--format", format, "--out", out), 2, "exists")
    refused(dprandp("export", "--run", stages["finetune"], "--out", out), 2, f"--format {format}")


def test_export_to_a_zip(dprandp: Dprandp, model_alone: Path, stages: dict[str, Path], tmp_path: Path) -> None:
    done = dprandp("export", "--run", stages["finetune"], "--out", tmp_path / "deep/tiny.zip")
    assert done.code == 0, done.err
    assert "4 files" in done.out
    assert "ε = " in done.out
    with zipfile.ZipFile(tmp_path / "deep/tiny.zip") as archive:
        assert archive.namelist() == [f"tiny/{name}" for name in EXPORTED_FILES]
        archive.extractall(tmp_path / "unpacked")
    model = load_model(tmp_path / "unpacked/tiny")
    export(model, tmp_path / "again" / "tiny.zip")
    assert (tmp_path / "again/tiny.zip").read_bytes() == (tmp_path / "deep/tiny.zip").read_bytes()
    (tmp_path / "file").touch()
    for target, kind, said in (
        ("deep/tiny.zip", UsageError, "tiny.zip exists"),
        ("unpacked", UsageError, "exists and is not empty"),
        ("file", UsageError, "exists and is not empty"),
        ("file/x", StorageError, "cannot create"),
        ("file/x.zip", StorageError, "cannot create"),
    ):
        with pytest.raises(kind, match=said):
            export(model, tmp_path / target)


def test_export_without_a_guarantee_needs_consent(dprandp: Dprandp, run_after: RunAfter, tmp_path: Path) -> None:
    run, out = run_after("pretrain"), tmp_path / "out"
    done = dprandp("probe", "--run", run, "--config", "small.toml", "--data", "npz:tiny.npz", "--eps", "inf")
    assert done.code == 0, done.err
    refused(dprandp("export", "--run", run, "--out", out), 2, "NOT PRIVATE", "--allow-not-private")
    assert not out.exists()
    done = dprandp("export", "--run", run, "--out", out, "--allow-not-private")
    assert done.code == 0, done.err
    assert "NOT PRIVATE" in done.out
    assert "NOT PRIVATE" in done.err
    for name in ("MODEL_CARD.md", "example.py"):
        assert "NOT PRIVATE" in (out / name).read_text()
    assert load_model(out).not_private_because is not None


def test_a_card_that_promises_privacy_where_there_is_none(model_alone: Path, tmp_path: Path) -> None:
    for changes in ({"random": "insecure-seed"}, {"epsilon": "inf", "noise_multiplier": 0}):
        changed_config(lambda config, changes=changes: config["result"].update(changes, private=False))(model_alone)
        with pytest.raises(UsageError, match="NOT PRIVATE"):
            export(load_model(model_alone), tmp_path / "out")
        with pytest.raises(CheckpointError, match="does not say so"):
            export(load_model(model_alone), tmp_path / "out", allow_not_private=True)


# --------------------------------------------------------------------------------------------------------- local paths


def local_paths(folder: Path, parts: list[str]) -> list[str]:
    """Files that say where something lies on this disk."""
    return [path.name for path in folder.iterdir() if any(part in path.read_text("latin-1") for part in parts)]


@pytest.mark.slow
def test_a_released_model_does_not_say_where_the_data_lie(
    dprandp: Dprandp, run_after: RunAfter, folder: Path, tmp_path: Path
) -> None:
    secret = tmp_path / "home-of-somebody" / "study"
    secret.mkdir(parents=True)
    shutil.copy(folder / "tiny.npz", secret / "scans.npz")
    labels = arrays()
    for split in ("train", "test"):
        for index in range(6):
            target = secret / "pictures" / split / ("a" if index % 2 else "b")
            target.mkdir(parents=True, exist_ok=True)
            Image.fromarray(labels[f"x_{split}"][index]).save(target / f"{index}.png")
    scratch = ("--from", "scratch", "--arch", "wrn-10-1", "--steps", 1, "--eps", 8)
    for name, command in (
        ("folder:pictures", ("probe", "--run", run_after("pretrain"), "--data", f"folder:{secret}/pictures")),
        ("npz:scans.npz", ("finetune", "--run", tmp_path / "new", "--data", f"npz:{secret}/scans.npz", *scratch)),
    ):
        run = Path(command[2])
        done = dprandp(*command, "--config", folder / "small.toml")
        assert done.code == 0, done.err
        config = json.loads((run / "model/config.json").read_text())
        assert config["result"]["data"] == name
        assert name in (run / "model/MODEL_CARD.md").read_text()
        assert local_paths(run / "model", ["home-of-somebody", str(tmp_path), str(run)]) == []
        (run / "model" / "leak.json").write_text(json.dumps({"data": str(secret)}))  # the check can fail
        assert local_paths(run / "model", ["home-of-somebody"]) == ["leak.json"]
        load_model(run / "model")


KILLED = """
import os
import dprandp.privacy.ledger as ledger
charge = ledger.Ledger.charge
def killed(*values, **named):
    charge(*values, **named)
    os._exit(137)
ledger.Ledger.charge = killed
"""


def test_what_a_run_has_spent_since_its_model_is_told(dprandp: Dprandp, run_after: RunAfter, tmp_path: Path) -> None:
    run = run_after("probe")
    commands = (("predict", "--data", "npz:tiny.npz"), ("export", "--out", tmp_path / "out"))
    for command in commands[:1]:  # the control
        done = dprandp(*command, "--run", run)
        assert (done.code, "has spent" in done.err) == (0, False), done.err
    assert dprandp("finetune", "--config", "small.toml", "--run", run, before=KILLED).code == 137
    for command in commands:
        said = dprandp(*command, "--run", run).err
        assert "this model's ε = 0.6 is its own; the run has spent ε = " in " ".join(said.split()), said
    told = [dprandp("predict", "--data", "npz:tiny.npz", "--run", run, "--json", "--quiet").json,
            dprandp("export", "--out", tmp_path / "second", "--run", run, "--json", "--quiet").json]  # fmt: skip
    assert all(answer["run_epsilon"] > answer["epsilon"] for answer in told)
    with pytest.warns(UserWarning, match="the run has spent"):
        api.load_model(run)
    card = (tmp_path / "second/MODEL_CARD.md").read_text(encoding="utf-8")
    assert "sees all that this run released up to the end of this stage" in card
    assert f"the run has spent ε = {rounded_up(told[1]['run_epsilon'])} by now" in card
    with pytest.warns(UserWarning, match="the run has spent"):
        received = api.load_model(tmp_path / "second")
    assert received.run_epsilon == told[1]["run_epsilon"]
    export(received, tmp_path / "third")
    again = (tmp_path / "third/MODEL_CARD.md").read_text(encoding="utf-8")
    assert (again.count("the run has spent"), again == card) == (1, True)
    for folder in (run / "model", tmp_path / "second"):  # the run's own, and a copy that left it
        said = dprandp("predict", "--data", "npz:tiny.npz", "--model", folder).err
        assert "the run has spent ε = " in " ".join(said.split())
        with pytest.warns(UserWarning, match="the run has spent"):
            api.load_model(folder)
    assert graph.metadata(received, Publication())["run_epsilon"] == str(received.run_epsilon)
