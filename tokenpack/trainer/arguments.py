"""The options of a token budget: their defaults, help and checks.

`TokenBudget` declares each option once. `TokenBudgetArguments` copies the defaults and the help for
scripts and `HfArgumentParser`. The trainers take the options as keywords, which take precedence
over the fields of the arguments.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Final, Literal

from transformers import Seq2SeqTrainingArguments, TrainingArguments

Overlong = Literal["error", "truncate", "drop"]


class _FromArgs:
    """Default of a trainer's keyword: take the value from the arguments, then `TokenBudget`."""

    def __repr__(self) -> str:
        return "FROM_ARGS"


FROM_ARGS: Final[Any] = _FromArgs()


def _option(default: Any, help: str, **metadata: Any) -> Any:
    """Declare an option of `TokenBudget`.

    Args:
        default: the default value. If it is True or False, the option accepts only these two.
        help: the help text of the command-line flag.
        metadata: ``minimum``, the smallest accepted integer; ``optional``, True if None is accepted
            too; ``choices``, the accepted values; ``args_name``, the name in
            `TokenBudgetArguments`, if it differs.
    """
    return field(default=default, metadata={"help": help, **metadata})


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

    max_tokens_per_batch: int = _option(
        8192, "Tokens of a batch, over all ranks together.", minimum=1
    )
    max_tokens_per_microbatch: int = _option(
        1024, "Tokens of one forward and backward on one rank.", minimum=1
    )
    max_eval_tokens_per_microbatch: int = _option(
        512, "The same in evaluation and prediction.", minimum=1
    )
    max_encoder_len: int | None = _option(
        512, "Longest sequence on the encoder's side.", minimum=1, optional=True
    )
    max_decoder_len: int | None = _option(
        256, "Longest sequence on the decoder's side.", minimum=1, optional=True
    )
    overlong: Overlong = _option(
        "error",
        "What happens to an example over a limit.",
        choices=["error", "truncate", "drop"],
    )
    length_column_name: str = _option(
        "input_length", "Column of the dataset that knows the lengths."
    )
    use_cpu_microbatch: bool = _option(
        True, "Leave the batch in host memory, copy one piece ahead."
    )
    pack: bool = _option(True, "Patch the model to compute real tokens alone.")
    auto_find_microbatch: bool = _option(False, "Find the largest micro-batch that fits first.")
    log_longest_every: int = _option(
        100, "Steps between logs of the longest sequence; 0: never.", minimum=0
    )
    debug: bool = _option(
        False, "Print the first planned batches as a table.", args_name="debug_batches"
    )
    oom_max_retries: int = _option(
        3, "Times that a step which ran out of memory is done again.", minimum=0
    )
    oom_skip_batch_on_fail: bool = _option(False, "Then leave out what does not fit, and count it.")

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            object.__setattr__(self, each.name, _checked(each, getattr(self, each.name)))


def _checked(option: dataclasses.Field[Any], value: Any) -> Any:
    """Return ``value``, as an int if the option has a minimum.

    Raises:
        TypeError: if ``value`` has the wrong type.
        ValueError: if ``value`` is out of range or not among the choices.
    """
    name, checks = option.name, option.metadata
    if isinstance(option.default, bool) and not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    if "choices" in checks and value not in checks["choices"]:
        *others, last = map(repr, checks["choices"])
        raise ValueError(f"{name} must be {', '.join(others)} or {last}, got {value!r}")
    if "minimum" not in checks or (value is None and checks.get("optional")):
        return value
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < checks["minimum"]:
        raise ValueError(f"{name} must be {checks['minimum']} or more, got {value}")
    return int(value)


def _copied(name: str) -> Any:
    """A field with the default of an option, and the metadata that `HfArgumentParser` accepts."""
    option = TokenBudget.__dataclass_fields__[name]
    metadata = {key: option.metadata[key] for key in ("help", "choices") if key in option.metadata}
    return field(default=option.default, metadata=metadata)


@dataclass
class TokenBudgetArguments(Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` with the fields of a `TokenBudget`.

    But ``debug`` is ``debug_batches`` here: transformers has a ``debug`` of its own.

    ``per_device_train_batch_size`` plays no part where batches are planned; it still counts for an
    `IterableDataset`, which cannot be planned.
    """

    max_tokens_per_batch: int = _copied("max_tokens_per_batch")
    max_tokens_per_microbatch: int = _copied("max_tokens_per_microbatch")
    max_eval_tokens_per_microbatch: int = _copied("max_eval_tokens_per_microbatch")
    max_encoder_len: int | None = _copied("max_encoder_len")
    max_decoder_len: int | None = _copied("max_decoder_len")
    overlong: str = _copied("overlong")
    length_column_name: str = _copied("length_column_name")
    use_cpu_microbatch: bool = _copied("use_cpu_microbatch")
    pack: bool = _copied("pack")
    auto_find_microbatch: bool = _copied("auto_find_microbatch")
    log_longest_every: int = _copied("log_longest_every")
    debug_batches: bool = _copied("debug")
    oom_max_retries: int = _copied("oom_max_retries")
    oom_skip_batch_on_fail: bool = _copied("oom_skip_batch_on_fail")


def args_name(option: str) -> str:
    """The name of an option of `TokenBudget` in `TokenBudgetArguments`."""
    return TokenBudget.__dataclass_fields__[option].metadata.get("args_name", option)


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
