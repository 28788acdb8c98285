"""The site as a person meets it: headless Chromium, wide and phone-wide, light and dark."""

import functools
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from playwright.sync_api import sync_playwright

import taxonomy

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.xdist_group("site"),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt install chromium)"),
    # Chromium and the server close sockets in an order that Python's bookkeeping does not like.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"),
]
GPTQ = "survey/compression/quantization/weight_only/gptq.html"
PAGES = [
    "index.html",
    "survey/index.html",
    "survey/compression/quantization/index.html",
    "survey/compression/quantization/weight_only/index.html",
    GPTQ,
    "survey/compression/quantization/weight_only/rtn.html",
    "survey/systems/frameworks/vllm.html",
    "graph.html",
    "papers.html",
    "results/claims.html",
    "results/weights.html",
    "guide/python.html",
]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address(site):
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def browser():
    flags = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address):
    """`visit(path, width=…, dark=…)` opens a page and watches it; at the end nothing may have gone wrong or outside."""
    complaints, contexts = [], []

    def open_page(path, *, width=1280, height=900, dark=False):
        scheme = "dark" if dark else "light"
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: complaints.append(f"{path}: {m.text}") if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: complaints.append(f"{path}: {e}"))
        page.on("requestfailed", lambda r: complaints.append(f"{path}: failed {r.url}"))
        page.on(
            "request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else complaints.append(r.url)
        )
        page.goto(address + path, wait_until="networkidle")
        page.wait_for_function(
            "want => document.body.dataset.mdColorScheme === want", arg="slate" if dark else "default"
        )
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not complaints


@pytest.mark.parametrize("path", PAGES)
def test_pages_open_without_complaint_and_fit_the_phone(visit, path):
    """No console error, no outside request; at 390 pixels nothing makes the page itself scroll sideways."""
    page = visit(path, width=390, height=800)
    assert page.locator("h1").count() == 1
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.parametrize("path", PAGES)
def test_dark_is_dark(visit, path):
    """Oracle: luminance of what is drawn. Text is lighter than the ground by a contrast of 4.5 at least (WCAG AA)."""
    page = visit(path, dark=True)
    ground, ink = page.evaluate(
        """() => ["backgroundColor", "color"].map(name => {
            let e = document.querySelector("article p, article li"), c;
            do { c = getComputedStyle(e)[name]; e = e.parentElement } while (name == "backgroundColor" && e && /, 0\\)$|transparent/.test(c));
            return c.match(/[\\d.]+/g).slice(0, 3).map(Number) })"""
    )
    assert luminance(ink) > luminance(ground)
    assert (luminance(ink) + 0.05) / (luminance(ground) + 0.05) >= 4.5


def luminance(rgb):
    channels = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * channels[0] + 0.7152 * channels[1] + 0.0722 * channels[2]


def test_home_counts_what_the_taxonomy_holds(visit):
    """Oracle: the taxonomy."""
    tree = taxonomy.load()
    facts = visit("index.html").locator(".facts b").all_inner_texts()
    ready = sum(m.implemented for m in tree.methods.values())
    assert facts == [str(n) for n in (len(tree.methods), ready, len(tree.papers), len(tree.categories))]


def test_from_home_to_a_method_by_clicks(visit):
    page = visit("index.html")
    page.get_by_role("link", name="Model compression").last.click()
    page.locator("article").get_by_role("link", name="Quantization", exact=True).first.click()
    page.locator("article").get_by_role("link", name="Weight-only post-training quantization").first.click()
    page.locator("article table").first.get_by_role("link", name="GPTQ").click()
    assert page.url.endswith(GPTQ)
    assert page.locator("h1").inner_text().startswith("GPTQ")
    assert page.locator("math").count() > 5


