"""Pipelines: guidance in one call, noise from the generator, folders that load again."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel, UNet2DModel, VQModel
from diffusers.models.attention_processor import Attention

from questlib import QuantConfig, calibrate
from questlib.checkpoint import from_pretrained, save_pretrained
from questlib.diffusion.schedulers import make_scheduler
from questlib.diffusion.unets import FixedHeadsUNet2DModel
from questlib.errors import ConfigError
from questlib.post_training import quantize
from reproduce.models.loading import load_pipeline
from reproduce.models.pipelines import (
    ClassConditionalPipeline,
    ClassEmbedder,
    LatentDiffusionPipeline,
)

BLOCKS = dict(
    block_out_channels=(32, 32),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
)
HEADS = dict(
    sample_size=8,
    in_channels=3,
    out_channels=3,
    block_out_channels=(32, 64),
    layers_per_block=1,
    attention_head_dim=4,
    down_block_types=("AttnDownBlock2D",) * 2,
    up_block_types=("AttnUpBlock2D",) * 2,
    downsample_type="resnet",
    upsample_type="resnet",
    resnet_time_scale_shift="scale_shift",
    attn_norm_num_groups=32,
)


def seed(n: int) -> torch.Generator:
    return torch.Generator().manual_seed(n)


@pytest.fixture(scope="module")
def conditional():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=12,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    pipe = ClassConditionalPipeline(
        VQModel(**BLOCKS, num_vq_embeddings=16, scaling_factor=0.5),
        unet.eval(),
        DDIMScheduler(clip_sample=False, steps_offset=1),
        ClassEmbedder(10, 12),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def unconditional():
    torch.manual_seed(0)
    vae = AutoencoderKL(**BLOCKS, latent_channels=3)
    pipe = LatentDiffusionPipeline(
        vae, FixedHeadsUNet2DModel(**HEADS).eval(), DDIMScheduler(clip_sample=False)
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def test_guidance_is_one_unet_call_a_step(conditional):
    calls = []
    handle = conditional.unet.register_forward_pre_hook(lambda m, args: calls.append(len(args[0])))
    x = torch.randn(3, 3, 8, 8, generator=seed(0))
    labels = [4, 0, 9]
    ours = conditional(
        labels, guidance_scale=2.5, num_inference_steps=3, latents=x, output_type="latent"
    ).images
    assert calls == [6, 6, 6]
    calls.clear()
    conditional(labels, guidance_scale=1.0, num_inference_steps=2, latents=x, output_type="latent")
    assert calls == [3, 3]
    handle.remove()
    scheduler = DDIMScheduler.from_config(conditional.scheduler.config)
    scheduler.set_timesteps(3)
    embed, unet = conditional.class_embedder, conditional.unet
    for t in scheduler.timesteps:  # two calls, written out
        null, label = (unet(x, t, embed(torch.tensor(c))).sample for c in ([10] * 3, labels))
        x = scheduler.step(null + 2.5 * (label - null), t, x).prev_sample
    assert torch.allclose(ours, x, rtol=1e-4, atol=1e-5)


def test_labels(conditional):
    one = conditional(3, num_inference_steps=1, generator=seed(0), output_type="latent").images
    same = conditional(
        torch.tensor([3]), num_inference_steps=1, generator=seed(0), output_type="latent"
    ).images
    other = conditional([4], num_inference_steps=1, generator=seed(0), output_type="latent").images
    assert torch.equal(one, same) and not torch.equal(one, other)
    for bad in ([], [-1], [3, 11]):
        with pytest.raises(ConfigError, match=r"labels in 0\.\.10"):
            conditional(bad)


@pytest.mark.parametrize("name", ["conditional", "unconditional"])
def test_all_noise_comes_from_the_generator(request, name):
    pipe = request.getfixturevalue(name)
    what = {"class_labels": [1, 2]} if name == "conditional" else {"batch_size": 2}
    what |= {"num_inference_steps": 3, "output_type": "np"}
    torch.manual_seed(1)
    first = pipe(**what, eta=1.0, generator=seed(0)).images
    torch.manual_seed(2)
    again = pipe(**what, eta=1.0, generator=seed(0), return_dict=False)[0]
    assert first.shape == (2, 16, 16, 3) and (first == again).all()
    assert (first != pipe(**what, eta=0.0, generator=seed(0)).images).any()
    assert (first != pipe(**what, eta=1.0, generator=seed(1)).images).any()


def test_samples_depend_on_their_own_generator_alone(unconditional):
    two = unconditional(2, 3, eta=1.0, generator=[seed(5), seed(6)], output_type="latent").images
    second = unconditional(1, 3, eta=1.0, generator=[seed(6)], output_type="latent").images
    assert torch.allclose(two[1:], second, atol=1e-5)


def test_eta_without_ddim_is_refused(unconditional):
    pipe = LatentDiffusionPipeline(
        unconditional.vae, unconditional.unet, make_scheduler(unconditional, "plms")
    )
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe(1, 2, output_type="pil").images) == 1
    with pytest.raises(ConfigError, match="eta: PNDMScheduler has none"):
        pipe(1, 2, eta=1.0)


@pytest.mark.parametrize("name", ["conditional", "unconditional"])
def test_saved_pipelines_load_again(request, name, tmp_path):
    pipe = request.getfixturevalue(name)
    pipe.save_pretrained(tmp_path)
    what = {"class_labels": [1]} if name == "conditional" else {"batch_size": 1}
    what |= {"num_inference_steps": 2, "output_type": "latent"}
    for loaded in (load_pipeline(tmp_path), type(pipe).from_pretrained(tmp_path)):
        assert type(loaded) is type(pipe) and type(loaded.unet) is type(pipe.unet)
        loaded.set_progress_bar_config(disable=True)
        ours, theirs = (p(**what, generator=seed(0)).images for p in (loaded, pipe))
        assert torch.allclose(
            ours, theirs, rtol=1e-3, atol=1e-3
        )  # other addresses of the weights, another order of sums


def test_number_of_heads_is_the_same_at_every_width(unconditional):
    heads = [
        (m.heads, m.inner_dim // m.heads, m.scale)
        for m in unconditional.unet.modules()
        if isinstance(m, Attention)
    ]
    assert {h for h, _, _ in heads} == {4} and {w for _, w, _ in heads} == {8, 16}
    assert all(scale == width**-0.5 for _, width, scale in heads)
    assert unconditional.unet.state_dict().keys() == UNet2DModel(**HEADS).state_dict().keys()
    with pytest.raises(ConfigError, match="width 32 cannot have 5 heads"):
        FixedHeadsUNet2DModel(**{**HEADS, "attention_head_dim": 5})


def test_a_unet_with_fixed_heads_is_quantized_and_loads_from_its_checkpoint(
    unconditional, tmp_path
):
    """So are residual blocks that resample, scale-shift norms and heads of several widths."""
    calib = calibrate(unconditional, 2, 2)
    unet = quantize(unconditional.unet, QuantConfig.preset("minmax", 8, 8), calib)
    save_pretrained(unet, tmp_path)
    loaded = from_pretrained(tmp_path)
    assert type(loaded).__mro__[1:] == type(unet).__mro__[1:] and isinstance(
        loaded, FixedHeadsUNet2DModel
    )
    x = torch.randn(1, 3, 8, 8, generator=seed(0))
    t = int(calib.t[0])
    assert torch.equal(loaded(x, t).sample, unet(x, t).sample)
    with torch.no_grad():
        full = unconditional.unet(x, t).sample
    assert 0 < float((loaded(x, t).sample - full).norm() / full.norm()) < 0.1
