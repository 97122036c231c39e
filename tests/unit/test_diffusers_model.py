"""A quantized UNet lives in its pipeline, and is saved and loaded as diffusers does it."""

import json
import subprocess
import sys

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.models.attention_processor import AttnProcessor2_0
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import questlib
from questlib import QuantConfig, calibrate, from_pretrained, quantize, save_pretrained
from questlib.errors import CheckpointError, ConfigError, QuestError
from questlib.quantization.preparation import prepare

CONTEXT = dict(
    sample_size=8,
    in_channels=3,
    out_channels=3,
    layers_per_block=1,
    block_out_channels=(16, 32),
    norm_num_groups=8,
    attention_head_dim=8,
)


def added_kv(context):
    """As DeepFloyd IF's UNet: attention with added keys and values."""
    torch.manual_seed(0)
    return (
        UNet2DConditionModel(
            **CONTEXT,
            cross_attention_dim=context,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            resnet_time_scale_shift="scale_shift",
        )
        .eval()
        .requires_grad_(False)
    )


@pytest.fixture
def quantized(pipe, calib):
    return quantize(pipe.unet, QuantConfig.preset("minmax", 8, 8), calib)


@pytest.mark.parametrize("context", [12, 32])  # 32: as wide as the attention's own channels
def test_added_keys_and_values(context):
    """W16A16 is the full-precision UNet; W8A8 is near to it, in integers too."""
    unet = added_kv(context)
    pipe = DDIMPipeline(unet, DDIMScheduler(clip_sample=False))

    def run():
        unet(torch.randn(2, 3, 8, 8), 500, encoder_hidden_states=torch.randn(2, 5, context))

    calib = calibrate(pipe, run=run)
    batch = calib.batch(0, torch.arange(2))
    off = prepare(unet, QuantConfig.preset("minmax", 16, 16), calib.t)
    torch.testing.assert_close(batch.run(off), batch.eps)
    student = quantize(unet, QuantConfig.preset("minmax", 8, 8), calib)
    for made in (student, questlib.convert(student, "reference")):
        assert (batch.run(made) - batch.eps).norm() < 0.1 * batch.eps.norm()


def test_a_pipeline_comes_back_from_diffusers_bit_for_bit(pipe, calib, fast, tmp_path):
    for name, bits in (("minmax", 8), ("quest", 4)):
        unet = quantize(pipe.unet, fast(name, bits, bits), calib)
        DDIMPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path / name)
        folder = tmp_path / name / "unet"
        about = json.loads((folder / "config.json").read_text())["quantization_config"]
        assert about["quant_method"] == "quest"
        batch = calib.batch(1, torch.arange(6))
        loaded = (
            DiffusionPipeline.from_pretrained(tmp_path / name).unet,
            type(unet).from_pretrained(folder),
            from_pretrained(folder),
        )
        for again in loaded:
            assert torch.equal(batch.run(again), batch.run(unet))
        half = type(unet).from_pretrained(folder, torch_dtype=torch.float16)
        assert half.dtype == torch.float16 and torch.isfinite(batch.run(half)).all()
        loaded[0].save_pretrained(tmp_path / "again")
        assert torch.equal(batch.run(from_pretrained(tmp_path / "again")), batch.run(unet))


def test_shards_come_back(quantized, calib, tmp_path):
    quantized.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    batch = calib.batch(1, torch.arange(6))
    assert torch.equal(batch.run(UNet2DModel.from_pretrained(tmp_path)), batch.run(quantized))


