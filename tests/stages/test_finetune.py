"""Promises 4, 6, 7, 8 and the fine-tune's own arithmetic: released parameters are a function of noisy updates alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import (
    CLASSES,
    DEEP,
    Recorder,
    blobs,
    metrics_of,
    plans_of,
    read_json,
    run_finetune,
    run_probe,
    run_scratch,
)
from torch import Tensor, nn

from dprandp.config.schema import PretrainConfig
from dprandp.dpsgd import clipped_sums
from dprandp.errors import UsageError
from dprandp.finetune import start
from dprandp.models import extractor as extractors
from dprandp.models import patchnet, whitening
from dprandp.models.classifier import Classifier
from dprandp.privacy.clipping import ROUNDING_SLACK, per_example_gradients, sum_of_clipped
from dprandp.privacy.randomness import PoissonSampler
from dprandp.vision.images import to_input

Copy = Callable[[Path], Path]
Record = Callable[[Path], Recorder]
Patch = pytest.MonkeyPatch
CPU = torch.device("cpu")
CLIP = 0.05


def model_of(arch: str) -> Classifier:
    """A classifier with random weights, a random whitener and a random head."""
    generator = torch.Generator().manual_seed(1)
    settings = DEEP if arch == "deep" else {"arch": arch}
    extractor = extractors.build_extractor(PretrainConfig(filters=16, **settings), generator)
    whitener = whitening.Whitener(extractor.feature_dim, 20, extractor.parts)
    whitener.projection.normal_(generator=generator)
    model = Classifier(extractor, whitener, CLASSES)
    model.head.data.normal_(generator=generator)
    return model


def views_of(count: int, views: int = 2) -> tuple[Tensor, Tensor]:
    """Different views: the image and its mirror image."""
    made = blobs(3)
    images = to_input(made["x_train"][:count])
    return torch.stack([images, images.flip(-1)], dim=1)[:, :views], torch.from_numpy(made["y_train"][:count])


def scaled_parameters(model: Classifier, scale: float) -> dict[str, Tensor]:
    return {
        name: value.detach().clone() / (scale if name.startswith("extractor.") else 1)
        for name, value in model.named_parameters()
    }


def assert_close(left: Mapping[str, Tensor], right: Mapping[str, Tensor], tolerance: float) -> None:
    """Equal up to a part of the joint norm."""
    assert left.keys() == right.keys()
    joint = math.sqrt(sum(float(value.square().sum()) for value in right.values()))
    apart = math.sqrt(sum(float((left[name] - right[name]).square().sum()) for name in right))
    assert joint > 0
    assert apart <= tolerance * joint


def norm_of(sums: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in sums.values()))


# -------------------------------------------------------------------------------------- 6: memory flags change nothing


@pytest.mark.parametrize("arch", ["patchnet", "wrn-10-1"])
def test_6_the_clipped_sum_is_the_same_for_every_microbatch(arch: str) -> None:
    views, labels = views_of(7)
    sums = []
    for microbatch in (None, 1, 3, 16):
        model = model_of(arch)
        source = clipped_sums.gradient_source(model, 0.1, CPU, microbatch)
        parameters = scaled_parameters(model, 0.1)
        sums.append(sum_of_clipped(source(parameters, views, labels), parameters, CLIP))
    for other in sums[1:]:
        assert_close(other, sums[0], 1e-5)
    assert norm_of(sums[0]) <= 7 * CLIP


def test_6_closed_form_and_automatic_gradients_agree() -> None:
    views, labels = views_of(6)
    scale = 0.3
    model = model_of("patchnet")
    parameters = scaled_parameters(model, scale)
    loss = clipped_sums.loss_function(model, scale, CPU)
    automatic = sum_of_clipped(per_example_gradients(loss, parameters, views, labels, 3), parameters, CLIP)
    closed = patchnet.per_example_gradients(model, views, labels)
    closed = {name: clipped_sums.unscaled(name, closed[name], scale) for name in parameters}
    assert_close(sum_of_clipped([closed], parameters, CLIP), automatic, 1e-4)
    # the scale matters: with the wrong one the two are far apart
    wrong = {name: clipped_sums.unscaled(name, closed[name], 2.0) for name in parameters}
    with pytest.raises(AssertionError):
        assert_close(sum_of_clipped([wrong], parameters, CLIP), automatic, 1e-2)


@pytest.mark.parametrize("precise", [False, True])
def test_6_sums_layer_by_layer_and_automatic_ones_agree(monkeypatch: Patch, precise: bool) -> None:
    """A WideResNet's clipped sums with units of several images and with masks, whatever makes the gradients."""
    made, parameters = blobs(3), scaled_parameters(model_of("wrn-10-1"), 0.3)
    images, labels = to_input(made["x_train"][:6]), torch.from_numpy(made["y_train"][:6])
    batch = clipped_sums.Batch(images, labels, torch.arange(6), torch.tensor([1, 3, 2]))
    generator = torch.Generator().manual_seed(4)
    masks = {name: torch.rand(value.shape, generator=generator) < 0.5 for name, value in parameters.items()}
    masks = {name: mask.float() for name, mask in masks.items() if mask.ndim > 1}

    def total(microbatch: int | None, masks: Mapping[str, Tensor] | None = masks) -> dict[str, Tensor]:
        settings = clipped_sums.SumSettings(0.3, 2, 5, False, CLIP, precise=precise, microbatch=microbatch)
        sums = clipped_sums.ClippedSums(model_of("wrn-10-1"), settings)
        return sums.of(parameters, 3, batch, masks)

    by_layers = [total(microbatch) for microbatch in (None, 1, 4)]
    monkeypatch.setattr(clipped_sums, "has_layer_gradients", lambda extractor: False)
    automatic = total(2)
    for found in by_layers:
        assert_close(found, automatic, 1e-4)
        assert norm_of(found) <= 3 * CLIP
    assert not any(bool(found[name][mask == 0].any()) for name, mask in masks.items())
    with pytest.raises(AssertionError):  # what is compared could tell masked from unmasked
        assert_close(total(2, None), automatic, 1e-2)


