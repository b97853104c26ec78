from __future__ import annotations

import base64
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings, strategies as st
from markdown_it import MarkdownIt
from PIL import Image

from llavakit.contracts.errors import LlavaError
from llavakit.contracts.sections import Card, Curves, Gallery, Section, Table
from llavakit.engine.environment import recipe_text
from llavakit.recipe.recipe import Recipe
from llavakit_plugins.reporting.charts import Chart, draw_lines
from llavakit_plugins.reporting.markdown import code, escape, table
from llavakit_plugins.reporting.report import write_report
from llavakit_plugins.reporting.run_folder import StepRecord

HOSTILE = (
    """<script>alert('x')</script> & <img src="http://e.org/a.png" onerror=f()> | `a` _b_ *c*"""
)
VOID = {"meta", "link", "img", "input", "br", "hr"}


class Page(HTMLParser):
    """An HTML page: its elements, its texts, and whether its elements nest."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def make_recipe(**options: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "tiny",
            "seed": 7,
            "model": {
                "vision": {"use": "clip", "layer": -2},
                "connector": {"use": "mlp", **options},
                "language": {"use": "llama"},
            },
            "steps": [
                {"use": "pretrain", "lr": 2e-3, "data": {"use": "llava_json", "path": "a.json"}},
                {"use": "evaluate"},
            ],
        }
    )


def make_record(
    run: Path,
    *sections: Section,
    name: str = "02-evaluate",
    seconds: float = 83,
    metrics: dict[str, float] | None = None,
) -> StepRecord:
    return StepRecord(
        name=name,
        folder=run / name,
        seconds=seconds,
        metrics=metrics or {},
        sections=[*sections],
    )


def report(run: Path, records: Sequence[StepRecord], recipe: Recipe | None = None) -> None:
    """Write the report of a run, beside the recipe where there is none."""
    if run.is_dir() and not (run / "recipe.toml").exists():
        (run / "recipe.toml").write_text(recipe_text(recipe or make_recipe()))
    write_report(run, records)


def write(run: Path, *sections: Section, **metrics: float) -> Page:
    report(run, [make_record(run, *sections, metrics=metrics)])
    return Page((run / "report.html").read_text(encoding="utf-8"))


def read_markdown(run: Path) -> str:
    """Return report.md as an independent reader understands it."""
    reader = MarkdownIt("commonmark").enable("table")
    rendered: str = reader.render((run / "report.md").read_text(encoding="utf-8"))
    return rendered


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "02-evaluate").mkdir(parents=True)
    return folder


# -- the whole -------------------------------------------------------------------------------------


def test_the_report_shows_steps_model_options_and_metrics(run: Path) -> None:
    plan = {"parts": {"vision": {"parameters": 1262592}}}
    (run / "plan.json").write_text(json.dumps(plan))
    (run / "environment.json").write_text(json.dumps({"packages": {"torch": "2.12"}, "cpus": 2}))
    (run / "recipe.toml").write_text(recipe_text(make_recipe()))
    with (run / "recipe.toml").open("a") as file:
        file.write("# ours\n")
    page = write(run, accuracy=0.9375, blind_accuracy=0.25)
    plain = Page(read_markdown(run)).text
    for shown in (
        "tiny",
        "seed 7",
        "1 of 2 steps done",
        "accuracy 0.9375",
        "blind accuracy 0.25",
        "1 min 23 s",
        "vision clip 1,262,592 layer -2",
        "01-pretrain not yet run",
        "packages.torch 2.12",
        "# ours",
    ):
        assert shown in page.text
        assert shown in plain


def test_a_step_shows_its_options_by_their_dotted_names(run: Path) -> None:
    report(run, [make_record(run, name="01-pretrain")])
    page = Page((run / "report.html").read_text())
    assert "lr 0.002 data.use llava_json data.path a.json" in page.text


def test_a_report_of_no_step_says_so(run: Path) -> None:
    report(run, [])
    page = Page((run / "report.html").read_text())
    assert "0 of 2 steps done" in page.text
    assert page.text.count("not yet run") == 2
    assert page.text.count("not recorded") == 1  # the environment


def test_bars_show_the_share_of_the_longest_step(run: Path) -> None:
    short = make_record(run, name="01-pretrain", seconds=20.75)
    report(run, [short, make_record(run)])
    page = Page((run / "report.html").read_text())
    assert [bar["width"] for bar in page.all("rect")] == ["25.0%", "100.0%"]


def test_hostile_text_shows_as_text_everywhere(run: Path) -> None:
    (run / "environment.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    (run / "recipe.toml").write_text(HOSTILE)
    curves = Curves(
        title=HOSTILE, x=HOSTILE, y=HOSTILE, series={HOSTILE: [(0, 1), (1, 2)]}, caption=HOSTILE
    )
    grid = Table(title=HOSTILE, columns=[HOSTILE, "b"], rows=[[HOSTILE, 1]], caption=HOSTILE)
    card = Card(image=f"{HOSTILE}.png", lines=[(HOSTILE, HOSTILE)])
    gallery = Gallery(title=HOSTILE, cards=[card], caption=HOSTILE)
    record = make_record(run, curves, grid, gallery, metrics={HOSTILE: 1.0})
    report(run, recipe=make_recipe(**{HOSTILE: HOSTILE}), records=[record])

    page = Page((run / "report.html").read_text())
    assert not page.all("script")
    assert not page.all("img")
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    # environment 2, recipe 1, curves 5, table 4, gallery 5 with the image's note, options 2
    assert page.text.count("alert('x')</script>") >= 19

    rendered = read_markdown(run)
    assert "<script" not in rendered
    assert "<img" not in rendered
    assert "<em>b</em>" not in rendered
    assert Page(rendered).text.count("alert('x')</script>") >= 15


def test_no_text_drives_a_terminal(run: Path) -> None:
    text = "a\x1b[2J\x9bb"
    (run / "environment.json").write_text(json.dumps({text: text}))
    curves = Curves(title=text, x=text, y=text, series={text: [(0, 1), (1, 2)]}, caption=text)
    grid = Table(title=text, columns=[text, "b"], rows=[[text, 1]], caption=text)
    gallery = Gallery(title=text, cards=[Card(image="a.png", lines=[(text, text)])], caption=text)
    report(
        run, recipe=make_recipe(**{text: text}), records=[make_record(run, curves, grid, gallery)]
    )
    for name in ("report.html", "report.md"):
        written = (run / name).read_text()
        assert "\x1b" not in written
        assert "\x9b" not in written
        assert "[2J" in written


def test_the_page_needs_nothing_from_elsewhere(run: Path) -> None:
    Image.new("RGB", (8, 8)).save(run / "02-evaluate" / "a.png")
    card = Card(image="a.png", lines=[("question", "?")], right=True)
    page = write(
        run,
        Gallery(title="g", cards=[card]),
        Curves(title="c", x="step", y="loss", series={"loss": [(0, 1), (1, 0.5)]}),
    )
    html = (run / "report.html").read_text()
    assert str(run) not in html
    assert "file:" not in html
    assert not re.search(r"url\(|@import|https?://", html)
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.elements}
    for _, attributes in page.elements:
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("data:image/", "#"))
    policy = next(m["content"] for m in page.all("meta") if "http-equiv" in m)
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_every_image_has_words_in_its_place(run: Path) -> None:
    """For whoever hears the page."""
    Image.new("RGB", (8, 8)).save(run / "02-evaluate" / "a.png")
    cards = [Card(image="a.png", lines=[("question", "?")], right=None)] * 2
    page = write(run, Gallery(title=HOSTILE, cards=cards))
    said = [image["alt"] for image in page.all("img")]
    assert said == [f"image {number} of {HOSTILE}" for number in (1, 2)]


def test_links_of_the_summary_lead_to_their_steps(run: Path) -> None:
    page = write(run)
    targets = {f"#{section['id']}" for section in page.all("section") if "id" in section}
    assert {link["href"] for link in page.all("a")} == targets != set()


def test_text_of_any_script_is_kept(run: Path) -> None:
    text = "„größer“ 数字 مرحبا 🐈"
    page = write(run, Table(title=text, columns=[text], rows=[[text]]))
    assert page.text.count(text) == 3
    assert read_markdown(run).count(text) == 3


def test_the_same_records_give_the_same_bytes(run: Path) -> None:
    section = Curves(title="c", x="step", y="loss", series={"loss": [(0, 1), (1, 0.5)]})
    write(run, section, loss=0.5)
    before = {file: (run / file).read_bytes() for file in ("report.html", "report.md")}
    write(run, section, loss=0.5)
    assert before == {file: (run / file).read_bytes() for file in before}
    assert {path.name for path in run.iterdir()} == {"02-evaluate", "recipe.toml", *before}


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(LlavaError, match=r"cannot write .*report\.html"):
        report(tmp_path / "absent", [])


def test_damaged_facts_beside_the_report_do_not_stop_it(run: Path) -> None:
    (run / "environment.json").write_text('{"torn')
    (run / "plan.json").write_text("[1]")
    (run / "recipe.toml").write_bytes(b"name = '\xff'")
    assert "not recorded" in write(run).text


def test_a_record_survives_the_step_folder_s_json(run: Path) -> None:
    section = Curves(title="c", x="s", y="l", series={"loss": [(0, math.nan), (1, math.inf)]})
    record = make_record(run, section, Table(title="t", columns=["a"], rows=[[math.nan], [None]]))
    stored = json.loads(json.dumps(record.model_dump(mode="json")))
    again = StepRecord.model_validate(stored)
    report(run, [record])
    html = (run / "report.html").read_bytes()
    report(run, [again])
    assert (run / "report.html").read_bytes() == html


def test_the_models_of_sections_import_nothing_heavy() -> None:
    names = "{'torch', 'PIL', 'jinja2'}"
    program = f"import sys, llavakit.contracts.sections; print(*{names} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout.strip() == b""


# -- tables ----------------------------------------------------------------------------------------


def test_a_table_s_numbers_read_alike(run: Path) -> None:
    section = Table(
        title="t",
        columns=["name", "share", "count", "rate", "mixed"],
        rows=[
            ["a", 1.0, 12345, 2e-5, "x"],
            ["b", 0.8625, 7, 0.5, 3],
            ["c", None, None, math.nan, None],
            ["d", math.inf, -20000, -math.inf, 0.25],
        ],
    )
    page = write(run, section)
    assert "a 1.0000 12,345 2e-05 x" in page.text
    assert "b 0.8625 7 0.5 3" in page.text
    assert "c – – NaN –" in page.text
    assert "d ∞ -20,000 −∞ 0.25" in page.text
    rendered = read_markdown(run)
    assert '<td style="text-align:right">12,345</td>' in rendered
    assert "<td>0.25</td>" in rendered


def test_rows_longer_or_shorter_than_the_head_are_shown(run: Path) -> None:
    section = Table(title="t", columns=["a", "b"], rows=[[1], [2, 3, 4], []])
    page = write(run, section)
    assert "a b 1 2 3 4" in page.text
    assert Page(read_markdown(run)).text.count("a b 1 2 3 4") == 1


def test_a_table_of_no_rows_or_columns_is_shown(run: Path) -> None:
    sections = (Table(title=t, columns=c, rows=[]) for t, c in (("one", ["a"]), ("none", [])))
    assert "one a none" in write(run, *sections).text
    read_markdown(run)


texts = st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["C"]), max_size=20)


@settings(deadline=None)
@given(st.lists(st.lists(texts, min_size=2, max_size=2), max_size=4))
def test_markdown_shows_any_cell_as_it_is(rows: list[list[str]]) -> None:
    lines = table(
        ["left", "right"], [[escape(cell) for cell in row] for row in rows], [False, True]
    )
    rendered = MarkdownIt("commonmark").enable("table").render("\n".join(lines))
    cells = re.findall(r"<td[^>]*>(.*?)</td>", rendered, flags=re.DOTALL)
    read = ["".join(Page(cell.replace("<br>", "\n")).texts) for cell in cells]
    expected = [
        "\n".join(filter(None, map(str.strip, c.splitlines()))) for row in rows for c in row
    ]
    assert read == expected


@pytest.mark.parametrize("text", ["a", "```\na\n```", "`" * 7, ""])
def test_markdown_code_is_kept_as_it_is(text: str) -> None:
    rendered = MarkdownIt("commonmark").render(code(text, "toml"))
    assert "".join(Page(rendered).texts).strip() == text


# -- galleries -------------------------------------------------------------------------------------


def embedded(page: Page) -> Image.Image:
    (element,) = page.all("img")
    head, data = (element["src"] or "").split(",")
    assert head.removesuffix(";base64") in ("data:image/png", "data:image/jpeg")
    image = Image.open(BytesIO(base64.b64decode(data)))
    assert (str(image.width), str(image.height)) == (element["width"], element["height"])
    return image


def show_image(run: Path, name: str) -> Page:
    return write(run, Gallery(title="g", cards=[Card(image=name, lines=[("question", "which?")])]))


def test_a_small_image_keeps_every_pixel_and_is_magnified_crisply(run: Path) -> None:
    image = Image.effect_noise((56, 40), 80).convert("RGB")
    image.save(run / "02-evaluate" / "a.png")
    page = show_image(run, "a.png")
    assert embedded(page).convert("RGB").tobytes() == image.tobytes()
    assert page.all("img")[0]["class"] == "small"
    assert "![](02-evaluate/a.png)" in (run / "report.md").read_text()


def test_a_large_photograph_becomes_a_small_jpeg(run: Path) -> None:
    Image.effect_noise((1600, 800), 80).save(run / "02-evaluate" / "a.png")
    image = embedded(show_image(run, "a.png"))
    assert (image.format, image.size) == ("JPEG", (384, 192))


def test_a_large_drawing_becomes_a_png(run: Path) -> None:
    Image.new("RGB", (640, 640), "teal").save(run / "02-evaluate" / "a.bmp")
    image = embedded(show_image(run, "a.bmp"))
    assert (image.format, image.size) == ("PNG", (384, 384))


def test_transparency_and_orientation_are_kept(run: Path) -> None:
    Image.new("RGBA", (300, 200), (9, 9, 9, 100)).save(run / "02-evaluate" / "a.png")
    assert embedded(show_image(run, "a.png")).getpixel((0, 0)) == (9, 9, 9, 100)
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side
    Image.new("RGB", (300, 200)).save(run / "02-evaluate" / "b.jpg", exif=exif)
    assert embedded(show_image(run, "b.jpg")).size == (200, 300)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK", "I;16", "F"])
def test_images_of_any_mode_are_embedded(run: Path, mode: str) -> None:
    Image.new(mode, (20, 10)).save(run / "02-evaluate" / "a.tiff")
    assert embedded(show_image(run, "a.tiff")).size == (20, 10)


def test_a_changed_image_is_read_again(run: Path) -> None:
    for colour in ((10, 20, 30), (200, 20, 30)):
        Image.new("RGB", (9, 9), colour).save(run / "02-evaluate" / "a.png")
        assert embedded(show_image(run, "a.png")).convert("RGB").getpixel((0, 0)) == colour


@pytest.mark.parametrize(
    "name", ["absent.png", "folder", "zero\0byte", "x" * 5000, "torn.png", "t"]
)
def test_an_image_that_cannot_be_read_leaves_a_note(run: Path, name: str) -> None:
    (run / "02-evaluate" / "folder").mkdir()
    (run / "02-evaluate" / "t").write_text("text")
    whole = BytesIO()
    Image.effect_noise((64, 64), 50).save(whole, "png")
    (run / "02-evaluate" / "torn.png").write_bytes(whole.getvalue()[:900])
    page = show_image(run, name)
    assert not page.all("img")
    assert re.search("no such image|cannot be read|no path of an image", page.text)
    assert "which?" in page.text


@pytest.mark.parametrize("name", ["../../secret.png", "link.png", "{parent}/secret.png"])
def test_an_image_outside_of_the_run_is_refused(run: Path, name: str) -> None:
    Image.new("RGB", (8, 8)).save(run.parent / "secret.png")
    (run / "02-evaluate" / "link.png").symlink_to(run.parent / "secret.png")
    page = show_image(run, name.format(parent=run.parent))
    assert not page.all("img")
    assert "outside of the run's folder" in page.text
    assert str(run.parent) not in (run / "report.html").read_text()
    assert "secret" not in (run / "report.md").read_text()


def test_an_image_of_another_step_is_shown(run: Path) -> None:
    (run / "01-scenes").mkdir()
    Image.new("RGB", (8, 8)).save(run / "01-scenes" / "a b.png")
    assert embedded(show_image(run, "../01-scenes/a b.png")).size == (8, 8)
    assert "![](01-scenes/a%20b.png)" in (run / "report.md").read_text()


def test_right_and_wrong_are_told_by_more_than_colour(run: Path) -> None:
    cards = [
        Card(lines=[("answer", "3"), ("truth", "3")], right=True),
        Card(lines=[("answer", "4"), ("truth", "3")], right=False),
        Card(lines=[("answer", "5"), ("remark", "open")]),
    ]
    page = write(run, Gallery(title="g", cards=cards))
    assert "1 of 2 right" in page.text
    assert "✓ right answer 3 truth 3 ✗ wrong answer 4 truth 3 answer 5 remark open" in page.text
    plain = Page(read_markdown(run)).text
    assert "1 of 2 right" in plain
    assert "Image answer truth remark Verdict 3 3 ✓ right 4 3 ✗ wrong 5 open" in plain


# -- charts ----------------------------------------------------------------------------------------


def draw(*points: tuple[float, float], log: bool | None = None) -> Chart:
    return draw_lines({"loss": points}, title="t", x="step", y="loss", log=log)


def parse(chart: Chart) -> ElementTree.Element:
    assert chart.svg is not None
    return ElementTree.fromstring(str(chart.svg))


def paths(chart: Chart, kind: str) -> list[list[list[tuple[float, float]]]]:
    """Return the strokes of every path of a kind, in shares of the plot's width and height."""
    found = []
    for path in parse(chart).iter("path"):
        if kind in path.attrib["class"].split():
            strokes = path.attrib["d"].removeprefix("M").split("M")
            pairs = [[p.removesuffix("h0").split() for p in s.split("L")] for s in strokes if s]
            found.append([[(float(x) / 1000, 1 - float(y) / 1000) for x, y in s] for s in pairs])
    return found


