"""The command line that the examples share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from deepspec.errors import DeepSpecError

PROMPT = "Write the numbers from one to ten, and then the same numbers again."


def parse(arguments: list[str] | None, draft: bool = False) -> argparse.Namespace:
    """Return the options of an example.

    Args:
        arguments: words of the command line; None takes the process's own.
        draft: whether the example also reads a draft directory.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--target", type=Path, default=Path("data/target"), help="a target directory")
    if draft:
        parser.add_argument(
            "--draft", type=Path, default=Path("data/drafts/dspark"), help="a draft directory"
        )
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer")
    return parser.parse_args(arguments)


def run(example: Callable[[], object]) -> None:
    """Run an example's `main`; a mistake is one line and exit status 2."""
    try:
        example()
    except DeepSpecError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
