"""Token sequences of several layers in the forms that timm's `forward_intermediates` promises."""

from __future__ import annotations

from torch import Tensor

from patchrank.utils.errors import UserError, near

FORMATS = ("NCHW", "NLC")  # those that timm's vision transformer gives


def check_format(output_fmt: object) -> str:
    """The name of a format, which timm may hand over as its own enum. Raises `UserError` for any other."""
    name = getattr(output_fmt, "value", output_fmt)
    if name not in FORMATS:
        raise UserError(
            f"output_fmt must be one of {', '.join(FORMATS)}, but is {name!r}; {near(str(name).upper(), FORMATS)}"
        )
    return name


def format_intermediates(
    sequences: list[Tensor], final: Tensor | None, num_prefix: int, grid_size: tuple[int, int], output_fmt: str,
    with_prefix: bool, as_dict: bool,
):  # fmt: skip
    """Splits full-grid sequences (B, P + N, D) into maps and prefix tokens.

    Args:
        sequences: one for each layer that was asked for.
        final: the last features, or None where they are not wanted.
        num_prefix: P.
        output_fmt: "NCHW" for maps (B, D, H, W), "NLC" for (B, N, D).
        with_prefix: hand out prefix tokens beside each map.
        as_dict: a dictionary instead of tuples.
    """
    prefix = [y[:, :num_prefix] for y in sequences]
    maps = [y[:, num_prefix:] for y in sequences]
    if output_fmt == "NCHW":
        maps = [y.transpose(1, 2).unflatten(2, grid_size).contiguous() for y in maps]
    if as_dict:
        out = {"image_intermediates": maps} | ({"image_intermediates_prefix": prefix} if with_prefix else {})
        return out if final is None else out | {"image_features": final}
    maps = list(zip(maps, prefix)) if with_prefix else maps
    return maps if final is None else (final, maps)
