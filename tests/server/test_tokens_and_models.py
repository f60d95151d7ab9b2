"""Tokens, models and adapters over HTTP, in the forms of vLLM and OpenAI."""

from __future__ import annotations

import pytest

from paged_kv import LLM, SamplingParams
from tests.support.adapters import adapted
from tests.support.running_server import NAME, running

TEXT = "Héllo, whale 😀"
MESSAGES = [{"role": "user", "content": TEXT}]


def test_text_becomes_tokens_and_text_again(server, llm):
    tokenizer = llm.tokenizer
    for options in ({}, {"add_special_tokens": False}):
        body = server.post("/tokenize", prompt=TEXT, **options).json()
        ids = tokenizer.encode(TEXT, **options)
        assert body == {
            "count": len(ids),
            "max_model_len": llm.max_model_len,
            "tokens": ids,
            "token_strs": None,
        }
        back = server.post("/detokenize", tokens=ids, model=NAME).json()
        assert back == {"prompt": tokenizer.decode(ids)}
    assert back["prompt"] == TEXT
    strings = server.post("/tokenize", prompt=TEXT, return_token_strs=True).json()["token_strs"]
    assert strings == tokenizer.convert_ids_to_tokens(tokenizer.encode(TEXT))
    assert server.post("/tokenize", prompt="", add_special_tokens=False).json()["tokens"] == []
    assert server.post("/detokenize", tokens=[]).json() == {"prompt": ""}


def test_a_chat_becomes_the_tokens_that_it_is_answered_for(server):
    tokens = server.post("/tokenize", messages=MESSAGES).json()["tokens"]
    answer = server.post(
        "/v1/chat/completions", messages=MESSAGES, max_tokens=1, return_token_ids=True
    )
    assert tokens == answer.json()["prompt_token_ids"]
    fewer = server.post("/tokenize", messages=MESSAGES, add_generation_prompt=False).json()
    assert fewer["count"] < len(tokens)


def test_what_is_no_token_or_text_is_refused(server, llm):
    for path, body in (
        ("/detokenize", {"tokens": [len(llm.tokenizer)]}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": "x"}),
        ("/detokenize", {}),
        ("/tokenize", {}),
        ("/tokenize", {"prompt": 3}),
        ("/tokenize", {"prompt": "x", "messages": MESSAGES}),
        ("/tokenize", {"prompt": "x", "other": 1}),
    ):
        answer = server.post(path, **body)
        assert answer.status_code == 400, body
        assert answer.json()["error"]["message"]
    assert server.post("/tokenize", prompt="x", model="other").status_code == 404


def test_the_model_is_listed(server, llm):
    body = server.get("/v1/models").json()
    (card,) = body["data"]
    assert body["object"] == "list"
    assert card == server.get(f"/v1/models/{NAME}").json()
    assert card["id"] == card["root"] == NAME
    assert card["object"] == "model"
    assert card["max_model_len"] == llm.max_model_len
    assert card["parent"] is None


@pytest.fixture(scope="module")
def adapted_server():
    with (
        LLM(adapted("llama"), kv_format="native", num_blocks=64, max_num_seqs=4) as llm,
        running(llm, model_name="base") as server,
    ):
        yield server


def test_adapters_are_models(adapted_server):
    """As vLLM has it; the model's own name is the model as it was loaded."""
    llm = adapted_server.llm
    cards = adapted_server.get("/v1/models").json()["data"]
    assert [(card["id"], card["parent"]) for card in cards] == [
        ("base", None),
        ("cat", "base"),
        ("dog", "base"),
    ]
    asked = {"prompt": [1, 2, 3], "max_tokens": 6, "temperature": 0, "return_token_ids": True}
    tokens = {}
    for name in ("base", "cat", "dog"):
        body = adapted_server.post("/v1/completions", model=name, **asked).json()
        assert body["model"] == name
        tokens[name] = body["choices"][0]["token_ids"]
        adapter = None if name == "base" else name
        params = SamplingParams(max_tokens=6, temperature=0, adapter=adapter)
        assert tokens[name] == llm.generate([1, 2, 3], params)[0].token_ids
    assert tokens["base"] == tokens["cat"] != tokens["dog"]
    plain = adapted_server.post("/v1/completions", adapter="__base__", **asked).json()
    assert plain["choices"][0]["token_ids"] not in tokens.values()
    both = adapted_server.post("/v1/completions", model="dog", adapter="cat", **asked)
    assert both.status_code == 400
    assert both.json()["error"]["param"] == "adapter"


def test_a_model_without_a_tokenizer_takes_token_ids_alone(adapted_server):
    for path, body in (
        ("/tokenize", {"prompt": "x"}),
        ("/detokenize", {"tokens": [1]}),
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": MESSAGES}),
    ):
        answer = adapted_server.post(path, **body)
        assert answer.status_code == 400, path
        assert "tokenizer" in answer.json()["error"]["message"]
    answer = adapted_server.post(
        "/v1/completions", prompt=[1, 2], max_tokens=2, logprobs=1, echo=True
    )
    (choice,) = answer.json()["choices"]
    assert choice["text"] == ""
    assert len(choice["logprobs"]["token_logprobs"]) == 4
