"""Save plans in folders: one ``.npy`` file per array, and ``plan.json``.

The arrays are written in parts, shard by shard, so memory does not grow with the number of shards.
They are read memory-mapped. ``plan.json`` is written last: a folder that has one is complete.
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
    """A context manager that writes the arrays of one plan in parts. `finish` completes the plan.

    Raises:
        FileExistsError: if the folder already contains a plan.
    """

    def __init__(self, folder: str | PathLike[str]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / "plan.json").exists():
            raise FileExistsError(f"folder must not contain a plan, got {self.folder}")
        self._arrays: dict[str, NpyWriter] = {}

    def __enter__(self) -> PlanWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for array in self._arrays.values():
            array.close()

    def append(self, name: str, part: NDArray[Any]) -> None:
        """Append to an array. Later parts are cast to the dtype of the first."""
        if name not in self._arrays:
            self._arrays[name] = NpyWriter(self.folder / f"{name}.npy", part.dtype)
        self._arrays[name].append(part)

    def finish(self, facts: dict[str, Any]) -> None:
        """Close the arrays and write everything else to ``plan.json``."""
        self.__exit__()
        text = json.dumps({"format": FORMAT, "arrays": list(self._arrays), **facts}, indent=1)
        (self.folder / "plan.json").write_text(text + "\n")


def read_plan(folder: str | PathLike[str], mmap: bool) -> tuple[dict[str, Any], dict[str, NDArray]]:
    """Return the facts and the arrays that `PlanWriter` wrote.

    Raises:
        FileNotFoundError: if the folder contains no plan, or one of its arrays is missing.
        ValueError: if a file is damaged or has another format version.
    """
    facts = read_facts(folder)
    names = facts.pop("arrays")
    return facts, {name: _read(Path(folder) / f"{name}.npy", mmap) for name in names}


def read_facts(folder: str | PathLike[str]) -> dict[str, Any]:
    """Return the facts, and the names of the arrays as "arrays". Raises the errors of `read_plan`.

    The facts are all values of a plan that are not arrays.
    """
    file = Path(folder) / "plan.json"
    try:
        facts = json.loads(file.read_text())
        version = facts.pop("format")
        facts["arrays"] = [str(name) for name in facts["arrays"]]
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"folder must contain a plan, got an invalid {file}: {error!r}") from error
    if version != FORMAT:
        raise ValueError(
            f"folder must contain a plan of format {FORMAT}, got format {version} in {file}"
        )
    return facts


def _read(path: Path, mmap: bool) -> NDArray[Any]:
    try:
        return np.load(path, mmap_mode="r" if mmap else None)
    except (ValueError, EOFError) as error:
        raise ValueError(f"folder must contain a plan, got an invalid {path}: {error}") from error
