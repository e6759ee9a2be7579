"""Rows of a dataset to samples: read, render, tokenize, fit, check."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from ...checks import optional_at_least_one
from .checks import ChatReport, RowChecks, flag
from .encoding import Encoded, Encoder
from .fitting import KEEPS, TRUNCATIONS, Truncation
from .rendering import Renderer, Rendering
from .schemas import SCHEMAS, Conversation, read_conversation
from .writing import RenderError

# Rows that are tokenized together, without the interpreter's lock, while others are rendered. With
# three parts at a time, the tokenizer works while the threads of others wait for the lock. Fewer
# rows would make threads wait more often.
_PART = 250
_WAITING = 3
_FIRST = 32  # rows of the first part, so that the tokenizer begins soon


def check_choice(name: str, given: Any, known: Collection[Any]) -> None:
    """Raise a ValueError if an option has none of the known values."""
    if given not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {given!r}")


@dataclass(frozen=True)
class ChatOptions:
    """The options of `chat_dataset` that decide what a row becomes; see there."""

    loss_on: str | Collection[str] = "all"
    train_on_terminator: bool = True
    max_length: int | None = None
    truncation: str = "turn"
    keep: str = "first"
    schema: str | None = None
    loss_weights: bool = False
    template_kwargs: Mapping[str, Any] | None = None
    generation_config: Any = None

    def __post_init__(self) -> None:
        roles = not isinstance(self.loss_on, str) and [*self.loss_on]
        if self.loss_on not in ("all", "last") and not (
            roles and all(isinstance(role, str) for role in roles)
        ):
            raise ValueError(
                f'loss_on must be "all", "last" or a list of roles, got {self.loss_on!r}'
            )
        optional_at_least_one("max_length", self.max_length)
        check_choice("truncation", self.truncation, TRUNCATIONS)
        check_choice("keep", self.keep, KEEPS)
        check_choice("schema", self.schema, (None, *SCHEMAS))

    def stop_ids(self, tokenizer: Any) -> list[int] | None:
        """The tokens that generation stops at, by default the EOS; None if there are none."""
        source = tokenizer if self.generation_config is None else self.generation_config
        given = getattr(source, "eos_token_id", source)
        if given is None:
            return None
        return [given] if isinstance(given, int) else list(given)


class Sample(NamedTuple):
    """A text that a row became.

    Attributes:
        row: the number of the row.
        encoded: its tokens. They are empty if the conversation is too long and was dropped.
        kept: whether it belongs to the dataset.
        flags: the problems that the checks found; see `checks.names_of`.
        cut_messages: messages that truncation left out.
        cut_tokens: tokens that truncation cut off.
    """

    row: int
    encoded: Encoded
    kept: bool
    flags: int
    cut_messages: int = 0
    cut_tokens: int = 0


class ChatPipeline:
    """Makes samples of rows.

    Args:
        tokenizer: with a chat template.
        options: see `ChatOptions`.

    Attributes:
        identity: equal for tokenizers that give the same samples.
    """

    def __init__(self, tokenizer: Any, options: ChatOptions) -> None:
        self._options = options
        self._encoder = Encoder(tokenizer)
        # All of the tokenizer that counts. The state that a call leaves in it does not.
        self.identity = repr(
            (self._encoder.identity, tokenizer.chat_template, tokenizer.special_tokens_map)
        )
        stop_ids = options.stop_ids(tokenizer)
        stops = tokenizer.convert_ids_to_tokens(stop_ids or [])
        self._renderer = Renderer(
            tokenizer,
            options.loss_on,
            options.train_on_terminator,
            [stop for stop in stops if stop in tokenizer.get_added_vocab()],
            dict(options.template_kwargs or {}),
        )
        self._truncation = Truncation(
            self._renderer, self._encoder, options.max_length, options.truncation, options.keep
        )
        self._checks = RowChecks(
            tokenizer.bos_token_id,
            stop_ids,
            options.train_on_terminator,
            tokenizer.convert_tokens_to_ids,
        )

    def encode(self, rows: Iterable[tuple[int, Any]], *, sparse: bool = False) -> list[Sample]:
        """The samples of rows, in order.

        Args:
            rows: pairs of a row's number and the row.
            sparse: see `read_conversation`.

        Raises:
            ValueError, TypeError: naming the row: if it has no known schema, if the template cannot
                write it, or if it is too long and that is an error.
        """
        return [sample for part in self.encode_parts(rows, sparse=sparse) for sample in part]

    def encode_parts(
        self, rows: Iterable[tuple[int, Any]], *, sparse: bool = False
    ) -> Iterator[list[Sample]]:
        """The samples of `encode`, a part at a time. A part that was used needs no memory."""
        waiting: deque[tuple[list[int], Future[list[Encoded]]]] = deque()
        iterator = iter(rows)
        wrong: Exception | None = None
        count = min(_FIRST, _PART)
        with ThreadPoolExecutor(_WAITING) as threads:
            while wrong is None:
                part, unread = _take(iterator, count)
                count = min(count * 2, _PART)
                if not part and unread is None:
                    break
                rendered, unwritten = self._render(part, sparse)
                wrong = unwritten or unread
                self._encoder.expect(len(rendered))
                encoding = threads.submit(self._encoder.encode, [each for _, each in rendered])
                waiting.append(([number for number, _ in rendered], encoding))
                if len(waiting) > _WAITING:
                    yield self._fit_all(*waiting.popleft())
            while waiting:
                yield self._fit_all(*waiting.popleft())
        if wrong is not None:  # an error of an earlier row came first
            raise wrong

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """The first and the last character (exclusive) of each token of a text."""
        return self._encoder.offsets(text)

    def _render(
        self, rows: list[tuple[int, Any]], sparse: bool
    ) -> tuple[list[tuple[int, Rendering]], Exception | None]:
        """The texts of rows up to the first that is wrong, and its error."""
        found: list[tuple[int, Rendering]] = []
        conversations: list[Conversation] = []
        wrong: Exception | None = None
        for number, row in rows:
            try:
                conversations.append(self._read(row, f"row {number}", sparse))
            except (TypeError, ValueError) as error:
                wrong = error
                break
        written = self._renderer.write_all(conversations)
        for (number, _), conversation, text in zip(rows, conversations, written):
            try:
                rendered = self._renderer.render(conversation, written=text)
                _require_unicode(rendered)
            except RenderError as error:
                return found, ValueError(f"row {number}: {error}")
            found += [(number, each) for each in rendered]
        return found, wrong

    def _read(self, row: Any, where: str, sparse: bool) -> Conversation:
        conversation = read_conversation(row, where, self._options.schema, sparse=sparse)
        self._require_weights(conversation, where)
        return conversation

    def _fit_all(self, numbers: list[int], encoding: Future[list[Encoded]]) -> list[Sample]:
        return [sample for each in zip(numbers, encoding.result()) for sample in self._fit(*each)]

    def _fit(self, row: int, encoded: Encoded) -> list[Sample]:
        if not len(encoded.spans):
            return [Sample(row, encoded, False, flag("no_target"))]
        try:
            fitted = self._truncation.fit(encoded, f"row {row}")
        except RenderError as error:
            raise ValueError(f"row {row}, shortened: {error}") from None
        if not fitted:
            flags = 0 if self._options.truncation == "drop" else flag("lost_target")
            return [Sample(row, encoded.cut(slice(0)), False, flags)]
        samples = []
        for each in fitted:
            kept = each.encoded.targets > 0
            flags = self._checks.find(each) if kept else flag("lost_target")
            samples.append(
                Sample(row, each.encoded, kept, flags, each.cut_messages, each.cut_tokens)
            )
        return samples

    def _require_weights(self, conversation: Conversation, where: str) -> None:
        for weight in conversation.weights:
            if weight not in (None, 0.0, 1.0) and not self._options.loss_weights:
                raise ValueError(
                    f"{where}: weight must be 0 or 1, got {weight}; with loss_weights=True the "
                    "dataset has a column loss_weights, which your loss must apply"
                )


def _require_unicode(rendered: list[Rendering]) -> None:
    """Raise an error for half of a surrogate pair, which JSON may have but no tokenizer takes."""
    for each in rendered:
        try:
            if not each.text.isascii():
                each.text.encode()
        except UnicodeEncodeError as error:
            raise RenderError(f"text must be valid Unicode: {error}") from None


def _take(
    rows: Iterator[tuple[int, Any]], count: int
) -> tuple[list[tuple[int, Any]], Exception | None]:
    """The next rows, up to the first that cannot be read, and its error."""
    part: list[tuple[int, Any]] = []
    try:
        for each in islice(rows, count):
            part.append(each)
    except (TypeError, ValueError) as error:
        return part, error
    return part, None


def count_samples(samples: Iterable[Sample], report: ChatReport) -> None:
    """Add samples to a report, but not the number of rows that they come from."""
    for sample in samples:
        report.add_flags(sample.flags, sample.row)
        report.cut_messages += sample.cut_messages
        report.cut_tokens += sample.cut_tokens
        report.dropped += not sample.kept
        if sample.kept:
            report.samples += 1
            report.tokens += len(sample.encoded.ids)
            report.targets += sample.encoded.targets
