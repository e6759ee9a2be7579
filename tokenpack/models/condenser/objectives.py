"""The objectives of a batch: sums over their targets.

    completion       cross entropy of the completion, given vectors and prompt
    continuation     the same, where the completion continues the context's own text
    reconstruction   cross entropy of the context itself, given vectors and the learned flags
    distillation     T^2 KL(p || q) of the same places as completion and continuation, where the
                     decoder reads the full context for p and the vectors for q, at temperature T

    loss = (sum over objectives of weight * sum over its targets) / N

N counts each place with a label once, and each token of the context if it is reconstructed. A sum
over targets and one denominator make the gradient of micro-batches exact.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...checks import IGNORE_INDEX
from ...segments import offsets_of, ranges
from .layout import ContextLayout, Integers, host_array
from .parts import Head

_ROWS = 512  # of logits at a time in the distillation


@dataclass
class ObjectiveSums:
    """The sums of a batch, by objective, and the numbers of their targets."""

    zero: Tensor  # (), 0 with a graph, for a batch without targets
    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    num_targets: int = 0

    def add(self, name: str, value: Tensor, count: int) -> None:
        """Add the sum of an objective over ``count`` targets."""
        self.sums[name], self.counts[name] = value, count


@dataclass
class Rows:
    """The decoder's tokens of a batch.

    Attributes:
        ids: ``(decoder_total,)``, prompts and completions, or None.
        lengths: ``(num_docs,)``.
        labels: ``(decoder_total,)`` on the device.
        targets: ``(num_targets,)``, where labels are not -100, on the host.
        is_text: ``(num_docs,)`` bool, on the host.
        reference_ids, reference_lengths: the contexts, or None.
    """

    ids: Tensor | None
    lengths: Integers
    labels: Tensor | None
    targets: Integers
    is_text: NDArray[np.bool_]
    reference_ids: Tensor | None
    reference_lengths: Integers | None

    @classmethod
    def of(
        cls,
        num_docs: int,
        decoder: tuple[Tensor | None, Tensor | None],
        labels: Tensor | None,
        reference: tuple[Tensor | None, Tensor | None],
        is_text: Tensor | None,
    ) -> Rows:
        """From the arguments of `Condenser.forward`."""
        ids, lengths = _flat("decoder", decoder, num_docs)
        reference_ids, reference_lengths = _flat("reference", reference, num_docs)
        targets = np.zeros(0, np.int64)
        if labels is not None:
            labels = labels.reshape(-1)
            if ids is None or labels.shape != ids.shape:
                raise ValueError(
                    "labels must have the shape of decoder_input_ids, "
                    f"{None if ids is None else tuple(ids.shape)}, got {tuple(labels.shape)}"
                )
            targets = np.flatnonzero(labels.detach().cpu().numpy() != IGNORE_INDEX)
        text = np.zeros(num_docs, bool)
        if is_text is not None:
            text = is_text.detach().cpu().numpy().astype(bool)
        nothing = np.zeros(num_docs, np.int64)
        return cls(
            ids,
            nothing if lengths is None else lengths,
            labels,
            targets,
            text,
            reference_ids,
            reference_lengths,
        )


def _flat(
    name: str, given: tuple[Tensor | None, Tensor | None], num_docs: int
) -> tuple[Tensor | None, Integers | None]:
    ids, bounds = given
    if ids is None or bounds is None:
        return None, None
    lengths: Integers = np.diff(host_array(bounds))
    if len(lengths) != num_docs:
        raise ValueError(
            f"{name}_cu_seqlens must have as many sequences as cu_seqlens, {num_docs}, got "
            f"{len(lengths)}"
        )
    return ids.reshape(-1), lengths


def count_targets(
    weights: dict[str, float], num_labels: Integers, num_reference: Integers
) -> Integers:
    """``(num_docs,)``, the targets of each document that the loss divides by."""
    labeled = any(weights[name] for name in ("completion", "continuation", "distillation"))
    counts = num_labels if labeled else np.zeros_like(num_labels)
    return counts + num_reference if weights["reconstruction"] else counts


def compute_objectives(
    model: Any, vectors: Tensor, layout: ContextLayout, rows: Rows
) -> ObjectiveSums:
    """The sums of all objectives with a weight, in one call of the decoder on stream 2.

    Distillation calls it once more, on the full contexts and without gradients.
    """
    weights = model.config.weights
    sums = ObjectiveSums(zero=vectors.sum() * 0.0)
    labeled = len(rows.targets) > 0 and bool(
        weights["completion"] or weights["continuation"] or weights["distillation"]
    )
    rebuilt = weights["reconstruction"] > 0
    if (rebuilt or weights["distillation"]) and rows.reference_ids is None:
        raise ValueError(
            "reference_ids must be given with a weight of reconstruction or distillation, got None"
        )
    if not (labeled or rebuilt):
        return sums
    number = len(layout.doc_vectors)
    ids: list[Any] = []
    lengths: list[Any] = []
    kinds = []
    if labeled:
        ids.append(rows.ids)
        lengths.append(rows.lengths)
        kinds.append(np.zeros(number, bool))
    if rebuilt:
        ids.append(rows.reference_ids)
        lengths.append(rows.reference_lengths)
        kinds.append(np.ones(number, bool))
    documents = np.tile(np.arange(number), len(kinds))
    stream, made = model.decoder_stream(
        vectors,
        layout,
        documents,
        np.concatenate(kinds),
        torch.cat(ids),
        np.concatenate(lengths),
    )
    hidden = model.run_decoder(stream, made)
    device = hidden.device
    split = len(rows.ids) if labeled and rows.ids is not None else 0
    if labeled:
        assert rows.labels is not None
        at = torch.from_numpy(made.token_at[:split][rows.targets] - 1).to(device)
        _add_labeled(model, sums, rows, hidden[at])
        sums.num_targets += len(rows.targets)
    if rebuilt:
        assert rows.reference_ids is not None
        at = torch.from_numpy(made.token_at[split:] - 1).to(device)
        loss = model.head.loss_sum(hidden[at], rows.reference_ids)
        sums.add("reconstruction", loss, len(rows.reference_ids))
        sums.num_targets += len(rows.reference_ids)
    return sums


def _add_labeled(model: Any, sums: ObjectiveSums, rows: Rows, hidden: Tensor) -> None:
    """Add completion, continuation and distillation. ``hidden`` predicts the labels in order."""
    weights = model.config.weights
    assert rows.labels is not None
    device = hidden.device
    labels = rows.labels[torch.from_numpy(rows.targets).to(device)]
    document = np.repeat(np.arange(len(rows.lengths)), rows.lengths)[rows.targets]
    is_text = rows.is_text[document]
    for name, chosen in (("completion", ~is_text), ("continuation", is_text)):
        if not weights[name] or not chosen.any():
            continue
        part, wanted = hidden, labels
        if not chosen.all():
            at = torch.from_numpy(np.flatnonzero(chosen)).to(device)
            part, wanted = hidden[at], labels[at]
        sums.add(name, model.head.loss_sum(part, wanted), int(chosen.sum()))
    if weights["distillation"]:
        teacher = full_context_states(model, rows)
        temperature = float(model.config.distillation_temperature)
        loss = distillation_sum(model.head, hidden, teacher, temperature)
        sums.add("distillation", loss, len(rows.targets))


@torch.no_grad()
def full_context_states(model: Any, rows: Rows) -> Tensor:
    """``(num_targets, width)``, the decoder's states before each label, given full contexts."""
    assert rows.ids is not None
    assert rows.reference_ids is not None
    assert rows.reference_lengths is not None
    ids, lengths, places = joined(
        (rows.reference_ids, rows.reference_lengths), (rows.ids, rows.lengths)
    )
    none = np.full(len(lengths), -1)
    stream, made = model.decoder_stream(None, None, none, none > 0, ids, lengths)
    at = made.token_at[places][rows.targets] - 1
    hidden = model.run_decoder(stream, made)
    return hidden[torch.from_numpy(at).to(hidden.device)]


