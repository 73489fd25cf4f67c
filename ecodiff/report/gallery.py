"""A page to look at the pictures of a run, prompt by prompt. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ecodiff.config.variants import Variant
from ecodiff.report.pages import write_page
from ecodiff.report.results import Results
from ecodiff.report.style import COMPARED_TO_DENSE, label


@dataclass(frozen=True)
class Score:
    """A score of single pictures: a column of `Results.seen`, how it is called, and its digits."""

    key: str
    name: str
    digits: int


SCORES = (
    Score("clip_score", "CLIP score", 3),
    Score("scene_accuracy", "scene as told", 0),
    Score("ssim", "SSIM to dense", 3),
    Score("latent_error", "latent error", 4),
)


def write_gallery(results: Results, path: Path) -> None:
    """Write a page that shows a prompt's pictures of the dense model and all variants, with scores.

    It is one file that needs no server and no network; pictures are read from beside it, where
    `generate` left them.

    Args:
        results: of the run.
        path: of the page, in the run's folder.

    Raises:
        UserError: what was seen of the pictures is missing, damaged or of other prompts.
    """
    write_page(path, "gallery.html", data=gallery(results))


def gallery(results: Results) -> dict[str, Any]:
    """What the page shows, as JSON holds it: prompts by row, and of each model its variants, the
    dense one first, with their scores by row."""
    models = {
        model: [
            {"name": one.name, "label": label(one), "scores": _scores(results, model, one)}
            for one in results.of(model)
        ]
        for model in results.variants
    }
    return {
        "run": results.folder.resolve().name,
        "set": results.sets[0],
        "shard_size": results.shard_size,
        "prompts": results.table[["index", "prompt", "seed"]].to_dict("records"),
        "scores": [asdict(score) for score in SCORES],
        "models": models,
    }


def _scores(results: Results, model: str, variant: Variant) -> dict[str, list[float | bool]]:
    seen = results.seen(model, variant)
    trivial = COMPARED_TO_DENSE if variant.is_dense else ()
    chosen = [one for one in SCORES if one.key in seen and one.key not in trivial]
    return {one.key: seen[one.key].round(one.digits).tolist() for one in chosen}
