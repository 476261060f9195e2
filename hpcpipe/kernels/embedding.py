"""Embedding of tokens and positions.

Shapes: R rows (batch x T), T context, C width, V vocabulary.
"""

from hpcpipe.kernels.arrays import Floats, Tokens
from hpcpipe.kernels.jit import kernel


@kernel
def embedding_forward(tokens: Tokens, token_weight: Floats, position_weight: Floats, out: Floats) -> None:
    """Compute the row of each token as its embedding plus the embedding of its position.

    Parameters
    ----------
    tokens : int32 array, shape [batch, T]
        Token ids, each at least 0 and less than V; not checked.
    token_weight : array, shape [V, C]
        Embedding of each token.
    position_weight : array, shape [at least T, C]
        Embedding of each position.
    out : array, shape [R, C]
        Overwritten.
    """
    context = tokens.shape[1]
    for sample in range(tokens.shape[0]):
        for position in range(context):
            token = tokens[sample, position]
            row = sample * context + position
            for c in range(out.shape[1]):
                out[row, c] = token_weight[token, c] + position_weight[position, c]


@kernel
def embedding_backward_weight(tokens: Tokens, dout: Floats, d_token: Floats, d_position: Floats) -> None:
    """Add the rows of ``dout``, from row 0 upwards, to the gradients of their token and their position.

    Parameters
    ----------
    tokens : int32 array, shape [batch, T]
        Token ids of the forward.
    dout : array, shape [R, C]
        Gradient of the output.
    d_token : array, shape [V, C]
        Gradient of the token embedding, added to in place.
    d_position : array, shape [at least T, C]
        Gradient of the position embedding, added to in place.
    """
    context = tokens.shape[1]
    for sample in range(tokens.shape[0]):
        for position in range(context):
            token = tokens[sample, position]
            row = sample * context + position
            for c in range(dout.shape[1]):
                d_token[token, c] += dout[row, c]
            for c in range(dout.shape[1]):
                d_position[position, c] += dout[row, c]
