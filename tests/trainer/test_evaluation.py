"""Evaluation and prediction: the loss is over all targets, and rows are in dataset order."""

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import (
    BertForQuestionAnswering,
    BertForSequenceClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)

from tokenpack import packing_stats
from tokenpack.adapters.inputs import shift_right
from tokenpack.data import CappedSeq2SeqCollator, packed_collate_fn
from tokenpack.trainer import HierarchicalTokenTrainer
from tokenpack.trainer.evaluation import EvaluationSampler

from ..adapters.models import BY_NAME, EOS, PAD, VOCABULARY
from .setting import CASES, collate, collate_left, make_examples, make_trainer, on_ranks

TOLERANCE = 1e-6
BUDGET = 90  # an example has about 30 tokens
TOKENIZER = SimpleNamespace(pad_token_id=PAD, eos_token_id=EOS, padding_side="right")


def is_causal(name):
    return CASES[name].labels != "seq2seq"


def examples_of(name, count=17, seed=1):
    return make_examples(count, seed, causal=is_causal(name))


def ours(name, folder, examples=None, **options):
    options = {"max_eval_tokens_per_microbatch": BUDGET, "eval_dataset": examples, **options}
    return make_trainer(name, folder, examples_of(name, 8, 2), **options)


def theirs(name, folder, examples=None, model=None, **options):
    """transformers' own trainer with the unpatched model."""
    kind, fields = (
        (Trainer, TrainingArguments)
        if is_causal(name)
        else (Seq2SeqTrainer, Seq2SeqTrainingArguments)
    )
    given = {key: options.pop(key) for key in list(options) if key not in _fields(fields)}
    return kind(
        CASES[name].build() if model is None else model,
        fields(
            str(folder),
            **{
                "use_cpu": True,
                "report_to": [],
                "disable_tqdm": True,
                "per_device_eval_batch_size": 4,
                **options,
            },
        ),
        eval_dataset=examples,
        **{"data_collator": collate, **given},
    )


def _fields(kind):
    return kind.__dataclass_fields__


def loss_of_all(name, examples, smoothing=0.0):
    """The loss over all examples as one padded batch, in float64."""
    model = CASES[name].build().double().eval()
    batch = collate(examples)
    labels = batch.pop("labels")
    if not is_causal(name):
        batch["decoder_input_ids"] = shift_right(model, labels)
    with torch.no_grad():
        logits = model(**batch).logits.double()
    if is_causal(name):
        logits, labels = logits[:, :-1], labels[:, 1:]
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), label_smoothing=smoothing
    ).item()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", CASES)
def test_loss(name, smoothing, tmp_path):
    examples = examples_of(name)
    trainer = ours(name, tmp_path, examples, label_smoothing_factor=smoothing)
    expected = loss_of_all(name, examples, smoothing)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=TOLERANCE)
    other = trainer.evaluate(examples[:5], metric_key_prefix="few")
    expected = loss_of_all(name, examples[:5], smoothing)
    assert other["few_loss"] == pytest.approx(expected, rel=TOLERANCE)


