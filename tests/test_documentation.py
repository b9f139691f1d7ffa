"""The documentation site: it builds without a warning, every page is in it, and its tables are true."""

import re
from pathlib import Path

import pytest

from fastdeit.recipes import RECIPES
from system import run_python

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(package, reason="pip install 'fastdeit[docs]'")
    folder = tmp_path_factory.mktemp("site")
    run_python("-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder, cwd=ROOT, status=0)
    return folder


@pytest.mark.slow
def test_every_page_is_built(site):
    assert {path.stem for path in site.glob("*.html")} == {path.stem for path in PAGES} | {"404"}


@pytest.mark.slow
def test_the_api_has_every_public_name_with_its_docstring(site):
    html = (site / "api.html").read_text()
    text = re.sub(r"<[^>]+>", "", html)
    for name in ("ImageLoader", "load_state_dict", "probabilities", "fuse", "recipe_named", "UserError"):
        assert name in text
    assert "<code>batch_size</code>: images of a batch of this process" in html  # a column of the docstring


@pytest.mark.slow
def test_links_out_of_the_folder_lead_somewhere_or_nowhere(site):
    html = (site / "clusters.html").read_text()
    targets = re.findall(r'href="(examples/[^"]+)"', html)
    assert len(targets) == 4
    assert all((site / target).read_text() == (ROOT / target).read_text() for target in targets)
    assert "../benchmarks" not in (site / "benchmarks.html").read_text()


@pytest.mark.slow
def test_the_site_loads_nothing_from_other_servers(site):
    element = re.compile(r'<(?:script|img|link rel="(?:stylesheet|preconnect)")[^>]*(?:src|href)="(https?:[^"]+)"')
    loaded = {page.name: element.findall(page.read_text()) for page in site.glob("*.html")}
    assert not any(loaded.values()), loaded


def test_the_table_of_recipes_is_true():
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", (ROOT / "docs" / "recipes.md").read_text(), re.MULTILINE)
    assert [name for name, _ in rows] == list(RECIPES)
    for name, cells in rows:
        _, pixels, epochs, batch, lr, top1 = (cell.strip() for cell in cells.split("|"))
        recipe = RECIPES[name]()
        assert int(pixels) == recipe.model.img_size
        assert int(epochs) == recipe.run.epochs
        assert int(batch.replace(",", "")) == recipe.run.global_batch
        rate, _, at = lr.partition(" at ")
        assert (float(rate), int(at or 0)) == (recipe.optim.lr, recipe.optim.lr_batch)
        if top1:
            assert top1.split()[0] in (RECIPES[name].__doc__ or "")


def test_every_picture_is_shown():
    text = "\n".join(path.read_text() for path in (*PAGES, ROOT / "README.md"))
    unused = [path.name for path in (ROOT / "docs" / "images").iterdir() if f"images/{path.name}" not in text]
    assert unused == []
