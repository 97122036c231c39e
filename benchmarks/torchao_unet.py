"""The UNet by torchao: int8 after export (PT2E), compiled by torch's Inductor.

Linear layers and convolutions get 8-bit weights and activations, and run on oneDNN. Needs
`pip install torchao`, which is in the extra `[benchmarks]`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

import torch
from openvino_unet import Outputs

# precision of what is not quantized
VARIANTS = {"torchao-int8": torch.float32, "torchao-int8-bf16": torch.bfloat16}
CALLS = 1  # that ranges are taken from; speed does not depend on the values


def is_there() -> bool:
    """Whether the package is installed."""
    return importlib.util.find_spec("torchao") is not None


def size_of(unet: torch.nn.Module) -> int:
    """Bytes of its weights: one for each weight of a linear layer or convolution, 4 for others.

    torchao keeps the codes in the compiled program and writes no file.
    """
    layers = [m for m in unet.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    codes = sum(layer.weight.numel() for layer in layers)
    others = sum(p.numel() for p in unet.parameters()) - codes
    return codes + 4 * others


def without_dtype_checks(program: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The program without the checks that export wrote, which refuse autocast's precision."""
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            program.graph.erase_node(node)
    program.recompile()
    return program


def load(
    variant: str, unet: torch.nn.Module, inputs: Sequence[torch.Tensor]
) -> Callable[[Sequence[torch.Tensor]], torch.Tensor]:
    """A function that runs one step of a variant on its inputs.

    Args:
        unet: in float32.
        inputs: tensors of a call: sample, timestep and, where there is one, the context.
    """
    from torch._inductor import config
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    quantizer = X86InductorQuantizer()
    quantizer.set_global(get_default_x86_inductor_quantization_config())
    config.freezing = True  # torchao's kernels want the weights as constants
    with torch.no_grad():
        exported = torch.export.export(Outputs(unet), tuple(inputs)).module()
        prepared = prepare_pt2e(exported, quantizer)
        for _ in range(CALLS):
            prepared(torch.randn_like(inputs[0]), *inputs[1:])
        compiled = torch.compile(without_dtype_checks(convert_pt2e(prepared)))
    dtype = VARIANTS[variant]

    def run(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            return compiled(*inputs)

    return run
