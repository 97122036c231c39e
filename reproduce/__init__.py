"""The driver: runs the paper's tables at one of three scales, keeps every stage's product, and reports the results."""

import os

# OpenMP threads that spin long while they wait slow each other down as soon as anything else runs on the machine; threads that
# never spin make many small operations slow. One UNet step of mini-ldm4, two threads: 0.16 s idle with any setting; beside one
# busy process 0.53 s with GNU's default (300,000), 0.28 s with 2,000. Table 3 at smoke scale: 2 minutes without spinning, 1 with.
# It must be said before torch is loaded; notebook kernels inherit it.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

# Memory that is given back to the system after each operation comes back as fresh pages, which cost more than the arithmetic on
# them. glibc keeps up to 4 GiB for the next operation, in pages of 2 MiB: a step of finetuning mini-ldm4 takes a tenth
# less time, a UNet step on 100 images a seventh (3,000 and 24,000 page faults before, 10 after); peak memory stays the same.
# It is read when a process starts: the kernels that run the notebooks have it, this process has not.
os.environ.setdefault(
    "GLIBC_TUNABLES",
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=4294967296",
)
