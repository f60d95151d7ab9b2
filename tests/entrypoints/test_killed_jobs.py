"""Jobs in processes of their own: killed, stopped, and with nobody reading what they print.

Few, since each costs seconds of imports; `tests/soak/soak_job.py` kills a long one again and again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.batch_jobs import ROOT, JobFiles, num_repeated, random_requests

OPTIONS = (
    *("--kv-format", "native", "--dtype", "float32", "--temperature", "1", "--seed", "3"),
    # One thread: two wait for each other where other tests run.
    *("--ignore-eos", "--max-num-seqs", "2", "--threads", "1"),
)
REQUESTS = random_requests(12, seed=2)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> JobFiles:
    job = JobFiles(tmp_path_factory.mktemp("undisturbed"), OPTIONS)
    job.write(REQUESTS)
    assert job.run() == (0, "")
    return job


def test_a_killed_job_loses_nothing_that_was_finished(undisturbed, tmp_path: Path) -> None:
    job = JobFiles(tmp_path, OPTIONS)
    job.write(REQUESTS)
    job.output.write_text("older results")
    code, _ = job.run_until(4, signal.SIGKILL)
    kept = job.kept()
    assert code == -signal.SIGKILL
    assert 4 <= len(kept) < len(REQUESTS)
    assert job.output.read_text() == "older results"
    code, said = job.run_until(len(kept) + 2, signal.SIGTERM, "--resume")
    assert code == 128 + signal.SIGTERM
    assert f"{len(kept)} of 12 are done" in said
    assert f"stopped by SIGTERM: {len(job.kept())} of 12 done" in said
    assert num_repeated(job.kept()) == 0
    code, said = job.run("--resume")
    assert code == 0
    assert job.results() == undisturbed.results()
    assert sorted(tmp_path.iterdir()) == [job.source, job.output]


def python(*arguments: str, stdout: int) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONUNBUFFERED", None)  # argparse would not notice that help is not read
    command = [sys.executable, "-m", "paged_kv", *arguments]
    return subprocess.run(
        command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment, check=False
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "The captain", "Her sister", "--max-tokens", "4", "--dtype", "float32"),
        ("generate", "--help"),
    ],
)
def test_a_reader_that_has_gone_ends_it_quietly(arguments: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    ended = python(*arguments, stdout=writer)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has such a device")
def test_a_full_disk_under_standard_output_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        ended = python("--version", stdout=full.fileno())
    assert ended.returncode == 2
    assert ended.stderr == "paged-kv: cannot write 'standard output': No space left on device\n"
