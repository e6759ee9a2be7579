"""Scores of translations: equal to sacrebleu's, by language, and of the right rows."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import (
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.testing_utils import CaptureLogger
from transformers.trainer_utils import EvalPrediction
from transformers.utils import logging

from tokenpack.metrics import make_seq2seq_compute_metrics
from tokenpack.samples.tokenizer import EOS, PAD, train_tokenizer

datasets = pytest.importorskip("datasets")
sacrebleu = pytest.importorskip("sacrebleu.metrics")
BLEU, CHRF, TER = sacrebleu.BLEU, sacrebleu.CHRF, sacrebleu.TER
logger = logging.get_logger("tokenpack.metrics")

REFERENCES = [
    "the cat sat on the mat in the house",
    "a dog ran over the old bridge at night",
    "das Haus steht am Ufer des Flusses",
    "sie lesen ein Buch über die See",
]
PREDICTIONS = [
    "the cat sat on a mat in the house",
    "the old bridge at night a dog ran over",
    "das Haus steht am Ufer des Flusses",
    "they read a book about the sea",
]
SOURCES = [
    "die Katze sass auf der Matte im Haus",
    "ein Hund lief nachts über die alte Brücke",
    "the house stands on the bank of the river",
    "They read  a book about the sea ",
]
LANGUAGES = ["eng_Latn", "eng_Latn", "deu_Latn", "deu_Latn"]


@pytest.fixture(scope="module")
def tokenizer():
    return PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(REFERENCES, 420), pad_token=PAD, eos_token=EOS
    )


@pytest.fixture(autouse=True)
def without_nltk(monkeypatch):
    monkeypatch.setitem(sys.modules, "nltk", None)


@pytest.fixture
def with_nltk(monkeypatch):
    """A METEOR that is the fraction of the prediction's words in the reference."""
    tokenize, score, nltk = (ModuleType(name) for name in ("t", "s", "nltk"))
    nltk.__version__ = "0"
    tokenize.word_tokenize = lambda text, preserve_line: text.split() if preserve_line else None
    score.meteor_score = lambda references, words: (
        sum(word in references[0] for word in words) / max(len(words), 1)
    )
    monkeypatch.setitem(sys.modules, "nltk", nltk)
    monkeypatch.setitem(sys.modules, "nltk.translate", ModuleType("nltk.translate"))
    monkeypatch.setitem(sys.modules, "nltk.tokenize", tokenize)
    monkeypatch.setitem(sys.modules, "nltk.translate.meteor_score", score)
    return score


def ids_of(tokenizer, texts, fill, columns=None):
    rows = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    columns = columns or max(map(len, rows))
    return np.array([row + [fill] * (columns - len(row)) for row in rows])


def evaluated(tokenizer, predictions=PREDICTIONS, references=REFERENCES):
    pad = tokenizer.pad_token_id
    return EvalPrediction(ids_of(tokenizer, predictions, pad), ids_of(tokenizer, references, -100))


def a_dataset(**columns):
    return datasets.Dataset.from_dict(columns)


def labelled(tokenizer, references=REFERENCES, **columns):
    rows = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in references]
    return a_dataset(labels=rows, **columns)


def by_sacrebleu(predictions, references, **bleu):
    return {
        "bleu": BLEU(**bleu).corpus_score(predictions, [references]).score,
        "chrf": CHRF(word_order=2).corpus_score(predictions, [references]).score,
        "ter": TER().corpus_score(predictions, [references]).score,
    }


def test_the_corpus_is_scored_as_sacrebleu_scores_it(tokenizer):
    scores = make_seq2seq_compute_metrics(tokenizer)(evaluated(tokenizer))
    expected = by_sacrebleu(PREDICTIONS, REFERENCES)
    lengths = [len(tokenizer(text)["input_ids"]) + 1 for text in PREDICTIONS]
    expected |= {"exact_match": 0.25, "gen_len": np.mean(lengths)}
    assert scores == pytest.approx(expected, rel=1e-12)
    assert all(type(score) is float for score in scores.values())


