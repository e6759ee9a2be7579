"""A small random model and batches for every family and head that tokenpack packs.

The equivalence test runs `CASES`, and the table in the README is made from it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from packaging.version import Version

from tokenpack.adapters.families import FAMILIES

VOCABULARY = 97
PAD, EOS, BOS = 0, 1, 2
HEADS = 4

_DECODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "attention_dropout": 0.0,
}
_ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "decoder_start_token_id": BOS,
    "forced_eos_token_id": None,
    "scale_embedding": True,  # as published checkpoints have it
}
_T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": HEADS,
    "dropout_rate": 0.0,
    "decoder_start_token_id": PAD,
    # Shorter than the sequences, so that some distances exceed it.
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 10,
}
_MODERNBERT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "attention_dropout": 0.0,
    "local_attention": 6,
    "global_attn_every_n_layers": 2,
    "cls_token_id": BOS,
    "sep_token_id": EOS,
}
_GPT2 = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": HEADS,
    "n_positions": 64,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}


@dataclass(frozen=True)
class Case:
    """One family with one head.

    Attributes:
        family: the name in the README.
        labels: ``"seq2seq"``, ``"causal"``, ``"tokens"`` (one for each token), ``"row"`` (one for
            each row), ``"decoder_inputs"`` or ``"none"``, both without a loss.
        float32_loss: transformers computes this loss in float32 even in a float64 model.
        float64: transformers can run this model in float64.
        pools: the head reads the first column, so a batch with left padding runs padded.
    """

    family: str
    config: str
    model: str
    options: dict[str, Any] = field(default_factory=dict)
    labels: str = "causal"
    attention: str = "sdpa"
    float32_loss: bool = False
    float64: bool = True
    pools: bool = False
    since: str = "5.15"

    @property
    def kind(self) -> str:
        kind = FAMILIES[getattr(hf, self.config).model_type].kind
        return {"encoder_decoder": "encoder-decoder"}.get(kind, f"{kind}-only")

    @property
    def available(self) -> bool:
        return Version(hf.__version__) >= Version(self.since)

    def build(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> hf.PreTrainedModel:
        """The model with random weights, including norms and biases, in training mode."""
        torch.manual_seed(seed)
        config = getattr(hf, self.config)(
            **{
                "vocab_size": VOCABULARY,
                "pad_token_id": PAD,
                "eos_token_id": EOS,
                "bos_token_id": BOS,
                **self.options,
            }
        )
        config._attn_implementation = self.attention
        model = getattr(hf, self.model)(config)
        for parameter in model.parameters():
            if parameter.dim() == 1:  # all ones or zeros, which would hide errors
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
        return model.to(dtype).train()

    def batch(self, padding: str, seed: int = 0) -> dict[str, torch.Tensor]:
        """Rows of random lengths, one of them 1, with a pad id and an ignored label among them."""
        rng = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        columns, rows = rng.randint(12, 20), 5
        lengths = [columns, 1, *(rng.randint(2, columns) for _ in range(rows - 2))]
        mask = torch.zeros(rows, columns, dtype=torch.long)
        for row, length in enumerate(lengths):
            start = 0 if padding == "right" else columns - length
            mask[row, start : start + length] = 1
        ids = torch.randint(3, VOCABULARY, (rows, columns), generator=generator)
        ids = torch.where(mask.bool(), ids, PAD)
        ids[0, 5] = PAD  # a real token
        batch = {"input_ids": ids, "attention_mask": mask}
        if self.labels == "seq2seq":
            targets = torch.randint(3, VOCABULARY, (rows, 9), generator=generator)
            for row in range(rows):
                targets[row, (9, 1, *(rng.randint(1, 9) for _ in range(3)))[row] :] = -100
            targets[0, 3] = -100
            targets[0, 5] = PAD
            batch["labels"] = targets
        elif self.labels == "decoder_inputs":
            batch["decoder_input_ids"] = torch.randint(
                3, VOCABULARY, (rows, 7), generator=generator
            )
        elif self.labels == "row":
            batch["labels"] = torch.randint(0, 2, (rows,), generator=generator)
        elif self.labels in ("causal", "tokens"):
            classes = VOCABULARY if "TokenClassification" not in self.model else 2
            labels = torch.randint(0, classes, ids.shape, generator=generator)
            labels = torch.where(mask.bool(), labels, -100)
            labels[0, 3] = -100
            if self.labels == "causal" and padding == "left":
                for row, length in enumerate(lengths):
                    if length < columns:  # no real token predicts it
                        labels[row, columns - length] = -100
            batch["labels"] = labels
        return batch

    def real_positions(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The positions of real tokens in the outputs of the head or the base model."""
        if self.labels == "seq2seq":
            remaining = batch["labels"].flip(1).ne(-100).cumsum(1).flip(1)
            return remaining > 0
        if self.labels == "decoder_inputs":
            return torch.ones_like(batch["decoder_input_ids"], dtype=torch.bool)
        return batch["attention_mask"].bool()

    def __str__(self) -> str:
        return (
            self.model
            if self.family.split(",")[0] in ("T5", "BART")
            else (f"{self.family.split(',')[0]}-{self.model}")
        )


def _causal(family: str, name: str, **more: Any) -> Case:
    options = {**_DECODER, **more.pop("options", {})}
    return Case(family, f"{name}Config", f"{name}ForCausalLM", options, float32_loss=True, **more)


