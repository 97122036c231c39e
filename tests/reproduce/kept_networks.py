"""Networks and features that a process keeps, which tests replace under the same names."""

from __future__ import annotations

from reproduce import seed_run
from reproduce.evaluation import features
from reproduce.evaluation.clip_score import load_clip


def clear_caches() -> None:
    """Forget them."""
    features._load_extractor.cache_clear()
    seed_run.load.cache_clear()
    seed_run.FULL_FEATURES.clear()
    load_clip.cache_clear()