def test_another_tokenizer_for_bleu(tokenizer):
    make = make_seq2seq_compute_metrics(tokenizer, bleu_tokenizer="char", metrics=["bleu"])
    expected = by_sacrebleu(PREDICTIONS, REFERENCES, tokenize="char")["bleu"]
    assert make(evaluated(tokenizer)) == pytest.approx({"bleu": expected}, rel=1e-12)
    with pytest.raises(
        ValueError, match=r"bleu_tokenizer must be one of .*'flores200'.*, got 'chars'"
    ):
        make_seq2seq_compute_metrics(tokenizer, bleu_tokenizer="chars")


def test_signatures_exist_before_the_first_score(tokenizer):
    compute = make_seq2seq_compute_metrics(tokenizer, bleu_tokenizer="intl")
    assert list(compute.signatures) == ["bleu", "chrf", "ter"]
    bleu, chrf = BLEU(tokenize="intl"), CHRF(word_order=2)
    for name, metric in {"bleu": bleu, "chrf": chrf}.items():
        metric.corpus_score(PREDICTIONS, [REFERENCES])
        assert compute.signatures[name] == str(metric.get_signature())
    assert "nrefs:1" in compute.signatures["ter"]


def test_minus_100_is_ignored_everywhere(tokenizer):
    compute = make_seq2seq_compute_metrics(tokenizer)
    expected = compute(evaluated(tokenizer))
    predicted = ids_of(tokenizer, PREDICTIONS, -100, columns=80)
    labels = ids_of(tokenizer, REFERENCES, -100, columns=90)[:, ::-1]
    labels = np.stack([np.concatenate([row[row < 0], row[row >= 0][::-1]]) for row in labels])
    assert compute(EvalPrediction(predicted, labels)) == expected


def test_formats_of_the_trainer(tokenizer):
    compute = make_seq2seq_compute_metrics(tokenizer)
    plain = evaluated(tokenizer)
    expected = compute(plain)
    predicted, labels = plain.predictions, plain.label_ids
    nothing = np.zeros((4, 7, 8))
    assert compute(EvalPrediction((predicted, nothing), labels)) == expected
    assert compute(EvalPrediction(torch.tensor(predicted), torch.tensor(labels))) == expected
    wider = np.pad(predicted[3:], ((0, 0), (0, 2)), constant_values=-100)
    by_batch = [predicted[:3], wider], [labels[:3], labels[3:]]
    assert compute(EvalPrediction(*by_batch)) == expected
    by_batch = [(predicted[:3], nothing), (predicted[3:], nothing)], [labels[:3], labels[3:]]
    assert compute(EvalPrediction(*by_batch)) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_on_a_gpu(tokenizer):
    compute = make_seq2seq_compute_metrics(tokenizer)
    plain = evaluated(tokenizer)
    on_gpu = (torch.tensor(ids, device="cuda") for ids in (plain.predictions, plain.label_ids))
    assert compute(EvalPrediction(*on_gpu)) == compute(plain)


@pytest.mark.parametrize("as_array", [np.asarray, lambda a: torch.tensor(a, dtype=torch.bfloat16)])
def test_logits_count_only_at_labels(tokenizer, as_array):
    labels = ids_of(tokenizer, REFERENCES, -100)
    predicted = np.where(labels < 0, 300, labels)  # 300: predictions after the end
    logits = as_array(np.eye(len(tokenizer), dtype=np.float32)[predicted])
    scores = make_seq2seq_compute_metrics(tokenizer)(EvalPrediction((logits, None), labels))
    assert scores["exact_match"] == 1
    assert scores["gen_len"] == np.mean(np.sum(labels >= 0, axis=1))


