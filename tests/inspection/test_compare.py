"""Runs side by side: what those about the same data have spent together, and the tables."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dprandp.errors import CheckpointError, InputError, UsageError
from dprandp.inspection import compare as comparing
from dprandp.inspection.compare import compare, lines, runs_in
from dprandp.privacy.accounting import GaussianEvent, compose
from dprandp.privacy.gaussian_dp import gaussian_dp_epsilon
from dprandp.privacy.ledger import Ledger
from dprandp.privacy.tuning import TuningEvent
from dprandp.report.disclosure import epsilon_text
from dprandp.runs.directory import RunDir
from dprandp.runs.files import atomic_write
from dprandp.runs.ledger import sealed_budget

PATIENT = "one patient (column patient_train)"
Make = Callable[..., Path]


def hashes(names: str) -> np.ndarray:
    """Of images with these names, as ``Dataset.hashes`` has them."""
    digests = [hashlib.blake2b(name.encode(), digest_size=16).digest() for name in names.split()]
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 1, 16)


def hash_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A run that has charged full batches (T, σ), or sampled ones (T, σ, q), and has no model yet.

    ``images``: names of its images. ``units``: which unit each of these is of.
    """

    def made(
        name: str | int, *charges: tuple, train: str = "t", images: str | None = "i", unit: str = "one image",
        delta: float = 1e-5, tuning: bool = False, random: str = "os-entropy", units: str | None = None,
        data: str | None = None,
    ) -> Path:  # fmt: skip
        run = RunDir.open(tmp_path / str(name), create=True)
        plan = {"format": 1, "data": data or f"npz:/secret/{name}.npz", "epsilon": 3.0, "delta": delta,
                "examples": 1000, "unit": unit, "stages": {}}  # fmt: skip
        with run.lock():
            if images is not None:
                np.save(run.private_dir / "training-images.npy", hashes(images))
                known = {"images": hash_of(run.private_dir / "training-images.npy")}
                if units is not None:
                    np.save(run.private_dir / "training-units.npy", np.array(units.split(), np.int64))
                    known["units"] = hash_of(run.private_dir / "training-units.npy")
                atomic_write(run.private_dir / "training-data.json", json.dumps({"train": train} | known))
            ledger = Ledger.create(run.privacy_dir / "ledger.jsonl", 1000, budget=sealed_budget(plan))
            atomic_write(run.privacy_dir / "plan.json", json.dumps(plan))
            run.keep_ledger_head(ledger.head)
            if tuning:
                ledger.charge_tuning(stage="tune", attempt=1, event=TuningEvent(0.05, 0.0, 0.1), random=random)
            for number, (steps, sigma, *rate) in enumerate(charges):
                ledger.charge(
                    stage=f"s{number}", attempt=1, steps=steps, planned=steps, noise_multiplier=sigma,
                    sample_rate=rate[0] if rate else 1.0, clip_norm=1.0, random=random,
                )  # fmt: skip
            run.keep_ledger_head(ledger.head)
        return run.path

    return made


def test_full_batches_of_runs_compose_as_gaussians(make: Make) -> None:
    """The oracle: squares of μ add up. Far below the sum of the ε, and never below the truth."""
    charges = [(100, 40.0), (120, 60.0), (50, 25.0)]
    found = compare([make(f"run{number}", charge) for number, charge in enumerate(charges)])
    (together,) = found.together
    truth = gaussian_dp_epsilon(math.sqrt(sum(steps / sigma**2 for steps, sigma in charges)), 1e-5)
    assert truth <= together.epsilon <= 1.01 * truth
    assert together.epsilon < 0.7 * sum(row.epsilon for row in found.runs)
    assert together.delta == 1e-5
    assert "Gaussian-DP filter" in together.method
    assert len(together.runs) == 3


