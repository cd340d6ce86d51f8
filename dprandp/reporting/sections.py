"""The report below its headline, one function per section."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Any

from dprandp import toml
from dprandp.reporting.disclosure import disclosure, epsilon_text, number, percent
from dprandp.reporting.figures import curve, heat_picture, preview_image
from dprandp.reporting.headline import not_private_reason
from dprandp.reporting.markup import Markup, section, table, tag
from dprandp.reporting.runfiles import Run, changed_settings, is_number
from dprandp.rundir import OPTIONAL_STAGES

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
        # only what is known to be public: a line's unknown quantity is not drawn
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
        "Curves of the private stages show functions of noisy updates alone, which are paid for. Training loss and "
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
    note = tag("p", "ε is cumulative and does not add up: stages compose to less than their sum.", class_="soft")
    void = tag("p", "NOT PRIVATE: these figures do not hold.") if not_private_reason(run) else None
    return section("Budget", void, bar, tag("ul", items, class_="legend"), note, id_="budget")


def audit(run: Run) -> Markup:
    """What the audit showed, if there was one."""
    if run.audit is None:
        return Markup("")
    rows = []
    for found in run.audit["mechanisms"]:
        two, one, controls = found["two_world"], found["one_run"], found["controls"]
        caught = sum(control["flagged"] for control in controls)
        rows.append(
            [
                found["name"],
                f"≤ {epsilon_text(found['epsilon_claimed'])}",
                f"≥ {number(two['epsilon_lower'])} ({two['trials']} trials a world)",
                f"≥ {number(one['epsilon_lower'])} ({one['canaries']} canaries)",
                "contradicts" if found["replay"]["flagged"] else "exact",
                f"{caught} of {len(controls)} flagged" if controls else "not run",
            ]
        )
    head = ["mechanism", "ε claimed", "ε shown by two worlds", "ε shown by one run", "record and replay", "controls"]
    caption = f"Attacks on each mechanism against its claim, significance {number(run.audit['significance'])}"
    outcome = {True: "Nothing contradicts the claims.", False: "THE AUDIT FAILED: do not rely on the claims."}
    old = "The audit is of other plans than the run has now: run dprandp audit again." if run.audit_is_old else None
    return section(
        "Audit",
        tag("p", outcome[run.audit["passed"] is True], f" Outcome: {run.audit['outcome']}."),
        tag("p", old, class_="note") if old else None,
        table(head, rows, caption),
        tag("p", f"Data: {run.audit['data']}. A clean audit is no proof: it sees only gross faults, of the kinds that "
            "its controls show.", class_="soft"),
        id_="audit",
    )  # fmt: skip


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
    """Every fact a privacy claim needs, a column per private stage."""
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
    caption = "What the guarantee is, what it rests on, and where it ends"
    return section("Disclosure", table(["", *stages], rows, caption, class_="facts"), id_="disclosure")


def configuration(run: Run) -> Markup:
    """The exact configuration of each stage, folded."""
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
            # never darker than this: the count on it stays readable in the page's ink
            shade = f"--share: {0.62 * share:.3f}"
            cells.append(tag("td", count, class_=kind, style=shade if count else None, title=percent(share)))
        rows.append([classes[true], *cells, percent(counts[true] / total) if total else "–"])
    head = ["true \\ predicted", *classes, "recall"]
    caption = "Test images: rows are true classes, columns predicted ones; shade is the share of the row"
    return table(head, rows, caption, class_="confusion")


def _confusion_picture(matrix: list[list[int]], classes: list[str]) -> Markup:
    title = f"Confusion matrix of {len(classes)} classes"
    caption = (
        "Rows are true classes, columns predicted ones, by number; blue is right, orange wrong; shade grows with the "
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
