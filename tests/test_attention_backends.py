"""Which backend runs a call and why, and that all backends get the same call.

Stand-ins for flash-attn and torch have the signatures of old and new releases, interpret the
parameters as each release does, and run the reference.
"""

import inspect
import sys
import types

import pytest
import torch

from tokenpack.attention import (
    BACKENDS,
    AttentionCall,
    backend_report,
    backends,
    choose_backend,
    dispatch,
    layout_attention,
    packed_attention,
)
from tokenpack.kernels import layout_from_lengths, varlen_attention

PLAIN = AttentionCall(
    device_type="cuda",
    dtype=torch.bfloat16,
    heads=8,
    kv_heads=8,
    head_dim=64,
    default_scale=True,
    causal=True,
    window=None,
    softcap=False,
    relative_bias=False,
    dropout=False,
    flash_scratch_fits=True,
)

# ------------------------------------------------------------------------------ the stand-ins


def torch_2_10(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None
):
    assert query.shape[1] == key.shape[1]
    return varlen_attention(query, key, value, cu_seq_q, cu_seq_k, causal=is_causal)


def torch_2_11(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
):
    assert query.shape[1] == key.shape[1]
    return varlen_attention(query, key, value, cu_seq_q, cu_seq_k, scale=scale, window=window_size)


