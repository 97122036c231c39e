"""One tiny pipeline of each kind, with the arguments of a call. All weights are random."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import tiny_parts as parts
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

Made = tuple[Any, dict[str, Any]]


class Case(NamedTuple):
    """A pipeline that is tried."""

    group: str
    """What the table puts together."""

    make: Callable[[], Made]
    """Builds the pipeline, and the keyword arguments of a call."""

    @property
    def name(self) -> str:
        """A name for people, made of the function's."""
        doc = self.make.__doc__ or ""
        return doc.splitlines()[0].rstrip(".")


CASES: dict[str, Case] = {}


def case(group: str) -> Callable[[Callable[[], Made]], Callable[[], Made]]:
    """Register a function as a case of a group."""

    def register(make: Callable[[], Made]) -> Callable[[], Made]:
        CASES[make.__name__] = Case(group, make)
        return make

    return register


STEPS = 3


def ddim(**choices: Any) -> DDIMScheduler:
    """Stable Diffusion's scheduler."""
    base = dict(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
    )
    return DDIMScheduler(**base | choices)


def build(kind: str, **components: Any) -> Any:
    """A pipeline of this class; components that it has and that are not given are None."""
    cls = getattr(diffusers, kind)
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    missing = {p.name: None for p in parameters if p.default is p.empty}
    known = {p.name for p in parameters}
    given = {k: v for k, v in components.items() if k in known}
    assert set(components) - known <= {"safety_checker"}, set(components) - known
    if "requires_safety_checker" in known:
        given["requires_safety_checker"] = False
    if "add_watermarker" in known:
        given["add_watermarker"] = False
    pipe = cls(**missing | given)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ---- without text ----


def _noise_to_image(kind: str, **choices: Any) -> Made:
    call = dict(batch_size=2, num_inference_steps=STEPS, output_type="np")
    return build(kind, unet=parts.unet_2d(), scheduler=DDIMScheduler(**choices)), call


@case("Noise to image")
def ddim_pixels() -> Made:
    """DDIM."""
    return _noise_to_image("DDIMPipeline", clip_sample=False)


@case("Noise to image")
def ddpm_pixels() -> Made:
    """DDPM."""
    call = dict(batch_size=2, num_inference_steps=STEPS, output_type="np")
    return build("DDPMPipeline", unet=parts.unet_2d(), scheduler=diffusers.DDPMScheduler()), call


@case("Noise to image")
def latent_diffusion() -> Made:
    """Latent diffusion (LDM)."""
    unet = parts.unet_2d()
    pipe = build("LDMPipeline", vqvae=parts.vq_model(3), unet=unet, scheduler=ddim())
    return pipe, dict(batch_size=2, num_inference_steps=STEPS, output_type="np")


@case("Noise to image")
def consistency() -> Made:
    """Consistency model, with class labels."""
    unet = parts.unet_2d(num_class_embeds=4, resnet_time_scale_shift="scale_shift")
    scheduler = diffusers.CMStochasticIterativeScheduler()
    call = dict(batch_size=2, num_inference_steps=STEPS, class_labels=[1, 2], output_type="np")
    return build("ConsistencyModelPipeline", unet=unet, scheduler=scheduler), call


@case("Noise to image")
def super_resolution_ldm() -> Made:
    """LDM super resolution, six input channels."""
    unet = parts.unet_2d(in_channels=6)
    vqvae = parts.vq_model(3)
    pipe = build("LDMSuperResolutionPipeline", vqvae=vqvae, unet=unet, scheduler=ddim())
    image = parts.image(size=16)
    return pipe, dict(image=image, num_inference_steps=STEPS, output_type="np")


@case("Noise to image")
def repaint() -> Made:
    """RePaint."""
    pipe = build("RePaintPipeline", unet=parts.unet_2d(), scheduler=diffusers.RePaintScheduler())
    call = dict(image=parts.image(size=16), mask_image=parts.mask(16), num_inference_steps=STEPS)
    return pipe, call | dict(jump_length=1, jump_n_sample=1, output_type="np")


