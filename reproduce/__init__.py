"""The driver: runs the paper's tables at one of three scales, keeps every stage's product, and reports the results."""

import os

# OpenMP threads that spin long while they wait slow each other down as soon as anything else runs on the machine; threads that
# never spin make many small operations slow. One UNet step of mini-ldm4, two threads: 0.16 s idle with any setting; beside one
# busy process 0.53 s with GNU's default (300,000), 0.28 s with 2,000. Table 3 at smoke scale: 2 minutes without spinning, 1 with.
# It must be said before torch is loaded; notebook kernels inherit it.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
