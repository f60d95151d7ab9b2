"""The page at `/` in a real browser: what people type and read, and what they see go wrong.

`make test-page` brings what it needs; without it these tests are skipped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from paged_kv import SamplingParams, SinkWindow
from tests.support.browser import CHROMIUM, chromium
from tests.support.running_server import NAME, RunningServer, running

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
expect = sync_api.expect
expect.set_options(timeout=60_000)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is the browser"),
    pytest.mark.xdist_group("browser"),
]

MUCH = re.compile(".{20}", re.DOTALL)
CHATS, STATISTICS = "**/v1/chat/completions", "**/statistics"
SCRIPT = "<img src=x onerror='window.caught = 1'><script>window.caught = 1</script>"
FIGURES: dict[str, Any] = {
    "kv_format": "int8",
    "requests": {"running": 2, "waiting": 3},
    "blocks": {"total": 100, "head": 5, "body": 30, "tail": 10, "cached": 15, "free": 40},
    "bytes": {"allocated": 45 << 20, "total": 100 << 20},
    "prefix_cache": {"hit_rate": 0.834},
    "tokens": {"generated_per_second": 1234.5},
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def options() -> dict[str, Any]:
    """Of the server; tests say theirs by `serving`."""
    return {}


@pytest.fixture
def server(llm, options) -> Iterator[RunningServer]:
    with running(llm, **options) as server:
        yield server


@pytest.fixture
def page(browser, server) -> Iterator[Any]:
    """The page, which asks nobody but its server and fails nowhere."""
    context = browser.new_context(viewport={"width": 1200, "height": 760})
    page = context.new_page()
    page.set_default_timeout(60_000)
    faults, asked = [], []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda said: said.type == "error" and faults.append(said.text))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(server.url)
    yield page
    context.close()
    # Statuses that tests ask for are told on the console too.
    assert [fault for fault in faults if "Failed to load resource" not in fault] == []
    assert [url for url in asked if not url.startswith(f"{server.url}/")] == []


def serving(**options: Any) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("options", [options], ids=[""])


def ask(page: Any, question: str) -> None:
    page.get_by_label("Message", exact=True).fill(question)
    page.keyboard.press("Enter")


def wait_for_end(page: Any) -> None:
    page.wait_for_selector("#turns li:last-child:not(.coming)")


def answers(page: Any) -> list[str]:
    return page.locator(".text").all_text_contents()


def last(page: Any, selector: str) -> str:
    return page.locator(selector).last.text_content()


def asked_last(server: RunningServer) -> str:
    return server.llm.tokenizer.decode(server.engine.submitted[-1][0])


def wait_for_idle(page: Any, server: RunningServer) -> None:
    for _ in range(500):
        if server.engine.num_requests == 0:
            return
        page.wait_for_timeout(20)
    raise AssertionError("a request is still there")


def make_endless(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers go on until somebody ends them."""
    submit = server.engine.submit
    endless = {"sink_window": SinkWindow(4, 64), "max_tokens": None, "ignore_eos": True}

    async def submit_endless(prompt: Any, params: SamplingParams, **options: Any) -> Any:
        return await submit(prompt, replace(params, **endless), **options)

    monkeypatch.setattr(server.engine, "submit", submit_endless)


def test_a_talk(page, server, llm):
    expect(page.locator("#model-name")).to_have_text(NAME)
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Most tokens").fill("24")
    page.get_by_label("System message").fill("You tell of the sea.")
    question = page.get_by_label("Message", exact=True)
    question.fill("Where is")
    question.press("Shift+Enter")
    question.press_sequentially("the whale?")
    assert page.locator("#turns li").count() == 0
    question.press("Enter")
    wait_for_end(page)
    messages = [
        {"role": "system", "content": "You tell of the sea."},
        {"role": "user", "content": "Where is\nthe whale?"},
    ]
    (output,) = llm.generate([messages], SamplingParams(temperature=0, max_tokens=24))
    assert answers(page) == [output.text]
    num_prompt = len(output.prompt_token_ids)
    assert f"{num_prompt} prompt tokens, " in last(page, ".usage")
    assert "24 generated" in last(page, ".usage")
    assert "cut off at the limit" in last(page, ".usage")
    assert question.input_value() == ""

    question.fill("And then?")
    page.get_by_role("button", name="Send").click()
    wait_for_end(page)
    said = (*messages, {"role": "assistant", "content": output.text})
    said = (*said, {"role": "user", "content": "And then?"})
    expected = llm.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    assert asked_last(server).endswith(expected)

    page.get_by_role("button", name="New conversation").click()
    assert page.locator("#turns li").count() == 0
    ask(page, "Who is there?")
    wait_for_end(page)
    assert "whale" not in asked_last(server)