def test_sampled_batches_of_runs_compose_to_no_less_than_numerically(make: Make) -> None:
    found = compare([make("a", (200, 2.0, 0.05)), make("b", (300, 3.0, 0.1), (40, 30.0))])
    (together,) = found.together
    events = [GaussianEvent(2.0, 0.05, 200), GaussianEvent(3.0, 0.1, 300), GaussianEvent(30.0, 1.0, 40)]
    assert compose(events, 1e-5).upper <= together.epsilon < sum(row.epsilon for row in found.runs)


def test_what_counts_is_the_content_of_the_data(make: Make) -> None:
    a, b = make("a", (100, 40.0)), make("b", (100, 40.0), train="other order")
    other, quiet = make("other", (100, 40.0), images="j"), make("quiet")
    assert [each.runs for each in compare([a, b, other, quiet]).together] == [(str(a), str(b))]
    assert compare([a, other]).together == compare([a, quiet]).together == compare([a, a]).together == []
    unknown = make("unknown", (100, 40.0), images=None)
    assert compare([a, unknown]).data_unknown == [str(unknown)]
    assert f"{unknown} has no private/training-images.npy" in lines(compare([a, unknown]))


def test_the_hashes_of_another_runs_images_are_refused(make: Make) -> None:
    first, second = make("a", (100, 40.0)), make("b", (100, 40.0), images="other")
    shutil.copy(second / "private/training-images.npy", first / "private/training-images.npy")
    with pytest.raises(CheckpointError, match="unknown which images"):
        compare([first, second])


def test_runs_are_composed_from_the_first_image_that_they_have_in_common(make: Make) -> None:
    """Also by way of a third. The control: no image in common."""
    first, second, third = (make(name, (100, 40.0), images=f"{name} {name + 1}") for name in range(3))
    apart = make("d", (100, 40.0), images="m n")
    assert [each.runs for each in compare([first, third, apart]).together] == []
    (together,) = compare([first, second, third, apart]).together
    assert together.runs == (str(first), str(second), str(third))
    truth = gaussian_dp_epsilon(math.sqrt(3 * 100 / 40.0**2), 1e-5)
    assert truth <= together.epsilon <= 1.01 * truth


@pytest.mark.parametrize("name", ["public-images.npy", "declared-public.npy"])
def test_an_image_that_is_public_in_one_run_and_private_in_another_is_named(make: Make, name: str) -> None:
    first, second, third = (make(run, (100, 40.0), images=run) for run in "ijk")
    np.save(first / "private" / name, hashes("x j"))
    found = compare([first, second, third])
    assert (found.exposed, found.together) == (
        [f"{first} has used images as public data that are private in {second}"], []
    )  # fmt: skip
    assert found.exposed[0] in lines(found)


def test_units_are_not_mixed(make: Make) -> None:
    patients = [make(f"p{number}", (100, 40.0), unit=PATIENT) for number in range(2)]
    others, single = make("p3", (100, 40.0), unit=PATIENT, train="other patients"), make("x", (100, 40.0))
    found = compare([*patients, others, single])
    assert [(each.runs, each.epsilon is None) for each in found.together] == [
        (tuple(map(str, patients)), False), ((*map(str, patients), str(others), str(single)), True),
    ]  # fmt: skip
    assert "different units of privacy, or with other units (one image, one patient" in found.together[1].method


@pytest.mark.parametrize(
    ("first", "second", "composed"),
    [
        (("i j k", "0 0 1"), ("i j k", "5 5 3"), True),  # other names, and another size or colour: another hash in all
        (("i j k", "0 0 1"), ("k j i", "0 1 1"), True),
        (("i j k", "0 0 1"), ("j l", "0 0"), True),  # more of the same patient
        (("i j k", "0 0 1"), ("i j k", "0 1 1"), False),
        (("i j k", "0 0 1"), ("i j k", "0 1 2"), False),  # one patient of the first is two of the second
        (("i j k", "0 0 1"), ("i k", "0 0"), False),
        (("i j k", "0 0 1"), ("i j k", None), False),  # not recorded
    ],
)
def test_runs_that_divide_their_common_images_alike_are_composed(
    make: Make, first: tuple, second: tuple, composed: bool
) -> None:
    runs = [
        make(name, (100, 40.0), images=images, units=units, unit=PATIENT, train=name)
        for name, (images, units) in zip("ab", (first, second), strict=True)
    ]
    (together,) = compare(runs).together
    assert (together.epsilon is not None) is composed
    if composed:
        truth = gaussian_dp_epsilon(math.sqrt(2 * 100 / 40.0**2), 1e-5)
        assert truth <= together.epsilon <= 1.01 * truth


