"""Calibrations: what they find, how they are kept, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from paged_kv import LLM, ConfigError, SamplingParams
from paged_kv.cache.formats import INT2, INT8
from paged_kv.cache.key_calibration import KeyCalibration, usual_channel_order
from paged_kv.cache.layer_spec import LayerSpec
from paged_kv.entrypoints.demo import MODEL_FOLDER
from paged_kv.models.calibration import (
    TEXT,
    Calibration,
    Moments,
    calibrate,
    calibrate_on_text,
    usual_calibration,
)
from paged_kv.models.huggingface import PagedModel
from tests.support import zoo


@pytest.fixture(scope="module")
def paged() -> PagedModel:
    return PagedModel(AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_FOLDER)


@pytest.fixture(scope="module")
def known(paged, tokenizer) -> Calibration:
    return calibrate_on_text(paged, tokenizer)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "cache").mkdir(mode=0o700)
    monkeypatch.setenv("PAGED_KV_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_moments_are_those_of_all_tokens_however_they_come():
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(50, 4, 8, generator=generator)
    keys = torch.randn(50, 2, 8, generator=generator) * torch.arange(1.0, 9.0)
    moments = Moments.none(2, 8, torch.device("cpu"))
    for start, end in ((0, 7), (7, 8), (8, 50)):
        moments.add(queries[start:end], keys[start:end], is_head=start == 0)
    grouped = queries.double().reshape(50, 2, 2, 8)
    products = torch.einsum("thgi,thgj->hij", grouped, grouped) / 100
    variance = keys[7:].double().var(0, unbiased=False)
    expected = KeyCalibration.from_moments(products.numpy(), variance.numpy())
    found = moments.key_calibration()
    assert np.array_equal(found.channel_order, expected.channel_order)
    np.testing.assert_allclose(
        found.feedback.astype(float), expected.feedback.astype(float), rtol=1e-3, atol=1e-6
    )


def test_feedback_is_gptqs_rule_for_the_covariance_of_queries():
    """To make up for an error in one channel, those behind take on its regression."""
    mixing = np.random.default_rng(0).normal(size=(1, 6, 6))
    covariance = mixing @ mixing.transpose(0, 2, 1) + 0.1 * np.eye(6)
    found = KeyCalibration.from_moments(covariance, np.ones((1, 6))).feedback[0].astype(float)
    damped = covariance[0] + 0.1 * np.trace(covariance[0]) / 6 * np.eye(6)
    for channel in range(5):
        behind = slice(channel + 1, 6)
        best = np.linalg.solve(damped[behind, behind], damped[behind, channel])
        np.testing.assert_allclose(found[channel, behind], -best, rtol=2e-3, atol=1e-4)
    assert not np.tril(found).any()


def test_it_knows_each_layer_and_kv_head_and_is_the_same_the_second_time(paged, tokenizer, known):
    assert len(known.layers) == len(paged.layer_shapes)
    assert [(k.num_kv_heads, k.key_dim) for k in known.layers] == [
        (heads, key_dim) for heads, key_dim, _ in paged.layer_shapes.values()
    ]
    assert len({k.digest for k in known.layers}) == len(known.layers)
    assert calibrate_on_text(paged, tokenizer).layers == known.layers
    other = calibrate_on_text(paged, tokenizer, TEXT.read_text()[:2000])
    assert other.layers != known.layers


def test_a_file_holds_it_and_what_is_none_is_refused(paged, known, tmp_path):
    path = tmp_path / "known.safetensors"
    known.save(path)
    loaded = Calibration.load(path)
    assert loaded.layers == known.layers
    loaded.require_model(paged)
    with pytest.raises(ConfigError, match="another model"):
        replace(loaded, model_fingerprint=b"x").require_model(paged)
    data = path.read_bytes()
    for wrong in (b"", b"text", data[:-100], data.replace(b"calibration 2", b"calibration 9")):
        path.write_bytes(wrong)
        with pytest.raises(ConfigError, match="calibration"):
            Calibration.load(path)
    with pytest.raises(ConfigError, match="no calibration can be read"):
        Calibration.load(tmp_path / "missing")
    with pytest.raises(ConfigError, match="cannot be written"):
        known.save(tmp_path / "no folder" / "known")


def test_the_usual_one_is_kept_and_made_again_where_it_is_damaged(
    paged, tokenizer, known, cache_folder
):
    assert usual_calibration(paged, tokenizer).layers == known.layers
    (kept,) = (cache_folder / "calibrations").iterdir()
    content = kept.read_bytes()
    kept.write_bytes(b"damaged")
    assert usual_calibration(paged, tokenizer).layers == known.layers
    assert kept.read_bytes() == content


def test_too_short_a_text_is_refused(paged):
    with pytest.raises(ConfigError, match="at least 64 tokens of text, got 3"):
        calibrate(paged, [1, 2, 3])


def test_an_llm_takes_the_usual_one_a_given_one_its_file_or_none(known, tmp_path):
    path = tmp_path / "known.safetensors"
    options = {"kv_format": "int2", "dtype": torch.float32, "num_blocks": 60, "max_num_seqs": 2}
    params = SamplingParams(max_tokens=3)
    found = {}
    known.save(path)
    for name, given in (("usual", "usual"), ("own", known), ("file", path), ("none", None)):
        with LLM(MODEL_FOLDER, calibration=given, **options) as llm:
            found[name] = [layer.calibration for layer in llm.engine.cache.layers]
            assert llm.generate("It was", params)[0].token_ids
    assert found["usual"] == found["own"] == found["file"] == list(known.layers)
    assert found["none"] == [None] * len(known.layers)
    with LLM(MODEL_FOLDER, **options | {"kv_format": "int8"}) as llm:
        assert {layer.calibration for layer in llm.engine.cache.layers} == {None}
    with pytest.raises(ConfigError, match="another model"):
        LLM(zoo.model("llama"), calibration=known, **options | {"dtype": None})
    with pytest.raises(ConfigError, match="calibration must be"):
        LLM(MODEL_FOLDER, calibration=7, **options)


def test_a_layer_takes_wide_channels_from_it_or_those_that_turn_slowest(known):
    layer = LayerSpec(kv_format=INT2, num_kv_heads=2, key_dim=64, value_dim=64)
    assert layer.wide_channels.tolist() == [[*range(24, 32), *range(56, 64)]] * 2
    assert layer.feedback is None
    assert sorted(usual_channel_order(64).tolist()) == list(range(64))
    calibrated = replace(layer, calibration=known.layers[0])
    expected = np.sort(known.layers[0].channel_order[:, :16], axis=1)
    assert np.array_equal(calibrated.wide_channels, expected)
    assert replace(calibrated, kv_format=INT8).calibration is None
    with pytest.raises(ConfigError, match="2 kv heads of 64 channels, the layer has 1 of 64"):
        replace(calibrated, num_kv_heads=1)
    with pytest.raises(ConfigError, match="permutations"):
        KeyCalibration(channel_order=np.zeros((1, 4)), feedback=np.zeros((1, 4, 4)))
    with pytest.raises(ConfigError, match="0 on the diagonal"):
        KeyCalibration(channel_order=np.arange(4)[None], feedback=np.ones((1, 4, 4)))
