"""Tokenizers: bytes, which need no file, and GPT-2's byte-pair encoding through tiktoken.

Training reads token ids only. A tokenizer is needed to prepare text and to print it.
"""

import base64
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

GPT2_RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
RANKS_URL = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"
RANKS_VARIABLE = "GPT2_TIKTOKEN"  # environment variable: path of a local GPT-2 ranks file


class Tokenizer(Protocol):
    """What the rest of the code needs of a tokenizer."""

    name: str
    vocab_size: int  # number of ids, including end-of-text
    eot: int  # id that separates documents

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


class ByteTokenizer:
    """UTF-8 bytes 0-255 and end-of-text 256."""

    name, vocab_size, eot = "byte", 257, 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", errors="surrogateescape"))

    def encode_array(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8", errors="surrogateescape"), dtype=np.uint8).astype(np.uint16)

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


class GPT2Tokenizer:
    """GPT-2's 50,256 byte pairs and end-of-text 50256. Special tokens in text are read as plain text."""

    name, vocab_size, eot = "gpt2", 50257, 50256

    def __init__(self, ranks_file: str | None = None) -> None:
        try:
            import tiktoken
        except ImportError:
            raise ImportError("the GPT-2 tokenizer needs: pip install tiktoken") from None
        ranks_file = ranks_file or os.environ.get(RANKS_VARIABLE)
        if ranks_file:
            self.encoding = tiktoken.Encoding(
                "gpt2",
                explicit_n_vocab=self.vocab_size,
                pat_str=GPT2_PATTERN,
                mergeable_ranks=_read_ranks(Path(ranks_file)),
                special_tokens={"<|endoftext|>": self.eot},
            )
            return
        for name in ("gpt2", "r50k_base"):  # one vocabulary at two addresses; tiktoken may have cached either
            try:
                self.encoding = tiktoken.get_encoding(name)
                return
            except Exception as error:  # tiktoken passes on the many exceptions of its HTTP library
                reason = type(error).__name__
        raise ValueError(
            f"the GPT-2 vocabulary could not be downloaded ({reason}). On a machine with a network, run: curl -o "
            f"gpt2.tiktoken {RANKS_URL} (0.8 MB); then give --ranks gpt2.tiktoken or set {RANKS_VARIABLE}=gpt2.tiktoken"
        )

    @property
    def ranks(self) -> dict[bytes, int]:
        """The byte pairs and their ids, without end-of-text."""
        return self.encoding._mergeable_ranks

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode_ordinary(text)

    def encode_array(self, text: str) -> np.ndarray:
        return self.encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)

    def decode(self, ids: list[int]) -> str:
        return self.encoding.decode([i for i in ids if i < self.vocab_size])


# Places that no match of GPT-2's pattern crosses: between a character that is not white space and a space or line end;
# between a letter and an ASCII character that is none; between a digit and an ASCII character that is none. The pattern
# has no look-behind, and its look-ahead concerns only white space.
_SAFE_CUT = re.compile(r"\S(?=[ \n])|[A-Za-z](?=[!-@\[-`{-~])|[0-9](?=[!-/:-~])")


def pieces(text: str, size: int = 1 << 20) -> Iterator[str]:
    """Cut a text into parts of about `size` characters. Their tokens, joined, are the tokens of the whole text."""
    start = 0
    while len(text) - start > size and (cut := _SAFE_CUT.search(text, start + size)):
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:]


def _read_ranks(path: Path) -> dict[bytes, int]:
    """The byte pairs in a tiktoken ranks file and their ranks; ValueError unless it is GPT-2's own."""
    if not path.is_file():
        raise ValueError(f"GPT-2 ranks file {path}: no such file")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != GPT2_RANKS_SHA256:
        raise ValueError(f"GPT-2 ranks file {path}: sha256 is {found}, GPT-2's is {GPT2_RANKS_SHA256}")
    pairs = (line.split() for line in content.splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def get_tokenizer(name: str, ranks_file: str | None = None) -> "ByteTokenizer | GPT2Tokenizer":
    """The tokenizer called "byte" or "gpt2"; ValueError for any other name."""
    if name == "byte":
        return ByteTokenizer()
    if name == "gpt2":
        return GPT2Tokenizer(ranks_file)
    raise ValueError(f'tokenizer "{name}": must be "byte" or "gpt2"')
