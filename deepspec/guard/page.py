"""reports/validation.html: the suite's expectations and what was found, in one file that needs nothing else.

Great Expectations' own Data Docs load styles and scripts from other hosts; this page makes no request and has no
script. Whatever a model wrote stands in it as text.
"""

from __future__ import annotations

from pathlib import Path

from deepspec.guard.verdict import Validation
from deepspec.html import templates

ASSETS = Path(__file__).parent / "assets"


def render(validation: Validation) -> str:
    """Render the page; the same validation gives the same text."""
    return templates(ASSETS).get_template("validation.html").render(validation=validation)
