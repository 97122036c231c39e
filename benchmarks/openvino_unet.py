"""The UNet by OpenVINO: what people would use for int8 on a CPU.

NNCF quantizes it after training (weights and activations, 8 bits). Needs `pip install openvino
nncf`, the extra `[benchmarks]`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

# precision of the model file, precision of what is not quantized
VARIANTS = {
    "openvino-fp32": ("fp32", "f32"),
    "openvino-bf16": ("fp32", "bf16"),
    "openvino-int8": ("int8", "f32"),
    "openvino-int8-bf16": ("int8", "bf16"),
}
CALLS = 4  # that NNCF calibrates on; speed does not depend on the values


def is_there() -> bool:
    """Whether the packages are installed."""
    return all(importlib.util.find_spec(name) for name in ("openvino", "nncf"))


class Outputs(torch.nn.Module):
    """A UNet that takes positional arguments and returns its output alone."""

    def __init__(self, unet: torch.nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample, timestep, context=None):
        """Its output, a tensor like `sample`."""
        args = () if context is None else (context,)
        return self.unet(sample, timestep, *args, return_dict=False)[0]


def write_models(
    unet: torch.nn.Module, inputs: Sequence[torch.Tensor], folder: Path, names: Sequence[str]
) -> dict[str, int]:
    """Write the model files that the variants need; returns their sizes in bytes.

    Args:
        unet: in float32.
        inputs: tensors of a call: sample, timestep and, where there is one, the context.
        folder: where they are written.
        names: variants.
    """
    import nncf
    import openvino

    wanted = {VARIANTS[name][0] for name in names}
    sizes = {}
    shapes = [tensor.shape for tensor in inputs]
    model = openvino.convert_model(Outputs(unet), example_input=tuple(inputs), input=shapes)
    if "fp32" in wanted:
        sizes["fp32"] = _save(model, folder / "fp32.xml")
    if "int8" in wanted:
        calls = [[torch.randn_like(inputs[0]), *inputs[1:]] for _ in range(CALLS)]
        data = nncf.Dataset(calls, lambda call: [tensor.numpy() for tensor in call])
        quantized = nncf.quantize(
            model, data, subset_size=CALLS, model_type=nncf.ModelType.TRANSFORMER
        )
        sizes["int8"] = _save(quantized, folder / "int8.xml")
    return sizes


def _save(model: object, path: Path) -> int:
    import openvino

    path.parent.mkdir(parents=True, exist_ok=True)
    openvino.save_model(model, path, compress_to_fp16=False)
    return path.with_suffix(".bin").stat().st_size


def load(variant: str, folder: Path, threads: int) -> Callable[[Sequence[torch.Tensor]], object]:
    """A function that runs one step of a variant on its inputs."""
    import openvino

    file, precision = VARIANTS[variant]
    options = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.compile_model(folder / f"{file}.xml", "CPU", options).create_infer_request()
    return lambda inputs: request.infer([tensor.numpy() for tensor in inputs])
