"""DiT and PixArt are quantized as UNets are; other transformers are refused by name."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
)

import questlib
from questlib import QuantConfig, calibrate, finetune, from_pretrained, quantize, save_pretrained
from questlib.__main__ import main
from questlib.capture import capture_outputs
from questlib.denoisers import unet_of
from questlib.diffusion.conditioning import Conditioning
from questlib.diffusion.sampling import denoise
from questlib.errors import ConfigError, QuestError
from questlib.integer.time_table import TimeTable
from questlib.quantization.preparation import prepare
from questlib.quantization.roles import TIME_ROLES, layer_roles
from questlib.quantization.time_path import run_time_layers

SIZES = dict(sample_size=8, patch_size=2, num_layers=2, num_attention_heads=3, in_channels=4)


def autoencoder():
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )


def ready(pipe):
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    return pipe


def dit(**changes):
    """1000 classes, since DiTPipeline says 1000 for "no class"."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        **SIZES, attention_head_dim=8, **{"out_channels": 8, "num_embeds_ada_norm": 1000} | changes
    )
    return ready(DiTPipeline(transformer, autoencoder(), DDIMScheduler()))


def pixart(conditions=False):
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        **SIZES | ({"sample_size": 128} if conditions else {}),  # sizes are told to 1024 px models
        attention_head_dim=8,
        out_channels=8,
        cross_attention_dim=24,
        caption_channels=12,
        use_additional_conditions=conditions,
    )
    return ready(PixArtAlphaPipeline(None, None, autoencoder(), transformer, DDIMScheduler()))


def texts(seed=0):
    """Embedded prompts of 5 and 3 tokens; the empty one has 1."""
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(3, 5, 12, generator=generator)
    mask = (torch.arange(5) < torch.tensor([5, 3, 1])[:, None]).long()
    return dict(
        prompt=None,
        negative_prompt=None,
        prompt_embeds=embeds[:2],
        prompt_attention_mask=mask[:2],
        negative_prompt_embeds=embeds[2:].expand(2, -1, -1),
        negative_prompt_attention_mask=mask[2:].expand(2, -1),
        use_resolution_binning=False,
        height=16,
        width=16,
    )


CALLS = {
    "dit": dict(class_labels=[3, 7], guidance_scale=4.0, num_inference_steps=4),
    "pixart": dict(**texts(), num_inference_steps=4),
    "pixart-sizes": dict(**texts(), num_inference_steps=4),
}
PIPES = {"dit": dit, "pixart": pixart, "pixart-sizes": lambda: pixart(conditions=True)}


@pytest.fixture(scope="module", params=PIPES)
def case(request):
    """A pipeline, its call and its calibration."""
    pipe, call = PIPES[request.param](), CALLS[request.param]
    calib = calibrate(pipe, calls=[call, call])
    return SimpleNamespace(name=request.param, pipe=pipe, call=call, calib=calib)


def draw(case, transformer):
    """The pipeline's own images with this transformer [2, H, W, 3]."""
    own = case.pipe.transformer
    case.pipe.transformer = transformer
    try:
        generator = torch.Generator().manual_seed(5)
        return torch.as_tensor(case.pipe(**case.call, generator=generator, output_type="np").images)
    finally:
        case.pipe.transformer = own


def snr(found, expected):
    """In dB."""
    return 10 * torch.log10(expected.square().sum() / (found - expected).square().sum()).item()


def minmax(case, bits=8):
    return quantize(case.pipe.transformer, QuantConfig.preset("minmax", bits, bits), case.calib)


def test_every_call_is_recorded_and_replayed(case):
    """Two calls of two samples with two halves, at four steps."""
    assert len(case.calib.t) == 4 and case.calib.width(0) == 8
    for step in range(4):
        batch = case.calib.batch(step, torch.arange(8))
        torch.testing.assert_close(batch.run(case.pipe.transformer), batch.eps)


def test_w16a16_is_full_precision_and_w8a8_is_near(case):
    batch = case.calib.batch(2, torch.arange(4))
    off = prepare(case.pipe.transformer, QuantConfig.preset("minmax", 16, 16), case.calib.t)
    torch.testing.assert_close(batch.run(off), batch.eps)
    student = minmax(case)
    assert snr(batch.run(student), batch.eps) > 25
    full = draw(case, case.pipe.transformer)
    assert snr(draw(case, student), full) > 20


