"The front door: short, with links that lead somewhere, numbers from the results, and Python that runs."
import re, runpy
import pandas as pd
import pytest
from conftest import ROOT
from mdd_bench.data.synthetic import CLASSES
from mdd_bench.detectors.detector import detector_class
from mdd_bench.evaluation.protocols import get_protocol
from mdd_bench.running.runtime import Runtime
from mdd_bench.running.store import load_records

README = (ROOT/"README.md").read_text(encoding="utf-8")
RESULTS = ROOT/"results"

def blocks(language):
    "The code blocks of the README in one language."
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)

def test_it_is_short():
    assert len(README.splitlines()) <= 150

def test_its_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert len(links) > 10
    assert not [link for link in links if not (ROOT/link).exists()]

# --- its numbers

def tables(text):
    "The tables of a page in Markdown."
    return re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE)

def cell(page, row, column):
    "What a page of the results has in a row, which its first cell names, and a column."
    for table in tables((RESULTS/page).read_text(encoding="utf-8")):
        cells = [line.strip("|\n").split("|") for line in table.splitlines()]
        head, _, *lines = [[word.strip(" *") for word in line] for line in cells]
        found = [line for line in lines if line[0].removesuffix(" †") == row]
        if column in head and found: return re.sub("</?u>", "", found[0][head.index(column)])
    raise KeyError(f"{page} has no {column} of {row}")

def rooms():
    "'[data](nbs/data): 00 to 08', ...: the rooms of the notebooks, each with its first and its last number."
    for folder in sorted(path for path in (ROOT/"nbs").iterdir() if path.is_dir()):
        numbers = sorted(path.name.split("_")[0] for path in folder.glob("[0-9]*.ipynb"))
        if numbers: yield f"[{folder.name}](nbs/{folder.name}): {numbers[0]} to {numbers[-1]}"

def stated():
    """What the README says with numbers, made from where they come from: a record, a page, a recipe.

    A sentence with a number that is not here fails `test_every_number_comes_from_somewhere`."""
    rd4ad, uniad = detector_class("rd4ad").recipe, detector_class("uniad").recipe
    demo = next(r for r in load_records(RESULTS/"embedded-v1"/"benchmark") if r.spec["detector"] == "rd4ad")
    epochs, steps = demo.spec["epochs"], demo.provenance["steps"]
    real = load_records(RESULTS/"real"/"benchmark")[0]
    effects = pd.read_csv(RESULTS/"real"/"benchmark"/"benchmark_effects.csv")
    of_mddnet = effects[(effects["detector"] == "mddnet") & (effects["metric"] == "mAD")].iloc[0]
    claims = pd.read_csv(RESULTS/"real"/"claims"/"claims.csv")
    standardised = claims[claims["claim"].str.contains("levels of RD4AD are standardised as well")].iloc[0]
    converged = [cell("real/lengths/lengths.md", name, "converged") for name in ("rd4ad", "mddnet")]
    bgad = next(r for r in load_records(RESULTS/"real"/"benchmark") if r.spec["detector"] == "bgad")
    of_labels = load_records(RESULTS/"real"/"labels")
    labelled = {r.spec["labelled"] for r in of_labels if r.spec["detector"] == "dmad"}
    first, *others, last = sorted(labelled)
    kinds = sum(len(cls.kinds) for cls in CLASSES.values())
    parity = pd.read_csv(RESULTS/"real"/"parity"/"parity.csv").set_index("by")
    by_us, by_anomalib = 100*parity["mAD"][["mdd_bench", "anomalib"]]
    return [
        f"at {real.spec['size']} pixels",
        f"+{of_mddnet['difference']:.1f} points of mAD ({of_mddnet['low']:.1f} to {of_mddnet['high']:.1f})",
        f"+{standardised['gain']:.1f} ({standardised['low']:.1f} to {standardised['high']:.1f}) if",
        f"a plain flow, for {bgad.spec['steps']} steps",
        f"DMAD with {first}, {', '.join(map(str, others))} and {last} labelled anomalies of each class",
        f"after {epochs} epochs of {steps*demo.spec['batch']//epochs} images",
        f"here {steps} of [{' and '.join(converged)}](results/real/lengths/lengths.md)",
        f"AUPRO up to {get_protocol('exact').fpr_limit:.0%} false positives",
        f"over {rd4ad.epochs} epochs to {uniad.epochs} (UniAD)",
        f"{Runtime.cache_gb} GB in all",
        f"MVTec AD at 256 pixels with a wide ResNet-50 takes {gigabytes_of_mvtec():.1f}",
        f"at {load_records(RESULTS/'real'/'benchmark_256')[0].spec['size']} pixels",
        f"Python {settings_of('min_python')} or newer",
        f"{kinds} kinds of defects",
        f"our RD4AD has a mAD of {by_us:.1f} and theirs {by_anomalib:.1f}",
        *rooms(), *BY_HAND,
    ]