CASES = [
    Case("T5", "T5Config", "T5ForConditionalGeneration", _T5, "seq2seq"),
    Case(
        "Flan-T5, ByT5 (gated, untied)",
        "T5Config",
        "T5ForConditionalGeneration",
        {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        "seq2seq",
    ),
    Case("T5", "T5Config", "T5Model", _T5, "decoder_inputs"),
    Case("T5", "T5Config", "T5EncoderModel", _T5, "none"),
    Case("T5", "T5Config", "T5ForTokenClassification", _T5, "tokens"),
    Case("mT5", "MT5Config", "MT5ForConditionalGeneration", _T5, "seq2seq"),
    Case("UMT5", "UMT5Config", "UMT5ForConditionalGeneration", _T5, "seq2seq", since="5.18"),
    Case("M2M100, NLLB", "M2M100Config", "M2M100ForConditionalGeneration", _SEQ2SEQ, "seq2seq"),
    Case("BART", "BartConfig", "BartForConditionalGeneration", _SEQ2SEQ, "seq2seq"),
    Case("BART", "BartConfig", "BartModel", _SEQ2SEQ, "decoder_inputs"),
    Case("mBART", "MBartConfig", "MBartForConditionalGeneration", _SEQ2SEQ, "seq2seq"),
    Case("Marian", "MarianConfig", "MarianMTModel", _SEQ2SEQ, "seq2seq"),
    Case("Pegasus", "PegasusConfig", "PegasusForConditionalGeneration", _SEQ2SEQ, "seq2seq"),
    _causal("Llama", "Llama"),
    Case("Llama", "LlamaConfig", "LlamaModel", _DECODER, "none"),
    Case("Llama", "LlamaConfig", "LlamaForSequenceClassification", _DECODER, "row"),
    Case(
        "Llama",
        "LlamaConfig",
        "LlamaForTokenClassification",
        {**_DECODER, "classifier_dropout": 0.0},
        "tokens",
        float32_loss=True,
    ),
    _causal("Mistral", "Mistral", options={"sliding_window": 5}),
    _causal(
        "Mixtral",
        "Mixtral",
        options={"num_local_experts": 4, "sliding_window": None},
        float64=False,  # its grouped matrix product has no float64
    ),
    _causal("Qwen2", "Qwen2"),
    _causal(
        "Qwen3",
        "Qwen3",
        options={
            "head_dim": 8,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 1,
        },
    ),
    _causal(
        "Qwen3-MoE",
        "Qwen3Moe",
        options={"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        float64=False,
    ),
    _causal(
        "Gemma2",
        "Gemma2",
        options={
            "head_dim": 8,
            "sliding_window": 5,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
        attention="eager",  # transformers' SDPA has no softcap
        float64=False,  # the mask's float64 minimum is -inf in eager's float32 softmax
    ),
    Case(
        "Gemma3",
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {**_DECODER, "head_dim": 8, "sliding_window": 5},
        float32_loss=True,
    ),
    _causal("Phi3", "Phi3"),
    _causal("OLMo2", "Olmo2"),
    _causal("Granite", "Granite", options={"logits_scaling": 3.0, "attention_multiplier": 0.2}),
    _causal("Cohere", "Cohere", options={"logit_scale": 0.3}),
    Case("GPT-2", "GPT2Config", "GPT2LMHeadModel", _GPT2, float32_loss=True),
    Case("GPT-NeoX", "GPTNeoXConfig", "GPTNeoXForCausalLM", _ENCODER, float32_loss=True),
    Case("BERT", "BertConfig", "BertForMaskedLM", _ENCODER, "tokens"),
    Case("BERT", "BertConfig", "BertForSequenceClassification", _ENCODER, "row", pools=True),
    Case("BERT", "BertConfig", "BertForTokenClassification", _ENCODER, "tokens"),
    Case("RoBERTa", "RobertaConfig", "RobertaForMaskedLM", _ENCODER, "tokens"),
    Case(
        "RoBERTa", "RobertaConfig", "RobertaForSequenceClassification", _ENCODER, "row", pools=True
    ),
    Case("XLM-RoBERTa", "XLMRobertaConfig", "XLMRobertaForMaskedLM", _ENCODER, "tokens"),
    Case(
        "ModernBERT",
        "ModernBertConfig",
        "ModernBertForMaskedLM",
        _MODERNBERT,
        "tokens",
        float32_loss=True,
    ),
    Case(
        "ModernBERT",
        "ModernBertConfig",
        "ModernBertForSequenceClassification",
        _MODERNBERT,
        "row",
        pools=True,
    ),
]

BY_NAME: dict[str, Case] = {case.model: case for case in reversed(CASES)}
T5 = BY_NAME["T5ForConditionalGeneration"]
NLLB = BY_NAME["M2M100ForConditionalGeneration"]
LLAMA = BY_NAME["LlamaForCausalLM"]
BERT = BY_NAME["BertForMaskedLM"]

Build = Callable[[], hf.PreTrainedModel]


def gradient_distance(model: torch.nn.Module, reference: torch.nn.Module) -> float:
    """Largest difference between the gradients of two models, relative to the largest gradient."""
    ours = {name: p.grad for name, p in model.named_parameters()}
    theirs = {name: p.grad for name, p in reference.named_parameters()}
    assert [g is None for g in ours.values()] == [g is None for g in theirs.values()]
    pairs = [(g, theirs[name]) for name, g in ours.items() if g is not None]
    largest = max(float(g.abs().max()) for _, g in pairs)
    assert largest > 0
    return max(float((a - b).abs().max()) for a, b in pairs) / largest
