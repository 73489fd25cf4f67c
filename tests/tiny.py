"""Genuine pipelines with random weights, small enough to run dozens of times in a test."""

from __future__ import annotations

import tiny_more
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    LCMScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tiny_more import SMALL
from tiny_parts import (
    CHANNELS,
    WIDTH,
    make_clip,
    make_gemma_tokenizer,
    make_language,
    make_qwen_tokenizer,
    make_t5,
    make_unet,
    make_vae,
    make_video_vae,
)
from torch import Tensor
from transformers import (
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3Model,
    UMT5Config,
    UMT5EncoderModel,
)

from ecodiff.calibrate import Calibration, calibrate
from ecodiff.mask import Mask
from ecodiff.models.pipelines import denoise, encode, fingerprint, starting_noise
from ecodiff.models.structures import discover
from ecodiff.toys import flux, sdxl, text, vae

CALLS = {
    "sdxl": {"num_inference_steps": 3, "guidance_scale": 3.0, "height": 64, "width": 64},
    "flux": {"num_inference_steps": 3, "max_sequence_length": 16, "height": 64, "width": 64},
    "sd15": {**SMALL, "guidance_scale": 3.0},
    "sd2": {**SMALL, "guidance_scale": 3.0},
    "lcm": {**SMALL, "guidance_scale": 3.0},
    "sd3": {**SMALL, "guidance_scale": 3.0, "max_sequence_length": 16},
    "pixart": {**SMALL, "guidance_scale": 3.0, "max_sequence_length": 16},
    "qwen": {**SMALL, "true_cfg_scale": 3.0, "max_sequence_length": 64},
    "z-image": {**SMALL, "guidance_scale": 3.0, "max_sequence_length": 40},
    "sana": {**SMALL, "guidance_scale": 3.0, "max_sequence_length": 16},
    "wan": {**SMALL, "guidance_scale": 3.0, "max_sequence_length": 16, "num_frames": 3},
    **tiny_more.CALLS,
}


def tiny(family: str, seed: int = 0) -> DiffusionPipeline:
    """The tiny pipeline of a family, a key of `CALLS`."""
    torch.manual_seed(seed)
    return _awake(_BUILDERS[family]())


def tiny_sdxl(seed: int = 0) -> StableDiffusionXLPipeline:
    """A StableDiffusionXLPipeline of the toy's shape at a fraction of its width."""
    return tiny("sdxl", seed)


def tiny_flux(seed: int = 0) -> FluxPipeline:
    """A FluxPipeline of the toy's shape with two heads, one double and two single blocks."""
    return tiny("flux", seed)


def _sdxl() -> StableDiffusionXLPipeline:
    return sdxl.build(vae.build(), widths=(16, 32, 48))


def _flux() -> FluxPipeline:
    return flux.build(vae.build(), heads=2, double=1, single=2)


def _sd15() -> StableDiffusionPipeline:
    unet = make_unet(cross_attention_dim=WIDTH)
    scheduler = PNDMScheduler(skip_prk_steps=True, steps_offset=1)
    return _stable_diffusion(unet, scheduler)


def _sd2() -> StableDiffusionPipeline:
    unet = make_unet(
        cross_attention_dim=WIDTH, use_linear_projection=True, attention_head_dim=(2, 4)
    )
    scheduler = EulerDiscreteScheduler(prediction_type="v_prediction", steps_offset=1)
    return _stable_diffusion(unet, scheduler)


