"""`vllm serve` with our blocks, asked over HTTP as its users do."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from openai import OpenAI

from tests.support.vllm_job import MODEL, ROOT, environment, own_rounds

pytestmark = pytest.mark.xdist_group("server")

VLLM = str(Path(sys.executable).with_name("vllm"))
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
START_UP = 180  # seconds, at the most


@dataclass(frozen=True)
class Server:
    url: str
    log: Path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    template, log = folder / "template.jinja", folder / "log"
    template.write_text(TEMPLATE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [VLLM, "serve", MODEL, "--attention-backend", "CUSTOM", "--served-model-name", "demo"]
    command += ["--additional-config", '{"paged_kv": {"format": "int2"}}', "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", "--chat-template", str(template)]
    command += ["--kv-cache-memory-bytes", str(64 << 20), "--host", "127.0.0.1"]
    settings = environment(VLLM_ENABLE_V1_MULTIPROCESSING="1")
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=settings, stdout=file, stderr=file)
        try:
            wait_until_healthy(url, process, log)
            yield Server(url, log)
        finally:
            process.terminate()
            process.wait(timeout=60)


def wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(2 * START_UP):
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            urllib.request.urlopen(f"{url}/health")
        except OSError:
            time.sleep(0.5)
        else:
            return
    raise TimeoutError(log.read_text()[-4000:])


@pytest.fixture
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none")


PROMPT = "Once upon a time there was a girl who"


def test_a_completion_is_that_of_our_own_engine(client):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    expected = own_rounds([tokenizer(PROMPT)["input_ids"]], "int2")[0][0]
    options = {"max_tokens": 64, "temperature": 0, "extra_body": {"ignore_eos": True}}
    answer = client.completions.create(model="demo", prompt=PROMPT, **options)
    assert answer.choices[0].text == tokenizer.decode(expected)
    parts = client.completions.create(model="demo", prompt=PROMPT, stream=True, **options)
    assert "".join(part.choices[0].text for part in parts) == answer.choices[0].text


def test_chat_answers_whole_and_in_parts(client):
    messages = [{"role": "user", "content": PROMPT}]
    options = {"messages": messages, "max_tokens": 20, "temperature": 0}
    whole = client.chat.completions.create(model="demo", **options).choices[0].message.content
    parts = client.chat.completions.create(model="demo", stream=True, **options)
    said = [part.choices[0].delta.content or "" for part in parts if part.choices]
    assert "".join(said) == whole
    assert len(said) > 5


def test_the_log_says_the_format_and_what_fits(server):
    log = server.log.read_text()
    assert "paged_kv: format int2, 84.0 bytes a token and layer (1024 in vLLM's own cache)" in log


def test_vllms_own_benchmark_drives_it(server):
    command = [VLLM, "bench", "serve", "--backend", "openai", "--base-url", server.url]
    command += ["--model", MODEL, "--served-model-name", "demo", "--dataset-name", "random"]
    command += ["--random-input-len", "60", "--random-output-len", "20", "--num-prompts", "8"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Successful requests:                     8" in done.stdout
