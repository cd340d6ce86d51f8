"""Promise 16 for functions and stages: sums, features, images and steps are one process's, for any number of ranks.

Whole commands, ranks that die or hang, exit codes and torchrun are in tests/faults/test_ranks_*.py.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rank_processes import FailedRank, context_of, of_rank_0, on_ranks
from safetensors.torch import load_file
from small_models import CLIP, SETTING, STEP, apart, gradient_by_hand, images_and_labels, model_of, norm_of, scaled
from tiny_run import FINETUNE, GENERATE, PROBE, Copy, Recorder, blobs, read_json
from torch import Tensor

from dprandp import finetune, generate, probe
from dprandp.config.schema import PretrainConfig, build
from dprandp.dpsgd import clipped_sums
from dprandp.dpsgd import features as extraction
from dprandp.dpsgd.clipped_sums import ClippedSums, SumSettings, share_of
from dprandp.dpsgd.units import UnitRows
from dprandp.errors import InputError
from dprandp.models.extractor import build_extractor, extract
from dprandp.pretrain import contrastive
from dprandp.privacy.clipping import sum_of_clipped
from dprandp.runs import parallel
from dprandp.runs.parallel import ALONE, Ranks
from dprandp.runs.results import GenerateResult


def totals_over(ranks: Ranks, arch: str, batches: list[np.ndarray], settings: SumSettings = SETTING) -> list[dict]:
    """The clipped sum of each batch; ranks but rank 0 have other parameters until they are given rank 0's."""
    found, (images, labels) = [], images_and_labels()
    for records in batches:
        model = model_of(arch)
        parameters = {name: value + ranks.rank for name, value in scaled(model).items()}
        share = share_of(ranks, records, images, labels, None)
        found.append(ClippedSums(model, settings).over_ranks(ranks, parameters, STEP, share))
    return found


def by_hand(arch: str, records: np.ndarray) -> dict[str, Tensor]:
    """One record after another: its gradient by automatic differentiation, a clip, a sum."""
    total: dict[str, Tensor] = {}
    for record in records.tolist():
        gradient = gradient_by_hand(arch, record)
        for name, value in gradient.items():
            total[name] = total.get(name, 0) + value * min(1, CLIP / norm_of(gradient))
    return total


# --------------------------------------------------------------------------------------------------------------- shares


@given(size=st.integers(1, 9), block=st.integers(1, 5), count=st.integers(0, 40))
def test_16_every_row_is_in_exactly_one_share(size: int, block: int, count: int) -> None:
    shares = Ranks(None, 0, size).shares(count, block)
    assert len(shares) == size
    assert [row for share in shares for row in range(count)[share]] == list(range(count))
    assert all(share.start % block == 0 for share in shares if share.start < count)
    sizes = [share.stop - share.start for share in shares]
    assert max(sizes) - min(sizes) <= block + (count % block > 0) * block


def test_16_a_unit_is_never_cut() -> None:
    images, labels = torch.zeros(10, 3, 32, 32, dtype=torch.uint8), torch.arange(10)
    rows = UnitRows(np.arange(8), np.array([0, 1, 3, 4, 6, 7]))
    for size in (1, 2, 3, 7):
        shares = [share_of(Ranks(None, rank, size), np.arange(5), images, labels, rows) for rank in range(size)]
        assert sum(share.records for share in shares) == 5
        assert all(int(share.sizes.sum()) == len(share.members) for share in shares)
        assert torch.cat([share.sizes for share in shares]).tolist() == [1, 2, 1, 2, 1]


# ----------------------------------------------------------------------------------------------------------------- sums


@pytest.mark.parametrize("arch", ["patchnet", pytest.param("wrn-10-1", marks=pytest.mark.slow)])
def test_16_the_clipped_sum_of_several_ranks_is_that_of_one_by_hand(arch: str) -> None:
    records, none = np.array([3, 77, 119]), np.array([], dtype=np.int64)
    oracle = by_hand(arch, records)
    for size in (1, 5):  # with 5 ranks, two shares are empty
        whole, fewer, empty = of_rank_0(size, totals_over, arch, [records, records[:-1], none])
        assert apart(whole, oracle) < 1e-4
        assert apart(fewer, oracle) > 1e-2  # the oracle would see a lost record
        assert empty.keys() == oracle.keys()
        assert all(value.dtype == torch.float64 and not value.any() for value in empty.values())


