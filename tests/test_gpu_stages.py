"""Stages of run_gpu.sh with commands that need no GPU, going on where one was, and the picture."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import bench_gpu_attention
import pytest
import run_gpu
from pictures import gpu
from report import Row, kept_rows, write_report
from run_gpu import CUT_OFF, Stage, main, run_stages, stages

from paged_kv.benchmarks import report

ROOT = Path(__file__).parent.parent


def stage(folder: Path, name: str, code: str = "pass", **fields: object) -> Stage:
    """Counts its runs in its result, then does something."""
    script = f"open({str(folder / name)!r}, 'a').write('x'); import os, sys, time; {code}"
    return Stage(name, (sys.executable, "-S", "-c", script), (name,), **fields)


def runs(folder: Path, name: str) -> int:
    return len((folder / name).read_text())


def test_what_has_ended_is_skipped_until_it_is_asked_for_again(tmp_path, capsys):
    done, failing = stage(tmp_path, "done"), stage(tmp_path, "failing", "sys.exit(3)")
    found = stage(tmp_path, "found", "print('a test failed'); sys.exit(1)", answers=(0, 1))
    chosen = [done, failing, found]
    assert run_stages(chosen, tmp_path) == {"done": "done", "failing": "failed", "found": "failed"}
    said = run_stages(chosen, tmp_path)
    assert said == {"done": "done before", "failing": "failed", "found": "failed before"}
    assert [runs(tmp_path, name) for name in ("done", "failing", "found")] == [1, 2, 1]
    assert "a test failed" in (tmp_path / "found.log").read_text()
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if line.startswith("found ") and "failed before" in line)
    assert line.split()[:2] == ["found", "1"]
    assert line.endswith("found (failed before)")
    assert run_stages([done], tmp_path, again=True) == {"done": "done"}
    assert runs(tmp_path, "done") == 1  # what was there is gone first


def test_another_commit_or_a_result_that_is_gone_runs_it_once_more(tmp_path, monkeypatch):
    done = stage(tmp_path, "done")
    run_stages([done], tmp_path)
    monkeypatch.setattr(run_gpu, "COMMIT", "another")
    assert run_stages([done], tmp_path) == {"done": "done"}
    assert runs(tmp_path, "done") == 1  # what another commit left is gone first
    (tmp_path / "done").unlink()
    assert run_stages([done], tmp_path) == {"done": "done"}
    drawn = stage(tmp_path, "drawn", is_kept=False)
    run_stages([drawn], tmp_path)
    assert run_stages([drawn], tmp_path) == {"drawn": "done"}


def test_a_stage_over_its_limit_leaves_what_it_wrote_and_no_process(tmp_path, monkeypatch):
    monkeypatch.setattr(run_gpu, "GRACE", 0.3)
    monkeypatch.setattr(run_gpu, "LIMIT", 2)
    monkeypatch.setattr(run_gpu, "LEAST", 0)
    slow = stage(tmp_path, "slow", f"{DEAF}; print(os.fork(), flush=True); time.sleep(60)")
    said = run_stages([slow, stage(tmp_path, "next")], tmp_path)
    assert said == {"slow": "cut off", "next": "done"}
    record = json.loads((tmp_path / "stages.json").read_text())["slow"]
    assert (record["exit"], record["results"]) == (CUT_OFF, ["slow"])
    child = max(int(line) for line in (tmp_path / "slow.log").read_text().split())
    assert child  # in itself it is 0
    assert not is_alive(child)
    assert run_stages([slow], tmp_path, seconds=0) == {"slow": "no time left"}  # once more


DEAF = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"


def is_alive(process: int) -> bool:
    """Also told of what nobody has waited for yet; killed processes take a moment."""
    status = Path(f"/proc/{process}/stat")
    for _ in range(100):
        if not status.exists() or status.read_text().split()[2] == "Z":
            return False
        time.sleep(0.05)
    return True


def test_stages_share_what_time_there_is(tmp_path, monkeypatch):
    monkeypatch.setattr(run_gpu, "GRACE", 0)
    chosen = [stage(tmp_path, "first"), stage(tmp_path, "second")]
    assert run_stages(chosen, tmp_path, seconds=20) == dict.fromkeys(
        ("first", "second"), "no time left"
    )
    lacking = stage(tmp_path, "third", lacking="nothing is installed")
    assert run_stages([lacking], tmp_path) == {"third": "not run: nothing is installed"}


def test_stages_are_chosen_by_name(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "results"
    monkeypatch.setattr("sys.argv", ["run_gpu.py", str(folder), "two"])

    def made(folder: Path) -> list[Stage]:
        return [stage(folder, "one"), stage(folder, "two")]

    assert main(made) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["stages.json", "two", "two.log"]
    monkeypatch.setattr("sys.argv", ["run_gpu.py", str(folder), "three"])
    with pytest.raises(SystemExit):
        main(made)
    assert "no stage three: there are one, two" in capsys.readouterr().err


def test_the_script_ends_its_stage_when_it_is_ended(tmp_path):
    code = f"""
