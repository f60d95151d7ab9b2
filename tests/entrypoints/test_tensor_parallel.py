"""Tensor parallelism: tokens of several processes are those of one, and no process is left."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from paged_kv import (
    DEMO_MODEL,
    LLM,
    AsyncLLM,
    BeamSearchParams,
    SamplingParams,
    ServerSettings,
    create_app,
)
from paged_kv.cache.transfer import export_sequence
from paged_kv.engine.parallel_group import WorkerProcess
from paged_kv.engine.parallel_worker import RunStep
from paged_kv.engine.prompt_lookup import PromptLookup
from paged_kv.errors import (
    ClosedError,
    ConfigError,
    GenerationError,
    StepFailedError,
    TransferError,
    UnsupportedModelError,
)
from paged_kv.models.calibration import calibrate
from paged_kv.models.huggingface import PagedModel
from paged_kv.models.loading import load_model, load_tokenizer
from tests.support import zoo
from tests.support.worker_pool import WorkerPool

pytestmark = pytest.mark.xdist_group("tensor-parallel")
pytest.importorskip("transformers.distributed.tensor_parallel")

GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
Make = Callable[..., LLM]


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    workers = WorkerPool()
    yield workers
    workers.close()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(DEMO_MODEL)


@pytest.fixture
def make(pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Makes LLMs of two processes on the demo model, and closes them."""
    monkeypatch.setattr(WorkerProcess, "start", pool.take)
    monkeypatch.setattr(WorkerProcess, "end", lambda worker: pool.give(worker))
    made: list[LLM] = []

    def new(model: str | Path = DEMO_MODEL, **settings: Any) -> LLM:
        made.append(LLM(model, **{"tensor_parallel_size": 2, "dtype": "float32", **settings}))
        return made[-1]

    yield new
    for llm in made:
        llm.engine.manager.check_integrity()
        llm.close()
    assert not torch.distributed.is_initialized()


def tokens_of(llm: LLM, prompts: list[list[int]], params: SamplingParams = GREEDY) -> Any:
    outputs = llm.generate(prompts, params, show_progress=False)
    return [[each.token_ids for each in output.completions] for output in outputs]


