"""The version of each stage's numbers; results and caches are named by it.

A version is raised by hand when the numbers of its stage change, not when code is moved or tidied.
tests/test_golden_bits.py fails, and names the stage, when its numbers change and its version does
not.
"""

from __future__ import annotations

STAGE_VERSIONS: dict[str, int] = {
    "calibrate": 1,
    "ranges": 1,
    "adaround": 3,
    "act_recon": 2,
    "noise_correction": 1,
    "finetune": 1,
    "sample": 1,
    "integer": 3,
}


def versions(*stages: str) -> dict[str, int]:
    """The versions of the named stages."""
    return {stage: STAGE_VERSIONS[stage] for stage in stages}
