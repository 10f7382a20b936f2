"""`deepspec plots`: the plots that dvc.yaml declares in one page that loads nothing, for machines without a network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from deepspec.errors import DeepSpecError
from deepspec.files import write_text
from deepspec.git import reason

TEMPLATE = Path(".deepspec/plots.html")
PAGE = Path("dvc_plots/index.html")
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{refresh_tag}
<title>Plots</title>
<script type="module">%s</script>
</head>
<body>
{plot_divs}
</body>
</html>
"""


def run(revisions: tuple[str, ...] = (), root: Path = Path()) -> Path:
    """Write `dvc_plots/index.html` as `dvc plots show` does, or `diff` between revisions, with Vega inside; return it.

    Raises:
        DeepSpecError: DVC refused.
    """
    write_text(root / TEMPLATE, template())
    what = ["diff", *revisions] if revisions else ["show"]
    words = [sys.executable, "-m", "dvc", "plots", *what, "--html-template", str(TEMPLATE)]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise DeepSpecError(f"dvc plots {what[0]}: {reason(done)}")
    return root / PAGE


def template() -> str:
    """Return the page around DVC's plots: Vega's own code in it, where DVC's asks a content network."""
    import vl_convert

    # DVC's scripts call `vegaEmbed` as soon as they are read, a module only after that.
    code = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub lacks a default
    return _PAGE.replace(' type="module"', "") % code.replace("</script", "<\\/script")
