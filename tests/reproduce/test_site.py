"""The static site: complete, self-contained, and nothing half written."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from bs4 import BeautifulSoup
from made_results import made_result
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from questlib.errors import ConfigError, QuestError
from reproduce.__main__ import main
from reproduce.reporting import markup, report, site
from reproduce.tables.registry import all_tables

ROOT = Path(__file__).resolve().parents[2]
PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5E"
    "rkJggg=="
)


def write_notebook(path: Path, *cells) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=list(cells)), path)


def shown(data: dict[str, str]):
    return new_output("display_data", data=data)


@pytest.fixture
def repository(tmp_path) -> Path:
    """README.md, two notebooks, one of them with a mini run, and one row of Table 2."""
    (tmp_path / "README.md").write_text(
        "# Thing: *made up*\n\nWhat it is.\n\n## More\n\nNot on the site.\n"
    )
    notebooks, mini = tmp_path / "notebooks", tmp_path / "results" / "mini"
    write_notebook(
        notebooks / "00_tour.ipynb", new_markdown_cell("# The tour"), new_code_cell("1 + 1")
    )
    for path, scale in ((notebooks, "smoke"), (mini / "table2", "mini")):
        code = new_code_cell(
            f'SCALE = "{scale}"', outputs=[new_output("stream", text=f"made at {scale}")]
        )
        write_notebook(path / "table02.ipynb", new_markdown_cell("# How `precise`?"), code)
    row = made_result({"fid": [98.5925, 98.9475]}, table="table2", row="w8a8-te-ptq")
    row.write(mini / "table2" / "w8a8-te-ptq.json")
    return tmp_path


def build(repository: Path) -> Path:
    site.build(repository / "site", repository / "results", repository)
    return repository / "site"


def pages(folder: Path) -> dict[str, BeautifulSoup]:
    return {p.name: BeautifulSoup(p.read_text(), "html.parser") for p in folder.glob("*.html")}


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> dict[str, BeautifulSoup]:
    """The site of this repository, with its folder's files under "files"."""
    folder = tmp_path_factory.mktemp("real") / "site"
    count = site.build(folder, ROOT / "results")
    found = pages(folder)
    assert len(found) == count
    return found | {"files": {p.name for p in folder.iterdir()}}


def test_every_notebook_and_table_has_its_page(real):
    wanted = {f"{p.stem}.html" for p in (ROOT / "notebooks").glob("*.ipynb")}
    wanted |= {f"results-{name}.html" for name in all_tables()} | {"index.html"}
    assert wanted == set(real) - {"files"}
    linked = {a["href"] for a in real["index.html"].find_all("a")}
    assert wanted - {"index.html"} <= linked


def test_links_hold_and_nothing_comes_from_the_network(real):
    for name, page in real.items():
        if name == "files":
            continue
        for tag in page.find_all(["a", "link", "script", "img", "iframe", "source"]):
            url = urlsplit(tag.get("href") or tag.get("src") or "")
            if url.scheme:
                assert tag.name == "a" and url.scheme in ("http", "https"), f"{name}: {tag}"
                continue
            target = real[url.path or name] if url.path.endswith(".html") or not url.path else None
            assert target is not None or url.path in real["files"], f"{name}: {tag}"
            assert not url.fragment or target.find(id=unquote(url.fragment)), f"{name}: {tag}"
        assert not page.find_all("script") and not re.search(
            r"@import|url\(", str(page.find_all("style"))
        )


def test_equations_are_mathml_and_tables_scroll(real):
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        page = real[f"{path.stem}.html"]
        shown = nbformat.read(
            site.shown_run(path, ROOT / "results"), 4
        )  # an older run's text may be another
        source = "\n".join(c.source for c in shown.cells if c.cell_type == "markdown")
        equations = re.findall(r"\$\$.+?\$\$|\$[^$]+\$", re.sub(r"`[^`]*`", "", source), re.S)
        assert len(page.find_all("math")) >= len(equations), path.name
        for table in page.find_all("table"):
            assert table.find_parent(class_=["scroll", "output_html", "output_markdown"]), path.name
        for code in page.find_all(["pre", "code"]):
            code.extract()
        assert "$" not in page.main.get_text(), path.name
    for name in all_tables():
        assert all(
            t.find_parent(class_="scroll") for t in real[f"results-{name}.html"].find_all("table")
        )


def test_our_numbers_are_those_of_the_result_files(real):
    for table in all_tables().values():
        rows = (
            real[f"results-{table.name}.html"]
            .find("h2", string="Ours")
            .find_next("table")
            .find_all("tr")
        )
        column = [th.text for th in rows[0].find_all("th")].index("FID")
        results = report.committed(table.name, ROOT / "results")
        for (_, result), row in zip(results, rows[1:], strict=True):
            text = row.find_all("td")[column].text
            fid = result.metric("fid").value
            if fid is not None:
                assert text.startswith(f"{fid:.2f}")
            else:
                assert not re.search(r"\d", text)


