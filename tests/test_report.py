"The report of a results folder: what is in it, what it survives, and how a real browser shows it."
import base64, io, json, math, re, shutil
from html.parser import HTMLParser
from urllib.parse import unquote
import pandas as pd
import pytest
from PIL import Image
from browser import Browser, find_browser
from conftest import ROOT
from mdd_bench.errors import DataError, SpecError, StoreError
from mdd_bench.reporting.arms import settings
from mdd_bench.reporting.report import facts, report, rest_as_yaml
from mdd_bench.reporting.shown import default_title, find_studies
from mdd_bench.reporting.tables import caption, per_class, summary, write_table
from mdd_bench.reporting.web import read_frame
from mdd_bench.running.inventory import inventory
from mdd_bench.running.store import Record, Store

METRICS = ("I-AUROC", "I-AP", "I-F1max", "P-AUROC", "P-AP", "P-F1max", "AUPRO", "mAD")
RUNS = [("alpha", 0), ("alpha", 1), ("beta", 0), ("beta", 1)]
EVIL = '<script>alert("x")</script>'

# --- results

def stub_record(out, number, detector="alpha", seed=0, classes=("felt", "tile"), **fields):
    "A record on the disk with invented metrics."
    spec = dict(data="/data/fabrics", backbone="resnet18", weights="pretrained", layers=[2, 3], epochs=3,
                options={}, detector=detector, seed=seed, revision=1) | fields
    scores = dict.fromkeys(METRICS, .5 + .01*number)
    metrics = dict(exact=dict(mean=scores, per_class=dict.fromkeys(classes, scores), per_kind={}))
    provenance = dict(data_fingerprint="d1", weights_hash="w1", git_commit="c0ffee1234")
    provenance |= dict(started="2026-05-01T10:00:00Z", finished="2026-05-02T10:00:00Z")
    provenance |= dict(versions=dict(mdd_bench="0.1.0"))
    store, id = Store(out), f"{number:012x}"
    store.folder(id).mkdir(parents=True)
    store.write(Record(id, spec, metrics, dict(train_s=1.5, device="cpu"), provenance))
    return store.load(id)

def stub_records(out, **fields):
    "Two detectors with two seeds."
    return [stub_record(out, 10 + i, *run, **fields) for i, run in enumerate(RUNS)]

def png(width=40, height=30):
    "The bytes of a picture."
    file = io.BytesIO()
    Image.new("RGB", (width, height), "teal").save(file, "PNG")
    return file.getvalue()

def code_cell(source, *outputs): return dict(cell_type="code", source=source, outputs=list(outputs))

def shown(kind, value): return dict(output_type="display_data", data={kind: value})

def said(text): return dict(output_type="stream", name="stdout", text=text)

def prose(*lines): return dict(cell_type="markdown", source="\n".join(lines))

def write_notebook(folder, *cells):
    "The executed notebook of a study."
    text = json.dumps(dict(cells=list(cells), metadata={}, nbformat=4, nbformat_minor=5))
    (folder/f"{folder.name}.ipynb").write_text(text, encoding="utf-8")

@pytest.fixture
def study(tmp_path):
    "The folder of a study with records, tables, pictures and a notebook."
    folder = tmp_path/"results"/"fabrics"
    records = stub_records(folder, classes=[f"felt_of_a_long_name_{i}" for i in range(12)])
    write_table(folder, "fabrics", summary(records), caption(records))
    write_table(folder, "fabrics_per_class", per_class(records), caption(records, metric="P-AP"))
    (folder/"fabrics_bars.png").write_bytes(png(900, 300))
    (folder/"fabrics_extra.png").write_bytes(png())
    table, inline = (folder/"fabrics.md").read_text(), base64.b64encode(png(20, 10)).decode()
    write_notebook(
        folder,
        prose("# Fabrics", "", "> Which *detector* is best?"),
        code_cell("secret = len(records)", dict(output_type="execute_result", data={"text/plain": "(4, 0)"})),
        prose("## The table", "Read [the lesson](../lesson.ipynb) for $N = 0$."),
        code_cell("page(table)", shown("text/markdown", table)),
        prose("## Bars and losses"),
        code_cell('save(figure, folder/"fabrics_bars.png")', shown("image/png", inline)),
        code_cell("losses", said("alpha\n"), shown("image/png", inline)))
    return folder

