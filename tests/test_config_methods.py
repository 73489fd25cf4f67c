"""Methods are declared once; all that names them reads the declaration."""

import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest
from imports import loaded_by

import ecodiff
from ecodiff.config import methods
from ecodiff.config.methods import METHODS
from ecodiff.config.variants import Variant

PACKAGE = Path(ecodiff.__file__).parent
OTHER_MEANINGS = {
    "ecodiff": "the name of the package",
    "sensitivity": "a value of mask.first_logit",
    "per-step": "a value of mask.loss",
}
DOCS = PACKAGE.parent / "docs/methods.md"


@pytest.mark.parametrize("name", METHODS)
def test_every_entry_has_a_function_of_a_pipeline_and_a_request(name):
    module, _, function = METHODS[name].function.partition(":")
    assert [*inspect.signature(getattr(import_module(module), function)).parameters] == [
        "pipe",
        "request",
    ]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_names_variants(name):
    assert Variant.parse(f"{name}-20-comp").method == name


@pytest.mark.parametrize("name", METHODS)
def test_no_other_file_declares_a_method(name):
    """The name of a method, quoted by itself, stands in its entry alone."""
    if name in OTHER_MEANINGS:
        pytest.skip(OTHER_MEANINGS[name])
    quoted = re.compile(rf"""["']{name}["']""")
    found = [
        str(path.relative_to(PACKAGE))
        for path in [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "workflow").rglob("*.smk")]
        if quoted.search(path.read_text())
    ]
    assert found == ["config/methods.py"]


def test_the_docs_show_the_table_of_the_entries():
    assert methods.table() in DOCS.read_text()


def test_declaring_methods_needs_no_torch():
    assert "torch" not in loaded_by("ecodiff.config.methods")
