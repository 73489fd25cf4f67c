"""The toys are genuine pipelines of the families that they stand for."""

from __future__ import annotations

from dataclasses import asdict

import open_clip
import pytest
import torch

from ecodiff.runtime.errors import UserError
from ecodiff.runtime.state import State
from ecodiff.toys import clip, flux, sdxl, text, training, vae, world
from ecodiff.toys.making import make
from ecodiff.toys.training import Recipe

LONGEST = "a small magenta triangle left of a large magenta triangle on maroon"


@pytest.mark.parametrize("tokenizer", [text.clip_tokenizer(), text.t5_tokenizer()])
def test_every_word_of_the_world_is_one_token(tokenizer):
    assert all(len(tokenizer.tokenize(word)) == 1 for word in world.vocabulary())
    assert len(tokenizer(LONGEST).input_ids) <= text.MAX_TOKENS


def test_the_trained_tokenizer_is_the_same_every_time():
    vocabularies = [text.clip_tokenizer().get_vocab() for _ in range(8)]
    assert all(vocabulary == vocabularies[0] for vocabulary in vocabularies)


@pytest.mark.parametrize("tokenizer", [text.clip_tokenizer(), text.t5_tokenizer()])
def test_a_saved_tokenizer_reads_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert again(LONGEST).input_ids == tokenizer(LONGEST).input_ids


def test_toy_sdxl_has_two_attention_levels_and_depth_beyond_one():
    config = sdxl.build(vae.build()).unet.config
    assert config.down_block_types.count("CrossAttnDownBlock2D") >= 2
    assert "DownBlock2D" in config.down_block_types
    assert max(config.transformer_layers_per_block) > 1


def test_toy_flux_has_three_double_and_six_single_blocks():
    transformer = flux.build(vae.build()).transformer
    assert len(transformer.transformer_blocks) >= 3
    assert len(transformer.single_transformer_blocks) >= 6


def test_toy_clip_loads_through_open_clip_alone(tmp_path):
    torch.manual_seed(0)
    model = open_clip.model.CLIP(**clip.CONFIG).half().float().eval()
    clip.save(model, tmp_path)
    loaded, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    loaded.eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path}")([LONGEST])
    assert tokens.tolist() == clip.tokenize(text.t5_tokenizer(), [LONGEST]).tolist()
    torch.testing.assert_close(loaded.encode_text(tokens), model.encode_text(tokens))


def test_training_repeats_to_the_bit():
    recipe = Recipe(cycles=(2,), batch=2, lr=1e-3)
    first, second = (vae.train(recipe)[0].state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_killed_training_ends_as_if_it_had_never_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)
    recipe, state = Recipe(cycles=(2, 3), batch=2, lr=1e-2), tmp_path / "state.safetensors"

    def train(dies_at=None, state=None):
        torch.manual_seed(0)
        linear = torch.nn.Linear(3, 2)
        module = torch.nn.ModuleList([linear, linear])  # T5 too holds a weight under two names

        def loss_of_step(step):
            if step == dies_at:
                raise KeyboardInterrupt
            return linear(torch.randn(4, 3)).square().mean()

        training.fit(module, recipe, loss_of_step, "linear", state)
        return linear.weight

    with pytest.raises(KeyboardInterrupt):
        train(dies_at=3, state=state)
    assert state.exists()
    resumed = train(dies_at=1, state=state)  # a step before the death is not run again
    assert torch.equal(resumed, train())
    assert not state.exists()


def test_each_cycle_rises_and_falls_again():
    recipe = Recipe(cycles=(4, 8), batch=1, lr=1.0, warmup=2)
    rates = [recipe.lr_of(step) for step in range(recipe.steps)]
    halves = [0.5, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4]  # a cosine's quarters
    assert rates[:4] == pytest.approx(halves)
    assert rates[6:12:2] == pytest.approx(halves[1:])
    assert [step for step in range(recipe.steps) if recipe.starts_cycle(step)] == [4]


def test_a_shipped_toy_goes_on_as_if_its_next_cycle_had_followed_at_once(tmp_path):
    both, state = Recipe(cycles=(2, 3), batch=2, lr=1e-2), tmp_path / "state.safetensors"

    def fit(recipe, linear, state=None):
        def loss_of_step(step):
            return linear(torch.randn(4, 3)).square().mean()

        training.fit(linear, recipe, loss_of_step, "linear", state)
        return linear

    def new():
        torch.manual_seed(0)
        return torch.nn.Linear(3, 2)

    shipped = fit(Recipe(cycles=(2,), batch=2, lr=1e-2), new()).half().float()
    optimizer = torch.optim.AdamW(shipped.parameters())
    unfinished = State(state, asdict(both), dict(shipped.named_parameters()), optimizer)
    unfinished.write({"step": 2, "seconds": 0.0})
    assert torch.equal(fit(both, new(), state).weight, fit(both, new()).weight)


def test_latents_have_unit_scale():
    model = vae.train(Recipe(cycles=(1,), batch=2, lr=1e-3))[0]
    latents, captions = training.Latents(model, Recipe((1,), 64, 0.0), pictures=64).batch(0)
    assert latents.shape == (64, 4, 16, 16)
    assert len(captions) == 64
    assert latents.std().item() == pytest.approx(1, abs=0.2)


def test_an_unknown_toy_is_named(tmp_path):
    with pytest.raises(UserError, match="toy-vae, toy-sdxl"):
        make("toy-gan", tmp_path)
