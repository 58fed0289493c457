"""Turns between two threads of which exactly one runs at a time."""

import threading


class TurnsEnded(BaseException):
    """Raised in the worker when the main thread has ended the turns."""


class Turns:
    """Passes control between a main thread and a worker, so that their work has one fixed order.

    The main thread calls `give` to let the worker run until it calls `give_back` or ends. Which
    thread issues which operation therefore depends on the program alone and never on timing.
    """

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self._is_workers = False
        self._has_ended = False

    def give(self) -> bool:
        """Let the worker run, and return when it gives its turn back; called by the main thread.

        Returns whether it ran; False at once if it had ended before.
        """
        with self._lock:
            if self._has_ended:
                return False
            self._is_workers = True
            self._lock.notify_all()
            self._lock.wait_for(lambda: not self._is_workers)
            return True

    def wait(self) -> None:
        """Wait for the worker's first turn; called by the worker. Raises TurnsEnded."""
        with self._lock:
            self._wait_for_turn()

    def give_back(self) -> None:
        """Let the main thread run, and return at the worker's next turn. Raises TurnsEnded."""
        with self._lock:
            self._is_workers = False
            self._lock.notify_all()
            self._wait_for_turn()

    def leave(self) -> None:
        """Let the main thread run for good; called by the worker before it ends."""
        with self._lock:
            self._is_workers = False
            self._has_ended = True
            self._lock.notify_all()

    def end(self) -> None:
        """End the worker at its next turn; called by the main thread."""
        with self._lock:
            self._has_ended = True
            self._is_workers = True
            self._lock.notify_all()

    def _wait_for_turn(self) -> None:
        self._lock.wait_for(lambda: self._is_workers)
        if self._has_ended:
            raise TurnsEnded
