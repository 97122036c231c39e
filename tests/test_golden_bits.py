"""Each stage's numbers on a tiny model are those of the golden file, or its version was raised.

tests/golden_bits.json holds for each stage: its version; values, for any machine; and digests of
all bits, one for each kind of machine that has written some.

    python tests/test_golden_bits.py --write    values and bits of stages whose version was raised
    python tests/test_golden_bits.py --add      bits of this machine, where the values agree

A stage of which the golden file has nothing is new. Where what is run here changes (not questlib),
delete the stage's entry in the golden file and run --write.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel, UNet2DModel
from torch import nn

from questlib import Calibration, QuantConfig, calibrate, convert, finetune, quantize
from questlib.quantization import primitives
from questlib.versions import STAGE_VERSIONS
from reproduce.evaluation import metrics
from reproduce.evaluation.drawing import sample
from reproduce.models.pipelines import ClassEmbedder
from reproduce.seed_run import EVALUATE_VERSION

GOLDEN = Path(__file__).with_name("golden_bits.json")
# Of a tensor's mean size: far above the rounding of other machines. Where a model is trained,
# single roundings go the other way there, and what follows goes with them.
TOLERANCE = 1e-3
TRAINED = 5e-2
Numbers = dict[str, torch.Tensor]


# ---- what is run ----

ITERATIONS = dict(
    adaround_iters=4,
    act_iters=3,
    tla_iters=3,
    cma_iters=3,
    batch_size=4,
    recon_samples=8,
    calib_batch=4,
    lora_rank=2,
)
UNQUANTIZED = dict(adaround=False, act_recon=False)
PLAIN = UNQUANTIZED | dict(act_range="minmax", weight_range="minmax")  # quick to quantize


def fill(model: nn.Module) -> nn.Module:
    """Weights by name from one generator, whatever the library's own initialization is."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator)
            fan_in = max(1, weight[0].numel())
            is_norm = weight.ndim == 1 and name.endswith("weight")
            weight.copy_(1 + 0.1 * noise if is_norm else noise * fan_in**-0.5)
    return model.eval().requires_grad_(False)


@cache
def unconditional() -> SimpleNamespace:
    unet = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return SimpleNamespace(unet=fill(unet), scheduler=DDIMScheduler(clip_sample=False))


@cache
def conditional() -> SimpleNamespace:
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    return SimpleNamespace(
        unet=fill(unet),
        scheduler=DDIMScheduler(clip_sample=False),
        components={},
        class_embedder=fill(ClassEmbedder(4, 8)),
    )


@cache
def calibration() -> Calibration:
    return calibrate(unconditional(), 6, 4, seed=3)


def quantized(preset: str, act_bits: int = 4, weight_bits: int = 4, **changes) -> nn.Module:
    torch.manual_seed(0)
    changes = ITERATIONS | dict(step_groups=2) | UNQUANTIZED | changes
    config = QuantConfig.preset(preset, weight_bits, act_bits, **changes)
    return quantize(unconditional().unet, config, calibration())


def gathered(unet: nn.Module, *endings: str) -> torch.Tensor:
    """All of a model's floating-point tensors with such names, in one row."""
    found = [v.flatten() for k, v in unet.state_dict().items() if k.endswith(endings)]
    return torch.cat([v for v in found if v.is_floating_point()])


def weights(unet: nn.Module) -> torch.Tensor:
    """How far they are from the full-precision ones: a small step shows."""
    full = unconditional().unet.state_dict()
    found = {k: v for k, v in unet.state_dict().items() if k.endswith(".weight")}
    return torch.cat([(v - full[k]).flatten() for k, v in sorted(found.items())])


def scales(unet: nn.Module) -> torch.Tensor:
    return gathered(unet, ".scale").clone()


def run_calibrate() -> Numbers:
    plain = calibration.__wrapped__()
    guided = calibrate(conditional(), 4, 3, guidance_scale=3.0, seed=1)
    return {
        "unconditional x": plain.x,
        "unconditional eps": plain.eps,
        "guided x": guided.x,
        "guided eps": guided.eps,
        "guided context": guided.context,
    }


