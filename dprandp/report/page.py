"""report.html: accuracy and privacy of a run, and their meaning, on one page, from the run's public files.

The page is self-contained: its style, drawings and pictures are inside. It runs no script and loads nothing, and its
content security policy forbids both.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dprandp import __version__
from dprandp.config import toml
from dprandp.config.schema import public_data_name
from dprandp.report.disclosure import disclosure, epsilon_text, number, percent, privacy_sentence, why_not_private
from dprandp.report.figures import curve, heat_picture, preview_image
from dprandp.report.markup import Markup, raw, section, table, tag, text
from dprandp.report.run import PRIVATE_STAGES, Run, changed_settings, is_number, read_run
from dprandp.runs import faults
from dprandp.runs.directory import OPTIONAL_STAGES, RunDir
from dprandp.runs.files import atomic_write

# ------------------------------------------------------------------------------------------------------------ headline
#
# The top of the report: accuracy, ε, and their meaning.


def headline(run: Run) -> Markup:
    """The headline block of a run with any stages."""
    result = run.final
    if result is None:
        return _without_classifier(run)
    reason = not_private_reason(run)
    data = public_data_name(result["data"])
    title = f"{result['title']}: {'differentially private ' if reason is None else ''}image classifier"
    return tag(
        "header",
        tag("h1", title),
        tag("p", f"Run {run.name}. Data set {data}, after stage {result['stage']}.", class_="soft"),
        badge(reason),
        _notes(run, result),
        _numbers(run, result, reason),
        tag("p", accuracy_sentence(result)),
        tag("p", _privacy_sentence(run, result)) if reason is None else None,
    )


def badge(reason: str | None) -> Markup:
    """The badge PRIVATE, or a banner NOT PRIVATE."""
    if reason is None:
        return tag("p", tag("span", "PRIVATE", class_="badge"))
    explanation = f"{reason} Handle the model as you handle the training images."
    return tag("div", tag("strong", "NOT PRIVATE"), tag("p", explanation), class_="banner", role="alert")


def not_private_reason(run: Run) -> str | None:
    """Why the run's result is not private; None if it is."""
    if run.final is not None:
        reason = why_not_private(run.final)
        if reason is not None:
            return reason
    if math.isinf(run.spending.epsilon):
        return "The ledger holds steps without noise (ε = ∞): there is no guarantee at all."
    if run.spending.insecure:
        return "The ledger holds steps whose noise came from a seed (--insecure-seed), so the computed ε is void."
    return None


def accuracy_sentence(result: dict[str, Any]) -> str:
    """The meaning of the accuracy, with the uncertainty of a finite test split."""
    low, high = wilson(result["accuracy"], result["test_examples"])
    return (
        f"The finished model was evaluated on the {result['test_examples']} test images once, and they chose "
        f"nothing: it assigned {percent(result['accuracy'])} of them to the right one of "
        f"{len(result['classes'])} classes (95\u00a0% interval for new images of this kind: {percent(low)} to "
        f"{percent(high)}; one training, one random draw); always predicting the most frequent class "
        f"would be right in {percent(result['majority_accuracy'])}."
    )


