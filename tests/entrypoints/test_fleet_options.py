"""What an application of Ray Serve may be told, from YAML and from a command line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from paged_kv import DEMO_MODEL, ConfigError
from paged_kv.integrations.ray_serve.options import FleetOptions, read_options

ROOT = Path(__file__).parents[2]


def test_a_command_line_says_as_much_as_yaml() -> None:
    written = {
        "model": "path",
        "num_replicas": 2,
        "kv_format": "int8",
        "num_blocks": 64,
        "prefix_caching": False,
        "request_timeout": 1.5,
        "release": 7,
        "deployment": {"graceful_shutdown_timeout_s": 5},
    }
    texts = {
        **{name: str(value) for name, value in written.items()},
        "prefix_caching": "false",
        "deployment": '{"graceful_shutdown_timeout_s": 5}',
    }
    options = read_options(written)
    assert read_options(texts) == options
    assert options.llm == {"kv_format": "int8", "num_blocks": 64, "prefix_caching": False}
    assert (options.release, options.model, options.num_replicas) == ("7", "path", 2)


def test_without_any_the_demo_model_is_served() -> None:
    options = read_options({})
    assert options.model == str(DEMO_MODEL)
    assert options.settings.model_name == str(DEMO_MODEL)
    assert read_options({"served_model_name": "12"}).settings.model_name == "12"


def test_keywords_of_an_llm_may_stand_together() -> None:
    assert read_options({"llm": {"kv_format": "int4"}, "num_blocks": 9}).llm == {
        "kv_format": "int4",
        "num_blocks": 9,
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_replicas": 0}, "num_replicas: .* 1, got 0"),
        ({"num_replicas": "two"}, "num_replicas: .*, got 'two'"),
        ({"kv_fromat": "int8"}, "kv_fromat: .*, got 'int8'"),
        ({"kv_format": "int9"}, "unknown KV format 'int9'"),
        ({"block_store_size": "zzz"}, "block_store_size must be .*'zzz'"),
        ({"prefix_caching": "maybe"}, "prefix_caching must be True or False, got 'maybe'"),
        ({"block_store": "x", "tensor_parallel_size": 2}, "block_store: a store takes"),
        ({"dtype": "int4"}, "dtype must be .*'int4'"),
        ({"llm": {"tokenizer": 1}}, "llm: .*tokenizer is no keyword of LLM"),
        ({"policy": "best"}, "policy: .*must be one of prefix, round_robin, got 'best'"),
        ({"deployment": {"num_replicas": 3}}, "deployment: .*num_replicas is not one"),
        ({"request_timeout": -1}, "request_timeout: .*, got -1"),
        (
            {"num_replicas": 2, "deployment": {"autoscaling_config": {}}},
            "num_replicas 2 and an autoscaling_config: give one of them",
        ),
    ],
)
def test_what_cannot_be_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_options(given)


def test_what_the_docs_say_is_taken() -> None:
    page = (ROOT / "docs" / "ray.md").read_text().partition("## Our own engine")[2]
    written = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (application,) = yaml.safe_load(written[0])["applications"]
    options = read_options(application["args"])
    assert (options.served_model_name, options.llm["kv_format"]) == ("chat", "int8")
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", page, re.MULTILINE)
    told = {name for row in rows for name in re.findall(r"\w+", row)}
    assert told == FleetOptions.model_fields.keys() - {"llm"}
