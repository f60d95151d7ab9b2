"""Text to tokens and back: prompts of every kind, text as it streams, stop strings.

The tokenizers are built here: bytes (with merges that cut characters in two), words with
Metaspace, and characters with byte fallback. The reference is `tokenizer.decode`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from paged_kv.engine import text
from paged_kv.engine.live_request import LiveRequest
from paged_kv.engine.output_processor import OutputProcessor, TextOutput
from paged_kv.engine.sampler import Draw
from paged_kv.engine.sampling_params import SamplingParams
from paged_kv.engine.text import Detokenizer, encode_prompt
from paged_kv.engine.token_rules import rules_of
from paged_kv.errors import InvalidRequestError, PagedKVError
from paged_kv.scheduler.request import Request

CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
REPLACEMENT = "\ufffd"


def fast(backend: Tokenizer, **options: object) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **options
    )


@cache
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Token i is byte i; three merges, two of which end inside a character; <s> and </s>."""
    letters = bytes_to_unicode()
    vocab = {letters[byte]: byte for byte in range(256)}
    merges = []
    for first, second in (b"he", b"\xe4\xb8", b"\xf0\x9f"):
        merges.append((letters[first], letters[second]))
        vocab[letters[first] + letters[second]] = len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return fast(backend, bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE)


WORDS = ["▁Hello", "▁world", "▁", "wor", "ld", "lo", "!", "▁a", "b", "é", "▁日本", "語", "▁🙂", "."]


@cache
def word_tokenizer() -> PreTrainedTokenizerFast:
    """Sentencepiece-like: words begin with a space that decoding strips from the first."""
    pieces = [("<unk>", 0.0), *((word, -1.0 - 0.1 * i) for i, word in enumerate(WORDS))]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return fast(backend, unk_token="<unk>", eos_token="</s>")


@cache
def fallback_tokenizer() -> PreTrainedTokenizerFast:
    """Llama-like: letters, and a byte token for each byte of what the vocabulary lacks."""
    vocab = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}}
    for piece in "▁abcdefé":
        vocab[piece] = len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return fast(backend, unk_token="<unk>")


TOKENIZERS = {
    "bytes": byte_tokenizer,
    "words": word_tokenizer,
    "byte-fallback": fallback_tokenizer,
}
every_tokenizer = pytest.mark.parametrize(
    "tokenizer", [make() for make in TOKENIZERS.values()], ids=TOKENIZERS.keys()
)


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def stream_text(
    tokenizer: PreTrainedTokenizerFast | None,
    prompt: Sequence[int],
    output: Sequence[int],
    stop: Sequence[str] = (),
    min_tokens: int = 0,
) -> tuple[list[str], bool]:
    """Pieces of text in the order they are emitted, one a token, and whether a stop string came."""
    detokenizer = Detokenizer(tokenizer, prompt, stop)
    pieces = []
    for index, token_id in enumerate(output):
        has_stopped = detokenizer.append(token_id, may_stop=index + 1 >= min_tokens)
        is_final = has_stopped or index + 1 == len(output)
        if is_final:
            detokenizer.finish()
        pieces.append(detokenizer.take_new_text(is_final))
        if has_stopped:
            break
    assert "".join(pieces).endswith(detokenizer.text)  # of a long text only the end is kept
    return pieces, has_stopped


def text_after(
    tokenizer: PreTrainedTokenizerFast, prompt: Sequence[int], output: Sequence[int]
) -> str:
    """What `tokenizer.decode` adds to the prompt's text when the output follows it."""
    before = tokenizer.decode(list(prompt), skip_special_tokens=True)
    after = tokenizer.decode([*prompt, *output], skip_special_tokens=True)
    assert after.startswith(before)
    return after[len(before) :]


# -- text as it streams -------------------------------------------------------------------------

TEXTS = {
    "bytes": ["hello world", "日本語中文", "🙂🙃 and 中", "naïve café\n\n", "x", "a\ufffdb"],
    "words": ["Hello world!", "world Hello.", "Hello 日本語 🙂 a.", "aé b", "world"],
    "byte-fallback": ["abc def", "日本 é 🙂!", "a\nb\tc", "a", "a \ufffd b"],
}


