"""Small models, examples, collators and ranks for the tests of the trainers."""

from __future__ import annotations

import gc
import os
import pickle
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp
from transformers import Seq2SeqTrainingArguments, TrainerCallback, TrainingArguments

from tokenpack.adapters.inputs import shift_right
from tokenpack.trainer import HierarchicalTokenTrainer, TokenBudgetTrainer

from ..adapters.models import EOS, LLAMA, NLLB, PAD, T5, VOCABULARY

CASES = {"T5": T5, "NLLB": NLLB, "Llama": LLAMA}


def make_examples(count: int, seed: int = 0, longest: int = 40, causal: bool = False) -> list[dict]:
    rng = np.random.default_rng(seed)

    def ids(length):
        return [*rng.integers(3, VOCABULARY, length - 1).tolist(), EOS]

    sources = rng.integers(2, longest, count)
    targets = rng.integers(2, max(longest // 2, 3), count)
    if causal:
        return [{"input_ids": (row := ids(n)), "labels": row} for n in sources]
    return [{"input_ids": ids(n), "labels": ids(m)} for n, m in zip(sources, targets)]


def collate(examples: list[dict], side: str = "right") -> dict[str, torch.Tensor]:
    def rows(name, fill):
        width = max(len(each[name]) for each in examples)
        lists = [list(each[name]) for each in examples]
        padding = [[fill] * (width - len(each)) for each in lists]
        return torch.tensor(
            [each + pad if side == "right" else pad + each for each, pad in zip(lists, padding)]
        )

    ids = rows("input_ids", PAD)
    ones = [{"ones": [1] * len(each["input_ids"])} for each in examples]
    mask = [each["ones"] for each in ones]
    width = ids.shape[1]
    mask = [
        row + [0] * (width - len(row)) if side == "right" else [0] * (width - len(row)) + row
        for row in mask
    ]
    return {"input_ids": ids, "attention_mask": torch.tensor(mask), "labels": rows("labels", -100)}


def collate_left(examples: list[dict]) -> dict[str, torch.Tensor]:
    batch = collate(examples, side="left")
    if [each["labels"] for each in examples] != [each["input_ids"] for each in examples]:
        batch["labels"] = collate(examples)["labels"]  # the decoder's padding stays on the right
    return batch


class KeepGradients(TrainerCallback):
    """Records the gradients of each step before the optimizer uses them."""

    def __init__(self):
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.steps.append(
            {
                name.removeprefix("module."): whole(p.grad).clone()
                for name, p in model.named_parameters()
                if p.grad is not None
            }
        )


def whole(gradient):
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def make_trainer(name: str, folder: Any, examples: list[dict], **options: Any):
    """A trainer of a small model on the CPU. ``options`` go to its arguments or to the trainer."""
    case = CASES[name]
    seq2seq = case.labels == "seq2seq"
    kind = Seq2SeqTrainingArguments if seq2seq else TrainingArguments
    fields = kind.__dataclass_fields__
    own = {key: options.pop(key) for key in list(options) if key not in fields}
    for key in ("debug", "length_column_name"):
        if key in options:
            own[key] = options.pop(key)
    defaults = {
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "num_train_epochs": 1,
        "learning_rate": 0.05,
        "lr_scheduler_type": "linear",
        "optim": "sgd",
        "max_grad_norm": 0,
        "disable_tqdm": True,
    }
    args = kind(str(folder), **{**defaults, **options})
    trainer_class = own.pop("trainer_class", None) or (
        HierarchicalTokenTrainer if seq2seq else TokenBudgetTrainer
    )
    model = own.pop("model", None)
    return trainer_class(
        case.build() if model is None else model,
        args,
        train_dataset=examples,
        **{
            "data_collator": collate,
            "max_tokens_per_batch": 300,
            "max_tokens_per_microbatch": 100,
            **own,
        },
    )


def padded_gradient(name: str, examples: list[dict], smoothing: float = 0.0):
    """Loss and gradient of all examples as one padded batch of the unpatched model.

    The loss is the mean over all targets, with torch's label smoothing.
    """
    model = CASES[name].build()
    batch = collate(examples)
    labels = batch.pop("labels")
    if CASES[name].labels == "seq2seq":
        batch["decoder_input_ids"] = shift_right(model, labels)
    logits = model(**batch).logits
    if CASES[name].labels != "seq2seq":
        logits, labels = logits[:, :-1], labels[:, 1:]
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), label_smoothing=smoothing
    )
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest difference between two gradients, relative to the largest value of the second."""
    ours = {name: g for name, g in ours.items() if name in theirs or g.abs().max() > 0}
    assert ours.keys() == theirs.keys()
    largest = max(float(g.abs().max()) for g in theirs.values())
    assert largest > 0
    return max(float((ours[n] - theirs[n]).abs().max()) for n in theirs) / largest


# ------------------------------------------------------------------------------------------- ranks


# Modules that take a rank eight seconds to import. The fork server imports them once.
_IMPORTED_ONCE = [
    "pytest",
    "tokenpack.trainer",
    "tokenpack.adapters.inputs",
    "transformers.models.t5.modeling_t5",
    "transformers.models.m2m_100.modeling_m2m_100",
    "transformers.models.llama.modeling_llama",
    "torch._dynamo",
]


def _rank(rank, world, port, function, arguments, queue):
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
    )
    torch.set_num_threads(1)
    gc.freeze()  # as in conftest.py
    try:
        # As bytes, because a tensor in shared memory disappears with this process.
        queue.put((rank, True, pickle.dumps(function(rank, *arguments))))
        code = 0
    except BaseException:
        queue.put((rank, False, traceback.format_exc()))
        code = 1
    sys.stdout.flush()
    # Skip the interpreter's teardown, where gloo's threads sometimes abort the process.
    os._exit(code)


def on_ranks(world: int, function: Any, *arguments: Any, timeout: float = 120) -> list[Any]:
    """The results of ``function(rank, *arguments)`` in ``world`` new gloo processes, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED_ONCE)
    queue = context.SimpleQueue()
    processes = [
        context.Process(target=_rank, args=(rank, world, port, function, arguments, queue))
        for rank in range(world)
    ]
    # The processes import this file by name, with the path of this process.
    path = list(sys.path)
    sys.path.append(str(Path(__file__).parents[2]))
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    try:
        for process in processes:
            process.start()
        while len(results) < world:
            alive = [process for process in processes if process.is_alive()]
            if queue.empty():
                assert alive, f"ranks ended without a result: {[p.exitcode for p in processes]}"
                assert time.monotonic() < deadline, f"timeout; ranks that finished: {list(results)}"
                time.sleep(0.05)
                continue
            rank, fine, value = queue.get()
            assert fine, f"rank {rank}:\n{value}"
            results[rank] = pickle.loads(value)
    finally:
        sys.path[:] = path
        for process in processes:
            process.kill()
    return [results[rank] for rank in range(world)]
