"""Triton kernels that move rows between a padded batch and the stream of its tokens; see `padding`.

The launchers are there.
"""

from __future__ import annotations

from ._triton import tl, triton


@triton.jit(do_not_specialize=["total_tokens"])
def _unpad_kernel(
    streams,
    paddeds,
    indices,
    total_tokens,
    row_words,
    row_strides,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    """Each program copies BLOCK_ROWS tokens of all tensors, BLOCK_WORDS words of each.

    ``streams``, ``paddeds``, ``row_words`` and ``row_strides`` are tuples with one entry per
    tensor. Row sizes and strides are in words.
    """
    token = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BR]
    word = tl.program_id(1) * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)  # [BW]
    is_token = token < total_tokens
    slot = tl.load(indices + token, mask=is_token, other=0).to(tl.int64)
    for i in tl.static_range(len(streams)):
        mask = is_token[:, None] & (word < row_words[i])[None, :]  # [BR, BW]
        row = tl.load(paddeds[i] + slot[:, None] * row_strides[i] + word[None, :], mask=mask)
        tl.store(streams[i] + token[:, None] * row_words[i] + word[None, :], row, mask=mask)


@triton.jit(do_not_specialize=["total_tokens", "num_slots", "search_steps"])
def _repad_kernel(
    paddeds,
    streams,
    indices,
    total_tokens,
    num_slots,
    search_steps,
    row_words,
    row_strides,
    fills,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    """Each program writes BLOCK_ROWS slots of all tensors, BLOCK_WORDS words of each."""
    slot = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BR]
    word = tl.program_id(1) * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)  # [BW]
    # Binary search for the first token whose index is at least the slot, in [token, end).
    token = tl.zeros([BLOCK_ROWS], tl.int64)
    end = token + total_tokens
    for _ in range(search_steps):
        middle = (token + end) // 2
        searching = middle < end
        index = tl.load(indices + middle, mask=searching, other=num_slots).to(tl.int64)
        before = index < slot
        token = tl.where(searching & before, middle + 1, token)
        end = tl.where(searching & ~before, middle, end)
    # A slot without a token gets the fill: no token has its index.
    has_candidate = token < total_tokens
    found = tl.load(indices + token, mask=has_candidate, other=-1).to(tl.int64) == slot
    is_slot = slot < num_slots
    for i in tl.static_range(len(paddeds)):
        in_row = (word < row_words[i])[None, :]
        row = tl.load(
            streams[i] + token[:, None] * row_strides[i] + word[None, :],
            mask=found[:, None] & in_row,
            other=fills[i],
        )  # [BR, BW]
        tl.store(
            paddeds[i] + slot[:, None] * row_words[i] + word[None, :],
            row,
            mask=is_slot[:, None] & in_row,
        )
