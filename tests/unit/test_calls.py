"""Calibration by a pipeline's own calls, with pipelines of diffusers' own classes."""

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)

import questlib
from questlib import Calibration, QuantConfig, calibrate, finetune, quantize
from questlib.calls import (
    put_tensors,
    skeleton_from_json,
    skeleton_to_json,
    take_tensors,
)
from questlib.capture import capture_outputs
from questlib.errors import CheckpointError, ConfigError, QuestError
from questlib.quantization.roles import TIME_ROLES, layer_roles
from questlib.quantization.time_path import run_time_layers
from questlib.recording import CallRecorder

SMALL = dict(sample_size=8, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8)
CROSS = SMALL | dict(
    attention_head_dim=4,
    cross_attention_dim=12,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
)
PLAIN = SMALL | dict(
    attention_head_dim=8,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)


@pytest.fixture(scope="module")
def sdxl():
    """SDXL with added conditions and fractional timesteps, without its text encoders."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        **CROSS,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=8 * 6 + 12,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    scheduler = EulerDiscreteScheduler(use_karras_sigmas=True)
    pipe = StableDiffusionXLPipeline(
        vae, None, None, None, None, unet, scheduler, add_watermarker=False
    )
    pipe.set_progress_bar_config(disable=True)
    for part in (unet, vae):
        part.eval().requires_grad_(False)
    return pipe


def call(seed, height=16, width=24, steps=4):
    generator = torch.Generator().manual_seed(seed)
    texts = {
        "prompt_embeds": (1, 7, 12),
        "negative_prompt_embeds": (1, 7, 12),
        "pooled_prompt_embeds": (1, 12),
        "negative_pooled_prompt_embeds": (1, 12),
    }
    embeds = {name: torch.randn(shape, generator=generator) for name, shape in texts.items()}
    sizes = dict(height=height, width=width, num_inference_steps=steps)
    return embeds | sizes | {"output_type": "latent"}


@pytest.fixture(scope="module")
def recorded(sdxl):
    return calibrate(sdxl, calls=[call(0), call(1)])


def snr(batch, unet):
    error = batch.run(unet) - batch.eps
    return 10 * (batch.eps.pow(2).mean() / error.pow(2).mean()).log10().item()


def test_a_replayed_call_gives_what_was_recorded(sdxl, recorded):
    """Non-square inputs, added conditions, timesteps with fractions: each belongs to its step."""
    sdxl.scheduler.set_timesteps(4)
    assert torch.equal(recorded.t, sdxl.scheduler.timesteps) and (recorded.t % 1 > 0).any()
    assert recorded.x.shape == (4, 4, 4, 8, 12)
    for step in range(4):
        batch = recorded.batch(step, torch.arange(4))
        torch.testing.assert_close(batch.run(sdxl.unet), batch.eps)
    mixed = recorded.batch(torch.tensor([0, 3]), torch.tensor([1, 2]))
    torch.testing.assert_close(mixed.run(sdxl.unet), mixed.eps)


def test_what_is_the_same_at_all_steps_is_kept_once(recorded):
    inputs = recorded.tables[0].inputs
    assert len(inputs["sample"].values) == 16
    assert len(inputs["encoder_hidden_states"].values) == 4
    assert len(inputs["added_cond_kwargs.time_ids"].values) == 2  # both calls have one size


def test_calls_are_reproducible_and_survive_the_disk(sdxl, recorded, tmp_path):
    assert calibrate(sdxl, calls=[call(0), call(1)]).hash() == recorded.hash()
    assert calibrate(sdxl, calls=[call(0), call(1)], seed=1).hash() != recorded.hash()
    recorded.save(tmp_path / "c")
    loaded = Calibration.load(tmp_path / "c")
    assert loaded.hash() == recorded.hash() and loaded.model == recorded.model
    batch = loaded.batch(1, torch.arange(2))
    torch.testing.assert_close(batch.run(sdxl.unet), batch.eps)


def test_large_recordings_go_to_files(sdxl, recorded, tmp_path):
    recorder = CallRecorder(tmp_path, in_memory=1000)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    with torch.no_grad(), recorder.on(sdxl.unet):
        for i, generator in enumerate(generators):
            sdxl(**call(i), generator=generator)
    found = Calibration(recorder.tables())
    assert list(tmp_path.iterdir()) and found.x.shape == recorded.x.shape
    batch = found.batch(2, torch.arange(4))
    torch.testing.assert_close(batch.run(sdxl.unet), batch.eps)


@pytest.mark.parametrize("sizes", [((16, 24), (16, 24)), ((16, 24), (16, 16), (24, 40))])
def test_sdxl_is_quantized_finetuned_and_runs_in_its_own_pipeline(sdxl, fast, sizes):
    calib = calibrate(sdxl, calls=[call(i, *size) for i, size in enumerate(sizes)])
    assert len(calib.tables) == len(set(sizes))
    config = fast("quest", 8, 8)
    unet = quantize(sdxl.unet, config, calib)
    log = finetune(unet, sdxl.unet, calib, config)
    assert len(log["loss"]) == 8
    for step in range(len(calib.t)):
        assert snr(calib.batch(step, torch.arange(calib.width(step))), unet) > 20
    expected = sdxl(**call(0), generator=torch.Generator().manual_seed(0)).images
    full = sdxl.unet
    try:
        for own in (unet, questlib.convert(unet, "reference")):
            sdxl.unet = own
            images = sdxl(**call(0), generator=torch.Generator().manual_seed(0)).images
            assert (images - expected).pow(2).mean() < 0.01 * expected.pow(2).mean()
    finally:
        sdxl.unet = full


def test_the_time_path_sees_the_conditions_of_each_call(sdxl, recorded):
    """Added conditions enter the embedding: the short run gives what the whole UNet gives."""
    names = [n for n, role in layer_roles(sdxl.unet).items() if role in TIME_ROLES]
    assert any(name.startswith("add_embedding") for name in names)
    (short,) = recorded.time_calls(sdxl.unet, torch.Generator().manual_seed(0))
    which = torch.randint(4, (4,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), capture_outputs(sdxl.unet, names) as own:
        run_time_layers(sdxl.unet, *short)
    with torch.no_grad(), capture_outputs(sdxl.unet, names) as whole:
        recorded.batch(torch.arange(4), which).run(sdxl.unet)
    assert set(own) == set(names)
    for name in names:
        torch.testing.assert_close(own[name], whole[name])


def test_class_labels_are_recorded_and_reach_the_time_path(fast):
    torch.manual_seed(0)
    unet = UNet2DModel(**PLAIN, in_channels=3, out_channels=3, num_class_embeds=10)
    unet.eval().requires_grad_(False)
    pipe = DDIMPipeline(unet, DDIMScheduler(clip_sample=False))

    def run():
        for t in (900, 400, 1):
            unet(torch.randn(4, 3, 8, 8), t, class_labels=torch.arange(4))

    with pytest.raises(ConfigError, match="num_class_embeds = 10.*calls"):
        calibrate(pipe, 4, 3)
    calib = calibrate(pipe, run=run)
    assert calib.tables[0].inputs["class_labels"].values.tolist() == [0, 1, 2, 3]
    config = fast("quest", 8, 8)
    student = quantize(unet, config, calib)
    finetune(student, unet, calib, config)
    assert snr(calib.batch(1, torch.arange(4)), student) > 20


def test_recording_is_in_eval_mode_and_leaves_the_mode_as_it_was():
    torch.manual_seed(0)
    unet = UNet2DModel(**PLAIN, in_channels=3, out_channels=3, dropout=0.3)
    pipe = DDIMPipeline(unet.train(), DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    unet.mid_block.eval()
    calib = calibrate(pipe, calls=[dict(batch_size=2, num_inference_steps=3)])
    assert unet.training and not unet.mid_block.training
    batch = calib.batch(1, torch.arange(2))
    with torch.no_grad():
        assert torch.equal(batch.run(unet.eval()), batch.eps)


def test_the_calibration_of_another_model_is_refused(pipe, calib, fast, tmp_path):
    torch.manual_seed(1)
    other = UNet2DModel(**PLAIN, in_channels=3, out_channels=3).eval().requires_grad_(False)
    with pytest.raises(ConfigError, match="another model"):
        quantize(other, fast("minmax", 8, 8), calib)
    student = quantize(pipe.unet, fast(), calib, cache_dir=tmp_path)
    with pytest.raises(ConfigError, match="another model"):
        finetune(student, other, calib, fast())
    unknown = Calibration(calib.tables)  # a file of before does not name its model
    with pytest.raises(CheckpointError, match="another model"):
        quantize(other, fast(), unknown, cache_dir=tmp_path)


def test_values_that_are_not_finite_are_found_before_long_work(pipe, calib, fast):
    torch.manual_seed(0)
    unet = UNet2DModel(**PLAIN, in_channels=3, out_channels=3).eval().requires_grad_(False)
    unet.conv_in.bias[0] = float("nan")
    broken = DDIMPipeline(unet, DDIMScheduler(clip_sample=False))
    broken.set_progress_bar_config(disable=True)
    for kind in (dict(calls=[dict(num_inference_steps=2)]), dict(num_samples=2)):
        more = {} if "calls" in kind else {"num_inference_steps": 2}
        with pytest.raises(QuestError, match="weights that are not finite: conv_in.bias"):
            calibrate(broken, **kind, **more)
    with pytest.raises(QuestError, match="not finite at timestep 5: sample, its output"):
        calibrate(pipe, run=lambda: pipe.unet(torch.full((1, 3, 8, 8), math.nan), 5))
    damaged = Calibration.regular(calib.x.clone(), calib.t, calib.eps.clone())
    damaged.eps[2, 1] = float("inf")
    with pytest.raises(QuestError, match="not finite"):
        quantize(pipe.unet, fast(), damaged)


def test_a_layer_that_no_call_reaches_is_named(fast):
    """GLIGEN's layers run with boxes alone."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**CROSS, attention_type="gated").eval().requires_grad_(False)
    pipe = DDIMPipeline(unet, DDIMScheduler(clip_sample=False))

    def run():
        unet(torch.randn(2, 4, 9, 7), 500, encoder_hidden_states=torch.randn(2, 5, 12))

    calib = calibrate(pipe, run=run)
    config = fast("minmax", 8, 8)
    with pytest.raises(ConfigError, match=r"fuser\.linear.*skip_layers"):
        quantize(unet, config, calib)
    skipped = config.replace(skip_layers=["*.fuser.*", "position_net.*"])
    student = quantize(unet, skipped, calib)
    assert snr(calib.batch(0, torch.arange(2)), student) > 15


