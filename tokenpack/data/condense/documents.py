"""Documents of ids from columns of texts, and a split by content.

    context, prompt, completion    the completion is learned, with one EOS behind it
    text                           windows [context, prompt, continuation] of the text itself

The context is tokenized twice: in the condenser's ids, with its special tokens, and in the
decoder's, without.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from ...checks import at_least_one, check_seed, optional_at_least_one

logger = logging.getLogger(__name__)

TRIPLE = ("context", "prompt", "completion")


def tokenize_documents(
    dataset: Any,
    condenser_tokenizer: Any,
    decoder_tokenizer: Any,
    *,
    max_context_tokens: int | None = None,
    continuation_tokens: int = 64,
    prompt_tokens: int = 0,
    num_proc: int | None = None,
) -> Any:
    """Tokenize a `datasets.Dataset` for the condenser.

    Args:
        dataset: with the columns ``context``, ``prompt`` (optional) and ``completion``, or ``text``
            alone.
        condenser_tokenizer: of the condenser model. It adds its special tokens.
        decoder_tokenizer: of the decoder. Texts alone need a fast one, which knows the places of
            its tokens.
        max_context_tokens: longest context. A longer one of a triple is an error, because its end
            may be what the prompt asks about. A text is cut into windows. Counted in the decoder's
            tokens for a text, in the condenser's for a triple. None: no limit, and one window.
        continuation_tokens: learned tokens of a window of a text, at the most.
        prompt_tokens: tokens of a text in front of them that the decoder reads as they are.
        num_proc: processes, as in `datasets.Dataset.map`.

    Returns:
        A dataset with the columns ``context_ids``, ``reference_ids`` (the context in the decoder's
        ids), ``prompt_ids``, ``completion_ids`` and ``is_text``, and the numbers of tokens:
        ``context_length``, ``reference_length``, ``prompt_length`` and ``completion_length``. Texts
        that are too short for a context are dropped, and a warning counts them.

    Raises:
        ValueError: if the columns are others, a context is empty or too long, or nothing is left.
    """
    names = set(dataset.column_names)
    is_text = "text" in names and "context" not in names
    if not is_text and not {"context", "completion"} <= names:
        raise ValueError(
            "dataset must have the columns context, prompt and completion, or text alone, got "
            f"{', '.join(sorted(names)) or 'none'}"
        )
    limit = optional_at_least_one("max_context_tokens", max_context_tokens)
    if is_text and not getattr(decoder_tokenizer, "is_fast", False):
        raise ValueError(
            "decoder_tokenizer must be a fast tokenizer to cut texts at tokens, got a "
            f"{type(decoder_tokenizer).__name__}"
        )
    if prompt_tokens < 0:
        raise ValueError(f"prompt_tokens must be 0 or more, got {prompt_tokens}")
    tokenizers = (condenser_tokenizer, decoder_tokenizer)
    if is_text:
        sizes = (limit, prompt_tokens, at_least_one("continuation_tokens", continuation_tokens))
        function: Callable[..., Any] = functools.partial(_windows, *tokenizers, sizes)
    else:
        function = functools.partial(_triples, *tokenizers, limit)
    found = dataset.map(
        function,
        batched=True,
        batch_size=100,
        with_indices=True,
        remove_columns=dataset.column_names,
        num_proc=num_proc,
        desc="Tokenizing documents",
    )
    if not len(found):
        raise ValueError("dataset must have a text with a context and a continuation, got none")
    dropped = len(dataset) - len(set(found["row"]))
    if dropped:
        logger.warning(f"{dropped} of {len(dataset)} texts are too short and were dropped")
    return found.remove_columns("row")


def _row(at: int, ids: Mapping[str, list[int]], is_text: bool) -> dict[str, Any]:
    lengths = {f"{name}_length": len(ids[f"{name}_ids"]) for name in ("reference", "prompt")}
    return {
        **ids,
        "is_text": is_text,
        "context_length": len(ids["context_ids"]),
        "completion_length": len(ids["completion_ids"]),
        **lengths,
        "row": at,
    }


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    names = [
        *("context_ids", "reference_ids", "prompt_ids", "completion_ids", "is_text"),
        *("context_length", "completion_length", "reference_length", "prompt_length", "row"),
    ]
    return {name: [row[name] for row in rows] for name in names}


def _triples(
    condenser_tokenizer: Any,
    decoder_tokenizer: Any,
    limit: int | None,
    batch: Mapping[str, list[Any]],
    indices: list[int],
) -> dict[str, list[Any]]:
    rows = []
    prompts = batch.get("prompt") or [""] * len(indices)
    for at, context, prompt, completion in zip(
        indices, batch["context"], prompts, batch["completion"]
    ):
        if not context or not completion:
            name = "completion" if context else "context"
            raise ValueError(f"{name} must not be empty, got row {at} without one: drop it")
        ids = {
            "context_ids": condenser_tokenizer(context)["input_ids"],
            "reference_ids": _plain(decoder_tokenizer, context),
            "prompt_ids": _plain(decoder_tokenizer, prompt or ""),
            "completion_ids": with_one_eos(
                _plain(decoder_tokenizer, completion), decoder_tokenizer
            ),
        }
        if limit is not None and len(ids["context_ids"]) > limit:
            raise ValueError(
                f"context must have at most max_context_tokens={limit} tokens, got row {at} with "
                f"{len(ids['context_ids'])}: cut it, or raise the limit and set segment_length"
            )
        rows.append(_row(at, ids, is_text=False))
    return _columns(rows)


def _windows(
    condenser_tokenizer: Any,
    decoder_tokenizer: Any,
    sizes: tuple[int | None, int, int],
    batch: Mapping[str, list[Any]],
    indices: list[int],
) -> dict[str, list[Any]]:
    rows = []
    for at, text in zip(indices, batch["text"]):
        encoded = decoder_tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, places = encoded["input_ids"], encoded["offset_mapping"]
        for first, prompt, completion, end in _cuts(len(ids), *sizes):
            # Some tokenizers leave the space in front of a token out of its place.
            last = min(places[prompt - 1][1], places[prompt][0])
            context = text[places[first][0] : last]
            if not context:
                continue
            learned = ids[completion:end]
            if end == len(ids):
                learned = with_one_eos(learned, decoder_tokenizer)
            own = {
                "context_ids": condenser_tokenizer(context)["input_ids"],
                "reference_ids": ids[first:prompt],
                "prompt_ids": ids[prompt:completion],
                "completion_ids": learned,
            }
            rows.append(_row(at, own, is_text=True))
    return _columns(rows)


def _cuts(
    total: int, context: int | None, prompt: int, continuation: int
) -> Iterator[tuple[int, int, int, int]]:
    """Where context, prompt and continuation begin, and where each window ends.

    A window has at least one token of context and of continuation. What remains of a text is a
    window too, if its context would be at least as long as its continuation.
    """
    size = total if context is None else context + prompt + continuation
    for first in range(0, total, max(size, 1)):
        end = min(first + size, total)
        room = end - first - prompt
        learned = min(continuation, room // 2)
        if learned >= 1:
            yield first, end - learned - prompt, end - learned, end


def _plain(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def with_one_eos(ids: list[int], tokenizer: Any) -> list[int]:
    """The ids with exactly one EOS at their end, also where the text ends with EOS itself."""
    eos = tokenizer.eos_token_id
    if eos is None:
        return ids
    end = len(ids)
    while end and ids[end - 1] == eos:
        end -= 1
    return [*ids[:end], eos]


def split_by_content(dataset: Any, held_out: float = 0.05, *, seed: int = 0) -> tuple[Any, Any]:
    """Split a dataset so that rows with the same context, or the same text, are on one side.

    The side depends on a hash of the content and the seed alone, so it is the same for every order
    of the rows and when rows are added. White space at the ends does not count.

    Args:
        dataset: a `datasets.Dataset` with a column ``context`` or ``text``.
        held_out: the expected share of contents on the second side, above 0 and below 1.
        seed: an integer of 0 or more.

    Returns:
        ``(train, held_out)``.

    Raises:
        ValueError: if there is no such column, the share is out of range, or a side is empty.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must be above 0 and below 1, got {held_out}")
    column = next((name for name in ("context", "text") if name in dataset.column_names), None)
    if column is None:
        raise ValueError(
            "dataset must have a column context or text, got "
            f"{', '.join(dataset.column_names) or 'none'}"
        )
    prefix = str(check_seed(seed)).encode() + b"\0"
    digests = (
        hashlib.blake2b(prefix + str(text).strip().encode("utf-8", "surrogatepass"), digest_size=8)
        for text in dataset[column]
    )
    shares = np.array([int.from_bytes(each.digest(), "big") / 2.0**64 for each in digests])
    sides = [np.flatnonzero(shares >= held_out), np.flatnonzero(shares < held_out)]
    if not all(len(side) for side in sides):
        raise ValueError(
            f"held_out must leave rows on both sides, got {held_out} for {len(dataset)} rows with "
            f"{len(set(dataset[column]))} contents: change it or the seed"
        )
    return dataset.select(sides[0]), dataset.select(sides[1])