def test_units_that_are_not_those_of_the_run_are_refused(make: Make) -> None:
    runs = [make(name, (100, 40.0), images="i j", units="0 0", unit=PATIENT, train=name) for name in "ab"]
    np.save(runs[0] / "private/training-units.npy", np.array([0, 1]))
    with pytest.raises(CheckpointError, match=r"training-units\.npy is damaged"):
        compare(runs)


def test_a_copy_counts_as_a_run_of_its_own_and_another_name_of_a_run_does_not(make: Make, tmp_path: Path) -> None:
    """Two copies may go on with equal plans in the same second: their ledgers are then equal, their noise is not."""
    first, second = make("a", (100, 40.0)), tmp_path / "copy"
    shutil.copytree(first, second)
    found = compare([first, second])
    assert found.together[0].epsilon > 1.3 * found.runs[0].epsilon
    (tmp_path / "link").symlink_to(first)
    again = compare([first, first.parent / "copy/../a", tmp_path / "link"])
    assert (len(again.runs), again.runs[0].run, again.together) == (1, str(first), [])


def test_basic_composition_is_named_where_nothing_tighter_is_proven(make: Make) -> None:
    """Private tuning is composed tightly only where it came first of all, which two ledgers cannot show."""
    found = compare([make("tuned", (100, 40.0), tuning=True), make("plain", (100, 40.0), delta=1e-6)])
    (together,) = found.together
    assert together.method.startswith("basic composition")
    assert together.epsilon == pytest.approx(sum(row.epsilon for row in found.runs))
    assert together.delta == pytest.approx(1.1e-5)
    plain = compare([make("b", (100, 40.0)), make("c", (100, 40.0), delta=1e-6)]).together[0]
    assert (plain.delta, "basic" in plain.method) == (1e-6, False)  # the smaller δ, for which all is composed again


@pytest.mark.parametrize("kind", ["no noise", "a seed"])
def test_without_privacy_nothing_is_promised(make: Make, kind: str) -> None:
    bad = make("bad", (100, 0.0)) if kind == "no noise" else make("bad", (100, 40.0), random="insecure-seed")
    found = compare([make("good", (100, 40.0)), bad])
    assert found.together[0].epsilon == math.inf
    assert "void" in found.together[0].method
    assert "NOT PRIVATE" in lines(found)
    assert "together they have spent ε = ∞" in lines(found)


def test_the_tables(make: Make, tmp_path: Path) -> None:
    found = compare([make("a_b&c", (100, 40.0)), make("b", (100, 40.0))])
    text = lines(found)
    assert "/secret" not in text  # where the data lie is nobody's business
    assert text.splitlines()[0].startswith("run ")
    assert f"are about the same data: together they have spent ε = {found.together[0].epsilon:.2f}"[:-1] in text
    rows: list[dict[str, Any]] = list(csv.DictReader(io.StringIO(comparing.as_csv(found))))
    assert [float(row["epsilon"]) for row in rows] == [row.epsilon for row in found.runs]
    assert {float(row["together_epsilon"]) for row in rows} == {found.together[0].epsilon}
    assert rows[0]["accuracy"] == ""
    latex = comparing.as_latex(found)
    assert r"a\_b\&c & no model & " in latex
    assert latex.count(r" \\") == 3
    table, comments = latex.split(r"\end{tabular}")
    assert "ε" not in table
    assert r"$\varepsilon$" in table
    assert "\n% " in comments
    assert "together they have spent ε = " in comments
    assert all(line.startswith("% ") for line in comments.strip().splitlines())
    page = comparing.as_html(found)
    assert "a_b&amp;c</th><td>no model</td>" in page
    assert page.count('<p class="warning" role="alert">') == 1
    assert "<script" not in page