def test_bad_input_is_one_typed_error(pipe, sdxl):
    dit = DiTTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=10,
    )
    with pytest.raises(ConfigError, match="no UNet or transformer.*found vae"):
        calibrate(SimpleNamespace(components={"vae": sdxl.vae}), calls=[{}])
    with pytest.raises(ConfigError, match=r"calls\[0\]: DiTPipeline needs.*'class_labels'"):
        calibrate(DiTPipeline(dit, sdxl.vae, DDIMScheduler()), calls=[{}])
    plain = DDIMPipeline(pipe.unet, pipe.scheduler)
    with pytest.raises(ConfigError, match="cannot be called"):
        calibrate(pipe, calls=[{}])
    with pytest.raises(ConfigError, match="found none"):
        calibrate(pipe)
    with pytest.raises(ConfigError, match="found calls and run"):
        calibrate(pipe, calls=[{}], run=print)
    with pytest.raises(ConfigError, match="at least one call"):
        calibrate(sdxl, calls=[])
    with pytest.raises(ConfigError, match=r"calls\[0\].*'promt'"):
        calibrate(plain, calls=[dict(promt="a")])
    with pytest.raises(ConfigError, match="labels"):
        calibrate(sdxl, calls=[call(0)], labels=[1])
    with pytest.raises(ConfigError, match="not called"):
        calibrate(sdxl, run=lambda: None)


