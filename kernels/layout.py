"""Describe a packed batch: which tokens are real, and where each sequence begins and ends.

    cu_seqlens[s + 1] = cu_seqlens[s] + length of sequence s
    indices[t]        = row of token t in the flattened padded batch
    position_ids[t]   = t - cu_seqlens[sequence of t]

A layout is built once per batch, from whatever the caller has (a mask, lengths, position ids or
``cu_seqlens``), and validated there. Everything below trusts it and looks at no value again.

On a GPU that takes one launch (two for large batches: `layout_ops`) and one copy of 8 bytes to the
host: how many tokens there are and how long the longest sequence is, or in their place a negative
number where the input is wrong. A caller who knows the numbers is spared the copy, and with it the
check of values that it carries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .layout_ops import (
    INT32_MAX,
    boundary_layout_reference,
    refuse_boundaries,
    refuse_mask,
    refuse_position_ids,
)


@dataclass(frozen=True, eq=False)
class PackedLayout:
    """The frozen description of one packed batch. Build it with one of the ``layout_from_*``.

    Attributes:
        cu_seqlens: ``(num_seqs + 1,)`` int32, rising from 0 to ``total_tokens``.
        indices: ``(total_tokens,)`` int32, the row of each token in the padded batch flattened
            to ``(rows * columns, ...)``.
        position_ids: ``(total_tokens,)`` int32, each token's place in its own sequence, from 0.
        total_tokens: how many real tokens there are.
        max_seqlen: length of the longest sequence; no less than it where the builder was told
            ``total_tokens`` and copied nothing.
        padded_shape: ``(rows, columns)`` of the padded batch. Row ``s`` is sequence ``s``. A layout
            that was not built from a padded batch has the smallest right-padded one here.
    """

    cu_seqlens: Tensor
    indices: Tensor
    position_ids: Tensor
    total_tokens: int
    max_seqlen: int
    padded_shape: tuple[int, int]

    @property
    def num_seqs(self) -> int:
        """How many sequences there are, those without any token included."""
        return self.cu_seqlens.numel() - 1

    @property
    def device(self) -> torch.device:
        """Where the layout's tensors are."""
        return self.cu_seqlens.device

    @property
    def lengths(self) -> Tensor:
        """``(num_seqs,)`` int32, tokens in each sequence."""
        return self.cu_seqlens.diff()

    @property
    def columns(self) -> Tensor:
        """``(total_tokens,)`` int32, the column of each token in the padded batch.

        Differs from ``position_ids`` where a row is left-padded or its mask has holes.
        """
        return self.indices % max(self.padded_shape[1], 1)

    def to(self, device: torch.device | str) -> PackedLayout:
        """The same layout with its tensors on ``device``; itself if they are there."""
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
        attention_mask: ``(rows, columns)`` bool, integer or floating point; 1 marks a real token,
            0 padding. Left and right padding, holes and rows of padding alone are all welcome.
        total_tokens: how many real tokens there are, if known: then nothing is copied from a GPU,
            ``max_seqlen`` is ``columns``, and neither the number nor the mask's values are checked
            there. A wrong number gives a wrong layout, but never one that points outside.

    Returns:
        A layout whose sequence ``s`` holds the real tokens of row ``s`` in order.

    Raises:
        TypeError: if ``attention_mask`` is no tensor or has complex values.
        ValueError: if it is not two-dimensional, is empty, holds anything but 0 and 1, or
            ``total_tokens`` is not the number of its ones.
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
    _require_int32_rows(rows * columns)
    _require_total(total_tokens, rows * columns)
    cu_seqlens, indices, position_ids, sizes = torch.ops.tokenpack.mask_layout(
        attention_mask, total_tokens
    )
    if total_tokens is None:
        total, longest = sizes.tolist()
        if total < 0:
            refuse_mask(attention_mask)
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
    """Lay out sequences of known lengths, one after the other.

    Args:
        lengths: ``(num_seqs,)`` integers, a tensor or any sequence of them; 0 is a sequence
            without tokens. On the host, everything is known there: a layout on a GPU then takes one
            launch and waits for nothing.
        total_tokens: their sum, and
        max_seqlen: their maximum, if known. Both together spare lengths on a GPU the copy to the
            host, and with it the check of their values. Wrong numbers give a wrong layout then, but
            never more than ``total_tokens`` tokens.
        device: where the layout goes; by default where ``lengths`` is.

    Returns:
        A layout whose padded shape is the right-padded ``(num_seqs, max(lengths))``.

    Raises:
        TypeError: if a length is not an integer.
        ValueError: if there is no length, one is negative, they sum past int32, or
            ``total_tokens`` or ``max_seqlen`` is not what they say.
    """
    given = _integers("lengths", lengths)
    if given.numel() == 0:
        raise ValueError("lengths must name at least one sequence, got none")
    return _from_boundaries(given, False, total_tokens, max_seqlen, device)


