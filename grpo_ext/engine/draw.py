"""Draw the next token of each row: the tokens that transformers' loop would draw from the same random state.

In a small model, passes over the logits are a large part of a decode step. Rows that have left the batch therefore take
part only in what the random state and the logits processors need.

Legend: B rows, R rows that are still decoded, T tokens so far, V vocabulary.
"""

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper


def draw(
    logits_RV: Tensor,
    rows_R: Tensor | None,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    *,
    temperature: float,
    do_sample: bool,
) -> tuple[Tensor, Tensor]:
    """The next token of each row, and its log-prob in nats under the full distribution at `temperature`.

    Args:
        logits_RV: logits of the rows that are still decoded.
        rows_R: which rows these are; None if they are all rows, in order.
        input_ids: all rows so far, shape (B, T).
        logits_processor: includes the temperature at which tokens are sampled.
        do_sample: whether to sample, or to take the most likely token.

    Returns:
        Tokens and log-probs, shape (B,); zeros for the other rows.
    """
    rows = len(input_ids)
    if do_sample and _only_scales(logits_processor, temperature):
        probs_RV = logits_processor(input_ids, logits_RV.float()).softmax(dim=-1)
        tokens_R = _sample(probs_RV, rows_R, rows)
        return _spread(tokens_R, rows_R, rows), _spread(_pick(probs_RV, tokens_R).log(), rows_R, rows)
    # Processors keep state per row, and some write into their input.
    if rows_R is None:
        logits_BV = logits_RV.to(torch.float32, copy=True)
    else:
        logits_BV = logits_RV.new_zeros(rows, logits_RV.size(1), dtype=torch.float32)
        logits_BV.index_copy_(0, rows_R, logits_RV.float())
    scores_BV = logits_processor(input_ids, logits_BV)
    scores_RV = scores_BV if rows_R is None else scores_BV.index_select(0, rows_R)
    tokens_R = _sample(scores_RV.softmax(dim=-1), rows_R, rows) if do_sample else scores_RV.argmax(dim=-1)
    tempered_RV = logits_RV.float() / temperature
    logps_R = _pick(tempered_RV, tokens_R) - tempered_RV.logsumexp(dim=-1)
    return _spread(tokens_R, rows_R, rows), _spread(logps_R, rows_R, rows)


def _only_scales(logits_processor: LogitsProcessorList, temperature: float) -> bool:
    """Whether tokens are sampled from the distribution whose log-probs are reported."""
    if len(logits_processor) != 1:
        return not logits_processor and temperature == 1.0
    processor = logits_processor[0]
    return type(processor) is TemperatureLogitsWarper and processor.temperature == temperature


def _sample(probs_RV: Tensor, rows_R: Tensor | None, rows: int) -> Tensor:
    """What `torch.multinomial` would draw, shape (R,), without the three passes in which it checks its input."""
    noise_BV = probs_RV.new_empty(rows, probs_RV.size(1)).exponential_()
    noise_RV = noise_BV if rows_R is None else noise_BV.index_select(0, rows_R)
    return torch.div(probs_RV, noise_RV, out=noise_RV).argmax(dim=-1)


def _pick(values_RV: Tensor, tokens_R: Tensor) -> Tensor:
    return values_RV.gather(1, tokens_R.unsqueeze(1)).squeeze(1)


def _spread(values_R: Tensor, rows_R: Tensor | None, rows: int) -> Tensor:
    """The values of all rows, shape (B,)."""
    return values_R if rows_R is None else values_R.new_zeros(rows).index_copy_(0, rows_R, values_R)