@pytest.fixture(scope="module")
def prompts(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    text = (Path(__file__).parents[2] / "README.md").read_text()
    token_ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    return [token_ids[start : start + 40 + 37 * n] for n, start in enumerate(range(0, 900, 150))]


@pytest.mark.parametrize(
    "name", ["llama-bias", "llama-tied", "qwen2", "qwen3-moe", "gemma3", "mixtral"]
)
def test_tokens_are_those_of_generate(
    name: str, make: Make, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    alone = zoo.model(name)
    alone.save_pretrained(tmp_path)
    llm = make(tmp_path, tokenizer=tokenizer, kv_format="native", token_budget=40)
    params = SamplingParams(max_tokens=zoo.NUM_NEW_TOKENS, temperature=0, ignore_eos=True)
    found = tokens_of(llm, zoo.prompts(), params)
    assert [tokens for [tokens] in found] == zoo.expected_tokens(name)
    assert llm.engine.model.fingerprint() == fingerprint(alone)


def fingerprint(model: Any) -> bytes:
    attached = PagedModel(model)
    try:
        return attached.fingerprint()
    finally:
        attached.close()


@pytest.mark.parametrize("kv_format", ["native", "int8", "int2"])
def test_formats_preemption_and_sharing_are_those_of_one_process(
    kv_format: str, make: Make, prompts: list[list[int]], tmp_path: Path
) -> None:
    """The same calibration, as sums of floats may differ in their last bits."""
    attached = PagedModel(load_model(DEMO_MODEL, torch.float32))
    calibration = tmp_path / "calibration.safetensors"
    calibrate(attached, prompts[-1]).save(calibration)
    attached.close()
    settings = {
        "kv_format": kv_format,
        "calibration": calibration,
        "num_blocks": 22,
        "swap_space": "1MiB",
        "max_num_seqs": 6,
        "token_budget": 128,
    }
    batch = [*prompts, prompts[3]]
    # Where a code is rounded the other way, what is drawn of two tokens may be the other one.
    top_k = 2 if kv_format == "native" else 1
    two = SamplingParams(max_tokens=40, temperature=0.7, seed=3, n=2, ignore_eos=True, top_k=top_k)
    with LLM(DEMO_MODEL, dtype="float32", **settings) as one:
        expected = tokens_of(one, batch), tokens_of(one, prompts[:2], two)
        beams = one.beam_search(prompts[:1], BeamSearchParams(num_beams=3, max_tokens=9))
        statistics = one.statistics()
        stats, bytes_per_token = one.memory_stats(), one.bytes_per_token()
    assert statistics.num_preemptions or kv_format != "int2"
    assert statistics.num_hit_tokens
    llm = make(**settings)
    assert (tokens_of(llm, batch), tokens_of(llm, prompts[:2], two)) == expected
    found = llm.beam_search(prompts[:1], BeamSearchParams(num_beams=3, max_tokens=9))
    assert [c.token_ids for c in found[0].completions] == [
        c.token_ids for c in beams[0].completions
    ]
    assert llm.statistics() == statistics
    assert (llm.memory_stats(), llm.bytes_per_token()) == (stats, bytes_per_token)


def test_windows_and_guesses_are_those_of_one_process(make: Make, prompts: list[list[int]]) -> None:
    from paged_kv.blocks.sink_window import SinkWindow

    settings = {
        "kv_format": "int8",
        "sink_window": SinkWindow(4, 128),
        "speculation": PromptLookup(num_tokens=3),
        "max_num_seqs": 4,
    }
    batch = [[*prompt, *prompt, *prompt[:9]] for prompt in prompts[:4]]
    with LLM(DEMO_MODEL, dtype="float32", **settings) as one:
        expected = tokens_of(one, batch)
        assert one.statistics().num_accepted_tokens
    assert tokens_of(make(**settings), batch) == expected


def log_probs_of(llm: LLM, prompts: list[list[int]]) -> torch.Tensor:
    """Of every token of the prompts but the first."""
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    outputs = llm.generate(prompts, params, show_progress=False)
    found = [output.prompt_logprobs for output in outputs]
    return torch.tensor([each.logprob for its in found for each in its[1:]], dtype=torch.float64)


def test_four_processes_in_half_precision_are_as_near_as_one(
    make: Make, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], tmp_path: Path
) -> None:
    """Beside float32: what they add up in another order is rounded no worse."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=512, num_hidden_layers=3,
        num_attention_heads=8, num_key_value_heads=4, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    settings = {"tokenizer": tokenizer, "kv_format": "native", "max_num_seqs": 4}
    with LLM(tmp_path, dtype="float32", **settings) as llm:
        exact = log_probs_of(llm, prompts)
    with LLM(tmp_path, dtype="bfloat16", **settings) as llm:
        alone = (log_probs_of(llm, prompts) - exact).norm() / exact.norm()
    four = make(tmp_path, tensor_parallel_size=4, num_threads=1, **settings | {"dtype": "bfloat16"})
    assert len(four.engine.runner.group.process_ids) == 3
    together = (log_probs_of(four, prompts) - exact).norm() / exact.norm()
    assert 1e-5 < together < 1.5 * alone


def test_tasks_share_an_engine_of_two_processes(make: Make, prompts: list[list[int]]) -> None:
    llm = make(kv_format="int8", calibration=None, max_num_seqs=3)
    expected = tokens_of(llm, prompts)

    async def main() -> list[list[int]]:
        async with AsyncLLM(llm) as engine:
            left = asyncio.create_task(engine.generate(prompts[0], GREEDY))
            answers = [engine.generate(prompt, GREEDY) for prompt in prompts]
            await asyncio.sleep(0)
            left.cancel()
            return [answer.token_ids for answer in await asyncio.gather(*answers)]

    assert [[tokens] for tokens in asyncio.run(main())] == expected


def test_a_calibration_is_joined_from_the_heads_of_all(
    make: Make, prompts: list[list[int]]
) -> None:
    attached = PagedModel(load_model(DEMO_MODEL, torch.float32))
    expected = calibrate(attached, prompts[-1])
    attached.close()
    llm = make(kv_format="int2", calibration=None)
    group = llm.engine.runner.group
    found = group.calibrate(llm.engine.model, prompts[-1])
    found.require_fingerprint(expected.model_fingerprint)
    for its, own in zip(expected.layers, found.layers, strict=True):
        assert its.channel_order.shape == own.channel_order.shape
        differ = (its.channel_order != own.channel_order).mean()
        assert differ < 0.05  # where two channels matter equally
    widths = [layer.num_kv_heads for layer in llm.engine.cache.layers]
    assert widths == [1] * 5


def test_sequences_of_one_part_do_not_travel(make: Make, prompts: list[list[int]]) -> None:
    engine = make(kv_format="int8").engine
    seq_id = engine.manager.add_sequence(prompts[0])
    with pytest.raises(TransferError, match="2 processes"):
        export_sequence(engine.cache, engine.manager, seq_id)
    engine.manager.remove_sequence(seq_id)


# -- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"tensor_parallel_size": 3}, ConfigError, "4 heads, got 3"),
        ({"tensor_parallel_size": 4}, ConfigError, "2 kv heads, got 4"),
        ({"tensor_parallel_size": 0}, ConfigError, "tensor_parallel_size"),
        ({"device": "meta"}, ConfigError, "for CPUs"),
        ({"gguf_file": "model.gguf"}, ConfigError, "GGUF"),
        ({"block_store": "somewhere"}, ConfigError, "block_store"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_started(
    settings: dict[str, Any], error: type[Exception], says: str, make: Make, pool: WorkerPool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(WorkerProcess, "start", lambda *_: pytest.fail("a process was started"))
    with pytest.raises(error, match=says):
        make(**settings)


def test_loaded_models_and_plans_that_share_no_heads_are_refused(
    make: Make, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WorkerProcess, "start", lambda *_: pytest.fail("a process was started"))
    with pytest.raises(ConfigError, match="loaded LlamaForCausalLM"):
        LLM(zoo.model("llama"), tensor_parallel_size=2, tokenizer=tokenizer)
    for name, says in (
        ("phi3", "'colwise_gather_output'"),
        ("gpt-oss", "no plan"),
    ):
        zoo.model(name).save_pretrained(tmp_path / name)
        with pytest.raises(UnsupportedModelError, match=says):
            make(tmp_path / name, tokenizer=tokenizer)


def test_two_groups_in_a_process_are_refused(make: Make) -> None:
    make(kv_format="native")
    with pytest.raises(ConfigError, match="there can be one"):
        make(kv_format="native")


def test_an_interrupt_waits_until_all_have_done_the_step(
    make: Make, prompts: list[list[int]]
) -> None:
    llm = make(kv_format="int8", calibration=None)
    expected = tokens_of(llm, prompts[:2])
    layer = llm.engine.model.model.model.layers[2]
    hook = layer.register_forward_hook(lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        tokens_of(llm, prompts[:2])
    hook.remove()
    assert not llm.engine.has_unfinished
    assert tokens_of(llm, prompts[:2]) == expected


def test_a_worker_that_raises_ends_the_requests_and_says_why(
    make: Make, prompts: list[list[int]]
) -> None:
    llm = make(kv_format="int8", calibration=None)
    group = llm.engine.runner.group
    plan: Any = None
    with group.together(RunStep(plan, plan, plan)):
        pass  # rank 0 has nothing to do with it
    with pytest.raises(StepFailedError, match=r"rank 1 \(process \d+\) failed: AttributeError"):
        tokens_of(llm, prompts[:1])
    with pytest.raises(StepFailedError, match="close this LLM"):
        tokens_of(llm, prompts[:1])


def test_a_worker_that_is_killed_ends_the_requests_and_is_named(
    make: Make, prompts: list[list[int]]
) -> None:
    llm = make(kv_format="int8", calibration=None)
    [process_id] = llm.engine.runner.group.process_ids
    layer = llm.engine.model.model.model.layers[2]
    layer.register_forward_hook(lambda *_: os.kill(process_id, signal.SIGKILL))
    events = list(llm.stream(prompts[:2], GREEDY, keep_going=True))
    errors = [event.error for event in events if event.error is not None]
    assert len(errors) == 2
    for error in errors:
        assert isinstance(error, StepFailedError)
        assert f"rank 1 (process {process_id}) ended with signal 9" in str(error)
    with pytest.raises((StepFailedError, GenerationError), match="signal 9"):
        tokens_of(llm, prompts[:1])
    assert not llm.engine.has_unfinished


@pytest.mark.parametrize("is_idle", [True, False])
def test_a_server_whose_worker_died_says_that_it_must_be_started_anew(
    is_idle: bool, make: Make, prompts: list[list[int]]
) -> None:
    llm = make(kv_format="int8", calibration=None)
    [process_id] = llm.engine.runner.group.process_ids

    async def main() -> None:
        async with AsyncLLM(llm) as engine:
            app = create_app(engine, ServerSettings(model_name="m"))
            async with httpx.AsyncClient(
                transport=httpx.ASGITransport(app=app), base_url="http://here"
            ) as client:
                assert (await client.get("/health")).status_code == 200
                os.kill(process_id, signal.SIGKILL)
                if is_idle:
                    while engine.is_accepting:
                        await asyncio.sleep(0.01)
                else:
                    with pytest.raises((GenerationError, ClosedError)):
                        await engine.generate(prompts[0], GREEDY)
                with pytest.raises(ClosedError, match=f"process {process_id}.*signal 9"):
                    await engine.generate(prompts[0], GREEDY)
                for path in ("/health", "/ready"):
                    answer = await client.get(path)
                    assert answer.status_code == 503
                    assert "signal 9" in answer.json()["error"]["message"]

    asyncio.run(main())


def test_closing_leaves_no_process(prompts: list[list[int]]) -> None:
    before = torch.get_num_threads()
    with LLM(DEMO_MODEL, kv_format="native", tensor_parallel_size=2, num_threads=1) as llm:
        [process_id] = llm.engine.runner.group.process_ids
        os.kill(process_id, 0)  # it is there
        assert len(tokens_of(llm, prompts[:1])[0][0]) == GREEDY.max_tokens
    with pytest.raises(ProcessLookupError):
        os.kill(process_id, 0)
    assert torch.get_num_threads() == before
    assert not torch.distributed.is_initialized()
