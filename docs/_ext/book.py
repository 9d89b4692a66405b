"""The book: what Sphinx does before and after it reads the pages.

* The pages of the ops are written (op_pages.py), and those of linked source files, so that a link to
  ../tinydiff/engine.py leads to the file inside the book. `../tinydiff/ops/softmax.py#softmax` leads to the op's page.
* On every page, in order, the Python sessions run, and the formulas in blocks of `claims` are evaluated. What is quoted
  in a block of `py` must stand in a file that the page links to. A page that is false stops the build. (Blocks of
  Python without prompts are run by tests/docs/test_pages.py, which has the files that they need.)
"""

from __future__ import annotations

import doctest
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

import op_pages
from algebra import BAR, FUNCTIONS, NotAFormula, normal, read, value
from claims import FalseClaim, clauses, relative, short
from derivations import file_of_op

from tinydiff.operators import OPS

DOCS = Path(__file__).parents[1]
ROOT = DOCS.parent
LINK = re.compile(r"\]\(((?:\.\./)+)([^)#\s]+)(#[\w-]+)?\)")
BLOCK = re.compile(r"^```(python|claims)\n(.*?)^```", re.M | re.S)
LANGUAGES = {".py": "python", ".c": "c", ".h": "c", ".cu": "cuda", ".cuh": "cuda", ".md": "markdown", ".toml": "toml"}
TOLERANCE = 1e-6

# ---------------------------------------------------------------- links to the source


def is_source(path: Path) -> bool:
    """Is it a file or folder of the repository, and no page of the book?"""
    inside = DOCS in path.parents and path.suffix != ".py"
    return path.exists() and ROOT in path.parents and not inside


def targets(text: str, page: Path) -> set[str]:
    """The source files and folders that a page links to, from the root of the repository."""
    found = set()
    for match in LINK.finditer(text):
        path = (page.parent / (match[1] + match[2])).resolve()
        if is_source(path):
            found.add(str(path.relative_to(ROOT)))
    return found


def rewritten(text: str, page: Path) -> str:
    """The page with those links leading into the book."""
    up = "../" * (len(page.relative_to(DOCS).parts) - 1)

    def lead(match: re.Match[str]) -> str:
        path = (page.parent / (match[1] + match[2])).resolve()
        if not is_source(path):
            return match[0]
        name = (match[3] or "").removeprefix("#")
        if name:
            if name not in OPS or file_of_op(name) != str(path.relative_to(ROOT)):
                raise FalseClaim(f"{page.name}: {match[2]} has no op {name!r}")
            return f"]({up}ops/{name}.md)"
        return f"]({up}source/{path.relative_to(ROOT)}.md)"

    return LINK.sub(lead, text)


def write_source_pages(pages: list[Path]) -> None:
    """A page for each linked file; for a folder its list. Pages of files that nobody links to any more are removed."""
    wanted: set[str] = set()
    for page in pages:
        wanted |= targets(page.read_text(), page)
    for name in sorted(wanted):
        path, out = ROOT / name, DOCS / "source" / f"{name}.md"
        up = "../" * len(Path(name).parts)
        out.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            files = [f.name for f in sorted(path.iterdir()) if not f.name.startswith(("_", "."))]
            body = "\n".join(f"* `{f}`" for f in files)
        else:
            kind = LANGUAGES.get(path.suffix, "text")
            body = f"```{{literalinclude}} {up}../{name}\n:language: {kind}\n:linenos:\n```"
            here = [f"[{op}]({up}ops/{op}.md)" for op in OPS if file_of_op(op) == name]
            body = (f"The pages of its ops: {', '.join(here)}.\n\n" if here else "") + body
        op_pages.put(out, f"---\norphan: true\n---\n\n# {name}\n\n{body}\n")
    for old in (DOCS / "source").rglob("*.md"):
        if str(old.relative_to(DOCS / "source").with_suffix("")) not in wanted:
            old.unlink()


# ---------------------------------------------------------------- pages that run


class Namespace(dict[str, Any]):
    """The names of a page's Python session, and what its claims define."""


def run(text: str, page: str) -> None:
    """Run the Python sessions and evaluate the claims of a page, in order. Errors: FalseClaim."""
    space: Namespace = Namespace({"__name__": "page"})
    before = dict(OPS)
    here = os.getcwd()
    try:
        for match in BLOCK.finditer(text):
            kind, body = match.groups()
            line = text[: match.start()].count("\n") + 2
            if kind == "claims":
                evaluate(body, space, f"{page}, line {line}")
            elif body.lstrip().startswith(">>>"):
                session(body, space, page, line)
    finally:
        os.chdir(here)
        OPS.clear()
        OPS.update(before)


