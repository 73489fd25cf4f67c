"""What modulation by rank removes of real models: `python benchmarks/ranks.py`.

Denoisers are built on the meta device from their public configs; no weights are needed. All linears
that read the conditioning alone get one rank, or stay whole where it would not pay.
"""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import diffusers
import pandas as pd
from accelerate import init_empty_weights

from ecodiff.models.structures import count_parameters, discover, maskable_share
from ecodiff.report.tables import markdown

CONFIGS = Path(__file__).parents[1] / "tests/configs"
MODELS = {
    "flux": "FLUX.1",
    "sd3-medium": "SD 3 medium",
    "sd35-large": "SD 3.5 large",
    "qwen-image": "Qwen-Image",
}
RANKS = (16, 32, 64, 128)


def main() -> None:
    """Print one table, a row a model."""
    rows = []
    for name, title in MODELS.items():
        facts = json.loads((CONFIGS / f"{name}.json").read_text())
        config = facts["config"] | (
            {"pos_embed_max_size": 1} if "pos_embed_max_size" in facts["config"] else {}
        )
        with init_empty_weights():
            denoiser = getattr(diffusers, facts["class"])(**config)
        total = count_parameters(denoiser)
        directions = [s for s in discover(denoiser, "rank") if s.directions_of]
        gone = [sum(max(0, s.removed(s.units - rank)) for s in directions) for rank in RANKS]
        shares = [f"{100 * removed / total:.1f} %" for removed in gone]
        whole = f"{100 * maskable_share(directions, total):.1f} %"
        rows.append([title, f"{total / 1e9:.2f}", len(directions), whole, *shares])
    head = ["model", "parameters (10⁹)", "linears", "all of them", *(f"rank {r}" for r in RANKS)]
    print(f"{date.today()}\n\n{markdown(pd.DataFrame(rows, columns=head))}")


if __name__ == "__main__":
    main()
