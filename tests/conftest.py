"""Common to all tests.

Worker processes share the threads. Triton's kernels run in its interpreter, even where there is a
GPU. A fixture names the folder of data that are too large for the repository.
"""

import os
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

import pytest  # noqa: E402
import torch  # noqa: E402

workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, torch.get_num_threads() // workers))


@pytest.fixture(scope="session")
def quest_data() -> Path:
    """The folder QUEST_DATA, or shared/data beside the repository. Skips the test without it."""
    folder = Path(
        os.environ.get("QUEST_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data"
    )
    if not folder.is_dir():
        pytest.skip(f"the data for checking are not at {folder}; set QUEST_DATA")
    return folder
