"""The rules of the block manager in plain Python. Knows what must happen, never how it is done.

Lists and dicts instead of tables and counts: a sequence is a list of tokens and the *stretches* of
positions that its blocks hold, and every operation is read off the rules below. They fix every
choice, so the model predicts exact block ids.

- A sequence is head | body | tail. Head and tail lie in open blocks, the body in sealed ones. As
  many body blocks are sealed as leave `min_tail` certain tokens behind them, and drafts are not
  certain. Where an open block is as large as a block (the native format), nothing is ever sealed.
- A step takes blocks for all its sequences or none: first those that it seals, then new open
  blocks, then copies, each in the order of its rows.
- Of several users of a block that is not full, all but the last that write to it in one step copy.
- Released blocks are reused first block first, the latest release first. Those that can be found by
  their content are idle instead: the pool takes them when no other is left, the longest idle first,
  and of one release the last block first.
- Ended by commit, a step lets go of the blocks of dropped drafts, then of the blocks whose tokens
  were sealed. Then the sequences whose blocks it changed, or that reached where they would seal if
  drafts counted, offer their complete links to the cache, which keeps the first block of a content,
  but for an idle one: it is free then, and may no longer be found. Drafts that were kept must be
  known by then. So do sequences in the first step since they were
  added, forked, swapped in or placed; after the last two they offer all of their links.
- A new sequence shares the cached blocks of its first links: at least one token is left to
  compute, and no more body blocks are shared than it would have sealed itself. The first link that
  it does not find is pending while a sequence lives that was added with it and has yet to offer it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
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
def layout(shape: Shape, num_tokens: int, num_sealed: int) -> tuple[Stretch, ...]:
    """The blocks of a sequence in the order of its tokens."""
    stretches = []
    position = 0
    body = range(shape.num_head, shape.num_head + num_sealed * shape.block_size)
    while position < num_tokens:
        kind = "sealed" if position in body else "open"
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
class Sequence:
    """Tokens, and where the computed ones are."""

    root: ExtraKeys
    tokens: list[int] = field(default_factory=list)
    histories: list[int] = field(default_factory=list)  # a number for all tokens up to each
    num_known: int = 0  # tokens that the manager was told
    num_computed: int = 0
    num_sealed: int = 0
    blocks: dict[Stretch, int] = field(default_factory=dict)  # in the order of its tokens
    num_expected: int = 0  # links of its first tokens, for which others may wait
    num_published: int = 0

    def extend(self, tokens: list[int]) -> None:
        for token in tokens:
            before = self.histories[-1] if self.histories else hash(self.root)
            self.tokens.append(token)
            self.histories.append(hash((before, token)))

    def copy(self) -> Sequence:
        twin = Sequence(**vars(self))
        twin.tokens, twin.histories = self.tokens.copy(), self.histories.copy()
        twin.blocks = self.blocks.copy()
        return twin

    def content(self, link: Link) -> Content:
        return self.root, tuple(self.tokens[: link.end])

    @property
    def block_ids(self) -> list[int]:
        return list(self.blocks.values())

    def ids_of(self, kind: str) -> list[int]:
        return [block_id for stretch, block_id in self.blocks.items() if stretch.kind == kind]


class Wish(NamedTuple):
    """One sequence of a step: the last `num_drafts` of its `num_new` tokens may be dropped."""

    seq_id: int
    num_new: int
    num_drafts: int = 0


@dataclass
class Row:
    """What one sequence of a step takes and lets go."""

    wish: Wish
    sequence: Sequence
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
class Step:
    rows: list[Row]
    new_ids: list[int] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)  # source, target

    @property
    def seal_ids(self) -> list[int]:
        return [row.given[stretch] for row in self.rows for stretch in row.sealed]

    @property
    def left_ids(self) -> list[int]:
        return [row.sequence.blocks[stretch] for row in self.rows for stretch in row.left]


class Match(NamedTuple):
    """What the cache has of a sequence: the fields of `PrefixMatch`."""

    num_tokens: int
    num_blocks: int
    num_sealed: int
    num_idle: int
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
    ) -> None:
        self.shape = shape
        self.prefix_caching = prefix_caching
        self.sequences: dict[int, Sequence] = {}
        self.free_seq_ids = list(reversed(range(max_num_seqs)))
        self.ref_counts = [0] * num_blocks
        self.free = list(reversed(range(num_blocks)))  # the last is taken first
        self.idle: list[int] = []  # the first is evicted first
        self.num_host_blocks = num_host_blocks
        self.host_free = list(reversed(range(num_host_blocks)))
        self.peak = 0
        self.cached: dict[Content, int] = {}
        self.content_of: dict[int, Content] = {}
        self.events: list[Event] = []
        self.num_queries = self.num_query_tokens = self.num_hit_tokens = 0

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
            content = self.content_of.pop(evicted)
            del self.cached[content]
            self.events.append(Event("removed", content, evicted))
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
        hits = self._hits(sequence)  # none without a cache: nothing is ever stored
        wanted = shareable_links(self.shape, len(sequence.tokens))
        following = wanted[len(hits) : len(hits) + 1]
        return Match(
            num_tokens=wanted[len(hits) - 1].end if hits else 0,
            num_blocks=len(hits),
            num_sealed=sum(stretch.kind == "sealed" for stretch in hits),
            num_idle=sum(not self.ref_counts[block_id] for block_id in hits.values()),
            next_link=len(hits) if following and self.prefix_caching else None,
            is_pending=any(
                other.num_published <= len(hits) < other.num_expected
                and other.content(link) == sequence.content(link)
                for link in following
                for other in self.sequences.values()
            ),
        )

    def _hits(self, sequence: Sequence) -> dict[Stretch, int]:
        """Cached blocks of the first links, as far as there is no gap."""
        hits: dict[Stretch, int] = {}
        for link in shareable_links(self.shape, len(sequence.tokens)):
            block_id = self.cached.get(sequence.content(link))
            if block_id is None:
                break
            hits[link.stretch] = block_id
        return hits

    def add(self, tokens: list[int], root: ExtraKeys) -> int:
        seq_id = self._take_seq_id()
        sequence = Sequence(root, num_known=len(tokens))
        sequence.extend(tokens)
        self.sequences[seq_id] = sequence
        if not self.prefix_caching:
            return seq_id
        match = self.find(sequence)
        sequence.blocks = self._hits(sequence)
        self._share(sequence.block_ids)
        sequence.num_computed, sequence.num_sealed = match.num_tokens, match.num_sealed
        sequence.num_published = match.num_blocks
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
        self._release(sequence.block_ids)
        self.free_seq_ids.append(seq_id)
        return sequence

    # -- steps ----------------------------------------------------------------------------------

    def plan_rows(self, wishes: list[Wish]) -> list[Row]:
        """What each sequence of a step needs, whether there are blocks for it or not."""
        rows = []
        num_copied: dict[int, int] = {}
        for wish in wishes:
            sequence = self.sequences[wish.seq_id]
            after = sequence.num_computed + wish.num_new
            certain = after - wish.num_drafts
            num_sealed = max(sequence.num_sealed, num_sealable(self.shape, certain))
            needed = layout(self.shape, after, num_sealed)
            new = [stretch for stretch in needed if stretch not in sequence.blocks]
            row = Row(
                wish=wish,
                sequence=sequence,
                num_sealed=num_sealed,
                sealed=[stretch for stretch in new if stretch.kind == "sealed"],
                opened=[stretch for stretch in new if stretch.kind == "open"],
                left=[stretch for stretch in sequence.blocks if stretch not in needed],
                copied=None,
            )
            last = self._block_with_room(sequence)
            if last in needed:
                block_id = sequence.blocks[last]
                if self.ref_counts[block_id] - num_copied.get(block_id, 0) > 1:
                    num_copied[block_id] = num_copied.get(block_id, 0) + 1
                    row.copied = last
            rows.append(row)
        return rows

    def _block_with_room(self, sequence: Sequence) -> Stretch | None:
        """The last block, where it is not full."""
        if not sequence.blocks:
            return None
        last = list(sequence.blocks)[-1]
        has_room = sequence.num_computed < last.start + self.shape.open_block_size
        return last if last.kind == "open" and has_room else None

    def reserve(self, wishes: list[Wish]) -> Step | None:
        step = Step(self.plan_rows(wishes))
        num_needed = sum(row.num_new_blocks for row in step.rows)
        if num_needed > self.num_free:
            return None
        step.new_ids = self._allocate(num_needed)
        ids = iter(step.new_ids)
        for row in step.rows:
            row.given |= {stretch: next(ids) for stretch in row.sealed}
        for row in step.rows:
            row.given |= {stretch: next(ids) for stretch in row.opened}
        for row in step.rows:
            if row.copied is not None:
                source, row.given[row.copied] = row.sequence.blocks[row.copied], next(ids)
                step.copies.append((source, row.given[row.copied]))
                self.ref_counts[source] -= 1
        return step

    def rollback(self, step: Step) -> None:
        """Blocks that were evicted for the step stay forgotten."""
        self._release(step.new_ids)
        for source, _ in step.copies:
            self.ref_counts[source] += 1

    def commit(self, step: Step, num_kept: list[int]) -> None:
        unused, left = [], step.left_ids
        for row, kept in zip(step.rows, num_kept, strict=True):
            sequence = row.sequence
            sequence.num_computed += kept
            sequence.num_sealed = row.num_sealed
            blocks = sequence.blocks | row.given
            stays = layout(self.shape, sequence.num_computed, row.num_sealed)
            unused += [blocks[stretch] for stretch in row.opened if stretch not in stays]
            sequence.blocks = {stretch: blocks[stretch] for stretch in stays}
        self._release(unused)
        self._release(left)
        for row in step.rows:
            self.publish(row.sequence)

    def publish(self, sequence: Sequence) -> None:
        """Offer the complete links to the cache."""
        if not self.prefix_caching:
            return
        complete = links(self.shape, min(sequence.num_computed, sequence.num_known))
        for link in complete[sequence.num_published :]:
            block_id = sequence.blocks.get(link.stretch)
            if block_id is None:  # its tokens are there, but not sealed yet
                return
            content = sequence.content(link)
            sequence.num_published += 1
            known = self.cached.get(content)
            if known in self.idle:
                assert known is not None
                self.idle.remove(known)
                self.free.append(known)
                del self.cached[content], self.content_of[known]
                self.events.append(Event("removed", content, known))
            if content not in self.cached:
                self.cached[content] = block_id
                self.content_of[block_id] = content
                self.events.append(Event("stored", content, block_id))

    # -- swap, and the cache as a whole ---------------------------------------------------------

    def swap_out(self, seq_id: int) -> Swapped | None:
        num_blocks = len(self.sequences[seq_id].blocks)
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
        if len(sequence.blocks) > self.num_free or not self.free_seq_ids:
            return None
        seq_id = self._take_seq_id()
        stretches = list(sequence.blocks)
        ids = self._allocate(len(stretches))
        sequence.blocks = dict(zip(stretches, ids, strict=True))
        sequence.num_published = 0
        if self.prefix_caching:
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
