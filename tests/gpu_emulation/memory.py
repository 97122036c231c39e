"""Memory that is read and written by vectors of byte addresses."""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from ptx import PtxError


class Window:
    """One piece of memory.

    Attributes:
        data: uint8 [n].
        name: for messages.
    """

    def __init__(self, data: np.ndarray, name: str) -> None:
        self.data = data
        self.name = name
        self.views: dict[int, np.ndarray] = {}

    def view(self, size: int) -> np.ndarray:
        """The values of `size` bytes that begin at each byte, as numpy's void type."""
        if size not in self.views:
            count = max(0, len(self.data) - size + 1)
            self.views[size] = np.ndarray((count,), f"V{size}", self.data, strides=(1,))
        return self.views[size]

    def load(self, offsets: np.ndarray, size: int) -> np.ndarray:
        """void [L] of int64 offsets [L]

        Raises:
            PtxError: an offset lies outside.
        """
        self.check(offsets, size)
        return self.view(size)[offsets]

    def store(self, offsets: np.ndarray, values: np.ndarray) -> None:
        """values: void [L]. Raises PtxError as `load` does."""
        self.check(offsets, values.itemsize)
        self.view(values.itemsize)[offsets] = values

    def check(self, offsets: np.ndarray, size: int) -> None:
        if len(offsets) and (offsets.min() < 0 or offsets.max() + size > len(self.data)):
            worst = max(int(offsets.max()) + size, -int(offsets.min()))
            raise PtxError(f"access beyond {self.name} of {len(self.data)} bytes: {worst}")


class Memory:
    """Global memory: the tensors of a launch at their own addresses, and nothing beside them."""

    def __init__(self) -> None:
        self.pieces: list[tuple[int, Window]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Make a tensor of the CPU accessible, with what lies between its elements."""
        if not tensor.numel():
            return
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        size = (last + 1) * tensor.element_size()
        base = tensor.data_ptr()
        if all((base, size) != (at, len(window.data)) for at, window in self.pieces):
            data = np.frombuffer((ctypes.c_uint8 * size).from_address(base), np.uint8)
            self.pieces.append((base, Window(data, name)))

    def load(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """void [L] of uint64 addresses [L]

        Raises:
            PtxError: an address is in no tensor, or no multiple of the size.
        """
        out = np.empty(len(addresses), f"V{size}")
        for own, offsets, window in self._parts(addresses, size):
            out[own] = window.load(offsets, size)
        return out

    def store(self, addresses: np.ndarray, values: np.ndarray) -> None:
        """values: void [L]. Raises PtxError as `load` does."""
        for own, offsets, window in self._parts(addresses, values.itemsize):
            window.store(offsets, values[own])

    def add_int32(self, addresses: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Atomic addition of int32 values [L], one lane after the other.

        Returns what each lane found. Raises PtxError as `load` does.
        """
        out = np.empty(len(addresses), np.int32)
        for own, offsets, window in self._parts(addresses, 4):
            data = window.data.view(np.int32)
            place = offsets // 4
            # In the order of addresses, what the lanes before one at its address have added.
            order = np.argsort(place, kind="stable")
            added = values[own][order].astype(np.int64)
            before = np.cumsum(added) - added
            _, first, which = np.unique(place[order], return_index=True, return_inverse=True)
            found = np.empty(len(place), np.int32)
            found[order] = data[place[order]] + (before - before[first][which])
            np.add.at(data, place, values[own])
            out[own] = found
        return out

    def _parts(self, addresses: np.ndarray, size: int):
        """(lanes, offsets, window) for each piece of memory that is used."""
        if (addresses % np.uint64(size)).any():
            raise PtxError(f"misaligned access of {size} bytes")
        if not len(addresses):
            return
        first, last = int(addresses.min()), int(addresses.max()) + size
        for base, window in self.pieces:
            if base <= first and last <= base + len(window.data):
                yield slice(None), (addresses - np.uint64(base)).view(np.int64), window
                return
        left = np.ones(len(addresses), bool)
        for base, window in self.pieces:
            end = base + len(window.data) - size
            own = left & (addresses >= base) & (addresses.view(np.int64) <= end)
            if own.any():
                yield own, (addresses[own] - np.uint64(base)).view(np.int64), window
                left &= ~own
        if left.any():
            known = ", ".join(f"{w.name} of {len(w.data)} bytes" for _, w in self.pieces)
            raise PtxError(f"access to {int(addresses[left][0]):#x}, outside of {known}")
