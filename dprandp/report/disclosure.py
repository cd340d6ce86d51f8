"""The facts that must accompany every privacy claim: one list, ``disclosure``, shared by the report and the model card.

An ε means nothing without its mechanism, neighbours, unit and limits. All facts come from the result that a private
stage recorded; nothing is computed from private data.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from dprandp.config.schema import WITHOUT_PHASE_ONE
from dprandp.privacy.accounting import (
    ADVISED_SHARE,
    DELTA_SHARE,
    LATTICE_BITS,
    GaussianEvent,
    group_privacy,
    rounded_up,
)
from dprandp.privacy.adaptive import SLACK
from dprandp.privacy.gaussian_dp import gaussian_dp_epsilon, gaussian_dp_mu
from dprandp.privacy.neighbours import gaussian_rate, point_rate, trade_off
from dprandp.runs.results import (
    ONE_IMAGE,
    ContinueResult,
    FinetuneResult,
    GenerateResult,
    PretrainResult,
    PrivateResult,
    ProbeResult,
    PublicTraining,
    Refit,
    Tuned,
)

SHOWN_CLASSES = 5
"""Most classes that a warning names."""

INTERVAL = "95 % interval"

GROUP_SIZES = (2, 5, 10)
"""Of which the disclosure says what is left of the guarantee."""

RELEASED = {
    "average": "the mean of the second half of the iterates",
    "ema": "the exponential moving average of the iterates",
    "last": "the last iterate",
}

# This is not computed from a run's files: keep it true when you change a default.
DEFAULTS_CHOSEN_ON = (
    "Default learning rates, steps and sizes were chosen on public benchmark data sets; on such a set the accuracy is "
    "slightly optimistic. Trying several settings on the private data and keeping the best spends privacy "
    "that ε does not count, unless all were tried in this run directory."
)

OS_ENTROPY = "os-entropy: noise and batches from the operating system, never seeded, stored or repeated"
SEEDED = ": noise and batches from a seed that can be repeated. NOT PRIVATE."

LIMITS = {
    "Limit: floating-point noise (severity low)": (
        "Gaussian noise in floating point has gaps that can reveal the value it hides (Mironov 2012). It is computed "
        "and added in float64 and rounded to float32, which hides the 29 lowest bits: a mitigation, not a proof. The "
        "severity is low because a trained model is published, not single noisy sums."
    ),
    "Limit: tails and timing": (
        "Noise values never exceed 12.2 standard deviations; the omitted tail has probability 1e-32 per coordinate and "
        "step, which δ does not include. Nothing runs in constant time: somebody who can time the training may "
        "learn from that."
    ),
    "Limit: N is treated as public": (
        "The number of training images sets the sampling rate, the divisor and δ, and is printed here. If the size "
        "of the data set is secret, this guarantee does not cover it."
    ),
    "Limit: test split": (
        "Each private stage (continue, probe, fine-tune) evaluates the model that it releases on the test split once, "
        "at its end; nothing is chosen by the result. Its metrics, their intervals and the figures of each class among "
        "them, are published without noise: ε covers the training images, not the test images."
    ),
    "Limit: other copies": (
        "ε counts what this run directory released. Other runs on the same images add to it (dprandp compare "
        "composes them). Images of the same person, or duplicates, are protected singly and not as a group."
    ),
}

DISCRETE_LIMITS = {
    "Limit: floating-point noise (severity low)": (
        "None in the noise: sums and noise are whole multiples of a public granularity, a power of two with 2^"
        f"{LATTICE_BITS} to 2^{LATTICE_BITS + 1} steps to the noise's standard deviation, added as whole numbers. Only "
        "the summands are rounded. A head's sums are made in float64, with errors below the slack of the clip. "
        "Features and gradients of a whole network are float32; where they are computed in batches, their last bits "
        "may depend on other images of the batch."
    ),
    "Limit: tails and timing": (
        "Discrete noise is drawn to within 2^-110 of its exact distribution per coordinate; its distance from Gaussian "
        f"noise takes a part of {DELTA_SHARE:g} of δ. Nothing runs in constant time: somebody who can time the "
        "training may learn from that."
    ),
}

UNIT_LIMITS = {
    "Limit: N is treated as public": (
        "The number of units ({one}) sets the sampling rate, the divisor and δ; it is printed here, as is the "
        "number of images. If they are secret, this guarantee does not cover them."
    ),
    "Limit: other copies": (
        "ε counts what this run directory released. Other runs on the same images add to it (dprandp compare "
        "composes them). All images of one {one} are protected together if the column gives them the same value; "
        "images of one person under two values, or duplicates in two units, are not."
    ),
}


def disclosure(
    result: PrivateResult,
    pretrain: PretrainResult | None = None,
    generate: GenerateResult | None = None,
    continued: ContinueResult | None = None,
    *,
    changed: Sequence[str] | None = None,
) -> list[tuple[str, str]]:
    """Everything a reader needs to judge the guarantee of one private stage.

    Args:
        result: the stage's result.
        pretrain, generate, continued: results of the stages before it, None where there are none.
        changed: settings other than the defaults, as ``"steps = 300 (default 120)"``; None if not known.

    Returns:
        (label, value) pairs of plain text, always the same labels in the same order.
    """
    record = noun(result) if several_images(result) else "example"
    expected, seen = number(result.expected_batch), result.input_size
    update, trained, refit = f"SGD on the noisy gradients, momentum {result.momentum:g}", "the head only", None
    if not isinstance(result, ProbeResult):
        update, trained = result.optimizer, "all"
    if isinstance(result, FinetuneResult):
        trained, refit = result.trained_weights, result.refit
        if result.head_steps:
            update += f"; the first {result.head_steps} steps train the head and the last norm alone, at learning rate "
            update += f"{number(result.head_lr)}"
        update += f"; hyper-parameters of the recipe {result.recipe}" if result.recipe else ""
    limits = dict(LIMITS)
    if result.noise == "discrete":
        limits |= DISCRETE_LIMITS
    if several_images(result):
        limits |= {label: text.format(one=noun(result)) for label, text in UNIT_LIMITS.items()}
    if result.shared_units_allowed:
        limits["Limit: test split"] += (
            f" The user allowed units in both splits (--allow-shared-units): images of a {noun(result)} may be in "
            "both, and then the figures are better than they would be for others."
        )
    return [
        ("Mechanism", _mechanism(result, record)),
        ("ε (privacy loss)", _epsilon(result)),
        ("Also counted in ε", _also_charged(result)),
        ("δ", _delta(result)),
        ("Adjacency", _adjacency(result, record)),
        ("Unit of privacy", result.unit),
        ("Several records together", _groups(result)),
        ("N (training examples)", _size(result)),
        ("Test split", result.split_rule or "as the data set has it"),
        ("Images as the network sees them", f"{seen} × {seen} pixels" if seen else "not recorded"),
        ("Decoding of image files", result.decoding or "no rules were declared: ambiguous files are refused"),
        ("q (sampling rate)", f"{number(result.sample_rate)} per step, expected batch qN = {expected}"),
        ("T (noisy steps)", _steps(result)),
        ("σ (noise multiplier)", f"{number(result.noise_multiplier)} (noise std over clip norm)"),
        ("C (clip norm)", f"{number(result.clip_norm)} (L2 norm of one {record}'s gradient)"),
        ("K (views per example)", f"{result.views}, their gradients averaged before the clip"),
        ("Loss", _loss(result)),
        ("Update", update),
        ("Trained weights", trained),
        ("Layers replaced (they mix images)", result.replaced or "none"),
        ("Second mechanism (refit)", _refit(refit)),
        ("Accountant", f"{result.accountant}, upper bound"),
        ("Random numbers", OS_ENTROPY if result.random == "os-entropy" else f"{result.random}{SEEDED}"),
        ("Arithmetic", f"network computed in {result.precision}; sums and noise in float64"),
        ("Released", f"{RELEASED.get(result.released, result.released)}, and the test metrics"),
        ("Tuning, and its data", _tuned(result, changed)),
        ("Public inputs", _public_inputs(result, pretrain, generate, continued)),
        *limits.items(),
    ]


# -------------------------------------------------------------------------------------------------------- what ε means


def why_not_private(result: PrivateResult) -> str | None:
    """The reason for the stamp NOT PRIVATE, or None for a private result."""
    if math.isinf(result.epsilon) or result.noise_multiplier == 0:
        return "It was trained without noise (ε = ∞): there is no guarantee at all."
    if result.random != "os-entropy":
        return (
            "Its noise came from a seed (--insecure-seed): anyone who knows or guesses the seed can remove the noise, "
            "so the computed ε is void."
        )
    if not result.private:
        return "An earlier step of this run had no noise, or noise from a seed (see privacy/ledger.jsonl): ε is void."
    return None


FALSE_ALARMS = 0.01


def detected_at_most(result: PrivateResult, epsilon: float) -> float:
    """The most true positives, in [0, 1], of a membership test with ``FALSE_ALARMS`` false positives.

    Args:
        result: of a private stage, with a finite ε.
        epsilon: of everything released, at the result's δ; larger than the result's ε if more was spent since.

    Full batches, and several stages under the Gaussian-DP filter, allow no more than the Gaussian mechanism through
    (ε, δ): Φ(Φ⁻¹(α) + μ) (Dong, Roth & Su 2022, "Gaussian Differential Privacy", equation 6), and the filter's slack.
    One sampled stage alone has its own curve (``privacy.neighbours``), private tuning only the point (ε, δ).
    """
    if result.tuned and result.tuned.charged_epsilon > 0:
        return point_rate(epsilon, result.delta, FALSE_ALARMS)
    slack = (SLACK + DELTA_SHARE) * result.delta
    alone = not result.also_charged and not getattr(result, "refit", None) and epsilon <= result.epsilon
    if alone and result.sample_rate < 1:
        steps = max(result.steps, result.charged_steps)  # a sampled stage counts with its whole plan
        attacker = trade_off([GaussianEvent(result.noise_multiplier, result.sample_rate, steps)])
        return min(1.0, attacker.true_positive_rate(FALSE_ALARMS) + slack)
    return min(1.0, gaussian_rate(FALSE_ALARMS, gaussian_dp_mu(epsilon, result.delta)) + slack)


def privacy_sentence(result: PrivateResult, epsilon: float | None = None) -> str:
    """The meaning of the guarantee, in one or two sentences.

    Args:
        result: of a private stage.
        epsilon: the ε to explain, if more was spent than the result states.
    """
    reason = why_not_private(result)
    if reason is not None:
        return f"NOT PRIVATE. {reason} Handle the model as you handle the training images."
    rate = detected_at_most(result, result.epsilon if epsilon is None else epsilon)
    released = "released up to the end of this stage" if epsilon is None else "has released so far"
    known, hidden = "every training image but one", "that image"
    if several_images(result):
        known, hidden = f"every training image but those of one {noun(result)}", f"that {noun(result)}"
    return (
        f"Suppose an attacker knows {known}, sees all that this run {released}, and accepts "
        f"1\u00a0% false alarms: the presence of {hidden} is then detected at most "
        f"{percent(rate, up=True)} of the time, where guessing gives 1\u00a0%."
        + (f" This is about training images: --allow-shared-units let the same {noun(result)} have images in the test "
           "split, and what the test figures tell about those is not counted in ε."
           if result.shared_units_allowed else "")
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- numbers


def epsilon_text(epsilon: float) -> str:
    """ε to three decimals, rounded up."""
    if math.isinf(epsilon):
        return "∞"
    return f"{math.ceil(epsilon * 1000 - 1e-9) / 1000:.3f}".rstrip("0").rstrip(".")


def number(value: float | None) -> str:
    """A number for people: at most six significant digits, ∞ for infinity, – for none."""
    if value is None:
        return "–"
    if isinstance(value, float) and math.isinf(value):
        return "∞"
    if isinstance(value, int):
        return str(value)
    return re.sub(r"e([+-])0+", r"e\1", f"{value:.6g}").replace("e+", "e")


def percent(value: float, up: bool = False) -> str:
    """``0.4312`` as ``43.1 %`` with a space that does not break; ``up`` rounds up."""
    tenths = math.ceil(value * 1000 - 1e-9) if up else round(value * 1000)
    return f"{tenths / 10:g}\u00a0%"


# ------------------------------------------------------------------------------------- wording shared with the card


def interval_text(interval: tuple[float, float] | None, scale: float = 100.0) -> str:
    """``(0.8417, 0.8975)`` as ``84.2 to 89.7``, rounded outwards so that it covers the interval; – for none."""
    if interval is None:
        return "–"
    places = 10 if scale == 100 else 1000
    low, high = interval[0] * scale * places, interval[1] * scale * places
    return f"{math.floor(low + 1e-9) / places:g} to {math.ceil(high - 1e-9) / places:g}"


def figures(result: PrivateResult) -> list[tuple[str, str, str]]:
    """Each figure of the test split: name, value, 95 % interval (– where none is recorded)."""
    several = result.multi_label
    usual = "giving each label its more frequent answer" if several else "predicting the most frequent class"
    balanced = "recall of yes and of no, over the labels" if several else "recall"
    shown = [
        ("accuracy", "accuracy, mean over the labels" if several else "accuracy", result.accuracy),
        ("majority_accuracy", f"accuracy of always {usual}", result.majority_accuracy),
        ("balanced_accuracy", f"balanced accuracy (mean {balanced})", result.balanced_accuracy),
    ]
    if result.sensitivity is not None and len(result.classes) == 2:
        shown.append(("sensitivity", f"sensitivity (recall of {result.classes[1]})", result.sensitivity))
    if result.specificity is not None and len(result.classes) == 2:
        shown.append(("specificity", f"specificity (recall of {result.classes[0]})", result.specificity))
    rows = [(label, percent(value), _percents(result.interval(name))) for name, label, value in shown]
    area = "–" if result.auc is None else f"{result.auc:.4f}"
    label = "AUC" if len(result.classes) == 2 else "macro AUC, one class against the rest"
    label = "mean AUC over the labels" if several else label
    rows.append((label, area, interval_text(result.interval("auc"), 1)))
    if result.kappa is not None:
        interval = interval_text(result.interval("kappa"), 1)
        rows.append(("kappa of the grades, quadratic weights", f"{result.kappa:.4f}", interval))
    return [*rows, ("loss, nats", number(result.loss), "–")]


def model_warnings(result: PrivateResult) -> list[str]:
    """What must be said before anybody uses the model; empty if nothing. From the figures of its test split."""
    said = []
    figure, least, words = "accuracy", result.majority_accuracy, "always saying the most frequent class: accuracy"
    other = f"that class {percent(least)}"
    if result.multi_label:  # few images have a rare label, so that accuracy says little
        figure, least, words, other = "auc", 0.5, "guessing: mean AUC", "guessing 50\u00a0%"
    elif result.class_shares is not None:  # the loss gave accuracy up for it
        least = 1 / sum(any(row) for row in result.confusion)
        figure, words, other = "balanced_accuracy", "guessing: balanced accuracy", f"guessing {percent(least)}"
    value, interval = getattr(result, figure), result.interval(figure)
    if interval is not None and interval[0] <= least:
        said.append(
            f"the model is not better than {words} {percent(value)} (95\u00a0%: {_percents(interval)}), {other}"
        )
    never = _never_predicted(result)
    if never:
        more = f" and {len(never) - SHOWN_CLASSES} more" if len(never) > SHOWN_CLASSES else ""
        kind = ("label", "the labels") if result.multi_label else ("class", "the classes")
        names = f"{kind[len(never) > 1]} {', '.join(never[:SHOWN_CLASSES])}{more}"
        above = " with a probability above .5" if result.multi_label else ""
        said.append(f"the model never predicts {names}{above}")
    return said


def _never_predicted(result: PrivateResult) -> list[str]:
    """Classes or labels that test images have, and that the model gives to none of them."""
    if result.confusion is None:
        rows = zip(result.classes, result.per_class or (), strict=False)
        return [name for name, each in rows if each.recall is not None and each.precision is None]
    named = map(sum, zip(*result.confusion, strict=True))
    return [name for name, of, of_model in zip(result.classes, result.confusion, named, strict=True)
            if sum(of) and not of_model]  # fmt: skip


def class_figures(result: PrivateResult) -> list[tuple[str, ...]]:
    """The head of a table, then for each class: name, recall, its interval, precision, its interval; for each of
    several labels an image also AUC and its interval. Empty where they are not recorded."""
    if not result.per_class:
        return []
    rows = [("label" if result.multi_label else "class", "recall", INTERVAL, "precision", INTERVAL)]
    for name, each in zip(result.classes, result.per_class, strict=True):
        recall = "no test image" if each.recall is None else percent(each.recall)
        precision = "never predicted" if each.precision is None else percent(each.precision)
        rows.append((name, recall, _percents(each.recall_interval), precision, _percents(each.precision_interval)))
    if not result.multi_label:
        return rows
    areas = [("AUC", INTERVAL)] + [
        ("–" if each.auc is None else f"{each.auc:.3f}", interval_text(each.auc_interval, 1))
        for each in result.per_class
    ]
    return [row + area for row, area in zip(rows, areas, strict=True)]


def _percents(interval: tuple[float, float] | None) -> str:
    return "–" if interval is None else f"{interval_text(interval)}\u00a0%"


def several_images(result: PrivateResult) -> bool:
    """Whether a unit of privacy may have several images."""
    return result.unit != ONE_IMAGE


def noun(result: PrivateResult) -> str:
    """The noun for one record: ``image``, or the name of the column, such as ``patient``."""
    return result.unit.removeprefix("one ").split(" (column ")[0]


def from_scratch(result: PrivateResult) -> bool:
    """Whether the network began with random weights."""
    return isinstance(result, FinetuneResult) and result.source == "scratch"


def public_weights(result: PrivateResult, pretrain: PretrainResult | None) -> str | None:
    """The source of a network's initial weights, if a file; that they are public was declared, not checked."""
    own = isinstance(result, FinetuneResult) and result.source in WITHOUT_PHASE_ONE
    of = result if own else pretrain
    if of is None or not of.init_sha256:
        return None
    return (
        f"weights from {'a file' if of.init_file is None else f'the file {of.init_file}'} (sha256 {of.init_sha256}), "
        f"declared public by the user, in these words: “{of.init_source}”. This program cannot check that: if the file "
        "was made from the private images, "
        "or from anything else that must stay hidden, ε does not cover it"
        + (f". By its own description {of.init_origin}" if of.init_origin else "")
    )


