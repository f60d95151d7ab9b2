"""Blocks of documents as a reader would run them, on the demo model and a server of this process.

Knows what stands for a reader's own in them, never what they are to print.
"""

from __future__ import annotations

import io
import re
import runpy
import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from paged_kv import LLM
from paged_kv.entrypoints.cli import main
from paged_kv.entrypoints.demo import MODEL_FOLDER

from .documents import ROOT, Fence
from .running_server import running

STORE: Final = '"kv-store"'
SERVER: Final = "http://127.0.0.1:8000"
STAND_INS: Final = {
    "path/to/model": str(MODEL_FOLDER),
    "HuggingFaceTB/SmolLM2-135M-Instruct": str(MODEL_FOLDER),
    "paged_kv/demo_model": str(MODEL_FOLDER),
    "tcp://*:5557": "tcp://127.0.0.1:*",  # a port that nobody else has
}
NAMES: Final = re.compile("|".join(map(re.escape, STAND_INS)))
ADAPTERS: Final = ("path/to/formal", "path/to/brief")


def printed_by(fence: Fence) -> str:
    """Run a block; returns what it prints."""
    with ExitStack() as stack:
        text = fence.text
        text = NAMES.sub(lambda name: STAND_INS[name[0]], text)
        if any(adapter in text for adapter in ADAPTERS):
            text = stack.enter_context(with_adapters(text))
        if SERVER in text:
            text = text.replace(SERVER, stack.enter_context(server_url()))
        if STORE in text:
            text = text.replace(STORE, f'"{stack.enter_context(TemporaryDirectory())}/store"')
        return executed(text, str(fence)) if fence.language == "python" else run_in_shell(text)


def executed(text: str, name: str) -> str:
    output = io.StringIO()
    names: dict[str, Any] = {"__name__": "__main__"}
    with redirect_stdout(output):
        exec(compile(text, name, "exec"), names)
    for value in names.values():
        if isinstance(value, LLM):
            value.close()
    return output.getvalue()


def run_in_shell(text: str) -> str:
    """Commands of ours and scripts of the checkout, one after the other, in this process."""
    output = io.StringIO()
    with redirect_stdout(output), pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "100")
        for line in text.splitlines():
            name, *words = shlex.split(line, comments=True)
            if name == "paged-kv":
                assert main(words) == 0
            else:
                script, *arguments = words
                patch.setattr("sys.argv", [script, *arguments])
                runpy.run_path(str(ROOT / script), run_name="__main__")
    return output.getvalue()


@contextmanager
def with_adapters(text: str) -> Iterator[str]:
    """The block with adapters of the demo model in the place of a reader's."""
    with TemporaryDirectory() as folder:
        model = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER)
        adapted: Any = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2))
        for adapter in ADAPTERS:
            adapted.save_pretrained(Path(folder) / adapter)
            text = text.replace(adapter, str(Path(folder) / adapter))
        yield text


@contextmanager
def server_url() -> Iterator[str]:
    """A server of the demo model."""
    with LLM(str(MODEL_FOLDER)) as llm, running(llm) as server:
        yield server.url
