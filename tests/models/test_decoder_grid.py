"""Every pair of the decoder's options: forms of a batch, cached decoding, causality, isolation."""

import pytest
import torch

from tokenpack.models.decoder.configuration import FFN_TYPES, POSITION_TYPES

from . import grid
from .grid import Options, make_batch, make_model


def test_the_part_of_the_grid_has_every_pair_of_options():
    pairs = set().union(*map(grid.pairs_of, grid.full_grid()))
    assert set().union(*map(grid.pairs_of, grid.covering_grid())) == pairs


@pytest.mark.parametrize("options", grid.covering_grid(), ids="-".join)
def test_a_sequence_gets_the_same_values_in_every_batch_and_with_a_cache(options):
    assert grid.largest_error(options, torch.float64) <= 1e-10
    assert grid.decoding_error(options) <= 1e-10


@pytest.mark.parametrize("attention, ffn", [("mla", "moe"), ("mqa", "moe_ec"), ("gqa", "glu")])
@pytest.mark.parametrize("positions", POSITION_TYPES)
def test_generate_returns_the_same_with_and_without_a_cache(attention, positions, ffn):
    assert grid.generates_the_same(Options(attention, positions, ffn=ffn))


@pytest.mark.parametrize("ffn", FFN_TYPES)
def test_float32(ffn):
    assert grid.largest_error(Options(ffn=ffn), torch.float32) <= 1e-5


@pytest.mark.parametrize("ffn", FFN_TYPES)
def test_a_changed_token_leaves_earlier_logits_and_other_sequences_bit_identical(ffn):
    # The product of each expert has as many rows as tokens, and BLAS may round by that number.
    model = make_model(Options(ffn=ffn), experts_implementation="batched_mm")
    batch = make_batch()
    first, last = batch.cu_seqlens[2:4]
    changed = first + 4
    other = batch.stream.clone()
    other[0, changed] = (other[0, changed] + 1) % grid.VOCAB
    with torch.no_grad():
        before, after = (
            model(ids, cu_seqlens=batch.cu_seqlens).logits[0] for ids in (batch.stream, other)
        )
    assert torch.equal(before[:first], after[:first])
    assert not torch.equal(before[changed:last], after[changed:last])
    # Experts that choose tokens see later ones, which is what their flag warns of.
    is_causal = torch.equal(before[:changed], after[:changed])
    assert is_causal == (ffn != "moe_ec")
