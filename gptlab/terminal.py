"""Escape control characters in untrusted text."""

import logging
import re

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but newline and tab


def printable(text: str) -> str:
    r"""Show control characters, such as the one that starts terminal commands, as `\x1b` instead of obeying them."""
    return CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


class PrintableFormatter(logging.Formatter):
    """For what a run logs to the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))