def test_the_runs_of_a_folder(make: Make, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    make("a", (100, 40.0))
    broken = make("b", (100, 40.0))
    (broken / "privacy/ledger.jsonl").unlink()
    (tmp_path / "notes").mkdir()
    make("deep/er/c", (100, 40.0))
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "d"
    make("d", (100, 40.0)).rename(elsewhere)
    (tmp_path / "deep/link").symlink_to(elsewhere)
    found = runs_in(tmp_path)
    lost = make("lost", (100, 40.0))
    assert len(runs_in(tmp_path).runs) == 5
    (lost / "run.json").unlink()
    (row,) = [row for row in runs_in(tmp_path).runs if row.run == str(lost)]
    assert "run.json does not know of it" in row.problem  # not listed would be taken for not spent
    shutil.rmtree(lost)
    names = [Path(row.run).relative_to(tmp_path).as_posix() for row in found.runs]
    assert names == ["a", "b", "deep/er/c", "deep/link"]
    assert found.runs[0].problem is None
    assert f"{broken} cannot be read: " in lines(found)
    with pytest.raises(CheckpointError):
        compare([broken])
    for folder, words in ((tmp_path / "notes", "no run"), (tmp_path / "none", "no folder")):
        with pytest.raises(InputError, match=words):
            runs_in(folder)
    with pytest.raises(InputError, match="there is no run"):
        compare([tmp_path / "none"])
    (tmp_path / "notes/file").touch()
    with pytest.raises(UsageError, match="not a run directory"):
        compare([tmp_path / "notes"])


def test_the_results_of_sweeps_are_means_and_deviations_over_seeds(tmp_path: Path) -> None:
    def row(seed: int, accuracy: float, **other: Any) -> str:
        facts = {"data": "digits", "system": "probe", "size": "tiny", "seed": seed, "epsilon": 0.99 + seed / 1000}
        facts |= {"epsilon_total": 1.0, "delta": 1e-5, "private": True, "majority_accuracy": 0.1, "seconds": 60.0}
        return json.dumps(facts | {"run": f"r{seed}", "accuracy": accuracy} | other)

    together = {"together": {"runs": ["r0", "r1"], "epsilon": 1.5, "delta": 1e-5, "method": "said"}}
    path = tmp_path / "results.jsonl"
    free = row(0, 0.9, epsilon="inf", epsilon_total="inf", private=False)
    path.write_text("\n".join([row(0, 0.80), row(1, 0.86), free, json.dumps(together)]))
    found = compare([path])
    one, other = found.groups
    assert (one.seeds, one.accuracy, one.epsilon, other.accuracy_std) == (2, pytest.approx(0.83), 0.991, None)
    assert one.accuracy_std == pytest.approx(0.06 / math.sqrt(2))
    text = lines(found)
    assert "83.0 ± 4.2 %" in text
    assert "NOT PRIVATE" in text
    assert "r0, r1 are about the same data: together they have spent ε = 1.5 at δ = 1e-5 (said)" in text
    latex = comparing.as_latex(found).splitlines()
    assert latex[2] == r"system & data & size & $\varepsilon$ = 1 & $\varepsilon$ = $\infty$ \\"
    assert latex[4] == r"probe & digits & tiny & 83.0 $\pm$ 4.2 & 90.0 \\"
    assert latex[7] == "% test accuracy in %, mean ± sample standard deviation, seeds: 1 to 2"
    assert latex[8].startswith("% r0, r1 are about the same data: together they have spent ε = 1.5")
    assert "83.0 ± 4.2 %</td>" in comparing.as_html(found)
    table = list(csv.DictReader(io.StringIO(comparing.as_csv(found))))
    assert [float(line["accuracy"]) for line in table] == [pytest.approx(0.83), 0.9]


def results_of(path: Path, *runs: Path, **stored: Any) -> Path:
    """A ``results.jsonl`` as a sweep writes it: a line for each run, with what it had spent."""
    lines_of = []
    for seed, run in enumerate(runs):
        (row,) = compare([run]).runs
        facts = {"system": "probe", "size": "tiny", "seed": seed, "accuracy": 0.8, "majority_accuracy": 0.1,
                 "data": "scans", "seconds": 1.0}  # fmt: skip
        lines_of.append(json.dumps({**vars(row), **facts}))
    lines_of += [json.dumps({"together": stored})] if stored else []
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines_of))
    return path


