"""Which rows are siblings, and how many of them fit a budget: index algebra, no model.

In: the padded prompts and completions of a micro-batch. Out: one `Siblings` per distinct prompt, in order of first
appearance. Rows share a prompt when their unpadded prompt ids are equal, whatever reward group they belong to.

    prompts  [. a b] [. a b] [c d e] [a b .]     ->  rows (0, 1, 3) on (a, b);  row (2,) on (c, d, e)

Legend: B rows, S prompt tokens, C completion tokens.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Siblings:
    """Rows on one prompt, or on several of one length.

    Attributes:
        prompts: token ids without padding; at least one each, as many for all.
        rows: indices into the micro-batch, the longest completion first.
        lengths: completion tokens of each of these rows.
        prompt_of: of each of these rows, its index in `prompts`.
    """

    prompts: tuple[tuple[int, ...], ...]
    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    prompt_of: tuple[int, ...]

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompts[0])


def unpadded(ids_BT: Tensor, mask_BT: Tensor) -> list[tuple[int, ...]]:
    """The token ids of each row where its mask is 1, for padding on either side."""
    rows = zip(ids_BT.tolist(), mask_BT.tolist(), strict=True)
    return [tuple(token for token, kept in zip(ids, mask, strict=True) if kept) for ids, mask in rows]


def find_siblings(input_ids_BT: Tensor, attention_mask_BT: Tensor, completion_tokens: int) -> list[Siblings] | None:
    """Group the rows of TRL's concatenation [prompt | completion] by prompt.

    Args:
        input_ids_BT: token ids, shape (B, S + C).
        attention_mask_BT: 1 on tokens, 0 on padding. Prompts may be padded on either side, completions on the right;
            a row whose completion is masked away altogether has length 0.
        completion_tokens: C.

    Returns:
        One entry a distinct prompt; None where a completion has a hole in its mask or a prompt is empty, which a
        shared prompt cannot express.
    """
    split = input_ids_BT.size(1) - completion_tokens
    prompts = unpadded(input_ids_BT[:, :split], attention_mask_BT[:, :split])
    rows_of: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for row, (prompt, mask) in enumerate(zip(prompts, attention_mask_BT[:, split:].tolist(), strict=True)):
        length = sum(map(bool, mask))
        if not prompt or not all(mask[:length]):
            return None
        rows_of.setdefault(prompt, []).append((length, row))
    return [_siblings([prompt], [(*member, 0) for member in members]) for prompt, members in rows_of.items()]


def of_one_length(siblings: list[Siblings], max_rows: int | None, max_tokens: int | None) -> list[Siblings]:
    """Join groups whose prompts have the same number of tokens, which run side by side without padding.

    Args:
        max_rows, max_tokens: bounds on what is joined, counted as in `cut_rows`; a group stays whole, however large.
    """
    joined: list[list[Siblings]] = []
    for group in sorted(siblings, key=lambda group: group.prompt_tokens):
        together = [*joined[-1], group] if joined else [group]
        rows = sum(len(member.rows) for member in together)
        tokens = rows * (group.prompt_tokens + max(member.lengths[0] for member in together))
        if (
            group.prompt_tokens == together[0].prompt_tokens
            and (max_rows is None or rows <= max_rows)
            and (max_tokens is None or tokens <= max_tokens)
            and joined
        ):
            joined[-1] = together
        else:
            joined.append([group])
    return [_join(groups) for groups in joined]


def _join(groups: list[Siblings]) -> Siblings:
    prompts = [prompt for group in groups for prompt in group.prompts]
    members = [
        (length, row, prompts.index(group.prompts[i]))
        for group in groups
        for length, row, i in zip(group.lengths, group.rows, group.prompt_of, strict=True)
    ]
    return _siblings(prompts, members)


def _siblings(prompts: list[tuple[int, ...]], members: list[tuple[int, int, int]]) -> Siblings:
    """Members are (length, row, prompt)."""
    lengths, rows, prompt_of = zip(*sorted(members, key=lambda member: -member[0]), strict=True)
    return Siblings(tuple(prompts), rows, lengths, prompt_of)


def keep_together(groups_B: list[int]) -> list[int]:
    """An order of the rows in which those of a group are neighbours: groups by their first row, rows as they were.

    `[7, 3, 7, 5, 3]` -> `[0, 2, 1, 4, 3]`. Rows that were shuffled before give groups in random order.
    """
    first = {group: groups_B.index(group) for group in set(groups_B)}
    return sorted(range(len(groups_B)), key=lambda row: (first[groups_B[row]], row))


def cut_rows(
    siblings: Siblings, max_rows: int | None, max_tokens: int | None, *, with_empty: bool = False
) -> list[range]:
    """Cut the rows of a group, longest first, into chunks; each is padded to its own longest row.

    Args:
        max_rows: rows a chunk at most; None for no bound.
        max_tokens: bound on rows x (prompt + longest completion), since attention copies the prompt's states for every
            row; a chunk has one row at least. None for no bound.
        with_empty: whether rows of length 0 are in a chunk too; log-probs do not need them.

    Returns:
        Ranges into `siblings.rows`.
    """
    count = sum(length > 0 or with_empty for length in siblings.lengths)
    chunks, start = [], 0
    while start < count:
        rows = count - start if max_rows is None else min(max_rows, count - start)
        if max_tokens is not None:
            rows = min(rows, max(1, max_tokens // (siblings.prompt_tokens + siblings.lengths[start])))
        chunks.append(range(start, start + rows))
        start += rows
    return chunks
