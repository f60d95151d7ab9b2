"""The table in docs/server.md: what becomes of every parameter of OpenAI's and vLLM's API.

Written from the code by `python -m tests.support.conformance_table`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from paged_kv.entrypoints.server.chat_request import ChatRequest
from paged_kv.entrypoints.server.completion_request import CompletionRequest
from paged_kv.entrypoints.server.parameters import Parameter
from paged_kv.entrypoints.server.sampling_fields import MAX_LOGPROBS, MAX_SAMPLES, SamplingFields

DOCUMENT: Final = Path(__file__).parents[2] / "docs" / "server.md"
BEGIN, END = "<!-- conformance -->\n", "<!-- end of conformance -->\n"
ENDPOINTS: Final[dict[str, type[SamplingFields]]] = {
    "completions": CompletionRequest,
    "chats": ChatRequest,
}
# What is to be said of parameters that are applied.
NOTES: Final = {
    "model": "the served name, or an adapter's; may be left out",
    "prompt": "text, token ids, or a list of these",
    "messages": "content is text or parts of type `text`; no `tool_calls`, no images",
    "stream": "server-sent events",
    "stream_options": "`include_usage`, `continuous_usage_stats`; no `include_obfuscation`",
    "n": f"at most {MAX_SAMPLES}",
    "best_of": f"at most {MAX_SAMPLES}; not with `stream`",
    "seed": "the tokens depend on nothing else but the logits; negative ones count from 2^64 down",
    "max_tokens": "completions: 16 without it, and 0 with `echo`; chats: as many as fit",
    "max_completion_tokens": "another name of `max_tokens`",
    "min_tokens": "nothing but `max_tokens` ends the answer before",
    "stop": "one or any number of texts, which are not part of the answer",
    "stop_token_ids": "",
    "ignore_eos": "",
    "temperature": "1 where neither the request nor the model's generation config says one",
    "top_p": "",
    "top_k": "0 and -1: all",
    "min_p": "",
    "top_h": "as in transformers",
    "typical_p": "as in transformers",
    "epsilon_cutoff": "as in transformers",
    "eta_cutoff": "as in transformers",
    "frequency_penalty": "",
    "presence_penalty": "",
    "repetition_penalty": "as in transformers",
    "no_repeat_ngram_size": "as in transformers",
    "logit_bias": "by token id, from -10000 to 10000",
    "bad_words_ids": "as in transformers",
    "suppress_tokens": "as in transformers",
    "begin_suppress_tokens": "as in transformers",
    "forced_bos_token_id": "as in transformers",
    "forced_eos_token_id": "as in transformers",
    "exponential_decay_length_penalty": "as in transformers",
    "logprobs": f"completions: a number, at most {MAX_LOGPROBS}; chats: true or false",
    "top_logprobs": f"at most {MAX_LOGPROBS}, with `logprobs`",
    "echo": "",
    "response_format": "`text`, `json_object`, `json_schema`, which is always strict",
    "structured_outputs": "one of `json`, `json_object`, `regex`, `choice`, `grammar`",
    "sink_window": "ours: `{num_sink_tokens, window_size}`, see [streams](streams.md)",
    "adapter": "ours: an adapter's name, or `__base__` for none",
    "cache_salt": "shares cached blocks only with requests of the same salt",
    "priority": "lower ones come first; not below `--min-priority`",
    "return_token_ids": "also `prompt_token_ids`",
    "add_generation_prompt": "true unless the last message is continued",
    "continue_final_message": "",
    "chat_template_kwargs": "variables of the template",
}


def treatment(request: type[SamplingFields], name: str) -> str:
    if name in request.model_fields:
        return "applied"
    return request.unapplied[name].treatment if name in request.unapplied else "unknown"


def names() -> list[str]:
    """Of all parameters: applied ones in the order of the notes, then the others."""
    assert NOTES.keys() == {name for kind in ENDPOINTS.values() for name in kind.model_fields}
    unapplied = {name: None for kind in ENDPOINTS.values() for name in kind.unapplied}
    return [*NOTES, *(name for name in unapplied if name not in NOTES)]


def note(name: str) -> str:
    """What is to be said of it, once if it is the same of both endpoints."""
    notes = {}
    for endpoint, kind in ENDPOINTS.items():
        if name in kind.model_fields:
            notes[endpoint] = NOTES[name]
        elif name in kind.unapplied:
            notes[endpoint] = reason(kind.unapplied[name])
    if len(set(notes.values())) == 1:
        return next(iter(notes.values()))
    return "; ".join(f"{endpoint}: {text}" for endpoint, text in notes.items() if text)


def reason(parameter: Parameter) -> str:
    taken = ", ".join(map(shown, parameter.harmless or ()))
    return f"{parameter.reason} ({taken} is taken)" if taken else parameter.reason


def shown(value: Any) -> str:
    return f"`{json.dumps(value)}`"


def table() -> str:
    lines = ["| parameter | completions | chats | |", "|---|---|---|---|"]
    for name in names():
        treatments = " | ".join(treatment(kind, name) for kind in ENDPOINTS.values())
        lines.append(f"| `{name}` | {treatments} | {note(name)} |")
    return "\n".join(lines) + "\n"


def written(document: str) -> str:
    """The document with the table as it is now."""
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table() + END + after


if __name__ == "__main__":
    DOCUMENT.write_text(written(DOCUMENT.read_text()))
