"""Places of tokens: from lengths where these are exact, then equal to the tokenizer's offsets."""

import random

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, processors
from tokenizers.pre_tokenizers import ByteLevel, Digits, Metaspace, Sequence, Split
from transformers import PreTrainedTokenizerFast

from tokenpack.data.chat.ascii_texts import for_ascii
from tokenpack.data.chat.encoding import Encoder
from tokenpack.data.chat.rendering import Rendering, Span

from .helpers import make_tokenizer

PIECES = [
    *("a", " the", "  ", "\n", "\n\n", "\t", "\x00", "don't", "12345", "word", "Hello, the world"),
    *(
        "é",
        "e\u0301",
        "\u212b",
        "\u0344",
        "字",
        "元気",
        "🙂",
        "👩‍👩‍👧",
        "🇫🇷",
        "\u2028",
        "\ufeff",
        "Ã©",
    ),
    *("<|im_end|>", "<|im_start|>", "</s>", "<s>", "<｜User｜>", "[INST]", "<strip>", "<unk>"),
]
BYTES = ByteLevel(add_prefix_space=False, use_regex=False)


def changed(**parts):
    tokenizer = make_tokenizer()
    for name, part in parts.items():
        setattr(tokenizer.backend_tokenizer, name, part)
    return tokenizer


def with_tokens(*tokens):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken(*token, **options) for *token, options in tokens])
    return tokenizer


def of_some_bytes(unk_token, strip=False):
    """A vocabulary without most bytes, which drops them or writes ``unk_token``."""
    names = [*"athewords", "Ġ", "Ã", "©", "Ã©", "<unk>"]
    vocabulary = {name: at for at, name in enumerate(names)}
    model = models.BPE(vocabulary, [("Ã", "©")], unk_token=unk_token, fuse_unk=True)
    backend = Tokenizer(model)
    backend.pre_tokenizer = BYTES
    backend.add_tokens([AddedToken("Ã©", normalized=False)])  # as merges write é
    backend.add_tokens([AddedToken("<strip>", lstrip=True)] if strip else [])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def split_of(behavior):
    return Sequence([Split(Regex(r"\p{L}+|\s+"), behavior), Digits(individual_digits=True), BYTES])


TEMPLATE = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
BOTH = processors.Sequence([processors.ByteLevel(trim_offsets=False), TEMPLATE])

# A tokenizer, and the share of texts whose places follow from lengths: all, some or none.
TOKENIZERS = {
    "byte-level": (make_tokenizer, "all"),
    "published": (lambda: changed(pre_tokenizer=split_of("isolated"), post_processor=BOTH), "all"),
    "no specials": (lambda: changed(encode_special_tokens=True), "all"),
    "NFC": (lambda: changed(normalizer=normalizers.NFC()), "some"),
    "strips": (lambda: with_tokens(("<strip>", {"lstrip": True}), ("word", {})), "some"),
    "some bytes": (lambda: of_some_bytes(None), "some"),
    "unknown": (lambda: of_some_bytes("<unk>"), "some"),
    "NFKC": (lambda: changed(normalizer=normalizers.NFKC()), "none"),
    "prefix space": (lambda: changed(pre_tokenizer=ByteLevel(add_prefix_space=True)), "none"),
    "removes": (lambda: changed(pre_tokenizer=split_of("removed")), "none"),
    "metaspace": (lambda: changed(pre_tokenizer=Metaspace()), "none"),
    "trims": (lambda: make_tokenizer(trim_offsets=True), "none"),
}


def renderings(rng):
    for _ in range(60):
        text = "".join(rng.choice(PIECES) for _ in range(rng.choice([0, 1, 2, 5, 30])))
        count = min(len(text) + 1, 2 * rng.randint(0, 3)) // 2 * 2
        cuts = sorted(rng.sample(range(len(text) + 1), count))
        spans = [
            Span(*pair, 0, rng.choice([0.5, 1.0]), None) for pair in zip(cuts[::2], cuts[1::2])
        ]
        yield Rendering(None, {}, text, spans)


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_lengths_and_offsets_give_the_same(kind, many):
    make, share = TOKENIZERS[kind]
    encoder, by_offsets = Encoder(make()), Encoder(make())
    by_offsets._lengths = None
    if many:
        encoder.expect(10_001)
    assert (encoder._for_ascii is not None) == (many and share != "none")
    texts = list(renderings(random.Random(kind)))
    for one, other in zip(encoder.encode(texts), by_offsets.encode(texts), strict=True):
        assert one.ids.tolist() == other.ids.tolist()
        assert one.labels.tolist() == other.labels.tolist()
        assert one.weights.tolist() == other.weights.tolist()
        assert one.spans.tolist() == other.spans.tolist()
        assert (one.merged, one.targets) == (other.merged, other.targets)
        assert one.targets == (one.labels != -100).sum()
    used = sum(each is not None for each in encoder._by_length(texts))
    assert {"all": used == 60, "some": 0 < used < 60, "none": used == 0}[share]
    assert encoder.encode([]) == []


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: of_some_bytes("<unk>"), "xaxxxxxxxxx"),  # one token for one byte, one for nine
        (TOKENIZERS["NFC"][0], "\u212b\u212b.\u0344"),  # two bytes less, two more
        (lambda: of_some_bytes(None, strip=True), "é  <strip>a"),  # é is the token Ã©
    ],
)
def test_changes_that_keep_the_number_of_bytes_are_found(make, text):
    encoder = Encoder(make())
    (encoded,) = encoder.encode([Rendering(None, {}, text, [])])
    assert len(encoded.ids) > 1
    assert encoder._by_length([encoded.rendering]) == [None]


def test_a_cut_counts_its_targets():
    text = Rendering(None, {}, "a b c d", [Span(2, 7, 0, 1.0, None)])
    (encoded,) = Encoder(make_tokenizer()).encode([text])
    cut = encoded.cut(slice(None, 3))
    assert cut.targets == (cut.labels != -100).sum() > 0
    assert encoded.cut(slice(1)).targets == 0


def characters(count):
    rng = random.Random(0)
    letters = [*map(chr, range(128)), *"   \n\n''tsdremvl", " don't", "<|im_end|>", "</s>"]
    return ["".join(rng.choices(letters, k=rng.randrange(60))) for _ in range(count)]


LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    "pre_tokenizer", [None, BYTES, Sequence([Split(Regex(LLAMA), "isolated"), BYTES])]
)
def test_a_tokenizer_for_ascii_gives_the_same_ids(pre_tokenizer):
    own = changed(**{"pre_tokenizer": pre_tokenizer} if pre_tokenizer else {}).backend_tokenizer
    other = for_ascii(own)
    for text in characters(2000):
        ids = own.encode(text, add_special_tokens=False).ids
        assert other.encode(text, add_special_tokens=False).ids == ids


def test_some_vocabularies_have_no_tokenizer_for_ascii():
    """A token with a space of its own cannot be told from one with the space's name."""
    names = {"a": 0, "Ġ": 1, "Ġa": 2, " a": 3}
    backend = Tokenizer(models.BPE(names, [("Ġ", "a")]))
    backend.pre_tokenizer = BYTES
    assert for_ascii(backend) is None
    del names[" a"]
    backend.model = models.BPE(names, [("Ġ", "a")])
    assert for_ascii(backend).encode("a a").ids == [0, 2]
    backend.add_tokens(["x\ny"])  # not in the vocabulary, so no merge writes it
    assert for_ascii(backend).encode("x\ny a").ids == [3, 2]
