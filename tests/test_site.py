"""The built site: both builders, every link, nothing from another host."""

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("site")]
# Elements that make a browser load something; an `a` only leads away.
LOADING = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "object": "data",
    "embed": "src",
    "link": "href",
}


class Page(HTMLParser):
    """Ids, links and loaded resources of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids, self.links, self.loads = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if values.get("id"):
            self.ids.add(values["id"])
        if tag == "a" and values.get("name"):
            self.ids.add(values["name"])
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        if tag in LOADING and values.get(LOADING[tag]) and values.get("rel") not in ("canonical", "next", "prev"):
            self.loads.append(values[LOADING[tag]])


@pytest.fixture(scope="module")
def pages(site):
    return {p.relative_to(site).as_posix(): Page(p.read_text(encoding="utf-8")) for p in site.rglob("*.html")}


def test_no_internal_link_or_anchor_is_broken(site, pages):
    broken = []
    for name, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or name == "404.html":
                continue
            target = (site / name).parent.joinpath(unquote(parts.path)).resolve() if parts.path else site / name
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                broken.append(f"{name}: {link}")
            elif parts.fragment and target.suffix == ".html":
                anchors = pages[target.relative_to(site.resolve()).as_posix()].ids
                if unquote(parts.fragment) not in anchors and not parts.fragment.startswith("__"):
                    broken.append(f"{name}: {link} (anchor)")
    assert not broken, broken[:20]


def test_nothing_is_loaded_from_another_host(site, pages):
    outside = [f"{name}: {url}" for name, page in pages.items() for url in page.loads if urlsplit(url).netloc]
    for sheet in site.rglob("*.css"):
        urls = re.findall(r"(?:url\(|@import\s*)[\"']?((?:https?:)?//[^\"')]+)", sheet.read_text(encoding="utf-8"))
        outside += [f"{sheet.name}: {url}" for url in urls]
    assert not outside, outside[:20]


def test_every_formula_is_mathml(site):
    """No dollar formula is left over on a method's or category's page, and there are a thousand formulas."""
    texts = [p.read_text(encoding="utf-8") for p in (site / "survey").rglob("*.html")]
    assert sum(text.count("<math") for text in texts) > 1000
    left = [
        m for text in texts for m in re.findall(r"\$\\[a-z]+[^$<]*\$", re.sub(r"(?s)<(pre|code)\b.*?</\1>", "", text))
    ]
    assert not left, left[:10]


def test_zensical_builds_the_same_pages(pages, tmp_path):
    """Oracle: the other builder, strict, on the same pages and configuration, in a copy of what it reads."""
    for name in ("build/docs", "refimpl", "taxonomy", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {p.relative_to(tmp_path / "site").as_posix() for p in (tmp_path / "site").rglob("*.html")} == pages.keys()