def public_steps(training: PublicTraining) -> str:
    """The public training of ``continue``."""
    weight = {"cosine": "with a weight that rose from 0 towards 1", "ratio": "by the ratio of the numbers of examples"}
    mix, switch = training.mix, training.switch
    said = f"{training.steps} steps on public images only ({training.images})"
    if mix in ("cosine", "ratio", "private"):
        said += f"; {switch}"
    elif mix != "public":
        said += f"; private steps began {switch}"
    return said + (f"; a public gradient was mixed into every private step, {weight[mix]}" if mix in weight else "")


def shipped_prior(pretrain: PretrainResult, generate: GenerateResult | None) -> str:
    """The shipped prior that a run used instead of learning an extractor, with its hash."""
    process = f" of the random process {generate.process}" if generate else ""
    return (
        f"the prior {pretrain.prior} that dprandp ships (sha256 {pretrain.prior_sha256}), an extractor "
        f"({pretrain.arch}) learned from {pretrain.prior_images} synthetic images{process}, made without any data"
    )


# ------------------------------------------------------------------------------------- rows of the list


def _mechanism(result: PrivateResult, record: str) -> str:
    if result.noise_multiplier == 0:
        return "None: clipped gradient sums without noise. This is not a private mechanism."
    batch = f"Poisson-subsampled Gaussian mechanism (DP-SGD): each {record} joins a step's batch independently with q"
    if result.sample_rate == 1:
        batch = f"Gaussian mechanism on full batches (DP-SGD): all {record}s take part in every step"
    gradient = "each example's gradient"
    if several_images(result):
        gradient = f"each {record}'s gradient, the mean over all its images,"
    clip = {
        "automatic": "is scaled to just below L2 norm C, for every length (automatic clipping, Bu et al. 2023)",
        "rescaled": "is clipped to L2 norm C (sum and noise are then divided by C: De et al. 2022)",
    }.get("norm" if isinstance(result, ProbeResult) else result.clipping, "is clipped to L2 norm C")
    noise = "the sum gets noise N(0, (σC)²) per coordinate"
    if result.noise == "discrete":
        noise = (
            "the sum is rounded to a lattice and gets discrete Gaussian noise (Canonne, Kamath & Steinke 2020) of std "
            "σC per coordinate"
        )
    return (
        f"{batch}; {gradient} {clip}; {noise}, "
        "once per step, and is divided by the public qN, not by the size of the drawn batch."
    )