def plain_results(tmp_path):
    "Records of runs, and nothing else."
    stub_records(tmp_path/"results")
    return tmp_path/"results"

@pytest.mark.parametrize("data, name", [
    ("/disk/mvtec", "mvtec"), ("heldout:/disk/mvtec", "heldout:mvtec"), ("heldout:embedded-v1",)*2])
def test_drawn_defects_are_named_so_wherever_a_path_is_shortened(tmp_path, data, name):
    record = stub_record(tmp_path, 1, data=data)
    [study] = find_studies(tmp_path)
    [item] = inventory(tmp_path)
    assert settings(record)["data"] == facts([record])["Data"] == name
    assert f"\n  data: {name}\n" in rest_as_yaml(record)
    assert default_title(study) == f"alpha on {name}"
    assert item.about == f"alpha, {name}, seed 0"

# --- reading a page

VOID = {"meta", "link", "img", "br"}

class Reader(HTMLParser):
    "Reads a page, and refuses what is wrong with it."
    def __init__(self, html):
        super().__init__()
        self.open, self.ids, self.links, self.images, self.headings, self.heads = [], [], [], [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        assert tag not in ("script", "iframe", "object") and not [a for a in attrs if a.startswith("on")]
        if tag not in VOID: self.open.append(tag)
        if "id" in attrs: self.ids.append(attrs["id"])
        if tag == "a": self.links.append(attrs["href"])
        if tag == "img": self.images.append(attrs)
        if tag == "th": self.heads.append(attrs.get("scope"))
        if re.fullmatch("h[1-6]", tag): self.headings.append(int(tag[1]))

    def handle_endtag(self, tag): assert self.open.pop() == tag

def check(file):
    "Read a page that must be sound: well formed, no dead link, headings in order. Returns (html, Reader)."
    html = file.read_text(encoding="utf-8")
    page = Reader(html)
    assert len(page.ids) == len(set(page.ids)) and '<html lang="en">' in html
    assert page.headings[0] == 1 and page.headings.count(1) == 1
    assert all(b - a <= 1 for a, b in zip(page.headings, page.headings[1:]))
    assert all(image["alt"] and image["src"].startswith("data:image/") for image in page.images)
    assert set(page.heads) <= {"col", "row"}
    inside = {unquote(link[1:]) for link in page.links if link.startswith("#")}
    assert inside <= set(page.ids)
    for link in page.links:
        if not link.startswith(("#", "https:")): assert (file.parent/unquote(link)).is_file(), link
    return html, page

def rows_of(html, first):
    "The rows of all tables whose first cell has this text."
    rows = re.findall(r"<tr>.*?</tr>", html, re.DOTALL)
    return [row for row in rows if re.search(rf'<th scope="row">{first}( †)?</th>', row)]

# --- what is in it

def test_a_study_with_a_notebook(study):
    html, page = check(report(study))
    assert "<h1 " in html and ">Fabrics</h1>" in html and "Which detector is best?" in html
    assert "secret" not in html and "(4, 0)" not in html                   # no code, and no value without it
    assert "the lesson" in html and "lesson.ipynb" not in html             # its target is not there
    assert "<code>N = 0</code>" in html
    assert "alpha (2), beta (2)" in html and "2026-05-01 to 2026-05-02" in html and "c0ffee1" in html
    assert "fabrics" in html and "/data/fabrics" not in html
    assert {"fabrics.ipynb", "fabrics.csv", "fabrics.tex", "fabrics_bars.png"} <= set(page.links)
    assert "How this was made" in html

def test_rows_lead_to_records(study):
    html, _ = check(report(study))
    alphas = rows_of(html, "alpha")
    assert len(alphas) == 4          # in the table, class by class, and in their folds
    for row in alphas:
        assert re.findall('href="#record-([^"]+)"', row) == ["00000000000a", "00000000000b"]
    assert html.count("<article ") == 4 and 'href="runs/00000000000a/record.json"' in html
    article = html[html.index('<article id="record-00000000000a"'):].partition("</article>")[0]
    assert "train_s: 1.5" in article and "felt_of_a_long_name_3" in article and "60.0" in article

def test_pictures(study):
    "That of a file is better than that of the notebook; what the notebook does not show follows."
    _, page = check(report(study))
    assert [(i["width"], i["height"]) for i in page.images] == [("900", "300"), ("20", "10"), ("40", "30")]
    alts = [image["alt"] for image in page.images]
    assert [alt.split(": ", 1)[1] for alt in alts] == ["Bars", "Bars and losses: alpha", "Extra"]

def test_a_later_picture_and_table_appear_by_themselves(study):
    (study/"fabrics_worst.png").write_bytes(png())
    (study/"by_hand.md").write_text("| a | b |\n|---|---|\n| 1 | 2 |\n", encoding="utf-8")
    html, page = check(report(study))
    assert len(page.images) == 4 and ">Worst (" in html and ">By hand</h2>" in html

def test_records_alone(tmp_path):
    "As `run` and `sweep --plain` leave them."
    html, _ = check(report(plain_results(tmp_path)))
    assert "Mean over two classes of <code>fabrics</code>" in html and ">Class by class</h2>" in html
    assert all('href="#record-00000000000a"' in row for row in rows_of(html, "alpha"))

def test_a_single_record(tmp_path):
    folder = plain_results(tmp_path)/"runs"/"00000000000a"
    html, page = check(report(folder))
    assert ">alpha on fabrics</h1>" in html and html.count("<article ") == 1 and "record.json" in page.links

def test_a_run_draws_itself(kept_run, tmp_path, cli):
    "Losses, maps and failures, from the command line."
    run = kept_run("rd4ad")
    code, out, _ = cli("report", run.out, "--out", tmp_path/"deep"/"page.html")
    assert code == 0 and out.strip().endswith("page.html")
    _, page = check(tmp_path/"deep"/"page.html")
    assert len(page.images) == 3

def test_tables_of_a_grid_without_notebook(tmp_path):
    folder = tmp_path/"mine"
    records = stub_records(folder)
    write_table(folder, "mine_exact", summary(records), caption(records))
    html, page = check(report(folder))
    assert ">Exact</h2>" in html and len(rows_of(html, "alpha")) == 2
    assert [image["alt"] for image in page.images] == ["Mine, Pictures: Means over classes"]

def test_several_studies(study):
    other = study.parent/"more"/"other"
    stub_records(other)
    html, page = check(report(study.parent))
    assert ">Benchmark report</h1>" in html and "2 studies with four records" in html
    assert "(results/more/other)" in html and html.count("<article ") == 8
    assert "more/other/runs/00000000000a/record.json" in page.links
    assert {"record-00000000000a", "record-00000000000a-2", "contents"} <= set(page.ids)

def test_different_protocols_and_no_metrics(tmp_path):
    out = tmp_path/"results"
    stub_record(out, 1)
    record = stub_record(out, 2, seed=1)
    record.metrics = {}
    Store(out).write(record)
    html, _ = check(report(out))
    assert html.count("<article ") == 2

def test_records_that_fit_in_no_table(tmp_path):
    stub_record(tmp_path/"results", 1)
    stub_record(tmp_path/"results", 2)
    html, _ = check(report(tmp_path/"results"))
    assert "There is no common table: seed 0 occurs 2 times" in html

def test_unfinished_runs_are_counted(tmp_path):
    folder = plain_results(tmp_path)
    (folder/"runs"/"0123456789ab").mkdir()
    html, _ = check(report(folder))
    assert "<dt>Not finished</dt><dd>one run</dd>" in html

def test_the_same_results_are_the_same_page(study, tmp_path):
    first = report(study).read_bytes()
    assert report(study).read_bytes() == first
    shutil.copytree(study, tmp_path/"elsewhere"/"fabrics")
    assert report(tmp_path/"elsewhere"/"fabrics").read_bytes() == first

def test_links_start_where_the_page_lies(study, tmp_path):
    file = report(study, tmp_path/"a b"/"page #1.html")
    _, page = check(file)
    assert "../results/fabrics/fabrics.csv" in page.links

# --- names that were chosen to do harm

def test_names_are_escaped(tmp_path):
    folder = tmp_path/"results"/'a "quoted" & <b>bold</b> ü'
    records = stub_records(folder, classes=[EVIL, 'a"b', "größe|x"])
    for record in records: record.spec["detector"] = f"my.py:{EVIL}"
    for record in records: Store(folder).write(record)
    stub_record(folder, 30, detector="' onmouseover=alert(1) '", classes=[EVIL, 'a"b', "größe|x"], data=EVIL)
    (folder/'x" onerror="y.png').write_bytes(png())
    html, page = check(report(folder))
    assert "<script" not in html and "&lt;script&gt;alert" in html and "größe" in html
    assert len(page.images) >= 1

def test_notebooks_can_do_no_harm(tmp_path):
    folder = tmp_path/"evil"
    stub_records(folder)
    write_notebook(
        folder,
        prose(f"# {EVIL}", "", f"> {EVIL}", "", f"[x](javascript:alert(1)) {EVIL}",
              "<img src=x onerror=alert(1)> ![p](http://example.org/p.png) </details></div>"),
        prose("<iframe src='http://example.org'></iframe>", "", "<div>", "</main>"),
        code_cell("x", shown("text/html", f"<table><tr><td>{EVIL}</td></tr></table>"), said(EVIL),
                  shown("text/plain", EVIL), dict(output_type="error", ename="E", evalue=EVIL, traceback=[])))
    html, page = check(report(folder))
    assert not [link for link in page.links if "javascript" in link] and page.images == []

# --- what is not there, or broken

def test_only_a_cell_that_is_nan_is_a_dash():
    frame = pd.DataFrame({"method": ["NaNet", "plain"], "mAD": [math.nan, .5]})
    assert read_frame(frame._repr_html_()).rows == [["0", "NaNet", "-"], ["1", "plain", "0.5"]]

def test_nothing_there(tmp_path):
    (tmp_path/"empty").mkdir()
    for name in ("empty", "nowhere"):
        with pytest.raises(StoreError, match="no results in .* give a results folder"): report(tmp_path/name)

def test_a_half_written_record(tmp_path):
    folder = plain_results(tmp_path)
    file = folder/"runs"/"00000000000a"/"record.json"
    file.write_text(file.read_text()[:200])
    with pytest.raises(StoreError, match="cannot read .*00000000000a/record.json"): report(folder)
    assert not (folder/"report.html").exists()

@pytest.mark.parametrize("text", [
    '{"cells": [', "[]", '{"cells": null}', '{"cells": {"a": 1}}', '{"cells": [{}]}',
    '{"cells": [{"cell_type": "code", "metadata": {}}]}',
    *(json.dumps(dict(cells=[code_cell("", output)]))
      for output in ({}, dict(output_type="stream"), dict(output_type="error"), shown("text/html", None)))])
def test_a_damaged_notebook(study, text):
    (study/"fabrics.ipynb").write_text(text)
    with pytest.raises(StoreError, match="cannot read the notebook .*fabrics.ipynb"): report(study)

def test_a_damaged_picture_in_the_notebook(tmp_path):
    stub_records(tmp_path/"a")
    for data in ("abc", base64.b64encode(png()[:50]).decode()):
        write_notebook(tmp_path/"a", prose("# A", "## Curve"), code_cell("x", shown("image/png", data)))
        with pytest.raises(DataError, match="cannot read the picture below 'Curve'"):
            report(tmp_path/"a")

def test_odd_headings(tmp_path):
    "A second title, a level that is left out, no title at all."
    stub_records(tmp_path/"a")
    write_notebook(tmp_path/"a", prose("#### Deep"), prose("# One"), prose("# Two"))
    html, page = check(report(tmp_path/"a"))
    assert ">A</h1>" in html and page.headings[:4] == [1, 2, 2, 2]

def test_a_picture_that_is_cut_short(study):
    (study/"fabrics_extra.png").write_bytes(png()[:50])
    with pytest.raises(DataError, match="cannot read the picture .*fabrics_extra.png"): report(study)

def test_a_table_that_is_not_text(study):
    (study/"fabrics_extra.csv").write_bytes(b"\xff\xfe\x00records,\x00\n")
    (study/"notes.md").write_bytes(b"\xff\xfe broken")
    check(report(study))

def test_a_place_that_cannot_be_written(study, tmp_path, cli):
    (tmp_path/"file").write_text("")
    with pytest.raises(StoreError, match="cannot make the folder .*choose another --out"):
        report(study, tmp_path/"file"/"page.html")
    with pytest.raises(SpecError, match="ends in .html"): report(study, tmp_path)
    (tmp_path/"folder.html").mkdir()
    code, _, error = cli("report", study, "--out", tmp_path/"folder.html")
    assert code == 2 and error.startswith("error: cannot write") and error.count("\n") == 1
    assert not list(tmp_path.glob("*.part"))

def test_the_help_knows_it(cli):
    code, out, _ = cli("--help")
    assert code == 0 and " report " in out

# --- the results of this project

OURS = ["embedded-v1/benchmark", "real/efficiency", "real/labels", "real/memory", "speed"]

@pytest.mark.parametrize("name", OURS)
def test_our_own_results(name, tmp_path):
    html, page = check(report(ROOT/"results"/name, tmp_path/"page.html"))
    assert page.images and html.count("<table>") > 1 and len(html) < 2e6

# --- in a browser

NO_BROWSER = "there is no chromium here (apt-get install chromium)"
needs_browser = pytest.mark.skipif(not find_browser(), reason=NO_BROWSER)
WIDTHS = dict(phone=390, desk=1440)
SOME_BOX_SCROLLS = """[...document.querySelectorAll('.scroll')].some(
    box => box.scrollWidth > box.clientWidth)"""
DEAD = """[...document.querySelectorAll('a[href^="#"]')].filter(
    a => !document.getElementById(decodeURIComponent(a.hash.slice(1)))).length"""

@pytest.fixture(scope="module")
def browser():
    with Browser() as browser: yield browser

@needs_browser
@pytest.mark.parametrize("device", WIDTHS)
@pytest.mark.parametrize("several", [False, True])
def test_in_a_browser(browser, study, device, several):
    "Pictures are shown, nothing is fetched, nothing is complained about, and only boxes scroll sideways."
    if several: stub_records(study.parent/"other")
    width, file = WIDTHS[device], report(study.parent if several else study)
    page = browser.open(file, width, phone=device == "phone")
    assert page.complaints() == [] and page.requests() == [file.resolve().as_uri()]
    sizes = page.value("[...document.images].map(image => [image.naturalWidth, image.clientWidth])")
    assert len(sizes) >= 3 and all(natural > 0 and drawn > 0 for natural, drawn in sizes)
    page.value("document.querySelectorAll('details').forEach(fold => fold.open = true)")
    assert page.value("document.documentElement.scrollWidth") <= width
    assert page.value(SOME_BOX_SCROLLS) and page.value(DEAD) == 0

@needs_browser
def test_a_link_leads_to_its_record(browser, study):
    "The contents stand beside the text on a wide screen and above it on a phone."
    page = browser.open(report(study), 390, phone=True)
    page.value("document.querySelector('a[href=\"#record-00000000000b\"]').click()")
    assert page.value("document.querySelector(':target').id") == "record-00000000000b"
    top = page.value("document.querySelector(':target').getBoundingClientRect().top")
    assert -1 <= top < 844
    left_of_main = "document.querySelector('nav').getBoundingClientRect().right"
    main = "document.querySelector('main').getBoundingClientRect().left"
    assert page.value(f"{left_of_main} > {main}")
    assert browser.open(report(study), 1440).value(f"{left_of_main} <= {main}")

@needs_browser
def test_light_and_dark(browser, study):
    ground = "getComputedStyle(document.body).backgroundColor"
    light, dark = [browser.open(report(study), 390, dark=dark).value(ground) for dark in (False, True)]
    assert light == "rgb(255, 255, 255)" and dark != light