@pytest.mark.parametrize(
    ("name", "text"), [(name, text) for name, texts in TEXTS.items() for text in texts]
)
def test_streamed_text_is_the_text_that_was_encoded(name, text):
    tokenizer = TOKENIZERS[name]()
    prompt, output = ids_of(tokenizer, "a"), ids_of(tokenizer, text)
    pieces, _ = stream_text(tokenizer, prompt, output)
    assert "".join(pieces) == text_after(tokenizer, prompt, output)
    assert "".join(pieces).lstrip() == text


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), word_tokenizer()], ids=["bytes", "words"])
@pytest.mark.parametrize("prompt_length", [1, 3, 8, 9, 40])
def test_streamed_random_tokens_are_the_decoded_output_after_the_prompt(tokenizer, prompt_length):
    """Random bytes are broken characters more often than not."""
    rng = random.Random(prompt_length)
    for _ in range(60):
        word = ids_of(tokenizer, "a")
        prompt = [rng.randrange(len(tokenizer)) for _ in range(prompt_length - 1)] + word
        output = [rng.randrange(len(tokenizer)) for _ in range(rng.randint(1, 40))]
        pieces, _ = stream_text(tokenizer, prompt, output)
        assert "".join(pieces) == text_after(tokenizer, prompt, output)


@pytest.mark.parametrize("seed", range(5))
def test_no_letter_is_lost_among_random_byte_tokens(seed):
    """A broken byte turns its whole run into replacements, even what was emitted by then: such a
    stream cannot equal `decode`, but it must go on, with every letter once and in order."""
    tokenizer = fallback_tokenizer()
    rng = random.Random(seed)
    high_bytes = [byte + 1 for byte in range(0x80, 0x100)]
    letters = [tokenizer.get_vocab()[letter] for letter in "abcdef"]
    for _ in range(40):
        output = [rng.choice(rng.choice([high_bytes, letters])) for _ in range(30)]
        pieces, _ = stream_text(tokenizer, ids_of(tokenizer, "a"), output)
        streamed = [letter for letter in "".join(pieces) if letter in "abcdef"]
        assert streamed == [tokenizer.decode([token]) for token in output if token in letters]


def test_an_ascii_byte_before_broken_bytes_does_not_end_the_stream():
    """<0x41> is "A", but as one run with the broken <0xE4> it decodes as two replacements."""
    tokenizer = fallback_tokenizer()
    prompt = ids_of(tokenizer, "a")
    output = [0x41 + 1, 0xE4 + 1, *ids_of(tokenizer, "b")[1:], *ids_of(tokenizer, "c")]
    pieces, _ = stream_text(tokenizer, prompt, output)
    assert "".join(pieces).endswith("b c")


def test_a_word_that_continues_a_prompt_keeps_its_space():
    tokenizer = word_tokenizer()
    prompt, output = ids_of(tokenizer, "Hello"), ids_of(tokenizer, "world")
    assert tokenizer.decode(output) == "world"
    assert stream_text(tokenizer, prompt, output) == ([" world"], False)


def test_a_piece_that_continues_the_prompts_word_gets_no_space():
    tokenizer = word_tokenizer()
    vocab = tokenizer.get_vocab()
    assert stream_text(tokenizer, [vocab["▁world"]], [vocab["ld"]]) == (["ld"], False)


def test_text_comes_as_soon_as_its_character_is_complete():
    tokenizer = byte_tokenizer()
    output = [*b"a", *"中".encode(), *b"b"]
    pieces, _ = stream_text(tokenizer, ids_of(tokenizer, "x"), output)
    assert pieces == ["a", "", "", "中", "b"]