def test_each_language_is_scored_by_itself(tokenizer):
    dataset = labelled(tokenizer, language=LANGUAGES)
    scores = make_seq2seq_compute_metrics(tokenizer, dataset)(evaluated(tokenizer))
    for suffix, rows in {"": slice(4), "_eng_Latn": slice(2), "_deu_Latn": slice(2, 4)}.items():
        expected = by_sacrebleu(PREDICTIONS[rows], REFERENCES[rows])
        lengths = [len(tokenizer(text)["input_ids"]) + 1 for text in PREDICTIONS[rows]]
        expected |= {"gen_len": np.mean(lengths)}
        found = {name: scores[name + suffix] for name in expected}
        assert found == pytest.approx(expected, rel=1e-12)
    assert (scores["exact_match_eng_Latn"], scores["exact_match_deu_Latn"]) == (0, 0.5)
    assert len(scores) == 3 * 5


class Rows(torch.utils.data.Dataset):
    """A typical user dataset: rows by index, no columns."""

    def __init__(self, **columns):
        self.rows = [dict(zip(columns, row)) for row in zip(*columns.values())]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


def classes(**columns):
    return a_dataset(**columns).cast_column("lang", datasets.ClassLabel(names=["x", "de", "en"]))


@pytest.mark.parametrize(
    "dataset, options, languages",
    [
        (a_dataset(tgt_lang=["de", "de", None, " "], lang=["en"] * 4), {}, {"de"}),
        (a_dataset(mine=["de"] * 4, lang=["en"] * 4), {"language_column": "mine"}, {"de"}),
        (a_dataset(lang=["en"] * 4), {"language_column": None}, set()),
        (a_dataset(lang=["en"] * 4).with_format("torch", columns=[]), {}, {"en"}),
        (classes(lang=[1, 1, 2, None]), {}, {"de", "en"}),
        (Rows(lang=["Haitian Creole"] * 4), {}, {"Haitian_Creole"}),
        ([{"lang": "en"}] * 4, {}, {"en"}),
        ([{"lang": "en"}] * 3 + [{}], {}, set()),
        ([1] * 4, {}, set()),
        (a_dataset(source=["translate English to German: a"] * 4), {}, {"German"}),
        (a_dataset(source=["Translate into French : a"] * 4, lang=["en"] * 4), {}, {"en"}),
        (a_dataset(source=["translate English to German: a"] * 3 + ["a"]), {}, set()),
        (a_dataset(source=["translate a to b: a"] * 4), {"language_column": None}, set()),
    ],
)
def test_languages_are_found(tokenizer, dataset, options, languages):
    compute = make_seq2seq_compute_metrics(tokenizer, dataset, metrics=["gen_len"], **options)
    scores = compute(evaluated(tokenizer))
    assert {name.removeprefix("gen_len") for name in scores} == {
        "",
        *(f"_{language}" for language in languages),
    }


def test_missing_column(tokenizer):
    with pytest.raises(ValueError, match="language_column must be in eval_dataset, got 'mine'"):
        make_seq2seq_compute_metrics(tokenizer, a_dataset(a=[1]), language_column="mine")
    compute = make_seq2seq_compute_metrics(tokenizer, a_dataset(a=[1] * 4), source_column="mine")
    assert "copied_source" not in compute(evaluated(tokenizer))


@pytest.mark.parametrize("prompt", ["", "translate German to English: "])
def test_copied_source_is_counted_unless_correct(tokenizer, prompt):
    sources = [*SOURCES[:2], REFERENCES[2], SOURCES[3]]  # the third is right, the fourth copied
    dataset = a_dataset(mine=[prompt + text for text in sources])
    options = {"source_column": "mine", "language_column": None, "metrics": ["copied_source"]}
    compute = make_seq2seq_compute_metrics(tokenizer, dataset, **options)
    assert compute(evaluated(tokenizer)) == {"copied_source": 0.25}


