"""Small condensers of several families, documents, and batches for the tests."""

from __future__ import annotations

import numpy as np
import torch

from tokenpack.models.condenser import Condenser, CondenserConfig
from tokenpack.models.decoder import DecoderConfig, DecoderForCausalLM

from ..adapters.models import BY_NAME, VOCABULARY

FAMILIES = ("Llama", "Qwen3", "Gemma2", "ours")
LENGTHS = {"context": (30, 7, 18), "prompt": (2, 3, 5), "completion": (10, 4, 6)}


def causal_model(family, dtype=torch.float32, seed=0):
    """A small causal model of a family, with random weights."""
    if family == "ours":
        torch.manual_seed(seed)
        config = DecoderConfig(
            vocab_size=VOCABULARY, dim=32, n_layers=2, n_heads=4, attn="gqa", n_kv_heads=2,
            max_seq=64, bos_token_id=2, eos_token_id=1, pad_token_id=0,
        )  # fmt: skip
        return DecoderForCausalLM(config).to(dtype)
    return BY_NAME[f"{family}ForCausalLM"].build(dtype, seed)


def make_condenser(family="Llama", dtype=torch.float32, decoder=None, lora=None, **options):
    """A condenser of one family with a decoder of the same or another family."""
    torch.manual_seed(3)
    model = Condenser.from_models(
        causal_model(family, dtype),
        causal_model(decoder or family, dtype, seed=1),
        CondenserConfig(**{"num_condense_tokens": 4, **options}),
        lora={"r": 4, "init_lora_weights": False, **(lora or {})},
    )
    return model.to(dtype).train()


def make_documents(seed=0, lengths=LENGTHS, text=()):
    """Documents of random ids, with the lengths of the issue."""
    rng = np.random.default_rng(seed)
    documents = []
    for at, sizes in enumerate(zip(*lengths.values())):
        context, prompt, completion = (rng.integers(3, VOCABULARY, n).tolist() for n in sizes)
        reference = rng.integers(3, VOCABULARY, sizes[0] - 1).tolist()
        documents.append(
            {
                "context_ids": context,
                "reference_ids": reference,
                "prompt_ids": prompt,
                "completion_ids": completion,
                "is_text": at in text,
            }
        )
    return documents


def make_batch(documents, ratios=None):
    """The arguments of `Condenser.forward`, made by hand."""

    def packed(rows):
        ends = np.cumsum([0, *map(len, rows)])
        flat = [token for row in rows for token in row]
        return torch.tensor([flat]), torch.tensor(ends, dtype=torch.int32)

    ids, bounds = packed([each["context_ids"] for each in documents])
    after = [each["prompt_ids"] + each["completion_ids"] for each in documents]
    decoder_ids, decoder_bounds = packed(after)
    labels = [[-100] * len(each["prompt_ids"]) + list(each["completion_ids"]) for each in documents]
    reference_ids, reference_bounds = packed([each["reference_ids"] for each in documents])
    batch = {
        "input_ids": ids,
        "cu_seqlens": bounds,
        "decoder_input_ids": decoder_ids,
        "decoder_cu_seqlens": decoder_bounds,
        "labels": packed(labels)[0],
        "reference_ids": reference_ids,
        "reference_cu_seqlens": reference_bounds,
        "is_text": torch.tensor([each["is_text"] for each in documents]),
    }
    if ratios is not None:
        batch["ratios"] = torch.tensor(ratios)
    return batch