@pytest.mark.parametrize("units", [False, True])
def test_6_precise_sums_are_added_in_float64(units: bool) -> None:
    """For discrete noise: the same gradients, clipped and added by hand in double precision, to its last digits."""
    generator = torch.Generator().manual_seed(6)
    model = model_of("wrn-10-1")
    parameters = scaled_parameters(model, 1.0)
    rows = {n: torch.randn(40, *v.shape, generator=generator) * 10 for n, v in parameters.items()}
    sizes = torch.tensor([7, 1, 12, 20]) if units else None
    batch = clipped_sums.Batch(torch.zeros(40, 3, 32, 32, dtype=torch.uint8), torch.zeros(40, dtype=torch.int64),
                               torch.arange(40), sizes)  # fmt: skip
    apart = {}
    for precise in (True, False):
        settings = clipped_sums.SumSettings(1.0, 1, 0, False, CLIP, precise=precise)
        sums = clipped_sums.ClippedSums(model, settings)
        sums._gradients = lambda *rest: ({n: value[i : i + 10] for n, value in rows.items()} for i in range(0, 40, 10))
        total = sums.of(parameters, 0, batch)
        units_of = (torch.ones(40, dtype=torch.int64) if sizes is None else sizes).tolist()
        expected = {n: torch.zeros_like(v, dtype=torch.float64) for n, v in parameters.items()}
        for part in zip(*(value.double().split(units_of) for value in rows.values()), strict=True):
            means = [each.mean(0) for each in part]
            factor = min(1.0, CLIP * (1 - ROUNDING_SLACK) / norm_of(dict(enumerate(means))))
            for name, mean in zip(rows, means, strict=True):
                expected[name] += factor * mean
        apart[precise] = norm_of({n: total[n] - expected[n] for n in total}) / norm_of(expected)
    assert apart[True] < (1e-6 if units else 1e-13)  # the means of units are those of the gradients, in float32
    assert apart[False] > 1e-9


