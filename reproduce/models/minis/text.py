"""What mini-sd adds to image models: a tokenizer of the captions, a small CLIP text encoder, and mini-clip for its CLIP score."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

LENGTH = 24  # tokens of a prompt, start and end included; the longest caption has 23
MERGES = 700
# Weights of mini-clip: a ViT and a text transformer, the parts of ViT-B/16.
CLIP = dict(
    embed_dim=64,
    vision_cfg=dict(image_size=64, layers=4, width=96, head_width=24, patch_size=8),
    text_cfg=dict(
        context_length=LENGTH,
        width=64,
        heads=4,
        layers=3,
        hf_tokenizer_name="tokenizer",  # of a local folder, open_clip reads the folder's own
    ),
)
PREPROCESS = dict(
    size=64,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    interpolation="bicubic",
    resize_mode="squash",
)


class Clip(NamedTuple):
    model: open_clip.CLIP
    tokenizer: CLIPTokenizer


def train_tokenizer(captions: Sequence[str]) -> CLIPTokenizer:
    """CLIP's byte-level BPE in CLIP's order of ids: bytes, bytes that end a word, MERGES merges, start, end.

    Not by the tokenizers library's trainer, which breaks ties between equal counts at random.
    """
    splitter = CLIPTokenizer().backend_tokenizer
    words = Counter(
        word
        for c in captions
        for word, _ in splitter.pre_tokenizer.pre_tokenize_str(splitter.normalizer.normalize_str(c))
    )
    split = {word: [*word[:-1], word[-1] + "</w>"] for word in sorted(words)}
    merges = []
    while len(merges) < MERGES:
        pairs = Counter()
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
    """int64 [N, LENGTH], padded with the end token and cut, as StableDiffusionPipeline does it."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def text_encoder(tokenizer: CLIPTokenizer, width: int) -> CLIPTextModel:
    """Fresh weights: two layers. Output: last_hidden_state [N, LENGTH, width]."""
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
    """The symmetric contrastive loss. images float [N, 3, 64, 64] in (-1, 1); ids [N, LENGTH]; equal captions are one target."""
    image, text, scale = model(images, ids)
    logits = scale.float() * image.float() @ text.float().T  # [N, N]
    same = (ids[:, None] == ids[None]).all(-1).float()
    target = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@torch.no_grad()
def retrieval(model: nn.Module, images: torch.Tensor, ids: torch.Tensor) -> dict[str, float]:
    """Share of images (uint8) whose own caption is first, or among the first five, of all distinct captions in `ids`."""
    captions, own = torch.unique(ids, dim=0, return_inverse=True)
    image = torch.cat(
        [model.encode_image(b.float() / 127.5 - 1, normalize=True) for b in images.split(100)]
    )
    order = (image @ model.encode_text(captions, normalize=True).T).argsort(
        1, descending=True
    )  # [N, captions]
    return {
        "captions": len(captions),
        "top1": (order[:, 0] == own).float().mean().item(),
        "top5": (order[:, :5] == own[:, None]).any(1).float().mean().item(),
    }


def save_clip(model: nn.Module, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """fp16 weights; open_clip.create_model_and_transforms(f"local-dir:{folder}") and get_tokenizer(...) read the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    save_file(
        {k: v.half().contiguous() for k, v in model.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
    config = {"model_cfg": _clip_config(tokenizer), "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n")


def make_clip(tokenizer: CLIPTokenizer) -> open_clip.CLIP:
    """Fresh weights."""
    return open_clip.CLIP(**_clip_config(tokenizer))


def _clip_config(tokenizer: CLIPTokenizer) -> dict:
    return {**CLIP, "text_cfg": {**CLIP["text_cfg"], "vocab_size": len(tokenizer)}}