def torch_2_13(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    assert enable_gqa == (query.shape[1] != key.shape[1])
    return varlen_attention(query, key, value, cu_seq_q, cu_seq_k, scale=scale, window=window_size)


def torch_with_both(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    is_causal=False,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
):
    return varlen_attention(
        query, key, value, cu_seq_q, cu_seq_k, causal=is_causal, scale=scale, window=window_size
    )


def flash_2_5(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    assert window_size[0] is not None
    return varlen_attention(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        causal=causal,
        scale=softmax_scale,
        window=window_size,
        dropout_p=dropout_p,
    )


def flash_2_8(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    assert not (softcap and dropout_p)
    return varlen_attention(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        causal=causal,
        scale=softmax_scale,
        window=window_size,
        softcap=softcap,
        dropout_p=dropout_p,
    )


def flash_3(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    qv=None,
    window_size=(-1, -1),
    softcap=0.0,
):
    assert seqused_q is seqused_k is qv is None
    out = flash_2_8(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
    )
    return out, torch.zeros(())  # and the log-sum-exp


def flash_4(
    q,
    k,
    v,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    seqused_q=None,
    seqused_k=None,
    page_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
    learnable_sink=None,
    softcap=0.0,
):
    assert seqused_q is seqused_k is page_table is None
    assert all(side is None or side >= 0 for side in window_size)
    return flash_3(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        None,
        None,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=tuple(-1 if side is None else side for side in window_size),
        softcap=softcap,
    )


FLASH_MODULES = ("flash_attn", "flash_attn_interface", "flash_attn.cute")
FLASH = {
    "2.5": ("flash_attn", flash_2_5),
    "2.8": ("flash_attn", flash_2_8),
    "3": ("flash_attn_interface", flash_3),
    "4": ("flash_attn.cute", flash_4),
}
TORCH = {"2.10": torch_2_10, "2.11": torch_2_11, "2.13": torch_2_13, "both": torch_with_both}


def forget_probes():
    choose_backend.cache_clear()
    dispatch.find_backend.cache_clear()
    backends._flash_attn.cache_clear()
    backends._torch_varlen.cache_clear()


@pytest.fixture
def machine(monkeypatch):
    """A function that simulates a machine with a GPU and these versions."""

    def pretend(*, torch_version=None, flash_version=None, capability=(9, 0)):
        for module in FLASH_MODULES:
            monkeypatch.setitem(sys.modules, module, None)  # as if not installed
        if flash_version is not None:
            module, function = FLASH[flash_version]
            stand_in = types.ModuleType(module)
            stand_in.flash_attn_varlen_func = function
            monkeypatch.setitem(sys.modules, module, stand_in)
        stand_in = types.ModuleType("torch.nn.attention.varlen")
        if torch_version is not None:
            stand_in.varlen_attn = TORCH[torch_version]
        monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", stand_in)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: capability)
        forget_probes()

    pretend()
    yield pretend
    monkeypatch.undo()
    forget_probes()


@pytest.fixture
def as_if_on_cuda(monkeypatch):
    """Selects backends for CPU tensors as if they were CUDA tensors."""
    calls = []

    def choose(call, prefer="auto"):
        calls.append(call)
        return choose_backend(call._replace(device_type="cuda"), prefer)

    monkeypatch.setattr(dispatch, "choose_backend", choose)
    return calls


# ------------------------------------------------------------------------------------- the choice


def test_cpu_runs_the_reference(machine):
    machine(torch_version="2.13", flash_version="2.8")
    choice = choose_backend(PLAIN._replace(device_type="cpu"))
    assert choice.backend == "reference"
    assert choice.reason == (
        "flash_attn: needs a CUDA device, not cpu; torch: needs a CUDA device, not cpu; "
        "triton: needs a CUDA device and Triton, not cpu"
    )
    assert str(choice) == f"reference ({choice.reason})"


def test_cuda_prefers_flash_attn_then_torch_then_triton(machine):
    machine(torch_version="2.13", flash_version="2.8")
    assert choose_backend(PLAIN) == ("flash_attn", "first choice, lacks nothing")
    machine(torch_version="2.13")
    choice = choose_backend(PLAIN)
    assert choice.backend == "torch"
    assert (
        choice.reason == "flash_attn: flash-attn is not installed (pip install 'tokenpack[flash]')"
    )
    machine()
    choice = choose_backend(PLAIN)
    assert choice.backend == "triton"
    assert "this torch has no torch.nn.attention.varlen.varlen_attn" in choice.reason


@pytest.mark.parametrize(
    "changes, flash_lacks, torch_lacks, triton_lacks",
    [
        (
            {"relative_bias": True},
            "does not support a relative bias",
            "does not support a relative bias",
            None,
        ),
        ({"dtype": torch.float32}, "not torch.float32", "not torch.float32", None),
        ({"dtype": torch.float16}, None, None, None),
        ({"head_dim": 264}, "up to 256, not 264", "up to 256, not 264", "16 to 256, not 264"),
        (
            {"head_dim": 60},
            "multiple of 8 up to 256, not 60",
            "multiple of 8 up to 256, not 60",
            None,
        ),
        ({"head_dim": 256}, None, None, None),
        ({"flash_scratch_fits": False}, "past 2**31", "past 2**31", None),
        ({"softcap": True}, None, "does not support softcap", None),
        ({"dropout": True}, None, "does not support dropout", None),
        (
            {"softcap": True, "dropout": True},
            "softcap together with dropout",
            "does not support softcap",
            None,
        ),
        ({"window": (3, 0)}, None, None, None),
        ({"kv_heads": 2}, None, None, None),
        ({"default_scale": False}, None, None, None),
        (
            {"device_type": "mps"},
            "needs a CUDA device, not mps",
            "needs a CUDA device, not mps",
            "and Triton, not mps",
        ),
    ],
    ids=str,
)
def test_what_the_newest_versions_lack(machine, changes, flash_lacks, torch_lacks, triton_lacks):
    machine(torch_version="2.13", flash_version="2.8")
    call = PLAIN._replace(**changes)
    lacking = {"flash_attn": flash_lacks, "torch": torch_lacks, "triton": triton_lacks}
    for backend, lack in lacking.items():
        if lack is None:
            assert choose_backend(call, backend) == (backend, "selected by name")
            continue
        with pytest.raises(ValueError, match="cannot run this call") as error:
            choose_backend(call, backend)
        assert lack in str(error.value)
        assert repr(backend) in str(error.value)
    expected = next((name for name, lack in lacking.items() if lack is None), "reference")
    choice = choose_backend(call)
    assert choice.backend == expected
    passed_over = BACKENDS[: BACKENDS.index(expected)]
    for name in passed_over:
        assert f"{name}: " in choice.reason
        assert lacking[name] in choice.reason


@pytest.mark.parametrize("capability", [(7, 5), None])
def test_old_gpu_or_no_gpu(machine, capability):
    machine(torch_version="2.13", flash_version="2.8", capability=capability)
    for backend in ("flash_attn", "torch", "triton"):
        with pytest.raises(ValueError, match=r"needs compute capability 8\.0 or newer"):
            choose_backend(PLAIN, backend)


@pytest.mark.parametrize(
    "version, changes, lack",
    [
        ("2.10", {"window": (3, 0)}, "does not accept window_size"),
        ("2.10", {"default_scale": False}, "does not accept scale"),
        ("2.10", {"kv_heads": 2}, "does not support grouped-query heads"),
        ("2.11", {"kv_heads": 2}, "does not support grouped-query heads"),
    ],
)
def test_what_older_torch_lacks(machine, version, changes, lack):
    machine(torch_version=version)
    with pytest.raises(ValueError, match=lack):
        choose_backend(PLAIN._replace(**changes), "torch")
    assert choose_backend(PLAIN, "torch").backend == "torch"


@pytest.mark.parametrize(
    "version, changes, lack",
    [
        ("2.5", {"softcap": True}, "does not accept softcap"),
        ("3", {"dropout": True}, "does not accept dropout_p"),
        ("4", {"dropout": True}, "does not accept dropout_p"),
    ],
)
def test_what_other_flash_attn_lacks(machine, version, changes, lack):
    machine(flash_version=version)
    with pytest.raises(ValueError, match=lack):
        choose_backend(PLAIN._replace(**changes), "flash_attn")
    assert choose_backend(PLAIN, "flash_attn").backend == "flash_attn"


def test_signature_without_causality(machine, monkeypatch):
    monkeypatch.setitem(TORCH, "stripped", lambda query, key, value, *lengths: query)
    machine(torch_version="stripped")
    with pytest.raises(ValueError, match="accepts neither is_causal nor window_size"):
        choose_backend(PLAIN, "torch")
    assert choose_backend(PLAIN._replace(causal=False), "torch").backend == "torch"


@pytest.mark.parametrize(
    "changes, lack",
    [
        ({"dtype": torch.float64}, "float16, bfloat16 or float32, not torch.float64"),
        ({"head_dim": 8}, "a head_dim from 16 to 256, not 8"),
        ({"device_type": "cpu"}, "a CUDA device and Triton, not cpu"),
    ],
)
def test_what_triton_lacks(machine, changes, lack):
    machine(torch_version="2.13")
    with pytest.raises(ValueError, match=f"attention='triton' cannot run this call: needs {lack}"):
        choose_backend(PLAIN._replace(**changes), "triton")
    everything = {"relative_bias": True, "softcap": True, "dropout": True, "window": (3, 5)}
    assert choose_backend(PLAIN._replace(**everything), "triton").backend == "triton"


def test_the_reference_runs_everything(machine):
    machine(torch_version="2.13", flash_version="2.8")
    assert choose_backend(PLAIN, "reference") == ("reference", "selected by name")


@pytest.mark.parametrize("name", ["flash", "sdpa", "", None])
def test_unknown_name(name):
    with pytest.raises(ValueError, match=r"attention must be one of \('auto', 'flash_attn', 't"):
        choose_backend(PLAIN, name)


def test_failed_import_is_reported(machine, tmp_path, monkeypatch):
    machine(torch_version="2.13")
    (tmp_path / "flash_attn.py").write_text("import a_missing_extension")
    monkeypatch.delitem(sys.modules, "flash_attn")
    monkeypatch.syspath_prepend(tmp_path)
    choice = choose_backend(PLAIN)
    assert choice.backend == "torch"
    assert "flash_attn cannot be imported: No module named 'a_missing_ext" in choice.reason


def test_report_names_every_backend(machine):
    machine(torch_version="2.13", flash_version="2.8")
    report = backend_report()  # of the GPU
    assert [status.name for status in report] == list(BACKENDS)
    assert [status.usable for status in report] == [True] * 4
    assert [status.reason for status in report] == ["ready"] * 4
    machine(torch_version="2.11")
    flash, *_ = backend_report(torch.device("cuda"))
    assert not flash.usable
    assert "pip install" in flash.reason
    report = backend_report(torch.device("cpu"))
    assert [status.usable for status in report] == [False, False, False, True]
    assert "needs a CUDA device, not cpu" in report[1].reason


def test_report_of_a_machine_without_a_gpu(machine):
    machine(torch_version="2.13", flash_version="2.8", capability=None)
    assert [status.usable for status in backend_report()] == [False, False, False, True]
    report = backend_report(torch.device("cuda"))
    assert [status.usable for status in report] == [False, False, False, True]


def test_a_new_backend_is_one_entry_of_the_table(monkeypatch):
    calls = []

    def run(tensors, max_seqlens, options):
        calls.append((tensors, max_seqlens, options))
        return tensors[0] * 2

    new = backends.Backend("new", lambda call: "needs heads" if call.heads > 4 else None, run)
    monkeypatch.setattr(dispatch, "TABLE", (new, *backends.TABLE))
    forget_probes()
    q, k, v, *cu_seqlens = make_call()
    out, choice = packed_attention(
        q, k, v, *cu_seqlens, *map(max, LENGTHS), causal=True, scale=0.5, window=(-1, -1)
    )
    assert choice == ("new", "first choice, lacks nothing")
    assert out.equal(q * 2)
    ((tensors, max_seqlens, options),) = calls
    assert all(map(torch.Tensor.equal, tensors, (q, k, v, *cu_seqlens)))
    assert max_seqlens == (30, 25)
    assert options == {
        "causal": True,
        "scale": 0.5,
        "window": None,
        "softcap": None,
        "relative_bias": None,
        "dropout_p": 0.0,
    }
    assert choose_backend(PLAIN._replace(heads=4), "new") == ("new", "selected by name")
    assert choose_backend(PLAIN._replace(device_type="cpu")).reason.startswith("new: needs heads; ")
    assert [status.name for status in backend_report()] == ["new", *BACKENDS]
    with pytest.raises(ValueError, match=r"attention='new' cannot run this call: needs heads"):
        choose_backend(PLAIN, "new")
    with pytest.raises(ValueError, match=r"must be one of \('auto', 'new', 'flash_attn', .*'old'"):
        choose_backend(PLAIN, "old")
    monkeypatch.undo()
    forget_probes()
    with pytest.raises(ValueError, match="attention must be one of"):
        choose_backend(PLAIN, "new")


# ---------------------------------------------------------------------------------- the same result


def cumulative(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


LENGTHS = [7, 1, 0, 12, 30], [9, 2, 3, 12, 25]


def make_call(kv_heads=4, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(sum(lengths), heads, 16, generator=generator).to(dtype)
        for lengths, heads in zip((LENGTHS[0], *LENGTHS[1:] * 2), (4, kv_heads, kv_heads))
    )
    return q, k, v, *map(cumulative, LENGTHS)


def through(backend, call, *, scale=None, **options):
    scale = call[0].shape[-1] ** -0.5 if scale is None else scale
    out, choice = packed_attention(
        *call, *map(max, LENGTHS), scale=scale, backend=backend, **options
    )
    assert choice.backend == backend
    return out


WINDOWS = [None, (-1, -1), (-3, 0), (3, 0), (2, 5), (-1, 2), (4, -1)]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize(
    "backend, version",
    [*(("torch", version) for version in TORCH), *(("flash_attn", version) for version in FLASH)],
)
def test_causality_and_window_on_every_signature(
    machine, as_if_on_cuda, backend, version, causal, window
):
    machine(**{"torch_version" if backend == "torch" else "flash_version": version})
    call = make_call()
    if version == "2.10" and window not in (None, (-1, -1)):
        with pytest.raises(ValueError, match="does not accept window_size"):
            through(backend, call, causal=causal, window=window)
        return
    expected = varlen_attention(*call, causal=causal, window=window)
    assert through(backend, call, causal=causal, window=window).equal(expected)


@pytest.mark.parametrize(
    "backend, version",
    [("torch", "2.13"), ("flash_attn", "2.5"), ("flash_attn", "2.8"), ("flash_attn", "4")],
)
def test_scale_and_grouped_heads_arrive(machine, as_if_on_cuda, backend, version):
    machine(**{"torch_version" if backend == "torch" else "flash_version": version})
    call = make_call(kv_heads=2)
    expected = varlen_attention(*call, causal=True, scale=1.0)
    assert through(backend, call, causal=True, scale=1.0).equal(expected)
    assert not as_if_on_cuda[-1].default_scale
    through(backend, call, causal=True)
    assert as_if_on_cuda[-1].default_scale


@pytest.mark.parametrize("options", [{"softcap": 2.0}, {"dropout_p": 0.5}], ids=str)
def test_softcap_and_dropout_arrive(machine, as_if_on_cuda, options):
    machine(flash_version="2.8")
    call = make_call()
    torch.manual_seed(0)
    expected = varlen_attention(*call, **options)
    assert not expected.equal(varlen_attention(*call))
    torch.manual_seed(0)
    assert through("flash_attn", call, causal=False, **options).equal(expected)


def test_every_option_reaches_the_reference():
    call = make_call(kv_heads=2)
    table = torch.randn(4, 9)
    options = {"causal": True, "window": (6, -1), "softcap": 2.0, "relative_bias": table}
    expected = varlen_attention(*call, scale=0.7, **options)
    out, choice = packed_attention(*call, *map(max, LENGTHS), scale=0.7, **options)
    assert choice.backend == "reference"
    assert out.equal(expected)
    torch.manual_seed(0)
    expected = varlen_attention(*call, dropout_p=0.5)
    torch.manual_seed(0)
    assert through("reference", call, causal=False, dropout_p=0.5).equal(expected)


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("role, sides", [("cross", (0, 1)), ("enc", (1, 1)), ("dec", (0, 0))])
def test_layout_attention_computes_varlen_attention(role, sides, causal):
    layouts = {name: layout_from_lengths(LENGTHS[i]) for name, i in (("dec", 0), ("enc", 1))}
    of_q, of_k = (LENGTHS[side] for side in sides)
    query, key, value = (
        torch.randn(1, heads, sum(n), 16) for heads, n in ((4, of_q), *[(2, of_k)] * 2)
    )
    table = torch.randn(4, 9)
    options = {"causal": causal, "softcap": 2.0, "relative_bias": table}
    out, choice = layout_attention(query, key, value, layouts, role, sliding_window=3, **options)
    expected = varlen_attention(
        *(side[0].transpose(0, 1) for side in (query, key, value)),
        *map(cumulative, (of_q, of_k)),
        window=(2, 2),
        **options,
    )
    assert choice.backend == "reference"
    assert out.shape == (1, sum(of_q), 4, 16)
    assert out[0].equal(expected)
    with pytest.raises(RuntimeError, match=rf"of their layouts, got {sum(of_q) - 1} and"):
        layout_attention(query[:, :, 1:], key, value, layouts, role, causal=causal)


def test_autocast_decides_before_the_choice(machine, as_if_on_cuda):
    machine(torch_version="2.13")
    call = make_call(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = through("torch", call, causal=True)
    assert as_if_on_cuda[-1].dtype == out.dtype == torch.bfloat16


def test_flash_scratch_limit(machine, as_if_on_cuda):
    machine(torch_version="2.13")

    def attend(tokens):
        side = torch.zeros(1, 1, 1, dtype=torch.bfloat16).expand(tokens, 32, 64)
        cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32)
        packed_attention(side, side, side, cu_seqlens, cu_seqlens, tokens, tokens, **options)

    options = {"causal": True, "scale": 0.125, "backend": "torch"}
    with pytest.raises(ValueError, match=r"past 2\*\*31 scratch elements"):
        attend(2**20 - 256)
    assert not as_if_on_cuda[-1].flash_scratch_fits
    options["backend"] = "flash_attn"  # not installed, so it raises before it runs
    with pytest.raises(ValueError, match="not installed"):
        attend(2**20 - 257)
    assert as_if_on_cuda[-1].flash_scratch_fits


# ------------------------------------------------------------------------------ the real functions


def test_installed_torch_accepts_the_keywords():
    forget_probes()
    function, accepted = backends._torch_varlen()
    for causal in (False, True):
        options = backends._torch_keywords(
            accepted, {"causal": causal, "scale": 0.5, "window": None}, grouped=False
        )
        bound = inspect.signature(function).bind(*range(7), **options)
        if "is_causal" in accepted:
            assert bound.arguments["is_causal"] is causal
        if "window_size" in accepted:
            # torch compares with exactly this tuple.
            assert bound.arguments["window_size"] == ((-1, 0) if causal else (-1, -1))
            assert isinstance(bound.arguments["window_size"], tuple)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["flash_attn", "torch"])
@pytest.mark.parametrize("window", [None, (3, 0), (2, 5), (4, -1)], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
def test_on_cuda_against_the_reference_in_float64(backend, causal, window):
    forget_probes()
    q, k, v, *cu_seqlens = (tensor.cuda() for tensor in make_call())
    options = {"causal": causal, "window": window}
    shape = {"head_dim": 16, "heads": 4, "kv_heads": 4}
    try:
        choose_backend(PLAIN._replace(**options, **shape), backend)
    except ValueError as lack:
        pytest.skip(str(lack))

    def run(function, dtype):
        leaves = [side.to(dtype).requires_grad_() for side in (q, k, v)]
        out = function(*leaves)
        out.backward(torch.ones_like(out))
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    def reference(q, k, v):
        return varlen_attention(q, k, v, *cu_seqlens, **options)

    def tested(q, k, v):
        return through(backend, (q, k, v, *cu_seqlens), **options)

    exact = run(reference, torch.float64)
    yardstick = run(reference, torch.bfloat16)
    for ours, theirs, truth in zip(run(tested, torch.bfloat16), yardstick, exact):
        assert ours.isfinite().all()
        allowed = 3 * (theirs.double() - truth).norm() + 2**-8 * truth.norm()
        assert (ours.double() - truth).norm() <= allowed


@pytest.mark.parametrize("lengths", [[4, 5], [200, 300]], ids=["one call", "groups"])
@pytest.mark.parametrize("options", [{}, {"relative_bias": True}, {"dropout_p": 0.2}], ids=str)
def test_a_second_derivative_is_an_error(options, lengths):
    """Also if no gradient of the output requires one: a sum of these would lack a term."""
    options = dict(options)
    q = torch.randn(1, 2, sum(lengths), 16, requires_grad=True)
    if options.pop("relative_bias", False):
        options["relative_bias"] = torch.randn(2, 7, requires_grad=True)
    out, _ = layout_attention(
        q, q, q, {"self": layout_from_lengths(lengths)}, causal=True, **options
    )
    (gradient,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiable once|is not implemented"):
        (gradient.sum() + q.sum()).backward()