def test_6_the_whole_stage_with_another_microbatch(
    copy: Copy, probed_run: Path, data: str, monkeypatch: Patch
) -> None:
    """Same batches and noise (a seed, for once): the released parameters agree."""
    released = []
    for microbatch, closed_form in ((1, True), (16, True), (3, False)):
        if not closed_form:
            monkeypatch.setattr(clipped_sums, "patch_layers", lambda extractor: {})  # none has a closed form
        run = copy(probed_run)
        run_finetune(run, data, {"insecure_seed": 1, "microbatch": microbatch}, views=2)
        released.append(load_file(run / "model/model.safetensors"))
    for other in released[1:]:
        assert_close(other, released[0], 1e-4)


# ------------------------------------------------------------------------------------------------ 8: isolated examples


@pytest.mark.parametrize(
    ("arch", "closed_form"), [("patchnet", False), ("patchnet", True), ("deep", True), ("wrn-10-1", False)]
)
def test_8_no_gradient_moves_when_another_example_does(arch: str, closed_form: bool) -> None:
    views, labels = views_of(5)
    model = model_of(arch)
    loss = clipped_sums.loss_function(model, 1.0, CPU)
    parameters = scaled_parameters(model, 1.0)

    def gradients(images: Tensor, answers: Tensor) -> dict[str, Tensor]:
        if closed_form:
            return patchnet.per_example_gradients(model, images, answers)
        (rows,) = per_example_gradients(loss, parameters, images, answers, 5)
        return rows

    before = {name: value.clone() for name, value in gradients(views, labels).items()}
    changed = views.clone()
    changed[3] = 255 - changed[3]
    after = gradients(changed, torch.where(torch.arange(5) == 3, (labels + 1) % CLASSES, labels))
    others = [0, 1, 2, 4]
    for name in before:
        assert torch.allclose(before[name][others], after[name][others], rtol=1e-4, atol=1e-6)
    assert max(float((before[name][3] - after[name][3]).abs().max()) for name in before) > 1e-3
    # and each row is what the example gives alone
    one_by_one = [gradients(views[i : i + 1], labels[i : i + 1]) for i in range(5)]
    alone = {name: torch.cat([rows[name] for rows in one_by_one]) for name in before}
    for name in before:
        assert torch.allclose(before[name], alone[name], rtol=1e-3, atol=1e-5)


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
    monkeypatch.setattr(start, "build_extractor", lambda config, generator: Mixing())
    with pytest.raises(UsageError, match=r"extractor\.normaliser.*BatchNorm2d"):
        run_scratch(tmp_path / "run", data)
    ledger = tmp_path / "run/privacy/ledger.jsonl"
    assert len(ledger.read_text(encoding="utf-8").splitlines()) == 1  # the header: nothing was charged
    assert not (tmp_path / "run/model/model.safetensors").exists()


# ----------------------------------------------------------- 4 and 7: one record less changes the sum only


def replay(run: Path, data: str, without: int | None, stage: Callable[..., dict], **changes) -> None:
    """Run a stage on given batches and given noise, with or without one record in the batches."""
    draw = PoissonSampler.draw
    with pytest.MonkeyPatch.context() as patch:
        if without is not None:
            patch.setattr(PoissonSampler, "draw", lambda sampler: (found := draw(sampler))[found != without])
        stage(run, data, {"insecure_seed": 5}, **changes)


