"""The environment that this package's processes run best in."""

from __future__ import annotations

import os

# OpenMP threads that spin long while they wait slow each other down as soon as anything else runs
# on the machine; threads that never spin make many small operations slow. One UNet step of
# mini-ldm4 on two threads takes 0.16 s on an idle machine with any setting. Beside one busy
# process it takes 0.53 s with GNU's default (300,000) and 0.28 s with 2,000. Table 3 at smoke
# scale takes 2 minutes without spinning and 1 minute with it.
#
# Memory that is given back to the system after each operation comes back as fresh pages, which
# cost more than the arithmetic on them. With these settings glibc keeps up to 4 GiB for the next
# operation, in pages of 2 MiB. A step of finetuning mini-ldm4 then takes a tenth less time and a
# UNet step on 100 images a seventh (10 page faults instead of 3,000 and 24,000); peak memory stays
# the same.
VARIABLES = {
    "GOMP_SPINCOUNT": "2000",
    "GLIBC_TUNABLES": (
        "glibc.malloc.hugetlb=1"
        ":glibc.malloc.mmap_threshold=1073741824"
        ":glibc.malloc.trim_threshold=4294967296"
    ),
}


def set_defaults() -> None:
    """Set the variables above where the user has not.

    Call it before torch is loaded, which reads GOMP_SPINCOUNT then. GLIBC_TUNABLES is read when a
    process starts, so it reaches the kernels that run the notebooks, but not this process.
    """
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
