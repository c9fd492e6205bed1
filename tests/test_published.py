"What the lesson on published numbers tells badly: every suspect cell, and what must not be compared."
import itertools
from types import SimpleNamespace
import pandas as pd
import pytest
from mdd_bench.errors import SpecError
from mdd_bench.reporting.published import (METRICS, SOURCES, _as_printed, _known_tests, beside, cells,
                                           dataset_of, published, published_markdown, with_published)

APPENDIX = "Dinomaly appendix"
MVTEC, VISA = _known_tests()["MVTec AD"], _known_tests()["VisA"]


def record(counts, scored=None, **spec):
    "A stand-in: classes with their (good, anomalous) test images; `scored`: the classes that have metrics."
    per_class = {cls: {"P-AP": .5} for cls in (scored or counts)}
    return SimpleNamespace(
        spec=dict(setting="unified", labelled=0, data="anywhere") | spec,
        metrics=dict(exact=dict(mean={"P-AP": .5}, per_class=per_class)),
        provenance=dict(test_counts={cls: list(n) for cls, n in counts.items()}),
    )


# ---- the numbers

def test_every_number_has_a_source_that_is_explained():
    rows = published(cls=None)
    assert len(_as_printed()) == 3640 and len(rows) > 3640
    assert rows.notna().all(axis=None)
    assert set(rows["source"]) == set(SOURCES)
    assert all(source.citation and source.note for source in SOURCES.values())
    for source, of_source in rows.groupby("source"):
        assert of_source["note"].str.startswith(SOURCES[source].note).all()


def test_numbers_are_percentages():
    rows = published(cls=None)
    assert rows["value"].between(0, 100).all() and rows["value"].max() > 99
    assert set(rows["unit"]) == {"percent"} and set(rows["setting"]) == {"unified"}


def test_no_number_stands_twice():
    assert not published(cls=None).duplicated(["source", "dataset", "cls", "method", "metric"]).any()


@pytest.mark.parametrize("dataset, method, metric, source, value", [
    ("MVTec AD", "UniAD", "I-AUROC", "Dinomaly Table 1", 96.5),
    ("MVTec AD", "UniAD", "I-AUROC", "ADer 100 epochs", 92.5),
    ("MVTec AD", "RD4AD", "P-AP", "ADer 100 epochs", 48.2),       # called RD there
    ("MVTec AD", "DeSTSeg", "P-AP", "ADer 300 epochs", 75.8),     # called DesTSeg there
    ("VisA", "UniAD", "AUPRO", APPENDIX, 75.6),                   # a printed mean that contradicts Table 1
])
def test_numbers_by_hand(dataset, method, metric, source, value):
    assert published(dataset, "unified", method, metric, source)["value"].tolist() == [value]


def test_the_mean_of_the_metrics_is_theirs():
    asked = dict(dataset="VisA", method="MambaAD", source="Dinomaly Table 1")
    seven = published(metric=METRICS, **asked)["value"]
    [mean] = published(metric="mAD", **asked)["value"]
    assert len(seven) == 7 and mean == pytest.approx(seven.mean())


def test_questions():
    assert published(setting="separate").empty
    assert set(published(method=["UniAD", "DiAD"])["method"]) == {"UniAD", "DiAD"}
    assert set(published()["cls"]) == {"mean"} and len(set(published("VisA", cls=None)["cls"])) == 13
    for wrong in (dict(dataset="MVTec-AD"), dict(setting="unify"), dict(method="UniAd"), dict(metric="PRO")):
        with pytest.raises(SpecError, match="Did you mean"): published(**wrong)


def test_an_answer_is_the_askers_own():
    mine = published()
    mine.loc[:, "value"] = 0.
    assert published()["value"].min() > 0


# ---- what is suspect

MISPRINTS = {
    ("MVTec AD", "UniAD", "metal_nut", "P-AUROC"): 62.7,
    ("MVTec AD", "UniAD", "grid", "P-AUROC"): 63.1,
    ("MVTec AD", "RD4AD", "hazelnut", "I-AUROC"): 60.8,
    ("VisA", "RD4AD", "macaroni1", "I-AP"): 1.5,
    ("VisA", "DeSTSeg", "capsules", "P-F1max"): 9.1,
}

