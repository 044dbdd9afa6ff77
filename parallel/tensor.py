"""From hidden states to what a script reads: the shift to tokens, log-probabilities and entropies."""

from torch import Tensor

from kernels.linear_logprobs import linear_logprobs


def hidden_before(hidden: Tensor, token_mask: Tensor) -> Tensor:
    """Hidden state of the position before each masked token: what predicts the token, and what its value is read from.

    The one place where positions are shifted to tokens; everything else is indexed by the token it is about.

    Shapes: hidden [batch, seq_len, hidden_size], token_mask bool [batch, seq_len] -> [num_masked, hidden_size]
    Raises: ValueError if a masked token is the first of its row.
    """
    rows, positions = token_mask.nonzero(as_tuple=True)  # [num_masked] each, in row-major order
    if (positions == 0).any():
        raise ValueError("the first token of a row has no state before it and cannot carry a loss")
    return hidden[rows, positions - 1]


def vocab_parallel_logits(hidden, weight, bias, token_ids, vocab_size, temperature=1.0):
    """What a head says of each token, differentiable: its logit, log-probability and the distribution's entropy.

    Args: hidden: what the head reads. temperature: divides the logits.
    Shapes: hidden [tokens, n], weight [padded_vocab, n], bias [padded_vocab] or None, token_ids [tokens]
        -> three of [tokens], float32 or float64; log-probability and entropy in nats
    """
    largest, sum_exp, target, weighted = linear_logprobs(
        hidden, weight, token_ids, bias=bias, temperature=temperature, vocab_size=vocab_size
    )
    log_sum = sum_exp.log()
    return target, target - largest - log_sum, log_sum - weighted / sum_exp


def vocab_parallel_logprobs(hidden: Tensor, decoder, token_ids: Tensor, temperature: float = 1.0):
    """Log-probability of each token and entropy of the distribution it was drawn from, in nats, differentiable.

    Args: hidden: the states before the tokens. decoder: whose LM head is read. temperature: divides the logits.
    Shapes: hidden [tokens, hidden_size], token_ids [tokens] -> two of [tokens], float32 or float64
    """
    vocab_size = decoder.config.vocab_size
    return vocab_parallel_logits(
        hidden, decoder.lm_head_weight, decoder.lm_head_bias, token_ids, vocab_size, temperature
    )[1:]
