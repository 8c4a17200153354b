"""Forwards that stop on their way, so that a layer can be changed when all batches have come to it.

Each forward runs in a thread of its own, of which one runs at a time. So every layer is seen as the changed layers
before it leave it, and all that takes no longer than one forward of each batch.

Worked example: two batches walk through Linear(3, 8), ReLU, Linear(8, 2) with a stop before the last layer. Both
forwards stop with their 8 features. Then the weights of the last layer are changed, and both go on with the new ones.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

Stop = Callable[[Any], None]
NAME = "hf_oto walk"  # of the threads


class _Ended(BaseException):
    """Ends a forward that nobody needs any more."""


class Walk:
    """One forward that stops on its way.

    Args:
        run: makes the forward. It takes the function that stops it, which returns when the walk goes on.

    Attributes:
        at: what the forward has stopped with; None before it has begun, and at its end.
    """

    def __init__(self, run: Callable[[Stop], None]) -> None:
        self.at: Any = None
        self._run = run
        self._error: BaseException | None = None
        self._is_to_end = False
        self._is_over = False
        # each thread has a current device of its own, too
        self._device = torch.accelerator.current_device_index() if torch.accelerator.is_available() else None
        self._may_go = threading.Semaphore(0)
        self._stands = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._walk, name=NAME, daemon=True)

    def go_on(self) -> None:
        """Lets the forward run to its next stop, or to its end; what it raises is raised here.

        A forward that has come to its end stays there.
        """
        if self._is_over:
            return
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._may_go.release()
        self._stands.acquire()
        if self._error is not None:
            raise self._error

    def end(self) -> None:
        """Ends a forward that stands still."""
        if self._thread.ident is None:
            return
        self._is_to_end = True
        self._may_go.release()
        self._thread.join()

    def _walk(self) -> None:
        try:
            if self._device is not None:
                torch.accelerator.set_device_index(self._device)
            torch.manual_seed(0)
            with torch.no_grad():  # each thread has a mode of its own
                self._run(self._stop)
        except _Ended:
            pass
        except BaseException as error:
            self._error = error
        self.at = None
        self._is_over = True
        self._stands.release()

    def _stop(self, what: Any) -> None:
        # others draw random numbers meanwhile, and this forward draws the same ones whatever they do
        random_state = torch.random.get_rng_state()
        self.at = what
        self._stands.release()
        self._may_go.acquire()
        self.at = None
        torch.random.set_rng_state(random_state)
        if self._is_to_end:
            raise _Ended
