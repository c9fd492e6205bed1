"The page of effects: golden texts, every number found again, what is missing, and what is refused."
import json, re, shutil, subprocess
from dataclasses import dataclass
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
import numpy as np
import pandas as pd
import pytest

from conftest import ROOT
from mdd_bench.errors import SpecError
from mdd_bench.reporting.effects import (draw_effects, effects, printed_effects, rank_diagram, with_baseline,
                                         write_effects)
from mdd_bench.reporting.formats import to_latex, to_markdown
from mdd_bench.reporting.plots import colours
from mdd_bench.reporting.published import _known_tests
from mdd_bench.reporting.statistics import class_values, effect
from mdd_bench.reporting.tables import TABLE_METRICS
from mdd_bench.running.store import Record
from mdd_bench.running.study import load_study, notebook_parameters
from test_tables import DOCUMENT

SPEC = dict(
    data="/data/fabrics", classes=None, size=128, resize="stretch", setting="unified", options={},
    backbone="resnet18", weights="pretrained", layers=[2, 3], labelled=0, scheme="pooled", label_classes=None,
    label_seed=None, hold_out=None, epochs=10, steps=None, batch=16, protocols=["exact"],
)
CLASSES = ("felt", "lens", "tile", "wood", "yarn", "zinc")
WAVE = np.linspace(-1, 1, 200)       # what other images would do to an arm, in points


@dataclass
class Drawn(Record):
    "A record whose replicates are in memory; None: they were not kept."
    drawn: dict | None = None

    def replicates(self):
        return super().replicates() if self.drawn is None else self.drawn


def record(detector, seed, value, wave=0., classes=CLASSES, metrics=("P-AP",), test="t1", **fields):
    "Class number i scores `value` + i points; replicates move all classes by `wave` times WAVE."
    values = {cls: (value + i)/100 for i, cls in enumerate(classes)}
    per_class = {cls: dict.fromkeys(metrics, v) for cls, v in values.items()}
    drawn = {cls: {m: v + wave*WAVE/100 for m in metrics} for cls, v in values.items()}
    mean = dict.fromkeys(metrics, float(np.mean([*values.values()])))
    spec = SPEC | dict(detector=detector, seed=seed) | fields
    labels = dict(labels=dict(test_hash=test)) if spec["hold_out"] else {}
    told = dict(data_fingerprint="d1", split_hashes=dict(test=test), weights_hash="w1", steps=100,
                git_commit="0123456789", versions=dict(mdd_bench="0.1.0"))
    id = "-".join(str(part) for part in (detector, *fields.values(), seed))
    metrics_of = {"exact": dict(mean=mean, per_class=per_class, per_kind={})}
    return Drawn(id.replace(" ", ""), spec, metrics_of, {}, told | labels, Path("runs")/id, drawn)


@pytest.fixture
def records():
    "Two seeds each; beta is 2 points above alpha for sure, gamma half a point below, with a wide interval."
    levels = dict(alpha=(40, 0), beta=(42, .5), gamma=(39.5, 3))
    return [record(name, seed, *level) for name, level in levels.items() for seed in (0, 1)]


def found(records, **kwargs):
    return effects(records, "detector", {"detector": "alpha"}, **dict(metrics=["P-AP"]) | kwargs)


# ---- golden texts

CAPTION = (
    "Difference from `alpha` in points, mean over six classes of `fabrics`, two seeds. "
    "The 95% interval covers other seeds and other test images of these classes; ✓ where it excludes zero. "
    "Nothing is decidable over classes: Holm's p of two comparisons cannot fall below 0.062.")

TABLE = """\
| detector | metric | difference | 95% interval | excludes 0 | within 1 |
| :--- | :--- | ---: | ---: | ---: | ---: |
| beta | P-AP | +2.00 | +1.52 to +2.48 | ✓ | no |
| gamma | P-AP | -0.50 | -3.38 to +2.38 |  | undecided |"""

DETAILS = """\
<details>
<summary>How this was made</summary>

- Data `fabrics`, fingerprint d1
- Protocol `exact`; F1max uses the best threshold on the test set
- The same in all rows: trained 10 epochs (100 steps); size 128; resize stretch; setting unified; \
backbone resnet18; weights pretrained; layers 2,3; labelled 0; batch 16; weights_hash w1; \
seeds 0, 1
- Statistics: interval from 20 draws of the seeds for each resample of the test images, the same images in \
both arms; p of Wilcoxon's signed ranks over classes, seeds averaged, exact; Holm over all rows
- Versions: mdd_bench 0.1.0; commits 0123456
- Not verified against published numbers: alpha, beta, gamma

| detector | records |
| :--- | :--- |
| alpha | alpha-0 alpha-1 |
| beta | beta-0 beta-1 |
| gamma | gamma-0 gamma-1 |

</details>"""