def suspects():
    rows = published(cls=None, metric=METRICS)
    return rows[rows["suspect"]]


@pytest.mark.parametrize("cell, value", MISPRINTS.items())
def test_misprints_are_marked_with_their_own_reason(cell, value):
    dataset, method, cls, metric = cell
    rows = published(dataset, method=method, metric=metric, cls=cls)
    [row] = rows.itertuples()
    assert row.suspect and row.value == value
    assert f"suspect: {value}" in row.note


def test_exactly_the_known_cells_are_suspect():
    "Those above, all of UniAD, two metrics of RD4AD whose means do not fit, and the row of hazelnut."
    expected = set(MISPRINTS)
    for dataset, classes in (("MVTec AD", MVTEC), ("VisA", [*VISA, "mean"])):
        expected |= {(dataset, "UniAD", *rest) for rest in itertools.product(classes, METRICS)}
    expected |= {("MVTec AD", "RD4AD", *rest) for rest in itertools.product(MVTEC, ("P-AP", "P-F1max"))}
    expected |= {("MVTec AD", "RD4AD", "hazelnut", metric) for metric in ("I-AP", "I-F1max")}
    rows = suspects()
    assert {(r.dataset, r.method, r.cls, r.metric) for r in rows.itertuples()} == expected
    assert len(rows) == len(expected) == 105 + 91 + 30 + 5
    assert set(rows["source"]) == {APPENDIX}


def test_every_misfit_of_means_and_cells_is_marked():
    "Computed from the numbers: where the cells do not have the printed mean, one of them is suspect."
    every = published(["MVTec AD", "VisA"], metric=METRICS, source=[APPENDIX, "Dinomaly Table 1"], cls=None)
    by = ["dataset", "method", "metric"]
    of_classes = every[every["cls"] != "mean"].groupby(by)
    printed = every[every["source"] == "Dinomaly Table 1"].set_index(by)["value"]
    off = (of_classes["value"].mean() - printed).abs() > .1
    misfits = set(off[off].index)
    assert len(misfits) == 14
    assert misfits <= {(r.dataset, r.method, r.metric) for r in suspects().itertuples()}


def test_a_mean_of_suspects_is_suspect():
    rows = published("MVTec AD", method=["UniAD", "RD4AD", "DiAD"], metric="mAD", cls="grid")
    assert dict(zip(rows["method"], rows["suspect"])) == {"UniAD": True, "RD4AD": True, "DiAD": False}
    assert not published(metric="mAD", source="Dinomaly Table 1")["suspect"].any()


# ---- which dataset

def test_the_counts_are_those_of_the_papers():
    totals = {dataset: tuple(map(sum, zip(*tests.values()))) for dataset, tests in _known_tests().items()}
    assert totals == {"MVTec AD": (467, 1258), "VisA": (962, 1200), "BTAD": (451, 290), "MPDD": (176, 282),
                      "MVTec 3D": (249, 948), "MVTec LOCO": (575, 993)}
    assert len(MVTEC) == 15 and len(VISA) == 12


def test_classes_of_the_numbers_are_those_of_the_datasets():
    for dataset, tests in (("MVTec AD", MVTEC), ("VisA", VISA)):
        assert set(published(dataset, cls=None)["cls"]) - {"mean"} == set(tests)
    assert set(_known_tests()) <= set(published()["dataset"])


@pytest.mark.parametrize("dataset", _known_tests())
def test_a_dataset_is_known_by_its_tests_wherever_it_lies(dataset):
    tests = _known_tests()[dataset]
    found = beside([record(tests, data="/home/somebody/parts")])
    assert dataset_of(record(tests)) == dataset
    assert set(found["dataset"]) == {dataset} and set(found["cls"]) == {"mean"}
    assert len(found) == len(published(dataset, metric=METRICS))


ALIENS = {
    "the name alone": record(dict(cap=(10, 20)), data="mvtec"),
    "one class more": record(MVTEC | dict(cap=(10, 20))),
    "other images of the same classes": record({cls: (10, 20) for cls in MVTEC}),
    "an image missing": record(MVTEC | dict(bottle=(20, 62))),
    "classes of two datasets": record({"bottle": MVTEC["bottle"], "candle": VISA["candle"]}),
    "no counts": SimpleNamespace(spec=dict(setting="unified", labelled=0), provenance={},
                                 metrics=dict(exact=dict(per_class=dict.fromkeys(MVTEC, {})))),
    "no classes": record({}),
}