def test_meteor_scores_only_english(tokenizer, with_nltk):
    options = {"metrics": ["meteor"], "source_column": "none"}
    rows = [8 / 9, 1, 1, 0]
    dataset = a_dataset(language=LANGUAGES)
    compute = make_seq2seq_compute_metrics(tokenizer, dataset, **options)
    english = np.mean(rows[:2])
    assert compute(evaluated(tokenizer)) == pytest.approx(
        {"meteor": english, "meteor_eng_Latn": english}
    )
    assert compute.signatures == {"meteor": "nltk:0|tok:treebank"}
    compute = make_seq2seq_compute_metrics(
        tokenizer, dataset, meteor_only_for_english=False, **options
    )
    assert compute(evaluated(tokenizer)) == pytest.approx(
        {"meteor": np.mean(rows), "meteor_eng_Latn": english, "meteor_deu_Latn": 0.5}
    )
    compute = make_seq2seq_compute_metrics(tokenizer, **options)
    assert compute(evaluated(tokenizer)) == pytest.approx({"meteor": np.mean(rows)})


@pytest.mark.parametrize(
    "language, is_english",
    [
        *((name, True) for name in ("en", "eng", "eng_Latn", "en_XX", "en-US", "en_gb", "English")),
        *((name, True) for name in ("__en__", ">>eng<<", "EN")),
        *((name, False) for name in ("en-de", "enm", "de", "deu_Latn", "end", "Greenlandic")),
    ],
)
def test_names_of_english(tokenizer, with_nltk, language, is_english):
    dataset = a_dataset(language=[language] * 4)
    compute = make_seq2seq_compute_metrics(tokenizer, dataset, metrics=["meteor"])
    assert ("meteor" in compute(evaluated(tokenizer))) == is_english


def test_meteor_is_left_out_without_nltk(tokenizer):
    with CaptureLogger(logger) as seen:
        compute = make_seq2seq_compute_metrics(tokenizer)
        scores = compute(evaluated(tokenizer)) | compute(evaluated(tokenizer))
    assert "meteor" not in scores
    assert "bleu" in scores
    assert seen.out.count("meteor is left out: it needs NLTK (pip install nltk)") == 1


def test_meteor_is_left_out_without_wordnet(tokenizer, with_nltk):
    def score(references, words):
        raise LookupError("Resource wordnet not found.")

    with_nltk.meteor_score = score
    with CaptureLogger(logger) as seen:
        scores = make_seq2seq_compute_metrics(tokenizer)(evaluated(tokenizer))
    assert "meteor" not in scores
    assert seen.out.count("meteor is left out: NLTK lacks its WordNet") == 1


@pytest.mark.parametrize(
    "dataset, metrics",
    [(a_dataset(lang=["de"] * 4), ["bleu", "meteor"]), (None, ["bleu"])],
)
def test_no_warning_if_meteor_is_not_needed(tokenizer, dataset, metrics):
    with CaptureLogger(logger) as seen:
        make_seq2seq_compute_metrics(tokenizer, dataset, metrics=metrics)
    assert seen.out == ""


