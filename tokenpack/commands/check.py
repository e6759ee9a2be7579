"""``tokenpack check``: one batch of the user's texts through a model, padded and packed."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from .. import check_patch
from ..checks import IGNORE_INDEX
from ..data.reader import streaming_dataset_reader
from ..samples.text import Text, read_texts
from .tokenizer import Encode, load_tokenizer


def run(arguments: argparse.Namespace) -> int:
    """Print the report. Returns 0 if the packed model is right, 1 if it differs."""
    texts = _read(arguments.data, arguments.texts)
    encode = load_tokenizer(arguments.tokenizer or arguments.model)
    model = load_model(arguments.model, arguments.random)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = make_batch(model, texts, encode, arguments.max_len)
    batch = {name: value.to(device) for name, value in batch.items()}
    report = check_patch(model.to(device).train(), batch)
    print(report)
    return 0 if report.ok else 1


def load_model(name_or_path: str, random: bool) -> PreTrainedModel:
    """The model of a folder or of a name on the hub, of the class that its config names.

    Raises:
        ValueError: if there is no such model, or no weights and ``random`` is False.
    """
    try:
        config = AutoConfig.from_pretrained(name_or_path)
        named = getattr(transformers, (config.architectures or [""])[0], None)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        if not random:
            return (named or auto).from_pretrained(name_or_path)
        torch.manual_seed(0)
        return named(config) if named is not None else auto.from_config(config)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--model must be a folder or a name on the hub, with a config and weights (--random "
            f"needs no weights), got {name_or_path}: {error}"
        ) from None


def make_batch(
    model: PreTrainedModel, texts: Sequence[Text], encode: Encode, max_length: int
) -> dict[str, torch.Tensor]:
    """One batch, padded on the right: ids and mask ``(rows, columns)``, and labels.

    An encoder-decoder learns the targets, or the texts themselves if they have none. A sequence
    classifier has label 0 in every row. Other models learn their ids. A model without labels has
    none.
    """
    sources = _encode(encode, [text.source for text in texts], max_length)
    targets = _encode(encode, [text.target or text.source for text in texts], max_length)
    ids = pad_sequence(sources, True, getattr(model.config, "pad_token_id", None) or 0)
    columns = torch.arange(ids.shape[1])
    lengths = torch.tensor([[len(source)] for source in sources])
    batch = {"input_ids": ids, "attention_mask": (columns < lengths).long()}
    if type(model).__name__.endswith("ForSequenceClassification"):
        kind = torch.float if model.config.num_labels == 1 else torch.long
        batch["labels"] = torch.zeros(len(ids), dtype=kind)
    elif _takes_labels(model):
        kept = targets if model.config.is_encoder_decoder else sources
        batch["labels"] = pad_sequence(kept, True, IGNORE_INDEX)
    return batch


def _takes_labels(model: Any) -> bool:
    return "labels" in type(model).forward.__code__.co_varnames or hasattr(model, "lm_head")


def _encode(encode: Encode, texts: list[str], max_length: int) -> list[torch.Tensor]:
    return [torch.tensor(ids[:max_length]) for ids in encode(texts)]


def _read(path: Any, count: int) -> list[Text]:
    if path.suffix.lower() in (".txt", ".jsonl"):
        return read_texts(path)[:count]
    rows = streaming_dataset_reader(str(path), columns=["text"])
    return [Text(row["text"]) for row in itertools.islice(rows, count)]
