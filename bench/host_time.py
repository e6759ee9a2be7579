"""Time that the host spends on a training step of few tokens: patched over unpatched.

    python -m bench.host_time [cpu|registered]

Forward and backward of 16 tokens in two rows, one thread, models of width 32. The compute is so
small that the time is the host's. Both models take turns, and the ratio is the median over rounds.
Two depths separate the cost of a layer from the fixed cost of a step.

``registered`` times the path that a GPU takes: all launchers run on CPU tensors under a driver that
names a GPU. Only the call of the driver that launches a kernel is left out, so a launch on a GPU
costs a few microseconds more. The results of attention and cross entropy are arbitrary. Those of
layouts, padding and targets are computed once and looked up, because the batch must be packed. The
time of the lookups does not count. All operators of the model run as on the CPU.
"""

import contextlib
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers as hf

from tokenpack import patch_model
from tokenpack.attention.dispatch import choose_backend
from tokenpack.table import format_table

LAYERS = (2, 12)
ROUNDS = 30
ROWS, COLUMNS = 2, 8
SHARED = {"vocab_size": 64, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 2}


def build(name: str, layers: int) -> Any:
    """A model without dropout."""
    torch.manual_seed(0)
    if name == "Llama":
        config = hf.LlamaConfig(
            **SHARED,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=2,
        )
        return hf.LlamaForCausalLM(config)
    if name == "NLLB":
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
        sizes = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, **heads}
        depth = {"encoder_layers": layers, "decoder_layers": layers}
        dropouts = ("dropout", "attention_dropout", "activation_dropout")
        drops = ("encoder_layerdrop", "decoder_layerdrop")
        none = dict.fromkeys((*dropouts, *drops), 0.0)
        return hf.M2M100ForConditionalGeneration(
            hf.M2M100Config(**SHARED, **sizes, **depth, **none, forced_eos_token_id=None)
        )
    config = hf.T5Config(
        **SHARED, d_model=32, d_kv=16, d_ff=64, num_layers=layers, num_heads=2, dropout_rate=0.0
    )
    return hf.T5ForConditionalGeneration(config)


def batch_of(name: str) -> dict[str, torch.Tensor]:
    """The ids of full rows, also as labels."""
    ids = torch.randint(3, 64, (ROWS, COLUMNS), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


@contextlib.contextmanager
def stubbed_launches() -> Iterator[None]:
    """Let attention run its launchers on CPU tensors, up to the launch."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import CompiledKernel
    from triton.runtime.driver import driver

    from tokenpack.kernels import _ops, loss
    from tokenpack.kernels._triton import DEVICES

    class NamedTarget:
        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> str:
            return "cuda:90"

        def get_current_stream(self, device: Any = None) -> int:
            return 0

    init_handles = CompiledKernel._init_handles

    def without_a_gpu(self: Any) -> None:
        self._run = lambda *args: None

    launchers = _ops._LAUNCHERS.copy()
    for each in launchers.keys() - {loss.cross_entropy, loss.cross_entropy_backward_}:
        _ops._LAUNCHERS[each] = with_results(launchers[each], _ops._REFERENCES[each])
    choose_backend.cache_clear()
    CompiledKernel._init_handles = without_a_gpu
    driver.set_active(NamedTarget())
    DEVICES.append("cpu")
    assert_async = torch._assert_async
    torch._assert_async = lambda *_: None  # no kernel wrote what it reads
    try:
        yield
    finally:
        DEVICES.remove("cpu")
        torch._assert_async = assert_async
        _ops._LAUNCHERS.update(launchers)
        driver.set_active(None)
        CompiledKernel._init_handles = init_handles
        choose_backend.cache_clear()


_LOOKUPS: list[float] = []
"""How long the lookups of a step took, in seconds."""


def with_results(launcher: Callable[..., Any], reference: Callable[..., Any]) -> Any:
    """The launcher, and then the results of the reference, computed once for each input.

    The batch must be packed, although its kernels do not run.
    """
    known: dict[Any, Any] = {}

    def launch(*args: Any) -> Any:
        launcher(*args)
        begin = time.process_time()
        key = tuple(map(frozen, args))
        if key not in known:
            known[key] = reference(*args)
        _LOOKUPS.append(time.process_time() - begin)
        return known[key]

    return launch


def frozen(value: Any) -> Any:
    """A value that can be a key."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.numpy().tobytes()
    return tuple(map(frozen, value)) if isinstance(value, list) else value


def milliseconds(models: list[Any], batch: dict[str, torch.Tensor]) -> list[list[float]]:
    """The times of the steps of each model, which take turns."""
    times: list[list[float]] = [[] for _ in models]
    for number in range(ROUNDS + 3):
        for model, taken in zip(models, times, strict=True):
            _LOOKUPS.clear()
            begin = time.process_time()  # without the time of other processes
            model(**batch).loss.backward()
            end = time.process_time()
            if number >= 3:
                taken.append(1e3 * (end - begin - sum(_LOOKUPS)))
    return times


def compare(name: str, path: str) -> list[str]:
    """A row of the table."""
    depths = [build(name, layers) for layers in LAYERS]
    patched = [patch_model(build(name, layers)) for layers in LAYERS]
    batch = batch_of(name)
    for model in patched:  # the first call checks what follows the head
        model(**batch)
        if path == "registered":
            with stubbed_launches():
                patch_model(model, attention="triton")(**batch).loss.backward()
    gc.collect()
    gc.freeze()
    gc.disable()
    with stubbed_launches() if path == "registered" else contextlib.nullcontext():
        shallow, deep, shallow_patched, deep_patched = milliseconds([*depths, *patched], batch)
    gc.enable()
    ratio = statistics.median(b / a for a, b in zip(deep, deep_patched, strict=True))
    low, high, low_patched, high_patched = map(
        statistics.median, (shallow, deep, shallow_patched, deep_patched)
    )
    layers = LAYERS[1] - LAYERS[0]
    layer, layer_patched = (high - low) / layers, (high_patched - low_patched) / layers
    fixed, fixed_patched = high - LAYERS[1] * layer, high_patched - LAYERS[1] * layer_patched
    micro = (layer, layer_patched, fixed, fixed_patched)
    return [
        *(name, f"{high:.1f}", f"{high_patched:.1f}", f"{ratio:.2f}"),
        *(f"{1e3 * each:.0f}" for each in micro),
    ]


def main(path: str = "cpu") -> None:
    """Print the table."""
    torch.set_num_threads(1)
    if path not in ("cpu", "registered"):
        raise SystemExit(f"path must be cpu or registered, got {path}")
    header = ["model", "ms", "patched", "ratio", "us/layer", "patched", "us fixed", "patched"]
    rows = []
    for name in ("Llama", "NLLB", "T5"):
        rows.append(compare(name, path))
        print(format_table(header, rows), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
