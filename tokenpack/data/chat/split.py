"""Training and validation data in one call, with the names that users of transformer-toolkit know.

Each function is `chat_dataset` on two parts of the source. Rows are divided before they are
encoded, so that the parts of one conversation stay together.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...checks import at_least_one, check_seed
from .checks import read_actions
from .dataset import encode_opened
from .fitting import TRUNCATIONS
from .pipeline import ChatOptions, check_choice
from .preview import preview
from .schemas import SCHEMAS
from .sources import open_source
from .templates import ChatTemplate, set_template

if TYPE_CHECKING:
    import datasets

    Split = tuple[datasets.Dataset, datasets.Dataset]


@dataclass
class SFTDataConfig:
    """How `from_sft_strings` and its siblings make training and validation data.

    Attributes:
        tokenizer: of transformers, for calls that name none.
        seq_len: the most tokens of a row.
        split: the share of the rows that is training data, between 0 and 1.
        template: a preset's name, a `ChatTemplate` or jinja; None uses the tokenizer's own.
        schema: ``"auto"``, or the schema of all rows; see `chat_dataset`.
        truncation_strategy: ``"turn"``, ``"token"``, ``"drop"`` or ``"error"``.
        generation_config: the model's, or ids of tokens, that generation stops at; by default the
            tokenizer's EOS. Used by the checks.
        seed: of the division into two parts.
        debug: print a preview of the training data.
        debug_n: rows of the preview.
    """

    tokenizer: Any = None
    seq_len: int = 512
    split: float = 0.9
    template: str | ChatTemplate | None = None
    schema: str = "auto"
    truncation_strategy: str = "turn"
    generation_config: Any = None
    seed: int = 0
    debug: bool = False
    debug_n: int = 3

    def __post_init__(self) -> None:
        at_least_one("seq_len", self.seq_len)
        at_least_one("debug_n", self.debug_n)
        check_seed(self.seed)
        if not 0 < self.split < 1:
            raise ValueError(f"split must be between 0 and 1, got {self.split}")
        check_choice("schema", self.schema, ("auto", *SCHEMAS))
        check_choice("truncation_strategy", self.truncation_strategy, TRUNCATIONS)


def from_sft_strings(samples: Sequence[Any], tokenizer: Any, cfg: SFTDataConfig) -> Split:
    """Training and validation data from rows in memory.

    Args:
        samples: rows in any schema of `chat_dataset`.
        tokenizer: of transformers; None uses that of ``cfg``.
        cfg: the options.

    Returns:
        ``(train, validation)``, two datasets with ``input_ids``, ``labels`` and ``length``.

    Raises:
        TypeError, ValueError: as `chat_dataset`; also if there are fewer than two rows.
    """
    return _divide(samples, tokenizer, cfg)


def from_sft_json(path: str | os.PathLike[str], tokenizer: Any, cfg: SFTDataConfig) -> Split:
    """Training and validation data from a ``.json`` or ``.jsonl`` file; see `from_sft_strings`."""
    return _divide(os.fspath(path), tokenizer, cfg)


def from_sft_files(
    paths: Sequence[str | os.PathLike[str]], tokenizer: Any, cfg: SFTDataConfig
) -> Split:
    """Training and validation data from several files; see `from_sft_strings`."""
    return _divide(list(paths), tokenizer, cfg)


def from_sft_hf(
    dataset_name: str, tokenizer: Any, cfg: SFTDataConfig, split: str = "train"
) -> Split:
    """Training and validation data from one split of a dataset on the hub; see `from_sft_strings`.

    Args:
        dataset_name: its name.
        tokenizer, cfg: as for `from_sft_strings`.
        split: the split that is divided.
    """
    return _divide(dataset_name, tokenizer, cfg, split)


def _divide(source: Any, tokenizer: Any, cfg: SFTDataConfig, split: str = "train") -> Split:
    tokenizer = cfg.tokenizer if tokenizer is None else tokenizer
    set_template(tokenizer, cfg.template)
    options = ChatOptions(
        max_length=cfg.seq_len,
        truncation=cfg.truncation_strategy,
        schema=None if cfg.schema == "auto" else cfg.schema,
        generation_config=cfg.generation_config,
    )
    rows, json_column = open_source(source, split, streaming=False)
    if len(rows) < 2:
        raise ValueError(f"rows must be at least 2, to be divided, got {len(rows)}")
    # At least one row on each side, however few there are.
    held_out = min(max(round(len(rows) * (1 - cfg.split)), 1), len(rows) - 1)
    parts = rows.train_test_split(held_out, seed=cfg.seed)
    actions = read_actions("warn")
    train = encode_opened((parts["train"], json_column), tokenizer, options, actions)
    warned = [name for name, count in train.chat_report.problems.items() if count]
    actions |= dict.fromkeys(warned, "ignore")  # said once, not again for the other part
    validation = encode_opened((parts["test"], json_column), tokenizer, options, actions)
    if cfg.debug:
        shown = preview(train[: cfg.debug_n], tokenizer, n=cfg.debug_n)
        print(shown.render("color" if sys.stdout.isatty() else "marks"))
    return train, validation
