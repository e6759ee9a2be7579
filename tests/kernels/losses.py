"""References for the packed losses: PyTorch, and a loop over sequences."""

import torch
import torch.nn.functional as F

from tokenpack.kernels._triton import INTERPRETED

IGNORED = -100

# Triton's interpreter computes bf16 on raw bits and truncates its stores, so tests use fp16 there.
DTYPES = [torch.float32, torch.float64, torch.float16 if INTERPRETED else torch.bfloat16]


def token_losses(
    logits, labels, cu_seqlens, *, shift=False, label_smoothing=0.0, z_loss=0.0, softcap=None
):
    """Loss and target of each token by PyTorch, in the dtype of the logits but at least float32."""
    targets = labels
    if shift:
        targets = torch.full_like(labels, IGNORED)
        for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist()):
            targets[start : max(end - 1, start)] = labels[start + 1 : max(end, start + 1)]
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    loss = F.cross_entropy(z, targets, reduction="none", label_smoothing=label_smoothing)
    return loss + z_loss * z.logsumexp(1).square() * (targets != IGNORED), targets


def reduced(loss, targets, cu_seqlens, reduction, weights):
    """The reduction, computed by a loop over sequences."""
    valid = targets != IGNORED
    parts = [
        (loss[start:end] * weights[s], valid[start:end])
        for s, (start, end) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist()))
    ]
    if reduction == "none":
        return torch.cat([part for part, _ in parts])
    total = sum(part.sum() for part, _ in parts)
    if reduction == "sum":
        return total
    if reduction == "mean":
        return total / sum(weights[s] * real.sum() for s, (_, real) in enumerate(parts))
    means = torch.stack([part.sum() / real.sum().clamp(min=1) for part, real in parts])
    if reduction == "sequence":
        return means
    return means.sum() / sum(weights[s] for s, (_, real) in enumerate(parts) if real.any())


def assert_as_exact(ours, theirs, exact):
    assert ours.isfinite().all()
    error = (ours.double() - exact).norm()
    roundings = 64 if ours.dtype == torch.float64 else 2
    floor = roundings * torch.finfo(ours.dtype).eps * exact.norm()
    assert error <= 1.5 * (theirs.double() - exact).norm() + floor
