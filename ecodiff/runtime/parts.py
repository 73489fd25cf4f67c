"""The finished parts of an unfinished folder: what a killed job continues from.

Imports no torch.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ecodiff.runtime.artifacts import atomic, write_text
from ecodiff.runtime.errors import UserError

log = logging.getLogger(__name__)


class Parts:
    """Folders that are made one after the other, each whole or not at all.

    Args:
        folder: where they lie until all are made.
        identity: what they depend on, as JSON holds it; those of another identity are removed.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        note, text = folder / "identity.json", json.dumps(identity, default=str)
        if folder.exists() and not (note.is_file() and note.read_text() == text):
            shutil.rmtree(folder)
        found = [*folder.glob("[0-9]*")]
        if found:
            log.info("%s: %s parts are there; it goes on after them", folder, len(found))
        folder.mkdir(parents=True, exist_ok=True)
        write_text(note, text)

    @contextmanager
    def make(self, number: int) -> Iterator[Path | None]:
        """A folder to fill, or None where that part is there already.

        What only a user can mend goes on from nothing, so on a `UserError` no part is left.
        """
        place = self.folder / f"{number:09d}"
        if place.exists():
            yield None
            return
        try:
            with atomic(place, folder=True) as scratch:
                yield scratch
        except UserError:
            self.discard()
            raise

    def files(self, pattern: str) -> list[Path]:
        """The files of all parts, in their order."""
        return sorted(self.folder.glob(f"[0-9]*/{pattern}"))

    def discard(self) -> None:
        """Remove them: the whole is made."""
        shutil.rmtree(self.folder, ignore_errors=True)


def link_or_copy(file: Path, to: Path) -> None:
    """The same file at another place of its disk; a copy where disks know no links."""
    try:
        os.link(file, to)
    except OSError:
        shutil.copyfile(file, to)
