"""The methods that score units, each declared once.

A method is a function and an entry of `METHODS`. The choices of the config, what a workflow plans,
how tables and figures call it, and the table in docs/methods.md (which
`python -m ecodiff.config.methods` prints) all come from the entry. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Method:
    """A way to give each unit a score.

    Attributes:
        name: its name in configs and folders.
        title: its name in tables and figures.
        function: `module:function`, which takes a pipeline and a `mask.methods.Request`.
        score: what the score is, for docs/methods.md.
        source: where it was published.
        looks_at: what it reads besides the model's structures.
        learns: whether it iterates, with a history; others score once, for all sparsities.
        ranks: among which units its scores compare: those of the whole `model`, or those of each
            `structure`, so that every structure loses the same share.
        closes_on_means: whether it scores what closing a gate does, so that `mask.closed` counts.
        by_rank: whether it can score directions of what modulation linears read, so that
            `mask.modulation` counts; others remove modulation by channels.
        colours: in figures, without and with compensation.
    """

    name: str
    title: str
    function: str
    score: str
    source: str
    looks_at: Literal["nothing", "weights", "calibration"]
    colours: tuple[str, str]
    learns: bool = False
    ranks: Literal["model", "structure"] = "model"
    closes_on_means: bool = False
    by_rank: bool = False


# Okabe and Ito's palette first, which people with any kind of colour vision can tell apart.
_ALL = (
    Method(
        name="ecodiff",
        title="EcoDiff",
        function="ecodiff.mask.methods:learned",
        score="logit of a learned gate; the final latent must not change, all steps end to end; "
        "logits start from sensitivities",
        source="EcoDiff, Zhang et al. 2024; the start is ours",
        looks_at="calibration",
        colours=("#0072B2", "#56B4E9"),
        learns=True,
        closes_on_means=True,
        by_rank=True,
    ),
    Method(
        name="sensitivity",
        title="EcoDiff, not learned",
        function="ecodiff.mask.methods:sensitivities",
        score="change of the final latent when a unit alone is removed, to second order and over "
        "all steps, divided by its share of the parameters",
        source="ours",
        looks_at="calibration",
        colours=("#117733", "#44AA77"),
        closes_on_means=True,
        by_rank=True,
    ),
    Method(
        name="flat-start",
        title="EcoDiff, flat start",
        function="ecodiff.mask.methods:learned_from_a_flat_start",
        score="as `ecodiff`, but all logits start at 3 and closed gates give zero",
        source="EcoDiff",
        looks_at="calibration",
        colours=("#6A3D9A", "#B79BD6"),
        learns=True,
    ),
    Method(
        name="per-step",
        title="EcoDiff a step",
        function="ecodiff.mask.methods:learned_a_step_at_a_time",
        score="as `flat-start`, but each step's prediction must not change, on the dense model's "
        "own latents",
        source="EcoDiff, ablation",
        looks_at="calibration",
        colours=("#332288", "#8877CC"),
        learns=True,
    ),
    Method(
        name="obs",
        title="OBS-Diff score",
        function="ecodiff.mask.methods:obs",
        score="error of a layer without the unit once the rest of the layer is solved again, on "
        "the inputs of all steps, early ones weighing more (1.2 to 0.8, logarithmic); heads one by "
        "one",
        source="OBS-Diff, Zhu et al. 2025",
        looks_at="calibration",
        colours=("#882255", "#CC6688"),
        ranks="structure",
    ),
    Method(
        name="obs-inner",
        title="OBS-Diff score, inner blocks",
        function="ecodiff.mask.methods:obs_of_inner_blocks",
        score="as `obs`, but the first and the last block go last",
        source="OBS-Diff",
        looks_at="calibration",
        colours=("#DDAA33", "#EECC88"),
        ranks="structure",
    ),
    Method(
        name="wanda",
        title="Wanda",
        function="ecodiff.mask.methods:wanda",
        score="weight times norm of its input over all steps, summed over a unit's columns",
        source="Wanda, Sun et al. 2024",
        looks_at="calibration",
        colours=("#999933", "#CCCC77"),
        ranks="structure",
    ),
    Method(
        name="taylor",
        title="Diff-Pruning",
        function="ecodiff.mask.methods:taylor",
        score="weight times gradient of the training loss on noised latents of the dense model, "
        "absolute, summed over a unit's weights; timesteps whose loss exceeds 5 % of the largest",
        source="Diff-Pruning, Fang et al. 2023",
        looks_at="calibration",
        colours=("#661100", "#AA6644"),
        ranks="structure",
    ),
    Method(
        name="depth",
        title="Depth",
        function="ecodiff.mask.methods:depth",
        score="how much a unit's block changes its hidden states over all steps; whole blocks go",
        source="FLUX.1 Lite 2024; compare BK-SDM, Kim et al. 2023",
        looks_at="calibration",
        colours=("#666666", "#AAAAAA"),
    ),
    Method(
        name="magnitude",
        title="Magnitude",
        function="ecodiff.mask.methods:magnitude",
        score="root mean square of a unit's weights",
        source="",
        looks_at="weights",
        colours=("#D55E00", "#E69F00"),
    ),
    Method(
        name="magnitude-local",
        title="Magnitude a layer",
        function="ecodiff.mask.methods:magnitude",
        score="the same",
        source="",
        looks_at="weights",
        colours=("#AA4400", "#EEBB66"),
        ranks="structure",
    ),
    Method(
        name="random",
        title="Random",
        function="ecodiff.mask.methods:random",
        score="a random number",
        source="",
        looks_at="nothing",
        colours=("#009E73", "#CC79A7"),
    ),
)
METHODS = {method.name: method for method in _ALL}


def table() -> str:
    """The table of docs/methods.md: a row a method."""
    head = ("method", "score", "looks at", "units compete within", "source")
    rows = [(f"`{m.name}`", m.score, m.looks_at, f"the {m.ranks}", m.source) for m in _ALL]
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    print(table(), end="")
