"""Blocks of README and docs/ from what the scripts in benchmarks/ measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from reproduce.figures import engine
from reproduce.provenance import Machine
from reproduce.reporting import report


def machine_words(about: Machine) -> str:
    """A machine in words."""
    cores = f"{about['cores']} core{'' if about['cores'] == 1 else 's'}"
    return ", ".join([about["cpu"], cores, f"{about['memory_gib']} GiB", *about["gpus"]])


def _benchmark(folder: Path, name: str) -> dict[str, Any] | None:
    """What benchmarks/NAME.py wrote, beside the results; None when it was not run."""
    path = folder.parent / "benchmarks" / "results" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _not_measured(name: str) -> str:
    return f"`benchmarks/{name}.py`: not measured yet."


# ---- README: what the integer engine saves, and what finetuning needs ----

SAVINGS = {
    "fp32": "float32",
    "bf16-compiled": "bfloat16, compiled",
    "openvino-int8-bf16": "OpenVINO, int8 and bfloat16",
    "w4a4-fused": "**W4A4 in integers, `fuse=True`**",
}


def savings(folder: Path) -> str:
    """One step of Stable Diffusion's UNet: its time on each machine, memory and disk."""
    machines = [_benchmark(folder, name) for name in of_machines(folder, "cpu_unet")]
    found = [known["models"]["sd14"] for known in machines if known is not None]
    if not found:
        return _not_measured("cpu_unet")
    first = found[0]
    rows = []
    for key, name in SAVINGS.items():
        row = {"": name}
        for about in found:
            variant = about["variants"].get(key)
            head = f"step, {about['provenance']['machine']['cpu']}"
            row[head] = "-" if variant is None else f"{variant['step_s']:.1f} s"
        variant = first["variants"][key]
        row["peak memory"] = f"{variant['peak_bytes'] / 1e9:.1f} GB"
        row["on disk"] = f"{variant['disk_bytes'] / 1e9:.2f} GB"
        rows.append(row)
    cores = first["provenance"]["machine"]["cores"]
    heading = f"One step of Stable Diffusion v1.4's UNet, batch {first['batch']}, on {cores} cores:"
    return f"{heading}\n\n{report.as_markdown(pd.DataFrame(rows))}"


def finetuning_memory(folder: Path) -> list[str]:
    """Lines of a table (model, machine, time, memory): full-size models on one GPU."""
    found = _benchmark(folder, "finetune_memory")
    if found is None:
        return []
    titles = {"sd14": "Stable Diffusion v1.4", "ldm4-imagenet": "LDM-4, ImageNet"}
    return [
        f"| {titles[model]}, `save_memory=True, batch_size={c['batch_size']}` | one GPU "
        f"| see `--dry-run` | {c['bytes'] / 1e9:.0f} GB, counted |"
        for model, counts in found["models"].items()
        for c in counts
        if c["save_memory"] and c["batch_size"] == 4
    ]


# ---- docs/: the integer engine, full-size models, machines ----


def equality(found: dict[str, Any]) -> list[str]:
    """Whether the integer engine gives what the simulation does."""
    first = found["results"][0]
    images = first["metrics"]["cpu"]["n_samples"]
    counts = f"{images} images; reference and float64: {first['cpu_against_reference']['samples']}"
    heading = f"`python benchmarks/equality.py CHECKPOINTS` ({found['model']}, {counts}):"
    return [heading, report.as_markdown(engine.equality_table(found))]


def speed(found: dict[str, Any]) -> list[str]:
    """How fast the integer engine is on one machine."""
    parts = []
    for model, about in found["models"].items():
        where = f"{model}, batch {about['batch']}, {machine_words(about['provenance']['machine'])}"
        heading = f"`python benchmarks/cpu_unet.py` ({where}):"
        parts += [heading, report.as_markdown(engine.speed_table(found, model))]
    return parts


def of_machines(folder: Path, name: str) -> list[str]:
    """Names of a benchmark's results: the first machine's, then NAME_MACHINE of each other."""
    others = (folder.parent / "benchmarks" / "results").glob(f"{name}_*.json")
    return [name, *sorted(path.stem for path in others)]


