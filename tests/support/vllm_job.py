"""One engine in a process of its own: vLLM walks the modules that are loaded when an engine is made
and trips over llvmlite's, which our kernels have loaded by then.

    python -m tests.support.vllm_job '{"engine": "vllm", "rounds": 2, "prompts": [[5, 6]], ...}'

prints, as its last line, the tokens of each round and the pages that nobody holds at the end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import paged_kv

ROOT = Path(__file__).parents[2]
MODEL = str(Path(paged_kv.__file__).parent / "demo_model")
NUM_NEW = 64
MEMORY = 64 << 20


def run(engine: str, prompts: list[list[int]], rounds: int = 1, **options: Any) -> dict[str, Any]:
    """Run a job and read what it says."""
    job = json.dumps({"engine": engine, "prompts": prompts, "rounds": rounds, "options": options})
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.support.vllm_job", job]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def vllm_rounds(prompts: list[list[int]], rounds: int, options: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    if "additional_config" in options:
        options["attention_backend"] = "CUSTOM"
    settings = {
        "dtype": "float32",
        "max_model_len": 1024,
        "kv_cache_memory_bytes": MEMORY,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "max_num_batched_tokens": 4096,
        **options,
    }
    llm = LLM(MODEL, **settings)
    params = SamplingParams(temperature=0, max_tokens=NUM_NEW, ignore_eos=True)
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = [llm.generate(given, params, use_tqdm=False) for _ in range(rounds)]
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    return {
        "rounds": [[list(one.outputs[0].token_ids) for one in some] for some in outputs],
        "lost": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
        "num_hit_tokens": sum(one.num_cached_tokens or 0 for one in outputs[-1]),
    }


def own_rounds(prompts: list[list[int]], rounds: int, options: dict[str, Any]) -> dict[str, Any]:
    import torch

    settings = {"token_budget": 4096, "prefix_caching": False, **options}
    llm = paged_kv.LLM(
        MODEL, calibration=None, dtype=torch.float32, max_model_len=1024, kv_memory=MEMORY,
        **settings,
    )  # fmt: skip
    params = paged_kv.SamplingParams(temperature=0.0, max_tokens=NUM_NEW, ignore_eos=True)
    outputs = [llm.generate(prompts, params) for _ in range(rounds)]
    return {"rounds": [[list(one.completions[0].token_ids) for one in some] for some in outputs]}


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    run_engine = vllm_rounds if asked["engine"] == "vllm" else own_rounds
    print("\n" + json.dumps(run_engine(asked["prompts"], asked["rounds"], asked["options"])))