def test_the_page_is_golden(records, tmp_path):
    text = write_effects(tmp_path, "study", found(records), margin=1)
    assert text == f"{CAPTION}\n\n{TABLE}\n\n{DETAILS}"
    assert (tmp_path/"study_effects.md").read_text(encoding="utf-8") == text + "\n"
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".csv", ".md", ".tex"]
    assert "significant" not in text


def test_latex(records):
    latex = to_latex(printed_effects(found(records)), CAPTION)
    assert r"beta & P-AP & +2.00 & +1.52 to +2.48 & $\checkmark$ \\" in latex


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="no TeX is installed")
def test_latex_compiles(records, tmp_path):
    table = found(records)
    latex = to_latex(printed_effects(table, margin=1), table.attrs["caption"])
    (tmp_path/"paper.tex").write_text(DOCUMENT % latex, encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="latin-1")
    assert done.returncode == 0 and "Overfull" not in done.stdout, done.stdout[-3000:]


# ---- every number is found again

def test_every_row_is_found_again_by_its_records(records, tmp_path):
    "From the ids in the CSV alone: difference and interval, with every digit."
    write_effects(tmp_path, "study", found(records))
    read_back = pd.read_csv(tmp_path/"study_effects.csv", index_col=[0, 1])
    by_id = {r.id: r for r in records}
    for (name, metric), row in read_back.iterrows():
        of_arm, of_base = ([by_id[id] for id in row[c].split()] for c in ("records", "baseline records"))
        assert {r.spec["detector"] for r in of_arm} == {name} and of_base == records[:2]
        again = effect(of_arm, of_base, metric)
        assert (row.difference, row.low, row.high) == pytest.approx(again[:3], rel=1e-14)
        by_hand = np.mean([[v["P-AP"] for v in r.metrics["exact"]["per_class"].values()] for r in of_arm])
        assert row.difference == pytest.approx(100*(by_hand - .425))


def test_a_rounded_zero_has_no_minus():
    rows = printed_effects(found([record("alpha", 0, 40), record("beta", 0, 39.999, .001)]))
    assert rows.iloc[0][["difference", "95% interval"]].tolist() == ["+0.00", "+0.00 to +0.00"]


def test_p_is_printed_where_it_can_decide():
    "Nine classes and one comparison; the word decides nothing where classes tie."
    classes = [f"c{i}" for i in range(9)]
    pair = [record("alpha", 0, 40, classes=classes), record("beta", 0, 42, classes=classes)]
    third = record("gamma", 0, 43, classes=classes)
    row = printed_effects(found(pair)).iloc[0]
    assert (row["Holm p"], row["smallest attainable"]) == ("0.0039", "0.0039")
    assert "Holm's p of one comparison is about other classes like these." in found(pair).attrs["caption"]
    blocks = [r.metrics["exact"]["per_class"] for r in pair]
    for cls in classes[:5]: blocks[1][cls] = blocks[0][cls]
    rows = printed_effects(found([*pair, third]))
    assert list(rows["Holm p"]) == ["not decidable with 4 of 9 classes", "0.0078"]
    assert list(rows["smallest attainable"]) == ["0.12", "0.0078"]     # 2**-3, and 2*2**-8
    assert list(printed_effects(found(pair)).columns) == ["difference", "95% interval", "excludes 0"]


# ---- what is missing

def test_without_replicates_there_are_differences_and_a_sentence(records, tmp_path):
    "Of one record only, as after a run on another machine."
    records[3].drawn = None
    table = found(records)
    text = write_effects(tmp_path, "study", table, margin=1)
    assert "There are no intervals: record beta-1 has no replicates.npz. " in text
    assert "95% interval" not in text and "- Statistics: p of Wilcoxon's" in text
    assert "| beta | P-AP | +2.00 |\n" in text
    assert table["low"].isna().all()
    assert draw_effects(table, margin=1).axes[0].get_xlabel().endswith("points (no intervals)")


