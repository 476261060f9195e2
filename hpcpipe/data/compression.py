"""What general-purpose compressors reach, to stand beside a model's bits per byte."""

import gzip
import lzma


def baseline(raw: bytes) -> dict[str, float]:
    """Compress bytes with gzip -9 and xz -9.

    Parameters
    ----------
    raw : bytes
        The text.

    Returns
    -------
    dict
        ``gzip`` and ``xz``: bits of compressed file per byte of text; 0.0 for empty text.
    """
    if not raw:
        return {"gzip": 0.0, "xz": 0.0}
    return {
        "gzip": 8.0 * len(gzip.compress(raw, compresslevel=9, mtime=0)) / len(raw),
        "xz": 8.0 * len(lzma.compress(raw, preset=9)) / len(raw),
    }
