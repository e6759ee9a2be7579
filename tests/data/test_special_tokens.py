"""Truncation keeps what each family's tokenizer puts around a text: its own cut is the standard.

The tokenizers are transformers' classes on small vocabularies.
"""

import io
import json

import numpy as np
import pytest
import torch
import transformers as hf
from transformers import PreTrainedTokenizerFast
from transformers.models.mbart.modeling_mbart import shift_tokens_right

from tokenpack.data import CappedSeq2SeqCollator, T5SpanCorruptionCollatorFast
from tokenpack.data.collators.special_tokens import EndOfSequence
from tokenpack.data.tokens import flatten_tokens
from tokenpack.metrics.datasets import _may_be_equal
from tokenpack.trainer.loading import Caps, PlannedDataset

from .test_seq2seq import make_tokenizer

TEXT = "the cat sat on the mat and the dog ran far away"
WORDS = [(f"▁{word}", -2.0) for word in dict.fromkeys(TEXT.split())]
LETTERS = ["▁", "Ġ", *sorted(set(TEXT) - {" "})]


def unigram(*specials):
    return [*((name, 0.0) for name in specials), *WORDS, ("▁", -5.0)]


def letters(*specials):
    return {name: at for at, name in enumerate((*specials, *LETTERS))}


def t5():
    return hf.T5Tokenizer(vocab=unigram("<pad>", "</s>", "<unk>"), extra_ids=10)


def umt5():  # AutoTokenizer gives the generic class
    given = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=t5().backend_tokenizer, **given)


def nllb(**options):
    vocab = letters("<s>", "<pad>", "</s>", "<unk>")
    return hf.NllbTokenizer(vocab=vocab, merges=[], **LANGUAGES["nllb"], **options)


def mbart(kind):
    vocab = unigram("<s>", "<pad>", "</s>", "<unk>")
    return kind(vocab=vocab, src_lang="en_XX", tgt_lang="ro_RO")


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    """A folder with a SentencePiece model and its vocabulary."""
    spm = pytest.importorskip("sentencepiece", reason="M2M100 and Marian need sentencepiece")
    folder, model = tmp_path_factory.mktemp("spm"), io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 20), model_writer=model, vocab_size=25,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (folder / "m.model").write_bytes(model.getvalue())
    processor = spm.SentencePieceProcessor(model_file=str(folder / "m.model"))
    pieces = [processor.id_to_piece(at) for at in range(processor.get_piece_size())]
    names = dict.fromkeys(["<s>", "<pad>", "</s>", "<unk>", *pieces])
    (folder / "vocab.json").write_text(json.dumps({name: at for at, name in enumerate(names)}))
    return folder


def m2m100(folder):
    files = str(folder / "vocab.json"), str(folder / "m.model")
    return hf.M2M100Tokenizer(*files, src_lang="en", tgt_lang="ro")


def marian(folder):
    model = str(folder / "m.model")
    return hf.MarianTokenizer(model, model, str(folder / "vocab.json"), target_lang="ro")


LANGUAGES = {"nllb": {"src_lang": "eng_Latn", "tgt_lang": "deu_Latn"}}
TOKENIZERS = {
    "T5": t5,
    "mT5": t5,  # the class of mT5 in AutoTokenizer
    "UMT5": umt5,
    "ByT5": hf.ByT5Tokenizer,
    "NLLB": nllb,
    "NLLB, legacy": lambda: nllb(legacy_behaviour=True),
    "mBART": lambda: mbart(hf.MBartTokenizer),
    "mBART50": lambda: mbart(hf.MBart50Tokenizer),
    "Pegasus": lambda: hf.PegasusTokenizer(vocab=unigram("<pad>", "</s>", "<unk>"), offset=10),
    "BART": lambda: hf.BartTokenizer(
        vocab=letters("<s>", "<pad>", "</s>", "<unk>", "<mask>"), merges=[]
    ),
    "M2M100": m2m100,
    "Marian": marian,
}


def tokenizer_of(family, request):
    make = TOKENIZERS[family]
    needs_files = family in ("M2M100", "Marian")
    return make(request.getfixturevalue("sentencepiece")) if needs_files else make()


@pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")
@pytest.mark.parametrize("family", TOKENIZERS)
def test_a_cut_is_the_tokenizers_own(family, request):
    tokenizer = tokenizer_of(family, request)
    sides = {"input_ids": {"text": TEXT}, "labels": {"text_target": TEXT}}
    whole = {name: tokenizer(**text)["input_ids"] for name, text in sides.items()}
    num_special = tokenizer.num_special_tokens_to_add()
    assert num_special == {"mBART": 2, "mBART50": 2, "BART": 2, "M2M100": 2}.get(
        family, 2 if "NLLB" in family else 1
    )
    for limit in (num_special, 5, 8, len(whole["input_ids"]) - 1, len(whole["input_ids"])):
        options = {"truncation": True, "max_length": limit}
        own = {name: tokenizer(**text, **options)["input_ids"] for name, text in sides.items()}
        batch = CappedSeq2SeqCollator(tokenizer, limit, limit, None)([whole])
        assert {name: batch[name][0].tolist() for name in own} == own
        caps = Caps(np.array([limit]), np.array([limit]))
        view = PlannedDataset([whole], np.arange(1), caps, EndOfSequence(tokenizer))
        assert view[0][1] == own
        assert _may_be_equal(whole["labels"], own["labels"])
    assert CappedSeq2SeqCollator(tokenizer, 1, 1, None)([whole])["labels"].shape == (1, 1)