def test_index_and_runs(repository):
    found = pages(build(repository))
    index = found["index.html"].main.get_text(" ")
    assert (
        found["index.html"].title.text == "Thing: made up"
        and "What it is." in index
        and "Not on the site" not in index
    )
    assert index.index("The tour") < index.index("How precise?")
    assert "Not executed" in found["00_tour.html"].text and "1 + 1" in found["00_tour.html"].text
    assert (
        "mini scale" in found["table02.html"].find(class_="about").text
        and "made at mini" in found["table02.html"].text
    )
    assert (
        found["00_tour.html"].footer.a["href"] == "table02.html"
        and found["table02.html"].footer.a["href"] == "00_tour.html"
    )
    (row,) = (tr for tr in found["index.html"].find_all("tr") if "98.77 ± 0.25" in tr.text)
    assert (
        row.td.text == "W8A8"
        and "1 of 7 rows run" in index
        and "6 rows not run: not run yet" in index
    )
    heads = (
        found["index.html"].find(id="ablation").find_next("table").tr.text
    )  # no numbers in the paper: ours alone
    assert "FID" in heads and "paper" not in heads
    (repository / "results" / "mini" / "table2" / "table02.ipynb").unlink()
    assert (
        "numbers mean nothing" in pages(build(repository))["table02.html"].find(class_="about").text
    )  # the committed smoke run


def test_reading_order():
    order = [
        "00_tour",
        "10_engine",
        "20_own",
        "table02",
        "table10",
        "figure02",
        "30_ablation",
        "other",
    ]
    assert [
        p.stem for p in sorted((Path(f"{n}.ipynb") for n in order[::-1]), key=site.reading_order)
    ] == order


def test_links_between_notebooks_and_out_of_the_site():
    text = "[a](table02.ipynb#FID) [b](../README.md) [c](https://example.org/x.ipynb)"
    text += " [d](#here) `$HOME`"
    links = BeautifulSoup(markup.markdown(text), "html.parser").find_all("a")
    assert [a["href"] for a in links] == [
        "table02.html#FID",
        "https://example.org/x.ipynb",
        "#here",
    ]
    assert (
        "b" in markup.markdown(text)
        and "README" not in markup.markdown(text)
        and "$HOME" in markup.markdown(text)
    )


def test_equations():
    html = markup.markdown(
        "Of $2^b$ values.\n\n$$\\left\\| \\tilde O_l \\right\\|^2$$\n\n"
        "\\begin{equation}x\\end{equation}"
    )
    assert (
        html.count("<math") == 3
        and html.count('display="block"') == 2
        and "$" not in html
        and "\\" not in html
    )
    with pytest.raises(QuestError, match="nosuch"):
        markup.markdown("$\\nosuch{x}$")


def test_outputs(repository):
    """Images become files with words; a widget's text stands for it; code and data are escaped."""
    widget = shown(
        {
            "application/vnd.jupyter.widget-view+json": '{"model_id": "1"}',
            "text/plain": "100%|####|",
        }
    )
    code = new_code_cell(
        '# NBVAL_IGNORE_OUTPUT\n"<b>"',
        outputs=[shown({"image/png": PNG, "text/plain": "Figure"}), widget],
    )
    write_notebook(
        repository / "notebooks" / "figure02.ipynb",
        new_markdown_cell("## Seen\n\n|a|b|\n|-|-|\n|1|2|"),
        code,
    )
    folder = build(repository)
    page = pages(folder)["figure02.html"]
    assert page.img["alt"] == "Figure: Seen" and (folder / page.img["src"]).read_bytes().startswith(
        b"\x89PNG"
    )
    assert "100%|####|" in page.text and not page.find_all("script") and "NBVAL" not in page.text
    assert page.table.find_parent(class_="scroll") and '"<b>"' in page.find(class_="highlight").text


def test_a_site_is_replaced_whole(repository):
    folder = build(repository)
    (folder / "old.html").touch()
    assert build(repository) == folder and not (folder / "old.html").exists()
    assert not list(repository.glob(".site-*"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda r: (r / "notebooks" / "00_tour.ipynb").write_text("{"),
            "00_tour.ipynb: expected a Jupyter notebook",
        ),
        (
            lambda r: (r / "notebooks" / "00_tour.ipynb").write_text("{}"),
            "00_tour.ipynb: expected a Jupyter notebook",
        ),
        (
            lambda r: (r / "results" / "mini" / "table2" / "fp.json").write_text("{"),
            "fp.json: expected JSON",
        ),
        (lambda r: (r / "README.md").write_text("no title"), "expected a title"),
        (lambda r: (r / "results" / "mini").rename(r / "gone"), "expected a folder .*mini"),
    ],
)
def test_bad_input_leaves_the_site_as_it_was(repository, damage, words):
    folder = build(repository)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    damage(repository)
    with pytest.raises(QuestError, match=words):
        build(repository)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before and not list(
        repository.glob(".site-*")
    )


def test_a_failed_swap_puts_the_old_site_back(repository, monkeypatch):
    folder = build(repository)
    rename = Path.rename

    def full(self, target):
        if self.name == "new":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(ConfigError, match="cannot be replaced .No space left"):
        build(repository)
    assert (folder / "index.html").is_file() and not list(repository.glob(".site-*"))


@pytest.mark.parametrize("place", ["a file", "someone's folder", "below a file"])
def test_places_that_cannot_be_written(repository, place, capsys):
    out = repository / "elsewhere"
    if place == "someone's folder":
        out.mkdir()
        (out / "thesis.txt").write_text("work of years")
    else:
        out.write_text("work of years")
    kept = out / "thesis.txt" if out.is_dir() else out
    asked = out / "site" if place == "below a file" else out
    assert main(["site", "--out", str(asked), "--results", str(repository / "results")]) == 2
    error = capsys.readouterr().err
    assert str(out) in error and error.count("\n") == 1 and kept.read_text() == "work of years"