def test_every_example_once_within_the_budget():
    rng = np.random.default_rng(0)
    for count, ranks, in_order, multiple in [
        (count, ranks, in_order, multiple)
        for count in (0, 1, 2, 3, 7, 100)
        for ranks in (1, 2, 3)
        for in_order in (False, True)
        for multiple in (1, 8)
    ]:
        lengths = rng.integers(0, 40, (count, 2))
        lengths[: count // 20] = 300
        options = {"num_ranks": ranks, "in_order": in_order, "multiple": multiple}
        plans = [EvaluationSampler(lengths, 100, rank=rank, **options) for rank in range(ranks)]
        steps = list(zip(*plans))
        assert all(len(plan) == len(steps) for plan in plans)
        rounded = -(-lengths // multiple) * multiple
        seen = []
        for at, step in enumerate(steps):
            for rows in step:
                assert len(rows) == len(step[0])
                sizes = rounded[[index if index >= 0 else -1 - index for index in rows]]
                assert len(rows) == 1 or len(rows) * sizes.max(0).sum() <= 100
            gathered = np.concatenate(step)
            assert ((gathered >= 0) == plans[0].real(at).reshape(-1)).all()
            seen += gathered[gathered >= 0].tolist()
        assert sorted(seen) == list(range(count))
        assert seen == plans[0].order.tolist()
        if in_order:
            assert seen == list(range(count))
        else:
            assert (np.diff(lengths[seen, 0]) <= 0).all()
        least = -(-int(rounded[lengths[:, 0] < 300].sum()) // (100 * ranks))
        assert not count or len(steps) >= least


@pytest.mark.parametrize("multiple", [None, 8])
def test_batches_hold_the_budget(multiple, tmp_path):
    """Collated batches hold the budget too, unless a single example exceeds it."""
    examples = [*examples_of("T5", 30), {"input_ids": [5] * 180, "labels": [7] * 90}]
    examples[3], examples[-1] = examples[-1], examples[3]
    collator = CappedSeq2SeqCollator(TOKENIZER, None, None, multiple)
    budget = 200
    trainer = ours(
        "T5",
        tmp_path,
        examples,
        data_collator=collator,
        max_eval_tokens_per_microbatch=budget,
    )
    alone, full = 0, []
    for batch in trainer.get_eval_dataloader():
        slots = batch["input_ids"].numel() + batch["labels"].numel()
        assert slots <= budget or len(batch["labels"]) == 1
        alone += slots > budget
        full.append(slots / budget)
    assert alone == 1
    assert np.mean(full) > 0.8


# --------------------------------------------------------------------------------------- prediction

GENERATION = {"predict_with_generate": True, "generation_max_length": 7}


def check_predictions(name, examples, mine, other, generated):
    """Check that real positions have the same values, and that the rest is padding."""
    assert len(mine.predictions) == len(other.predictions)
    labels = [np.array(each["labels"]) for each in examples] if mine.label_ids is not None else []
    assert (mine.label_ids is None) == (other.label_ids is None)
    for row, real in enumerate(labels):
        for ids in (mine.label_ids, other.label_ids):
            assert (ids[row, : len(real)] == real).all()
            assert np.isin(ids[row, len(real) :], (-100, PAD)).all()
    if generated:
        width = min(mine.predictions.shape[1], other.predictions.shape[1])
        assert width > 4
        np.testing.assert_array_equal(mine.predictions[:, :width], other.predictions[:, :width])
        for each in (mine, other):
            assert np.isin(each.predictions[:, width:], (-100, PAD)).all()
        return
    sides = ["labels", "input_ids"]
    mine, other = (
        each.predictions if isinstance(each.predictions, tuple) else (each.predictions,)
        for each in (mine, other)
    )
    assert (
        len(mine) == len(other) == (1 if is_causal(name) else 2)
    )  # encoder-decoder models also return the encoder's states
    for side, a, b in zip(sides, mine, other):
        largest = np.abs(b[b != -100]).max()
        for row, each in enumerate(examples):
            length = len(each[side if side in each else "input_ids"])
            assert np.abs(a[row, :length] - b[row, :length]).max() < 1e-5 * largest


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_predict_logits(name, pack, tmp_path):
    examples = examples_of(name)
    mine = ours(name, tmp_path, pack=pack).predict(examples)
    check_predictions(name, examples, mine, theirs(name, tmp_path).predict(examples), False)
    assert mine.metrics["test_loss"] == pytest.approx(loss_of_all(name, examples), rel=TOLERANCE)


@pytest.mark.parametrize(
    "options", [{}, {"generation_num_beams": 2}, {"label_smoothing_factor": 0.1}]
)
@pytest.mark.parametrize("name", ["T5", "NLLB"])
def test_predict_generated(name, options, tmp_path):
    examples = examples_of(name)
    options = {**GENERATION, **options}
    mine = ours(name, tmp_path, **options).predict(examples, metric_key_prefix="mine")
    other = theirs(name, tmp_path, **options).predict(examples)
    check_predictions(name, examples, mine, other, True)
    loss = loss_of_all(name, examples, options.get("label_smoothing_factor", 0.0))
    assert mine.metrics["mine_loss"] == pytest.approx(loss, rel=TOLERANCE)
    assert {key.replace("mine", "test") for key in mine.metrics} == other.metrics.keys()


def test_predict_several_sequences_per_example(tmp_path):
    examples = examples_of("T5")
    options = {"num_beams": 2, "num_return_sequences": 2, "max_length": 7}
    arguments = {"predict_with_generate": True}
    mine = ours("T5", tmp_path, **arguments).predict(examples, **options)
    other = theirs("T5", tmp_path, **arguments).predict(examples, **options)
    width = min(mine.predictions.shape[1], other.predictions.shape[1])
    assert len(mine.predictions) == 2 * len(examples)
    np.testing.assert_array_equal(mine.predictions[:, :width], other.predictions[:, :width])


def collate_unlabelled(examples):
    batch = collate([{**each, "labels": [1]} for each in examples])
    del batch["labels"]
    return batch


@pytest.mark.parametrize("name", ["T5", "Llama"])
def test_predict_without_labels(name, tmp_path):
    examples = [{"input_ids": each["input_ids"]} for each in examples_of(name)]
    options = {} if is_causal(name) else GENERATION
    options = {**options, "data_collator": collate_unlabelled}
    mine = ours(name, tmp_path, **options).predict(examples)
    other = theirs(name, tmp_path, **options).predict(examples)
    check_predictions(name, examples, mine, other, not is_causal(name))
    assert mine.label_ids is None
    assert mine.metrics.keys() == other.metrics.keys()


@pytest.mark.parametrize("name", ["T5", "Llama"])
def test_left_padding(name, tmp_path):
    """The returned labels are the original ones, including those that the loss ignores."""
    examples = examples_of(name)
    options = {"data_collator": collate_left}
    mine = ours(name, tmp_path, **options).predict(examples)
    other = theirs(name, tmp_path, **options).predict(examples)
    assert mine.metrics["test_loss"] == pytest.approx(loss_of_all(name, examples), rel=TOLERANCE)
    for each in (mine, other):
        found = [row[row != -100].tolist() for row in each.label_ids]
        assert found == [example["labels"] for example in examples]


# ------------------------------------------------------------------------------------------ metrics


class Metrics:
    """A compute_metrics that records its arguments."""

    def __init__(self):
        self.calls, self.ends = [], []

    def __call__(self, prediction, compute_result=None):
        fields = ("predictions", "label_ids", "inputs", "losses")
        self.calls.append({name: getattr(prediction, name) for name in fields})
        self.ends.append(compute_result)
        return {"rows": sum(len(call["label_ids"]) for call in self.calls)}


def best_tokens(logits, labels):
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def rows_of(ids, examples, name):
    """Whether each row is that of the example at the same position."""
    real = [each[name] for each in examples]
    return len(ids) == len(real) and all(
        row[: len(each)].tolist() == each and np.isin(row[len(each) :], (-100, PAD)).all()
        for row, each in zip(np.asarray(ids), real)
    )


@pytest.mark.parametrize("name", CASES)
def test_metrics_get_rows_in_dataset_order(name, tmp_path):
    examples = examples_of(name)
    seen, reference = Metrics(), Metrics()
    options = {
        "include_for_metrics": ["inputs", "loss"],
        "preprocess_logits_for_metrics": best_tokens,
    }
    trainer = ours(name, tmp_path, examples, compute_metrics=seen, **options)
    metrics = trainer.evaluate()
    other = theirs(name, tmp_path, examples, compute_metrics=reference, **options).evaluate()
    assert metrics.keys() == other.keys()
    assert metrics["eval_rows"] == len(examples)
    (mine,), (other,) = seen.calls, reference.calls
    assert rows_of(mine["label_ids"], examples, "labels")
    assert rows_of(mine["inputs"], examples, "input_ids")
    for row, each in enumerate(examples):
        length = len(each["labels"])
        a, b = (each["predictions"][row, :length] for each in (mine, other))
        np.testing.assert_array_equal(a, b)
    batches = [batch.examples for batch in trainer.get_eval_dataloader()]
    assert len(mine["losses"]) == len(examples)
    for batch in batches:
        loss = loss_of_all(name, [examples[at] for at in batch])
        np.testing.assert_allclose(mine["losses"][batch], loss, rtol=1e-5)


@pytest.mark.parametrize("generate", [False, True])
def test_metrics_by_batch(generate, tmp_path):
    examples = examples_of("T5")
    seen = Metrics()
    options = {**(GENERATION if generate else {}), "include_for_metrics": ["loss"]}
    trainer = ours(
        "T5", tmp_path, examples, compute_metrics=seen, batch_eval_metrics=True, **options
    )
    metrics = trainer.evaluate()
    assert len(seen.calls) > 3
    assert seen.ends == [False] * (len(seen.calls) - 1) + [True]
    labels = [row for call in seen.calls for row in call["label_ids"]]
    widest = max(len(row) for row in labels)
    labels = [np.append(row, np.full(widest - len(row), -100)) for row in labels]
    assert rows_of(labels, examples, "labels")
    assert all(len(call["losses"]) == len(call["label_ids"]) for call in seen.calls)
    assert metrics["eval_rows"] == len(examples)
    assert metrics["eval_loss"] == pytest.approx(loss_of_all("T5", examples), rel=TOLERANCE)


def test_lists_of_batches(tmp_path):
    examples = examples_of("T5")
    seen = Metrics()
    options = {"eval_do_concat_batches": False, "include_for_metrics": ["inputs", "loss"]}
    trainer = ours("T5", tmp_path, examples, compute_metrics=seen, **options)
    assert trainer.evaluate()["eval_rows"] > 3  # the metric counts batches here
    (call,) = seen.calls
    assert all(isinstance(call[name], list) for name in call)
    begin = 0
    for ids, labels in zip(call["inputs"], call["label_ids"]):
        of_batch = examples[begin : begin + len(ids)]
        assert rows_of(ids, of_batch, "input_ids")
        assert rows_of(labels, of_batch, "labels")
        begin += len(ids)
    assert begin == len(examples)


def test_arrays_moved_to_the_host_during_evaluation(tmp_path):
    examples = examples_of("T5")
    once = ours("T5", tmp_path).predict(examples)
    often = ours("T5", tmp_path, eval_accumulation_steps=2).predict(examples)
    np.testing.assert_array_equal(once.predictions[0], often.predictions[0])
    np.testing.assert_array_equal(once.label_ids, often.label_ids)


def test_several_evaluation_sets(tmp_path):
    sets = {"long": examples_of("T5", 9), "short": examples_of("T5", 5, 7)}
    seen = Metrics()
    trainer = ours("T5", tmp_path, sets, compute_metrics=seen)
    metrics = trainer.evaluate()
    others = theirs("T5", tmp_path, sets, compute_metrics=Metrics()).evaluate()
    assert metrics.keys() == others.keys()
    for name, examples in sets.items():
        expected = loss_of_all("T5", examples)
        assert metrics[f"eval_{name}_loss"] == pytest.approx(expected, rel=TOLERANCE)
    assert metrics["eval_long_rows"] == 9
    metrics = trainer.evaluate({"one": sets["short"]}, metric_key_prefix="test")
    assert metrics["test_one_loss"] == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize("pack", [True, False])
def test_examples_without_targets(pack, tmp_path):
    examples = examples_of("T5")
    for each in examples[::2]:
        each["labels"] = [-100] * len(each["labels"])
    trainer = ours("T5", tmp_path, examples, pack=pack, max_eval_tokens_per_microbatch=1)
    asking = examples[1::2]
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(loss_of_all("T5", asking), rel=TOLERANCE)
    assert metrics["eval_samples_per_second"] > 0
    assert np.isnan(trainer.evaluate(examples[::2])["eval_loss"])
    assert "eval_loss" not in trainer.evaluate([])


# ------------------------------------------------------------------------------------------- losses


def mean_of_the_batch(outputs, labels, num_items_in_batch=None):
    return torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())


def sum_over_items(outputs, labels, num_items_in_batch=None):
    total = torch.nn.functional.cross_entropy(
        outputs.logits.flatten(0, 1), labels.flatten(), reduction="sum"
    )
    return total / num_items_in_batch


class WithoutNumItems(HierarchicalTokenTrainer):
    def compute_loss(self, model, inputs, return_outputs=False):
        outputs = model(**inputs)
        return (2 * outputs.loss, outputs) if return_outputs else 2 * outputs.loss


class WithNumItems(HierarchicalTokenTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        return (2 * outputs.loss, outputs) if return_outputs else 2 * outputs.loss


@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({"compute_loss_func": mean_of_the_batch}, 1),
        ({"compute_loss_func": sum_over_items}, 1),
        ({"trainer_class": WithoutNumItems}, 2),
        ({"trainer_class": WithNumItems}, 2),
    ],
)
def test_a_loss_of_the_user(options, factor, tmp_path):
    examples = examples_of("T5")
    trainer = ours("T5", tmp_path, examples, **options)
    expected = factor * loss_of_all("T5", examples)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=TOLERANCE)
    trainer.args.average_tokens_across_devices = False
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=TOLERANCE)


