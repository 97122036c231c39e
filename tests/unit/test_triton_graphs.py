"""Steps as CUDA graphs, in the interpreter: a graph is a function that runs again on its inputs."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from test_triton_fused import conditional, error, quantized
from torch import nn

from questlib import convert
from questlib.errors import EngineError
from questlib.integer.engines import ENGINES, fastest
from questlib.integer.time_table import TimeTable
from questlib.integer.triton import graphs, runtime

pytestmark = pytest.mark.skipif(
    not runtime.INTERPRET, reason="needs triton, imported with TRITON_INTERPRET=1"
)


@contextmanager
def capture():
    """What runs inside is captured, as far as the code can ask."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        yield


@pytest.fixture
def replays(monkeypatch) -> list[int]:
    """Graphs are functions; the number of times that each one was launched again."""
    counts: list[int] = []

    def captured(run):
        with capture():
            out = run()
        counts.append(0)
        own = len(counts) - 1

        def replay():
            counts[own] += 1
            out.copy_(run())

        return replay, out

    monkeypatch.setattr(graphs, "captured", captured)
    return counts


def step(unet: nn.Module, x: torch.Tensor, t: int, text: torch.Tensor) -> torch.Tensor:
    return unet(x, t, encoder_hidden_states=text).sample


@torch.no_grad()
def test_a_graph_for_each_step_group_and_shape(replays):
    fake = quantized(conditional(False), 8)
    assert [fake.quest_steps.lookup(torch.tensor(t)) for t in (0, 1, 3)] == [1, 1, 0]
    plain = convert(fake, "triton", fuse=True)
    unet = convert(fake, "triton", fuse=True, graphs=True)
    text = torch.randn(1, 5, 12)
    x = torch.randn(1, 4, 4, 4)
    first = step(unet, x, 0, text)
    kept = first.clone()
    text.mul_(-1)
    found = step(unet, x + 1, 1, text)
    assert replays == [2]
    assert error(found, step(plain, x + 1, 1, text)) < 1e-9
    assert torch.equal(first, kept)  # an output is the caller's own
    # Keys and values that a real graph reads are those of the new context.
    (graph,) = unet.forward.graphs.values()
    assert graph.contexts
    for attn, held in graph.contexts:
        key, value = attn.processor.of_context(attn, text)
        assert torch.equal(held.made[0][..., :16], key[..., :16])
        assert torch.equal(held.made[1][..., :5], value[..., :5])
    (other,) = unet(x[:, :, :2], 3, text, return_dict=False)
    assert other.shape == (1, 4, 2, 4) and replays == [2, 1]


def tables(unet: nn.Module) -> list[TimeTable]:
    return [m for m in unet.modules() if isinstance(m, TimeTable)]


@torch.no_grad()
def test_rows_of_the_timestep_are_there_before_a_graph_is_captured(replays):
    unet = convert(quantized(conditional(False), 8), "triton", fuse=True, graphs=True)
    x, text = torch.randn(1, 4, 4, 4), torch.randn(1, 5, 12)
    assert tables(unet) and not any(table.rows for table in tables(unet))
    step(unet, x, 0, text)
    first = [table.rows[0] for table in tables(unet)]
    (graph,) = unet.forward.graphs.values()
    # A graph reads copies of its own, in which the rows of later timesteps come.
    assert not {row.data_ptr() for row in graph.rows} & {row.data_ptr() for row in first}
    step(unet, x, 1, text)
    assert replays == [2] and all({0, 1} == set(table.rows) for table in tables(unet))
    assert all(table.rows[0] is row for table, row in zip(tables(unet), first, strict=True))


@torch.no_grad()
def test_a_graph_of_ones_own_needs_a_call_before(replays):
    """A row that is made during a capture would be overwritten with the graph's memory."""
    unet = convert(quantized(conditional(False), 8), "triton", fuse=True)
    x, text = torch.randn(1, 4, 4, 4), torch.randn(1, 5, 12)
    with capture(), pytest.raises(EngineError, match="timestep 1: expected a call .* before"):
        step(unet, x, 1, text)
    assert not any(table.rows for table in tables(unet))
    expected = step(unet, x, 1, text)
    with capture():
        assert torch.equal(step(unet, x, 1, text), expected)
        with pytest.raises(EngineError, match="timestep 0"):
            step(unet, x, 0, text)


@torch.no_grad()
def test_copies_and_moves_capture_anew(replays):
    unet = convert(quantized(conditional(False), 8), "triton", fuse=True, graphs=True)
    x, text = torch.randn(1, 4, 4, 4), torch.randn(1, 5, 12)
    expected = step(unet, x, 1, text)
    other = copy.deepcopy(unet)
    assert other.forward.unet is other and not other.forward.graphs
    nn.Module.to(unet, torch.float64).to(torch.float32)
    assert torch.equal(step(unet, x, 1, text), expected) and replays == [1, 1]


def test_an_engine_is_fastest_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert fastest(ENGINES["triton"]) == ("cuda", torch.float16, True, True)
    assert fastest(ENGINES["cpu"]) == ("cpu", None, False, False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fastest(ENGINES["triton"]) == ("cpu", None, False, False)
