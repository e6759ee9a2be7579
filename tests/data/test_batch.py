"""Packed batches: each sequence gets its own logits, and the loss is that of the padded batch."""

import copy
import pickle

import numpy as np
import pytest
import torch
import transformers as hf
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import modeling_flash_attention_utils as flash

from tokenpack import packing_stats, patch_model
from tokenpack.data import PackedBatch, pack_result_to_tensors, pack_stream, packed_collate_fn
from tokenpack.packing import pack_lengths

LENGTHS = (5, 1, 9, 3, 12, 2, 7, 4)
CAPACITY = 16
FOUR = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [10, 11, 12]]


def llama(attention="sdpa", **options):
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=attention,
        initializer_range=0.3,  # so that a leak shows
        **options,
    )
    return hf.LlamaForCausalLM(config).eval()


def samples(seed=0):
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 97, (length,), generator=random) for length in LENGTHS]


def padded(sequences, labels=None):
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(each) for each in sequences], batch_first=True)
    return {
        "input_ids": pad(list(sequences), batch_first=True),
        "attention_mask": mask,
        "labels": pad(list(labels or sequences), batch_first=True, padding_value=-100),
    }


def by_sample(batch, values):
    """Split ``(rows, capacity, ...)`` values into ``{sample: (length, ...)}``."""
    flat = values.flatten(0, 1)
    bounds = [pair for row in enumerate_boundaries(batch) for pair in row]
    return {int(item): flat[begin:end] for item, (begin, end) in zip(batch.plan.items, bounds)}


def enumerate_boundaries(batch):
    columns = batch.input_ids.shape[1]
    return [(pairs + row * columns).tolist() for row, pairs in enumerate(batch.boundaries)]


def largest_error(batch, logits, model, sequences):
    found = by_sample(batch, logits)
    assert sorted(found) == [*range(len(sequences))]
    with torch.no_grad():
        separate = [model(each[None], use_cache=False).logits[0] for each in sequences]
    return max(float((found[at] - separate[at]).abs().max()) for at in found)


# --------------------------------------------------------------------------- isolation and the loss