def ticks(chart: Chart, axis: str) -> Iterator[tuple[float, float]]:
    """Yield (value, place) of the ticks of an axis, as a reader takes them from the labels."""
    for text in parse(chart).iter("text"):
        classes = text.attrib["class"].split()
        if axis in classes and "name" not in classes:
            share = float(text.attrib[axis].removesuffix("%")) / 100
            label = (text.text or "").replace(",", "").replace("−", "-")
            scale = {"k": 1e3, "M": 1e6, "B": 1e9}.get(label[-1], 1.0)
            yield float(label.rstrip("kMB")) * scale, share if axis == "x" else 1 - share


def read_back(ticks: Sequence[tuple[float, float]], place: float) -> float:
    (v0, p0), (v1, p1) = ticks[0], ticks[-1]
    return v0 + (v1 - v0) * (place - p0) / (p1 - p0)


@pytest.mark.parametrize("scale", [1.0, 1e-7, 3e4, 2e9, -5.0])
def test_a_linear_chart_reads_back_as_its_values(scale: float) -> None:
    points = [(0, 0.0), (10, 2 * scale), (40, 1 * scale)]
    chart = draw(*points, log=False)
    across, up = list(ticks(chart, "x")), list(ticks(chart, "y"))
    assert len(across) >= 3
    assert 3 <= len(up) <= 9
    (stroke,) = paths(chart, "line")[0]
    for (x, y), (left, top) in zip(points, stroke, strict=True):
        assert read_back(across, left) == pytest.approx(x, abs=0.1)
        assert read_back(up, top) == pytest.approx(y, abs=abs(scale) / 200)
        assert 0 <= left <= 1
        assert 0 <= top <= 1


