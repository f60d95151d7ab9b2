"""vLLM's own KVCacheManager and Scheduler, driven without vLLM's compiled parts, for timing.

    unzip -q vllm-0.33.0-*.whl '*.py' '*/METADATA' -d site   # python only, 57 MB, no .so
    pip install --no-deps --target extra aiohappyeyeballs aiohttp aiosignal attrs cachetools cbor2 \
        charset_normalizer cloudpickle einops frozenlist msgspec multidict pillow \
        prometheus_client propcache psutil py-cpuinfo pybase64 pyzmq requests urllib3 uvloop yarl
    PYTHONPATH=site:extra python bench/vllm_manager.py

It knows vLLM 0.33's scheduling interface: which calls make up a decode step, an admission, a
preemption. It knows nothing of paged_kv, runs no model and compares nothing. What it drives is
vLLM's unmodified python under vLLM's defaults: prefix caching on, first come first served, no KV
events; one full-attention group unless others are asked for, no LoRA, connector or speculation. Two
defaults of a GPU server differ: stats are off, as in `LLM(...)`, and so is async scheduling, whose
subclass of Scheduler only adds to the same step. vLLM asks for torch 2.14; the measured code never
calls torch. Its 0.32 serves as well, but for the Scheduler, which there wants Triton.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

BLOCK_SIZE = 16
VOCAB_SIZE = 32_000

# Read while vLLM is imported and a Scheduler made. The platform keeps it from looking for a GPU;
# model runner v2, a GPU server's default, decides which lists a step builds (both cost the same).
ENVIRONMENT = {
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "VLLM_NO_USAGE_STATS": "1",
}

# Modules of vLLM that need heavy packages, with the names that others import from them. They serve
# tool calls and grammars: the measured code asks `request.use_structured_output`, False here, and
# goes no further. They are stubbed only where one of those packages is missing.
STUBBED_FOR = ("openai", "openai_harmony", "xgrammar", "llguidance")
STUBS = {
    "vllm.entrypoints.mcp.tool_server": "ToolServer",  # an annotation in ReasoningParser
    "vllm.parser": "",
    "vllm.parser.engine": "",
    "vllm.parser.engine.adapters": "ParserEngineReasoningAdapter",  # an isinstance of reasoners
    "vllm.v1.structured_output.backend_guidance": "GuidanceBackend",  # both are made for the first
    "vllm.v1.structured_output.backend_xgrammar": "XgrammarBackend",  # request with a grammar
}

NAMES = {
    "vllm": "__version__",
    "vllm.config": "CacheConfig DeviceConfig ModelConfig SchedulerConfig VllmConfig",
    "vllm.model_executor.models.llama": "LlamaForCausalLM",
    "vllm.model_executor.models.registry": "ModelRegistry",
    "vllm.sampling_params": "SamplingParams",
    "vllm.utils.hashing": "get_hash_fn_by_name",
    "vllm.v1.core.kv_cache_manager": "KVCacheManager",
    "vllm.v1.core.kv_cache_utils": "get_request_block_hasher init_none_hash",
    "vllm.v1.core.sched.scheduler": "Scheduler",
    "vllm.v1.kv_cache_interface": (
        "FullAttentionSpec KVCacheConfig KVCacheGroupSpec SlidingWindowSpec"
    ),
    "vllm.v1.outputs": "ModelRunnerOutput",
    "vllm.v1.request": "Request RequestStatus",
    "vllm.v1.structured_output": "StructuredOutputManager",
}


@contextmanager
def _environment() -> Iterator[None]:
    """vLLM's settings, for as long as it needs them; undoes what it sets itself (LD_PRELOAD)."""
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@cache
def _load() -> tuple[Any, str]:
    """vLLM's names, or None and the reason why there are none."""
    if find_spec("vllm") is None:
        return None, "no vllm on PYTHONPATH"
    if not all(find_spec(name) for name in STUBBED_FOR):
        for name, class_name in STUBS.items():
            stub = ModuleType(name)
            stub.__path__ = []
            if class_name:
                setattr(stub, class_name, type(class_name, (), {}))
            sys.modules.setdefault(name, stub)
    logging.getLogger("vllm").setLevel(logging.ERROR)  # it misses vllm._C and Triton, loudly
    found: dict[str, Any] = {}
    try:
        with _environment():
            for module_name, wanted in NAMES.items():
                module = importlib.import_module(module_name)
                found.update({name: getattr(module, name) for name in wanted.split()})
            # Registered as a class it is inspected here, not in a subprocess without the stubs.
            found["ModelRegistry"].register_model("LlamaForCausalLM", found["LlamaForCausalLM"])
    except Exception as error:  # whatever a foreign import raises: it is not available
        return None, f"{type(error).__name__}: {error}"
    return SimpleNamespace(**found), ""


