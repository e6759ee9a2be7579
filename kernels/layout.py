"""Describe a packed batch: which tokens are real, and where each sequence begins and ends.

    cu_seqlens[s + 1] = cu_seqlens[s] + length of sequence s
    indices[t]        = slot of token t in the flattened padded batch
    position_ids[t]   = t - cu_seqlens[sequence of t]

A layout is built once per batch, from a mask, lengths, position ids or ``cu_seqlens``. The builder
validates its input. Code that uses a layout relies on that and does not check values again.

On a GPU, building a layout takes one launch (two for large batches, see `layout_ops`) and one copy
of 8 bytes to the host. The copy holds the number of tokens and the length of the longest sequence.
If the input is invalid, the first number is negative. A caller that passes both numbers skips the
copy, and with it the check of values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._ops import run, runs_reference
from .layout_ops import (
    INT32_MAX,
    boundary_layout,
    boundary_layout_reference,
    mask_layout,
    mask_layout_reference,
    position_layout,
    raise_boundary_error,
    raise_mask_error,
    raise_position_error,
)


@dataclass(frozen=True, eq=False)
class PackedLayout:
    """The frozen description of one packed batch. Build it with a ``layout_from_*`` function.

    Attributes:
        cu_seqlens: ``(num_seqs + 1,)`` int32. Non-decreasing from 0 to ``total_tokens``.
        indices: ``(total_tokens,)`` int32. The slot of each token in the padded batch flattened
            to ``(rows * columns, ...)``. Empty if int32 cannot hold ``rows * columns``: such a
            layout has everything but a padded form.
        position_ids: ``(total_tokens,)`` int32. The position of each token in its own sequence,
            from 0.
        total_tokens: number of real tokens.
        max_seqlen: length of the longest sequence. If ``total_tokens`` was passed to
            `layout_from_mask`, this is an upper bound: the number of columns.
        padded_shape: ``(rows, columns)`` of the padded batch. Row ``s`` is sequence ``s``. If the
            layout was not built from a mask, this is the smallest right-padded batch that holds it.
    """

    cu_seqlens: Tensor
    indices: Tensor
    position_ids: Tensor
    total_tokens: int
    max_seqlen: int
    padded_shape: tuple[int, int]

    @property
    def num_seqs(self) -> int:
        """Number of sequences, including empty ones."""
        return self.cu_seqlens.numel() - 1

    @property
    def device(self) -> torch.device:
        """The device of the layout's tensors."""
        return self.cu_seqlens.device

    @property
    def lengths(self) -> Tensor:
        """``(num_seqs,)`` int32, the number of tokens in each sequence."""
        return self.cu_seqlens.diff()

    @property
    def columns(self) -> Tensor:
        """``(total_tokens,)`` int32, the column of each token in the padded batch.

        This differs from ``position_ids`` if a row is left-padded or its mask has gaps.
        """
        require_padded_form(self)
        return self.indices % max(self.padded_shape[1], 1)

    def to(self, device: torch.device | str) -> PackedLayout:
        """The layout with its tensors on ``device``. Returns itself if they are there already."""
        if self.device == torch.device(device):
            return self
        return PackedLayout(
            self.cu_seqlens.to(device),
            self.indices.to(device),
            self.position_ids.to(device),
            self.total_tokens,
            self.max_seqlen,
            self.padded_shape,
        )


def layout_from_mask(attention_mask: Tensor, *, total_tokens: int | None = None) -> PackedLayout:
    """Lay out the real tokens of a padded batch.

    Args:
        attention_mask: ``(rows, columns)`` bool, integer or floating point. 1 marks a real token
            and 0 marks padding. The mask may have left padding, right padding, gaps, and rows that
            are all padding.
        total_tokens: number of real tokens. Pass it if you know it, to skip the copy from a GPU to
            the host. Then ``max_seqlen`` is ``columns``, and on a GPU neither this number nor the
            mask's values are checked. A wrong number gives a wrong layout, but its indices stay
            within the padded batch.

    Returns:
        A layout whose sequence ``s`` holds the real tokens of row ``s`` in order.

    Raises:
        TypeError: ``attention_mask`` is not a tensor or is complex.
        ValueError: ``attention_mask`` is not two-dimensional, is empty, or holds a value other than
            0 and 1; or ``total_tokens`` is not the number of ones.
    """
    _require_tensor("attention_mask", attention_mask)
    if attention_mask.dim() != 2 or attention_mask.numel() == 0:
        raise ValueError(
            "attention_mask must be (rows, columns) with at least one row and one column, "
            f"got shape {tuple(attention_mask.shape)}"
        )
    if attention_mask.is_complex():
        raise TypeError(f"attention_mask must be bool, int or float, got {attention_mask.dtype}")
    rows, columns = attention_mask.shape
    _require_int32_slots(rows * columns)
    _require_total(total_tokens, rows * columns)
    if runs_reference(attention_mask):
        cu_seqlens, indices, position_ids, longest = mask_layout_reference(
            attention_mask, total_tokens
        )
        longest = longest if total_tokens is None else columns
        total = indices.numel()
        return PackedLayout(cu_seqlens, indices, position_ids, total, longest, (rows, columns))
    cu_seqlens, indices, position_ids, sizes = run(mask_layout, attention_mask, total_tokens)
    if total_tokens is None:
        total, longest = sizes.tolist()
        if total < 0:
            raise_mask_error(attention_mask)
    else:
        total, longest = total_tokens, columns
    return PackedLayout(
        cu_seqlens, indices[:total], position_ids[:total], total, longest, (rows, columns)
    )


