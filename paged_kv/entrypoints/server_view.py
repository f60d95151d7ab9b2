"""What `paged-kv top` shows of a server. Knows figures by name, never where they are from."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ..units import format_memory

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

LATENCIES: Final = {
    "first token": "vllm:time_to_first_token_seconds",
    "next token": "vllm:inter_token_latency_seconds",
    "whole request": "vllm:e2e_request_latency_seconds",
}
BUCKET: Final = re.compile(r'(?m)^([\w:]+)_bucket\{(?:.*?,)?le="([^"]+)".*\} (\S+)')
# How blocks of a kind are drawn; those that are free come last.
KINDS: Final = {
    "head": ("█", "magenta"),
    "body": ("▓", "green"),
    "tail": ("▒", "yellow"),
    "cached": ("░", "cyan"),
    "free": ("·", "bright_black"),
}
Histogram = dict[float, float]  # observations up to a bound


class Reading(NamedTuple):
    """What a server has told, at a `time.monotonic`."""

    seconds: float
    figures: Mapping[str, Any]
    histograms: Mapping[str, Histogram]


def histograms_of(exposition: str) -> dict[str, Histogram]:
    """Histograms by name, in the text that Prometheus scrapes; those of all engines together."""
    found: defaultdict[str, Histogram] = defaultdict(lambda: defaultdict(float))
    for name, bound, count in BUCKET.findall(exposition):
        found[name][float(bound)] += float(count)
    return dict(found)


def quantile(histogram: Histogram, share: float) -> float | None:
    """The value that this share of the observations is below; None without observations.

    Within a bucket as if they were spread evenly; beyond the last bound that bound.
    """
    bounds = sorted(histogram)
    if not bounds or not histogram[bounds[-1]]:
        return None
    rank, low, below = share * histogram[bounds[-1]], 0.0, 0.0
    for bound in bounds:
        count = histogram[bound]
        if count >= rank:
            is_last = bound == float("inf")
            return low if is_last else low + (bound - low) * (rank - below) / (count - below)
        low, below = bound, count
    raise AssertionError


def difference(later: Histogram, earlier: Histogram) -> Histogram:
    return {bound: count - earlier.get(bound, 0.0) for bound, count in later.items()}


class ServerView:
    """The newest reading of a server, beside the one before it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.fault: str | None = None  # why there is no newer one
        self._last: Reading | None = None
        self._before: Reading | None = None

    def show(self, reading: Reading) -> None:
        """Take a new reading; one of a server that was started anew has none before it."""
        last = self._last
        is_new = last is not None and (
            reading.figures["uptime_seconds"] < last.figures["uptime_seconds"]
        )
        self._before, self._last = None if is_new else last, reading
        self.fault = None

    def frame(self, width: int) -> Table:
        from rich.table import Table
        from rich.text import Text

        frame = Table.grid(padding=(0, 2))
        if self.fault is not None:
            frame.add_row("", Text(f"{self.fault}; trying again", style="bold red"))
        if self._last is not None:
            for name, value in self._rows(self._last, max(width - 18, 10)):
                frame.add_row(Text(name, style="bold"), value)
        return frame

    def _rows(self, reading: Reading, width: int) -> Iterator[tuple[str, Text]]:
        from rich.text import Text

        figures = reading.figures
        requests, tokens, sizes = figures["requests"], figures["tokens"], figures["bytes"]
        ended = ", ".join(f"{count} {reason}" for reason, count in requests["ended"].items())
        up = f"up {duration(figures['uptime_seconds'])}"
        yield "server", Text(f"{figures['model']} in {figures['kv_format']} at {self.url}, {up}")
        yield (
            "requests",
            Text(
                f"{requests['running']} running, {requests['waiting']} waiting "
                f"({requests['swapped']} swapped); ended: {ended}"
            ),
        )
        yield (
            "tokens/s",
            Text(
                f"{tokens['generated_per_second']:.1f} generated, "
                f"{tokens['prompt_per_second']:.1f} of prompts"
            ),
        )
        yield "hit rate", Text(self._hit_rate(figures))
        for name, histogram in LATENCIES.items():
            yield name, Text(self._latency(reading, histogram))
        yield "blocks", self._bar(figures["blocks"], width)
        yield "", self._legend(figures["blocks"])
        yield (
            "memory",
            Text(
                f"{format_memory(sizes['used'])} used, {format_memory(sizes['wasted'])} wasted, "
                f"{format_memory(sizes['cached'])} cached, of {format_memory(sizes['total'])}"
            ),
        )
        drafts = figures["drafts"]
        yield (
            "steps",
            Text(
                f"{figures['steps']}, {figures['preemptions']} preemptions; "
                f"{drafts['accepted']} of {drafts['tried']} drafts accepted"
            ),
        )

    def _hit_rate(self, figures: Mapping[str, Any]) -> str:
        """Of prompts' tokens since the reading before, and of all."""
        now = figures["prefix_cache"]
        total = f"{now['hit_rate']:.1%} of all prompts' tokens"
        before = self._before.figures["prefix_cache"] if self._before else None
        if before is None or now["query_tokens"] == before["query_tokens"]:
            return total
        hits = now["hit_tokens"] - before["hit_tokens"]
        return f"{hits / (now['query_tokens'] - before['query_tokens']):.1%} now, {total}"

    def _latency(self, reading: Reading, name: str) -> str:
        histogram = reading.histograms.get(name, {})
        earlier = self._before.histograms.get(name, {}) if self._before else {}
        newer = difference(histogram, earlier)
        half, most = quantile(newer, 0.5), quantile(newer, 0.99)
        if half is None or most is None:
            return "-"
        return f"p50 {seconds_text(half)}, p99 {seconds_text(most)}"

    def _bar(self, blocks: Mapping[str, Any], width: int) -> Text:
        """Blocks by kind; of each kind that there is at least one place."""
        from rich.text import Text

        bar = Text()
        places = shares([blocks[kind] for kind in KINDS], width)
        for (letter, style), count in zip(KINDS.values(), places, strict=True):
            bar.append(letter * count, style)
        return bar

    def _legend(self, blocks: Mapping[str, Any]) -> Text:
        from rich.text import Text

        legend = Text()
        for kind, (letter, style) in KINDS.items():
            legend.append(letter, style)
            legend.append(f" {blocks[kind]} {kind}  ")
        return legend.append(f"of {blocks['total']}")


def shares(counts: list[int], width: int) -> list[int]:
    """So many places for each count, together `width`; what is not 0 has at least one."""
    total = max(sum(counts), 1)
    places = [max(width * count // total, 1) if count else 0 for count in counts]
    places[places.index(max(places))] += width - sum(places)
    return places


def seconds_text(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def duration(seconds: float) -> str:
    """12345 -> "3:25:45"."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
