"""The site has a page for every public module, with every public name on it, and shows the commands as they are."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import griffe
import pytest

from alrp_triton import cli

ROOT = Path(__file__).parent.parent
PAGES = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs" / "api").glob("*.md"))]
MODULES = [module for page in PAGES for module in re.findall(r"^::: (\S+)$", page, re.MULTILINE)]
# What is public in them, other modules or commands have.
PRIVATE = {"benchmarks", "cli", "compiling", "data", "engine", "info", "integrations", "kernels", "losses", "positives"}
PRIVATE |= {"doctor", "doctor_devices", "verify_cases", "verify_losses"}
PACKAGE = griffe.load("alrp_triton", search_paths=[ROOT], resolve_aliases=True)


def public_names(module: str) -> dict[str, griffe.Object | griffe.Alias]:
    """What ``__all__`` lists, or without it all that begins with no underscore."""
    found = PACKAGE[module.partition(".")[2]] if "." in module else PACKAGE
    return {name: found[name] for name in found.exports or found.members if found[name].is_public}


def modules_in(folder: Path, private: set[str]) -> set[str]:
    names = {path.stem for path in folder.iterdir() if path.is_dir() or path.suffix == ".py"}
    return {name for name in names - private if name[0] != "_"}


def test_every_public_module_has_a_page():
    package = ROOT / "alrp_triton"
    names = {*modules_in(package, PRIVATE), "metrics.torchmetrics"}
    names |= {f"integrations.{name}" for name in modules_in(package / "integrations", set())}
    assert sorted(MODULES) == sorted(["alrp_triton", *(f"alrp_triton.{name}" for name in names)])


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_has_a_docstring(module):
    """Without one it has no entry."""
    names = public_names(module)
    assert names
    assert not [name for name, found in names.items() if not found.has_docstring]


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="argparse writes its help in another way")
def test_commands_are_shown_as_they_are(capsys):
    page = (ROOT / "docs" / "api" / "cli.md").read_text(encoding="utf-8")
    shown = re.findall(r"^```text\n\$ alrp-triton ([a-z ]*)--help\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (commands,) = re.findall(r"^  COMMAND\n(.*?)\n\n", shown[0][1], re.MULTILINE | re.DOTALL)
    assert [name.strip() for name, _ in shown[1:]] == re.findall(r"^    (\w+)", commands, re.MULTILINE)
    for command, text in shown:
        with pytest.raises(SystemExit):
            cli.main([*command.split(), "--help"])
        # Lines break elsewhere in other terminals.
        assert "".join(text.split()) == "".join(capsys.readouterr().out.split()), f"alrp-triton {command}--help"


def test_the_site_is_whole_and_browsers_fetch_nothing_elsewhere(tmp_path):
    mkdocs = pytest.importorskip("mkdocs.commands.build", reason="make docs")
    from mkdocs.config import load_config
    from mkdocstrings import Inventory

    repository = {"repository": "https://example.org/repository"}
    mkdocs.build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), extra=repository))
    with open(tmp_path / "objects.inv", "rb") as file:
        entries = set(Inventory.parse_sphinx(file))
    assert {f"{module}.{name}" for module in MODULES for name in public_names(module)} <= entries
    text = {page: (tmp_path / page / "index.html").read_text(encoding="utf-8") for page in ("mathematics", "losses")}
    assert "<math" in text["mathematics"]
    assert "arithmatex" not in text["mathematics"]
    assert 'href="https://example.org/repository/blob/main/' in "".join(text.values())
    assert (tmp_path / "tutorials" / "digits" / "index.html").exists()
    elsewhere = re.compile(r"""(?:\bsrc=|<link[^>]*\bhref=|url\()["']?(?:https?:)?//[^"' )]*""")
    pages = [path for path in tmp_path.rglob("*") if path.suffix in (".html", ".css")]
    assert len(pages) > 40
    assert not [found for path in pages for found in elsewhere.findall(path.read_text(encoding="utf-8"))]