def test_sacrebleu_is_missing(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.bleu", None)
    with pytest.raises(ImportError, match=r'bleu, ter need sacrebleu: pip install "tokenpack\[met'):
        make_seq2seq_compute_metrics(tokenizer, metrics=["bleu", "ter", "gen_len"])
    compute = make_seq2seq_compute_metrics(tokenizer, metrics=["exact_match"])
    assert compute(evaluated(tokenizer)) == {"exact_match": 0.25}


def test_number_of_rows_differs_from_the_dataset(tokenizer):
    compute = make_seq2seq_compute_metrics(tokenizer, a_dataset(language=["en"] * 3))
    with pytest.raises(
        ValueError, match=r"eval_dataset must have as many rows as are evaluated, 4, got 3:"
    ):
        compute(evaluated(tokenizer))
    by_name = {"a": a_dataset(lang=["en"] * 3), "b": a_dataset(lang=["de"] * 5)}
    compute = make_seq2seq_compute_metrics(tokenizer, by_name)
    with pytest.raises(ValueError, match=r"got 3 \('a'\), 5 \('b'\):"):
        compute(evaluated(tokenizer))
    first = evaluated(tokenizer, PREDICTIONS[:3], REFERENCES[:3])
    assert "bleu_en" in compute(first)  # the failed call left no rows


def test_predictions_and_labels_of_wrong_shapes(tokenizer):
    compute = make_seq2seq_compute_metrics(tokenizer)
    plain = evaluated(tokenizer)
    with pytest.raises(
        ValueError, match="predictions must have as many rows as label_ids, 4, got 3"
    ):
        compute(EvalPrediction(plain.predictions[:3], plain.label_ids))
    with pytest.raises(
        ValueError, match=r"predictions must be token ids .* got float64 of shape \(4, 5\)"
    ):
        compute(EvalPrediction(np.zeros((4, 5)), plain.label_ids))
    with pytest.raises(
        ValueError, match=r"label_ids must be token ids .n, columns., got int64 of shape \(4,\)"
    ):
        compute(EvalPrediction(plain.predictions, plain.label_ids[:, 0]))


def test_wrong_arguments(tokenizer):
    with pytest.raises(ValueError, match=r"metrics must be from \['bleu', .*, got \['rouge'\]"):
        make_seq2seq_compute_metrics(tokenizer, metrics=["bleu", "rouge"])
    stream = a_dataset(a=[1]).to_iterable_dataset()
    with pytest.raises(
        TypeError, match=r"eval_dataset must be a dataset with a length, .* got IterableDataset"
    ):
        make_seq2seq_compute_metrics(tokenizer, stream)


def test_the_evaluated_dataset_is_identified(tokenizer):
    other = list(reversed(REFERENCES))
    compute = make_seq2seq_compute_metrics(
        tokenizer,
        {
            "short": a_dataset(lang=["a"] * 3),
            "one": labelled(tokenizer, lang=["b"] * 4),
            "other": labelled(tokenizer, other, lang=["c"] * 4),
        },
        metrics=["gen_len"],
    )
    assert "gen_len_a" in compute(evaluated(tokenizer, PREDICTIONS[:3], REFERENCES[:3]))
    assert "gen_len_b" in compute(evaluated(tokenizer))
    assert "gen_len_c" in compute(evaluated(tokenizer, PREDICTIONS, other))
    left = evaluated(tokenizer)
    left.label_ids = np.stack([np.roll(row, np.sum(row < 0)) for row in left.label_ids])
    assert "gen_len_b" in compute(left)
    cut = evaluated(tokenizer)
    cut.label_ids = cut.label_ids[:, :5]
    cut.label_ids[:, -1] = tokenizer.eos_token_id  # as a truncating collator may end them
    assert "gen_len_b" in compute(cut)
    cut.label_ids = cut.label_ids[:, -1:]
    with pytest.raises(
        ValueError, match="eval_dataset must have one dataset with the evaluated labels, got 2"
    ):
        compute(cut)


def test_indistinguishable_datasets_raise_at_once(tokenizer):
    same = labelled(tokenizer, lang=["a"] * 4)
    for other in (labelled(tokenizer, lang=["b"] * 4), a_dataset(lang=["b"] * 4)):
        for pair in ({"one": same, "two": other}, {"one": other, "two": same}):
            with pytest.raises(ValueError, match="got 'one' and 'two' with 4 rows and no labels"):
                make_seq2seq_compute_metrics(tokenizer, pair)
    compute = make_seq2seq_compute_metrics(tokenizer, {"one": same, "two": same})
    assert "bleu_a" in compute(evaluated(tokenizer))  # either is correct


def test_rows_in_another_order_get_no_scores_by_language(tokenizer, with_nltk):
    dataset = labelled(tokenizer, language=LANGUAGES, source=SOURCES)
    compute = make_seq2seq_compute_metrics(tokenizer, dataset)
    in_order = compute(evaluated(tokenizer))
    with CaptureLogger(logger) as seen:
        shuffled = compute(evaluated(tokenizer, PREDICTIONS[::-1], REFERENCES[::-1]))
    assert "not those of eval_dataset in its order" in seen.out
    whole = ["bleu", "chrf", "ter", "exact_match", "gen_len"]
    assert shuffled == pytest.approx({name: in_order[name] for name in whole}, rel=1e-12)


def test_order_is_checked_only_if_needed(tokenizer):
    compute = make_seq2seq_compute_metrics(tokenizer, labelled(tokenizer))
    with CaptureLogger(logger) as seen:
        compute(evaluated(tokenizer, PREDICTIONS[::-1], REFERENCES[::-1]))
    assert seen.out == ""


def test_batches_give_the_scores_of_the_whole(tokenizer):
    dataset = labelled(tokenizer, language=LANGUAGES, source=SOURCES)
    compute = make_seq2seq_compute_metrics(tokenizer, dataset)
    plain = evaluated(tokenizer)
    expected = compute(plain)
    for _ in range(2):  # the second evaluation starts without rows
        batches = [
            EvalPrediction(
                torch.tensor(plain.predictions[rows]), torch.tensor(plain.label_ids[rows])
            )
            for rows in (slice(0, 3), slice(3, 4))
        ]
        assert compute(batches[0], compute_result=False) == {}
        assert compute(batches[1], compute_result=True) == expected


def test_empty_texts(tokenizer):
    compute = make_seq2seq_compute_metrics(tokenizer, a_dataset(source=["", "", "b"]))
    scores = compute(evaluated(tokenizer, ["", "", "b"], ["", "a", ""]))
    assert scores["exact_match"] == 1 / 3
    assert scores["ter"] == TER().corpus_score(["", "", "b"], [["", "a", ""]]).score
    assert scores["copied_source"] == 1 / 3
    assert all(np.isfinite(score) for score in scores.values())
    compute = make_seq2seq_compute_metrics(tokenizer, metrics=["ter"])
    assert compute(evaluated(tokenizer, ["", ""], ["", ""])) == {"ter": 0}
    assert compute(evaluated(tokenizer, ["a", ""], ["", ""])) == {"ter": 100}


def test_no_rows_have_no_metrics(tokenizer):
    none = np.zeros((0, 3), np.int64)
    assert make_seq2seq_compute_metrics(tokenizer)(EvalPrediction(none, none)) == {}


def test_a_tokenizer_without_a_pad(tokenizer):
    bare = SimpleNamespace(pad_token_id=None, batch_decode=tokenizer.batch_decode)
    scores = make_seq2seq_compute_metrics(bare, metrics=["gen_len", "exact_match"])(
        EvalPrediction(*(ids_of(tokenizer, texts, -100) for texts in (PREDICTIONS, REFERENCES)))
    )
    assert scores == make_seq2seq_compute_metrics(tokenizer, metrics=["gen_len", "exact_match"])(
        evaluated(tokenizer)
    )


@pytest.mark.parametrize("by_batch", [False, True])
def test_with_the_trainer(tokenizer, tmp_path, by_batch):
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    rows = labelled(tokenizer, REFERENCES * 2, language=LANGUAGES * 2, source=SOURCES * 2)
    # Padded to the longest row, so that the default collator works.
    padded = ids_of(tokenizer, REFERENCES * 2, -100)
    dataset = rows.add_column("input_ids", np.where(padded < 0, 0, padded).tolist())
    dataset = dataset.map(lambda row, i: {"labels": padded[i]}, with_indices=True)
    arguments = Seq2SeqTrainingArguments(
        tmp_path, per_device_eval_batch_size=3, predict_with_generate=True, use_cpu=True,
        generation_max_length=8, report_to=[], batch_eval_metrics=by_batch,
    )  # fmt: skip
    compute = make_seq2seq_compute_metrics(tokenizer, dataset)
    trainer = Seq2SeqTrainer(
        model, arguments, eval_dataset=dataset, processing_class=tokenizer, compute_metrics=compute
    )
    scores = trainer.evaluate()
    assert 0 < scores["eval_gen_len_deu_Latn"] < 8  # without the start token
    assert {"eval_bleu", "eval_chrf_eng_Latn", "eval_copied_source"} <= scores.keys()