RANGES: dict[str, dict] = {
    "minmax": dict(preset="minmax", weight_bits=8, act_bits=8),
    "q-diffusion": dict(preset="q-diffusion", act_bits=8),
    "quest": dict(preset="quest"),
    "quest tokens": dict(preset="quest", act_granularity="token"),
    "quest-release w4a8": dict(preset="quest-release", act_bits=8),
    "quest-release w4a4": dict(preset="quest-release"),
}


def run_ranges(*names: str) -> Numbers:
    numbers = {}
    for name in names or RANGES:
        unet = quantized(**RANGES[name])
        numbers[f"{name} scales"] = scales(unet)
        numbers[f"{name} others"] = gathered(unet, ".zero_point", ".ratio")
    return numbers


def run_adaround() -> Numbers:
    # A high rate: in a few iterations many weights are rounded to the other side.
    plain = PLAIN | dict(adaround=True, adaround_lr=0.2, adaround_iters=8)
    time_path = dict(temporal_block=True)
    return {
        "quest weights": weights(quantized("quest", **plain)),
        "tfmq-dm weights": weights(quantized("tfmq-dm", 8, **plain | time_path)),
    }


def run_act_recon() -> Numbers:
    numbers = {}
    for bits in (8, 4):
        before = scales(quantized("q-diffusion", bits, **PLAIN))
        after = scales(quantized("q-diffusion", bits, **PLAIN | dict(act_recon=True)))
        numbers |= {f"w4a{bits} scales": after, f"w4a{bits} change": after - before}
    return numbers


def run_noise_correction() -> Numbers:
    unet = quantized("ptq-d", **PLAIN)
    found = unet.quest_correction.state_dict()
    return {name: found[name] for name in ("gain", "bias", "variance")}


def run_finetune() -> Numbers:
    numbers = {}
    for preset in ("quest", "quest-paper", "quest-release", "full-finetune", "efficientdm"):
        unet = quantized(preset, **PLAIN)
        before = scales(unet)
        log = finetune(unet, unconditional().unet, calibration(), unet.quest_config)
        numbers[f"{preset} weights"] = weights(unet)
        numbers[f"{preset} scales"] = scales(unet)
        numbers[f"{preset} change of scales"] = scales(unet) - before
        numbers[f"{preset} losses"] = torch.tensor([entry[2:] for entry in log["loss"]])
    return numbers


def run_sample() -> Numbers:
    numbers = {}
    small = quantized("minmax", 8, 8)
    for name, unet in {"full": None, "quantized": small}.items():
        for sampler, choices in {"ddim": dict(eta=1.0), "plms": {}}.items():
            drawn = sample(
                unconditional(),
                4,
                num_inference_steps=4,
                sampler=sampler,
                seed=1000,
                unet=unet,
                progress=False,
                **choices,
            )
            numbers[f"{name} {sampler}"] = drawn.latents
    guided = sample(
        conditional(), 4, num_inference_steps=3, guidance_scale=3.0, seed=1000, progress=False
    )
    return numbers | {"guided": guided.latents}


def run_integer() -> Numbers:
    calib, numbers = calibration(), {}
    for name, unet in {
        "tensor w8a8": quantized("minmax", 8, 8),
        "tensor w4a8": quantized("minmax", 8),
        "carrier w4a4": quantized("quest", **PLAIN),
        "token w4a4": quantized("quest", **PLAIN, act_granularity="token"),
    }.items():
        integers = convert(unet, "reference")
        with torch.no_grad():
            outputs = [integers(calib.x[step], calib.t[step]).sample for step in (0, 3)]
        numbers[name] = torch.stack(outputs)
    return numbers


def run_evaluate() -> Numbers:
    """More images than features: their covariance has an inverse. Six digits: FID is LAPACK's."""
    generator = torch.Generator().manual_seed(0)

    def images(low: int, high: int) -> torch.Tensor:
        coarse = torch.randint(low, high, (160, 3, 8, 8), generator=generator, dtype=torch.uint8)
        return coarse.repeat_interleave(8, 2).repeat_interleave(8, 3)

    ours = images(40, 240)
    noise = torch.randint(0, 16, ours.shape, generator=generator, dtype=torch.uint8)
    found = metrics.evaluate(ours, reference=images(0, 256), paired=ours + noise)
    values = {k: v for k, v in found.items() if isinstance(v, float)}
    return {k: torch.tensor(float(f"{v:.6g}"), dtype=torch.float64) for k, v in values.items()}