def test_a_logarithmic_chart_reads_back_as_its_values() -> None:
    values = [8.0, 1.0, 0.3, 0.05, 0.04, 0.03, 0.03, 0.03]
    chart = draw(*enumerate(values))
    up = [(math.log10(value), place) for value, place in ticks(chart, "y")]
    (stroke,) = paths(chart, "line")[0]
    for value, (_, top) in zip(values, stroke, strict=True):
        assert 10 ** read_back(up, top) == pytest.approx(value, rel=0.03)


def test_the_axis_is_logarithmic_where_that_reads_better() -> None:
    accuracy = [(x, 1 - 0.95 * math.exp(-x / 5)) for x in range(30)]
    falling = [(x, 0.02 + 6 * math.exp(-x / 3)) for x in range(30)]
    assert 0.0 in dict(ticks(draw(*accuracy), "y"))
    assert 0.0 not in dict(ticks(draw(*falling), "y"))
    assert 0.0 in dict(ticks(draw(*falling, log=False), "y"))
    assert 0.0 not in dict(ticks(draw(*accuracy, log=True), "y"))


def test_a_logarithmic_axis_of_values_not_above_zero_is_linear_and_says_so() -> None:
    chart = draw((0, 0.0), (1, 5.0), log=True)
    assert 0.0 in dict(ticks(chart, "y"))
    assert any("linear" in note for note in chart.notes)


