"""Models that somebody else made, pruned in place: `patchrank.prune` and `patchrank.unprune`.

Their layers get a runner of ours around them, so that tokens leave on the way; all else of a model is its own, and so
are its weights and their names. Behind the layers a patch that left is a row of zeros on the full grid.
"""