def test_roles(case):
    """All linear layers on the way of the timestep are time layers, and these alone."""
    roles = layer_roles(case.pipe.transformer)
    time = {name for name, role in roles.items() if role in TIME_ROLES}
    if case.name == "dit":
        assert "transformer_blocks.1.norm1.linear" in time and "proj_out_1" in time
    else:
        assert "adaln_single.linear" in time
        sizes = {f"adaln_single.emb.{part}.linear_1" for part in ("resolution_embedder",)}
        assert (sizes <= time) == (case.name == "pixart-sizes")
    cross = "context_kv" if case.name != "dit" else None
    assert roles.get("transformer_blocks.0.attn2.to_k") == cross
    assert roles["transformer_blocks.0.attn1.to_q"] == "qkv"
    assert roles["transformer_blocks.0.attn1.to_out.0"] == "attn_out"
    assert roles["transformer_blocks.0.ff.net.2"] == "feed_forward"
    assert roles["pos_embed.proj"] == "first"
    assert [name for name, role in roles.items() if role == "last"][0].startswith("proj_out")


def test_the_time_path_runs_alone(case):
    """Its layers give what they give in a whole call, row by row."""
    transformer = case.pipe.transformer
    roles = layer_roles(transformer)
    time = [name for name, role in roles.items() if role in TIME_ROLES]
    (calls,) = case.calib.time_calls(transformer, torch.Generator().manual_seed(0))
    with capture_outputs(transformer, time) as alone:
        run_time_layers(transformer, *calls)
    assert set(alone) == set(time)
    table = case.calib.tables[0]
    which = torch.randint(8, (4,), generator=torch.Generator().manual_seed(0))
    with capture_outputs(transformer, time) as whole:
        table.batch(torch.arange(4), which if calls.arguments else torch.arange(4)).run(transformer)
    for name in time:
        torch.testing.assert_close(alone[name], whole[name])


@pytest.mark.parametrize("preset", ["quest", "q-diffusion", "efficientdm", "tfmq-dm", "ptq-d"])
def test_methods_finetune_save_load_and_run_in_integers(case, fast, preset, tmp_path):
    config = fast(preset, 4, 8)
    student = quantize(case.pipe.transformer, config, case.calib)
    batch = case.calib.batch(1, torch.arange(4))
    before = batch.run(student)
    log = finetune(student, case.pipe.transformer, case.calib, config)
    if config.finetunes:
        assert log["trained_weights"] and not torch.equal(batch.run(student), before)
    out = batch.run(student)
    assert torch.isfinite(out).all()

    save_pretrained(student, tmp_path / "own")
    assert torch.equal(batch.run(from_pretrained(tmp_path / "own")), out)
    student.save_pretrained(tmp_path / "diffusers")
    again = type(student).from_pretrained(tmp_path / "diffusers")
    assert torch.equal(batch.run(again), out)

    integer = questlib.convert(student, "cpu")
    oracle = questlib.convert(student, "reference")
    assert set(questlib.engine_report(integer).engines()) == {"cpu-int8"}
    torch.testing.assert_close(batch.run(oracle), out, rtol=0.02, atol=0.02)
    torch.testing.assert_close(batch.run(integer), batch.run(oracle), rtol=0.02, atol=0.02)


def test_tla_trains_the_adaptive_norms(case, fast):
    config = fast("quest", 4, 8).replace(cma_iters=0, tla_iters=4)
    student = quantize(case.pipe.transformer, config, case.calib)
    before = {name: p.clone() for name, p in student.named_parameters() if "weight" in name}
    finetune(student, case.pipe.transformer, case.calib, config)
    changed = {n for n, p in student.named_parameters() if n in before and (p != before[n]).any()}
    time = {f"{n}.weight" for n, role in layer_roles(student).items() if role in TIME_ROLES}
    assert changed == time


def test_integers_in_the_own_pipeline(case):
    student = minmax(case)
    integer = questlib.convert(student, "cpu")
    tables = [m for m in integer.modules() if isinstance(m, TimeTable)]
    assert len(tables) == {"dit": 2, "pixart": 2, "pixart-sizes": 1}[case.name]
    simulated = draw(case, student)
    assert snr(draw(case, integer), simulated) > 30
    assert all(len(table.rows) == 4 for table in tables)
    assert torch.equal(draw(case, integer), draw(case, integer))


def test_a_pipeline_comes_back(case, tmp_path):
    student = minmax(case)
    expected = draw(case, student)
    own = case.pipe.transformer
    case.pipe.transformer = student
    try:
        case.pipe.save_pretrained(tmp_path)
    finally:
        case.pipe.transformer = own
    absent = {} if case.name == "dit" else dict(text_encoder=None, tokenizer=None)
    again = DiffusionPipeline.from_pretrained(tmp_path, **absent).transformer
    assert torch.equal(draw(case, again), expected)


