"""The lengths of the sequences in a collated batch.

    tokens of row i  =  real source tokens + target columns up to the last label

A batch is measured after collation, on the host, because a collator may change the examples. An
unpatched model computes rows x columns instead of real tokens. For such a model (``padded=True``),
the trainer counts slots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeGuard

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..checks import IGNORE_INDEX


class SequenceSizes(NamedTuple):
    """The sizes of the sequences in a batch.

    Attributes:
        source: ``(n,)`` int64, real tokens of the encoder, or of a causal model.
        target: ``(n,)`` int64, tokens of the decoder, up to the last label. 0 for causal models.
        num_targets: ``(n,)`` int64, targets of the loss. 1 each if the batch has no labels.
        first: ``(n,)`` int64, the column of the first source token.
        end: ``(n,)`` int64, the column after the last source token.
    """

    source: NDArray[np.int64]
    target: NDArray[np.int64]
    num_targets: NDArray[np.int64]
    first: NDArray[np.int64]
    end: NDArray[np.int64]

    @property
    def tokens(self) -> NDArray[np.int64]:
        """``(n,)`` int64, source plus target."""
        return self.source + self.target

    @property
    def columns(self) -> NDArray[np.int64]:
        """``(n,)`` int64, source columns in a padded batch, including gaps in the mask."""
        return self.end - self.first

    def slots(self, multiple: int) -> NDArray[np.int64]:
        """``(n,)`` int64, slots of each row if it is padded by itself to a multiple."""
        return rounded_up(self.columns, multiple) + rounded_up(self.target, multiple)


@dataclasses.dataclass
class ModelTraits:
    """Properties of the model that determine how batches are measured and split.

    Attributes:
        is_encoder_decoder: the model has a decoder, and labels belong to it.
        shifts_labels: the loss shifts labels, so that each token predicts the next label.
        padded: the model computes rows x columns, not only real tokens.
        trims_left_padding: columns of left padding can be removed. This holds if positions are
            relative, or are counted from the first real token.
        multiple: padded widths are rounded up to a multiple of this.
        hidden_size: the model's hidden size, which sets the cost of attention relative to the
            linear layers.
    """

    is_encoder_decoder: bool
    shifts_labels: bool
    padded: bool
    trims_left_padding: bool = True
    multiple: int = 1
    hidden_size: int = 1024

    def loss_inputs(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The batch without labels that the loss must ignore; see `ignore_first_labels`."""
        return ignore_first_labels(inputs) if self.shifts_labels else inputs

    def measure(self, inputs: Mapping[str, Any]) -> SequenceSizes:
        """Measure the sequences of a batch; see `measure`."""
        sizes = measure(
            inputs,
            is_encoder_decoder=self.is_encoder_decoder,
            shifts_labels=self.shifts_labels,
        )
        if self.trims_left_padding:
            return sizes
        return sizes._replace(first=np.zeros_like(sizes.first))


def is_packed(inputs: Mapping[str, Any]) -> bool:
    """Whether the batch stores its sequences without padding, separated by ``cu_seqlens``."""
    return "cu_seqlens" in inputs