# ---- Stable Diffusion ----


def stable_diffusion(
    kind: str = "StableDiffusionPipeline",
    call: dict[str, Any] | None = None,
    unet: dict[str, Any] | None = None,
    scheduler: Any = None,
    **more: Any,
) -> Made:
    """A pipeline of Stable Diffusion's components, called with a prompt."""
    pipe = build(
        kind,
        unet=parts.unet_2d_condition(**unet or {}),
        vae=parts.vae(),
        text_encoder=parts.text_encoder(),
        tokenizer=parts.tokenizer(),
        scheduler=scheduler or ddim(),
        **more,
    )
    base = dict(prompt="a fox", num_inference_steps=STEPS, output_type="np", guidance_scale=3.0)
    return pipe, base | (call or {})


SIZES = dict(height=parts.SIZE, width=parts.SIZE)
ATTENTION_FIRST = dict(
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)
"""For adapters, whose residuals have the sizes of blocks with attention."""


@case("Stable Diffusion")
def sd() -> Made:
    """Text to image, DDIM."""
    return stable_diffusion(call=SIZES)


@case("Stable Diffusion")
def sd_half() -> Made:
    """Text to image in float16."""
    pipe, call = stable_diffusion(call=SIZES)
    return pipe.to(torch.float16), call


@case("Stable Diffusion")
def sd_bfloat() -> Made:
    """Text to image in bfloat16."""
    pipe, call = stable_diffusion(call=SIZES)
    return pipe.to(torch.bfloat16), call


@case("Stable Diffusion")
def sd_not_square() -> Made:
    """Text to image, 32 x 48, two images a prompt, without guidance."""
    call = dict(height=32, width=48, num_images_per_prompt=2, guidance_scale=1.0)
    return stable_diffusion(call=call)


@case("Stable Diffusion")
def sd_euler() -> Made:
    """Euler, Karras's timesteps."""
    scheduler = EulerDiscreteScheduler.from_config(ddim().config, use_karras_sigmas=True)
    return stable_diffusion(call=SIZES, scheduler=scheduler)


@case("Stable Diffusion")
def sd_heun() -> Made:
    """Heun, two calls a step."""
    scheduler = diffusers.HeunDiscreteScheduler.from_config(ddim().config)
    return stable_diffusion(call=SIZES, scheduler=scheduler)


@case("Stable Diffusion")
def sd_dpm() -> Made:
    """DPM-Solver++."""
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(ddim().config)
    return stable_diffusion(call=SIZES, scheduler=scheduler)


@case("Stable Diffusion")
def sd_plms() -> Made:
    """PLMS (PNDM)."""
    scheduler = diffusers.PNDMScheduler.from_config(ddim().config, skip_prk_steps=True)
    return stable_diffusion(call=SIZES, scheduler=scheduler)


