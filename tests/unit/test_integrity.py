"""What is loaded is what was saved: calibrations, caches, states and other files."""

import copy
import math
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from questlib import Calibration, QuantConfig, calibrate, finetune, quantize
from questlib.diffusion.drawing import Drawing
from questlib.diffusion.sampling import MAX_SEED, SEED_STRIDE, sample_generators
from questlib.errors import (
    CheckpointError,
    ConfigError,
    MetricError,
    NotFiniteError,
    StorageError,
)
from questlib.files import atomic_path
from questlib.integrity import digest_of_tree, read_tensors, write_tensors
from questlib.quantization.weight_quantizer import WeightQuantizer
from reproduce.evaluation.reference import load_reference


def damage(path, change, *, digests=True):
    """Change a file's tensors; its metadata stay, or their digests are dropped."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    change(state)
    save_file(state, path, metadata if digests else None)


def test_a_file_comes_back_and_is_the_same_at_each_write(tmp_path):
    tensors = {
        "a": torch.arange(6.0).view(2, 3).t(),
        "b": torch.tensor(True),
        "c": torch.ones(2, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 4),
    }
    for name in ("one", "two"):
        write_tensors(tmp_path / name, tensors, {"model": "m", "list": [1, None]})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    found, about = read_tensors(tmp_path / "one")
    assert about == {"model": "m", "list": [1, None]}
    assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in tensors.items())
    save_file(found, tmp_path / "before")  # as files of before: nothing to compare with
    assert read_tensors(tmp_path / "before")[1] == {}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s["a"].view(torch.int32).bitwise_xor_(1), "not what was saved: a$"),
        (lambda s: s.update(a=s["a"].reshape(3, 2)), "not what was saved: a$"),
        (lambda s: s.update(a=s["a"].view(torch.int32)), "not what was saved: a$"),
        (lambda s: s.update(b=s.pop("a")), "missing: a; unexpected: b$"),
    ],
)
def test_any_change_is_named(tmp_path, change, says):
    path = tmp_path / "file.safetensors"
    write_tensors(path, {"a": torch.ones(2, 3)})
    damage(path, change)
    with pytest.raises(CheckpointError, match=f"file.safetensors: {says}"):
        read_tensors(path)


def test_a_digest_of_a_tree_tells_all_apart():
    values = [
        {"a": 1}, {"a": 1.5}, {"a": True}, {1: "a"}, {"1": "a"}, [1, 2], [[1], 2], [2, 1],
        torch.ones(2), torch.ones(2, 1), torch.ones(2, dtype=torch.int32), [torch.ones(2)], None,
    ]  # fmt: skip
    assert len({digest_of_tree(value) for value in values}) == len(values)


def test_a_link_is_replaced_and_not_written_through(tmp_path):
    target = tmp_path / "target"
    target.write_text("kept")
    (tmp_path / "link").symlink_to(target)
    with atomic_path(tmp_path / "link") as temporary:
        waiting = temporary
        temporary.write_text("new")
    assert target.read_text() == "kept" and (tmp_path / "link").read_text() == "new"
    waiting.symlink_to(target)  # someone has guessed the temporary name
    with atomic_path(tmp_path / "link") as temporary:
        temporary.write_text("newer")
    assert target.read_text() == "kept" and (tmp_path / "link").read_text() == "newer"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "target"]


FULL = """
import resource, sys, torch
from pathlib import Path
from questlib.errors import StorageError
from questlib.files import atomic_path
from questlib.finetuning.state import FinetuningState
from questlib.integrity import write_tensors
folder = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
large = torch.zeros(10_000)
log = dict(seconds=0.0, loss=[], trained_weights=0, trained_fraction=0.0)
state = FinetuningState("key", "unet", 0, 1, log, {"a": large}, {}, {}, None)

def text(path):
    with atomic_path(path) as temporary:
        temporary.write_text("x" * 10_000)

for write in (lambda path: write_tensors(path, {"a": large}), state.save, text):
    try:
        write(folder / "file")
    except StorageError as error:
        print(error)
