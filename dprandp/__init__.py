"""dprandp: train an image classifier under differential privacy, with a prior learned from random processes."""

__version__ = "0.1.0"
