"""Tokenizers: bytes, which need no file, and GPT-2's byte-pair encoding through tiktoken.

Training reads token ids only; a tokenizer is needed to prepare text and to print it.
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
RANKS_VARIABLE = "GPT2_TIKTOKEN"  # environment variable: path of a local GPT-2 ranks file


class Tokenizer(Protocol):
    """What the rest of the code asks of a tokenizer."""

    name: str
    vocab_size: int  # number of ids, end-of-text included
    eot: int  # id that separates documents

    def encode(self, text: str) -> list[int]: ...

    def encode_array(self, text: str) -> np.ndarray: ...  # the same as (n,) uint16, without a Python object per token

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
    """GPT-2's 50,256 byte pairs and end-of-text 50256; special tokens in text are read as plain text."""

    name, vocab_size, eot = "gpt2", 50257, 50256

    def __init__(self, ranks_file: str | None = None) -> None:
        try:
            import tiktoken
        except ImportError:
            raise ImportError("the GPT-2 tokenizer needs: pip install tiktoken") from None
        ranks_file = ranks_file or os.environ.get(RANKS_VARIABLE)
        if ranks_file:
            self._encoding = tiktoken.Encoding(
                "gpt2",
                explicit_n_vocab=self.vocab_size,
                pat_str=GPT2_PATTERN,
                mergeable_ranks=_read_ranks(Path(ranks_file)),
                special_tokens={"<|endoftext|>": self.eot},
            )
            return
        try:
            self._encoding = tiktoken.get_encoding("gpt2")
        except Exception as error:  # tiktoken lets its HTTP library's many exceptions through
            raise ValueError(
                f"the GPT-2 vocabulary could not be downloaded ({type(error).__name__}). Fetch "
                "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken on a machine with a "
                f"network and name it with --ranks FILE or the variable {RANKS_VARIABLE}"
            ) from None

    @property
    def ranks(self) -> dict[bytes, int]:
        """The byte pairs and their ids, end-of-text left out."""
        return self._encoding._mergeable_ranks

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def encode_array(self, text: str) -> np.ndarray:
        return self._encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)

    def decode(self, ids: list[int]) -> str:
        return self._encoding.decode([i for i in ids if i < self.vocab_size])


def pieces(text: str, size: int = 1 << 20) -> Iterator[str]:
    """A text in parts of about `size` characters whose tokens, put together, are those of the whole.

    A cut between a character that is no white space and a space or line end is exact: GPT-2's pattern
    has no look-behind, its matches never cross such a place, and its look-ahead concerns white space only.
    """
    start = 0
    while len(text) - start > size:
        cut = _BEFORE_SPACE.search(text, start + size)
        if cut is None:
            break
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:]


_BEFORE_SPACE = re.compile(r"\S(?=[ \n])")


def _read_ranks(path: Path) -> dict[bytes, int]:
    """The byte pairs of a tiktoken ranks file and their ranks; ValueError unless it is GPT-2's own."""
    if not path.is_file():
        raise ValueError(f"GPT-2 ranks file {path}: no such file")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != GPT2_RANKS_SHA256:
        raise ValueError(f"GPT-2 ranks file {path}: sha256 is {found}, GPT-2's is {GPT2_RANKS_SHA256}")
    pairs = (line.split() for line in content.splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def get_tokenizer(name: str, ranks_file: str | None = None) -> Tokenizer:
    """The tokenizer called "byte" or "gpt2"; ValueError for any other name."""
    if name == "byte":
        return ByteTokenizer()
    if name == "gpt2":
        return GPT2Tokenizer(ranks_file)
    raise ValueError(f'tokenizer "{name}": must be "byte" or "gpt2"')