@pytest.mark.parametrize("stream", [False, True], ids=["rows", "stream"])
@pytest.mark.parametrize("patched", [False, True], ids=["unpatched", "patched"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("strategy", ["obfdp", "nf"])
def test_each_sequence_has_its_own_logits_and_the_loss_is_the_padded_one(
    strategy, attention, patched, stream
):
    reference, sequences = llama(attention), samples()
    model = copy.deepcopy(reference)
    if patched:
        patch_model(model, strict=True)
    batch = packed_collate_fn(CAPACITY, strategy, stream=stream)(sequences)
    assert (batch.attention_mask == 0).any() != stream
    with torch.no_grad():
        out, expected = model(**batch), reference(**padded(sequences))
    assert out.logits.isfinite().all()
    assert out.logits.shape[:2] == batch.input_ids.shape
    assert largest_error(batch, out.logits, reference, sequences) <= 1e-5
    assert abs(out.loss - expected.loss) <= 1e-6
    assert PackedBatch.isolated_by(model)
    if patched:
        stats = packing_stats(model)
        assert not stats.fallbacks
        assert stats.packed_calls == 3  # isolated_by makes two
        assert stats.packed_tokens == sum(LENGTHS) + 2 * 13


@pytest.mark.parametrize("patched", [False, True], ids=["unpatched", "patched"])
def test_gradients_are_those_of_the_padded_batch(patched):
    reference, sequences = llama().double().train(), samples()
    model = copy.deepcopy(reference)
    if patched:
        patch_model(model, strict=True)
    model(**packed_collate_fn(CAPACITY)(sequences)).loss.backward()
    reference(**padded(sequences)).loss.backward()
    pairs = [
        (one.grad, other.grad) for one, other in zip(model.parameters(), reference.parameters())
    ]
    largest = max(other.abs().max() for _, other in pairs)
    # Stock models compute the loss in float32.
    assert all((one - other).abs().max() <= 1e-6 * largest for one, other in pairs)


def test_samples_with_their_own_labels_give_the_padded_loss():
    sequences = samples()
    labels = [each.where(each % 3 > 0, -100) for each in sequences]
    rows = [{"input_ids": ids, "labels": own} for ids, own in zip(sequences, labels)]
    expected = llama()(**padded(sequences, labels)).loss
    batch = packed_collate_fn(CAPACITY)(rows)
    assert abs(llama()(**batch).loss - expected) <= 1e-6
    assert abs(patch_model(llama())(**batch).loss - expected) <= 1e-6


@pytest.mark.parametrize("stream", [False, True], ids=["rows", "stream"])
def test_shifted_labels_are_for_a_loss_that_does_not_shift(stream):
    sequences, model = samples(), llama()
    batch = packed_collate_fn(CAPACITY, labels_shifted=True, stream=stream)(sequences)
    assert "labels" not in batch  # a model would shift them again
    with torch.no_grad():
        out, expected = model(**batch), model(**padded(sequences)).loss
    assert "loss" not in out
    loss = cross_entropy(out.logits.flatten(0, 1), batch.labels.flatten())
    assert abs(loss - expected) <= 1e-6
    moved = batch.to("meta")
    assert moved.labels.is_meta
    assert "labels" not in moved


def reference_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, **options):
    """Compute what flash attention computes, with checks that its kernels do not make."""
    assert cu_seqlens_q[-1] == len(q)
    assert options["max_seqlen_q"] >= cu_seqlens_q.diff().max() > 0
    assert options["causal"]
    out = []
    for begin, end in zip(cu_seqlens_q.tolist(), cu_seqlens_q[1:].tolist()):
        parts = (each[begin:end].transpose(0, 1) for each in (q, k, v))
        attend = torch.nn.functional.scaled_dot_product_attention
        out.append(attend(*parts, is_causal=True, enable_gqa=True).transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("stream", [False, True], ids=["rows", "stream"])
def test_flash_attention_gets_the_boundaries(stream, monkeypatch):
    """The kernels need a GPU, but the arguments that transformers passes to them do not."""

    def no_boundaries(*args, **kwargs):
        raise AssertionError("flash attention was called without boundaries")

    def process(**given):
        return {"causal": given["is_causal"], "max_seqlen_q": given["max_seqlen_q"]}

    def functions(implementation):
        calls = (no_boundaries, reference_varlen, None, None, None)
        if "process_paged_kwargs_fn" in flash._flash_attention_forward.__code__.co_varnames:
            return calls, (process, None)
        return calls, process  # older releases

    sequences, model = samples(), llama()
    reference = copy.deepcopy(model)
    monkeypatch.setattr(flash, "lazy_import_flash_attention", functions)
    model.config._attn_implementation = "flash_attention_2"
    batch = packed_collate_fn(CAPACITY, stream=stream)(sequences)
    with torch.no_grad():
        out = model(**batch)
    assert largest_error(batch, out.logits, reference, sequences) <= 1e-5


@pytest.mark.parametrize("change", [{"use_cache": True}, {"attention_mask": None}])
def test_a_cache_or_a_mask_would_leak_between_sequences(change):
    """This is why the batch passes neither, and it shows that these tests detect a leak."""
    sequences, model = samples(), llama()
    batch = packed_collate_fn(CAPACITY)(sequences)
    change = {
        name: batch.attention_mask if value is None else value for name, value in change.items()
    }
    with torch.no_grad():
        out = model(**{**batch, **change})
    assert largest_error(batch, out.logits, model, sequences) > 1e-2


def test_isolated_by_finds_models_that_mix_sequences():
    options = {
        "vocab_size": 97,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    bert = hf.BertForMaskedLM(
        hf.BertConfig(**options, intermediate_size=48, initializer_range=0.3)
    ).train()
    assert not PackedBatch.isolated_by(bert)
    assert bert.training
    assert PackedBatch.isolated_by(patch_model(bert))
    masked = llama()
    forward = masked.forward
    masked.forward = lambda input_ids, **given: forward(input_ids, torch.ones_like(input_ids))
    assert not PackedBatch.isolated_by(masked)
    assert PackedBatch.isolated_by(llama().bfloat16())
    assert PackedBatch.isolated_by(llama().model)


# ------------------------------------------------------------------------------- fields and methods


@pytest.fixture
def batch():
    return packed_collate_fn(8, "nf")(FOUR)


def test_fields(batch):
    lists = {name: value.tolist() for name, value in batch.items() if torch.is_tensor(value)}
    pieces = [0, 3, 5, 8, 12, 15, 16]  # includes the padding
    assert lists == {
        "input_ids": [[1, 2, 3, 4, 5, 0, 0, 0], [6, 7, 8, 9, 10, 11, 12, 0]],
        "labels": [
            [-100, 2, 3, -100, 5, -100, -100, -100],
            [-100, 7, 8, 9, -100, 11, 12, -100],
        ],
        "position_ids": [[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 2, 3, 0, 1, 2, 0]],
        "cu_seqlens": [0, 3, 5, 9, 12],
        "cu_seqlens_padded": [0, 3, 8, 12, 16],
        "cu_seq_lens_q": pieces,
        "cu_seq_lens_k": pieces,
    }
    others = {name: value for name, value in batch.items() if not torch.is_tensor(value)}
    assert others == {"max_seqlen": 4, "use_cache": False, "max_length_q": 4, "max_length_k": 4}
    for name in ("input_ids", "labels", "position_ids"):
        assert batch[name].dtype == torch.int64
        assert getattr(batch, name) is batch[name]
    for name in ("cu_seqlens", "cu_seqlens_padded", "cu_seq_lens_q"):
        assert batch[name].dtype == torch.int32
    assert batch.attention_mask.tolist() == [[1] * 5 + [0] * 3, [1] * 7 + [0]]
    assert [pairs.tolist() for pairs in batch.boundaries] == [[[0, 3], [3, 5]], [[0, 4], [4, 7]]]
    assert batch.plan.items.tolist() == [0, 1, 2, 3]


def test_the_stream_equals_the_rows_without_padding(batch):
    made = packed_collate_fn(8, "nf", stream=True)(FOUR)
    for stream in (batch.stream, made, made.stream):
        lists = {n: v.tolist() if torch.is_tensor(v) else v for n, v in stream.items()}
        assert lists == {
            "input_ids": [[*range(1, 13)]],
            "labels": [[-100, 2, 3, -100, 5, -100, 7, 8, 9, -100, 11, 12]],
            "position_ids": [[0, 1, 2, 0, 1, 0, 1, 2, 3, 0, 1, 2]],
            "cu_seqlens": [0, 3, 5, 9, 12],
            "max_seqlen": 4,
            "use_cache": False,
            "cu_seq_lens_q": [0, 3, 5, 9, 12],
            "cu_seq_lens_k": [0, 3, 5, 9, 12],
            "max_length_q": 4,
            "max_length_k": 4,
        }
        assert stream.attention_mask.tolist() == [[1] * 12]
        assert stream.boundaries[0].tolist() == [[0, 3], [3, 5], [5, 9], [9, 12]]
        assert stream.plan == batch.plan
    shifted = packed_collate_fn(8, "nf", labels_shifted=True)(FOUR)
    assert shifted.stream.labels.tolist() == [[2, 3, -100, 5, -100, 7, 8, 9, -100, 11, 12, -100]]


def test_setting_an_attribute_sets_the_field(batch):
    batch.labels = batch.input_ids
    assert batch["labels"] is batch.input_ids
    assert batch.pop("labels") is batch.input_ids
    with pytest.raises(
        AttributeError, match="PackedBatch has no 'labels'; its fields are input_ids"
    ):
        _ = batch.labels
    assert not hasattr(batch, "logits")


def test_batches_can_be_moved_copied_and_pickled(batch, monkeypatch):
    moved = batch.to("meta", non_blocking=True)
    assert isinstance(moved, PackedBatch)
    assert all(value.is_meta for value in moved.values() if torch.is_tensor(value))
    assert moved.max_seqlen == 4
    assert moved.plan is batch.plan
    assert moved.cu_seq_lens_q is moved.cu_seq_lens_k  # one copy
    assert not batch.input_ids.is_meta

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.to("meta"))
    pinned = batch.pin_memory()
    assert isinstance(pinned, PackedBatch)
    assert all(value.is_meta for value in pinned.values() if torch.is_tensor(value))

    for other in (pickle.loads(pickle.dumps(batch)), copy.copy(batch), copy.deepcopy(batch)):
        assert isinstance(other, PackedBatch)
        assert other.keys() == batch.keys()
        assert other.input_ids.equal(batch.input_ids)
        assert other.plan == batch.plan
    rebuilt = PackedBatch(dict(batch))  # as Trainer does with any mapping
    assert rebuilt.attention_mask.equal(batch.attention_mask)


def test_dataloader_workers_can_collate():
    collate = packed_collate_fn(CAPACITY, "ffs", seed=3)
    again = pickle.loads(pickle.dumps(collate))
    assert again(samples()).input_ids.equal(collate(samples()).input_ids)
    loader = DataLoader(samples() * 2, batch_size=8, collate_fn=collate, num_workers=1)
    batches = list(loader)
    assert len(batches) == 2
    assert all(each.input_ids.equal(collate(samples()).input_ids) for each in batches)
    assert isinstance(batches[0], PackedBatch)


def test_trainer_has_the_same_losses_on_packed_and_padded_batches(tmp_path):
    pytest.importorskip("accelerate")
    sequences = [{"input_ids": each.tolist(), "labels": each.tolist()} for each in samples()]

    def losses(model, collate):
        arguments = hf.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            max_steps=3,
            logging_steps=1,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = hf.Trainer(model, arguments, train_dataset=sequences, data_collator=collate)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    def pad(rows):
        return padded([torch.tensor(row["input_ids"]) for row in rows])

    expected = losses(llama(), pad)
    assert len(expected) == 3
    for patch in (lambda model: model, patch_model):
        found = losses(patch(llama()), packed_collate_fn(CAPACITY))
        assert found == pytest.approx(expected, abs=2e-4)  # logged with four digits


# -------------------------------------------------------------------------------- samples and plans


@pytest.mark.parametrize(
    "hold",
    [
        list,
        lambda s: [torch.tensor(each) for each in s],
        lambda s: [np.array(each, np.int32) for each in s],
        lambda s: [{"input_ids": each} for each in s],
        lambda s: [{"input_ids": torch.tensor(each), "labels": each} for each in s],
        lambda s: [{"input_ids": each, "attention_mask": [1] * len(each)} for each in s],
        lambda s: [hf.BatchEncoding({"input_ids": each, "other": None}) for each in s],
        lambda s: [
            {
                "input_ids": [99, *each, 99],
                "labels": [99, *each, 99],
                "attention_mask": [0] + [1] * len(each) + [0],
            }
            for each in s
        ],
        lambda s: [
            {"input_ids": [99, *each], "attention_mask": torch.arange(len(each) + 1) > 0}
            for each in s
        ],
    ],
)
def test_samples_of_every_kind(batch, hold):
    other = packed_collate_fn(8, "nf")(hold(FOUR))
    for name, value in batch.items():
        assert torch.equal(value, other[name]) if torch.is_tensor(value) else value == other[name]


def test_a_plan_becomes_tensors(batch):
    plan = pack_lengths([3, 2, 4, 3], 8, "nf")
    made = pack_result_to_tensors(plan, FOUR)
    assert made.input_ids.equal(batch.input_ids)
    assert made.labels.equal(batch.labels)
    others = [[i + 20 for i in each] for each in FOUR]
    made = pack_result_to_tensors(
        plan, FOUR, others, padding_value=77, label_padding_value=-1, device="cpu"
    )
    assert made.input_ids.tolist() == [[1, 2, 3, 4, 5, 77, 77, 77], [6, 7, 8, 9, 10, 11, 12, 77]]
    assert made.labels.tolist() == [
        [-1, 22, 23, -1, 25, -1, -1, -1],
        [-1, 27, 28, 29, -1, 31, 32, -1],
    ]
    assert pack_result_to_tensors(plan, FOUR, device="meta").cu_seqlens.is_meta
    shifted = pack_result_to_tensors(plan, FOUR, labels_shifted=True)
    assert shifted.labels.tolist() == [
        [2, 3, -100, 5, -100, -100, -100, -100],
        [7, 8, 9, -100, 11, 12, -100, -100],
    ]


@pytest.mark.parametrize("overlong", ["truncate", "split", "drop"])
def test_overlong_samples(overlong):
    made = packed_collate_fn(3, "nf", overlong=overlong)(FOUR)
    rows = {
        "truncate": [[1, 2, 3], [4, 5, 0], [6, 7, 8], [10, 11, 12]],
        "split": [[1, 2, 3], [4, 5, 0], [6, 7, 8], [9, 0, 0], [10, 11, 12]],
        "drop": [[1, 2, 3], [4, 5, 0], [10, 11, 12]],
    }[overlong]
    assert made.input_ids.tolist() == rows
    counted = {"truncate": "truncated", "split": "split", "drop": "dropped"}[overlong]
    assert getattr(made.plan, counted).tolist() == [2]
    assert made.labels[:, 0].tolist() == [-100] * len(rows)
    stream = packed_collate_fn(3, "nf", overlong=overlong, stream=True)(FOUR)
    assert stream.input_ids[0].tolist() == [token for row in rows for token in row if token]
    assert stream.labels.equal(made.stream.labels)


def test_dropped_sequences_may_be_empty():
    plan = pack_lengths([2, 0, 1], 4, drop_empty=True)
    assert sorted(pack_result_to_tensors(plan, [[1, 2], [], [3]]).input_ids[0].tolist()) == [
        0,
        1,
        2,
        3,
    ]


def ids(*sequences):
    return [{"input_ids": each} for each in sequences]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([], TypeError, r"samples must be a list of at least one sample, got \[\]"),
        ("text", TypeError, "samples must be a list of at least one sample, got 'text'"),
        ([[1], []], ValueError, r"samples\[1\] must hold at least one token"),
        ([[1], [2.5]], TypeError, r"samples\[1\]\[0\] must be an integer"),
        ([[1], [2] * 9], ValueError, r"samples\[1\] must be at most capacity = 8 tokens, got 9"),
        ([*ids([1]), [2]], TypeError, r"mapping at samples\[0\] and a list at samples\[1\]"),
        (ids([1], []), ValueError, r"input_ids of samples\[1\] must hold at least one token"),
        (ids([1] * 9), ValueError, r"input_ids of samples\[0\] must be at most capacity = 8"),
        (
            [*ids([1]), {"ids": [1]}],
            ValueError,
            r"samples\[1\] must have 'input_ids', got only 'ids'",
        ),
        (
            [{"input_ids": [1], "labels": [1]}, *ids([2])],
            ValueError,
            r"samples\[1\] must have 'labels', got only 'input_ids'; .* in every sample or in none",
        ),
        (
            [{"input_ids": [1, 2], "labels": [1]}],
            ValueError,
            r"labels of samples\[0\] must be as long as input_ids of samples\[0\], 2 tokens, got 1",
        ),
        (
            [{"input_ids": [1, 2], "attention_mask": [1]}],
            ValueError,
            r"attention_mask of samples\[0\] must be as long as",
        ),
        (
            [{"input_ids": [1], "attention_mask": [1]}, {"input_ids": [1], "attention_mask": [2]}],
            ValueError,
            r"attention_mask of samples\[1\] must contain only 0 and 1, got 2",
        ),
        (
            [{"input_ids": [1], "attention_mask": [1]}, {"input_ids": [1], "attention_mask": [0]}],
            ValueError,
            r"attention_mask of samples\[1\] must be 1 at one token or more, got 0",
        ),
    ],
)
def test_bad_samples_are_named(given, error, message):
    with pytest.raises(error, match=message):
        packed_collate_fn(8)(given)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"capacity": 0}, ValueError, "capacity must be from 1"),
        ({"capacity": 8.0}, TypeError, "capacity must be an integer"),
        ({"strategy": "best"}, ValueError, "strategy must be auto or one of"),
        ({"padding_value": None}, TypeError, "padding_value must be an integer, got None"),
        ({"label_padding_value": 1.0}, TypeError, "label_padding_value must be an integer"),
        ({"max_sequences": 0}, ValueError, "max_sequences must be"),
    ],
)
def test_bad_options_are_named_before_the_first_batch(options, error, message):
    with pytest.raises(error, match=message):
        packed_collate_fn(**{"capacity": 8, **options})


