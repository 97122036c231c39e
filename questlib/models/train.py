"""Train the embedded mini models: `python -m questlib.models.train --out questlib/models/mini --work DIR`.

Four stages, each resumable from its last checkpoint in --work, each with fixed seeds and a JSONL log:
autoencoder (VQ, f=4, as LDM-4) -> classifier (metric features) -> unet (eps-prediction on its latents) -> export.
About an hour and a half on two CPU cores (bf16 autocast); the model card, made from the logs, has the measured times.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DModel, VQModel
from diffusers.training_utils import EMAModel

from questlib.errors import QuestError
from questlib.models.classifier import GroupClassifier
from questlib.models.data import GROUPS, EmojiData, fetch_emoji, load_emoji

# LDM-4's autoencoder and UNet, scaled down: f=4, 3 latent channels, attention at the two lower resolutions.
AUTOENCODER = dict(
    in_channels=3,
    out_channels=3,
    sample_size=64,
    latent_channels=3,
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    block_out_channels=(16, 32, 64),
    layers_per_block=1,
    norm_num_groups=8,
    num_vq_embeddings=2048,
)
UNET = dict(
    sample_size=16,
    in_channels=3,
    out_channels=3,
    layers_per_block=1,
    block_out_channels=(48, 96, 96),
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=32,
    norm_num_groups=16,
)
# CompVis "linear" betas of LDM-4 are diffusers' "scaled_linear".
SCHEDULER = dict(
    num_train_timesteps=1000, beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False,
    set_alpha_to_one=False, steps_offset=1,
)  # fmt: skip
STEPS = {"autoencoder": 5000, "classifier": 2000, "unet": 8000}
BATCH = {"autoencoder": 16, "classifier": 64, "unet": 64}
LR = {"autoencoder": 2e-3, "classifier": 2e-3, "unet": 1e-3}
VQ_START = 1000  # plain autoencoder before, then the codebook starts from encoder outputs and is used


def run_stage(name: str, model: torch.nn.Module, step_loss, work: Path, steps: int, on_step=None) -> torch.nn.Module:
    """Adam with warm-up and cosine decay; EMA weights are returned; state is saved every 500 steps and resumed from."""
    torch.manual_seed(0)
    model.train()
    opt = torch.optim.AdamW(model.parameters(), lr=LR[name], weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        opt, lambda i: min(1.0, (i + 1) / 300) * (0.01 + 0.99 * 0.5 * (1 + torch.cos(torch.tensor(i / steps * torch.pi)).item()))
    )
    ema = EMAModel(model.parameters(), decay=0.9995 if name == "unet" else 0.995, use_ema_warmup=True, power=0.75)
    state_file, log_file, start = work / f"{name}.pt", work / f"{name}.jsonl", 0
    generator = torch.Generator().manual_seed(1)
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"]), opt.load_state_dict(state["opt"]), schedule.load_state_dict(state["schedule"])
        ema.load_state_dict(state["ema"]), generator.set_state(state["rng"])
        start, seconds = state["step"], state["seconds"]
    else:
        seconds = 0.0
        log_file.unlink(missing_ok=True)
    clock, window = time.time() - seconds, []
    for step in range(start, steps):
        if on_step:
            on_step(step)
        with torch.autocast("cpu", torch.bfloat16):
            loss = step_loss(step, generator)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step(), schedule.step(), ema.step(model.parameters())
        window.append(loss.item())
        if (step + 1) % 100 == 0:
            line = {"step": step + 1, "loss": round(sum(window) / len(window), 5), "seconds": round(time.time() - clock, 1)}
            with log_file.open("a") as log:
                log.write(json.dumps(line) + "\n")
            print(name, line, flush=True)
            window = []
        if (step + 1) % 500 == 0 or step + 1 == steps:
            state = dict(model=model.state_dict(), opt=opt.state_dict(), schedule=schedule.state_dict(), ema=ema.state_dict(),
                         rng=generator.get_state(), step=step + 1, seconds=time.time() - clock)  # fmt: skip
            torch.save(state, state_file.with_suffix(".tmp"))
            state_file.with_suffix(".tmp").replace(state_file)
    ema.copy_to(model.parameters())
    return model.eval()


def train_autoencoder(data: EmojiData, work: Path, steps: int) -> VQModel:
    torch.manual_seed(0)
    vae = VQModel(**AUTOENCODER)
    images = data.images.float() / 127.5 - 1

    def edges(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]

    def start_codebook(step: int) -> None:
        if step == VQ_START:
            with torch.no_grad():
                z = torch.cat([vae.encode(b).latents for b in images[::4].split(128)]).permute(0, 2, 3, 1).reshape(-1, 3)
                vae.quantize.embedding.weight.copy_(z[torch.randperm(len(z))[: len(vae.quantize.embedding.weight)]])

    def loss(step: int, g: torch.Generator) -> torch.Tensor:
        x = images[torch.randint(len(images), (BATCH["autoencoder"],), generator=g)]
        z = vae.encode(x).latents.float()
        commit = 0.0
        if step >= VQ_START:
            with torch.autocast("cpu", enabled=False):
                z, commit, _ = vae.quantize(z)
        else:
            commit = 1e-3 * z.pow(2).mean()
        y = vae.decode(z, force_not_quantize=True).sample.float()
        grad = sum((a - b).abs().mean() for a, b in zip(edges(y), edges(x), strict=True))
        return (y - x).abs().mean() + (y - x).pow(2).mean() + 0.5 * grad + 0.25 * commit

    return run_stage("autoencoder", vae, loss, work, steps, start_codebook)


def train_classifier(data: EmojiData, work: Path, steps: int) -> GroupClassifier:
    """Nine emoji groups, class-balanced batches, shifts, zooms, flips, colour shifts; every tenth image held out."""
    torch.manual_seed(0)
    model = GroupClassifier(len(GROUPS))
    held_out = torch.arange(len(data.images)) % 10 == 9
    x_train, y_train = data.images[~held_out].float() / 127.5 - 1, data.labels[~held_out]
    weight = (1.0 / torch.bincount(y_train).float())[y_train]

    def loss(step: int, g: torch.Generator) -> torch.Tensor:
        idx = torch.multinomial(weight, BATCH["classifier"], replacement=True, generator=g)
        x, n = x_train[idx], len(idx)
        u = torch.rand(n, 4, generator=g) * 2 - 1
        theta = torch.zeros(n, 2, 3)
        flip = torch.where(torch.rand(n, generator=g) < 0.5, -1.0, 1.0)
        theta[:, 0, 0], theta[:, 1, 1] = flip * (1 + 0.15 * u[:, 0]), 1 + 0.15 * u[:, 0]
        theta[:, 0, 2], theta[:, 1, 2] = 0.12 * u[:, 1], 0.12 * u[:, 2]
        x = 1 - F.grid_sample(1 - x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)
        x = x * (1 + 0.1 * u[:, 3, None, None, None])
        return F.cross_entropy(model(x).float(), y_train[idx], label_smoothing=0.05)

    model = run_stage("classifier", model, loss, work, steps)
    with torch.no_grad():
        predicted = torch.cat([model(b.float() / 127.5 - 1).argmax(1) for b in data.images[held_out].split(128)])
    accuracy = (predicted == data.labels[held_out]).float().mean().item()
    (work / "classifier.json").write_text(json.dumps({"held_out": int(held_out.sum()), "held_out_accuracy": round(accuracy, 4)}))
    print("classifier held-out accuracy", round(accuracy, 4), flush=True)
    return model


def train_unet(data: EmojiData, vae: VQModel, work: Path, steps: int) -> UNet2DModel:
    with torch.no_grad():
        latents = torch.cat([vae.encode(b.float() / 127.5 - 1).latents for b in data.images.split(128)])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 6))
    latents = latents * vae.config.scaling_factor
    torch.manual_seed(0)
    unet, scheduler = UNet2DModel(**UNET), DDIMScheduler(**SCHEDULER)

    def loss(step: int, g: torch.Generator) -> torch.Tensor:
        n = BATCH["unet"]
        x0 = latents[torch.randint(len(latents), (n,), generator=g)]
        t = torch.randint(1000, (n,), generator=g)
        noise = torch.randn(x0.shape, generator=g)
        return F.mse_loss(unet(scheduler.add_noise(x0, noise, t), t).sample.float(), noise)

    return run_stage("unet", unet, loss, work, steps)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m questlib.models.train", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("questlib/models/mini"), help="where the diffusers folder is written")
    parser.add_argument("--work", type=Path, default=Path("runs/train"), help="checkpoints, logs and the data archive")
    args = parser.parse_args(argv)
    try:
        args.work.mkdir(parents=True, exist_ok=True)
        data = load_emoji(fetch_emoji(args.work))
    except (QuestError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(data.images)} images", flush=True)
    vae = train_autoencoder(data, args.work, STEPS["autoencoder"])
    classifier = train_classifier(data, args.work, STEPS["classifier"])
    unet = train_unet(data, vae, args.work, STEPS["unet"])
    from questlib.models.export import export  # late: training must not depend on metrics

    export(data, vae, classifier, unet, DDIMScheduler(**SCHEDULER), args.work, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