@case("Stable Diffusion")
def sd_v_prediction() -> Made:
    """v-prediction, zero terminal SNR, guidance rescaled (SD 2.1's kind)."""
    scheduler = ddim(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    return stable_diffusion(
        call=SIZES | dict(guidance_rescale=0.7),
        unet=dict(use_linear_projection=True, upcast_attention=True),
        scheduler=scheduler,
    )


@case("Stable Diffusion")
def sd_img2img() -> Made:
    """Image to image."""
    call = dict(image=parts.image(), strength=0.7, num_inference_steps=5)
    return stable_diffusion("StableDiffusionImg2ImgPipeline", call)


@case("Stable Diffusion")
def sd_inpaint() -> Made:
    """Inpainting, nine input channels."""
    call = SIZES | dict(image=parts.image(), mask_image=parts.mask())
    return stable_diffusion("StableDiffusionInpaintPipeline", call, dict(in_channels=9))


@case("Stable Diffusion")
def sd_inpaint_four() -> Made:
    """Inpainting with a text-to-image model."""
    call = SIZES | dict(image=parts.image(), mask_image=parts.mask())
    return stable_diffusion("StableDiffusionInpaintPipeline", call)


@case("Stable Diffusion")
def sd_depth() -> Made:
    """Depth to image, five input channels."""
    call = dict(image=parts.image(), depth_map=parts.image(1)[:, 0], strength=0.9)
    made = stable_diffusion("StableDiffusionDepth2ImgPipeline", call, dict(in_channels=5))
    return made


@case("Stable Diffusion")
def sd_pix2pix() -> Made:
    """InstructPix2Pix, eight input channels, three calls a step in one batch."""
    call = dict(image=parts.image(), image_guidance_scale=1.5)
    return stable_diffusion("StableDiffusionInstructPix2PixPipeline", call, dict(in_channels=8))


@case("Stable Diffusion")
def sd_upscale() -> Made:
    """Upscaling, seven input channels, noise level as class label."""
    return stable_diffusion(
        "StableDiffusionUpscalePipeline",
        dict(image=parts.image(size=16), noise_level=20),
        dict(in_channels=7, num_class_embeds=1000, sample_size=16),
        low_res_scheduler=diffusers.DDPMScheduler(),
        max_noise_level=350,
    )


@case("Stable Diffusion")
def sd_variation() -> Made:
    """Image variation, an image in place of a prompt."""
    pipe = build(
        "StableDiffusionImageVariationPipeline",
        unet=parts.unet_2d_condition(),
        vae=parts.vae(),
        image_encoder=parts.image_encoder(),
        feature_extractor=parts.image_processor(),
        scheduler=ddim(),
    )
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return pipe, SIZES | dict(image=image, num_inference_steps=STEPS, output_type="np")


@case("Stable Diffusion")
def sd_controlnet() -> Made:
    """ControlNet."""
    control = parts.controlnet(parts.unet_2d_condition())
    return stable_diffusion(
        "StableDiffusionControlNetPipeline", SIZES | dict(image=parts.image()), controlnet=control
    )


@case("Stable Diffusion")
def sd_controlnet_two() -> Made:
    """Two ControlNets."""
    control = [parts.controlnet(parts.unet_2d_condition()) for _ in range(2)]
    call = SIZES | dict(image=[parts.image(), parts.image()])
    call |= dict(controlnet_conditioning_scale=[1.0, 0.5])
    return stable_diffusion("StableDiffusionControlNetPipeline", call, controlnet=control)


@case("Stable Diffusion")
def sd_controlnet_img2img() -> Made:
    """ControlNet, image to image, guess mode."""
    control = parts.controlnet(parts.unet_2d_condition())
    call = SIZES | dict(image=parts.image(), control_image=parts.image(), strength=0.9)
    call |= dict(guess_mode=True)
    return stable_diffusion("StableDiffusionControlNetImg2ImgPipeline", call, controlnet=control)


@case("Stable Diffusion")
def sd_controlnet_inpaint() -> Made:
    """ControlNet, inpainting."""
    control = parts.controlnet(parts.unet_2d_condition())
    call = SIZES | dict(image=parts.image(), mask_image=parts.mask(), control_image=parts.image())
    return stable_diffusion("StableDiffusionControlNetInpaintPipeline", call, controlnet=control)


@case("Stable Diffusion")
def sd_adapter() -> Made:
    """T2I-Adapter."""
    call = SIZES | dict(image=parts.image())
    return stable_diffusion(
        "StableDiffusionAdapterPipeline", call, ATTENTION_FIRST, adapter=parts.adapter()
    )


@case("Stable Diffusion")
def sd_ip_adapter() -> Made:
    """IP-Adapter."""
    pipe, call = stable_diffusion(
        call=SIZES,
        image_encoder=parts.image_encoder(),
        feature_extractor=parts.image_processor(),
    )
    parts.add_ip_adapter(pipe.unet)
    pipe.set_ip_adapter_scale(0.7)
    embeds = torch.cat([torch.zeros(1, 1, parts.CONTEXT), parts.embeddings(1, 1, parts.CONTEXT)])
    return pipe, call | dict(ip_adapter_image_embeds=[embeds])


@case("Stable Diffusion")
def sd_lora() -> Made:
    """A fused LoRA."""
    pipe, call = stable_diffusion(call=SIZES)
    parts.fuse_lora(pipe.unet)
    return pipe, call


@case("Stable Diffusion")
def sd_freeu() -> Made:
    """FreeU."""
    pipe, call = stable_diffusion(call=SIZES)
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    return pipe, call


@case("Stable Diffusion")
def sd_sliced() -> Made:
    """Attention slicing before quantizing."""
    pipe, call = stable_diffusion(call=SIZES)
    pipe.enable_attention_slicing(1)
    return pipe, call


@case("Stable Diffusion")
def sd_channels_last() -> Made:
    """channels_last."""
    pipe, call = stable_diffusion(call=SIZES)
    pipe.unet.to(memory_format=torch.channels_last)
    return pipe, call


@case("Stable Diffusion")
def sd_ldm3d() -> Made:
    """LDM3D."""
    return stable_diffusion("StableDiffusionLDM3DPipeline", SIZES)


@case("Stable Diffusion")
def sd_panorama() -> Made:
    """MultiDiffusion (panorama)."""
    return stable_diffusion("StableDiffusionPanoramaPipeline", dict(height=32, width=64))


@case("Stable Diffusion")
def sd_pag() -> Made:
    """Perturbed-attention guidance (PAG)."""
    return stable_diffusion(
        "StableDiffusionPAGPipeline", SIZES | dict(pag_scale=2.0), pag_applied_layers=["mid"]
    )


@case("Stable Diffusion")
def sd_sag() -> Made:
    """Self-attention guidance (SAG)."""
    return stable_diffusion("StableDiffusionSAGPipeline", SIZES | dict(sag_scale=0.7))


@case("Stable Diffusion")
def sd_attend() -> Made:
    """Attend-and-Excite."""
    call = SIZES | dict(token_indices=[1], max_iter_to_alter=1, thresholds={0: 0.5})
    call |= dict(attn_res=(8, 8))
    return stable_diffusion("StableDiffusionAttendAndExcitePipeline", call)


@case("Stable Diffusion")
def sd_gligen() -> Made:
    """GLIGEN."""
    unet = dict(attention_type="gated", use_linear_projection=True)
    call = SIZES | dict(gligen_phrases=["a fox"], gligen_boxes=[[0.1, 0.1, 0.6, 0.6]])
    call |= dict(gligen_scheduled_sampling_beta=1.0)
    return stable_diffusion("StableDiffusionGLIGENPipeline", call, unet)


@case("Stable Diffusion")
def lcm() -> Made:
    """Latent consistency model, guidance as an embedding."""
    scheduler = diffusers.LCMScheduler.from_config(ddim().config)
    unet = dict(time_cond_proj_dim=8)
    return stable_diffusion("LatentConsistencyModelPipeline", SIZES, unet, scheduler)


@case("Stable Diffusion")
def marigold() -> Made:
    """Marigold, depth of an image."""
    pipe = build(
        "MarigoldDepthPipeline",
        unet=parts.unet_2d_condition(in_channels=8),
        vae=parts.vae(),
        text_encoder=parts.text_encoder(),
        tokenizer=parts.tokenizer(),
        scheduler=ddim(prediction_type="v_prediction", timestep_spacing="trailing"),
        prediction_type="depth",
        scale_invariant=True,
        shift_invariant=True,
    )
    call = dict(image=parts.image(), num_inference_steps=STEPS, processing_resolution=0)
    return pipe, call


# ---- SDXL ----


def sdxl_pipeline(
    kind: str = "StableDiffusionXLPipeline",
    call: dict[str, Any] | None = None,
    unet: dict[str, Any] | None = None,
    scheduler: Any = None,
    **more: Any,
) -> Made:
    """A pipeline of SDXL's components, called with embeddings of a prompt."""
    pipe = build(
        kind,
        unet=parts.unet_sdxl(**unet or {}),
        vae=parts.vae(),
        scheduler=scheduler or EulerDiscreteScheduler.from_config(ddim().config),
        **more,
    )
    base = dict(num_inference_steps=STEPS, output_type="np", guidance_scale=3.0)
    for i, start in enumerate(("", "negative_")):
        text = parts.embeddings(1, parts.TOKENS, parts.CONTEXT, seed=i)
        base |= {f"{start}prompt_embeds": text, f"{start}pooled_prompt_embeds": text[:, 0]}
    return pipe, base | (call or {})


@case("SDXL")
def sdxl() -> Made:
    """Text to image, Euler."""
    return sdxl_pipeline(call=SIZES)


@case("SDXL")
def sdxl_half() -> Made:
    """Text to image in float16."""
    pipe, call = sdxl_pipeline(call=SIZES)
    call = {k: v.half() if torch.is_tensor(v) else v for k, v in call.items()}
    return pipe.to(torch.float16), call


@case("SDXL")
def sdxl_edm() -> Made:
    """EDM's continuous timesteps (Playground v2.5's kind)."""
    return sdxl_pipeline(call=SIZES, scheduler=diffusers.EDMEulerScheduler())


@case("SDXL")
def sdxl_img2img() -> Made:
    """Image to image."""
    call = dict(image=parts.image(), strength=0.8, num_inference_steps=5)
    return sdxl_pipeline("StableDiffusionXLImg2ImgPipeline", call)


@case("SDXL")
def sdxl_refiner() -> Made:
    """Refiner, aesthetic scores."""
    call = dict(image=parts.image(), strength=0.8, num_inference_steps=5)
    unet = dict(projection_class_embeddings_input_dim=8 * 5 + parts.CONTEXT)
    return sdxl_pipeline(
        "StableDiffusionXLImg2ImgPipeline", call, unet, requires_aesthetics_score=True
    )


@case("SDXL")
def sdxl_inpaint() -> Made:
    """Inpainting, nine input channels."""
    call = SIZES | dict(image=parts.image(), mask_image=parts.mask(), num_inference_steps=5)
    return sdxl_pipeline("StableDiffusionXLInpaintPipeline", call, dict(in_channels=9))


@case("SDXL")
def sdxl_pix2pix() -> Made:
    """InstructPix2Pix, eight input channels."""
    call = SIZES | dict(image=parts.image(), image_guidance_scale=1.5)
    return sdxl_pipeline("StableDiffusionXLInstructPix2PixPipeline", call, dict(in_channels=8))


@case("SDXL")
def sdxl_controlnet() -> Made:
    """ControlNet."""
    control = parts.controlnet(parts.unet_sdxl())
    call = SIZES | dict(image=parts.image())
    return sdxl_pipeline("StableDiffusionXLControlNetPipeline", call, controlnet=control)


@case("SDXL")
def sdxl_controlnet_union() -> Made:
    """ControlNet Union."""
    control = parts.controlnet_union(parts.unet_sdxl())
    call = SIZES | dict(control_image=[parts.image()], control_mode=[0])
    return sdxl_pipeline("StableDiffusionXLControlNetUnionPipeline", call, controlnet=control)


@case("SDXL")
def sdxl_adapter() -> Made:
    """T2I-Adapter."""
    call = SIZES | dict(image=parts.image())
    return sdxl_pipeline(
        "StableDiffusionXLAdapterPipeline", call, ATTENTION_FIRST, adapter=parts.adapter()
    )


@case("SDXL")
def sdxl_pag() -> Made:
    """Perturbed-attention guidance (PAG)."""
    return sdxl_pipeline(
        "StableDiffusionXLPAGPipeline", SIZES | dict(pag_scale=2.0), pag_applied_layers=["mid"]
    )


# ---- other text-to-image models ----


def unet_added_kv(**choices: Any) -> Any:
    """DeepFloyd IF's and Kandinsky's kind: keys and values are added to self-attention."""
    base = dict(
        in_channels=3,
        out_channels=6,
        attention_head_dim=8,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        resnet_time_scale_shift="scale_shift",
    )
    return parts.unet_2d_condition(**base | choices)


def deepfloyd(kind: str, call: dict[str, Any], unet: dict[str, Any], **more: Any) -> Made:
    """A pipeline of DeepFloyd IF, called with embeddings of a prompt."""
    text = dict(
        encoder_hid_dim=parts.CONTEXT,
        encoder_hid_dim_type="text_proj",
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
    )
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range", thresholding=True)
    pipe = build(kind, unet=unet_added_kv(**text | unet), scheduler=scheduler, **more)
    embeds = [parts.embeddings(1, parts.TOKENS, parts.CONTEXT, seed=i) for i in range(2)]
    base = dict(prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1])
    return pipe, base | dict(num_inference_steps=STEPS, output_type="np") | call


