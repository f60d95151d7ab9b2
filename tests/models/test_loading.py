"""What is loaded is the whole model that was meant, or an error says what is wrong with it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils import logging as transformers_logging

from paged_kv import LLM, PagedKVError
from paged_kv.errors import ConfigError, MissingDependencyError, ModelNotFoundError
from paged_kv.models.cost import probe_layers
from paged_kv.models.loading import Source, load_model, load_tokenizer, move_model

LAYER = "model.layers.1.mlp.up_proj"
Tensors = dict[str, Tensor]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No test may ask a hub: whatever would be asked for is noted instead."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small model, whose head is tied to its embeddings, and a tokenizer."""
    path = tmp_path_factory.mktemp("models") / "small"
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path)
    backend = Tokenizer(models.WordLevel({f"t{n}": n for n in range(64)}, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(path)
    return path


@pytest.fixture
def changed(folder, tmp_path) -> Callable[..., Path]:
    """A copy of the folder, its tensors or its configuration changed."""

    def make(tensors: Callable[[Tensors], object] | None = None, **config: object) -> Path:
        path = tmp_path / "changed"
        shutil.copytree(folder, path)
        if tensors is not None:
            weights = load_file(path / "model.safetensors")
            tensors(weights)
            save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        settings = json.loads((path / "config.json").read_text()) | config
        (path / "config.json").write_text(json.dumps(settings))
        return path

    return make


def assert_refused(path: object, match: str, error: type[PagedKVError] = ModelNotFoundError):
    with pytest.raises(error, match=match) as caught:
        LLM(path)
    assert len(str(caught.value)) < 700


# -- tensors ------------------------------------------------------------------------------------


def test_a_whole_checkpoint_loads_with_a_tied_head(folder):
    model = load_model(folder, None)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.dtype == torch.float32
    assert load_model(str(folder), torch.bfloat16).dtype == torch.bfloat16


def test_loading_draws_no_bar_and_leaves_what_the_user_has_set(folder, capsys):
    shown = transformers_logging.is_progress_bar_enabled()
    try:
        for wanted in (True, False):
            switch = "enable" if wanted else "disable"
            getattr(transformers_logging, f"{switch}_progress_bar")()
            with LLM(folder, kv_format="native", max_num_seqs=1):
                assert transformers_logging.is_progress_bar_enabled() is wanted
            with pytest.raises(ModelNotFoundError):
                load_model(folder.parent, None)
            assert transformers_logging.is_progress_bar_enabled() is wanted
        assert capsys.readouterr() == ("", "")
        transformers_logging.enable_progress_bar()
        AutoModelForCausalLM.from_pretrained(folder)
        assert "Loading weights" in capsys.readouterr().err  # as ever in the user's own calls
    finally:
        getattr(transformers_logging, f"{'enable' if shown else 'disable'}_progress_bar")()


@pytest.mark.parametrize(
    "name", [f"{LAYER}.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_a_missing_tensor_is_refused_by_name(changed, name):
    assert_refused(changed(lambda weights: weights.pop(name)), f"lacks .*{name}")


def test_an_untied_head_is_missed(changed):
    assert_refused(changed(tie_word_embeddings=False), r"lacks lm_head\.weight$")


def test_of_many_missing_tensors_some_are_named(changed):
    path = changed(lambda weights: [weights.pop(name) for name in list(weights) if ".0." in name])
    assert_refused(path, r"lacks model\.layers\.0\..* and 4 more$")


@pytest.mark.parametrize("shape", [(3, 3), (32,), (32, 33)])
def test_a_tensor_of_another_size_is_refused_by_name(changed, shape):
    path = changed(lambda weights: weights.update({f"{LAYER}.weight": torch.zeros(shape)}))
    assert_refused(path, f"in other sizes than its configuration says {LAYER}.weight$")


def test_a_configuration_of_another_size_is_refused(changed):
    assert_refused(changed(intermediate_size=48), "in other sizes than its configuration says")


@pytest.mark.parametrize(
    "name",
    [
        f"{LAYER}.bias",
        f"{LAYER}.weight_scale",
        f"{LAYER}.lora_A.weight",
        "model.layers.2.mlp.up_proj.weight",
    ],
)
def test_a_tensor_that_would_change_what_is_computed_has_to_have_a_place(changed, name):
    path = changed(lambda weights: weights.update({name: torch.ones(4)}))
    assert_refused(path, f"the model has no place for {name}$")


def test_what_changes_nothing_may_be_there(changed):
    extra = ("model.layers.1.self_attn.rotary_emb.inv_freq", "vision.patch.weight", "mtp.fc.weight")
    path = changed(lambda weights: weights.update({name: torch.ones(4) for name in extra}))
    assert load_model(path, None).num_parameters() > 0


def test_masks_of_old_checkpoints_may_be_there(tmp_path):
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["transformer.h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    weights["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert load_model(tmp_path, None).num_parameters() > 0


# -- other checkpoints --------------------------------------------------------------------------


def test_an_encoder_is_refused(tmp_path):
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=32,
    )
    BertModel(config).save_pretrained(tmp_path)
    assert_refused(tmp_path, "not one of BertLMHeadModel: it lacks")


def test_an_encoder_decoder_is_refused_without_a_list_of_all_models(tmp_path):
    config = T5Config(vocab_size=64, d_model=32, num_layers=1, num_heads=4, d_ff=32, d_kv=8)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    assert_refused(tmp_path, "no causal language model at .*T5Config")


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq"])
def test_a_quantized_checkpoint_whose_package_is_missing_is_refused(changed, method):
    path = changed(quantization_config={"quant_method": method, "bits": 4, "load_in_4bit": True})
    assert_refused(path, "requires", MissingDependencyError)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.safetensors", b"abc"),
        ("model.safetensors", b""),
        ("model.safetensors", b"\xff" * 100),
        ("config.json", b"{"),
        ("config.json", b"[]"),
        ("config.json", b'{"model_type": "nothing"}'),
        ("config.json", b'{"model_type": "llama", "hidden_size": "x"}'),
        ("config.json", b'{"model_type": "llama", "hidden_size": 30}'),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"not json"),
        ("tokenizer_config.json", b"{"),
    ],
    ids=lambda value: value if isinstance(value, str) else repr(value[:30]),
)
def test_a_broken_file_is_refused(changed, file, content):
    path = changed()
    (path / file).write_bytes(content)
    assert_refused(path, "no (causal language model|tokenizer) at .*changed")


def test_a_broken_pickle_is_refused(changed):
    path = changed()
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(b"abc")
    assert_refused(path, "no causal language model at")


def test_code_of_a_checkpoint_is_not_asked_about(changed, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the terminal"))
    auto_map = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    path = changed(model_type="foreign", auto_map=auto_map)
    assert_refused(path, "contains custom code")


# -- what is no model ---------------------------------------------------------------------------


class Adapter(nn.Module):
    """Looks like a PEFT wrapper."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = model

    def merge_and_unload(self) -> nn.Module:
        return self.base_model


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (None, "got None$"),
        (123, "got 123$"),
        (b"gpt2", "got b'gpt2'$"),
        (["gpt2"], r"got \['gpt2'\]$"),
        (LlamaForCausalLM, "got <class"),
        (nn.Linear(2, 2), r"got Linear, which is no transformers\.PreTrainedModel"),
        (Adapter(nn.Linear(2, 2)), r"Adapter: call its merge_and_unload\(\) first"),
        ("", "got ''$"),
        ("  ", "got '  '$"),
        ("a\0b", "got 'a"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_model_is_refused_by_value(wrong, match):
    for call in (LLM, lambda value: load_model(value, None), load_tokenizer, probe_layers):
        with pytest.raises(ConfigError, match=f"model must be a folder.*{match}"):
            call(wrong)


# -- names --------------------------------------------------------------------------------------


@pytest.fixture
def asked_for(monkeypatch) -> list[str]:
    """Names that transformers is asked for; it finds none of them."""
    names: list[str] = []

    def ask(name: str, **_: object) -> None:
        names.append(name)
        raise OSError("not there")

    for loader in (AutoModelForCausalLM, AutoTokenizer):
        monkeypatch.setattr(loader, "from_pretrained", ask)
    return names


PATHS = [
    "./x",
    "../x",
    "/x/y",
    "~/no-such-model",
    "~nobody-of-this-name/x",
    "a/b/c",
    "C:\\models\\x",
    "C:/x",
    "models\\x",
    "x.gguf",
    "owner/x.safetensors",
    "a model",
    "owner/name/",
    "x/",
    "https://hub/owner/name",
    "owner//name",
    "-x",
    ".x",
]


@pytest.mark.parametrize("name", [*PATHS, Path("owner/name"), Path("x")], ids=str)
def test_what_looks_like_a_path_never_goes_to_the_hub(asked_for, monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    for load in (lambda: load_model(name, None), lambda: load_tokenizer(name)):
        with pytest.raises(ModelNotFoundError, match="no model folder at"):
            load()
    assert not asked_for


@pytest.mark.parametrize("name", ["gpt2", "owner/name", "owner/name-2.5B_v1.0", "0x/Y-GGUF"])
def test_hub_names_go_to_the_hub(asked_for, monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFoundError, match=f"at {name!r}"):
        load_model(name, None)
    assert asked_for == [name]


def test_a_folder_that_is_there_is_meant(asked_for, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("gpt2", "owner/name", "a model", "x.gguf"):
        (tmp_path / name).mkdir(parents=True)
        with pytest.raises(ModelNotFoundError, match="not there"):
            load_model(name, None)
        assert asked_for.pop() == name


def test_a_name_in_a_folder_of_this_machine_is_a_path(asked_for, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(ModelNotFoundError, match="there is a folder 'models' here"):
        load_model("models/foo", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelNotFoundError, match="no model folder at 'file'"):
        load_model("file", None)
    assert not asked_for


def test_the_home_folder_is_found(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert load_model(f"~{os.sep}small", None).num_parameters() > 0
    assert len(load_tokenizer("~/small")) == 64
    assert len(probe_layers("~/small")[0]) == 2


# -- precision and device -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.float64, torch.complex64, "int8", "nonsense", 7], ids=str
)
def test_other_precisions_are_refused_by_value(folder, dtype):
    with pytest.raises(ConfigError, match=f"{dtype}"):
        LLM(folder, dtype=dtype)
    with pytest.raises(ConfigError, match=f"{dtype}"):
        LLM(load_model(folder, None), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "float32", "auto", None], ids=str)
def test_a_dtype_may_be_a_name(folder, dtype):
    """And so may that of what is not quantized."""
    expected = {"auto": torch.float32, None: torch.float32}.get(dtype)
    expected = expected or (getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    with LLM(folder, dtype=dtype, kv_dtype="float16", device="auto") as llm:
        assert llm.engine.model.dtype == expected
        assert llm.engine.cache.dtype == torch.float16
        assert llm.engine.model.device.type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_revision_and_trust_are_passed_on(monkeypatch):
    """Without them it is the newest, and no code of the model's runs."""
    asked: list[tuple[object, object]] = []

    def ask(name: str, *, revision: object, trust_remote_code: object, **_: object) -> None:
        asked.append((revision, trust_remote_code))
        raise OSError("not there")

    for loader in (AutoModelForCausalLM, AutoTokenizer):
        monkeypatch.setattr(loader, "from_pretrained", ask)
    for options in ({}, {"revision": "v2", "trust_remote_code": True}):
        with pytest.raises(ModelNotFoundError):
            LLM("owner/name", **options)
        with pytest.raises(ModelNotFoundError):
            load_tokenizer("owner/name", source=Source(None, **options))
    assert asked == [("main", False)] * 2 + [("v2", True)] * 2


@pytest.mark.parametrize(
    "options", [{"revision": ""}, {"revision": 3}, {"trust_remote_code": "yes"}], ids=str
)
def test_a_bad_source_is_refused_by_name(folder, options):
    (name,) = options
    with pytest.raises(ConfigError, match=f"{name} must be .*, got {options[name]!r}"):
        LLM(folder, **options)
    with pytest.raises(ConfigError, match="revision 'v2' is for a folder"):
        LLM(load_model(folder, None), revision="v2")


DEVICES = ["meta", "nonsense", "", "cuda:99", "cpu:x", 5.5, object, True]


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_a_device_that_is_not_there_is_refused_and_the_model_stays(folder, device):
    model = load_model(folder, None)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    for call in (lambda: LLM(model, device=device), lambda: move_model(model, device)):
        with pytest.raises(ConfigError, match="device"):
            call()
    assert model.config._attn_implementation != "paged_kv"
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])


def test_a_model_without_weights_is_refused(folder):
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
    with pytest.raises(ConfigError, match=r"device.*'meta'"):
        LLM(model)