def test_4_sensitivity_over_ranks() -> None:
    """A record more or less changes the sum by at most C, also where it moves others from rank to rank."""
    settings = replace(SETTING, precise=True, clip_norm=1e-3)
    records = np.array([1, 8, 30, 31, 60, 61, 90])
    batches = [records, *(np.delete(records, left_out) for left_out in (0, 3, 6))]
    whole, *others = of_rank_0(3, totals_over, "patchnet", batches, settings)
    for fewer in others:
        moved = norm_of({name: whole[name] - fewer[name] for name in whole})
        assert 0.9e-3 < moved <= 1e-3 * (1 + 1e-6)


def broken_sum(kind: str) -> Callable:
    honest = sum_of_clipped

    def broken(gradients, parameters, clip_norm, **options):
        if kind == "not clipped":
            return honest(gradients, parameters, 1e6)
        total = honest(gradients, parameters, clip_norm, **options)
        if kind == "noise of its own":
            return {name: value + clip_norm * torch.randn(value.shape) for name, value in total.items()}
        if kind == "not a number":
            return {name: value * math.nan for name, value in total.items()}
        return {name: value.float() for name, value in total.items()}

    return broken


class Unheard(Ranks):
    """One of two ranks; what it would add to the sum is kept."""

    def broadcast(self, tensors) -> None:
        pass

    def reduce(self, tensors) -> None:
        self.added = tensors


def bytes_over(ranks: Ranks, arch: str, batches: list[np.ndarray]) -> int:
    """What a rank sends or receives of tensors while the clipped sums of some batches are made."""
    moved = []
    for name in ("broadcast", "reduce"):
        exchange = getattr(parallel.dist, name)

        def counting(tensor: Tensor, *given: object, exchange: Callable = exchange) -> None:
            moved.append(tensor.numel() * tensor.element_size())
            exchange(tensor, *given)

        setattr(parallel.dist, name, counting)
    totals_over(ranks, arch, batches)
    return sum(moved)