# --------------------------------------------------------------------------------------------- data


def test_a_datasets_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    examples = examples_of("T5")
    table = datasets.Dataset.from_list(
        [{**each, "source": str(at)} for at, each in enumerate(examples)]
    )
    seen = Metrics()
    trainer = ours("T5", tmp_path, table, compute_metrics=seen, dataloader_num_workers=2)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(loss_of_all("T5", examples), rel=TOLERANCE)
    assert rows_of(seen.calls[0]["label_ids"], examples, "labels")


class Stream(IterableDataset):
    def __init__(self, examples, sized=False):
        self.examples = examples
        if sized:
            self.__class__ = SizedStream

    def __iter__(self):
        return iter(self.examples)


class SizedStream(Stream):
    def __len__(self):
        return len(self.examples)


@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("name", ["T5", "Llama"])
def test_iterable(name, sized, tmp_path):
    examples = examples_of(name)
    trainer = ours(name, tmp_path, Stream(examples, sized), per_device_eval_batch_size=4)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(loss_of_all(name, examples), rel=TOLERANCE)
    predicted = trainer.predict(Stream(examples, sized))
    assert rows_of(predicted.label_ids, examples, "labels")


PACKED = {
    "T5": CappedSeq2SeqCollator(TOKENIZER, packed=True),
    "Llama": packed_collate_fn(64),
}


