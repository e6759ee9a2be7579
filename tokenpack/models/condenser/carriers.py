"""From the condenser's hidden states to vectors of the decoder's width.

slots       x_j = hidden states of slot j
mean_pool   x_j = mean of the hidden states of span j
vector_j    = projection(norm(x_j))
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .configuration import CondenserConfig


class CondenserProjection(nn.Module):
    """The norm and the projection. Its first outputs are as large as the decoder's embeddings."""

    def __init__(self, config: CondenserConfig, scale: float) -> None:
        """Make the layers.

        Args:
            config: its widths are set.
            scale: root mean square of the decoder's embeddings.
        """
        super().__init__()
        assert config.condenser_hidden_size is not None
        assert config.decoder_hidden_size is not None
        width, out = (
            config.condenser_hidden_size * config.num_last_layers,
            config.decoder_hidden_size,
        )
        self.kind, self.scale = config.projection, scale
        self.norm: nn.Module = nn.Identity()
        if config.norm == "layer_norm":
            self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        elif config.norm == "rms_norm":
            self.norm = nn.RMSNorm(width, eps=config.norm_eps)
        self.linear: nn.Module = nn.Identity()
        bias = config.projection_bias
        if config.projection == "linear":
            self.linear = nn.Linear(width, out, bias=bias)
        elif config.projection == "mlp":
            hidden = nn.Linear(width, out, bias=bias)
            self.linear = nn.Sequential(hidden, nn.GELU(), nn.Linear(out, out, bias=bias))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew, from torch's global generator."""
        if isinstance(self.norm, (nn.LayerNorm, nn.RMSNorm)):
            self.norm.reset_parameters()
        linears = [each for each in self.linear.modules() if isinstance(each, nn.Linear)]
        for at, linear in enumerate(linears):
            std = linear.in_features**-0.5
            if at == len(linears) - 1:
                # GELU of a unit normal has a root mean square of 0.65.
                std *= self.scale / (0.65 if len(linears) > 1 else 1.0)
            nn.init.normal_(linear.weight, std=std)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, carriers: Tensor) -> Tensor:
        """``(num_vectors, width)`` to ``(num_vectors, decoder width)``."""
        return self.linear(self.norm(carriers))


def pooled(hidden: Tensor, spans: Tensor) -> Tensor:
    """The mean of each span of ``hidden (total, width)``; ``spans (n,)`` sum up to ``total``."""
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    return torch.segment_reduce(wide, "mean", lengths=spans, axis=0).to(hidden.dtype)
