"""The result of a benchmark for people: Markdown tables, ready for a page."""

from __future__ import annotations

from typing import Any

from benchmark.cases import Figure

_MET = {None: "–", True: "met", False: "missed"}
_HELD = {None: "–", True: "held", False: "REGRESSED"}


def lines(result: dict[str, Any]) -> str:
    """What ``suite.run`` returns, as text."""
    facts = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    parts = [f"{facts}\n{result['scale']} sizes, median (range) of {result['rounds']} rounds, one run"]
    if result["figures"]:
        parts.append(_figures(result))
    parts += [_curve(curve) for curve in result["curves"]]
    if result["failed"]:
        parts.append("\n".join(f"FAILED: {each['pair']}: {each['reason']}" for each in result["failed"]))
    if result["left_out"]:
        parts.append("\n".join(f"LEFT OUT: {o['peer']} in {o['pair']}: {o['reason']}" for o in result["left_out"]))
    return "\n\n".join(parts)


def _figures(result: dict[str, Any]) -> str:
    quick = any(row["bound"] for row in result["figures"])
    last = "bound" if quick else "target"
    rows = [f"| pair | against | ratio | ours / theirs | {last} | sizes |", "|---|---|---|---|---|---|"]
    for row in result["figures"]:
        ratio = _ratio(row)
        state = _HELD[row["held"]] if quick else _MET[row["met"]]
        limit = f"{row[last]} {state}" if row[last] else "–"
        sides = f"{_quantity(row['ours'], row['unit'])} / {_quantity(row['theirs'], row['unit'])}"
        cells = [row["pair"], row["against"], ratio, sides, limit, row["sizes"]]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def line(figure: Figure) -> str:
    """One figure as soon as it is known: a run that is stopped later has said it."""
    row = figure.to_dict()
    return f"  {row['pair']}, {row['quantity']}: {_ratio(row)} against {row['against']}"


def _ratio(row: dict[str, Any]) -> str:
    return f"{_number(row['ratio'])}{_range(row)} {row['wording']}"


def _curve(curve: dict[str, Any]) -> str:
    rows = [f"| {curve['axis']}: {curve['title']} | time | memory |", "|---|---|---|"]
    for point in curve["points"]:
        time = f"{_number(point['time']['median'])}{_range(point['time'])} × ({_quantity(point['seconds'], 'seconds')})"
        memory = f"{_number(point['memory'])} × ({_quantity(point['bytes'], 'bytes')})"
        rows.append(f"| {point['size']:,} | {time} | {memory} |")
    return "\n".join(rows)


def _range(row: dict[str, Any]) -> str:
    return f" ({_number(row['lowest'])}-{_number(row['highest'])})" if row["lowest"] != row["highest"] else ""


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _quantity(value: float, unit: str) -> str:
    if unit == "bytes":
        return f"{value / 1e6:,.0f} MB"
    if unit.startswith("seconds"):
        return f"{value:.3g} s"
    return f"{_number(value)} {unit}"