@pytest.mark.parametrize("name", PACKED)
def test_packed_batches(name, tmp_path):
    examples = examples_of(name)
    seen = Metrics()
    trainer = ours(
        name,
        tmp_path,
        data_collator=PACKED[name],
        per_device_eval_batch_size=4,
        compute_metrics=seen,
        include_for_metrics=["inputs"],
    )
    for dataset in (examples, Stream(examples)):
        loss = trainer.evaluate(dataset)["eval_loss"]
        assert loss == pytest.approx(loss_of_all(name, examples), rel=TOLERANCE)
    assert all(rows_of(call["inputs"], examples, "input_ids") for call in seen.calls)
    assert len(seen.calls) == 2
    mine = trainer.predict(examples)
    other = theirs(name, tmp_path).predict(examples)
    if is_causal(name):  # the collator ignores the labels of first tokens
        other.label_ids[:, 0] = -100
        examples = [{**each, "labels": [-100, *each["labels"][1:]]} for each in examples]
    check_predictions(name, examples, mine, other, False)


def test_packed_batches_generate(tmp_path):
    examples = examples_of("NLLB")
    options = {**GENERATION, "data_collator": CappedSeq2SeqCollator(TOKENIZER, packed=True)}
    mine = ours("NLLB", tmp_path, **options).predict(examples)
    check_predictions(
        "NLLB", examples, mine, theirs("NLLB", tmp_path, **GENERATION).predict(examples), True
    )


