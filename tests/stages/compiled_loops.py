"""Importing this loads the compiled loops of a patchnet, a third of a second: before a fork instead of after each."""

from __future__ import annotations

import torch

from dprandp.config.schema import build
from dprandp.models.extractor import build_extractor

_small = build("pretrain", {"arch": "patchnet", "filters": 4, "second_filters": 4})
build_extractor(_small, torch.Generator()).extract(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
