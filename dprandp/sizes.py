"""The size dial: what tiny, small and paper mean for each stage."""

from __future__ import annotations

from typing import Any

SIZES = ("tiny", "small", "paper")

SIZE_DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "tiny": {
        "generate": {}, "pretrain": {"feature_stages": "all"}, "continue": {}, "probe": {}, "finetune": {},
    },
    "small": {
        "generate": {"count": 24_000},
        "pretrain": {
            "filters": 2400,
            "layers": 2,
            "second_filters": 3200,
            "dictionary_patches": 400_000,
            "feature_stages": "all",
            "steps": 600,
            "batch_size": 64,
            "projection_hidden": 1024,
        },
        "continue": {"steps": 600, "instances": 2000},
        "probe": {"dims": 4096, "statistics_images": 2000, "steps": 200},
        "finetune": {},
    },
    # METHOD of Tang et al. 2023: 105,000 images, 200 epochs of batch 256, step schedule
    "paper": {
        "generate": {"count": 105_000, "resolution": 256},
        "pretrain": {
            "arch": "wrn-16-4",
            "filters": 6400,
            "layers": 2,
            "second_filters": 6400,
            "dictionary_patches": 1_000_000,
            "steps": 82_000,
            "batch_size": 256,
            "schedule": "step",
            "projection_hidden": 4096,
            "checkpoint_every": 1000,
        },
        # Bu et al. 2024 train with B = 4096; steps and sizes are ours
        "continue": {"steps": 2000, "batch_size": 4096, "public_batch_size": 256, "instances": 10_000},
        "probe": {"dims": 4096, "statistics_images": 4000, "steps": 100},
        "finetune": {"steps": 779, "batch_size": 4096, "views": 16},
    },
}
