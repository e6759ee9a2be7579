"""Gradient accumulation over unequal micro-batches with transformers' Trainer."""

import copy

import pytest
import torch

from tokenpack import packing_stats, patch_model

from .models import LLAMA, NLLB, T5, Case

pytest.importorskip("accelerate")
from transformers import Trainer, TrainerCallback, TrainingArguments


class KeepGradients(TrainerCallback):
    """Keeps the gradients of the optimizer step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.kept = {name: p.grad.clone() for name, p in model.named_parameters()}


def long_positions(case: Case) -> Case:
    options = {**case.options}
    if "max_position_embeddings" in options:
        options["max_position_embeddings"] = 1100
    return Case(case.family, case.config, case.model, options, case.labels)


def rows(case: Case, targets: list[int]) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    width = max(targets) + 2
    examples = []
    for count in targets:
        # No token predicts a causal model's first token, so it needs one more for `count` targets.
        length = count + 1 if case is LLAMA or case.labels == "causal" else 7
        ids = torch.zeros(width, dtype=torch.long)
        ids[:length] = torch.randint(3, 97, (length,), generator=generator)
        labels = torch.full((width,), -100)
        if case.labels == "causal":
            labels[:length] = ids[:length]
        else:
            labels[:count] = torch.randint(3, 97, (count,), generator=generator)
        mask = (torch.arange(width) < length).long()
        examples.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return examples


def trained_gradients(model, examples, tmp_path, batch_size, steps):
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=steps,
        max_steps=1,
        max_grad_norm=0.0,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
    )
    gradients = KeepGradients()
    trainer = Trainer(model=model, args=arguments, train_dataset=examples, callbacks=[gradients])
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return gradients.kept, logged[0]


def distance(ours, theirs):
    largest = max(float(g.abs().max()) for g in theirs.values())
    return max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) / largest


@pytest.mark.parametrize("case", [T5, NLLB, LLAMA], ids=lambda case: case.model)
def test_micro_batches_of_10_and_1000_targets_give_the_gradient_of_the_batch(case, tmp_path):
    case = long_positions(case)
    reference = case.build()
    examples = rows(case, [10, 1000])
    together = {key: torch.stack([e[key] for e in examples]) for key in examples[0]}
    reference(**together).loss.backward()
    exact = {name: p.grad for name, p in reference.named_parameters()}
    expected_loss = float(reference(**together).loss.detach())

    model = patch_model(copy.deepcopy(reference), strict=True)
    model.zero_grad()
    gradients, loss = trained_gradients(model, examples, tmp_path, batch_size=1, steps=2)
    assert packing_stats(model).packed_calls == 2
    assert distance(gradients, exact) <= 1e-5
    assert abs(loss - expected_loss) <= 1e-4 * expected_loss


def test_padded_t5_gives_another_gradient(tmp_path):
    """The patch fixes this. If transformers fixes it too, the test above shows nothing."""
    case = long_positions(T5)
    reference = case.build()
    examples = rows(case, [10, 1000])
    together = {key: torch.stack([e[key] for e in examples]) for key in examples[0]}
    reference(**together).loss.backward()
    exact = {name: p.grad.clone() for name, p in reference.named_parameters()}
    reference.zero_grad()
    gradients, _ = trained_gradients(reference, examples, tmp_path, batch_size=1, steps=2)
    assert distance(gradients, exact) > 0.1
