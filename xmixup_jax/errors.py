"""Errors that a user can mend; `main` prints them as one line, without a stack trace."""


class UserError(Exception):
    """What is wrong, where, and what to do about it, in one message."""

    exit_code = 1


class ConfigError(UserError):
    """The configuration asks for something impossible; nothing has been started."""

    exit_code = 2


class DataError(UserError):
    """A data set, an image or a weights file is missing or unreadable."""


class Interrupted(UserError):
    """SIGTERM or SIGINT arrived; the run is saved and the same command continues it."""

    exit_code = 75  # EX_TEMPFAIL in sysexits.h: "try again later"
