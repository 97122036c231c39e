"""Norms and activations whose output leaves as bytes, in one pass (`rows.cpp`)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch

from questlib.kernels.library import call
from questlib.kernels.quantize import Pointers, Table, TokenRule, View

AFFINE, AFFINE_SILU, LAYER_NORM, GEGLU = range(4)


class Target(NamedTuple):
    """A grid on which rows leave, and the channels that do."""

    table: Table
    offset: int  # added to the integers, so that they fit a byte
    start: int
    stop: int
    token: TokenRule | None = None  # where each row has a grid of its own


class _Target(ctypes.Structure):
    _fields_ = [
        ("out", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("grid", Pointers),
        *((name, ctypes.c_int64) for name in ("start", "count", "uniform", "offset")),
        *((name, ctypes.c_float) for name in TokenRule._fields),
    ]


class _Source(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "scale", "shift")),
        ("at", View),
        ("kind", ctypes.c_int64),
        ("eps", ctypes.c_float),
    ]


class _Group(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_void_p) for n in ("x", "weight", "bias", "added", "scale", "shift")),
        ("at", View),
        ("groups", ctypes.c_int64),
        ("eps", ctypes.c_double),
    ]


class Rows(NamedTuple):
    """Rows as bytes."""

    bytes: torch.Tensor  # uint8, shaped like the rows; an image in channels_last
    scales: torch.Tensor | None  # of tokens, float32 with one entry where the rows have channels


def group_affine(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    added: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """GroupNorm(x + added) as a scale and a shift of x's channels.

    Args:
        x: float32 or bfloat16 [B, C, H, W].
        groups: their number, a divisor of C.
        weight: float32 [C].
        bias: float32 [C].
        eps: added to the variance.
        added: float32 [B, C]: of all pixels of a channel.

    Returns:
        float32 [B, C] each: the norm is x * scale + shift.
    """
    x = _in_rows(x)
    scale, shift = torch.empty(2, *x.shape[:2])
    tensors = (x, weight, bias, added, scale, shift)
    pointers = (None if t is None else t.data_ptr() for t in tensors)
    own = _Group(*pointers, _view(x, x.shape[1]), groups, eps)
    call("group_affine", own, int(x.dtype == torch.bfloat16))
    return scale, shift


def affine_rows(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    silu: bool,
    targets: Sequence[Target],
) -> tuple[list[Rows], bool]:
    """x * scale + shift as bytes, behind a SiLU or not.

    Args:
        x: float32 or bfloat16 [B, C, H, W].
        scale: float32 [B, C].
        shift: float32 [B, C].
        silu: whether a SiLU follows.
        targets: on which the rows leave.

    Returns:
        The bytes of each target; whether all values are finite.
    """
    kind = AFFINE_SILU if silu else AFFINE
    return _quantize(x, (scale, shift), x.shape[1], kind, 0.0, targets)


def layer_norm_rows(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    targets: Sequence[Target],
) -> tuple[list[Rows], bool]:
    """LayerNorm(x) as bytes.

    Args:
        x: float32 or bfloat16 [..., C].
        weight: float32 [C].
        bias: float32 [C].
        eps: added to the variance.
        targets: on which the rows leave.

    Returns:
        The bytes of each target; whether all values are finite.
    """
    return _quantize(x, (weight, bias), x.shape[-1], LAYER_NORM, eps, targets)


def geglu_rows(x: torch.Tensor, targets: Sequence[Target]) -> tuple[list[Rows], bool]:
    """GEGLU(x), the first half times the GELU of the second, as bytes.

    Args:
        x: float32 or bfloat16 [..., 2 C].
        targets: on which the rows leave.

    Returns:
        The bytes of each target [..., C]; whether all values are finite.
    """
    return _quantize(x, (None, None), x.shape[-1] // 2, GEGLU, 0.0, targets)


def _quantize(
    x: torch.Tensor,
    of_channels: tuple[torch.Tensor | None, torch.Tensor | None],
    channels: int,
    kind: int,
    eps: float,
    targets: Sequence[Target],
) -> tuple[list[Rows], bool]:
    x = _in_rows(x)
    image = x.ndim == 4
    found = []
    own = (_Target * len(targets))()
    for i, target in enumerate(targets):
        count = target.stop - target.start
        shape = [*x.shape[:-1], count]
        scales = None
        if image:
            shape = [x.shape[0], count, *x.shape[2:]]
        layout = torch.channels_last if image else torch.contiguous_format
        out = torch.empty(shape, dtype=torch.uint8, memory_format=layout)
        if target.token is not None:
            scales = torch.empty(
                [1 if d == (1 if image else x.ndim - 1) else n for d, n in enumerate(shape)]
            )
        found.append(Rows(out, scales))
        own[i] = _Target(
            out.data_ptr(),
            None if scales is None else scales.data_ptr(),
            target.table.pointers(),
            *(target.start, count, int(target.table.uniform), target.offset),
            *(target.token or (0.0, 0.0, 0.0, 0.0)),
        )
    if not x.numel():
        return found, True
    pointers = (None if t is None else t.data_ptr() for t in (x, *of_channels))
    source = _Source(*pointers, _view(x, channels), kind, eps)
    finite = call("quantize_rows", source, own, len(targets), int(x.dtype == torch.bfloat16))
    return found, bool(finite)


def _in_rows(x: torch.Tensor) -> torch.Tensor:
    """x with its channels as neighbours, in a precision that the kernels read."""
    if x.dtype not in (torch.float32, torch.bfloat16):
        x = x.float()
    layout = torch.channels_last if x.ndim == 4 else torch.contiguous_format
    return x.contiguous(memory_format=layout)


def _view(x: torch.Tensor, channels: int) -> View:
    """How x lies in memory: dense rows, of which `channels` are taken or made."""
    if x.ndim == 4:
        batch, width, height, columns = x.shape
        pixels = height * columns
    else:
        width = x.shape[-1]
        batch = 1
        pixels = x.numel() // width
    return View(batch, pixels, channels, pixels * width, width, 1)