def _loss(result: PrivateResult) -> str:
    said = "softmax cross-entropy of one class an image"
    if result.multi_label:
        said = f"sum of the binary cross-entropies of {len(result.classes)} labels, clipped together as one gradient"
    if result.class_shares is None:
        return f"{said}, all classes weighted alike" if not result.multi_label else said
    shares = ", ".join(f"{name} {share:g}" for name, share in zip(result.classes, result.class_shares, strict=True))
    kind = "labels" if result.multi_label else "classes"
    return (
        f"{said}, weighted by the shares of the {kind} that the user declared: {shares}. This program did not compute "
        "them; ε does not cover shares that were counted in the private labels"
    )


def _epsilon(result: PrivateResult) -> str:
    if math.isinf(result.epsilon):
        return "∞: NOT PRIVATE, no noise was added"
    void = "" if why_not_private(result) is None else " VOID, NOT PRIVATE (see random numbers)."
    return (
        f"{epsilon_text(result.epsilon)}, upper bound for everything that this run released up to the end of this "
        f"stage. Target of the stage {number(result.epsilon_target)}, of the run "
        f"{number(result.epsilon_total)}.{void}"
    )


def _also_charged(result: PrivateResult) -> str:
    """The ledger's other charges: stages before this one, and abandoned attempts."""
    parts = [
        f"{charged.stage}" + (f", attempt {charged.attempt}" if charged.attempt > 1 else "") + ": "
        f"q = {number(charged.sample_rate)}, T = {charged.charged_steps}, "
        f"σ = {number(charged.noise_multiplier)}, C = {number(charged.clip_norm)}"
        for charged in result.also_charged
    ]
    return "; ".join(parts) or "nothing: the run's ledger holds only this stage, and what is named below"