def is_available() -> bool:
    """Whether vLLM can be imported; the first call imports it, which takes seconds."""
    return _load()[0] is not None


def takes_part(*, is_asked: bool) -> bool:
    """Whether a benchmark measures vLLM too; says why where it does not."""
    if is_asked and is_available():
        return True
    print(f"without vLLM: {why_not() or 'left out as asked'}")
    return False


def why_not() -> str:
    """Why `is_available()` is False; empty when it is True."""
    return _load()[1]


def _vllm() -> Any:
    found, reason = _load()
    if found is None:
        raise ImportError(f"vLLM is not available: {reason}")
    return found


def version() -> str:
    return str(_vllm().__version__)


def hash_algorithm() -> str:
    """What vLLM hashes blocks with unless told otherwise."""
    return str(_vllm().CacheConfig().prefix_caching_hash_algo)


class _Peer:
    """Makes requests with distinct ids, and tokens from one seeded generator."""

    def _prepare(self, block_size: int, max_model_len: int, enable_caching: bool, seed: int) -> Any:
        self.vllm = vllm = _vllm()
        self.rng = np.random.default_rng(seed)
        self.num_made = 0
        self.params = vllm.SamplingParams(max_tokens=max_model_len, ignore_eos=True)
        self.hasher: Any = None
        if enable_caching:  # as EngineCore.__init__ makes it
            hash_function = vllm.get_hash_fn_by_name(hash_algorithm())
            vllm.init_none_hash(hash_function)
            self.hasher = vllm.get_request_block_hasher(block_size, hash_function)
        return vllm

    def tokens(self, count: int) -> list[int]:
        return list(map(int, self.rng.integers(VOCAB_SIZE, size=count)))

    def make_request(self, token_ids: list[int]) -> Any:
        """A request and, with caching, the hash of every full block of its prompt."""
        self.num_made += 1
        arguments = str(self.num_made), token_ids, self.params, None
        return self.vllm.Request(*arguments, arrival_time=0.0, block_hasher=self.hasher)


def _kv_cache_config(
    num_blocks: int, block_size: int, windows: Sequence[int | None] = (None,)
) -> Any:
    """A group of layers for each window, None for full attention; vLLM keeps one block itself."""
    import torch

    vllm = _vllm()
    groups = []
    for index, window in enumerate(windows):
        shape = {"block_size": block_size, "num_kv_heads": 1, "head_size": 64}
        if window is None:
            spec = vllm.FullAttentionSpec(**shape, dtype=torch.bfloat16)
        else:
            spec = vllm.SlidingWindowSpec(**shape, dtype=torch.bfloat16, sliding_window=window)
        groups.append(vllm.KVCacheGroupSpec([f"model.layers.{index}.self_attn.attn"], spec))
    return vllm.KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=groups)


