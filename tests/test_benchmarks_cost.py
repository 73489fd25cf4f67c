"""benchmarks/cost.py against operations and bytes that are worked out by hand."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from ecodiff.config.run import Config, load_config
from ecodiff.runtime.errors import UserError

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TOY = "resources/toys/toy-flux"
# toy-flux at 64 px: 64 tokens of the picture and 16 of the caption, 96 wide, feed-forwards of 384.
WIDE, PICTURE, WORDS = 96, 64, 16
ALL = PICTURE + WORDS
ATTENTION = 2 * ALL * ALL * WIDE
DOUBLE = (
    2 * 6 * WIDE**2 + ALL * (4 + 8) * WIDE**2 + ATTENTION
)  # modulation, attention, feed-forward
SINGLE = 3 * WIDE**2 + ALL * (3 + 4 + 5) * WIDE**2 + ATTENTION
EDGES = 2 * PICTURE * 16 * WIDE + WORDS * 64 * WIDE  # in, out, caption
EDGES += (256 + 64 + 2 * WIDE) * WIDE + 2 * WIDE**2  # time, pooled caption, last modulation
STEP = 2 * (3 * DOUBLE + 6 * SINGLE + EDGES)
GRAMS = 8 * (3 * (2 * 96**2 + 2 * 384**2) + 6 * 480**2)  # bytes of float64


@pytest.fixture
def cost(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import cost

    yield cost
    sys.modules.pop("cost")
    sys.modules.pop("sizes")


def config(source: str = TOY) -> Config:
    call = {"num_inference_steps": 8, "max_sequence_length": 16, "height": 64, "width": 64}
    drawn: dict[str, Any] = {"source": "shapeworld"}
    prompts = {
        "calibration": drawn | {"count": 100, "seed": 1000},
        "evaluation": drawn | {"count": 50, "seed": 5000, "split": "held-out"},
    }
    return load_config(
        {
            "run": "sums",
            "models": {"toy": {"source": source, "call": call}},
            "variants": [{"method": "ecodiff", "sparsities": [0.2], "compensation": True}],
            "prompts": prompts,
            "evaluate": {"clip_model": "local-dir:resources/toys/toy-clip", "clip_pretrained": None}
            | {"features": "clip"},
        }
    )


def test_hours_and_bytes_are_those_worked_out_by_hand(cost):
    """At a rate of one step an hour, hours are steps."""
    found = cost.table(config(), rate=1.0, float32=STEP / 3600).set_index("stage")
    hours = found["GPU-hours"]
    assert hours["calibrate"] == pytest.approx(100 * 8)
    assert hours["mask"] == pytest.approx((25 + 12 * 2) * 8 * 3)
    assert hours["generate"] == pytest.approx(50 * 8 * (1 + 0.8))
    rows = 3 * 2 * ALL * (96**2 + 384**2) + 6 * 2 * ALL * 480**2
    assert hours["grams"] == pytest.approx(100 * 8 * (1 + rows / STEP))
    assert found["disk GB"]["grams"] == pytest.approx(GRAMS / 1e9)
    assert found["jobs"]["generate"] == 2
    assert found["longest h"]["generate"] == pytest.approx(50 * 8)  # the dense one's
    assert found["host GB"]["grams"] == pytest.approx(GRAMS / 1e9)  # more than the weights


def test_a_model_that_is_not_known_is_named(cost):
    with pytest.raises(UserError, match=r"someone/model: neither a pipeline's folder"):
        cost.table(config("someone/model"), rate=1.0, float32=1.0)


@pytest.mark.slow
def test_what_the_papers_run_asks_of_a_cluster_is_what_it_needs_and_some_more(cost):
    papers = load_config(BENCHMARKS.parent / "config/paper.yaml")
    found = cost.table(papers, cost.USED * cost.BF16, cost.USED * cost.FLOAT32)
    for name, needed in found.groupby("model").max().iterrows():
        if name != "all":
            asked = papers.models[name].resources
            assert 1 <= asked.mem_mb / (1000 * needed["host GB"] + 4000) <= 1.5
            minutes = 60 * needed["longest h"]
            assert 1.5 * minutes <= asked.runtime <= max(4 * minutes, 60)
