"What the lesson on claims tells badly: files without claims, arms that do not belong together, signs."
from dataclasses import dataclass, replace

import matplotlib
matplotlib.use("Agg")
import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import ROOT

from mdd_bench.errors import SpecError, StoreError
from mdd_bench.reporting.claims import (Claim, draw_ledger, ledger, ledger_markdown, matching, mean_of_others,
                                        read_claims, verdict)
from mdd_bench.running.store import Record

CLASSES = ("a", "b", "c")
TESTED = dict(data_fingerprint="d1", split_hashes=dict(test="t1"))
SPEC = dict(data="drawn", weights="random", detector="x", options={}, epochs=1, label_seed=None, labelled=0,
            protocols=["exact"], label_classes=None)
GOOD = dict(claim="more is more", source="test", metric="mAD", arm=dict(detector="y"),
            against=dict(detector="x"))
HALF = {key: value for key, value in GOOD.items() if key != "against"}


@dataclass
class Drawn(Record):
    "A record with replicates in memory; None: they were not kept."
    drawn: dict | None = None

    def replicates(self):
        if self.drawn is None: raise StoreError(f"record {self.id} keeps no replicates")
        return self.drawn


def record(detector, seed, values, metric="mAD", spread=1., size=100, **spec):
    "Values [classes] in points, and replicates that deviate from them alike for every record."
    errors = spread*np.random.default_rng(5).normal(0, 1, (len(values), 200))
    per_class = {cls: {metric: value/100} for cls, value in zip(CLASSES, values)}
    drawn = {cls: {metric: (value + row)/100} for cls, value, row in zip(CLASSES, values, errors)}
    changes = dict(detector=detector, seed=seed) | spec
    id = "-".join(map(str, changes.values()))
    cost = dict(bytes_test_without_backbone=size)
    return Drawn(id, SPEC | changes, {"exact": dict(per_class=per_class)}, cost, TESTED, None, drawn)


def written(tmp_path, content):
    "A file of claims."
    file = tmp_path/"claims.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return file


def test_a_file_says_what_a_claim_is(tmp_path):
    claim, = read_claims(written(tmp_path, [GOOD]))
    assert claim == Claim(**GOOD) and claim.asks == "any gain"
    assert replace(claim, at_least=2).asks == "2 or more"
    assert replace(claim, at_least=-.5).asks == "0.5 lost at most"
    assert replace(claim, at_least=-20, metric="bytes").asks == "20% lost at most"


@pytest.mark.parametrize("content, named", [
    ("", "holds no list"), ("claim: x", "holds no list"), ("- x", "claim 1"), ("- [", "cannot be read"),
    ([GOOD | dict(metrics="mAD")], "metrics"), ([HALF], "against"), ([GOOD | dict(arm="y")], "`arm`"),
    ([GOOD, GOOD | dict(metric="P-AP")], "2 claims in"),
    ([GOOD | dict(at_least="four")], "`at_least`"), ([GOOD | dict(at_least=None)], "`at_least`"),
    ([GOOD | dict(metric=["mAD", "P-AP"])], "`metric`"), ([GOOD | dict(claim="")], "`claim`"),
    ([GOOD | dict(from_others="no")], "true or false"), ([GOOD | dict(classes="a")], "a list of names")])
def test_a_file_that_holds_no_claims_is_named(tmp_path, content, named):
    file = written(tmp_path, content)
    with pytest.raises(SpecError, match="claims.yaml") as e: read_claims(file)
    assert named in str(e.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SpecError, match=r"nothing\.yaml"): read_claims(tmp_path/"nothing.yaml")


def test_records_are_found_by_settings_and_count_once():
    records = [record("x", 0, [1, 2, 3]), record("y", 0, [1, 2, 3]), record("y", 1, [1, 2, 3])]
    assert [r.id for r in matching([*records, *records], dict(detector="y"))] == ["y-0", "y-1"]
    assert matching(records, dict(detector="z")) == []
    with pytest.raises(SpecError, match="detektor"): matching(records, dict(detektor="y"))


