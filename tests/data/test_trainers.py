"""Packed rows in other libraries' trainers give the same losses as padded sequences."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from tokenpack import patch_model
from tokenpack.data import collate_packed_rows, pack_dataset

pytest.importorskip("datasets")
pytest.importorskip("accelerate")

VOCABULARY, CAPACITY = 128, 64
RNG = np.random.default_rng(0)
SEQUENCES = [RNG.integers(3, VOCABULARY, n).tolist() for n in RNG.integers(2, 40, 40)]


def make_model(attention="sdpa"):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=attention,
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    )
    return LlamaForCausalLM(config)


def padded(sequences):
    """Pad the sequences into an ordinary batch."""
    longest = max(map(len, sequences))
    rows = [each + [0] * (longest - len(each)) for each in sequences]
    mask = [[1] * len(each) + [0] * (longest - len(each)) for each in sequences]
    ids, mask = torch.tensor(rows), torch.tensor(mask)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def sequences_in(rows):
    for row in rows:
        start = 0
        for length in row["seq_lengths"]:
            yield row["input_ids"][start : start + length]
            start += length


def expected_losses(rows, learning_rate):
    """Run four steps of SGD on padded batches of the sequences of two rows each."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), learning_rate)
    losses = []
    for first in range(0, 8, 2):
        batch = padded(list(sequences_in(rows.select([first, first + 1]))))
        loss = model(**batch).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


OPTIONS = {
    **{"per_device_train_batch_size": 2, "max_steps": 4, "logging_steps": 1, "optim": "sgd"},
    **{"learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0},
    **{"save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True},
    "remove_unused_columns": False,
    "logging_nan_inf_filter": False,
    "train_sampling_strategy": "sequential",
}


def losses_of(trainer):
    seen = []
    compute_loss = trainer.compute_loss

    def watched(*args, **kwargs):
        result = compute_loss(*args, **kwargs)
        seen.append((result[0] if isinstance(result, tuple) else result).item())
        return result

    trainer.compute_loss = watched
    trainer.train()
    return seen


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("patched", [True, False], ids=["patched", "unpatched"])
@pytest.mark.parametrize("which", ["Trainer", "SFTTrainer"])
def test_packed_and_padded_losses_are_equal(tmp_path, which, patched, attention):
    rows = pack_dataset(SEQUENCES, CAPACITY, progress=False)
    model = make_model(attention)
    if patched:
        patch_model(model)
    options = {"output_dir": str(tmp_path), **OPTIONS}
    if which == "Trainer":
        trainer = Trainer(
            model, TrainingArguments(**options), collate_packed_rows, train_dataset=rows
        )
    else:
        trl = pytest.importorskip("trl")
        trainer = trl.SFTTrainer(
            model,
            trl.SFTConfig(**options, dataset_kwargs={"skip_prepare_dataset": True}, bf16=False),
            data_collator=collate_packed_rows,
            train_dataset=rows,
            processing_class=make_tokenizer(),
        )
    got = losses_of(trainer)
    want = expected_losses(rows, learning_rate=1.0)
    assert got == pytest.approx(want, abs=2e-6)
    # The steps change the losses, so the comparison covers the gradients.
    assert abs(expected_losses(rows, learning_rate=0.0)[-1] - want[-1]) > 1e-3


def make_tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="3")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), pad_token="0", eos_token="2", unk_token="3"
    )


def test_the_example_runs(tmp_path):
    pytest.importorskip("trl")
    path = Path(__file__).parents[2] / "examples" / "pack_sft.py"
    spec = importlib.util.spec_from_file_location("pack_sft", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    flags = ["--texts", "60", "--capacity", "256", "--steps", "3", "--out", str(tmp_path)]
    trainer = example.main(flags)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert all(0 < float(loss) < 9 for loss in losses)
