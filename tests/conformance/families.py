"""A tiny model of every class of every supported family in the installed transformers.

The classes are read from transformers, so a new class cannot be forgotten: it becomes a case, or
a test fails until it has a reason here.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
import transformers as hf
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tokenpack.adapters.families import FAMILIES, find_family

VOCABULARY = 40
WIDTH = 16
PAD, EOS, BOS = 0, 1, 2
NUM_LABELS = 3

# Classes that are not built alone, with the reason.
NOT_BUILT = {
    "PretrainedBartModel": "another name of BartPreTrainedModel",
    "BartPretrainedModel": "another name of BartPreTrainedModel",
    "Gemma3Model": "reads images too, and has the unsupported family 'gemma3'",
    "Gemma3ForConditionalGeneration": "reads images too, and has the unsupported family 'gemma3'",
    "Gemma3ForSequenceClassification": "reads images too, and has the unsupported family 'gemma3'",
}

_DECODER = {
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "attention_dropout": 0.0,
    "classifier_dropout": 0.0,
}
_ENCODER = {
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.0,
    "hidden_dropout": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "attention_dropout": 0.0,
    "classifier_dropout": 0.0,
}
_SEQ2SEQ = {
    "d_model": WIDTH,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "classifier_dropout": 0.0,
    "decoder_start_token_id": BOS,
    "forced_eos_token_id": None,
    "scale_embedding": True,
}
_T5 = {
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 1,
    "num_heads": 2,
    "dropout_rate": 0.0,
    "classifier_dropout": 0.0,
    "decoder_start_token_id": PAD,
    "relative_attention_num_buckets": 6,
    "relative_attention_max_distance": 5,
}
_GPT2 = {
    "n_embd": WIDTH,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 32,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "summary_first_dropout": 0.0,
    "classifier_dropout": 0.0,
}

# The options of each family, by `config.model_type`.
OPTIONS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("t5", "mt5", "umt5"), _T5),
    **dict.fromkeys(("m2m_100", "bart", "mbart", "marian", "pegasus"), _SEQ2SEQ),
    **dict.fromkeys(("llama", "qwen2", "phi3", "olmo2", "cohere"), _DECODER),
    "mistral": {**_DECODER, "sliding_window": 3},
    "mixtral": {**_DECODER, "num_local_experts": 3, "sliding_window": None},
    "qwen3": {
        **_DECODER,
        "use_sliding_window": True,
        "sliding_window": 3,
        "max_window_layers": 0,
    },
    "qwen3_moe": {
        **_DECODER,
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
    },
    "gemma2": {
        **_DECODER,
        "sliding_window": 3,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {**_DECODER, "sliding_window": 3},
    "granite": {**_DECODER, "logits_scaling": 3.0, "attention_multiplier": 0.2},
    "gpt2": _GPT2,
    **dict.fromkeys(("gpt_neox", "bert", "roberta", "xlm-roberta"), _ENCODER),
    "modernbert": {
        **_ENCODER,
        "local_attention": 4,
        "global_attn_every_n_layers": 2,
        "num_hidden_layers": 2,
        "cls_token_id": BOS,
        "sep_token_id": EOS,
    },
}
# Their kernels or their eager softmax have no float64.
_FLOAT32_ONLY = frozenset({"mixtral", "qwen3_moe", "gemma2"})
# Their norms multiply by the weight in float32, so the order of a sum over tokens shows.
_FLOAT32_NORMS = frozenset({"gemma3_text", "cohere"})
# More configurations of a class, by its name: the suffix of the case, and the options.
_MORE: dict[str, dict[str, dict[str, Any]]] = {
    **{
        f"{prefix}Stack": {
            "": {"is_decoder": False, "is_encoder_decoder": False},
            "decoder": {"is_decoder": True, "is_encoder_decoder": False},
        }
        for prefix in ("T5", "MT5", "UMT5")
    },
    **{
        name: {"": {}, "is_decoder": {"is_decoder": True}}
        for name in ("BertLMHeadModel", "RobertaForCausalLM", "XLMRobertaForCausalLM")
    },
    "BertModel": {
        "": {},
        "is_decoder": {"is_decoder": True},
        "cross": {"is_decoder": True, "add_cross_attention": True},
    },
    "GPT2Model": {"": {}, "cross": {"add_cross_attention": True}},
    "LlamaForSequenceClassification": {"": {}, "another_pad": {"pad_token_id": 7}},
    "T5ForConditionalGeneration": {"": {}, "untied": {"tie_word_embeddings": False}},
}


@dataclass(frozen=True)
class Case:
    """A class with the options of its config."""

    model_type: str
    model_class: type[hf.PreTrainedModel] = field(repr=False)
    suffix: str = ""

    @property
    def name(self) -> str:
        return self.model_class.__name__

    @property
    def kind(self) -> str:
        return FAMILIES[self.model_type].kind

    @property
    def available(self) -> bool:
        """Whether the installed transformers is new enough for the family."""
        try:
            find_family(self.model_type)
        except ValueError:
            return False
        return True

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        only = self.model_type in _FLOAT32_ONLY
        return (torch.float32,) if only else (torch.float32, torch.float64)

    @property
    def has_float32_norms(self) -> bool:
        return self.model_type in _FLOAT32_NORMS

    def config(self) -> hf.PreTrainedConfig:
        config = CONFIG_MAPPING[self.model_type](
            **{
                "vocab_size": VOCABULARY,
                "pad_token_id": PAD,
                "eos_token_id": EOS,
                "bos_token_id": BOS,
                "num_labels": 2 if "QuestionAnswering" in self.name else NUM_LABELS,
                **OPTIONS[self.model_type],
                **_MORE.get(self.name, {}).get(self.suffix, {}),
            }
        )
        # transformers' SDPA has no softcap.
        config._attn_implementation = "eager" if self.model_type == "gemma2" else "sdpa"
        return config

    def build(self, dtype: torch.dtype) -> hf.PreTrainedModel:
        """The model with weights so large that an error shows."""
        torch.manual_seed(0)
        model = self.model_class(self.config())
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn_like(parameter)
                if parameter.dim() == 1:  # ones or zeros
                    parameter.data.add_(noise * 0.1)
                else:
                    parameter.data.copy_(noise * 0.25)
        return model.to(dtype)

    def parts(self) -> dict[str, str]:
        """The module name of each entry of the model. A module is an entry once."""
        return _parts(self)

    def __str__(self) -> str:
        return self.name + (f"[{self.suffix}]" if self.suffix else "")


@functools.cache
def _parts(case: Case) -> dict[str, str]:
    with torch.device("meta"):
        model = case.model_class(case.config())
    named: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    parts: dict[str, str] = {"top": ""}
    found = {"base": model.base_model, "decoder": _getter(model, "get_decoder")}
    if case.kind == "encoder_decoder":
        found["encoder"] = _getter(model, "get_encoder")
    for entry in ("base", "encoder", "decoder"):
        part = found.get(entry)
        is_entry = isinstance(part, hf.PreTrainedModel) and named.get(part) is not None
        if is_entry and named[part] not in parts.values():
            parts[entry] = named[part]
    return parts


def _getter(model: hf.PreTrainedModel, name: str) -> Any:
    try:
        return getattr(model, name)()
    except (AttributeError, NotImplementedError):
        return None


def modeling_module(model_type: str) -> ModuleType:
    configuration = CONFIG_MAPPING[model_type].__module__
    return importlib.import_module(configuration.replace(".configuration_", ".modeling_"))


def classes_of(model_type: str) -> list[type[hf.PreTrainedModel]]:
    """The concrete model classes of a family, without those of `NOT_BUILT`."""
    module = modeling_module(model_type)
    return [
        value
        for name, value in vars(module).items()
        if inspect.isclass(value)
        and issubclass(value, hf.PreTrainedModel)
        and value.__module__ == module.__name__
        and not name.endswith("PreTrainedModel")
        and name not in NOT_BUILT
    ]


CASES = [
    Case(model_type, model_class, suffix)
    for model_type in FAMILIES
    for model_class in classes_of(model_type)
    for suffix in _MORE.get(model_class.__name__, {"": {}})
]
