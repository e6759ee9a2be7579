"""The committed table of `make compile` belongs to the kernels of this checkout."""

import shutil
from statistics import harmonic_mean

import pytest

from . import compile_table
from .tile_counts import NEEDED_PRODUCTS


def test_the_committed_table_is_of_this_code():
    _, made_from, lines = compile_table.read()
    assert len(lines) > 200
    assert made_from == compile_table.fingerprint(), (
        "kernels/ or the cases of the gate have changed: run make compile and commit its table"
    )


def test_a_changed_kernel_is_seen_and_a_changed_comment_is_not(tmp_path, monkeypatch):
    before = compile_table.fingerprint()
    shutil.copytree(compile_table.ROOT / "kernels", tmp_path / "kernels")
    monkeypatch.setattr(compile_table, "ROOT", tmp_path)
    assert compile_table.fingerprint() == before
    path = tmp_path / "kernels/padding.py"
    text = path.read_text(encoding="utf-8")
    path.write_text("# A comment.\n" + text.replace('"""', '"""Another docstring. ', 1))
    assert compile_table.fingerprint() == before
    path.write_text(text + "\n_NEW = 1\n")
    assert compile_table.fingerprint() != before


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    "kernels, within", [(["forward"], 1.3), (["backward_q", "backward_kv"], 1.5)]
)
def test_tiles_with_a_bias_cost_little_more_than_tiles_without(kernels, within, head_dim):
    """Beyond the table's reach at most 1.02 times as much, on both sides together."""
    counts = [row for row in compile_table.read_counts() if row.target == "sm_90"]

    def clocks(case, kind):
        """Of all kernels, for one score. Loops of one kind count equally."""
        total = 0.0
        for name in (f"_attention_{kernel}_kernel" for kernel in kernels):
            call = name, f"attention, {case}, {head_dim}, bf16", kind
            serial = [row.serial for row in counts if call == (row.kernel, row.case, row.kind)]
            total += NEEDED_PRODUCTS[name] / harmonic_mean(serial)
        return total

    assert clocks("bias", "table") <= within * clocks("plain", "whole")
    assert clocks("bias", "whole") <= 1.02 * clocks("plain", "whole")


def test_whole_calls_with_a_bias_are_predicted():
    rows = compile_table.read_predictions()
    calls = {(row["tokens"], row["head_dim"], row["direction"]) for row in rows}
    sizes = [(tokens, width) for tokens in ("128", "512") for width in ("64", "128")]
    assert calls == {(*size, way) for size in sizes for way in ("causal", "both directions")}
    # Short causal sequences: with a bias, dq's smaller tiles compute fewer hidden scores.
    assert all(0.95 <= float(row["both"]) <= 1.5 for row in rows)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    "kernel, share", [("forward", 0.95), ("backward_q", 0.9), ("backward_kv", 0.9)]
)
def test_whole_loops_are_about_as_cheap_as_attention_without_options(kernel, share, head_dim):
    """The loop over keys or queries that no mask and no bias touches."""
    ceilings = compile_table.read_ceilings()
    ours = max(
        ceiling
        for (*call, _, _), ceiling in ceilings.items()
        if call == [f"_attention_{kernel}_kernel", f"attention, causal, {head_dim}, bf16", "sm_90"]
    )
    name = f"_yardstick_{kernel}_kernel", f"yardstick, {head_dim}, bf16", "sm_90"
    yardstick = ceilings[compile_table.Loop(*name, "whole", 0)]
    assert ours >= share * yardstick