def test_committed_records_make_a_page():
    "Of the repository: with replicates or without, with the sentence that goes with each."
    from mdd_bench.running.store import load_records
    for folder in ("embedded-v1/benchmark", "real/transfer"):
        records = load_records(ROOT/"results"/folder)
        kept = all((r.folder/"replicates.npz").is_file() for r in records)
        by = "label_classes" if "transfer" in folder else "detector"
        text = effects(records, by, {by: ""}).attrs["caption"]
        assert ("There are no intervals: record" in text) == (not kept)


def test_one_arm_is_told_in_one_sentence(records, tmp_path):
    for baseline in ("", "alpha"):
        text = write_effects(tmp_path, "study", effects(records[:2], "detector", {"detector": baseline}))
        assert text.startswith("Nothing can be compared with") and text.endswith(": the rows are `alpha`.")
    assert [path.name for path in tmp_path.iterdir()] == ["study_effects.md"]


def test_a_baseline_that_was_not_run_is_told_in_one_sentence(records):
    table = effects(records, "detector", {"detector": "rd4ad"})
    assert table.empty
    assert table.attrs["caption"] == ("Nothing can be compared with detector `rd4ad`: "
                                      "the rows are `alpha`, `beta`, `gamma`.")
    with pytest.raises(SpecError, match="unknown column of the baseline 'detectr'"):
        effects(records, "detector", {"detectr": "alpha"})


def test_one_seed_covers_images_only(records):
    text = found([r for r in records if r.spec["seed"] == 0]).attrs["caption"]
    assert "of these classes, but no other seed of an arm that has one; ✓" in text
    assert "`fabrics`, one seed." in text
    text = found(records[:5]).attrs["caption"]
    assert "one to two seeds" in text
    assert "of these classes, but no other seed of an arm that has one; ✓" in text
    assert "but no other seed" not in found(records).attrs["caption"]


def test_a_metric_without_a_value_in_some_class_is_left_out():
    pair = [record(name, 0, value, metrics=("P-AP", "mAD")) for name, value in (("alpha", 40), ("beta", 42))]
    pair[0].metrics["exact"]["per_class"]["lens"]["P-AP"] = float("nan")
    assert found(pair, metrics=["P-AP", "mAD"]).index.tolist() == [("beta", "mAD")]
    assert found(pair, metrics=["P-AP"]).attrs["caption"].endswith("no metric has a value in every class.")
    with pytest.raises(SpecError, match="unknown metric 'P-PA'"): found(pair, metrics=["P-PA"])


def test_what_is_left_out_is_named():
    "A metric that one class lacks, and an arm whose baseline failed."
    kept = [record(name, 0, 50 + i, metrics=("P-AP", "mAD"), labelled=n)
            for i, name in enumerate(("alpha", "beta")) for n in (0, 5) if (name, n) != ("beta", 0)]
    kept[0].metrics["exact"]["per_class"]["felt"]["mAD"] = float("nan")
    table = effects(kept, ["detector", "labelled"], {"labelled": 0}, ("P-AP", "mAD"))
    assert len(table) == 1
    assert "Left out for want of a value in every class: mAD." in table.attrs["caption"]
    assert "Left out for want of a baseline that was tested alike: `beta, 5`." in table.attrs["caption"]


def test_nothing_stale_stays_where_nothing_can_be_compared(records, tmp_path):
    write_effects(tmp_path, "study", effects(records, "detector", {"detector": ""}, ["P-AP"]))
    assert {path.suffix for path in tmp_path.iterdir()} == {".md", ".csv", ".tex"}
    alone = effects(records[:2], "detector", {"detector": ""}, ["P-AP"])
    write_effects(tmp_path, "study", alone)
    assert [path.name for path in tmp_path.iterdir()] == ["study_effects.md"]
    with pytest.raises(SpecError, match="no effects to draw. Nothing can be compared"): draw_effects(alone)


def test_warnings_stand_in_the_caption(records):
    records[0].provenance["converged_steps"] = 500
    table = found(records)
    warned = "† Not converged: trained for fewer steps than it takes, or may take, the row or its baseline."
    assert table.attrs["caption"].endswith(warned) and "alpha (100 of 500 steps)" in table.attrs["made"]
    assert "| beta † | P-AP |" in to_markdown(printed_effects(table))
    for r in records: r.spec["weights"] = "random"
    assert found(records).attrs["caption"].startswith("**RANDOM backbone weights")


