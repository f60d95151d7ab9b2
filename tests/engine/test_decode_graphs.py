"""Decode steps on a pretended GPU: captured and replayed, and what passes between it and the host.

Held to the same requests on the CPU's kernels. The model is as small as models get, because its
attention is interpreted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
import transformers
import triton

from paged_kv import LLM, SamplingParams, SinkWindow
from paged_kv.engine.decode_graphs import DecodeGraphs, rounded_up
from tests.support.adapters import lora, scatter
from tests.support.pretend_gpu import PretendGpu, move_to_gpu, pretend_gpu

pytestmark = [
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1"),
    # What NumPy says of the interpreter's own scalars and of infinities that kernels mean.
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
WINDOW = SinkWindow(num_sink_tokens=4, window_size=64)


@pytest.fixture
def gpu() -> Iterator[PretendGpu]:
    with pretend_gpu() as gpu:
        yield gpu


def tiny_model(**options: Any) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "initializer_range": 0.5,
        "eos_token_id": None,
        "bos_token_id": 0,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **options}))


def llm_of(model: transformers.LlamaForCausalLM, **options: Any) -> LLM:
    usual = {"kv_format": "native", "num_blocks": 200, "max_num_seqs": 3, "max_model_len": 512}
    return LLM(model, kv_dtype=torch.float32, dtype=torch.float32, **{**usual, **options})


def on_gpu(**options: Any) -> LLM:
    model = tiny_model()
    move_to_gpu(model)
    return llm_of(model, **options)


def prompts_of(*lengths: int) -> list[list[int]]:
    return [[*range(1, 1 + min(length, 40)), *range(length - 40)] for length in lengths]


def greedy(*counts: int) -> list[SamplingParams]:
    return [SamplingParams(max_tokens=count, ignore_eos=True) for count in counts]


def tokens_of(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> list[list[int]]:
    return [output.token_ids for output in llm.generate(prompts, params)]


def graphs_of(llm: LLM) -> DecodeGraphs:
    graphs = llm.engine.runner.graphs
    assert graphs is not None
    return graphs


def replays_of(llm: LLM) -> dict[tuple[int, bool], int]:
    """By rows and whether they seal, how often each graph was replayed."""
    entries = graphs_of(llm)._entries.items()
    graphs = {kind: entry.graph for kind, entry in entries if entry.graph is not None}
    return {(kind.num_rows, kind.seals): graph.num_replays for kind, graph in graphs.items()}


def test_tokens_are_those_of_the_cpu(gpu: PretendGpu) -> None:
    """Three sequences, each of which seals a block, and a fourth that comes later."""
    prompts, params = prompts_of(76, 74, 73, 20), greedy(9, 9, 9, 4)
    with llm_of(tiny_model(), kv_format="int8") as llm:
        expected = tokens_of(llm, prompts, params)
    with on_gpu(kv_format="int8") as llm:
        assert tokens_of(llm, prompts, params) == expected
        replays = replays_of(llm)
    assert replays[3, True] >= 1
    assert replays[3, False] >= 2


def test_windowed_sequences_are_captured(gpu: PretendGpu) -> None:
    prompts, params = prompts_of(72, 11), greedy(8, 8)
    options = {"sink_window": WINDOW, "num_blocks": 60}
    with llm_of(tiny_model(), **options) as llm:
        expected = tokens_of(llm, prompts, params)
    with on_gpu(**options) as llm:
        assert tokens_of(llm, prompts, params) == expected
        assert replays_of(llm)[2, False] >= 4


RANDOM = {"temperature": 0.9, "seed": 5, "ignore_eos": True, "max_tokens": 9}
DRAWN = [
    SamplingParams(max_tokens=9, ignore_eos=True),
    SamplingParams(n=2, **RANDOM),
    SamplingParams(top_k=5, top_p=0.9, **RANDOM),
]


@pytest.mark.parametrize("enforce_eager", [False, True], ids=["graphs", "eager"])
def test_a_decode_step_is_one_copy_there_and_one_back(enforce_eager: bool, gpu: PretendGpu) -> None:
    """Whatever is drawn, and whether the step is captured, replayed or neither."""
    with on_gpu(max_num_seqs=4, enforce_eager=enforce_eager) as llm:
        engine, passed = llm.engine, []
        for number, params in enumerate(DRAWN):
            names = [f"{number}-{sample}" for sample in range(params.num_samples)]
            engine.add_request(names, [3, 1, 4, 1, 5, number], params)
        engine.step()  # the prompts
        engine.step()  # the first of its kind
        while engine.has_unfinished:
            with gpu.watching() as traffic:
                engine.step()
            passed.append((traffic.to_device, traffic.to_host, traffic.waits))
    assert len(passed) == 7
    assert all(each == (1, 1, []) for each in passed)
    assert len(gpu.graphs) == (0 if enforce_eager else 1)


def looks_at(module: torch.nn.Module, args: object, output: torch.Tensor) -> None:
    """What a model's own code may do, and what no graph can hold."""
    assert output.isfinite().all()


