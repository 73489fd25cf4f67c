"""Prompt files of any content, and what comes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from ecodiff.config.sections import PromptSet
from ecodiff.prompts import make_prompts
from ecodiff.runtime.errors import UserError


def prompts(
    path: Path, content: str | bytes, count: int, source: str = "file", **settings: Any
) -> pd.DataFrame:
    """The table of `count` prompts from a file of this content."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    chosen = PromptSet(source=source, path=str(path), count=count, **settings)
    return make_prompts(chosen, path.parent / "none")


def listed(*arguments: Any, **settings: Any) -> list[str]:
    return prompts(*arguments, **settings)["prompt"].tolist()


def refused(path: Path, content: str | bytes, **settings: Any) -> str:
    """What is said of a file, without its path."""
    with pytest.raises(UserError) as error:
        prompts(path, content, count=1, **settings)
    text = str(error.value)
    assert "\n" not in text
    assert str(path) in text
    return text.replace(str(path), "FILE")