"""


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    """But not what a process that lives is writing, nor for a day what another machine left."""
    code = (
        "import os, sys; from questlib.files import atomic_path\n"
        "with atomic_path(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half'); os.kill(os.getpid(), 9)"
    )
    path = tmp_path / "log[1].json"
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == -9
    (abandoned,) = tmp_path.iterdir()
    machine = abandoned.name.split(".")[-2].split("-")[0]
    alive = tmp_path / f"{path.name}.{machine}-{os.getppid()}-1.tmp"
    elsewhere, long_ago = (tmp_path / f"{path.name}.{n:08x}-999999999-1.tmp" for n in (1, 2))
    not_ours = tmp_path / f"{path.name}.part.tmp"
    for other in (alive, elsewhere, long_ago, not_ours):
        other.write_text("half")
    os.utime(long_ago, (0, 0))
    with atomic_path(path) as temporary:
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert set(tmp_path.iterdir()) == {path, alive, elsewhere, not_ours}


def test_a_full_disk_is_one_line_and_keeps_the_old_file(tmp_path):
    (tmp_path / "file").write_text("old")
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and all("cannot write" in x and "kept" in x for x in lines), done
    assert (tmp_path / "file").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        write_tensors(tmp_path / "file" / "in" / "it", {"a": torch.ones(1)})


# ---- calibrations ----


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s["eps"][0, 0].fill_(math.nan), "not finite: eps"),
        (lambda s: s.update(t=s["t"][1:].clone()), "do not fit: t"),
        (lambda s: s.update(t=s["t"].bool()), "t's type"),
        (lambda s: s["t"].sub_(2**40), "t's range"),
        (lambda s: s.update(eps=s["eps"][:, 1:].clone()), "do not fit"),
        (lambda s: s.update(eps=s["eps"].to(torch.int32)), "do not fit: eps"),
        (lambda s: s.update(more=s["eps"].clone()), "unexpected: more"),
        (lambda s: s.pop("x"), "'x'"),
    ],
)
def test_a_damaged_calibration(calib, tmp_path, change, says):
    path = tmp_path / "calib.safetensors"
    calib.save(path)
    damage(path, change)
    with pytest.raises(CheckpointError, match="calib.safetensors: (not what|missing|unexpected)"):
        Calibration.load(path)
    damage(path, lambda state: None, digests=False)
    with pytest.raises(CheckpointError, match=f"calibration file .*{says}"):
        Calibration.load(path)


def test_timesteps_below_zero_are_loaded(calib, tmp_path):
    """Those of EDM are logarithms of sigma."""
    (table,) = calib.tables
    early = Calibration([replace(table, t=-0.25 * table.t)], model=calib.model)
    path = tmp_path / "calib.safetensors"
    early.save(path)
    assert torch.equal(Calibration.load(path).t, -0.25 * calib.t)


# ---- caches and states ----


@pytest.fixture(scope="module")
def config():
    fast = dict(adaround=False, act_range="minmax", weight_range="minmax", calib_batch=4)
    return QuantConfig.preset("quest", 4, 4, tla_iters=1, cma_iters=1, batch_size=2, **fast)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s["conv_in.input_quantizer.scale"].neg_(), "scale .expected positive"),
        (lambda s: s["conv_in.input_quantizer.scale"].fill_(math.nan), "not finite"),
        (lambda s: s["conv_in.input_quantizer.zero_point"].fill_(0.5), "zero_point"),
        (
            lambda s: s.update({"conv_in.input_quantizer.scale": torch.tensor(0.5)}),
            "wrong shape: conv_in.input_quantizer.scale",
        ),
    ],
)
def test_a_damaged_cache_of_ranges(pipe, calib, config, tmp_path, change, says):
    quantize(pipe.unet, config, calib, cache_dir=tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    damage(path, change)
    with pytest.raises(CheckpointError, match="not what was saved: conv_in.input_quantizer"):
        quantize(pipe.unet, config, calib, cache_dir=tmp_path)
    damage(path, lambda state: None, digests=False)
    with pytest.raises(CheckpointError, match=says):
        quantize(pipe.unet, config, calib, cache_dir=tmp_path)


def test_a_state_of_another_quantized_unet(pipe, calib, config, tmp_path):
    path = tmp_path / "state"
    finetune(quantize(pipe.unet, config, calib), pipe.unet, calib, config, state_path=path)
    other = quantize(pipe.unet, config, calib)
    other.conv_in.bias.data[0] += 1
    with pytest.raises(CheckpointError, match="belongs to another quantized UNet"):
        finetune(other, pipe.unet, calib, config, state_path=path)


# ---- references ----


@pytest.mark.parametrize(
    ("mean", "covariance", "says"),
    [
        (np.full(4, math.nan), np.eye(4), "NaN or infinite"),
        (np.zeros(4), -np.eye(4), "not a covariance: it has the eigenvalue -1"),
        (np.zeros(4), np.triu(np.ones((4, 4))), "not symmetric"),
        (np.zeros(4, dtype=bool), np.eye(4), "in floats"),
    ],
)
def test_moments_that_are_none(tmp_path, mean, covariance, says):
    np.savez(tmp_path / "r.npz", mu=mean, sigma=covariance)
    with pytest.raises(MetricError, match=f"r.npz: .*{says}"):
        load_reference(tmp_path / "r.npz", "mini")


def test_files_get_the_permissions_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_tensors(tmp_path / "file", {"a": torch.ones(1)})
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


# ---- NaN, infinity and tiny weights: found where they are first seen ----


def changed(unet, name, change):
    """A copy of a UNet with another parameter."""
    unet = copy.deepcopy(unet)
    change(unet.get_parameter(name).data)
    return unet


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["conv_in.weight", "conv_out.bias"])
def test_weights_that_are_not_finite_are_named(pipe, calib, config, name, value):
    unet = changed(pipe.unet, name, lambda data: data.view(-1)[:1].fill_(value))
    with pytest.raises(NotFiniteError, match=f"not finite: {name}"):
        calibrate(SimpleNamespace(unet=unet, scheduler=pipe.scheduler), 2, 2)
    with pytest.raises(NotFiniteError, match=f"not finite: {name}"):
        quantize(unet, config, calib)
    with pytest.raises(NotFiniteError, match="samples 0..1 .* denoiser's output at timestep 500"):
        drawn = SimpleNamespace(unet=unet, scheduler=pipe.scheduler)
        Drawing(drawn, num_inference_steps=2).draw(range(2))


def test_a_sampler_that_divides_by_zero_is_named(pipe):
    """Zero terminal SNR: nothing of the image is in x_T, and predicted noise cannot tell it."""
    scheduler = DDIMScheduler(
        clip_sample=False, rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    drawn = SimpleNamespace(unet=pipe.unet, scheduler=scheduler)
    with pytest.raises(NotFiniteError, match="the sampler's step at timestep 999"):
        Drawing(drawn, num_inference_steps=2, eta=1.0).draw(range(1))


@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_tiny_weights_are_quantized_as_well_as_others(method):
    """One row is a billion times smaller: its scale is as much smaller, exactly."""
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    small = weight.clone()
    small[1] *= 2.0**-40
    small[2] = 0
    index = torch.zeros(8, dtype=torch.int64)
    made = WeightQuantizer.from_weight(weight, 4, index, method)
    tiny = WeightQuantizer.from_weight(small, 4, index, method)
    assert torch.equal(tiny(small)[0], made(weight)[0])
    assert torch.equal(tiny.scale[0], made.scale[0])
    error = (tiny(small)[1] - small[1]).norm() / small[1].norm()
    assert error < 1.1 * (made(weight)[1] - weight[1]).norm() / weight[1].norm()
    assert not tiny(small)[2].any()


def test_a_layer_that_would_be_dead_in_half_precision_is_named(pipe, calib, config):
    unet = changed(pipe.unet, "conv_in.weight", lambda data: data[0].mul_(1e-9))
    own = calibrate(SimpleNamespace(unet=unet, scheduler=pipe.scheduler), 2, 2)
    made = quantize(unet, config, own)
    with pytest.raises(ConfigError, match="conv_in: weights of .* are zero or infinite in"):
        made.half()


# ---- seeds ----


def test_no_two_seeds_have_the_same_noise():
    for seed in (-1, MAX_SEED + 1, 2**32, True):
        with pytest.raises(ConfigError, match="seed: expected a whole number"):
            sample_generators(seed, [0])
    with pytest.raises(ConfigError, match="indices"):
        sample_generators(0, [SEED_STRIDE])
    ends = [(s, i) for s in (0, 1, MAX_SEED - 1, MAX_SEED) for i in (0, SEED_STRIDE - 1)]
    first = {int(torch.randint(2**62, (), generator=sample_generators(s, [i])[0])) for s, i in ends}
    assert len(first) == len(ends)
    before = torch.randn(4, generator=torch.Generator().manual_seed(3 * SEED_STRIDE + 7))
    assert torch.equal(torch.randn(4, generator=sample_generators(3, [7])[0]), before)