@pytest.mark.parametrize("num_bytes", [1, 2, 3])
@pytest.mark.parametrize("name", ["bytes", "byte-fallback"])
def test_an_incomplete_character_at_the_end_becomes_replacement_characters(name, num_bytes):
    tokenizer = TOKENIZERS[name]()
    first_byte = 1 if name == "byte-fallback" else 0
    prompt = ids_of(tokenizer, "a")
    output = ids_of(tokenizer, "b") + [first_byte + byte for byte in "🙂".encode()[:num_bytes]]
    pieces, _ = stream_text(tokenizer, prompt, output)
    text = "".join(pieces)
    assert text == text_after(tokenizer, prompt, output)
    assert text.endswith(REPLACEMENT)
    assert text.strip(" " + REPLACEMENT) == "b"


@pytest.mark.parametrize("prompt_end", ["\ufffd", b"\xe4", b"\xf0\x9f"], ids=repr)
def test_a_prompt_that_ends_in_a_broken_character_is_not_part_of_the_output(prompt_end):
    tokenizer = byte_tokenizer()
    ending = prompt_end if isinstance(prompt_end, bytes) else prompt_end.encode()
    prompt = [*b"prompt ", *ending]
    pieces, _ = stream_text(tokenizer, prompt, [*b"out"])
    assert "".join(pieces) == "out"


def test_special_tokens_have_no_text():
    tokenizer = byte_tokenizer()
    output = [*b"ab", tokenizer.bos_token_id, *b"c", tokenizer.eos_token_id]
    pieces, _ = stream_text(tokenizer, ids_of(tokenizer, "x"), output)
    assert "".join(pieces) == "abc"


@every_tokenizer
def test_a_long_stream_equals_one_decode(tokenizer):
    rng = random.Random(0)
    prompt = ids_of(tokenizer, "a b")
    text = " ".join(rng.choice(["a", "b", "é", "日本", "🙂"]) for _ in range(300))
    output = ids_of(tokenizer, text)
    pieces, _ = stream_text(tokenizer, prompt, output)
    assert "".join(pieces) == text_after(tokenizer, prompt, output)


def test_without_a_tokenizer_there_is_no_text():
    assert stream_text(None, [1, 2], [3, 4]) == (["", ""], False)


# -- stop strings -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("abc END def", ["END"], "abc "),
        ("abcdef", ["cd"], "ab"),
        ("abcdef", ["ab"], ""),
        ("abcdef", ["f"], "abcde"),
        ("abcdef", ["de", "bc"], "a"),
        ("xx one two", ["two", "one"], "xx "),
        ("aaab", ["aab"], "a"),
        ("ab中文cd", ["中文"], "ab"),
        ("ab🙂cd", ["🙂c"], "ab"),
        ("xhe said", ["he"], "x"),  # "he" is one token, and is found inside and at its end
        ("xhe said", ["h"], "x"),
        ("ababac", ["abac"], "ab"),
        ("line\n\nnext", ["\n\n"], "line"),
    ],
)
def test_text_ends_before_the_earliest_stop_string(text, stop, expected):
    tokenizer = byte_tokenizer()
    output = ids_of(tokenizer, text)
    pieces, has_stopped = stream_text(tokenizer, ids_of(tokenizer, "p"), output, stop)
    assert has_stopped
    assert "".join(pieces) == expected


def test_of_stop_strings_that_come_with_one_token_the_earliest_in_the_text_wins():
    tokenizer = word_tokenizer()
    vocab = tokenizer.get_vocab()
    output = [vocab["▁a"], vocab["▁world"], vocab["."]]
    for stop in (["ld", "wor"], ["wor", "ld"], ["d", "orl", "wor"]):
        pieces, has_stopped = stream_text(tokenizer, ids_of(tokenizer, "b"), output, stop)
        assert has_stopped
        assert len(pieces) == 2  # with the token that brought it
        assert "".join(pieces) == " a "


@pytest.mark.parametrize("others", [[], ["#"], ["#", "##########"]], ids=str)
@pytest.mark.parametrize("length", range(1, 8))
def test_a_stop_string_across_token_boundaries_is_never_emitted_in_part(length, others):
    """Every place of a stop string in every cut into tokens of one or two bytes."""
    tokenizer = byte_tokenizer()
    stop = "heheSTO"[:length]
    for position in range(5):
        text = "." * position + stop + "after"
        output = ids_of(tokenizer, text)
        pieces, has_stopped = stream_text(tokenizer, [*b"p"], output, [*others, stop])
        assert has_stopped
        assert "".join(pieces) == "." * position


