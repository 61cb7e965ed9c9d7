"""NumPy's and torch's numbers as plain ones, so that settings can be compared, hashed and written as JSON."""

from __future__ import annotations

from typing import Any


def plain(value: Any) -> Any:
    """A number or an array of NumPy's or torch's as plain numbers, arrays as tuples; any other value as it is.

    A number of lower precision means what it prints as: `np.float32(0.6)` is 0.6, and not 0.6000000238418579.
    """
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    library = type(value).__module__.partition(".")[0]  # neither is imported here, since both take their time
    if library == "torch" and hasattr(value, "detach"):
        value = value.detach().cpu()
        value = (value.float() if str(value.dtype) == "torch.bfloat16" else value).numpy()  # NumPy has no bfloat16
    elif library != "numpy":
        return value
    if getattr(value, "ndim", 0):
        return tuple(map(plain, value))
    number = value.item() if hasattr(value, "item") else value
    return float(str(value)) if isinstance(number, float) else number
