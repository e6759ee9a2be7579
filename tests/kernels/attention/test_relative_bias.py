"""Bias tables contain the biases that T5 and ALiBi add to scores."""

import pytest
import torch
from transformers import T5Config
from transformers.models.t5.modeling_t5 import T5Attention

from tokenpack.kernels.attention import alibi_bias_table, t5_bias_table
from tokenpack.kernels.attention.relative_bias import (
    bias_line,
    line_distances,
    t5_relative_buckets,
)


@pytest.mark.parametrize("max_distance", [40, 128, 300])
@pytest.mark.parametrize("num_buckets", [8, 31, 32, 64])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_are_those_of_t5(bidirectional, num_buckets, max_distance):
    distance = torch.arange(-700, 701)
    options = {"num_buckets": num_buckets, "max_distance": max_distance}
    theirs = T5Attention._relative_position_bucket(distance, bidirectional, **options)
    ours = t5_relative_buckets(distance, bidirectional=bidirectional, **options)
    assert ours.dtype == torch.int64
    assert ours.equal(theirs)


def dense(table, rows, keys):
    """``(heads, rows, keys)``, bottom-right aligned."""
    reach = table.shape[1] // 2
    distance = torch.arange(keys) - (torch.arange(rows)[:, None] + keys - rows)
    return table[:, distance.clamp(-reach, reach) + reach]


@pytest.mark.parametrize("is_decoder", [False, True])
def test_t5_table_is_the_models_bias_within_and_beyond_its_reach(is_decoder):
    config = T5Config(num_heads=3, d_model=12, d_kv=4, is_decoder=is_decoder)
    attention = T5Attention(config, has_relative_attention_bias=True, layer_idx=0).double()
    weight = attention.relative_attention_bias.weight
    table = t5_bias_table(weight, not is_decoder, config.relative_attention_max_distance)
    assert table.shape == (3, 2 * 128 + 1)
    theirs = attention.compute_bias(300, 300)[0]
    assert dense(table, 300, 300).equal(theirs)
    # The buckets get the same gradient.
    incoming = torch.randn_like(theirs)
    (expected,) = torch.autograd.grad(theirs, weight, incoming)
    (grad,) = torch.autograd.grad(dense(table, 300, 300), weight, incoming)
    torch.testing.assert_close(grad, expected)


def test_t5_table_keeps_the_dtype_of_the_weight():
    assert t5_bias_table(torch.randn(32, 2).bfloat16(), True).dtype == torch.bfloat16


def test_alibi_falls_with_the_distance_and_is_differentiable():
    slopes = torch.tensor([0.5, 0.25], requires_grad=True)
    table = alibi_bias_table(slopes, reach=9)
    bias = dense(table, 10, 10)
    for head, slope in enumerate(slopes.tolist()):
        for m in range(10):
            for n in range(10):
                assert bias[head, m, n].item() == -slope * abs(n - m)
    bias.sum().backward()
    assert slopes.grad.tolist() == [-330.0, -330.0]  # the sum of |n - m|


@pytest.mark.parametrize("rows, keys", [(1, 1), (4, 4), (3, 9), (9, 3), (30, 2)])
def test_a_line_holds_the_bias_of_every_distance(rows, keys):
    table = torch.randn(2, 2 * 5 + 1)
    line = bias_line(table, rows, keys)
    distances = line_distances(rows, keys, torch.device("cpu"))
    assert line.shape == (2, rows + keys - 1)
    assert distances.tolist() == list(range(1 - keys, rows))
    # The smallest distance is that of the first key from the last query.
    bias = dense(table, rows, keys)
    assert line[:, 0].equal(bias[:, -1, 0])
    reversed_rows = line.unfold(1, keys, 1)  # as the reference reads it
    assert reversed_rows.flip(1).equal(bias)
