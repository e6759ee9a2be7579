"""The op that runs the grouped reference in a graph equals the reference, and can be traced."""

import pytest
import torch

from tokenpack.attention.host_op import attend_on_host_in_graph
from tokenpack.kernels.attention import varlen_attention_reference

PLAIN = {
    "causal": False,
    "scale": 0.3,
    "window": None,
    "softcap": None,
    "relative_bias": None,
    "dropout_p": 0.0,
}
CASES = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": (3, -1)},
    "softcap": {"softcap": 1.5},
    "bias": {"relative_bias": True},
}


def sequences(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def inputs(lengths_q, lengths_k, options, dtype=torch.float64, kv_heads=2):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

    tensors = [
        random(sum(lengths_q), 4, 8),
        random(sum(lengths_k), kv_heads, 8),
        random(sum(lengths_k), kv_heads, 8),
    ]
    options = {**PLAIN, **options}
    if options["relative_bias"]:
        options["relative_bias"] = random(4, 7)
    return (*tensors, sequences(lengths_q), sequences(lengths_k)), options


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("cross", [False, True])
def test_equals_the_reference_with_its_gradients(name, cross):
    if cross and CASES[name].get("causal"):
        pytest.skip("cross-attention is not causal")
    lengths = [5, 4, 0, 9, 1, 5]
    keys = [3, 6, 2, 4, 1, 0] if cross else lengths
    tensors, options = inputs(lengths, keys, CASES[name])
    leaves = [t for t in (*tensors, options["relative_bias"]) if t is not None and t.requires_grad]
    dout = torch.randn(tensors[0].shape, dtype=torch.float64)
    results = []
    for run in (
        lambda: attend_on_host_in_graph(tensors, options),
        lambda: varlen_attention_reference(*tensors, **options),
    ):
        out = run()
        results.append((out, *torch.autograd.grad(out, leaves, dout)))
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["causal", "bias"])
def test_opcheck(name):
    tensors, options = inputs([3, 5, 3], [3, 5, 3], CASES[name], torch.float32)
    torch.library.opcheck(
        torch.ops.tokenpack.host_attention.default,
        (*tensors, options["relative_bias"], 0.3, 0.0, [int(options["causal"]), -1, -1]),
    )
