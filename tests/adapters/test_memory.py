"""Packing must not use memory quadratic in the batch or copy gradients."""

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from tokenpack import patch_model

from .models import BERT, LLAMA, NLLB, T5, Case

LENGTH = 256


class PeakMemory(TorchDispatchMode):
    """Tracks the bytes of live storages that ops return, and their peak."""

    def __init__(self):
        super().__init__()
        self.live = WeakIdKeyDictionary()
        self.now = self.peak = self.largest = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        torch.utils._pytree.tree_map_only(torch.Tensor, self.count, result)
        return result

    def count(self, tensor):
        storage = tensor.untyped_storage()
        if storage in self.live:
            return
        size = storage.nbytes()
        self.live[storage] = size
        import weakref

        weakref.finalize(storage, self.release, size)
        self.now += size
        self.peak = max(self.peak, self.now)
        self.largest = max(self.largest, size)

    def release(self, size):
        self.now -= size


def step_memory(sequences: int) -> PeakMemory:
    model = patch_model(Case(T5.family, T5.config, T5.model, T5.options, T5.labels).build())
    ids = torch.randint(3, 97, (sequences, LENGTH))
    with PeakMemory() as memory:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    return memory


@pytest.mark.skipif(sys.platform == "win32", reason="counts CPython's own releases")
def test_peak_grows_linearly_with_sequences():
    peaks = {n: step_memory(n) for n in (8, 16, 32)}
    print(
        {n: f"{m.peak / 2**20:.1f} MiB, largest {m.largest / 2**20:.1f}" for n, m in peaks.items()}
    )
    first, second = (peaks[16].peak - peaks[8].peak) / 8, (peaks[32].peak - peaks[16].peak) / 16
    assert second <= 1.1 * first
    # A bias of all queries by all keys would have 4 heads x 8192 x 8192 floats, 1 GiB.
    assert peaks[32].largest < 4 * (32 * LENGTH) * LENGTH * 4 * 2


class Names(TorchDispatchMode):
    """Collects the names of the ops that run."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.seen.add(op.name())
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", [T5, NLLB, LLAMA, BERT], ids=str)
@pytest.mark.parametrize("logits", ["auto", "always"])
def test_no_gradient_is_copied_into_zeros(case: Case, logits: str):
    """The backward of ``tensor[0]`` does this. The backward of ``tensor.squeeze(0)`` is a view."""
    model = patch_model(case.build(), logits=logits)
    with Names() as names:
        model(**case.batch("right")).loss.backward()
    assert "aten::mm" in names.seen
    assert "aten::select_backward" not in names.seen
