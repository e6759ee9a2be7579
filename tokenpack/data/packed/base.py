"""The base of packed batches: keyword arguments of a model whose names are also attributes.

`PackedBatch` and `PackedPairs` differ in their fields. Attribute access, copies to a device and
the padding of sequences into rows are the same for both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...checks import at_least_one
from ...packing.lengths import as_lengths

if TYPE_CHECKING:
    from typing_extensions import Self

CUT_BY_ROWS = "cannot be cut by rows (with accelerate, set dispatch_batches=False)"


class PackedFields(dict[str, Any]):
    """A mapping for ``model(**batch)``. Each field is also an attribute.

    Setting an attribute changes the field of that name, if there is one, so that the model always
    gets the value that the attribute shows. Other attributes are not passed to the model.
    """

    _token_fields: frozenset[str] = frozenset()  # become fields when set, even if absent before
    _host_fields: frozenset[str] = frozenset()  # tensors that stay on the CPU

    def __init__(self, *fields: Any, **more: Any) -> None:
        super().__init__(*fields, **more)
        self._check_boundaries()

    def _check_boundaries(self) -> None:
        """Raise a ValueError if the boundaries do not match the tokens.

        This happens if a batch is cut by rows, as accelerate does to distribute it to processes.
        Implementations read only CPU tensors, to avoid waiting for a device.
        """
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(
                f"{type(self).__name__} has no {name!r}; its fields are {', '.join(self)}"
            ) from None

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self or name in self._token_fields:
            self[name] = value
        else:
            super().__setattr__(name, value)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Self:
        """Return a copy of the batch with its tensors on ``device``."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Return a copy of the batch in page-locked memory, for non-blocking copies to a GPU."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return a copy with every tensor changed, except the host fields."""
        changed: dict[int, Tensor] = {}  # a tensor under two names is changed once

        def mapped(values: dict[str, Any]) -> dict[str, Any]:
            result = dict(values)
            for name, value in values.items():
                if isinstance(value, Tensor) and name not in self._host_fields:
                    if id(value) not in changed:
                        changed[id(value)] = change(value)
                    result[name] = changed[id(value)]
            return result

        batch = type(self)(mapped(self))
        vars(batch).update(mapped(vars(self)))
        return batch


def selected(sequences: Any, count: int) -> NDArray[np.int64]:
    """Return the numbers of the sequences of a batch that `select` gets, as an array.

    Raises:
        TypeError: if they are not integers.
        ValueError: if there is none.
        IndexError: if one is not below ``count``.
    """
    chosen = as_lengths(sequences, "sequences")
    if (wrong := (chosen < 0) | (chosen >= count)).any():
        at = int(wrong.argmax())
        raise IndexError(
            f"sequences[{at}] must be from 0 to {count - 1}, because the batch has {count} "
            f"sequences, got {chosen[at]}"
        )
    return chosen.astype(np.int64)


def pad_rows(
    values: Tensor,
    lengths: Tensor,
    fill: int,
    multiple: int | None = None,
    left: bool = False,
) -> tuple[Tensor, Tensor]:
    """Pad concatenated sequences into the rows of a tensor.

    Args:
        values: ``(total,)``, one sequence after another.
        lengths: ``(num_sequences,)`` integers on the CPU. Their sum is ``total``.
        fill: the value at padding.
        multiple: round the number of columns up to a multiple of this. By default, there are as
            many columns as the longest sequence has tokens.
        left: pad on the left.

    Returns:
        ``(rows, mask)``, both ``(num_sequences, columns)`` with at least one column, on the device
        of ``values``. The mask is bool and True at tokens.
    """
    step = 1 if multiple is None else at_least_one("pad_to_multiple_of", multiple)
    columns = -(-max(int(lengths.max()), 1) // step) * step
    column = torch.arange(columns)
    ends = lengths[:, None]
    mask = (column >= columns - ends) if left else (column < ends)
    rows = values.new_full(tuple(mask.shape), fill)
    if values.is_cpu:
        rows.numpy()[mask.numpy()] = values.numpy()  # twice as fast as torch on the CPU
        return rows, mask
    mask = mask.to(values.device, non_blocking=True)
    return rows.masked_scatter_(mask, values), mask
