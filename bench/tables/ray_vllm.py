"""vLLM with the plugin under Ray Serve LLM: the report of bench_ray_vllm."""

from __future__ import annotations

from tables.report import Reports, table


def workers(reports: Reports) -> str:
    report = reports["ray_vllm"]
    lines = []
    for case in dict.fromkeys(row["case"] for row in report.rows):
        kv_format, num_workers = case.split(", tensor parallel ")
        answers, others = (
            report.value(case, metric) for metric in ("answers", "other than one worker's")
        )
        lines.append(
            (
                f"`{kv_format}`, {num_workers} worker{'s' * (num_workers != '1')}",
                f"{report.value(case, 'a token and layer of a worker'):g}",
                f"{answers - others:.0f} of {answers:.0f}" if num_workers != "1" else "",
            )
        )
    heads = ("", "bytes a token and layer of a worker, as its log says", "one worker's answers")
    return table(heads, lines)
