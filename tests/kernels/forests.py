"""Random forests for the tests of attention."""

import numpy as np


def random_forest(rng, num_rows, num_tokens):
    """Subtree ends of random forests in depth-first order, some of them lone padding tokens."""
    ends = np.zeros((num_rows, num_tokens), np.int32)
    for row in range(num_rows):
        open_ends = []
        for token in range(num_tokens):
            while open_ends and open_ends[-1] == token:
                open_ends.pop()
            limit = open_ends[-1] if open_ends else num_tokens
            ends[row, token] = rng.choice([token + 1, limit, rng.integers(token + 1, limit + 1)])
            open_ends.append(ends[row, token])
    return ends


def chains(rng, num_rows, num_tokens):
    """As `random_forest`, of fewer and longer branches: blocks that nothing masks, and none."""
    ends = np.zeros((num_rows, num_tokens), np.int32)

    def grow(row, start, stop, depth):
        trunk = int(rng.integers(1, stop - start + 1)) if depth else stop - start
        ends[row, start : start + trunk] = stop
        while start + trunk < stop:
            child = int(rng.integers(1, stop - start - trunk + 1))
            grow(row, start + trunk, start + trunk + child, depth - 1)
            trunk += child

    for row in range(num_rows):
        start = 0
        while start < num_tokens:
            stop = int(rng.integers(start + 1, num_tokens + 1))
            grow(row, start, stop, depth=2)
            start = stop
    return ends


def paths(ends):
    """Token indices of every root-to-leaf sequence of one row."""
    tokens = np.arange(len(ends))
    seen = (tokens[None] <= tokens[:, None]) & (tokens[:, None] < ends[None])
    leaves = [t for t in tokens if not seen[t + 1 :, t].any()]
    return [np.flatnonzero(seen[leaf]) for leaf in leaves]