BY_HAND = [     # no record has these
    "116 and 243 s from the clone to the table",     # measured by a clock, on two machines
    "floats and 12 of 16 bits",                      # cameras with 12 bits write files with 16
]

def gigabytes_of_mvtec():
    "The features of its 5354 images, two bytes a number: three levels of the wide ResNet-50 at 256 pixels."
    numbers = sum(channels*(256//stride)**2 for channels, stride in ((256, 4), (512, 8), (1024, 16)))
    return 5354*2*numbers/1e9

def settings_of(name):
    return re.search(rf"^{name} = (.*)$", (ROOT/"settings.ini").read_text(), re.MULTILINE)[1]

NAMES = [       # with a number that says nothing; letters before a number make a name as well: RD4AD, F1max
    r"ResNet-\d+", "3D-AD", r"AD 2\b", "KolektorSDD and 2", r"(?:CVPR|NeurIPS) 20\d\d", r"arXiv \d{4}\.\d{5}",
    r"Apache-2\.0", r"\[\d\d[a-z]? \w+\]", r"\b\d\d[a-z]?_\w+",      # [00 errors], 01a_layouts
]

def decimals(text): return re.findall(r"\b\d{1,2}\.\d\b", text)

def prose(text):
    "A text without code and tables of results."
    for table in tables(text):
        if decimals(table): text = text.replace(table, "")
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)

def test_what_it_states_is_so():
    assert not [phrase for phrase in stated() if phrase not in README]

def unexplained(text):
    "The numbers of a text that nothing here explains, each with the words around it."
    text = prose(text)
    for phrase in stated(): text = text.replace(prose(phrase), "")
    text = re.sub(r"\]\([^)]*\)", "]", text)     # where links lead to
    for name in NAMES: text = re.sub(name, "", text)
    return re.findall(r"(?:^|.{0,30}[^A-Za-z\d])\d.{0,30}", text, re.MULTILINE)

def test_every_number_comes_from_somewhere():
    assert unexplained(README) == []

@pytest.mark.parametrize("sentence", [
    "RD4AD reaches 72.3 there.", "It takes 20 minutes.", "Trained for 1725 steps.", "| rd4ad | 12 |\n"])
def test_a_number_that_comes_from_nowhere_is_noticed(sentence):
    assert len(unexplained(f"{README}\n{sentence}")) == 1

def written_tables(folder):
    "The tables of the pages in the folders of the studies."
    pages = [page for page in folder.glob("*/**/*.md")]
    return [table.strip() for page in pages for table in tables(page.read_text(encoding="utf-8"))]

def cells(line, most=None): return tuple(word.strip() for word in line.strip().strip("|").split("|")[:most])

def test_its_tables_are_those_of_the_results():
    "Every table with decimals stands, line for line, in a page below results/, but the ledger."
    shown = [table.strip() for table in tables(README) if decimals(table) and "| claim |" not in table]
    assert shown and not set(shown) - set(written_tables(RESULTS))

def test_the_page_of_other_products_is_that_of_its_records():
    folder = RESULTS/"real"/"labels"
    made = runpy.run_path(str(folder/"other_products.py"))["page"](folder)
    assert made == (folder/"other_products.md").read_text(encoding="utf-8")

def test_its_ledger_is_that_of_the_results():
    "The first three columns of some rows."
    whole = {cells(line, 3) for line in (RESULTS/"real"/"claims"/"claims.md").read_text().splitlines()}
    shown, = [table for table in tables(README) if "| claim |" in table]
    lines = shown.splitlines()
    assert len(lines) > 5 and not {cells(line) for line in lines} - whole - {(":---",)*3}

def test_the_ledger_of_the_results_stands_in_their_front_page():
    shown = tables((RESULTS/"README.md").read_text(encoding="utf-8"))
    assert (RESULTS/"real"/"claims"/"claims.md").read_text().strip() in map(str.strip, shown)

def test_a_cell_of_a_page_is_found():
    assert cell("real/benchmark/benchmark.md", "rd4ad", "mAD") in README
    with pytest.raises(KeyError): cell("real/lengths/lengths.md", "nobody", "converged")

def test_its_python_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, = blocks("python")
    exec(code, {})
    printed = capsys.readouterr().out
    assert "| patchcore |" in printed and "| rd4ad † |" in printed and "Not verified" in printed
