"""Summarise a folder of texts, all at once; killed at any time, it goes on where it was.

    python examples/summarise_folder.py [FOLDER] [--model MODEL] > summaries.jsonl

Long texts are summarised in pieces. What was answered is kept in summaries.sqlite, by question.
"""

import argparse
import asyncio
import json
import sqlite3
from pathlib import Path

from paged_kv import DEMO_MODEL, LLM, AsyncLLM, PagedKVError, SamplingParams

PARAMS = SamplingParams(temperature=0.5, seed=0, max_tokens=64)


async def answer(piece: str, engine: AsyncLLM, kept: sqlite3.Connection) -> str:
    prompt = [{"role": "user", "content": f"Summarise this text in two sentences:\n\n{piece}"}]
    asked = f"{engine.llm.tokenizer.name_or_path} {PARAMS} {prompt}"
    for (text,) in kept.execute("SELECT text FROM answers WHERE asked = ?", [asked]):
        return text
    text = (await engine.generate(prompt, PARAMS)).text.strip()
    kept.execute("INSERT OR IGNORE INTO answers VALUES (?, ?)", [asked, text])
    return text


async def summarise(path: Path, engine: AsyncLLM, kept: sqlite3.Connection) -> dict[str, str]:
    tokens, size = engine.llm.tokenizer.backend_tokenizer, min(600, engine.llm.max_model_len - 128)
    try:
        text, pieces = path.read_text("utf-8"), ["", ""]
        while len(pieces) > 1:
            ids = tokens.encode(text, add_special_tokens=False).ids
            pieces = [tokens.decode(ids[at : at + size]) for at in range(0, len(ids), size)]
            text = "\n".join(await asyncio.gather(*(answer(p, engine, kept) for p in pieces)))
        return {"file": path.name, "summary": text}
    except (OSError, ValueError, PagedKVError) as error:
        return {"file": path.name, "error": str(error)}


async def main(folder: Path, model: str, kv_format: str) -> None:
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    kept = sqlite3.connect("summaries.sqlite", isolation_level=None)
    kept.execute("CREATE TABLE IF NOT EXISTS answers (asked UNIQUE, text)")
    async with AsyncLLM(LLM(model, kv_format=kv_format, dtype="float32")) as engine:
        for job in [asyncio.create_task(summarise(path, engine, kept)) for path in paths]:
            print(json.dumps(await job), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parents[1] / "docs")
    parser.add_argument("--model", default=DEMO_MODEL, help="folder or hub name (the demo model)")
    parser.add_argument("--kv-format", default="int8", help='"native": a kill changes no word')
    try:
        asyncio.run(main(**vars(parser.parse_args())))
    except (OSError, sqlite3.Error, PagedKVError) as error:
        raise SystemExit(f"summarise_folder.py: {error}") from error