def test_runs_of_several_sweeps_are_composed(make: Make, tmp_path: Path) -> None:
    """Each file knows of its own runs alone, and together they are about the same images."""
    runs = [make(f"sweep{number}/run", (100, 40.0)) for number in range(2)]
    files = [results_of(run.parent / "results.jsonl", run) for run in runs]
    assert [compare([file]).together for file in files] == [[], []]  # one run each
    found = compare(files)
    (together,) = found.together
    (expected,) = compare(runs).together
    assert (together.epsilon, together.delta) == (expected.epsilon, expected.delta)
    assert together.epsilon > 1.3 * found.runs[0].epsilon
    said = f"together they have spent ε = {epsilon_text(together.epsilon)}"
    for text in (lines(found), comparing.as_html(found)):
        assert said in text
    (row,) = csv.DictReader(io.StringIO(comparing.as_csv(found)))
    assert (float(row["together_epsilon"]), row["seeds"]) == (together.epsilon, "2")
    # a sweep that was moved is found beside its file; without its runs nobody can know
    (tmp_path / "sweep1").rename(tmp_path / "moved")
    moved = [files[0], tmp_path / "moved/results.jsonl"]
    assert compare(moved).together[0].epsilon == together.epsilon
    shutil.rmtree(tmp_path / "moved/run")
    (note,) = compare(moved).notes
    assert f"not all runs of {moved[1]} are there" in note
    assert "not what they and those of the other files have spent together" in note


def test_what_was_spent_after_the_sweep_counts(make: Make, tmp_path: Path) -> None:
    first, second = make("sweep/a", (100, 40.0)), make("sweep/b", (100, 40.0))
    before = compare([first, second]).together[0]
    file = results_of(tmp_path / "sweep/results.jsonl", first, second, **vars(before))
    assert compare([file]).together == [before]
    assert compare([file]).notes == []
    run = RunDir.open(first, create=False)
    with run.lock():
        ledger = Ledger.open(run.privacy_dir / "ledger.jsonl")
        ledger.charge(stage="finetune", attempt=1, steps=50, planned=50, noise_multiplier=20.0, sample_rate=1.0,
                      clip_norm=1.0, random="os-entropy")  # fmt: skip
        run.keep_ledger_head(ledger.head)
    found = compare([file])
    assert found.together[0].epsilon > before.epsilon
    assert found.groups[0].epsilon == compare([first]).runs[0].epsilon > before.epsilon / 2
    (note,) = found.notes
    assert f"{first} has spent ε = " in note
    assert note in lines(found)


def test_another_run_in_the_place_of_a_recorded_one_is_not_taken_for_it(make: Make, tmp_path: Path) -> None:
    """It has spent less, and a row is known by the ledger that it was read from."""
    first, second = make("sweep/a", (100, 40.0)), make("sweep/b", (100, 40.0))
    before = compare([first, second]).together[0]
    file = results_of(tmp_path / "sweep/results.jsonl", first, second, **vars(before))
    for run in (first, second):
        shutil.rmtree(run)
        make(f"sweep/{run.name}", (10, 60.0))
    found = compare([file])
    assert found.together == [before]
    assert "not all runs of" in found.notes[0]
    _, lost, stored = comparing.earlier_rows(file)
    assert ([row.run for row in lost], stored) == ([str(first), str(second)], [before])
    older = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("\n".join(json.dumps({k: v for k, v in row.items() if k != "ledger_head"}) for row in older))
    assert compare([file]).together == [before]  # of a version that did not write it


