"""Per-example gradients, written out for the networks whose layers allow it."""