class ManagerPeer(_Peer):
    """A KVCacheManager whose `running` requests have a computed prompt and one sampled token.

    `running` is a plain list, which `admit` and `free` leave alone. `windows` are those of groups
    of layers, which vLLM's hybrid coordinator then serves. No step computes more than `chunk`
    tokens of a prompt.
    """

    def __init__(
        self,
        num_seqs: int,
        prompt_lens: list[int],
        *,
        windows: Sequence[int | None] = (None,),
        chunk: int | None = None,
        num_blocks: int,
        max_model_len: int,
        enable_caching: bool = True,
        seed: int,
    ) -> None:
        vllm = self._prepare(BLOCK_SIZE, max_model_len, enable_caching, seed)
        self.chunk = chunk or max_model_len
        limits = {} if chunk is None else {"max_in_flight_tokens": chunk}
        self.manager = vllm.KVCacheManager(
            kv_cache_config=_kv_cache_config(num_blocks, BLOCK_SIZE, windows),
            max_model_len=max_model_len,
            scheduler_block_size=BLOCK_SIZE,
            hash_block_size=BLOCK_SIZE,
            enable_caching=enable_caching,
            **limits,
        )
        self.running: list[Any] = []
        for _, length in zip(range(num_seqs), prompt_lens, strict=True):
            self.running.append(self.admit(self.tokens(length)))
            self.running[-1].append_output_token_ids(self.tokens(1))

    def allocate_step(self) -> None:
        """The manager calls of a `Scheduler.schedule()` in which every running request decodes."""
        manager = self.manager
        manager.new_step_starts()
        for request in self.running:
            if manager.allocate_slots(request, 1, num_lookahead_tokens=0) is None:
                raise RuntimeError("vLLM's pool is full: give it more blocks")
        manager.take_new_block_ids()

    def append_step(self, tokens: list[int] | None = None) -> None:
        """What the scheduler then does to the requests; hashes the blocks that are now full."""
        tokens = tokens or self.tokens(len(self.running))
        for request, token in zip(self.running, tokens, strict=True):
            request.num_computed_tokens += 1
            request.append_output_token_ids(token)

    def decode_step(self) -> None:
        self.allocate_step()
        self.append_step()

    def admit_request(self, request: Any) -> int:
        """The manager calls with which `Scheduler.schedule()` admits a prompt, and those of the
        steps that compute the rest of it. Returns how many tokens it found in the cache.
        """
        computed, num_computed, *_ = self.manager.get_computed_blocks(request)
        num_new = min(request.num_tokens - num_computed, self.chunk)
        allocated = self.manager.allocate_slots(
            request,
            num_new,
            num_new_computed_tokens=num_computed,
            new_computed_blocks=computed,
            full_sequence_must_fit=True,  # the default of scheduler_reserve_full_isl
        )
        request.status = self.vllm.RequestStatus.RUNNING
        request.num_computed_tokens = num_computed
        while True:
            if allocated is None:
                raise RuntimeError("vLLM's pool is full: give it more blocks")
            request.num_computed_tokens += num_new
            num_new = min(request.num_tokens - request.num_computed_tokens, self.chunk)
            if not num_new:
                return int(num_computed)
            self.manager.new_step_starts()
            allocated = self.manager.allocate_slots(request, num_new)

    def admit(self, token_ids: list[int]) -> Any:
        request = self.make_request(token_ids)
        self.admit_request(request)
        return request

    def free(self, request: Any) -> None:
        self.manager.free(request)

    def num_blocks_of(self, request: Any) -> int:
        """Of all groups; what stands for blocks that were let go is none."""
        groups = self.manager.get_blocks(request.request_id).blocks
        return sum(not block.is_null for blocks in groups for block in blocks)


class SchedulerPeer(_Peer):
    """The real v1 Scheduler, with a real VllmConfig, and `num_seqs` requests past their prefill.

    All are prefilled in one step while it is made, so each has one output token. `token_budget`
    holds from then on; it is at least `num_seqs` and also the most requests that may run.
    """

    def __init__(
        self,
        num_seqs: int,
        prompt_lens: list[int],
        *,
        block_size: int = BLOCK_SIZE,
        num_blocks: int,
        max_model_len: int,
        token_budget: int,
        enable_caching: bool = True,
        seed: int,
    ) -> None:
        vllm = self._prepare(block_size, max_model_len, enable_caching, seed)
        with _environment():
            config = _vllm_config(block_size, max_model_len, token_budget, enable_caching)
            config.cache_config.num_gpu_blocks = num_blocks
            self.scheduler = vllm.Scheduler(
                vllm_config=config,
                kv_cache_config=_kv_cache_config(num_blocks, block_size),
                structured_output_manager=vllm.StructuredOutputManager(config),
                block_size=block_size,
            )
        for _, length in zip(range(num_seqs), prompt_lens, strict=True):
            self.add(self.tokens(length))
        self._set_budget(sum(prompt_lens))
        self.update(self.schedule())
        self._set_budget(token_budget)
        if len(self.scheduler.running) != num_seqs:
            raise RuntimeError("not all requests run: give vLLM more blocks or a larger budget")

    def _set_budget(self, num_tokens: int) -> None:
        self.scheduler.max_num_scheduled_tokens = num_tokens
        self.scheduler.scheduler_config.max_num_batched_tokens = num_tokens

    def schedule(self) -> Any:
        """One step: allocates, may admit and preempt, and builds a SchedulerOutput."""
        return self.scheduler.schedule()

    def sample(self, output: Any) -> Any:
        """What a model runner would answer: a random token for each request past its prefill."""
        ids = list(output.num_scheduled_tokens)
        prefills = [self.scheduler.requests[request_id].is_prefill_chunk for request_id in ids]
        drawn = zip(self.tokens(len(ids)), prefills, strict=True)
        tokens = [[] if prefill else [token] for token, prefill in drawn]
        index_of = {request_id: index for index, request_id in enumerate(ids)}
        return self.vllm.ModelRunnerOutput(ids, index_of, tokens)

    def update(self, output: Any, sampled: Any = None) -> Any:
        """`update_from_output`; hand `sample(output)` in to keep sampling out of the time."""
        return self.scheduler.update_from_output(output, sampled or self.sample(output))

    def add(self, token_ids: list[int]) -> str:
        """Hash a prompt and queue it; a later `schedule()` admits it."""
        request = self.make_request(token_ids)
        self.scheduler.add_request(request)
        return str(request.request_id)

    def abort(self, request_id: str) -> None:
        """Not between a `schedule()` and its `update()`."""
        self.scheduler.finish_requests(request_id, self.vllm.RequestStatus.FINISHED_ABORTED)

    def preempt(self) -> str:
        """Preempt the newest running request, with the two lines `schedule()` has for it."""
        request = self.scheduler.running.pop()
        self.scheduler._preempt_request(request, time.monotonic())
        return str(request.request_id)


