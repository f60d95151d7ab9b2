"""A chat server in a program of one's own, and people who talk to it by the openai package.

    python examples/chat_server.py [--model MODEL] [--port PORT]

All answers are decoded together, and streamed. With a PORT it serves on there: OpenAI's API at
http://127.0.0.1:PORT/v1, a page to chat at /. Needs: pip install 'paged-kv[models,server]' openai
"""

import argparse
import asyncio
import socket

import openai
import uvicorn

from paged_kv import DEMO_MODEL, LLM, AsyncLLM, PagedKVError, ServerSettings, create_app

TALKS = (("Where do whales sleep?", "Who told you?"), ("Is the captain in?", "When is he?"))
OPTIONS = {"model": "demo", "temperature": 0.3, "max_completion_tokens": 48, "stop": '"\n'}


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


async def main(model: str, listener: socket.socket, *, serves_on: bool) -> None:
    with LLM(model, kv_format="int8") as llm:
        async with AsyncLLM(llm) as engine:
            app = create_app(engine, ServerSettings(model_name="demo"))
            server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
            serving = asyncio.create_task(server.serve([listener]))
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
            print(f"serving at {url}", flush=True)
            async with openai.AsyncOpenAI(base_url=url, api_key="none") as client:
                await asyncio.gather(*(talk(client, questions) for questions in TALKS))
            server.should_exit = not serves_on
            await serving


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=DEMO_MODEL, help="folder or hub name (the demo model)")
    parser.add_argument("--port", type=int, default=0, help="serve on there, until Ctrl-C")
    asked = parser.parse_args()
    if not 0 <= asked.port < 1 << 16:
        parser.error(f"--port {asked.port} is none from 0 to 65535")
    try:
        with socket.create_server(("127.0.0.1", asked.port)) as listener:
            asyncio.run(main(asked.model, listener, serves_on=asked.port != 0))
    except (OSError, PagedKVError) as error:
        parser.error(f"--port {asked.port}, --model {asked.model}: {error}")
