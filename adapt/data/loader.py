"""A rank's share of the stream, step by step, read ahead in the background."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count

from torch.utils.data import IterableDataset

from adapt.data.batch import Batch
from adapt.data.stream import TrainStream

AHEAD = 2
"""Steps prepared while the model works."""


class StepLoader(IterableDataset):
    """Yields `stream.step_batch(step, ...)` for step `start` and on, without end (or before step `stop`).

    For a DataLoader: `batch_size=None, num_workers=0`; a thread reads ahead.
    """

    def __init__(
        self,
        stream: TrainStream,
        rows_per_step: int,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        stride: int | None = None,
        stop: int | None = None,
    ):
        self.stream, self.start, self.stop = stream, start, stop
        self.share = {"rows_per_step": rows_per_step, "rank": rank, "world": world, "stride": stride}

    def __iter__(self) -> Iterator[Batch]:
        steps = count(self.start) if self.stop is None else iter(range(self.start, self.stop))
        waiting: deque[Future[Batch]] = deque()
        with ThreadPoolExecutor(1, thread_name_prefix="data") as pool:
            try:
                for step in steps:
                    waiting.append(pool.submit(self.stream.step_batch, step, **self.share))
                    if len(waiting) > AHEAD:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
