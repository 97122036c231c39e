"""Are a UNet's kernels compiled beforehand? `shared_compilation.py ARCH`; a line of JSON.

Two shares are compiled, as benchmarks/gpu.py does it; then a step runs, whose kernels are compiled
and not executed. In a process of its own: the kernels must be imported without Triton's
interpreter.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from driver import engine_on

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import gpu_compile  # noqa: E402
from gpu_subjects import FORMS, random_unet  # noqa: E402
from roofline_launches import Models, all_launches, converted  # noqa: E402

SIZE = dict(
    sample_size=16,
    cross_attention_dim=48,
    layers_per_block=1,
    block_out_channels=(64,),
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("UpBlock2D",),
    mid_block_type=None,
)
BATCH = 2
KINDS = ((4, ""), (8, ", not fused"))


def make() -> Models:
    """The UNet; its narrow form is as wide."""

    def unet() -> UNet2DConditionModel:
        return UNet2DConditionModel(attention_head_dim=8, **SIZE)

    with torch.device("meta"):
        full = unet()
    return Models(full, unet(), (4, 16, 16), (77, 48))


def compiled() -> set[str]:
    """What is in Triton's cache, by the names of its folders."""
    return {path.parent.name for path in Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin")}


def tiles_of(tuned: bool) -> set[tuple]:
    """Kind and tile of each product that is launched."""
    models = make()
    gpu = torch.cuda.get_device_properties(0)
    launches = all_launches(converted(models), models, BATCH, gpu, tuned)
    names = ("PACKED", "N", "BM", "BN", "BK", "SPLIT")
    return {tuple(x.arguments[n] for n in names) for x in launches if x.kernel == "gemm"}


@torch.no_grad()
def main(arch: int) -> None:
    """Compile and run, and print what was compiled when."""
    from questlib.integer.conversion import convert
    from questlib.integer.triton import runtime

    torch.manual_seed(0)
    driver, _ = engine_on(arch)
    runtime.require_engine = lambda: None
    driver.emulated = "nothing"
    shares = []
    for i in range(2):
        before = compiled()
        gpu_compile.compile_unets(i, 2, False, lambda what: True, make, (BATCH,), KINDS)
        shares.append(len(compiled() - before))
    before = compiled()
    x = torch.randn(BATCH, 4, 16, 16).half().to(memory_format=torch.channels_last)
    text = torch.randn(BATCH, 77, 48).half()
    for bits, form in KINDS:
        fake = random_unet("quest", bits, device="cpu", **SIZE)
        unet = convert(fake, "triton", dtype=torch.float16, **FORMS[form])
        for _ in range(2):
            unet(x, torch.tensor(500), text)
    row = dict(
        shares=shares,
        kernels=len({launch.binary.ptx for launch in driver.launches}),
        late=len(compiled() - before),
        estimated=len(tiles_of(False)),
        tuned=len(tiles_of(True)),
        both=len(tiles_of(False) & tiles_of(True)),
    )
    print(json.dumps(row))


if __name__ == "__main__":
    main(int(sys.argv[1]))
