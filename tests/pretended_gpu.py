"""A pretended GPU: its tensors compute on the CPU, but cannot be mixed with the CPU's own.

Its device is torch's "meta", which needs no driver. It can be called "cuda": then it is asked for
by this name, and its tensors say that they are there. What only a GPU has (kernels, streams,
reduced precision) is not here.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("meta")
aten = torch.ops.aten
MOVES = (aten._to_copy.default, aten.copy_.default)
# A GPU takes indices of the CPU.
INDEXING = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)


class GpuTensor(torch.Tensor):
    """A tensor of the pretended GPU; `inner` is its value, on the CPU."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> GpuTensor:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=GPU,
        )

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def __repr__(self) -> str:
        return f"GpuTensor({self.inner})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """torch.save keeps the value, as torch.load(map_location="cpu") gives it back."""
        return self.inner.__reduce_ex__(protocol)

    def tolist(self) -> Any:
        """A GPU's tensors have it, and subclasses of torch.Tensor have not."""
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _call(func, args, kwargs or {})


def _call(func, args, kwargs):
    """Run an operator on the inner tensors, and wrap what lands on the GPU."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    here = [x for x in tensors if isinstance(x, GpuTensor)]
    if here and func not in MOVES:
        indexed = func in INDEXING and isinstance(args[0], GpuTensor)
        if not indexed and any(x.dim() > 0 for x in tensors if not isinstance(x, GpuTensor)):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, found the GPU and the CPU: {func}"
            )
    plain_args, plain = tree_map(
        lambda x: x.inner if isinstance(x, GpuTensor) else x, (args, kwargs)
    )
    asked = kwargs.get("device")
    if asked is not None:
        plain = plain | {"device": torch.device("cpu")}
    out = func(*plain_args, **plain)
    if func is aten.copy_.default:
        return args[0]
    on_gpu = bool(here) if asked is None else torch.device(asked) == GPU
    if not on_gpu:
        return out
    # What is changed in place stays the same tensor.
    known = {id(x.inner): x for x in here}

    def wrap(x):
        if not isinstance(x, torch.Tensor):
            return x
        return known[id(x)] if id(x) in known else GpuTensor(x)

    return tree_map(wrap, out)


class _Calls(TorchDispatchMode):
    """Operators that get no GpuTensor, but may make one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _call(func, args, kwargs or {})


class _Factories(TorchFunctionMode):
    """torch.tensor(values, device=...) fills its memory without a call that could be seen.

    Args:
        name: of the device, as programs know it.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.name != GPU.type and func is not torch.device:
            args = tuple(map(self.meant, args))
            kwargs = {key: self.meant(value) for key, value in kwargs.items()}
            if func == torch.Tensor.device.__get__ and isinstance(args[0], GpuTensor):
                return torch.device(self.name, 0)
        if (
            func in (torch.tensor, torch.as_tensor)
            and torch.device(kwargs.get("device") or "cpu") == GPU
        ):
            return func(*args, **kwargs | {"device": "cpu"}).to(GPU)
        return func(*args, **kwargs)

    def meant(self, x: Any) -> Any:
        """The pretended GPU in place of a device of its name; all else as it is."""
        if isinstance(x, str):
            return GPU if x.split(":")[0] == self.name else x
        return GPU if isinstance(x, torch.device) and x.type == self.name else x


@contextmanager
def pretended_gpu(name: str = GPU.type):
    """Inside, `.to(name)` is `.to("cuda")` on such a machine."""
    with ExitStack() as stack:
        stack.enter_context(_Calls())
        stack.enter_context(_Factories(name))
        yield GPU
