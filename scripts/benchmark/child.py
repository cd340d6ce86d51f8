"""``python -m benchmark.child PAIR SCALE SIDE``: the peak memory of one side, as JSON on stdout.

``python -m benchmark.child curve CURVE SCALE VALUE`` is one point of a curve.
"""

from __future__ import annotations

import json
import sys

from benchmark import curves, memory, peer_opacus, registry
from benchmark.timing import Work
from dprandp.runs.context import prepare_device


def main(arguments: list[str]) -> None:
    """Measure what the arguments name."""
    prepare_device("cpu")
    peer_opacus.preload()
    libraries = memory.resident()

    def make() -> Work:
        if arguments[0] == "curve":
            _, curve, scale, value = arguments
            return curves.CURVES[curve].make(scale, int(value))
        pair, scale, side = arguments
        return registry.PAIRS[pair].build(scale).side(side).make()

    print(json.dumps(vars(memory.peak_of(make, libraries))))


if __name__ == "__main__":
    main(sys.argv[1:])
