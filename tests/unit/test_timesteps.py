import copy
import warnings

import pytest
import torch

from questlib.errors import ConfigError, TimestepWarning
from questlib.quantization.step_groups import StepGroups, contiguous_groups


def test_groups_are_contiguous_and_balanced():
    assert contiguous_groups(20, 4).tolist() == [i // 5 for i in range(20)]
    assert contiguous_groups(5, 5).tolist() == [0, 1, 2, 3, 4]
    assert contiguous_groups(7, 2).bincount().tolist() == [4, 3]
    with pytest.raises(ConfigError, match="expected 1..5"):
        contiguous_groups(5, 6)


def test_group_follows_from_the_timestep_whatever_the_number_of_steps():
    steps = StepGroups(torch.tensor([951, 701, 451, 201]), contiguous_groups(4, 4))
    assert [steps.lookup(torch.tensor(t)) for t in (951, 701, 451, 201)] == [0, 1, 2, 3]
    assert steps.lookup(torch.tensor(560)) == 2 and steps.lookup(torch.tensor(600)) == 1
    assert steps.lookup(torch.tensor([951, 201])).tolist() == [0, 3]
    assert steps.lookup(torch.tensor([951, 940])) == 0


def test_far_timesteps_warn_once_and_are_named():
    steps = StepGroups(torch.tensor([300, 200, 100]), contiguous_groups(3, 3))
    with pytest.warns(
        TimestepWarning, match=r"timesteps \[900\] are farther than 100.*\(100..300\)"
    ):
        assert steps.lookup(torch.tensor(900)) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps.lookup(torch.tensor(900))
        steps.lookup(torch.tensor(350))


def test_a_call_selects_its_groups_and_timestep():
    steps = StepGroups(torch.tensor([300, 200, 100]), contiguous_groups(3, 3))
    steps.hook(torch.nn.Identity(), (torch.zeros(2), 200), {})
    assert (steps.current, steps.timestep) == (1, 200)
    steps.hook(torch.nn.Identity(), (torch.zeros(2),), {"timestep": torch.tensor([300, 100])})
    assert steps.current.tolist() == [0, 2] and steps.timestep is None
    steps.select(torch.tensor([300, 300]))
    assert (steps.current, steps.timestep) == (0, 300)
    steps.select_group(2)
    assert (steps.current, steps.timestep) == (2, None)


def test_groups_are_selected_by_methods_alone():
    steps = StepGroups(torch.tensor([300, 100]), contiguous_groups(2, 2))
    with pytest.raises(AttributeError):
        steps.current = 1
    with pytest.raises(AttributeError):
        steps.timestep = 100


def test_copies_have_their_own_state():
    steps = StepGroups(torch.tensor([300, 100]), contiguous_groups(2, 2))
    other = copy.deepcopy(steps)
    other.select_group(1)
    assert steps.current == 0
