"""The one exception a user is meant to see."""


class UserError(Exception):
    """Something the user can fix: one line that says what is wrong, where, and what to do.

    Entry points print it without a traceback and exit with status 2.
    """


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
