"""A chat server in a program of one's own, and people who talk to it by the openai package.

    python examples/chat_server.py [--model MODEL] [--port PORT]

All answers are decoded together, and streamed. With a PORT it serves on there: OpenAI's API at
http://127.0.0.1:PORT/v1, a page to chat at /. Needs: pip install 'paged-kv[models,server]' openai
"""

import argparse
import asyncio

import openai
import uvicorn

from paged_kv import DEMO_MODEL, LLM, AsyncLLM
from paged_kv.entrypoints.server.app import create_app
from paged_kv.entrypoints.server.settings import ServerSettings

TALKS = (("Where do whales sleep?", "Who told you?"), ("Is the captain in?", "When is he?"))
OPTIONS = {"model": "demo", "temperature": 0.3, "max_completion_tokens": 48, "stop": '"\n'}
NOVEL = '{% for m in messages %}"{{ m.content }}"\n\n{% endfor %}"'  # how novels write talks


async def talk(client: openai.AsyncOpenAI, questions: tuple[str, ...]) -> None:
    messages = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        pieces = []
        stream = await client.chat.completions.create(messages=messages, stream=True, **OPTIONS)
        async for chunk in stream:  # as they come
            pieces.append(chunk.choices[0].delta.content or "")
        messages.append({"role": "assistant", "content": "".join(pieces)})
        print(f"{question}\n    {''.join(pieces).strip()}  [{len(pieces)} pieces]", flush=True)


async def main(model: str, port: int) -> None:
    with LLM(model, kv_format="int8") as llm:
        llm.tokenizer.chat_template = llm.tokenizer.chat_template or NOVEL
        async with AsyncLLM(llm) as engine:
            app = create_app(engine, ServerSettings(model_name="demo"))
            server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
            serving = asyncio.create_task(server.serve())
            while not server.started:
                await asyncio.sleep(0.01)
            url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
            print(f"serving at {url}", flush=True)
            async with openai.AsyncOpenAI(base_url=url, api_key="none") as client:
                await asyncio.gather(*(talk(client, questions) for questions in TALKS))
            server.should_exit = not port
            await serving


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=DEMO_MODEL, help="folder or hub name (the demo model)")
    parser.add_argument("--port", type=int, default=0, help="serve on there, until Ctrl-C")
    asyncio.run(main(**vars(parser.parse_args())))