def breakdown(found: dict[str, Any]) -> list[str]:
    """Where the time goes, and what the hardware would allow."""
    parts = []
    for model, about in found["models"].items():
        peak = about["peaks"]
        heading = (
            f"`python benchmarks/cpu_breakdown.py` ({model}, batch {about['batch']}, "
            f"{machine_words(about['provenance']['machine'])}; int8 {peak['int8'] / 1e9:.0f}, "
            f"float32 {peak['float32'] / 1e9:.0f} billion multiplications a second, copying "
            f"{peak['copy'] / 1e9:.1f} GB/s):"
        )
        parts += [heading, report.as_markdown(engine.breakdown_table(found, model))]
    return parts


def engines(folder: Path) -> str:
    """The integer engine: whether it is equal, how fast it is, and where the time goes."""
    parts = []
    written = [("equality", equality)]
    for base, write in (("cpu_unet", speed), ("cpu_breakdown", breakdown)):
        written += [(name, write) for name in of_machines(folder, base)]
    for name, write in written:
        found = _benchmark(folder, name)
        parts += [_not_measured(name)] if found is None else write(found)
    return "\n\n".join(parts)


def estimate(folder: Path) -> str:
    """A step on a GPU as benchmarks/roofline.py estimates it."""
    found = _benchmark(folder, "roofline")
    if found is None:
        return _not_measured("roofline")
    rows = [
        {
            "model": row["model"],
            "batch": row["batch"],
            "": row["what"],
            "kernels": row["kernels"],
            "step, ms": f"{row['ms']:.2f}",
            "x fp16": f"{row['speed_up']:.2f}",
        }
        for row in found["rows"]
    ]
    return report.as_markdown(pd.DataFrame(rows))


def full_size(folder: Path) -> str:
    """Full-size models: what quantization takes here, and finetuning on a GPU."""
    parts = []
    for name, line_of in (("full_size", quantized_line), ("finetune_memory", finetuned_line)):
        found = _benchmark(folder, name)
        if found is None:
            parts.append(_not_measured(name))
        else:
            lines = [line_of(model, about) for model, about in found["models"].items()]
            table = report.as_markdown(pd.DataFrame(lines))
            parts.append(f"`python benchmarks/{name}.py`:\n\n{table}")
    return "\n\n".join(parts)


def quantized_line(model: str, about: dict[str, Any]) -> dict[str, str]:
    """Size, memory and time of quantizing one model."""
    stages = ("calibrate", "quantize", "finetune", "save")
    return {
        "model": model,
        "parameters, M": f"{about['parameters'] / 1e6:.1f}",
        "fp32, MB": f"{about['fp32_bytes'] / 1e6:.0f}",
        "W4A4 on disk, MB": f"{about['checkpoint_bytes'] / 1e6:.0f}",
        "peak memory, GB": f"{about['peak_bytes'] / 1e9:.1f}",
        **{f"{stage}, s": f"{about['seconds'][stage]:.0f}" for stage in stages},
        "on": f"{machine_words(about['provenance']['machine'])}, {about['threads']} thread(s)",
    }


def finetuned_line(model: str, counts: list[dict[str, Any]]) -> dict[str, str]:
    """Memory of finetuning one model, by batch size."""
    name = {False: "", True: ", save_memory"}
    memory = {
        f"batch {c['batch_size']}{name[c['save_memory']]}, GB": f"{c['bytes'] / 1e9:.1f}"
        for c in counts
    }
    return {"model": model} | memory


QUANTIZED_BY = {
    "kernels": "with compiled kernels",
    "torch": "without them",
    "before": "before them, at {commit}",
}


