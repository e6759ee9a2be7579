"""Describe a packed batch: which tokens are real, and where each sequence begins and ends.

    cu_seqlens[s + 1] = cu_seqlens[s] + length of sequence s
    indices[t]        = row of token t in the flattened padded batch
    position_ids[t]   = t - cu_seqlens[sequence of t]

A layout is built once per batch, from whatever the caller has (a mask, lengths, position ids or
``cu_seqlens``), and validated there. Everything below trusts it and looks at no value again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_INT32_MAX = 2**31 - 1


@dataclass(frozen=True, eq=False)
class PackedLayout:
    """The frozen description of one packed batch. Build it with one of the ``layout_from_*``.

    Attributes:
        cu_seqlens: ``(num_seqs + 1,)`` int32, rising from 0 to ``total_tokens``.
        indices: ``(total_tokens,)`` int32, the row of each token in the padded batch flattened
            to ``(rows * columns, ...)``.
        position_ids: ``(total_tokens,)`` int32, each token's place in its own sequence, from 0.
        total_tokens: how many real tokens there are.
        max_seqlen: length of the longest sequence.
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


def layout_from_mask(attention_mask: Tensor) -> PackedLayout:
    """Lay out the real tokens of a padded batch.

    Args:
        attention_mask: ``(rows, columns)`` bool, integer or floating point; 1 marks a real token,
            0 padding. Left and right padding, holes and rows of padding alone are all welcome.

    Returns:
        A layout whose sequence ``s`` holds the real tokens of row ``s`` in order.

    Raises:
        TypeError: if ``attention_mask`` is no tensor or has complex values.
        ValueError: if it is not two-dimensional, is empty, or holds anything but 0 and 1.
    """
    _require_tensor("attention_mask", attention_mask)
    if attention_mask.dim() != 2 or attention_mask.numel() == 0:
        raise ValueError(
            "attention_mask must be (rows, columns) with at least one row and one column, "
            f"got shape {tuple(attention_mask.shape)}"
        )
    if attention_mask.is_complex():
        raise TypeError(f"attention_mask must be bool, int or float, got {attention_mask.dtype}")
    _require_int32_rows(attention_mask.numel())

    real = attention_mask != 0
    if attention_mask.dtype != torch.bool and bool((real & (attention_mask != 1)).any()):
        wrong = attention_mask[real & (attention_mask != 1)][0].item()
        raise ValueError(f"attention_mask must hold only 0 and 1, got {wrong}")
    lengths = real.sum(dim=1, dtype=torch.int32)
    indices = real.flatten().nonzero().squeeze(1).to(torch.int32)
    positions = real.cumsum(dim=1, dtype=torch.int32).sub_(1)[real]
    rows, columns = attention_mask.shape
    return PackedLayout(
        _cumulative(lengths),
        indices,
        positions,
        indices.numel(),
        int(lengths.max()),
        (rows, columns),
    )


def layout_from_lengths(
    lengths: Tensor | Sequence[int], *, device: torch.device | str | None = None
) -> PackedLayout:
    """Lay out sequences of known lengths, one after the other.

    Args:
        lengths: ``(num_seqs,)`` integers, a tensor or any sequence of them; 0 is a sequence
            without tokens.
        device: where the layout goes; by default where ``lengths`` is.

    Returns:
        A layout whose padded shape is the right-padded ``(num_seqs, max(lengths))``.

    Raises:
        TypeError: if a length is not an integer.
        ValueError: if there is no length, one is negative, or they sum past int32.
    """
    on_host = _host_integers("lengths", lengths)
    if on_host.numel() == 0:
        raise ValueError("lengths must name at least one sequence, got none")
    if int(on_host.min()) < 0:
        at = int(on_host.argmin())
        raise ValueError(f"lengths must not be negative, got {int(on_host[at])} at index {at}")
    if device is None:
        device = lengths.device if isinstance(lengths, Tensor) else "cpu"
    longest = int(on_host.max())
    _require_int32_rows(on_host.numel() * longest)
    return _right_padded(_cumulative(on_host.to(torch.int32)), longest).to(device)