def test_an_answer_can_be_stopped(page, server, monkeypatch):
    make_endless(server, monkeypatch)
    ask(page, "Tell me everything.")
    expect(page.locator(".text")).to_have_text(MUCH)
    assert server.engine.num_requests == 1
    assert page.locator(".error, .again").filter(visible=True).count() == 0
    page.get_by_role("button", name="Stop").click()
    wait_for_end(page)
    assert last(page, ".usage") == "stopped"
    assert len(answers(page)[0]) >= 20
    wait_for_idle(page, server)
    ask(page, "And more.")
    expect(page.locator(".text").last).to_have_text(MUCH)
    page.get_by_role("button", name="New conversation").click()
    wait_for_idle(page, server)
    assert page.locator("#turns li").count() == 0
    ask(page, "Tell me everything.")
    expect(page.locator(".text")).to_have_text(MUCH)
    page.get_by_role("button", name="Stop").click()
    wait_for_end(page)
    monkeypatch.undo()
    page.get_by_label("Most tokens").fill("4")
    page.get_by_role("button", name="Try again").click()
    wait_for_end(page)
    assert "4 generated" in last(page, ".usage")
    assert len(answers(page)) == 1


@serving(api_key="sesame")
def test_a_key_is_asked_for_and_kept_in_the_tab(page, server):
    key = page.get_by_label("This server asks for an API key")
    expect(key).to_be_focused()
    page.get_by_label("Most tokens").fill("4")
    ask(page, "Open!")
    wait_for_end(page)
    assert "asks for an API key" in last(page, ".error")
    key.fill("wrong")
    key.press("Enter")
    expect(page.locator("#key-note")).to_have_text("The server refused this key.")
    key.fill("sesame")
    key.press("Enter")
    expect(key).to_be_hidden()
    expect(page.locator("#model-name")).to_have_text(NAME)
    expect(page.locator(".usage")).to_contain_text("4 generated")
    assert page.locator(".error").is_hidden()
    page.reload()
    expect(page.locator("#model-name")).to_have_text(NAME)
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]


def test_what_the_server_refuses_is_said_and_tried_again(page, server):
    page.get_by_label("Most tokens").fill("4")
    ask(page, "whale " * 3000)
    wait_for_end(page)
    assert "too long for the model" in last(page, ".error")
    assert "1024" in last(page, ".error")  # in the server's own words
    ask(page, "Whale?")
    wait_for_end(page)
    assert page.locator(".error").last.is_hidden()
    assert "whale whale" not in asked_last(server)  # it has no answer
    page.route(CHATS, lambda route: route.fulfill(status=500, body="<h1>Oh</h1>"))
    ask(page, "Again?")
    wait_for_end(page)
    assert last(page, ".error") == "The server failed at this."
    page.unroute(CHATS)
    page.get_by_role("button", name="Try again").click()
    wait_for_end(page)
    assert page.locator(".error").last.is_hidden()
    assert len(answers(page)) == 3
    page.route("**", lambda route: route.abort())
    ask(page, "Still there?")
    wait_for_end(page)
    assert last(page, ".error") == "The server does not answer."
    expect(page.locator("#trouble")).to_contain_text("No figures: the server does not answer.")


@serving(request_timeout=0.5)
def test_an_answer_that_fails_on_its_way_is_kept_as_far_as_it_came(page, server, monkeypatch):
    make_endless(server, monkeypatch)
    ask(page, "Tell me everything.")
    wait_for_end(page)
    assert "longer than the server allows" in last(page, ".error")
    assert answers(page)[0]


def test_a_stream_that_breaks_off_says_so(page):
    body = 'data: {"choices": [{"index": 0, "delta": {"content": "Once"}}]}\n\ndata: {"cho'
    page.route(CHATS, lambda route: route.fulfill(content_type="text/event-stream", body=body))
    ask(page, "Tell me.")
    wait_for_end(page)
    assert answers(page) == ["Once"]
    assert last(page, ".error") == "The answer broke off: the connection was lost."


