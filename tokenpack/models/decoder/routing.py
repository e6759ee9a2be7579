"""Which experts a token goes to, and how the load of the experts is balanced.

Token choice: the k experts with the largest router probabilities (Shazeer et al., 2017).
Expert choice: each expert takes the tokens with the largest probabilities (Zhou et al., 2022).

    balance = E * sum_e f_e * P_e       per layer (Fedus et al., 2021, "Switch Transformers")

``f_e`` is expert e's share of all k choices, and ``P_e`` its mean probability. Both are over the
tokens that count. A uniform router gives 1 for every k.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .configuration import DecoderConfig
from .inputs import PackedInputs
from .layers import Float32Buffers


class DecoderRouter(Float32Buffers):
    """Router probabilities and choices of tokens.

    Attributes:
        weight: ``(num_experts, hidden_size)``.
        e_score_correction_bias: ``(num_experts,)`` float32, added to the probabilities where
            experts are selected, but not to the weights of the experts. See `update_bias`.
        tokens_per_expert: ``(num_experts,)`` float32, choices since the last `update_bias`.
    """

    e_score_correction_bias: Tensor
    tokens_per_expert: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.normalize = config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(config.num_local_experts, config.hidden_size))
        self.has_bias = config.router_bias_update_rate > 0.0
        if self.has_bias:
            zeros = torch.zeros(config.num_local_experts, dtype=torch.float32)
            self.register_buffer("e_score_correction_bias", zeros)
            self.register_buffer("tokens_per_expert", zeros.clone(), persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """``(total_tokens, hidden_size)`` to probabilities ``(total_tokens, num_experts)``.

        In float32 or better.
        """
        logits = nn.functional.linear(hidden, self.weight)
        return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))

    def choose(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """The experts of each token, and their weights, ``(total_tokens, top_k)`` each."""
        scores = probabilities.detach()
        if self.has_bias:
            scores = scores + self.e_score_correction_bias
        experts = scores.topk(self.top_k, dim=-1).indices
        weights = probabilities.gather(1, experts)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return experts, weights

    def count(self, counts: Tensor) -> None:
        """Add the choices of a training forward, ``(num_experts,)``."""
        self.tokens_per_expert += counts

    @torch.no_grad()
    def update_bias(self, rate: float, reduce: Any = None) -> None:
        """Raise the bias of experts with fewer tokens than the mean by ``rate``; lower the others.

        This balances the load without a gradient (Wang et al., 2024, "Auxiliary-loss-free load
        balancing strategy for mixture-of-experts"; DeepSeek-V3).

        Args:
            rate: the step.
            reduce: sums the counts over all ranks in place, if there are several.
        """
        counts = self.tokens_per_expert
        if reduce is not None:
            reduce(counts)
        self.e_score_correction_bias += rate * (counts.mean() - counts).sign()
        counts.zero_()


def choices_per_expert(experts: Tensor, num_experts: int, counted: Tensor | None) -> Tensor:
    """``(num_experts,)`` float32: how many choices of the tokens that count fell on each expert."""
    chosen = torch.zeros(num_experts, dtype=torch.float32, device=experts.device)
    ones = torch.ones_like(experts, dtype=torch.float32)
    if counted is not None:
        ones = ones * counted[:, None]
    return chosen.index_add(0, experts.flatten(), ones.flatten())


def balance_loss(probabilities: Tensor, counts: Tensor, counted: Tensor | None) -> Tensor:
    """The balancing loss of one layer, a scalar. 1 if the router is uniform.

    Args:
        probabilities: ``(total_tokens, num_experts)``.
        counts: as `choices_per_expert` returns them.
        counted: ``(total_tokens,)`` bool, or None if all tokens count.
    """
    share = counts / counts.sum().clamp(min=1.0)
    if counted is None:
        mean = probabilities.mean(0)
    else:
        weight = counted.to(probabilities.dtype)
        mean = (probabilities * weight[:, None]).sum(0) / weight.sum().clamp(min=1.0)
    return probabilities.shape[1] * (share * mean).sum()


def choose_tokens(
    probabilities: Tensor, inputs: PackedInputs, capacity_factor: float
) -> tuple[Tensor, Tensor]:
    """Expert choice within each sequence.

    In a sequence of n tokens, each expert takes ``ceil(capacity_factor * n / num_experts)`` tokens,
    at most n. Ties are broken in favor of the earlier token.

    Returns:
        The tokens ``(taken, num_experts)`` that each expert takes, and their weights.
    """
    sequence, num_experts = inputs.sequence_ids(), probabilities.shape[1]
    places = inputs.memo.get(num_experts)
    if places is None:
        places = inputs.memo[num_experts] = _places(inputs, num_experts, capacity_factor)
    by_score = probabilities.detach().argsort(dim=0, descending=True, stable=True)
    by_sequence = sequence[by_score].argsort(dim=0, stable=True)
    order = by_score.gather(0, by_sequence)  # by sequence, then from the largest score down
    taken = order.index_select(0, places)
    return taken, probabilities.gather(0, taken)


def _places(inputs: PackedInputs, num_experts: int, capacity_factor: float) -> Tensor:
    """``(taken,)`` int64, the first places of each sequence, as many as each expert takes."""
    lengths = inputs.layout.lengths.long()
    # In integers: the product of a factor and a length may round to just above an integer.
    factor = round(capacity_factor * 1_000_000)
    capacity = -(-(lengths * factor) // (num_experts * 1_000_000))
    capacity = torch.minimum(capacity, lengths)
    takes = inputs.layout.position_ids < capacity[inputs.sequence_ids()]
    return takes.nonzero().squeeze(1)  # waits for the device, once per forward
