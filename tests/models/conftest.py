"""Four tiny checkpoints in CompVis's layout; the networks that made them are the oracle."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import yaml
from ldm_reference import Autoencoder, UNet, clip_state

BETAS = {"linear_start": 0.0015, "linear_end": 0.0195, "timesteps": 1000, "image_size": 8}
UNETS = {  # three levels and two layers, so that no index is right by chance
    "beds": dict(attention_resolutions=[4, 2], num_head_channels=16),
    "churches": dict(
        attention_resolutions=[1, 4], num_heads=4, use_scale_shift_norm=True, resblock_updown=True
    ),
    "cin": dict(
        attention_resolutions=[4, 2],
        num_heads=1,
        use_spatial_transformer=True,
        transformer_depth=1,
        context_dim=24,
    ),
    "sd": dict(
        attention_resolutions=[2, 1],
        num_heads=4,
        use_spatial_transformer=True,
        context_dim=64,
        legacy=False,
    ),
}
CONDITION = {
    "cin": {
        "target": "ldm.modules.encoders.modules.ClassEmbedder",
        "params": {"n_classes": 11, "embed_dim": 24},
    },
    "sd": {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"},
}


def make_checkpoint(kind: str, folder) -> SimpleNamespace:
    """KIND.ckpt and KIND.yaml in `folder`; raw and EMA UNet weights differ, cin has no EMA ones."""
    torch.manual_seed(sum(map(ord, kind)))
    vq = kind in ("beds", "cin")
    channels = 3 if vq else 4
    unet_params = dict(
        in_channels=channels,
        out_channels=channels,
        model_channels=32,
        num_res_blocks=2,
        channel_mult=[1, 2, 3],
    )
    unet_params |= UNETS[kind]
    dd = dict(
        double_z=not vq,
        z_channels=channels,
        resolution=32,
        in_channels=3,
        out_ch=3,
        ch=32,
        ch_mult=[1, 2, 1],
        num_res_blocks=1,
        attn_resolutions=[],
        dropout=0.0,
    )
    vae_params = {"embed_dim": channels, "ddconfig": dd} | ({"n_embed": 16} if vq else {})
    raw, unet, vae = (
        m.eval().requires_grad_(False)
        for m in (UNet(unet_params), UNet(unet_params), Autoencoder(vae_params))
    )
    target = f"ldm.models.autoencoder.{'VQModelInterface' if vq else 'AutoencoderKL'}"
    params = BETAS | {
        "unet_config": {
            "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
            "params": unet_params,
        },
        "first_stage_config": {"target": target, "params": vae_params},
        "cond_stage_config": CONDITION.get(kind, "__is_unconditional__"),
    }
    betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2
    state = {"betas": betas.float(), "alphas_cumprod": torch.cumprod(1 - betas, 0).float()}
    state |= {
        f"model.diffusion_model.{k}": v
        for k, v in (unet if kind == "cin" else raw).state_dict().items()
    }
    if kind != "cin":
        state |= {
            "model_ema." + f"diffusion_model.{k}".replace(".", ""): v
            for k, v in unet.state_dict().items()
        }
        state |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    state |= {f"first_stage_model.{k}": v for k, v in vae.state_dict().items()}
    state["first_stage_model.loss.logvar"] = torch.zeros(())
    scale = 1.0
    if kind == "churches":
        params["scale_by_std"], params["scale_factor"], scale = (
            True,
            9.9,
            0.2,
        )  # the buffer is right
        state["scale_factor"] = torch.tensor(scale)
    elif kind == "sd":
        params["scale_factor"] = scale = 0.18215
        state |= clip_state(64, 2, 96)
    elif kind == "cin":
        state["cond_stage_model.embedding.weight"] = torch.randn(11, 24)
    ckpt, config = folder / f"{kind}.ckpt", folder / f"{kind}.yaml"
    torch.save({"state_dict": state, "global_step": 1}, ckpt)
    config.write_text(yaml.safe_dump({"model": {"params": params}}))
    return SimpleNamespace(
        kind=kind,
        ckpt=ckpt,
        config=config,
        params=params,
        state=state,
        raw=raw,
        unet=unet,
        vae=vae,
        scale=scale,
    )


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, SimpleNamespace]:
    folder = tmp_path_factory.mktemp("compvis")
    return {kind: make_checkpoint(kind, folder) for kind in UNETS}
