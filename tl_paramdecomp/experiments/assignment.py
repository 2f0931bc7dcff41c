"""The best one-to-one assignment of rows to columns, for lining components up with features."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_paramdecomp.errors import ShapeError


def best_assignment(values: Float[Tensor, "rows columns"]) -> Int[Tensor, " rows"]:
    """A column for each row, no column twice, so that the sum of the chosen values is largest.

    The Hungarian method with shortest augmenting paths (Jonker and Volgenant 1987), rows^2 columns steps.

    Raises:
        ShapeError: There are more rows than columns.
    """
    n, m = values.shape
    if n > m:
        raise ShapeError(f"An assignment needs at least as many columns as rows; given {n} rows, {m} columns.")
    cost = -values.double().cpu()
    row_price, column_price = torch.zeros(n, dtype=cost.dtype), torch.zeros(m + 1, dtype=cost.dtype)
    taken_by = [-1] * (m + 1)  # the last column is where each path starts
    for row in range(n):
        taken_by[m], column = row, m
        shortest, before = torch.full((m,), torch.inf, dtype=cost.dtype), [m] * m
        seen = torch.zeros(m, dtype=torch.bool)
        path: list[tuple[int, int]] = []
        while taken_by[column] != -1:
            at = taken_by[column]
            path.append((at, column))
            reach = cost[at] - row_price[at] - column_price[:m]
            for j in ((reach < shortest) & ~seen).nonzero().flatten().tolist():
                before[j] = column
            shortest = torch.where(seen, shortest, torch.minimum(shortest, reach))
            column = int(shortest.masked_fill(seen, torch.inf).argmin())
            step = shortest[column].clone()
            for at, through in path:
                row_price[at] += step
                column_price[through] -= step
            shortest[~seen] -= step
            seen[column] = True
        while column != m:
            taken_by[column] = taken_by[before[column]]
            column = before[column]
    chosen = torch.empty(n, dtype=torch.long)
    for column, at in enumerate(taken_by[:m]):
        if at != -1:
            chosen[at] = column
    return chosen