def test_packing_collators_that_drop_a_row_are_an_error(tmp_path):
    examples = examples_of("Llama")
    trainer = ours("Llama", tmp_path, data_collator=packed_collate_fn(35, overlong="split"))
    with pytest.raises(ValueError, match="one sequence per sample"):
        trainer.evaluate(examples)


@pytest.mark.parametrize("generate", [False, True])
def test_a_collator_with_a_length_column(generate, tmp_path):
    """The length column of the collator is not an input of the model."""
    examples = examples_of("T5")
    options = {
        **(GENERATION if generate else {}),
        "data_collator": CappedSeq2SeqCollator(TOKENIZER),
    }
    trainer = ours("T5", tmp_path, examples, **options)
    loss = trainer.predict(examples).metrics["test_loss"]
    assert loss == pytest.approx(loss_of_all("T5", examples), rel=TOLERANCE)
    assert not [each for each in packing_stats(trainer.model).fallbacks if "length" in each]
    assert packing_stats(trainer.model).packed_calls > 0


# ----------------------------------------------------------------------------------------- training


def train_with_evaluation(folder, name="T5", **options):
    examples = examples_of(name)
    trainer = ours(
        name,
        folder,
        examples,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        max_steps=3,
        learning_rate=5.0,  # too large, so that the last model is not the best
        **options,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    history = trainer.state.log_history
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    return before, losses, trainer.state.best_metric, trainer.evaluate()["eval_loss"]


def check_training(before, losses, best, after):
    assert before == pytest.approx(loss_of_all("T5", examples_of("T5")), rel=TOLERANCE)
    assert len({before, *losses}) == 4
    assert best == min(losses) != losses[-1]
    assert after == pytest.approx(best, rel=TOLERANCE)


def test_evaluation_while_training(tmp_path):
    check_training(*train_with_evaluation(tmp_path))


def test_tokens_per_second_are_those_of_training(tmp_path):
    def slow(prediction):
        time.sleep(1)
        return {}

    options = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2, "compute_metrics": slow}
    trainer = ours("T5", tmp_path, examples_of("T5", 2), **options)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    tokens = sum(len(each["input_ids"] + each["labels"]) for each in trainer.train_dataset)
    assert logs[1]["tokens_per_second"] > tokens


