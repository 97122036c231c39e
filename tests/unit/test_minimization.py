"""Minimization by Adam: a stopped one goes on to the same bits."""

import pytest
import torch
from torch import nn

from questlib import stage_cache
from questlib.errors import CheckpointError
from questlib.minimization import minimize
from questlib.stage_cache import Parts

ITERS = 12


class Stopped(Exception):
    """The process has ended."""


@pytest.fixture(autouse=True)
def _save_always(monkeypatch):
    monkeypatch.setattr(stage_cache, "SAVE_SECONDS", 0.0)


def fit(folder, stop_at=None, size=3, iters=ITERS):
    """Fit two tensors by random batches, as the part of a stage; stop before an iteration."""
    target = torch.randn(8, size, generator=torch.Generator().manual_seed(0))
    params = [nn.Parameter(torch.zeros(size)), nn.Parameter(torch.ones(1))]
    draw = torch.Generator().manual_seed(1)
    seen = []

    def loss(i):
        if i == stop_at:
            raise Stopped
        seen.append(i)
        rows = torch.randint(len(target), (4,), generator=draw)
        return (params[0] * params[1] - target[rows]).pow(2).mean()

    def compute(unfinished):
        groups = [{"params": [params[0]], "lr": 0.1}, {"params": [params[1]], "lr": 0.03}]
        minimize(loss, groups, iters, generator=draw, unfinished=unfinished)
        return len(seen)

    parts = Parts(folder, "model")
    tensors = {str(i): param.data for i, param in enumerate(params)}
    parts.fill("part", tensors, compute)
    return torch.cat([param.detach() for param in params]), seen, parts


@pytest.mark.parametrize("stop_at", range(ITERS))
def test_a_stopped_minimization_goes_on_to_the_same_bits(tmp_path, stop_at):
    whole, *_ = fit(None)
    with pytest.raises(Stopped):
        fit(tmp_path, stop_at)
    again, seen, parts = fit(tmp_path)
    assert torch.equal(again, whole)
    assert seen == list(range(stop_at, ITERS))
    assert [path.name for path in tmp_path.iterdir()] == ["part.safetensors"]
    assert (parts.seconds_before > 0) == (stop_at > 0)


def test_one_that_is_stopped_at_every_iteration_comes_to_its_end(tmp_path):
    for stop_at in range(ITERS):
        with pytest.raises(Stopped):
            fit(tmp_path, stop_at)
    again, seen, _ = fit(tmp_path)
    assert seen == [ITERS - 1]
    assert torch.equal(again, fit(None)[0])


def test_a_state_that_does_not_fit_is_an_error_that_names_the_file(tmp_path):
    with pytest.raises(Stopped):
        fit(tmp_path, 5)
    with pytest.raises(CheckpointError, match=r"part.unfinished.safetensors: wrong shape: 0"):
        fit(tmp_path, size=4)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"part.unfinished.*remove it to make it again"):
        fit(tmp_path)