@pytest.mark.parametrize("name", ALIENS)
def test_other_data_are_of_no_dataset(name):
    alien = ALIENS[name]
    assert dataset_of(alien) is None
    for per_class in (False, True):
        found = beside([alien], per_class=per_class)
        assert found.empty and list(found) == list(published())


# ---- what may stand beside

@pytest.mark.parametrize("records", [
    [],
    [record(MVTEC, setting="separate")],
    [record(MVTEC, labelled=10)],
    [record(MVTEC), record(VISA)],
    [record(MVTEC), record(MVTEC, labelled=1)],
    [record(MVTEC), record({"bottle": MVTEC["bottle"]})],
], ids=["none", "separate", "labelled", "two datasets", "one arm labelled", "other classes"])
def test_nothing_stands_beside_what_does_not_match(records):
    assert beside(records).empty and beside(records, "P-AP", per_class=True).empty
    assert with_published("ours", records) == "ours"


def test_some_classes_have_numbers_per_class_only():
    part = record({cls: VISA[cls] for cls in ("candle", "pcb3")})
    assert beside([part]).empty
    rows = beside([part, part], "AUPRO", per_class=True)
    assert set(rows["cls"]) == {"candle", "pcb3"} and set(rows["source"]) == {APPENDIX}
    assert len(rows) == 2*7


def test_classes_that_were_tested_but_not_scored_do_not_count():
    part = record(MVTEC, scored=["bottle"])
    assert beside([part]).empty and set(beside([part], "P-AP", per_class=True)["cls"]) == {"bottle"}


def test_metrics_that_nobody_publishes_are_left_out():
    assert set(beside([record(VISA)], ["P-FPR95", "mAD", "P-AP"])["metric"]) == {"mAD", "P-AP"}
    assert beside([record(VISA)], "P-FPR95").empty


def test_committed_records_have_nothing_beside_them():
    "Ours are of data that nobody has published on."
    from conftest import ROOT
    from mdd_bench.running.store import load_records
    records = load_records(ROOT/"results"/"real"/"efficiency")
    assert records and beside(records).empty


# ---- how it looks

def lines_of(text): return [line for line in text.splitlines() if line.startswith("|")]


def test_columns_are_in_the_order_asked_and_rows_in_alphabetical_order():
    table = cells(beside([record(MVTEC)], ["mAD", "AUPRO", "I-AP"]))
    assert list(table.columns) == ["mAD", "AUPRO", "I-AP"]
    assert list(table.index) == sorted(table.index)
    values = pd.to_numeric(table["AUPRO"])
    assert not values.is_monotonic_increasing and not values.is_monotonic_decreasing


def test_markdown_is_set_apart_and_ranks_nothing():
    text = with_published("| ours |", [record(VISA)], ("I-AUROC", "mAD"))
    ours, apart = text.split("\n\n---\n\n")
    assert ours == "| ours |"
    assert apart.startswith("**Published (not ours, not ranked)**\n\n| method | source |")
    assert not any("**" in line or "<u>" in line for line in lines_of(apart))
    assert len(lines_of(apart)) == 2 + len(published("VisA", metric="mAD"))
    for number, source in enumerate(sorted(SOURCES), 1):
        assert f"[{number}] {SOURCES[source].citation}: " in apart
        assert any(f"| [{number}] |" in line for line in lines_of(apart))


def test_suspect_numbers_carry_a_mark_and_a_reason():
    rows = beside([record({cls: MVTEC[cls] for cls in ("grid", "tile")})], "P-AUROC", per_class=True)
    text = published_markdown(rows, "cls")
    assert "| UniAD | [1] | 63.1 (?) | 91.8 (?) |" in text and "| DiAD | [1] | 96.6 | 92.4 |" in text
    assert "(?) Suspect: 63.1, with metal_nut, lowers the mean" in text
    clean = published_markdown(published("MVTec AD", method="DiAD"))
    assert "(?)" not in clean and "Suspect" not in clean


def test_nothing_to_show_is_an_empty_text():
    nothing = beside([])
    assert published_markdown(nothing) == "" and cells(nothing).empty