@pytest.mark.parametrize(
    "stop", [["zzz"], ["hello world?"], ["world!!", "lox"], ["d" * 50], ["ab", "abcdefgh"]], ids=str
)
@pytest.mark.parametrize("text", ["hello world!", "中文 hello", "acb", "x" * 30, "a world! a"])
def test_holding_back_loses_no_text_when_no_stop_string_comes(stop, text):
    tokenizer = byte_tokenizer()
    output = ids_of(tokenizer, text)
    pieces, has_stopped = stream_text(tokenizer, [*b"p"], output, stop)
    assert not has_stopped
    assert "".join(pieces) == text


@pytest.mark.parametrize("limit", [0, 1, 5])
def test_a_long_text_is_forgotten_but_for_what_a_stop_string_may_begin_with(limit, monkeypatch):
    monkeypatch.setattr(text, "MAX_KEPT_CHARACTERS", limit)
    tokenizer = byte_tokenizer()
    written = "the cat sat on the mat, the cat sat on the stool"
    for stop in ([], ["stool"], ["st", "stool"], ["cat sat on the s", "zzz"], ["the dog"]):
        expected, stopped = written, any(word in written for word in stop)
        if stopped:
            expected = written[: min(written.find(word) for word in stop if word in written)]
        output = ids_of(tokenizer, written)
        pieces, has_stopped = stream_text(tokenizer, [*b"p"], output, stop)
        assert ("".join(pieces), has_stopped) == (expected, stopped)
    detokenizer = Detokenizer(tokenizer, [*b"p"], ["stool"])
    for token_id in output * 50:
        detokenizer.append(token_id, may_stop=False)
        detokenizer.take_new_text(is_final=False)
        assert len(detokenizer.text) <= limit + 10


def test_only_what_may_become_a_stop_string_is_held_back():
    pieces, _ = stream_text(byte_tokenizer(), [*b"p"], [*b"abcdef"], ["xyz"])
    assert pieces == ["", "", "a", "b", "c", "def"]


def test_without_stop_strings_nothing_is_held_back():
    pieces, _ = stream_text(byte_tokenizer(), [*b"p"], [*b"abc"])
    assert pieces == ["a", "b", "c"]


def test_a_stop_string_in_the_prompt_does_not_count():
    pieces, has_stopped = stream_text(byte_tokenizer(), [*b"say EN"], [*b"D of it"], ["END"])
    assert not has_stopped
    assert "".join(pieces) == "D of it"


@pytest.mark.parametrize(
    ("text", "min_tokens", "expected", "stops"),
    [
        ("abSTOPcdSTOPef", 0, "ab", True),
        ("abSTOPcdSTOPef", 6, "ab", True),  # complete with the sixth token
        ("abSTOPcdSTOPef", 7, "abSTOPcd", True),
        ("abSTOPcdSTOPef", 12, "abSTOPcd", True),
        ("abSTOPcdSTOPef", 13, "abSTOPcdSTOPef", False),
    ],
)
def test_a_stop_string_counts_from_min_tokens_on(text, min_tokens, expected, stops):
    output = [*text.encode()]
    pieces, has_stopped = stream_text(byte_tokenizer(), [*b"p"], output, ["STOP"], min_tokens)
    assert ("".join(pieces), has_stopped) == (expected, stops)


def test_a_stop_string_complete_before_min_tokens_does_not_count_beside_a_longer_one():
    stop = ["ab", "a much longer one"]
    pieces, has_stopped = stream_text(byte_tokenizer(), [*b"p"], [*b"xabyz"], stop, 4)
    assert ("".join(pieces), has_stopped) == ("xabyz", False)


# -- prompts ------------------------------------------------------------------------------------


@every_tokenizer
def test_a_text_prompt_is_what_the_tokenizer_makes_of_it(tokenizer):
    assert encode_prompt("a b", tokenizer) == tokenizer.encode("a b")
    assert len(encode_prompt("a b", tokenizer)) >= 2