def rounded_up(lengths: Any, multiple: int) -> Any:
    """Round an integer, or an array of integers, up to a multiple."""
    return -(-lengths // multiple) * multiple


def ignore_first_labels(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Set the label of each row's first real token to -100 in a left-padded causal batch.

    A collator that copies ``input_ids`` to ``labels`` keeps this label, and the loss would predict
    it from a padding token, which attends to nothing. The same sequence with right padding, or
    without padding, has no such target.
    """
    labels, mask = inputs.get("labels"), inputs.get("attention_mask")
    if is_packed(inputs) or not isinstance(labels, Tensor) or not isinstance(mask, Tensor):
        return inputs
    if mask.shape != labels.shape or "shift_labels" in inputs:
        return inputs
    follows_padding = (mask[:, 1:] != 0) & (mask[:, :-1] == 0)
    if not bool((follows_padding & (labels[:, 1:] != IGNORE_INDEX)).any()):
        return inputs
    labels = labels.clone()
    labels[:, 1:].masked_fill_(follows_padding, IGNORE_INDEX)
    return {**inputs, "labels": labels}


def measure(
    inputs: Mapping[str, Any], *, is_encoder_decoder: bool, shifts_labels: bool
) -> SequenceSizes:
    """Measure the sequences of a batch on the host.

    Args:
        inputs: a padded batch (``input_ids`` or ``inputs_embeds`` of ``(rows, columns, ...)``,
            optionally ``attention_mask`` and ``labels``) or a packed one (``cu_seqlens``).
        is_encoder_decoder: labels belong to a decoder, otherwise to the source.
        shifts_labels: the loss shifts labels, so that the label in the first column has no effect.

    Raises:
        ValueError: if the batch has no inputs to count, or labels at padded positions.
    """
    if is_packed(inputs):
        return _measure_packed(inputs)
    source, first, end = _measure_source(inputs)
    labels = inputs.get("shift_labels", inputs.get("labels"))
    num_targets = np.ones_like(source)
    target = np.zeros_like(source)
    if isinstance(labels, Tensor) and _are_classes(labels):
        num_targets = (_to_numpy(labels) != IGNORE_INDEX).astype(np.int64)
    elif are_token_labels(labels, inputs, is_encoder_decoder):
        valid = _to_numpy(labels) != IGNORE_INDEX
        if not is_encoder_decoder:
            _require_no_labels_at_padding(valid, inputs)
        begin = int(shifts_labels and "shift_labels" not in inputs)
        num_targets = valid[:, begin:].sum(1)
        target = _extent(valid) if is_encoder_decoder else target
    else:
        # Targets may be column indices, like the answer spans of question answering. Removing
        # columns on the left would shift them.
        first = np.zeros_like(first)
    if is_encoder_decoder:
        target = np.maximum(target, _decoder_extent(inputs, has_labels=labels is not None))
    return SequenceSizes(source, target, num_targets, first, end)


def _measure_packed(inputs: Mapping[str, Any]) -> SequenceSizes:
    if "dead_tokens" in inputs:
        raise ValueError(
            f"dead_tokens must not be in a batch of the trainer, which regroups sequences, got "
            f"{int(inputs['dead_tokens'])}: pass pad_to_total to the trainer, not to the collator"
        )
    source = _to_numpy(inputs["cu_seqlens"].diff())
    starts = inputs.get("cu_seqlens_padded", inputs["cu_seqlens"])
    decoder = inputs.get("decoder_cu_seqlens")
    target = np.zeros_like(source) if decoder is None else _to_numpy(decoder.diff())
    labels = inputs.get("labels")
    num_targets = np.ones_like(source)
    if labels is not None:
        bounds = _to_numpy(starts if decoder is None else decoder)
        counts = np.append(0, (_to_numpy(labels.flatten()) != IGNORE_INDEX).cumsum())
        num_targets = np.diff(counts[bounds])
    return SequenceSizes(source, target, num_targets, np.zeros_like(source), source)


def _are_classes(labels: Tensor) -> bool:
    """Whether each row has one class label."""
    return labels.dim() == 1 and not labels.is_floating_point()


def are_token_labels(
    labels: Any, inputs: Mapping[str, Any], is_encoder_decoder: bool
) -> TypeGuard[Tensor]:
    """Whether each token has a label. Several class labels per row have another width."""
    if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.is_floating_point():
        return False
    rows, columns = main_input(inputs).shape[:2]
    return len(labels) == rows and (is_encoder_decoder or labels.shape[1] == columns)


def _measure_source(inputs: Mapping[str, Any]) -> tuple[NDArray[np.int64], ...]:
    """The real tokens of each row, its first column and the column after its last."""
    rows, columns = main_input(inputs).shape[:2]
    mask = inputs.get("attention_mask")
    if not (isinstance(mask, Tensor) and mask.dim() == 2):
        full = np.full(rows, columns, np.int64)
        return full, np.zeros_like(full), full
    real = _to_numpy(mask) != 0
    first = np.where(real.any(1), real.argmax(1), 0)
    return real.sum(1), first, _extent(real)


def _require_no_labels_at_padding(valid: NDArray[np.bool_], inputs: Mapping[str, Any]) -> None:
    """Raise an error for labels at padded positions, since a packed model does not compute them."""
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == valid.shape:
        wrong = int((valid & (_to_numpy(mask) == 0)).sum())
        if wrong:
            raise ValueError(
                f"labels must be {IGNORE_INDEX} where attention_mask is 0, got {wrong} other labels"
                " there; a data collator that copies input_ids to labels must replace padding by"
                f" {IGNORE_INDEX}"
            )


def _decoder_extent(inputs: Mapping[str, Any], *, has_labels: bool) -> NDArray[np.int64] | int:
    """The columns that the decoder's own inputs need."""
    mask, ids = inputs.get("decoder_attention_mask"), inputs.get("decoder_input_ids")
    if isinstance(mask, Tensor):
        return _extent(_to_numpy(mask) != 0)
    return ids.shape[1] if isinstance(ids, Tensor) and not has_labels else 0


def _extent(valid: NDArray[np.bool_]) -> NDArray[np.int64]:
    """``(rows,)`` int64, the number of columns up to the last True of each row."""
    columns = valid.shape[1]
    if not columns:
        return np.zeros(len(valid), np.int64)
    return np.where(valid.any(1), columns - valid[:, ::-1].argmax(1), 0)


def main_input(inputs: Mapping[str, Any]) -> Tensor:
    """The input of a padded batch that gives its rows and columns.

    Raises:
        ValueError: if there is none.
    """
    for name in ("input_ids", "inputs_embeds", "input_features"):
        value = inputs.get(name)
        if isinstance(value, Tensor) and value.dim() >= 2:
            return value
    raise ValueError(
        "data_collator must return input_ids or inputs_embeds of shape (rows, columns, ...), got "
        f"{sorted(inputs)}"
    )


def _to_numpy(tensor: Tensor) -> NDArray[Any]:
    array = tensor.detach().cpu().numpy()
    return array.astype(np.int64) if array.dtype == np.int32 else array
