"""Triton kernels of cross entropy, with the formulas of `loss`. Their launchers are there.

One program computes one row of logits. The forward reads the row once and rescales the running sum
of exponentials whenever the maximum grows (Milakov and Gimelshein, 2018). The backward reads the
row once more, and may write the gradient over the logits. Rows without a target are not read.
"""

from __future__ import annotations

from ._triton import tl, triton


@triton.jit
def _tanh(x):
    """tanh within 2 ulp of float32, without an external library.

    Near 0 this is the odd polynomial of Cephes (Moshier), elsewhere 1 - 2 / (exp(2x) + 1).
    """
    far = 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)
    if x.dtype == tl.float64:
        return far
    square = x * x
    near = -5.70498872745e-3 * square + 2.06390887954e-2
    near = near * square - 5.37397155531e-2
    near = near * square + 1.33314422036e-1
    near = near * square - 3.33332819422e-1
    return tl.where(tl.abs(x) < 0.625, near * square * x + x, far)


@triton.jit
def _load_z(
    logits, row, column, num_classes, softcap, scale, SOFTCAP: tl.constexpr, SCALED: tl.constexpr
):
    """z of the formulas at ``column``, in float32, or float64 if the logits are float64.

    z is -inf beyond the last class, where exp(z) is 0. ``row`` is an offset in elements.
    """
    z = tl.load(logits + row + column, mask=column < num_classes, other=float("-inf"))
    if z.dtype != tl.float64:
        z = z.to(tl.float32)
    if SCALED:
        z *= tl.full([], scale, z.dtype)
    if SOFTCAP:
        cap = tl.full([], softcap, z.dtype)
        z = _tanh(z / cap) * cap
        z = tl.where(column < num_classes, z, float("-inf"))  # tanh(-inf) is finite
    return z


# num_classes is specialized, because it does not change from batch to batch: the compiler emits
# 16-byte loads only if it can prove that the mask is uniform over 16 bytes. The float options are
# passed as float64, which is exact, and cast to the dtype of the loss. Tensors with one number per
# row are not specialized by their alignment: chunks of tokens begin anywhere.
@triton.jit(do_not_specialize_on_alignment=["targets", "token_loss", "token_lse", "correct"])
def _cross_entropy_kernel(
    logits,
    targets,
    token_loss,
    token_lse,
    correct,
    num_classes,
    row_stride,
    label_smoothing: tl.float64,
    z_loss: tl.float64,
    softcap: tl.float64,
    scale: tl.float64,
    SMOOTHED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row = token * row_stride
    target = tl.load(targets + token)
    dtype: tl.constexpr = token_lse.dtype.element_ty
    last = tl.where(target >= 0, num_classes, 0)  # without a target, skip the loop
    # [BLOCK] Each lane keeps its own maximum and its own sum of exponentials. Of exp(z - maximum)
    # and exp(maximum - new maximum) one is always 1, so one exponential serves both. The maximum
    # starts at the lowest finite float32, because -inf - (-inf) is NaN.
    largest = tl.full([BLOCK], -3.4028234663852886e38, dtype)
    total = tl.zeros([BLOCK], dtype)
    sum_z = tl.zeros([BLOCK], dtype)
    for first in range(0, last, BLOCK):
        column = first + tl.arange(0, BLOCK)
        z = _load_z(logits, row, column, num_classes, softcap, scale, SOFTCAP, SCALED)
        gain = z - largest
        decay = tl.exp(-tl.abs(gain))
        total = tl.where(gain > 0, total * decay + 1.0, total + decay)
        largest = tl.maximum(largest, z)
        if SMOOTHED:
            sum_z += tl.where(column < num_classes, z, 0.0)
    top = tl.max(largest)
    lse = top + tl.log(tl.sum(total * tl.exp(largest - top)))
    target_z = _load_z(
        logits, row, tl.maximum(target, 0), num_classes, softcap, scale, SOFTCAP, SCALED
    )
    loss = lse - target_z
    if SMOOTHED:
        smoothing = tl.full([], label_smoothing, dtype)
        loss = (1.0 - smoothing) * loss + smoothing * (lse - tl.sum(sum_z) / num_classes)
    loss += tl.full([], z_loss, dtype) * lse * lse
    has_target = target >= 0
    tl.store(token_loss + token, tl.where(has_target, loss, 0.0))
    tl.store(token_lse + token, tl.where(has_target, lse, 0.0))
    tl.store(correct + token, has_target & (target_z >= top))


@triton.jit(do_not_specialize_on_alignment=["dloss", "token_lse", "targets"])
def _cross_entropy_backward_kernel(
    dloss,
    logits,
    token_lse,
    targets,
    dlogits,
    num_classes,
    row_stride,
    drow_stride,
    label_smoothing: tl.float64,
    z_loss: tl.float64,
    softcap: tl.float64,
    scale: tl.float64,
    SOFTCAP: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + token)
    dtype: tl.constexpr = token_lse.dtype.element_ty
    lse = tl.load(token_lse + token)
    dtoken_loss = tl.load(dloss + token).to(dtype)
    # dz = softmax * softmax_factor - uniform - (target_share at the target)
    softmax_factor = 1.0 + 2.0 * tl.full([], z_loss, dtype) * lse
    uniform = tl.full([], label_smoothing, dtype) / num_classes
    target_share = 1.0 - tl.full([], label_smoothing, dtype)
    for first in range(0, num_classes, BLOCK):
        column = first + tl.arange(0, BLOCK)
        dz = tl.zeros([BLOCK], dtype)
        if target >= 0:
            z = _load_z(
                logits, token * row_stride, column, num_classes, softcap, scale, SOFTCAP, SCALED
            )
            hit = tl.where(column == target, target_share, 0.0)
            dz = tl.exp(z - lse) * softmax_factor - uniform - hit
            if SOFTCAP:
                capped = z / tl.full([], softcap, dtype)  # tanh of the scaled logit over the cap
                dz *= 1.0 - capped * capped
            if SCALED:
                dz *= tl.full([], scale, dtype)
            dz *= dtoken_loss
        tl.store(
            dlogits + token * drow_stride + column,
            dz.to(dlogits.dtype.element_ty),
            mask=column < num_classes,
        )
