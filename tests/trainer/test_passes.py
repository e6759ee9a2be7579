"""Resuming in a later pass over a dataset without a length."""

import json
import logging

import pytest
from torch.utils.data import IterableDataset

from tokenpack.trainer.checkpoints import STATE_NAME

from .setting import make_examples, make_trainer

EXAMPLES = [{"input_ids": [3 + n, 1], "labels": [3 + n, 1]} for n in range(8)]  # 4 batches


class Plain(IterableDataset):
    """The same examples in every pass."""

    def __iter__(self):
        return iter(EXAMPLES)


class ByEpoch(IterableDataset):
    """Another order in each epoch that it is told."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        first = 3 * self.epoch % 8
        return iter(EXAMPLES[first:] + EXAMPLES[:first])


class Stateful(IterableDataset):
    """Another order in each pass, which it counts itself."""

    passes = 0

    def state_dict(self):
        return {"passes": self.passes}

    def load_state_dict(self, state):
        self.passes = state["passes"]

    def __iter__(self):
        self.passes += 1
        first = 3 * self.passes % 8
        return iter(EXAMPLES[first:] + EXAMPLES[:first])


class NotJson(Stateful):
    def state_dict(self):
        return {"passes": {self.passes}}


def train(folder, dataset, steps, resume=None, **options):
    trainer = make_trainer(
        "T5", folder, dataset, max_steps=steps, save_strategy="steps",
        per_device_train_batch_size=2, **{"save_steps": 99, **options},
    )  # fmt: skip
    trained = []
    step = trainer.training_step

    def training_step(model, inputs, *arguments):
        trained.append(int(inputs["input_ids"][0, 0]) - 3)
        return step(model, inputs, *arguments)

    trainer.training_step = training_step
    trainer.train(resume_from_checkpoint=resume)
    return trained


@pytest.fixture
def log(caplog):
    transformers_logger = logging.getLogger("transformers")
    transformers_logger.propagate = True
    yield caplog
    transformers_logger.propagate = False


@pytest.mark.parametrize(
    "dataset, accumulation, warns",
    [(Plain, 1, True), (ByEpoch, 2, False), (Stateful, 1, False)],
)
def test_a_later_pass_goes_on_where_it_stopped(dataset, accumulation, warns, tmp_path, log):
    options = {"gradient_accumulation_steps": accumulation}
    whole = train(tmp_path, dataset(), 8 // accumulation, save_steps=2 // accumulation, **options)
    assert len(whole) == 8
    assert (whole[:3] == whole[4:7]) == (dataset is Plain)
    for at in (4, 6):
        folder = str(tmp_path / f"checkpoint-{at // accumulation}")
        resumed = train(tmp_path, dataset(), 7 // accumulation, folder, **options)
        assert resumed == whole[at : 7 // accumulation * accumulation], at
    message = "Pass 2 over it is read again from its start, and its first 2 batches are skipped"
    assert (message in log.text) == warns


def test_a_state_that_cannot_be_saved_and_a_checkpoint_without_position(tmp_path, log):
    train(tmp_path, NotJson(), 1, save_steps=1)
    assert "is not saved with checkpoints, because it is not JSON" in log.text
    state = tmp_path / "checkpoint-1" / STATE_NAME
    facts = json.loads(state.read_text())
    assert (facts.pop("pass"), facts.pop("batch"), facts["datasets"]) == (0, 1, [None])
    state.write_text(json.dumps(facts))  # as another trainer would leave it
    train(tmp_path, Plain(), 2, str(state.parent))
    assert "no position in train_dataset, which has no length: the first 1 batches" in log.text


def test_a_plan_has_no_position_in_passes(tmp_path):
    train(tmp_path, make_examples(12), 1, save_steps=1, max_tokens_per_batch=100)
    assert "pass" not in json.loads((tmp_path / "checkpoint-1" / STATE_NAME).read_text())
