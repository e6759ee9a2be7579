"""A model of the user's and one batch of the user's data, for commands that run them once."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)

from ..checks import IGNORE_INDEX
from ..models import decoder  # noqa: F401  registers it with the Auto classes
from ..samples.text import Text, read_texts

# A row: the ids of a source, and those of a target if the data has targets.
_Row = tuple[list[int], "list[int] | None"]


def model_and_batch(
    arguments: argparse.Namespace,
) -> tuple[PreTrainedModel, dict[str, Tensor], int]:
    """The model and the batch that the options of `model_options.add_model_and_batch` name.

    Both are on the GPU if there is one. The model is in eval mode.

    Returns:
        The model, the arguments of its forward, and the number of rows.

    Raises:
        ValueError: if there is no such model or no such data.
    """
    rows = _rows(arguments)
    model = load_model(arguments.model, arguments.random)
    if arguments.dtype is not None:
        model = model.to(getattr(torch, arguments.dtype))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = {name: value.to(device) for name, value in make_batch(model, rows).items()}
    return model.to(device).eval(), batch, len(rows)


def load_model(name_or_path: str, random: bool) -> PreTrainedModel:
    """The model of a folder or of a name on the hub, of the class that its config names.

    Args:
        name_or_path: of the model.
        random: use random weights. Only the config is read.

    Raises:
        ValueError: if there is no such model, or no weights and ``random`` is False.
    """
    try:
        config = AutoConfig.from_pretrained(name_or_path)
        named = getattr(transformers, (config.architectures or [""])[0], None)
        if named is None:
            named = _auto_class(config)
        if not random:
            return named.from_pretrained(name_or_path)
        torch.manual_seed(0)
        return named(config) if hasattr(named, "config_class") else named.from_config(config)
    except (OSError, ValueError) as error:
        raise ValueError(
            "--model must be a folder or a name on the hub, with a config and weights (--random "
            f"needs no weights), got {name_or_path}: {error}"
        ) from None


def _auto_class(config: Any) -> Any:
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    causal = type(config) in AutoModelForCausalLM._model_mapping
    masked = type(config) in AutoModelForMaskedLM._model_mapping
    return AutoModelForMaskedLM if masked and not causal else AutoModelForCausalLM


def make_batch(model: PreTrainedModel, rows: Sequence[_Row]) -> dict[str, Tensor]:
    """One batch, padded on the right: ids and mask ``(rows, columns)``, and labels.

    An encoder-decoder learns the targets, or the sources if there are none. Other models with a
    head over tokens learn their ids, and in the data with targets the target alone. A sequence
    classifier has label 0 in every row, and a token classifier at every token. Models without a
    head have no labels.
    """
    name = type(model).__name__
    joined = not model.config.is_encoder_decoder
    ids = [source + (target or []) * joined for source, target in rows]
    vocabulary = model.get_input_embeddings().weight.shape[0]
    largest = max(max(source + (target or [])) for source, target in rows)
    if largest >= vocabulary:
        raise ValueError(
            f"--data must have ids below {vocabulary}, the vocabulary of {name}, got {largest}: is "
            "--tokenizer that of --model?"
        )
    lengths = torch.tensor([[len(row)] for row in ids])
    columns = torch.arange(int(lengths.max()))
    mask = columns < lengths
    pad = getattr(model.config, "pad_token_id", None) or 0
    batch = {"input_ids": _padded(ids, pad), "attention_mask": mask.long()}
    if name.endswith("ForSequenceClassification"):
        kind = torch.float if model.config.num_labels == 1 else torch.long
        batch["labels"] = torch.zeros(len(ids), dtype=kind)
    elif name.endswith("ForTokenClassification"):
        batch["labels"] = torch.zeros_like(mask, dtype=torch.long).masked_fill(~mask, IGNORE_INDEX)
    elif name.endswith(("ForConditionalGeneration", "MTModel")):
        batch["labels"] = _padded([target or source for source, target in rows], IGNORE_INDEX)
    elif name.endswith(("ForCausalLM", "LMHeadModel", "ForMaskedLM")):
        labels = [
            [IGNORE_INDEX] * len(source) + target if target else source for source, target in rows
        ]
        batch["labels"] = _padded(labels, IGNORE_INDEX)
    elif model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = _padded([target or source for source, target in rows], pad)
    return batch


def _padded(rows: list[list[int]], value: int) -> Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], True, value)


# -------------------------------------------------------------------------------------------- data


def _rows(arguments: argparse.Namespace) -> list[_Row]:
    """The ids of the first rows of --data that have any."""
    limit = arguments.max_length
    found = [
        (source[:limit], None if target is None else target[:limit])
        for source, target in itertools.islice(_all_rows(arguments), arguments.batch_size)
    ]
    if not found or not all(source and target != [] for source, target in found):
        raise ValueError(f"--data must hold rows that are not empty, got {arguments.data}")
    return found


def _all_rows(arguments: argparse.Namespace) -> Iterator[_Row]:
    path: Path = arguments.data
    if arguments.column is None and path.suffix.lower() in (".txt", ".jsonl"):
        texts = read_texts(path)[: arguments.batch_size]
        yield from _encoded(texts, arguments)
        return
    from ..data.reader import streaming_dataset_reader  # needs pyarrow

    column, target = arguments.column or "text", arguments.target_column
    columns = [column] + [target] * (target is not None)
    for batch in streaming_dataset_reader(str(path), arguments.batch_size, columns):
        values = list(zip(*(batch[name] for name in columns)))
        if all(isinstance(cell, list) for row in values for cell in row):
            yield from ((row[0], row[1] if len(row) > 1 else None) for row in values)
        elif all(isinstance(cell, str) for row in values for cell in row):
            yield from _encoded([Text(*row) for row in values], arguments)
        else:
            raise ValueError(f"--column must name texts or lists of ids, got {column} in {path}")


def _encoded(texts: list[Text], arguments: argparse.Namespace) -> Iterator[_Row]:
    from .tokenizer import load_tokenizer

    encode = load_tokenizer(arguments.tokenizer or arguments.model)
    sources = encode([text.source for text in texts])
    has_targets = texts[0].target is not None
    targets = encode([text.target or "" for text in texts]) if has_targets else [None] * len(texts)
    yield from zip(sources, targets)
