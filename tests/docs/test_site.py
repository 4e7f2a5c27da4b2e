"""The documentation builds as a site without a warning, needs no network, and no link of it leads nowhere."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

import millrace.kernels
from tests.docs.building import Site, build, load

ROOT = Path(__file__).resolve().parents[2]


LOADS = {
    "script": ("src",),
    "link": ("href",),
    "img": ("src", "srcset"),
    "source": ("src", "srcset"),
    "video": ("src", "poster"),
    "iframe": ("src",),
    "object": ("data",),
    "embed": ("src",),
    "image": ("href",),
    "use": ("href",),
}
"""What a browser fetches without being asked."""


class Addresses(HTMLParser):
    """Addresses of a page: those that a browser loads, and those that a reader may follow."""

    def __init__(self, html):
        super().__init__()
        self.loaded, self.linked, self.names = [], [], set()
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in LOADS.get(tag, ()) and value:
                self.loaded.append(value)
            elif (tag, name) == ("a", "href") and value:
                self.linked.append(value)
            elif name == "id":
                self.names.add(value)
            elif name == "style" and "url(" in (value or ""):
                self.loaded.append(value)


def is_outside(address):
    return address.startswith("//") or urlsplit(address).scheme not in ("", "data")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return Site(tmp_path_factory.mktemp("site"))


def test_builds_without_a_warning(site):
    said = site.built.stdout + site.built.stderr
    assert site.built.returncode == 0, said
    assert "WARNING" not in said
    assert len(site.pages) > 30


def test_a_browser_asks_nothing_of_the_network(site):
    for page in site.pages:
        outside = [address for address in Addresses(page.read_text()).loaded if is_outside(address)]
        assert not outside, f"{page.name} loads {outside}"
        assert 'class="mermaid' not in page.read_text(), f"{page.name}: the theme would fetch mermaid"
    for sheet in site.folder.rglob("*.css"):
        found = re.findall(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//[^)'\"]*", sheet.read_text())
        assert not found, f"{sheet.name} loads {found}"


def test_a_page_that_loads_from_elsewhere_is_seen():
    page = Addresses(
        '<script src="https://a.example/x.js"></script><img src="//b.example/y.png"><a href="https://c">'
    )
    assert [is_outside(address) for address in page.loaded] == [True, True]


def test_every_link_leads_to_a_page_of_the_site(site):
    names = {page.resolve(): Addresses(page.read_text()).names for page in site.pages}
    for page in site.pages:
        if page.name == "404.html":
            continue
        for address in Addresses(page.read_text()).linked:
            parts = urlsplit(address)
            if parts.scheme or not (parts.path or parts.fragment):
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page.resolve()
            assert target.exists(), f"{page.name} links {address}"
            if parts.fragment and target in names and not parts.fragment.startswith("__"):
                assert unquote(parts.fragment) in names[target], f"{page.name} links {address}"


def test_pages_link_source_files_that_the_site_has(site):
    assert 'href="source/engine/trainer.py.html"' in site.page("step.html")
    assert "class Trainer" in re.sub("<[^>]*>", "", site.page("source/engine/trainer.py.html"))
    assert 'href="source/kernels/index.html"' in site.page("step.html")
    assert (site.folder / "source/benchmarks/results/guidance.json").exists()


def test_a_broken_link_stops_the_build(tmp_path):
    """With the checks of mkdocs.yml: a page or heading that is not there, a page outside the navigation."""
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    (tmp_path / "docs").mkdir()
    source_pages = load("source_pages")

    def built(index, others=()):
        for name in ("index", "a", *others):
            (tmp_path / "docs" / f"{name}.md").write_text(f"# {name}\n")
        (tmp_path / "docs" / "index.md").write_text(source_pages.rewritten(f"# Index\n\n{index}\n"))
        config = {"site_name": "x", "theme": "mkdocs", "plugins": [], "validation": settings["validation"]}
        config["nav"] = [{"i": "index.md"}, {"a": "a.md"}]
        (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(config))
        return build(tmp_path / "mkdocs.yml").returncode

    assert built("[a](a.md#a)") == 0
    assert built("[a](../engine/nothing.py)") != 0
    assert built("[a](a.md#nothing)") != 0
    assert built("text", others=("left_out",)) != 0


def test_a_drawing_opens_its_file(site):
    page = site.page("concepts.html")
    for name in ("packed", "step", "routing", "data", "zero"):
        assert re.search(rf'<a href="diagrams/{name}.svg"><img [^>]*src="diagrams/{name}.svg"', page), name


def test_all_settings_and_configurations_are_listed(site):
    page = site.page("settings.html")
    schema = json.loads((ROOT / "configs" / "schema.json").read_text())
    for name, field in schema["properties"].items():
        if "$ref" in field:
            for key in schema["$defs"][field["$ref"].rsplit("/", 1)[1]]["properties"]:
                assert f"<code>{name}.{key}</code>" in page
    assert "<code>conditioning.autoencoder.tuning.enabled</code>" in page
    page = site.page("configurations.html")
    files = [path for path in (ROOT / "configs").rglob("*.json") if path.name != "schema.json"]
    assert len(files) > 25
    for path in files:
        assert f"configs/{path.relative_to(ROOT / 'configs').as_posix()}</code>" in page


def test_operations_are_beside_their_peers_once_a_gpu_was_measured():
    def row(implementation, shape, seconds):
        shown = {"operation": "geglu", "mode": "both", "status": "timed", "shape": {"name": shape}}
        return shown | {"implementation": implementation, "seconds_median": seconds}

    rows = [row("ours/triton", "256", 2.0), row("compile", "256", 3.0), row("eager", "256", 9.0)]
    rows += [row("ours/triton", "1024", 4.0), row("compile", "1024", 5.0)]
    result = {"benchmark": "kernels", "device": "cuda", "file": "kernels-x.json", "rows": rows}
    said = load("kernels_page")._on_a_gpu([result], ["geglu"])
    assert said == "1.25 to 1.50 times the fastest peer, 2 cases (`kernels-x.json`)"
    assert load("kernels_page")._on_a_gpu([result], ["add_noise"]) == "not measured"


def test_all_operations_are_listed(site):
    page = site.page("kernels.html")
    for name in millrace.kernels.__all__:
        assert name[0].isupper() or f'id="{name}"' in page, name
    assert "resources.json" in page
    assert "traffic.json" in page


def test_search_opens_from_a_folder(site):
    """A browser neither fetches a file from file:// nor starts a worker there."""
    assert (site.folder / "search" / "search_index.js").read_text().startswith("var __index = {")
    for page in site.pages:
        scripts = [address for address in Addresses(page.read_text()).loaded if address.endswith(".js")]
        assert any(address.endswith("assets/iframe-worker.js") for address in scripts), page
