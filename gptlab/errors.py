"""User errors: printed without traceback, exit status 2."""


class UserError(ValueError):
    """A wrong key, value, file or command; the text says what was given, what is allowed, and the fix."""


class MissingFileError(UserError, FileNotFoundError):
    """A named file or a download is missing."""


class JobError(Exception):
    """A job of a sweep failed, and has said why; the exit status of the sweep is 1."""