def test_the_decoder_of_mbart_starts_with_the_language():
    tokenizer = mbart(hf.MBartTokenizer)
    labels = tokenizer(text_target=TEXT)["input_ids"]
    batch = CappedSeq2SeqCollator(tokenizer, 6, 6, None)([{"input_ids": [5], "labels": labels}])
    start = shift_tokens_right(batch["labels"], tokenizer.pad_token_id)[0, 0]
    assert tokenizer.convert_ids_to_tokens(int(start)) == "ro_RO"


def test_labels_of_several_languages():
    """The language of a target need not be the one that the tokenizer is set to."""
    tokenizer = mbart(hf.MBartTokenizer)
    romanian = tokenizer(text_target=TEXT)["input_ids"]
    tokenizer.tgt_lang = "de_DE"
    german = tokenizer(text_target=TEXT)["input_ids"]
    samples = [{"input_ids": [4, 2], "labels": each} for each in (romanian, german)]
    labels = CappedSeq2SeqCollator(tokenizer, 9, 5, None)(samples)["labels"]
    assert labels[:, -2:].tolist() == [romanian[-2:], german[-2:]]
    assert romanian[-1] != german[-1]


@pytest.mark.parametrize(
    "end, kept",
    [
        (["</s>"], 1),
        (["w1", "</s>", "ro_RO"], 2),  # a language that the tokenizer does not list
        (["w1", "</s>", "w2"], 0),  # another text follows: not the end mark of this one
        (["<extra_id_3>", "</s>"], 1),  # a sentinel belongs to the text
        (["<unk>", "</s>"], 1),
        (["</s>", "</s>", "</s>"], 1),  # padding with EOS
        (["w1"], 0),
        ([], 0),
    ],
)
def test_what_belongs_to_the_end(end, kept):
    tokenizer = make_tokenizer(extra_special_tokens=["<extra_id_3>"])
    tokenizer.add_tokens(["ro_RO"])
    ids = tokenizer.convert_tokens_to_ids(end)
    tokens = flatten_tokens([ids, [6, 7]], empty=True)
    assert EndOfSequence(tokenizer).lengths(tokens).tolist() == [kept, 0]


def test_labels_that_were_cut_otherwise_are_of_another_row():
    whole = [30, 31, 32, 33, 34, 1, 201]
    assert _may_be_equal(whole, [30, 31, 1, 201])
    assert _may_be_equal(whole, [30, 31, 1])  # cut, and ended with an EOS
    assert not _may_be_equal(whole, [30, 32, 1, 201])
    assert not _may_be_equal(whole, [30, 99, 99, 201])
    assert not _may_be_equal(whole, [30, 31, 32, 33, 34, 1, 202])


def test_the_trainers_cut_ignores_padding():
    row = {"input_ids": [6, 7, 8, 9, 1, 0, 0], "labels": [20, 21, 22, 1, -100, -100]}
    row["attention_mask"] = [1] * 5 + [0] * 2
    caps = Caps(np.array([3]), np.array([3]))
    _, cut = PlannedDataset([row], np.arange(1), caps, EndOfSequence(make_tokenizer()))[0]
    assert cut == {"input_ids": [6, 7, 1], "labels": [20, 21, 1], "attention_mask": [1, 1, 1]}


# --------------------------------------------------------------------------------- other defaults


def test_the_sentinels_of_byt5_are_those_of_its_pretraining():
    tokenizer = hf.ByT5Tokenizer()
    sample = tokenizer(TEXT * 3)
    labels = T5SpanCorruptionCollatorFast(tokenizer, pad_to_multiple_of=None)([sample])["labels"]
    sentinels = labels[labels > 158]
    assert len(sentinels) > 3
    assert sentinels.tolist() == list(range(258, 258 - len(sentinels), -1))
    given = T5SpanCorruptionCollatorFast(tokenizer, sentinel_ids=[300, 301] * 9)([sample])
    assert given["labels"][0, 0] == 300


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("corrupts", [False, True])
def test_label_smoothing_with_a_stock_trainer(packed, corrupts):
    """Trainer.compute_loss takes the labels away under label_smoothing_factor."""
    config = hf.T5Config(
        vocab_size=200, d_model=16, num_layers=1, num_heads=2, d_kv=8, d_ff=16, dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = hf.T5ForConditionalGeneration(config)
    kind = T5SpanCorruptionCollatorFast if corrupts else CappedSeq2SeqCollator
    collator = kind(make_tokenizer(), length_column_name=None, model=model, packed=packed)
    rows = [{"input_ids": [*range(6, 6 + n), 1]} for n in (9, 30)]
    rows = rows if corrupts else [{**row, "labels": [*row["input_ids"][:n]]} for n, row in
                                  zip((3, 5), rows)]  # fmt: skip
    batch = collator(rows)
    padded = batch.padded(0) if packed else batch
    real = padded["labels"] >= 0
    whole = model(**{**padded, "decoder_input_ids": None}).logits[real]
    labels = padded.pop("labels")
    assert torch.equal(model(**padded).logits[real], whole)
    assert torch.equal(model._shift_right(labels)[real], padded["decoder_input_ids"][real])


def test_a_model_that_cannot_shift_labels():
    with pytest.raises(TypeError, match="model must have prepare_decoder_input_ids_from_labels"):
        CappedSeq2SeqCollator(make_tokenizer(), model=torch.nn.Linear(1, 1))
