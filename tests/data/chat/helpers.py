"""A byte-level tokenizer trained on two lines, and the learned parts of samples."""

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tokenpack.data.chat.pipeline import ChatOptions, ChatPipeline
from tokenpack.data.chat.templates import set_template

LINES = ["Hello, the world of packing is a row of tokens.", "Two lines of English text, not more."]
SPECIAL = [
    *("[PAD]", "<s>", "</s>", "<|im_start|>", "<|im_end|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "[TOOL_CALLS]"),
    *("<｜User｜>", "<｜Assistant｜>"),
    *("<|start|>", "<|channel|>", "<|message|>", "<|call|>", "<|return|>", "<|end|>"),
]


@cache
def _backend(special, trim_offsets):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    if trim_offsets:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer.to_str()


def make_tokenizer(template=None, special=tuple(SPECIAL), trim_offsets=False):
    """A new tokenizer. With ``trim_offsets``, the space before a word is not in its offsets."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend(tuple(special), trim_offsets)),
        pad_token="[PAD]",
        bos_token="<s>",
        eos_token="</s>",
    )
    if template is not None:
        set_template(tokenizer, template)
    return tokenizer


def encode(tokenizer, *rows, **options):
    """The samples of rows."""
    return ChatPipeline(tokenizer, ChatOptions(**options)).encode(list(enumerate(rows)))


def targets(tokenizer, row, **options):
    """For each sample of a row, its learned runs of tokens, decoded."""
    return [runs(tokenizer, sample.encoded) for sample in encode(tokenizer, row, **options)]


def runs(tokenizer, encoded):
    """The decoded runs of learned tokens. Two spans that touch are one run."""
    found, current = [], []
    for label in [*encoded.labels.tolist(), -100]:
        if label != -100:
            current.append(label)
        elif current:
            found.append(tokenizer.decode(current, skip_special_tokens=False))
            current = []
    return found


def user(content, **more):
    return {"role": "user", "content": content, **more}


def assistant(content=None, **more):
    return {"role": "assistant", **({} if content is None else {"content": content}), **more}


def system(content):
    return {"role": "system", "content": content}
