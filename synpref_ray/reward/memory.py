"""Micro-batches that do not fit in memory: halved and tried again, counted.

Our choice: how much memory a batch takes hangs on the model, its attention and whatever else holds the device, so a budget in tokens is a guess that
a long prompt can prove wrong, days into a job. What did not fit is run in two halves, and these in halves again; from then on this process tries no
batch of that size any more. The replies of one prompt are not parted here, and where they do not fit alone, the job ends with the settings to
change: a pair must not vanish because a neighbour took its memory. The system's own killer (no exception, just a dead process) is another matter:
`pipeline/crashes.py`.

Training does not halve: a backward pass that failed has added part of its gradients already. It ends with the setting to lower (`explain_training`).
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from synpref_ray.errors import ConfigError

T = TypeVar("T")
CPU_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"
"""What torch says on a CPU, in a plain RuntimeError."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch could not allocate, on a GPU or a CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (isinstance(error, RuntimeError) and CPU_ALLOCATOR in str(error))


class MemoryLimit:
    """What a process has learnt about the memory of its device; `num_halved` counts the batches that did not fit."""

    def __init__(self) -> None:
        self._refused_tokens = math.inf  # the smallest batch that did not fit
        self.num_halved = 0

    def run(
        self, batches: Sequence[Sequence[int]], tokens_of: Callable[[Sequence[int]], int], run: Callable[[Sequence[int]], T]
    ) -> Iterator[tuple[Sequence[int], T]]:
        """Yield every batch, or the parts that halving made of it, in order, with what `run` returns for it.

        Args:
            batches: what to run, as numbers of the caller's.
            tokens_of: how big a batch is.

        Raises:
            ConfigError: what cannot be halved does not fit.
        """
        waiting = deque(batches)
        while waiting:  # ends: each turn yields a batch, or parts one that has at least two numbers
            batch = waiting.popleft()
            tokens = tokens_of(batch)
            if len(batch) == 1 or tokens < self._refused_tokens:
                try:
                    result = run(batch)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    if len(batch) == 1:
                        raise ConfigError(
                            f"the replies to one prompt, {tokens} tokens, do not fit in memory alone: lower max_length_tokens (what is longer is "
                            "rejected as too_long), or run with fewer models or more memory per worker"
                        ) from error
                    self._refused_tokens = min(tokens, self._refused_tokens)
                    self.num_halved += 1
                else:
                    yield batch, result
                    continue
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            middle = len(batch) // 2
            waiting.extendleft((batch[middle:], batch[:middle]))


@contextmanager
def explain_training(max_tokens_per_microbatch: int) -> Iterator[None]:
    """Turn an allocation that failed while training into the setting to change.

    Raises:
        ConfigError: in its place.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(
            f"a micro-batch of up to {max_tokens_per_microbatch} tokens does not fit in memory while training: lower max_tokens_per_microbatch "
            "(which changes results by float error alone), set gradient_checkpointing=true or raise zero_stage; the training goes on from its last "
            "checkpoint"
        ) from error
