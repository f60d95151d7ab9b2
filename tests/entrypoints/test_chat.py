"""Talks: what is kept of them, what is computed, and what lines do."""

from __future__ import annotations

import io

import pytest

from paged_kv import SinkWindow
from paged_kv.entrypoints import chat_cli, cli
from paged_kv.entrypoints.chat import Conversation
from paged_kv.errors import InvalidRequestError
from tests.support.small_llm import assert_nothing_is_held, params_of

PARAMS = params_of(max_tokens=12)


def roles(conversation: Conversation) -> list[str]:
    return [message["role"] for message in conversation.messages]


def test_answers_are_those_to_the_whole_talk(make_llm):
    llm = make_llm(kv_format="native")
    conversation = Conversation(llm, PARAMS, "be brief")
    for question in ("who are you", "and then?"):
        pieces = list(conversation.answer(question))
        *before, last = conversation.messages
        assert last == {"role": "assistant", "content": "".join(pieces)}
        expected = make_llm(kv_format="native").generate([before], PARAMS)[0]
        assert "".join(pieces) == expected.text
    assert roles(conversation) == ["system", *["user", "assistant"] * 2]
    conversation.reset()
    assert roles(conversation) == ["system"]
    assert_nothing_is_held(llm)


def test_what_was_said_is_not_computed_again(make_llm):
    llm = make_llm()
    conversation = Conversation(llm, PARAMS)
    list(conversation.answer("a long question " * 12))
    before = llm.statistics().num_hit_tokens
    list(conversation.answer("and?"))
    assert llm.statistics().num_hit_tokens - before > 100


def test_the_oldest_is_forgotten_where_a_talk_no_longer_fits(make_llm):
    llm = make_llm()  # of 512 bytes
    conversation = Conversation(llm, PARAMS, "be brief")
    for turn in range(12):
        assert list(conversation.answer(f"{turn:03} " + "x" * 60))
    assert 5 <= len(conversation.messages) < 15
    assert roles(conversation)[0] == "system"
    assert roles(conversation)[1::2] == ["user"] * (len(conversation.messages) // 2)
    assert conversation.messages[-2]["content"].startswith("011")
    kept = list(conversation.messages)
    with pytest.raises(InvalidRequestError):
        list(conversation.answer("y" * 600))
    assert conversation.messages == kept


def test_a_window_keeps_a_talk_going_for_ever(make_llm):
    llm = make_llm(sink_window=SinkWindow(4, 128))
    conversation = Conversation(llm, PARAMS)
    for turn in range(12):
        assert list(conversation.answer(f"{turn:03} " + "x" * 60))
        assert len(conversation.messages) <= 4


def test_an_answer_that_nobody_hears_out_counts_as_far_as_it_came(make_llm):
    llm = make_llm()
    conversation = Conversation(llm, PARAMS)
    answer = conversation.answer("hello")
    first = next(answer)
    answer.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": first}
    assert_nothing_is_held(llm)


def test_lines_are_turns_and_commands(make_llm, monkeypatch, capsys):
    llm = make_llm()
    monkeypatch.setattr(chat_cli, "load_llm", lambda arguments: llm)
    said = "hello\n\n/reset\n/memory\n/what\n" + "y" * 600 + "\nhello\n/exit\nnever\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    assert cli.main(["chat", "--max-tokens", "8"]) == 0
    captured = capsys.readouterr()
    expected = make_llm().generate(
        [[{"role": "user", "content": "hello"}]], params_of(max_tokens=8)
    )
    assert captured.out.count(expected[0].text) == 2
    assert " of " in captured.out
    assert "/reset  forget" in captured.out
    assert "never" not in captured.out
    assert "leaves no room" in captured.err


def test_a_chat_has_one_answer_and_needs_a_template(make_llm, capsys):
    assert cli.main(["chat", "--n", "2"]) == 2
    assert "a chat has one answer, not 2" in capsys.readouterr().err
    llm = make_llm()
    template, llm.tokenizer.chat_template = llm.tokenizer.chat_template, None
    try:
        with pytest.raises(InvalidRequestError, match="needs a tokenizer with a chat template"):
            Conversation(llm, PARAMS)
    finally:
        llm.tokenizer.chat_template = template
