"""Promise 16, with the ranks in this process: sums, features, images and steps are one process's, for any number.

What needs processes of their own (a rank that dies, exit codes, torchrun) is in tests/faults/test_ranks_*.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rank_threads import DoneAtOnce, ThreadRank, in_threads
from safetensors.torch import load_file
from tiny_run import DEEP, GENERATE, Recorder, blobs, context, ledger_of, read_json, run_finetune, run_probe
from torch import Tensor

from dprandp import generate
from dprandp.config.schema import PretrainConfig, build
from dprandp.dpsgd import clipped_sums
from dprandp.dpsgd import features as extraction
from dprandp.dpsgd.clipped_sums import SETTINGS, ClippedSums, SumSettings, shares_of, unscaled
from dprandp.models.classifier import Classifier
from dprandp.models.extractor import build_extractor, extract
from dprandp.models.whitening import Whitener
from dprandp.pretrain import contrastive, wrn
from dprandp.privacy.clipping import sum_of_clipped
from dprandp.runs.parallel import ALONE, Ranks, shares
from dprandp.vision.images import to_input
from dprandp.vision.views import keyed_uniforms, private_views

Copy = Callable[[Path], Path]
Record = Callable[[Path], Recorder]
CLIP = 0.05
SETTING = SumSettings(scale=0.3, views=2, seed=5, flip=True, clip_norm=CLIP)


def model_of(arch: str) -> Classifier:
    generator = torch.Generator().manual_seed(1)
    settings = DEEP if arch == "deep" else {"arch": arch}
    extractor = build_extractor(PretrainConfig(filters=16, **settings), generator)
    whitener = Whitener(extractor.feature_dim, 20, extractor.parts)
    whitener.projection.normal_(generator=generator)
    model = Classifier(extractor, whitener, 3)
    model.head.data.normal_(generator=generator)
    return model


def scaled(model: Classifier) -> dict[str, Tensor]:
    return {
        name: value.detach().clone() / (SETTING.scale if name.startswith("extractor.") else 1)
        for name, value in model.named_parameters()
    }


def apart(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Distance over all tensors jointly, as a part of the joint norm."""
    assert left.keys() == right.keys()
    difference = math.sqrt(sum(float((left[name].double() - right[name].double()).square().sum()) for name in right))
    return difference / math.sqrt(sum(float(value.double().square().sum()) for value in right.values()))


def total_over(ranks: Ranks, arch: str, records: np.ndarray, rows=None, settings: SumSettings = SETTING):
    model = model_of(arch)
    made = blobs(3)
    images, labels = to_input(made["x_train"]), torch.from_numpy(made["y_train"])
    parameters = scaled(model)
    extraction.tell_model(ranks, model.extractor, model.whitener, model.head.shape[1])
    ranks.tell(SETTINGS, vars(settings))
    sums = ClippedSums(model, settings)
    return sums.over_ranks(ranks, parameters, 4, shares_of(ranks, records, images, labels, rows))


def by_hand(arch: str, records: np.ndarray) -> dict[str, Tensor]:
    """One record after another: its views, the mean of their losses, autograd, a clip, a sum."""
    model, made = model_of(arch), blobs(3)
    before = scaled(model)
    total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in before.items()}
    for record in records:
        image = to_input(made["x_train"][record : record + 1])
        views = private_views(image, 2, keyed_uniforms(np.array([record]), 4, 5, 2), flip=True)[0]
        leaves = {name: value.clone().requires_grad_() for name, value in before.items()}
        weights = {name: unscaled(name, value, SETTING.scale) for name, value in leaves.items()}
        scores = torch.func.functional_call(model, weights, (model.extractor.normalise(views),))
        label = torch.tensor([made["y_train"][record]] * 2)
        gradients = torch.autograd.grad(torch.nn.functional.cross_entropy(scores, label), list(leaves.values()))
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
        for name, gradient in zip(leaves, gradients, strict=True):
            total[name] += gradient.double() * min(1, CLIP / norm)
    return total


# --------------------------------------------------------------------------------------------------------------- shares


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("block", [1, 4])
def test_16_every_row_is_in_exactly_one_share(size: int, block: int) -> None:
    for count in range(40):
        shares = DoneAtOnce(size).shares(count, block)
        assert len(shares) == size
        assert [row for share in shares for row in range(count)[share]] == list(range(count))
        assert all(share.start % block == 0 for share in shares if share.start < count)
        sizes = [share.stop - share.start for share in shares]
        assert max(sizes) - min(sizes) <= block + (count % block > 0) * block
    assert ALONE.shares(5) == [slice(0, 5)]


