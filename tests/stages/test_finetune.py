"""Promises 4, 6, 7, 8 and the fine-tune's own arithmetic: released parameters are a function of noisy updates alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_models import CLIP, SETTING, STEP, apart, batch_of, gradient_by_hand, model_of, norm_of
from small_models import scaled as scaled_parameters
from tiny_run import Copy, Patch, Record, Recorder, plans_of, read_json, run_finetune, run_probe, run_scratch
from torch import Tensor, nn

from dprandp import finetune
from dprandp.config.schema import PretrainConfig
from dprandp.dpsgd import clipped_sums
from dprandp.dpsgd.clipped_sums import Batch, ClippedSums, SumSettings
from dprandp.errors import UsageError
from dprandp.models.extractor import build_extractor
from dprandp.privacy.clipping import ROUNDING_SLACK, sum_of_clipped
from dprandp.privacy.randomness import PoissonSampler

# -------------------------------------------------------------------------------------- 6: memory flags change nothing


@pytest.mark.parametrize("arch", ["patchnet", "deep"])
def test_6_the_clipped_sum_is_the_same_for_every_microbatch(arch: str) -> None:
    """And it is that of single records, differentiated automatically: no record's gradient depends on another's (8)."""
    hand = [gradient_by_hand(arch, record) for record in range(7)]
    parameters = scaled_parameters(model_of(arch))
    expected = sum_of_clipped(({n: v[None] for n, v in each.items()} for each in hand), parameters, CLIP)
    for microbatch in (None, 1, 3, 16):
        sums = ClippedSums(model_of(arch), replace(SETTING, microbatch=microbatch))
        assert apart(sums.of(parameters, STEP, batch_of(7)), expected) < 1e-4
    other = ClippedSums(model_of(arch), replace(SETTING, scale=2.0))
    assert apart(other.of(parameters, STEP, batch_of(7)), expected) > 1e-2  # a wrong scale would be seen


@pytest.mark.parametrize("precise", [False, True])
def test_6_sums_layer_by_layer_and_automatic_ones_agree(monkeypatch: Patch, precise: bool) -> None:
    """A WideResNet's clipped sums with units of several images and with masks, whatever makes the gradients."""
    parameters, batch = scaled_parameters(model_of("wrn-10-1")), batch_of(6, [1, 3, 2])
    generator = torch.Generator().manual_seed(4)
    masks = {name: torch.rand(value.shape, generator=generator) < 0.5 for name, value in parameters.items()}
    masks = {name: mask.float() for name, mask in masks.items() if mask.ndim > 1}

    def total(microbatch: int | None, masks: Mapping[str, Tensor] | None = masks) -> dict[str, Tensor]:
        settings = replace(SETTING, precise=precise, microbatch=microbatch)
        return ClippedSums(model_of("wrn-10-1"), settings).of(parameters, 3, batch, masks)

    by_layers = [total(microbatch) for microbatch in (None, 1, 4)]
    monkeypatch.setattr(clipped_sums, "has_layer_gradients", lambda extractor: False)
    automatic = total(2)
    for found in by_layers:
        assert apart(found, automatic) < 1e-4
        assert norm_of(found) <= 3 * CLIP
    assert not any(bool(found[name][mask == 0].any()) for name, mask in masks.items())
    assert apart(total(2, None), automatic) > 1e-2  # what is compared could tell masked from unmasked


@pytest.mark.parametrize("units", [False, True])
def test_6_precise_sums_are_added_in_float64(units: bool) -> None:
    """For discrete noise: the same gradients, clipped and added by hand in double precision, to its last digits."""
    generator = torch.Generator().manual_seed(6)
    model = model_of("wrn-10-1")
    parameters = scaled_parameters(model, 1.0)
    rows = {n: torch.randn(40, *v.shape, generator=generator) * 10 for n, v in parameters.items()}
    sizes = torch.tensor([7, 1, 12, 20]) if units else None
    batch = Batch(torch.zeros(40, 3, 32, 32, dtype=torch.uint8), torch.zeros(40, dtype=torch.int64), torch.arange(40),
                  sizes)  # fmt: skip
    units_of = (torch.ones(40, dtype=torch.int64) if sizes is None else sizes).tolist()
    expected = {n: torch.zeros_like(v, dtype=torch.float64) for n, v in parameters.items()}
    for part in zip(*(value.double().split(units_of) for value in rows.values()), strict=True):
        means = dict(zip(rows, (each.mean(0) for each in part), strict=True))
        factor = min(1.0, CLIP * (1 - ROUNDING_SLACK) / norm_of(means))
        for name, mean in means.items():
            expected[name] += factor * mean
    found = {}
    for precise in (True, False):
        sums = ClippedSums(model, SumSettings(1.0, 1, 0, False, CLIP, precise=precise))
        sums._gradients = lambda *rest: ({n: value[i : i + 10] for n, value in rows.items()} for i in range(0, 40, 10))
        found[precise] = apart(sums.of(parameters, 0, batch), expected)
    assert found[True] < (1e-6 if units else 1e-13)  # the means of units are those of the gradients, in float32
    assert found[False] > 1e-9


