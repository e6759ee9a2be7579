"""Every public name is importable from the path that users know, and is documented there."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The contract: a name that once was public stays where it is. New names are added here.
PUBLIC = {
    "tokenpack": """
        ModelReport PackingStats PatchCheck PatchCheckError check_patch inspect_model is_patched
        packing_stats patch_model unpatch_model
    """,
    "tokenpack.adapters": "PackingStats is_patched packing_stats patch_model unpatch_model",
    "tokenpack.attention": """
        BACKENDS AttentionCall BackendStatus Choice backend_report choose_backend layout_attention
        packed_attention require_known_backend
    """,
    "tokenpack.cost": """
        BatchCount Ceilings Exchange ModelCost Operations StepMemory StepSeconds Traffic
        count_lengths count_memory count_operations count_packed count_padded count_traffic
        exchange_bytes forecast_seconds kept_label_lengths measure_ceilings model_cost
        rank_efficiency read_ceilings state_memory token_budget training_operations write_ceilings
    """,
    "tokenpack.data": """
        BlendedSamples CappedSeq2SeqCollator ChatReport ChatTemplate DataConfig Denoiser PackedBatch
        PackedPairs PackedStream PackedStreamLoader Preview SFTDataConfig ShardLoader ShardSamples
        ShardStep
        ShardWriter T5SpanCorruptionCollatorFast TokenShards blend_shards byte_tokenizer
        chat_dataset collate_packed_rows concatenate_and_pack convert_shards from_binary from_files
        from_hf from_npy_split from_sft_files from_sft_hf from_sft_json from_sft_strings
        merge_shards pack_dataset pack_dataset_from_result pack_pairs_to_tensors
        pack_result_to_tensors pack_sequences pack_stream packed_collate_fn preview save_binary
        shard_windows streaming_dataset_reader train_tokenizer write_shards
    """,
    "tokenpack.kernels": """
        PackedLayout TokenStats layout_from_cu_seqlens layout_from_lengths layout_from_mask
        layout_from_position_ids packed_cross_entropy packed_linear_cross_entropy repad unpad
        varlen_attention
    """,
    "tokenpack.kernels.attention": """
        alibi_bias_table cast_for_autocast is_ampere_or_newer kernel_lacks normal_window
        t5_bias_table varlen_attention varlen_attention_reference
    """,
    "tokenpack.metrics": "LANGUAGE_COLUMNS METRICS Seq2SeqMetrics make_seq2seq_compute_metrics",
    "tokenpack.models.decoder": """
        DecoderConfig DecoderForCausalLM DecoderModel RouterBiasCallback
    """,
    "tokenpack.packing": """
        PackMetrics PackResult Packer PairPackResult StreamBin StreamPacker balance_ranks bin_costs
        merge_results merge_saved pack_lengths pack_pairs pack_shards
    """,
    "tokenpack.trainer": """
        HierarchicalTokenTrainer OutOfMemoryInStepError TokenBudget TokenBudgetArguments
        TokenBudgetBatchSampler TokenBudgetTrainer dataset_lengths
    """,
}
NAMES = [(module, name) for module, names in PUBLIC.items() for name in names.split()]


@pytest.mark.parametrize("module, name", NAMES, ids=[f"{m}.{n}" for m, n in NAMES])
def test_public_name_imports_from_its_path(module, name):
    assert getattr(importlib.import_module(module), name) is not None


@pytest.mark.parametrize("module", PUBLIC)
def test_all_lists_what_is_public(module):
    assert set(importlib.import_module(module).__all__) >= set(PUBLIC[module].split())


@pytest.mark.parametrize("module", sorted(set(PUBLIC) - {"tokenpack.adapters"}))
def test_public_module_has_an_api_page_in_the_navigation(module):
    pages = {
        path.name: re.findall(r"^::: (\S+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        for path in (ROOT / "docs/api").glob("*.md")
    }
    (page,) = [name for name, documented in pages.items() if module in documented]
    assert f"api/{page}" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def documented_names():
    """Dotted names of ours and imports in the README, the pages and the examples."""
    found = set()
    for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.py")]:
        text = path.read_text(encoding="utf-8")
        for module, names in re.findall(
            r"^\s*(?:>>> )?from (tokenpack[\w.]*) import ((?:\(\n[^)]*\))|[^\n]*)",
            text,
            re.MULTILINE,
        ):
            found |= {
                f"{module}.{name}" for name in re.findall(r"\w+", re.sub(r"#.*| as \w+", "", names))
            }
        found |= set(re.findall(r"`(tokenpack(?:\.\w+)+)", text))
    return sorted(found)


@pytest.mark.parametrize("name", documented_names())
def test_documented_name_exists(name):
    parts = name.split(".")
    value, at = importlib.import_module(parts[0]), 1
    while at < len(parts):
        try:
            value = getattr(value, parts[at])
        except AttributeError:
            value = importlib.import_module(".".join(parts[: at + 1]))
        at += 1
