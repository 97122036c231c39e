"""`engine_report`: how each layer of a UNet runs, and how many bytes its weights take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from questlib.integer.modules import IntegerAttention, IntegerLayer, TransformedLayer
from questlib.quantization.attention import ProjectedAttention, QuantAttnProcessor
from questlib.quantization.layers import QuantLayer
from questlib.quantization.packed_codes import packed_size

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("layer", "engine", "format", "checkpoint bytes", "resident bytes")


class LayerReport(NamedTuple):
    """How one layer runs."""

    layer: str
    engine: str  # what really runs it: an engine, "fake" for a simulated layer, or a dtype
    format: str  # of its integers; "simulated" or "not quantized"
    checkpoint_bytes: int  # of its weights in a checkpoint
    resident_bytes: int  # of its weights in memory


@dataclass(frozen=True)
class EngineReport:
    """How each layer of a UNet runs. Iterates over its layers; prints as a table with totals."""

    layers: tuple[LayerReport, ...]

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def engines(self) -> dict[str, int]:
        """Number of layers that each engine runs, the most first."""
        return dict(Counter(row.engine for row in self.layers).most_common())

    def formats(self) -> dict[str, int]:
        """Number of layers in each format, the most first."""
        return dict(Counter(row.format for row in self.layers).most_common())

    def totals(self) -> list[LayerReport]:
        """One entry for each engine and format, with the sums of its layers' bytes.

        Its `layer` is the number of layers in words.
        """
        kinds = Counter((row.engine, row.format) for row in self.layers)
        totals = []
        for (engine, form), count in sorted(kinds.items()):
            own = [r for r in self.layers if (r.engine, r.format) == (engine, form)]
            stored = sum(row.checkpoint_bytes for row in own)
            resident = sum(row.resident_bytes for row in own)
            words = f"{count} layer{'s' if count > 1 else ''}"
            totals.append(LayerReport(words, engine, form, stored, resident))
        return totals

    def __str__(self) -> str:
        if not self.layers:
            return "no layers"
        blocks = [[COLUMNS], self.layers, self.totals()]
        text = [[tuple(map(str, row)) for row in block] for block in blocks]
        widths = [max(map(len, column)) for column in zip(*sum(text, []), strict=True)]
        rule = "  ".join("-" * width for width in widths)
        lines = []
        for block in text:
            for row in block:
                # words to the left, numbers to the right
                words = [v.ljust(n) for v, n in zip(row[:3], widths[:3], strict=True)]
                numbers = [v.rjust(n) for v, n in zip(row[3:], widths[3:], strict=True)]
                lines.append("  ".join(words + numbers))
            lines.append(rule)
        return "\n".join(lines[:-1])

    def frame(self) -> pd.DataFrame:
        """One row a layer, as a table of pandas.

        Raises:
            ImportError: pandas, which questlib itself does not need, is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError(
                "EngineReport.frame needs pandas (pip install pandas); print the report without it"
            ) from error
        return pd.DataFrame(self.layers, columns=list(COLUMNS))


def engine_report(unet: nn.Module) -> EngineReport:
    """How each linear layer, convolution and attention of a UNet runs.

    Example:
        >>> report = questlib.engine_report(questlib.convert(unet, "cpu"))
        >>> report.engines()
        {'cpu-int8': 83}
        >>> print(report)
    """
    layers = []
    inner = {id(m.layer) for m in unet.modules() if isinstance(m, TransformedLayer)}
    for name, module in unet.named_modules():
        if isinstance(module, TransformedLayer):
            layers.append(_transformed(name, module))
        elif id(module) in inner:
            continue
        elif isinstance(module, IntegerLayer):
            sizes = (module.packed_bytes, module.resident_bytes)
            layers.append(LayerReport(name, module.engine, module.format, *sizes))
        elif isinstance(module, ProjectedAttention):
            name = name.removesuffix(".processor")
            layers.append(LayerReport(name, *_attention_runs(module, unet), 0, 0))
        elif isinstance(module, QuantLayer | nn.Linear | nn.Conv2d):
            layers.append(_float_layer(name, module))
    return EngineReport(tuple(layers))


def _transformed(name: str, module: TransformedLayer) -> LayerReport:
    """A layer in integers with what stands around it in floating point."""
    layer, transform = module.layer, module.transform
    added = sum(v.numel() * v.element_size() for v in transform.state_dict().values())
    words = f"{layer.format}, {transform.words}"
    sizes = (layer.packed_bytes + added, layer.resident_bytes + added)
    return LayerReport(name, layer.engine, words, *sizes)


def _attention_runs(processor: ProjectedAttention, unet: nn.Module) -> tuple[str, str]:
    """What runs an attention's products, and their format."""
    if isinstance(processor, IntegerAttention):
        return processor.engine, processor.format
    if isinstance(processor, QuantAttnProcessor) and processor.q.enabled:
        return "fake", "simulated"
    return str(unet.dtype).removeprefix("torch."), "not quantized"


def _float_layer(name: str, layer: nn.Module) -> LayerReport:
    """A layer that runs in floating point, simulated or not quantized at all."""
    size = layer.weight.numel() * layer.weight.element_size()
    simulated = isinstance(layer, QuantLayer) and (
        layer.input_quantizer.enabled or layer.weight_quantizer is not None and layer.weights_on
    )
    if not simulated:
        dtype = str(layer.weight.dtype).removeprefix("torch.")
        return LayerReport(name, dtype, "not quantized", size, size)
    wq = layer.weight_quantizer
    packed = size if wq is None else packed_size(layer.weight.numel(), wq.bits)
    return LayerReport(name, "fake", "simulated", packed, size)
