"""An `LLM` as a stage of Ray Data: rows of requests in, the same rows with their results out.

Knows tables and an LLM, never files: Ray reads and writes, and goes on where a job was cut off.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from ..engine.sampling_params import SamplingParams
from ..entrypoints.batch_job import result_body
from ..entrypoints.llm import LLM
from ..entrypoints.request_lines import ECHOED_FIELDS, SAMPLING_FIELDS, Line, prepare
from ..errors import ConfigError, GenerationError, InvalidRequestError, PagedKVError

REQUEST_FIELDS: Final = {*SAMPLING_FIELDS, *ECHOED_FIELDS} - {"id"}
RESULTS: Final = {"text": "string", "finish_reason": "string", "num_tokens": "int64"}
COLUMNS: Final = {**RESULTS, "error": "string"}


class LLMStage:
    """For `Dataset.map_batches`: each row is a request, and is given its result.

        dataset.map_batches(
            LLMStage, fn_constructor_args=["path/to/model"],
            fn_constructor_kwargs={"kv_format": "int2"}, batch_format="pyarrow", batch_size=256,
            compute=ray.data.ActorPoolStrategy(size=2), num_cpus=2,
        )

    A row has `prompt` or `messages`, and may have any field of `SamplingParams` that a line of
    `paged-kv generate --input` may have; null is as if it were not there, and other columns stay
    as they are. It gets `text`, `finish_reason` and `num_tokens`, or else an `error`: a request
    that is wrong, or fails, disturbs no other.
    """

    def __init__(self, model: str, defaults: SamplingParams | None = None, **options: Any) -> None:
        """`defaults` are for what rows do not say; `options` are those of `LLM`."""
        self.defaults: Final = defaults or SamplingParams()
        self.llm: Final = LLM(model, **options)

    def __call__(self, table: Any) -> Any:
        """A `pyarrow.Table` with the columns of results behind its own."""
        if not hasattr(table, "append_column"):
            kind = type(table).__name__
            raise ConfigError(f'LLMStage takes tables, got {kind}: batch_format="pyarrow"')
        taken = sorted(COLUMNS.keys() & set(table.column_names))
        if taken:
            raise ConfigError(f"the dataset has a column {taken[0]!r}, which results are to have")
        import pyarrow

        results = self.serve(table.to_pylist())
        for name, kind in COLUMNS.items():
            values = [result.get(name) for result in results]
            table = table.append_column(name, pyarrow.array(values, pyarrow.type_for_alias(kind)))
        return table

    def serve(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The result of each row, in their order."""
        results: list[dict[str, Any]] = [{} for _ in rows]
        served, prompts, params = [], [], []
        for index, row in enumerate(rows):
            try:
                token_ids, one = prepare(self.llm, line_of(row), self.defaults)
                if one.num_samples != 1 or one.logprobs is not None or one.prompt_logprobs:
                    raise InvalidRequestError("a row gets one text: no n, best_of or logprobs")
            except PagedKVError as error:
                results[index] = {"error": str(error)}
                continue
            served.append(index)
            prompts.append(token_ids)
            params.append(one)
        try:
            outputs = self.llm.generate(prompts, params, show_progress=False) if served else []
        except GenerationError as error:
            outputs = list(error.outputs)  # type: ignore[arg-type]
        for index, output in zip(served, outputs, strict=True):
            results[index] = result_body(output)
        return results


def line_of(row: dict[str, Any]) -> Line:
    """The request in a row of a table, where a field that a row does not have is null."""
    record = {name: present(value) for name, value in row.items() if name in REQUEST_FIELDS}
    record = {name: value for name, value in record.items() if value is not None}
    has_one = ("prompt" in record) != ("messages" in record)
    return Line(0, record, None if has_one else 'a row needs either "prompt" or "messages"')


def present(value: Any) -> Any:
    """Without fields that only other rows have; what a message says may be null."""
    if isinstance(value, list):
        return [present(one) for one in value]
    if isinstance(value, dict):
        return {
            name: present(one)
            for name, one in value.items()
            if one is not None or name == "content"
        }
    return value
