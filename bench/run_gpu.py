"""Stages of run_gpu.sh: commands under a time limit, each with results and a log of its own.

    bench/run_gpu.sh [--again] [--seconds N] FOLDER [stage ...]

A stage that ended at this commit and whose results stand is skipped; one that was cut off goes on
where its measurements can. stages.json in the folder says what ended how, so that the folder can be
carried from one machine to the next. Knows commands, files and clocks, not what is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from report import COMMIT

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 520  # seconds of a stage
GRACE = 10.0  # seconds to write what there is, once a stage is told to stop
LEAST = 30  # seconds below which no stage is begun
CUT_OFF = 124
RECORDS = "stages.json"
KERNEL_TESTS = [
    f"tests/kernels/test_{name}.py"
    for name in ("triton_kernels", "triton_windowed", "xformers_attention")
]
# Of the first of them, under compute-sanitizer.
CHECKED = "bfloat16 and (ragged_decode or chunks_beside or stored_bytes)"
VLLM_CACHES = ("fp8", "int8_per_token_head", "int4_per_token_head", "turboquant_4bit_nc")


class Stage(NamedTuple):
    """A command, and the files that it leaves in the folder."""

    name: str
    command: Sequence[str]
    results: tuple[str, ...] = ()
    lacking: str = ""  # why it cannot be run here
    answers: tuple[int, ...] = (0,)  # exits with which it has ended: tests may also fail
    is_kept: bool = True  # otherwise it is run each time


class Outcome(NamedTuple):
    """How a stage ended, as in the records: at which commit, when it was run."""

    commit: str
    exit: int
    seconds: float
    results: list[str]


def missing(*modules: str) -> str:
    return ", ".join(f"{name} is not installed" for name in modules if not find_spec(name))


def stages(folder: Path) -> list[Stage]:
    """In the order in which they are run: what is worth most first."""

    def measuring(name: str, script: str, *options: str, lacking: str = "") -> Stage:
        result = f"{name}.json"
        command = (sys.executable, f"bench/{script}", "--json", str(folder / result), *options)
        return Stage(name, command, (result,), lacking)

    def testing(name: str, tests: Sequence[str], *options: str) -> Stage:
        pytest = ("-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider", *tests, *options)
        result = f"{name}.xml"
        command = (sys.executable, *pytest, f"--junitxml={folder / result}")
        return Stage(name, command, (result,), missing("pytest"), (0, 1))

    def sanitizing(tool: str) -> Stage:
        stage = testing(tool, KERNEL_TESTS[:1], "-k", CHECKED)
        checker = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1")
        lacking = "" if shutil.which(checker[0]) else f"{checker[0]} is not installed"
        uncached = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1")  # so that every bound is seen
        return stage._replace(command=(*uncached, *checker, *stage.command), lacking=lacking)

    workers = ("-n", str(min(12, os.cpu_count() or 1)))  # they compile for most of the time
    answers = ("--answers", str(folder / "expectations.npz"))
    expectations = measuring("expectations", "tools/gpu_expectations.py", *answers)
    plugin = ("--dtype", "bfloat16", "--rounds", "1", "--peers", *VLLM_CACHES)
    return [
        testing("tests", KERNEL_TESTS, *(workers if find_spec("xdist") else ())),
        expectations._replace(results=("expectations.json", "expectations.npz"), answers=(0, 1)),
        measuring("copy", "bench_gpu_attention.py", "--copy"),
        measuring("sweep", "bench_gpu_attention.py"),
        measuring("tune", "tools/tune.py"),
        measuring("graphs", "bench_decode_graphs.py", lacking=missing("transformers")),
        measuring(
            "serving",
            "bench_throughput.py",
            *("--device", "cuda"),
            lacking=missing("transformers"),
        ),
        measuring("vllm", "bench_vllm.py", *plugin, lacking=missing("vllm")),
        sanitizing("memcheck"),
        sanitizing("racecheck"),
        Stage(
            "pictures",
            (sys.executable, "bench/make_results.py", "--gpu", str(folder)),
            lacking=missing("matplotlib"),
            is_kept=False,
        ),
    ]


def read_records(folder: Path) -> dict[str, Outcome]:
    file = folder / RECORDS
    records = json.loads(file.read_text()) if file.exists() else {}
    return {name: Outcome(**record) for name, record in records.items()}


def write_records(folder: Path, records: dict[str, Outcome]) -> None:
    unfinished = folder / f"{RECORDS}.part"
    written = {name: outcome._asdict() for name, outcome in records.items()}
    unfinished.write_text(json.dumps(written, indent=1) + "\n")
    unfinished.replace(folder / RECORDS)


def has_ended(stage: Stage, folder: Path, outcome: Outcome | None) -> bool:
    return (
        stage.is_kept
        and outcome is not None
        and outcome.commit == COMMIT
        and outcome.exit in stage.answers
        and all((folder / name).exists() for name in stage.results)
    )


def run_stage(stage: Stage, folder: Path, seconds: float) -> Outcome:
    """Run it with all that it starts in a group of its own, of which nothing is left behind."""
    start = time.monotonic()
    with (folder / f"{stage.name}.log").open("w") as log:
        process = subprocess.Popen(
            stage.command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=os.setpgrp,
        )
        try:
            exit_code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            exit_code = CUT_OFF
            os.killpg(process.pid, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    left = [name for name in stage.results if (folder / name).exists()]
    return Outcome(COMMIT, exit_code, round(time.monotonic() - start, 1), left)


def run_stages(
    chosen: Sequence[Stage], folder: Path, *, again: bool = False, seconds: float = float("inf")
) -> dict[str, str]:
    """What became of each, in words."""
    deadline = time.monotonic() + seconds
    records, said = read_records(folder), {}
    for stage in chosen:
        left = min(LIMIT, deadline - time.monotonic() - GRACE)
        if stage.lacking:
            said[stage.name] = f"not run: {stage.lacking}"
        elif not again and has_ended(stage, folder, records.get(stage.name)):
            said[stage.name] = "failed before" if records[stage.name].exit else "done before"
        elif left < LEAST:
            said[stage.name] = "no time left"
        else:
            before = records.get(stage.name)
            if again or before is None or before.commit != COMMIT:
                for name in stage.results:
                    (folder / name).unlink(missing_ok=True)
            print(f"== {stage.name}", flush=True)
            # As it stands if this very process is killed.
            records[stage.name] = Outcome(COMMIT, CUT_OFF, 0.0, [])
            write_records(folder, records)
            records[stage.name] = outcome = run_stage(stage, folder, left)
            write_records(folder, records)
            said[stage.name] = {0: "done", CUT_OFF: "cut off"}.get(outcome.exit, "failed")
            print(f"{tail(folder / f'{stage.name}.log')}== {stage.name}: exit {outcome.exit}")
    print_summary(chosen, records, said)
    return said


def tail(log: Path, num_lines: int = 12) -> str:
    return "".join(log.read_text(errors="replace").splitlines(keepends=True)[-num_lines:])


def print_summary(
    chosen: Sequence[Stage], records: dict[str, Outcome], said: dict[str, str]
) -> None:
    print(f"\n{COMMIT}\n{'stage':14}{'exit':>5}{'seconds':>9}  results", flush=True)
    for stage in chosen:
        what, outcome = said[stage.name], records.get(stage.name)
        if outcome is None:
            print(f"{stage.name:14}{'':14}  {what}")
            continue
        results = " ".join(outcome.results) or "none"
        print(f"{stage.name:14}{outcome.exit:5}{outcome.seconds:9.1f}  {results} ({what})")


def main(make_stages: Callable[[Path], list[Stage]] = stages) -> int:
    """1 where a stage failed or is not at its end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--again", action="store_true", help="also what has ended before")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of all together")
    parser.add_argument("folder", type=Path, help="where results and logs are and go")
    parser.add_argument("stages", nargs="*", help="by name; without: all")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # stages end with us
    folder = arguments.folder.resolve()
    known = {stage.name: stage for stage in make_stages(folder)}
    if unknown := set(arguments.stages) - known.keys():
        parser.error(f"no stage {', '.join(sorted(unknown))}: there are {', '.join(known)}")
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [stage for name, stage in known.items() if name in (arguments.stages or known)]
    said = run_stages(chosen, folder, again=arguments.again, seconds=arguments.seconds)
    return int(not all(what.startswith(("done", "not run")) for what in said.values()))


if __name__ == "__main__":
    sys.exit(main())