# ------------------------------------------------------------------------------------------------ 8: isolated examples


class Mixing(nn.Module):
    """An extractor with a layer that mixes examples."""

    feature_dim = 12

    def __init__(self) -> None:
        super().__init__()
        self.normaliser = nn.BatchNorm2d(3)
        self.weight = nn.Parameter(torch.randn(3 * 32 * 32, 12))

    @staticmethod
    def normalise(images: Tensor) -> Tensor:
        return images.float() / 255

    def features(self, images: Tensor) -> Tensor:
        return self.normaliser(images).flatten(1) @ self.weight


def test_8_batch_norm_is_refused_by_name(tmp_path: Path, data: str, monkeypatch: Patch) -> None:
    def made(config: PretrainConfig, *generator: torch.Generator) -> nn.Module:
        return Mixing() if generator else build_extractor(config)  # without one: the trial before anything is opened

    monkeypatch.setattr(finetune, "build_extractor", made)
    with pytest.raises(UsageError, match=r"extractor\.normaliser.*BatchNorm2d"):
        run_scratch(tmp_path / "run", data)
    ledger = tmp_path / "run/privacy/ledger.jsonl"
    assert not ledger.exists()  # nothing was planned
    assert not (tmp_path / "run/model/model.safetensors").exists()


# ----------------------------------------------------------- 4 and 7: one record less changes the sum only


@pytest.mark.parametrize("kind", ["probe", "finetune"])
def test_7_one_record_less_moves_nothing_but_the_sum(
    copy: Copy, public_run: Path, probed_run: Path, data: str, kind: str
) -> None:
    """D against D without one record: same noise and same other records in the batches (record and replay)."""
    source, stage, folder = (probed_run, run_finetune, "4-finetune")
    changes = {"clip_norm": CLIP, "batch_size": 24, "refit_steps": 0}
    if kind == "probe":
        source, stage, folder, changes = public_run, run_probe, "3-probe", {"clip_norm": CLIP, "batch_size": 30}
    runs = [copy(source), copy(source)]
    seen = [Recorder(run) for run in runs]
    member, first, draw = None, 0, PoissonSampler.draw
    for run, recorder in zip(runs, seen, strict=True):
        with pytest.MonkeyPatch.context() as patch:
            if member is not None:
                others = lambda sampler, member=member: (found := draw(sampler))[found != member]  # noqa: E731
                patch.setattr(PoissonSampler, "draw", others)
            recorder.install(patch)
            stage(run, data, {"insecure_seed": 5}, **changes)
        if member is None:  # a record that the first batch with at least two holds
            first = next(i for i, release in enumerate(recorder.releases) if len(release.indices) > 1)
            member = int(recorder.releases[first].indices[1])
    left, right = (recorder.releases[first] for recorder in seen)
    assert set(left.indices) - set(right.indices) == {member}
    # 4: the first sum that holds the record differs by its clipped gradient: of norm C, as C is small
    moved = norm_of({name: left.sums[name] - right.sums[name] for name in left.sums})
    assert 0.98 * CLIP < moved <= CLIP * (1 + 1e-4)
    # the noise did not move, and neither did the divisor
    assert torch.allclose(left.noise, right.noise, atol=1e-4)
    assert [release.divisor for release in seen[0].releases] == [release.divisor for release in seen[1].releases]
    # what is written has the same names and sizes
    assert plans_of(runs[0]) == plans_of(runs[1])
    configs = [read_json(run / "model/config.json") for run in runs]
    assert list(configs[0]["result"]) == list(configs[1]["result"])
    for key in ("steps", "charged_steps", "expected_batch", "sample_rate", "lr", "noise_multiplier", "train_examples"):
        assert configs[0]["result"][key] == configs[1]["result"][key]
    assert len({(run / "model/model.safetensors").stat().st_size for run in runs}) == 1
    names = [sorted(str(path.relative_to(run)) for path in (run / folder).rglob("*")) for run in runs]
    assert names[0] == names[1]


@pytest.mark.parametrize("automatic", [False, True])
def test_4_a_record_weighs_what_its_kind_of_clip_says(automatic: bool) -> None:
    """The oracle: the gradient of one record by autograd, and its length scaled by hand."""
    length = norm_of(gradient_by_hand("patchnet", 0))
    for clip_norm in (length / 3, length * 3):
        settings = replace(SETTING, clip_norm=clip_norm, automatic=automatic)
        model = model_of("patchnet")
        total = norm_of(ClippedSums(model, settings).of(scaled_parameters(model), STEP, batch_of(1)))
        expected = clip_norm * length / (length + 0.01) if automatic else min(length, clip_norm)
        assert total == pytest.approx(expected, rel=1e-3)
        assert total <= clip_norm


