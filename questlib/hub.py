"""The model card of a quantized UNet, for the Hugging Face hub."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

from torch import nn

from questlib.config import OFF
from questlib.errors import ConfigError
from questlib.integer.report import engine_report
from questlib.quantization.model import quant_layers, step_groups

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

TEXT = """
# {title}

{name} with {weights} weights and {acts} activations in its denoiser, quantized by
[QuEST](https://arxiv.org/abs/2402.03666) (low-bit diffusion-model quantization by selective
finetuning), preset `{preset}`, with questlib {version}.

| | |
|---|---|
| class | `{kind}` |
| quantized layers | {layers} |
| weights on disk | {packed:.1f} MB, {full:.1f} MB in float32 |
| calibrated timesteps | {count}, {last:g} to {first:g} |

## Use

```python
import questlib  # pip install questlib; registers its quantizer with diffusers
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{repo}")
pipe.unet = questlib.convert(pipe.unet)  # int8 and int4 products; leave it out to simulate them
image = pipe(num_inference_steps={count}).images[0]
```

## Limits

Ranges and finetuning belong to the timesteps above: at another timestep the nearest calibrated
one's are used. Sample with the scheduler and the number of steps of the calibration.
"""


def model_card(unet: nn.Module, repo: str = "OWNER/NAME") -> ModelCard:
    """The card of a quantized UNet, with `save` and `push_to_hub` methods.

    Args:
        unet: a quantized UNet before `questlib.convert`.
        repo: its name on the hub.

    Raises:
        ConfigError: the UNet is not quantized, or runs in integers.

    Example:
        >>> pipe.push_to_hub("me/ldm4-w4a4")
        >>> questlib.model_card(pipe.unet, "me/ldm4-w4a4").push_to_hub("me/ldm4-w4a4")
    """
    from huggingface_hub import ModelCard, ModelCardData

    steps = step_groups(unet)
    layers = quant_layers(unet)
    if not layers:
        raise ConfigError("model_card: the UNet runs in integers; make its card before convert")
    config = unet.quest_config
    base = str(unet.config.get("_name_or_path") or "")
    is_on_hub = base.count("/") == 1 and not base.startswith((".", "/", "~"))
    bits = f"w{config.weight_bits}a{config.act_bits}"
    data = ModelCardData(
        library_name="diffusers",
        base_model=base if is_on_hub else None,
        tags=["questlib", "quest", "quantized", bits, "arxiv:2402.03666"],
    )
    parameters = sum(parameter.numel() for parameter in unet.parameters())
    unpacked = parameters - sum(layer.weight.numel() for layer in layers.values())
    packed = sum(row.checkpoint_bytes for row in engine_report(unet) if row.layer in layers)
    text = TEXT.format(
        title=repo.split("/")[-1],
        name=f"`{base}`" if is_on_hub else f"A `{type(unet).__name__}`",
        weights=_words(config.weight_bits),
        acts=_words(config.act_bits),
        preset=config.preset_name,
        version=version("questlib"),
        kind=type(unet).__name__,
        layers=len(layers),
        packed=(packed + 4 * unpacked) / 1e6,
        full=4 * parameters / 1e6,
        count=len(steps.timesteps),
        first=steps.timesteps.max().item(),
        last=steps.timesteps.min().item(),
        repo=repo,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")


def _words(bits: int) -> str:
    return "full-precision" if bits == OFF else f"{bits}-bit"
