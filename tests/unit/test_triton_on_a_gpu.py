"""The user's way to the Triton engine on a GPU: a pretended one, and Triton's interpreter.

CUDA graphs are functions that run again. What is left for a real GPU is what the kernels compile
to, streams, and the graphs themselves.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from diffusers import DDIMScheduler, LDMPipeline, UNet2DModel
from pretended_gpu import GpuTensor, pretended_gpu
from test_triton_graphs import replays  # noqa: F401
from tiny_pipelines import autoencoder

import questlib
from questlib import QuantConfig, calibrate, convert, from_pretrained, quantize, save_pretrained
from questlib.errors import EngineError
from questlib.integer.triton import runtime
from questlib.integer.triton.fused import FusedResnetBlock
from questlib.integer.triton.graphs import Graphs
from reproduce.evaluation import drawing

pytestmark = pytest.mark.skipif(
    not runtime.INTERPRET, reason="needs triton, imported with TRITON_INTERPRET=1"
)
ROOT = Path(__file__).resolve().parents[2]
YOUR_OWN = "20_quantize_your_own_pipeline.ipynb"


def tiny() -> UNet2DModel:
    """The interpreter takes a second for a few layers."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=4,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(16,),
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    return unet.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A quantized UNet, saved where there is no GPU."""
    pipe = SimpleNamespace(unet=tiny(), scheduler=DDIMScheduler(clip_sample=False))
    calib = calibrate(pipe, 4, 2, seed=0)
    config = QuantConfig.preset("quest", 4, 8, adaround=False, calib_batch=4)
    folder = tmp_path_factory.mktemp("unet")
    save_pretrained(quantize(pipe.unet, config, calib), folder)
    return folder


@pytest.fixture
def on_gpu(monkeypatch, replays):  # noqa: F811
    """This machine has a GPU; the processes of a launch are one, which is there already."""
    PartialState(cpu=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pretended_gpu("cuda"):
        yield replays


def test_the_pretended_gpu_is_called_cuda(on_gpu):
    x = torch.ones(3, device="cuda:0")
    assert isinstance(x, GpuTensor) and x.device == torch.device("cuda:0")
    assert isinstance(torch.zeros_like(x), GpuTensor) and torch.zeros(2).device.type == "cpu"
    layer = torch.nn.Linear(3, 2).to("cuda")
    assert layer(x).device.type == "cuda" and layer(x).cpu().device.type == "cpu"
    with pytest.raises(RuntimeError, match="same device"):
        x + torch.ones(3)


@torch.no_grad()
def test_the_first_call_of_a_user(saved, on_gpu):
    """What from_pretrained chooses, and that the first call computes on the GPU, as a graph."""
    unet = from_pretrained(saved, engine="triton")
    assert unet.quest_engine == "triton" and unet.dtype == torch.float16
    assert unet.device == torch.device("cuda:0") and isinstance(unet.forward, Graphs)
    assert any(isinstance(m, FusedResnetBlock) for m in unet.modules()) and unet.quest_fused
    assert all(isinstance(value, GpuTensor) for value in unet.state_dict().values())
    assert {row.engine for row in questlib.engine_report(unet)} == {"triton"}

    x = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0)).half()
    t = unet.quest_steps.timesteps[1].cpu()
    assert on_gpu == []
    y = unet(x.to("cuda"), t.to("cuda")).sample
    assert isinstance(y, GpuTensor) and y.dtype == torch.float16 and on_gpu == [1]
    here = convert(from_pretrained(saved), "triton", dtype=torch.float16, fuse=True)
    assert torch.equal(here(x, t).sample, y.cpu())


@torch.no_grad()
def test_a_user_chooses_otherwise(saved, on_gpu):
    """Engine "auto" finds the GPU; each choice can be another, and `convert` makes no choice."""
    unet = from_pretrained(saved, engine="auto", dtype=torch.float32, fuse=False, graphs=False)
    assert unet.quest_engine == "triton" and unet.dtype == torch.float32
    assert unet.device.type == "cuda" and not isinstance(unet.forward, Graphs)
    assert not any(isinstance(m, FusedResnetBlock) for m in unet.modules())

    there = from_pretrained(saved).to("cuda")
    unet = convert(there, "auto")
    assert (unet.quest_engine, unet.dtype, unet.quest_fused) == ("triton", torch.float32, False)
    assert unet.device.type == "cuda" and unet is not there
    with pytest.raises(EngineError, match="engine cpu needs the model on cpu, found cuda:0"):
        convert(there, "cpu")
    assert from_pretrained(saved, engine="cpu").device.type == "cpu"


def cell_with(name: str, text: str) -> str:
    """The one cell of a notebook that has this text."""
    cells = json.loads((ROOT / "notebooks" / name).read_text())["cells"]
    found = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    (code,) = (source for source in found if text in source)
    return code


def test_no_other_notebook_chooses_a_device():
    """The tour and the integer engine run on the CPU, as their tables were made."""
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        if path.name != YOUR_OWN:
            code = "".join(
                "".join(cell["source"])
                for cell in json.loads(path.read_text())["cells"]
                if cell["cell_type"] == "code"
            )
            assert "cuda" not in code and "device" not in code, path.name


@pytest.mark.parametrize("engine", ["auto", "cpu"])
def test_your_own_pipeline_is_quantized_where_the_notebook_says(on_gpu, tmp_path, engine):
    """The cell that chooses the device, from the pipeline to images."""
    pipe = LDMPipeline(vqvae=autoencoder(), unet=tiny(), scheduler=DDIMScheduler(clip_sample=False))
    loaded = []
    names = dict(
        torch=torch,
        questlib=questlib,
        QuantConfig=QuantConfig,
        drawing=drawing,
        load_pipeline=lambda name: loaded.append(name) or pipe,
        MODEL="mine",
        ENGINE=engine,
        STEPS=1,
        GUIDANCE=1.0,
        PROMPTS=None,
        LABELS=None,
        TRAJECTORIES=2,
        IMAGES=1,
        WEIGHT_BITS=4,
        ACT_BITS=8,
        budget=dict(adaround=False, act_range="minmax", calib_batch=2, tla_iters=0, cma_iters=0),
        folder=tmp_path,
    )
    exec(cell_with(YOUR_OWN, ".to(device)"), names)
    wanted = {"auto": ("cuda", "triton"), "cpu": ("cpu", "cpu")}[engine]
    unet = names["pipe"].unet
    assert loaded == ["mine"] and (unet.device.type, unet.quest_engine) == wanted
    assert names["unet"].device.type == names["pipe"].vqvae.device.type == wanted[0]
    assert names["images"].shape == (1, 3, 8, 8) and names["images"].device.type == "cpu"
    assert len(on_gpu) == (engine == "auto") and isinstance(unet.forward, Graphs) == bool(on_gpu)
