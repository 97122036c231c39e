import pytest
import torch
from torch import nn

from questlib.capture import (
    StopForward,
    capture_calls,
    capture_outputs,
    execution_order,
    hooks,
)


class Net(nn.Module):
    """b runs before a; c never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 4)
        self.b = nn.Linear(3, 3)
        self.c = nn.Linear(3, 3)
        self.ran = 0

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        y = self.a(self.b(x) * scale)
        self.ran += 1
        return y


class Block(nn.Module):
    def forward(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        return x * scale


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def hooked(net: nn.Module) -> bool:
    return any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_hooks_see_arguments_and_keywords_and_are_removed(net):
    seen = []
    x = torch.ones(2, 3)
    before = lambda module, args, kwargs: seen.append((module, args, kwargs))  # noqa: E731
    after = lambda module, args, kwargs, output: seen.append((kwargs, output))  # noqa: E731
    with hooks(net, {"": before}, "input"), hooks(net, {"": after}):
        y = net(x, scale=2.0)
    assert seen[0] == (net, (x,), {"scale": 2.0})
    assert seen[1][0] == {"scale": 2.0} and seen[1][1] is y
    assert not hooked(net)


def test_hooks_are_removed_after_an_error_and_other_errors_pass(net):
    with pytest.raises(ZeroDivisionError), hooks(net, {"a": lambda *given: 1 / 0}):
        net(torch.ones(1, 3))
    with pytest.raises(AttributeError), hooks(net, {"a": print, "missing": print}):
        pass
    assert not hooked(net)


def test_a_hook_can_stop_the_forward_pass(net):
    def stop(*given) -> None:
        raise StopForward

    with hooks(net, {"b": stop}):
        net(torch.ones(1, 3))
        raise AssertionError("the block goes on")
    assert net.ran == 0 and not hooked(net)


def test_outputs_are_the_last_ones_and_carry_gradients(net):
    x = torch.randn(2, 3)
    with capture_outputs(net, ["b", "a"]) as outputs:
        net(torch.zeros(2, 3))
        y = net(x)
    assert outputs["a"] is y and torch.equal(outputs["b"], net.b(x))
    outputs["b"].sum().backward()
    assert net.b.weight.grad is not None


def test_outputs_stop_when_all_are_there(net):
    with capture_outputs(net, ["a", "b"], stop=True) as outputs:
        net(torch.ones(1, 3))
    assert set(outputs) == {"a", "b"} and net.ran == 0


def test_calls_of_a_block_rerun_to_the_same_output():
    net = nn.Sequential(nn.Linear(3, 3), Block())
    net.forward = lambda x: net[1](net[0](x), scale=2.0)
    batches = [torch.randn(2, 3), torch.randn(1, 3)]
    calls = capture_calls(net, "1", [lambda model, x=x: model(x) for x in batches])
    assert [len(call.args[0]) for call in calls] == [2, 1]
    for call in calls:
        assert call.kwargs == {"scale": 2.0} and not call.output.requires_grad
        assert torch.equal(net[1](*call.args, **call.kwargs), call.output)
    assert not hooked(net)


def test_order_of_execution_leaves_out_what_does_not_run(net):
    assert execution_order(net, ["a", "b", "c"], lambda m: m(torch.ones(1, 3))) == ["b", "a"]
    assert not hooked(net)