def joined(
    first: tuple[Tensor, Integers], second: tuple[Tensor, Integers]
) -> tuple[Tensor, Integers, Integers]:
    """Append the sequences of ``second`` to those of ``first``, pair by pair.

    Returns:
        The ids, the lengths, and where the tokens of ``second`` are.
    """
    lengths = first[1] + second[1]
    starts = offsets_of(lengths)[:-1]
    where = [ranges(starts, first[1]), ranges(starts + first[1], second[1])]
    order = np.empty(int(lengths.sum()), np.int64)
    order[where[0]] = np.arange(len(where[0]))
    order[where[1]] = len(where[0]) + np.arange(len(where[1]))
    ids = torch.cat([first[0], second[0]])
    return ids[torch.from_numpy(order).to(ids.device)], lengths, where[1]


def distillation_sum(head: Head, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The sum of T^2 KL(teacher || student), a few rows of logits at a time.

    Args:
        head: the decoder's head.
        student: ``(n, width)``, hidden states with a gradient.
        teacher: ``(n, width)``.
        temperature: T.
    """
    head.logits(teacher[:1])  # its check runs outside of the checkpoint

    def divergence(ours: Tensor, theirs: Tensor) -> Tensor:
        wide: Any = torch.promote_types(ours.dtype, torch.float32)
        log_q = nn.functional.log_softmax(head.logits(ours).to(wide) / temperature, -1)
        with torch.no_grad():
            log_p = nn.functional.log_softmax(head.logits(theirs).to(wide) / temperature, -1)
        return nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True)

    parts = [
        checkpoint(divergence, ours, theirs, use_reentrant=False)
        for ours, theirs in zip(student.split(_ROWS), teacher.split(_ROWS))
    ]
    return torch.stack(parts).sum() * temperature**2
