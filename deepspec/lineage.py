"""Compute which code decides a result: what a module imports, directly or not, read from the source.

`dvc.yaml` and `paper/dvc.yaml` name the same code as dependencies (a test holds them to this closure), and unfinished
work is kept under the digest of it, so that what other code has made is never continued.

    python -m deepspec.lineage deepspec.stages.train      # the closure of one module, a file a line
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from deepspec.files import digest

ROOT = Path(__file__).parent.parent
PACKAGES = ("deepspec", "paper")
NATIVE = "deepspec.kernels"

# Modules that cannot change a result, with the reason. The closure does not go through them.
INERT = {
    "deepspec": "names the public functions",
    "deepspec.config": "reads params.yaml, whose values DVC tracks; defaults are in each package's params.py",
    "deepspec.device": "describes the machine in words",
    "deepspec.entry": "environment and error messages of a process",
    "deepspec.errors": "error messages",
    "deepspec.files": "writes files whole or not at all; what is in them comes from its callers",
    "deepspec.git": "asks git",
    "deepspec.html": "escapes what a page shows",
    "deepspec.journal": "keeps finished pieces of work as they are",
    "deepspec.lineage": "says where work is kept",
    "deepspec.markdown": "lays out a table that a person reads",
    "deepspec.parallel": "gives pieces of work to processes, and their results in order",
    "deepspec.progress": "progress shown to a person",
    "deepspec.provenance": "says which commit and packages a result is of",
    "deepspec.retrying": "says when a request is sent again",
    "deepspec.section": "checks the values of params.yaml",
    "deepspec.serving.environment": "finds the Python that has vLLM",
    "deepspec.serving.launch": "starts servers; what they answer is judged by who asks",
    "deepspec.stages.common": "flags of a stage",
    "deepspec.training.system": "watches the machine while training runs",
}

# Imports that cannot change what the importing module computes, with the reason. The closure does not follow them.
PROVEN = {
    (
        "deepspec.stages.generate",
        "deepspec.training.keeping",
    ): "keeps states beside the answers, which are the same",
    ("deepspec.serving.evaluation", "deepspec.export.draft"): "hands the trained draft to the exporter",
    (
        "deepspec.serving.evaluation",
        "deepspec.export.engines",
    ): "what it writes is read back and held to the trained draft before it is measured",
}


def closure(*modules: str) -> set[str]:
    """Return the project's modules that the given ones import, directly or not, themselves included.

    Imports under `if TYPE_CHECKING` are left out; `pkgutil.iter_modules(package.__path__)` stands for every module of
    that package. The `INERT` ones are neither included nor followed, nor are imports that are `PROVEN`.

    Raises:
        KeyError: a module that the project does not have.
    """
    found: set[str] = set()
    open_ = [name for name in modules if name not in INERT]
    while open_:
        name = open_.pop()
        if name not in found:
            found.add(name)
            open_ += [other for other in imports(name) if other not in INERT and (name, other) not in PROVEN]
    return found


@cache
def imports(name: str) -> frozenset[str]:
    """Return the project's modules that one module imports itself."""
    known = modules()
    found = set()
    for module in _named(ast.parse(known[name].read_text(encoding="utf-8"))):
        found |= {module} & known.keys() if not module.endswith(".*") else _inside(module[:-2])
    return frozenset(found - {name})


@cache
def modules() -> dict[str, Path]:
    """Return every module of the project that has code, with its file."""
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return {_name(path): path for path in files if path.name != "__init__.py" or _has_code(path)}


@cache
def code_digest(*names: str) -> str:
    """Return the digest of the code that decides what these modules compute: `closure`, and kernels where they run."""
    found = sorted(closure(*names))
    code = b"".join(modules()[name].read_bytes() for name in found)
    return digest(code + (_kernels() if NATIVE in found else b""))


def _kernels() -> bytes:
    """Return what else decides how sums are rounded: the kernels' sources, where this machine uses them, and how."""
    from deepspec.kernels import kernels, sources, state

    return sources() + state().encode() if kernels() else b""


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _has_code(path: Path) -> bool:
    """Whether a file holds more than its docstring."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return any(not isinstance(node, ast.Expr) for node in body)


def _inside(package: str) -> set[str]:
    return {name for name in modules() if name.startswith(f"{package}.")}


def _named(node: ast.AST) -> Iterator[str]:
    """Yield what a syntax tree imports, at any depth; `package.*` where all modules of a package are listed."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for other in child.orelse:
                yield from _named(other)
            continue
        if isinstance(child, ast.ImportFrom) and child.module and not child.level:
            yield child.module
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.Call) and ast.unparse(child.func).endswith("iter_modules") and child.args:
            yield ast.unparse(child.args[0]).removesuffix(".__path__") + ".*"
        yield from _named(child)


if __name__ == "__main__":
    for module in sorted(closure(*sys.argv[1:])):
        print(modules()[module].relative_to(ROOT))
