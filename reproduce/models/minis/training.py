"""Train the embedded mini models: `python -m reproduce.models.minis.training --model mini-ldm4 --out reproduce/models/minis/weights --work DIR`.

The stages of reproduce.models.minis.architectures, each resumable from its last checkpoint in DIR/MODEL, each with fixed seeds and a JSONL
log; then the export. The model card, made from the logs, has the measured times.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, VQModel
from diffusers.training_utils import EMAModel
from torch import nn

from questlib.errors import QuestError
from reproduce.models.classifier import GroupClassifier
from reproduce.models.loading import load_pipeline
from reproduce.models.minis import text
from reproduce.models.minis.architectures import DROP, NUM_SAMPLES, PRESETS, Preset, Stage
from reproduce.models.minis.data import GROUPS, TrainingData, fetch
from reproduce.models.pipelines import ClassEmbedder

SAVE_SECONDS = 300
REFERENCE_HELP = "for mini-cifar: statistics made by python -m reproduce.evaluation reference (default: of its first 10,000 images)"
VQ_START = (
    1000  # plain autoencoder before, then the codebook starts from encoder outputs and is used
)
KL_WEIGHT = 1e-4  # of the mean over latents; the reconstruction losses are means over pixels


def run_stage(
    name: str, stage: Stage, model: nn.Module, step_loss: Callable, work: Path, on_step=None
) -> nn.Module:
    """step_loss(step, generator) -> loss. EMA weights are returned; state is saved every 500 steps or SAVE_SECONDS."""
    torch.manual_seed(0)
    work.mkdir(parents=True, exist_ok=True)
    model.train()
    opt = torch.optim.AdamW(model.parameters(), lr=stage.lr, weight_decay=1e-4)
    steps = stage.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        opt,
        lambda i: (
            min(1.0, (i + 1) / 300)
            * (0.01 + 0.99 * 0.5 * (1 + torch.cos(torch.tensor(i / steps * torch.pi)).item()))
        ),
    )
    ema = EMAModel(model.parameters(), decay=stage.ema, use_ema_warmup=True, power=0.75)
    state_file, log_file, start = work / f"{name}.pt", work / f"{name}.jsonl", 0
    generator = torch.Generator().manual_seed(1)
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        (
            model.load_state_dict(state["model"]),
            opt.load_state_dict(state["opt"]),
            schedule.load_state_dict(state["schedule"]),
        )
        ema.load_state_dict(state["ema"]), generator.set_state(state["rng"])
        start, seconds = state["step"], state["seconds"]
    else:
        seconds = 0.0
        log_file.unlink(missing_ok=True)
    clock, saved, window = time.time() - seconds, time.time(), []
    for step in range(start, steps):
        if on_step:
            on_step(step)
        with torch.autocast("cpu", torch.bfloat16, enabled=stage.bf16):
            loss = step_loss(step, generator)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step(), schedule.step(), ema.step(model.parameters())
        window.append(loss.item())
        if (step + 1) % 100 == 0:
            line = {
                "step": step + 1,
                "loss": round(sum(window) / len(window), 5),
                "seconds": round(time.time() - clock, 1),
            }
            with log_file.open("a") as log:
                log.write(json.dumps(line) + "\n")
            print(name, line, flush=True)
            window = []
        if (step + 1) % 500 == 0 or step + 1 == steps or time.time() - saved > SAVE_SECONDS:
            state = dict(
                model=model.state_dict(),
                opt=opt.state_dict(),
                schedule=schedule.state_dict(),
                ema=ema.state_dict(),
                rng=generator.get_state(),
                step=step + 1,
                seconds=time.time() - clock,
            )
            torch.save(state, state_file.with_suffix(".tmp"))
            state_file.with_suffix(".tmp").replace(state_file)
            saved = time.time()
    ema.copy_to(model.parameters())
    return model.eval()


def encode(vae: VQModel | AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """uint8 [N, 3, H, W] -> unscaled latents [N, C, H / f, W / f]: before vector quantization, or the mode of the posterior."""
    encoded = [vae.encode(b.float() / 127.5 - 1) for b in images.split(128)]
    return torch.cat(
        [e.latent_dist.mode() if isinstance(vae, AutoencoderKL) else e.latents for e in encoded]
    )


def train_autoencoder(preset: Preset, data: TrainingData, work: Path) -> VQModel | AutoencoderKL:
    torch.manual_seed(0)
    vae, stage = preset.autoencoder(), preset.stages["autoencoder"]
    images = data.images.float() / 127.5 - 1

    def edges(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]

    def start_codebook(step: int) -> None:
        if step == VQ_START:
            with torch.no_grad():
                z = (
                    encode(vae, data.images[::4])
                    .permute(0, 2, 3, 1)
                    .reshape(-1, vae.config.latent_channels)
                )
                vae.quantize.embedding.weight.copy_(
                    z[torch.randperm(len(z))[: len(vae.quantize.embedding.weight)]]
                )

    def vq(x: torch.Tensor, step: int, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        z = vae.encode(x).latents.float()
        commit = 0.0
        if step >= VQ_START:
            with torch.autocast("cpu", enabled=False):
                z, commit, _ = vae.quantize(z)
        else:
            commit = 1e-3 * z.pow(2).mean()
        return vae.decode(z, force_not_quantize=True).sample.float(), 0.25 * commit

    def kl(x: torch.Tensor, step: int, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        posterior = vae.encode(x).latent_dist
        z = posterior.sample(g)
        return vae.decode(z).sample.float(), KL_WEIGHT * posterior.kl().mean() / z[0].numel()

    reconstruct = kl if isinstance(vae, AutoencoderKL) else vq

    def loss(step: int, g: torch.Generator) -> torch.Tensor:
        x = images[torch.randint(len(images), (stage.batch,), generator=g)]
        y, penalty = reconstruct(x, step, g)
        grad = sum((a - b).abs().mean() for a, b in zip(edges(y), edges(x), strict=True))
        return (y - x).abs().mean() + (y - x).pow(2).mean() + 0.5 * grad + penalty

    return run_stage(
        "autoencoder", stage, vae, loss, work, start_codebook if reconstruct is vq else None
    )


def augment(x: torch.Tensor, g: torch.Generator, flips: float = 0.5) -> torch.Tensor:
    """Each image [3, H, W] of x in (-1, 1) mirrored, zoomed, shifted and dimmed at random; what comes in is white."""
    n = len(x)
    u = torch.rand(n, 4, generator=g) * 2 - 1
    theta = torch.zeros(n, 2, 3)
    flip = torch.where(torch.rand(n, generator=g) < flips, -1.0, 1.0)
    theta[:, 0, 0], theta[:, 1, 1] = flip * (1 + 0.15 * u[:, 0]), 1 + 0.15 * u[:, 0]
    theta[:, 0, 2], theta[:, 1, 2] = 0.12 * u[:, 1], 0.12 * u[:, 2]
    x = 1 - F.grid_sample(
        1 - x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False
    )
    return x * (1 + 0.1 * u[:, 3, None, None, None])


def train_classifier(preset: Preset, data: TrainingData, work: Path) -> GroupClassifier:
    """Nine emoji groups, class-balanced batches, augmented; every tenth image held out."""
    torch.manual_seed(0)
    model, stage = GroupClassifier(len(GROUPS)), preset.stages["classifier"]
    held_out = torch.arange(len(data.images)) % 10 == 9
    x_train, y_train = data.images[~held_out].float() / 127.5 - 1, data.labels[~held_out]
    weight = (1.0 / torch.bincount(y_train).float())[y_train]

    def loss(step: int, g: torch.Generator) -> torch.Tensor:
        idx = torch.multinomial(weight, stage.batch, replacement=True, generator=g)
        return F.cross_entropy(
            model(augment(x_train[idx], g)).float(), y_train[idx], label_smoothing=0.05
        )

    model = run_stage("classifier", stage, model, loss, work)
    with torch.no_grad():
        predicted = torch.cat(
            [model(b.float() / 127.5 - 1).argmax(1) for b in data.images[held_out].split(128)]
        )
    accuracy = (predicted == data.labels[held_out]).float().mean().item()
    (work / "classifier.json").write_text(
        json.dumps({"held_out": int(held_out.sum()), "held_out_accuracy": round(accuracy, 4)})
    )
    print("classifier held-out accuracy", round(accuracy, 4), flush=True)
    return model


def train_clip(preset: Preset, data: TrainingData, work: Path) -> text.Clip:
    """On images and captions, augmented but not mirrored, since captions tell left from right; every tenth image held out."""
    tokenizer = text.train_tokenizer(data.captions)
    torch.manual_seed(0)
    model, stage = text.make_clip(tokenizer), preset.stages["clip"]
    held_out = torch.arange(len(data.images)) % 10 == 9
    ids = text.tokens(tokenizer, list(data.captions))
    x_train, ids_train = data.images[~held_out].float() / 127.5 - 1, ids[~held_out]

    def loss(step: int, g: torch.Generator) -> torch.Tensor:
        idx = torch.randint(len(x_train), (stage.batch,), generator=g)
        return text.clip_loss(model, augment(x_train[idx], g, flips=0.0), ids_train[idx])

    return text.Clip(run_stage("clip", stage, model, loss, work), tokenizer)


def context_parts(
    preset: Preset, data: TrainingData, width: int
) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """What gives the UNet its context: modules to train with it, each image's condition int64 [N] or [N, L], and the null one."""
    if preset.condition == "class":
        null = torch.tensor(len(data.class_names))
        return {"class_embedder": ClassEmbedder(len(data.class_names), width)}, data.classes, null
    tokenizer = text.train_tokenizer(data.captions)
    encoder = text.text_encoder(tokenizer, width)
    return (
        {"text_encoder": encoder},
        text.tokens(tokenizer, list(data.captions)),
        text.tokens(tokenizer, [""]),
    )


