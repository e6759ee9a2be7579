"""The step of a datatrove pipeline. Without datatrove, its base class is replaced by one with the
methods that the step calls."""

import contextlib
import importlib
import sys
import types
from collections import Counter

import datasets
import numpy as np
import pytest

from tokenpack.data import TokenShards, merge_shards, train_tokenizer

TEXTS = [f"line {at} of a text. " * (at % 4) for at in range(50)]


class Step:
    """What the step needs of datatrove's `PipelineStep`."""

    def __init__(self):
        self.counted = Counter()

    def stat_update(self, *labels, value=1, unit=None):
        self.counted.update(dict.fromkeys(labels, value))

    def track_time(self, unit=None):
        return contextlib.nullcontext()


@pytest.fixture
def shard_step(monkeypatch):
    try:
        importlib.import_module("datatrove.pipeline.base")
    except ImportError:
        base = types.ModuleType("datatrove.pipeline.base")
        base.PipelineStep = Step
        for name in ("datatrove", "datatrove.pipeline"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.setitem(sys.modules, "datatrove.pipeline.base", base)
    name = "tokenpack.data.shards.pipeline"
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(name).ShardStep
    sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300, chat_template="chatml")


def document(text, **metadata):
    return types.SimpleNamespace(text=text, metadata=metadata)


def of_task(rank, stop=None):
    """The documents of a task; ``stop`` raises in their middle."""
    for at, text in enumerate(TEXTS[rank::3]):
        if at == stop:
            raise KeyboardInterrupt
        yield document(text)


def test_tasks_that_stop_are_written_again_and_merged(shard_step, tokenizer, tmp_path):
    step = shard_step(str(tmp_path / "a"), tokenizer, eos=False)
    step.run(of_task(0), 0, 3)
    with pytest.raises(KeyboardInterrupt):
        step.run(of_task(1, stop=9), 1, 3)
    step.run(of_task(2), 2, 3)
    assert not list(tmp_path.glob("*.unfinished"))
    with pytest.raises(ValueError, match=r"ranks \[1\] are missing"):
        merge_shards(tmp_path / "a-*", tmp_path / "whole")
    for rank in (1, 0):  # a task that is complete may run again
        step.run(of_task(rank), rank, 3)
    merged = merge_shards(tmp_path / "a-*", tmp_path / "whole")
    texts = [text for rank in range(3) for text in TEXTS[rank::3] if text]
    assert [each.tolist() for each in merged] == [tokenizer(text).input_ids for text in texts]


def test_chats(shard_step, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="format must be 'datatrove' with chat"):
        shard_step("a", tokenizer, chat=True)
    step = shard_step(str(tmp_path / "a"), tokenizer, chat=True, format="datatrove")
    step.run([document("", prompt="line", response="of a text.", input=None)])
    shards = TokenShards(tmp_path / "a-00000-of-00001.ds")
    learned = shards.tokens(0, shards.num_tokens)[shards.targets(0, shards.num_tokens)]
    assert tokenizer.decode(learned) == "of a text.<|im_end|>"


def test_packed_rows(shard_step, tokenizer, tmp_path):
    step = shard_step(str(tmp_path / "a"), tokenizer, capacity=64, overlong="drop")
    for rank in range(3):
        step.run(of_task(rank), rank, 3)
    assert len(list(tmp_path.iterdir())) == 3
    found = []
    for path in tmp_path.iterdir():
        for row in datasets.Dataset.from_file(str(path)):
            edges = np.cumsum([0, *row["seq_lengths"]])
            found += [row["input_ids"][a:b] for a, b in zip(edges, edges[1:])]
    expected = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in TEXTS if text]
    assert sorted(found) == sorted(ids for ids in expected if len(ids) <= 64)


def test_without_datatrove_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datatrove.pipeline.base", None)
    monkeypatch.delitem(sys.modules, "tokenpack.data.shards.pipeline", raising=False)
    shard_step = importlib.import_module("tokenpack.data").ShardStep
    with pytest.raises(ImportError, match=r"pip install 'tokenpack\[datatrove\]'"):
        shard_step("a", "b")
    sys.modules.pop("tokenpack.data.shards.pipeline")
