"""The site in a browser, opened from its folder: nothing overflows, pictures follow the scheme, search finds.

Skipped without Chromium (Debian: `apt-get install chromium`) or playwright, which drives it.
"""

import io
import shutil
from collections import Counter

import pytest
from PIL import Image

from millrace.benchmarks.report.charts import DARK, LIGHT
from tests.docs.building import Site

WIDTHS = {"desktop": 1300, "telephone": 390}
PAPER = {"light": LIGHT["paper"], "dark": DARK["paper"]}
ILLUSTRATED = ("concepts.html", "index.html", "logbook.html", "performance.html", "precision.html")

OVERFLOWING = """() => {
  const screen = {left: 0, right: window.innerWidth};  // on a telephone code reaches from edge to edge
  const content = document.querySelector(".md-content__inner").getBoundingClientRect();
  const column = screen.right < 720 ? screen : content;
  const scrolls = element => ["auto", "scroll"].includes(getComputedStyle(element).overflowX);
  const found = [];
  if (document.documentElement.scrollWidth > window.innerWidth) found.push("the page");
  const kinds = ".md-content__inner :is(pre, table, img, p, li, h1, h2, h3)";
  for (const element of document.querySelectorAll(kinds)) {
    let box = element;
    for (let at = element.parentElement; at && !at.matches(".md-content__inner"); at = at.parentElement)
      if (scrolls(at)) box = at;
    const {left, right, width} = box.getBoundingClientRect();
    const cut = element.matches("pre") && ![element, ...element.children].some(scrolls)
      && element.scrollWidth > element.clientWidth;
    if (width && (left < column.left - 1 || right > column.right + 1 || cut))
      found.push(`${element.tagName}: ${(element.innerText || element.src).slice(0, 60)}`);
  }
  return found;
}"""
"""What is wider than its column and lies in nothing that scrolls; the page itself if it scrolls sideways."""

BROKEN = "() => [...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src)"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return Site(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def browser():
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")
    with driver.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.fixture
def tab(browser, request):
    """A tab whose system asks for the scheme that the test is parametrised with, else for light."""
    context = browser.new_context(
        color_scheme=getattr(request, "param", "light"), viewport={"width": 1300, "height": 900}
    )
    yield context.new_page()
    context.close()


def test_nothing_overflows_and_no_picture_is_broken(site, tab):
    pages = [*site.folder.glob("*.html"), site.folder / "source/engine/trainer.py.html"]
    assert len(pages) > 30
    problems = []
    for page in pages:
        for name, width in WIDTHS.items():
            tab.set_viewport_size({"width": width, "height": 900})
            if name == "desktop":  # made narrower afterwards: the menu slides away while a page grows
                tab.goto(page.as_uri())
            problems += [f"{page.name}, {name}: {found}" for found in tab.evaluate(OVERFLOWING)]
        problems += [f"{page.name}: broken picture {address}" for address in tab.evaluate(BROKEN)]
    assert not problems, "\n".join(problems)


def test_what_overflows_or_is_broken_is_seen(site, tab):
    tab.goto((site.folder / "index.html").as_uri())
    assert not tab.evaluate(OVERFLOWING)
    wide = '<p style="width: 3000px">wide</p><img src="none.png">'
    tab.evaluate(
        "html => document.querySelector('.md-content__inner').insertAdjacentHTML('beforeend', html)", wide
    )
    tab.wait_for_function("document.images[document.images.length - 1].complete")
    assert any(found.startswith("P: wide") for found in tab.evaluate(OVERFLOWING))
    assert [address.rsplit("/", 1)[1] for address in tab.evaluate(BROKEN)] == ["none.png"]


@pytest.mark.parametrize("name", WIDTHS)
def test_search_finds_pages_from_a_folder(site, tab, name):
    tab.set_viewport_size({"width": WIDTHS[name], "height": 900})
    tab.goto((site.folder / "index.html").as_uri())
    if name == "telephone":
        tab.locator("label.md-header__button[for=__search]").click()
    tab.locator(".md-search__input").click()
    tab.keyboard.type("Newton-Schulz")
    first = tab.locator(".md-search-result__item a").first
    first.wait_for(timeout=30_000)
    addresses = tab.locator(".md-search-result__item a").evaluate_all("all => all.map(a => a.href)")
    assert any("optimizers.html" in address for address in addresses), addresses
    first.click()
    tab.wait_for_url("**/*.html?h=*")
    assert "Newton" in tab.locator(".md-content").inner_text()


def shown(locator):
    """The most frequent colour of a picture, as its reader sees it, and how many others it has."""
    locator.scroll_into_view_if_needed()
    pixels = Image.open(io.BytesIO(locator.screenshot())).convert("RGB")
    counts = Counter(pixels.get_flattened_data())
    return "#{:02x}{:02x}{:02x}".format(*counts.most_common(1)[0][0]), len(counts)


@pytest.mark.parametrize(
    ("tab", "switched"), [("light", False), ("dark", False), ("light", True)], indirect=["tab"]
)
def test_pictures_follow_the_scheme_of_the_page(site, tab, switched, request):
    """`switched`: the reader asks the page for the other scheme than the system's."""
    system = request.node.callspec.params["tab"]
    scheme = {"light": "dark", "dark": "light"}[system] if switched else system
    seen = 0
    for name in ILLUSTRATED:
        tab.goto((site.folder / name).as_uri())
        if switched and seen == 0:
            tab.locator("label.md-header__button[title=Dark]").click()
        tab.wait_for_function(
            "name => document.body.dataset.mdColorScheme === name",
            arg={"light": "default", "dark": "slate"}[scheme],
        )
        for drawing in tab.locator(".md-content img[src$='.svg']").all():
            paper, colours = shown(drawing)
            assert paper == PAPER[scheme], (name, drawing.get_attribute("src"))
            assert colours > 20
            seen += 1
    assert seen >= 11
