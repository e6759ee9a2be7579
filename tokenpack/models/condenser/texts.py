"""From texts to vectors, and from vectors and prompts to texts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from ...adapters.patching import transformers_model
from ...checks import at_least_one
from ...kernels import layout_from_lengths, repad
from .layout import ContextLayout
from .parts import embedding_of


class CondenserTexts:
    """The part of `Condenser` that takes texts."""

    _tokenizers: dict[str, Any] | None = None

    def set_tokenizers(self: Any, condenser: Any = None, decoder: Any = None) -> None:
        """Set the tokenizers of the two models. Default: those of their folders or names.

        Args:
            condenser: the tokenizer of the condenser model.
            decoder: the tokenizer of the decoder.

        Raises:
            ValueError: if a tokenizer does not belong to its model.
        """
        known = dict(self._tokenizers or {})
        for name, tokenizer in (("condenser", condenser), ("decoder", decoder)):
            if tokenizer is not None:
                check_tokenizer(name, tokenizer, getattr(self, name))
                known[name] = tokenizer
        self._tokenizers = known

    def tokenizer_of(self: Any, name: str) -> Any:
        """The tokenizer of the ``"condenser"`` or the ``"decoder"``.

        Raises:
            ValueError: if it was not set, and the configuration does not say where it is.
        """
        known = self._tokenizers or {}
        if name not in known:
            where = getattr(self.config, f"{name}_name_or_path")
            if not where:
                raise ValueError(
                    f"tokenizer of the {name} must be set with set_tokenizers({name}=...), because "
                    f"{name}_name_or_path is not in the configuration"
                )
            self.set_tokenizers(**{name: AutoTokenizer.from_pretrained(where)})
            known = self._tokenizers
        return known[name]

    @torch.no_grad()
    def condense(
        self: Any,
        texts: Sequence[str],
        *,
        ratio: int | None = None,
        max_tokens: int = 16_384,
    ) -> list[Tensor]:
        """Condense texts of any lengths.

        Args:
            texts: the contexts.
            ratio: tokens per vector. Default: the first ratio of the configuration.
            max_tokens: the most tokens of one call of the condenser model. A longer context gets a
                call of its own.

        Returns:
            One tensor of ``(k_i, decoder width)`` for each text, on the model's device.

        Raises:
            ValueError: if a text is empty or too long, or ``ratio`` contradicts the configuration.
        """
        ids = context_ids(self.tokenizer_of("condenser"), texts)
        at_least_one("max_tokens", max_tokens)
        found: list[Tensor] = []
        with evaluating(self):
            for group in _groups([len(each) for each in ids], max_tokens):
                vectors, layout = condense_ids(self, [ids[at] for at in group], ratio)
                found += vectors.split(layout.doc_vectors.tolist())
        return found

    @torch.no_grad()
    def generate(
        self: Any,
        contexts: Sequence[str],
        prompts: Sequence[str] | None = None,
        *,
        ratio: int | None = None,
        skip_special_tokens: bool = True,
        **options: Any,
    ) -> list[str]:
        """Let the decoder answer prompts, given condensed contexts, all in one call.

        The decoder generates with a cache, in rows that are padded on the left.

        Args:
            contexts: texts of any lengths.
            prompts: what follows each context. Default: nothing, so the decoder continues.
            ratio: tokens per vector. Default: the first ratio of the configuration.
            skip_special_tokens: leave special tokens out of the texts.
            options: of transformers' ``generate``, such as ``max_new_tokens``.

        Returns:
            The new text for each context.

        Raises:
            ValueError: if there are not as many prompts as contexts, or a context is empty or too
                long.
        """
        prompts = [""] * len(contexts) if prompts is None else list(prompts)
        if len(prompts) != len(contexts):
            raise ValueError(
                f"prompts must be as many as contexts, {len(contexts)}, got {len(prompts)}"
            )
        if not len(contexts):
            return []
        tokenizer = self.tokenizer_of("decoder")
        asked = [tokenizer(each, add_special_tokens=False)["input_ids"] for each in prompts]
        with evaluating(self):
            ids = context_ids(self.tokenizer_of("condenser"), contexts)
            vectors, layout = condense_ids(self, ids, ratio)
            made = generate_ids(self, vectors, layout, asked, **options)
        return tokenizer.batch_decode(made, skip_special_tokens=skip_special_tokens)


def context_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The ids of contexts, with the special tokens that the tokenizer adds.

    Raises:
        TypeError: if ``texts`` is one text.
        ValueError: if a context is empty.
    """
    if isinstance(texts, str):
        raise TypeError("texts must be a list of texts, got one text: put it into a list")
    for at, text in enumerate(texts):
        if not text:
            raise ValueError(f"context must have at least one token, got context {at} with none")
    return [tokenizer(each)["input_ids"] for each in texts]