def layout_from_lengths(
    lengths: Tensor | Sequence[int],
    *,
    total_tokens: int | None = None,
    max_seqlen: int | None = None,
    device: torch.device | str | None = None,
) -> PackedLayout:
    """Lay out consecutive sequences of known lengths.

    Args:
        lengths: ``(num_seqs,)`` integers: a tensor or any sequence. A length of 0 is an empty
            sequence. If ``lengths`` is on the host, a layout on a GPU takes one launch and never
            waits for the device.
        total_tokens: sum of ``lengths``. Pass it together with ``max_seqlen`` to skip the copy of
            lengths on a GPU to the host, and with it the check of their values. Wrong numbers then
            give a wrong layout, but never more than ``total_tokens`` tokens.
        max_seqlen: maximum of ``lengths``.
        device: device of the layout. Default: the device of ``lengths``.

    Returns:
        A layout whose padded shape is the right-padded ``(num_seqs, max(lengths))``.

    Raises:
        TypeError: a length is not an integer.
        ValueError: ``lengths`` is empty, a length is negative, the sum exceeds int32, or
            ``total_tokens`` or ``max_seqlen`` does not match ``lengths``.
    """
    given = _integers("lengths", lengths)
    if given.numel() == 0:
        raise ValueError("lengths must hold at least one length, got none")
    return _from_boundaries(given, False, total_tokens, max_seqlen, device)


def layout_from_cu_seqlens(
    cu_seqlens: Tensor | Sequence[int],
    total_tokens: int | None = None,
    *,
    max_seqlen: int | None = None,
    device: torch.device | str | None = None,
) -> PackedLayout:
    """Lay out consecutive sequences with known boundaries.

    Args:
        cu_seqlens: ``(num_seqs + 1,)`` integers that start at 0 and never decrease.
        total_tokens: length of the token stream, which must be the last value of ``cu_seqlens``.
        max_seqlen: length of the longest sequence. Pass it together with ``total_tokens`` to skip
            the copy of ``cu_seqlens`` on a GPU to the host, and with it the check of their values.
        device: device of the layout. Default: the device of ``cu_seqlens``.

    Returns:
        A layout whose padded shape is the right-padded ``(num_seqs, max_seqlen)``.

    Raises:
        TypeError: ``cu_seqlens`` are not integers.
        ValueError: ``cu_seqlens`` has fewer than two values, does not start at 0, decreases, or
            does not end at ``total_tokens``; or ``max_seqlen`` is not the longest length.
    """
    given = _integers("cu_seqlens", cu_seqlens)
    if given.numel() < 2:
        raise ValueError(f"cu_seqlens must be (num_seqs + 1,), got {given.numel()} value(s)")
    return _from_boundaries(given, True, total_tokens, max_seqlen, device)