# ---- what is refused

def test_mixtures_are_refused(records):
    stranger = record("delta", 0, 40, size=256)
    with pytest.raises(SpecError, match=r"several values of size.*256 \(records delta-256-0\)"):
        found([*records, stranger])
    with pytest.raises(SpecError, match="seed 0 occurs 2 times for alpha"): found([*records, records[0]])
    records[5].provenance["split_hashes"] = dict(test="t2")
    with pytest.raises(SpecError, match="not tested alike.*gamma-1"): found(records)


def test_a_class_that_no_record_has_is_refused(records):
    with pytest.raises(SpecError, match="class of record beta-0.*nope.*felt"):
        found(records, classes_of=lambda arm: ["felt", "nope"])


# ---- who is compared with whom

def labelled(detector, number, seed, value, wave=0., test=None):
    return record(detector, seed, value, wave, test=test or f"test {seed}", labelled=number, hold_out=5,
                  label_seed=seed)


@pytest.fixture
def of_labels():
    "Two detectors with and without labels, and one that learns from none; each seed has a test of its own."
    made = [labelled("dmad", n, seed, 40 + n, .5*n) for n in (0, 5) for seed in (0, 1)]
    made += [labelled("bgad", n, seed, 50 - n) for n in (0, 5) for seed in (0, 1)]
    return made + [labelled("patchcore", 0, seed, 45) for seed in (0, 1)]


BY_LABELS = ["detector", "labelled"]


def test_each_detector_meets_itself_without_labels(of_labels):
    pairs = with_baseline(of_labels, BY_LABELS, {"labelled": 0})
    assert [(arm.name, base.name) for arm, base in pairs] == [("dmad, 5", "dmad, 0"), ("bgad, 5", "bgad, 0")]
    table = effects(of_labels, BY_LABELS, {"labelled": "0"}, ["P-AP"])
    assert table.index.tolist() == [("dmad", 5, "P-AP"), ("bgad", 5, "P-AP")]
    assert table["difference"].tolist() == pytest.approx([5, -5])
    assert table.attrs["caption"].startswith("Difference from the row with labelled 0 in points, ")
    assert list(printed_effects(table).index.names) == ["detector", "labelled", "metric"]


def test_a_failed_run_leaves_the_seeds_that_both_have(of_labels):
    "Where each seed has a test of its own; one more seed of the same test would stay."
    without = [r for r in of_labels if r.id != "dmad-0-5-1-1"]
    assert len(without) == len(of_labels) - 1
    table = effects(without, BY_LABELS, {"labelled": 0}, ["P-AP"])
    assert table["seeds"].tolist() == [1, 2] and table["records"].iloc[0] == "dmad-5-5-0-0"
    no_common_seed = [without[0], labelled("dmad", 5, 1, 45)]
    text = effects(no_common_seed, BY_LABELS, {"labelled": 0}, ["P-AP"]).attrs["caption"]
    assert text.endswith("no seed, or no class, was tested in a row and in its baseline.")


def not_labelled(arm):
    return [cls for cls in CLASSES if cls not in arm.values["label_classes"].split("+")]


def learned(source, gain):
    "Labels of `source` ('a+b') make it nearly perfect, and the other classes better by `gain` points."
    number = 5 if source else 0
    made = record("dmad", 0, 40 + gain, labelled=number, hold_out=5, label_seed=0, label_classes=source)
    for cls in source.split("+") if source else (): made.metrics["exact"]["per_class"][cls] = {"P-AP": .9}
    return made


def test_each_arm_may_have_its_own_classes():
    arms = [learned(None, 0), learned("felt", 2), learned("lens+tile", -1)]
    table = effects(arms, "label_classes", {"label_classes": "-"}, ["P-AP"], not_labelled)
    assert table["difference"].tolist() == pytest.approx([2, -1])
    assert table["of classes"].tolist() == [5, 4]
    assert table.attrs["caption"].startswith("Difference from the row without label_classes in points, mean "
                                             "over four to five of six classes of `fabrics`, one seed.")


def test_the_baseline_is_a_parameter_of_some_studies():
    assert notebook_parameters(load_study("benchmark", baseline="patchcore"))["baseline"] == "patchcore"
    assert load_study("benchmark").baseline == "" and load_study("decoders").baseline == "distillation"
    assert "baseline" not in notebook_parameters(load_study("labels"))
    with pytest.raises(SpecError, match="unknown parameter of the study labels 'baseline'"):
        load_study("labels", baseline="dmad")


