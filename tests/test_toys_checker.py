"""The checker against rendered truth, and against pictures that must not pass."""

from __future__ import annotations

import numpy as np
import pytest

from ecodiff.toys import checker, world
from ecodiff.toys.world import Scene, Thing

RED_RING = Thing("small", "red", "ring", 15, 20)
BLUE_SQUARE = Thing("large", "blue", "square", 45, 30)
PAIR = Scene("navy", (RED_RING, BLUE_SQUARE), "left of")


def sample(count, seed=0):
    rng = np.random.default_rng(seed)
    return [world.sample_scene(rng, "held-out") for _ in range(count)]


def test_rendered_truth_scores_at_least_99_percent():
    scenes = sample(400)
    images = [world.render(scene) for scene in scenes]
    assert checker.scene_accuracy(images, [s.caption for s in scenes]) >= 0.99


def test_noise_of_five_percent_changes_nothing():
    rng = np.random.default_rng(0)
    scenes = sample(100)
    noisy = [world.render(s) + rng.normal(0, 12, (64, 64, 3)) for s in scenes]
    images = [np.clip(image, 0, 255).astype(np.uint8) for image in noisy]
    assert checker.scene_accuracy(images, [s.caption for s in scenes]) >= 0.99


def test_places_are_read_to_a_pixel():
    background, things = checker.read_scene(world.render(PAIR))
    assert background == "navy"
    ring = next(thing for thing in things if thing.shape == "ring")
    assert (ring.x, ring.y) == (pytest.approx(15, abs=1), pytest.approx(20, abs=1))


@pytest.mark.parametrize(
    "caption",
    [
        "a small red ring left of a large blue square on black",
        "a small red ring left of a large cyan square on navy",
        "a small red circle left of a large blue square on navy",
        "a large red ring left of a large blue square on navy",
        "a large blue square left of a small red ring on navy",
        "a small red ring on navy",
    ],
)
def test_one_wrong_word_fails(caption):
    image = world.render(PAIR)
    assert checker.meets(image, PAIR.caption)
    assert not checker.meets(image, caption)


def test_a_shape_of_another_world_is_not_read():
    image = world.render(Scene("black", (Thing("large", "red", "square", 30, 30),)))
    image[18:42:4] = 0  # a blind instead of a square
    image[20:42:4] = 0
    assert not checker.meets(image, "a large red square on black")
