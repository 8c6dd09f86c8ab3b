"""SIGTERM and SIGINT: the training loop saves a checkpoint before it stops."""

import contextlib
import signal

_received: list[int] = []


def interrupt(number: int, frame) -> None:
    """Signal handler outside the training loop: ends the program.

    Python drops an exception that is raised inside a library's callback; in that case the loop
    stops after its first step.
    """
    del frame
    _received.append(number)
    raise KeyboardInterrupt


@contextlib.contextmanager
def stop_signal():
    """Yields a function that tells whether SIGTERM or SIGINT has arrived.

    A second signal kills the process.
    """

    def handler(number, frame):
        del frame
        _received.append(number)
        signal.signal(number, signal.SIG_DFL)

    old = {}
    with contextlib.suppress(ValueError):  # only the main thread can install handlers
        old = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(_received)
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)
        _received.clear()
