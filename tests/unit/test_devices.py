"""A model on a pretended GPU, from calibration to samples. No GPU is needed."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from pretended_gpu import GPU, GpuTensor, pretended_gpu
from tiny_pipelines import class_conditional

from questlib import calibrate, finetune, from_pretrained, quantize, save_pretrained
from reproduce.evaluation.drawing import sample


def test_what_a_gpu_refuses_is_refused_here():
    with pretended_gpu():
        x, y = torch.ones(3).to(GPU), torch.ones(3)
        assert (
            x.device == GPU
            and isinstance(x + 1, GpuTensor)
            and (x + torch.tensor(2.0)).sum().item() == 9
        )
        with pytest.raises(RuntimeError, match="same device"):
            x + y
        assert torch.equal(x.cpu(), y) and x[torch.tensor([0, 2])].tolist() == [1.0, 1.0]
        layer = torch.nn.Linear(3, 2).to(GPU)
        layer(x).sum().backward()
        assert isinstance(layer.weight.grad, GpuTensor)


@pytest.mark.parametrize(
    ("preset", "bits", "guided", "overrides"),
    [  # the search for ranges is slow here: once is enough
        ("quest", (4, 4), False, {}),
        ("quest-release", (4, 8), False, dict(save_memory=True)),
        ("ptq-d", (4, 8), True, dict(act_range="minmax")),
        ("efficientdm", (4, 4), False, dict(act_range="minmax")),
    ],
)
def test_the_whole_way_on_a_gpu(pipe, fast, tmp_path, preset, bits, guided, overrides):
    own = class_conditional() if guided else pipe
    how = {"num_inference_steps": 2} | ({"guidance_scale": 2.0} if guided else {})
    config = fast(preset, *bits, **overrides)
    calib = calibrate(own, 4, seed=0, **how)
    with pretended_gpu():
        there = SimpleNamespace(
            **{
                k: copy.deepcopy(v).to(GPU) if isinstance(v, torch.nn.Module) else v
                for k, v in vars(own).items()
            }
        )
        moved = calibrate(there, 4, seed=0, **how)
        torch.testing.assert_close(
            moved.eps, calib.eps, rtol=1e-3, atol=1e-3
        )  # sums in another order
        unet = quantize(there.unet, config, moved)
        finetune(unet, there.unet, moved, config)
        save_pretrained(unet, tmp_path)
        drawn = sample(there, 2, unet=from_pretrained(tmp_path).to(GPU), progress=False, **how)
    assert drawn.images.device.type == "cpu" and drawn.latents.isfinite().all()
    assert all(isinstance(value, GpuTensor) for value in unet.state_dict().values())
