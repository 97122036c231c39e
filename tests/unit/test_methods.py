"""The other methods of the tables, presets of the same engine: each one's defining idea."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler
from torch.nn.utils import parametrize
from watched import Count, Stop, watched

from questlib import QuantConfig, convert, finetune, from_pretrained, quantize, save_pretrained
from questlib.adaround import reconstruct_time
from questlib.alignment import alignment_error
from questlib.baselines.low_rank import LowRank, attach, count_trainable, merge
from questlib.baselines.noise_correction import NoiseCorrection
from questlib.capture import capture_outputs
from questlib.diffusion.sampling import denoise
from questlib.errors import CheckpointError, ConfigError
from questlib.finetuning.stages import select_stages
from questlib.observers import init_ranges, samples_of_steps
from questlib.quantization.model import act_quantizers, freeze, quant_layers, set_mode
from questlib.quantization.preparation import prepare
from questlib.quantization.roles import TIME_ROLES
from questlib.quantization.time_path import run_time_layers


# ---- PTQ4DM: normally distributed calibration steps ----
def test_normal_calibration_steps():
    """Truncated N(400, 500): more of the less noisy steps, calib_batch in all.

    "uniform" takes every step alike.
    """
    t = torch.arange(981, 0, -20)  # a sampler's 50 steps, from noise to image
    ranges = QuantConfig.preset("ptq4dm", 8, 8, calib_batch=20_000).ranges
    counts = torch.tensor(samples_of_steps(t, ranges, torch.Generator().manual_seed(0)))
    assert counts.sum() == 20_000
    mean = (counts * t).sum() / 20_000
    z = torch.distributions.Normal(0.0, 1.0)
    a, b = torch.tensor(-0.4 / 0.5), torch.tensor(0.6 / 0.5)
    expected = 400 + 500 * (z.log_prob(a).exp() - z.log_prob(b).exp()) / (z.cdf(b) - z.cdf(a))
    assert abs(mean - expected) < 10 and counts[t < 500].sum() > 1.15 * counts[t >= 500].sum()
    uniform = samples_of_steps(t, QuantConfig(calib_batch=64).ranges, torch.Generator())
    assert uniform == [2] * 50


def test_steps_without_samples_do_not_stop_the_search(pipe, calib, fast):
    q = quantize(pipe.unet, fast("ptq4dm", 8, 8, calib_batch=2), calib)
    assert all(bool(a.calibrated) and (a.scale > 0).all() for a in act_quantizers(q))


# ---- PTQ-D: noise correction ----
def test_correction_recovers_what_was_done_to_the_noise():
    g = torch.Generator().manual_seed(0)
    eps = torch.randn(400, 3, 8, 8, generator=g)
    bias, rest = torch.tensor([0.2, -0.1, 0.05]), 0.1 * torch.randn(eps.shape, generator=g)
    eps_hat = 1.15 * eps + bias[:, None, None] + rest
    correction = NoiseCorrection(torch.tensor([1, 101, 201]), 3)
    correction.estimate(torch.tensor(110), eps_hat, eps)
    assert correction.gain[1] == pytest.approx(0.15, abs=2e-3) and not correction.gain[[0, 2]].any()
    assert torch.allclose(correction.bias[1], bias, atol=2e-3)
    assert correction.variance[1] == pytest.approx((0.1 / 1.15) ** 2, rel=0.02)
    assert (
        correction.hook(None, (None, torch.tensor(101)), {}, (eps_hat,)) is None
    )  # not yet declared estimated
    correction.calibrated.fill_(True)
    (corrected,) = correction.hook(None, (None, torch.tensor(101)), {}, (eps_hat,))
    assert (corrected - eps).square().mean() < 0.3 * (eps_hat - eps).square().mean()
    both = correction.hook(None, (None, torch.tensor([101, 1])), {}, (eps_hat[:2],))[0]
    assert torch.equal(both[0], corrected[0]) and torch.equal(both[1], eps_hat[1])


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_the_noise_factor_follows_from_how_the_prediction_enters(kind, spacing):
    """d x_{t-1} / d output and the sampler's own noise, by differences of the scheduler's steps."""
    scheduler = DDIMScheduler(
        clip_sample=False, prediction_type=kind, timestep_spacing=spacing, set_alpha_to_one=False
    )
    scheduler.set_timesteps(8)
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    for t in scheduler.timesteps[:-1]:
        correction = NoiseCorrection(t[None], 3)
        correction.variance[0] = 1e-3

        def step(output, noise, t=t):
            return scheduler.step(output, t, zero, eta=1.0, variance_noise=noise).prev_sample

        slope = (step(zero + 1, zero) - step(zero, zero)).item()
        sigma = (step(zero, zero + 1) - step(zero, zero)).item()
        expected = max(0.0, sigma**2 - slope**2 * 1e-3) ** 0.5 / sigma
        assert correction.noise_factor(scheduler, t, 1.0) == pytest.approx(expected, abs=1e-4)


def test_the_sampler_adds_less_noise_by_what_quantization_brings():
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1, set_alpha_to_one=False)
    scheduler.set_timesteps(10)
    correction = NoiseCorrection(torch.tensor([501]), 3)
    assert correction.noise_factor(scheduler, torch.tensor(501), 1.0) == 1
    g = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 1, 3, 64, 64, generator=g)
    correction.variance[0] = 0.02
    factor = correction.noise_factor(scheduler, torch.tensor(501), 1.0)
    assert 0 < factor < 1
    # With noise of this variance in eps, and the factor on the sampler's own noise, x_{t-1} has the
    # spread that the sampler alone gives it.
    draws = []
    for _ in range(200):
        noise, own = torch.randn(2, *x.shape, generator=g)
        wrong = eps + 0.02**0.5 * noise
        draws.append(
            scheduler.step(wrong, 501, x, eta=1.0, variance_noise=own * factor).prev_sample
        )
    deviation = torch.stack(draws).std(0).square().mean().sqrt()
    expected = scheduler._get_variance(501, 401).sqrt()
    assert deviation == pytest.approx(expected.item(), rel=0.01)
    correction.variance[0] = 1e6
    assert correction.noise_factor(scheduler, torch.tensor(501), 1.0) == 0
    assert correction.noise_factor(scheduler, torch.tensor(501), 0.0) == 1


def test_a_corrected_model(pipe, calib, fast, tmp_path):
    """No mean error, none correlated with the noise; in checkpoint, integer engine, sampler."""
    config = fast("ptq-d", 4, 4)
    q = quantize(pipe.unet, config, calib)
    plain = quantize(pipe.unet, config.replace(noise_correction=False), calib)
    for x, t, eps in zip(calib.x, calib.t, calib.eps, strict=True):
        error, before = ((m(x, t).sample - eps).double() for m in (q, plain))
        assert error.mean((0, 2, 3)).abs().max() < 1e-6 < before.mean((0, 2, 3)).abs().max()
        centred = (eps - eps.mean((0, 2, 3), keepdim=True)).double()
        correlated = [abs((e * centred).sum() / centred.square().sum()) for e in (error, before)]
        assert correlated[0] < 1e-5 < correlated[1]
    save_pretrained(q, tmp_path)
    for other in (from_pretrained(tmp_path), copy.deepcopy(q)):
        assert torch.equal(other(calib.x[0], calib.t[0]).sample, q(calib.x[0], calib.t[0]).sample)
    integer, x = convert(q, "cpu"), calib.x[1]
    assert (integer(x, calib.t[1]).sample - q(x, calib.t[1]).sample).abs().max() < 0.1 * q(
        x, calib.t[1]
    ).sample.abs().max()
    seen = []
    q.quest_correction.noise_factor = lambda *args: seen.append(args) or 1.0
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    with_factor = denoise(q, pipe.scheduler, x[:2], 5, eta=1.0, generators=generators)
    assert len(seen) == 5
    q.quest_correction.noise_factor = lambda *args: 0.0
    assert not torch.equal(
        denoise(q, pipe.scheduler, x[:2], 5, eta=1.0, generators=generators), with_factor
    )
    plain.quest_config = config
    plain.quest_correction = NoiseCorrection(plain.quest_steps.timesteps, 3)
    save_pretrained(plain, tmp_path)
    with pytest.raises(CheckpointError, match="never calibrated: quest_correction"):
        from_pretrained(tmp_path)


def test_correction_and_finetuning_exclude_each_other():
    with pytest.raises(
        ConfigError, match="noise_correction: expected post-training quantization alone"
    ):
        QuantConfig.preset("quest", noise_correction=True)


# ---- EfficientDM: low-rank updates, merged before quantization ----
def test_low_rank_updates_start_at_nothing_and_are_merged():
    g = torch.Generator().manual_seed(0)
    w = torch.randn(6, 4, 3, 3, generator=g)
    update = LowRank(w, 2, 0.5, g)
    assert torch.equal(update(w), w)
    torch.nn.init.normal_(update.b, generator=g)
    change = (update(w) - w).flatten(1)
    assert torch.linalg.matrix_rank(change) == 2
    assert torch.allclose(change, 0.5 * update.b @ update.a, atol=1e-6)


def test_efficientdm_trains_low_rank_updates_of_every_layer_and_scales_of_every_step(
    pipe, calib, fast, tmp_path
):
    config = fast("efficientdm", 4, 4, lora_rank=2)
    q = quantize(pipe.unet, config, calib)
    assert q.quest_steps.num_groups == len(calib.t)
    before = {n: m.weight.clone() for n, m in quant_layers(q).items()}
    kinds = {n: type(m) for n, m in quant_layers(q).items()}
    log = finetune(q, pipe.unet, calib, config)
    (stage,) = select_stages(q, config)
    assert set(stage.layers) == set(quant_layers(q)) and not stage.local
    assert log["trained_weights"] == sum(count_trainable(m, 2) for m in quant_layers(q).values())
    for name, layer in quant_layers(q).items():
        assert type(layer) is kinds[name] and not parametrize.is_parametrized(layer)
        change = (layer.weight - before[name]).flatten(1).double()
        assert change.any(), name
        values = torch.linalg.svdvals(change)
        assert values[2] <= 1e-3 * values[0], name
    save_pretrained(q, tmp_path)
    assert torch.equal(
        from_pretrained(tmp_path)(calib.x[0], calib.t[0]).sample, q(calib.x[0], calib.t[0]).sample
    )


def test_efficientdm_goes_on_bit_for_bit(pipe, calib, fast, tmp_path):
    config = fast("efficientdm", 4, 4, lora_rank=2)
    whole = quantize(pipe.unet, config, calib)
    finetune(whole, pipe.unet, calib, config)

    def run(count: Count) -> torch.nn.Module:
        unet = quantize(pipe.unet, config, calib)
        data = watched(calib, count)
        finetune(unet, pipe.unet, data, config, state_path=tmp_path / "state", save_every=2)
        return unet

    with pytest.raises(Stop):
        run(Count(stop_at=2))
    resumed = run(Count()).state_dict()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed[name]), name


def test_updates_count_in_quantization_steps(pipe, calib, fast):
    q = quantize(pipe.unet, fast("efficientdm", 4, 4), calib)
    layers = list(quant_layers(q).values())[:3]
    attach(layers, 2, seed=0)
    assert all(
        x.parametrizations.weight[0].unit == x.weight_quantizer.scale.mean().item() for x in layers
    )
    merge(layers)
    assert not any(map(parametrize.is_parametrized, layers))


# ---- TFMQ-DM: the time path as one block, with a range for each step ----
def test_time_features_are_reconstructed_together(pipe, calib, fast):
    config = fast("tfmq-dm", 3, 8, adaround_iters=150, adaround_lr=1e-2)
    names = [n for n, m in pipe.unet.named_modules() if n.endswith("time_emb_proj")]

    def error(q):
        set_mode(q, acts=False)
        with (
            torch.no_grad(),
            capture_outputs(q, names) as own,
            capture_outputs(pipe.unet, names) as target,
        ):
            run_time_layers(q, calib.t)
            run_time_layers(pipe.unet, calib.t)
        return sum(
            ((own[n] - target[n]).square().mean() / target[n].square().mean()).item() for n in names
        )

    q = prepare(pipe.unet, config, calib.t)
    init_ranges(q, calib, config)
    nearest = {n: m.weight.clone() for n, m in quant_layers(q).items()}
    before = error(freeze(q))
    set_mode(q, weights=True, acts=False)
    reconstruct_time(q, pipe.unet, calib, config)
    assert error(q) < 0.7 * before
    changed = {m.role for n, m in quant_layers(q).items() if not torch.equal(m.weight, nearest[n])}
    assert changed == set(TIME_ROLES)
    assert all(m.weight_quantizer.alpha is None for m in quant_layers(q).values())


def test_ranges_of_time_layers_follow_the_step(pipe, calib, fast):
    q = quantize(pipe.unet, fast("tfmq-dm", 4, 8), calib)
    layers = quant_layers(q).values()
    assert q.quest_steps.num_groups == 1 and {
        m.role for m in layers if m.input_quantizer.token
    } == set(TIME_ROLES)
    assert all((m.input_quantizer.ratio == 1).all() for m in layers)
    convert(q, "cpu")(calib.x[0], calib.t[0])  # has an integer form


def test_temporal_reconstruction_does_not_share_its_weights_with_others():
    keys = {QuantConfig.preset(n, 4, 8).adaround_key() for n in ("q-diffusion", "tfmq-dm", "ptq-d")}
    assert len(keys) == 2  # Q-Diffusion and PTQ-D round alike


# ---- full finetuning ----
def test_full_finetuning_trains_every_weight(pipe, calib, fast):
    config = fast("full-finetune", 4, 8, lr_weight=1e-3)
    q = quantize(pipe.unet, config, calib)
    before = {n: m.weight.clone() for n, m in quant_layers(q).items()}
    log = finetune(q, pipe.unet, calib, config)
    assert log["trained_fraction"] == 1
    assert all((m.weight != before[n]).any() for n, m in quant_layers(q).items())


def test_an_error_beside_small_half_precision_targets_is_a_number():
    """A square of a small output, and the smallest power, are zero in float16."""
    outputs = {"a": torch.full((2, 3), 1e-4)}
    for value in (0.0, 1e-4):
        targets = {"a": torch.full((2, 3), value, dtype=torch.float16)}
        assert torch.isfinite(alignment_error(outputs, targets, relative=True))
