"""What a token budget consists of: its fields, their defaults, and where they are checked.

The trainers take the fields as keywords, `TokenBudgetArguments` carries them for scripts and
`HfArgumentParser`. A keyword outweighs the field of the arguments.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Final, Literal

from transformers import Seq2SeqTrainingArguments, TrainingArguments

Overlong = Literal["error", "truncate", "drop"]


class _FromArgs:
    """Default of a keyword that is looked up in the arguments, then in `TokenBudget`."""

    def __repr__(self) -> str:
        return "FROM_ARGS"


FROM_ARGS: Final[Any] = _FromArgs()


@dataclass(frozen=True)
class TokenBudget:
    """How much is computed at once, and what happens to what does not fit.

    A token is a token of the encoder's or the decoder's input. Without packing (``pack=False``) a
    padded slot counts for one too.

    Attributes:
        max_tokens_per_batch: tokens of a batch, over all ranks together. An optimizer step takes
            ``gradient_accumulation_steps`` batches, so neither the number of ranks nor that of
            micro-batches changes what it learns from.
        max_tokens_per_microbatch: tokens of one forward and backward on one rank.
        max_eval_tokens_per_microbatch: the same in evaluation and prediction; a longer sequence is
            evaluated by itself.
        max_encoder_len: longest sequence on the encoder's side (or of a causal model), None for
            no limit.
        max_decoder_len: longest sequence on the decoder's side, None for no limit.
        overlong: what happens to a training example over a length limit or over
            ``max_tokens_per_microbatch``: an ``"error"`` before training, ``"truncate"`` or
            ``"drop"`` it, counted.
        length_column_name: column of the dataset that knows the lengths, if there is one; see
            `tokenpack.trainer.dataset_lengths`.
        use_cpu_microbatch: leave the batch in (pinned) host memory and copy one micro-batch ahead;
            else it goes to the device whole and is cut there.
        pack: patch the model, so that it computes real tokens alone.
        auto_find_microbatch: find the largest ``max_tokens_per_microbatch`` that fits, up to
            ``max_tokens_per_batch``, before the first step.
        log_longest_every: log the longest sequence every so many steps; 0 for never.
        debug: print the first planned batches.
        oom_max_retries: how often a step is done again with a smaller budget after it ran out of
            memory. With 0, DDP overlaps its communication with the last backward again.
        oom_skip_batch_on_fail: after that, or where a single sequence does not fit, leave it out
            and count it, instead of an error.
    """

    max_tokens_per_batch: int = 8192
    max_tokens_per_microbatch: int = 1024
    max_eval_tokens_per_microbatch: int = 512
    max_encoder_len: int | None = 512
    max_decoder_len: int | None = 256
    overlong: Overlong = "error"
    length_column_name: str = "input_length"
    use_cpu_microbatch: bool = True
    pack: bool = True
    auto_find_microbatch: bool = False
    log_longest_every: int = 100
    debug: bool = False
    oom_max_retries: int = 3
    oom_skip_batch_on_fail: bool = False

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            if value < least:
                raise ValueError(f"{name} must be {least} or more, got {value}")
            object.__setattr__(self, name, int(value))
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.overlong not in ("error", "truncate", "drop"):
            raise ValueError(
                f"overlong must be 'error', 'truncate' or 'drop', got {self.overlong!r}"
            )


_LEAST = {
    "max_tokens_per_batch": 1,
    "max_tokens_per_microbatch": 1,
    "max_eval_tokens_per_microbatch": 1,
    "max_encoder_len": 1,
    "max_decoder_len": 1,
    "log_longest_every": 0,
    "oom_max_retries": 0,
}
_SWITCHES = (
    "use_cpu_microbatch",
    "pack",
    "auto_find_microbatch",
    "debug",
    "oom_skip_batch_on_fail",
)
_OPTIONAL = ("max_encoder_len", "max_decoder_len")
# `TrainingArguments.debug` is something else.
_IN_ARGS = {"debug": "debug_batches"}


@dataclass
class TokenBudgetArguments(Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` with the fields of a `TokenBudget`.

    But ``debug`` is ``debug_batches`` here: transformers has a ``debug`` of its own.

    ``per_device_train_batch_size`` plays no part where batches are planned; it still counts for an
    `IterableDataset`, which cannot be planned.
    """

    max_tokens_per_batch: int = field(
        default=8192, metadata={"help": "Tokens of a batch, over all ranks together."}
    )
    max_tokens_per_microbatch: int = field(
        default=1024, metadata={"help": "Tokens of one forward and backward on one rank."}
    )
    max_eval_tokens_per_microbatch: int = field(
        default=512, metadata={"help": "The same in evaluation and prediction."}
    )
    max_encoder_len: int | None = field(
        default=512, metadata={"help": "Longest sequence on the encoder's side."}
    )
    max_decoder_len: int | None = field(
        default=256, metadata={"help": "Longest sequence on the decoder's side."}
    )
    overlong: str = field(
        default="error",
        metadata={
            "help": "What happens to an example over a limit.",
            "choices": ["error", "truncate", "drop"],
        },
    )
    length_column_name: str = field(
        default="input_length", metadata={"help": "Column of the dataset that knows the lengths."}
    )
    use_cpu_microbatch: bool = field(
        default=True, metadata={"help": "Leave the batch in host memory, copy one piece ahead."}
    )
    pack: bool = field(
        default=True, metadata={"help": "Patch the model to compute real tokens alone."}
    )
    auto_find_microbatch: bool = field(
        default=False, metadata={"help": "Find the largest micro-batch that fits first."}
    )
    log_longest_every: int = field(
        default=100, metadata={"help": "Steps between logs of the longest sequence; 0: never."}
    )
    debug_batches: bool = field(
        default=False, metadata={"help": "Print the first planned batches as a table."}
    )
    oom_max_retries: int = field(
        default=3, metadata={"help": "Times that a step which ran out of memory is done again."}
    )
    oom_skip_batch_on_fail: bool = field(
        default=False, metadata={"help": "Then leave out what does not fit, and count it."}
    )


def args_name(name: str) -> str:
    """What `TokenBudgetArguments` call a field of `TokenBudget`."""
    return _IN_ARGS.get(name, name)


def budget_of(
    args: TrainingArguments, given: dict[str, Any], defaults: dict[str, Any]
) -> TokenBudget:
    """The keywords that were given, then fields of ``args``, then ``defaults``, then the class's.

    Raises:
        TypeError, ValueError: if a number is none, or out of range.
    """
    values = {} if isinstance(args, TokenBudgetArguments) else dict(defaults)
    for each in dataclasses.fields(TokenBudget):
        if given[each.name] is not FROM_ARGS:
            values[each.name] = given[each.name]
        elif isinstance(args, TokenBudgetArguments):
            values[each.name] = getattr(args, args_name(each.name))
    return TokenBudget(**values)
