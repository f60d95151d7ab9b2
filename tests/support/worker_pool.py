"""Worker processes of tensor parallelism that LLMs of tests use one after the other: a start costs
seconds. Knows processes, never what they compute."""

from __future__ import annotations

from paged_kv.engine.parallel_group import WorkerProcess


class WorkerPool:
    """Stands in for `WorkerProcess.start` and `end`; a worker forgets its model when it is told of
    the next one."""

    def __init__(self) -> None:
        self.start = WorkerProcess.start  # as they are without this
        self.end = WorkerProcess.end
        self.idle: list[WorkerProcess] = []

    def take(self, num_threads: int) -> WorkerProcess:
        while self.idle:
            worker = self.idle.pop()
            if worker.process.poll() is None and not worker.connection.closed:
                return worker
        return self.start(num_threads)

    def give(self, worker: WorkerProcess) -> None:
        self.idle.append(worker)

    def close(self) -> None:
        for worker in self.idle:
            self.end(worker)