@pytest.mark.parametrize("size", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_16_a_step_moves_twelve_bytes_a_parameter_whatever_the_ranks_and_the_batch(size: int) -> None:
    """Parameters as float32, and sums as float64."""
    count = sum(value.numel() for value in model_of("patchnet").parameters())
    batches = [np.arange(2), np.arange(8), np.arange(0)]
    assert on_ranks(size, bytes_over, "patchnet", batches) == [12 * count * len(batches)] * size


@pytest.mark.parametrize("kind", ["not clipped", "noise of its own", "not a number", "other type"])
def test_16_a_share_that_is_no_sum_of_clipped_gradients_is_refused(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    ranks = Unheard(None, 1, 2)
    totals_over(ranks, "patchnet", [np.arange(6)])
    assert vars(ranks).pop("added")
    monkeypatch.setattr(clipped_sums, "sum_of_clipped", broken_sum(kind))
    with pytest.raises(RuntimeError, match="a rank's sum"):
        totals_over(ranks, "patchnet", [np.arange(6)])
    assert not hasattr(ranks, "added")


def broken_on_rank_1(ranks: Ranks) -> None:
    if ranks.rank == 1:
        clipped_sums.sum_of_clipped = broken_sum("noise of its own")
    totals_over(ranks, "patchnet", [np.arange(6)])


def test_16_the_others_release_nothing_of_such_a_step() -> None:
    first, broken = on_ranks(2, broken_on_rank_1)
    assert (first.args[0], broken.args[0]) == ("RankLostError", "RuntimeError")


# --------------------------------------------------------------------------------------------------- collectives


def everything(ranks: Ranks) -> None:
    """Each collective once; every rank checks what it has then."""
    assert ranks.first(lambda: {"rank": ranks.rank}) == {"rank": 0}
    assert ranks.first(lambda: object, told=lambda made: "word") == (object if ranks.is_first else "word")
    tensors = [torch.full((2, 3), float(ranks.rank)), torch.tensor([ranks.rank > 0, True]), torch.tensor(ranks.rank)]
    tensors.append(torch.arange(6.0).view(2, 3).T + ranks.rank)  # not contiguous
    ranks.broadcast(tensors)
    assert not tensors[0].any()
    assert tensors[1].tolist() == [False, True]
    assert tensors[2] == 0
    assert torch.equal(tensors[3], torch.arange(6.0).view(2, 3).T)
    for rows in ([], [7, 2**40]):
        given = torch.tensor(rows, dtype=torch.int64)
        assert ranks.broadcast_rows(given if ranks.is_first else None).tolist() == rows
    sums = {"a": torch.ones(2, 2, dtype=torch.float64), "b": torch.tensor(float(ranks.rank), dtype=torch.float64)}
    ranks.reduce(sums)
    if ranks.is_first:
        assert sums["a"].tolist() == [[3.0, 3.0], [3.0, 3.0]]
        assert sums["b"] == 3
    total = torch.tensor([1.0, ranks.rank])
    ranks.all_reduce(total)
    assert total.tolist() == [3.0, 3.0]
    own = torch.full((ranks.rank, 2), ranks.rank, dtype=torch.uint8)
    for everywhere in (False, True):
        parts = ranks.gather(own, [0, 1, 2], everywhere=everywhere)
        expected = [[], [[1, 1]], [[2, 2]] * 2] if everywhere or ranks.is_first else []
        assert [part.tolist() for part in parts] == expected
    ranks.refuse_different("thing", lambda: "ab" * 32)
    with pytest.raises(InputError, match="the 3 processes do not have the same thing"):
        ranks.refuse_different("thing", lambda: f"a{ranks.rank}" * 32)


def in_folders(ranks: Ranks, *folders: Path) -> None:
    parallel.SEEN_WITHIN = 1.0
    ranks.require_one_folder(folders[ranks.rank])


def test_16_copies_of_a_run_directory_are_not_one(tmp_path: Path) -> None:
    """Each would have its own ledger; also where a copy has the file of an earlier job."""
    copies = [tmp_path / name for name in "ab"]
    for copy in copies:
        copy.mkdir()
    assert on_ranks(2, in_folders, copies[0], copies[0]) == [None, None]
    shutil.copy(copies[0] / ".shared", copies[1])
    for failed in on_ranks(2, in_folders, *copies):
        assert isinstance(failed, FailedRank)
        assert "do not work in the same run directory" in str(failed)


def test_16_collectives() -> None:
    assert on_ranks(3, everything) == [None] * 3


def test_tensors_of_accelerators_are_preceded_by_a_meeting_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL does not notice that a process is gone; gloo does."""
    done = []
    monkeypatch.setattr(parallel.dist, "all_reduce", lambda tensor: done.append(tensor.device.type))
    ranks = Ranks(None, 0, 2)
    for is_cuda in (False, True):
        ranks._collective(lambda: done.append("exchange"), SimpleNamespace(is_cuda=is_cuda))
    assert done == ["exchange", "cpu", "exchange"]


# ----------------------------------------------------------------------------------------------------- whole stages


def private_stages(ranks: Ranks, run: Path, *settings: dict) -> None:
    """Probe, then fine-tune."""
    recorder = Recorder(run)
    with pytest.MonkeyPatch.context() as patch, context_of(ranks, run, insecure_seed=1) as context:
        recorder.install(patch)
        for name, stage, values in zip(("probe", "finetune"), (probe, finetune), settings, strict=True):
            assert (stage.run(build(name, values), context) is None) != ranks.is_first
    assert ranks.is_first or not (recorder.draws or recorder.releases)  # rank 0 alone draws and adds noise


@pytest.mark.slow
def test_16_units_of_several_images(copy: Copy, public_run: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "patients.npz", **blobs(), patient_train=np.arange(120) // 4)
    given = {"data": f"npz:{tmp_path / 'patients.npz'}", "unit_column": "patient"}
    settings = [PROBE | given | {"steps": 2}]
    settings.append(FINETUNE | given | {"batch_size": 7, "noise": "discrete", "refit_steps": 0})
    released = []
    for size in (1, 3):
        run = copy(public_run)
        of_rank_0(size, private_stages, run, *settings)
        released.append(load_file(run / "model/model.safetensors"))
    assert apart(released[1], released[0]) < 1e-5


# --------------------------------------------------------------------------------------------------- the public stages


def features_over(ranks: Ranks, count: int) -> list[tuple[Tensor, int]]:
    """Features of some images, with and without whitener, and how many were reported as done."""
    extraction.BATCH, extraction.ROUND = 8, 16
    model, found = model_of("patchnet"), []
    images, _ = images_and_labels(count)
    for whitener, mirror in ((model.whitener, True), (None, False)):
        done: list[int] = []
        made = extraction.extract_by_ranks(ranks, model.extractor, images, whitener, mirror, done.append)
        found.append((made, sum(done)))
        assert ranks.is_first or len(made) == 0
    return found


def test_16_features_equal_those_of_one_process_to_the_bit() -> None:
    model, (images, _) = model_of("patchnet"), images_and_labels(75)
    whitened = extract(model.extractor, images, mirror=True, batch_size=8, after=model.whitener)
    plain = extract(model.extractor, images, mirror=False, batch_size=8)
    for size in (2, 5):
        for (made, done), alone in zip(of_rank_0(size, features_over, 75), (whitened, plain), strict=True):
            assert torch.equal(made, alone)
            assert done == len(images)
    assert [made.shape for made, _ in of_rank_0(2, features_over, 0)] == [(0, 20), (0, model.extractor.feature_dim)]


def rendered(ranks: Ranks, run: Path) -> GenerateResult | None:
    settings = build("generate", GENERATE | {"process": "perlin", "count": 900})
    with context_of(ranks, run) as given:
        return generate.run(settings, given)


def test_16_images_are_the_same_bytes(tmp_path: Path) -> None:
    manifests = []
    for size in (1, 2):
        assert of_rank_0(size, rendered, tmp_path / f"{size}").count == 900
        manifests.append(read_json(tmp_path / f"{size}/1-generate/manifest.json"))
    assert manifests[0] == manifests[1]
    assert len(manifests[0]["shards"]) > 2  # an odd number or not, the last round may leave a rank idle


TINY = PretrainConfig(
    arch="wrn-10-1", steps=3, batch_size=9, lr=1e-3, projection_hidden=32, projection_dim=16, momentum=0.9
)


def trained(ranks: Ranks, pictures: Tensor, config: PretrainConfig) -> tuple[list[float], dict[str, Tensor]]:
    network = build_extractor(config, torch.Generator().manual_seed(3 + ranks.rank))
    trainer = contrastive.ContrastiveTrainer(network, config, pictures, ranks)
    trainer.agree()  # with rank 0: the others begin with other weights
    losses = [float(trainer.step(step)) for step in range(config.steps)]
    return losses, trainer.state()


def selfish(ranks: Ranks, *given) -> tuple[list[float], dict[str, Tensor]]:
    """A rank that compares its own images alone."""
    ranks.gather = lambda own, counts, everywhere: [own if rank == ranks.rank else own[:0] for rank in range(2)]
    return trained(ranks, *given)


LATER = pytest.param(2, 12, 3, 5e-3, marks=pytest.mark.slow)  # later steps enlarge the rounding of the first


@pytest.mark.parametrize(("size", "count", "steps", "tolerance"), [(3, 2, 1, 1e-4), LATER])
def test_16_contrastive_steps_equal_those_of_one_process(size: int, count: int, steps: int, tolerance: float) -> None:
    random = np.random.default_rng(0)
    pictures = torch.from_numpy(random.integers(0, 255, (count, 3, 32, 32)).astype(np.uint8))
    config = replace(TINY, steps=steps, batch_size=count if count < 3 else TINY.batch_size)
    losses, state = trained(ALONE, pictures, config)  # of a batch of two images, one of three ranks has none
    together = on_ranks(size, trained, pictures, config)
    for theirs, theirs_after in together:
        assert theirs == pytest.approx(losses, rel=1e-3)
        assert apart(theirs_after, state) < tolerance  # gradients (the momentum) among it
        assert apart(theirs_after, together[0][1]) == 0  # the ranks stay equal to one another


def test_16_without_the_others_embeddings_the_loss_is_another() -> None:
    """The control: ranks that compare their own images alone, and average, do not equal one process."""
    pictures = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (12, 3, 32, 32)).astype(np.uint8))
    config = replace(TINY, steps=1)
    _, alone = trained(ALONE, pictures, config)
    assert apart(of_rank_0(2, selfish, pictures, config)[1], alone) > 0.05
