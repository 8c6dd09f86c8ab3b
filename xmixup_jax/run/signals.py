"""SIGTERM and SIGINT: the training loop saves a checkpoint before it stops."""

import contextlib
import signal

_received: list[int] = []


def interrupt(number: int, frame) -> None:
    """Handler of signals outside the loop: ends the program.

    Where it comes in the midst of a library's callback, Python drops what a handler raises; then
    the loop stops after its first step.
    """
    del frame
    _received.append(number)
    raise KeyboardInterrupt


@contextlib.contextmanager
def stop_signal():
    """Yields a function that says whether SIGTERM or SIGINT has arrived; a second one kills."""

    def handler(number, frame):
        del frame
        _received.append(number)
        signal.signal(number, signal.SIG_DFL)

    old = {}
    with contextlib.suppress(ValueError):  # signals belong to the main thread
        old = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(_received)
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)
        _received.clear()
