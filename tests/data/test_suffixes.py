"""Truncation keeps what each family's tokenizer puts before and after a text."""

import numpy as np
import pytest
import torch
import transformers as hf
from transformers.trainer_pt_utils import LabelSmoother

from tokenpack.data import CappedSeq2SeqCollator, T5SpanCorruptionCollatorFast

WORDS = [f"w{i}" for i in range(1, 9)]


def unigram(*special):
    pieces = [("▁" + word, -1.0) for word in WORDS] + [("▁", -5.0)]
    return [(name, 0.0) for name in special] + pieces + [(each, -9.0) for each in "w12345678"]


def byte_level(*special):
    return {name: at for at, name in enumerate([*special, *"w12345678", "Ġ"])}


NLLB = {"vocab": byte_level("<s>", "<pad>", "</s>", "<unk>"), "merges": []}
PAIR = {"src_lang": "eng_Latn", "tgt_lang": "fra_Latn"}
MBART = {
    "vocab": unigram("<s>", "<pad>", "</s>", "<unk>"),
    "src_lang": "en_XX",
    "tgt_lang": "ro_RO",
}
TOKENIZERS = {
    "T5": lambda: hf.T5Tokenizer(vocab=unigram("<pad>", "</s>", "<unk>")),
    "ByT5": hf.ByT5Tokenizer,
    "NLLB": lambda: hf.NllbTokenizer(**NLLB, **PAIR),
    "NLLB, legacy": lambda: hf.NllbTokenizer(**NLLB, **PAIR, legacy_behaviour=True),
    "mBART": lambda: hf.MBartTokenizer(**MBART),
    "mBART-50": lambda: hf.MBart50Tokenizer(**MBART),
    "Pegasus": lambda: hf.PegasusTokenizer(
        vocab=unigram("<pad>", "</s>", "<mask_1>", "<mask_2>", "<unk>")
    ),
    "BART": lambda: hf.BartTokenizer(vocab=byte_level("<s>", "<pad>", "</s>", "<unk>"), merges=[]),
}


class Parts:
    """M2M100 and Marian, whose tokenizers need SentencePiece files: only their special tokens."""

    pad_token_id, eos_token_id, padding_side = 1, 2, "right"
    all_special_ids = (0, 1, 2, 3, 90, 91)

    def __init__(self, before):
        self.before = before

    def __call__(self, text=None, *, text_target=None, **options):
        count = len((text or text_target).split())
        return {"input_ids": [*self.before, *range(10, 10 + count), 2]}


TOKENIZERS["M2M100"] = lambda: Parts([90])
TOKENIZERS["Marian"] = lambda: Parts([])


@pytest.mark.parametrize("limit", [4, 5, 6])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_special_tokens_survive_at_both_ends(name, limit):
    tokenizer = TOKENIZERS[name]()
    text = " ".join(WORDS)
    sample = {
        "input_ids": tokenizer(text)["input_ids"],
        "labels": tokenizer(text_target=text)["input_ids"],
    }
    short = {key: _cut(tokenizer, key, text, limit) for key in sample}
    batch = CappedSeq2SeqCollator(tokenizer, limit, limit, None)([sample])
    assert batch["input_ids"][0].tolist() == short["input_ids"]
    assert batch["labels"][0].tolist() == short["labels"]


def _cut(tokenizer, key, text, limit):
    """The tokenizer's own truncation."""
    argument = {"text": text} if key == "input_ids" else {"text_target": text}
    if isinstance(tokenizer, Parts):
        return [*tokenizer(**argument)["input_ids"][: limit - 1], 2]
    return tokenizer(**argument, truncation=True, max_length=limit)["input_ids"]


def test_labels_of_several_languages():
    """The language of a target is not the one that the tokenizer is set to."""
    tokenizer = TOKENIZERS["mBART"]()
    romanian = tokenizer(text_target=" ".join(WORDS))["input_ids"]
    tokenizer.tgt_lang = "de_DE"
    german = tokenizer(text_target=" ".join(WORDS))["input_ids"]
    samples = [{"input_ids": [4, 2], "labels": each} for each in (romanian, german)]
    labels = CappedSeq2SeqCollator(tokenizer, 9, 5, None)(samples)["labels"]
    assert labels[:, -2].tolist() == [2, 2]
    assert labels[:, -1].tolist() == [romanian[-1], german[-1]]
    assert romanian[-1] != german[-1]


def test_sentinels_are_text():
    """T5's sentinels are special tokens, but they belong to the text."""
    tokenizer = TOKENIZERS["T5"]()
    sentinel = tokenizer.convert_tokens_to_ids("<extra_id_0>")
    batch = CappedSeq2SeqCollator(tokenizer, 3, 3, None)(
        [{"input_ids": [3, 4, 5, sentinel, 1], "labels": [sentinel, 4, 5, 6, sentinel]}]
    )
    assert batch["input_ids"].tolist() == [[3, 4, 1]]
    assert batch["labels"].tolist() == [[sentinel, 4, 5]]


def test_byt5_has_the_sentinels_of_its_pretraining():
    tokenizer = hf.ByT5Tokenizer()
    batch = T5SpanCorruptionCollatorFast(tokenizer)([tokenizer("hello world, how are you?")])
    sentinels = [258, 257, 256]
    assert batch["labels"][0, 0] == sentinels[0]
    assert set(np.intersect1d(batch["input_ids"], batch["labels"])) >= {sentinels[0]}


def test_decoder_inputs_for_label_smoothing():
    """`Trainer` takes the labels away from the model when it smooths them."""
    config = hf.T5Config(
        vocab_size=50, d_model=16, num_layers=1, num_heads=2, d_kv=8, decoder_start_token_id=0
    )
    model = hf.T5ForConditionalGeneration(config).eval()
    collator = CappedSeq2SeqCollator(Parts([]), length_column_name=None, model=model)
    batch = collator([{"input_ids": [5, 6, 2], "labels": [7, 2]}])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    whole = model(**inputs).logits
    labels = batch.pop("labels")
    outputs = model(**batch)
    torch.testing.assert_close(outputs.logits, whole)
    assert LabelSmoother(0.1)(outputs, labels).isfinite()
    with pytest.raises(TypeError, match="prepare_decoder_input_ids_from_labels"):
        CappedSeq2SeqCollator(Parts([]), model=torch.nn.Linear(2, 2))
