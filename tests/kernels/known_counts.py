"""What the compile gate allows beside its limits, each with the reason."""

# (kernel, case, target, loop) whose ceiling may fall when the table is written next. A change that
# needs an entry says why in its commit message; the change after it removes the entry.
KNOWN_FALLS: set[tuple[str, str, str, int]] = {
    (f"_attention_backward_{kernel}_kernel", f"attention, {case}, bf16", target, loop)
    for kernel, case, target, loops in (
        ("kv", "bias, 128", "sm_100", (3, 5)),
        ("kv", "bias, causal, dropout, 128", "sm_100", (2, 3)),
        ("kv", "causal, 128", "sm_100", (2, 3, 5)),
        ("kv", "causal, dropout, 128", "sm_100", (0, 2, 3)),
        ("kv", "causal, dropout, 128", "sm_80", (0, 1, 2)),
        ("kv", "causal, grouped, 256", "sm_100", (0, 1)),
        ("q", "causal, 64", "sm_80", (1,)),
        ("q", "causal, dropout, 128", "sm_100", (3,)),
        ("q", "causal, dropout, 64", "sm_100", (0,)),
    )
    for loop in loops
}

# Kernels of sm_90 that spill: the words that the kernel and its loops move at most, by kernel,
# kind of call, head_dim and dtype. What tiles without spills give was counted (serial ceilings):
# - dk and dv with a bias, 96 or 128: 561 instead of 711 (32 x 128), so the words cost less.
# - dq with a bias, 96 or 128: 690 instead of 720 (128 x 64 with 8 warps). This is more than the 2 %
#   that tiles beyond the table's reach may cost (`test_compile_table`).
# - dq with a bias, 256: 375 instead of 577 (128 x 16: 3 words), with dropout 280 instead of 336.
# - dq with "everything", 64: 182 instead of 199 (128 x 32).
# - Grouped dk and dv: two words for a whole program.
_DQ, _DKV = "_attention_backward_q_kernel", "_attention_backward_kv_kernel"
HOPPER_SPILLS = {
    (_DKV, "bias", 128, "bf16"): (10, 2),
    (_DKV, "bias", 96, "bf16"): (5, 0),
    (_DKV, "bias, causal", 128, "bf16"): (27, 13),
    (_DKV, "bias, grouped", 256, "bf16"): (2, 0),
    (_DKV, "bias, grouped", 96, "bf16"): (2, 0),
    (_DKV, "causal, grouped", 256, "bf16"): (2, 0),
    (_DQ, "bias", 128, "bf16"): (25, 0),
    (_DQ, "bias", 256, "bf16"): (27, 0),
    (_DQ, "bias", 96, "bf16"): (25, 0),
    (_DQ, "bias, causal", 128, "bf16"): (29, 0),
    (_DQ, "bias, causal, dropout", 256, "bf16"): (32, 0),
    (_DQ, "everything", 256, "bf16"): (12, 0),
    (_DQ, "everything", 64, "bf16"): (4, 0),
    (_DQ, "bias", 256, "fp32"): (2, 0),
    (_DQ, "bias, causal, dropout", 256, "fp32"): (51, 0),
    (_DQ, "causal", 128, "fp32"): (17, 0),
}

# How many warps compute the same float32 scores, by kernel and head_dim: in the forward of 128
# columns, only with dropout. Tiles for fewer warps were counted. They are two to five times better,
# without spills in the forward (64 x 32 with 4 warps, 32 x 64 and 16 x 64 with 8 warps for head_dim
# 64, 128 and 256) and in dq up to 128 columns (16 x 32 with 4 warps: 9 words). dk and dv with 64
# keys of 128 columns spill 743 words, and Triton 3.7.1 compiles one of them to nothing for sm_100.
FLOAT32_TIMES = {
    ("_attention_forward_kernel", 64): 2.05,
    ("_attention_forward_kernel", 128): 4.05,
    ("_attention_forward_kernel", 256): 4.05,
    ("_attention_backward_q_kernel", 64): 2.05,
    ("_attention_backward_q_kernel", 128): 2.05,
    ("_attention_backward_q_kernel", 256): 2.05,
    ("_attention_backward_kv_kernel", 64): 4.05,
    ("_attention_backward_kv_kernel", 128): 4.05,
    ("_attention_backward_kv_kernel", 256): 8.05,
}
