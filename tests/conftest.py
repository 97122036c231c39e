"""Common to all tests.

Worker processes, and the commands that their tests run, share the cores. Triton's kernels run in
its interpreter, even where there is a GPU. A fixture names the folder of data that are too large
for the repository.
"""

import os
from pathlib import Path

workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton
if workers > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

import pytest  # noqa: E402
import torch  # noqa: E402

if workers > 1:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def quest_data() -> Path:
    """The folder QUEST_DATA, or shared/data beside the repository. Skips the test without it."""
    folder = Path(
        os.environ.get("QUEST_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data"
    )
    if not folder.is_dir():
        pytest.skip(f"the data for checking are not at {folder}; set QUEST_DATA")
    return folder