RUNS: dict[str, Callable[[], Numbers]] = {
    "calibrate": run_calibrate,
    "ranges": run_ranges,
    "adaround": run_adaround,
    "act_recon": run_act_recon,
    "noise_correction": run_noise_correction,
    "finetune": run_finetune,
    "sample": run_sample,
    "integer": run_integer,
    "evaluate": run_evaluate,
}
BEFORE = {  # stages whose results a stage is run on: when they change, so does it
    "calibrate": (),
    "ranges": ("calibrate",),
    "adaround": ("calibrate", "ranges"),
    "act_recon": ("calibrate", "ranges"),
    "noise_correction": ("calibrate", "ranges"),
    "finetune": ("calibrate", "ranges"),
    "sample": ("calibrate", "ranges"),
    "integer": ("calibrate", "ranges"),
    "evaluate": (),
}


# ---- how it is compared ----


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums are then taken in one order, whatever the number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def processor() -> str:
    """The CPU's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown")


def fingerprint() -> str:
    """What decides the last bits of a CPU's numbers."""
    with one_thread():
        threads = torch.get_num_threads()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__}, {capability}, {processor()}, {threads} thread"


@cache
def numbers_of(stage: str) -> Numbers:
    with one_thread():
        return RUNS[stage]()


def version_of(stage: str) -> int:
    return EVALUATE_VERSION if stage == "evaluate" else STAGE_VERSIONS[stage]


def bits_of(numbers: Numbers) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(numbers.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().numpy())
    return digest.hexdigest()


def values_of(numbers: Numbers) -> dict[str, list[float]]:
    """Of each tensor its mean size, mean and deviation: a code that flips hardly moves them."""
    values = {}
    for name, tensor in sorted(numbers.items()):
        x = tensor.detach().double().flatten()
        found = [x.abs().mean(), x.mean(), x.std()] if len(x) > 1 else [x[0]]
        values[name] = [float(f"{v.item():.7g}") for v in found]
    return values


def tolerance_of(stage: str) -> float:
    return TRAINED if stage in ("adaround", "act_recon", "finetune") else TOLERANCE


def values_agree(
    found: dict[str, list[float]], golden: dict[str, list[float]], tolerance: float
) -> bool:
    if found.keys() != golden.keys():
        return False
    for name, expected in golden.items():
        allowed = max(1e-8, tolerance * abs(expected[0]))
        if any(abs(a - b) > allowed for a, b in zip(found[name], expected, strict=True)):
            return False
    return True


def failure(stage: str, numbers: Numbers, golden: dict, version: int, machine: str) -> str | None:
    """What is wrong with a stage's numbers, or None."""
    command = "python tests/test_golden_bits.py --write"
    if stage not in golden:
        return f"stage {stage!r} has no golden numbers: run {command}"
    entry = golden[stage]
    if version != entry["version"]:
        return (
            f"stage {stage!r} has version {version}, the golden file holds {entry['version']}: "
            f"run {command}"
        )
    if machine in entry["bits"]:
        what, same = "bits", bits_of(numbers) == entry["bits"][machine]
    else:
        found = values_of(numbers)
        what, same = "values", values_agree(found, entry["values"], tolerance_of(stage))
    if same:
        return None
    place = "STAGE_VERSIONS['" + stage + "'] in questlib/versions.py"
    if stage == "evaluate":
        place = "EVALUATE_VERSION in reproduce/pipeline.py"
    return (
        f"stage {stage!r} changed its numbers ({what}) while its version is still {version}: "
        f"bump {place}, then run: {command}"
    )


def check(stage: str, golden: dict) -> str | None:
    return failure(stage, numbers_of(stage), golden, version_of(stage), fingerprint())


def read_golden() -> dict:
    return json.loads(GOLDEN.read_text()) if GOLDEN.is_file() else {}


