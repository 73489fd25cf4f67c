"""CLIP and T5 tokenizers for ShapeWorld's vocabulary, and small text encoders for them."""

from __future__ import annotations

import json
from string import ascii_lowercase

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from ecodiff.toys import world

MAX_TOKENS = 16  # the longest caption has 13 words; CLIP adds two tokens, T5 one
WIDTH = 64


def clip_tokenizer() -> CLIPTokenizer:
    """A byte-pair tokenizer whose merges make each word of ShapeWorld one token."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    # Final letters are listed, too: the trainer would number them in no fixed order.
    last_letters = [f"{letter}</w>" for letter in ascii_lowercase]
    trainer = trainers.BpeTrainer(
        special_tokens=["<|startoftext|>", "<|endoftext|>", *last_letters],
        initial_alphabet=list(ascii_lowercase),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator([" ".join(world.vocabulary())], trainer)
    learned = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) for merge in learned["merges"]]
    return CLIPTokenizer(vocab=learned["vocab"], merges=merges, model_max_length=MAX_TOKENS)


def t5_tokenizer() -> T5Tokenizer:
    """A unigram tokenizer that prefers whole words of ShapeWorld and falls back on letters."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0)]
    words = [(f"▁{word}", -1.0) for word in world.vocabulary()]
    letters = [(letter, -10.0) for letter in ascii_lowercase]
    return T5Tokenizer(vocab=special + words + letters, extra_ids=0, model_max_length=MAX_TOKENS)


def clip_encoder(tokenizer: CLIPTokenizer, *, projection: bool = False) -> CLIPTextModel:
    """An untrained CLIP text encoder, with a final projection for SDXL's second encoder."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=WIDTH,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def t5_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """An untrained T5 encoder."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        d_ff=4 * WIDTH,
        d_kv=16,
        num_layers=3,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    return T5EncoderModel(config)
