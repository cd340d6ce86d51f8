"""Promise 27: the precision is decided in one place and is the same for every image, thread and rank."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch

from dprandp import finetune
from dprandp.config.schema import PretrainConfig
from dprandp.dpsgd.clipped_sums import SumSettings
from dprandp.errors import UsageError
from dprandp.inspection import check
from dprandp.models import precision
from dprandp.models.classifier import Classifier
from dprandp.models.extractor import build_extractor, extract
from dprandp.models.patchnet import per_example_gradients
from dprandp.models.precision import BFLOAT16, FLOAT32, autocast, decide, dtype_of, has_fast_bfloat16
from dprandp.models.whitening import Whitener
from dprandp.models.wrn import WrnGradients
from dprandp.threads import in_parts

NETWORKS = {
    "patchnet": {"filters": 8, "layers": 1},
    "two layers": {"filters": 8, "layers": 2, "second_filters": 6},
    "wrn": {"arch": "wrn-10-1"},
    "vit": {"arch": "vit-1-16-16"},
}
CASES = [(name, kind) for name in NETWORKS for kind in (FLOAT32, BFLOAT16)]
NEAR = {FLOAT32: 1e-4, BFLOAT16: 2e-2}
BATCH = 8
COUNTS = (0, 1, 2, BATCH + 1)


@pytest.fixture(params=["surrounded by autocast", "alone"])
def surroundings(request: pytest.FixtureRequest) -> contextlib.AbstractContextManager:
    """What a caller's own autocast must not change."""
    surrounded = request.param == "surrounded by autocast"
    return torch.autocast("cpu", dtype=torch.bfloat16) if surrounded else contextlib.nullcontext()


def network(name: str, kind: str = FLOAT32) -> torch.nn.Module:
    net = build_extractor(PretrainConfig(**NETWORKS[name], precision=kind), torch.Generator().manual_seed(0))
    return net.eval()


def images(count: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8))


def classifier(name: str, kind: str) -> Classifier:
    net = network(name, kind)
    model = Classifier(net, Whitener(net.feature_dim, 6, net.parts, dtype_of(net)), 3)
    generator = torch.Generator().manual_seed(1)
    model.whitener.projection.normal_(generator=generator)
    model.head.data.normal_(generator=generator)
    return model


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(((one - other).norm() / other.norm()).detach())


# ------------------------------------------------------------------------------------------------------- the decision


def test_the_decision(processor: str) -> None:
    fast = BFLOAT16 if processor == "1" else FLOAT32
    assert decide("auto", "cpu") == fast
    for asked in (FLOAT32, BFLOAT16):
        assert decide(asked, "cpu") == asked