def test_copies_that_differ_are_refused(tmp_path):
    here, there = (replace(record("x", 0, [1, 2, value]), folder=tmp_path/str(value)) for value in (3, 4))
    with pytest.raises(StoreError, match=r"x-0 has other numbers in .*3 than in .*4"):
        matching([here, there], dict(detector="x"))
    undefined = [record("x", 0, [1, 2, float("nan")]) for _ in range(2)]
    assert len(matching(undefined, dict(detector="x"))) == 1


def test_copies_may_have_more_protocols():
    "What both have counts; copies without a protocol in common say nothing of each other."
    once, twice = record("x", 0, [1, 2, 3]), record("x", 0, [1, 2, 3])
    twice.metrics["ader"] = dict(per_class={"a": dict(mAD=.5)})
    assert len(matching([once, twice], dict(detector="x"))) == 1
    other = replace(once, metrics=dict(ader=twice.metrics["ader"]))
    with pytest.raises(StoreError, match="other numbers"): matching([once, other], dict(detector="x"))


@pytest.mark.parametrize("gain, at_least, expected", [
    (3, 0, "held"), (3, 2, "held"), (3, 4, "not held"), (0, 0, "not decidable"), (-2, 0, "not held"),
    (-.2, -1, "held"), (-3, -1, "not held")])
def test_the_interval_decides(gain, at_least, expected):
    "The seeds of the arm are 0.1 apart."
    classes = np.array([50, 60, 70])
    arm = [record("y", seed, classes + gain + .1*(seed - 1)) for seed in range(3)]
    base = [record("x", seed, classes) for seed in range(3)]
    row = ledger([Claim(**GOOD, at_least=at_least)], arm + base).iloc[0]
    assert row.verdict == expected and row.low <= row.gain <= row.high
    assert row.records.split() == ["y-0", "y-1", "y-2"] and row.seeds == 3


def test_fewer_false_positives_are_a_gain():
    rates = dict(x=20, y=15)
    records = [record(name, s, [rate + .1*s]*3, "P-FPR95") for name, rate in rates.items() for s in (0, 1)]
    row = ledger([Claim(**GOOD | dict(metric="P-FPR95"))], records).iloc[0]
    assert row.gain == pytest.approx(5) and row.low > 4 and row.verdict == "held"


def test_without_replicates_there_is_a_gain_and_no_verdict():
    records = [replace(record(name, 0, [gain]*3), drawn=None) for name, gain in (("x", 50), ("y", 53))]
    table = ledger([Claim(**GOOD)], records)
    assert table.iloc[0].gain == pytest.approx(3) and table.iloc[0].verdict == "no interval"
    assert "| **no interval** | +3.0 |" in ledger_markdown(table)
    with pytest.raises(SpecError, match="no claim has an interval"): draw_ledger(table)


def test_what_was_not_run_is_not_measured():
    table = ledger([Claim(**GOOD)], [record("x", 0, [1, 2, 3])])
    assert table.iloc[0].verdict == "not measured"
    assert "| **not measured** | - | mAD | any gain | - |" in ledger_markdown(table)


def test_bytes_are_percent_saved():
    records = [record("x", 0, [1]*3, size=200*2**20), record("y", 0, [1]*3, size=50*2**20)]
    row = ledger([Claim(**GOOD | dict(metric="bytes"))], records).iloc[0]
    assert row.gain == row.low == row.high == 75 and row.verdict == "held"
    assert "| 50.0 MiB against 200.0 MiB |" in ledger_markdown(row.to_frame().T)


def test_an_arm_that_mixes_settings_is_refused():
    records = [record("x", 0, [1]*3), record("y", 0, [1]*3), record("y", 1, [1]*3, epochs=2)]
    with pytest.raises(SpecError, match="epochs"): ledger([Claim(**GOOD)], records)


