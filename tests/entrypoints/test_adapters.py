"""peft's adapters in an `LLM`: as they were loaded, and by name, different ones in one step."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from paged_kv import LLM, BeamSearchParams, SamplingParams
from paged_kv.entrypoints.request_lines import json_line, prepare
from paged_kv.errors import (
    InvalidRequestError,
    MissingDependencyError,
    ModelNotFoundError,
    PagedKVError,
    UnsupportedModelError,
)
from paged_kv.models import loading
from paged_kv.models.attached_model import fingerprint_of
from tests.support import zoo
from tests.support.adapters import (
    NAMES,
    TARGETS,
    adapted,
    applied,
    expected_tokens,
    lora,
    scatter,
)

BASE = "__base__"
CHOICES = [BASE, "cat", "dog", "cat", "dog", BASE]
PROMPTS = zoo.prompts()[:6]
COUNT = 24

every_architecture = pytest.mark.parametrize("name", TARGETS)


def params_of(adapter: str | None = None, **options: Any) -> SamplingParams:
    return SamplingParams(adapter=adapter, **{"max_tokens": COUNT, **options})


def small_llm(model: Any, **options: Any) -> LLM:
    return LLM(model, **{"kv_format": "native", "num_blocks": 120, "max_num_seqs": 8, **options})


def tokens_of(llm: LLM, choices: list[str | None], prompts: Any = PROMPTS) -> list[list[int]]:
    outputs = llm.generate(prompts, [params_of(choice) for choice in choices])
    return [output.token_ids for output in outputs]


@pytest.fixture(scope="module")
def model() -> Any:
    """Not to be changed; or to be given back as it was."""
    return adapted("llama")


@pytest.fixture(scope="module")
def expected(model) -> list[list[int]]:
    """Of `CHOICES`."""
    return expected_tokens(model, CHOICES, PROMPTS, COUNT)


def state_of(model: nn.Module) -> list[Any]:
    places = [parameter.data_ptr() for parameter in model.parameters()]
    parts = [
        (name, part.training, part.__dict__.get("forward")) for name, part in model.named_modules()
    ]
    hooks = [[*part._forward_hooks, *part._forward_pre_hooks] for part in model.modules()]
    return [places, parts, hooks]


# -- by name --------------------------------------------------------------------------------------


@every_architecture
def test_requests_of_one_batch_have_the_tokens_of_their_own_adapters(name: str) -> None:
    model = adapted(name)
    expected = expected_tokens(model, CHOICES, PROMPTS, COUNT)
    one = [expected_tokens(model, [choice], PROMPTS[2:3])[0] for choice in (BASE, *NAMES)]
    assert len({tuple(tokens) for tokens in one}) == 3, "an adapter that changes nothing"
    with small_llm(model) as llm:
        assert llm.adapters == NAMES
        assert tokens_of(llm, CHOICES) == expected


def test_chunked_and_preempted_requests_keep_their_adapters(model) -> None:
    choices, prompts = CHOICES[:4], PROMPTS[:4]
    expected = expected_tokens(model, choices, prompts, 72)
    with small_llm(model, num_blocks=12, token_budget=16) as llm:
        params = [params_of(choice, max_tokens=72) for choice in choices]
        assert [output.token_ids for output in llm.generate(prompts, params)] == expected
        assert llm.statistics().num_preemptions > 0


def test_samples_and_beams_have_the_adapter_of_their_request(model) -> None:
    prompt = PROMPTS[2]
    ids = torch.tensor([prompt])
    with small_llm(model) as llm:
        params = [params_of(choice, n=3, temperature=1.0, seed=3) for choice in (BASE, *NAMES)]
        together = llm.generate([prompt] * 3, params)
        alone = [llm.generate(prompt, one)[0] for one in params]
        beams = [
            llm.beam_search(prompt, BeamSearchParams(num_beams=3, max_tokens=8, adapter=choice))
            for choice in (BASE, *NAMES)
        ]
    samples = [[c.token_ids for c in output.completions] for output in together]
    assert samples == [[c.token_ids for c in output.completions] for output in alone]
    assert len({str(each) for each in samples}) == 3
    for choice, (output,) in zip((BASE, *NAMES), beams, strict=True):
        with applied(model, choice):
            found = model.generate(input_ids=ids, num_beams=3, max_new_tokens=8, do_sample=False)
        assert output.token_ids == found[0, len(prompt) :].tolist(), choice


def test_what_a_request_leaves_open_is_the_active_adapter(model, expected) -> None:
    with small_llm(model) as llm:
        choices: list[str | None] = [c if c != "cat" else None for c in CHOICES]
        assert tokens_of(llm, choices) == expected


def test_an_adapter_activated_or_loaded_later_serves(expected) -> None:
    """A request keeps what it began with; nothing that was captured or cached answers for it."""
    model = adapted("llama")
    with small_llm(model) as llm:
        assert tokens_of(llm, [None] * 6)[1] == expected[1]
        stream = llm.stream(PROMPTS[1], params_of())
        begun = [next(stream).token_id]
        model.set_adapter("dog")
        assert begun + [event.token_id for event in stream] == expected[1]
        assert tokens_of(llm, [None] * 6)[2] == expected[2]
        model.add_adapter("owl", lora(["k_proj", "gate_proj"], r=2))
        scatter(model, "owl")
        with pytest.raises(InvalidRequestError, match="training mode"):
            llm.generate(PROMPTS[1], params_of("owl"))
        model.eval()
        assert llm.adapters == ("cat", "dog", "owl")
        found = tokens_of(llm, ["owl", "cat", None, BASE, "dog", "owl"])
    choices = ["owl", "cat", "dog", BASE, "dog", "owl"]
    assert found == expected_tokens(model, choices, PROMPTS, COUNT)


def test_lines_of_a_batch_job_name_adapters(model) -> None:
    with small_llm(model) as llm:
        line = json_line(1, b'{"prompt": [1, 2], "adapter": "dog"}')
        assert prepare(llm, line, SamplingParams())[1].adapter == "dog"
        with pytest.raises(InvalidRequestError, match="no adapter 'x'"):
            prepare(llm, json_line(1, b'{"prompt": [1, 2], "adapter": "x"}'), SamplingParams())


# -- sharing --------------------------------------------------------------------------------------


def test_cached_blocks_are_shared_only_by_requests_of_one_adapter(model) -> None:
    prompt, choices = zoo.prompts()[6], ["cat", "dog", BASE, "cat", None, "dog", BASE]
    wanted = expected_tokens(model, [choice or "cat" for choice in choices], [prompt] * 7, COUNT)
    with small_llm(model) as llm:
        hits = []
        for choice, expected in zip(choices, wanted, strict=True):
            before = llm.statistics().num_hit_tokens
            assert tokens_of(llm, [choice], [prompt]) == [expected]
            hits.append(llm.statistics().num_hit_tokens > before)
        assert hits == [False] * 3 + [True] * 4
        before = llm.statistics().num_hit_tokens
        llm.generate(prompt, params_of(BASE, cache_salt="cat"))
        assert llm.statistics().num_hit_tokens == before, "a salt passes for an adapter"


def test_a_fingerprint_covers_adapters_and_which_of_them_are_active() -> None:
    model = adapted("llama")
    base = model.get_base_model()
    seen = {fingerprint_of(zoo.model("llama")), fingerprint_of(base)}
    model.set_adapter("dog")
    seen.add(fingerprint_of(base))
    with model.disable_adapter():
        seen.add(fingerprint_of(base))
    layer = base.model.layers[0].self_attn.q_proj
    layer.scaling["cat"] *= 2
    seen.add(fingerprint_of(base))
    layer.lora_B["cat"].weight.data[0, 0] += 1
    seen.add(fingerprint_of(base))
    model.merge_adapter(["dog"])
    seen.add(fingerprint_of(base))
    assert len(seen) == 7


# -- as loaded ------------------------------------------------------------------------------------


def test_a_model_is_served_as_it_was_loaded(expected) -> None:
    """With one active adapter, several at once, a merged one, and none."""
    model = adapted("llama")
    prompts, base = PROMPTS[1:3], model.get_base_model()
    with small_llm(base) as llm:
        assert tokens_of(llm, [None] * 2, prompts)[0] == expected[1]
    model.base_model.set_adapter(["cat", "dog"])
    both = zoo.generate_alone(model, prompts, COUNT)
    with small_llm(model) as llm:
        assert tokens_of(llm, [None] * 2, prompts) == both
        with pytest.raises(InvalidRequestError, match="several are active at once: cat, dog"):
            llm.generate(PROMPTS[1], params_of("cat"))
    model.set_adapter("cat")
    model.merge_adapter()
    with small_llm(model) as llm:
        assert tokens_of(llm, [None] * 2, prompts)[0] == expected[1]
        with pytest.raises(InvalidRequestError, match="merged"):
            llm.generate(PROMPTS[1], params_of("dog"))
    model.unmerge_adapter()
    with model.disable_adapter(), small_llm(model) as llm:
        assert tokens_of(llm, [None, BASE], PROMPTS[:1] * 2) == [expected[0]] * 2
        with pytest.raises(InvalidRequestError, match="disabled"):
            llm.generate(PROMPTS[1], params_of("cat"))


def test_a_half_precision_model_is_widened_with_its_adapters() -> None:
    """On a CPU: adapters in half precision do not round what goes through them."""
    model = adapted("llama").to(torch.float16)
    wide = copy.deepcopy(model).to(torch.float32)
    wanted = expected_tokens(wide, CHOICES, PROMPTS, COUNT)
    with small_llm(model, kv_dtype="float32") as llm:
        own = {p.dtype for name, p in model.named_parameters() if "lora_" in name}
        assert own == {torch.float32}, "peft rounds what comes in to this"
        assert tokens_of(llm, CHOICES) == wanted
    assert {p.dtype for p in model.parameters()} == {torch.float16}


@every_architecture
def test_a_model_is_given_back_as_it_was(name: str) -> None:
    model = adapted(name)
    next(layer for layer in model.modules() if hasattr(layer, "lora_A")).train()
    before, mode = state_of(model), model.get_base_model().config._attn_implementation
    with small_llm(model) as llm:
        tokens_of(llm, CHOICES[:3], PROMPTS[:3])
    assert state_of(model) == before
    assert model.get_base_model().config._attn_implementation == mode
    assert model.active_adapter == "cat"


# -- what cannot be -------------------------------------------------------------------------------


def test_unknown_adapters_are_refused_with_those_that_are_known(model, expected) -> None:
    with small_llm(model) as llm:
        with pytest.raises(
            InvalidRequestError, match="no adapter 'x'; there are 'cat', 'dog', and"
        ):
            llm.generate(PROMPTS[:2], [params_of("cat"), params_of("x")])
        with pytest.raises(InvalidRequestError, match="no adapter 'x'"):
            llm.beam_search(PROMPTS[1], BeamSearchParams(adapter="x"))
        assert not llm.engine.has_unfinished
    with small_llm(zoo.model("llama")) as llm:
        assert llm.adapters == ()
        with pytest.raises(InvalidRequestError, match="no adapter 'cat'; there are no others"):
            llm.generate(PROMPTS[1], params_of("cat"))
        assert tokens_of(llm, [BASE], PROMPTS[:1]) == expected[:1]
    with pytest.raises(ValueError, match="adapter must be None or a string, got 3"):
        SamplingParams(adapter=3)  # type: ignore[arg-type]


UNSWITCHABLE = {
    "dora": (lora(["q_proj"], use_dora=True), "DoRA"),
    "modules_to_save": (lora(["q_proj"], modules_to_save=["lm_head"]), "modules_to_save"),
    "ia3": (
        peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
        "ia3",
    ),
}


@pytest.mark.parametrize("kind", UNSWITCHABLE)
def test_what_peft_cannot_switch_is_served_as_loaded_and_refused_by_name(kind: str) -> None:
    config, reason = UNSWITCHABLE[kind]
    model = peft.get_peft_model(copy.deepcopy(zoo.model("llama")), config, "cat").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "ia3_l" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn_like(parameter))
    expected = zoo.generate_alone(model, PROMPTS[1:3], COUNT)
    with small_llm(model) as llm:
        assert tokens_of(llm, [None, "cat"], PROMPTS[1:3]) == expected
        with pytest.raises(InvalidRequestError, match=f"'__base__' cannot be .*{reason}"):
            llm.generate(PROMPTS[1:3], [params_of(), params_of(BASE)])
        assert not llm.engine.has_unfinished
        assert tokens_of(llm, [None, "cat"], PROMPTS[1:3]) == expected


def test_methods_that_do_more_than_change_layers_are_refused() -> None:
    config = peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    model = peft.get_peft_model(copy.deepcopy(zoo.model("llama")), config)
    with pytest.raises(UnsupportedModelError, match="'default' is one of PROMPT_TUNING"):
        small_llm(model)
    invoked = lora(["q_proj"], alora_invocation_tokens=[5])
    model = peft.get_peft_model(copy.deepcopy(zoo.model("llama")), invoked)
    with pytest.raises(UnsupportedModelError, match="aLoRA"):
        small_llm(model)


def test_requests_that_a_changed_model_cannot_serve_are_told_and_the_rest_goes_on(expected) -> None:
    model = adapted("llama")
    with small_llm(model) as llm:
        stream = llm.stream(PROMPTS[1], params_of("dog"))
        next(stream)
        model.merge_adapter()
        with pytest.raises(PagedKVError, match="merged"):
            list(stream)
        model.unmerge_adapter()
        assert not llm.engine.has_unfinished
        assert tokens_of(llm, CHOICES) == expected


# -- folders --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An adapter without a tokenizer, and the model that it names beside it."""
    path = tmp_path_factory.mktemp("saved")
    model = adapted("llama")
    zoo.model("llama").save_pretrained(path / "base")
    model.peft_config["cat"].base_model_name_or_path = str(path / "base")
    model.save_pretrained(path, selected_adapters=["cat"], save_embedding_layers=False)
    return path / "cat"