# -------------------------------------------------------------------------------------- other heads


def collate_heads(examples):
    """A collator for labels per row, and for answers between two positions."""
    batch = collate([{**each, "labels": [1]} for each in examples])
    del batch["labels"]
    names = examples[0].keys() - {"input_ids"}
    return {**batch, **{name: torch.tensor([each[name] for each in examples]) for name in names}}


def tokens(rng, length):
    inner = rng.integers(0, 2, length - 2).tolist()
    return {"labels": [-100, *inner, -100] if length > 2 else [1, -100]}


def answers(rng, length):
    return {"start_positions": length // 2, "end_positions": length - 1}


def build_bert(kind, **options):
    torch.manual_seed(0)
    config = BY_NAME["BertForMaskedLM"].build().config
    config.update(options)
    return kind(config)


HEADS = {
    "tokens": (
        lambda: BY_NAME["BertForTokenClassification"].build(),
        tokens,
    ),
    "row": (
        lambda: BY_NAME["BertForSequenceClassification"].build(),
        lambda rng, length: {"labels": int(rng.integers(0, 2))},
    ),
    "number": (
        lambda: build_bert(BertForSequenceClassification, num_labels=1),
        lambda rng, length: {"labels": float(rng.normal())},
    ),
    "several": (
        lambda: build_bert(
            BertForSequenceClassification,
            num_labels=4,
            problem_type="multi_label_classification",
        ),
        lambda rng, length: {"labels": rng.integers(0, 2, 4).astype(float).tolist()},
    ),
    "answer": (lambda: build_bert(BertForQuestionAnswering), answers),
}


def head_examples(kind, count=17, seed=1):
    rng = np.random.default_rng(seed)
    lengths = np.full(count, 9) if kind == "answer" else rng.integers(4, 40, count)
    ids = [rng.integers(3, VOCABULARY, length).tolist() for length in lengths]
    label = HEADS[kind][1]
    return [{"input_ids": each, **label(rng, len(each))} for each in ids]


def head_options(kind):
    return {
        "model": HEADS[kind][0](),
        "data_collator": collate if kind == "tokens" else collate_heads,
        "max_steps": 2,
        "learning_rate": 0.5,
    }


def our_head(kind, folder):
    return make_trainer(
        "Llama",
        folder,
        head_examples(kind, 12, 5),
        eval_dataset=head_examples(kind),
        max_eval_tokens_per_microbatch=BUDGET,
        max_tokens_per_batch=10_000,
        pack=kind != "answer",
        **head_options(kind),
    )


def their_head(kind, folder):
    return theirs(
        "Llama",
        folder,
        head_examples(kind),
        train_dataset=head_examples(kind, 12, 5),
        per_device_train_batch_size=100,
        per_device_eval_batch_size=100,  # one batch, since Trainer averages the means of batches
        optim="sgd",
        max_grad_norm=0,
        logging_steps=1,
        **head_options(kind),
    )


@pytest.mark.parametrize("kind", HEADS)
def test_heads(kind, tmp_path):
    mine, other = our_head(kind, tmp_path), their_head(kind, tmp_path)
    examples = mine.eval_dataset
    before = [trainer.evaluate()["eval_loss"] for trainer in (mine, other)]
    assert before[0] == pytest.approx(before[1], rel=TOLERANCE)
    a, b = (trainer.predict(examples) for trainer in (mine, other))
    if kind == "tokens":
        pairs = [
            (a.predictions[row, : len(each["labels"])], b.predictions[row, : len(each["labels"])])
            for row, each in enumerate(examples)
        ]
        assert rows_of(a.label_ids, examples, "labels")
    else:
        both = zip(*(x if isinstance(x, tuple) else (x,) for x in (a.predictions, b.predictions)))
        pairs = list(both)
        np.testing.assert_array_equal(np.array(a.label_ids), np.array(b.label_ids))
    for one, two in pairs:
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-5 * np.abs(two).max())
    for trainer in (mine, other):
        trainer.train()
    logged = [
        [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        for trainer in (mine, other)
    ]
    assert logged[0] == pytest.approx(logged[1], rel=1e-5)
    after = [trainer.evaluate()["eval_loss"] for trainer in (mine, other)]
    assert after[0] == pytest.approx(after[1], rel=1e-5)
    assert after[0] != pytest.approx(before[0], rel=1e-3)


# -------------------------------------------------------------------------------------------- ranks


def of_one_size():
    return [{name: each[name] * 9 for name in each} for each in make_examples(17, longest=3)]


def evaluate_on_rank(rank, folder, counts):
    found = {}
    for name in CASES:
        trainer = ours(name, folder, label_smoothing_factor=0.1)
        for count in counts:
            loss = trainer.evaluate(examples_of(name, count))["eval_loss"]
            found[name, "loss", count] = loss
        found[name, "logits"] = trainer.predict(examples_of(name))
        trainer.preprocess_logits_for_metrics = best_tokens
        trainer.args.include_for_metrics = ["inputs", "loss"]
        trainer.compute_metrics = Metrics()
        trainer.evaluate(examples_of(name))
        found[name, "metrics"] = trainer.compute_metrics.calls
    options = {**GENERATION, "trainer_class": WithoutNumItems}
    trainer = ours("T5", folder, **options)
    found["generated"] = [trainer.predict(examples_of("T5", count)) for count in counts]
    trainer.args.predict_with_generate = False
    found["own loss"] = trainer.evaluate(examples_of("T5"))["eval_loss"]
    trainer.args.batch_eval_metrics = True
    trainer.compute_metrics = Metrics()
    found["rows"] = trainer.evaluate(examples_of("T5"))["eval_rows"]
    found["by batch"] = trainer.compute_metrics
    trainer = ours("T5", folder, eval_do_concat_batches=False, compute_metrics=Metrics())
    trainer.evaluate(examples_of("T5"))
    found["lists"] = trainer.compute_metrics.calls
    # accelerate splits the rows of one batch over ranks, so widths must be equal.
    found["stream"] = trainer.evaluate(Stream(of_one_size()))["eval_loss"]
    for kind in HEADS:
        trainer = our_head(kind, folder)
        found[kind] = trainer.predict(trainer.eval_dataset)
    found["training"] = train_with_evaluation(f"{folder}/training")
    return found


# Rows divide by 3 in more ways: a rank has none, one or two more than another.
@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.long), 3])
def test_ranks(ranks, tmp_path):
    counts = (ranks - 1, 17)
    first, *others = on_ranks(ranks, evaluate_on_rank, tmp_path, counts)
    for key in first:
        if "loss" in key or key in ("rows", "training", "stream"):
            assert all(other[key] == first[key] for other in others), key
    for name in CASES:
        examples = examples_of(name)
        for count in counts:
            loss = loss_of_all(name, examples_of(name, count), 0.1)
            assert first[name, "loss", count] == pytest.approx(loss, rel=TOLERANCE)
        reference = theirs(name, tmp_path).predict(examples)
        check_predictions(name, examples, first[name, "logits"], reference, False)
        (call,) = others[-1][name, "metrics"]
        assert rows_of(call["label_ids"], examples, "labels")
        assert rows_of(call["inputs"], examples, "input_ids")
        assert len(call["losses"]) == len(call["predictions"]) == len(examples)
        best = [row[: len(each["labels"])] for row, each in zip(call["predictions"], examples)]
        logits = reference.predictions
        logits = logits[0] if isinstance(logits, tuple) else logits
        for row, each in zip(best, logits):
            np.testing.assert_array_equal(row, each[: len(row)].argmax(-1))

    examples = examples_of("T5")
    for count, found in zip(counts, first["generated"]):
        some = examples_of("T5", count)
        reference = theirs("T5", tmp_path, **GENERATION).predict(some)
        check_predictions("T5", some, found, reference, True)
    assert first["own loss"] == pytest.approx(2 * loss_of_all("T5", examples), rel=TOLERANCE)
    assert first["rows"] == len(examples)
    by_batch = others[-1]["by batch"]
    assert by_batch.ends == [False] * (len(by_batch.ends) - 1) + [True]
    for calls in (by_batch.calls, [{"label_ids": ids} for ids in first["lists"][0]["label_ids"]]):
        begin = 0
        for call in calls:
            rows = len(call["label_ids"])
            assert rows_of(call["label_ids"], examples[begin : begin + rows], "labels")
            begin += rows
        assert begin == len(examples)
    assert first["stream"] == pytest.approx(loss_of_all("T5", of_one_size()), rel=TOLERANCE)

    for kind in HEADS:
        reference = their_head(kind, tmp_path)
        expected = reference.predict(reference.eval_dataset)
        loss = expected.metrics["test_loss"]
        assert first[kind].metrics["test_loss"] == pytest.approx(loss, rel=TOLERANCE)
        if kind != "tokens":
            np.testing.assert_array_equal(first[kind].label_ids, expected.label_ids)
    check_training(*first["training"])
    alone = train_with_evaluation(f"{tmp_path}/alone")  # differs if ranks do not average gradients
    for found, expected in zip(first["training"], alone):
        assert found == pytest.approx(expected, rel=1e-5)
