"""The rules of the block manager in plain Python. Knows what must happen, never how it is done.

Lists and dicts instead of tables and counts: a sequence is a list of tokens and the *stretches* of
positions that its blocks hold, and every operation is read off the rules below. They fix every
choice, so the model predicts exact block ids.

- A sequence is head | body | tail. Head and tail lie in open blocks, the body in sealed ones. As
  many body blocks are sealed as leave `min_tail` certain tokens behind them, and drafts are not
  certain. Where an open block is as large as a block (the native format), nothing is ever sealed.
- Every group of layers has blocks of its own for each sequence. What happens to all groups happens
  in their order, but for a sequence that ends: there the last group comes first.
- A step takes blocks for all its sequences and groups or none: for a group first those that it
  seals, then new open blocks, then copies, each in the order of its rows.
- Of several users of a block that is not full, all but the last that write to it in one step copy.
- Released blocks are reused first block first, the latest release first. Those that can be found by
  their content are idle instead: the pool takes them when no other is left, the longest idle first,
  and of one release the last block first.
- Ended by commit, a step lets go of the blocks of dropped drafts, then of the blocks whose tokens
  were sealed, group by group. Then, in each group, its sequences first offer their complete links
  to the cache, which keeps the first block of a content and group, but for an idle one: it is free
  then, and may no longer be found. Drafts that were kept must be known by then. Sequences that
  were swapped in or placed offer all links that they hold.
- After that the group lets go of what no later token of its sequences sees: of tokens behind the
  head, in whole blocks and whole chunks, which are sealed where blocks seal.
- A new sequence shares the longest prefix of links of which every group finds what it would still
  hold after so many tokens. At least one token is left to compute, and no more body blocks are
  shared than it would have sealed itself. The first link that is not shared is pending while a
  sequence lives that was added with it and whose first group has yet to offer it; one that was
  placed without some of that group's links never will.
- A sequence can be cut where no group is cut within a sealed block, or misses what the next token
  sees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cache
from typing import NamedTuple

ExtraKeys = tuple[object, ...]
Content = tuple[ExtraKeys, tuple[int, ...]]  # of a link: whose tokens, and all up to its end


class Shape(NamedTuple):
    """All sizes in tokens."""

    block_size: int
    open_block_size: int
    num_head: int
    min_tail: int

    @property
    def seals(self) -> bool:
        return self.block_size > self.open_block_size


class Rule(NamedTuple):
    """What the layers of a group see: the last `window` tokens, of their own chunk. None: all."""

    window: int | None = None
    chunk: int | None = None

    def sees(self, position: int, earlier: int) -> bool:
        is_near = self.window is None or position - earlier < self.window
        return is_near and (self.chunk is None or position // self.chunk == earlier // self.chunk)

    @property
    def reach(self) -> float:
        """The most tokens that one sees, itself included."""
        return min(self.window or math.inf, self.chunk or math.inf)

    def step(self, shape: Shape) -> int:
        """Tokens that are let go at once: the fewest that are whole blocks and whole chunks."""
        step = shape.block_size
        while self.chunk is not None and step % self.chunk:
            step += shape.block_size
        return step


KEEPS_ALL = Rule()


@cache
def num_unseen(rule: Rule, shape: Shape, num_tokens: int) -> int:
    """Of so many tokens those behind the head that no later one sees, in whole steps."""
    step, count = rule.step(shape), 0
    while True:
        start = shape.num_head + count
        if start + step > num_tokens:
            return count
        if any(rule.sees(num_tokens, position) for position in range(start, start + step)):
            return count
        count += step


class Stretch(NamedTuple):
    """Positions of a sequence that lie in one block, from `start` on."""

    kind: str  # "open" or "sealed"
    start: int


class Link(NamedTuple):
    """Positions whose block can be shared once it holds all of them."""

    stretch: Stretch
    end: int


@cache
def num_sealable(shape: Shape, num_tokens: int) -> int:
    """Body blocks of a sequence of which so many tokens are certain."""
    count = 0
    if shape.seals:
        unsealed = shape.num_head + shape.min_tail
        while unsealed + (count + 1) * shape.block_size <= num_tokens:
            count += 1
    return count


@cache
def layout(
    shape: Shape, num_tokens: int, num_sealed: int, num_gone: int = 0
) -> tuple[Stretch, ...]:
    """The blocks of a sequence in the order of its tokens, but for those let go behind the head."""
    stretches = []
    position = 0
    body = range(shape.num_head, shape.num_head + num_sealed * shape.block_size)
    while position < num_tokens:
        kind = "sealed" if position in body else "open"
        if position not in range(shape.num_head, shape.num_head + num_gone):
            stretches.append(Stretch(kind, position))
        position += shape.block_size if kind == "sealed" else shape.open_block_size
    return tuple(stretches)


@cache
def links(shape: Shape, num_tokens: int) -> tuple[Link, ...]:
    """The links that so many tokens complete."""
    found = []
    start = 0
    while True:
        kind = "sealed" if shape.seals and start >= shape.num_head else "open"
        end = start + (shape.block_size if kind == "sealed" else shape.open_block_size)
        if end > num_tokens:
            return tuple(found)
        found.append(Link(Stretch(kind, start), end))
        start = end


@cache
def shareable_links(shape: Shape, num_tokens: int) -> tuple[Link, ...]:
    """The links that a new sequence of so many tokens may find in the cache."""
    body_end = shape.num_head + num_sealable(shape, num_tokens) * shape.block_size
    return tuple(
        link
        for link in links(shape, num_tokens)
        if link.end < num_tokens and (link.stretch.kind == "open" or link.end <= body_end)
    )


@dataclass
class Held:
    """What a group of layers stores of a sequence."""

    blocks: dict[Stretch, int] = field(default_factory=dict)  # in the order of its tokens
    num_sealed: int = 0  # body blocks, with those let go
    num_gone: int = 0  # tokens behind the head that were let go
    num_published: int = 0  # links

    @property
    def block_ids(self) -> list[int]:
        return list(self.blocks.values())

    def ids_of(self, kind: str) -> list[int]:
        return [block_id for stretch, block_id in self.blocks.items() if stretch.kind == kind]


@dataclass
class Sequence:
    """Tokens, and where the computed ones are."""

    root: ExtraKeys
    groups: list[Held]
    tokens: list[int] = field(default_factory=list)
    histories: list[int] = field(default_factory=list)  # a number for all tokens up to each
    num_known: int = 0  # tokens that the manager was told
    num_computed: int = 0
    num_expected: int = 0  # links of its first tokens, for which others may wait

    def extend(self, tokens: list[int]) -> None:
        for token in tokens:
            before = self.histories[-1] if self.histories else hash(self.root)
            self.tokens.append(token)
            self.histories.append(hash((before, token)))

    def copy(self) -> Sequence:
        groups = [replace(held, blocks=held.blocks.copy()) for held in self.groups]
        tokens, histories = self.tokens.copy(), self.histories.copy()
        return replace(self, groups=groups, tokens=tokens, histories=histories)

    def content(self, link: Link) -> Content:
        return self.root, tuple(self.tokens[: link.end])

    @property
    def block_ids(self) -> list[int]:
        return [block_id for held in self.groups for block_id in held.block_ids]


class Wish(NamedTuple):
    """One sequence of a step: the last `num_drafts` of its `num_new` tokens may be dropped."""

    seq_id: int
    num_new: int
    num_drafts: int = 0


@dataclass
class Row:
    """What one sequence of a step takes and lets go in one group."""

    wish: Wish
    held: Held
    num_sealed: int
    sealed: list[Stretch]
    opened: list[Stretch]
    left: list[Stretch]
    copied: Stretch | None
    given: dict[Stretch, int] = field(default_factory=dict)

    @property
    def num_new_blocks(self) -> int:
        return len(self.sealed) + len(self.opened) + (self.copied is not None)


@dataclass
class GroupStep:
    """A step in one group."""

    rows: list[Row]
    new_ids: list[int] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)  # source, target

    @property
    def num_new_blocks(self) -> int:
        return sum(row.num_new_blocks for row in self.rows)

    @property
    def seal_ids(self) -> list[int]:
        return [row.given[stretch] for row in self.rows for stretch in row.sealed]

    @property
    def left_ids(self) -> list[int]:
        return [row.held.blocks[stretch] for row in self.rows for stretch in row.left]


class Step(NamedTuple):
    wishes: list[Wish]
    parts: list[GroupStep]  # one for each group


class Lengths(NamedTuple):
    """What a group stores of a sequence: the fields of `StoredLengths`."""

    num_stored: int
    num_sealed: int
    num_evicted: int


class Match(NamedTuple):
    """What the cache has of a sequence: the fields of `PrefixMatch`."""

    num_tokens: int
    num_blocks: int
    num_idle: int
    lengths: tuple[Lengths, ...]
    next_link: int | None  # by number, as the manager names it by hash
    is_pending: bool


@dataclass
class Swapped:
    sequence: Sequence
    host_ids: list[int]


class Event(NamedTuple):
    """What happened to the cache: "stored", "removed" or "cleared"."""

    kind: str
    content: Content | None = None
    block_id: int | None = None
    group: int = 0


class NoSeqIdError(Exception):
    """Every seq_id is taken."""


class ReferenceManager:
    """Sequences by seq_id, over one pool."""

    def __init__(
        self,
        shape: Shape,
        *,
        num_blocks: int,
        max_num_seqs: int,
        prefix_caching: bool,
        num_host_blocks: int,
        rules: tuple[Rule, ...] = (KEEPS_ALL,),
    ) -> None:
        self.shape = shape
        self.rules = rules
        self.prefix_caching = prefix_caching
        self.max_num_seqs = max_num_seqs
        self.num_host_blocks = num_host_blocks
        self.events: list[Event] = []
        self.num_queries = self.num_query_tokens = self.num_hit_tokens = 0
        self._begin_empty(num_blocks)

    def _begin_empty(self, num_blocks: int) -> None:
        self.sequences: dict[int, Sequence] = {}
        self.free_seq_ids = list(reversed(range(self.max_num_seqs)))
        self.ref_counts = [0] * num_blocks
        self.free = list(reversed(range(num_blocks)))  # the last is taken first
        self.idle: list[int] = []  # the first is evicted first
        self.host_free = list(reversed(range(self.num_host_blocks)))
        self.peak = 0
        self.cached: dict[tuple[Content, int], int] = {}  # by content and group
        self.content_of: dict[int, tuple[Content, int]] = {}

    def recover(self) -> None:
        """Everything is dropped; statistics and events go on."""
        self._begin_empty(len(self.ref_counts))
        if self.prefix_caching:
            self.events.append(Event("cleared"))

    def new_sequence(self, root: ExtraKeys, tokens: list[int]) -> Sequence:
        sequence = Sequence(root, [Held() for _ in self.rules], num_known=len(tokens))
        sequence.extend(tokens)
        return sequence

    # -- the pool -------------------------------------------------------------------------------

    @property
    def num_free(self) -> int:
        return len(self.free) + len(self.idle)

    def _allocate(self, count: int) -> list[int]:
        ids = []
        for _ in range(count):
            if self.free:
                ids.append(self.free.pop())
                continue
            evicted = self.idle.pop(0)
            content, group = self.content_of.pop(evicted)
            del self.cached[content, group]
            self.events.append(Event("removed", content, evicted, group))
            ids.append(evicted)
        for block_id in ids:
            self.ref_counts[block_id] = 1
        self._note_peak()
        return ids

    def _share(self, ids: list[int]) -> None:
        for block_id in ids:
            if not self.ref_counts[block_id]:
                self.idle.remove(block_id)
            self.ref_counts[block_id] += 1
        self._note_peak()

    def _note_peak(self) -> None:
        self.peak = max(self.peak, len(self.ref_counts) - self.num_free)

    def _release(self, ids: list[int]) -> None:
        for block_id in reversed(ids):
            self.ref_counts[block_id] -= 1
            if not self.ref_counts[block_id]:
                (self.idle if block_id in self.content_of else self.free).append(block_id)

    # -- sequences ------------------------------------------------------------------------------

    def find(self, sequence: Sequence) -> Match:
        num_links, hits = self._hits(sequence)
        wanted = shareable_links(self.shape, len(sequence.tokens))
        following = wanted[num_links : num_links + 1]
        block_ids = [block_id for blocks in hits for block_id in blocks.values()]
        shared = wanted[:num_links]
        num_tokens = shared[-1].end if shared else 0
        return Match(
            num_tokens=num_tokens,
            num_blocks=len(block_ids),
            num_idle=sum(not self.ref_counts[block_id] for block_id in block_ids),
            lengths=tuple(
                Lengths(
                    num_tokens - num_unseen(rule, self.shape, num_tokens),
                    sum(stretch.kind == "sealed" for stretch in blocks),
                    num_unseen(rule, self.shape, num_tokens),
                )
                for rule, blocks in zip(self.rules, hits, strict=True)
            ),
            next_link=num_links if following and self.prefix_caching else None,
            is_pending=any(
                other.groups[0].num_published <= num_links < other.num_expected
                and other.content(link) == sequence.content(link)
                for link in following
                for other in self.sequences.values()
            ),
        )

    def _hits(self, sequence: Sequence) -> tuple[int, list[dict[Stretch, int]]]:
        """The most first links that every group can serve, and its cached blocks of them."""
        wanted = shareable_links(self.shape, len(sequence.tokens)) if self.prefix_caching else ()
        for num_links in range(len(wanted), 0, -1):
            hits = [
                self._served(sequence, wanted[:num_links], group)
                for group in range(len(self.rules))
            ]
            if None not in hits:
                return num_links, [blocks for blocks in hits if blocks is not None]
        return 0, [{} for _ in self.rules]

    def _served(
        self, sequence: Sequence, shared: tuple[Link, ...], group: int
    ) -> dict[Stretch, int] | None:
        """Cached blocks of all that a group would hold of these links; None where one lacks."""
        blocks: dict[Stretch, int] = {}
        num_gone = num_unseen(self.rules[group], self.shape, shared[-1].end)
        for link in shared:
            if self._is_gone(link.stretch, num_gone):
                continue
            block_id = self.cached.get((sequence.content(link), group))
            if block_id is None:
                return None
            blocks[link.stretch] = block_id
        return blocks

    def _is_gone(self, stretch: Stretch, num_gone: int) -> bool:
        """Whether it is among so many tokens behind the head."""
        return self.shape.num_head <= stretch.start < self.shape.num_head + num_gone

    def add(self, tokens: list[int], root: ExtraKeys) -> int:
        seq_id = self._take_seq_id()
        sequence = self.sequences[seq_id] = self.new_sequence(root, tokens)
        if not self.prefix_caching:
            return seq_id
        match = self.find(sequence)
        num_links, hits = self._hits(sequence)
        for held, lengths, blocks in zip(sequence.groups, match.lengths, hits, strict=True):
            self._share(list(blocks.values()))
            held.blocks = blocks
            held.num_gone = lengths.num_evicted
            held.num_sealed = lengths.num_sealed + held.num_gone // self.shape.block_size
            held.num_published = num_links
        sequence.num_computed = match.num_tokens
        sequence.num_expected = len(shareable_links(self.shape, len(tokens)))
        self.num_queries += 1
        self.num_query_tokens += len(tokens)
        self.num_hit_tokens += match.num_tokens
        return seq_id

    def _take_seq_id(self) -> int:
        if not self.free_seq_ids:
            raise NoSeqIdError
        return self.free_seq_ids.pop()

    def append(self, seq_id: int, tokens: list[int]) -> None:
        """The manager is told more tokens; the first of them may be computed already."""
        sequence = self.sequences[seq_id]
        sequence.extend(tokens[len(sequence.tokens) - sequence.num_known :])
        sequence.num_known += len(tokens)

    def fork(self, seq_id: int) -> int:
        child = self._take_seq_id()
        parent = self.sequences[seq_id]
        self._share(parent.block_ids)
        self.sequences[child] = parent.copy()
        return child

    def remove(self, seq_id: int) -> Sequence:
        sequence = self.sequences.pop(seq_id)
        for held in reversed(sequence.groups):
            self._release(held.block_ids)
        self.free_seq_ids.append(seq_id)
        return sequence

    def can_truncate(self, seq_id: int, num_tokens: int) -> bool:
        """To so many of the tokens that it has computed."""
        for rule, held in zip(self.rules, self.sequences[seq_id].groups, strict=True):
            for stretch in held.blocks:
                end = stretch.start + self.shape.block_size
                if stretch.kind == "sealed" and stretch.start < num_tokens < end:
                    return False
            gap = range(self.shape.num_head, self.shape.num_head + held.num_gone)
            if gap and num_tokens < gap.stop:
                return False
            if any(rule.sees(num_tokens, position) for position in gap):
                return False
        return not self.prefix_caching

    def truncate(self, seq_id: int, num_tokens: int) -> None:
        sequence = self.sequences[seq_id]
        for held in sequence.groups:
            self._release([held.blocks[each] for each in held.blocks if each.start >= num_tokens])
            held.blocks = {
                stretch: block_id
                for stretch, block_id in held.blocks.items()
                if stretch.start < num_tokens
            }
            held.num_sealed = held.num_gone // self.shape.block_size if self.shape.seals else 0
            held.num_sealed += len(held.ids_of("sealed"))
        del sequence.tokens[num_tokens:], sequence.histories[num_tokens:]
        sequence.num_known = min(sequence.num_known, num_tokens)
        sequence.num_computed = num_tokens

    # -- steps ----------------------------------------------------------------------------------

    def plan_rows(self, wishes: list[Wish]) -> Step:
        """What each sequence of a step needs, whether there are blocks for it or not."""
        return Step(wishes, [self._plan_group(wishes, group) for group in range(len(self.rules))])

    def _plan_group(self, wishes: list[Wish], group: int) -> GroupStep:
        rows = []
        num_copied: dict[int, int] = {}
        for wish in wishes:
            sequence = self.sequences[wish.seq_id]
            held = sequence.groups[group]
            after = sequence.num_computed + wish.num_new
            certain = after - wish.num_drafts
            num_sealed = max(held.num_sealed, num_sealable(self.shape, certain))
            needed = layout(self.shape, after, num_sealed, held.num_gone)
            new = [stretch for stretch in needed if stretch not in held.blocks]
            row = Row(
                wish=wish,
                held=held,
                num_sealed=num_sealed,
                sealed=[stretch for stretch in new if stretch.kind == "sealed"],
                opened=[stretch for stretch in new if stretch.kind == "open"],
                left=[stretch for stretch in held.blocks if stretch not in needed],
                copied=None,
            )
            last = self._block_with_room(held, sequence.num_computed)
            if last in needed:
                block_id = held.blocks[last]
                if self.ref_counts[block_id] - num_copied.get(block_id, 0) > 1:
                    num_copied[block_id] = num_copied.get(block_id, 0) + 1
                    row.copied = last
            rows.append(row)
        return GroupStep(rows)

    def _block_with_room(self, held: Held, num_computed: int) -> Stretch | None:
        """The last block, where it is not full."""
        if not held.blocks:
            return None
        last = list(held.blocks)[-1]
        has_room = num_computed < last.start + self.shape.open_block_size
        return last if last.kind == "open" and has_room else None

    def reserve(self, wishes: list[Wish]) -> Step | None:
        step = self.plan_rows(wishes)
        num_needed = sum(part.num_new_blocks for part in step.parts)
        if num_needed > self.num_free:
            return None
        given = self._allocate(num_needed)
        for part in step.parts:
            part.new_ids, given = given[: part.num_new_blocks], given[part.num_new_blocks :]
            self._give(part)
        return step

    def _give(self, part: GroupStep) -> None:
        ids = iter(part.new_ids)
        for row in part.rows:
            row.given |= {stretch: next(ids) for stretch in row.sealed}
        for row in part.rows:
            row.given |= {stretch: next(ids) for stretch in row.opened}
        for row in part.rows:
            if row.copied is not None:
                source, row.given[row.copied] = row.held.blocks[row.copied], next(ids)
                part.copies.append((source, row.given[row.copied]))
                self.ref_counts[source] -= 1

    def rollback(self, step: Step) -> None:
        """Blocks that were evicted for the step stay forgotten."""
        for part in step.parts:
            self._release(part.new_ids)
            for source, _ in part.copies:
                self.ref_counts[source] += 1

    def commit(self, step: Step, num_kept: list[int]) -> list[int]:
        """The blocks that groups let go because no later token sees them."""
        sequences = [self.sequences[wish.seq_id] for wish in step.wishes]
        for sequence, kept in zip(sequences, num_kept, strict=True):
            sequence.num_computed += kept
        for part in step.parts:
            unused, left = [], part.left_ids
            for row, sequence in zip(part.rows, sequences, strict=True):
                held = row.held
                held.num_sealed = row.num_sealed
                blocks = held.blocks | row.given
                stays = layout(self.shape, sequence.num_computed, held.num_sealed, held.num_gone)
                unused += [blocks[stretch] for stretch in row.opened if stretch not in stays]
                held.blocks = {stretch: blocks[stretch] for stretch in stays}
            self._release(unused)
            self._release(left)
        let_go = []
        for group in range(len(self.rules)):
            for sequence in sequences:
                self._publish(sequence, group)
            gone = [
                block_id for sequence in sequences for block_id in self._let_go(sequence, group)
            ]
            self._release(gone)
            let_go += gone
        return let_go

    def _let_go(self, sequence: Sequence, group: int) -> list[int]:
        """Blocks of what no later token sees, which are the group's no more."""
        held, rule = sequence.groups[group], self.rules[group]
        num_gone = num_unseen(rule, self.shape, sequence.num_computed)
        while self.shape.seals and num_gone > held.num_sealed * self.shape.block_size:
            num_gone -= rule.step(self.shape)
        held.num_gone = max(held.num_gone, num_gone)
        gone = [stretch for stretch in held.blocks if self._is_gone(stretch, held.num_gone)]
        return [held.blocks.pop(stretch) for stretch in gone]

    def publish(self, sequence: Sequence) -> None:
        for group in range(len(self.rules)):
            self._publish(sequence, group)

    def _publish(self, sequence: Sequence, group: int) -> None:
        """Offer the complete links to the cache, as far as the group holds them."""
        if not self.prefix_caching:
            return
        held = sequence.groups[group]
        complete = links(self.shape, min(sequence.num_computed, sequence.num_known))
        for link in complete[held.num_published :]:
            block_id = held.blocks.get(link.stretch)
            is_gone = self._is_gone(link.stretch, held.num_gone)
            if block_id is None and not is_gone:  # its tokens are there, but not sealed yet
                return
            held.num_published += 1
            if block_id is None:
                continue
            name = sequence.content(link), group
            known = self.cached.get(name)
            if known in self.idle:
                assert known is not None
                self.idle.remove(known)
                self.free.append(known)
                del self.cached[name], self.content_of[known]
                self.events.append(Event("removed", name[0], known, group))
            if name not in self.cached:
                self.cached[name] = block_id
                self.content_of[block_id] = name
                self.events.append(Event("stored", name[0], block_id, group))

    # -- swap, and the cache as a whole ---------------------------------------------------------

    def swap_out(self, seq_id: int) -> Swapped | None:
        num_blocks = len(self.sequences[seq_id].block_ids)
        if not self.num_host_blocks or num_blocks > len(self.host_free):
            return None
        host_ids = [self.host_free.pop() for _ in range(num_blocks)]
        return Swapped(self.remove(seq_id), host_ids)

    def swap_in(self, swapped: Swapped) -> int | None:
        seq_id = self.place(swapped.sequence)
        if seq_id is not None:
            self.discard(swapped)
        return seq_id

    def place(self, sequence: Sequence) -> int | None:
        """A sequence computed elsewhere, in new blocks; None where blocks or seq_ids lack."""
        if len(sequence.block_ids) > self.num_free or not self.free_seq_ids:
            return None
        seq_id = self._take_seq_id()
        ids = iter(self._allocate(len(sequence.block_ids)))
        for held in sequence.groups:
            held.blocks = {stretch: next(ids) for stretch in held.blocks}
            held.num_published = 0
        sequence.num_expected = 0
        if self.prefix_caching and not sequence.groups[0].num_gone:
            sequence.num_expected = len(shareable_links(self.shape, sequence.num_known))
        self.sequences[seq_id] = sequence
        return seq_id

    def discard(self, swapped: Swapped) -> None:
        self.host_free += reversed(swapped.host_ids)

    def reset_cache(self) -> None:
        self.free += self.idle
        self.idle.clear()
        self.cached.clear()
        self.content_of.clear()
        self.events.append(Event("cleared"))
