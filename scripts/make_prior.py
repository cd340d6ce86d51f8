#!/usr/bin/env python3
"""A prior that ships, from the public stages of a finished run: its tensors, its card, and the card for people.

    dprandp generate --run runs/priors/patchnet-tiny && dprandp pretrain --colour rgb --run runs/priors/patchnet-tiny
    python scripts/make_prior.py patchnet-tiny --run runs/priors/patchnet-tiny
    python scripts/results_table.py cifar10 --size tiny --extractors prior:patchnet-tiny --out runs/results
    python scripts/make_prior.py patchnet-tiny --run runs/priors/patchnet-tiny --results runs/results/results.jsonl

The last line puts the measured accuracies on the card. Only rows that were measured with these very tensors count, be
it as a prior or in the run that learned them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

from dprandp import __version__, priors
from dprandp.config import schema
from dprandp.config.schema import as_dict
from dprandp.errors import DprandpError
from dprandp.runs import checkpoint
from dprandp.runs.checkpoint import tensors_to_bytes
from dprandp.runs.directory import RunDir, frozen
from dprandp.runs.files import atomic_write, to_json
from dprandp.runs.results import PretrainResult

LICENCE = "MIT"
FLAGS = {
    "generate": ("process", "count", "resolution", "seed"),
    "pretrain": ("arch", "steps", "batch_size", "lr", "colour", "seed", "optimizer", "layers", "precision"),
}
"""Settings that have a flag: a card names a command, and nothing that is not in it."""


def main() -> None:
    """Write the three files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="of the prior: small letters, digits and dashes")
    parser.add_argument("--run", type=Path, required=True, help="a run whose generate and pretrain are done")
    parser.add_argument("--results", type=Path, help="results.jsonl of results_table.py, for the card")
    parser.add_argument("--note", help="a remark on the hardware, such as: a busy machine")
    parser.add_argument("--out", type=Path, default=priors.FOLDER, help="folder to write to")
    args = parser.parse_args()
    try:
        made = write(args)
    except DprandpError as error:
        sys.exit(f"error: {error}")
    print(f"{args.out / args.name}.safetensors: {made['bytes']} bytes, sha256 {made['sha256']}")


def write(args: argparse.Namespace) -> dict[str, Any]:
    """The card as it was written."""
    rundir = RunDir.open(args.run, create=False)
    rundir.require("pretrain", "make_prior")
    rows = {row.stage: row for row in rundir.status()}
    extractor = checkpoint.load_finished(rundir.stage_dir("pretrain"), "extractor", "pretrain")
    data = tensors_to_bytes(extractor.tensors)
    result = rundir.result(PretrainResult)
    if result.random_init or result.prior is not None:
        sys.exit("error: this run has not learned an extractor of its own")
    if result.grey is not None:
        sys.exit("error: this run has two extractors, and a prior is one: dprandp pretrain --colour rgb, or grey")
    if len(data) > priors.MOST_BYTES:
        sys.exit(f"error: {len(data)} bytes are more than the {priors.MOST_BYTES} that a prior may have")
    digest = hashlib.sha256(data).hexdigest()
    facts = json.loads((rundir.path / "env.json").read_text(encoding="utf-8"))
    hardware = {
        "device": facts["device"], "cores": facts["cpu_count"], "torch": facts["torch"], "python": facts["python"],
    }  # fmt: skip
    card = {
        "format": priors.FORMAT,
        "name": args.name,
        "version": __version__,
        "licence": LICENCE,
        "sha256": digest,
        "bytes": len(data),
        "commands": [command(stage, rows[stage].config, args.name) for stage in FLAGS],
        "seconds": {stage: rows[stage].result["seconds"] for stage in FLAGS},
        "hardware": hardware | ({"remark": args.note} if args.note else {}),
        "generate": rows["generate"].config,
        "pretrain": rows["pretrain"].config,
        "result": {key: value for key, value in frozen(result).items() if key not in ("seconds", "views_per_second")},
        "probes": measured(args.results, digest) if args.results else [],
    }
    text = card_text(priors.parse(args.name, card))  # refuses what could not be read back
    atomic_write(args.out / f"{args.name}.safetensors", data)
    atomic_write(args.out / f"{args.name}.json", to_json(card, indent=1) + "\n")
    atomic_write(args.out / f"{args.name}.md", text)
    return card