@pytest.mark.parametrize("kind", ["probe", "patchnet", "automatic", "wrn"])
def test_7_one_record_less_moves_nothing_but_the_sum(
    copy: Copy, public_run: Path, probed_run: Path, wide_run: Path, data: str, record: Record, kind: str
) -> None:
    """D against D without one record: same noise and same other records in the batches (record and replay)."""
    source, stage = {"probe": (public_run, run_probe), "wrn": (None, None)}.get(kind, (probed_run, run_finetune))
    changes = {"clip_norm": CLIP, "batch_size": 30 if kind == "probe" else 24}
    changes |= {"clipping": "automatic"} if kind == "automatic" else {}
    if kind == "wrn":
        source, stage = copy(wide_run), run_finetune
        run_probe(source, data, {"insecure_seed": 5})
        changes |= {"refit_steps": 0, "batch_size": 12, "steps": 2}  # as elsewhere: accounted once
    runs = [copy(source), copy(source)]
    seen = [Recorder(run) for run in runs]
    member, first = None, 0
    for run, recorder in zip(runs, seen, strict=True):
        with pytest.MonkeyPatch.context() as patch:
            recorder.install(patch)
            replay(run, data, member, stage, **changes)
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
    assert len(seen[0].releases) == len(seen[1].releases)
    assert [release.divisor for release in seen[0].releases] == [release.divisor for release in seen[1].releases]
    # what is written has the same names and sizes
    assert plans_of(runs[0]) == plans_of(runs[1])
    configs = [read_json(run / "model/config.json") for run in runs]
    assert list(configs[0]) == list(configs[1])
    assert list(configs[0]["result"]) == list(configs[1]["result"])
    for key in ("steps", "charged_steps", "expected_batch", "sample_rate", "lr", "noise_multiplier", "train_examples"):
        assert configs[0]["result"][key] == configs[1]["result"][key]
    assert len({(run / "model/model.safetensors").stat().st_size for run in runs}) == 1
    folder = "3-probe" if kind == "probe" else "4-finetune"
    assert len({len(metrics_of(run / folder)) for run in runs}) == 1
    names = [sorted(str(path.relative_to(run)) for path in (run / folder).rglob("*")) for run in runs]
    assert names[0] == names[1]


@pytest.mark.parametrize("automatic", [False, True])
def test_4_a_record_weighs_what_its_kind_of_clip_says(automatic: bool) -> None:
    """The oracle: the gradient of one record by autograd, and its length scaled by hand."""
    (views, labels), model = views_of(1), model_of("patchnet")
    parameters = scaled_parameters(model, 0.3)
    draws = clipped_sums.keyed_uniforms(torch.tensor([0]), 3, 5, 2)
    seen = clipped_sums.private_views(views[:, 0], 2, draws, flip=False)
    (rows,) = per_example_gradients(
        clipped_sums.loss_function(model, 0.3, CPU), parameters, seen, labels, 1
    )
    length = norm_of(rows)
    for clip_norm in (length / 3, length * 3):
        settings = clipped_sums.SumSettings(0.3, 2, 5, False, clip_norm, automatic=automatic)
        batch = clipped_sums.Batch(views[:, 0], labels, torch.tensor([0]))
        total = norm_of(clipped_sums.ClippedSums(model_of("patchnet"), settings).of(parameters, 3, batch))
        expected = clip_norm * length / (length + 0.01) if automatic else min(length, clip_norm)
        assert total == pytest.approx(expected, rel=1e-3)
        assert total <= clip_norm


def test_automatic_clipping_is_used_and_disclosed(copy: Copy, probed_run: Path, data: str) -> None:
    released = []
    for clipping in ("norm", "automatic"):
        run = copy(probed_run)
        result = run_finetune(run, data, {"insecure_seed": 1}, clipping=clipping, clip_norm=30.0)
        assert result["clipping"] == clipping
        card = (run / "model/MODEL_CARD.md").read_text(encoding="utf-8")
        assert ("automatic clipping" in card) == (clipping == "automatic")
        assert ("is clipped to L2 norm C" in card) == (clipping == "norm")
        released.append(load_file(run / "model/model.safetensors"))
    with pytest.raises(AssertionError):  # with C = 30 hardly a gradient is cut, and every one is lengthened
        assert_close(released[0], released[1], 1e-3)


@pytest.mark.parametrize("kind", ["probe", "finetune"])
def test_7_the_divisor_is_the_expected_batch(
    copy: Copy, public_run: Path, probed_run: Path, data: str, record: Record, kind: str
) -> None:
    """Without noise the update is the sum over qN, for whatever number of records was drawn."""
    if kind == "probe":
        run = copy(public_run)
        seen = record(run)
        run_probe(run, data, epsilon=math.inf, batch_size=30)
        expected = 30
    else:
        run = copy(public_run)
        run_probe(run, data, epsilon=math.inf)
        seen = record(run)
        run_finetune(run, data, epsilon=math.inf, batch_size=24, refit_steps=0)
        expected = 24
    assert len({len(release.indices) for release in seen.releases}) > 1
    for release in seen.releases:
        for name, update in release.released.items():
            assert torch.allclose(update.double(), release.sums[name].double() / expected, rtol=1e-5, atol=1e-9)