def test_16_a_unit_is_never_cut() -> None:
    images, labels = torch.zeros(10, 3, 32, 32, dtype=torch.uint8), torch.arange(10)

    def rows(units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sizes = units % 2 + 1  # unit 3 has the images 30 and 31, modulo ten
        return np.concatenate([np.arange(u, u + s) % 10 for u, s in zip(units, sizes, strict=True)] or [units]), sizes

    for size in (1, 2, 3, 7):
        shares = shares_of(DoneAtOnce(size), np.arange(5), images, labels, rows)
        assert sum(share.records for share in shares) == 5
        assert all(int(share.sizes.sum()) == len(share.members) for share in shares)
        assert torch.cat([share.sizes for share in shares]).tolist() == [1, 2, 1, 2, 1]


# ----------------------------------------------------------------------------------------------------------------- sums


@pytest.mark.parametrize("arch", ["patchnet", pytest.param("wrn-10-1", marks=pytest.mark.slow)])
def test_16_the_clipped_sum_of_several_ranks_is_that_of_one_by_hand(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    records = np.array([3, 77, 119])
    oracle = by_hand(arch, records)
    for size in (1, 2, 5):  # with 5 ranks, two shares are empty
        assert apart(total_over(DoneAtOnce(size), arch, records), oracle) < 1e-4
    assert apart(total_over(DoneAtOnce(2), arch, records[:-1]), oracle) > 1e-2  # the oracle would see a lost record


@pytest.mark.parametrize("size", [1, 3])
def test_16_an_empty_batch_is_zeros(size: int) -> None:
    total = total_over(DoneAtOnce(size), "patchnet", np.array([], dtype=np.int64))
    assert total.keys() == scaled(model_of("patchnet")).keys()
    assert all(value.dtype == torch.float64 and not value.any() for value in total.values())


@pytest.mark.parametrize("precise", [pytest.param(False, marks=pytest.mark.slow), True])
def test_4_sensitivity_over_ranks(precise: bool) -> None:
    """A record more or less changes the sum by at most C, also where it moves others from rank to rank."""
    settings = SumSettings(**(vars(SETTING) | {"precise": precise, "clip_norm": 1e-3}))
    records = np.array([1, 8, 30, 31, 60, 61, 90])
    for size in (2, 3):
        whole = total_over(DoneAtOnce(size), "patchnet", records, settings=settings)
        for left_out in (0, 3, 6):
            fewer = total_over(DoneAtOnce(size), "patchnet", np.delete(records, left_out), settings=settings)
            moved = math.sqrt(sum(float((whole[name] - fewer[name]).square().sum()) for name in whole))
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


@pytest.mark.parametrize("kind", ["not clipped", "noise of its own", "not a number", "other type"])
def test_16_a_share_that_is_no_sum_of_clipped_gradients_is_refused(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    ranks, records = DoneAtOnce(2), np.arange(6)
    total_over(ranks, "patchnet", records)
    honest, broken = sum_of_clipped, broken_sum(kind)
    calls = []

    def on_rank_1(gradients, parameters, clip_norm, **options):
        calls.append(1)
        one = broken if len(calls) % 2 else honest  # the other rank is first
        return one(gradients, parameters, clip_norm, **options)

    monkeypatch.setattr(clipped_sums, "sum_of_clipped", on_rank_1)
    with pytest.raises(RuntimeError, match="a rank's sum"):
        total_over(ranks, "patchnet", records)


# ----------------------------------------------------------------------------------------------------- whole stages


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_16_probe_and_fine_tune_of_several_ranks_equal_those_of_one(
    copy: Copy, public_run: Path, data: str, record: Record, size: int
) -> None:
    released, seen = [], []
    for ranks in (ALONE, DoneAtOnce(size)):
        run = copy(public_run)
        options = {"insecure_seed": 1, "ranks": ranks}
        with pytest.MonkeyPatch.context() as patch:
            seen.append(Recorder(run).install(patch))
            run_probe(run, data, options, views=2)
            run_finetune(run, data, options, views=2)
        released.append(load_file(run / "model/model.safetensors"))
        charges = ledger_of(run).charges
        # one charge, one draw and one noisy release a step, on the leader alone
        assert sum(charge.steps for charge in charges) == len(seen[-1].draws) == len(seen[-1].releases) == 8 + 4 + 6
    assert apart(released[1], released[0]) < 1e-5
    for alone, together in zip(seen[0].releases, seen[1].releases, strict=True):
        assert np.array_equal(alone.indices, together.indices)
        assert torch.allclose(alone.noise, together.noise, atol=1e-4)
    tasks = {task for _, task, _ in ranks.sent}
    assert tasks == {"model", "features", "clipped-sums", "clipped-sums.parameters", "clipped-sums.share"}
    names = {name for _, task, names in ranks.sent if task.startswith("clipped-sums") for name in names}
    assert names == {"head", "extractor.weight", "extractor.bias", "images", "labels", "members"}


def test_16_noise_on_every_rank_would_be_noticed(
    copy: Copy, probed_run: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison above sees a rank that adds a little noise, too little to be refused."""
    honest, released = sum_of_clipped, []

    def faulty(*given, **options):
        return {name: value + 1e-3 * torch.randn(value.shape) for name, value in honest(*given, **options).items()}

    for used in (honest, faulty):
        monkeypatch.setattr(clipped_sums, "sum_of_clipped", used)
        run = copy(probed_run)
        run_finetune(run, data, {"insecure_seed": 1, "ranks": DoneAtOnce(2)}, refit_steps=0)
        released.append(load_file(run / "model/model.safetensors"))
    assert apart(*released) > 1e-5


@pytest.mark.slow
def test_16_units_of_several_images(copy: Copy, public_run: Path, tmp_path: Path) -> None:
    arrays = blobs()
    arrays["patient_train"], arrays["patient_test"] = np.arange(120) // 4, np.arange(40)
    np.savez(tmp_path / "patients.npz", **arrays)
    data, released = f"npz:{tmp_path / 'patients.npz'}", []
    for ranks in (ALONE, DoneAtOnce(3)):
        run = copy(public_run)
        options = {"insecure_seed": 1, "ranks": ranks}
        run_probe(run, data, options, unit_column="patient", steps=2)
        run_finetune(run, data, options, unit_column="patient", batch_size=7, noise="discrete", refit_steps=0)
        released.append(load_file(run / "model/model.safetensors"))
    assert apart(released[1], released[0]) < 1e-5


# --------------------------------------------------------------------------------------------------- the public stages


def test_16_features_equal_those_of_one_process_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extraction, "BATCH", 8)
    monkeypatch.setattr(extraction, "ROUND", 16)
    model = model_of("patchnet")
    images = to_input(blobs(3)["x_train"])[:75]
    for whitener, mirror in ((model.whitener, True), (None, False)):
        after = (lambda features: features) if whitener is None else whitener
        alone = extract(model.extractor, images, mirror=mirror, batch_size=8, after=after)
        for size in (2, 3, 5):
            done: list[int] = []
            made = extraction.extract_by_ranks(
                DoneAtOnce(size), model.extractor, images, whitener, mirror, done.append
            )
            assert torch.equal(made, alone)
            assert sum(done) == len(images)
    nothing = extraction.extract_by_ranks(DoneAtOnce(2), model.extractor, images[:0], None, False, done.append)
    assert nothing.shape == (0, model.extractor.feature_dim)


def test_16_images_are_the_same_bytes(tmp_path: Path, public_run: Path) -> None:
    settings = build("generate", GENERATE | {"process": "perlin", "count": 900})
    manifests = []
    for ranks in (ALONE, DoneAtOnce(2)):
        with context(tmp_path / f"{ranks.size}", ranks=ranks) as given:
            made = generate.run(settings, given)
            assert made["count"] == 900
            manifests.append(read_json(given.rundir.stage_dir("generate") / "manifest.json"))
    assert manifests[0] == manifests[1]
    assert len(manifests[0]["shards"]) > 2  # an odd number or not, the last round may leave a rank idle
    assert any(task == "render" for _, task, _ in ranks.sent)


TINY = PretrainConfig(
    arch="wrn-10-1", steps=3, batch_size=9, lr=1e-3, projection_hidden=32, projection_dim=16, momentum=0.9
)


def trained(rank: ThreadRank | None, pictures: Tensor, config: PretrainConfig):
    network = build_extractor(config, torch.Generator().manual_seed(3))
    if rank is None:
        trainer = contrastive.ContrastiveTrainer(network, config, pictures)
    else:
        rank.ask, rank.answers = lambda *given, together=False: None, lambda: []
        own = shares(len(pictures), rank.size)[rank.rank]
        trainer = wrn.SharedTrainer(network, config, pictures[own], rank, len(pictures))
    losses = [float(trainer.step(step)) for step in range(config.steps)]
    return SimpleNamespace(losses=losses, state=trainer.state())


LATER = pytest.param(2, 12, 3, 5e-3, marks=pytest.mark.slow)  # later steps enlarge the rounding of the first


@pytest.mark.parametrize(("size", "count", "steps", "tolerance"), [(3, 2, 1, 1e-4), LATER])
def test_16_contrastive_steps_equal_those_of_one_process(
    size: int, count: int, steps: int, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    pictures = torch.from_numpy(random.integers(0, 255, (count, 3, 32, 32)).astype(np.uint8))
    config = replace(TINY, steps=steps)  # of two images, one of three ranks has none
    alone = trained(None, pictures, config)
    together = in_threads(size, lambda rank: trained(rank, pictures, config))
    for rank in together:
        assert rank.losses == pytest.approx(alone.losses, rel=1e-3)
        assert apart(rank.state, alone.state) < tolerance  # gradients (the momentum) among it
        assert apart(rank.state, together[0].state) == 0  # the ranks stay equal to one another


def test_16_without_the_others_embeddings_the_loss_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: ranks that compare their own images alone, and average, do not equal one process."""
    pictures = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (12, 3, 32, 32)).astype(np.uint8))
    config = replace(TINY, steps=1)
    alone = trained(None, pictures, config)

    def selfish(rank: ThreadRank):
        rank.gathered = lambda own, counts: [own if r == rank.rank else own[:0] for r in range(rank.size)]
        return trained(rank, pictures, config)

    together = in_threads(2, selfish)
    assert apart(together[0].state, alone.state) > 0.05