def _stable_diffusion(unet: UNet2DConditionModel, scheduler: object) -> StableDiffusionPipeline:
    tokenizer, encoder = make_clip()
    return StableDiffusionPipeline(
        vae=make_vae(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _lcm() -> StableDiffusionXLPipeline:
    unet = make_unet(
        cross_attention_dim=2 * WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + WIDTH,
        time_cond_proj_dim=8,
    )
    tokenizer, encoder = make_clip()
    tokenizer_2, encoder_2 = make_clip(CLIPTextModelWithProjection)
    return StableDiffusionXLPipeline(
        vae=make_vae(),
        text_encoder=encoder,
        text_encoder_2=encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=unet,
        scheduler=LCMScheduler(),
    )


def _sd3() -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=8,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=3,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=24,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    (first, encoder), (second, encoder_2) = (
        make_clip(CLIPTextModelWithProjection) for _ in range(2)
    )
    return StableDiffusion3Pipeline(
        vae=make_vae(shift_factor=0.1),
        text_encoder=encoder,
        tokenizer=first,
        text_encoder_2=encoder_2,
        tokenizer_2=second,
        text_encoder_3=make_t5(2 * WIDTH),
        tokenizer_3=text.t5_tokenizer(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _pixart() -> PixArtSigmaPipeline:
    transformer = PixArtTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=8,
        in_channels=CHANNELS,
        out_channels=2 * CHANNELS,  # with its variance
        num_layers=2,
        cross_attention_dim=24,
        sample_size=8,
        caption_channels=WIDTH,
        use_additional_conditions=False,
    )
    return PixArtSigmaPipeline(
        vae=make_vae(),
        text_encoder=make_t5(WIDTH),
        tokenizer=text.t5_tokenizer(),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(beta_end=0.002),
    )


def _qwen() -> QwenImagePipeline:
    tokenizer = make_qwen_tokenizer()
    language = make_language(tokenizer)
    language["rope_parameters"] = {"rope_type": "default", "mrope_section": [2, 1, 1]}
    eyes = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2}
    config = Qwen2_5_VLConfig(
        text_config=language, vision_config={**eyes, "out_hidden_size": WIDTH}
    )
    transformer = QwenImageTransformer2DModel(
        in_channels=4 * CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=3,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 2, 2),
    )
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=AutoencoderKLQwenImage(**make_video_vae()),
        text_encoder=Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=tokenizer,
        transformer=transformer,
    )


def _z_image() -> ZImagePipeline:
    tokenizer = make_qwen_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    transformer = ZImageTransformer2DModel(
        in_channels=CHANNELS,
        dim=24,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=3,
        n_kv_heads=3,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 2, 2],
        axes_lens=[128, 8, 8],
    )
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=make_vae(shift_factor=0.1),
        text_encoder=Qwen3Model(Qwen3Config(**make_language(tokenizer), head_dim=8)),
        tokenizer=tokenizer,
        transformer=transformer,
    )


def _sana() -> SanaPipeline:
    tokenizer = make_gemma_tokenizer()
    transformer = SanaTransformer2DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=3,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=WIDTH,
        sample_size=8,
    )
    blocks = {"block_out_channels": (4, 8, 8), "layers_per_block": (1, 1, 1)}
    blocks["qkv_multiscales"] = ((), (), ())
    sides = {f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in blocks.items()}
    config = Gemma2Config(**make_language(tokenizer), head_dim=8)
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=Gemma2Model(config),
        vae=AutoencoderDC(latent_channels=CHANNELS, scaling_factor=0.5, **sides),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def _wan() -> WanPipeline:
    tokenizer = text.t5_tokenizer()
    config = UMT5Config(
        vocab_size=len(tokenizer), d_model=WIDTH, d_kv=8, d_ff=WIDTH, num_layers=1, num_heads=2
    )
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=WIDTH,
        freq_dim=WIDTH,
        ffn_dim=40,
        num_layers=2,
    )
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(config),
        vae=AutoencoderKLWan(**make_video_vae(), scale_factor_temporal=2, scale_factor_spatial=4),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=transformer,
    )


_BUILDERS = {
    "sdxl": _sdxl,
    "flux": _flux,
    "sd15": _sd15,
    "sd2": _sd2,
    "lcm": _lcm,
    "sd3": _sd3,
    "pixart": _pixart,
    "qwen": _qwen,
    "z-image": _z_image,
    "sana": _sana,
    "wan": _wan,
    **tiny_more.BUILDERS,
}


def _awake(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Random biases, so that a forgotten bias cannot hide behind zeros; quiet bars."""
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval()
            for name, parameter in module.named_parameters():
                if name.endswith("bias") or not parameter.any():
                    torch.nn.init.normal_(parameter, std=0.05)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def calibrated(family: str, seed: int = 0) -> tuple[DiffusionPipeline, Calibration]:
    """A dense pipeline and its calibration on two prompts."""
    pipe = tiny(family, seed)
    return pipe, calibrate(pipe, ["a red square", "a blue ring"], [1, 2], CALLS[family], 2)


def whole_mask(pipe: DiffusionPipeline, kept: dict, means: dict | None = None) -> Mask:
    """A mask of a pipeline that keeps whole what `kept` doesn't name."""
    structures = discover(pipe)
    scores = {s.name: torch.zeros(s.units) for s in structures}
    whole = {s.name: torch.ones(s.units, dtype=torch.bool) for s in structures}
    return Mask(scores, {**whole, **kept}, fingerprint(pipe), means=means or {})


def z0(pipe: DiffusionPipeline, family: str) -> Tensor:
    """The final latent of a prompt."""
    call = CALLS[family]
    embeds, noise = encode(pipe, ["a red square"], call), starting_noise(pipe, [3], call)
    return denoise(pipe, embeds, noise, call)
