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
    """How many tokens are computed at once, and how the trainers handle what does not fit.

    Tokens are input tokens of the encoder and the decoder. Without packing (``pack=False``), padded
    slots count as tokens too.

    Attributes:
        max_tokens_per_batch: maximum number of tokens of a batch, over all ranks. An optimizer step
            takes ``gradient_accumulation_steps`` batches. The result of training therefore does not
            depend on the number of ranks or micro-batches.
        max_tokens_per_microbatch: maximum number of tokens of one forward and backward on one rank.
        max_eval_tokens_per_microbatch: maximum number of slots (rows x columns) of a batch in
            evaluation and prediction, on one rank. A longer sequence gets a batch of its own.
        max_encoder_len: maximum length of an encoder sequence, or of a sequence of a causal model.
            None means no limit.
        max_decoder_len: maximum length of a decoder sequence. None means no limit.
        overlong: how to handle a training example that exceeds a length limit or
            ``max_tokens_per_microbatch``: ``"error"`` raises an error before training,
            ``"truncate"`` shortens the example, ``"drop"`` removes it. The trainer counts truncated
            and dropped examples.
        length_column_name: dataset column that contains the lengths, if there is one. See
            `tokenpack.trainer.dataset_lengths`.
        use_cpu_microbatch: keep the batch in (pinned) host memory, and copy the next micro-batch to
            the device during the current one. If False, copy the whole batch to the device and
            split it there.
        pack: patch the model so that it computes real tokens only.
        auto_find_microbatch: before the first step, search for the largest
            ``max_tokens_per_microbatch`` that fits in memory, up to ``max_tokens_per_batch``.
        log_longest_every: log the longest sequence every this many steps. 0 means never.
        debug: print the first planned batches.
        oom_max_retries: how often a step that ran out of memory is repeated, each time with smaller
            micro-batches. With 0, steps are not repeated, and DDP overlaps its communication with
            the last backward.
        oom_skip_batch_on_fail: if a step or a single sequence still does not fit, skip it and count
            it, instead of raising an error.
        pad_to_total: fill the tokens of each side of a micro-batch up to a multiple of this number,
            for constant shapes; see `tokenpack.patch_model`. Requires ``pack``.
    """

    max_tokens_per_batch: int = _option(
        8192, "Maximum number of tokens of a batch, over all ranks.", minimum=1
    )
    max_tokens_per_microbatch: int = _option(
        1024, "Maximum number of tokens of a forward and backward on a rank.", minimum=1
    )
    max_eval_tokens_per_microbatch: int = _option(
        512, "Maximum number of slots of an evaluation batch on a rank.", minimum=1
    )
    max_encoder_len: int | None = _option(
        512, "Maximum length of an encoder sequence.", minimum=1, optional=True
    )
    max_decoder_len: int | None = _option(
        256, "Maximum length of a decoder sequence.", minimum=1, optional=True
    )
    overlong: Literal["error", "truncate", "drop"] = _option(
        "error",
        "How to handle a training example that exceeds a limit.",
        choices=["error", "truncate", "drop"],
    )
    length_column_name: str = _option("input_length", "Dataset column that contains the lengths.")
    use_cpu_microbatch: bool = _option(
        True, "Keep the batch in host memory, and prefetch micro-batches."
    )
    pack: bool = _option(True, "Patch the model so that it computes real tokens only.")
    auto_find_microbatch: bool = _option(False, "Search for the largest micro-batch that fits.")
    log_longest_every: int = _option(
        100, "Steps between logs of the longest sequence. 0 means never.", minimum=0
    )
    debug: bool = _option(
        False, "Print the first planned batches as a table.", args_name="debug_batches"
    )
    oom_max_retries: int = _option(
        3, "How often to repeat a step that ran out of memory.", minimum=0
    )
    oom_skip_batch_on_fail: bool = _option(
        False, "Skip what still does not fit, instead of raising an error."
    )
    pad_to_total: int | None = _option(
        None, "Fill the tokens of a micro-batch up to a multiple of this.", minimum=1, optional=True
    )

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            object.__setattr__(self, each.name, _checked(each, getattr(self, each.name)))
        if self.pad_to_total is not None and not self.pack:
            raise ValueError(
                f"pad_to_total must be None with pack=False, got {self.pad_to_total}: a padded "
                "batch has no stream of tokens to fill"
            )


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
    """`Seq2SeqTrainingArguments` with the fields of a `TokenBudget`, and ``decay``.

    The field ``debug`` is called ``debug_batches`` here, because transformers has a ``debug`` of
    its own.

    ``per_device_train_batch_size`` has no effect on planned batches. It sets the number of rows in
    the batches of an `IterableDataset`, which cannot be planned.
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
    pad_to_total: int | None = _copied("pad_to_total")
    decay: str = field(
        default="transformers",
        metadata={
            "help": "Weight decay on all but norms and biases, by name, or on matrices alone.",
            "choices": ["transformers", "matrices"],
        },
    )


def args_name(option: str) -> str:
    """The name of an option of `TokenBudget` in `TokenBudgetArguments`."""
    return TokenBudget.__dataclass_fields__[option].metadata.get("args_name", option)


def budget_of(
    args: TrainingArguments, given: dict[str, Any], defaults: dict[str, Any]
) -> TokenBudget:
    """Build the budget of a trainer.

    The value of each option is the keyword of the trainer if it was passed, else the field of
    ``args`` if these are `TokenBudgetArguments`, else the default of the trainer's class, else the
    default of `TokenBudget`.

    Args:
        args: the trainer's arguments.
        given: the trainer's keyword for each option, or ``FROM_ARGS``.
        defaults: defaults of the trainer's class.

    Raises:
        TypeError, ValueError: if an option has the wrong type or is out of range.
    """
    values = {} if isinstance(args, TokenBudgetArguments) else dict(defaults)
    for each in dataclasses.fields(TokenBudget):
        if given[each.name] is not FROM_ARGS:
            values[each.name] = given[each.name]
        elif isinstance(args, TokenBudgetArguments):
            values[each.name] = getattr(args, args_name(each.name))
    return TokenBudget(**values)
