"""What every entry point shares: its environment, and how it fails."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable

from deepspec.errors import DeepSpecError
from deepspec.progress import send

_NO_SPACE = 1 << 20  # bytes

TELEMETRY_OFF = {
    "DO_NOT_TRACK": "true",
    "DVC_NO_ANALYTICS": "1",
    "GX_ANALYTICS_ENABLED": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}


def quiet_environment() -> None:
    """Telemetry off, and no warning from tokenizers about forks."""
    os.environ.update(TELEMETRY_OFF)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def guarded(action: Callable[[], None]) -> int:
    """Run `action`; a user's mistake or a full disk becomes one line on stderr and in the channel of `progress`.

    Returns:
        The exit status: 0, 2 after such a mistake, 130 when it was interrupted.
    """
    try:
        action()
    except DeepSpecError as error:
        return _mistake(str(error))
    except Exception as error:
        if not _disk_is_full(error):
            raise
        where = getattr(error, "filename", None) or "while writing"
        return _mistake(f"the disk is full ({where}); free space, run again: finished work is kept")
    except KeyboardInterrupt:
        print("interrupted; run again to continue", file=sys.stderr)
        return 130
    return 0


def _mistake(what: str) -> int:
    send({"error": what})
    print(f"error: {what}", file=sys.stderr)
    return 2


def _disk_is_full(error: Exception) -> bool:
    """Libraries that write from C++ report a full disk in words of their own: then the disk is asked."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return shutil.disk_usage(".").free < _NO_SPACE
