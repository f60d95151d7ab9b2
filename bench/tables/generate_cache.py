"""`PagedCache` beside the caches of transformers: the report of bench_generate_cache."""

from __future__ import annotations

from tables.report import Report, Reports, brief, table

CACHES = (
    "DynamicCache",
    "QuantizedCache quanto 4 bits",
    "QuantizedCache quanto 2 bits",
    "QuantizedCache hqq 4 bits",
    "QuantizedCache hqq 2 bits",
    "PagedCache native, fused",
    "PagedCache int8, fused",
    "PagedCache int4, fused",
    "PagedCache int2, fused",
    "PagedCache int4, gather",
    "PagedCache int2, gather",
)
HELD, SPEED, DIVERGENCE = "K/V of a sequence, mean", "decoding", "KL from DynamicCache"
REFERENCE = "DynamicCache"


def cells(report: Report, batch: int, cache: str) -> list[str]:
    case = f"batch {batch}, 512 + 128 tokens, {cache}"
    held = f"{report.value(case, HELD):.2f}"
    if cache == REFERENCE:
        return [held, f"{report.value(case, SPEED):.1f}", ""]
    divergence = report.value(case, DIVERGENCE)
    written = "0" if abs(divergence) < 1e-4 else brief(divergence)
    return [held, f"{report.value(case, SPEED):.1f}", written]


def caches(reports: Reports) -> str:
    report = reports["generate_cache"]
    lines = [
        (cache, *(cell for batch in (8, 32) for cell in cells(report, batch, cache)))
        for cache in CACHES
    ]
    names = ("MiB", "tokens/s", "mnat")
    head = ("Cache", *(f"batch {batch}: {name}" for batch in (8, 32) for name in names))
    return table(head, lines)
