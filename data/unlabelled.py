"""Recognizes files without a header that hold something else than uint16 tokens.

A file that is refused by mistake is worse than one that is not recognized. So each rule asks for something that tokens
of text never have, whether they are bytes, characters or GPT-2's byte pairs. Most ids of such tokens are small numbers.
"""

import numpy as np

PICKLE = "pickle, which can run code when it is read; write its tokens: array.astype(np.uint16).tofile(...)"
STARTS = {
    b"\x93NUMPY": "NumPy array with a header; write its tokens without one: np.load(...).astype(np.uint16).tofile(...)",
    b"PK\x03\x04": "zip archive; unpack it",
    b"\x1f\x8b\x08": "gzip archive; unpack it",
    b"BZh91AY&SY": "bzip2 archive; unpack it",
    b"\xfd7zXZ\0": "xz archive; unpack it",
    b"\x28\xb5\x2f\xfd": "zstd archive; unpack it",
    b"\x80\x04\x95": PICKLE,
    b"\x80\x05\x95": PICKLE,
    b"PAR1": "parquet file; prepare it: python -m data.prepare text --root FILE",
    b"\x89HDF\r\n\x1a\n": "HDF5 file; write its tokens as uint16 without a header",
    b"version https://git-lfs": "git-lfs pointer to the file; fetch the file: git lfs pull",
}
FEWEST = 64  # with fewer numbers, their kind cannot be recognized
CONTROL = np.zeros(256, dtype=bool)  # bytes that do not occur in text
CONTROL[[*range(9), 11, *range(14, 27), *range(28, 32), 127]] = True


def other_content(start: bytes, samples: np.ndarray) -> str | None:
    """What a file holds other than uint16 tokens, and what to do; None if it may hold tokens.

    start: its first bytes. samples: (places, n) uint16 from several places, each of which starts at a multiple of 4.
    """
    for magic, kind in STARTS.items():
        if start.startswith(magic):
            return f"is a {kind}"
    flat = samples.reshape(-1)
    if len(flat) and CONTROL[flat.view(np.uint8)].mean() < 0.01:
        return "holds text, not tokens; python -m data.prepare text makes tokens of it"
    if samples.shape[1] < FEWEST or not flat.any():
        return None
    again = "; write it again: np.fromfile(FILE, dtype=...).astype(np.uint16).tofile(FILE)"
    whole = samples[:, : samples.shape[1] // 4 * 4]  # numbers of up to 8 bytes
    high = {0, 0xFFFF}  # the upper halves of positive and negative 32-bit integers
    if any(high.issuperset(np.unique(whole[:, parity::2])) for parity in (0, 1)):  # in either byte order
        return f"holds wider integers than uint16{again}"
    with np.errstate(all="ignore"):
        for kind in ("<f8", "<f4", "<f2"):
            if _are_floats(np.ascontiguousarray(whole).view(kind).astype(np.float64), kind == "<f2"):
                return f"holds floating-point numbers{again}"
    return None


def _are_floats(x: np.ndarray, is_short: bool) -> bool:
    """Whether bytes that were read as floats are floats: then nearly all are zero or of usual size.

    is_short: the floats have 16 bits. Then ids in a narrow range look like floats of usual size, too. So the numbers
    must also be whole like ids, or have both signs, or lie between 0 and 1. Most arrays do one of these.
    """
    x = x[x != 0]
    if not len(x):
        return False
    size = np.abs(x)
    usual = np.isfinite(x).all() and np.mean((size > 1e-4) & (size < 1e5)) > 0.98
    ids = (x == np.floor(x)).all() and np.mean((size >= 1) & (size < 1024)) > 0.25
    signs = 0.2 < np.mean(x < 0) < 0.8
    fractions = (x > 0).all() and (x <= 1).all() and np.mean(x >= 0.5) > 0.4
    return bool(usual and (not is_short or ids or signs or fractions))