def test_few_points_are_dots_and_many_noisy_ones_a_running_mean() -> None:
    few = draw(*((x, x % 3) for x in range(20)))
    assert len(paths(few, "dots")) == 1
    assert not paths(few, "raw")

    noisy = draw(*((x, 1.0 + x % 2) for x in range(400)))
    assert not paths(noisy, "dots")
    assert len(paths(noisy, "raw")) == 1
    (mean,) = paths(noisy, "line")[0]
    middle = [read_back(list(ticks(noisy, "y")), top) for _, top in mean[50:-50]]
    assert middle == pytest.approx([1.5] * len(middle), abs=0.08)
    assert noisy.legend[0].last == pytest.approx(1.5, abs=0.08)

    schedule = draw(*((x, min(x / 30, (1 + math.cos(math.pi * x / 400)) / 2)) for x in range(401)))
    assert not paths(schedule, "raw")


def test_thinning_keeps_the_highest_and_the_lowest_value() -> None:
    points = [(x, 1.0 + x % 2) for x in range(50_000)]
    points[31_415] = (31_415, 9.0)
    points[27_182] = (27_182, 0.25)
    chart = draw(*points, log=False)
    (stroke,) = paths(chart, "raw")[0]
    assert len(stroke) < 1000
    up = list(ticks(chart, "y"))
    heights = [read_back(up, top) for _, top in stroke]
    assert max(heights) == pytest.approx(9, abs=0.02)
    assert min(heights) == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("count", [10, 200, 5000])
