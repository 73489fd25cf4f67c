"""ShapeWorld's pictures, captions and splits."""

from __future__ import annotations

import numpy as np
import pytest

from ecodiff.toys import world
from ecodiff.toys.world import Scene, Thing


def test_world_is_as_rich_as_promised():
    assert len(world.SHAPES) >= 6
    assert len(world.COLOURS) >= 8
    assert len(world.RADII) == 2
    assert len(world.BACKGROUNDS) >= 4


def test_caption_reads_as_english():
    things = Thing("small", "red", "ring"), Thing("large", "blue", "square")
    scene = Scene("navy", things, "left of")
    assert scene.caption == "a small red ring left of a large blue square on navy"
    assert world.parse_caption(scene.caption) == scene


@pytest.mark.parametrize("caption", ["", "a cat", "a small red ring", "a small red ring on pink"])
def test_foreign_captions_are_refused(caption):
    with pytest.raises(ValueError, match="not a ShapeWorld caption"):
        world.parse_caption(caption)


def test_sampling_repeats_with_its_seed():
    scenes = [world.sample_scene(np.random.default_rng(3)) for _ in range(2)]
    assert scenes[0] == scenes[1]


def test_splits_never_share_a_caption():
    rng = np.random.default_rng(0)
    train, held_out = (
        {world.sample_scene(rng, split).caption for _ in range(300)}
        for split in ("train", "held-out")
    )
    assert not train & held_out


def test_square_is_drawn_where_it_should_be():
    image = world.render(Scene("black", (Thing("large", "white", "square", 20, 30),)))
    lit = np.argwhere(image.sum(-1) > 0)
    assert lit.min(0).tolist() == [18, 8]
    assert lit.max(0).tolist() == [41, 31]


@pytest.mark.parametrize("relation", world.RELATIONS)
def test_objects_never_touch(relation):
    rng = np.random.default_rng(1)
    pair = Thing("large", "red", "square"), Thing("large", "blue", "square")
    for _ in range(50):
        first, second = world.place(Scene("black", pair, relation), rng).things
        apart = second.x - first.x if relation == "left of" else second.y - first.y
        assert apart >= 2 * world.RADII["large"] + world.GAP