def test_an_adapters_folder_is_its_model_with_the_adapter(folder, expected, tmp_path) -> None:
    loaded = loading.load_model(folder, None)
    with small_llm(loaded) as llm:
        assert llm.adapters == ("default",)
        assert tokens_of(llm, [BASE, "default"], PROMPTS[:2]) == expected[:2]
    later = AutoModelForCausalLM.from_pretrained(folder.parent / "base")
    later.load_adapter(str(folder), "cat")
    with small_llm(later) as llm:
        assert tokens_of(llm, [BASE, None], PROMPTS[:2]) == expected[:2]


def test_the_tokenizer_of_an_adapters_folder_is_its_models(folder, monkeypatch) -> None:
    asked: list[str] = []

    def load(name: Any, gguf_file: Any, source: Any) -> Any:
        asked.append(str(name))
        if len(asked) == 1:
            raise ModelNotFoundError("no tokenizer")
        return None

    monkeypatch.setattr(loading, "load_tokenizer", load)
    loading.NEWEST.load(folder, None, None)
    assert asked == [str(folder), str(folder.parent / "base")]


def test_an_adapters_folder_without_peft_says_what_is_missing(folder, monkeypatch) -> None:
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"needs peft: pip install 'paged-kv\[adap"):
        small_llm(str(folder))


def test_an_adapter_that_does_not_fit_its_model_is_refused(folder, tmp_path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "r": 2}))
    (tmp_path / "adapter_model.safetensors").symlink_to(folder / "adapter_model.safetensors")
    with pytest.raises(ModelNotFoundError):
        loading.load_model(tmp_path, None)
