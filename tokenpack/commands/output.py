"""Output folders and files of the commands."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..files import locked_folder
from .interrupts import uninterrupted


def make_folder(folder: Path, option: str) -> None:
    """Create a folder and its parents if they do not exist.

    Args:
        folder: to create.
        option: the argument that named it, for the error message.

    Raises:
        ValueError: if the folder cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{option}: cannot create the folder {folder}: {error.strerror}") from None


@contextmanager
def new_folder(folder: Path, option: str) -> Iterator[None]:
    """`make_folder`, and keep other runs out of it.

    After an error, the folders that it created are removed again, unless they hold a file.

    Raises:
        ValueError: if the folder cannot be created, or if another run uses it.
    """
    created = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]
    make_folder(folder, option)
    with locked_folder(folder, option):
        try:
            yield
        except BaseException:
            with uninterrupted(), suppress(OSError):
                for each in created:
                    each.rmdir()
            raise


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write a report as indented JSON."""
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
