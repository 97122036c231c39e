"""Guidance, labels and prompts, through sampling, calibration and finetuning."""

import importlib
from types import SimpleNamespace

import pytest
import tiny_pipelines as tiny
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from questlib import Calibration, calibrate, finetune, quantize, save_pretrained
from questlib.adaround import blocks
from questlib.calibration import TimeCalls
from questlib.capture import capture_outputs
from questlib.diffusion.conditioning import Condition, Conditioning
from questlib.diffusion.drawing import Drawing
from questlib.diffusion.sampling import choose_scheduler, denoise
from questlib.diffusion.schedulers import make_scheduler
from questlib.errors import ConfigError
from questlib.finetuning.losses import stage_losses
from questlib.finetuning.stages import select_parameters, select_stages
from questlib.quantization.model import act_quantizers, quant_layers
from questlib.quantization.time_path import run_time_layers
from reproduce.evaluation.drawing import sample
from reproduce.models.pipelines import ClassConditionalPipeline, ClassEmbedder

PLAIN = dict(
    adaround=False, act_granularity="tensor", act_range="minmax", weight_range="minmax"
)  # quick to quantize


@pytest.fixture(scope="module")
def classes():
    return tiny.class_conditional()


@pytest.fixture(scope="module")
def guided(classes):
    return calibrate(classes, 6, 3, guidance_scale=3.0, seed=1, batch_size=4)


@pytest.fixture(scope="module")
def prompts_pipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    words = [
        "<|startoftext|>",
        "<|endoftext|>",
        "c",
        "a",
        "t",
        "t</w>",
        "a</w>",
        "d",
        "o",
        "g</w>",
        "ca",
        "cat</w>",
    ]
    (folder / "vocab.json").write_text(
        "{" + ", ".join(f'"{w}": {i}' for i, w in enumerate(words)) + "}"
    )
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=12,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    vae = AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=3, sample_size=8
    )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text).eval(),
        unet=tiny.conditional_unet(),
        scheduler=PNDMScheduler(skip_prk_steps=True, steps_offset=1),
        tokenizer=CLIPTokenizer(
            str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_guidance_is_one_batched_call_of_both_halves(classes):
    calls = []

    def unet(x, t, encoder_hidden_states):
        calls.append(len(x))
        return classes.unet(x, t, encoder_hidden_states=encoder_hidden_states)

    x, condition = torch.randn(3, 3, 8, 8), Conditioning(classes, guidance_scale=2.5).at(range(3))
    eps = condition.predict(unet, x, torch.tensor(7))
    eps_c = classes.unet(
        x, 7, encoder_hidden_states=classes.class_embedder(torch.tensor([0, 1, 2]))
    ).sample
    eps_u = classes.unet(
        x, 7, encoder_hidden_states=classes.class_embedder(torch.tensor([4, 4, 4]))
    ).sample
    assert calls == [6]
    assert torch.allclose(eps, eps_u + 2.5 * (eps_c - eps_u), atol=1e-5)
    alone = Conditioning(classes).at(range(3))  # guidance scale 1: the class alone, one half
    assert torch.equal(alone.predict(unet, x, torch.tensor(7)), eps_c) and calls == [6, 3]
    assert not torch.allclose(eps_c, eps_u, atol=1e-3)


def test_labels_follow_from_the_index_and_are_balanced(classes):
    table = classes.class_embedder.embedding.weight
    assert torch.equal(Conditioning(classes).at(range(3, 7)).context[:, 0], table[[3, 0, 1, 2]])
    assert torch.equal(
        Conditioning(classes, labels=[2, 1]).at([0, 1, 2]).context[:, 0], table[[2, 1, 2]]
    )
    few = [tuple(Conditioning(classes, shuffle=seed).choices) for seed in range(20)]
    assert (
        all(sorted(order) == [0, 1, 2, 3] for order in few) and len(set(few)) > 3
    )  # not always the first classes


def test_a_sample_depends_on_its_index_alone_under_guidance(classes):
    def draw(**kw):
        return sample(
            classes, 5, num_inference_steps=2, guidance_scale=3.0, progress=False, **kw
        ).latents

    assert torch.allclose(draw(batch_size=5), draw(batch_size=2), atol=1e-5)
    assert not torch.allclose(draw(), draw(labels=[1]), atol=1e-3)
    assert not torch.allclose(draw(), draw(seed=1), atol=1e-2)


def test_prompts_equal_the_stable_diffusion_pipeline(prompts_pipe):
    """The same latents through diffusers' own loop: PLMS, guidance 7.5.

    The empty prompt is the unconditional context.
    """
    x, texts = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), ["cat", "dog a"]
    condition = Conditioning(prompts_pipe, guidance_scale=7.5, prompts=texts).at(range(2))
    ours = denoise(prompts_pipe.unet, prompts_pipe.scheduler, x, 4, condition=condition)
    theirs = prompts_pipe(
        texts, num_inference_steps=4, guidance_scale=7.5, latents=x, output_type="latent"
    ).images
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    assert sample(
        prompts_pipe, 3, num_inference_steps=2, prompts=texts, progress=False
    ).images.shape == (3, 3, 8, 8)


