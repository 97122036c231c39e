"""What is saved and loaded: a small one of each kind of file."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch import nn

from questlib import Calibration, QuantConfig, calibrate, finetune, quantize, save_pretrained
from questlib.checkpoint import from_pretrained
from questlib.diffusion.digests import model_digest
from questlib.diffusion.drawing import Samples
from questlib.errors import EngineError
from questlib.finetuning.loop import state_key
from questlib.finetuning.state import FinetuningState
from questlib.integer.triton.tile_table import table_of
from questlib.integer.triton.tiles import ConfigCache
from questlib.integrity import digest_of_tree
from questlib.post_training import _activation_ranges, check_ranges
from questlib.stage_cache import StageCache
from reproduce.evaluation.image_statistics import Statistics
from reproduce.evaluation.reference import load_reference, save_reference
from reproduce.evaluation.samples import read_samples, write_samples
from reproduce.store import ArtifactStore

CONFIG = dict(calib_batch=2, tla_iters=1, cma_iters=1, batch_size=2, weight_range="minmax")


@dataclass(frozen=True)
class Subject:
    """A folder, and what its loading gives."""

    name: str
    folder: Path
    load: Callable[[Path], str]
    """A digest of what was loaded, or "nan"."""

    share: int = 1
    """Of all mutants."""

    damages: str = ""
    """How the names of the files end that are damaged."""

    others: tuple[type[Exception], ...] = ()
    """Errors of a library whose own loader it is."""


def told(values: Iterable[torch.Tensor]) -> str:
    """A digest of tensors, or "nan"."""
    found = list(values)
    finite = all(v.isfinite().all() for v in found if v.is_floating_point())
    return digest_of_tree(found) if finite else "nan"


def tiny_unet() -> nn.Module:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",),
    )
    return unet.eval().requires_grad_(False)


def make_subjects(place: Path) -> list[Subject]:
    """One of each kind, below a new folder."""
    unet = tiny_unet()
    pipe = SimpleNamespace(unet=unet, scheduler=DDIMScheduler(clip_sample=False))
    calib = calibrate(pipe, 2, 2)
    x = calib.x[0]

    def by_diffusers(folder: Path) -> str:
        model, about = UNet2DModel.from_pretrained(
            folder, local_files_only=True, output_loading_info=True
        )
        # Where a damaged name hides the quantization, diffusers warns of weights that it makes up.
        if about["missing_keys"]:
            raise ValueError("newly initialized weights")
        return output(model)

    def output(model: nn.Module) -> str:
        with torch.no_grad():
            return told([model(x, 5).sample])

    config = QuantConfig.preset(
        "quest", 4, 4, adaround=False, act_range="minmax", step_groups=1, **CONFIG
    )
    cache = place / "cache"
    student = quantize(unet, config, calib, cache_dir=cache)
    ranges = _activation_ranges(student)
    given = model_digest(student)

    def read_cache(folder: Path) -> str:
        def search(parts: Any) -> None:
            raise AssertionError("the cache's file was not read")

        kept = StageCache(folder, calib.hash(), model_digest(unet))
        check_ranges(student, kept.fill("ranges", config.range_key(), ranges, search))
        return told(ranges.values())

    state_folder = place / "state"
    state_folder.mkdir()
    finetune(student, unet, calib, config, state_path=state_folder / "state", save_every=1)
    key = state_key(config, calib, model_digest(unet))

    def read_state(folder: Path) -> str:
        state = FinetuningState.load(folder / "state", key, given)
        return digest_of_tree(vars(state))

    save_pretrained(student, place / "checkpoint")
    (place / "diffusers").mkdir()
    student.save_pretrained(place / "diffusers")
    (place / "calibration").mkdir()
    calib.save(place / "calibration" / "calibration.safetensors")
    controlled = calibrate(pipe, run=lambda: unet(x, 7, class_labels=None))
    (place / "calls").mkdir()
    controlled.save(place / "calls" / "calibration.safetensors")

    def read_calibration(folder: Path) -> str:
        found = Calibration.load(folder / "calibration.safetensors")
        batch = found.batch(0, torch.arange(1))
        return f"{found.hash()} {told([batch.eps, batch.t, *batch.rows.values()])}"

    def draw(indices: range) -> Samples:
        latents = torch.stack([torch.full((2, 4, 4), float(i)) for i in indices])
        return Samples(torch.zeros(len(indices), 3, 8, 8, dtype=torch.uint8), latents)

    write_samples(place / "samples", {"num_samples": 5, "batch_size": 2, "seed": 0}, draw)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(20, 6, generator=generator).double()
    moments = features.mean(0).numpy(), np.cov(features.numpy(), rowvar=False)
    (place / "reference").mkdir()
    spatial = moments[0].copy(), moments[1].copy()
    reference = Statistics(features, moments, spatial, (64, 64), 20)
    save_reference(reference, place / "reference" / "images.safetensors", "mini")
    (place / "npz").mkdir()
    np.savez(place / "npz" / "moments.npz", mu=moments[0], sigma=moments[1])

    def read_reference(name: str) -> Callable[[Path], str]:
        def read(folder: Path) -> str:
            found = load_reference(folder / name, "mini")
            arrays = [*(found.pooled_moments or ()), *(found.spatial_moments or ())]
            pooled = [] if found.pooled is None else [found.pooled]
            return told([*map(torch.from_numpy, arrays), *pooled])

        return read

    artifact = ArtifactStore(place / "artifact").artifact("sample", {"seed": 0})
    artifact.make(lambda folder: {"size_bytes": 7, "metrics": {"fid": 1.5}})

    def read_artifact(folder: Path) -> str:
        (found,) = folder.glob("*/*/done.json")
        again = type(artifact)(found.parent, artifact.hash)
        return json.dumps(again.info, sort_keys=True)

    choices = ConfigCache()
    choices.about = {"gpu": "NVIDIA-Test", "triton": "3.9.0", "kernels": "1f3a0c99"}
    choices.known = table_of((9, 0)).tiles
    choices.chosen = {f"torch.int8-{n}": choices.known[n] for n in range(4)}
    choices.save(place / "tiles" / "tiles.json")

    def read_tiles(folder: Path) -> str:
        with warnings.catch_warnings():
            # A file that does not serve is ignored, and said to be.
            warnings.simplefilter("error")
            try:
                return json.dumps(choices.stored(folder / "tiles.json"), sort_keys=True)
            except UserWarning as warning:
                raise EngineError(str(warning)) from warning

    return [
        Subject("checkpoint", place / "checkpoint", lambda f: output(from_pretrained(f)), 6),
        Subject("diffusers", place / "diffusers", lambda f: output(from_pretrained(f)), 3),
        Subject(
            "diffusers, by diffusers",
            place / "diffusers",
            by_diffusers,
            1,
            others=(Exception,),
        ),
        Subject("calibration", place / "calibration", read_calibration, 3),
        Subject("calls", place / "calls", read_calibration, 3),
        Subject("cache", cache, read_cache, 4, ".safetensors"),
        Subject("state", state_folder, read_state, 4),
        Subject(
            "samples",
            place / "samples",
            lambda f: told(v for samples in read_samples(f) for v in samples),
            3,
        ),
        Subject("reference", place / "reference", read_reference("images.safetensors"), 2),
        Subject("npz", place / "npz", read_reference("moments.npz"), 2),
        Subject("artifact", place / "artifact", read_artifact, 2, "done.json"),
        Subject("tiles", place / "tiles", read_tiles, 1),
    ]