def check_quotes(text: str, page: Path) -> None:
    """A block of `py` is quoted from a source file that the page links to. Errors: FalseClaim if it stands in none."""
    sources = [path.read_text() for name in targets(text, page) if (path := ROOT / name).suffix == ".py"]
    for quote in re.findall(r"^```py\n(.*?)^```", text, re.M | re.S):
        if not any(quote in source for source in sources):
            raise FalseClaim(f"{page.name} quotes what does not stand in the files it links to:\n{quote}")


def session(body: str, space: Namespace, page: str, line: int) -> None:
    test = doctest.DocTestParser().get_doctest(body, {}, page, page, line)
    test.globs = space
    said: list[str] = []
    runner = doctest.DocTestRunner(verbose=False)
    if runner.run(test, out=said.append, clear_globs=False).failed:
        raise FalseClaim(f"{page}: what a Python session shows is not what it gives:\n" + "".join(said))


def evaluate(body: str, space: Namespace, where: str) -> None:
    """Each chain of a block of claims. x̄ is the name x_bar in Python, dx is dx."""
    extra = {"sum": np.sum, "flat": np.ravel, "like": lambda a, x: np.reshape(a, np.shape(x))}
    functions = {**FUNCTIONS, **extra, **{k: v for k, v in space.items() if callable(v)}}

    def name(letter: str) -> Any:
        key = letter.replace(BAR, "_bar") if BAR in letter else letter
        if key in space:
            v = space[key]
            return v.numpy() if hasattr(v, "numpy") else v
        if key in ("e", "pi"):
            return {"e": np.e, "pi": np.pi}[key]
        raise NotAFormula(f"{where}: {letter!r} has no meaning here")

    for clause in clauses(body):
        chain = read(
            clause, functions.keys(), {normal(k).replace("_bar", BAR) for k, v in space.items() if not callable(v)}
        )
        wanted = value(chain[0], name, functions.__getitem__)
        for part in chain[1:]:
            found = value(part, name, functions.__getitem__)
            if not relative(np.asarray(found), np.asarray(wanted)) <= TOLERANCE:
                raise FalseClaim(f"{where}: {clause!r} is false: {short(wanted)} is not {short(found)}")


def pages() -> list[Path]:
    """Those written by hand."""
    return sorted(p for p in DOCS.rglob("*.md") if not {"ops", "source", "_build"} & set(p.relative_to(DOCS).parts))


# ---------------------------------------------------------------- Sphinx


def marked(text: str) -> str:
    """The page with the class `claims` on what is evaluated: book.css draws a bar beside it."""
    return re.sub(r"^```claims$", "```{code-block} text\n:class: claims\n", text, flags=re.M)


def more(index: str) -> str:
    """The pages that the index does not list yet, at the end of the contents."""
    names = (str(page.relative_to(DOCS).with_suffix("")) for page in pages())
    missing = [name for name in names if name != "index" and not re.search(rf"^{name}$", index, re.M)]
    lines = ["", "```{toctree}", ":hidden:", ":caption: More", "", *missing, "```", ""]
    return "\n".join(lines) if missing else ""


def before_reading(app: Any) -> None:
    from sphinx.errors import SphinxError

    try:
        op_pages.write_all(DOCS / "ops")
        for page in pages():
            if page.name != "pencil.md":  # whose formulas are evaluated for the pages of the ops
                run(page.read_text(), str(page.relative_to(DOCS)))
            check_quotes(page.read_text(), page)
    except (FalseClaim, NotAFormula) as error:
        raise SphinxError(f"the book is wrong: {error}") from error
    write_source_pages([*pages(), *sorted((DOCS / "ops").glob("*.md"))])


def on_reading(app: Any, name: str, source: list[str]) -> None:
    page = DOCS / f"{name}.md"
    if not name.startswith("source/"):
        source[0] = marked(rewritten(source[0], page))
    if name == "index":
        source[0] += more(source[0])


def setup(app: Any) -> dict[str, Any]:
    app.connect("builder-inited", before_reading)
    app.connect("source-read", on_reading)
    app.connect("env-get-outdated", lambda *_: ["index"])  # it depends on which pages there are
    return {"parallel_read_safe": True, "parallel_write_safe": True}
