"""Tokenizers: bytes, GPT-2's byte pairs through tiktoken, and custom ones: a tokenizer.json or a character map.

Training reads token ids only. A tokenizer is needed to prepare text and to print it. A dataset's manifest describes
its tokenizer by facts: name, vocab_size, eot and, for a custom one, the file in the dataset's folder and its sha256.
"""

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from runtime.errors import UserError
from runtime.files import sha256_of, write_durably

GPT2_RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
RANKS_URL = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"
RANKS_VARIABLE = "GPT2_TIKTOKEN"  # environment variable: path of a local GPT-2 ranks file
SIZES = {257: "byte", 320: "byte", 50257: "gpt2", 50304: "gpt2"}  # vocabularies, some padded to a multiple of 64
PADDING = 128  # a model must have fewer than this many ids beyond those of its tokenizer
TOKENIZER_FILE = "tokenizer.json"  # a custom tokenizer, in the folders of datasets and runs
# names of end-of-text tokens; the first one that a tokenizer file has is used
SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")


class Tokenizer(Protocol):
    """What the rest of the code needs of a tokenizer."""

    @property
    def name(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...  # number of ids, including end-of-text

    @property
    def eot(self) -> int: ...  # id that separates documents

    @property
    def stop(self) -> int | None: ...  # id that ends a generated text: eot, unless that also occurs inside documents

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


class ByteTokenizer:
    """UTF-8 bytes 0-255 and end-of-text 256."""

    name, vocab_size, eot, stop = "byte", 257, 256, 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", errors="surrogateescape"))

    def encode_array(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8", errors="surrogateescape"), dtype=np.uint8).astype(np.uint16)

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


class GPT2Tokenizer:
    """GPT-2's 50,256 byte pairs and end-of-text 50256. Special tokens in text are read as plain text."""

    name, vocab_size, eot, stop = "gpt2", 50257, 50256, 50256

    def __init__(self, ranks_file: str | None = None) -> None:
        try:
            import tiktoken
        except ImportError:
            raise UserError("the GPT-2 tokenizer needs: pip install tiktoken") from None
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
        raise UserError(
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
    """The byte pairs in a tiktoken ranks file and their ranks; UserError unless it is GPT-2's own."""
    if not path.is_file():
        raise UserError(f"GPT-2 ranks file {path}: no such file")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != GPT2_RANKS_SHA256:
        raise UserError(f"GPT-2 ranks file {path}: sha256 is {found}, GPT-2's is {GPT2_RANKS_SHA256}")
    pairs = (line.split() for line in content.splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


class CustomTokenizer:
    """A tokenizer from a user's file. Its name contains a part of the file's sha256."""

    def __init__(self, path: Path, kind: str, ids: dict[str, int], eot: str | None, usual: tuple[str, ...]) -> None:
        """ids: of all tokens. eot: the token that separates documents, by default the first of the usual ones."""
        self.path, self.sha256, self.vocab_size = path, sha256_of(path), len(ids)
        self.name = f"{kind}-{self.sha256[:12]}"
        for token, number in ids.items():
            if type(number) is not int or not 0 <= number < len(ids):
                problem = f"gives {token!r} the id {number!r}"
                raise UserError(f"{path}: {problem}; the ids of {len(ids)} tokens are 0 to {len(ids) - 1}")
        if len(set(ids.values())) < len(ids):
            raise UserError(f"{path}: gives one id to several tokens")
        found = next((token for token in ([eot] if eot is not None else usual) if token in ids), None)
        if found is None:
            problem = f"no token {eot!r}" if eot is not None else f"none of {', '.join(map(repr, usual))}"
            raise UserError(f"{path}: has {problem}; give the token that separates documents with --eot TOKEN")
        self.separator, self.eot = found, ids[found]

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def encode_array(self, text: str) -> np.ndarray:
        return np.array(self.encode(text), dtype=np.uint16)


class CharacterTokenizer(CustomTokenizer):
    """One id for each character of a map, such as nanoGPT's. A newline separates documents, unless --eot names another.

    Raises UserError, which names the character and its place, for one that is not in the map.
    """

    def __init__(self, path: Path, ids: dict[str, int], eot: str | None = None) -> None:
        if wrong := next((c for c in ids if len(c) != 1), None):
            raise UserError(f"{path}: {wrong!r} is not one character")
        super().__init__(path, "characters", ids, eot, ("\n",))
        self.ids, self.characters = ids, {number: character for character, number in ids.items()}
        self.stop = None if self.separator == "\n" else self.eot

    def encode(self, text: str) -> list[int]:
        try:
            return [self.ids[c] for c in text]
        except KeyError:
            i = next(i for i, c in enumerate(text) if c not in self.ids)
            line, column = text.count("\n", 0, i) + 1, i - text.rfind("\n", 0, i)
            what = f"character {text[i]!r} (U+{ord(text[i]):04X}) is not in the map {self.path}"
            raise UserError(f"{what}: line {line}, column {column}, after {text[max(0, i - 20) : i]!r}") from None

    def decode(self, ids: list[int]) -> str:
        return "".join(self.characters[i] for i in ids)


class FileTokenizer(CustomTokenizer):
    """A tokenizer.json of Hugging Face. Special tokens in text are read as plain text, and none are added."""

    def __init__(self, path: Path, content: str, eot: str | None = None) -> None:
        try:
            from tokenizers import Tokenizer as Encoding
        except ImportError:
            raise UserError(f"{path}: needs: pip install tokenizers") from None
        try:
            self.encoding = Encoding.from_str(content)
        except Exception as error:  # the Rust library raises no other class
            raise UserError(f"{path}: not a tokenizer.json of Hugging Face ({error})") from None
        self.encoding.no_truncation()
        self.encoding.no_padding()
        super().__init__(path, "tokenizer", self.encoding.get_vocab(with_added_tokens=True), eot, SEPARATORS)
        self.encoding.encode_special_tokens = True  # as plain text
        self.stop = self.eot

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.encoding.decode(ids, skip_special_tokens=False)


def get_tokenizer(
    name: str, ranks_file: str | None = None, eot: str | None = None
) -> "ByteTokenizer | GPT2Tokenizer | CharacterTokenizer | FileTokenizer":
    """The tokenizer called "byte" or "gpt2", or that of a file; UserError for anything else.

    eot: the token of a file that separates documents, if it is not one of the usual ones.
    """
    if name in ("byte", "gpt2"):
        if eot is not None:
            raise UserError(f"--eot {eot!r}: belongs to a tokenizer file; {name} has its own end-of-text")
        return ByteTokenizer() if name == "byte" else GPT2Tokenizer(ranks_file)
    path = Path(name, TOKENIZER_FILE) if Path(name).is_dir() else Path(name)
    if not path.is_file():
        raise UserError(f'tokenizer "{name}": must be "byte", "gpt2" or a file')
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not JSON, so no tokenizer.json and no character map; see docs/data.md") from None
    if isinstance(content, dict) and content.keys() & {"stoi", "itos"}:
        return CharacterTokenizer(path, _character_ids(content, path), eot)
    return FileTokenizer(path, text, eot)


def _character_ids(content: dict, path: Path) -> dict[str, Any]:
    """The ids of the characters of a map, from its "stoi" or, without that, its "itos"."""
    try:
        if "stoi" in content:
            return dict(content["stoi"].items())
        itos = content["itos"]
        return {str(c): int(i) for i, c in (enumerate(itos) if isinstance(itos, list) else itos.items())}
    except (AttributeError, ValueError):
        raise UserError(f'{path}: not a character map {{"stoi": {{"a": 0, ...}}}}') from None


def facts_of(tokenizer: "Tokenizer | CustomTokenizer") -> dict:
    """What a manifest says of a tokenizer."""
    facts = {"name": tokenizer.name, "vocab_size": tokenizer.vocab_size, "eot": tokenizer.eot}
    if isinstance(tokenizer, CustomTokenizer):
        facts |= {"separator": tokenizer.separator, "file": TOKENIZER_FILE, "sha256": tokenizer.sha256}
    return facts


def facts_by_size(vocab_size: int) -> dict | None:
    """What the size of a vocabulary says of its tokenizer; None if it is not that of a known one."""
    name = SIZES.get(vocab_size)
    return {"name": name, "vocab_size": {"byte": 257, "gpt2": 50257}[name]} if name else None


def tokenizer_of(facts: dict, folders: tuple[Path, ...], ranks_file: str | None = None) -> Tokenizer:
    """The tokenizer that facts describe. The file of a custom one is in one of the folders; UserError if it is not."""
    if "file" not in facts:
        return get_tokenizer(facts["name"], ranks_file)
    for path in (folder / facts["file"] for folder in folders):
        if path.is_file() and sha256_of(path) == facts["sha256"]:
            return get_tokenizer(str(path), eot=facts["separator"])
    places = " or ".join(str(folder) for folder in folders)
    raise UserError(f"tokenizer {facts['name']}: {places} has no such {facts['file']}; give it with --tokenizer FILE")


def copy_custom(facts: dict | None, source: Path, folder: Path) -> None:
    """Copy the file of a custom tokenizer, if facts name one, from a dataset to a folder."""
    if facts and "file" in facts:
        write_durably(folder / facts["file"], (source / facts["file"]).read_bytes())


def text_problem(facts: dict | None, vocab_size: int) -> str | None:
    """Why a model with this vocabulary could not read or print text; None if it can."""
    if facts is None:
        return "not recorded in the dataset; give --tokenizer FILE to eval.sample, eval.run and eval.export"
    if not facts["vocab_size"] <= vocab_size < facts["vocab_size"] + PADDING:
        ids = f"{facts['name']} has {facts['vocab_size']} ids, which do not fit vocab_size={vocab_size}"
        return f"{ids}: eval.sample, eval.run and eval.export will refuse this run"
    return None