def wilson(share: float, count: int, deviations: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (Wilson 1927).

    Args:
        share: observed, in [0, 1].
        count: of how many, at least 1.
        deviations: standard deviations to each side.
    """
    z2 = deviations**2 / count
    centre = (share + z2 / 2) / (1 + z2)
    half = deviations * math.sqrt(share * (1 - share) / count + z2 / (4 * count)) / (1 + z2)
    return max(0.0, centre - half), min(1.0, centre + half)


def _numbers(run: Run, result: dict[str, Any], reason: str | None) -> Markup:
    epsilon, delta = run.spending.epsilon, result["delta"]
    if reason is None:
        shown, below = epsilon_text(epsilon), f"of {number(run.spending.total)} allowed"
    elif math.isinf(epsilon):
        shown, below = "∞", "no noise"
    else:
        shown, below = "void", f"computed {epsilon_text(epsilon)}, which does not hold"
    cards = [
        ("Test accuracy", percent(result["accuracy"]), f"{result['test_examples']} images", True),
        ("ε, spent", shown, below, True),
        ("δ", _power(delta), f"chance that ε fails; unit: {result['unit']}", True),
        ("Majority baseline", percent(result["majority_accuracy"]), "most frequent class", False),
        ("Balanced accuracy", percent(result["balanced_accuracy"]), "mean over classes", False),
        ("AUC", "–" if result["auc"] is None else f"{result['auc']:.3f}", "one class against the rest", False),
    ]
    return tag(
        "dl",
        (
            tag("div", tag("dt", name), tag("dd", value, tag("small", below)), class_="big" if big else None)
            for name, value, below, big in cards
        ),
        class_="numbers",
    )


def _power(value: float) -> Markup:
    """``1e-05`` as 10⁻⁵."""
    if value >= 0.01:
        return tag("span", number(value))
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    factor = f"{float(mantissa):g}"
    return tag("span", "" if factor == "1" else f"{factor}·", "10", tag("sup", f"−{abs(int(exponent))}"))


def _privacy_sentence(run: Run, result: dict[str, Any]) -> str:
    exact = all(run.results[stage]["sample_rate"] == 1 for stage in run.private_stages)
    return privacy_sentence(result, run.spending.epsilon, exact=exact and not run.spending.unfinished)


def _notes(run: Run, result: dict[str, Any]) -> list[Markup]:
    notes = []
    row = run.row(result["stage"])
    if row["state"] == "stale":
        notes.append(
            f"Stage {result['stage']} is stale: {'; '.join(row['reasons'])}. The public stages shown below may not be "
            f"those it was made from."
        )
    open_stages = [r["stage"] for r in run.rows if r["stage"] in PRIVATE_STAGES and r["state"] == "partial"]
    if open_stages:
        notes.append(f"Stage {open_stages[-1]} was begun but is not finished.")
    if run.spending.unfinished:
        notes.append(
            f"ε counts the whole ledger, including steps that no finished stage reports: "
            f"{epsilon_text(run.spending.epsilon)} instead of {epsilon_text(result['epsilon'])}."
        )
    return [tag("p", note, class_="note") for note in notes]


def _without_classifier(run: Run) -> Markup:
    spent = run.spending
    if spent.epsilon == 0:
        privacy = "No private data was read, and no privacy was spent."
    else:
        privacy = (
            f"No private stage is finished; tuning or an unfinished stage has spent ε = {epsilon_text(spent.epsilon)} "
            f"at "
            f"δ = {number(spent.delta)} of {number(spent.total)}."
        )
    reason = not_private_reason(run)
    return tag(
        "header",
        tag("h1", "No classifier yet"),
        tag("p", f"Run {run.name}.", class_="soft"),
        badge(reason) if reason else None,
        tag("p", privacy),
    )


# ------------------------------------------------------------------------------------------------------------ sections
#
# The report below its headline, one function per section.

TABLE_CLASSES = 20
"""Most classes of a confusion matrix that is shown as a table."""

PHASES = {
    "generate": "synthetic images",
    "pretrain": "feature extractor",
    "continue": "public, then private steps on the extractor",
    "probe": "private head",
    "finetune": "private fine-tune",
}

CURVES = {
    "loss": ("loss", "loss on synthetic images"),
    "similarity": ("similarity", "mean projection of whitened synthetic patches on their dictionary atom"),
    "knn_accuracy": ("accuracy", "held-out synthetic images recognised by the nearest neighbour of another crop"),
    "linear_accuracy": ("accuracy", "held-out synthetic images recognised by a linear classifier of another crop"),
    "alignment": ("distance²", "alignment: mean squared distance of two crops of a held-out synthetic image"),
    "uniformity": ("log mean", "uniformity of held-out synthetic images on the sphere; lower is more spread"),
    "effective_rank": ("rank", "effective rank of the features of held-out synthetic images"),
    "public_loss": ("loss", "loss of held-out public images"),
    "slowdown": ("ratio", "the decelerator over the other terms, on public images"),
    "update_norm": ("norm", "norm of the noisy update (signal and noise)"),
    "weight_norm": ("norm", "norm of the head's weights"),
}


def timeline(run: Run) -> Markup:
    """The stages: state, time, outcome."""
    told = (row for row in run.rows if row["state"] != "missing" or row["stage"] not in OPTIONAL_STAGES)
    return section("Stages", tag("ol", (_stage(run, row) for row in told), class_="stages"), id_="stages")


def synthetic(run: Run) -> Markup:
    """The contact sheet."""
    result = run.results.get("generate")
    if result is None or run.preview is None:
        return Markup("")
    caption = (
        f"Some of the {result['count']} images that the random process {result['process']} made at "
        f"{result['resolution']} px. No photograph and no private image went into them."
    )
    picture = preview_image(run.preview, f"Contact sheet of synthetic images of the process {result['process']}")
    return section("Synthetic images", tag("figure", picture, tag("figcaption", caption)), id_="synthetic")


def curves(run: Run) -> Markup:
    """Every quantity of every metrics.jsonl over its steps."""
    figures = []
    for stage, lines in run.metrics.items():
        lines = [line for line in lines if is_number(line.get("step"))]
      
        for key, (label, meaning) in CURVES.items():
            points = [(line["step"], line[key]) for line in lines if key in line]
            points = [(step, value if is_number(value) else None) for step, value in points]
            if sum(value is not None for _, value in points) < 2:
                continue
            title = f"{stage}: {meaning}"
            drawn = curve(f"{stage}-{key}", *zip(*points, strict=True), title=title, label=label)
            figures.append(tag("figure", drawn, tag("figcaption", title)))
    if not figures:
        return Markup("")
    note = tag(
        "p",
        "Curves of the private stages show only functions of noisy updates, which are charged. Training loss and "
        "training accuracy on private images are not published.",
        class_="soft",
    )
    private = any(stage in run.metrics for stage in run.private_stages)
    return section("Learning curves", note if private else None, tag("div", figures, class_="curves"), id_="curves")


def budget(run: Run) -> Markup:
    """How much of the run's ε was spent, and by which stage."""
    spent, total = run.spending, run.spending.total
    stages = [run.results[stage] for stage in run.private_stages]
    if total is None or (not stages and spent.epsilon == 0):
        return Markup("")
    if math.isinf(total) or math.isinf(spent.epsilon):
        return section("Budget", tag("p", "No budget was set (ε = ∞): the run is NOT PRIVATE."), id_="budget")
    marks = [(result["stage"], result["epsilon"]) for result in stages]
    if spent.unfinished:
        marks.append(("other", spent.epsilon))
    scale = max(total, spent.epsilon)
    parts, items, reached = [], [], 0.0
    for name, epsilon in sorted(marks, key=lambda mark: mark[1]):
        parts.append(tag("span", class_=name, style=f"width: {100 * (epsilon - reached) / scale:.2f}%"))
        after = "steps of unfinished stages or tuning" if name == "other" else name
        items.append(tag("li", tag("i", class_=name), f"ε = {epsilon_text(epsilon)} spent after {after}"))
        reached = epsilon
    at = tag("span", f"at δ = {number(spent.delta)}", class_="whole")
    items.append(tag("li", tag("i"), f"ε = {number(total)} is the budget of the run, ", at))
    label = f"{epsilon_text(spent.epsilon)} of {number(total)} spent"
    bar = tag("div", parts, class_="bar", role="img", aria_label=label)
    note = tag("p", "The bar shows cumulative ε: stages compose to less than the sum of their ε.", class_="soft")
    void = tag("p", "NOT PRIVATE: these figures do not hold.") if not_private_reason(run) else None
    return section("Budget", void, bar, tag("ul", items, class_="legend"), note, id_="budget")


def audit(run: Run) -> Markup:
    """The result of the audit, if there was one."""
    if run.audit is None:
        return Markup("")
    rows = []
    for found in run.audit["mechanisms"]:
        game, one, controls = found["two_world"], found["one_run"], found["controls"]
        claimed = found["epsilon_claimed"]
        caught = sum(control["flagged"] for control in controls)
        rows.append(
            [
                found["name"],
                f"≤ {epsilon_text(claimed)}",
                f"≥ {_share(game, claimed)} ({game['trials']} trials with the record and without)",
                _less_noise(game),
                f"≥ {_share(one, claimed)} ({one['canaries']} canaries)" if one else "not for paid tuning",
                "contradicts" if found["replay"]["flagged"] else "exact",
                f"{caught} of {len(controls)} flagged" if controls else "not run",
            ]
        )
    head = ["mechanism", "ε claimed", "ε shown by the distinguishing game", "it would see less noise",
            "ε shown by one run", "record and replay", "controls"]  # fmt: skip
    caption = f"Attacks on each mechanism against its claim, significance {number(run.audit['significance'])}"
    outcome = {True: "Nothing contradicts the claims.", False: "THE AUDIT FAILED: do not rely on the claims."}
    old = "The run's plans have changed since the audit: run dprandp audit again." if run.audit_is_old else None
    return section(
        "Audit",
        tag("p", outcome[run.audit["passed"] is True], f" Outcome: {run.audit['outcome']}."),
        tag("p", old, class_="note") if old else None,
        table(head, rows, caption),
        tag("p", f"Data: {run.audit['data']}. A clean audit is no proof: it detects only gross faults, of the kinds "
            "that it injects.", class_="soft"),
        id_="audit",
    )  # fmt: skip


def _share(bound: dict[str, Any], claimed: float) -> str:
    """A bound, and what part of the claim it is."""
    lower = bound["epsilon_lower"]
    return f"{number(lower)}, {100 * lower / claimed:.0f} % of the claim"


def _less_noise(game: dict[str, Any]) -> str:
    """How likely a contradiction would have been, were the noise too small by a factor."""
    seen = [entry for entry in game.get("power", []) if entry["factor"] > 1]
    return ", ".join(f"{entry['factor']:g} times less: {100 * entry['flagged']:.0f} %" for entry in seen) or "not known"


def confusion(run: Run) -> Markup:
    """The confusion matrix of the final result: a table, or a picture where there are many classes."""
    result = run.final
    if result is None:
        return Markup("")
    matrix, classes = result["confusion"], result["classes"]
    if len(classes) > TABLE_CLASSES:
        content = [_confusion_picture(matrix, classes), _worst_confusions(matrix, classes)]
    else:
        content = [_confusion_table(matrix, classes)]
    return section("Confusion matrix", content, id_="confusion")


def disclosures(run: Run) -> Markup:
    """Every fact of a privacy claim, with a column for each private stage."""
    stages = run.private_stages
    if not stages:
        return Markup("")
    generate = run.results.get("generate")
    columns = [
        dict(disclosure(run.results[stage], run.extractor_of(stage), generate, changed=changed_settings(row)))
        for stage, row in ((stage, run.row(stage)) for stage in stages)
    ]
    rows = []
    for label in columns[0]:
        values = [column[label] for column in columns]
        if len(set(values)) == 1:
            rows.append([label, tag("td", values[0], colspan=len(stages) if len(stages) > 1 else None)])
        else:
            cells = zip(stages, values, strict=True)
            rows.append([label, *(tag("td", value, data_column=stage) for stage, value in cells)])
    if run.spending.opinions:
        said = f"for the run's ledger, with parameters fixed beforehand: {'; '.join(run.spending.opinions)}"
        rows.append(["Other accountants", tag("td", said, colspan=len(stages) if len(stages) > 1 else None)])
    caption = "The guarantee, its assumptions and its limits"
    return section("Disclosure", table(["", *stages], rows, caption, class_="facts"), id_="disclosure")


def configuration(run: Run) -> Markup:
    """The exact configuration of each stage, collapsed."""
    folded = []
    for row in run.rows:
        if row["config"] is None:
            continue
        changed = changed_settings(row)
        remark = f"{len(changed)} not default" if changed else "all default"
        folded.append(
            tag(
                "details",
                tag("summary", f"{row['stage']} ({remark})"),
                tag("p", f"Not default: {', '.join(changed)}") if changed else None,
                tag("pre", tag("code", toml.dumps(row["config"])), tabindex=0),
            )
        )
    return section("Configuration", folded, id_="configuration")


def environment(run: Run) -> Markup:
    """Versions and machine."""
    facts = dict(run.environment)
    for stage in run.private_stages:
        facts[f"device of {stage}"] = run.results[stage]["device"]
    rows = [(name, _plain(value)) for name, value in facts.items()]
    return section("Environment", table([], rows, "Where the run was made", class_="facts"), id_="environment")


def _stage(run: Run, row: dict[str, Any]) -> Markup:
    result = run.results.get(row["stage"])
    seconds = result.get("seconds") if result else None
    took = f" in {duration(seconds)}" if is_number(seconds) else ""
    return tag(
        "li",
        tag("h3", row["stage"], tag("small", PHASES[row["stage"]])),
        tag("p", f"{row['state']}{took}"),
        tag("p", _moment(row["finished"]), class_="soft") if row["finished"] else None,
        tag("p", _outcome(row["stage"], result), class_="soft") if result else None,
        class_=None if row["state"] == "done" else "open",
    )


def _outcome(stage: str, result: dict[str, Any]) -> str:
    if stage == "generate":
        return f"{result['count']} images of {result['process']}, {result['resolution']} px"
    if stage == "pretrain":
        quality = result.get("knn_accuracy")
        learned = "random" if result.get("random_init") else "learned"
        if result.get("prior"):
            learned = f"the shipped prior {result['prior']}"
        neighbours = "" if quality is None else f", k-NN {percent(quality)} on synthetic classes"
        if is_number(result.get("effective_rank")):
            neighbours += f", effective rank {number(round(result['effective_rank']))}"
        if "grey" in result:
            neighbours += " (of the extractor for colour; grey data have their own)"
        return f"{result['arch']}, {learned}, {number(result.get('feature_dim'))} features{neighbours}"
    before = ""
    if stage == "continue":
        public = result["public_training"]
        before = f"{result['arch']}; {public['steps']} steps on {public['images']}; {public['switch']}; "
        if "epsilon" not in result:
            return before + "nothing private was read"
    privacy = f"ε = {epsilon_text(result['epsilon'])}" if result["private"] else "NOT PRIVATE"
    return f"{before}test accuracy {percent(result['accuracy'])}, {privacy}, {result['steps']} steps"


def _moment(stamp: str) -> str:
    """``2026-03-01T09:05:07+00:00`` as ``2026-03-01, 09:05 UTC``."""
    moment = datetime.fromisoformat(stamp).astimezone(UTC)
    return f"{moment:%Y-%m-%d, %H:%M} UTC"


def duration(seconds: float) -> str:
    """Seconds for people: ``14 s``, ``3 min 20 s``, ``2 h 05 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.3g} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _confusion_table(matrix: list[list[int]], classes: list[str]) -> Markup:
    rows = []
    for true, counts in enumerate(matrix):
        total = sum(counts)
        cells = []
        for predicted, count in enumerate(counts):
            share = count / total if total else 0.0
            kind = "soft" if not count else "hit" if true == predicted else "miss"
            # light enough for the count on it
            shade = f"--share: {0.62 * share:.3f}"
            cells.append(tag("td", count, class_=kind, style=shade if count else None, title=percent(share)))
        rows.append([classes[true], *cells, percent(counts[true] / total) if total else "–"])
    head = ["true \\ predicted", *classes, "recall"]
    caption = "Test images: rows are true classes, columns predicted ones; shade is the share of the row"
    return table(head, rows, caption, class_="confusion")


def _confusion_picture(matrix: list[list[int]], classes: list[str]) -> Markup:
    title = f"Confusion matrix of {len(classes)} classes"
    caption = (
        "Rows are true classes, columns predicted ones, by number; blue is right, orange wrong; the shade shows the "
        "share of the true class."
    )
    picture = heat_picture("confusion", matrix, title)
    return tag("figure", picture, tag("figcaption", caption), class_="picture")


def _worst_confusions(matrix: list[list[int]], classes: list[str], most: int = 10) -> Markup:
    wrong = [
        (count / sum(counts), count, classes[true], classes[predicted])
        for true, counts in enumerate(matrix)
        for predicted, count in enumerate(counts)
        if true != predicted and count
    ]
    worst = sorted(wrong, reverse=True)[:most]
    rows = [(true, predicted, count, percent(share)) for share, count, true, predicted in worst]
    return table(["true", "predicted", "images", "share of the class"], rows, "Most frequent confusions")


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


# --------------------------------------------------------------------------------------------------------------- style
#
# The CSS of report.html: one column on a phone, light and dark, and on paper.

CSS = """
:root { color-scheme: light dark;
  --paper: #ffffff; --ink: #1c2127; --soft: #566069; --line: #d5dae0; --panel: #f4f6f8; --accent: #1f6fb5;
  --good: #14633a; --good-panel: #e3f4ea; --bad: #ffffff; --bad-panel: #b3161d; --hit: 47 127 196; --miss: 217 95 2; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #14171b; --ink: #e6e9ec; --soft: #a5aeb8; --line: #3a424b; --panel: #1e2329; --accent: #6cb2f0;
  --good: #8fe0b0; --good-panel: #143524; --bad: #ffffff; --bad-panel: #a81820; --hit: 74 150 216;
  --miss: 226 118 38; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 66rem; padding: 1.5rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  overflow-wrap: break-word; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.25rem 0 .5rem; }
p { margin: .5rem 0; max-width: 46rem; }
.soft, figcaption, caption, dt { color: var(--soft); }
.banner { margin: 1rem 0; padding: .9rem 1.1rem; border-radius: .5rem; background: var(--bad-panel);
  color: var(--bad); }
.banner strong { display: block; font-size: 1.7rem; line-height: 1.2; letter-spacing: .04em; }
.banner p { max-width: none; }
.badge { display: inline-block; padding: .15rem .7rem; border-radius: 1rem; font-weight: 700; letter-spacing: .04em;
  background: var(--good-panel); color: var(--good); border: 1px solid var(--good); }
.note { margin: 1rem 0; padding: .7rem 1rem; border-left: .3rem solid #d95f02;
  background: var(--panel); }
.numbers { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: .75rem; margin: 1.25rem 0; }
.numbers div { background: var(--panel); border-radius: .5rem; padding: .75rem .9rem; }
.numbers dt { font-size: .875rem; }
.numbers dd { margin: 0; font-size: 1.25rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.numbers .big dd { font-size: 2.3rem; line-height: 1.15; font-weight: 700; white-space: nowrap; }
.numbers sup { line-height: 0; font-size: .6em; }
.numbers small { display: block; white-space: normal;
  font-size: .8125rem; font-weight: 400; color: var(--soft); line-height: 1.35; }
ol.stages { list-style: none; margin: 0; padding: 0; display: grid; gap: .75rem;
  grid-template-columns: repeat(auto-fit, minmax(13.5rem, 1fr)); }
ol.stages li { background: var(--panel); border-top: .25rem solid var(--accent); border-radius: .25rem;
  padding: .7rem .9rem; }
ol.stages li.open { border-top-color: var(--line); }
ol.stages h3 { margin: 0; }
ol.stages h3 small { display: block; font-weight: 400; font-size: .9375rem; }
ol.stages p { margin: .25rem 0 0; font-size: .9375rem; }
figure { margin: .75rem 0; }
figcaption { font-size: .875rem; margin-top: .35rem; max-width: 46rem; }
img { max-width: 100%; height: auto; border-radius: .25rem; display: block; }
svg { width: 100%; height: auto; display: block; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1rem 2rem; }
.curves figure { margin: 0; max-width: 32rem; }
.picture { max-width: 36rem; }
.bar { display: flex; height: 1.75rem; border-radius: .3rem; overflow: hidden; background: var(--panel);
  border: 1px solid var(--line); }
.bar span { display: block; min-width: 2px; }
.probe { background: var(--accent); }
.finetune { background: #d95f02; }
.continue { background: #7570b3; }
.other { background: var(--soft); }
ul.legend { list-style: none; padding: 0; margin: .5rem 0; }
ul.legend i { display: inline-block; width: .8rem; height: .8rem; border-radius: .15rem; margin-right: .5rem;
  border: 1px solid var(--line); }
.scroll { overflow-x: auto; margin: .75rem 0; }
.scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .9375rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-size: .875rem; padding-bottom: .4rem; }
caption span { display: block; max-width: min(46rem, calc(100vw - 2.5rem)); }
.whole { white-space: nowrap; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
thead th { border-bottom: 2px solid var(--line); }
.facts { width: 100%; }
.facts tbody th { width: 11.5rem; font-weight: 600; }
.confusion td { text-align: right; min-width: 2.6rem; border: 1px solid var(--paper); }
.confusion thead th { text-align: right; vertical-align: bottom; font-weight: 500; max-width: 8rem; }
.confusion tbody th { font-weight: 500; max-width: 14rem; position: sticky; left: 0; background: var(--paper); }
.confusion tbody th { border-bottom: 0; }
.confusion thead th:first-child { text-align: left; min-width: 5rem; }
.hit { background: rgb(var(--hit) / var(--share)); }
.miss { background: rgb(var(--miss) / var(--share)); }
details { margin: .5rem 0; }
summary { cursor: pointer; font-weight: 600; padding: .25rem 0; }
pre { overflow-x: auto; background: var(--panel); border-radius: .4rem; padding: .75rem 1rem; font-size: .875rem; }
code { overflow-wrap: anywhere; }
footer { margin-top: 3rem; font-size: .875rem; color: var(--soft); }
@media (max-width: 34rem) {
  body { padding: 1rem .9rem 3rem; }
  .facts, .facts tbody, .facts tr, .facts th, .facts td, .facts caption { display: block; width: auto; }
  .facts thead { position: absolute; clip-path: inset(50%); height: 1px; width: 1px; overflow: hidden; }
  .facts tbody th { width: auto; border: 0; padding: .6rem 0 0; }
  .facts td { padding: .1rem 0 .6rem; }
  .facts td[data-column]::before { content: attr(data-column) ": "; color: var(--soft); }
  .facts td[data-column]:not(:last-child) { border-bottom: 0; padding-bottom: .2rem; }
  .numbers { gap: .5rem; }
  .numbers div { padding: .5rem .55rem; }
  .numbers dd { font-size: 1.1rem; }
  .numbers .big dd { font-size: 1.45rem; }
  .numbers small, .numbers dt { font-size: .75rem; }
}
@media print {
  :root { color-scheme: light; --paper: #fff; --ink: #000; --soft: #444; --line: #bbb; --panel: #f4f4f4;
  --accent: #1f6fb5;
    --good: #14633a; --good-panel: #e3f4ea; --hit: 47 127 196; --miss: 217 95 2; }
  * { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
  html { font-size: 9.5pt; }
  body { max-width: none; padding: 0; }
  ol.stages { grid-template-columns: repeat(4, 1fr); }
  details::details-content { content-visibility: visible; height: auto; }
  .confusion tbody th { position: static; }
  .scroll, pre { overflow: visible; white-space: pre-wrap; }
  table { white-space: normal; }
  figure, li, tr, .banner, .numbers { break-inside: avoid; }
  h2 { break-after: avoid; }
}
"""


POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write(rundir: RunDir) -> Path:
    """Write ``report.html`` into the run directory.

    Returns:
        The page's path.

    Raises:
        InputError: no stage is finished; the fix is the command to run.
        CheckpointError: a file of the run is corrupt, or a result lacks what must be disclosed.
        StorageError: the disk refuses.
    """
    path = rundir.path / "report.html"
    atomic_write(path, page(read_run(rundir)))
    faults.point("report-written")
    return path


def page(run: Run) -> Markup:
    """The page of a run."""
    body = [
        headline(run),
        tag(
            "main",
            timeline(run),
            synthetic(run),
            curves(run),
            budget(run),
            audit(run),
            confusion(run),
            disclosures(run),
            configuration(run),
            environment(run),
        ),
        tag("footer", tag("p", f"Made by dprandp {__version__} from the files of run {run.name}.")),
    ]
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"dprandp: {run.name}"),
        tag("style", raw(CSS)),
    ]
    document = tag("html", tag("head", head), "\n", tag("body", body), lang="en")
    return Markup(f"<!DOCTYPE html>\n{text(document)}\n")
