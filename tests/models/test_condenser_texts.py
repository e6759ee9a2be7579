"""The condenser on texts: condense, generate, tokenizers that belong, and the evaluation."""

import copy

import pytest
import torch

from tokenpack.data.tokenizers import train_tokenizer
from tokenpack.models.condenser import Condenser
from tokenpack.models.condenser.evaluation import evaluate_condenser, untrained
from tokenpack.models.condenser.texts import left_padded

from .condensers import causal_model, make_condenser, make_documents

SENTENCE = "the condenser reads a long context and writes few vectors for one frozen decoder"
CONTEXTS = [SENTENCE, "a long context", "vectors for one frozen decoder reads"]
PROMPTS = ["reads", "", "the long frozen"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(
        [SENTENCE] * 9, 300, special_tokens=["[PAD]", "[EOS]", "[BOS]"], min_frequency=1
    )


def text_condenser(family, tokenizer, **options):
    """A condenser whose models have embeddings for all of the tokenizer's ids."""
    torch.manual_seed(0)
    models = [causal_model(family, seed=seed) for seed in (0, 1)]
    for model in models:
        model.resize_token_embeddings(len(tokenizer))
        model.config.max_position_embeddings = 256
    return Condenser.from_models(
        *models,
        lora={"r": 2},
        condenser_tokenizer=tokenizer,
        decoder_tokenizer=tokenizer,
        **{"ratios": [4], **options},
    )


def test_condense_gives_ceil_n_over_ratio_vectors(tokenizer):
    model = text_condenser("Llama", tokenizer, ratios=[4, 8]).train()
    lengths = [len(tokenizer(text)["input_ids"]) for text in CONTEXTS]
    for ratio in (None, 3):
        found = model.condense(CONTEXTS, ratio=ratio)
        assert [each.shape for each in found] == [(-(-n // (ratio or 4)), 32) for n in lengths]
        split = model.condense(CONTEXTS, ratio=ratio, max_tokens=1)  # one call for each text
        for one, other in zip(found, split):
            torch.testing.assert_close(one, other)
            assert not one.requires_grad
    assert model.training
    with pytest.raises(ValueError, match="context must have at least one token, got context 1"):
        model.condense(["a", ""])
    with pytest.raises(TypeError, match="texts must be a list of texts"):
        model.condense("a")
    fixed = text_condenser("Llama", tokenizer, ratios=None, num_condense_tokens=2)
    with pytest.raises(ValueError, match="ratio must be None for a condenser with num_condense"):
        fixed.condense(["a"], ratio=4)


@pytest.mark.parametrize("family", ["Llama", "ours"])
def test_generate_for_a_mix_of_lengths_is_one_at_a_time(family, tokenizer):
    model = text_condenser(family, tokenizer)
    options = {"max_new_tokens": 6, "do_sample": False, "skip_special_tokens": False}
    together = model.generate(CONTEXTS, PROMPTS, **options)
    alone = [model.generate([c], [p], **options)[0] for c, p in zip(CONTEXTS, PROMPTS)]
    padding = tokenizer.eos_token
    assert [text.rstrip(padding) for text in together] == [text.rstrip(padding) for text in alone]
    assert model.generate([], []) == []
    with pytest.raises(ValueError, match="prompts must be as many as contexts, 3, got 2"):
        model.generate(CONTEXTS, PROMPTS[:2])


def test_rows_padded_on_the_left():
    stream = torch.arange(1.0, 11.0)[:, None]
    rows, mask = left_padded(stream, [3, 5, 2])
    assert mask.tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 1, 1]]
    assert rows[mask.bool()].flatten().tolist() == list(range(1, 11))


def test_tokenizers_that_do_not_belong_are_named(tokenizer):
    model = make_condenser()
    with pytest.raises(ValueError, match=r"tokenizer of the decoder must belong .* 97 embeddings"):
        model.set_tokenizers(decoder=tokenizer)
    fitting = text_condenser("Llama", tokenizer)
    other = copy.deepcopy(tokenizer)
    other.eos_token = "[PAD]"
    with pytest.raises(ValueError, match=r"whose eos_token_id is \[1\], got one with 0"):
        fitting.set_tokenizers(decoder=other)
    with pytest.raises(ValueError, match="tokenizer of the condenser must be set with set_token"):
        model.condense(["a"])


def test_the_untrained_condenser_leaves_the_trained_one_as_it_was():
    model = make_condenser(separate_segments=True, num_completion_flags=1).eval()
    before = copy.deepcopy(model.state_dict())
    ids, lengths = torch.arange(3, 33), torch.tensor([30]).numpy()
    trained = model.vectors(ids, lengths)[0]
    state = torch.get_rng_state()
    with untrained(model, seed=2):
        first = model.vectors(ids, lengths)[0].detach()
    assert torch.get_rng_state().equal(state)
    with untrained(model, seed=2):
        assert model.vectors(ids, lengths)[0].equal(first)
    assert not first.equal(trained)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert model.vectors(ids, lengths)[0].equal(trained)


def test_arms_of_the_evaluation_are_their_definitions():
    model = make_condenser(num_condense_tokens=None, ratios=[4]).eval()
    rows = make_documents()
    result = evaluate_condenser(model, rows, [4])
    (entry,) = result.ratios
    decoder = model.decoder

    def nll(row, raw):
        ids = [2, *raw, *row["prompt_ids"], *row["completion_ids"]]
        logits = decoder(torch.tensor([ids]), use_cache=False).logits[0]
        count = len(row["completion_ids"])
        wanted = torch.tensor(row["completion_ids"])
        losses = torch.nn.functional.cross_entropy(logits[-count - 1 : -1], wanted, reduction="sum")
        return losses.item()

    counts = [-(-len(row["context_ids"]) // 4) for row in rows]
    raw = {
        "none": [[] for _ in rows],
        "full": [row["reference_ids"] for row in rows],
        "last_k": [row["reference_ids"][-k:] for row, k in zip(rows, counts)],
    }
    for name, contexts in raw.items():
        expected = sum(map(nll, rows, contexts)) / 20
        assert entry.nll[name] == pytest.approx(expected, rel=1e-5)
    assert entry.vectors == pytest.approx(sum(counts) / 3)
    assert result.targets == 20
    gain = entry.nll["none"] - entry.nll["full"]
    if gain > 0:
        expected = (entry.nll["none"] - entry.nll["condensed"]) / gain
        assert entry.recovered == pytest.approx(expected)
    else:
        assert entry.recovered != entry.recovered
    assert entry.teacher_forced is None
    # Llama: 3 layers, keys and values, 2 heads of width 8, float32; BOS, vectors and prompt.
    tokens = 1 + counts[0] + len(rows[0]["prompt_ids"])
    assert entry.cache_bytes == 3 * 2 * 2 * 8 * 4 * tokens
    with pytest.raises(ValueError, match="rows must hold at least two documents"):
        evaluate_condenser(model, rows[:1], [4])
