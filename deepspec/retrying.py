"""What clients of HTTP servers share: the key that they send, when to ask again and how long to wait before."""

from __future__ import annotations

import os
import random
from datetime import datetime
from email.utils import parsedate_to_datetime

import httpx

KEY_VARIABLE = "DEEPSPEC_OPENAI_KEY"
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
LONGEST_RETRY_AFTER_S = 300.0


def key_header() -> dict[str, str]:
    """Return the header with the key, where the environment has one."""
    key = os.environ.get(KEY_VARIABLE)
    return {"Authorization": f"Bearer {key}"} if key else {}


def worth_retrying(response: httpx.Response) -> bool:
    """Check whether a server may do better at the next time."""
    return response.status_code == 429 or response.status_code >= 500


def wait_s(attempt: int, response: httpx.Response | None) -> float:
    """Return seconds to wait: exponential backoff with jitter, never less than the server asks."""
    backoff = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**attempt) * random.uniform(0.5, 1.5)
    return max(backoff, retry_after_s(response) if response is not None else 0.0)


def retry_after_s(response: httpx.Response) -> float:
    """Parse `Retry-After`, seconds or a date; a missing or malformed one is 0."""
    value = response.headers.get("retry-after", "").strip()
    try:
        seconds = float(value)
    except ValueError:
        try:
            at = parsedate_to_datetime(value)
        except ValueError:
            return 0.0
        seconds = (at - datetime.now(at.tzinfo)).total_seconds()
    return min(seconds, LONGEST_RETRY_AFTER_S) if seconds > 0 else 0.0


def explain(error: Exception | None) -> str:
    """Return an error in one line."""
    return " ".join(str(error).split()) or type(error).__name__