# ------------------------------------------------- what is released is computed from the noisy updates alone


def test_9_the_released_head_is_a_function_of_the_noisy_updates(
    copy: Copy, public_run: Path, data: str, record: Record
) -> None:
    for released in ("average", "ema", "last"):
        run = copy(public_run)
        seen = record(run)
        result = run_probe(run, data, batch_size=30, released=released)
        head = velocity = average = torch.zeros_like(seen.releases[0].released["head"])
        for step, release in enumerate(seen.releases):
            velocity = 0.9 * velocity + release.released["head"]
            head = head - result["lr"] * velocity
            if released == "average" and step >= 4:
                average = average + (head - average) / (step - 3)
            elif released == "ema":
                decay = min(0.97, (1 + step) / (10 + step))
                average = decay * average + (1 - decay) * head
        expected = head if released == "last" else average
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
            head, velocity, mean = average, torch.zeros_like(average), torch.zeros_like(average)
            for step, release in enumerate(seen.of("finetune.head")):
                velocity = result["refit"]["momentum"] * velocity + release.released["head"].double()
                head = head - result["refit"]["lr"] * velocity
                if step >= 3:
                    mean = mean + (head - mean) / (step - 2)
            stored = load_file(run / "4-finetune/refit/head.safetensors")["head"].double()
            assert torch.allclose(stored, mean, rtol=1e-4, atol=1e-5)
        out = load_file(run / "model/model.safetensors")[name].double()
        assert torch.equal(out, stored)
    # nothing else of the model moved
    after = load_file(run / "model/model.safetensors")
    for name in before.keys() - set(names):
        assert torch.equal(before[name], after[name])


def test_the_card_of_a_finetune_names_the_probe(tuned_run: Path, probed_run: Path) -> None:
    """Its ε holds the probe's cost; a reader must be able to add it up."""
    card = (tuned_run / "model/MODEL_CARD.md").read_text(encoding="utf-8")
    (row,) = [line for line in card.splitlines() if "Also counted in ε" in line]
    plan = plans_of(tuned_run)["probe"]["plan"]
    assert "probe: q = 1, T = 8" in row
    assert f"{plan['noise_multiplier']:.6g}" in row
    assert "Also counted in ε | nothing:" in (probed_run / "model/MODEL_CARD.md").read_text(encoding="utf-8")


def test_a_frozen_extractor_stays_as_it_was(copy: Copy, probed_run: Path, data: str) -> None:
    run = copy(probed_run)
    before = load_file(run / "model/model.safetensors")
    run_finetune(run, data, extractor_scale=0.0)
    after = load_file(run / "model/model.safetensors")
    assert torch.equal(before["extractor.weight"], after["extractor.weight"])
    assert not torch.equal(before["head"], after["head"])


def test_views_of_an_example_do_not_depend_on_the_batch(
    copy: Copy, probed_run: Path, data: str, monkeypatch: Patch
) -> None:
    """Leaving out a record hands its random crops to nobody else."""
    draw, seen = PoissonSampler.draw, []
    views = clipped_sums.private_views

    def recorded(images: Tensor, count: int, draws: Tensor, **options) -> Tensor:
        made = views(images, count, draws, **options)
        seen[-1].append({tuple(image.flatten().tolist()[:200]): view for image, view in zip(images, made, strict=True)})
        return made

    monkeypatch.setattr(clipped_sums, "private_views", recorded)
    for keep in (slice(None), slice(1, None)):
        monkeypatch.setattr(PoissonSampler, "draw", lambda sampler, keep=keep: draw(sampler)[keep])
        seen.append([])
        run_finetune(copy(probed_run), data, {"insecure_seed": 2}, views=3)
    for whole, fewer in zip(*seen, strict=True):
        assert len(fewer) == len(whole) - 1
        assert all(torch.equal(whole[key], fewer[key]) for key in fewer)
