"""Attention of the T5 libraries on PyPI, called as their own models call it.

- turbot5 0.0.2: Triton kernels over packed tokens. They compute T5's buckets for every score. The
  host reads ``cu_seqlens`` once for each sequence and launch.
- nai-t5 1.0.10: FlexAttention over padded rows, with a dense bias of all queries and keys that its
  score function reads, and a block mask of the padding. Its whole model attends with PyTorch's
  fused kernel in training, since the bias that FlexAttention reads is bound without gradient.

turbot5's models cannot be imported with transformers 5, so it has no training step.
"""

import functools
import importlib.util
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from tokenpack.checks import IGNORE_INDEX

# Of both libraries and of T5: the table of a bias has the reach MAX_DISTANCE.
BUCKETS, MAX_DISTANCE = 32, 128


@functools.cache
def turbot5_attention():
    """The function for packed tokens of turbot5.

    It is loaded from its file: the package itself imports a module that transformers 5 has not.
    """
    spec = importlib.util.find_spec("turbot5")
    if spec is None or spec.origin is None:
        pytest.skip("turbot5 is not installed")
    path = Path(spec.origin).parent / "ops" / "varlen_fused_bias_attn.py"
    spec = importlib.util.spec_from_file_location("turbot5_varlen_fused_bias_attn", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.flash_attention_with_fusing_bias_varlen


def turbot5(qkv, buckets, layout, causal, scale):
    """Attention over packed ``(tokens, heads, head_dim)``.

    Args:
        buckets: ``(BUCKETS, heads)``, T5's relative_attention_bias, or None.
    """
    bounds, longest = layout.cu_seqlens, layout.max_seqlen
    return turbot5_attention()(
        *(*qkv, buckets, bounds, bounds, longest, longest),
        causal=causal,
        sm_scale=scale,
        NUM_BUCKETS=BUCKETS,
        MAX_DISTANCE=MAX_DISTANCE,
    )


def nai_t5(qkv, bias, mask, scale):
    """A function of attention over padded ``(rows, heads, columns, head_dim)``, both ways.

    Args:
        qkv: three tensors.
        bias: ``(heads, columns, columns)``.
        mask: ``(rows, columns)``, True at tokens.
    """
    library = pytest.importorskip("nai_t5.t5_encoder", reason="nai-t5 is not installed")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    make = functools.partial(create_block_mask, device=mask.device)
    block_mask = library.make_self_attn_block_mask(mask, create_block_mask=make)
    add_bias = library.T5EncoderSelfAttentionFlex.make_score_mod(bias)
    # It compiles the layer around it. On a CPU, FlexAttention has no backward.
    attend = torch.compile(flex_attention, dynamic=False) if mask.is_cuda else flex_attention
    return lambda: attend(*qkv, score_mod=add_bias, block_mask=block_mask, scale=scale)


class NaiT5(nn.Module):
    """nai-t5's encoder and decoder, with the weights and the calls of a T5 of transformers."""

    def __init__(self, model):
        super().__init__()
        library = pytest.importorskip("nai_t5", reason="nai-t5 is not installed")
        state = model.state_dict()
        if model.config.tie_word_embeddings:  # its head has weights of its own, and no factor
            state["lm_head.weight"] = model.shared.weight * model.config.d_model**-0.5
        self.library, self.config = library, library.to_based_config(model.config)
        self.model = library.T5(self.config).to(model.device)
        self.model.load_state_dict(library.hf_to_based_t5_state(state, self.config))
        self.train(model.training)

    def forward(self, input_ids, attention_mask, labels):
        config, encoder = self.config, attention_mask.bool()
        decoder_ids = self.library.labels_to_decoder_input_ids(
            labels,
            pad_token_id=config.pad_token_id,
            decoder_start_token_id=config.decoder_start_token_id,
            label_ignore_index=IGNORE_INDEX,
        )
        logits = self.model(
            input_ids,
            decoder_ids,
            encoder_input_mask=encoder,
            decoder_input_mask=self.library.label_mask_to_decoder_mask(labels != IGNORE_INDEX),
            decoder_cross_mask=encoder[:, None, :].expand(-1, labels.shape[1], -1),
        )
        return Loss(cross_entropy(logits.flatten(0, 1).float(), labels.flatten()))


class Loss(NamedTuple):
    """What a training step reads of a model's output."""

    loss: torch.Tensor
