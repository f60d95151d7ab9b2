"""What crosses between host and device in a step of the engine: one copy there, one back.

There is no device here: the model, its blocks and all arithmetic are on "meta", which computes
shapes alone, and `TransferCounter` counts what crosses and hands back zeros.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from paged_kv import BeamSearchParams, SamplingParams, Scheduler
from paged_kv.cache.formats import INT8, NATIVE, KVFormat
from paged_kv.cache.kv_cache import PagedKVCache
from paged_kv.engine.engine import Engine
from paged_kv.engine.model_runner import ModelRunner
from paged_kv.kernels.block_views import LayerBlocks
from paged_kv.kernels.new_tokens import NewTokens
from paged_kv.kernels.rules import ScoreRules
from paged_kv.kernels.step_inputs import KernelPlan, StepInputs
from paged_kv.models.huggingface import PagedModel
from tests.support import zoo
from tests.support.transfers import TransferCounter


@dataclass
class OnlyShapes:
    """A kernel plan, and a backend whose kernels compute nothing."""

    name: str = "shapes"
    step: StepInputs | None = None

    def warm_up(self, layers: Sequence[LayerBlocks]) -> None: ...

    def plan(self, step: StepInputs) -> OnlyShapes:
        return OnlyShapes(step=step)

    def attend_and_store(
        self, new: NewTokens, layer: LayerBlocks, plan: KernelPlan, rules: ScoreRules
    ) -> Tensor:
        return new.query.new_empty(*new.query.shape[:2], new.value.shape[-1])


def make_engine(kv_format: KVFormat) -> Engine:
    model = PagedModel(copy.deepcopy(zoo.model("llama")).to("meta"))
    cache = PagedKVCache(
        model.layers(kv_format),
        num_blocks=64,
        dtype=torch.float32,
        device=model.device,
        backend="torch",
    )
    cache.backend = OnlyShapes()
    manager = cache.new_manager(max_num_seqs=8, max_model_len=512, prefix_caching=True)
    return Engine(ModelRunner(model, cache), Scheduler(manager, token_budget=200), ())


REQUESTS = {
    "greedy": [SamplingParams(max_tokens=5)] * 3,
    "sampled": [
        SamplingParams(max_tokens=5, temperature=0.7, seed=1),
        SamplingParams(max_tokens=5, temperature=1.0, top_p=0.9, top_k=5, seed=2),
        SamplingParams(max_tokens=5),
    ],
    "several samples": [
        SamplingParams(max_tokens=5, temperature=1.0, n=3, seed=3),
        SamplingParams(max_tokens=5, temperature=1.0, best_of=2, seed=3, min_tokens=2),
    ],
}


@pytest.mark.parametrize("kv_format", [NATIVE, INT8], ids=lambda f: f.name)
@pytest.mark.parametrize("kind", REQUESTS)
def test_a_step_is_one_copy_there_and_one_back(kind: str, kv_format: KVFormat) -> None:
    engine = make_engine(kv_format)
    for number, params in enumerate(REQUESTS[kind]):
        request_ids = [f"{number}-{sample}" for sample in range(params.num_samples)]
        engine.add_request(request_ids, [1 + number] * (150 * number + 20), params)
    check_steps(engine)


def test_a_step_of_beams_is_one_copy_there_and_one_back() -> None:
    engine = make_engine(NATIVE)
    engine.add_search("beams", [3] * 20, BeamSearchParams(num_beams=3, max_tokens=4))
    engine.add_request("beside", [4] * 10, SamplingParams(max_tokens=6))
    check_steps(engine)


def check_steps(engine: Engine) -> None:
    num_steps = 0
    while engine.has_unfinished:
        with TransferCounter() as counter:
            engine.step()
        assert counter.to_device == ["aten._to_copy.default"], num_steps
        assert len(counter.to_host) <= 1  # none where nobody samples
        num_steps += 1
    assert num_steps > 4
