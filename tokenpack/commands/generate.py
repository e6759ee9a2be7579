"""``tokenpack generate``: text of a causal language model, shown word by word as it is generated.

Without --chat, the model continues a prompt. With --chat, it answers messages in the form of the
tokenizer's chat template, which renders the whole conversation for each answer.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, TextStreamer
from transformers.utils import logging

from ..data.chat.pipeline import ChatOptions, ChatPipeline
from ..data.chat.templates import set_template
from ..models import decoder  # noqa: F401  registers it with the Auto classes
from .arguments import template_of
from .interrupts import Interrupted
from .tokenizer import load_pretrained

Message = dict[str, str]


def run(arguments: argparse.Namespace) -> int:
    """Generate. Returns 0; bad input raises."""
    _check(arguments)
    sampling(arguments)  # what is wrong with it is wrong before a model is loaded
    tokenizer = _load_tokenizer(arguments)
    model = _load(arguments.model, arguments.dtype)
    writer = Writer(model, tokenizer, arguments)
    if arguments.seed is not None:
        torch.manual_seed(arguments.seed)
    if arguments.chat:
        set_template(tokenizer, template_of(arguments.template))
        _chat(writer, arguments)
    else:
        writer.write(_ids_of(tokenizer, arguments.prompt))
    return 0


def _check(arguments: argparse.Namespace) -> None:
    if arguments.prompt is None and not arguments.chat:
        raise ValueError("--prompt must be given without --chat, got none")
    for name in ("system", "template"):
        value = getattr(arguments, name)
        if value is not None and not arguments.chat:
            raise ValueError(f"--{name} must be given with --chat, got {value!r} without it")


def _load_tokenizer(arguments: argparse.Namespace) -> Any:
    if arguments.tokenizer is not None:
        return load_pretrained(arguments.tokenizer)
    try:
        return load_pretrained(arguments.model)
    except ValueError as error:
        raise ValueError(
            f"--model must have a tokenizer, or --tokenizer must be given: {error}"
        ) from None


def _load(name_or_path: str, dtype: str | None) -> PreTrainedModel:
    shows_progress = logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype or "auto")
    except (OSError, ValueError) as error:
        raise ValueError(
            "--model must be a folder or a name on the hub, of a causal language model with "
            f"weights, got {name_or_path}: {error}"
        ) from None
    finally:
        if shows_progress:
            logging.enable_progress_bar()
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of ``generate`` that choose tokens. Empty: as the model's generation config."""
    names = ("temperature", "top_k", "top_p")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if arguments.temperature != 0:
        return {**given, "do_sample": True} if given else {}
    if len(given) > 1:
        raise ValueError("--temperature must be above 0 with --top-k or --top-p, got 0")
    return {"do_sample": False, **dict.fromkeys(names)}


