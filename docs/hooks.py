"""What the site needs besides its packages: formulas, notebooks, links to source files, roles in docstrings."""

from __future__ import annotations

import html
import json
import posixpath
import re
from importlib.metadata import distribution
from typing import Any

import griffe
from math_core import LatexToMathML
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
_LINK = re.compile(r"\[([^]]*)\]\((?!\w+:|#)([^)#\s]+)(#[^)]*)?\)")
_ROLE = re.compile(r":\w+:`~?(\.*)([\w.]+)`")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Each notebook also becomes a page; a font for formulas is for readers who have none."""
    font = "STIXTwoMath-Regular.ttf"
    path = distribution("ziamath").locate_file(f"ziamath/fonts/{font}")
    files.append(File.generated(config, f"assets/{font}", abs_src_path=str(path)))
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        name = notebook.src_uri.replace(".ipynb", ".md")
        files.append(File.generated(config, name, content=_markdown(json.loads(notebook.content_string))))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to files outside docs/ lead to the repository; those to notebooks to their pages."""

    def lead(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), target))
        if not path.startswith("../"):
            return f"[{text}]({re.sub(r'[.]ipynb$', '.md', target)}{anchor})"
        return f"[{text}]({repository}/blob/main/{path[3:]}{anchor})" if repository else text

    repository = config.extra["repository"]
    return _LINK.sub(lead, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Formulas become MathML, which browsers render without a library."""
    converter = LatexToMathML()

    def convert(formula: re.Match[str]) -> str:
        latex, displayed = html.unescape(formula[3]), formula[2] == "["
        if r"\tag" in latex:
            latex = rf"\begin{{equation}}{latex}\end{{equation}}"
        math = converter.convert_with_local_state(latex, displaystyle=displayed)
        return f'<{formula[1]} class="math">{math}</{formula[1]}>'

    return _FORMULA.sub(convert, content)


class Roles(griffe.Extension):
    """Sphinx's roles in docstrings become references, if what they name is on a page."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each object after it has been read."""
        if obj.docstring:
            obj.docstring.value = _ROLE.sub(lambda role: _reference(obj, role[1], role[2]), obj.docstring.value)

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """The package itself is not among these."""
        self.on_object(obj=pkg)


def _reference(obj: griffe.Object, dots: str, name: str) -> str:
    """What Python would import by the name: from the object's own package and those around it, or its module."""
    try:
        path = obj.resolve(name)
    except griffe.NameResolutionError:
        path = name
    if dots:
        package = obj.module.path if obj.module.is_init_module else obj.module.path.rpartition(".")[0]
        path = f"{package.rsplit('.', len(dots) - 1)[0]}.{name}"
    return f'<autoref identifier="{path}" optional><code>{name}</code></autoref>'


def _markdown(notebook: dict[str, Any]) -> str:
    """Cells and outputs, of which there are text and pictures."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {"text/plain": output.get("text", "")})
            if "image/png" in data:
                parts.append(f"![](data:image/png;base64,{data['image/png'].strip()})")
            else:
                parts.append(f"```text\n{''.join(data['text/plain']).rstrip()}\n```")
    return "\n\n".join(parts)