def card_text(card: priors.Card) -> str:
    """A card in Markdown."""
    result, images = card.result, card.generate
    measures = {key.replace("_", " "): value for key, value in vars(result).items() if type(value) is float}
    public = "\n".join(f"* {name}: {value:.4g}" for name, value in measures.items())
    took = ", ".join(f"{stage} {seconds / 3600:.3f} h ({seconds:.0f} s)" for stage, seconds in card.seconds.items())
    where = ", ".join(f"{key} {value}" for key, value in card.hardware.items())
    commands = "\n".join(card.commands)
    probes = "No private probe was measured with this file.\n"
    if card.probes:
        head = "| data | size | ε | δ | test accuracy, % | seeds |\n|---|---|---|---|---|---|\n"
        probes = (
            "Private probes with it (`--share 1`; mean ± sample standard deviation over seeds), by "
            f"`scripts/results_table.py`:\n\n{head}{''.join(map(_probe_row, card.probes))}"
        )
    return f"""# Prior {card.name}

A feature extractor ({result.arch}, {result.feature_dim} features, {result.parameters} parameters) \
learned from {images.count} images of the random process {images.process} at {images.resolution} px, seed \
{images.seed}. No data of anybody's went into it: it has no privacy cost. It needs the statistics of \
synthetic features, which `dprandp probe --prior` makes again from the process and the seed.

Made by

```bash
{commands}
```

* time: {took}
* hardware and versions: {where}, dprandp {card.version}
* file: {card.name}.safetensors, {card.bytes} bytes, sha256 `{card.sha256}`
* licence: {card.licence}

Public evaluation, on synthetic images alone:

{public}

{probes}"""


def _probe_row(probe: priors.Probe) -> str:
    deviation = "" if probe.deviation is None else f" ± {100 * probe.deviation:.1f}"
    accuracy = f"{100 * probe.accuracy:.1f}{deviation}"
    return (
        f"| {probe.data} | {probe.size} | {probe.epsilon:g} | {probe.delta:g} | {accuracy} | {probe.seeds} |\n"
    )


def command(stage: str, made: dict[str, Any], name: str) -> str:
    """The command line that makes a stage with these settings."""
    size = made["size"]
    default = as_dict(schema.resolve(stage, size, None, {}))
    changed = {key: value for key, value in made.items() if value != default.get(key)}
    hidden = sorted(changed.keys() - set(FLAGS[stage]))
    if hidden:
        sys.exit(f"error: {stage} was made with {hidden[0]} = {made[hidden[0]]!r}, for which there is no flag")
    words = ["dprandp", stage, "--run", f"runs/{name}", "--size", size]
    for key, value in changed.items():
        words += [f"--{key.replace('_', '-')}", str(value)]
    return shlex.join(words)


def measured(path: Path, digest: str) -> list[dict[str, Any]]:
    """Accuracies of probes with these tensors, per data set, size and ε."""
    cells: dict[tuple, list[dict]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["stage"] == "probe" and row["extractor_sha256"] == digest:
            cells.setdefault((row["data"], row["size"], float(row["epsilon"]), row["delta"]), []).append(row)
    return [
        {
            "data": data,
            "size": size,
            "epsilon": epsilon,
            "delta": delta,
            "accuracy": statistics.mean(row["accuracy"] for row in rows),
            "deviation": statistics.stdev(row["accuracy"] for row in rows) if len(rows) > 1 else None,
            "seeds": len(rows),
        }
        for (data, size, epsilon, delta), rows in sorted(cells.items())
        if math.isfinite(epsilon)
    ]


if __name__ == "__main__":
    main()
