"""vLLM with our plugin under Ray Serve LLM: the report of bench_ray_vllm."""

from __future__ import annotations

from tables.report import Reports, table

FORMATS = ("int2",)
ROWS = {
    "answers": "answers",
    "other than one worker's": "other than one worker's",
    "bytes a token and layer, of each worker": "a token and layer of a worker",
}


def tensor_parallel(reports: Reports) -> str:
    report = reports["ray_vllm"]
    cases = [f"{name}, tensor parallel {workers}" for name in FORMATS for workers in (1, 2)]
    lines = [
        (label, *(f"{report.value(case, metric):.0f}" for case in cases))
        for label, metric in ROWS.items()
    ]
    return table(("", *cases), lines)
