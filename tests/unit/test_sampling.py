import copy
from types import SimpleNamespace

import pytest
import torch
from diffusers import LDMPipeline, VQModel

from questlib import quantize
from questlib.errors import ConfigError, QuestError
from reproduce.evaluation.drawing import sample


@pytest.fixture(scope="module")
def ldm(pipe):
    torch.manual_seed(1)
    vae = VQModel(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        num_vq_embeddings=16,
        sample_size=16,
    )
    return LDMPipeline(
        unet=pipe.unet, scheduler=pipe.scheduler, vqvae=vae.eval().requires_grad_(False)
    )


def draw(ldm, n=5, **kw):
    return sample(ldm, n, num_inference_steps=2, progress=False, **kw)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_sample_depends_on_seed_and_index_alone(ldm, eta):
    whole, parts = draw(ldm, eta=eta, batch_size=5), draw(ldm, eta=eta, batch_size=2)
    assert whole.images.shape == (5, 3, 16, 16) and whole.images.dtype == torch.uint8
    assert torch.allclose(whole.latents, parts.latents, atol=1e-5)
    assert torch.equal(draw(ldm, eta=eta).latents, draw(ldm, eta=eta).latents)
    assert not torch.allclose(draw(ldm, eta=eta, seed=1).latents, whole.latents, atol=1e-2)


def test_eta_matters(ldm):
    assert not torch.allclose(draw(ldm, eta=1.0).latents, draw(ldm).latents, atol=1e-2)


def test_stopped_and_started_again_nothing_is_lost_or_doubled(ldm, tmp_path):
    """A UNet that is stopped in the third batch; the second call draws only what is missing."""

    class Stops(torch.nn.Module):
        """The pipeline's UNet, whose `limit`-th call is interrupted."""

        def __init__(self, limit: int) -> None:
            super().__init__()
            self.unet, self.config, self.device = ldm.unet, ldm.unet.config, ldm.unet.device
            self.dtype = ldm.unet.dtype
            self.calls, self.limit = [], limit

        def forward(self, x, t):
            self.calls.append(len(x))
            if len(self.calls) == self.limit:
                raise KeyboardInterrupt
            return self.unet(x, t)

    stopped = Stops(limit=6)  # two steps a batch: the second step of the third batch
    with pytest.raises(KeyboardInterrupt):
        draw(ldm, batch_size=2, out_dir=tmp_path, unet=stopped)
    finished = {p.name for p in tmp_path.glob("*.safetensors")}
    assert finished == {"000000-2.safetensors", "000002-2.safetensors"}
    again = Stops(limit=0)
    resumed = draw(ldm, batch_size=2, out_dir=tmp_path, unet=again)
    assert again.calls == [1, 1]
    assert torch.equal(resumed.latents, draw(ldm, batch_size=2).latents)


def test_shards_of_another_run_or_model_are_refused(ldm, calib, fast, tmp_path):
    draw(ldm, batch_size=5, out_dir=tmp_path)
    with pytest.raises(QuestError, match="belongs to another run"):
        draw(ldm, batch_size=5, out_dir=tmp_path, seed=1)
    with pytest.raises(QuestError, match="belongs to another run"):
        draw(ldm, batch_size=5, out_dir=tmp_path, unet=quantize(ldm.unet, fast("minmax"), calib))
    other = copy.deepcopy(ldm)
    other.vqvae.decoder.conv_out.bias.data += 0.1
    with pytest.raises(QuestError, match="belongs to another run"):
        draw(other, batch_size=5, out_dir=tmp_path)
    file = next(tmp_path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(QuestError, match="damaged"):
        draw(ldm, batch_size=5, out_dir=tmp_path)


def test_bad_counts_and_infinite_latents(ldm):
    with pytest.raises(ConfigError, match="must be >= 1"):
        draw(ldm, 0)

    class Broken(torch.nn.Module):
        config, device, dtype = ldm.unet.config, ldm.unet.device, ldm.unet.dtype

        def forward(self, x, t):
            return SimpleNamespace(sample=x * float("nan"))

    with pytest.raises(QuestError, match="samples 0..4 are not finite"):
        draw(ldm, unet=Broken())


def test_another_step_count_uses_the_nearest_group(ldm, calib, fast):
    """Calibrated with 5 steps, sampled with 7: every step finds its group by its timestep."""
    q = quantize(ldm.unet, fast("minmax", 8, 8, step_groups=5), calib)
    groups = []
    q.register_forward_pre_hook(lambda m, a: groups.append(m.quest_steps.current))
    images = sample(ldm, 2, num_inference_steps=7, unet=q, progress=False).images
    assert (
        len(images) == 2
        and len(groups) == 7
        and groups == sorted(groups)
        and set(groups) == {0, 1, 2, 3, 4}
    )