def test_trees_of_any_nesting_come_back():
    tree = {"a": [torch.ones(2), (1, None)], "b": {"c": torch.zeros(3), "d": "text"}, "e": ()}
    skeleton, tensors = take_tensors(tree)
    assert set(tensors) == {"a.0", "b.c"}
    again = put_tensors(skeleton_from_json(skeleton_to_json(skeleton)), tensors)
    assert again["a"][0] is tensors["a.0"] and again["a"][1] == (1, None)
    assert again["b"]["c"] is tensors["b.c"] and again["b"]["d"] == "text" and again["e"] == ()
    with pytest.raises(ConfigError, match=r"a\.0 = object"):
        take_tensors({"a": [object()]})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_goes_through_every_stage(fast, dtype):
    torch.manual_seed(0)
    unet = UNet2DModel(**PLAIN, in_channels=3, out_channels=3).eval().requires_grad_(False)
    pipe = DDIMPipeline(unet.to(dtype), DDIMScheduler(clip_sample=False))
    calib = calibrate(pipe, 4, 3)
    config = fast("quest", 8, 8)
    student = quantize(unet, config, calib)
    assert student.dtype == dtype
    batch = calib.batch(1, torch.arange(4))
    before = batch.run(student)
    finetune(student, unet, calib, config)
    assert student.dtype == dtype and batch.run(student).dtype == dtype
    assert not torch.equal(batch.run(student), before)
    for made in (student, questlib.convert(student, "cpu")):
        error = batch.run(made).float() - batch.eps.float()
        assert error.pow(2).mean() < 0.01 * batch.eps.float().pow(2).mean()


