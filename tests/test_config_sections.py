import pytest

from ecodiff.config.reading import read_settings
from ecodiff.config.sections import PromptSet
from ecodiff.runtime.errors import UserError

COCO = {"source": "coco", "path": "c.json", "images": "val", "count": 2}


def refused(**settings):
    with pytest.raises(UserError) as error:
        read_settings(PromptSet, settings)
    return str(error.value)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"source": "file"}, "path"),
        ({"source": "gcc"}, "path"),
        ({"source": "coco", "path": "c.json"}, "images"),
        ({"source": "flickr30k", "images": "i"}, "path"),
    ],
)
def test_a_source_needs_its_files(settings, key):
    assert refused(count=1, **settings) == f"source {settings['source']} needs the key {key}"


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"source": "shapeworld", "path": "p.txt"}, "path"),
        ({"source": "shapeworld", "images": "i"}, "images"),
        ({"source": "shapeworld", "column": "text"}, "column"),
        ({"source": "file", "path": "p.csv", "images": "i"}, "images"),
        ({"source": "file", "path": "p.csv", "split": "held-out"}, "split"),
        ({"source": "file", "path": "p.TXT", "column": "text"}, "column"),
        ({"source": "gcc", "path": "g.tsv", "images": "i"}, "images"),
        ({**COCO, "column": "text"}, "column"),
    ],
)
def test_keys_that_nothing_reads_are_refused(settings, key):
    assert refused(**{"count": 1, **settings}).startswith(f"{key}: nothing reads it")


def test_all_values_of_a_set_make_that_set_again():
    chosen = PromptSet(**COCO)
    assert PromptSet(**chosen.model_dump()) == chosen


def test_the_last_seed_is_one_that_noise_is_drawn_from():
    assert PromptSet(source="shapeworld", count=2, seed=2**63 - 2).seed == 2**63 - 2
    assert "seed + count" in refused(source="shapeworld", count=2, seed=2**63 - 1)
    assert "seed + count" in refused(source="shapeworld", count=1, seed=2**64)


def test_a_set_knows_the_files_that_it_is_read_from():
    assert PromptSet(**COCO).files == ["c.json", "val"]
    assert PromptSet(source="file", path="p.txt", count=1).files == ["p.txt"]
    assert PromptSet(source="shapeworld", count=1).files == []