def layout_from_cu_seqlens(
    cu_seqlens: Tensor | Sequence[int],
    total_tokens: int | None = None,
    *,
    device: torch.device | str | None = None,
) -> PackedLayout:
    """Lay out sequences whose boundaries are known.

    Args:
        cu_seqlens: ``(num_seqs + 1,)`` integers that start at 0 and never fall.
        total_tokens: length of the token stream they must end at; unchecked if None.
        device: where the layout goes; by default where ``cu_seqlens`` is.

    Returns:
        A layout whose padded shape is the right-padded ``(num_seqs, max_seqlen)``.

    Raises:
        TypeError: if ``cu_seqlens`` are not integers.
        ValueError: if they are fewer than two, do not start at 0, fall, or do not end at
            ``total_tokens``.
    """
    on_host = _host_integers("cu_seqlens", cu_seqlens)
    if on_host.numel() < 2:
        raise ValueError(f"cu_seqlens must be (num_seqs + 1,), got {on_host.numel()} value(s)")
    steps = on_host.diff()
    if int(on_host[0]) != 0:
        raise ValueError(f"cu_seqlens must start at 0, got {int(on_host[0])}")
    if int(steps.min()) < 0:
        at = int(steps.argmin())
        raise ValueError(
            f"cu_seqlens must not fall, got {int(on_host[at])} then {int(on_host[at + 1])} "
            f"at index {at + 1}"
        )
    if total_tokens is not None and int(on_host[-1]) != total_tokens:
        raise ValueError(
            f"cu_seqlens must end at total_tokens = {total_tokens}, got {int(on_host[-1])}"
        )
    if device is None:
        device = cu_seqlens.device if isinstance(cu_seqlens, Tensor) else "cpu"
    longest = int(steps.max())
    _require_int32_rows(steps.numel() * longest)
    return _right_padded(on_host.to(torch.int32), longest).to(device)


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
    if bool((position_ids.reshape(-1, position_ids.shape[-1])[:, 0] != 0).any()):
        raise ValueError("position_ids must begin at 0 in every row")
    flat = position_ids.flatten().to(torch.int64)
    starts = flat == 0
    rises = flat[1:] == flat[:-1] + 1
    if not bool((rises | starts[1:]).all()):
        at = int((rises | starts[1:]).logical_not().nonzero()[0]) + 1
        raise ValueError(
            "position_ids must rise by one or restart at 0, "
            f"got {int(flat[at - 1])} then {int(flat[at])} at index {at}"
        )
    first = starts.nonzero().squeeze(1)
    cu_seqlens = torch.cat([first, first.new_tensor([flat.numel()])]).to(torch.int32)
    return _right_padded(cu_seqlens, int(flat.max()) + 1)


# --------------------------------------------------------------------------------------- helpers


def _right_padded(cu_seqlens: Tensor, max_seqlen: int) -> PackedLayout:
    lengths = cu_seqlens.diff()
    num_seqs = lengths.numel()
    sequence = torch.arange(num_seqs, dtype=torch.int32, device=cu_seqlens.device)
    sequence = sequence.repeat_interleave(lengths)  # [total_tokens]
    tokens = torch.arange(sequence.numel(), dtype=torch.int32, device=cu_seqlens.device)
    positions = tokens - cu_seqlens[sequence]
    return PackedLayout(
        cu_seqlens,
        sequence * max_seqlen + positions,
        positions,
        sequence.numel(),
        max_seqlen,
        (num_seqs, max_seqlen),
    )


def _cumulative(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def _require_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def _require_integers(name: str, value: Tensor) -> None:
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {value.dtype}")


def _require_int32_rows(rows: int) -> None:
    if rows > _INT32_MAX:
        raise ValueError(f"a padded batch may have at most 2**31 - 1 slots, got {rows}")


def _host_integers(name: str, values: Tensor | Sequence[int]) -> Tensor:
    """``values`` as a one-dimensional int64 tensor on the host, where looking at them is free."""
    try:
        tensor = torch.as_tensor(values)
    except (RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"{name} must be integers, got {values!r:.80}") from error
    if tensor.numel() == 0 and not isinstance(values, Tensor):
        tensor = tensor.to(torch.int64)  # an empty list has no dtype of its own
    _require_integers(name, tensor)
    if tensor.dim() != 1:
        raise ValueError(f"{name} must be one-dimensional, got shape {tuple(tensor.shape)}")
    return tensor.to("cpu", torch.int64)
