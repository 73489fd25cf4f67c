"""Parts of tiny pipelines: autoencoders, text encoders and tokenizers with random weights."""

from __future__ import annotations

import json

from diffusers import AutoencoderKL, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    GemmaTokenizer,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
)

from ecodiff.toys import text, world

WIDTH = 16  # of the texts
CHANNELS = 4  # of the latents, whose sides are a quarter of the picture's


def make_unet(**config: object) -> UNet2DConditionModel:
    """Attention on the upper level and in the middle."""
    defaults = {"attention_head_dim": 2, "layers_per_block": 1, "norm_num_groups": 4}
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        **{**defaults, **config},
    )


def make_vae(**config: object) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 4, 4),
        latent_channels=CHANNELS,
        norm_num_groups=2,
        scaling_factor=0.5,
        force_upcast=False,
        **config,
    )


def make_video_vae() -> dict[str, object]:
    return {
        "base_dim": 4,
        "z_dim": CHANNELS,
        "dim_mult": [1, 2, 2],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True],
        "latents_mean": [0.25, -0.5, 0.0, 1.0],
        "latents_std": [2.0, 0.5, 1.0, 1.5],
    }


def make_clip(kind: type = CLIPTextModel):
    tokenizer = text.clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=WIDTH,
        max_position_embeddings=text.MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer, kind(config)


def make_t5(width: int) -> T5EncoderModel:
    words = len(text.t5_tokenizer())
    config = T5Config(vocab_size=words, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return T5EncoderModel(config)


def make_language(tokenizer: object) -> dict[str, object]:
    """The config of a small decoder of text."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def make_qwen_tokenizer() -> Qwen2Tokenizer:
    """Bytes, merged to the world's words and to those of Qwen-Image's system prompt."""
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    system = (
        "system Describe the image by detailing the color, shape, size, texture, quantity,"
        " text, spatial relationships of the objects and background: user assistant"
    )
    vocab, merges = _byte_pairs(
        [system, *(f" {word}" for word in world.vocabulary())],
        bytes_,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=bytes_.alphabet(),
    )
    return Qwen2Tokenizer(vocab=vocab, merges=merges)


def make_gemma_tokenizer() -> GemmaTokenizer:
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    words = [" ".join(world.vocabulary())]
    vocab, merges = _byte_pairs(words, pre_tokenizers.Metaspace(), special_tokens=special)
    return GemmaTokenizer(vocab=vocab, merges=merges)


def _byte_pairs(lines: list[str], splits: object, **options: object):
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = splits
    bpe.train_from_iterator(lines, trainers.BpeTrainer(show_progress=False, **options))
    learned = json.loads(bpe.to_str())["model"]
    return learned["vocab"], [tuple(merge) for merge in learned["merges"]]
