"""The position in a training dataset without a length: which pass, and how many of its batches.

A resumed run reads the pass again from its start and skips the batches that are done. So it is
exact if the pass gives the same samples again. A dataset with ``set_epoch`` is told the pass. One
with ``state_dict`` and ``load_state_dict`` gets the state that it had before the pass. Any other
may give other samples, and a warning says which batches are at risk.
"""

from __future__ import annotations

import json
from typing import Any

from transformers.utils import logging

logger = logging.get_logger(__name__)


class Passes:
    """Counts the passes over a dataset, and the batches of the current one.

    Attributes:
        number: the current pass, from 0.
        batches: batches of this pass that this rank has read, including skipped ones.
    """

    def __init__(self) -> None:
        self.number = self.batches = 0
        self._before: Any = None  # the dataset's state before this pass
        self._loaded: Any = None  # the state that was loaded for the pass that begins

    def begin(self, number: int, skipped: int, dataset: Any) -> None:
        """Begin a pass, of which some batches are skipped."""
        self.number, self.batches = number, skipped
        self._before = self._loaded if self._loaded is not None else _state_of(dataset)
        self._loaded = None

    @property
    def position(self) -> dict[str, Any]:
        """The position, for the state of a checkpoint."""
        return {"pass": self.number, "batch": self.batches, "dataset": self._before}

    def resume(self, position: dict[str, Any], state: Any, dataset: Any) -> tuple[int, int]:
        """Prepare the dataset for the pass to resume in.

        Args:
            position: the position of the checkpoint.
            state: the dataset's state of this rank in the checkpoint, or None.
            dataset: the training dataset.

        Returns:
            The pass, and the number of its batches to skip.
        """
        number, skipped = position["pass"], position["batch"]
        if hasattr(dataset, "set_epoch") or not (number or skipped):
            return number, skipped
        if state is not None and _has_state(dataset):
            dataset.load_state_dict(state)
            self._loaded = state
            return number, skipped
        logger.warning(
            f"train_dataset ({type(dataset).__name__}) has neither set_epoch nor a state_dict that "
            f"was saved. Pass {number + 1} over it is read again from its start, and its first "
            f"{skipped} batches are skipped. If passes differ in their samples or in the order, "
            f"the resumed run repeats samples of these {skipped} batches and misses others."
        )
        return number, skipped


def warn_without_position(skipped: int) -> None:
    """Warn that a checkpoint of another trainer does not say in which pass it was saved."""
    logger.warning(
        f"The checkpoint has no position in train_dataset, which has no length: the first {skipped}"
        " batches of the first pass are skipped. If a pass is shorter, the resumed run repeats the "
        "batches from the start of a pass up to the position that the other run had reached."
    )


def _has_state(dataset: Any) -> bool:
    return hasattr(dataset, "state_dict") and hasattr(dataset, "load_state_dict")


def _state_of(dataset: Any) -> Any:
    """The state of a dataset that needs it and whose state is plain JSON, or None."""
    if hasattr(dataset, "set_epoch") or not _has_state(dataset):
        return None
    try:
        text = json.dumps(dataset.state_dict())
    except (TypeError, ValueError) as error:
        logger.warning(
            f"The state_dict of train_dataset ({type(dataset).__name__}) is not saved with "
            f"checkpoints, because it is not JSON: {error}"
        )
        return None
    return json.loads(text)
