"""A random CLIP model as a folder that open_clip loads."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
from safetensors.torch import save_file

CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def save_clip(folder: Path) -> str:
    """Write the model into a new folder; returns the name by which it is asked for."""
    folder.mkdir()
    weights = open_clip.model.CLIP(**CLIP).state_dict()
    save_file(weights, folder / "open_clip_model.safetensors")
    about = {"model_cfg": CLIP, "preprocess_cfg": {"size": 32}}
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    return f"local-dir:{folder}"