def _delta(result: PrivateResult) -> str:
    """δ, and its ratio to 1/N, at which one record could be published."""
    share = result.delta * result.train_units
    said = f"{number(result.delta)}, which is {share:.2g}/N"
    if share <= ADVISED_SHARE * (1 + 1e-9):
        return said
    return (
        f"{said}. At 1/N, publishing one whole record at random would count as private; at most {ADVISED_SHARE:g}/N is "
        "advised, unless results are compared with others that are published at this δ"
    )


def _adjacency(result: PrivateResult, record: str) -> str:
    said = f"{result.adjacency} (how neighbouring data sets differ)"
    if not result.adjacency.startswith("zero-out"):
        return said
    return (
        f"{said}: the slot of one {record} is left empty, so that it contributes nothing to any sum; N, q, the "
        "divisor and all other positions stay the same. The accountant's theorems for adding or removing a record "
        "bound the same sums, with the record and without it"
    )


def _groups(result: PrivateResult) -> str:
    """The guarantee for several records together."""
    epsilon, delta = result.epsilon, result.delta
    if math.isinf(epsilon) or not result.private:
        return f"no guarantee, as for one {noun(result)}"
    exact = result.accountant.startswith("exact Gaussian DP") and result.noise == "gaussian"
    parts = []
    for size in GROUP_SIZES:
        if exact:
            bound, at = gaussian_dp_epsilon(size * gaussian_dp_mu(epsilon, delta) * (1 + 1e-9), delta), ""
        else:
            bound, group_delta = group_privacy(epsilon, delta, size)
            at = f" with δ = {rounded_up(min(1.0, group_delta), 2)}"
        parts.append(f"{size}: ε = {math.ceil(bound * 100 - 1e-9) / 100:g}{at}")
    how = f"exact, at δ = {delta:g}" if exact else "a bound that holds for any mechanism, not tight"
    return f"together, by their number: {'; '.join(parts)} ({how}). dprandp account --group-size k finds better ones."