def quantizing(folder: Path) -> str:
    """Seconds to quantize one row's model, stage by stage."""
    found = _benchmark(folder, "quantize_time")
    if found is None:
        return _not_measured("quantize_time")
    lines = []
    for name, about in found["variants"].items():
        seconds = about["seconds"]
        errors = sorted({f"{run['error_db']:.1f}" for run in about["runs"]})
        line = {"": QUANTIZED_BY[name].format(commit=about["commit"])}
        line |= {f"{stage}, s": f"{value:.1f}" for stage, value in seconds.items()}
        line |= {"sum, s": f"{sum(seconds.values()):.1f}", "error, dB": ", ".join(errors)}
        lines.append(line)
    heading = (
        f"`python benchmarks/quantize_time.py` ({found['row']}, {found['bits']}, {found['model']}, "
        f"{found['threads']} thread, {machine_words(found['provenance']['machine'])}; error of the "
        "predicted noise on trajectories that were not calibrated on):"
    )
    return f"{heading}\n\n{report.as_markdown(pd.DataFrame(lines))}"


def machines(folder: Path) -> str:
    """The same seeds on two machines."""
    found = _benchmark(folder, "machines")
    if found is None:
        return _not_measured("machines")
    lines = []
    for metric, between_seeds in found["between_seeds"].items():
        between_machines = found["between_machines"][metric]
        far = max(found["rows"], key=lambda r: abs(r[metric][0] - r[metric][1]))
        values = f"{far[metric][0]:.2f} and {far[metric][1]:.2f}"
        lines.append(
            {
                "metric": report.HEADS[metric],
                "one seed, two machines: RMS difference": f"{between_machines:.2f}",
                "two seeds, one machine: RMS difference": f"{between_seeds:.2f}",
                "pairs": len(found["rows"]),
                "largest": f"{values} ({far['row']}, seed {far['seed']})",
            }
        )
    names = " | ".join(machine_words(run["machine"]) for run in found["runs"])
    heading = f"`python benchmarks/machines.py RESULTS` ({found['table']}; {names}):"
    return f"{heading}\n\n{report.as_markdown(pd.DataFrame(lines))}"


def adaround(folder: Path) -> str:
    """What the weight of AdaRound's regularizer does, at 4 bits and at 8."""
    found = [_benchmark(folder, name) for name in ("adaround", "adaround8")]
    return "\n\n".join(_not_measured("adaround") if f is None else rounded(f) for f in found)


def rounded(found: dict[str, Any]) -> str:
    """AdaRound at some bits, a line a run."""
    lines = []
    for run in found["runs"]:
        blocks = run["blocks"].values()
        mean = sum(block["db"] for block in blocks) / len(blocks)
        lines.append(
            {
                "iterations x learning rate": f"{run['iters']} x {run['lr']:g}",
                "weight": f"{run['round_weight']:g}",
                "decided": f"{run['decided']:.0%}",
                "error of a block, dB": f"{mean:.1f}",
                "error of the model, dB": f"{run['model_db']:.1f}",
            }
        )
    nearest = found["runs"][0]["model_nearest_db"]
    heading = (
        f"`python benchmarks/adaround.py --bits {found['bits']}` ({found['model']}, "
        f"W{found['bits']}, on trajectories that were not calibrated on; rounded to nearest the "
        f"model has {nearest:.1f} dB):"
    )
    return f"{heading}\n\n{report.as_markdown(pd.DataFrame(lines))}"


def release(folder: Path) -> str:
    """The release's preset beside the release."""
    found = _benchmark(folder, "release")
    if found is None:
        return _not_measured("release")
    theirs = found["theirs"]
    lines = [{"": "the official release, run by its README"} | _finetuned(theirs)]
    lines += [{"": f"`{run['preset']}`"} | _finetuned(run) for run in found["runs"]]
    heading = (
        f"`python benchmarks/release.py` ({found['model']}, W4A4; signal-to-noise ratio of the "
        "predicted noise on trajectories that were not calibrated on, one seed):"
    )
    return f"{heading}\n\n{report.as_markdown(pd.DataFrame(lines))}"


def _finetuned(run: dict[str, Any]) -> dict[str, str]:
    """One run's iterations, and its ratio before and after them."""
    return {
        "iterations of TLA + CMA": f"{run['tla_iters']} + {run['cma_iters']}",
        "before, dB": f"{run['before_db']:.1f}",
        "after, dB": f"{run['after_db']:.1f}",
    }
