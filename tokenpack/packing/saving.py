"""Plans in folders: one ``.npy`` per array and ``plan.json``.

A folder is written from front to back, shard after shard, in memory that does not grow with their
number, and it is read memory-mapped. ``plan.json`` comes last: a folder that has one is whole.
"""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..files import NpyWriter

FORMAT = 1


class PlanWriter:
    """Writes the arrays of one plan, in parts. Use it in ``with``; `finish` makes it a plan.

    Raises:
        FileExistsError: if there is a plan in the folder already.
    """

    def __init__(self, folder: str | PathLike[str]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / "plan.json").exists():
            raise FileExistsError(f"folder must hold no plan yet, got {self.folder}")
        self._arrays: dict[str, NpyWriter] = {}

    def __enter__(self) -> PlanWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for array in self._arrays.values():
            array.close()

    def append(self, name: str, part: NDArray[Any]) -> None:
        """Write more of an array; all its parts have the dtype of the first, or fit into it."""
        if name not in self._arrays:
            self._arrays[name] = NpyWriter(self.folder / f"{name}.npy", part.dtype)
        self._arrays[name].append(part)

    def finish(self, facts: dict[str, Any]) -> None:
        """Close the arrays and write what is no array, which makes the folder a plan."""
        self.__exit__()
        text = json.dumps({"format": FORMAT, "arrays": list(self._arrays), **facts}, indent=1)
        (self.folder / "plan.json").write_text(text + "\n")


def read_plan(folder: str | PathLike[str], mmap: bool) -> tuple[dict[str, Any], dict[str, NDArray]]:
    """The facts and the arrays that `PlanWriter` wrote.

    Raises:
        FileNotFoundError: if there is no plan in the folder, or an array of it is missing.
        ValueError: if a file of it is damaged, or of another version.
    """
    facts = read_facts(folder)
    present = facts.pop("arrays")
    return facts, {name: _read(Path(folder) / f"{name}.npy", mmap) for name in present}


def read_facts(folder: str | PathLike[str]) -> dict[str, Any]:
    """What is no array, and under "arrays" the names of those; errors as `read_plan`."""
    file = Path(folder) / "plan.json"
    try:
        facts = json.loads(file.read_text())
        version = facts.pop("format")
        facts["arrays"] = [str(name) for name in facts["arrays"]]
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is no plan: {error!r}") from error
    if version != FORMAT:
        raise ValueError(f"{file} is a plan of another version: {version}, not {FORMAT}")
    return facts


def _read(path: Path, mmap: bool) -> NDArray[Any]:
    try:
        return np.load(path, mmap_mode="r" if mmap else None)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is no array: {error}") from error