def test_the_record_of_the_data_is_the_one_that_the_budget_was_fixed_with(make: Make) -> None:
    """Two files of another run, put into private/ together, fit each other."""
    runs = [make(name, (100, 40.0), images=name) for name in ("a", "b")]
    for run in runs:
        record = hash_of(run / "private/training-data.json")
        plan = json.loads((run / "privacy/plan.json").read_text()) | {"data_record": record}
        (run / "privacy/plan.json").write_text(json.dumps(plan))
        ledger = run / "privacy/ledger.jsonl"
        header = json.loads(ledger.read_text().splitlines()[0])
        assert "data_record" not in header["budget"]
        ledger.unlink()
        with RunDir.open(run, create=False).lock():
            begun = Ledger.create(ledger, 1000, budget=sealed_budget(plan))
            RunDir.open(run, create=False)._write_heads(begun.head, None)
            edited = json.loads((run / "run.json").read_text()) | {"ledger_head": begun.head}
            (run / "run.json").write_text(json.dumps(edited))
    assert [row.problem for row in compare(runs).runs] == [None, None]
    for name in ("training-data.json", "training-images.npy"):
        shutil.copy(runs[0] / "private" / name, runs[1] / "private" / name)
    with pytest.raises(CheckpointError, match="not the record that this run's budget was fixed with"):
        compare(runs)


def test_medmnist_files_of_another_size_have_the_same_images(make: Make) -> None:
    """Their pixels have nothing in common. The control: another set, and a user's file of such a name."""
    names = ("pneumoniamnist", "pneumoniamnist_64", "breastmnist_64", "npz:/data/pneumoniamnist_224")
    runs = [make(number, (100, 40.0), images=f"i{number}", data=name) for number, name in enumerate(names)]
    assert [each.runs for each in compare(runs).together] == [(str(runs[0]), str(runs[1]))]


