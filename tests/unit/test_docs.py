"""The documents name what is there, and their paragraphs are short."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepspec.cli import app

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "paper/*.md", "examples/*.md", "data/README.md")
    for path in ROOT.glob(pattern)
)
PROSE = [name for name in DOCUMENTS if name.startswith("docs/") or name == "paper/README.md"]
CONFIGURATION = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.yaml", "paper/*.yaml", "configs/*.yaml", "docker/*", "Makefile")
    for path in ROOT.glob(pattern)
    if path.is_file()
)
FOLDERS = {path.name for home in (ROOT, ROOT / "deepspec") for path in home.iterdir() if path.is_dir()}
MADE = (
    ".dvc/",
    "data/",
    "paper/data/",
    ".deepspec/",
    "reports/serve",
    "docker/.env",
)  # by a run, not kept in git
ELSEWHERE = {"prepare.py"}  # files of other projects
PARAGRAPH = 120  # words
TABLE = re.compile(r"<!-- table 1.*?<!-- end of table 1 -->", re.S)  # written by paper/table.py


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def code_of(text: str) -> list[str]:
    """Code spans and lines of code blocks."""
    fenced = [
        line for block in re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S) for line in block.split("\n")
    ]
    indented = [line.strip() for line in text.split("\n") if line.startswith("    ")]
    spans = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    return [" ".join(code.split()) for code in (*fenced, *indented, *spans)]


def links(text: str) -> list[str]:
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]


def anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def missing_links(name: str, text: str) -> list[str]:
    missing = []
    for link in links(text):
        path, _, section = link.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        found = file.exists()
        if found and section:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
            found = section in map(anchor, headings)
        if not found:
            missing.append(link)
    return missing


def missing_paths(name: str, text: str) -> list[str]:
    """Repository paths in code spans that are not there; link texts are known by their links."""
    text = re.sub(r"\[`[^`]+`\]\([^)]+\)", "", text)
    homes = (ROOT, ROOT / "deepspec", (ROOT / name).parent)
    missing = []
    for code in re.findall(r"`([^`\s]+)`", text):
        path = code.split("::")[0].split("#")[0].rstrip("/")
        if re.search(r"[<>*{}$…(=@]", path) or path.startswith(MADE) or path in ELSEWHERE:
            continue
        ours = path.endswith(".py") or ("/" in path and path.split("/")[0] in FOLDERS)
        if ours and not any((home / path).exists() for home in homes):
            missing.append(path)
    return missing


def defined(module: Path) -> set[str]:
    """Names at the top of a module, and those that `deepspec` hands out on first use."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    names = {
        alias.asname or alias.name for n in tree.body if isinstance(n, ast.ImportFrom) for alias in n.names
    }
    names |= {n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
            if "__all__" in {target.id for target in targets if isinstance(target, ast.Name)}:
                names |= set(ast.literal_eval(node.value))
    return names


def has(dotted: str) -> bool:
    """Whether a dotted name is a module, a package, or something that a module defines."""
    parts = dotted.split(".")
    for size in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:size])
        module = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
        if module.is_file():
            return size == len(parts) or parts[size] in defined(module)
    return False


def missing_modules(text: str) -> list[str]:
    names = set(re.findall(r"(?<![\w/.-])(?:deepspec|flows|paper)(?:\.[A-Za-z_]\w*)+", text))
    for module, imported in re.findall(r"from ((?:deepspec|flows|paper)[.\w]*) import ([\w, ]+)", text):
        names |= {f"{module}.{name.strip()}" for name in imported.split(",")}
    return sorted(n for n in names if not n.endswith((".json", ".yaml", ".egg")) and not has(n))


def commands(text: str) -> set[str]:
    return {
        word
        for code in code_of(text)
        for word in re.findall(r"(?:^|[;&] ?|\() ?deepspec ([a-z][a-z-]*)\b", code)
    }


def make_targets(text: str) -> set[str]:
    return {word for code in code_of(text) for word in re.findall(r"(?:^|[;&] ?)make ([a-z][a-z-]*)\b", code)}


def paragraphs(text: str) -> Iterator[str]:
    """Running text, an item of a list by itself; code, tables and headings left out."""
    text = re.sub(r"^```.*?^```", "", TABLE.sub("", text), flags=re.M | re.S)
    text = re.sub(r"^<!-- .* -->$", "", text, flags=re.M)
    for block in re.split(r"\n\s*\n", text):
        if block.lstrip().startswith(("|", "#", "    ")) or block.startswith("    "):
            continue
        yield from re.split(r"\n(?=\s*(?:[-*]|\d+\.) )", block)


def too_long(text: str) -> list[str]:
    return [p for p in paragraphs(text) if len(p.split()) > PARAGRAPH]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_of_a_document_leads_somewhere(name):
    assert missing_links(name, text_of(name)) == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_path_and_module_that_a_document_names_exists(name):
    assert missing_paths(name, text_of(name)) == []
    assert missing_modules(text_of(name)) == []


