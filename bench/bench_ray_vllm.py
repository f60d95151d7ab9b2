"""vLLM with our plugin under Ray Serve LLM: what it answers, split over workers or not.

    python bench/bench_ray_vllm.py --model FOLDER --json FILE

Needs the environment that `make test-ray` makes, and no network; it has a cluster of Ray of its
own, on this machine. An application for each format and tensor parallel size, one after another,
asked over HTTP for greedy completions of exact lengths, all at once. Reports how many answers
differ from those of one worker (greedy and in float32: none should), what the log says a token and
layer takes, seconds until the application answers, and tokens a second.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from report import Row, add_arguments, write_report

ROOT = Path(__file__).resolve().parent.parent
DEMO_MODEL = ROOT / "paged_kv" / "demo_model"
TEXT = ROOT / "paged_kv" / "models" / "calibration.txt"
PORT = 18123
FORMATS = ("native", "int8", "int2")
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
}


def application(model: str, kv_format: str, num_workers: int) -> Any:
    from ray.serve.llm import LLMConfig, build_openai_app

    config = LLMConfig(
        model_loading_config={"model_id": "model", "model_source": model},
        placement_group_config={"bundle_per_worker": {"CPU": 1}},
        engine_kwargs={
            "attention_backend": "CUSTOM",
            "additional_config": {"paged_kv": {"format": kv_format}},
            "tensor_parallel_size": num_workers,
            "dtype": "float32",
            "max_model_len": 1024,
            "kv_cache_memory_bytes": 256 << 20,
            "enforce_eager": True,
        },
        deployment_config={"num_replicas": 1},
        log_engine_metrics=False,
    )
    one = {"num_replicas": 1, "autoscaling_config": None, "ray_actor_options": {"num_cpus": 0}}
    return build_openai_app({"llm_configs": [config], "ingress_deployment_config": one})


def prompts(count: int) -> list[str]:
    """Stretches of a text that begin at different places, of 40 to 400 words."""
    words = TEXT.read_text().split()
    step = len(words) // (2 * count)
    return [" ".join(words[n * step :][: 40 + 360 * n // count]) for n in range(count)]


def complete(prompt: str, num_tokens: int) -> str:
    body = {"model": "model", "prompt": prompt, "max_tokens": num_tokens}
    body |= {"temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        text: str = json.loads(answer.read())["choices"][0]["text"]
        return text


def bytes_said(logs: Path, kv_format: str) -> float:
    """Of a token and layer in all workers' heads, by vLLM's log; the newest."""
    said = re.compile(rf"paged_kv: format {kv_format}, ([\d.]+) bytes a token and layer")
    newest = sorted(logs.glob("worker-*"), key=lambda path: path.stat().st_mtime)
    found = [one for path in newest for one in said.findall(path.read_text(errors="replace"))]
    return float(found[-1])


def measure(arguments: argparse.Namespace) -> None:
    import ray
    from ray import serve

    count, num_tokens = (4, 16) if arguments.quick else (32, 64)
    rows: list[Row] = []
    ray.init("local", num_cpus=4, object_store_memory=200 << 20, include_dashboard=False)
    logs = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs"
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        for kv_format in arguments.formats:
            first: list[str] = []
            for num_workers in (1, 2):
                case = f"{kv_format}, tensor parallel {num_workers}"
                began = time.perf_counter()
                serve.run(application(arguments.model, kv_format, num_workers), name="llm")
                complete("Once", 1)
                started = time.perf_counter()
                with ThreadPoolExecutor(count) as pool:
                    asked = prompts(count)
                    texts = list(pool.map(complete, asked, [num_tokens] * count))
                seconds = time.perf_counter() - started
                first = first or texts
                differ = sum(one != other for one, other in zip(texts, first, strict=True))
                rows += [
                    Row(case=case, metric="answers", value=len(texts), unit="requests"),
                    Row(case=case, metric="other than one worker's", value=differ, unit="requests"),
                    Row(case=case, metric="start-up", value=started - began, unit="s"),
                    Row(
                        case=case,
                        metric="throughput",
                        value=count * num_tokens / seconds,
                        unit="tokens/s",
                    ),
                    Row(
                        case=case,
                        metric="a token and layer of a worker",
                        value=bytes_said(logs, kv_format),
                        unit="bytes",
                    ),
                ]
                write_report("ray_vllm", rows, arguments.json)  # a start takes minutes
                serve.delete("llm")
    finally:
        serve.shutdown()
        ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(DEMO_MODEL))
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS)
    add_arguments(parser)
    arguments = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    measure(arguments)


if __name__ == "__main__":
    main()
