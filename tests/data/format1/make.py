"""Checkpoints of format 1, written by the last code that had this format.

Only the code of commit 898730d or before can run this:

    python tests/data/format1/make.py FOLDER

Beside each checkpoint stand the outputs of the model that was saved, of the model loaded again,
and of the integer engine "reference", on the same seeded inputs; and what decides their last bits.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import DDIMScheduler, UNet2DModel
from safetensors.torch import save_file

from questlib import QuantConfig, calibrate, finetune, from_pretrained, quantize, save_pretrained

FAST = dict(
    adaround_iters=2,
    act_iters=2,
    tla_iters=2,
    cma_iters=2,
    batch_size=4,
    recon_samples=8,
    calib_batch=8,
)
PRESETS = {
    "quest_carrier": ("quest", dict(act_granularity="carrier", step_groups=2)),
    "quest_token": ("quest", dict(act_granularity="token", step_groups=2)),
    "ptq_d": ("ptq-d", {}),
}


def fingerprint() -> dict[str, str]:
    """What decides the last bits of a CPU's numbers."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    capability = torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__, "cpu": name, "capability": capability}


def main(out: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(33,),
        norm_num_groups=3,
        attention_head_dim=11,
        mid_block_type=None,
        down_block_types=("DownBlock2D",),
        up_block_types=("AttnUpBlock2D",),
    )
    unet.eval().requires_grad_(False)
    # Two of 66 channels are far larger than the others, so that their ratios m * 2^e have e > 0.
    for resnet in unet.up_blocks[0].resnets:
        resnet.norm1.weight[:2] *= 16
    pipe = SimpleNamespace(unet=unet, scheduler=DDIMScheduler(clip_sample=False))
    calib = calibrate(pipe, 6, 4, seed=3)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(7))
    for name, (preset, changes) in PRESETS.items():
        config = QuantConfig.preset(preset, 4, 4, **(FAST | changes))
        student = quantize(unet, config, calib)
        finetune(student, unet, calib, config)
        save_pretrained(student, out / name)
        loaded = from_pretrained(out / name)
        integers = from_pretrained(out / name, engine="reference")
        outputs = {"x": x, "timesteps": calib.t[[0, -1]].clone()}
        with torch.no_grad():
            for what, model in (("saved", student), ("fake", loaded), ("reference", integers)):
                found = torch.stack([model(x, t).sample for t in outputs["timesteps"]])
                outputs[what] = found.contiguous()
        assert torch.equal(outputs["saved"], outputs["fake"])
        save_file(outputs, out / name / "outputs.safetensors")
        tables = [(k, v) for k, v in loaded.state_dict().items() if k.endswith(".ratio")]
        print(name, "largest ratio:", max(float(v.max()) for _, v in tables))
    (out / "machine.json").write_text(json.dumps(fingerprint(), indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
