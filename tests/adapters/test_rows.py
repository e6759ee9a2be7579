"""Packed rows on a patched model give the same results as separate sequences."""

import copy

import pytest
import torch

from tokenpack import packing_stats, patch_model

from .models import BY_NAME, CASES, LLAMA, T5

LENGTHS = [[5, 1, 4], [9], [2, 6]]
COLUMNS = 12
CAUSAL = [case for case in CASES if case.labels == "causal" and case.available]


def packed_rows(seed=0, *, first_labels=-100):
    """``(batch, sequences)``: the rows of `LENGTHS`, and the ids of each sequence."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 97, (len(LENGTHS), COLUMNS), generator=random)
    labels, positions = torch.full_like(ids, -100), torch.zeros_like(ids)
    sequences, starts = [], []
    for row, lengths in enumerate(LENGTHS):
        column = 0
        for length in lengths:
            here = slice(column, column + length)
            sequences.append(ids[row, here])
            starts.append(row * COLUMNS + column)
            labels[row, here] = ids[row, here]
            if first_labels is not None:
                labels[row, column] = first_labels
            positions[row, here] = torch.arange(length)
            column += length
    lengths = torch.tensor([0, *map(len, sequences)])
    batch = {
        "input_ids": ids,
        "labels": labels,
        "position_ids": positions,
        "cu_seqlens": lengths.cumsum(0).int(),
        "cu_seqlens_padded": torch.tensor([*starts, ids.numel()]).int(),
        "max_seqlen": int(lengths.max()),
    }
    return batch, sequences


def padded(sequences):
    width = max(map(len, sequences))
    rows = [torch.nn.functional.pad(each, (0, width - len(each)), value=-100) for each in sequences]
    labels = torch.stack(rows)
    return {
        "input_ids": labels.clamp(min=0),
        "attention_mask": (labels >= 0).long(),
        "labels": labels,
    }


@pytest.mark.parametrize("case", CAUSAL, ids=lambda case: case.config)
def test_loss_logits_and_gradients_equal_separate_sequences(case):
    dtype = torch.float64 if case.float64 else torch.float32
    reference = case.build(dtype)
    model = patch_model(copy.deepcopy(reference), strict=True, logits="always")
    batch, sequences = packed_rows()
    ours, theirs = model(**batch), reference(**padded(sequences))
    loss_error = 1e-6 if case.float32_loss or not case.float64 else 1e-12
    assert abs(ours.loss - theirs.loss) <= loss_error * abs(theirs.loss)
    assert packing_stats(model).packed_tokens == sum(map(len, sequences))
    assert packing_stats(model).padded_tokens == batch["input_ids"].numel()
    assert ours.logits.shape[:2] == batch["input_ids"].shape
    flat = ours.logits.flatten(0, 1)
    starts = batch["cu_seqlens_padded"].tolist()
    real = torch.zeros(len(flat), dtype=torch.bool)
    for start, sequence, row in zip(starts, sequences, theirs.logits):
        here = slice(start, start + len(sequence))
        real[here] = True
        assert (flat[here] - row[: len(sequence)]).abs().max() <= 1e-5 * max(1, row.abs().max())
    assert not flat[~real].any()

    ours.loss.backward()
    theirs.loss.backward()
    pairs = list(zip(model.parameters(), reference.parameters()))
    largest = max(other.grad.abs().max() for _, other in pairs if other.grad is not None)
    for one, other in pairs:
        if other.grad is not None:
            assert (one.grad - other.grad).abs().max() <= 1e-5 * largest


def test_labels_of_first_tokens_are_ignored():
    """No token predicts the first token of the next sequence."""
    model = patch_model(LLAMA.build(), strict=True)
    masked, _ = packed_rows()
    left_in, _ = packed_rows(first_labels=None)
    assert model(**left_in).loss.equal(model(**masked).loss)


def test_embeddings_in_rows():
    model = patch_model(LLAMA.build().eval(), strict=True)
    batch, _ = packed_rows()
    with_ids = model(**batch)
    batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids"))
    assert model(**batch).logits.equal(with_ids.logits)


def test_boundaries_for_flash_attention_are_ignored():
    model = patch_model(LLAMA.build().eval(), strict=True)
    batch, _ = packed_rows()
    pieces = {"cu_seq_lens_q": 1, "cu_seq_lens_k": 1, "max_length_q": 1, "max_length_k": 1}
    expected = model(**batch)
    assert model(**batch, **pieces).logits.equal(expected.logits)
    stream = {"input_ids": batch["input_ids"][:1], "cu_seqlens": torch.tensor([0, 4, COLUMNS])}
    expected = model(**stream, use_cache=False)
    assert model(**stream, **pieces, use_cache=False).logits.equal(expected.logits)


WRONG = {
    "cu_seqlens and cu_seqlens_padded must both be .num_seqs . 1,.": {
        "cu_seqlens_padded": torch.tensor([0, 36])
    },
    "sequence 0 with 5 tokens from slot 0, and slot 4 of 36 after it": {
        "cu_seqlens_padded": torch.tensor([0, 4, 6, 12, 24, 26, 36])
    },
    "in one row of 12, got sequence 3 with 9 tokens from slot 16": {
        "cu_seqlens_padded": torch.tensor([0, 5, 6, 16, 25, 27, 36])
    },
    "sequence 5 with 6 tokens from slot 31": {
        "cu_seqlens_padded": torch.tensor([0, 5, 6, 12, 24, 31, 40])
    },
    "sequence 0 with 5 tokens from slot -1": {
        "cu_seqlens_padded": torch.tensor([-1, 5, 6, 12, 24, 26, 36])
    },
    "cu_seqlens must start at 0": {"cu_seqlens": torch.tensor([1, 6, 7, 11, 20, 22, 28])},
    "labels must begin with the rows and columns of input_ids": {
        "labels": torch.zeros(3, 11, dtype=torch.int64)
    },
    "input_ids must be .rows, columns. and not empty": {
        "input_ids": torch.zeros(3, 0, dtype=torch.int64)
    },
    "cannot pack this call: output_attentions": {"output_attentions": True},
}


@pytest.mark.parametrize("message", WRONG)
def test_contradictions_are_errors(message):
    model = patch_model(LLAMA.build())
    batch, _ = packed_rows()
    with pytest.raises(ValueError, match=message):
        model(**{**batch, **WRONG[message]})


def test_packed_rows_need_a_causal_model():
    batch, _ = packed_rows()
    with pytest.raises(ValueError, match="as many sequences as input_ids, 6, got 1"):
        patch_model(T5.build())(**batch)
    head = next(case for case in CASES if case.model == "LlamaForSequenceClassification")
    assert head in BY_NAME.values()
    with pytest.raises(ValueError, match="the head reads padded rows"):
        patch_model(head.build())(**{k: v for k, v in batch.items() if k != "labels"})
