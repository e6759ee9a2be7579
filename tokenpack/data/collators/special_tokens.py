"""The special tokens at the end of a sequence, which survive truncation.

    T5, BART, Marian, Pegasus, NLLB    text </s>
    mBART, legacy NLLB                 text </s> lang

A sequence that is too long loses tokens before these, so its front, with NLLB's language or BART's
``<s>``, is kept too. The tokens are found in the sequence itself and not taken from the tokenizer's
current template, because the language may differ between samples and sides.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...segments import offsets_of, ranges
from ..tokens import Tokens

_MOST = 4  # special tokens at the end of a sequence; templates have one or two
_CONTENT = ("unk_token_id", "mask_token_id", "pad_token_id")  # special, but part of the text
_SENTINEL = re.compile(r"▁?<extra_id_\d+>|<mask_\d+>|<unk_\d+>")
# ro_RO, eng_Latn, __ro__, <2ro>, >>ro<<: a language that the tokenizer does not list as special.
_LANGUAGE = re.compile(r"[a-z]{2,3}_([A-Z]{2}|[A-Z][a-z]{3})|__\w+__|<2\w+>|>>\w+<<")


class EndOfSequence:
    """Finds the special tokens at the end of sequences, and truncates before them.

    The special tokens are, from the end of the sequence: the tokens of ``tokenizer.suffix_tokens``
    if the sequence ends with them; otherwise special tokens of the tokenizer (`all_special_ids`)
    and language codes, up to the first EOS and at most four. An unknown word, a mask, a sentinel
    and padding are part of the text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._names: dict[int, str] = {}

    def lengths(self, tokens: Tokens) -> NDArray[np.int64]:
        """``(num_sequences,)`` int64, the number of special tokens at the end of each sequence."""
        special, suffix, eos = self._special(), self._suffix(), self._eos()
        lengths = tokens.lengths
        counts = np.zeros(len(lengths), np.int64)
        open_ = lengths > 0  # sequences in which an earlier token may be special too
        for back in range(1, _MOST + 1):
            (at,) = np.nonzero(open_ & (lengths >= back))
            values = tokens.values[tokens.offsets[1:][at] - back]
            is_special = np.isin(values, special)
            if back == 1 and not is_special.all():
                before = tokens.values[np.maximum(tokens.offsets[1:][at] - 2, 0)]
                ends = ~is_special & (lengths[at] > 1) & (before == eos)
                is_special[ends] = [self._is_language(int(each)) for each in values[ends]]
            counts[at[is_special]] = back
            open_[at[~is_special | (values == eos)]] = False
        if len(suffix):
            (at,) = np.nonzero(lengths >= len(suffix))
            tails = tokens.offsets[1:][at][:, None] + np.arange(-len(suffix), 0)
            same = (tokens.values[tails] == suffix).all(1)
            counts[at[same]] = np.maximum(counts[at[same]], len(suffix))
        return counts

    def truncated(self, tokens: Tokens, limit: int | NDArray[np.int64]) -> Tokens:
        """Return a copy in which no sequence is longer than its limit.

        A truncated sequence is its first tokens and the special tokens at its end. If the limit is
        smaller than these, the last of them are kept.
        """
        lengths = np.minimum(tokens.lengths, limit)
        ends = np.where(tokens.lengths > limit, self.lengths(tokens), 0)
        ends = np.minimum(ends, lengths)
        begins = np.stack([tokens.offsets[:-1], tokens.offsets[1:] - ends], axis=1)
        counts = np.stack([lengths - ends, ends], axis=1)
        values = tokens.values[ranges(begins.ravel(), counts.ravel())]
        return Tokens(values, offsets_of(lengths))

    def _eos(self) -> int:
        eos = getattr(self._tokenizer, "eos_token_id", None)
        return -1 if eos is None else int(eos)

    def _special(self) -> NDArray[np.int64]:
        """The ids that belong to the end of a sequence, not to its text."""
        given = [self._eos(), *(getattr(self._tokenizer, "all_special_ids", None) or ())]
        content = {getattr(self._tokenizer, name, None) for name in _CONTENT} - {self._eos()}
        names = {id_: self._name_of(id_) for id_ in given if id_ not in content}
        return np.array([i for i, name in names.items() if not _SENTINEL.fullmatch(name)], np.int64)

    def _suffix(self) -> NDArray[np.int64]:
        return np.array(getattr(self._tokenizer, "suffix_tokens", None) or (), np.int64)

    def _is_language(self, token: int) -> bool:
        return bool(_LANGUAGE.fullmatch(self._name_of(token)))

    def _name_of(self, token: int) -> str:
        if token not in self._names:
            names = getattr(self._tokenizer, "convert_ids_to_tokens", None)
            self._names[token] = "" if names is None or token < 0 else str(names(int(token)))
        return self._names[token]
