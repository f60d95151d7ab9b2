"""A known prompt after a restart: found in a block store on disk, beside computing it again.

    python bench/bench_block_store.py --model FOLDER --json FILE

For each format an `LLM` computes a prompt and writes its blocks to an empty folder; then another
one, made anew on the same weights, is given the same prompt. Both are timed from the request to the
first token, in turns with a folder of their own each; files are read from the machine's memory
where it still has them. Bytes of entries are those of the folder by the tokens that they hold.

Then entries are damaged, cut, lengthened, flipped, zeroed or emptied, and what is answered is
compared with what is where they are removed instead.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from report import Row, add_arguments, write_report
from transformers import PreTrainedModel

from paged_kv.engine.sampling_params import SamplingParams
from paged_kv.entrypoints.demo import MODEL_FOLDER
from paged_kv.entrypoints.llm import LLM
from paged_kv.models.calibration import TEXT
from paged_kv.models.loading import load_model, load_tokenizer

FORMATS = ("native", "int8", "int8/0", "int4", "int2")
ROUNDS = 3
FIRST = SamplingParams(max_tokens=1, ignore_eos=True, temperature=0)
ANSWER = SamplingParams(max_tokens=16, ignore_eos=True, temperature=0)
DAMAGED_TOKENS = 1000  # of the prompt whose entries are damaged
# Of all damaged entries, how many are of which format.
SHARES = {"native": 0.6, "int8": 0.2, "int2": 0.2}


class Bench:
    """One model and one prompt, on engines that come and go."""

    def __init__(self, model: PreTrainedModel, tokenizer: object, prompt: list[int]) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.prompt = prompt

    @contextmanager
    def engine(self, kv_format: str, folder: Path) -> Iterator[LLM]:
        with LLM(
            self.model,
            tokenizer=self.tokenizer,  # type: ignore[arg-type]
            kv_format=kv_format,
            block_store=folder,
            generation_config=None,
            max_num_seqs=2,
            max_model_len=len(self.prompt) + 32,
        ) as llm:
            yield llm

    def seconds_to_first(self, llm: LLM) -> float:
        start = time.perf_counter()
        llm.generate([self.prompt], FIRST, show_progress=False)
        return time.perf_counter() - start


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def measure_restarts(bench: Bench, kv_format: str, rounds: int) -> tuple[list[Row], float]:
    """First tokens by computing and by the store; and bytes of entries a token."""
    computing, finding, opening, a_token = [], [], [], 0.0
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "store"
            with bench.engine(kv_format, folder) as llm:
                computing.append(bench.seconds_to_first(llm))
                geometry = llm.engine.manager.geometry
            num_links = geometry.num_links(len(bench.prompt))
            if geometry.seals:
                sealable = len(bench.prompt) - geometry.num_head_tokens - geometry.min_tail_tokens
                num_links = geometry.num_head_blocks + sealable // geometry.block_size
            a_token = folder_bytes(folder) / geometry.link_end(num_links)
            start = time.perf_counter()
            with bench.engine(kv_format, folder) as llm:
                opening.append(time.perf_counter() - start)
                finding.append(bench.seconds_to_first(llm))
                num_hit = llm.statistics().num_hit_tokens
    case = f"{kv_format}, {len(bench.prompt)} tokens"
    computed, found = median(computing), median(finding)
    return [
        Row(
            case=case,
            metric="time to the first token",
            value=found,
            unit="s",
            baseline="computed",
            baseline_value=computed,
            ratio=computed / found,
        ),
        Row(case=case, metric="tokens found", value=num_hit, unit=""),
        Row(case=case, metric="making the engine", value=median(opening), unit="s"),
    ], a_token


def size_row(kv_format: str, a_token: float, native: float) -> Row:
    return Row(
        case=kv_format,
        metric="entries",
        value=a_token,
        unit="bytes/token",
        baseline="native",
        baseline_value=native,
        ratio=native / a_token,
    )


def damaged(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data))
    flipped = bytes([data[place] ^ (1 << rng.randrange(8))])
    return rng.choice(
        (
            data[:place],
            data + bytes(rng.randrange(1, 100)),
            data[:place] + flipped + data[place + 1 :],
            bytes(len(data)),
            b"",
        )
    )


def damage_rows(bench: Bench, kv_format: str, count: int) -> list[Row]:
    """Of damaged entries those that are refused, and of answers those that are wrong."""
    rng, num_damaged, num_answers, num_wrong = random.Random(1), 0, 0, 0
    with tempfile.TemporaryDirectory() as name:
        whole, folder = Path(name) / "whole", Path(name) / "store"
        with bench.engine(kv_format, whole) as llm:
            llm.generate([bench.prompt], FIRST, show_progress=False)
        files = sorted(whole.iterdir())
        with bench.engine(kv_format, folder) as llm:

            def answer() -> list[int]:
                (output,) = llm.generate([bench.prompt], ANSWER, show_progress=False)
                llm.engine.tier.flush()
                llm.reset_prefix_cache()
                return output.token_ids

            while num_damaged < count:
                some = rng.sample(files, k=min(rng.randrange(1, len(files)), count - num_damaged))
                for file in files:
                    shutil.copy(file, folder)
                for file in some:
                    (folder / file.name).unlink()
                expected = answer()
                for file in files:
                    shutil.copy(file, folder)
                for file in some:
                    (folder / file.name).write_bytes(damaged(file.read_bytes(), rng))
                num_wrong += answer() != expected
                num_answers += 1
                num_damaged += len(some)
            refused = llm.block_store_statistics()
    assert refused is not None
    case = f"{kv_format}, {num_damaged} damaged entries"
    return [
        Row(case=case, metric="refused", value=refused.num_refused, unit="entries"),
        Row(case=case, metric="answers", value=num_answers, unit=""),
        Row(case=case, metric="wrong answers", value=num_wrong, unit=""),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER, help="(the demo model)")
    parser.add_argument("--tokens", type=int, default=4000, help="of the prompt (4000)")
    parser.add_argument("--damaged", type=int, default=1000, help="entries (1000)")
    add_arguments(parser)
    arguments = parser.parse_args()
    num_tokens = min(arguments.tokens, 400) if arguments.quick else arguments.tokens
    num_damaged = 20 if arguments.quick else arguments.damaged
    tokenizer = load_tokenizer(arguments.model)
    model = load_model(arguments.model, None)
    text = tokenizer.encode(TEXT.read_text(encoding="utf-8"), add_special_tokens=False)
    prompt = (text * (num_tokens // len(text) + 1))[:num_tokens]
    bench, rows, sizes = Bench(model, tokenizer, prompt), list[Row](), dict[str, float]()
    for kv_format in FORMATS:
        its_rows, sizes[kv_format] = measure_restarts(
            bench, kv_format, 1 if arguments.quick else ROUNDS
        )
        rows += its_rows
    rows += [size_row(name, size, sizes["native"]) for name, size in sizes.items()]
    shorter = Bench(model, tokenizer, prompt[:DAMAGED_TOKENS])
    for kv_format, share in SHARES.items():
        rows += damage_rows(shorter, kv_format, round(num_damaged * share))
    write_report("block_store", rows, arguments.json)


if __name__ == "__main__":
    main()
