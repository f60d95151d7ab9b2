"""Commands that documents show, looked at without running them.

Knows shells, pip, make and our own parsers: ours have to accept each command as it stands, extras,
targets and files have to be there. Of what belongs to others it knows names only.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Final

import pytest
from packaging.requirements import Requirement

from paged_kv.entrypoints.cli import build_parser
from paged_kv.integrations.ray_serve.options import read_options

from .documents import ROOT

SEPARATORS: Final = ("&&", "||", ";", "|")
ASSIGNMENT: Final = re.compile(r"[A-Z_a-z]+=")
OF_A_COMMAND: Final = re.compile(r"\w+=\$\((.*)\)")
# Of others, and not looked into.
OTHERS: Final = {"guidellm", "export", "mkdir", "printf", ".", "cd", "source", "tail"}


def check_commands(text: str) -> int:
    """Raise AssertionError for a command that would be refused; returns how many there are."""
    count = 0
    for line in re.sub(r"\\\n\s*", " ", re.sub(r"'[^']*'", joined, text)).splitlines():
        words = shlex.split(OF_A_COMMAND.sub(r"\1", line), comments=True)
        for command in commands_of(words):
            check(command)
            count += 1
    return count


def joined(quoted: re.Match[str]) -> str:
    """A quoted text of several lines as one line."""
    return quoted[0].replace("\n", " ")


def commands_of(words: Sequence[str]) -> list[list[str]]:
    commands: list[list[str]] = [[]]
    for word in words:
        if word in SEPARATORS:
            commands.append([])
        elif word.endswith(";"):
            commands[-1].append(word[:-1])
            commands.append([])
        else:
            commands[-1].append(word)
    return [command for command in commands if command]


def check(command: Sequence[str]) -> None:
    while command and ASSIGNMENT.match(command[0]):
        command = command[1:]
    if not command:
        return
    name, *arguments = command
    name = name.rpartition("/")[2] or name
    if ">" in arguments:
        arguments = arguments[: arguments.index(">")]
    if name not in OTHERS:
        assert name in KNOWN, f"no test knows what {name!r} is: {command}"
        KNOWN[name](arguments)


def check_paged_kv(arguments: list[str]) -> None:
    """What is accepted, asks for help, or is the name of a command and nothing more."""
    try:
        build_parser().parse_args(arguments)
    except SystemExit as error:
        if error.code and not (len(arguments) == 1 and arguments[0] in command_names()):
            pytest.fail(f"paged-kv refuses {arguments}")


def command_names() -> set[str]:
    actions = build_parser()._subparsers
    assert actions is not None
    return {name for action in actions._group_actions for name in action.choices or ()}


def check_python(arguments: list[str]) -> None:
    assert arguments, "python alone does nothing"
    if arguments[0] == "-m":
        known = find_spec(arguments[1].partition(".")[0]) or arguments[1].startswith("vllm.")
        assert known, f"no module {arguments[1]}"
        if arguments[1] == "paged_kv" and len(arguments) > 2:
            check_paged_kv(arguments[2:])
    elif arguments[0] == "-c":
        compile(arguments[1], "-c", "exec")
    else:
        assert (ROOT / arguments[0]).is_file(), f"no file {arguments[0]}"


def check_serve(arguments: list[str]) -> None:
    """An application of ours for Ray Serve, and its options."""
    action, application, *options = arguments
    module, _, function = application.partition(":")
    assert action == "run"
    assert callable(getattr(import_module(module), function)), application
    read_options(dict(option.split("=", 1) for option in options))


def check_make(arguments: list[str]) -> None:
    for target in arguments:
        if "=" not in target:
            assert target in targets(), f"no target {target}"


@cache
def targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE))


def check_pip(arguments: list[str]) -> None:
    action, *rest = arguments
    assert action in ("install", "uninstall")
    while rest:
        word = rest.pop(0)
        if word in ("-c", "-r"):
            assert (ROOT / rest.pop(0)).is_file()
        elif word == "--group":
            rest.pop(0)
        elif not word.startswith("-"):
            check_requirement(word)


def check_requirement(word: str) -> None:
    """Extras of ours have to exist; other requirements have to be ones."""
    requirement = Requirement(re.sub(r"^\.", "paged-kv", word))
    if requirement.name == "paged-kv":
        assert requirement.extras <= extras(), word


@cache
def extras() -> set[str]:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    optional = project.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    return set(re.findall(r"^([\w-]+) = \[", optional, re.MULTILINE))


def check_curl(arguments: list[str]) -> None:
    """Data are JSON that a chat or completion takes."""
    if "-d" in arguments:
        assert json.loads(arguments[arguments.index("-d") + 1])


def check_vllm(arguments: list[str]) -> None:
    """What is ours of it: the format, in JSON."""
    from paged_kv import FORMATS

    if "--additional-config" in arguments:
        ours = json.loads(arguments[arguments.index("--additional-config") + 1])["paged_kv"]
        assert ours["format"] in FORMATS


KNOWN: Final[dict[str, Callable[[list[str]], None]]] = {
    "curl": check_curl,
    "make": check_make,
    "paged-kv": check_paged_kv,
    "pip": check_pip,
    "python": check_python,
    "python3": check_python,
    "serve": check_serve,
    "vllm": check_vllm,
}
