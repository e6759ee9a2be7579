"""Equal to the unpatched model, or a counted fall back, or a named error of tokenpack."""

import inspect

import pytest
import transformers as hf
from transformers.utils import logging

from tokenpack.adapters.families import FAMILIES

from .compare import FALLS_BACK, PACKS, Cell, run_cell
from .families import CASES, NOT_BUILT, modeling_module
from .table import ENTRIES, PACKS_FILE, recorded_packs, table_row

# Some classes only run padded.
pytestmark = pytest.mark.filterwarnings("ignore:patch_model has no effect:RuntimeWarning")

# Variants that differ today, with the reason: (class, entry, variant).
KNOWN_FAULTS: dict[tuple[str, str, str], str] = {}

# Families whose modules are those of another, in the same order or with other defaults: T5, BART,
# Marian, RoBERTa and Llama. CI runs their model with the main head.
LIKE_OTHERS = frozenset({"mt5", "mbart", "pegasus", "xlm-roberta", "qwen2"})
HEADS = ("ForConditionalGeneration", "MTModel", "ForCausalLM", "ForMaskedLM")


def marks_of(case, entry):
    yield pytest.mark.skipif(not case.available, reason="transformers is too old for it")
    # The parts of a model are the same under each of its heads.
    is_main = case.name.endswith(HEADS) and (entry == "top" or case.model_type not in LIKE_OTHERS)
    is_another = case.model_type not in LIKE_OTHERS and (entry == "top" or "For" not in case.name)
    if not (is_main or is_another):
        yield pytest.mark.long


CELLS = [
    pytest.param(case, entry, id=f"{case}-{entry}", marks=list(marks_of(case, entry)))
    for case in CASES
    for entry in case.parts()
]
RECORDED = recorded_packs()
# The heads that must pack, by kind of family, besides the base models and the stacks.
MAIN = {
    "encoder_decoder": ("ForConditionalGeneration", "MTModel", "Model", "Encoder", "Decoder"),
    "decoder": ("ForCausalLM", "LMHeadModel", "ForSequenceClassification", "Model"),
    "encoder": ("ForMaskedLM", "ForTokenClassification", "ForSequenceClassification", "Model"),
}


@pytest.fixture(autouse=True)
def _quiet():
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(level)


@pytest.mark.parametrize("case, entry", CELLS)
def test_equal_or_counted_or_refused(case, entry):
    cell = run_cell(case, entry)
    known = {variant for name, at, variant in KNOWN_FAULTS if (name, at) == (str(case), entry)}
    faults = [f"{v}: {fault}" for v, fault in cell.failures.items() if v not in known]
    faults += [f"{v}: remove it from KNOWN_FAULTS" for v in known if v not in cell.failures]
    packs = {variant for variant, kind in cell.kinds.items() if kind == PACKS}
    lost = RECORDED.get((str(case), entry), set()) - packs
    if lost:
        faults.append(f"no longer pack: {sorted(lost)} ({dict(cell.reasons)})")
    if "default cache" in cell.kinds and case.kind != "encoder":
        assert cell.kinds["default cache"] == FALLS_BACK
    assert not faults, f"{case}, {entry}:\n" + "\n".join(faults)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_main_classes_of_a_family_pack(model_type):
    """The first test cannot pass because everything falls back."""
    kind = FAMILIES[model_type].kind
    tops = [
        case
        for case in CASES
        if case.model_type == model_type and not case.suffix and case.name.endswith(MAIN[kind])
    ]
    assert len(tops) >= 2
    for case in tops:
        for entry in case.parts():
            if case.name != "GPT2DoubleHeadsModel":  # its second head reads a given column
                assert "right" in RECORDED[str(case), entry], f"{case}, {entry} must pack"


def test_every_class_is_a_case_or_has_a_reason():
    classes = {
        name
        for model_type in FAMILIES
        for name, value in vars(modeling_module(model_type)).items()
        if inspect.isclass(value)
        and issubclass(value, hf.PreTrainedModel)
        and value.__module__ == modeling_module(model_type).__name__
        and not name.endswith("PreTrainedModel")
    }
    cases = {case.name for case in CASES}
    assert classes == cases | NOT_BUILT.keys()
    assert not cases & NOT_BUILT.keys()
    known = {(str(case), entry) for case in CASES for entry in case.parts()}
    assert RECORDED.keys() <= known, f"{PACKS_FILE.name} has cells that do not exist"
    assert {(name, entry) for name, entry, _ in KNOWN_FAULTS} <= known


def test_no_cell_of_the_table_is_empty():
    case = CASES[0]
    row = table_row(case, {"top": Cell({"right": PACKS, "left": FALLS_BACK})})
    cells = [text.strip() for text in row.strip("|").split("|")]
    assert cells == [str(case), "packs 1, falls back 1", *["no such part"] * (len(ENTRIES) - 1)]