def layout_from_cu_seqlens(
    cu_seqlens: Tensor | Sequence[int],
    total_tokens: int | None = None,
    *,
    max_seqlen: int | None = None,
    device: torch.device | str | None = None,
) -> PackedLayout:
    """Lay out sequences whose boundaries are known.

    Args:
        cu_seqlens: ``(num_seqs + 1,)`` integers that start at 0 and never fall.
        total_tokens: length of the token stream they must end at, if known.
        max_seqlen: length of the longest sequence, if known. Together with ``total_tokens`` it
            spares a GPU's ``cu_seqlens`` the copy to the host, and with it the check of values.
        device: where the layout goes; by default where ``cu_seqlens`` is.

    Returns:
        A layout whose padded shape is the right-padded ``(num_seqs, max_seqlen)``.

    Raises:
        TypeError: if ``cu_seqlens`` are not integers.
        ValueError: if they are fewer than two, do not start at 0, fall, do not end at
            ``total_tokens``, or ``max_seqlen`` is not the longest of them.
    """
    given = _integers("cu_seqlens", cu_seqlens)
    if given.numel() < 2:
        raise ValueError(f"cu_seqlens must be (num_seqs + 1,), got {given.numel()} value(s)")
    return _from_boundaries(given, True, total_tokens, max_seqlen, device)


def layout_from_position_ids(position_ids: Tensor) -> PackedLayout:
    """Lay out a token stream whose sequences are told by position ids that restart at 0.

    Args:
        position_ids: ``(total_tokens,)`` integers, or ``(rows, columns)`` read row after row. Each
            is 0, which begins a sequence, or one more than the one before it.

    Returns:
        A layout whose padded shape is the right-padded ``(num_seqs, max_seqlen)``. Sequences
        without tokens leave no trace in position ids, so there are none.

    Raises:
        TypeError: if ``position_ids`` are not integers.
        ValueError: if they are empty, a row does not begin at 0, or they do not rise by one:
            such positions cannot tell where a sequence ends.
    """
    _require_tensor("position_ids", position_ids)
    _require_integers("position_ids", position_ids)
    if position_ids.dim() not in (1, 2) or position_ids.numel() == 0:
        raise ValueError(
            "position_ids must be (total_tokens,) or (rows, columns) and not empty, "
            f"got shape {tuple(position_ids.shape)}"
        )
    _require_int32_rows(position_ids.numel())
    cu_seqlens, indices, positions, sizes = torch.ops.tokenpack.position_layout(position_ids)
    num_seqs, longest = sizes.tolist()
    if num_seqs < 0:
        refuse_position_ids(position_ids)
    _require_int32_rows(num_seqs * longest)
    return PackedLayout(
        cu_seqlens[: num_seqs + 1],
        indices,
        positions,
        positions.numel(),
        longest,
        (num_seqs, longest),
    )


def _from_boundaries(
    given: Tensor,
    cumulative: bool,
    total_tokens: int | None,
    max_seqlen: int | None,
    device: torch.device | str | None,
) -> PackedLayout:
    """From lengths or, if ``cumulative``, from ``cu_seqlens``."""
    target = given.device if device is None else torch.device(device)
    num_seqs = given.numel() - cumulative
    boundaries, boundaries_cumulative = given, cumulative
    if not given.is_cpu and total_tokens is not None and max_seqlen is not None:
        total, longest = total_tokens, max_seqlen
    else:
        # Where looking at them is free, values are checked whatever the caller knows.
        find = boundary_layout_reference if given.is_cpu else torch.ops.tokenpack.boundary_layout
        boundaries, _, _, sizes = find(given, cumulative, None, None)
        boundaries_cumulative = True
        total, longest = sizes.tolist()
        if total < 0:
            refuse_boundaries(given, cumulative)
        if total_tokens not in (None, total):
            what = "cu_seqlens must end at" if cumulative else "lengths must sum to"
            raise ValueError(f"{what} total_tokens = {total_tokens}, got {total}")
        if max_seqlen not in (None, longest):
            raise ValueError(f"max_seqlen must be the longest length {longest}, got {max_seqlen}")
    _require_int32_rows(num_seqs * longest)
    cu_seqlens, indices, position_ids, _ = torch.ops.tokenpack.boundary_layout(
        _move(boundaries, target), boundaries_cumulative, total, longest
    )
    return PackedLayout(cu_seqlens, indices, position_ids, total, longest, (num_seqs, longest))


# --------------------------------------------------------------------------------------- helpers


def _move(tensor: Tensor, device: torch.device) -> Tensor:
    if tensor.is_cpu and device.type == "cuda":
        # From pageable memory the copy would wait for the device.
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _require_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def _require_integers(name: str, value: Tensor) -> None:
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {value.dtype}")


def _require_int32_rows(rows: int) -> None:
    if rows > INT32_MAX:
        raise ValueError(f"a padded batch may have at most 2**31 - 1 slots, got {rows}")


def _require_total(total_tokens: int | None, slots: int) -> None:
    if total_tokens is not None and not 0 <= total_tokens <= slots:
        raise ValueError(f"total_tokens must be from 0 to the batch's {slots}, got {total_tokens}")


def _integers(name: str, values: Tensor | Sequence[int]) -> Tensor:
    """``values`` as a one-dimensional tensor of integers."""
    try:
        tensor = torch.as_tensor(values)
    except (RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"{name} must be integers, got {values!r:.80}") from error
    if tensor.numel() == 0 and not isinstance(values, Tensor):
        tensor = tensor.to(torch.int64)  # an empty list has no dtype of its own
    _require_integers(name, tensor)
    if tensor.dim() != 1:
        raise ValueError(f"{name} must be one-dimensional, got shape {tuple(tensor.shape)}")
    return tensor
