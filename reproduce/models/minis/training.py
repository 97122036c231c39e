"""Train the parts of the embedded models: autoencoders, metric networks, denoisers.

The stages are those of `reproduce.models.minis.architectures`, each with fixed seeds and a JSONL
log, and resumable from its last checkpoint. `train` runs all of a model's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn

from questlib.denoisers import null_label, predict
from questlib.diffusion import sampling
from reproduce.models.classifier import GroupClassifier
from reproduce.models.loading import load_pipeline
from reproduce.models.minis import text
from reproduce.models.minis.architectures import DROP, MINI_MODELS, MiniModel
from reproduce.models.minis.data import GROUPS, TrainingData
from reproduce.models.minis.latents import Autoencoder, encode
from reproduce.models.minis.stages import run_stage
from reproduce.models.pipelines import ClassEmbedder

# A VQ model is a plain autoencoder before this step. Then its codebook starts from encoder outputs
# and is used.
VQ_START = 1000

# Of the mean over latents; the reconstruction losses are means over pixels.
KL_WEIGHT = 1e-4

HELD_OUT = 10  # every tenth image is not trained on by the metric networks


class Trained(NamedTuple):
    """All that was trained of a model; None: the model has no such part.

    Args:
        parts: "unet" or "transformer", and "class_embedder" or "text_encoder" beside a UNet.
    """

    vae: Autoencoder | None
    parts: nn.ModuleDict
    classifier: GroupClassifier | None = None
    clip: text.Clip | None = None


def train(name: str, data: TrainingData, out: Path, work: Path) -> Trained:
    """Run all stages of an embedded model.

    Args:
        out: where exported models are, among them those that it shares an autoencoder with.
        work: checkpoints and logs, in the folder NAME.
    """
    model, folder = MINI_MODELS[name], work / name
    vae = trained_autoencoder(name, data, out, work)
    classifier = train_classifier(model, data, folder) if "classifier" in model.stages else None
    clip = train_clip(model, data, folder) if "clip" in model.stages else None
    return Trained(vae, train_denoiser(model, data, vae, folder), classifier, clip)


def held_out(data: TrainingData) -> torch.Tensor:
    """Which images the metric networks are not trained on: bool [N]."""
    return torch.arange(len(data.images)) % HELD_OUT == HELD_OUT - 1


def _edges(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Differences of neighbouring pixels of [N, C, H, W]."""
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def train_autoencoder(model: MiniModel, data: TrainingData, work: Path) -> Autoencoder:
    """Reconstructs images: L1, L2 and edges; and a commitment (VQ) or Kullback-Leibler term."""
    assert callable(model.autoencoder)
    torch.manual_seed(0)
    vae = model.autoencoder()
    stage = model.stages["autoencoder"]
    images = data.images.float() / 127.5 - 1

    @torch.no_grad()
    def start_codebook(step: int) -> None:
        if step != VQ_START:
            return
        latents = encode(vae, data.images[::4])
        z = latents.permute(0, 2, 3, 1).reshape(-1, vae.config.latent_channels)  # [N * h * w, C]
        codebook = vae.quantize.embedding.weight
        codebook.copy_(z[torch.randperm(len(z))[: len(codebook)]])

    def vq(x: torch.Tensor, step: int, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        z = vae.encode(x).latents.float()
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

    is_kl = isinstance(vae, AutoencoderKL)
    reconstruct = kl if is_kl else vq

    def loss(step: int, g: torch.Generator) -> torch.Tensor:
        x = images[torch.randint(len(images), (stage.batch,), generator=g)]
        y, penalty = reconstruct(x, step, g)
        grad = sum((a - b).abs().mean() for a, b in zip(_edges(y), _edges(x), strict=True))
        return (y - x).abs().mean() + (y - x).pow(2).mean() + 0.5 * grad + penalty

    on_step = None if is_kl else start_codebook
    return run_stage("autoencoder", stage, vae, loss, work, on_step)


def augment(x: torch.Tensor, g: torch.Generator, flips: float = 0.5) -> torch.Tensor:
    """Each image [3, H, W] of x in (-1, 1) mirrored, zoomed, shifted and dimmed at random.

    What comes in at the borders is white.

    Args:
        flips: share of mirrored images.
    """
    n = len(x)
    u = torch.rand(n, 4, generator=g) * 2 - 1
    theta = torch.zeros(n, 2, 3)
    flip = torch.where(torch.rand(n, generator=g) < flips, -1.0, 1.0)
    zoom = 1 + 0.15 * u[:, 0]
    theta[:, 0, 0] = flip * zoom
    theta[:, 1, 1] = zoom
    theta[:, 0, 2] = 0.12 * u[:, 1]
    theta[:, 1, 2] = 0.12 * u[:, 2]
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    # grid_sample fills with 0, which here stands for white.
    x = 1 - F.grid_sample(1 - x, grid, align_corners=False)
    return x * (1 + 0.1 * u[:, 3, None, None, None])


def train_classifier(model: MiniModel, data: TrainingData, work: Path) -> GroupClassifier:
    """The classifier of the nine emoji groups, on class-balanced, augmented batches."""
    torch.manual_seed(0)
    classifier = GroupClassifier(len(GROUPS))
    stage = model.stages["classifier"]
    test = held_out(data)
    x_train = data.images[~test].float() / 127.5 - 1
    y_train = data.labels[~test]
    weight = (1.0 / torch.bincount(y_train).float())[y_train]

    def loss(step: int, g: torch.Generator) -> torch.Tensor:
        idx = torch.multinomial(weight, stage.batch, replacement=True, generator=g)
        logits = classifier(augment(x_train[idx], g)).float()
        return F.cross_entropy(logits, y_train[idx], label_smoothing=0.05)

    run_stage("classifier", stage, classifier, loss, work)
    with torch.no_grad():
        batches = [b.float() / 127.5 - 1 for b in data.images[test].split(128)]
        predicted = torch.cat([classifier(b).argmax(1) for b in batches])
    accuracy = round((predicted == data.labels[test]).float().mean().item(), 4)
    figures = {"held_out": int(test.sum()), "held_out_accuracy": accuracy}
    (work / "classifier.json").write_text(json.dumps(figures), encoding="utf-8")
    print("classifier held-out accuracy", accuracy, flush=True)
    return classifier


def train_clip(model: MiniModel, data: TrainingData, work: Path) -> text.Clip:
    """mini-clip, on images and captions.

    Images are augmented but not mirrored, since captions tell left from right.
    """
    tokenizer = text.train_tokenizer(data.captions)
    torch.manual_seed(0)
    clip = text.make_clip(tokenizer)
    stage = model.stages["clip"]
    test = held_out(data)
    ids = text.tokens(tokenizer, list(data.captions))
    x_train = data.images[~test].float() / 127.5 - 1
    ids_train = ids[~test]

    def loss(step: int, g: torch.Generator) -> torch.Tensor:
        idx = torch.randint(len(x_train), (stage.batch,), generator=g)
        return text.clip_loss(clip, augment(x_train[idx], g, flips=0.0), ids_train[idx])

    return text.Clip(run_stage("clip", stage, clip, loss, work), tokenizer)


class Context(NamedTuple):
    """What a denoiser is told of an image.

    Args:
        argument: of the denoiser.
        embedder: is trained with a UNet, whose context it gives; None: the condition itself.
        name: of the embedder in the pipeline.
        conditions: of each image, int64 [N] or [N, L].
        null: the condition that stands for none, int64 [] or [1, L].
    """

    argument: str
    embedder: nn.Module | None
    name: str
    conditions: torch.Tensor
    null: torch.Tensor


def make_context(model: MiniModel, data: TrainingData, denoiser: nn.Module) -> Context:
    """Embedder with fresh weights, and the conditions of the data."""
    if model.condition == "class":
        assert data.classes is not None
        classes = len(data.class_names)
        if model.part == "transformer":
            null = torch.tensor(null_label(denoiser))
            return Context("class_labels", None, "", data.classes, null)
        embedder = ClassEmbedder(classes, denoiser.config.cross_attention_dim)
        null = torch.tensor(classes)
        return Context("encoder_hidden_states", embedder, "class_embedder", data.classes, null)
    tokenizer = text.train_tokenizer(data.captions)
    return Context(
        "encoder_hidden_states",
        text.text_encoder(tokenizer, denoiser.config.cross_attention_dim),
        "text_encoder",
        text.tokens(tokenizer, list(data.captions)),
        text.tokens(tokenizer, [""]),
    )


def train_denoiser(
    model: MiniModel, data: TrainingData, vae: Autoencoder | None, work: Path
) -> nn.ModuleDict:
    """The UNet or transformer, which predicts the noise of scaled latents or of pixels.

    That is Eq. 14 of Ho et al. 2020. The condition's embedder is trained with it.

    Returns:
        The denoiser and the embedder by their names in the pipeline.
    """
    samples = data.images
    if vae is not None:
        with torch.no_grad():
            latents = encode(vae, data.images)
        vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 6))
        samples = latents * vae.config.scaling_factor
    torch.manual_seed(0)
    denoiser = model.denoiser()
    scheduler = model.scheduler()
    stage = model.stages[model.part]
    parts = nn.ModuleDict({model.part: denoiser})
    context: Context | None = None
    if model.condition is not None:
        context = make_context(model, data, denoiser)
        if context.embedder is not None:
            parts[context.name] = context.embedder

    def told(context: Context, idx: torch.Tensor, g: torch.Generator) -> torch.Tensor:
        """Labels [n] or context [n, L, D] of the images `idx`; a share of DROP is the null one."""
        given = context.conditions[idx]
        drop = torch.rand(len(idx), generator=g) < DROP
        drop = drop.view(len(idx), *[1] * (given.ndim - 1))  # [n] or [n, 1]
        given = torch.where(drop, context.null, given)
        if context.embedder is None:
            return given
        found = context.embedder(given)
        return found if isinstance(found, torch.Tensor) else found.last_hidden_state

    def loss(step: int, g: torch.Generator) -> torch.Tensor:
        n = stage.batch
        idx = torch.randint(len(samples), (n,), generator=g)
        x0 = samples[idx]
        if vae is None:  # pixels are kept as uint8, and mirrored at random
            flip = torch.rand(n, 1, 1, 1, generator=g) < 0.5
            x0 = torch.where(flip, x0.flip(-1), x0) / 127.5 - 1
        t = torch.randint(scheduler.config.num_train_timesteps, (n,), generator=g)
        noise = torch.randn(x0.shape, generator=g)
        given = {} if context is None else {context.argument: told(context, idx, g)}
        eps = predict(denoiser, scheduler.add_noise(x0, noise, t), t, **given)
        return F.mse_loss(eps.float(), noise)

    run_stage(model.part, stage, parts, loss, work)
    return parts


def trained_autoencoder(name: str, data: TrainingData, out: Path, work: Path) -> Autoencoder | None:
    """The autoencoder of model `name`; None where it works on pixels.

    It is trained in `work`/name, or is that of another embedded model. One that is not exported
    yet is trained as far as its autoencoder. Either way the weights are those of the export,
    rounded to fp16, so that the order of training does not matter.
    """
    model = MINI_MODELS[name]
    if model.autoencoder is None:
        return None
    if not isinstance(model.autoencoder, str):
        return train_autoencoder(model, data, work / name)
    shared = model.autoencoder
    if (out / shared / "model_index.json").is_file():
        return sampling.autoencoder(load_pipeline(out / shared))
    vae = trained_autoencoder(shared, data, out, work)
    assert vae is not None
    return vae.half().float()
