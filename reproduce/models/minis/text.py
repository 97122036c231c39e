"""What mini-sd adds to image models.

A tokenizer of the captions, a small CLIP text encoder, and mini-clip for its CLIP score.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from questlib.files import atomic_path

LENGTH = 24  # tokens of a prompt, start and end included; the longest caption has 23
MERGES = 700  # of the byte-pair encoding

# mini-clip in open_clip's words: a ViT and a text transformer, the parts of ViT-B/16.
CLIP_EMBED_DIM = 64
CLIP_VISION = dict(image_size=64, layers=4, width=96, head_width=24, patch_size=8)
CLIP_TEXT = dict(
    context_length=LENGTH,
    width=64,
    heads=4,
    layers=3,
    hf_tokenizer_name="tokenizer",  # of a local folder, open_clip reads the folder's own
)
PREPROCESS = dict(
    size=64,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    interpolation="bicubic",
    resize_mode="squash",
)


class Clip(NamedTuple):
    """mini-clip and its tokenizer."""

    model: open_clip.CLIP
    tokenizer: CLIPTokenizer


def train_tokenizer(captions: Sequence[str]) -> CLIPTokenizer:
    """CLIP's byte-level BPE (Sennrich et al. 2016), learned from the captions.

    The ids are in CLIP's order: bytes, bytes that end a word, MERGES merges, start, end. The
    tokenizers library's own trainer breaks ties between equal counts at random; here the pair that
    comes first in the alphabet wins.
    """
    splitter = CLIPTokenizer().backend_tokenizer
    words: Counter[str] = Counter()
    for caption in captions:
        normal = splitter.normalizer.normalize_str(caption)
        words.update(word for word, _ in splitter.pre_tokenizer.pre_tokenize_str(normal))
    split = {word: [*word[:-1], word[-1] + "</w>"] for word in sorted(words)}
    merges: list[tuple[str, str]] = []
    while len(merges) < MERGES:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in split.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        if not pairs:  # every word is one token
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        split = {word: _merge(parts, best) for word, parts in split.items()}
    alphabet = sorted(ByteLevel.alphabet())
    vocabulary = [
        *alphabet,
        *(a + "</w>" for a in alphabet),
        *("".join(m) for m in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    return CLIPTokenizer(
        {token: i for i, token in enumerate(vocabulary)}, merges, model_max_length=LENGTH
    )


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def tokens(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Captions -> int64 [N, LENGTH], padded with the end token and cut.

    StableDiffusionPipeline does the same.
    """
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def text_encoder(tokenizer: CLIPTokenizer, width: int) -> CLIPTextModel:
    """A text encoder of two layers with fresh weights: ids [N, LENGTH] -> [N, LENGTH, width]."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def clip_loss(model: nn.Module, images: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """CLIP's symmetric contrastive loss (Radford et al. 2021, Fig. 3).

    Equal captions are one target.

    Args:
        images: float [N, 3, 64, 64] in (-1, 1).
        ids: [N, LENGTH].
    """
    image, text, scale = model(images, ids)
    logits = scale.float() * image.float() @ text.float().T  # [N, N]
    same = (ids[:, None] == ids[None]).all(-1).float()
    target = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@torch.no_grad()
def retrieval(model: nn.Module, images: torch.Tensor, ids: torch.Tensor) -> dict[str, float]:
    """How often the model finds an image's own caption among all distinct captions.

    Args:
        images: uint8 [N, 3, H, W].
        ids: the captions' tokens [N, LENGTH].

    Returns:
        "captions", the number of distinct ones; "top1" and "top5", the share of images whose own
        caption is first, or among the first five.
    """
    captions, own = torch.unique(ids, dim=0, return_inverse=True)
    batches = [b.float() / 127.5 - 1 for b in images.split(100)]
    image = torch.cat([model.encode_image(b, normalize=True) for b in batches])
    similarity = image @ model.encode_text(captions, normalize=True).T
    order = similarity.argsort(1, descending=True)  # [N, captions]
    return {
        "captions": len(captions),
        "top1": (order[:, 0] == own).float().mean().item(),
        "top5": (order[:, :5] == own[:, None]).any(1).float().mean().item(),
    }


def save_clip(model: nn.Module, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write mini-clip in fp16, as open_clip reads it by the name "local-dir:FOLDER"."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    half = {k: v.half().contiguous() for k, v in model.state_dict().items()}
    with atomic_path(folder / "open_clip_model.safetensors") as temporary:
        save_file(half, temporary)
    config = {"model_cfg": _clip_config(tokenizer), "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(
        json.dumps(config, indent=1) + "\n", encoding="utf-8"
    )


def make_clip(tokenizer: CLIPTokenizer) -> open_clip.CLIP:
    """mini-clip with fresh weights."""
    return open_clip.CLIP(**_clip_config(tokenizer))


def _clip_config(tokenizer: CLIPTokenizer) -> dict[str, Any]:
    return {
        "embed_dim": CLIP_EMBED_DIM,
        "vision_cfg": CLIP_VISION,
        "text_cfg": {**CLIP_TEXT, "vocab_size": len(tokenizer)},
    }
