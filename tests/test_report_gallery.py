import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from browser import browser
from safetensors.numpy import load_file, save_file
from synthetic import harm_of, write_run

from ecodiff.config.variants import Variant
from ecodiff.report.gallery import gallery, write_gallery
from ecodiff.report.results import Results
from ecodiff.runtime.errors import UserError


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return write_run(tmp_path_factory.mktemp("a run #1"))


def test_each_variant_has_its_scores_prompt_by_prompt(results: Results) -> None:
    data = gallery(results)
    captions = results.captions()
    assert [one["prompt"] for one in data["prompts"]] == captions.tolist()
    dense, first, *_ = data["models"]["toy-flux"]
    assert (dense["label"], first["label"]) == ("Dense", "EcoDiff, 10 %")
    assert set(dense["scores"]) == {"clip_score", "scene_accuracy"}  # the others are trivial
    assert first["scores"]["clip_score"][:2] == [0.9, 0.89]
    assert first["scores"]["scene_accuracy"][:3] == [False, True, False]
    harm = harm_of(Variant.parse("ecodiff-10"))
    expected = [harm * (1 + row) for row in range(10)]  # the variance is 4
    assert first["scores"]["latent_error"] == pytest.approx(expected, abs=1e-4)


def test_captions_that_nothing_checks_have_no_verdict(tmp_path: Path) -> None:
    results = write_run(tmp_path, ("toy-flux",), ["random-10"])
    for file in tmp_path.glob("toy-flux/*/seen/evaluation/*"):
        save_file({**load_file(file), "objects": np.zeros(5)}, file)
    assert "scene_accuracy" not in gallery(results)["models"]["toy-flux"][1]["scores"]


def test_what_was_seen_of_other_prompts_is_refused(tmp_path: Path) -> None:
    results = write_run(tmp_path, ("toy-flux",), ["random-10"])
    table = pd.read_parquet(results.prompts)
    table["index"] += 1
    table.to_parquet(results.prompts)
    with pytest.raises(
        UserError, match=r"dense/seen/evaluation: is not of the prompts of .*evaluation"
    ):
        gallery(results)


@pytest.mark.parametrize("damage", ["missing", "cut", "of another stage"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    results = write_run(tmp_path, ("toy-flux",), ["random-10"])
    file = tmp_path / "toy-flux/random-10/seen/evaluation/1.safetensors"
    content = file.read_bytes()
    file.unlink()
    if damage == "cut":
        file.write_bytes(content[:50])
    elif damage == "of another stage":
        save_file({"index": np.zeros(1)}, file)
    with pytest.raises(
        UserError, match=r"random-10/seen/evaluation/1\.safetensors: cannot be read"
    ):
        gallery(results)


def test_no_caption_ends_the_script(tmp_path: Path) -> None:
    results = write_run(tmp_path, ("toy-flux",), ["random-10"])
    table = pd.read_parquet(results.prompts)
    table.loc[0, "prompt"] = "a </script><script>alert(1)</script> ring & <b>"
    table.to_parquet(results.prompts)
    write_gallery(results, tmp_path / "index.html")
    text = (tmp_path / "index.html").read_text()
    assert text.count("</script>") == 2
    data = text.split('id="data">')[1].split("</script>")[0]
    assert json.loads(data)["prompts"][0]["prompt"] == table.loc[0, "prompt"]


@pytest.fixture(scope="module")
def page(results: Results, tmp_path_factory: pytest.TempPathFactory):
    """The gallery in a browser."""
    write_gallery(results, results.folder / "index.html")
    with browser(tmp_path_factory.mktemp("browser")) as found:
        yield found
        assert not found.errors


SHOWN = "[...document.querySelectorAll('#pictures img')]"
LOADED = f"{SHOWN}.length && {SHOWN}.every(one => one.complete)"
CAPTION = "document.getElementById('caption').textContent"


def loaded(page) -> list[str]:
    """The pictures that are shown; all are there."""
    page.until(LOADED)
    assert page.js(f"{SHOWN}.every(one => one.naturalWidth === 64)")
    return page.js(f"{SHOWN}.map(one => decodeURIComponent(one.src).split('a run #1')[1].slice(2))")


@pytest.mark.slow
def test_a_prompt_is_picked_with_the_mouse_and_with_keys(page, results: Results, tmp_path) -> None:
    page.open(results.folder / "index.html")
    captions = results.captions().tolist()
    assert page.js(CAPTION) == captions[0]
    names = results.variants["toy-sdxl"]
    assert loaded(page) == [f"toy-sdxl/{name}/images/evaluation/0/00000.png" for name in names]
    page.key("ArrowRight")
    page.key("ArrowRight")
    assert page.js(CAPTION) == captions[2]
    page.key("ArrowLeft")
    assert page.js(CAPTION) == captions[1]
    page.click("document.querySelector('#prompts option:nth-child(8)')")
    assert page.js(CAPTION) == captions[7]
    assert (
        loaded(page)[1] == "toy-sdxl/ecodiff-10/images/evaluation/1/00007.png"
    )  # the second shard
    scores = page.js("document.querySelector('#pictures figure:nth-child(2)').innerText")
    assert "EcoDiff, 10\u00a0%" in scores and "0.830" in scores and "yes" in scores
    page.screenshot(tmp_path / "gallery.png")


@pytest.mark.slow
def test_space_shows_the_dense_pictures_in_place_of_all(page, results: Results) -> None:
    page.open(results.folder / "index.html")
    before = loaded(page)
    page.key(" ", ("keyDown",))
    assert set(loaded(page)) == {before[0]}
    page.key(" ", ("keyUp",))
    assert loaded(page) == before


@pytest.mark.slow
def test_captions_are_searched_and_ordered(page, results: Results) -> None:
    page.open(results.folder / "index.html")
    captions = results.captions().tolist()
    page.key("/")
    words = captions[4].split()
    page.write(" ".join(reversed(words)))
    found = page.js("[...document.getElementById('prompts').options].map(one => one.text)")
    assert captions[4] in found and len(found) < 10
    page.js("document.getElementById('search').select()")
    page.write(" ")
    page.js("order.value = 'random-30'; order.onchange()")
    found = page.js("[...document.getElementById('prompts').options].map(one => one.text)")
    assert found == captions[::-1]  # errors grow with the row
    assert page.js(CAPTION) == captions[-1]


@pytest.mark.slow
def test_a_view_has_an_address_and_m_changes_the_model(page, results: Results) -> None:
    page.open(results.folder / "index.html", "#toy-flux/3")
    assert page.js(CAPTION) == results.captions().tolist()[3]
    assert loaded(page)[0] == "toy-flux/dense/images/evaluation/0/00003.png"
    page.key("m")
    assert page.js("location.hash") == "#toy-sdxl/3"
    assert loaded(page)[0] == "toy-sdxl/dense/images/evaluation/0/00003.png"
