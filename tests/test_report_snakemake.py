"""`snakemake --report` and the gallery of a real run, clicked through in a browser."""

import re
from base64 import b64decode

import pytest
from browser import browser
from workflow_runs import run, snakemake, tiny_models, tiny_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run and its report."""
    folder = tmp_path_factory.mktemp("report")
    tiny_models(folder)
    done = run(folder, tiny_run())
    assert done.returncode == 0, done.stdout + done.stderr
    done = snakemake(folder, "--configfile", "run.yaml", "--report", "report.html")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def page(finished, tmp_path_factory):
    with browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


def link(text):
    """The link of the report's menu that begins with a text."""
    return f"[...document.querySelectorAll('a')].find(one => one.innerText.trim() === '{text}')"


def in_row(*labels):
    """The button that shows the result with some labels."""
    words = " && ".join(f"one.innerText.includes('{label}')" for label in labels)
    return f"[...document.querySelectorAll('tr')].find(one => {words}).querySelector('a')"


def test_the_report_opens_with_what_it_is_and_a_category_a_stage(page, finished):
    page.open(finished / "report.html")
    page.until("document.body.innerText.includes('Run small')")
    shown = page.js("document.body.innerText")
    assert "retrained only where a variant's name says so" in shown
    assert re.findall(r"^\d \w+$", shown, re.M) == ["4 prune", "6 generate", "7 evaluate"]
    page.screenshot(finished / "landing.png")


def test_each_result_has_labels_and_a_caption_of_its_own(page, finished):
    page.open(finished / "report.html")
    captions = page.js("Object.values(results).map(one => one.caption)")
    names = page.js("Object.values(results).map(one => one.name)")
    assert all(page.js("Object.values(results).map(one => Object.keys(one.labels).length > 0)"))
    figures = {n: c for n, c in zip(names, captions, strict=True) if n.endswith(".png")}
    assert len(figures) == len(set(figures.values())) == 4  # nothing was learned or timed
    ranking, main = (captions[names.index(f"{table}.html")] for table in ("ranking", "main"))
    assert "ranked by their latent error" in ranking and ranking != main


def test_a_figure_is_seen_with_a_click(page, finished):
    page.open(finished / "report.html")
    page.until(link("7 evaluate"))
    page.click(link("7 evaluate"))
    page.until(in_row("quality", "tiny"))
    page.click(in_row("quality", "tiny"))
    page.until("[...document.images].some(one => one.naturalWidth === 1210)")
    page.screenshot(finished / "figure.png")


def test_a_table_is_seen_and_sorted_with_clicks(page, finished):
    page.open(finished / "report.html")
    page.until(link("7 evaluate"))
    page.click(link("7 evaluate"))
    page.until(in_row("ranking", "html"))
    page.click(in_row("main", "html"))
    page.until("document.querySelector('iframe')")
    source = page.js("document.querySelector('iframe').src")
    table = finished / "main.html"
    table.write_bytes(b64decode(source.partition("base64,")[2]))
    page.screenshot(finished / "table.png")
    page.open(table)
    column = "[...document.querySelectorAll('th')].find(one => one.innerText.startsWith('Exact'))"
    shown = "[...document.querySelectorAll('tbody tr')].map(one => one.children[1].innerText)"
    assert page.js(shown) == ["Dense", "Random"]
    page.click(f"{column}.querySelector('button')")
    page.click(f"{column}.querySelector('button')")
    assert page.js(shown) == ["Random", "Dense"]
    assert not page.errors


def test_the_gallery_of_a_run_shows_its_pictures(page, finished):
    page.open(finished / "results/small/index.html")
    page.until("[...document.images].length === 2 && [...document.images].every(o => o.complete)")
    assert page.js("[...document.images].every(one => one.naturalWidth === 64)")
    page.click("document.querySelector('a')")  # the main table
    page.until("document.title === 'Results'")
