"""Memory and time of converting a full-size Stable Diffusion v1.4 checkpoint to diffusers.

    python benchmarks/convert_memory.py [--kinds raw,ema] [--folder DIR]

The checkpoint is in CompVis's layout, with random weights: `raw` has one set of UNet weights
(4.3 GB), `ema` two (7.7 GB). To make the file takes as much memory, and 12 GB of disk in DIR.

The checkpoint is mapped: its pages count as resident while they are cached, and can be dropped at
any time; `anonymous` memory cannot.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from common import RESULTS, parser_of, write_json
from transformers import CLIPTextConfig, CLIPTextModel

from reproduce.models.compvis_components import COND, UNET, unet_component, vae_component
from reproduce.models.compvis_files import load_config
from reproduce.provenance import provenance

RESULT = RESULTS / "convert_memory.json"
# CLIP ViT-L/14's text encoder
CLIP = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}


def make_checkpoint(path: Path, ema: bool) -> None:
    """Write a checkpoint with random weights."""
    config = load_config("sd-v1-4")
    state = {}
    generator = torch.Generator().manual_seed(0)
    components = (
        unet_component(config["unet_config"]["params"], 64),
        vae_component(config["first_stage_config"]["params"], 0.18215, None),
    )
    for component in components:
        for target, tensor in component.model.state_dict().items():
            key = component.prefix + component.origins[target].key
            state[key] = 0.02 * torch.randn(tensor.shape, generator=generator)
    for key, tensor in CLIPTextModel(CLIPTextConfig(**CLIP)).state_dict().items():
        state[f"{COND}transformer.text_model.{key.removeprefix('text_model.')}"] = tensor
    if ema:
        for key in [key for key in state if key.startswith(UNET)]:
            name = key.removeprefix("model.").replace(".", "")
            state[f"model_ema.{name}"] = state[key] + 0.01
    torch.save({"state_dict": state, "global_step": 470000}, path)


def measure(command: list[str]) -> dict[str, float]:
    """Run a command; its peaks of resident and of anonymous memory, in bytes, and seconds."""
    resident = anonymous = 0
    start = time.perf_counter()
    child = psutil.Popen(command)
    while child.poll() is None:
        try:
            memory = child.memory_info()
        except psutil.NoSuchProcess:
            break
        resident = max(resident, memory.rss)
        anonymous = max(anonymous, memory.rss - memory.shared)
        time.sleep(0.02)
    if child.wait():
        raise SystemExit(f"failed: {' '.join(command)}")
    return {
        "resident_bytes": resident,
        "anonymous_bytes": anonymous,
        "seconds": time.perf_counter() - start,
    }


def study(kind: str, folder: Path) -> dict[str, float]:
    """Make a checkpoint in a process of its own, and convert it in another."""
    ckpt = folder / "model.ckpt"
    out = folder / "out"
    make = [sys.executable, __file__, "--make", str(ckpt), "--kinds", kind]
    subprocess.run(make, check=True)
    command = [sys.executable, "-m", "reproduce.models", "convert", str(ckpt)]
    measured = measure([*command, "--config", "sd-v1-4", "--out", str(out)])
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return {"checkpoint_bytes": ckpt.stat().st_size} | measured | {"folder_bytes": size}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--kinds", default="raw,ema")
    parser.add_argument(
        "--folder", type=Path, help="where the checkpoint is made (default: the temporary folder)"
    )
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        make_checkpoint(args.make, args.kinds == "ema")
        return
    rows = {}
    for kind in args.kinds.split(","):
        with tempfile.TemporaryDirectory(prefix="quest-", dir=args.folder) as folder:
            rows[kind] = study(kind, Path(folder))
        shown = {k: round(v if k == "seconds" else v / 1e9, 2) for k, v in rows[kind].items()}
        print(kind, shown)
    command = "python benchmarks/convert_memory.py"
    write_json(RESULT, {"command": command, "kinds": rows, "provenance": provenance()})


if __name__ == "__main__":
    main()
