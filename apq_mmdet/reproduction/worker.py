"""A process for checks, so that the memory they take, on a GPU too, is free again when rows run."""

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any


@contextmanager
def own_process() -> Iterator[Callable[..., Any]]:
    """Give a function that calls a function with its arguments in the process, and passes on what it raises."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_leave_interrupts) as pool:
        try:
            yield lambda function, *args: pool.submit(function, *args).result()
        except KeyboardInterrupt:
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _leave_interrupts() -> None:
    """Let the parent alone answer Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
