"""What a program prints: to streams that may be missing, closed, full or broken, and without hidden characters."""

import io
import os
import re
import select
import sys
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from typing import Any

ADDRESS_USER = re.compile(r"(\w+://)[^/\s]+@")  # a name and a password in an address; it may hold an @
ADDRESS_SECRET = re.compile(r"([?&]\w*(?:token|key|secret|signature|password)\w*=)[^&\s]+", re.IGNORECASE)


def printable(text: str) -> str:
    """A text with control characters as codes, except line ends and tabs, and without secrets of addresses."""
    if not text.replace("\n", "").replace("\t", "").isprintable():
        text = text.replace("\r\n", "\n")
        text = "".join(_code(c) if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)
    return masked(text)


def masked(text: str) -> str:
    """A text in which the password, key or token of an address is ***."""
    return ADDRESS_SECRET.sub(r"\1***", ADDRESS_USER.sub(r"\1***@", text)) if "://" in text else text


def _code(character: str) -> str:
    return f"\\x{ord(character):02x}"


class _Descriptor(io.RawIOBase):
    """Writes to a file descriptor. After the first error, such as a full disk, it drops everything."""

    def __init__(self, number: int) -> None:
        self.number = number

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.number

    def isatty(self) -> bool:
        return os.isatty(self.number)

    def write(self, data: Any) -> int:
        while True:
            try:
                return os.write(self.number, data)
            except BlockingIOError:  # the reader of a pipe is slow, and the pipe does not wait by itself
                select.select([], [self.number], [])
            except OSError:
                _discard(self.number)  # libraries that write to the descriptor itself get no error either
                return len(data)


class _Console(io.TextIOWrapper):
    """A stream whose text `shown` has prepared for people."""

    def __init__(self, number: int, like: io.TextIOWrapper, shown: Callable[[str], str]) -> None:
        buffer = io.BufferedWriter(_Descriptor(number))
        every_line = like.line_buffering or like.write_through
        super().__init__(buffer, like.encoding, "backslashreplace", line_buffering=every_line)
        self.shown = shown

    def write(self, text: str) -> int:
        super().write(self.shown(text))
        return len(text)


def _discard(number: int) -> None:
    """Let a file descriptor lead to /dev/null."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, number)
    if nothing == number:
        os.set_inheritable(number, True)
    else:
        os.close(nothing)


def guard_streams() -> None:
    """Let no state of stdout and stderr change what the program does. Called at the entrance of every program.

    A missing stream becomes /dev/null, and one that fails later is dropped. Text that the encoding lacks, such as an
    é in ASCII, is printed as its code. Control characters are printed as codes on stdout; on stderr, progress bars
    need them. A stream that somebody replaced, such as a notebook, is left alone.
    """
    for name, number, shown in (("stdout", 1, printable), ("stderr", 2, masked)):
        stream = getattr(sys, name)
        if stream is None:
            with suppress(OSError):
                if not _is_open(number):  # else the next file that is opened would get this number
                    _discard(number)
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif type(stream) is io.TextIOWrapper and _number_of(stream) == number:
            setattr(sys, name, _Console(number, stream, shown))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _number_of(stream: io.TextIOWrapper) -> int | None:
    try:
        return stream.fileno()
    except OSError:  # a stream in memory has none
        return None
