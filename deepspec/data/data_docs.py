"""reports/validation.html: the suite's expectations and what was found, in one file that needs nothing else.

Great Expectations' own Data Docs load styles and scripts from other hosts; this page makes no request and has no
script. Whatever a model wrote stands in it as text.
"""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from deepspec.data.verdict import Validation

ASSETS = Path(__file__).parent / "assets"


def render(validation: Validation) -> str:
    """The page. The same validation gives the same text."""
    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("validation.html").render(validation=validation)