def _vllm_config(block_size: int, max_model_len: int, budget: int, enable_caching: bool) -> Any:
    """A real VllmConfig, for a Llama of two layers."""
    from transformers import LlamaConfig

    vllm = _vllm()
    llama = LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=1)
    llama.architectures = ["LlamaForCausalLM"]
    llama.max_position_embeddings = max_model_len
    with tempfile.TemporaryDirectory() as folder:
        llama.save_pretrained(folder)
        model = vllm.ModelConfig(folder, skip_tokenizer_init=True, max_model_len=max_model_len)
        cache_config = vllm.CacheConfig(block_size, enable_prefix_caching=enable_caching)
        limits = {"max_num_seqs": budget, "max_num_batched_tokens": budget}
        scheduler = vllm.SchedulerConfig(
            max_model_len, is_encoder_decoder=False, async_scheduling=False, **limits
        )
        return vllm.VllmConfig(
            model_config=model, cache_config=cache_config, scheduler_config=scheduler
        )


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Seconds that a call took, and what it returned."""
    start = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start, result


def measure(num_seqs: int, enable_caching: bool) -> str:
    """Medians; prompts of 1 to 1024 tokens, so that a 16th of the requests fills a block a step."""
    lens = np.random.default_rng(0).integers(1, 1025, size=num_seqs).tolist()
    shape: dict[str, Any] = {"max_model_len": 4096, "enable_caching": enable_caching, "seed": 1}
    shape["num_blocks"] = sum(length // 16 + 4 for length in lens) + 200
    manager = ManagerPeer(num_seqs, lens, **shape)
    allocate, admission, steps = [], [], []
    for _ in range(33):
        allocate.append(timed(manager.allocate_step)[0])
        manager.append_step()
    for _ in range(200):
        made, request = timed(manager.make_request, manager.tokens(1024))
        admitted, _ = timed(manager.admit_request, request)
        blocks = manager.num_blocks_of(request)
        admission.append((made, admitted, timed(manager.free, request)[0]))
    del manager
    scheduler = SchedulerPeer(num_seqs, lens, token_budget=8192, **shape)
    for _ in range(33):
        scheduled, output = timed(scheduler.schedule)
        updated, _ = timed(scheduler.update, output, scheduler.sample(output))
        steps.append((scheduled, scheduled + updated))
    schedule, both = 1e3 * np.median(steps, axis=0)
    make, admit, free = 1e6 * np.median(admission, axis=0)
    return (
        f"allocate_step {1e3 * np.median(allocate):.2f} ms, schedule {schedule:.2f} ms, "
        f"schedule+update {both:.2f} ms; 1024 tokens in {blocks} blocks: request+hash "
        f"{make:.0f} us, get_computed+allocate {admit:.0f} us, free {free:.0f} us"
    )


def main() -> None:
    if not is_available():
        sys.exit(f"vLLM cannot be imported: {why_not()}")
    for enable_caching in (True, False):
        print(f"vLLM {version()}, prefix caching: {hash_algorithm() if enable_caching else 'off'}")
        for num_seqs in (256, 1024, 4096):
            print(f"{num_seqs:6} requests: {measure(num_seqs, enable_caching)}")


if __name__ == "__main__":
    main()