def train_unet(
    preset: Preset, data: TrainingData, vae: VQModel | AutoencoderKL | None, work: Path
) -> nn.ModuleDict:
    """Predicts the noise of scaled latents, or of pixels; the condition's embedder is trained with the UNet. -> {"unet", ...}"""
    if vae is None:
        samples = data.images
    else:
        with torch.no_grad():
            latents = encode(vae, data.images)
        vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 6))
        samples = latents * vae.config.scaling_factor
    torch.manual_seed(0)
    unet, scheduler, stage = preset.unet(), preset.scheduler(), preset.stages["unet"]
    parts = {"unet": unet}
    if preset.condition:
        embedder, conditions, null = context_parts(preset, data, unet.config.cross_attention_dim)
        parts |= embedder
        (embed,) = embedder.values()

    def loss(step: int, g: torch.Generator) -> torch.Tensor:
        n = stage.batch
        idx = torch.randint(len(samples), (n,), generator=g)
        x0 = samples[idx]
        if vae is None:  # pixels: kept as uint8, mirrored at random
            flip = torch.rand(n, 1, 1, 1, generator=g) < 0.5
            x0 = torch.where(flip, x0.flip(-1), x0) / 127.5 - 1
        t = torch.randint(scheduler.config.num_train_timesteps, (n,), generator=g)
        noise = torch.randn(x0.shape, generator=g)
        context = ()
        if preset.condition:
            given = conditions[idx]
            drop = (torch.rand(n, generator=g) < DROP).view(n, *[1] * (given.ndim - 1))
            found = embed(torch.where(drop, null, given))
            context = (found if isinstance(found, torch.Tensor) else found.last_hidden_state,)
        return F.mse_loss(
            unet(scheduler.add_noise(x0, noise, t), t, *context).sample.float(), noise
        )

    return run_stage("unet", stage, nn.ModuleDict(parts), loss, work)