@case("DeepFloyd IF")
def deepfloyd_text() -> Made:
    """Text to image."""
    return deepfloyd("IFPipeline", dict(height=16, width=16), {})


@case("DeepFloyd IF")
def deepfloyd_img2img() -> Made:
    """Image to image."""
    call = dict(image=parts.image(size=16), strength=0.8, num_inference_steps=5)
    return deepfloyd("IFImg2ImgPipeline", call, {})


@case("DeepFloyd IF")
def deepfloyd_super() -> Made:
    """Super resolution, six input channels, noise level as a timestep."""
    call = dict(image=parts.image(size=8), height=16, width=16, noise_level=50)
    unet = dict(in_channels=6, class_embed_type="timestep")
    noising = diffusers.DDPMScheduler()
    return deepfloyd("IFSuperResolutionPipeline", call, unet, image_noising_scheduler=noising)


def kandinsky_22(kind: str, call: dict[str, Any], unet: dict[str, Any] | None = None) -> Made:
    """A decoder of Kandinsky 2.2, called with an image's embedding."""
    image = dict(
        in_channels=4,
        out_channels=8,
        encoder_hid_dim=parts.CONTEXT,
        encoder_hid_dim_type="image_proj",
        addition_embed_type="image",
    )
    pipe = build(
        kind,
        unet=unet_added_kv(**image | (unet or {})),
        scheduler=ddim(),
        movq=parts.vq_model(
            4, norm_type="spatial", norm_num_groups=32, block_out_channels=(32, 32)
        ),
    )
    embeds = [parts.embeddings(1, parts.CONTEXT, seed=i) for i in range(2)]
    base = dict(image_embeds=embeds[0], negative_image_embeds=embeds[1], height=64, width=64)
    return pipe, base | dict(num_inference_steps=STEPS, output_type="np") | call


