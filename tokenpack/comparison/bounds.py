"""How much the padded and the packed run may differ.

Every difference is the largest absolute one, divided by the size of what is compared: the largest
loss, logit, or gradient of the whole model. (A single gradient has no size of its own. That of a
key's bias is zero by mathematics, and rounding is all that is left of it.)

Two bounds, as multiples of the dtype's eps = 2 ** -mantissa bits:

    rounding   the two differ by less: equal
    large      the two differ by more: they differ, whatever float64 says
    between    equal only if the packed run is right by itself: its error against float64 on each
               sequence alone is at most 1.5 times the padded run's, or within `rounding`

    dtype                  loss     outputs   gradients   large
    float32                16 eps   64 eps    128 eps     8192 eps = 1e-3
    float64                the same in float32's eps, because transformers computes norms and losses
                           in float32 whatever the dtype
    float64, by dtype=     4096 eps = 9e-13, because all is computed in float64 then
    bfloat16, float16      eps / 4  2 eps     4 eps       16 eps

A sum of n terms rounds off by up to n eps, and about sqrt(n) eps; widths are thousands, hence 16 to
128 in float32. In half precision each result is rounded once, from sums in float32, and the loss
is a mean over many tokens.

Why there is something in between: transformers sums the losses of all tokens in one float32 number.
The loss of a published Llama of 135M parameters is off by 2.6e-6 from float64 on a CPU, and its
gradients by 1.6e-4 of the largest. tokenpack's loss is off by 3e-8. The padded run is wrong there,
within rounding, and the bound cannot tell that from a fault of the packed run. float64 can.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

FACTOR = 1.5


class Bounds(NamedTuple):
    """The allowed differences of one dtype, relative to the size of what is compared."""

    loss: float
    outputs: float
    gradients: float
    large: float


def bounds_of(dtype: torch.dtype, pure: bool = False) -> Bounds:
    """The bounds of a dtype.

    Args:
        dtype: in which the model computes.
        pure: float64 is kept in float64 everywhere.
    """
    eps = torch.finfo(dtype).eps
    if dtype == torch.float64 and pure:
        return Bounds(4096 * eps, 4096 * eps, 4096 * eps, 4096 * eps)
    if dtype in (torch.float32, torch.float64):
        eps = torch.finfo(torch.float32).eps
        return Bounds(16 * eps, 64 * eps, 128 * eps, 8192 * eps)
    return Bounds(eps / 4, 2 * eps, 4 * eps, 16 * eps)
