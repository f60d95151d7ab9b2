"""A batch job that is killed again and again, and resumed: nothing lost, nothing twice.

    make soak        or, from the checkout:
    PYTHONPATH=bench:. python -m tests.soak.soak_job --requests 500 --kills 10 --json job.json

The same job runs once undisturbed and once killed (SIGKILL) at moments drawn at random, with
sampling under a seed. The exit status is 1 if a result is lost, is there twice, or differs.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from report import Row, write_report

from tests.support.batch_jobs import JobFiles, num_repeated, random_requests


def soak(folder: Path, num_requests: int, num_kills: int, seed: int, kv_format: str) -> list[Row]:
    rng = random.Random(seed)
    options = (
        *("--temperature", "1", "--seed", str(seed), "--ignore-eos", "--kv-format", kv_format),
        # In bfloat16 the last bit of a logit, which may decide a token, depends on whether a prompt
        # is computed in one step. One thread: two would wait for each other on a busy machine.
        *("--dtype", "float32", "--threads", "1"),
    )
    undisturbed, killed = (JobFiles(folder / name, options) for name in ("undisturbed", "killed"))
    requests = random_requests(num_requests, seed, most_tokens=16)
    start = time.perf_counter()
    undisturbed.write(requests)
    code, said = undisturbed.run()
    assert code == 0, said
    undisturbed_seconds = time.perf_counter() - start
    killed.write(requests)
    num_landed = repeated = cut_lines = 0
    for number in range(num_kills):
        # So that the last one comes before the end: some of what is left, shared by kills to come.
        num_kept = len(killed.kept())
        share = (num_requests - num_kept) // (num_kills - number + 1)
        wanted = num_kept + rng.randint(1, max(share, 1))
        delay = rng.uniform(0, 0.1)
        code, said = killed.run_until(wanted, signal.SIGKILL, "--resume", delay=delay)
        assert code == -signal.SIGKILL, f"exit code {code}: {said}"
        kept = killed.kept()
        num_landed += 1
        repeated += num_repeated(kept)
        cut_lines += not killed.part.read_bytes().endswith(b"\n")
        print(f"killed with {len(kept)} of {num_requests} kept", flush=True)
    code, said = killed.run("--resume")
    assert code == 0, said
    seconds = time.perf_counter() - start - undisturbed_seconds
    expected, results = undisturbed.results(), killed.results()
    names = [result["id"] for result in results]
    others = [pair for pair in zip(expected, results, strict=False) if pair[0] != pair[1]]
    for one, other in others:
        print(f"undisturbed {one}\nresumed     {other}")
    figures = {
        "requests": num_requests,
        "kills": num_landed,
        "results": len(results),
        "lost": len({request["id"] for request in requests} - set(names)),
        "twice": len(names) - len(set(names)) + repeated,
        "other than undisturbed": len(others),
        "lines cut off by a kill": cut_lines,
        "files left over": len(list(killed.folder.iterdir())) - 2,
    }
    rows = [Row(case=kv_format, metric=name, value=n, unit="") for name, n in figures.items()]
    times = {"undisturbed": undisturbed_seconds, "killed and resumed": seconds}
    return rows + [Row(case=kv_format, metric=m, value=s, unit="s") for m, s in times.items()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kv-format", default="native")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = soak(
            Path(folder),
            arguments.requests,
            arguments.kills,
            arguments.seed,
            arguments.kv_format,
        )
    write_report("soak_job", rows, arguments.json)
    faults = ("lost", "twice", "other than undisturbed", "files left over")
    return int(any(row.value for row in rows if row.metric in faults))


if __name__ == "__main__":
    sys.exit(main())
