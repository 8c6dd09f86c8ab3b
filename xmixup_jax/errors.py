"""Errors that the user can mend; the commands print them as one line, without a stack trace."""

from collections.abc import Mapping


class UserError(Exception):
    """What is wrong, where, and what to do about it, in one message."""

    exit_code = 1


class ConfigError(UserError):
    """The configuration asks for something impossible; nothing has been started."""

    exit_code = 2


class DataError(UserError):
    """A data set, an image or a weights file is missing or unreadable."""


def first_line(error: BaseException) -> str:
    """The first line of its message, or its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def raise_all(missing: Mapping[str, str | None]) -> None:
    """Raises DataError with every message in one, if there is any.

    Args:
      missing: what each message is about, and the message, or None where nothing is missing.
    """
    lines = [f'{key}: {words}' for key, words in missing.items() if words]
    if lines:
        raise DataError(lines[0] if len(lines) == 1 else '\n- '.join(['missing:', *lines]))


class Interrupted(UserError):
    """SIGTERM or SIGINT arrived; the run is saved and the same command continues it."""

    exit_code = 75  # EX_TEMPFAIL in sysexits.h: "try again later"


class ProcessLost(UserError):
    """Another process of the run has ended; the same commands continue the run."""

    exit_code = 75


class Diverged(UserError):
    """The loss or a parameter is no longer finite."""