def test_what_is_not_finite_leaves_a_gap_and_a_note(count: int) -> None:
    points = [(float(x), math.nan if x == count // 2 else 2.0 + x % 2) for x in range(count)]
    chart = draw(*points, (math.inf, 1.0))
    assert [len(path) for path in paths(chart, "line")] == [2]
    assert any(note.startswith(f"2 of {count + 1} values") for note in chart.notes)


def test_nothing_to_draw_is_a_note(run: Path) -> None:
    assert draw().svg is None
    assert draw().notes == ("no values",)
    assert draw((0, math.nan), (1, -math.inf)).svg is None
    page = write(run, Curves(title="empty", x="step", y="loss", series={}))
    assert "empty no values" in page.text


def test_every_series_has_its_own_style_and_legend() -> None:
    series = {f"line {i}": [(0.0, float(i)), (1.0, i + 1.0)] for i in range(12)} | {"empty": []}
    chart = draw_lines(series, title="t", x="step", y="loss")
    assert [key.name for key in chart.legend] == list(series)
    assert len({key.style for key in chart.legend}) == len(series)
    assert [key.last for key in chart.legend] == [*(i + 1.0 for i in range(12)), None]


numbers = (
    st.floats() | st.integers(-1000, 1000).map(float) | st.sampled_from([1e300, 5e-324, 1e299])
)
lines = st.dictionaries(st.text(max_size=5), st.lists(st.tuples(numbers, numbers), max_size=80))


@settings(deadline=None)
@given(lines, st.sampled_from([None, True, False]))
def test_any_values_give_a_chart_that_is_well_formed(
    series: dict[str, list[tuple[float, float]]], log: bool | None
) -> None:
    chart = draw_lines(series, title="t", x="step", y="loss", log=log)
    if chart.svg is None:
        assert chart.notes
        return
    for path in parse(chart).iter("path"):
        assert re.fullmatch(r"[MLh0-9. -]*", path.attrib["d"])
        places = [float(number) for number in re.findall(r"-?[\d.]+", path.attrib["d"])]
        assert all(-1 <= place <= 1001 for place in places)
