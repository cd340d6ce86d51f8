"""Promises 10 and 12, inside ``privacy``: charged before used, and a ledger that cannot be edited unnoticed."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from dprandp.errors import CheckpointError, StorageError, UsageError
from dprandp.privacy import ledger as ledger_line
from dprandp.privacy.accounting import GaussianEvent, compose
from dprandp.privacy.adaptive import compose_stages
from dprandp.privacy.ledger import FIRST_PREVIOUS, FORMAT, Ledger, seal

VALUES = {"planned": 100, "noise_multiplier": 9.25, "sample_rate": 0.08192, "clip_norm": 1.0, "random": "os-entropy"}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


@pytest.fixture
def filled(path):
    ledger = Ledger.create(path, examples=50_000)
    ledger.charge(stage="probe", attempt=1, steps=60, **{**VALUES, "sample_rate": 1.0, "noise_multiplier": 40.0})
    for _ in range(3):
        ledger.charge(stage="finetune", attempt=1, steps=2, **VALUES)
    ledger.charge(stage="finetune", attempt=2, steps=5, **VALUES)
    return ledger


def lines_of(path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def test_a_reopened_ledger_holds_what_was_paid(filled, path):
    again = Ledger.open(path)
    assert again.charges == filled.charges
    assert again.head == filled.head
    assert again.events() == [GaussianEvent(9.25, 0.08192, 11), GaussianEvent(40.0, 1.0, 60)]
    planned = [GaussianEvent(9.25, 0.08192, 100)]  # sampled batches count as planned
    whole = [[GaussianEvent(40.0, 1.0, 60)], planned, planned]
    assert again.stages() == whole
    assert again.stages(besides=[("finetune", 2)]) == whole[:2]
    assert (again.charged_steps("finetune", 1), again.charged_steps("finetune", 2)) == (6, 5)
    assert (again.last_attempt("finetune"), again.last_attempt("audit")) == (2, 0)
    assert again.examples == 50_000
    assert again.header["adjacency"] == "zero-out"
    assert again.header["data_unit"] == "image"
    assert filled.spent(1e-5) == compose_stages(filled.stages(), 1e-5)
    assert filled.spent(1e-5).upper > compose(filled.events(), 1e-5).upper


def test_a_header_that_says_something_else_is_refused(path):
    with pytest.raises(CheckpointError, match="missing"):
        Ledger.open(path)
    body = {"kind": "header", "format": FORMAT, "data_unit": "image", "adjacency": "zero-out", "examples": 10}
    path.write_bytes(seal(body | {"budget": None}, FIRST_PREVIOUS)[0])
    assert Ledger.open(path).examples == 10
    for changes, words in (
        ({}, "what the budget is"), ({"budget": 2.0}, "what the budget is"),
        ({"format": 1}, f"has format 1; this version reads {FORMAT}"), ({"format": 99}, "format 99"),
        *(({"budget": None, "adjacency": other}, "relation of neighbours") for other in ("add-remove", None)),
    ):  # fmt: skip
        path.write_bytes(seal(body | changes, FIRST_PREVIOUS)[0])
        with pytest.raises(CheckpointError, match=words):
            Ledger.open(path)


def test_the_budget_is_sealed_with_the_header(path):
    Ledger.create(path, examples=10, budget={"epsilon": 2.0, "delta": 1e-5})
    assert Ledger.open(path).budget == {"epsilon": 2.0, "delta": 1e-5}
    path.write_bytes(path.read_bytes().replace(b'"epsilon":2.0', b'"epsilon":9.0'))
    with pytest.raises(CheckpointError, match=r"Line 1 .*was changed after it was written"):
        Ledger.open(path)


def test_a_charge_is_on_disk_before_it_returns(path, monkeypatch):
    order = []
    ledger = Ledger.create(path, examples=10, fault_point=order.append)
    real = os.fsync

    def fsync(descriptor):
        order.append(("fsync", path.read_bytes().count(b"\n")))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    ledger.charge(stage="probe", attempt=1, steps=1, **VALUES)
    order.append(("returned", len(ledger.charges)))
    assert order == ["ledger.appended", ("fsync", 2), "ledger.fsynced", ("returned", 1)]


def test_the_stamp_of_repeatable_randomness_or_missing_noise_never_goes_away(path):
    ledger = Ledger.create(path, examples=10)
    assert ledger.private
    ledger.charge(stage="probe", attempt=1, steps=1, **{**VALUES, "random": "insecure-seed"})
    ledger.charge(stage="probe", attempt=1, steps=1, **VALUES)
    assert not ledger.private
    assert not Ledger.open(path).private
    noiseless = Ledger.create(path.with_name("other.jsonl"), examples=10)
    noiseless.charge(stage="probe", attempt=1, steps=1, **{**VALUES, "noise_multiplier": 0.0})
    assert not noiseless.private
    assert noiseless.spent(1e-5).upper == float("inf")


# ---------------------------------------------------------------- edits


def edited(text: bytes, number: int) -> list[bytes]:
    rows = text.splitlines(keepends=True)
    rows[number - 1] = rows[number - 1].replace(b"9.25", b"19.25").replace(b"40.0", b"41.0").replace(b"50000", b"60000")
    return rows


@pytest.mark.parametrize("number", range(1, 7))
def test_a_line_that_was_edited_removed_or_moved_is_named(filled, path, number):
    rows = lines_of(path)
    changed = edited(path.read_bytes(), number)
    assert changed != rows
    removed, swapped = rows[: number - 1] + rows[number:], rows.copy()
    swapped[number - 1 : number + 1] = reversed(swapped[number - 1 : number + 1])
    for found in (changed, *([removed, swapped] if number < 6 else [])):
        path.write_bytes(b"".join(found))
        with pytest.raises(CheckpointError, match=f"Line {number} ") as caught:
            Ledger.open(path)
        assert caught.value.exit_code == 4


def test_a_line_repeated_or_taken_from_another_ledger_is_named(filled, path, tmp_path):
    rows = lines_of(path)
    path.write_bytes(b"".join([*rows, rows[-1]]))
    with pytest.raises(CheckpointError, match="Line 7 "):
        Ledger.open(path)
    other = Ledger.create(tmp_path / "other.jsonl", examples=9)
    other.charge(stage="probe", attempt=1, steps=60, **VALUES)
    path.write_bytes(b"".join([*rows, lines_of(other.path)[1]]))
    with pytest.raises(CheckpointError, match="Line 7 "):
        Ledger.open(path)


def test_what_is_no_ledger_is_refused(path):
    for text in (b"", b"\n", b"{}\n", b"not json\n", b"\xff\xfe\n", b"[1]\n", b"NaN\n", b'{"kind":"header"'):
        path.write_bytes(text)
        with pytest.raises(CheckpointError, match="Line 1 "):
            Ledger.open(path)


def test_every_flipped_byte_of_a_complete_line_is_found(filled, path):
    data = path.read_bytes()
    for position in range(0, len(data) - 1, 7):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(CheckpointError):
            Ledger.open(path)


def test_lines_cut_off_the_end_are_found_by_the_head_kept_elsewhere(filled, path):
    head = filled.head
    assert Ledger.open(path).includes(head)
    path.write_bytes(b"".join(lines_of(path)[:-1]))
    assert not Ledger.open(path).includes(head)


# ---------------------------------------------------------------- torn lines


def test_a_line_torn_anywhere_is_repaired_aloud_and_never_counts_more_than_it_cost(filled, path):
    data = path.read_bytes()
    start = data.rindex(b"\n", 0, len(data) - 1) + 1
    before = data.count(b"\n") - 2
    outcomes = set()
    for cut in range(start + 1, len(data)):
        path.write_bytes(data[:cut])
        said: list[str] = []
        if data[:cut].endswith(b"}") and cut < len(data) - 1:
            continue  # no such place inside a charge
        ledger = Ledger.open(path, warn=said.append)
        assert len(said) == 1
        assert "Line 6" in said[0]
        counted = len(ledger.charges) - before
        outcomes.add(counted)
        assert ledger.charged_steps("finetune", 2) == (5 if counted else 0)
        assert counted == ("counted" in said[0] or "kept" in said[0])
        if b'"random":"os-entropy",' in data[start:cut]:
            assert counted == 1  # everything that costs can be read: it is charged
        if cut % 5:
            continue  # that the ledger goes on is slow to see: not after every cut
        quiet: list[str] = []
        again = Ledger.open(path, warn=quiet.append)
        assert quiet == []
        assert again.charges == ledger.charges
        again.charge(stage="finetune", attempt=2, steps=1, **VALUES)
        assert len(Ledger.open(path).charges) == len(ledger.charges) + 1
    assert outcomes == {0, 1}


def test_reading_only_repairs_nothing_but_counts(filled, path):
    data = path.read_bytes()[:-10]
    path.write_bytes(data)
    said: list[str] = []
    ledger = Ledger.open(path, read_only=True, warn=said.append)
    assert said
    assert path.read_bytes() == data
    assert ledger.charged_steps("finetune", 2) == 5
    with pytest.raises(UsageError, match="reading only"):
        ledger.charge(stage="probe", attempt=1, steps=1, **VALUES)


def test_a_torn_line_with_senseless_values_is_refused(filled, path):
    torn = lines_of(path)[-1].replace(b'"step":0', b'"step":3')[:-80]
    path.write_bytes(b"".join(lines_of(path)[:-1]) + torn)
    with pytest.raises(CheckpointError, match="Line 6 "):
        Ledger.open(path)


def test_zeros_after_a_power_cut_are_a_torn_line(filled, path):
    *whole, last = lines_of(path)
    for left in (bytes(len(last)), last[:90] + bytes(len(last) - 90)):
        path.write_bytes(b"".join(whole) + left)
        said: list[str] = []
        assert len(Ledger.open(path, warn=said.append).charges) == len(whole) - 1
        assert "cut off" in said[0]
        assert path.read_bytes() == b"".join(whole)


def test_an_end_that_no_cut_can_have_left_is_refused(filled, path):
    lines = lines_of(path)
    for end in (
        b"\x07\xfe" * 50,  # other bytes over charged lines
        lines[-1][:90] + b"\xff",
        lines[-1][1:90],
        bytes(len(lines[-1]) + len(lines[-2])),  # zeros over two lines
        lines[-2][:90] + lines[-2][:90] * 10,  # longer than a line
    ):
        path.write_bytes(b"".join(lines[:-2]) + end)
        with pytest.raises(CheckpointError, match=r"Line 5 .* not the beginning of a line"):
            Ledger.open(path)


def test_no_charge_is_longer_than_a_torn_line_may_be(path):
    ledger = Ledger.create(path, examples=2**53)
    lengthy = {
        "noise_multiplier": 1.2345678901234567e-100,
        "sample_rate": 1.2345678901234567e-100,
        "clip_norm": 1.2345678901234567e-100,
    }
    ledger.charge(
        stage="finetune", attempt=2**53, steps=2**53, planned=2**53, random="insecure-seed", noise="discrete", **lengthy
    )
    assert len(lines_of(path)[-1]) + len(b',"repaired":true') < ledger_line._LONGEST_LINE


# ---------------------------------------------------------------- writing


def test_an_existing_ledger_is_never_replaced(filled, path):
    data = path.read_bytes()
    with pytest.raises(StorageError, match="exists"):
        Ledger.create(path, examples=1)
    assert path.read_bytes() == data


def test_a_second_writer_is_noticed(filled, path):
    other = Ledger.open(path)
    other.charge(stage="probe", attempt=2, steps=1, **VALUES)
    with pytest.raises(StorageError, match="somebody else") as caught:
        filled.charge(stage="probe", attempt=2, steps=1, **VALUES)
    assert caught.value.exit_code == 6
    assert len(Ledger.open(path).charges) == 6


@pytest.mark.parametrize("written", [0, 30, None])
def test_a_full_disk_stops_everything_until_the_ledger_is_opened_again(filled, path, monkeypatch, written):
    """None: ``write`` takes a part and says so, without an error."""
    real, charges = os.write, filled.charges

    def full(descriptor, line):
        done = real(descriptor, line[: len(line) // 4 if written is None else written])
        if written is None:
            return done
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StorageError, match="whole" if written is None else "No space left"):
        filled.charge(stage="finetune", attempt=2, steps=1, **VALUES)
    monkeypatch.undo()
    with pytest.raises(StorageError):
        filled.charge(stage="finetune", attempt=2, steps=1, **VALUES)
    assert filled.charges == charges
    said: list[str] = []
    assert Ledger.open(path, warn=said.append).charged_steps("finetune", 2) == 5
    assert ("dropped" in "".join(said)) == (written != 0)


def test_a_failed_fsync_means_no_charge_was_confirmed(filled, path, monkeypatch):
    def broken(descriptor):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(StorageError, match="Input/output error"):
        filled.charge(stage="finetune", attempt=2, steps=1, **VALUES)
    monkeypatch.undo()
    assert Ledger.open(path).charged_steps("finetune", 2) == 6  # charged, though it was not used


def test_senseless_charges_are_refused_and_not_written(filled, path):
    data = path.read_bytes()
    for change in (
        {"stage": 'a"b'}, {"attempt": 0}, {"steps": 0}, {"steps": 101}, {"random": "luck"}, {"sample_rate": 0.0},
        {"noise_multiplier": -1.0}, {"noise": "loud"},
    ):  # fmt: skip
        with pytest.raises(UsageError):
            filled.charge(**{"stage": "probe", "attempt": 1, "steps": 1, **VALUES, **change})
    assert path.read_bytes() == data


# -------------------------------------------------------------------------------------------------- seals of results


def test_a_seal_costs_nothing_and_the_latest_counts(tmp_path: Path) -> None:
    ledger = Ledger.create(tmp_path / "ledger.jsonl", examples=10)
    ledger.charge(
        stage="probe", attempt=1, steps=3, noise_multiplier=4.0, sample_rate=1.0, clip_norm=1.0, random="os-entropy",
        planned=3,
    )
    before = ledger.events()
    ledger.seal_result(stage="probe", attempt=1, digest="a" * 64)
    ledger.seal_result(stage="probe", attempt=2, digest="b" * 64)
    again = Ledger.open(ledger.path)
    assert again.events() == ledger.events() == before
    assert (again.seals["probe"].attempt, again.seals["probe"].digest) == (2, "b" * 64)
    assert again.head == ledger.head
    assert again.private


@pytest.mark.parametrize("digest", ["", "a" * 63, "A" * 64, 7])
def test_a_seal_that_is_none_is_refused_on_reading(tmp_path: Path, digest: object) -> None:
    ledger = Ledger.create(tmp_path / "ledger.jsonl", examples=10)
    line, _ = ledger_line.seal({"kind": "result", "stage": "probe", "attempt": 1, "digest": digest}, ledger.head)
    ledger.path.write_bytes(ledger.path.read_bytes() + line)
    with pytest.raises(CheckpointError, match="Line 2"):
        Ledger.open(ledger.path)


def test_a_torn_seal_is_dropped_and_a_charge_before_it_stays(tmp_path: Path) -> None:
    ledger = Ledger.create(tmp_path / "ledger.jsonl", examples=10)
    ledger.charge(
        stage="probe", attempt=1, steps=3, noise_multiplier=4.0, sample_rate=1.0, clip_norm=1.0, random="os-entropy",
        planned=3,
    )
    whole = ledger.path.read_bytes()
    ledger.seal_result(stage="probe", attempt=1, digest="a" * 64)
    torn = ledger.path.read_bytes()
    for end in range(len(whole) + 1, len(torn)):
        ledger.path.write_bytes(torn[:end])
        said: list[str] = []
        opened = Ledger.open(ledger.path, warn=said.append)
        assert opened.charged_steps("probe", 1) == 3
        assert said


def test_no_more_steps_than_the_attempt_was_planned_to_make(tmp_path: Path) -> None:
    ledger = Ledger.create(tmp_path / "ledger.jsonl", examples=10)
    ledger.charge(stage="probe", attempt=1, steps=99, **VALUES)
    before = ledger.path.read_bytes()
    with pytest.raises(UsageError, match="impossible"):
        ledger.charge(stage="probe", attempt=1, steps=2, **VALUES)
    assert ledger.path.read_bytes() == before
    ledger.charge(stage="probe", attempt=1, steps=1, **VALUES)


# ------------------------------------------------------------------------------------------------------------ beginning


def test_a_ledger_never_takes_the_place_of_one_that_was_begun_meanwhile(path, monkeypatch):
    """Another process begins and charges it after this one looked, and before this one has written."""
    link, others = os.link, []

    def late(old, new):
        monkeypatch.setattr(os, "link", link)
        others.append(Ledger.create(path, examples=10))
        others[0].charge(stage="head", attempt=1, steps=2, **VALUES)
        link(old, new)

    monkeypatch.setattr(os, "link", late)
    with pytest.raises(StorageError, match="exists already"):
        Ledger.create(path, examples=10)
    assert Ledger.open(path).charges == others[0].charges
    assert [each.name for each in path.parent.iterdir()] == [path.name]  # nothing is left behind


def test_so_it_is_where_the_disk_knows_no_links(path, monkeypatch):
    def none(old, new):
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(os, "link", none)
    made = Ledger.create(path, examples=10)
    made.charge(stage="head", attempt=1, steps=2, **VALUES)
    with pytest.raises(StorageError):
        Ledger.create(path, examples=10)
    assert Ledger.open(path).charges == made.charges


def _begin(path, ready, told):
    ready.wait()
    try:
        Ledger.create(path, examples=10).charge(stage="head", attempt=1, steps=2, **VALUES)
    except (StorageError, CheckpointError):
        told.put(0)
    else:
        told.put(1)


def test_of_processes_that_begin_a_ledger_at_once_the_charges_of_all_that_succeed_are_in_it(path):
    fork = multiprocessing.get_context("fork")
    for trial in range(20):
        ready, told, own = fork.Barrier(3), fork.Queue(), path.with_name(f"{trial}.jsonl")
        processes = [fork.Process(target=_begin, args=(own, ready, told)) for _ in range(3)]
        for process in processes:
            process.start()
        succeeded = sum(told.get(timeout=60) for _ in processes)
        for process in processes:
            process.join()
        assert succeeded == len(Ledger.open(own).charges) == 1


def test_links_to_a_ledger_that_is_still_to_come_are_links_to_one_ledger(path):
    first, second = path.with_name("first"), path.with_name("second")
    for link in (first, second):
        link.symlink_to(path)
    Ledger.create(first, examples=10).charge(stage="head", attempt=1, steps=2, **VALUES)
    assert first.is_symlink()
    with pytest.raises(StorageError, match="exists already"):
        Ledger.create(second, examples=10)
    assert Ledger.open(second).charged_steps("head", 1) == Ledger.open(path).charged_steps("head", 1) == 2


@pytest.mark.parametrize("path", ["/dev/full", "/dev/zero", "/"])
def test_a_device_or_a_folder_is_no_ledger(path: str) -> None:
    """/dev/zero would be read without an end."""
    with pytest.raises(CheckpointError, match="not a regular file"):
        Ledger.open(Path(path))