class Writer:
    """Generates, and prints the text as soon as words are complete.

    Attributes:
        stops: the ids at which generation stops.
        room: the largest number of tokens of a prompt, or None.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, arguments: argparse.Namespace
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        ends = model.generation_config.eos_token_id
        ends = tokenizer.eos_token_id if ends is None else ends
        self.stops: list[int] = [] if ends is None else [*ends] if type(ends) is list else [ends]
        self._options = {
            **sampling(arguments),
            "max_new_tokens": arguments.max_new_tokens,
            "num_beams": 1,  # streams need it
        }
        context = arguments.context
        if context is None:
            context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.room: int | None = None if context is None else context - arguments.max_new_tokens
        if self.room is not None and self.room < 1:
            raise ValueError(
                f"--max-new-tokens must be below the context of the model, {context} tokens, got "
                f"{arguments.max_new_tokens}: --context sets another one"
            )

    def write(self, ids: list[int], *, answers: bool = False) -> str:
        """Continue ``ids``, and print the text.

        Args:
            ids: the prompt. Of one that is too long, the last tokens are used.
            answers: print only what is new. Ctrl-C ends the answer, not the program.

        Returns:
            What was generated, without special tokens.
        """
        if self.room is not None and len(ids) > self.room:
            note = f"the prompt has {len(ids):,} tokens, of which the last {self.room:,} are used"
            print(f"tokenpack: {note}", file=sys.stderr)
            ids = ids[-self.room :]
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        if max(ids) >= vocabulary:
            raise ValueError(
                f"--tokenizer must have ids below {vocabulary}, the vocabulary of the model, got "
                f"{max(ids)}"
            )
        pad = self.tokenizer.pad_token_id
        prompt = torch.tensor([ids], device=self.model.device)
        stream = _Stream(self.tokenizer, skip_prompt=answers, skip_special_tokens=True)
        try:
            self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                streamer=stream,
                eos_token_id=self.stops or None,
                pad_token_id=pad if pad is not None else (self.stops or [0])[0],
                **self._options,
            )
        except Interrupted as interrupt:
            stream.end()
            if not answers or interrupt.number != signal.SIGINT:
                raise
        return self.tokenizer.decode(stream.ids[len(ids) :], skip_special_tokens=True)


class _Stream(TextStreamer):
    """Keeps the ids too, so that an answer that is cut by Ctrl-C is not lost."""

    def __init__(self, tokenizer: Any, skip_prompt: bool, **options: Any) -> None:
        super().__init__(tokenizer, skip_prompt, **options)
        self.ids: list[int] = []

    def put(self, value: Tensor) -> None:
        self.ids += value.flatten().tolist()
        super().put(value)


def _ids_of(tokenizer: Any, prompt: str) -> list[int]:
    ids = tokenizer(prompt)["input_ids"]
    if not ids:  # begin a text
        begins = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        ids = [token for token in begins if token is not None][:1]
    if not ids:
        raise ValueError("--prompt must have tokens if the tokenizer has no BOS, got none")
    return ids


# -------------------------------------------------------------------------------------------- chat


def _chat(writer: Writer, arguments: argparse.Namespace) -> None:
    """Answer --prompt, or each line of the standard input until its end or Ctrl-C."""
    stop = _end_of_turn(writer.tokenizer)
    if stop is not None and stop not in writer.stops:
        writer.stops.append(stop)
    messages: list[Message] = []
    if arguments.system is not None:
        messages.append({"role": "system", "content": arguments.system})
    for line in _lines() if arguments.prompt is None else [arguments.prompt]:
        messages.append({"role": "user", "content": line})
        answer = writer.write(_rendered(writer, messages), answers=True)
        messages.append({"role": "assistant", "content": answer})


def _end_of_turn(tokenizer: Any) -> int | None:
    """The token that ends an answer, as the template writes it. Generation must stop there."""
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (sample,) = ChatPipeline(tokenizer, ChatOptions()).encode([(0, row)])
    terminator = sample.encoded.rendering.spans[-1].terminator
    return None if terminator is None else tokenizer.convert_tokens_to_ids(terminator)


def _rendered(writer: Writer, messages: list[Message]) -> list[int]:
    """The ids of a conversation. If they are too many, the oldest messages are removed."""
    first = int(messages[0]["role"] == "system")
    removed = 0
    while True:
        ids = writer.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        if writer.room is None or len(ids) <= writer.room:
            break
        if len(messages) == first + 1:
            raise ValueError(
                f"a message must have at most {writer.room} tokens with its template, got "
                f"{len(ids)}: --max-new-tokens and --context leave no more"
            )
        del messages[first : first + 2]  # a question and its answer
        removed += 2
    if removed:
        note = f"the context is full: the oldest {removed} messages are forgotten"
        print(f"tokenpack: {note}", file=sys.stderr)
    return ids


def _lines() -> Iterator[str]:
    """The lines of the standard input that are not empty."""
    asked = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(asked).strip()
        except EOFError:
            return
        except Interrupted as interrupt:
            if interrupt.number != signal.SIGINT:
                raise
            print()
            return
        if line:
            yield line