@pytest.mark.parametrize("ids", [[5], [3, 1, 2], (7, 7), range(4)], ids=str)
@pytest.mark.parametrize("tokenizer", [None, byte_tokenizer()], ids=["no-tokenizer", "bytes"])
def test_token_ids_are_taken_as_they_are(ids, tokenizer):
    encoded = encode_prompt(ids, tokenizer)
    assert encoded == list(ids)
    assert type(encoded) is list


def test_chat_messages_are_rendered_by_the_template_with_a_generation_prompt():
    tokenizer = byte_tokenizer()
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "hé"}]
    ids = encode_prompt(messages, tokenizer)
    assert tokenizer.decode(ids) == "<s>system: be</s><s>user: hé</s><s>assistant:"
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.eos_token_id) == 2


def test_a_chat_prompt_gets_no_special_tokens_but_the_templates():
    backend = Tokenizer.from_str(byte_tokenizer().backend_tokenizer.to_str())
    backend.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", byte_tokenizer().bos_token_id)]
    )
    tokenizer = fast(backend, bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE)
    assert encode_prompt("a", tokenizer) == [tokenizer.bos_token_id, *b"a"]
    messages = [{"role": "user", "content": "a"}]
    chat = encode_prompt(messages, tokenizer)
    assert chat.count(tokenizer.bos_token_id) == 2  # the template's two
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert encode_prompt(rendered, tokenizer) == chat  # and none before it
    begin = tokenizer.bos_token_id
    assert encode_prompt("<s>", tokenizer) == [begin]
    assert encode_prompt("<s><s>a", tokenizer) == [begin, begin, begin, *b"a"]  # as it is written
    assert encode_prompt([begin, begin], tokenizer) == [begin, begin]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (np.array([3, 1, 2]), [3, 1, 2]),
        (np.array([3, 1, 2], dtype=np.uint8), [3, 1, 2]),
        (torch.tensor([3, 1, 2]), [3, 1, 2]),
        (torch.tensor([3, 1, 2], dtype=torch.int32), [3, 1, 2]),
        ({"prompt_token_ids": [3, 1, 2]}, [3, 1, 2]),
        ({"prompt_token_ids": np.array([3, 1, 2])}, [3, 1, 2]),
        ({"prompt": "ab"}, [*b"ab"]),
    ],
    ids=str,
)
def test_ids_may_come_in_arrays_and_prompts_in_dicts(prompt, expected):
    encoded = encode_prompt(prompt, byte_tokenizer())
    assert encoded == expected
    assert {type(token_id) for token_id in encoded} == {int}


@pytest.mark.parametrize(
    "prompt",
    [
        pytest.param([1, "a"], id="id-and-text"),
        pytest.param(["a", 1], id="text-and-id"),
        pytest.param([1.0, 2.0], id="floats"),
        pytest.param([1, 2.5], id="id-and-float"),
        pytest.param([True, False], id="bools"),
        pytest.param([1, True], id="id-and-bool"),
        pytest.param([None], id="none-in-list"),
        pytest.param([{"role": "user", "content": "a"}, "a"], id="message-and-text"),
        pytest.param([[1, 2]], id="list-in-list"),
        pytest.param(None, id="none"),
        pytest.param(7, id="one-id"),
        pytest.param(1.5, id="one-float"),
        pytest.param(b"bytes", id="bytes"),
        pytest.param({"role": "user", "content": "a"}, id="one-message"),
        pytest.param(np.array([1.0]), id="float-array"),
        pytest.param(np.array([[1, 2]]), id="two-dimensions"),
        pytest.param(torch.tensor([True]), id="bool-tensor"),
        pytest.param(torch.tensor(3), id="no-dimension"),
        pytest.param({"prompt": [1, 2]}, id="ids-as-text"),
        pytest.param({"prompt_token_ids": "ab"}, id="text-as-ids"),
        pytest.param({"prompt": "a", "prompt_token_ids": [1]}, id="both"),
        pytest.param({"prompt": "a", "temperature": 1}, id="more"),
        pytest.param({"prompt": {"prompt": "a"}}, id="dict-in-dict"),
        pytest.param({}, id="empty-dict"),
    ],
)
def test_a_prompt_of_the_wrong_type_is_refused_by_its_value(prompt):
    with pytest.raises(InvalidRequestError) as caught:
        encode_prompt(prompt, byte_tokenizer())
    assert repr(prompt) in str(caught.value)
    assert isinstance(caught.value, PagedKVError)


