"""Networks: feature extractors, a head on top of them, and how their per-example gradients are found.

To add one: write its module, and give it a name in ``extractor.py``. Layers that mix examples (batch statistics of any
kind) do not occur here: per-example clipping would be meaningless.
"""