@pytest.mark.parametrize("first", ["questlib", "diffusers"])
def test_the_quantizer_is_registered_in_either_order(quantized, tmp_path, first):
    quantized.save_pretrained(tmp_path)
    second = {"questlib": "diffusers", "diffusers": "questlib"}[first]
    code = f"""
import {first}, {second}
from diffusers import UNet2DModel
unet = UNet2DModel.from_pretrained({str(tmp_path)!r})
print(len(questlib.engine_report(unet)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.strip()) > 10


@pytest.mark.parametrize(
    "first",
    [
        "questlib.diffusers_quantizer",
        "diffusers, questlib.diffusers_quantizer",
        "questlib.integer.conversion",
        "questlib, diffusers.quantizers.auto",
    ],
)
def test_the_quantizer_is_registered_whatever_is_imported_first(first):
    code = (
        f"import {first}\n"
        "import diffusers.quantizers.auto as auto, questlib.diffusers_quantizer as own\n"
        "assert auto.AUTO_QUANTIZER_MAPPING['quest'] is own.QuestQuantizer"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr


def test_damaged_files_of_diffusers_are_refused(quantized, tmp_path):
    quantized.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["format"] = 9
    (tmp_path / "config.json").write_text(json.dumps(config))
    for load, says in (
        (UNet2DModel.from_pretrained, "format"),
        (from_pretrained, "config.json: not what was saved"),
    ):
        with pytest.raises(CheckpointError, match=says):
            load(tmp_path)


@pytest.mark.parametrize("shards", [False, True])
def test_one_changed_bit_in_files_of_diffusers_is_named(quantized, tmp_path, shards):
    quantized.save_pretrained(tmp_path, max_shard_size="50KB" if shards else "1GB")
    for path in tmp_path.glob("*.safetensors"):
        state = load_file(path)
        if "conv_out.bias" in state:
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
            state["conv_out.bias"].view(torch.int32).bitwise_xor_(1)
            save_file(state, path, metadata)
    for load in (
        (UNet2DModel.from_pretrained,)
        if shards
        else (
            UNet2DModel.from_pretrained,
            from_pretrained,
        )
    ):
        with pytest.raises(CheckpointError, match="not what was saved: conv_out.bias"):
            load(tmp_path)


def test_a_changed_config_of_diffusers_is_refused(quantized, tmp_path):
    quantized.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["norm_eps"] = 1e-4
    (tmp_path / "config.json").write_text(json.dumps(config))
    for load in (UNet2DModel.from_pretrained, from_pretrained):
        with pytest.raises(CheckpointError, match="config.json: not what was saved"):
            load(tmp_path)


def test_what_cannot_be_rebuilt_is_found_before_saving(quantized, pipe, calib, tmp_path):
    class Own(UNet2DModel):
        pass

    own = Own.from_config(pipe.unet.config).eval()
    own.load_state_dict(pipe.unet.state_dict())
    student = quantize(own, QuantConfig.preset("minmax", 8, 8), calib)
    damaged = quantize(pipe.unet, QuantConfig.preset("minmax", 8, 8), calib)
    damaged.conv_in.bias.data[0] = float("nan")
    freeu = quantize(pipe.unet, QuantConfig.preset("minmax", 8, 8), calib)
    freeu.up_blocks[0].s1 = 0.9
    for unet, why in (
        (student, "Own"),
        (damaged, "not finite"),
        (freeu, "FreeU"),
        (questlib.convert(quantized, "reference"), "integers"),
    ):
        for save in (save_pretrained, lambda unet, out: unet.save_pretrained(out)):
            with pytest.raises(QuestError, match=why):
                save(unet, tmp_path / "out")
            assert not (tmp_path / "out" / "config.json").exists()


def test_nothing_undoes_quantization_silently(pipe, calib, tmp_path):
    batch = calib.batch(0, torch.arange(2))

    def processors(unet):
        unet.mid_block.attentions[0].set_processor(AttnProcessor2_0())

    def slicing(unet):
        unet.mid_block.attentions[0].set_attention_slice(1)

    def adapter(unet):
        unet.conv_out = torch.nn.Sequential(unet.conv_out)

    for change in (processors, slicing, adapter):
        unet = quantize(pipe.unet, QuantConfig.preset("minmax", 8, 8), calib)
        for made in (unet, questlib.convert(unet, "reference")):
            batch.run(made)
            change(made)
            with pytest.raises(QuestError, match="full precision"):
                batch.run(made)
        with pytest.raises(QuestError, match="full precision"):
            save_pretrained(unet, tmp_path)
        with pytest.raises(QuestError, match="full precision"):
            questlib.convert(unet, "reference")


def test_a_wrapped_forward_is_refused(pipe, calib):
    """A copy of it would run the full-precision modules."""
    for owner in (pipe.unet, pipe.unet.mid_block):
        original = owner.forward
        owner.forward = lambda *args, original=original, **kwargs: original(*args, **kwargs)
        try:
            with pytest.raises(ConfigError, match="forward"):
                quantize(pipe.unet, QuantConfig.preset("minmax", 2, 16), calib)
        finally:
            del owner.forward


def test_offloaded_models_give_the_same(pipe, calib, quantized):
    batch = calib.batch(1, torch.arange(2))
    config = QuantConfig.preset("minmax", 8, 8)
    for offload in (cpu_offload, cpu_offload_with_hook):
        unet = UNet2DModel.from_config(pipe.unet.config).eval().requires_grad_(False)
        unet.load_state_dict(pipe.unet.state_dict())
        offload(unet, execution_device=torch.device("cpu"))
        student = quantize(unet, config, calib)
        assert torch.equal(batch.run(student), batch.run(quantized))
    expected = batch.run(quantized)
    cpu_offload(quantized, execution_device=torch.device("cpu"), offload_buffers=True)
    assert torch.equal(quantized(batch.x, batch.t).sample, expected)


def test_fused_projections_are_quantized_as_unfused_ones(fast):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        **CONTEXT,
        cross_attention_dim=12,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    unet.eval().requires_grad_(False)
    pipe = DDIMPipeline(unet, DDIMScheduler(clip_sample=False))
    x, context = torch.randn(2, 3, 8, 8), torch.randn(2, 5, 12)

    def quantized():
        calib = calibrate(pipe, run=lambda: unet(x, 500, encoder_hidden_states=context))
        return quantize(unet, QuantConfig.preset("minmax", 8, 8), calib)

    plain = quantized()
    unet.fuse_qkv_projections()
    fused = quantized()
    outputs = [u(x, 500, encoder_hidden_states=context).sample for u in (plain, fused)]
    torch.testing.assert_close(*outputs, rtol=0.05, atol=0.02)


def test_an_unknown_processor_is_refused_by_name(pipe, calib):
    class OwnProcessor(AttnProcessor2_0):
        pass

    attention = pipe.unet.mid_block.attentions[0]
    before = attention.processor
    attention.set_processor(OwnProcessor())
    try:
        with pytest.raises(ConfigError, match="mid_block.attentions.0.*OwnProcessor"):
            quantize(pipe.unet, QuantConfig.preset("minmax", 8, 8), calib)
    finally:
        attention.set_processor(before)


def test_integer_layers_have_the_sizes_of_their_layers(quantized):
    integer = questlib.convert(quantized, "reference")
    assert integer.conv_out.in_channels == quantized.conv_out.in_channels
    assert integer.conv_out.weight.shape == quantized.conv_out.weight.shape
    attention = integer.mid_block.attentions[0]
    assert attention.to_q.in_features == attention.to_q.out_features == 32


def test_adapters_are_refused_until_they_are_fused(fast):
    from peft import LoraConfig

    torch.manual_seed(0)
    unet = added_kv(12)
    pipe = DDIMPipeline(unet, DDIMScheduler(clip_sample=False))
    unet.add_adapter(LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False))
    unet.requires_grad_(False)
    x, context = torch.randn(2, 3, 8, 8), torch.randn(2, 5, 12)

    def run():
        unet(x, 500, encoder_hidden_states=context)

    with pytest.raises(ConfigError, match="fuse_lora"):
        calibrate(pipe, run=run)
    unet.fuse_lora()
    unet.unload_lora()
    calib = calibrate(pipe, run=run)
    student = quantize(unet, fast("minmax", 8, 8), calib)
    batch = calib.batch(0, torch.arange(2))
    assert (batch.run(student) - batch.eps).norm() < 0.1 * batch.eps.norm()


def test_the_model_card_says_what_a_reader_of_the_hub_asks(pipe, calib):
    quantized = quantize(pipe.unet, QuantConfig.preset("minmax", 4, 4), calib)
    card = questlib.model_card(quantized, "me/fox-w4a4")
    assert card.data.library_name == "diffusers" and "w4a4" in card.data.tags
    size = sum(row.checkpoint_bytes for row in questlib.engine_report(quantized))
    floats = sum(p.numel() for p in quantized.parameters())
    assert size < 0.2 * 4 * floats
    for part in ("4-bit weights and 4-bit", "preset `minmax`", '("me/fox-w4a4")'):
        assert part in card.content
    assert f"calibrated timesteps | {len(calib.t)}" in card.content
    with pytest.raises(ConfigError, match="plain UNet2DModel"):
        questlib.model_card(pipe.unet)
    with pytest.raises(ConfigError, match="before convert"):
        questlib.model_card(questlib.convert(quantized, "reference"))
