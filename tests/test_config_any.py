"""Any config at all: it is taken, or refused in lines, and never a traceback."""

import copy
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ecodiff.config.plan import Plan
from ecodiff.config.reading import read_document
from ecodiff.config.run import load_config
from ecodiff.runtime.errors import UserError

CONFIGS = [
    yaml.safe_load(path.read_text())
    for path in sorted((Path(__file__).parents[1] / "config").glob("*.yaml"))
]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["ecodiff", "budget", "calibration", "auto", "mean", "1e400", "dense"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


def places(values, path=()):
    """The paths of all keys and items."""
    pairs = values.items() if isinstance(values, dict) else enumerate(values)
    for key, value in pairs if isinstance(values, dict | list) else ():
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


@st.composite
def configs(draw):
    """A shipped config with a few values replaced, removed or added."""
    found = copy.deepcopy(draw(st.sampled_from(CONFIGS)))
    for _ in range(draw(st.integers(1, 4))):
        paths = [*places(found)]
        if not paths:
            break
        *way, last = draw(st.sampled_from(paths))
        owner = found
        for key in way:
            owner = owner[key]
        match draw(st.sampled_from(["replace", "remove", "add"])):
            case "replace":
                owner[last] = draw(VALUES)
            case "remove":
                del owner[last]
            case "add" if isinstance(owner, dict):
                owner[draw(st.text(max_size=12))] = draw(VALUES)
    return found


def check(config):
    try:
        run = load_config(config)
    except UserError as error:
        assert str(error).strip()
        assert all(len(line) < 600 for line in str(error).splitlines())
        return
    plan = Plan(run)
    masks = set(plan.all_masks())
    assert all(plan.mask(model, variant.name) in masks for model, variant in plan.pruned[:20])


def check_text(text):
    try:
        values = read_document(text).values
    except UserError as error:
        assert str(error).strip()
        return
    if values is not None:
        check(values)


TEXTS = st.text(max_size=60) | st.lists(
    st.sampled_from(["run", ": ", "mask", "\n", "  ", "- ", "[", "{", "}", "&a", "*a", "1", "!!x"]),
    max_size=30,
).map("".join)
QUICK = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}


@given(configs())
@settings(max_examples=60, **QUICK)
def test_any_config_is_taken_or_refused_in_lines(config):
    check(config)


@given(TEXTS)
@settings(max_examples=100, **QUICK)
def test_any_text_is_taken_or_refused_in_lines(text):
    check_text(text)


@pytest.mark.slow
@given(configs())
@settings(max_examples=2000, **QUICK)
def test_two_thousand_configs(config):
    check(config)


@pytest.mark.slow
@given(TEXTS)
@settings(max_examples=2000, **QUICK)
def test_two_thousand_texts(text):
    check_text(text)