def test_search_finds_a_method(visit):
    page = visit("index.html")
    page.keyboard.press("/")
    page.keyboard.type("gptq", delay=20)
    page.locator(".md-search-result__link").first.wait_for()
    assert any("gptq" in (link.get_attribute("href") or "") for link in page.locator(".md-search-result__link").all())


def test_papers_are_filtered(visit):
    """Oracle: the taxonomy, filtered by hand."""
    tree = taxonomy.load()
    page = visit("papers.html")
    shown = page.locator("#paper-list > li:not([hidden])")
    assert shown.count() == len(tree.papers)
    page.locator("#paper-filters [name=text]").fill("flash attention")
    wanted = [p for p in tree.papers.values() if all(w in searchable(p) for w in ("flash", "attention"))]
    assert 0 < shown.count() == len(wanted) < len(tree.papers)
    page.locator("#paper-filters [name=text]").fill("")
    page.locator("#paper-filters [name=category]").select_option("inference/kv_cache")
    page.locator("#paper-filters [name=year]").select_option("2024")
    inside = [
        p
        for p in tree.papers.values()
        if p.year == 2024 and any(f"{c}/".startswith("inference/kv_cache/") for c in p.categories)
    ]
    assert shown.count() == len(inside) > 3
    assert page.locator("#paper-filters output").inner_text() == f"{len(inside)} of {len(tree.papers)}"


def searchable(paper):
    return f"{paper.key} {paper.title} {paper.name or ''} {paper.arxiv or ''} {' '.join(paper.authors)}".lower()


def test_explorer_zooms_pans_and_resets(visit):
    page = visit("graph.html", height=1200)
    svg = page.locator("#explorer svg")
    box = svg.bounding_box()
    before = svg.get_attribute("viewBox")
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 3
    page.mouse.move(x, y)
    page.mouse.wheel(0, -400)
    page.wait_for_function(f"document.querySelector('#explorer svg').getAttribute('viewBox') != '{before}'")
    zoomed = [float(v) for v in svg.get_attribute("viewBox").split()]
    assert zoomed[2] < float(before.split()[2])
    page.mouse.down()
    page.mouse.move(x + 120, y + 40, steps=5)
    page.mouse.up()
    panned = [float(v) for v in svg.get_attribute("viewBox").split()]
    assert panned[0] < zoomed[0]
    assert panned[2] == pytest.approx(zoomed[2])
    page.get_by_role("button", name="Reset").click()
    page.wait_for_function(
        "whole => document.querySelector('#explorer svg').getAttribute('viewBox').split(' ').every((v, i) => Math.abs(v - whole.split(' ')[i]) < 1e-6)",
        arg=before,
    )


def test_explorer_filters_and_leads_to_pages(visit):
    """Oracle: the taxonomy, filtered by hand."""
    tree = taxonomy.load()
    page = visit("graph.html", height=1200)
    lit = page.locator("#explorer .node.kind-method:not(.dim)")
    assert lit.count() == len(tree.methods)
    page.locator("#graph-filters [name=category]").select_option("compression")
    assert lit.count() == len(tree.find(category="compression"))
    page.locator("#graph-filters [name=covered]").check()
    assert lit.count() == len(tree.find(category="compression", implemented=True))
    page.get_by_role("button", name="Reset").click()
    page.locator("#graph-filters [name=text]").fill("gptq")
    assert lit.count() == 1
    page.locator("#graph-filters .rel-builds_on input").uncheck()
    assert page.locator("#explorer .edge.rel-builds_on:not(.gone)").count() == 0
    page.locator("#explorer .node[data-id=gptq]").click()
    page.wait_for_url(f"**/{GPTQ}")


def test_plots_are_drawn(visit):
    page = visit("results/weights.html")
    page.locator(".plot .main-svg").first.wait_for()
    assert page.locator(".plot .main-svg").count() >= page.locator(".plot").count() > 0


def test_without_javascript_the_page_still_reads(browser, address):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(address + GPTQ)
    assert page.locator("math").first.is_visible()
    context.close()