@case("Kandinsky")
def kandinsky_decoder() -> Made:
    """2.2, text to image."""
    return kandinsky_22("KandinskyV22Pipeline", {})


@case("Kandinsky")
def kandinsky_img2img() -> Made:
    """2.2, image to image."""
    call = dict(image=parts.image(size=64), strength=0.8, num_inference_steps=5)
    return kandinsky_22("KandinskyV22Img2ImgPipeline", call)


@case("Kandinsky")
def kandinsky_controlnet() -> Made:
    """2.2, ControlNet: a hint beside the image's embedding."""
    unet = dict(in_channels=8, encoder_hid_dim_type="image_proj", addition_embed_type="image_hint")
    # A hint has eight times the size of its latents.
    call = dict(hint=parts.image(size=64), height=16, width=16)
    return kandinsky_22("KandinskyV22ControlnetPipeline", call, unet)


# ---- other conditions ----


@case("Other conditions")
def audio_ldm() -> Made:
    """AudioLDM's UNet: the text is concatenated to the time embedding."""
    unet = dict(
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=parts.CONTEXT,
        class_embeddings_concat=True,
        cross_attention_dim=(16, 32),
    )
    return parts.own_pipeline(
        parts.unet_2d_condition(**unet),
        ddim(),
        encoder_hidden_states=None,
        class_labels=parts.embeddings(2, parts.CONTEXT),
    )


