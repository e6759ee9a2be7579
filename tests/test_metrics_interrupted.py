"""Rows of an interrupted evaluation, ids that no tokenizer has, and datasets with a transform."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    EvalPrediction,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
)

from tokenpack.metrics import make_seq2seq_compute_metrics
from tokenpack.trainer import HierarchicalTokenTrainer

datasets = pytest.importorskip("datasets")
VOCABULARY = {"<pad>": 0, "</s>": 1, "a": 4, "b": 5, "c": 6}


@pytest.fixture(scope="module")
def tokenizer():
    model = Tokenizer(models.WordLevel(VOCABULARY, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="</s>")


class Interrupt(TrainerCallback):
    """Interrupts the first evaluation before its last batch."""

    def __init__(self):
        self.steps = 0

    def on_prediction_step(self, args, state, control, **_):
        self.steps += 1
        if self.steps == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize("trainer_class", [Seq2SeqTrainer, HierarchicalTokenTrainer])
def test_rows_of_an_interrupted_evaluation_are_left_out(tokenizer, tmp_path, trainer_class):
    torch.manual_seed(0)
    options = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=8, decoder_start_token_id=0, pad_token_id=0, **options)
    )
    rows = datasets.Dataset.from_dict({"input_ids": [[4, 5, 1]] * 8, "labels": [[4, 5, 1]] * 8})
    arguments = Seq2SeqTrainingArguments(
        tmp_path, per_device_eval_batch_size=2, predict_with_generate=True, use_cpu=True,
        generation_max_length=4, report_to=[], batch_eval_metrics=True, disable_tqdm=True,
    )  # fmt: skip
    compute = make_seq2seq_compute_metrics(tokenizer, rows, metrics=["gen_len"])
    own = {"max_eval_tokens_per_microbatch": 6} if trainer_class is not Seq2SeqTrainer else {}
    trainer = trainer_class(
        model, arguments, eval_dataset=rows, processing_class=tokenizer,
        compute_metrics=compute, callbacks=[interrupt := Interrupt()], **own,
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        trainer.evaluate()
    assert interrupt.steps == 3
    assert "eval_gen_len" in trainer.evaluate()  # with rows left over: not as many as the dataset


def test_reset_forgets_rows(tokenizer):
    compute = make_seq2seq_compute_metrics(tokenizer, metrics=["exact_match"])
    right, wrong = np.array([[4, 5]]), np.array([[6, 6]])
    compute(EvalPrediction(right, wrong), compute_result=False)
    assert compute(EvalPrediction(right, right)) == {"exact_match": 0.5}  # one evaluation
    compute(EvalPrediction(right, wrong), compute_result=False)
    compute.reset()
    assert compute(EvalPrediction(right, right)) == {"exact_match": 1.0}


@pytest.mark.parametrize("argument", ["predictions", "label_ids"])
def test_an_id_that_cannot_be_decoded_is_named(tokenizer, argument):
    compute = make_seq2seq_compute_metrics(tokenizer, metrics=["exact_match"])
    ids = {"predictions": np.array([[4, 5]] * 2), "label_ids": np.array([[4, 5]] * 2)}
    ids[argument] = np.array([[4, 5], [2**33, 5]])
    message = f"{argument} must be ids that the tokenizer can decode, got {2**33} in row 1"
    with pytest.raises(ValueError, match=message):
        compute(EvalPrediction(**ids))


def test_columns_are_read_through_a_transform(tokenizer):
    raw = datasets.Dataset.from_dict({"text": ["a", "b"], "lang": ["de", "en"]})
    upper = raw.with_transform(
        lambda batch: {
            "labels": [[VOCABULARY[each]] for each in batch["text"]],
            "lang": [each.upper() for each in batch["lang"]],
        }
    )
    compute = make_seq2seq_compute_metrics(tokenizer, upper, metrics=["exact_match"])
    scores = compute(EvalPrediction(np.array([[4], [6]]), np.array([[4], [5]])))
    assert scores == {"exact_match": 0.5, "exact_match_DE": 1.0, "exact_match_EN": 0.0}
