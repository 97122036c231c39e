"""Whether a CUDA graph is being captured."""

from __future__ import annotations

import torch


def capturing() -> bool:
    """Whether what is launched now goes into a CUDA graph, so that nothing can be read back."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