@case("Other conditions")
def unclip() -> Made:
    """Stable unCLIP: an image's embedding as projected class label."""
    unet = dict(
        class_embed_type="projection", projection_class_embeddings_input_dim=2 * parts.CONTEXT
    )
    return parts.own_pipeline(
        parts.unet_2d_condition(**unet),
        ddim(),
        class_labels=parts.embeddings(2, 2 * parts.CONTEXT),
        encoder_hidden_states=parts.embeddings(2, parts.TOKENS, parts.CONTEXT),
    )


@case("Other conditions")
def class_conditional() -> Made:
    """Class labels."""
    return parts.own_pipeline(
        parts.unet_2d(num_class_embeds=10), ddim(), class_labels=torch.tensor([1, 7])
    )


@case("Other conditions")
def masks() -> Made:
    """Attention masks of the text, odd sizes."""
    mask = torch.ones(2, parts.TOKENS)
    mask[1, 4:] = 0
    return parts.own_pipeline(
        parts.unet_2d_condition(),
        ddim(),
        size=15,
        encoder_hidden_states=parts.embeddings(2, parts.TOKENS, parts.CONTEXT),
        encoder_attention_mask=mask,
    )


# ---- transformers ----

PATCHES = dict(sample_size=16, patch_size=2, num_layers=2, num_attention_heads=2, in_channels=4)


