"""Memory and time of converting a full-size Stable Diffusion v1.4 checkpoint (random weights) from CompVis's layout to diffusers.

    python benchmarks/convert_memory.py [--kinds raw,ema] [--folder DIR]

`raw` has one set of UNet weights (4.3 GB), `ema` two (7.7 GB). Needs as much memory to make the file, and 12 GB of disk in DIR.
The checkpoint is mapped: its pages count as resident while they are cached, and can be dropped at any time; `anonymous` cannot.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from reproduce.models.compvis import load_config
from reproduce.models.compvis_parts import COND, UNET, unet_part, vae_part
from reproduce.provenance import provenance

RESULT = Path(__file__).parent / "results" / "convert_memory.json"
CLIP = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}  # ViT-L/14


def make_checkpoint(path: Path, ema: bool) -> None:
    config, state = load_config("sd-v1-4"), {}
    generator = torch.Generator().manual_seed(0)
    parts = (
        unet_part(config["unet_config"]["params"], 64),
        vae_part(config["first_stage_config"]["params"], 0.18215, None),
    )
    for part in parts:
        for target, tensor in part.model.state_dict().items():
            state[part.prefix + part.sources[target].key] = 0.02 * torch.randn(
                tensor.shape, generator=generator
            )
    for key, tensor in CLIPTextModel(CLIPTextConfig(**CLIP)).state_dict().items():
        state[f"{COND}transformer.text_model.{key.removeprefix('text_model.')}"] = tensor
    if ema:
        unet = [k for k in state if k.startswith(UNET)]
        state |= {
            "model_ema." + k.removeprefix("model.").replace(".", ""): state[k] + 0.01 for k in unet
        }
    torch.save({"state_dict": state, "global_step": 470000}, path)


def measure(command: list[str]) -> dict[str, float]:
    """Run it; peaks of resident and of anonymous memory, in bytes, and seconds."""
    peak, start = {"resident_bytes": 0, "anonymous_bytes": 0}, time.perf_counter()
    child = psutil.Popen(command)
    while child.poll() is None:
        try:
            memory = child.memory_info()
        except psutil.NoSuchProcess:
            break
        peak["resident_bytes"] = max(peak["resident_bytes"], memory.rss)
        peak["anonymous_bytes"] = max(peak["anonymous_bytes"], memory.rss - memory.shared)
        time.sleep(0.02)
    if child.wait():
        raise SystemExit(f"failed: {' '.join(command)}")
    return peak | {"seconds": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
            ckpt, out = Path(folder) / "model.ckpt", Path(folder) / "out"
            subprocess.run(
                [sys.executable, __file__, "--make", str(ckpt), "--kinds", kind], check=True
            )
            command = [
                "-m",
                "reproduce.models",
                "convert",
                str(ckpt),
                "--config",
                "sd-v1-4",
                "--out",
                str(out),
            ]
            rows[kind] = {"checkpoint_bytes": ckpt.stat().st_size} | measure(
                [sys.executable, *command]
            )
            rows[kind]["folder_bytes"] = sum(
                p.stat().st_size for p in out.rglob("*") if p.is_file()
            )
            print(
                kind, {k: round(v if k == "seconds" else v / 1e9, 2) for k, v in rows[kind].items()}
            )
    RESULT.write_text(
        json.dumps(
            {
                "command": "python benchmarks/convert_memory.py",
                "kinds": rows,
                "provenance": provenance(),
            },
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