def test_other_classes_are_judged_by_the_runs_without_their_labels():
    runs = [record("y", s, values, label_classes=cls) for s in (0, 1)
            for cls, values in zip(CLASSES, ([90, 10, 20], [30, 90, 40], [50, 60, 90]))]
    merged = mean_of_others(runs)
    assert [r.spec["seed"] for r in merged] == [0, 1]
    values = {cls: of["mAD"] for cls, of in merged[0].metrics["exact"]["per_class"].items()}
    assert values == pytest.approx(dict(a=.4, b=.35, c=.3))       # (30 + 50)/2, (10 + 60)/2, (20 + 40)/2
    expected = (runs[1].drawn["a"]["mAD"] + runs[2].drawn["a"]["mAD"])/2
    assert np.allclose(merged[0].replicates()["a"]["mAD"], expected)
    base = [record("x", s, [30, 30, 30]) for s in (0, 1)]
    row = ledger([Claim(**GOOD, from_others=True)], runs + base).iloc[0]
    assert row.gain == pytest.approx(5) and row.seeds == 2 and len(row.records.split()) == 6


def test_a_class_whose_name_is_in_another_is_another_class():
    values_of = {"aa": [1, 2, 3], "a+b": [4, 5, 6]}
    runs = [record("y", 0, values, label_classes=labels) for labels, values in values_of.items()]
    values = mean_of_others(runs)[0].metrics["exact"]["per_class"]
    assert values["a"]["mAD"] == pytest.approx(.01) and values["c"]["mAD"] == pytest.approx(.045)
    unlabelled = [record("y", 0, [1, 2, 3])]
    with pytest.raises(SpecError, match="y-0 has no label_classes"): mean_of_others(unlabelled)


def test_a_claim_may_be_judged_by_some_classes():
    values_of = {"x": [1, 2, 3], "y": [11, 2, 3]}
    records = [record(name, s, values) for name, values in values_of.items() for s in (0, 1)]
    def gain(names): return ledger([Claim(**GOOD, classes=names)], records).iloc[0].gain
    assert [gain(names) for names in ([], ["a"], ["b", "c"])] == pytest.approx([10/3, 10, 0])
    with pytest.raises(SpecError, match="claim 'more is more': unknown class"): gain(["d"])


@pytest.mark.parametrize("wrong, message", [
    (dict(metric="mad"), "claim 'more is more': unknown metric 'mad'"),
    (dict(arm=dict(detektor="y")), "claim 'more is more': unknown setting")])
def test_errors_name_the_claim(wrong, message):
    records = [record(name, 0, [1, 2, 3]) for name in "xy"]
    with pytest.raises(SpecError, match=message): ledger([Claim(**GOOD | wrong)], records)


@pytest.mark.parametrize("low, high, expected", [
    (.02, .9, "not decidable"), (.05, .9, "held"), (-2, -.05, "not decidable"), (-2, -.2, "not held")])
def test_an_end_is_known_to_a_twentieth_of_the_width(low, high, expected):
    assert verdict(low, high, 0) == expected


def test_the_picture_shows_what_is_asked():
    records = [record(name, s, [50 + gain + s/10]*3) for name, gain in (("x", 0), ("y", 3)) for s in (0, 1)]
    table = ledger([Claim(**GOOD), Claim(**GOOD | dict(claim="much more", at_least=4))], records)
    bars = [line for line in draw_ledger(table).axes[0].lines if line.get_marker() == "|"]
    assert [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in bars] == [([4.], [1])]


def test_our_own_claims_are_claims():
    claims = read_claims(ROOT/"results"/"real"/"claims.yaml")
    assert len({claim.claim for claim in claims}) == len(claims) > 15


def test_an_arm_of_different_classes_is_refused():
    "Else the comparison would be left with those that happen to have the same test."
    records = [record("x", 0, [1]*3), record("y", 0, [1]*3), record("y", 1, [1]*3, classes=["a"])]
    with pytest.raises(SpecError, match="'more is more': records of different classes, such as"):
        ledger([Claim(**GOOD)], records)


def test_an_end_at_zero_shows_its_sign():
    row = dict(verdict="held", gain=.44, low=.021, high=.86, metric="mAD", asked="", seeds=2, source="x")
    assert "| +0.4 (+0.02 to +0.9) |" in ledger_markdown(pd.DataFrame([row], index=["small"]))
