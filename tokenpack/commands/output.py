"""Where commands write to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def make_folder(folder: Path, option: str) -> None:
    """Make a folder and those above it, where they are missing.

    Args:
        folder: to be made.
        option: the argument that named it, for the error.

    Raises:
        ValueError: if it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{option}: cannot make the folder {folder}: {error.strerror}") from None


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write a report for machines, and for people with an editor."""
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
