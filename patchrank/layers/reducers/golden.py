"""The oracle: ranks by golden scores that the caller computed for the same images (table 1, columns 3 to 7)."""

from __future__ import annotations

from patchrank.layers.reducers.base import Reducer, register_reducer


@register_reducer("golden")
class Golden(Reducer):
    needs = ("scores",)
