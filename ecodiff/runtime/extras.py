"""Libraries that only some stages need, and the extra of the package that installs each.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ecodiff.runtime.errors import UserError

# Names as they are imported; pyproject.toml has the same libraries, as an index names them.
EXTRAS = {
    "evaluate": ("open_clip", "scipy", "torch_fidelity", "torchmetrics", "torchvision"),
    "prompts": ("datasets",),
    "report": ("jinja2", "matplotlib"),
    "retrain": ("peft",),
}


@contextmanager
def extras_named() -> Iterator[None]:
    """Within it, a missing library of an extra is a line that says how to install it.

    Raises:
        UserError: a library of `EXTRAS` is not installed. Any other is raised as it is.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        for extra, libraries in EXTRAS.items():
            if library in libraries:
                raise UserError(
                    f"{extra}: {library} is not installed; pip install 'ecodiff[{extra}]'"
                ) from error
        raise