def _size(result: PrivateResult) -> str:
    if several_images(result):
        return (
            f"N = {result.train_units} units, with {result.train_examples} images in all; "
            "both numbers are treated as public"
        )
    said = f"{result.train_examples}, treated as public"
    if result.public_part is None:
        return said
    return (
        f"{said}; a random part of the training images ({result.public_part}) was declared public by the user: it "
        "is not among them, and not protected"
    )


def _steps(result: PrivateResult) -> str:
    text = f"{result.steps} planned, {result.charged_steps} charged to the ledger"
    if result.lost_steps:
        text += f"; {result.lost_steps} of these were lost in interruptions: charged, but not part of the model"
    return text


def _refit(refit: Refit | None) -> str:
    if not refit:
        return "none"
    lost = f", {refit.lost_steps} of them lost in interruptions" if refit.lost_steps else ""
    return (
        f"then the head alone, on the features of the tuned extractor, with the remaining ε: "
        f"q = {number(refit.sample_rate)}, T = {refit.steps}{lost}, σ = {number(refit.noise_multiplier)}, "
        f"C = {number(refit.clip_norm)}, K = 1"
    )


def _tuned(result: PrivateResult, changed: Sequence[str] | None) -> str:
    parts = [_tuned_here(result.tuned) + "."]
    if result.tuned_on:
        parts.append(f"Declared of settings tuned elsewhere: tuned on “{result.tuned_on}”.")
    parts.append(DEFAULTS_CHOSEN_ON)
    if changed is not None:
        own = f"Not default: {', '.join(changed)}."
        parts.append(own if changed else "All settings of this stage are defaults.")
    return " ".join(parts)