def test_a_run_inside_a_run_is_found_and_an_unreadable_folder_is_refused(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("runs/a", (100, 40.0)), make("runs/a/second", (100, 40.0)), make("runs/a/second/deeper/third", (100, 40.0))
    make("runs/a/private/copy", (100, 40.0))  # of the run itself: nothing that it released
    names = [Path(row.run).relative_to(tmp_path / "runs").as_posix() for row in runs_in(tmp_path / "runs").runs]
    assert names == ["a", "a/second", "a/second/deeper/third"]
    assert len(runs_in(tmp_path / "runs/a").runs) == 3

    def walk(folder: Path, onerror: Callable[[OSError], None]) -> Iterator[tuple]:
        onerror(PermissionError(13, "denied", str(folder / "shut")))
        yield str(folder), [], []

    monkeypatch.setattr(os, "walk", walk)
    with pytest.raises(InputError, match="shut cannot be read"):
        runs_in(tmp_path / "runs")


def test_a_table_of_runs_names_those_that_are_gone(make: Make, tmp_path: Path) -> None:
    """Of a sweep, by its results; and it shows the largest ε alone. The control: all are there."""
    paths = [make(f"runs/sweep/{name}", (100, 40.0), data="scans") for name in "abc"]
    before = compare(paths)
    results_of(tmp_path / "runs/sweep/results.jsonl", *paths, **vars(before.together[0]))
    assert runs_in(tmp_path / "runs").together == before.together
    assert runs_in(tmp_path / "runs").notes == []
    shutil.rmtree(paths[0])
    found = runs_in(tmp_path / "runs")
    (note,) = found.notes
    assert f"{paths[0]}, which had spent ε = " in note
    (together,) = found.together
    assert together.runs == tuple(map(str, paths))
    assert together.epsilon >= before.together[0].epsilon
    assert str(together.runs[0]) in lines(found)
    (tmp_path / "runs/results.jsonl").write_text('{"accuracy": 1}\n')  # of something else
    assert any("runs that are gone are not counted" in each for each in runs_in(tmp_path / "runs").notes)


def test_a_run_that_is_named_twice_is_shown_once(make: Make) -> None:
    shown = comparing._names(["a", "b", "a", *"cdefghi"])
    assert shown == "a (2 times), b, c, d, e, f and 3 more"


def test_runs_that_were_deleted_and_made_again_count_twice(make: Make, tmp_path: Path) -> None:
    """Under the same paths, with the same ε. The control: nothing is gone."""
    paths = [make(f"sweep/{name}", (100, 40.0)) for name in "ab"]
    before = compare(paths)
    file = results_of(tmp_path / "sweep/results.jsonl", *paths, **vars(before.together[0]))
    rows, lost, _ = comparing.earlier_rows(file)
    assert comparing.with_lost(rows, lost, before.together) == []
    for path in paths:
        shutil.rmtree(path)
        make(f"sweep/{path.name}", (100, 40.0))
    _, lost, _ = comparing.earlier_rows(file)
    after = compare(paths)
    assert after.together == before.together
    present = [replace(row, data="scans") for row in after.runs]
    (both,) = comparing.with_lost(present, lost, after.together)
    assert both.runs == tuple(map(str, paths * 2))
    assert both.epsilon == pytest.approx(sum(row.epsilon for row in lost) + after.together[0].epsilon)
    assert both.delta == pytest.approx(3e-5)
    (one,) = comparing.with_lost(present[:1], lost, [])
    assert one.epsilon == pytest.approx(3 * lost[0].epsilon)
    (alone,) = comparing.with_lost([], lost, [])
    assert (len(alone.runs), alone.delta) == (2, 2e-5)
    assert comparing.with_lost([], lost[:1], []) == []
    (unknown,) = comparing.with_lost(present, [replace(lost[0], epsilon=None)], after.together)
    assert unknown.epsilon is None


def test_results_of_two_machines_in_one_file_are_added_up(make: Make, tmp_path: Path) -> None:
    """Their runs have the same paths, and are not there. The control: the lines of one machine, also twice."""
    lines_of = []
    for _ in range(2):
        paths = [make(f"sweep/{name}", (100, 40.0)) for name in "xy"]
        found = compare(paths)
        file = results_of(tmp_path / "sweep/results.jsonl", *paths, **vars(found.together[0]))
        lines_of.append(file.read_text())
        shutil.rmtree(tmp_path / "sweep")
    (tmp_path / "merged").mkdir()
    one, both, bare = (tmp_path / "merged" / name for name in ("one.jsonl", "both.jsonl", "bare.jsonl"))
    one.write_text("\n".join([lines_of[0], lines_of[0]]))
    both.write_text("\n".join(lines_of))
    bare.write_text("\n".join(line for line in lines_of[0].splitlines() if "together" not in json.loads(line)))
    each = found.runs[0].epsilon
    assert max(total.epsilon for total in compare([one]).together) == found.together[0].epsilon
    assert max(total.epsilon for total in compare([both]).together) == pytest.approx(4 * each)
    assert [total.epsilon for total in compare([bare]).together] == [pytest.approx(2 * each)]


def test_two_copies_of_a_run_that_go_on_have_different_ledgers(make: Make, tmp_path: Path) -> None:
    """Also where they do the same, so that neither is taken for the other."""
    first = make("a", (100, 40.0))
    shutil.copytree(first, tmp_path / "b")
    heads = []
    for name in "ab":
        ledger = Ledger.open(tmp_path / name / "privacy/ledger.jsonl")
        ledger.charge(stage="finetune", attempt=1, steps=50, planned=50, noise_multiplier=20.0, sample_rate=1.0,
                      clip_norm=1.0, random="os-entropy")  # fmt: skip
        heads.append(ledger.head)
    assert heads[0] != heads[1]
