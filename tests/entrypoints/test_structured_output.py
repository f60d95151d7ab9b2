"""Outputs of a given form: every one has it, and neighbours do not notice."""

from __future__ import annotations

import json
import re
import sys
from unittest.mock import Mock, patch

import pytest
import torch
from torch import Tensor

from paged_kv import SamplingParams, StructuredOutput
from paged_kv.errors import ConfigError, InvalidRequestError, MissingDependencyError
from tests.support.small_llm import assert_nothing_is_held, params_of, tokens_of

END = 257  # </s>
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture
def ending_model(model):
    model.generation_config.eos_token_id = END
    return model


def ascii_only(ids: Tensor, logits: Tensor) -> Tensor:
    """Bytes that are no text alone would end in the middle of a character."""
    is_other = torch.arange(logits.shape[1]) >= 127
    is_other[END] = False
    return logits.masked_fill(is_other, -torch.inf)


def forms(form: StructuredOutput, count: int, **options: object) -> list[SamplingParams]:
    return [
        params_of(
            structured_output=form,
            max_tokens=200,
            logits_processors=[ascii_only],
            **{"temperature": 1.2, "seed": seed, **options},
        )
        for seed in range(count)
    ]


def test_a_hundred_outputs_have_their_schema_and_others_are_as_they_are_alone(
    make_llm, ending_model
):
    llm = make_llm(kv_format="native", max_num_seqs=32)
    others = [params_of(temperature=1.5, seed=seed) for seed in range(8)]
    alone = tokens_of(llm.generate([[*b"once"]] * 8, others))
    constrained = forms(StructuredOutput(json_schema=SCHEMA), 100)
    outputs = llm.generate([[*b"once"]] * 108, [*others, *constrained])
    assert tokens_of(outputs[:8]) == alone
    found = [json.loads(output.text) for output in outputs[8:]]
    for each in found:
        assert set(each) == {"name", "age", "tags"}
        assert len(each["name"]) <= 5
        assert 0 <= each["age"] <= 120
        assert set(each["tags"]) <= {"a", "b"}
    assert len({str(each) for each in found}) > 90
    assert {output.completions[0].finish_reason for output in outputs[8:]} == {"stop"}
    assert_nothing_is_held(llm)


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        (StructuredOutput(regex=r"[0-9]{3}-[a-f]+x"), r"[0-9]{3}-[a-f]+x"),
        (StructuredOutput(choice=["yes", "no", "maybe so"]), r"yes|no|maybe so"),
        (StructuredOutput(grammar='start: "(" INNER ")"\nINNER: /[a-c]{2,4}/'), r"\([a-c]{2,4}\)"),
        (StructuredOutput(grammar='root ::= "a" [0-9] "z"'), r"a[0-9]z"),
        (StructuredOutput(json_schema='{"type": "integer"}'), r"-?[0-9]+"),
    ],
    ids=["regex", "choice", "lark", "gbnf", "schema as text"],
)
@pytest.mark.parametrize("options", [{"temperature": 0}, {"n": 3}], ids=["greedy", "samples"])
def test_every_form_is_kept(make_llm, ending_model, form, pattern, options):
    outputs = make_llm().generate([[*b"x"]] * 3, forms(form, 3, **options))
    for output in outputs:
        for completion in output.completions:
            if completion.finish_reason == "stop":
                assert re.fullmatch(pattern, completion.text), completion.text
            else:  # a number may be longer than it is allowed to become
                assert len(completion.token_ids) == 200


def test_a_form_that_is_cut_off_begins_anew(make_llm, ending_model):
    llm = make_llm()
    params = params_of(structured_output=StructuredOutput(regex="ab+c"))
    request = llm.engine.intake.request("", [1, 2], params)
    (processor,) = llm.engine.intake.rules(request, params).processors
    logits = torch.zeros(1, llm.engine.model.vocab_size)
    expected = processor(torch.tensor([[1, 2, *b"abb"]]), logits)
    cut_off = Mock(consume_tokens=Mock(side_effect=KeyboardInterrupt))
    with patch.object(processor, "_matcher", cut_off), pytest.raises(KeyboardInterrupt):
        processor(torch.tensor([[1, 2, *b"abbb"]]), logits)
    assert torch.equal(processor(torch.tensor([[1, 2, *b"abbb"]]), logits), expected)
    assert expected.isfinite().nonzero()[:, 1].tolist() == [*b"bc"]


def test_forms_survive_preemption(make_llm, ending_model):
    params = forms(StructuredOutput(json_schema=SCHEMA), 8)
    expected = tokens_of(make_llm(kv_format="native").generate([[*b"once"]] * 8, params))
    llm = make_llm(kv_format="native", num_blocks=14, prefix_caching=False)
    llm.engine.scheduler.steps_ahead = 0
    assert tokens_of(llm.generate([[*b"once"]] * 8, params)) == expected
    assert llm.statistics().num_preemptions


# -- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, r"one of its fields, got \[\]"),
        ({"regex": "a", "choice": ["b"]}, r"one of its fields, got \['regex', 'choice'\]"),
        ({"regex": ""}, "regex must be text, got ''"),
        ({"grammar": 5}, "grammar must be text, got 5"),
        ({"choice": []}, r"choice must be a list of texts, got \[\]"),
        ({"choice": "yes"}, "choice must be a list of texts, got 'yes'"),
        ({"json_schema": "{"}, "json_schema must be a JSON schema, got '{'"),
        ({"json_schema": {"type": object}}, "json_schema must be a JSON schema, got"),
        ({"json_schema": [1]}, r"json_schema must be a JSON schema, got \[1\]"),
    ],
    ids=str,
)
def test_what_is_no_form_is_refused_by_name(options, match):
    with pytest.raises(ConfigError, match=match):
        StructuredOutput(**options)


@pytest.mark.parametrize(
    "form",
    [
        StructuredOutput(regex="a("),
        StructuredOutput(grammar="start: missing"),
        StructuredOutput(json_schema={"type": "no such type"}),
    ],
    ids=["regex", "grammar", "schema"],
)
def test_a_broken_grammar_is_refused_before_anything_is_queued(make_llm, ending_model, form):
    llm = make_llm()
    with pytest.raises(InvalidRequestError, match="prompt 1: structured_output: "):
        llm.generate([[1], [2]], [params_of(), params_of(structured_output=form)])
    assert_nothing_is_held(llm)


def test_what_could_not_end_is_refused(make_llm, model):
    form = StructuredOutput(regex="a")
    with pytest.raises(InvalidRequestError, match="needs an end-of-sequence token"):
        make_llm().generate([1], params_of(structured_output=form))
    with pytest.raises(ConfigError, match="ignore_eos cannot be"):
        params_of(structured_output=form, ignore_eos=True)


def test_without_llguidance_the_extra_is_named(make_llm, ending_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.setitem(sys.modules, "llguidance.hf", None)
    with pytest.raises(MissingDependencyError, match=r"paged-kv\[structured\]"):
        make_llm().generate([1], params_of(structured_output=StructuredOutput(regex="a")))