@case("Transformers")
def dit() -> Made:
    """DiT, class labels, learned variance."""
    transformer = parts.seeded(
        diffusers.DiTTransformer2DModel,
        **PATCHES,
        out_channels=8,
        attention_head_dim=8,
        num_embeds_ada_norm=1000,
    )
    pipe = build("DiTPipeline", transformer=transformer, vae=parts.vae(), scheduler=ddim())
    call = dict(class_labels=[1, 7], num_inference_steps=STEPS, output_type="np")
    return pipe, call


@case("Transformers")
def pixart() -> Made:
    """PixArt-alpha, text of two lengths."""
    transformer = parts.seeded(
        diffusers.PixArtTransformer2DModel,
        **PATCHES,
        out_channels=8,
        attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=parts.CONTEXT,
        use_additional_conditions=False,
    )
    pipe = build("PixArtAlphaPipeline", transformer=transformer, vae=parts.vae(), scheduler=ddim())
    mask = torch.ones(1, parts.TOKENS, dtype=torch.long)
    mask[:, 5:] = 0
    call = dict(num_inference_steps=STEPS, output_type="np", use_resolution_binning=False)
    for i, start in enumerate(("", "negative_")):
        text = parts.embeddings(1, parts.TOKENS, parts.CONTEXT, seed=i)
        call |= {f"{start}prompt_embeds": text, f"{start}prompt_attention_mask": mask}
    return pipe, call | dict(SIZES, prompt=None, negative_prompt=None)


@case("Transformers")
def flux() -> Made:
    """Flux."""
    transformer = parts.seeded(
        diffusers.FluxTransformer2DModel,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=parts.CONTEXT,
        pooled_projection_dim=parts.CONTEXT,
        axes_dims_rope=(4, 4, 8),
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = build("FluxPipeline", transformer=transformer, vae=parts.vae(), scheduler=scheduler)
    text = parts.embeddings(1, parts.TOKENS, parts.CONTEXT)
    call = dict(prompt_embeds=text, pooled_prompt_embeds=text[:, 0], num_inference_steps=STEPS)
    return pipe, call | SIZES | dict(output_type="np")
