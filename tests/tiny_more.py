"""Tiny pipelines of families beside those of `tiny.py`, with random weights."""

from __future__ import annotations

from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    ChromaPipeline,
    ChromaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    OvisImagePipeline,
    OvisImageTransformer2DModel,
)
from tiny_parts import (
    CHANNELS,
    WIDTH,
    make_language,
    make_qwen_tokenizer,
    make_t5,
    make_vae,
)
from transformers import (
    Qwen3Config,
    Qwen3Model,
    UMT5Config,
    UMT5EncoderModel,
)

from ecodiff.toys import flux, text, vae

SMALL = {"num_inference_steps": 2, "height": 32, "width": 32}
CALLS = {
    "chroma": {**SMALL, "guidance_scale": 3.0, "max_sequence_length": 16},
    "kontext": {**SMALL, "max_sequence_length": 16},
    "ovis": {**SMALL, "guidance_scale": 3.0, "max_sequence_length": 48},
    "auraflow": {**SMALL, "guidance_scale": 3.0, "max_sequence_length": 16},
}


def _chroma() -> ChromaPipeline:
    transformer = ChromaTransformer2DModel(
        in_channels=4 * CHANNELS,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=3,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 2, 2),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    return ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=make_vae(shift_factor=0.1),
        text_encoder=make_t5(WIDTH),
        tokenizer=text.t5_tokenizer(),
        transformer=transformer,
    )


def _kontext() -> FluxKontextPipeline:
    pipe = flux.build(vae.build(), heads=2, double=1, single=1)
    return FluxKontextPipeline(**pipe.components)


def _ovis() -> OvisImagePipeline:
    tokenizer = make_qwen_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    transformer = OvisImageTransformer2DModel(
        in_channels=4 * CHANNELS,
        out_channels=4 * CHANNELS,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=3,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 2, 2),
    )
    return OvisImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=make_vae(shift_factor=0.1),
        text_encoder=Qwen3Model(Qwen3Config(**make_language(tokenizer), head_dim=8)),
        tokenizer=tokenizer,
        transformer=transformer,
    )


def _auraflow() -> AuraFlowPipeline:
    tokenizer = text.t5_tokenizer()
    config = UMT5Config(
        vocab_size=len(tokenizer), d_model=WIDTH, d_kv=8, d_ff=WIDTH, num_layers=1, num_heads=2
    )
    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=3,
        joint_attention_dim=WIDTH,
        caption_projection_dim=24,
        pos_embed_max_size=64,
    )
    return AuraFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(config),
        vae=make_vae(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )


BUILDERS = {
    "chroma": _chroma,
    "kontext": _kontext,
    "ovis": _ovis,
    "auraflow": _auraflow,
}
