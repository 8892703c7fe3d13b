"""The documentation site: it builds without a warning, no internal link is dead, and every public name is on it."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import pytest
from launched import PROJECT, launch, user_environment

import disttrain
import disttrain.strategy
import disttrain.testing
from disttrain import Config, Engine

PAGES = [*PROJECT.glob("*.md"), *(PROJECT / "docs").rglob("*.md")]
CODE_BLOCK = re.compile(r"^```.*?^```$|^~~~.*?^~~~$|<!--.*?-->", re.MULTILINE | re.DOTALL)


class Links(HTMLParser):
    """Collects a page's links and the ids that links can point to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids |= {values["id"]} if values.get("id") else set()
        link = values.get("href") if tag in ("a", "link") else values.get("src")
        if link:
            self.links.append(link)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built once by the script that users call."""
    folder = tmp_path_factory.mktemp("site")
    launch("bash", "launch/docs.sh", timeout_s=500, environment=user_environment(BUILD=str(folder)))
    return folder


@pytest.fixture(scope="module")
def conf() -> ModuleType:
    """docs/conf.py as a module."""
    spec = importlib.util.spec_from_file_location("docs_conf", PROJECT / "docs" / "conf.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


def dead_links(site: Path) -> Iterator[str]:
    pages = {path.resolve(): Links(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    for page, found in pages.items():
        for link in found.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            if not target.exists():
                yield f"{page.name}: {link}"
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
                yield f"{page.name}: {link} (no such anchor)"


def anchors(text: str) -> set[str]:
    """The anchors that a code host gives a page's headings."""
    found: list[str] = []
    for title in re.findall(r"^#+ (.+)$", CODE_BLOCK.sub("", text), re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", shown).replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return set(found)


def dead_markdown_links(page: Path) -> list[str]:
    """The links of a page whose file or anchor does not exist, on a code host."""
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", CODE_BLOCK.sub("", page.read_text(encoding="utf-8"))):
        path, _, anchor = link.partition("#")
        if "://" in path or path.startswith("mailto:"):
            continue
        target = page.parent / path if path else page
        missing_anchor = anchor and target.suffix == ".md" and target.is_file()
        if not target.exists() or (missing_anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            dead.append(link)
    return dead


def test_no_link_of_the_site_is_dead(site: Path) -> None:
    assert list(dead_links(site)) == []
    assert (site / "docs" / "tutorials" / "first-run.html").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_no_link_is_dead_on_a_code_host(page: Path) -> None:
    assert dead_markdown_links(page) == []


def test_every_public_name_is_documented(site: Path) -> None:
    ids = Links((site / "docs" / "reference" / "api.html").read_text(encoding="utf-8")).ids
    names = [f"disttrain.{name}" for name in disttrain.__all__ if not name.startswith("__") and name != "Config"]
    names += [f"disttrain.Engine.{name}" for name in dir(Engine) if not name.startswith("_")]
    names += [f"disttrain.strategy.{name}" for name in disttrain.strategy.__all__]
    names += [f"disttrain.testing.{name}" for name in disttrain.testing.__all__]
    names += [f"{Config.__module__}.Config"]
    assert [name for name in names if name not in ids] == []


def test_every_config_key_is_documented(site: Path) -> None:
    text = (site / "docs" / "reference" / "api.html").read_text(encoding="utf-8")
    code = {re.sub(r"<[^>]+>", "", one) for one in re.findall(r"<code.*?</code>", text, re.DOTALL)}
    assert {"global_batch", "reshard", "stage", "recompute", *Config.model_fields} <= code


def test_a_dead_link_fails_the_build(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# A\n\n[one](no-such-page.md) and [two](#no-such-anchor)\n", "utf-8")
    build = (sys.executable, "-m", "sphinx", "-W", "-n", "--keep-going", "-q")
    done = launch(*build, "-c", "docs", str(tmp_path), str(tmp_path / "out"), timeout_s=200, expect=None)
    assert done.returncode != 0
    assert "no-such-page.md" in done.stderr
    assert "no-such-anchor" in done.stderr


def test_dead_links_are_noticed_on_a_code_host(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One `two`, three\n\n[a](#one-two-three) [b](#two) [c](no.md) [d](page.md#x)\n", encoding="utf-8")
    assert dead_markdown_links(page) == ["#two", "no.md", "page.md#x"]


@pytest.mark.parametrize(
    ("docstring", "rest"),
    [
        ("`code` and ``code``", "``code`` and ``code``"),
        ("globs `a/*` and *.py", r"globs ``a/*`` and \*.py"),
        ("a trailing_ underscore, `init_`", r"a trailing\_ underscore, ``init_``"),
        ("Items:\n- one\n- two", "Items:\n\n- one\n- two"),
        ("Do:\n```python\na = `b*`\n```\nend", "Do:\n\n.. code-block:: python\n\n   a = `b*`\n\nend"),
        ("Do *it*::\n\n    f(*args)\n\nend_", "Do \\*it\\*::\n\n    f(*args)\n\nend\\_"),
        (">>> f(*args)\n2\n\nend_", ">>> f(*args)\n2\n\nend\\_"),
    ],
)
def test_docstrings_are_read_as_markdown(conf: ModuleType, docstring: str, rest: str) -> None:
    assert conf.to_rest(docstring) == rest