def test_nothing_that_is_said_becomes_a_part_of_the_page(page):
    delta = {"choices": [{"index": 0, "delta": {"content": SCRIPT}}]}
    body = f"data: {json.dumps(delta)}\n\ndata: {json.dumps({'error': {'message': SCRIPT}})}\n\n"
    page.route(CHATS, lambda route: route.fulfill(content_type="text/event-stream", body=body))
    figures = {"kv_format": SCRIPT}
    page.route(STATISTICS, lambda route: route.fulfill(json=figures))
    ask(page, SCRIPT)
    wait_for_end(page)
    expect(page.locator("#format")).to_have_text(SCRIPT)
    assert [last(page, s) for s in (".question p", ".text", ".error p + p")] == [SCRIPT] * 3
    page.wait_for_timeout(100)
    assert page.evaluate("window.caught") is None
    assert page.locator("main img, aside img, body script").count() == 0


def test_events_may_come_cut_anywhere(page):
    stream = ": remark\r\ndata: häß\r\ndata:lich \U0001f40b\r\n\r\n\ndata: 2\n\rdata: 3\r\rdata: 4"
    script = """async ([bytes, size]) => {
        const { eventsOf } = await import("/event_stream.js");
        const pieces = [];
        for (let i = 0; i < bytes.length; i += size) pieces.push(bytes.slice(i, i + size));
        const stream = new ReadableStream({
            pull(controller) {
                const piece = pieces.shift();
                if (piece) controller.enqueue(new Uint8Array(piece));
                else controller.close();
            },
        });
        const events = [];
        for await (const event of eventsOf(stream)) events.push(event);
        return events;
    }"""
    for size in (1, 2, 3, 7, 1000):
        events = page.evaluate(script, [list(stream.encode()), size])
        assert events == ["häß\nlich \U0001f40b", "2", "3"], size


def test_figures(page, server):
    page.route(STATISTICS, lambda route: route.fulfill(json=FIGURES))
    shown = {
        "#rate": "1,234.5",
        "#running": "2",
        "#waiting": "3",
        "#hit-rate": "83 %",
        "#blocks-in-use": "45 of 100 in use",
        "#num-body": "30",
        "#format": "int8",
        "#memory": "45 MiB of 100 MiB",
    }
    for selector, text in shown.items():
        expect(page.locator(selector)).to_have_text(text)
    bar = page.get_by_role("img", name="Blocks: 5 head, 30 body, 10 tail, 15 cached, 40 free")
    widths = bar.locator("span").evaluate_all("parts => parts.map((p) => p.offsetWidth)")
    total = sum(widths)
    assert [round(100 * width / total) for width in widths] == pytest.approx(
        [5, 30, 10, 15, 40], abs=2
    )
    assert page.locator("#sparkline polyline").count() == 1
    page.unroute(STATISTICS)
    page.route(STATISTICS, lambda route: route.fulfill(json={"requests": {"running": 7}}))
    expect(page.locator("#running")).to_have_text("7")
    for selector in ("#rate", "#hit-rate", "#num-body", "#format"):
        expect(page.locator(selector)).to_have_text("\N{EN DASH}")


def test_a_page_that_nobody_sees_asks_nothing(page):
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    show = """(is_hidden) => {
        Object.defineProperty(document, "hidden", { value: is_hidden, configurable: true });
        document.dispatchEvent(new Event("visibilitychange"));
    }"""
    page.evaluate(show, True)
    page.wait_for_timeout(50)
    asked.clear()
    page.wait_for_timeout(1500)
    assert asked == []
    with page.expect_request(STATISTICS):
        page.evaluate(show, False)


def test_it_fits_a_phone_and_names_what_can_be_pressed(page):
    page.get_by_label("Most tokens").fill("4")
    page.set_viewport_size({"width": 340, "height": 640})
    ask(page, "w" * 300)
    wait_for_end(page)
    page.locator("#settings summary").click()
    page.locator("#cache summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") == 340
    assert page.evaluate("document.documentElement.scrollHeight") == 640
    unnamed = """parts => parts.filter((p) => !(p.labels?.length || p.textContent.trim()))
        .map((p) => p.outerHTML)"""
    assert page.locator("input, select, textarea, button").evaluate_all(unnamed) == []
