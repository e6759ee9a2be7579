"""Packed batches of documents for `tokenpack.models.condenser.Condenser`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...checks import IGNORE_INDEX, as_integer
from ...segments import offsets_of, ranges
from ..collators.random_parts import text_keys, words
from ..packed.base import CUT_BY_ROWS, PackedFields, selected

# The fields of tokens, and the field of their boundaries.
_STREAMS = {
    "input_ids": "cu_seqlens",
    "decoder_input_ids": "decoder_cu_seqlens",
    "labels": "decoder_cu_seqlens",
    "reference_ids": "reference_cu_seqlens",
}
_PER_DOCUMENT = ("ratios", "is_text")


class CondenseBatch(PackedFields):
    """The arguments of `Condenser.forward`, document by document, without padding.

    Attributes:
        input_ids: ``(1, total)`` int64, the contexts in the condenser's ids.
        cu_seqlens: ``(num_docs + 1,)`` int32.
        decoder_input_ids: ``(1, decoder_total)`` int64, prompts and completions.
        decoder_cu_seqlens: ``(num_docs + 1,)`` int32.
        labels: ``(1, decoder_total)`` int64, -100 in prompts.
        reference_ids: ``(1, reference_total)`` int64, the contexts in the decoder's ids.
        reference_cu_seqlens: ``(num_docs + 1,)`` int32.
        is_text: ``(num_docs,)`` bool, whether the completion continues the context's own text.
        ratios: ``(num_docs,)`` int64, tokens per vector. Absent with a fixed number of vectors.

    `to` moves ids and labels alone. The model lays out its streams on the host, and would have to
    wait for the other fields to come back from a GPU.
    """

    _host_fields = frozenset({*_STREAMS.values(), *_PER_DOCUMENT})

    def _check_boundaries(self) -> None:
        for name, bounds in _STREAMS.items():
            ids, ends = self.get(name), self.get(bounds)
            if not (isinstance(ids, Tensor) and isinstance(ends, Tensor) and ends.is_cpu):
                continue
            if not len(ends) or int(ends[-1]) != ids.numel():
                raise ValueError(
                    f"{bounds} must end at the {ids.numel()} tokens of {name}, got "
                    f"{int(ends[-1]) if len(ends) else 'none'}: a packed batch {CUT_BY_ROWS}"
                )

    def select(self, sequences: Any) -> CondenseBatch:
        """Return some of the documents, in the given order.

        Args:
            sequences: ``(k,)`` integers, the numbers of the documents, at least one.

        Raises:
            TypeError, ValueError, IndexError: if ``sequences`` are no such numbers.
        """
        chosen = selected(sequences, len(self["cu_seqlens"]) - 1)
        fields: dict[str, Any] = {}
        for name, bounds in _STREAMS.items():
            if name not in self:
                continue
            ends = self[bounds].cpu().numpy().astype(np.int64)
            lengths = np.diff(ends)[chosen]
            places = torch.from_numpy(ranges(ends[:-1][chosen], lengths)).to(self[name].device)
            fields[name] = self[name][:, places]
            cu_seqlens = torch.from_numpy(offsets_of(lengths)).to(self[bounds].device)
            fields[bounds] = cu_seqlens.to(torch.int32)
        for name in _PER_DOCUMENT:
            if name in self:
                fields[name] = self[name][torch.from_numpy(chosen).to(self[name].device)]
        return type(self)(fields)


class CondenseCollator:
    """Packs documents into a `CondenseBatch`, and draws a ratio for each of them.

    A ratio depends on the context, the seed and the epoch alone. So it is the same on every rank
    and in every worker, in a repeated step, and after a resume.
    """

    def __init__(self, ratios: Sequence[int] | None, *, seed: int = 0, draw: bool = True) -> None:
        """Make a collator.

        Args:
            ratios: those of the configuration; None for a fixed number of vectors.
            seed: of the draws.
            draw: draw one of the ratios. False: take the first one.
        """
        self.ratios = None if ratios is None else [as_integer("ratios", each) for each in ratios]
        self.seed, self.draw = as_integer("seed", seed), draw
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, in this process and in all workers that already run."""
        self._epoch.fill_(as_integer("epoch", epoch))

    def __call__(self, documents: Sequence[Mapping[str, Any]]) -> CondenseBatch:
        """Pack documents.

        Args:
            documents: rows of `tokenize_documents`.

        Raises:
            ValueError: if a context has no token.
        """
        columns: dict[str, list[NDArray[np.int64]]] = {
            name: [np.asarray(each[name], np.int64) for each in documents]
            for name in ("context_ids", "reference_ids", "prompt_ids", "completion_ids")
        }
        empty = [at for at, ids in enumerate(columns["context_ids"]) if not len(ids)]
        if empty:
            raise ValueError(
                f"context_ids must have at least one token, got document {empty[0]} of a batch "
                "with none: drop it"
            )
        pairs = list(zip(columns["prompt_ids"], columns["completion_ids"]))
        labels = [np.concatenate([np.full_like(p, IGNORE_INDEX), c]) for p, c in pairs]
        decoder = [np.concatenate(pair) for pair in pairs]
        fields: dict[str, Any] = {}
        for name, rows in (
            ("input_ids", columns["context_ids"]),
            ("decoder_input_ids", decoder),
            ("labels", labels),
            ("reference_ids", columns["reference_ids"]),
        ):
            fields[name] = torch.from_numpy(np.concatenate(rows))[None]
            ends = torch.from_numpy(offsets_of([len(row) for row in rows]))
            fields[_STREAMS[name]] = ends.to(torch.int32)
        fields["is_text"] = torch.tensor([bool(each["is_text"]) for each in documents])
        if self.ratios is not None:
            fields["ratios"] = torch.from_numpy(self._ratios_of(columns["context_ids"]))
        return CondenseBatch(fields)

    def _ratios_of(self, contexts: list[NDArray[np.int64]]) -> NDArray[np.int64]:
        assert self.ratios is not None
        if not self.draw or len(self.ratios) == 1:
            return np.full(len(contexts), self.ratios[0])
        lengths = np.array([len(each) for each in contexts])
        begins = offsets_of(lengths)[:-1]
        keys = text_keys(
            np.concatenate(contexts), begins, lengths, self.seed, int(self._epoch.item())
        )
        drawn = words(keys, np.zeros(1, np.int64)) % np.uint64(len(self.ratios))
        return np.array(self.ratios)[drawn.astype(np.int64)]