def layout_from_position_ids(position_ids: Tensor) -> PackedLayout:
    """Lay out a token stream whose position ids restart at 0 at the start of each sequence.

    Args:
        position_ids: ``(total_tokens,)`` integers, or ``(rows, columns)``, whose rows are
            concatenated. Each value is either 0, which starts a sequence, or one more than the
            value before it.

    Returns:
        A layout whose padded shape is the right-padded ``(num_seqs, max_seqlen)``. It has no empty
        sequences, because position ids do not show them.

    Raises:
        TypeError: ``position_ids`` are not integers.
        ValueError: ``position_ids`` is empty, a row does not start at 0, or a value neither
            restarts at 0 nor increases by one. Such positions do not define where a sequence ends.
    """
    _require_tensor("position_ids", position_ids)
    _require_integers("position_ids", position_ids)
    if position_ids.dim() not in (1, 2) or position_ids.numel() == 0:
        raise ValueError(
            "position_ids must be (total_tokens,) or (rows, columns) and not empty, "
            f"got shape {tuple(position_ids.shape)}"
        )
    _require_int32_slots(position_ids.numel())
    cu_seqlens, indices, positions, sizes = run(position_layout, position_ids)
    num_seqs, longest = sizes.tolist()
    if num_seqs < 0:
        raise_position_error(position_ids)
    return PackedLayout(
        cu_seqlens[: num_seqs + 1],
        _slots_or_none(indices, num_seqs * longest),
        positions,
        positions.numel(),
        longest,
        (num_seqs, longest),
    )


def _from_boundaries(
    boundaries: Tensor,
    cumulative: bool,
    total_tokens: int | None,
    max_seqlen: int | None,
    device: torch.device | str | None,
) -> PackedLayout:
    """Lay out ``boundaries``, which are cu_seqlens if ``cumulative``, else lengths."""
    target = boundaries.device if device is None else torch.device(device)
    num_seqs = boundaries.numel() - cumulative
    if not boundaries.is_cpu and total_tokens is not None and max_seqlen is not None:
        total, longest = total_tokens, max_seqlen
    else:
        # On the host the check is cheap, so values are checked even if both numbers are given.
        on_host = boundaries.is_cpu
        offsets = (boundaries, cumulative, None, None)
        cu_seqlens, _, _, sizes = (
            boundary_layout_reference(*offsets) if on_host else run(boundary_layout, *offsets)
        )
        total, longest = sizes.tolist()
        if total < 0:
            raise_boundary_error(boundaries, cumulative)
        if total_tokens not in (None, total):
            expected = "cu_seqlens must end at" if cumulative else "lengths must sum to"
            raise ValueError(f"{expected} total_tokens = {total_tokens}, got {total}")
        if max_seqlen not in (None, longest):
            raise ValueError(f"max_seqlen must be the longest length, {longest}, got {max_seqlen}")
        boundaries, cumulative = cu_seqlens, True
    cu_seqlens, indices, position_ids, _ = run(
        boundary_layout, _move(boundaries, target), cumulative, total, longest
    )
    indices = _slots_or_none(indices, num_seqs * longest)
    return PackedLayout(cu_seqlens, indices, position_ids, total, longest, (num_seqs, longest))


# --------------------------------------------------------------------------------------- helpers


def _move(tensor: Tensor, device: torch.device) -> Tensor:
    if tensor.is_cpu and device.type == "cuda":
        # A copy from pageable memory would block the host.
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _require_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def _require_integers(name: str, value: Tensor) -> None:
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {value.dtype}")


def _require_int32_slots(slots: int) -> None:
    if slots > INT32_MAX:
        raise ValueError(f"rows * columns must be less than 2**31, got {slots} slots")


def require_padded_form(layout: PackedLayout) -> None:
    """Raise ValueError if the padded batch has too many slots for ``layout.indices``.

    In a graph, the sizes are not known. There, the op that lays out the batch must check them.
    """
    if torch.compiler.is_compiling():
        return
    rows, columns = layout.padded_shape
    if rows * columns > INT32_MAX:
        raise ValueError(
            f"layout must have less than 2**31 slots to have a padded form, got {rows} rows of "
            f"{columns} columns: pad fewer sequences at a time"
        )


def _slots_or_none(indices: Tensor, slots: int) -> Tensor:
    """``indices``, or none of them if int32 cannot hold them all."""
    return indices if slots <= INT32_MAX else indices[:0]


def _require_total(total_tokens: int | None, slots: int) -> None:
    if total_tokens is not None and not 0 <= total_tokens <= slots:
        raise ValueError(f"total_tokens must be from 0 to {slots}, got {total_tokens}")


def _integers(name: str, values: Tensor | Sequence[int]) -> Tensor:
    """``values`` as a one-dimensional tensor of integers."""
    try:
        tensor = torch.as_tensor(values)
    except (RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"{name} must be integers, got {values!r:.80}") from error
    if tensor.numel() == 0 and not isinstance(values, Tensor):
        tensor = tensor.to(torch.int64)  # torch gives an empty list a floating-point dtype
    _require_integers(name, tensor)
    if tensor.dim() != 1:
        raise ValueError(f"{name} must be one-dimensional, got shape {tuple(tensor.shape)}")
    return tensor