def test_an_empty_text_is_refused():
    with pytest.raises(InvalidRequestError, match="empty"):
        encode_prompt("", byte_tokenizer())


def test_messages_without_a_template_are_refused():
    with pytest.raises(InvalidRequestError, match="chat template"):
        encode_prompt([{"role": "user", "content": "a"}], word_tokenizer())


@pytest.mark.parametrize(
    "prompt", ["text", [{"role": "user", "content": "a"}]], ids=["text", "messages"]
)
def test_without_a_tokenizer_only_token_ids_are_prompts(prompt):
    with pytest.raises(InvalidRequestError, match="tokenizer"):
        encode_prompt(prompt, None)


@pytest.mark.parametrize(
    ("template", "messages"),
    [
        ("{{ raise_exception('roles must alternate') }}", [{"role": "user", "content": "x"}]),
        ("{{ messages[0]['content'].strip() }}", [{"role": "user"}]),
        ("{{ messages[0]['content'] + 'x' }}", [{"role": "user", "content": None}]),
    ],
)
def test_messages_that_a_template_refuses_are_an_invalid_request(template, messages):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(InvalidRequestError, match="the chat template refuses the messages"):
        encode_prompt(messages, tokenizer)


# -- tokens that are read later than they came ----------------------------------------------------


def live_request(prompt: list[int], params: SamplingParams) -> LiveRequest:
    return LiveRequest(
        request=Request("r", prompt, max_tokens=64),
        params=params,
        seed=0,
        sample_index=0,
        end_token_ids=frozenset(),
        rules=rules_of(params, (), (), len(prompt), 64),
    )


def output_of(text: bytes, finish_reason: str | None, params: SamplingParams) -> TextOutput:
    """An output that has not been read; token i is byte i."""
    live = live_request([1], params)
    for byte in text:
        live.take(Draw(row=0, params=params, token_id=byte))
    live.finish_reason = finish_reason
    return OutputProcessor(byte_tokenizer()).follow(live, [1])


def test_of_several_tokens_that_wait_the_last_alone_ends_the_request():
    output = output_of(b"abc", "length", SamplingParams(max_tokens=64))
    output.catch_up()
    updates = [output.take() for _ in range(output.num_waiting)]
    assert [update.finish_reason for update in updates] == [None, None, "length"]
    assert "".join(update.text for update in updates) == "abc"


def test_a_stop_string_counts_from_the_token_that_makes_min_tokens_full():
    for min_tokens, num_read in ((2, 2), (3, 5)):
        params = SamplingParams(max_tokens=64, min_tokens=min_tokens, stop=["b"])
        output = output_of(b"abcab", None, params)
        output.catch_up()
        assert output.is_stopped
        assert output.num_waiting == num_read


def test_a_token_that_was_cut_off_leaves_no_likelihood_behind():
    params = SamplingParams(max_tokens=8, temperature=1.0, best_of=2, logprobs=1)
    live = live_request([1, 2], params)
    first, second = (
        Draw(
            row=0, params=params, token_id=token, log_probability=value, likeliest=[(token, value)]
        )
        for token, value in ((5, -0.5), (6, -0.25))
    )
    live.take(first)
    live.log_probabilities.append(-9.0)  # and before its token an exception
    live.likeliest.append([(7, -9.0)])
    live.restart()
    assert live.request.token_ids == [1, 2, 5]
    live.take(second)
    assert live.log_probabilities.tolist() == [-0.5, -0.25]
    assert live.likeliest == [[(5, -0.5)], [(6, -0.25)]]