# ---- label seeds

def test_intervals_are_not_too_narrow_where_label_seeds_share_most_images():
    "Images err alike in all tests; replicates of one test know nothing of another. 300 experiments."
    rng, held = np.random.default_rng(11), 0
    for _ in range(300):
        of_images, arms = rng.normal(0, 1, len(CLASSES)), {0: [], 5: []}
        for seed in range(3):
            for number in arms:
                value = (1 + of_images if number else 0) + rng.normal(0, .2) + np.zeros(len(CLASSES))
                made = labelled("dmad", number, seed, 40)
                for i, cls in enumerate(CLASSES):
                    made.metrics["exact"]["per_class"][cls]["P-AP"] = .4 + value[i]/100
                    made.drawn[cls] = {"P-AP": (rng.normal(0, 1, 200) if number else np.zeros(200))/100}
                arms[number].append(made)
        difference = effect(arms[5], arms[0], "P-AP")
        held += difference.low <= 1 <= difference.high
    assert 279 <= held


# ---- pictures

def test_rows_have_the_colours_of_their_arms(records):
    ax = draw_effects(found(records)).axes[0]
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    palette = colours(["alpha", "beta", "gamma"])
    assert [dot.get_markeredgecolor() for dot in dots] == [palette["beta"], palette["gamma"]]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["beta, P-AP", "gamma, P-AP"]
    assert ax.get_xlabel() == "difference from alpha, points (filled: interval without 0)"


def test_a_diagram_of_ranks_or_why_not(records):
    with pytest.raises(SpecError, match="2 arms cannot be ranked"): rank_diagram(records[:4], metric="P-AP")
    title = rank_diagram(records, metric="P-AP").axes[0].get_title()
    assert title.startswith("P-AP, mean rank over 6 classes")
    assert class_values(records[2:4], "P-AP").shape == (2, 6)


# ---- the benchmark's page, and what was published

MVTEC = _known_tests()["MVTec AD"]


def cells_between(name, first, last):
    "The code cells of a study's notebook between two headings."
    cells = json.loads((ROOT/"nbs"/"studies"/f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells]
    start, end = (next(i for i, text in enumerate(texts) if text.startswith(h)) for h in (first, last))
    return [text for cell, text in zip(cells[start:end], texts[start:end]) if cell["cell_type"] == "code"]


def benchmark_page(folder, counts):
    "Execute the cells of the table on records that were tested on so many images; the pages."
    many = dict(classes=list(counts), metrics=TABLE_METRICS)
    made = [record(name, 0, 40, .5, **many) for name in ("rd4ad", "uniad")]
    for r in made: r.provenance["test_counts"] = {cls: list(n) for cls, n in counts.items()}
    space = dict(records=made, folder=folder, by=["detector"], baseline="", study=load_study("benchmark"))
    cells = cells_between("benchmark", "import warnings", "Runs that are recorded")
    cells += ["def display(*_): pass", *cells_between("benchmark", "## The table", "## The same as bars")]
    for code in cells: exec(code, space)
    return {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.md")}


def test_published_numbers_stand_below_ours_for_all_classes_of_mvtec(tmp_path):
    pages = benchmark_page(tmp_path, MVTEC)
    ours, apart = pages["benchmark.md"].split("\n\n---\n\n")
    assert apart.startswith("**Published (not ours, not ranked)**") and "| UniAD | [" in apart
    assert "| uniad |" in ours and "UniAD" not in ours and "| **" not in apart and "<u>" not in apart
    assert "mAD" in apart.splitlines()[2] and "mAD is our mean of the seven printed metrics." in apart
    assert re.search(r"\[1\] ADer benchmark", apart)
    assert "Published" in pages["benchmark_per_class.md"] and "metal_nut" in pages["benchmark_per_class.md"]
    assert "Published" not in pages["benchmark_effects.md"]


@pytest.mark.parametrize("counts", [
    {cls: n for cls, n in MVTEC.items() if cls != "zipper"} | {"zip": MVTEC["zipper"]},
    {cls: (good + 1, bad) for cls, (good, bad) in MVTEC.items()},
], ids=["another class", "other images"])
def test_nothing_published_stands_below_other_data(tmp_path, counts):
    assert not [name for name, text in benchmark_page(tmp_path, counts).items() if "Published" in text]
