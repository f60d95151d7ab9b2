"""Choose the next token of every sequence from its logits. Knows logits, never blocks or requests.

What the choice needs is known before the model runs, as arrays that travel to the device with the
step; all that was chosen, and what cannot be, comes back in one transfer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..cache.step_staging import StagedArray
from ..errors import InvalidRequestError, NonFiniteLogitsError, PagedKVError
from .sampling_params import SamplingParams
from .token_logprob import TokenLogprob
from .token_rules import NO_RULES, Processor, RowRules, TokenNumbers, processed

GOLDEN_GAMMA: Final = np.uint64(0x9E3779B97F4A7C15)
NUM_CANDIDATES: Final = 256  # tokens that are put in order before all are
NOT_FINITE: Final = "the model's logits are not finite"
NOTHING_LEFT: Final = "the request's options leave no token to sample"


@dataclass(eq=False, kw_only=True, slots=True)
class Draw:
    """A token to be drawn from a row of logits, and then what was drawn.

    Several draws may share a row. The rules of the request, which change the row, stand at one of
    them; what they leave of a row with `warpers` is drawn from as it is.
    """

    row: int
    params: SamplingParams
    uniform: float = 0.0  # in [0, 1): decides the token, unless that is greedy
    rules: RowRules = NO_RULES
    is_warped: bool = False  # its row, by rules that stand here or at another draw
    token_id: int = 0
    log_probability: float | None = None  # of the token by the model, where it is wanted
    likeliest: Sequence[tuple[int, float]] = ()  # tokens of the row by the model, best first
    error: PagedKVError | None = None  # why nothing can be drawn; the token is no choice then
    is_finite: bool = True  # what the model computed for the row

    @property
    def is_limited(self) -> bool:
        """Whether unlikely tokens are excluded: only then does the order of the tokens matter."""
        return not self.is_warped and self.params.limits != (0, 1.0, 0.0)

    @property
    def temperature(self) -> float:
        return 1.0 if self.is_warped else self.params.temperature or 0.0


@dataclass(eq=False, kw_only=True, slots=True)
class Shortlist:
    """The likeliest tokens of a row of logits are wanted, at least `count`; best first."""

    row: int
    count: int
    token_ids: Sequence[int] = ()
    log_probabilities: Sequence[float] = ()
    error: PagedKVError | None = None
    is_finite: bool = True  # what the model computed for the row


@dataclass(eq=False, kw_only=True, slots=True)
class Look:
    """How likely given tokens are: the i-th by row `first_row + i` of logits."""

    first_row: int
    token_ids: Sequence[int]
    count: int  # of the likeliest tokens in its place that are told with each
    logprobs: Sequence[TokenLogprob] = ()


def sampling_arrays(
    draws: Sequence[Draw], shortlists: Sequence[Shortlist] = (), looks: Sequence[Look] = ()
) -> dict[str, StagedArray]:
    """What `sample` needs on the device beside the logits; nothing where every row is greedy.

    `draw_rows` [M] rows of the draws, unless draw m is of row m; `free_rows`, `free_draws` [F] rows
    and numbers of those drawn from all tokens, and `free_numbers` [2, F] float64 their temperatures
    and uniform numbers; `limited_*` [L] likewise, with top_k (0: all), top_p and min_p as well;
    `scored_rows`, `scored_draws` [S] where log-probabilities are wanted; of all rules `biases`,
    `penalties` [2, K] rows and tokens, and `biases_numbers` [1, K], `penalties_numbers` [2, K]
    float64; `forbidden` [2, K] and `looks` [2, P] rows and tokens; `shortlist_rows` [B].
    """
    arrays: dict[str, StagedArray] = {}
    rows = [draw.row for draw in draws]
    if rows != list(range(len(rows))):
        arrays["draw_rows"] = np.array(rows)
    random = [place for place, draw in enumerate(draws) if not draw.params.is_greedy]
    limited = [place for place in random if draws[place].is_limited]
    free = [place for place in random if not draws[place].is_limited]
    scored = [place for place, draw in enumerate(draws) if draw.params.is_scored]
    for name, places in (("free", free), ("limited", limited), ("scored", scored)):
        if places:
            arrays[f"{name}_draws"] = np.array(places)
            arrays[f"{name}_rows"] = np.array([rows[place] for place in places])
    if free:
        numbers = [(draws[place].temperature, draws[place].uniform) for place in free]
        arrays["free_numbers"] = np.array(numbers, dtype=np.float64).T.copy()
    if limited:
        arrays["limited_numbers"] = np.array(
            [
                (draws[place].temperature, draws[place].uniform, *draws[place].params.limits)
                for place in limited
            ],
            dtype=np.float64,
        ).T.copy()
    ruled = [draw for draw in draws if draw.rules is not NO_RULES]
    add_numbers(arrays, "biases", [(d.row, d.rules.biases) for d in ruled if d.rules.biases])
    penalties = [(d.row, d.rules.penalties) for d in ruled if d.rules.penalties]
    add_numbers(arrays, "penalties", penalties)
    forbidden = [(draw.row, token_id) for draw in ruled for token_id in draw.rules.forbidden_ids]
    if forbidden:
        arrays["forbidden"] = np.array(forbidden).T.copy()
    if shortlists:
        arrays["shortlist_rows"] = np.array([shortlist.row for shortlist in shortlists])
    if looks:
        rows_of_looks = [look.first_row + np.arange(len(look.token_ids)) for look in looks]
        tokens = np.concatenate([look.token_ids for look in looks])
        arrays["looks"] = np.stack([np.concatenate(rows_of_looks), tokens])
    return arrays


def add_numbers(
    arrays: dict[str, StagedArray], name: str, rules: Sequence[tuple[int, TokenNumbers]]
) -> None:
    """Rows and tokens that are changed, and by which numbers, of several rows."""
    if rules:
        rows = np.repeat([row for row, _ in rules], [len(each.token_ids) for _, each in rules])
        arrays[name] = np.stack([rows, np.concatenate([each.token_ids for _, each in rules])])
        numbers = np.concatenate([each.numbers for _, each in rules], axis=1)
        arrays[f"{name}_numbers"] = numbers


class Sampling:
    """Draws and shortlists of one step, begun on the device; nobody has waited for them.

    `logits` [M, V] float32 may be changed; `inputs` are `sampling_arrays` of the same draws. One
    uniform number through the inverse of the cumulative distribution decides a token, so it depends
    on nothing but its own row, params and number.
    """

    def __init__(
        self,
        logits: Tensor,
        inputs: Mapping[str, Tensor],
        draws: Sequence[Draw],
        shortlists: Sequence[Shortlist] = (),
        looks: Sequence[Look] = (),
    ) -> None:
        self.draws: Final = draws
        self.shortlists: Final = shortlists
        self.looks: Final = looks
        self._logits, self._inputs = logits, inputs
        self._reading: ReadBack | None = None
        # [len(draws)] on the device.
        self.token_ids: Tensor = logits.new_empty(0, dtype=torch.int64)
        if draws or shortlists or looks:
            self._begin()

    def _begin(self) -> None:
        logits, inputs, draws = self._logits, self._inputs, self.draws
        self._found = {"is_not_finite": find_unusable_rows(logits)}
        if "scored_rows" in inputs:
            self._likelihoods = logits[inputs["scored_rows"]].double().log_softmax(-1)
            count = min(max(draw.params.logprobs or 0 for draw in draws), logits.shape[1])
            if count:
                likeliest = self._likelihoods.topk(count)
                self._found |= {"top_values": likeliest.values, "top_ids": likeliest.indices}
        if "looks" in inputs:
            self._found |= look_at(logits, inputs["looks"], max(look.count for look in self.looks))
        self._failures = apply_rules(logits, inputs, draws)
        if any(draw.rules.changes_logits for draw in draws):
            self._found["is_empty"] = find_unusable_rows(logits)  # few steps need a second look
        if self.shortlists:
            values, ids = find_likeliest(logits, inputs, self.shortlists)
            self._found |= {"listed_values": values, "listed_ids": ids}
        num_candidates = NUM_CANDIDATES
        if self.may_be_open:  # one more than may be kept, to see that it is excluded
            num_candidates = max(num_candidates, *(draw.params.limits[0] + 1 for draw in draws))
        self._choose(num_candidates)

    @property
    def may_be_open(self) -> bool:
        """Whether `settle` may need the logits once more, and choose other tokens."""
        return "limited_rows" in self._inputs

    def _choose(self, num_candidates: int) -> None:
        self.token_ids, is_open = choose(
            self._logits, self._inputs, len(self.draws), num_candidates
        )
        self._found |= {"token_ids": self.token_ids, "is_open": is_open}
        if "scored_draws" in self._inputs:
            chosen = self.token_ids[self._inputs["scored_draws"]][:, None]
            self._found["scores"] = self._likelihoods.gather(-1, chosen)[:, 0]
        self._reading = ReadBack(self._found)

    def settle(self) -> None:
        """Wait for what was drawn, and write it into the draws and shortlists."""
        if self._reading is None:
            return
        found = self._reading.wait()
        if found["is_open"].any():  # some row may keep more than the candidates
            self._choose(self._logits.shape[1])
            found = self._reading.wait()
        is_not_finite = found["is_not_finite"].tolist()
        is_empty = found.get("is_empty", found["is_not_finite"]).tolist()
        for draw, token_id in zip(self.draws, found["token_ids"].tolist(), strict=True):
            draw.token_id = int(token_id)
            draw.is_finite = not is_not_finite[draw.row]
            if not draw.is_finite:
                draw.error = NonFiniteLogitsError(NOT_FINITE)
            elif draw.row in self._failures:
                draw.error = self._failures[draw.row]
            elif is_empty[draw.row]:
                draw.error = NonFiniteLogitsError(NOTHING_LEFT)
        self._tell_scores(found)
        self._tell_looks(found)
        if self.shortlists:
            values = found["listed_values"].tolist()
            ids = found["listed_ids"].astype(np.int64).tolist()
            for place, shortlist in enumerate(self.shortlists):
                shortlist.log_probabilities, shortlist.token_ids = values[place], ids[place]
                shortlist.is_finite = not is_not_finite[shortlist.row]
                if not shortlist.is_finite:
                    shortlist.error = NonFiniteLogitsError(NOT_FINITE)

    def _tell_scores(self, found: Mapping[str, NDArray[np.float64]]) -> None:
        if "scores" not in found:
            return
        scored = [draw for draw in self.draws if draw.params.is_scored]
        for place, draw in enumerate(scored):
            draw.log_probability = float(found["scores"][place])
            if draw.params.logprobs:
                count = draw.params.logprobs
                ids = found["top_ids"][place, :count].astype(np.int64).tolist()
                values = found["top_values"][place, :count].tolist()
                draw.likeliest = list(zip(ids, values, strict=True))

    def _tell_looks(self, found: Mapping[str, NDArray[np.float64]]) -> None:
        start = 0
        for look in self.looks:
            end = start + len(look.token_ids)
            values = found["looked_at"][start:end].tolist()
            ids = found["looked_ids"][start:end, : look.count].astype(np.int64).tolist()
            likeliest = found["looked_values"][start:end, : look.count].tolist()
            look.logprobs = [
                TokenLogprob(token_id, value, list(zip(*others, strict=True)))
                for token_id, value, *others in zip(
                    look.token_ids, values, ids, likeliest, strict=True
                )
            ]
            start = end


class ReadBack:
    """Tensors on their way to the host, in one transfer, as float64: token ids are exact in it."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._shapes = {name: tensor.shape for name, tensor in tensors.items()}
        together = torch.cat([tensor.reshape(-1).double() for tensor in tensors.values()])
        self._arrived: torch.cuda.Event | None = None
        if together.device.type == "cuda":
            self._numbers = torch.empty(together.shape, dtype=together.dtype, pin_memory=True)
            self._numbers.copy_(together, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record(torch.cuda.current_stream(together.device))
        else:
            self._numbers = together.cpu()

    def wait(self) -> dict[str, NDArray[np.float64]]:
        """Arrays of the same names and shapes as the tensors."""
        if self._arrived is not None:
            self._arrived.synchronize()
        ends = np.cumsum([shape.numel() for shape in self._shapes.values()])
        parts = np.split(self._numbers.numpy(), ends[:-1])
        return {
            name: part.reshape(shape)
            for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }


def find_unusable_rows(logits: Tensor) -> Tensor:
    """Of logits [M, V], the rows [M] to draw nothing from: NaN, +inf, or nothing but -inf."""
    return ~logits.amax(-1).isfinite()  # NaN if any is NaN


def look_at(logits: Tensor, looks: Tensor, count: int) -> dict[str, Tensor]:
    """Log-probabilities [P] of tokens by their rows, and the `count` greatest of each with ids."""
    rows, token_ids = looks
    likelihoods = logits[rows].log_softmax(-1)
    likeliest = likelihoods.topk(min(count, logits.shape[1]))
    return {
        "looked_at": likelihoods.gather(-1, token_ids[:, None])[:, 0],
        "looked_values": likeliest.values,
        "looked_ids": likeliest.indices,
    }


def apply_rules(
    logits: Tensor, inputs: Mapping[str, Tensor], draws: Sequence[Draw]
) -> dict[int, PagedKVError]:
    """Let requests' options change their rows of logits [M, V], see `RowRules`; errors by row."""
    failures: dict[int, PagedKVError] = {}
    if "biases" in inputs:
        rows, tokens = inputs["biases"]
        logits[rows, tokens] += inputs["biases_numbers"][0].to(logits.dtype)
    if "penalties" in inputs:
        rows, tokens = inputs["penalties"]
        factors, amounts = inputs["penalties_numbers"].to(logits.dtype)
        kept = logits[rows, tokens]
        logits[rows, tokens] = torch.where(kept < 0, kept * factors, kept / factors) - amounts
    apply_functions(logits, [(draw, draw.rules.processors) for draw in draws], failures)
    if "forbidden" in inputs:
        logits.index_put_(inputs["forbidden"].unbind(), logits.new_full((), -torch.inf))
    apply_functions(logits, [(draw, draw.rules.warpers) for draw in draws], failures)
    return failures


def apply_functions(
    logits: Tensor,
    functions: Sequence[tuple[Draw, Sequence[Processor]]],
    failures: dict[int, PagedKVError],
) -> None:
    """Processors or warpers of some rows of logits [M, V]; adds the errors of those that fail."""
    for draw, processors in functions:
        if processors and draw.row not in failures:
            try:
                token_ids = draw.rules.token_ids or ()
                logits[draw.row] = processed(logits[draw.row], token_ids, processors)
            except InvalidRequestError as error:  # as a form says it that cannot be kept
                failures[draw.row] = error
            except Exception as error:  # the caller's code: it ends this request alone
                failures[draw.row] = InvalidRequestError(f"a logits processor failed: {error!r}")


def find_likeliest(
    logits: Tensor, inputs: Mapping[str, Tensor], shortlists: Sequence[Shortlist]
) -> list[Tensor]:
    """Log-probabilities and ids [B, K] of the likeliest tokens, K the greatest count asked for."""
    count = min(max(shortlist.count for shortlist in shortlists), logits.shape[1])
    return list(logits[inputs["shortlist_rows"]].log_softmax(-1).topk(count))


def choose(
    logits: Tensor, inputs: Mapping[str, Tensor], num_draws: int, num_candidates: int
) -> tuple[Tensor, Tensor]:
    """Token ids [M], and which of the limited rows [L] are left open.

    Of limited rows only `num_candidates` tokens are put in order; a token is open where more may
    have to be.
    """
    token_ids = logits.argmax(-1)
    rows = inputs.get("draw_rows")
    token_ids = token_ids[:num_draws] if rows is None else token_ids[rows]
    is_open = logits.new_empty(0)
    if "free_rows" in inputs:
        temperatures, uniforms = inputs["free_numbers"]
        scaled = scale(logits[inputs["free_rows"]], temperatures)
        token_ids[inputs["free_draws"]] = pick(scaled.softmax(-1), uniforms)
    if "limited_rows" in inputs:
        numbers = inputs["limited_numbers"]
        scaled = scale(logits[inputs["limited_rows"]], numbers[0])
        drawn, is_open = draw_likeliest(scaled, numbers[1:], num_candidates)
        token_ids[inputs["limited_draws"]] = drawn
    return token_ids, is_open


def scale(logits: Tensor, temperatures: Tensor) -> Tensor:
    """Logits [M, V] by temperature, less the maximum: so none, however small, overflows."""
    logits = logits.double()
    return (logits - logits.amax(-1, keepdim=True)) / temperatures[:, None]


def pick(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The index [M] whose part of the cumulative probabilities [M, K] a uniform number hits.

    Some index, where the probabilities are NaN.
    """
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1:]
    # Below the total even where the product is rounded up to it.
    threshold = torch.minimum(uniforms[:, None] * total, total.nextafter(torch.zeros_like(total)))
    found = torch.searchsorted(cumulative, threshold, right=True)[:, 0]
    return found.clamp_(max=probabilities.shape[1] - 1)


def draw_likeliest(scaled: Tensor, numbers: Tensor, num_candidates: int) -> tuple[Tensor, Tensor]:
    """Tokens [M] for rows of scaled logits [M, V] that exclude unlikely ones, and which are open.

    `numbers` [4, M] are the uniform numbers, top_k (0: all), top_p and min_p.
    """
    vocab_size = scaled.shape[1]
    uniforms, *limits = numbers
    top_k, top_p, min_p = (limit[:, None] for limit in limits)
    top_k = torch.where(top_k > 0, top_k, vocab_size)
    total = scaled.exp().sum(-1, keepdim=True)
    ordered, token_ids = likeliest(scaled, num_candidates)
    places = torch.arange(ordered.shape[1], device=scaled.device)
    weights = ordered.exp().masked_fill_(places >= top_k, 0.0)
    in_top_k = torch.where(top_k < vocab_size, weights.sum(-1, keepdim=True), total)
    probabilities = weights / in_top_k
    likelier = probabilities.cumsum(-1) - probabilities
    excluded = (likelier >= top_p) | (probabilities < min_p * probabilities[:, :1])
    excluded |= places >= top_k
    chosen = pick(probabilities.masked_fill(excluded, 0.0), uniforms)
    is_open = torch.zeros_like(chosen, dtype=torch.bool)
    if num_candidates < vocab_size:
        # More tokens may be kept, or kept ones equal some that are no candidates.
        lowest, is_kept = ordered[:, -1:], ~excluded & (weights > 0)
        has_equals = (scaled >= lowest).sum(-1) > num_candidates
        is_open = is_kept[:, -1] | (has_equals & (is_kept & (ordered == lowest)).any(-1))
    return token_ids.gather(-1, chosen[:, None])[:, 0], is_open


def likeliest(scaled: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` highest of each row [M, V] in order, of equal ones the first; and their ids.

    Which ones of those that equal the last are among them is chance.
    """
    if count >= scaled.shape[1]:
        return scaled.sort(dim=-1, descending=True, stable=True)
    ids = scaled.topk(count).indices.sort(dim=-1).values
    ordered, order = scaled.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    return ordered, ids.gather(-1, order)


def uniform_numbers(
    seeds: Sequence[int], sample_indices: Sequence[int], positions: Sequence[int]
) -> NDArray[np.float64]:
    """The number in [0, 1) that decides each token, from nothing but these three.

    A counter-based generator: the finalizer of SplitMix64 (Steele et al. 2014,
    doi:10.1145/2660193.2660195) over each in turn, so that neither order nor batch matters.
    """
    state = np.zeros(len(seeds), dtype=np.uint64)
    for values in (seeds, sample_indices, positions):
        state = scrambled(state + np.array(values, dtype=np.uint64) + GOLDEN_GAMMA)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def scrambled(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Every bit of the result depends on every bit given; different bits stay different."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    return bits ^ (bits >> np.uint64(31))