def test_labels_equal_the_class_conditional_pipeline(classes):
    """The same latents through the class-conditional pipeline: DDIM, guidance 3.

    The null class is the unconditional context.
    """
    torch.manual_seed(0)
    parts = {"unet": classes.unet, "vae": classes.vqvae, "scheduler": classes.scheduler}
    pipe = ClassConditionalPipeline(class_embedder=ClassEmbedder(4, 12), **parts)
    pipe.set_progress_bar_config(disable=True)
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    condition = Conditioning(pipe, guidance_scale=3.0, labels=[2, 0]).at(range(3))
    ours = denoise(pipe.unet, pipe.scheduler, x, 4, condition=condition)
    theirs = pipe(
        [2, 0, 2], guidance_scale=3.0, num_inference_steps=4, latents=x, output_type="latent"
    ).images
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_calibration_holds_what_the_unet_received(classes, guided):
    """(x_t, t, context) belong together, in both halves; every class occurs equally often."""
    assert guided.x.shape == guided.eps.shape == (3, 12, 3, 8, 8) and guided.context.shape == (
        12,
        1,
        12,
    )
    assert torch.equal(guided.x[:, :6], guided.x[:, 6:])  # both halves see the same x_t
    table = classes.class_embedder.embedding.weight
    assert torch.equal(guided.context[:6, 0], table[[4] * 6])
    labels = [int((table == row).all(1).nonzero()) for row in guided.context[6:, 0]]
    assert sorted(labels.count(c) for c in range(4)) == [1, 1, 2, 2]
    for i, t in enumerate(guided.t):
        batch = guided.batch(i, torch.arange(12))
        with torch.no_grad():
            assert torch.allclose(batch.run(classes.unet), guided.eps[i], atol=1e-5)
            swapped = classes.unet(
                guided.x[i], t, encoder_hidden_states=guided.context.roll(1, 0)
            ).sample
        assert not torch.allclose(swapped, guided.eps[i], atol=1e-4)
    x_next = classes.scheduler.step  # the recorded trajectory is the guided one
    classes.scheduler.set_timesteps(3)
    eps = guided.eps[0, :6] + 3.0 * (guided.eps[0, 6:] - guided.eps[0, :6])
    assert torch.allclose(
        x_next(eps, guided.t[0], guided.x[0, :6]).prev_sample, guided.x[1, :6], atol=1e-4
    )


def test_calibration_does_not_depend_on_the_batch_and_survives_the_disk(classes, guided, tmp_path):
    again = calibrate(classes, 6, 3, guidance_scale=3.0, seed=1, batch_size=6)
    assert torch.equal(again.context, guided.context) and torch.allclose(
        again.x, guided.x, atol=1e-5
    )
    guided.save(tmp_path / "c")
    assert Calibration.load(tmp_path / "c").hash() == guided.hash()
    other = Calibration.regular(guided.x, guided.t, guided.eps, guided.context.flip(0))
    assert other.hash() != guided.hash()


@pytest.fixture(scope="module")
def several():
    """A context of several tokens.

    With a single one attention has no choice, and its queries and keys no gradient.
    """
    pipe = tiny.class_conditional(tokens=3)
    return pipe, calibrate(pipe, 6, 3, guidance_scale=3.0, seed=1)


def test_conditional_model_is_quantized_and_finetuned(several, fast):
    classes, guided = several
    config = fast("quest", 4, 4, **PLAIN, tla_iters=6, cma_iters=14, batch_size=8, lr_scale=2e-2)
    q = quantize(classes.unet, config, guided)
    assert any(
        name.endswith("transformer_blocks.0")
        for name in blocks(q, guided.batch(0, torch.arange(2)))
    )

    def error():
        with torch.no_grad():
            return sum(
                (guided.batch(i, torch.arange(12)).run(q) - guided.eps[i]).pow(2).mean().item()
                for i in range(3)
            )

    before = error()
    finetune(q, classes.unet, guided, config)
    assert error() < 0.9 * before
    assert torch.isfinite(
        sample(
            classes, 2, num_inference_steps=3, guidance_scale=3.0, unet=q, progress=False
        ).latents
    ).all()