def test_automatic_clipping_is_used_and_disclosed(copy: Copy, probed_run: Path, data: str) -> None:
    released = []
    for clipping in ("norm", "automatic"):
        run = copy(probed_run)
        options = {"clipping": clipping, "clip_norm": 30.0, "refit_steps": 0}
        assert run_finetune(run, data, {"insecure_seed": 1}, **options)["clipping"] == clipping
        card = (run / "model/MODEL_CARD.md").read_text(encoding="utf-8")
        assert ("automatic clipping" in card) == (clipping == "automatic")
        assert ("is clipped to L2 norm C" in card) == (clipping == "norm")
        released.append(load_file(run / "model/model.safetensors"))
    assert apart(*released) > 1e-3  # with C = 30 hardly a gradient is cut, and every one is lengthened


# ------------------------------------------------- what is released is computed from the noisy updates alone


def head_by_hand(lr: float, momentum: float, updates: list[Tensor], start: Tensor, released: str) -> Tensor:
    head, velocity, average = start, torch.zeros_like(start), torch.zeros_like(start)
    half = len(updates) // 2
    for step, update in enumerate(updates):
        velocity = momentum * velocity + update
        head = head - lr * velocity
        if released == "average" and step >= half:
            average = average + (head - average) / (step - half + 1)
        elif released == "ema":
            decay = min(0.97, (1 + step) / (10 + step))
            average = decay * average + (1 - decay) * head
    return head if released == "last" else average


@pytest.mark.parametrize("released", ["average", "ema", "last"])
def test_9_the_released_head_is_a_function_of_the_noisy_updates(
    copy: Copy, public_run: Path, data: str, record: Record, released: str
) -> None:
    run = copy(public_run)
    seen = record(run)
    result = run_probe(run, data, batch_size=30, released=released)
    updates = [release.released["head"] for release in seen.releases]
    expected = head_by_hand(result["lr"], 0.9, updates, torch.zeros_like(updates[0]), released)
    stored = load_file(run / "3-probe/head.safetensors")["head"]
    assert torch.allclose(stored, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(load_file(run / "model/model.safetensors")["head"], stored)


def test_9_the_tuned_parameters_are_a_function_of_the_noisy_updates(
    copy: Copy, probed_run: Path, data: str, record: Record
) -> None:
    """Momentum SGD and EMA redone by hand from what ``release`` returned, then the refit from there."""
    run = copy(probed_run)
    before = load_file(run / "model/model.safetensors")
    seen = record(run)
    scale, momentum = 0.2, 0.7
    result = run_finetune(run, data, extractor_scale=scale, momentum=momentum, ema=0.9)
    assert [release.mechanism for release in seen.releases] == ["finetune"] * 4 + ["finetune.head"] * 6
    names = list(seen.releases[0].released)
    assert sorted(names) == ["extractor.bias", "extractor.weight", "head"]
    after = load_file(run / "model/model.safetensors")
    for name in names:
        s = scale if name.startswith("extractor.") else 1.0
        value = before[name].double() / s
        average, velocity = value, torch.zeros_like(value)
        for step, release in enumerate(seen.of("finetune")):
            velocity = momentum * velocity + release.released[name].double()
            value = value - result["lr"] * velocity
            decay = min(0.9, (1 + step) / (10 + step))
            average = decay * average + (1 - decay) * value
        stored = load_file(run / "4-finetune/model.safetensors")[name].double()
        assert torch.allclose(stored, average * s, rtol=1e-4, atol=1e-5)
        if name == "head":
            updates = [release.released["head"].double() for release in seen.of("finetune.head")]
            refit = result["refit"]
            expected = head_by_hand(refit["lr"], refit["momentum"], updates, average, "average")
            stored = load_file(run / "4-finetune/refit/head.safetensors")["head"].double()
            assert torch.allclose(stored, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(after[name].double(), stored)
    for name in before.keys() - set(names):  # nothing else of the model moved
        assert torch.equal(before[name], after[name])


def test_a_frozen_extractor_stays_as_it_was(copy: Copy, probed_run: Path, data: str) -> None:
    run = copy(probed_run)
    before = load_file(run / "model/model.safetensors")
    run_finetune(run, data, extractor_scale=0.0, refit_steps=0)
    after = load_file(run / "model/model.safetensors")
    assert torch.equal(before["extractor.weight"], after["extractor.weight"])
    assert not torch.equal(before["head"], after["head"])


def test_views_of_an_example_do_not_depend_on_the_batch() -> None:
    """Leaving out a record hands its random crops to nobody else."""
    seen, views = [], clipped_sums.private_views
    model = model_of("patchnet")
    whole = batch_of(4)
    fewer = Batch(whole.images[1:], whole.labels[1:], whole.members[1:])

    def recorded(*given, **how) -> Tensor:
        seen.append(views(*given, **how))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clipped_sums, "private_views", recorded)
        for batch in (whole, fewer):
            ClippedSums(model, replace(SETTING, views=3)).of(scaled_parameters(model), STEP, batch)
    assert torch.equal(seen[0][1:], seen[1])
    assert len({view.numpy().tobytes() for view in seen[0].flatten(0, 1)}) > 4  # they are random crops