# ---- tests ----


def test_every_stage_has_golden_numbers():
    assert set(RUNS) == set(BEFORE) == {*STAGE_VERSIONS, "evaluate"} == set(read_golden())


@pytest.mark.parametrize("stage", RUNS)
def test_numbers_are_those_of_the_version(stage):
    golden = read_golden()
    if changed := [s for s in BEFORE[stage] if check(s, golden)]:
        pytest.skip(f"is run on the results of {', '.join(changed)}, which changed")
    message = check(stage, golden)
    assert message is None, message


def test_a_change_is_found_and_its_stage_named(monkeypatch):
    """On the golden file of this very machine, and on one without its bits."""
    with one_thread():
        found = run_ranges("minmax")
    entry = {"version": 1, "values": values_of(found), "bits": {"here": bits_of(found)}}
    golden = {"ranges": entry}
    assert failure("ranges", found, golden, 1, "here") is None
    assert failure("ranges", found, golden, 1, "elsewhere") is None
    assert failure("ranges", found, golden, 2, "here") == (
        "stage 'ranges' has version 2, the golden file holds 1: "
        "run python tests/test_golden_bits.py --write"
    )
    monkeypatch.setattr(primitives, "EPS", 0.5)
    with one_thread():
        changed = run_ranges("minmax")
    for machine, what in (("here", "bits"), ("elsewhere", "values")):
        assert failure("ranges", changed, golden, 1, machine) == (
            f"stage 'ranges' changed its numbers ({what}) while its version is still 1: "
            "bump STAGE_VERSIONS['ranges'] in questlib/versions.py, "
            "then run: python tests/test_golden_bits.py --write"
        )


@pytest.mark.parametrize("stage", RUNS)
def test_one_last_bit_counts_where_the_machine_is_known_and_a_percent_elsewhere(stage):
    found = numbers_of(stage)
    golden = {stage: {"version": 1, "values": values_of(found), "bits": {"here": bits_of(found)}}}
    name = next(iter(found))
    last_bit = found[name].clone(memory_format=torch.contiguous_format)
    first = last_bit.view(-1)[:1]
    first.copy_(torch.nextafter(first, first + 1))
    nearly = found | {name: last_bit}
    assert f"stage {stage!r} changed its numbers (bits)" in failure(
        stage, nearly, golden, 1, "here"
    )
    assert failure(stage, nearly, golden, 1, "elsewhere") is None
    other = found | {name: found[name] * (1 + 2 * tolerance_of(stage))}
    assert "(values)" in failure(stage, other, golden, 1, "elsewhere")


# ---- the golden file ----


def entry_of(stage: str, numbers: Numbers, old: dict | None) -> dict:
    """A stage's new entry; bits of other machines stay where these numbers are still theirs."""
    entry = {"version": version_of(stage), "values": values_of(numbers), "bits": {}}
    same = old and old["version"] == entry["version"]
    if same and values_agree(entry["values"], old["values"], tolerance_of(stage)):
        entry["bits"] |= old["bits"]
        entry["values"] = old["values"]  # one machine's, as long as they are right
    entry["bits"][fingerprint()] = bits_of(numbers)
    return entry


def main(argv: list[str]) -> int:
    if argv not in (["--write"], ["--add"]):
        print("usage: python tests/test_golden_bits.py --write | --add", file=sys.stderr)
        return 2
    golden, new, changed, failed = read_golden(), {}, set(), 0
    for stage in RUNS:
        message = check(stage, golden)
        raised = stage not in golden or version_of(stage) != golden[stage]["version"]
        follows = changed.intersection(BEFORE[stage])
        if message is not None:
            changed.add(stage)
        if message is not None and (argv == ["--add"] or not (raised or follows)):
            print(message, file=sys.stderr)
            failed += 1
            if stage in golden:
                new[stage] = golden[stage]
            continue
        new[stage] = entry_of(stage, numbers_of(stage), golden.get(stage))
    GOLDEN.write_text(json.dumps(new, indent=1) + "\n")
    print(f"{GOLDEN}: {len(new) - failed} stages of {fingerprint()}, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
