"""Samples: windows of tokens, in random order for training and in sequence for evaluation."""

from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from hpcpipe.data.order import sample_at
from hpcpipe.data.reader import TokenRange
from hpcpipe.errors import UsageError

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]

PADDING_TARGET = -1


class Samples:
    """Training samples: windows of ``context + 1`` tokens, ``context`` apart, in an order that is computed.

    There is no state: which window a position of the run reads follows from the seed and the position alone, so any
    number of ranks read the same samples, and a restarted run goes on where it stopped.

    Parameters
    ----------
    token_range : TokenRange
        What to train on. Tokens after the last whole window are not read.
    context : int
        Tokens that the model sees at once.
    seed : int
        Key of the order.

    Attributes
    ----------
    num_samples : int
        Windows in an epoch.

    Raises
    ------
    UsageError
        Not even one window fits.
    """

    def __init__(self, token_range: TokenRange, context: int, seed: int) -> None:
        self._range = token_range
        self._context = context
        self._seed = seed
        self.num_samples = (token_range.num_tokens - 1) // context
        if self.num_samples < 1:
            raise UsageError(
                f"{token_range.file.path}: {token_range.num_tokens} training tokens in {token_range.num_documents} "
                f"documents, but one sample of context {context} needs {context + 1}; use more text, a smaller "
                f"model.context or a smaller data.validation_fraction"
            )

    def batch(self, first_global_index: int, count: int, tokens_out: Int32, targets_out: Int32) -> None:
        """Fill buffers with samples that follow each other in the run.

        Parameters
        ----------
        first_global_index : int
            Samples read before these since step 0, over all ranks.
        count : int
            Number of samples.
        tokens_out, targets_out : ndarray of int32, shape [count, context]
            Filled here, owned by the caller: tokens, and for each the token that follows it.

        Raises
        ------
        DamagedError
            The file has changed since it was written.
        ValueError
            A buffer has another shape or type.
        """
        _check_buffer("tokens_out", tokens_out, (count, self._context), np.int32)
        _check_buffer("targets_out", targets_out, (count, self._context), np.int32)
        for row in range(count):
            start = sample_at(self._seed, first_global_index + row, self.num_samples) * self._context
            window = self._range.read(start, start + self._context + 1)
            tokens_out[row] = window[:-1]
            targets_out[row] = window[1:]


class HeldOut:
    """Held-out samples in sequence: every token but the first is predicted exactly once.

    Parameters
    ----------
    token_range : TokenRange
        What to evaluate on; may be empty.
    context : int
        Tokens that the model sees at once.
    limit : int
        At most so many samples, from the beginning; 0: all.

    Attributes
    ----------
    num_samples : int
        Number of samples; the last one may be padded. 0 if there is nothing to predict.
    num_predictions : int
        Tokens that are predicted.
    """

    def __init__(self, token_range: TokenRange, context: int, limit: int) -> None:
        self._range = token_range
        self._context = context
        available = max(token_range.num_tokens - 1, 0)
        self.num_samples = -(-available // context)
        if limit > 0:
            self.num_samples = min(self.num_samples, limit)
        self.num_predictions = min(available, self.num_samples * context)

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of text among the predicted tokens: what bits per byte are divided by."""
        return int(np.count_nonzero(self._predicted() < self._range.file.separator))

    def raw_bytes(self) -> bytes:
        """Return the text that is predicted, without separators, for comparison with compressors."""
        predicted = self._predicted()
        return predicted[predicted < self._range.file.separator].astype(np.uint8).tobytes()

    def batch(self, first: int, count: int, tokens_out: Int32, targets_out: Int32, coefficients_out: Float32) -> None:
        """Fill buffers with samples that follow each other.

        Samples from ``num_samples`` on are padding throughout, so that the last batch may be filled up.

        Parameters
        ----------
        first : int
            Number of the first sample.
        count : int
            Number of samples.
        tokens_out, targets_out : ndarray of int32, shape [count, context]
            Filled here, owned by the caller. Padding: the separator in tokens, -1 in targets.
        coefficients_out : ndarray of float32, shape [count, context]
            Filled here, owned by the caller: 1 for a token that is predicted, 0 for padding.

        Raises
        ------
        DamagedError
            The file has changed since it was written.
        ValueError
            A buffer has another shape or type.
        """
        _check_buffer("tokens_out", tokens_out, (count, self._context), np.int32)
        _check_buffer("targets_out", targets_out, (count, self._context), np.int32)
        _check_buffer("coefficients_out", coefficients_out, (count, self._context), np.float32)
        tokens_out.fill(self._range.file.separator)
        targets_out.fill(PADDING_TARGET)
        coefficients_out.fill(0.0)
        for row in range(count):
            start = min((first + row) * self._context, self.num_predictions)
            length = min(self._context, self.num_predictions - start)
            if length > 0:
                window = self._range.read(start, start + length + 1)
                tokens_out[row, :length] = window[:-1]
                targets_out[row, :length] = window[1:]
                coefficients_out[row, :length] = 1.0

    def _predicted(self) -> npt.NDArray[np.uint16]:
        """All tokens that are predicted, in order."""
        if self.num_predictions == 0:
            return np.empty(0, dtype=np.uint16)
        return self._range.read(1, 1 + self.num_predictions)


def _check_buffer(name: str, buffer: npt.NDArray[Any], shape: tuple[int, int], kind: type) -> None:
    if buffer.shape != shape or buffer.dtype != kind:
        raise ValueError(f"{name} must be {kind.__name__}{list(shape)}, not {buffer.dtype}{list(buffer.shape)}")
