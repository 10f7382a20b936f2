"""What every entry point shares: its environment, where its log is shown, and how it fails."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import sys
from collections.abc import Callable

from rich.console import Console, ConsoleRenderable, Group
from rich.highlighter import NullHighlighter
from rich.logging import RichHandler

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
    """Switch telemetry off, and the warning from tokenizers about forks."""
    os.environ.update(TELEMETRY_OFF)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class LineHandler(RichHandler):
    """Rich's handler without its columns: a message is a line of stderr, however long, beside a live bar too."""

    def render(self, *, record, traceback, message_renderable) -> ConsoleRenderable:
        return Group(message_renderable, traceback) if traceback else message_renderable


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        said = super().format(record)
        return said if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {said}"


def show_log() -> None:
    """Show what the package logs, from INFO on, with the level before a warning or an error."""
    log = logging.getLogger("deepspec")
    log.setLevel(logging.INFO)
    if not any(isinstance(handler, LineHandler) for handler in log.handlers):
        console = Console(stderr=True, soft_wrap=True, emoji=False)
        handler = LineHandler(console=console, highlighter=NullHighlighter(), keywords=[])
        handler.setFormatter(_Formatter())
        log.addHandler(handler)


def guarded(action: Callable[[], None]) -> int:
    """Run `action` with the log shown; a user's mistake or a full disk becomes one line on stderr.

    The line goes to the channel of `deepspec.progress` as well.

    Returns:
        The exit status: 0, 2 after such a mistake, 130 when it was interrupted.
    """
    show_log()
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
    """Return whether the disk is full; libraries in C++ say so in words of their own, so the disk is asked."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return shutil.disk_usage(".").free < _NO_SPACE