def test_a_cast_changes_no_code_and_gives_no_nan(pipe, calib, fast):
    """Scales below float16's least number, and weights anywhere in their cells."""
    student = quantize(pipe.unet, fast("quest", 8, 8), calib)
    for name in ("down_blocks.0.resnets.0.conv2", "mid_block.resnets.0.conv1"):
        student.get_submodule(name).input_quantizer.scale.data.mul_(1e-6)
    layers = questlib.quantization.model.quant_layers(student)
    before = {name: layer.codes() for name, layer in layers.items()}
    for dtype in (torch.float16, torch.float32, torch.bfloat16, torch.float32):
        student.to(dtype)
        for name, layer in layers.items():
            assert torch.equal(layer.codes(), before[name])
        out = calib.batch(0, torch.arange(2)).run(student)
        assert out.dtype == dtype and torch.isfinite(out).all()


def test_presets_accept_patterns_of_layers_that_are_skipped(pipe, calib):
    config = QuantConfig.preset("minmax", 8, 8, skip_layers=["mid_block.*"])
    student = quantize(pipe.unet, config, calib)
    layers = questlib.quantization.model.quant_layers(student)
    assert layers and not any(name.startswith("mid_block") for name in layers)


def test_processors_that_a_pipeline_sets_while_it_runs_are_refused(pipe):
    """As PAG and SAG do; a replay would not have them."""
    attention = pipe.unet.mid_block.attentions[0]
    before = attention.processor

    def run():
        attention.set_processor(type(before)())
        pipe.unet(torch.randn(1, 3, 8, 8), 5)

    try:
        with pytest.raises(ConfigError, match=r"mid_block\.attentions\.0.*PAG"):
            calibrate(pipe, run=run)
    finally:
        attention.set_processor(before)
