"""Teacher forcing: what a quality is made of, windows that never overlap, hidden pairs, and passes
in parallel that say what decoding says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peers.own_formats import OwnFormat
from peers.parallel_pass import ParallelModel
from peers.quality_peers import PEERS
from quality_windows import STRETCH, book_windows
from transformers import AutoModelForCausalLM, AutoTokenizer

from paged_kv.cache.formats import FORMATS, INT2, NATIVE
from paged_kv.engine.evaluate import Quality, compare_formats, count_recalled, token_windows
from paged_kv.engine.recall import NAMES, PAIRS_BY_LENGTH, RecallContext, recall_contexts
from paged_kv.entrypoints.demo import MODEL_FOLDER
from paged_kv.entrypoints.evaluation import from_json, to_json
from paged_kv.entrypoints.kept_results import KeptResults
from paged_kv.errors import ConfigError
from paged_kv.models.calibration import calibrate
from paged_kv.models.huggingface import PagedModel

TEXT = Path(__file__).parents[1] / "support" / "data" / "persuasion-excerpt.txt"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_FOLDER, model_max_length=1 << 30)


@pytest.fixture(scope="module")
def text_ids(tokenizer) -> list[int]:
    return tokenizer.encode(" ".join(TEXT.read_text().split()), add_special_tokens=False)


@pytest.fixture
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32)


# -- figures --------------------------------------------------------------------------------------


def random_quality(seed: int, length: int) -> tuple[Quality, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 2, length, 50, generator=random).log_softmax(-1)
    targets = torch.randint(50, (2, length), generator=random)
    return Quality.of(logits[0], logits[1], targets), logits, targets


def test_figures_of_a_quality_are_what_they_are_called():
    quality, logits, targets = random_quality(0, 200)
    p, q = logits.double().numpy()
    divergences = (np.exp(p) * (p - q)).sum(-1)
    assert quality.num_tokens == 400
    assert quality.divergence == pytest.approx(divergences.mean(), rel=1e-5)
    assert quality.worst_percent == pytest.approx(np.quantile(divergences, 0.99), rel=1e-5)
    assert quality.agreement == (p.argmax(-1) == q.argmax(-1)).mean()
    losses = -np.take_along_axis(q, targets.numpy()[..., None], -1)
    assert quality.perplexity == pytest.approx(np.exp(losses.mean()), rel=1e-5)
    stretches = divergences[:, :192].reshape(6, 64).mean(1)
    expected = stretches.std(ddof=1) / 6**0.5
    assert quality.standard_error == pytest.approx(expected, rel=1e-5)


def test_joined_qualities_are_those_of_all_their_tokens():
    whole, _, _ = random_quality(1, 100)
    columns = whole.losses, whole.divergences, whole.agreements
    parts = [Quality(*(c[:, rows] for c in columns)) for rows in (slice(30), slice(30, None))]
    joined = Quality.joined(parts, axis=1)
    assert (joined.divergences == whole.divergences).all()
    assert Quality.joined([whole, whole]).num_tokens == 2 * whole.num_tokens
    assert Quality.joined([whole, whole]).divergence == whole.divergence


def test_one_stretch_tells_no_standard_error():
    quality, _, _ = random_quality(2, 60)
    one = Quality(quality.losses[:1], quality.divergences[:1], quality.agreements[:1])
    assert np.isnan(one.standard_error)


def test_a_quality_survives_json():
    quality, _, _ = random_quality(3, 70)
    again = from_json(json.loads(json.dumps(to_json(quality))))
    assert np.allclose(again.losses, quality.losses, rtol=1e-5)
    assert (again.agreements == quality.agreements).all()


def test_formats_are_compared_alike_in_one_step_and_in_many(model, text_ids, tokenizer):
    windows = token_windows(text_ids, 70, tokenizer.bos_token_id)[:2]
    paged = PagedModel(model)
    done: list[int] = []
    step = compare_formats(paged, [NATIVE], windows, tokens_per_step=69, report=done.append)[0]
    each = compare_formats(paged, [NATIVE], windows)[0]
    assert np.allclose(step.losses, each.losses, atol=1e-4)
    assert step.divergence == 0
    assert sum(done) == 2 * 69


# -- windows --------------------------------------------------------------------------------------


def test_windows_follow_each_other_and_open_with_the_first_token():
    windows = token_windows(list(range(10, 30)), 6, 1)
    assert windows.shape == (4, 6)
    assert (windows[:, 0] == 1).all()
    assert windows[:, 1:].reshape(-1).tolist() == list(range(10, 30))
    assert token_windows(list(range(12)), 6, None).tolist() == [[*range(6)], [*range(6, 12)]]


def test_a_text_without_a_window_is_refused():
    with pytest.raises(ConfigError, match="5 tokens holds no window of 7"):
        token_windows(list(range(5)), 7, 1)


@pytest.mark.parametrize("first_token", [None, -1])
def test_windows_for_tuning_and_for_reports_never_overlap(first_token):
    book = list(range(5 * STRETCH + 1000))
    seen = {
        tuning: {
            int(token)
            for length in (512, 2048, 8192)
            for window in book_windows(book, length, first_token, tuning=tuning)
            for token in window
            if token != -1
        }
        for tuning in (True, False)
    }
    assert not seen[True] & seen[False]
    assert min(map(len, seen.values())) > STRETCH


def test_a_few_windows_come_from_different_places():
    windows = book_windows(list(range(6 * STRETCH)), 512, None, tuning=False, count=3)
    assert windows[:, 0].tolist() == [STRETCH, 3 * STRETCH, 5 * STRETCH]


# -- recall ---------------------------------------------------------------------------------------


def test_contexts_hold_every_pair_and_its_question(tokenizer, text_ids):
    filler = text_ids * 3
    contexts = recall_contexts(tokenizer, filler, max_length=8192)
    assert [len(c.token_ids) for c in contexts] == list(PAIRS_BY_LENGTH)
    assert sum(len(c.answers) for c in contexts) == 14
    for context in contexts:
        ids, text = context.token_ids, tokenizer.decode(context.token_ids)
        for start, end in context.answers:
            answer = tokenizer.decode(ids[start:end]).strip()
            assert text.count(answer) == 2  # once hidden, once asked for
        assert max(text.count(name) for name in NAMES) >= 2
    again = recall_contexts(tokenizer, filler, max_length=8192)
    other = recall_contexts(tokenizer, filler, max_length=8192, seed=1)
    assert all((a.token_ids == b.token_ids).all() for a, b in zip(contexts, again, strict=True))
    assert (contexts[0].token_ids != other[0].token_ids).any()


def test_contexts_are_no_longer_than_the_model(tokenizer, text_ids):
    contexts = recall_contexts(tokenizer, text_ids, max_length=1024)
    assert [len(c.token_ids) for c in contexts] == [800]
    with pytest.raises(ConfigError, match=r"at least 800 tokens, got .* and 512"):
        recall_contexts(tokenizer, text_ids, max_length=512)


def test_an_answer_counts_if_all_of_its_tokens_are_chosen():
    context = RecallContext(np.arange(10), ((2, 4), (6, 9)))
    choices = np.full(10, -1)
    choices[[2, 3, 6, 8]] = [2, 3, 6, 8]
    assert context.num_recalled(choices) == 1
    assert context.answer_places.tolist() == [2, 3, 6, 7, 8]


@pytest.mark.parametrize("tokens_per_step", [1, 3, 64])
def test_answers_are_those_of_greedy_continuation(model, text_ids, tokens_per_step):
    """Answers that are what the model says, and one that is not."""
    prompt = torch.tensor([text_ids[:50]])
    said = model.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False)[0].numpy()
    wrong = said.copy()
    wrong[-1] += 1
    contexts = [RecallContext(said, ((50, 53), (53, 56))), RecallContext(wrong, ((52, 56),))]
    paged = PagedModel(model)
    found = count_recalled(paged, NATIVE, contexts, tokens_per_step=tokens_per_step)
    assert found == 2


# -- kept results ---------------------------------------------------------------------------------


def test_results_are_kept_one_by_one(tmp_path):
    output = tmp_path / "out.json"
    kept = KeptResults(output)
    kept.keep("a", [1.5])
    kept.keep("b", {"x": 1})
    assert kept.path is not None
    with kept.path.open("a") as file:
        file.write('["c", 1')  # cut off
    again = KeptResults(output)
    assert (again["a"], again["b"]) == ([1.5], {"x": 1})
    assert "c" not in again
    again.keep("c", 2)
    assert KeptResults(output)["c"] == 2


def test_without_an_output_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept = KeptResults(None)
    kept.keep("a", 1)
    assert kept["a"] == 1
    assert not list(tmp_path.iterdir())


# -- passes in parallel ---------------------------------------------------------------------------


def divergence(parallel: ParallelModel, window, storage) -> Quality:
    native, hidden = (parallel.hidden_states(window[:-1], s) for s in (None, storage))
    states = (parallel.logits(h).log_softmax(-1)[None] for h in (native, hidden))
    return Quality.of(*states, torch.from_numpy(window[None, 1:]))


def test_a_parallel_pass_says_what_decoding_says(model, text_ids, tokenizer):
    formats = [FORMATS[name] for name in ("int8", "int8-token", "k4v2", "int2", "kivi2")]
    window = token_windows(text_ids, 290, tokenizer.bos_token_id)[1]
    paged = PagedModel(model)
    known = calibrate(paged, text_ids[2000:2400]).layers
    layers = [paged.layers(kv_format, known) for kv_format in formats]
    decoded = compare_formats(paged, [NATIVE, *formats], window[None], calibration=known)[1:]
    paged.close()
    parallel = ParallelModel(model)
    for mine, quality in zip(layers, decoded, strict=True):
        name = mine[0].kv_format.name
        emulated = divergence(parallel, window, OwnFormat(name, mine, torch.float32))
        # Of 4e-6 what float32 rounds, differently on each processor, is the twentieth part.
        assert emulated.divergence == pytest.approx(quality.divergence, rel=0.02, abs=4e-7), name
        assert emulated.perplexity == pytest.approx(quality.perplexity, rel=1e-3), name


def test_a_parallel_pass_without_a_cache_is_the_model(model, text_ids):
    ids = torch.tensor(text_ids[:300])
    with torch.inference_mode():
        expected = model(input_ids=ids[None]).logits[0]
    parallel = ParallelModel(model)
    found = parallel.logits(parallel.hidden_states(ids.numpy(), None))
    assert torch.allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("peer", PEERS.values(), ids=list(PEERS))
def test_peers_err_by_what_their_bits_allow(peer):
    random = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 2, 512, 64, generator=random)
    copies = peer.copies(0, keys, values)
    most = {2: 0.5, 3: 0.22, 4: 0.16, 8: 0.05}[peer.bits]
    for sealed, rows in ((copies.sealed_keys, keys), (copies.sealed_values, values)):
        error = float((sealed - rows)[:, :480].norm() / rows[:, :480].norm())
        assert most / 60 < error < most
    assert (np.diff(copies.key_ends) >= 0).all()
    protected = peer.with_head_and_tail(16)
    again = protected.copies(0, keys, values)
    assert (again.sealed_keys[:, :16] == again.open_keys[:, :16]).all()
    assert (again.key_ends <= np.maximum(np.arange(512) - protected.tail, 0)).all()


def test_peers_take_the_bytes_that_are_published():
    sizes = {name: peer.sealed_bytes(128) for name, peer in PEERS.items()}
    assert sizes["KIVI-2"] == 96
    assert sizes["KIVI-4"] == 160
    assert sizes["TurboQuant-like 2"] == 68
    assert sizes["llama.cpp q4_0"] == 144
    assert sizes["llama.cpp q8_0"] == 272
    assert sizes["fp8 e4m3"] == 256
    kivi = PEERS["KIVI-2"]
    assert kivi.effective_bytes(128, 64) == 512
    assert 96 < kivi.effective_bytes(128, 8192) < 110
    assert PEERS["fp8 e4m3"].effective_bytes(128, 100) == 256


def test_tails_of_our_formats_count(model):
    paged = PagedModel(model)
    case = OwnFormat("int2", paged.layers(INT2), torch.float32)
    assert case.effective_bytes(100) > 3 * case.sealed_bytes
    assert case.sealed_bytes < case.effective_bytes(8192) < 1.3 * case.sealed_bytes
