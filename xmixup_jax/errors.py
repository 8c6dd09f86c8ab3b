"""Errors that a user can fix. The commands print them as one line, without a stack trace."""

from collections.abc import Mapping


class UserError(Exception):
    """Base class. The message says what is wrong, where, and how to fix it."""

    exit_code = 1


class ConfigError(UserError):
    """The configuration is impossible; nothing has been started."""

    exit_code = 2


class DataError(UserError):
    """A data set, an image or a weights file is missing or unreadable."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its class if there is no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def raise_all(missing: Mapping[str, str | None]) -> None:
    """Raises one DataError for all messages, if there are any.

    Args:
      missing: subject -> message; None or '' if nothing is missing.
    """
    lines = [f'{key}: {words}' for key, words in missing.items() if words]
    if lines:
        raise DataError(lines[0] if len(lines) == 1 else '\n- '.join(['missing:', *lines]))


class Interrupted(UserError):
    """The run was stopped by SIGTERM or SIGINT and is saved; the same command resumes it."""

    exit_code = 75  # EX_TEMPFAIL in sysexits.h: "try again later"


class ProcessLost(UserError):
    """Another process of the run has died; the same commands resume the run."""

    exit_code = 75


class Diverged(UserError):
    """The loss or a parameter is no longer finite."""