import sys, run_gpu, pathlib
from run_gpu import Stage
code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
command = (sys.executable, "-S", "-c", code)
sys.argv = ["run_gpu.py", {str(tmp_path)!r}]
run_gpu.main(lambda folder: [Stage("slow", command)])
"""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'bench'}"}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    log, number = tmp_path / "slow.log", 0
    for _ in range(1200):
        if log.exists() and (text := log.read_text()).endswith("\n"):
            number = int(text)
            break
        time.sleep(0.05)
    assert number
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    assert json.loads((tmp_path / "stages.json").read_text())["slow"]["exit"] == CUT_OFF
    assert not is_alive(number)


def test_every_stage_calls_what_there_is(tmp_path):
    made = stages(tmp_path)
    names = [each.name for each in made]
    assert names[:4] == ["tests", "expectations", "copy", "sweep"]
    results = [name for each in made for name in each.results]
    assert len(set(results)) == len(results)
    for each in made:
        files = [part for part in each.command if part.startswith(("bench/", "tests/"))]
        assert files
        assert all((ROOT / file).is_file() for file in files)


def test_what_a_memory_check_runs_is_there(tmp_path):
    (checked,) = (each for each in stages(tmp_path) if each.name == "memcheck")
    assert checked.command[2] == "compute-sanitizer"
    start = checked.command.index(sys.executable)
    command = [part for part in checked.command[start:] if not part.startswith("--junitxml")]
    output = subprocess.run(
        [*command, "--collect-only"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert 4 <= output.count("::test_") <= 40


def test_results_of_the_same_code_are_gone_on_with(tmp_path, monkeypatch):
    file, rows = tmp_path / "rows.json", [Row(case="a", metric="m", value=1.0, unit="s")]
    assert kept_rows(file) == kept_rows(None) == []
    write_report("b", rows, file)
    assert kept_rows(file) == rows
    monkeypatch.setattr(report, "device", lambda: "another")
    assert kept_rows(file) == []
    monkeypatch.undo()
    monkeypatch.setattr(report, "COMMIT", "another")
    assert kept_rows(file) == []


def test_sources_tell_code_apart_that_has_no_commit(tmp_path, monkeypatch):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "a.py").write_text("1")
    first = report.digest(tmp_path)
    (tmp_path / "kernels" / "a.py").write_text("2")
    assert report.digest(tmp_path) != first
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert report.commit() == f"unknown, sources {report.digest()}"


def test_the_sweep_measures_what_is_missing(tmp_path, monkeypatch):
    measured = []

    def rows_of(case: bench_gpu_attention.Case, copied: float) -> list[Row]:
        measured.append(case.name)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return [Row(case=case.name, metric="decode us", value=1.0, unit="us")]

    monkeypatch.setattr(bench_gpu_attention, "rows_of", rows_of)
    monkeypatch.setattr(bench_gpu_attention, "copy_bandwidth", lambda num_bytes: 1e9)
    file = tmp_path / "sweep.json"
    with pytest.raises(KeyboardInterrupt):
        bench_gpu_attention.run(True, file)
    bench_gpu_attention.run(True, file)
    names = [case.name for case in bench_gpu_attention.QUICK_CASES]
    assert measured == [*names[:3], *names[2:]]
    assert [row.case for row in kept_rows(file)] == ["copy", *names]
    bench_gpu_attention.run_copies(True, file)
    assert [row.case for row in kept_rows(file)] == ["copy of 4 MiB", "copy of 16 MiB"]


def test_the_sweep_goes_on_behind_what_failed(tmp_path, monkeypatch):
    first, *others = (case.name for case in bench_gpu_attention.QUICK_CASES)

    def rows_of(case: bench_gpu_attention.Case, copied: float) -> list[Row]:
        if case.name == first:
            raise RuntimeError("an illegal memory access\nat length")
        return [Row(case=case.name, metric="decode us", value=1.0, unit="us")]

    monkeypatch.setattr(bench_gpu_attention, "rows_of", rows_of)
    monkeypatch.setattr(bench_gpu_attention, "copy_bandwidth", lambda num_bytes: 1e9)
    file = tmp_path / "sweep.json"
    with pytest.raises(RuntimeError):
        bench_gpu_attention.run(True, file)
    bench_gpu_attention.run(True, file)
    rows = kept_rows(file)
    assert [row.case for row in rows] == ["copy", first, *others]
    assert rows[1].metric == "failed: RuntimeError: an illegal memory access"


def sweep_rows() -> list[Row]:
    rows = [Row(case="copy", metric="bytes read and written", value=4000, unit="GB/s")]
    for shape in ("64x32768, 4 queries a head", "1x131072, 8 queries a head"):
        for kv_format, share in (("native", 0.9), ("int4", 0.7)):
            common = {"case": f"{kv_format} {shape}", "unit": "us", "value": 100.0}
            moved = {"metric": "needed bytes read", "baseline": "copy", "ratio": share}
            rows.append(Row(**common, **moved, baseline_value=4000))
            time_of = {**common, "metric": "decode us"}
            rows.append(Row(**time_of, baseline="our native kernel", baseline_value=90.0))
            rows.append(Row(**time_of, baseline="paged bf16 FlashInfer", baseline_value=110.0))
            rows.append(Row(**time_of, baseline="paged bf16 vLLM unified (not installed)"))
    return rows


def test_figures_of_the_picture_are_those_of_the_rows(tmp_path):
    write_report("attention on a GPU", sweep_rows(), tmp_path / "sweep.json")
    rows = json.loads((tmp_path / "sweep.json").read_text())["rows"]
    shape = "64x32768\n4 queries"
    assert gpu.shares_of_copy(rows)[shape] == {"native": 0.9, "int4": 0.7}
    assert gpu.microseconds(rows)[shape] == {
        "ours, native": 100.0,
        "ours, int4": 100.0,
        "paged bf16 FlashInfer": 110.0,
    }


@pytest.mark.skipif(not find_spec("matplotlib"), reason="needs matplotlib")
def test_the_picture_is_drawn(tmp_path):
    write_report("attention on a GPU", sweep_rows(), tmp_path / "sweep.json")
    gpu.draw_folder(tmp_path)
    assert "</svg>" in (tmp_path / "attention-dark.svg").read_text()


def test_there_is_no_picture_of_nothing(tmp_path, capsys):
    gpu.draw_folder(tmp_path)
    assert capsys.readouterr().out.startswith("no picture: there is no sweep.json")