def condense_ids(
    model: Any, ids: Sequence[Sequence[int]], ratio: int | None
) -> tuple[Tensor, ContextLayout]:
    """The vectors of contexts that are lists of ids, in one call, and their layout.

    Raises:
        ValueError: if ``ratio`` is given for a condenser with a fixed number of vectors.
    """
    ratios = None
    if ratio is not None:
        if model.config.num_condense_tokens is not None:
            raise ValueError(
                "ratio must be None for a condenser with num_condense_tokens="
                f"{model.config.num_condense_tokens}, got {ratio}"
            )
        ratios = np.full(len(ids), at_least_one("ratio", ratio), np.int64)
    lengths = np.array([len(each) for each in ids], np.int64)
    flat = np.concatenate([np.asarray(each, np.int64) for each in ids])
    device = embedding_of(model.condenser).weight.device
    return model.vectors(torch.from_numpy(flat).to(device), lengths, ratios)


def generate_ids(
    model: Any,
    vectors: Tensor,
    layout: ContextLayout,
    prompts: Sequence[Sequence[int]],
    *,
    reconstruct: bool = False,
    **options: Any,
) -> Tensor:
    """``(num_docs, new tokens)``, what the decoder generates after vectors, flags and prompts.

    With ``reconstruct``, the flags are those that ask for the context itself.
    """
    lengths = np.array([len(each) for each in prompts], np.int64)
    flat = np.array([token for each in prompts for token in each], np.int64)
    ids = torch.from_numpy(flat).to(vectors.device)
    documents = np.arange(len(prompts))
    stream, made = model.decoder_stream(
        vectors, layout, documents, np.full(len(prompts), reconstruct), ids, lengths
    )
    embeds, mask = left_padded(stream, np.diff(made.cu_seqlens).tolist())
    decoder = transformers_model(model.decoder)
    config = decoder.generation_config
    if config.pad_token_id is None and "pad_token_id" not in options:
        eos = config.eos_token_id
        options["pad_token_id"] = eos[0] if isinstance(eos, list) else (0 if eos is None else eos)
    return decoder.generate(inputs_embeds=embeds, attention_mask=mask, **options)


def left_padded(stream: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Rows of a stream that end in the last column, and their mask.

    Returns:
        ``(rows, columns, width)`` and ``(rows, columns)`` int64.
    """
    layout = layout_from_lengths(lengths, device=stream.device)
    rows = repad(stream, layout)  # padded on the right
    columns = torch.arange(rows.shape[1], device=stream.device)
    lacking = rows.shape[1] - torch.tensor(lengths, device=stream.device)[:, None]
    source = (columns - lacking) % rows.shape[1]
    mask = (columns >= lacking).long()
    return rows.gather(1, source[..., None].expand_as(rows)), mask


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Run in evaluation mode, and restore the mode."""
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)


def check_tokenizer(name: str, tokenizer: Any, model: Any) -> None:
    """Check that a tokenizer belongs to a model.

    Raises:
        ValueError: if it has ids that the model has no embedding for, or another EOS.
    """
    inner = transformers_model(model)
    rows = embedding_of(model).weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(
            f"tokenizer of the {name} must belong to the model, which has {rows} embeddings, got "
            f"one with {len(tokenizer)} tokens"
        )
    known: set[int] = set()
    for config in (inner.config, getattr(inner, "generation_config", None)):
        eos = getattr(config, "eos_token_id", None)
        if eos is not None:
            known |= set(eos) if isinstance(eos, (list, tuple)) else {eos}
    eos = tokenizer.eos_token_id
    if known and eos is not None and eos not in known:
        raise ValueError(
            f"tokenizer of the {name} must belong to the model, whose eos_token_id is "
            f"{sorted(known)}, got one with {eos} (if it is right, set config.eos_token_id)"
        )


def _groups(lengths: list[int], most: int) -> Iterator[list[int]]:
    """Consecutive numbers of contexts with at most ``most`` tokens together."""
    group: list[int] = []
    used = 0
    for at, length in enumerate(lengths):
        if group and used + length > most:
            yield group
            group, used = [], 0
        group.append(at)
        used += length
    if group:
        yield group
