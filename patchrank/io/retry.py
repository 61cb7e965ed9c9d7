"""Stores that fail for a while: what is tried again, for how long, and the message where they do not come back."""

from __future__ import annotations

import asyncio
import errno
import os
import re
from collections.abc import Callable
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_exponential, wait_random

from patchrank.io.paths import is_remote
from patchrank.utils.errors import StoreError, UserError
from patchrank.utils.progress import write_line

PATIENCE = 60.0  # seconds, over all tries of one operation
PAUSE = 0.2  # seconds after the first try; they double, up to 25 times as long
QUIET = 5.0  # seconds of waiting before a line says so
MAX_REASON = 200  # characters
ANSWERS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)  # not faults of a store
_FULL = (errno.ENOSPC, errno.EDQUOT)  # of this machine's disk
_PASSING = (ConnectionError, TimeoutError, asyncio.TimeoutError)
# of botocore and of aiohttp, which we do not import
_PASSING_NAMES = {"HTTPClientError", "ConnectionError", "ResponseParserError"}
_PASSING_NAMES |= {"ClientConnectionError", "ClientPayloadError"}
_WORDLESS = {"FSTimeoutError": "no answer in time", "TimeoutError": "no answer in time"}
_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")

T = TypeVar("T")


def patiently(place: str, act: Callable[[], T], verb: str = "read", patience: float | None = None) -> T:
    """What `act()` returns; while a remote store fails in passing, it is called again after growing pauses.

    Args:
        place: path or URL that messages name; on local paths `act` runs once, and raises what it raises.
        verb: what cannot be done, for messages.
        patience: seconds over all tries, `PATIENCE` if left out; a try that has begun by then is waited for.

    Raises:
        StoreError: the store did not come back, or said no; one line that names place and cause.
        OSError: one of `ANSWERS`, as when there is no such file; or this machine's disk is full.
    """
    if not is_remote(place):
        return act()
    patience, told = PATIENCE if patience is None else patience, False

    def tell(state: RetryCallState) -> None:
        nonlocal told
        if not told and state.seconds_since_start + state.upcoming_sleep > QUIET:
            told, why = True, reason(state.outcome.exception())
            write_line(f"{place}: {why}; trying again for up to {patience:.0f} s")

    tries = Retrying(
        retry=retry_if_exception(is_passing),
        stop=stop_after_delay(patience),
        wait=wait_exponential(multiplier=PAUSE, max=25 * PAUSE) + wait_random(0, PAUSE),
        before_sleep=tell,
        reraise=True,
    )
    try:
        return tries(act)
    except (*ANSWERS, UserError):
        raise
    except Exception as error:  # stores have errors of their own, without a common class
        if getattr(error, "errno", None) in _FULL:
            raise
        tried = f"; tried for {patience:.0f} s" if is_passing(error) else ""
        raise StoreError(f"cannot {verb} {place}: {reason(error)}{tried}") from error


def is_passing(error: BaseException) -> bool:
    """Whether a store may do better in a while: answers 5xx, 408, 409 and 429, lost connections, timeouts."""
    if isinstance(error, (*ANSWERS, PermissionError)):
        return False
    status = _status(error)
    if status is not None:
        return (status >= 500 and status != 501) or status in (408, 409, 429)
    names = {base.__name__ for base in type(error).__mro__ if base.__module__.startswith(("botocore", "aiohttp"))}
    return isinstance(error, _PASSING) or (bool(names & _PASSING_NAMES) and "SSLError" not in names)


def reason(error: BaseException) -> str:
    """What an error says, in one line without secrets."""
    text = getattr(error, "strerror", None) or str(error) or _WORDLESS.get(type(error).__name__, type(error).__name__)
    text = re.sub(r"//[^/@\s]*@", "//", " ".join(str(text).split()))  # an endpoint may have a password too
    for name in _SECRETS:
        text = text.replace(os.environ.get(name) or "\0", "***")
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
        text += "; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment"
    return (f"access denied ({text})" if isinstance(error, PermissionError) else text)[:MAX_REASON]


def _status(error: BaseException | None) -> int | None:
    """The HTTP status of an error, or of one that caused it, whatever library raised them."""
    for _ in range(4):
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        for name in ("status", "status_code", "code"):
            value = getattr(error, name, None)
            if isinstance(value, int) and 100 <= value < 600:
                return value
        error = getattr(error, "__cause__", None) or getattr(error, "__context__", None)
    return None
