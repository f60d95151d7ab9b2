"""A text that is certain to be too long is refused by its length; no other is."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from paged_kv.engine.text import encode_prompt
from paged_kv.engine.text_length import least_tokens
from paged_kv.errors import InvalidRequestError, PromptTooLongError

DEMO_MODEL = Path(__file__).parents[2] / "paged_kv" / "demo_model"
LETTERS = list(bytes_to_unicode().values())
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(normalizer: Any = None, added: tuple[AddedToken, ...] = ()) -> Any:
    vocab = {letter: n for n, letter in enumerate(LETTERS)} | {"aa": 256, "aaaa": 257}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "a"), ("aa", "aa")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_tokens(list(added))
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def byte_fallback(*left_out: str) -> Any:
    """As Llama's: a space is written as ▁, and what no token has is said in bytes."""
    names = [name for name in ("<unk>", *BYTES, "▁", "a", "▁a", "aa") if name not in left_out]
    vocab = {name: n for n, name in enumerate(names)}
    merges = [("▁", "a"), ("a", "a")]
    backend = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def unigram() -> Any:
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    return PreTrainedTokenizerFast(tokenizer_object=backend)


KNOWN = {
    "byte-level": byte_level,
    "nfc": lambda: byte_level(normalizers.NFC()),
    "byte-fallback": byte_fallback,
    "demo": lambda: AutoTokenizer.from_pretrained(DEMO_MODEL),
}
UNKNOWN = {
    "unigram": unigram,
    "strips": lambda: byte_level(normalizers.Strip()),
    "deletes": lambda: byte_level(normalizers.Replace("b", "")),
    "drops accents": lambda: byte_level(normalizers.Sequence(
        [normalizers.NFD(), normalizers.StripAccents()])),
    "eats space": lambda: byte_level(added=(AddedToken("<x>", lstrip=True),)),
    "lacks bytes": lambda: byte_fallback("<0x80>"),
}  # fmt: skip


@pytest.fixture(params=KNOWN)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return KNOWN[request.param]()


class Untouched:
    """A tokenizer that is looked at, and never asked for tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self.backend_tokenizer = tokenizer.backend_tokenizer

    def encode(self, *arguments: object, **options: object) -> list[int]:
        raise AssertionError("it was tokenized")


def test_ten_megabytes_are_refused_without_being_tokenized(tokenizer):
    prompt = "a few words. " * 800_000
    start = time.thread_time()
    with pytest.raises(PromptTooLongError, match=r"^a prompt of \d+ or more tokens .* of 2048$"):
        encode_prompt(prompt, Untouched(tokenizer), 2047)
    assert time.thread_time() - start < 0.5


@pytest.mark.parametrize("kind", UNKNOWN)
def test_where_a_token_may_be_any_length_nothing_is_refused_by_length(kind):
    made = UNKNOWN[kind]()
    assert least_tokens(10_000_000, made) == 0
    assert encode_prompt("a" * 5000, made, 8) == made.encode("a" * 5000)


TEXTS = (
    st.text(max_size=60)
    | st.text("aé▁ \n", max_size=60)
    | st.text("a\u0301\u0345\u0313ω", max_size=60)
)


@pytest.mark.parametrize("kind", KNOWN)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(text=TEXTS)
def test_no_text_has_fewer_tokens_than_is_said(kind, text):
    made = MADE[kind]
    assert least_tokens(len(text), made) <= len(made.encode(text, add_special_tokens=False))


MADE = {kind: make() for kind, make in KNOWN.items()}


def test_without_a_limit_any_text_is_taken():
    made = MADE["byte-level"]
    assert len(encode_prompt("b" * 100_000, made)) == 100_000


def test_token_ids_are_refused_by_their_number_before_they_are_looked_at():
    class Ids(list):
        def __iter__(self):
            raise AssertionError("they were looked at")

    with pytest.raises(PromptTooLongError, match="1000000 or more tokens"):
        encode_prompt(Ids([1] * 1_000_000), None, 2047)


@pytest.mark.parametrize("prompt", ["\ud800", "a\udfffb"])
def test_what_is_no_text_is_refused(prompt, tokenizer):
    with pytest.raises(InvalidRequestError, match="surrogates"):
        encode_prompt(prompt, tokenizer, 2047)


def test_a_wrong_prompt_is_not_told_of_at_length():
    with pytest.raises(InvalidRequestError) as caught:
        encode_prompt(["x"] * 1_000_000, None)
    assert len(str(caught.value)) < 400
