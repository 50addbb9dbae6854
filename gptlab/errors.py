"""Errors that are the user's to fix: shown as their text alone, without a traceback; the exit status is 2."""


class UserError(ValueError):
    """A wrong key, value, file or command; the text says what was given, what is allowed, and the fix."""


class MissingFileError(UserError, FileNotFoundError):
    """A file that the user named, or that was to be downloaded, is not there."""


class JobError(Exception):
    """A job of a sweep failed, and has said why; the exit status of the sweep is 1."""