def test_a_model_that_cannot_be_captured_runs_on(gpu: PretendGpu) -> None:
    model = tiny_model()
    expected = []
    with llm_of(model) as llm:
        expected = tokens_of(llm, prompts_of(5), greedy(6))
    move_to_gpu(model)
    model.lm_head.register_forward_hook(
        lambda module, args, output: output * float(output.mean() < 9)
    )
    with llm_of(model) as llm:
        with pytest.warns(RuntimeWarning, match="LlamaForCausalLM cannot be captured.*capturing"):
            assert tokens_of(llm, prompts_of(5), greedy(6)) == expected
        assert not graphs_of(llm).is_enabled
        assert llm.engine.cache._tables[0]._changed is None
        assert tokens_of(llm, prompts_of(5), greedy(6)) == expected


def test_graphs_hold_the_adapter_that_was_active_and_serve_no_other(gpu: PretendGpu) -> None:
    def adapted() -> Any:
        model = peft.get_peft_model(tiny_model(), lora(["q_proj", "down_proj"]), "cat")
        model.add_adapter("dog", lora(["o_proj"], r=2))
        scatter(model)
        return model.eval()

    prompts, params = prompts_of(9), {}
    for name in ("__base__", "cat", "dog"):
        params[name] = [SamplingParams(max_tokens=5, ignore_eos=True, adapter=name)]
    with llm_of(adapted()) as llm:
        expected = {name: tokens_of(llm, prompts, one) for name, one in params.items()}
    assert len({str(tokens) for tokens in expected.values()}) == 3
    model, replays = adapted(), []
    move_to_gpu(model)
    with llm_of(model) as llm:
        for active, name in (("cat", "__base__"), ("cat", "cat"), ("dog", "dog")):
            model.set_adapter(active)
            assert tokens_of(llm, prompts, params[name]) == expected[name]
            replays.append(sum(replays_of(llm).values()))
    assert replays[0] == 0 < replays[1] == replays[2]


def test_an_interrupted_step_is_computed_again(gpu: PretendGpu) -> None:
    """While it is captured, when it is replayed, and before changed tables have arrived."""
    with llm_of(tiny_model()) as llm:
        expected = tokens_of(llm, prompts_of(14), greedy(9))
    interrupts = iter([False, True, False, False, True, False, True])
    with on_gpu() as llm:
        graphs = graphs_of(llm)
        run = graphs._compute

        def interrupted(*args: Any) -> Any:
            result = run(*args)
            if next(interrupts, False):
                raise KeyboardInterrupt
            return result

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(graphs, "_compute", interrupted)
            params = greedy(9)[0]
            llm.engine.add_request("one", prompts_of(14)[0], params)
            tokens: list[int] = []
            while llm.engine.has_unfinished:
                try:
                    updates = llm.engine.step()
                except KeyboardInterrupt:
                    continue
                tokens += [update.token_id for update in updates]
        assert tokens == expected[0]


def test_the_next_step_begins_before_the_host_waits(gpu: PretendGpu) -> None:
    """Steps whose tokens are read late end at the same tokens, and their blocks are found again."""
    prompt = prompts_of(14)
    with llm_of(tiny_model()) as llm:
        tokens = tokens_of(llm, prompt, greedy(24))
        params = [SamplingParams(max_tokens=24, stop_token_ids=[tokens[0][17]])]
        expected = tokens_of(llm, prompt, params)
    with on_gpu() as llm:
        assert tokens_of(llm, prompt, params) == expected
        waits = [name for name in gpu.log if name.startswith("waited")]
        for number in range(3, len(waits) - 1):
            launched, waited = f"launched {number + 1}", f"waited {number}"
            assert gpu.log.index(launched) < gpu.log.index(waited)
        before = llm.statistics().num_hit_tokens
        tokens_of(llm, [prompt[0] + expected[0]], greedy(1))
        assert llm.statistics().num_hit_tokens - before == 16


def test_few_rows_stay_empty() -> None:
    sizes = [rounded_up(count, 300) for count in range(1, 301)]
    assert sizes == sorted(sizes)
    assert sizes[:9] == [1, 2, 4, 4, 8, 8, 8, 8, 16]
    assert len(set(sizes)) == 20
    assert all(count <= size <= max(count * 1.25, count + 7) for count, size in enumerate(sizes, 1))
    assert rounded_up(5, 6) == 6
    assert rounded_up(3, 3) == 3