def test_half_precision(case):
    pipe = PIPES[case.name]()
    pipe.transformer.to(torch.bfloat16)
    call = {k: v.bfloat16() if k.endswith("embeds") else v for k, v in case.call.items()}
    calib = calibrate(pipe.to(torch.bfloat16), calls=[call])
    student = quantize(pipe.transformer, QuantConfig.preset("minmax", 8, 8), calib)
    assert student.dtype == torch.bfloat16
    batch = calib.batch(0, torch.arange(4))
    assert snr(batch.run(student).float(), batch.eps.float()) > 20


# ---- trajectories that are sampled here ----


def test_trajectories_with_labels_and_guidance():
    """As the own pipeline, with the labels' halves in the other order."""
    pipe = dit()
    calib = calibrate(pipe, 4, 3, labels=[2, 5], guidance_scale=4.0)
    assert calib.eps.shape == (3, 8, 8, 8, 8)  # T, both halves, noise and variance, h, w
    labels = calib.tables[0].inputs["class_labels"].grid()[0]
    assert labels[:4].tolist() == [1000] * 4 and sorted(labels[4:].tolist()) == [2, 2, 5, 5]
    student = quantize(pipe.transformer, QuantConfig.preset("minmax", 8, 8), calib)
    batch = calib.batch(1, torch.arange(8))
    assert snr(batch.run(student), batch.eps) > 25

    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    condition = Conditioning(pipe, guidance_scale=4.0, labels=[2, 5]).at(range(2))
    latents = denoise(pipe.transformer, pipe.scheduler, x, 3, condition=condition)
    images = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    generator = torch.Generator().manual_seed(3)
    own = pipe([2, 5], 4.0, generator, 3, output_type="pt").images
    torch.testing.assert_close((images / 2 + 0.5).clamp(0, 1), own, rtol=1e-4, atol=1e-4)


def test_a_learned_variance_reaches_a_sampler_that_knows_it():
    pipe = dit(num_embeds_ada_norm=10)
    pipe.scheduler = DDPMScheduler(variance_type="learned_range", clip_sample=False)
    calib = calibrate(pipe, 2, 3, labels=[1], guidance_scale=2.0)
    assert calib.eps.shape[2] == 8 and torch.isfinite(calib.x).all()


def test_a_saved_calibration_has_the_labels(tmp_path):
    pipe = dit(out_channels=None, num_embeds_ada_norm=10)
    calib = calibrate(pipe, 3, 2)
    calib.save(tmp_path / "calib.safetensors")
    again = questlib.Calibration.load(tmp_path / "calib.safetensors")
    assert again.hash() == calib.hash()
    batch = again.batch(1, torch.arange(3))
    torch.testing.assert_close(batch.run(pipe.transformer), batch.eps)


# ---- what is refused ----


def other(kind):
    torch.manual_seed(0)
    if kind is SD3Transformer2DModel:
        return kind(
            sample_size=8,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            in_channels=4,
            out_channels=4,
            joint_attention_dim=16,
            caption_projection_dim=16,
            pooled_projection_dim=16,
        )
    return kind(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
    )


@pytest.mark.parametrize("kind", [SD3Transformer2DModel, FluxTransformer2DModel])
def test_other_transformers_are_refused_by_name(kind):
    pipe = SimpleNamespace(transformer=other(kind), scheduler=FlowMatchEulerDiscreteScheduler())
    expected = f"{kind.__name__}.*UNet2DConditionModel.*DiTTransformer2DModel"
    calls = (
        lambda: calibrate(pipe, 2, 3),
        lambda: calibrate(pipe, run=lambda: pytest.fail("the pipeline has run")),
        lambda: unet_of(pipe),
        lambda: prepare(pipe.transformer, QuantConfig.preset("minmax", 8, 8), torch.arange(3)),
    )
    for call in calls:
        with pytest.raises(ConfigError, match=expected):
            call()


def test_pixart_is_calibrated_by_its_own_calls():
    with pytest.raises(ConfigError, match="calls="):
        calibrate(pixart(), 2, 3)


def test_labels_that_there_are_not():
    with pytest.raises(QuestError, match=r"0\.\.9, found 10"):
        calibrate(dit(num_embeds_ada_norm=10), 2, 3, labels=[10])


def test_the_command_line_quantizes_a_dit(tmp_path):
    dit(num_embeds_ada_norm=10).save_pretrained(tmp_path / "dit")
    given = ["quantize", str(tmp_path / "dit"), "--preset", "minmax", "--bits", "w8a8"]
    assert main([*given, "--out", str(tmp_path / "out"), "--samples", "2", "--steps", "2"]) == 0
    assert type(from_pretrained(tmp_path / "out")) is DiTTransformer2DModel