def _tuned_here(tuned: Tuned | None) -> str:
    """The tuning of this run: its data, its trials, its cost."""
    if not tuned:
        return "None in this run: the program chose neither epochs nor settings by results"
    names = ", ".join(tuned.settings) or "settings that are not recorded (tune.json is missing)"
    cost = f"ε = {epsilon_text(tuned.charged_epsilon)} by itself, part of the ε above"
    if tuned.on == "private":
        said = (
            f"{names} of the probe, on the private data, charged: the best of a random number of private trials "
            f"({tuned.trials} expected), {cost}"
        )
    else:
        what = f"the training split of {tuned.on}, declared public by the user"
        if tuned.on == "synthetic":
            what = "synthetic images of this run"
        said = f"{names} of the probe, on {what}: {tuned.trials} settings tried under simulated noise, no cost in ε"
        if tuned.charged_epsilon > 0:
            said += f"; before that on the private data, {cost}"
    if not tuned.settings:
        return said + "; whether this stage ran with them is not known"
    return said if tuned.used else said + "; the stage ran with other settings"


def _public_inputs(
    result: PrivateResult,
    pretrain: PretrainResult | None,
    generate: GenerateResult | None,
    continued: ContinueResult | None,
) -> str:
    """All inputs of a stage except the private images."""
    declared = (
        f"declared facts of the data set ({result.title}: {len(result.classes)} class names, N, image size"
        f"{'' if result.class_shares is None else ', class shares'}); the configuration; the code. Normalisation and "
        "whitening use constants or synthetic images, never private ones."
    )
    weights = public_weights(result, pretrain)
    if isinstance(result, FinetuneResult) and weights and result.init_sha256:
        return f"{weights[0].upper()}{weights[1:]}; {declared}"
    if from_scratch(result) or pretrain is None:
        arch = f" ({result.arch})" if isinstance(result, FinetuneResult) else ""
        return f"A randomly initialised network{arch}; {declared}"
    if isinstance(result, ContinueResult):
        declared = f"{public_steps(result.public_training)}; {declared}"
    if continued is not None:
        private = "without private images"
        if isinstance(continued, PrivateResult):
            private = f"then {continued.charged_steps} private steps on {continued.title}, counted in ε"
        declared = f"continued: {public_steps(continued.public_training)}; {private}; {declared}"
    images = "synthetic images"
    if generate:
        images = f"{generate.count} synthetic images of the random process {generate.process}"
    if weights:
        return f"{weights}; for its statistics {images}, made without any data; {declared}"
    if pretrain.prior:
        return f"{shipped_prior(pretrain, generate)}; for its statistics {images}, made without any data; {declared}"
    learned = "a randomly initialised extractor" if pretrain.random_init else "an extractor learned from them"
    return f"{images}, made without any data; {learned} ({pretrain.arch}); {declared}"