def test_plans_and_labels_must_match_the_ids():
    plan = pack_lengths([3, 2, 4, 3], 8)
    with pytest.raises(ValueError, match="token_ids must hold the 4 sequences that were planned"):
        pack_result_to_tensors(plan, FOUR[:3])
    with pytest.raises(ValueError, match=r"token_ids\[1\] must be of the planned length, 2 tokens"):
        pack_result_to_tensors(plan, [FOUR[0], [1], *FOUR[2:]])
    with pytest.raises(ValueError, match=r"labels\[3\] must be as long as token_ids\[3\]"):
        pack_result_to_tensors(plan, FOUR, [*FOUR[:3], [1]])
    with pytest.raises(ValueError, match=r"at most 2\*\*31 - 1 slots"):
        pack_result_to_tensors(pack_lengths([1] * 2, 2**30, max_sequences=1), [[1], [2]])


def test_packed_rows_are_not_samples():
    rows = [
        {"input_ids": [1, 2], "seq_lengths": [2]},
        {"input_ids": [3, 4, 5], "seq_lengths": np.array([1, 2])},
    ]
    assert packed_collate_fn(8)(rows[:1]).input_ids[0, :2].tolist() == [1, 2]
    for pack in (packed_collate_fn(8), lambda rows: list(pack_stream(rows, 8))):
        with pytest.raises(ValueError, match="must be one sequence, got a packed row of 2"):
            pack(rows)