def test_flags_of_the_processor_decide(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(precision.PRETEND, raising=False)
    asked, flags = precision._cpu_lists_bfloat16.__wrapped__, tmp_path / "cpuinfo"
    for words, answer in [("avx512f amx_bf16 x", True), ("avx512_bf16", True), ("avx512f", False)]:
        flags.write_text(f"flags : {words}", encoding="utf-8")
        assert asked(flags) is answer
    flags.unlink()
    assert asked(flags) is False
    assert has_fast_bfloat16("mps") is False
    monkeypatch.setenv(precision.PRETEND, "yes")
    with pytest.raises(UsageError, match="neither 0 nor 1"):
        has_fast_bfloat16("cpu")


# ------------------------------------------------------------------------------- any threads, images and surroundings


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_features_are_of_one_kind(name: str, kind: str, surroundings) -> None:
    """However many threads and images, and whatever autocast surrounds the call."""
    net, all_images = network(name, kind), images(COUNTS[-1])
    torch.set_num_threads(1)
    reference = extract(net, all_images, mirror=False, batch_size=BATCH)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for count in COUNTS:
            with surroundings:
                found = extract(net, all_images[:count], mirror=False, batch_size=BATCH)
            assert found.dtype == torch.float32
            assert found.shape == (count, net.feature_dim)
            assert count == 0 or apart(found, reference[:count]) < NEAR[kind] / 10


@pytest.mark.parametrize("name", NETWORKS)
def test_bfloat16_is_another_kind(name: str) -> None:
    """The control: what is asked for is what is computed, and the comparison above would see a mixture."""
    single, double = (extract(network(name, kind), images(4), mirror=False) for kind in (FLOAT32, BFLOAT16))
    assert NEAR[FLOAT32] < apart(double, single) < 0.05


@pytest.mark.parametrize(("name", "kind"), [case for case in CASES if case[0] != "vit"])
def test_gradients_are_of_one_kind(name: str, kind: str, surroundings) -> None:
    model, labels = classifier(name, kind), torch.tensor([0, 1, 2])
    views = images(6).view(3, 2, 3, 32, 32)

    def gradients(threads: int) -> torch.Tensor:
        torch.set_num_threads(threads)
        found = WrnGradients(model).of(views, labels) if name == "wrn" else per_example_gradients(model, views, labels)
        return torch.cat([found[key].flatten(1) for key in sorted(found)], dim=1)

    reference = gradients(1)
    for threads in (1, 2, 3):
        with surroundings:
            found = gradients(threads)
        assert found.dtype == torch.float32
        assert apart(found, reference) < NEAR[kind] / 10


def test_scores_and_their_gradients_are_of_one_kind(surroundings) -> None:
    """The head stays in float32, also where features and whitening are not."""
    for name, kind in CASES:
        model = classifier(name, kind)
        pixels = model.extractor.normalise(images(3))
        alone = model(pixels)
        with surroundings:
            found = model(pixels)
        assert found.dtype == torch.float32
        assert apart(found, alone) < 1e-6
        with autocast(model.extractor, torch.device("cpu")):
            features = model.extractor.features(pixels)
        assert apart(found, model.whitener(features.float()) @ model.head) < 1e-5


@pytest.mark.parametrize("parts", [1, 3])
def test_every_part_computes_as_its_caller_does(parts: int) -> None:
    """Torch keeps autocast and gradient mode per thread; a part in the calling thread and one elsewhere must agree."""
    matrix = torch.eye(4)

    def work(part: int, parts: int) -> tuple[torch.dtype, bool]:
        return (matrix @ matrix).dtype, torch.is_grad_enabled()

    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert in_parts(work, parts) == [(torch.bfloat16, False)] * parts
    with torch.enable_grad():
        assert in_parts(work, parts) == [(torch.float32, True)] * parts


def test_ranks_of_other_precisions_do_not_compute_together() -> None:
    """Another rank computes in the precision that rank 0 recorded; if it does not, its model is another one."""
    settings = SumSettings(1.0, 1, 0, True, 1.0)
    digests = [finetune._digest(classifier("wrn", kind), settings) for kind in (BFLOAT16, FLOAT32, BFLOAT16)]
    assert digests[0] == digests[2] != digests[1]


# ---------------------------------------------------------------------------------------------------------- self-check


def test_this_machine_computes_the_stored_numbers(processor: str) -> None:
    worst, _, said = check.compare(torch.device("cpu"))
    assert worst < 1
    assert f"wrn-10-1 in {decide('auto', 'cpu')}" in said


@pytest.mark.parametrize("broken", ["extract", "clipped_softmax_sum", "sum of clipped gradients", "noise"])
def test_wrong_arithmetic_is_seen(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if broken == "sum of clipped gradients":
        honest = check.ClippedSums.of
        wrong = lambda *given: {name: value * 1.01 for name, value in honest(*given).items()}  # noqa: E731
        monkeypatch.setattr(check.ClippedSums, "of", wrong)
    elif broken == "noise":
        monkeypatch.setattr(check, "NOISE_MULTIPLIER", 0.99)
    else:
        honest = getattr(check, broken)
        monkeypatch.setattr(check, broken, lambda *given, **more: honest(*given, **more) * 1.01)
    worst, where, _ = check.compare(torch.device("cpu"))
    assert worst > 1
    assert where