def test_gradient_checkpointing_gives_the_same_gradients_to_every_parameter(
    several, fast, monkeypatch
):
    """Local losses are hooked inside checkpointed blocks.

    In attention, too, which is computed head by head as at full size.
    """
    classes, guided = several
    config = fast("quest", 4, 4, **PLAIN)
    q = quantize(classes.unet, config, guided)
    step = torch.arange(12) % 3
    batch = guided.batch(step, torch.arange(12))

    def gradients(stage, config):
        params = [p for g in select_parameters(q, stage, config) for p in g["params"]]
        with (
            torch.no_grad(),
            capture_outputs(
                classes.unet, list(stage.layers) if stage.name == "tla" else []
            ) as targets,
        ):
            run_time_layers(classes.unet, guided.t)
        local, total = stage_losses(
            q, classes.unet, stage, config, batch, TimeCalls(guided.t, {}), targets
        )
        (local + total).backward()
        names = {id(p): n for n, p in q.named_parameters()}
        found = {names[id(p)]: p.grad.clone() for p in params}
        q.zero_grad()
        return found

    recomputed = []
    layer = q.down_blocks[1].attentions[0].transformer_blocks[0].attn1.to_q
    layer.register_forward_hook(lambda *a: recomputed.append(1))
    for stage in select_stages(q, config):
        plain = gradients(stage, config)
        once = len(recomputed)
        q.enable_gradient_checkpointing()
        saved = gradients(stage, config.replace(save_memory=True))
        assert len(recomputed) == 3 * once  # forward, and once more for the gradient
        recomputed.clear()
        q.disable_gradient_checkpointing()
        monkeypatch.setattr("questlib.quantization.attention.SCORES", 1)
        by_heads = gradients(stage, config)
        monkeypatch.undo()
        recomputed.clear()
        assert plain.keys() == saved.keys()
        for name, grad in plain.items():
            assert grad.any(), name
            assert torch.equal(saved[name], grad), name
            assert torch.allclose(
                by_heads[name], grad, rtol=1e-4, atol=1e-6 * float(grad.abs().max())
            ), name


def test_saving_memory_changes_no_result(classes, guided, fast, tmp_path):
    """Every number of the checkpoint is the same, and so are outputs.

    What is not trained takes half the memory.
    """
    found = []
    for save_memory in (False, True):
        config = fast("quest", 4, 4, **PLAIN, tla_iters=1, cma_iters=2, save_memory=save_memory)
        q = quantize(classes.unet, config, guided)
        finetune(q, classes.unet, guided, config)
        assert not q.is_gradient_checkpointing
        save_pretrained(q, tmp_path / str(save_memory))
        tensors = load_file(tmp_path / str(save_memory) / "model.safetensors")
        output = guided.batch(torch.tensor([0, 1]), torch.tensor([0, 1])).run(q)
        found.append(
            (
                tensors,
                output,
                {n: m.weight.data_ptr() == m.w_hat.data_ptr() for n, m in quant_layers(q).items()},
            )
        )
    (plain, output, shared), (saved, same_output, saved_shared) = found
    assert plain.keys() == saved.keys() and all(torch.equal(v, saved[k]) for k, v in plain.items())
    assert torch.equal(output, same_output)
    trained = {n for stage in select_stages(q, config) for n in stage.layers}
    assert (
        not any(shared.values()) and {n for n, once in saved_shared.items() if not once} == trained
    )


def test_small_forward_batches_give_the_same_ranges(classes, guided, fast):
    """Min-max ranges do not depend on how the inputs were split."""
    a, b = (quantize(classes.unet, fast("minmax", 8, 8, forward_batch=n), guided) for n in (64, 3))
    for x, y in zip(act_quantizers(a), act_quantizers(b), strict=True):
        assert torch.allclose(x.scale, y.scale, rtol=1e-4), x.name


@pytest.mark.parametrize("sampler", ["ddim", "plms", "dpm-solver++"])
def test_samplers_by_name(classes, sampler):
    draw = Drawing(classes, sampler=sampler, num_inference_steps=4, guidance_scale=2.0)
    first, again = draw.draw(range(2)), draw.draw(range(2))
    assert torch.equal(first.latents, again.latents)  # multistep samplers start afresh
    assert draw.scheduler.config.beta_schedule == classes.scheduler.config.beta_schedule


