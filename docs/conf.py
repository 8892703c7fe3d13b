"""Configures the documentation site, which `bash launch/docs.sh` builds with Sphinx, MyST and furo.

The source folder is the project's root, so that the build also checks the links of README.md and CHANGELOG.md. Pages
are plain Markdown and read well on a code host. The API reference comes from docstrings: single backticks are code.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from inspect import isclass
from pathlib import Path
from typing import Any

from docutils import nodes
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the API of this checkout, whatever else is installed

import disttrain

project = "disttrain"
author = "the disttrain authors"
version = release = disttrain.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/**/*.md", "docs/*.md"]
exclude_patterns = [
    ".*",
    "build",
    "dist",
    "runs",
    "*.egg-info",
    "disttrain",
    "tests",
    "benchmarks",
    "configs",
    "launch",
]

myst_heading_anchors = 4  # the same anchors as on a code host

html_theme = "furo"
html_title = f"disttrain {version}"
html_additional_pages = {"index": "to_the_docs.html"}
templates_path = ["_templates"]
html_show_sourcelink = html_copy_source = False
html_show_copyright = False

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
# `-n` reports every unknown name in a signature. Types of other libraries and internal types have no page here.
nitpick_ignore_regex = [("py:.*", ".*")]

# The site's sidebar. docs/index.md gets it at build time, because a code host would show the directive as text.
# A pattern adds the pages that no line names.
SIDEBAR = {
    "Tutorials": ("first-run", "your-model", "your-loop", "checkpoints", "several-machines", "slurm", "from-pytorch"),
    "Reference": ("configuration", "strategies", "fsdp", "deepspeed", "accelerate", "checkpoints", "parity"),
    "Measurements": ("hardware", "contract", "speed", "memory"),
    "Decisions": (),
}

_CODE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_SPLIT = re.compile(r"(``[^`]+``)")
_FENCE = re.compile(r"(?P<indent> *)```(?P<language>\w*)\n(?P<code>.*?)^ *```\n?", re.MULTILINE | re.DOTALL)
_VERBATIM = re.compile(
    r"(^ *```\w*\n(?s:.*?)^ *```\n?|(?<=::\n)(?:\n|^ {4,}.*\n)+|^ *>>> (?:.*\n)+?(?=\n|\Z))", re.MULTILINE
)


def setup(app: Sphinx) -> None:
    """Registers the hooks below. Called by Sphinx."""
    app.connect("autodoc-process-docstring", _process_docstring, priority=400)  # before napoleon, whose priority is 500
    app.connect("source-read", _add_sidebar)
    app.add_directive("config-sections", ConfigSections)


def _add_sidebar(app: Sphinx, page: str, source: list[str]) -> None:
    if page == root_doc:
        for caption, pages in SIDEBAR.items():
            folder = caption.lower()
            entries = [f"{folder}/{one}" for one in (*pages, "*")]
            source[0] += _toctree(caption, entries)
        source[0] += _toctree("Project", [f"/{one}" for one in ("README", "CHANGELOG", "CONTRIBUTING", "SECURITY")])


def _toctree(caption: str, entries: list[str]) -> str:
    return "\n".join(["\n\n```{toctree}", ":hidden:", ":glob:", f":caption: {caption}", "", *entries, "```\n"])


def _process_docstring(app: Sphinx, kind: str, name: str, found: Any, options: Any, lines: list[str]) -> None:
    lines[:] = to_rest("\n".join(lines)).split("\n")
    if isclass(found) and issubclass(found, BaseModel) and found.model_fields:
        lines += ["", *_field_table(found), ""]


def to_rest(text: str) -> str:
    """Converts a docstring's Markdown (code in single backticks, fences, lists) to reST. Pure.

    Literal blocks and doctests stay as they are.
    """
    parts = []
    for index, part in enumerate(_VERBATIM.split(text)):
        fence = _FENCE.fullmatch(part)
        if index % 2 == 0:
            parts.append(_prose_to_rest(part))
        elif fence:
            body = "".join(f"   {line}\n" for line in fence["code"].splitlines())
            parts.append(f"\n{fence['indent']}.. code-block:: {fence['language'] or 'text'}\n\n{body}\n")
        else:
            parts.append(part)
    return "".join(parts)


def _prose_to_rest(text: str) -> str:
    text = re.sub(
        r"^(?! *- )( *\S.*)\n(?=\1?- )", r"\1\n\n", text, flags=re.MULTILINE
    )  # a list starts after a blank line
    pieces = _SPLIT.split(_CODE.sub(r"``\1``", text))
    for at in range(0, len(pieces), 2):  # outside of code
        pieces[at] = re.sub(r"([*|\\]|(?<=\w)_(?!\w))", r"\\\1", pieces[at])
    return "".join(pieces)


def _field_table(section: type[BaseModel]) -> Iterator[str]:
    """The rows of a table of a config section: key, type, default."""
    yield from (".. list-table::", "   :header-rows: 1", "   :widths: 25 45 30", "")
    rows = [("key", "type", "default")]
    for name, field in section.model_fields.items():
        kind = getattr(field.annotation, "__name__", None) if isclass(field.annotation) else str(field.annotation)
        default = "required" if field.is_required() else _default_text(field.get_default(call_default_factory=True))
        rows.append((f"``{name}``", f"``{re.sub(r'[a-z_.]+[.](?=[A-Z])|typing[.]', '', str(kind))}``", default))
    for row in rows:
        yield from (f"   {'* -' if at == 0 else '  -'} {cell}" for at, cell in enumerate(row))


def _default_text(value: Any) -> str:
    if isinstance(value, BaseModel):
        return "its own defaults"
    return "none" if value is None or value is PydanticUndefined else f"``{value!r}``"


class ConfigSections(SphinxDirective):
    """`config-sections`: documents each section class that is reachable from `disttrain.Config`."""

    def run(self) -> list[nodes.Node]:
        text = "\n".join(
            f".. autoclass:: {one.__module__}.{one.__qualname__}()\n" for one in _sections(disttrain.Config)
        )
        return self.parse_text_to_nodes(text)


def _sections(section: type[BaseModel]) -> list[type[BaseModel]]:
    found = [section]
    for field in section.model_fields.values():
        for kind in _classes(field.annotation):
            found += [one for one in _sections(kind) if one not in found]
    return list(dict.fromkeys(found))


def _classes(annotation: Any) -> Iterator[type[BaseModel]]:
    if isclass(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _classes(inner)
