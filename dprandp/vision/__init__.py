"""Networks, batched views, the contrastive loss and the metrics. Knows nothing of privacy, datasets or run directories.

=============  ==========================================================================================
module         what it holds
=============  ==========================================================================================
wrn.py         the WideResNet of the published system and its throw-away projection head
views.py       two contrastive views of a public image; K crop-and-flip views of a private one
colour.py      batched colour changes, for views.py
losses.py      alignment and uniformity on the unit sphere
metrics.py     what is reported about a test split; k-nearest-neighbour accuracy of features
=============  ==========================================================================================

Layers that mix examples (batch statistics of any kind) do not occur here: per-example clipping would be meaningless.
"""
