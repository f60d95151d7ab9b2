"""A PTX module as instructions with operands. Knows syntax, never what an instruction does."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from tests.support.ptx.errors import PtxError

SKIPPED: Final = (".loc", ".file", ".version", ".target", ".address_size")
TOKEN: Final = re.compile(
    r"\s*(?:([{}])|([$\w]+):(?!:)|([^;{}]*(?:\{[^{}]*\}[^;{}]*)*;))", re.DOTALL
)
Scopes = list[dict[str, str]]


class Address(NamedTuple):
    """What is in square brackets: a register or a parameter, and bytes from there."""

    base: str
    offset: int


class Pair(NamedTuple):
    """Two destinations with a bar between them."""

    first: Any
    second: Any


@dataclass
class Instr:
    """Operands are words, lists of them, `Address`es or `Pair`s."""

    op: str
    args: list[Any]
    pred: str | None
    negated: bool
    text: str


@dataclass
class Program:
    name: str
    parameters: list[str]
    threads: int  # of a CTA
    instrs: list[Instr]
    labels: dict[str, int]  # the instruction that comes next
    registers: dict[str, int]  # bits by name, 1 for predicates
    symbols: dict[str, int]  # places in shared memory


def parse(ptx: str) -> Program:
    """The one entry function of a module, its registers renamed so that scopes do not matter."""
    lines = (line.split("//")[0].strip() for line in ptx.split("\n"))
    text = "\n".join(line for line in lines if line and not line.startswith(SKIPPED))
    if re.search(r"\.func\b", text):
        raise PtxError("functions are not implemented")
    head = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)(.*?)\{", text, re.DOTALL)
    threads = head and re.search(r"\.(?:req|max)ntid\s+(\d+)", head[3])
    if not head or not threads:
        raise PtxError("no entry function with a number of threads")
    program = Program(
        name=head[1],
        parameters=[parameter.split()[-1] for parameter in split_top(head[2])],
        threads=int(threads[1]),
        instrs=[],
        labels={},
        registers={},
        symbols=dict.fromkeys(re.findall(r"\.extern \.shared[^;]*?(\w+)\[\];", text), 0),
    )
    parse_body(text[head.end() :], program)
    return program


def parse_body(body: str, program: Program) -> None:
    scopes: Scopes = [{}]
    num_scopes = position = 0
    while scopes:
        match = TOKEN.match(body, position)
        if not match:
            raise PtxError(f"cannot parse: {body[position : position + 80]!r}")
        position = match.end()
        if match[1] == "{":
            num_scopes += 1
            scopes.append({})
        elif match[1] == "}":
            scopes.pop()
        elif match[2]:
            program.labels[match[2]] = len(program.instrs)
        else:
            statement = " ".join(match[3][:-1].split())
            if statement.startswith(".reg"):
                suffix = f"@{num_scopes}" if len(scopes) > 1 else ""
                declare(statement, program.registers, scopes[-1], suffix)
            elif statement.startswith(".") and not statement.startswith(".pragma"):
                raise PtxError(f"directive is not implemented: {statement}")
            elif statement and not statement.startswith("."):
                program.instrs.append(parse_instr(statement, scopes))


def declare(statement: str, registers: dict[str, int], scope: dict[str, str], suffix: str) -> None:
    _, kind, names = statement.split(None, 2)
    width = 1 if kind == ".pred" else int(kind.lstrip(".")[1:])
    for name in split_top(names):
        if match := re.fullmatch(r"(%\w+)<(\d+)>", name):
            registers |= {f"{match[1]}{i}": width for i in range(int(match[2]))}
        else:
            scope[name] = name + suffix
            registers[name + suffix] = width


def parse_instr(statement: str, scopes: Scopes) -> Instr:
    def renamed(name: str) -> str:
        return next((scope[name] for scope in reversed(scopes) if name in scope), name)

    def operand(word: str) -> Any:
        if word.startswith("{"):
            return [operand(part) for part in split_top(word[1:-1])]
        if word.startswith("["):
            base, *offsets = re.split(r"\s*\+\s*", word[1:-1].strip())
            return Address(renamed(base), sum(int(offset, 0) for offset in offsets))
        if "|" in word:
            return Pair(*(operand(part.strip()) for part in word.split("|")))
        return renamed(word)

    text, guard = statement, ""
    if statement.startswith("@"):
        guard, statement = statement[1:].split(None, 1)
    op, _, rest = statement.partition(" ")
    predicate = renamed(guard.lstrip("!")) if guard else None
    args = [operand(word) for word in split_top(rest)]
    return Instr(op, args, predicate, guard.startswith("!"), text)


def split_top(text: str) -> list[str]:
    """Split at commas outside of braces and brackets."""
    found, depth, start = [], 0, 0
    for i, char in enumerate(text):
        if char in "{[(":
            depth += 1
        elif char in "}])":
            depth -= 1
        elif char == "," and depth == 0:
            found.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*found, last] if last else found