def trained_autoencoder(
    name: str, data: TrainingData, out: Path, work: Path
) -> VQModel | AutoencoderKL | None:
    """The autoencoder of model `name`: trained in `work`/name, or of the embedded model that the preset names.

    An embedded model that is not exported yet is trained as far as its autoencoder. Either way the weights are those of the
    export, rounded to fp16, so that the order of training does not matter.
    """
    source = PRESETS[name].autoencoder
    if source is None:
        return None
    if not isinstance(source, str):
        return train_autoencoder(PRESETS[name], data, work / name)
    if (out / source / "model_index.json").is_file():
        pipe = load_pipeline(out / source)
        return getattr(pipe, "vqvae", None) or pipe.vae
    return trained_autoencoder(source, data, out, work).half().float()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m reproduce.models.minis.training", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--model", choices=PRESETS, default="mini-ldm4", help="which of the embedded models"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("reproduce/models/minis/weights"),
        help="where the diffusers folder is written",
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/train"),
        help="checkpoints, logs and the data archive",
    )
    parser.add_argument("--samples", type=int, default=NUM_SAMPLES, help="of the card's figures")
    parser.add_argument("--reference", type=Path, help=REFERENCE_HELP)
    args = parser.parse_args(argv)
    preset, work = PRESETS[args.model], args.work / args.model
    from reproduce.models.minis import export  # late: it imports this module

    try:
        export.check(args.model, args.out, args.reference)
        data = fetch(preset.data, args.work)
        print(f"{len(data.images)} images", flush=True)
        vae = trained_autoencoder(args.model, data, args.out, args.work)
        classifier = train_classifier(preset, data, work) if "classifier" in preset.stages else None
        clip = train_clip(preset, data, work) if "clip" in preset.stages else None
        parts = train_unet(preset, data, vae, work)
        export.export(
            args.model,
            data,
            vae,
            parts,
            work,
            args.out,
            classifier=classifier,
            clip=clip,
            num_samples=args.samples,
            reference=args.reference,
        )
    except (QuestError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