def test_plms_calls_one_timestep_twice_and_groups_survive_it(classes, fast):
    calib = calibrate(classes, 2, 4, sampler="plms", guidance_scale=2.0)
    assert calib.t.tolist() == [751, 501, 501, 251, 1] or len(calib.t) == 5 > len(calib.t.unique())
    q = quantize(classes.unet, fast("minmax", 8, 8, step_groups=4), calib)
    assert q.quest_steps.num_groups == 4 and len(q.quest_steps.timesteps) == 4


def test_eta_needs_a_sampler_that_has_it(classes):
    for sampler, kind in (("plms", PNDMScheduler), ("dpm-solver++", DPMSolverMultistepScheduler)):
        assert type(choose_scheduler(classes, sampler)) is kind
        with pytest.raises(
            ConfigError, match=f"eta: {kind.__name__} has none; expected 0, found 0.5"
        ):
            choose_scheduler(classes, sampler, 0.5)
    with pytest.raises(ConfigError, match="sampler: expected one of ddim, plms, dpm-solver"):
        choose_scheduler(classes, "euler")


def test_noise_of_each_sample_is_its_own_under_eta(classes):
    def draw(size):
        return sample(
            classes,
            4,
            num_inference_steps=3,
            eta=1.0,
            batch_size=size,
            guidance_scale=2.0,
            progress=False,
        ).latents

    assert torch.allclose(draw(4), draw(1), atol=1e-4) and torch.allclose(
        draw(4), draw(3), atol=1e-4
    )


@pytest.mark.parametrize(
    ("kind", "choices", "says"),
    [
        (
            "unconditional",
            {"guidance_scale": 2.0},
            "guidance_scale: LDMPipeline is unconditional; expected 1, found 2.0",
        ),
        ("unconditional", {"labels": [1]}, "labels: LDMPipeline is not class-conditional"),
        ("unconditional", {"prompts": ["cat"]}, "prompts: LDMPipeline has no text encoder"),
        ("class", {"labels": [0, 4]}, "labels: expected 0..3, found 4"),
        ("class", {"labels": []}, "labels: .* needs at least one"),
        ("class", {"prompts": ["cat"]}, "has no text encoder"),
        ("text", {}, "prompts: StableDiffusionPipeline needs at least one"),
        ("text", {"prompts": "cat"}, "expected a list of texts"),
        ("text", {"labels": [1]}, "not class-conditional"),
    ],
)
def test_bad_choices(kind, choices, says, classes, prompts_pipe):
    pipe = {
        "unconditional": tiny.unconditional,
        "class": lambda: classes,
        "text": lambda: prompts_pipe,
    }[kind]()
    with pytest.raises(ConfigError, match=says):
        Conditioning(pipe, **choices)


def test_a_context_that_nothing_gives(classes):
    bare = importlib.import_module("types").SimpleNamespace(
        unet=classes.unet, scheduler=classes.scheduler
    )
    with pytest.raises(ConfigError, match="needs a context, but it has neither"):
        Conditioning(bare)


def test_unconditional_is_a_plain_call():
    pipe = tiny.unconditional()
    x, t = torch.randn(2, 3, 8, 8), torch.tensor(3)
    assert Conditioning(pipe).at(range(2)) == Condition()
    assert torch.equal(Condition().predict(pipe.unet, x, t), pipe.unet(x, t).sample)


def test_zero_terminal_snr_is_taken_over_or_refused(classes):
    own = DDIMScheduler(rescale_betas_zero_snr=True, clip_sample=False)
    for name in ("ddim", "dpm-solver++"):
        made = make_scheduler(own, name)
        assert (made.alphas_cumprod - own.alphas_cumprod).abs().max() < 1e-6
    with pytest.raises(ConfigError, match="rescale_betas_zero_snr"):
        make_scheduler(own, "plms")


def test_a_learned_variance_needs_a_scheduler_that_knows_of_it():
    unet = SimpleNamespace(config=SimpleNamespace(in_channels=3, out_channels=6))
    pipe = SimpleNamespace(unet=unet, scheduler=DDIMScheduler())
    with pytest.raises(ConfigError, match="learned_range"):
        choose_scheduler(pipe)
    pipe.scheduler = DDPMScheduler(variance_type="learned_range")
    assert choose_scheduler(pipe) is pipe.scheduler