@pytest.mark.parametrize("name", CONFIGURATION)
def test_every_source_file_that_a_configuration_names_exists(name):
    paths = re.findall(r"\b((?:deepspec|flows|paper|tests)/[\w/]+\.py)\b", text_of(name))
    assert [path for path in paths if not (ROOT / path).is_file()] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_command_that_a_document_shows_exists(name):
    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert commands(text_of(name)) - known == set()
    targets = set(re.findall(r"^([a-z-]+):", text_of("Makefile"), re.M))
    assert make_targets(text_of(name)) - targets == set()


def test_the_layout_names_every_package():
    layout = re.search(r"## Layout\n(.*?)\n## ", text_of("README.md"), re.S)[1]
    named = set(re.findall(r"^      (\w+)/", layout, re.M))
    assert named == {path.parent.name for path in ROOT.glob("deepspec/*/__init__.py")}


def test_the_index_names_every_document():
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages <= set(links(text_of("docs/README.md")))


def test_the_glossary_is_short():
    assert 20 <= len(re.findall(r"^\| \*\*", text_of("docs/glossary.md"), re.M)) <= 40


def test_every_test_file_stands_beside_what_it_tests():
    table = text_of("docs/architecture.md").split("## Which tests to run")[1]
    files = {path.stem.removeprefix("test_") for path in (ROOT / "tests/unit").glob("test_*.py")}
    named = {
        name for row in re.findall(r"^\| .* \| (.*) \|$", table, re.M) for name in re.findall(r"`(\w+)`", row)
    }
    assert named == files


@pytest.mark.parametrize("name", PROSE)
def test_no_paragraph_is_long(name):
    assert too_long(text_of(name)) == []


def test_what_is_not_there_is_found():
    """The checks above can fail."""
    text = (
        "`deepspec/none.py` and [it](none.md), `deepspec.none.x`, `deepspec nonesuch`\n\n    make nonesuch\n"
    )
    assert missing_paths("README.md", text) == ["deepspec/none.py"]
    assert missing_links("README.md", text) == ["none.md"]
    assert missing_modules(text) == ["deepspec.none.x"]
    assert commands(text) == {"nonesuch"} and make_targets(text) == {"nonesuch"}
    assert too_long("short\n\n- " + "word " * 121) != []


def test_the_architecture_page_names_tests_that_exist_for_every_package():
    section = text_of("docs/architecture.md").split("## Which tests to run")[1]
    rows = [line.strip("| ").split(" | ") for line in section.split("\n") if line.startswith("| `")]
    named = {name for _, tests in rows for name in re.findall(r"`(\w+)`", tests)}
    assert [name for name in sorted(named) if not (ROOT / f"tests/unit/test_{name}.py").is_file()] == []
    packages = {path.parent.name for path in ROOT.glob("deepspec/*/__init__.py")} - {"stages"}
    assert packages <= {room for rooms, _ in rows for room in re.findall(r"`(\w+)/", rooms)}


def test_the_architecture_page_has_the_directions_that_are_tested():
    lines = re.findall(r"^\| \d \| (.*) \|$", text_of("docs/architecture.md"), re.M)
    stated = [set(re.findall(r"`(\w+)`", line)) for line in reversed(lines)]
    tree = ast.parse(text_of("tests/unit/test_directions.py"))
    layers = next(n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "LAYERS")
    assert stated == ast.literal_eval(layers)


# Packages whose functions say what they do with a verb in front; ruff's D401 knows only some of what is none.
IMPERATIVE = re.findall(
    r"\w+",
    "answers commands export features guard messages prompts report reproduce serving stages tasks tracking training",
)
NO_VERB = re.compile(
    r"(A|All|An|As|Both|Each|Every|For|How|In|It|Its|No|Of|On|One|Our|Over|README|The|These|Those"
    r"|What|When|Where|Whether|Which|Who|Whole|Why|With|Without)\b"
)


def no_verb(source: str) -> list[str]:
    """First lines of functions' docstrings that do not begin with a verb."""
    functions = [
        n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    lines = [(ast.get_docstring(function) or "Return").split("\n")[0] for function in functions]
    return [line for line in lines if not re.match(r"[A-Z][a-z-]+\b", line) or NO_VERB.match(line)]


@pytest.mark.parametrize("package", IMPERATIVE)
def test_docstrings_of_functions_begin_with_a_verb(package):
    for path in (ROOT / "deepspec" / package).rglob("*.py"):
        assert no_verb(path.read_text(encoding="utf-8")) == [], path.name


def test_a_docstring_without_a_verb_is_found():
    assert no_verb('def f():\n    """Of a draft\'s file."""\n') == ["Of a draft's file."]
    assert no_verb('def f():\n    """x → y"""\n') == ["x → y"]
    assert no_verb('def f():\n    """Return y."""\n\n\ndef g(): ...\n') == []
