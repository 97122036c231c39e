"""A whole run that is killed again and again comes to its end, with the same bytes."""

from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from kills import SERVER, kill_at, survive

from questlib import QuantConfig, calibrate, finetune, quantize, save_pretrained, stage_cache

FAST = dict(
    adaround_iters=4,
    act_iters=3,
    tla_iters=3,
    cma_iters=3,
    batch_size=2,
    recon_samples=4,
    calib_batch=2,
    step_groups=2,
    act_range="minmax",
    weight_range="minmax",
)
PRESETS = {
    "quest": QuantConfig.preset("quest", 4, 4, adaround=True, **FAST),
    "long": QuantConfig.preset("q-diffusion", 4, 4, **FAST | {"adaround_iters": 20_000}),
    "ptq-d": QuantConfig.preset("ptq-d", 8, 8, **FAST),
}


def run(folder: Path, preset: str, save_seconds: float = 0.0) -> None:
    """Calibrate, quantize, finetune and save.

    Args:
        folder: of the caches and the checkpoint.
        preset: a name in `PRESETS`.
        save_seconds: between two savings of a block's learned rounding.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    stage_cache.SAVE_SECONDS = save_seconds
    unet = UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    pipe = DDIMPipeline(unet.eval().requires_grad_(False), DDIMScheduler(clip_sample=False))
    config = PRESETS[preset]
    cache = folder / "cache"
    calib = calibrate(pipe, 4, 2, batch_size=2, cache_dir=cache)
    made = quantize(pipe.unet, config, calib, cache_dir=cache)
    if config.finetunes:
        finetune(made, pipe.unet, calib, config, state_path=folder / "state", save_every=1)
    save_pretrained(made, folder / "checkpoint")


def killed(folder: Path, preset: str, moment: int) -> None:
    """`run`, but the process is killed at its n-th moment of working with files."""
    kill_at(folder, moment)
    run(folder, preset)


def checkpoint(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (folder / "checkpoint").iterdir()}


@pytest.mark.parametrize(
    ("preset", "kills"),
    [
        ("quest", 5),
        pytest.param("quest", 50, marks=pytest.mark.slow),
        pytest.param("ptq-d", 50, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_killed_again_and_again_gives_the_same_bytes(tmp_path, preset, kills):
    run(tmp_path / "whole", preset)

    def check(folder: Path) -> None:
        assert checkpoint(folder) == checkpoint(tmp_path / "whole")

    folder = survive(killed, lambda folder: (folder, preset), tmp_path, kills, 40, check)
    run(folder, preset)
    check(folder)
    left = [p for p in folder.rglob("*.tmp*")]
    assert not left, left


@pytest.mark.slow
def test_a_long_block_goes_on_whatever_the_kills(tmp_path):
    """The paper's 20,000 iterations a block, killed every 30 seconds, the start included."""
    run(tmp_path / "whole", "long", save_seconds=1e9)
    folder = tmp_path / "killed"
    kills = 0
    while True:
        process = SERVER.Process(target=run, args=(folder, "long", 5.0))
        process.start()
        process.join(30)
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        kills += 1
        assert kills < 200
    assert process.exitcode == 0
    assert kills >= 3
    assert checkpoint(folder) == checkpoint(tmp_path / "whole")
    print(f"{kills} kills survived")
