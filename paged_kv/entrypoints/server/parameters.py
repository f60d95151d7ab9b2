"""Parameters of the API that are not applied: what of them is taken, and why not more.

Knows names and values of OpenAI's and vLLM's requests, never what is applied, which are the fields
of the requests themselves.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from .refusal import Refusal


@dataclass(frozen=True)
class Parameter:
    """A parameter that changes no answer. Without `harmless` values any value is taken; of others
    those are that ask for nothing, and null.
    """

    name: str
    reason: str
    harmless: tuple[Any, ...] | None = None

    @property
    def treatment(self) -> str:
        return "accepted" if self.harmless is None else "refused"

    def check(self, value: object) -> None:
        """Raise `Refusal` for a value that asks for something."""
        if self.harmless is None or value is None:
            return
        if any(type(value) is type(known) and value == known for known in self.harmless):
            return
        raise Refusal(
            f"{self.name} {reprlib.repr(value)} is not supported: {self.reason}",
            param=self.name,
            code="unsupported_parameter",
        )


def by_name(*parameters: Parameter) -> Mapping[str, Parameter]:
    return {parameter.name: parameter for parameter in parameters}


# Of completions and chats.
UNAPPLIED: Final = by_name(
    Parameter("user", "names whoever asks"),
    Parameter("safety_identifier", "names whoever asks"),
    Parameter("metadata", "for the caller's own lists"),
    Parameter("prompt_cache_key", "a hint: prefixes are found whatever it is"),
    Parameter("prompt_cache_retention", "a hint: cached blocks stay as long as there is room"),
    Parameter("spaces_between_special_tokens", "special tokens have no text"),
    Parameter("request_id", "requests are named by the server"),
    Parameter("store", "nothing is stored", (False,)),
    Parameter("service_tier", "all requests are of one tier", ("auto", "default")),
    Parameter("skip_special_tokens", "special tokens have no text", (True,)),
    Parameter("include_stop_str_in_output", "a text ends before its stop string", (False,)),
    Parameter("detokenize", "answers are text", (True,)),
    Parameter("use_beam_search", "samples alone are served", (False,)),
    Parameter("length_penalty", "it is of beam search", (1, 1.0)),
    Parameter("early_stopping", "it is of beam search", (False,)),
    Parameter("truncate_prompt_tokens", "a prompt that is too long is refused", ()),
    Parameter("prompt_logprobs", "ask for a completion with echo and logprobs", ()),
    Parameter("bad_words", "give bad_words_ids", ([],)),
    Parameter("allowed_token_ids", "give a structured output", ()),
    Parameter("logits_processors", "no code is taken from requests", ([],)),
    Parameter("guided_json", "give structured_outputs or response_format", ()),
    Parameter("guided_regex", "give structured_outputs", ()),
    Parameter("guided_choice", "give structured_outputs", ()),
    Parameter("guided_grammar", "give structured_outputs", ()),
    Parameter("guided_decoding_backend", "there is one", ()),
    Parameter("return_tokens_as_token_ids", "tokens of log-probabilities are text", (False,)),
    Parameter("kv_transfer_params", "blocks stay on this server", ()),
    Parameter("vllm_xargs", "they are of another server", ({},)),
)
OF_COMPLETIONS: Final = by_name(
    Parameter("suffix", "models continue their prompts only", ("",)),
    Parameter("add_special_tokens", "text begins as its tokenizer begins texts", (True,)),
    Parameter("prompt_embeds", "prompts are text or token ids", ()),
)
OF_CHATS: Final = by_name(
    Parameter("prediction", "a hint: what follows is guessed from what was there before"),
    Parameter("parallel_tool_calls", "there are no tool calls"),
    Parameter("tool_choice", "there are no tool calls", ("none", "auto")),
    Parameter("tools", 'there are no tool calls (tool_choice "none" takes them)', ([],)),
    Parameter("functions", "there are no function calls", ([],)),
    Parameter("function_call", "there are no function calls", ("none", "auto")),
    Parameter("modalities", "answers are text", (["text"],)),
    Parameter("audio", "answers are text", ()),
    Parameter("web_search_options", "nothing is searched", ()),
    Parameter("moderation", "nothing is moderated", ()),
    Parameter("reasoning_effort", "templates say how long a model thinks", ("none",)),
    Parameter("include_reasoning", "what a model thinks is a part of its answer", (True,)),
    Parameter("verbosity", "it is OpenAI's models'", ("medium",)),
    Parameter("echo", "an answer does not repeat the messages", (False,)),
    Parameter("chat_template", "templates of requests are not run", ()),
    Parameter("documents", "give chat_template_kwargs", ([],)),
    Parameter("add_special_tokens", "the template writes them", (False,)),
    Parameter("mm_processor_kwargs", "messages are text", ()),
)
