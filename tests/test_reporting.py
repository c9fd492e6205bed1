"What the lessons on tables and plots tell badly: mixtures that must be refused, ties, nans, scales."
import itertools, math
from dataclasses import dataclass, replace

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from mdd_bench.detectors.detector import list_detectors
from mdd_bench.errors import DataError, SpecError, StoreError
from mdd_bench.reporting.arms import arms, comparable, settings
from mdd_bench.reporting.captions import cost_caption, how_it_was_made
from mdd_bench.reporting.formats import marks
from mdd_bench.reporting.heatmaps import (chosen_samples, heatmap_grid, misjudged, shared_scale,
                                          spread_over_classes, worst_grid)
from mdd_bench.reporting.plots import (OWN_NUMBERS, arm_numbers, bars, colours, curve, loss_curves, save,
                                       transfer_map)
from mdd_bench.reporting.tables import (TABLE_METRICS, caption, costs, page, per_class, scores_frame,
                                        seen_and_unseen, summary, to_markdown, transfer, write_table)

KEYS = (*TABLE_METRICS, "I-FPR95", "P-FPR95", "P-FPR95-good")
IDS = itertools.count()
DEFAULTS = dict(
    data="embedded-v1", classes=None, size=128, setting="unified",
    backbone="resnet18", weights="pretrained", layers=[1, 2, 3], options={},
    labelled=0, scheme="pooled", label_classes=None, label_seed=None, hold_out=None,
    epochs=10, batch=16,
)


@dataclass
class StandIn:
    "What tables and plots ask of a record."
    id: str
    spec: dict
    metrics: dict
    provenance: dict
    cost: dict
    losses: pd.DataFrame
    drawn: object = None

    def history(self):
        return self.losses

    def samples(self):
        if self.drawn is None:
            raise StoreError(f"record {self.id} has no samples", "run the spec again")
        return self.drawn


def falling_losses(terms):
    if not terms:
        return pd.DataFrame()
    step = np.arange(40)
    term = np.exp(-step/10)
    frame = pd.DataFrame({"epoch": step//20, "step": step} | dict.fromkeys(terms, term))
    return frame.assign(loss=len(terms)*term)


def record(detector="a", seed=0, value=.5, terms=("dist",), provenance=None, protocols=("exact",),
           values=None, drawn=None, **fields):
    "A stand-in: every metric of every class is `value`, or values[class]."
    values = values or {"x": value, "y": value}
    mean = float(np.mean(list(values.values())))
    scores = dict(
        mean=dict.fromkeys(KEYS, mean),
        per_class={cls: dict.fromkeys(KEYS, v) for cls, v in values.items()},
        per_kind={},
    )
    return StandIn(
        id=f"{next(IDS):012x}",
        spec=DEFAULTS | dict(detector=detector, seed=seed, protocols=list(protocols)) | fields,
        metrics={protocol: scores for protocol in protocols},
        provenance=dict(data_fingerprint="d1", weights_hash="w1") | (provenance or {}),
        cost={},
        losses=falling_losses(terms),
        drawn=drawn,
    )


def cells(markdown):
    "{arm: {column: cell}} of a printed table."
    lines = []
    for line in markdown.splitlines():
        lines.append([cell.strip() for cell in line.strip("|").split("|")])
    head, _, *rows = lines
    return {row[0]: dict(zip(head[1:], row[1:])) for row in rows}


# ---- means and deviations

def test_mean_and_sample_deviation_by_hand():
    values = [.80, .83, .89]
    table = summary([record("a", seed, value) for seed, value in enumerate(values)])
    mean = sum(values)/3
    deviation = math.sqrt(sum((value - mean)**2 for value in values)/2)
    assert table.loc["a", "P-AP"] == pytest.approx(mean)
    assert table.loc["a", "P-AP std"] == pytest.approx(deviation)
    assert table.loc["a", "n"] == 3


def test_one_seed_has_no_deviation():
    table = summary([record("a"), record("b")])
    assert table["mAD std"].isna().all()
    assert "±" not in to_markdown(table)


def test_a_nan_is_not_averaged_away():
    table = summary([record("a", 0, .5), record("a", 1, float("nan"))])
    assert math.isnan(table.loc["a", "P-AP"])
    assert math.isnan(table.loc["a", "P-AP std"])
    assert cells(to_markdown(table))["a"]["P-AP"] == "-"


def test_a_null_from_json_is_a_nan():
    r = record("a")
    r.metrics["exact"]["mean"]["P-AP"] = None
    assert math.isnan(summary([r]).loc["a", "P-AP"])


def test_arms_keep_the_order_of_the_records():
    assert list(summary([record("z"), record("a"), record("m")]).index) == ["z", "a", "m"]


def test_per_class_and_its_mean():
    records = [record("a", seed, values={"x": .2 + .1*seed, "y": .6}) for seed in range(2)]
    table = per_class(records, metric="AUPRO")
    assert table.loc["a", ["x", "y", "mean"]].tolist() == pytest.approx([.25, .6, .425])
    assert table.loc["a", "x std"] == pytest.approx(.1/math.sqrt(2))
    assert table.loc["a", "records"].split() == [r.id for r in records]


def test_scores_frame_has_a_row_per_record():
    records = [record("a", seed, options=dict(m=m)) for m in (1, 2) for seed in (0, 1)]
    frame = scores_frame(records, by=["detector", "options.m"])
    assert frame["id"].tolist() == [r.id for r in records]
    assert frame[["options.m", "seed"]].values.tolist() == [[1, 0], [1, 1], [2, 0], [2, 1]]


def test_an_option_that_only_some_arms_have():
    table = summary([record("a", options=dict(m=1)), record("b")], by=["detector", "options.m"])
    assert list(table.index) == [("a", 1), ("b", "-")]


@pytest.mark.parametrize("argument", [dict(protocol="exakt"), dict(metrics=("P-AUC",)), dict(by="detectr")])
def test_unknown_names_are_refused_with_a_hint(argument):
    with pytest.raises(SpecError, match="Did you mean"):
        summary([record()], **argument)


# ---- what may stand in one table

@pytest.mark.parametrize("field, value, printed", [
    ("size", 256, "256"),
    ("data", "mvtec", "mvtec"),
    ("classes", ["x"], "x"),
    ("weights", "random", "random"),
    ("setting", "separate", "separate"),
])
def test_mixed_settings_are_refused_by_name(field, value, printed):
    with pytest.raises(SpecError, match=rf"several values of {field}: .*{printed}"):
        summary([record("a"), record("b", **{field: value})])


@pytest.mark.parametrize("field", ["data_fingerprint", "weights_hash"])
def test_the_same_name_for_other_bytes_is_refused(field):
    with pytest.raises(SpecError, match=field):
        summary([record("a"), record("b", provenance={field: "other"})])


def test_fingerprints_follow_the_data_and_hashes_the_backbone():
    other_data, other_weights = dict(data_fingerprint="d2"), dict(weights_hash="w2")
    comparable([record(data="m"), record(data="v", provenance=other_data)], by="data")
    comparable([record(backbone="r"), record(backbone="w", provenance=other_weights)], by="backbone")
    with pytest.raises(SpecError, match="data_fingerprint"):
        comparable([record(data="m"), record(data="m", seed=1, provenance=other_data)], by="data")


def test_random_weights_may_be_drawn_anew():
    hashes = [dict(weights_hash=str(seed)) for seed in range(2)]
    comparable([record(seed=seed, weights="random", provenance=hashes[seed]) for seed in range(2)])


@pytest.mark.parametrize("field, value", [
    ("epochs", 20),
    ("batch", 8),
    ("options", dict(m=1)),
    ("backbone", "resnet50"),
    ("layers", [2, 3]),
])
def test_a_detector_has_its_own_recipe_but_only_one(field, value):
    comparable([record("a"), record("b", **{field: value})])
    with pytest.raises(SpecError, match=field):
        comparable([record("a"), record("a", 1, **{field: value})])


def test_the_same_dataset_elsewhere_is_the_same_dataset():
    records = [record("a", 0, data="/home/one/mvtec"), record("a", 1, data="/mnt/two/mvtec/")]
    table = summary(records, by="data")
    assert list(table.index) == ["mvtec"]
    assert table["n"].tolist() == [2]


def test_a_seed_counts_once():
    first, second = record("a", 3), record("a", 3)
    with pytest.raises(SpecError, match=f"seed 3 .*{first.id} {second.id}"):
        arms([first, second])


def test_no_records():
    with pytest.raises(SpecError, match="no records"):
        summary([])


def test_protocols_are_not_settings():
    comparable([record("a"), record("b", protocols=("exact", "ader"))])
    with pytest.raises(SpecError, match="protocol in record"):
        summary([record("a"), record("b", protocols=("ader",))])


# ---- arms by name

def ablation():
    "Two named arms that differ in all that a method brings; three seeds each. Returns records and names."
    gated = dict(options=dict(branches="both", fusion="gate", scale=2), epochs=20, batch=8, revision=3)
    single = dict(options=dict(branches="one", fusion=None), epochs=5, batch=16, revision=1)
    both = [record("a", seed, .8 + .01*seed, **gated) for seed in range(3)]
    one = [record("b", seed, .7 + .01*seed, **single) for seed in range(3)]
    names = {r.id: "both + L_dist" for r in both} | {r.id: "one" for r in one}
    return [*one, *both], names


def test_named_arms_are_the_index_and_keep_the_order_of_the_records():
    records, names = ablation()
    in_order = ["one", "both + L_dist"]       # of the records, not of the dict
    table = summary(records, by=names)
    assert table.index.names == ["arm"]
    assert list(table.index) == in_order
    assert table["P-AP"].tolist() == pytest.approx([.71, .81])
    assert table["P-AP std"].tolist() == pytest.approx([.01, .01])
    assert [arm.name for arm in arms(records, names)] == in_order
    assert [arm.values for arm in arms(records, names)] == [{"arm": name} for name in in_order]
    assert [arm.records for arm in arms(records, names)] == [records[:3], records[3:]]
    assert scores_frame(records, by=names)["arm"].tolist() == ["one"]*3 + ["both + L_dist"]*3
    assert per_class(records, by=names).index.tolist() == in_order
    assert to_markdown(table).startswith("| arm |")
    assert "| one | 5 epochs | 16 | b | 1 |" in how_it_was_made(records, by=names)


def test_one_detector_may_have_several_named_arms():
    records = [record("a", options=dict(m=m)) for m in (1, None)]
    names = dict(zip((r.id for r in records), ("with", "without")))
    with pytest.raises(SpecError, match="options.m"):
        summary(records)
    assert list(summary(records, by=names).index) == ["with", "without"]
    assert summary(records, by=names | {"elsewhere": "unused"})["n"].tolist() == [1, 1]


@pytest.mark.parametrize("call", [comparable, summary, bars, loss_curves])
def test_every_record_must_have_a_name(call):
    records, names = ablation()
    del names[records[4].id]
    with pytest.raises(SpecError, match=f"record {records[4].id} has no name.*Add it"):
        call(records, by=names)


@pytest.mark.parametrize("field, fields", [
    ("detector", dict(detector="b")),
    ("options.m", dict(options=dict(m=2))),
    ("options.m", dict(options={})),
    ("revision", dict(revision=2)),
    ("epochs", dict(epochs=3)),
    ("batch", dict(batch=2)),
])
def test_a_mixture_within_a_named_arm_is_refused_by_field(field, fields):
    common = dict(detector="a", options=dict(m=1), revision=1)
    pair = [record(seed=0, **common), record(seed=1, **(common | fields))]
    with pytest.raises(SpecError, match=rf'several values of {field} within the arm "same"'):
        comparable(pair, {r.id: "same" for r in pair})
    comparable(pair, {r.id: r.id for r in pair})      # under two names they may stand together


@pytest.mark.parametrize("field, value", [
    ("size", 256),
    ("data", "mvtec"),
    ("setting", "separate"),
    ("weights", "random"),
])
def test_names_excuse_nothing_that_no_method_brings(field, value):
    pair = [record("a"), record("b", **{field: value})]
    with pytest.raises(SpecError, match=rf"several values of {field}: .*{value}"):
        comparable(pair, {r.id: r.spec["detector"] for r in pair})


def test_a_seed_counts_once_within_a_name():
    pair = [record("a", 3), record("a", 3)]
    with pytest.raises(SpecError, match="seed 3 occurs 2 times for same"):
        arms(pair, {r.id: "same" for r in pair})
    assert len(arms(pair, {pair[0].id: "one", pair[1].id: "two"})) == 2


def test_names_and_a_field_together():
    records, names = [], {}
    for kind, m, seed in itertools.product("xy", (1, 2), (0, 1)):
        r = record("a", seed, options=dict(kind=kind, m=m))
        records.append(r)
        names[r.id] = f"arm {kind}"
    table = summary(records, by=[names, "options.m"])
    assert list(table.index) == [("arm x", 1), ("arm x", 2), ("arm y", 1), ("arm y", 2)]
    with pytest.raises(SpecError, match="options.m within"):
        summary(records, by=names)


# ---- bold and underline

@pytest.mark.parametrize("values, lower, expected", [
    ([.1, .3, .2], False, ["", "best", "second"]),
    ([.1, .3, .2], True, ["best", "", "second"]),
    ([.8691, .8694, .8600], False, ["best", "best", "second"]),           # print alike: share the mark
    ([.9, .8694, .8691, .1], False, ["best", "second", "second", ""]),
    ([.86949, .86951], False, ["second", "best"]),                        # close, but print differently
    ([.5, .5], False, ["best", "best"]),
    ([math.nan, .2, math.nan, .1], False, ["", "best", "", "second"]),
    ([math.nan, math.nan], True, ["", ""]),
    ([.7], False, [""]),
])
def test_marks(values, lower, expected):
    assert marks(values, lower) == expected


def test_markdown_marks_each_metric_in_its_direction():
    records = [record("a", value=.1), record("b", value=.2), record("c", value=.3)]
    printed = cells(to_markdown(summary(records, metrics=("P-AP", "P-FPR95-good"))))
    assert [printed[name]["P-AP"] for name in "abc"] == ["10.0", "<u>20.0</u>", "**30.0**"]
    assert [printed[name]["P-FPR95-good"] for name in "abc"] == ["**10.0**", "<u>20.0</u>", "30.0"]


def test_per_class_table_of_a_rate_prefers_the_lower():
    records = [record("a", value=.1), record("b", value=.2)]
    assert cells(to_markdown(per_class(records, metric="I-FPR95")))["a"]["x"] == "**10.0**"
    assert cells(to_markdown(per_class(records, metric="I-AUROC")))["b"]["x"] == "**20.0**"


def test_markdown_cell_and_alignment():
    records = [record("a", 0, .86), record("a", 1, .87), record("b|c", 0, .5)]
    text = to_markdown(summary(records, metrics=("P-AP",)))
    assert "**86.5 ± 0.7**" in text
    assert r"b\|c" in text
    assert text.splitlines()[1] == "| :--- | ---: |"


# ---- captions and files

def test_caption_tells_what_the_numbers_are_of():
    data = "/home/me/mvtec"
    records = [record("a", seed, data=data) for seed in (0, 1)]
    records.append(record("b", 0, data=data, epochs=0))
    assert caption(records) == (
        "Mean over two classes of `mvtec` in percent, one to two seeds (± sample standard deviation). "
        "ResNet-18 features of strides 4, 8 and 16 at 128 px. Best in bold, second underlined.")
    text = how_it_was_made(records)
    for part in ("Data `mvtec`, fingerprint d1", "size 128", "backbone resnet18", "weights pretrained",
                 "| a | 10 epochs | 0, 1 |", "| b | nothing | 0 |", "batch 16", "Protocol `exact`",
                 "F1max uses the best threshold on the test set"):
        assert part in text
    assert "/home" not in text


@pytest.mark.parametrize("weights", [("random",), ("pretrained", "random")])
def test_caption_warns_in_capitals_when_any_weights_are_random(weights):
    text = caption([record(weights=w) for w in weights], by="weights")
    assert text.startswith("**RANDOM backbone weights: no comparison with published numbers.**")


def test_caption_counts_the_classes_of_its_protocol():
    r = record(protocols=("exact",))
    r.metrics["few"] = r.metrics["exact"] | dict(per_class={"x": {}})
    assert "two classes" in caption([r])
    assert "One class of" in caption([r], "few") and "Protocol `few`." in caption([r], "few")
    with pytest.raises(SpecError, match="protocol in record"):
        caption([r], "exakt")


def test_costs_are_medians_as_recorded():
    records = [record("a", seed) for seed in range(3)] + [record("b", 0)]
    for r, seconds, device in zip(records, (10, 90, 20, 5), ("cpu", "cpu", "cpu", "gpu")):
        r.cost = dict(prepare_s=1, train_s=seconds, test_s=2, ms_per_image=8, parameters_trained=2e6,
                      bytes_test_without_backbone=3*2**20, device=device, features="cached")
    table = costs(records)
    assert table.loc["a"].tolist() == [21, 2, 8, 2, 3, "cpu", 3, " ".join(r.id for r in records[:3])]
    assert table.loc["b", "training, s"] == 6
    assert table.loc["b", "device"] == "gpu"
    assert list(costs(records, {r.id: r.id for r in records}).index) == [r.id for r in records]
    with pytest.raises(SpecError):
        costs([record("a"), record("b", size=256)])


def test_a_scheme_counts_where_something_is_drawn_by_it():
    "A run without labels may be shared by studies of several schemes."
    def of(labelled, *schemes): return [record("a", seed, labelled=labelled, scheme=scheme)
                                        for seed, scheme in enumerate(schemes)]
    comparable([*of(0, "pooled", "from_classes"), *of(5, "from_classes")], ["detector", "labelled"])
    with pytest.raises(SpecError, match="several values of scheme: pooled .*; one_kind"):
        comparable(of(5, "pooled", "one_kind"))


def test_a_table_of_costs_says_on_what_they_were_measured_and_how_it_was_made():
    records = [record("a", seed, provenance=dict(threads=n)) for seed, n in enumerate((1, 1, 8))]
    for r in records:
        r.cost = dict(prepare_s=1, train_s=2, test_s=2, ms_per_image=8, parameters_trained=2e6,
                      bytes_test_without_backbone=3*2**20, device="cpu", features="cached")
    assert cost_caption(records[:2]) == (
        "What the runs on `embedded-v1` took when they were made, medians over two seeds, on cpu, 1 thread. "
        "Times of runs that were made side by side say little; sizes are exact. "
        "ResNet-18 features of strides 4, 8 and 16 at 128 px.")
    assert "on several machines, whose times cannot be compared." in cost_caption(records)
    assert "took when they were made, on cpu" in cost_caption(records[:1])
    table = costs(records)
    assert table.loc["a", "device"] == "cpu, 1 thread; cpu, 8 threads"
    text = page(table, "Costs.")
    assert text.startswith("Costs.\n\n| detector |") and text.endswith("</details>")
    assert "- Measured on cpu, 1 thread; cpu, 8 threads; features cached\n" in text
    assert "Protocol" not in text and "F1max" not in text and "published" not in text
    assert all(r.id in text for r in records)
    assert "Measured" not in how_it_was_made(records)


def test_a_plain_caption_explains_neither_deviations_nor_marks():
    short = dict(steps=3, converged_steps=9)
    records = [record(name, seed, provenance=short) for name in "ab" for seed in (0, 1)]
    full, plain = caption(records), caption(records, plain=True)
    assert plain == ("Mean over two classes of `embedded-v1` in percent, two seeds. "
                     "ResNet-18 features of strides 4, 8 and 16 at 128 px.")
    assert "±" in full and "bold" in full and "†" in full


def test_the_details_name_the_detectors_that_nobody_has_compared_with_their_paper():
    compared = record("b", provenance=dict(verified="table 2"))
    text = how_it_was_made([record("a"), compared, record("c")])
    assert "- Not verified against published numbers: a, c\n" in text
    assert "verified" not in how_it_was_made([compared])


def test_caption_names_the_labels():
    drawn = dict(labels=dict(test_hash="t"), test_counts=dict(x=[4, 7], y=[3, 5]))
    r = record(labelled=5, scheme="pooled", label_seed=0, hold_out=10, provenance=drawn)
    assert ("Labelled anomalies are drawn by scheme `pooled`, N = 5; "
            "those drawn for N = 10 are in no arm's test.") in caption([r])
    assert "Test images, good + anomalous: x 4 + 7, y 3 + 5\n" in how_it_was_made([r])
    assert "label seeds 0" in how_it_was_made([r])
    assert "Labelled" not in caption([record(labelled=0)])


# ---- labels

def labelled(number, seed, label_seed, test_hash, kinds=None, **fields):
    labels = dict(test_hash=test_hash, kinds=kinds or {})
    return record(seed=seed, labelled=number, label_seed=label_seed, provenance=dict(labels=labels), **fields)


def test_within_a_label_seed_all_arms_share_the_test_images():
    fair = [labelled(number, seed, seed, f"t{seed}") for number in (0, 5) for seed in (0, 1)]
    assert summary(fair, "labelled")["n"].tolist() == [2, 2]
    with pytest.raises(SpecError, match="different images"):
        summary(fair[:3] + [labelled(5, 1, 1, "t0")], "labelled")


def test_a_table_averages_over_both_seeds():
    records = []
    for number, seed, label_seed in itertools.product((0, 5), (0, 1), (0, 1)):
        records.append(labelled(number, seed, label_seed, f"t{label_seed}"))
    assert summary(records, "labelled")["n"].tolist() == [4, 4]
    with pytest.raises(SpecError, match="label seed 1 occurs 2 times"):
        summary(records + [labelled(5, 0, 1, "t1")], "labelled")


def test_seen_and_unseen_kinds_are_averaged_in_classes_that_have_both():
    r = labelled(5, 0, 0, "t", kinds=dict(x=["a"], y=["c"]))
    scores = {"x": dict(a=.9, b=.5, d=.7), "y": dict(c=.3), "z": dict(e=.1)}
    for cls, kinds in scores.items():
        r.metrics["exact"]["per_kind"][cls] = {kind: dict.fromkeys(KEYS, v) for kind, v in kinds.items()}
    row = seen_and_unseen([r], "labelled", ["P-AP"]).iloc[0]
    assert row["P-AP seen"] == pytest.approx(.9)
    assert row["P-AP unseen"] == pytest.approx(.6)
    r.provenance["labels"]["kinds"] = dict(y=["c"])
    with pytest.raises(SpecError, match="one_kind"):
        seen_and_unseen([r], "labelled", ["P-AP"])


def from_class(source, **values):
    "A record with labelled anomalies of the classes in `source`."
    provenance = dict(labels=dict(test_hash="t"))
    return record(labelled=5 if source else 0, label_classes=source, label_seed=0, hold_out=5,
                  values=values, provenance=provenance)


def test_transfer_is_the_gain_over_no_labels():
    records = [
        from_class(None, x=.5, y=.4, z=.3),
        from_class("x", x=.8, y=.5, z=.2),
        from_class("y+z", x=.6, y=.4, z=.4),
    ]
    matrix = transfer(records, "P-AP")
    assert matrix.loc["x", "none"] == .5
    assert matrix.loc["x", "x"] == pytest.approx(.3)
    assert matrix.loc["mean of other classes", "x"] == pytest.approx(0)
    assert matrix.loc["mean of other classes", "y+z"] == pytest.approx(.1)
    with pytest.raises(SpecError, match="labelled=0"):
        transfer(records[1:], "P-AP")

    ax = transfer_map(matrix).axes[1]
    assert sum(isinstance(patch, plt.Rectangle) for patch in ax.patches) == 3
    assert "+30.0" in [text.get_text() for text in ax.texts]


def test_csv_keeps_every_digit_and_every_record(tmp_path):
    records = [record("a", 0, 1/3), record("a", 1, 1/7), record("b", 0, 2/3)]
    table = summary(records)
    markdown_path, csv_path, _ = write_table(tmp_path/"new", "main", table, "A caption.")
    read_back = pd.read_csv(csv_path, index_col=0, dtype=str, keep_default_na=False)   # no parser rounds text
    for column in [*TABLE_METRICS, *(f"{metric} std" for metric in TABLE_METRICS)]:
        numbers = [float(text or "nan") for text in read_back[column]]
        np.testing.assert_array_equal(numbers, table[column])
    ids = [text.split() for text in read_back["records"]]
    assert ids == [[records[0].id, records[1].id], [records[2].id]]
    assert read_back["n"].tolist() == ["2", "1"]
    assert markdown_path.read_text(encoding="utf-8").startswith("A caption.\n\n| detector |")


@pytest.mark.parametrize("name", ["../out", "a/b"])
def test_a_table_stays_in_its_folder(tmp_path, name):
    with pytest.raises(SpecError, match="plain file name"):
        write_table(tmp_path, name, summary([record()]))


def test_settings_are_flat():
    flat = settings(record(options=dict(m=1)))
    assert flat["options.m"] == 1
    assert "options" not in flat
    assert "protocols" not in flat


# ---- bars

@pytest.fixture(autouse=True)
def no_figure_stays_open():
    yield
    assert plt.get_fignums() == []


def texts_of(artists):
    return [artist.get_text() for artist in artists]


def test_bars_show_means_and_every_seed():
    records = [record(name, seed, v + .02*seed) for name, v in (("a", .6), ("b", .7)) for seed in range(3)]
    ax = bars(records, metrics=("I-AUROC", "P-AP")).axes[0]
    assert [bar.get_height() for bar in ax.patches] == pytest.approx([62, 62, 72, 72])
    dots = [line.get_ydata() for line in ax.lines if line.get_marker() == "o"]
    assert sorted(np.concatenate(dots)) == pytest.approx(sorted([60, 62, 64, 70, 72, 74]*2))
    assert ax.get_ylim() == (0, 100)
    assert sum(line.get_linestyle() == ":" for line in ax.lines) == 1        # chance: at the AUROC only


def test_a_cut_axis_is_named_and_hides_no_bar():
    records = [record("a", value=.9), record("b", value=.8)]
    assert "cut at 70" in bars(records, low=70).axes[0].get_ylabel()
    with pytest.raises(SpecError, match="axis starts at 85"):
        bars(records, low=85)


def test_bars_name_a_nan():
    fig = bars([record("a", value=math.nan), record("b")])
    assert texts_of(fig.axes[0].texts) == ["nan"]*4


def test_bars_of_two_fields_and_a_shared_palette():
    records = [record("a", seed, options=dict(m=m)) for m in (1, 2) for seed in (0, 1)]
    palette = {"a, 1": (1, 0, 0), "a, 2": (0, 0, 1)}
    ax = bars(records, by=["detector", "options.m"], metrics=("P-AP",), palette=palette).axes[0]
    assert [bar.get_facecolor()[:3] for bar in ax.patches] == [(1, 0, 0), (0, 0, 1)]


@pytest.mark.parametrize("draw", [bars, loss_curves])
def test_plots_refuse_the_mixtures_that_tables_refuse(draw):
    with pytest.raises(SpecError, match="size"):
        draw([record("a"), record("b", size=256)])


def boxes(fig):
    "The extents of the legend, the first axes and the figure, in pixels."
    fig.draw_without_rendering()
    return fig.legends[0].get_window_extent(), fig.axes[0].get_window_extent(), fig.bbox


@pytest.mark.parametrize("number", [1, 6, 10, 14])
def test_the_legend_of_many_long_names_is_neither_cut_nor_over_the_bars(number):
    records, names = [], {}
    for i, seed in itertools.product(range(number), range(2)):
        r = record("a", seed, .5 + .01*i, options=dict(i=i))
        records.append(r)
        names[r.id] = f"{i:02d} WWW branches + memory"
    legend, axes, figure = boxes(bars(records, by=names))
    assert legend.x0 >= axes.x1
    assert legend.x1 <= figure.x1
    assert legend.y0 >= figure.y0
    assert legend.y1 <= figure.y1
    assert axes.width > .4*figure.width
    assert axes.height > .6*figure.height


# ---- curves

def memories(sizes=(1, 8, 32, 128), seeds=3, value=lambda k, seed: .5 + .001*k + .01*seed**2):
    "A curve: a memory of k prototypes per class."
    records = []
    for k, seed in itertools.product(sizes, range(seeds)):
        records.append(record("a", seed, value(k, seed), options=dict(memory="class", k=k)))
    return records


def levels(seeds=3):
    "Two arms to draw as levels."
    records = []
    for (memory, value, k), seed in itertools.product((("none", .4, None), ("shared", .6, 50)), range(seeds)):
        records.append(record("a", seed, value + .01*seed, options=dict(memory=memory, k=k)))
    return records


def solid_lines(ax):
    return [line for line in ax.lines if line.get_linestyle() == "-"]


def dashed_lines(ax):
    return [line for line in ax.lines if line.get_linestyle() == "--"]


def dots(ax):
    "The points of all markers, sorted."
    return sorted((x, y) for line in ax.lines if line.get_marker() == "o" for x, y in line.get_xydata())


def test_curve_shows_mean_band_and_seeds_by_hand():
    values = {(1, 0): .50, (1, 1): .53, (1, 2): .59, (2, 0): .7, (2, 1): .7, (2, 2): .7}
    fig = curve(memories((2, 1), value=lambda k, seed: values[k, seed]), "options.k")
    ax, = fig.axes
    by_rising_x = solid_lines(ax)[0].get_xydata().ravel()
    assert by_rising_x == pytest.approx([1, 54, 2, 70])
    std = 100*math.sqrt((.04**2 + .01**2 + .05**2)/2)
    edge = ax.collections[0].get_paths()[0].vertices
    at_one = edge[edge[:, 0] == 1, 1]
    assert (at_one.min(), at_one.max()) == pytest.approx((54 - std, 54 + std))
    assert edge[edge[:, 0] == 2, 1] == pytest.approx(70)
    expected_dots = sorted((k, 100*value) for (k, _), value in values.items())
    assert np.array(dots(ax)) == pytest.approx(np.array(expected_dots))
    assert ax.get_ylabel() == "mAD (percent)"
    assert ax.get_xlabel() == "k"
    assert ax.get_ylim()[0] > 40
    assert not fig.legends                  # one line needs no name


def test_one_seed_has_no_band():
    records = memories(seeds=1) + levels(seeds=1)
    ax = curve(records, "options.k", by="options.memory", levels=("none", "shared")).axes[0]
    assert len(ax.collections) == len(ax.patches) == 0
    assert len(dots(ax)) == 4
    assert len(dashed_lines(ax)) == 2


def test_levels_lie_at_their_means_and_lines_keep_their_points():
    records = levels() + memories()
    fig = curve(records, "options.k", ("mAD", "P-AP"), by="options.memory", levels=["none", "shared"])
    assert texts_of(fig.legends[0].get_texts()) == ["none", "shared", "class"]
    assert [ax.get_ylabel() for ax in fig.axes] == ["mAD (percent)", "P-AP (percent)"]
    for ax in fig.axes:
        assert [line.get_ydata()[0] for line in dashed_lines(ax)] == pytest.approx([41, 61])
        bands = [(band.get_y(), band.get_y() + band.get_height()) for band in ax.patches]
        assert bands == [pytest.approx((40, 42)), pytest.approx((60, 62))]
        line = next(line for line in solid_lines(ax) if len(line.get_xdata()) == 4)
        assert list(line.get_xdata()) == [1, 8, 32, 128]
    legend, axes, figure = boxes(fig)
    assert legend.x1 <= figure.x1
    assert legend.x0 >= axes.x1


@pytest.mark.parametrize("sizes, scale", [
    ((1, 8), "linear"),
    ((1, 9), "log"),
    ((1, 8, 32, 128), "log"),
    ((0, 1, 100), "linear"),
    ((.5, 2, 8), "log"),
])
def test_axis_doubles_above_a_factor_of_eight(sizes, scale):
    ax = curve(memories(sizes), "options.k").axes[0]
    assert ax.get_xscale() == scale
    assert ("log" in ax.get_xlabel()) == (scale == "log")
    if scale == "log":
        assert ax.xaxis.get_transform().base == 2
        assert list(ax.get_xticks()) == list(sizes)
        assert not len(ax.get_xticks(minor=True))
        assert texts_of(ax.get_xticklabels()) == [f"{size:g}" for size in sizes]


def test_curves_of_named_arms():
    records, names = [], {}
    for k, seed in itertools.product((1, 2, 4), (0, 1)):
        r = record("a", seed, options=dict(memory="class", k=k, fusion="gate"))
        records.append(r)
        names[r.id] = "class + gate"
    for seed in (0, 1):
        r = record("a", seed, options=dict(memory="none", k=None, fusion=None))
        records.append(r)
        names[r.id] = "no memory"
    fig = curve(records, "options.k", "mAD", by=names, levels=("no memory",))
    assert texts_of(fig.legends[0].get_texts()) == ["class + gate", "no memory"]
    assert len(dashed_lines(fig.axes[0])) == 1
    fig = curve(records, "options.k", by=names, levels="no memory")
    assert len(dashed_lines(fig.axes[0])) == 1
    with pytest.raises(SpecError, match="options.memory within the arm"):
        curve(records, "options.k", by=dict.fromkeys(names, "same"), levels=("same",))


@pytest.mark.parametrize("value", [None, "many", True, [1, 2], math.nan])
def test_an_x_that_is_no_number_is_refused_by_record(value):
    bad = record("a", options=dict(memory="class", k=value))
    with pytest.raises(SpecError, match=f"record {bad.id} has .* for options.k"):
        curve([*memories((2, 4)), bad], "options.k")


def test_an_x_that_is_missing_is_refused_by_record():
    bad = record("a", options=dict(memory="class"))
    with pytest.raises(SpecError, match=f"record {bad.id} has None for options.k.*levels"):
        curve([*memories(), bad], "options.k")


@pytest.mark.parametrize("change, message", [
    (dict(x="options.kk"), "Did you mean 'options.k'"),
    (dict(levels=("non",)), "Did you mean 'none'"),
    (dict(metrics="mADD"), "Did you mean 'mAD'"),
    (dict(levels=("none", "shared", "class")), "'class' is to be a level"),
    (dict(by=None, levels=()), "options.memory"),
    (dict(protocol="exakt"), "protocol"),
])
def test_curve_names_what_does_not_fit(change, message):
    arguments = dict(x="options.k", by="options.memory", levels=("none", "shared"))
    with pytest.raises(SpecError, match=message):
        curve(levels() + memories(), **(arguments | change))


def test_curve_refuses_mixtures_repeated_seeds_and_nothing_to_draw():
    larger = record("a", options=dict(memory="class", k=4), size=256)
    with pytest.raises(SpecError, match="size"):
        curve([*memories(), larger], "options.k")
    with pytest.raises(SpecError, match="seed 0 occurs 2 times"):
        curve(memories() + memories(), "options.k")
    with pytest.raises(SpecError, match="all arms are levels"):
        curve(levels(), "options.k", by="options.memory", levels=("none", "shared"))


def test_curve_names_a_nan():
    records = memories(value=lambda k, seed: math.nan if (k, seed) == (8, 1) else .5)
    records.append(record("a", 0, math.nan, options=dict(memory="none", k=None)))
    ax = curve(records, "options.k", by="options.memory", levels=("none",)).axes[0]
    assert texts_of(ax.texts) == ["nan", "nan"]
    assert ax.texts[0].get_position()[0] == 8
    assert np.isnan(solid_lines(ax)[0].get_ydata()).tolist() == [False, True, False, False]
    assert not dashed_lines(ax)


# ---- losses

def test_loss_curves_have_a_panel_per_term_and_a_sum():
    fig = loss_curves([record("a"), record("b", terms=("dist", "identity")), record("c", terms=())])
    assert [ax.get_title() for ax in fig.axes] == ["dist", "identity", "sum"]
    assert texts_of(fig.legends[0].get_texts()) == ["a", "b"]
    assert [len(ax.lines) for ax in fig.axes] == [4, 2, 4]                # what was logged, and its median
    assert len({ax.get_xlim() for ax in fig.axes}) == 1


def test_loss_curves_of_one_record_and_of_none():
    assert [ax.get_title() for ax in loss_curves(record()).axes] == ["dist"]
    with pytest.raises(SpecError, match="none of these"):
        loss_curves(record(terms=()))


def test_negative_losses_stay_in_view():
    r = record()
    r.losses["dist"] *= -1
    low, high = loss_curves(r).axes[0].get_ylim()
    assert low <= -1
    assert high >= r.losses["dist"].max()


# ---- heatmaps

@dataclass
class Samples:
    "What `record.samples()` returns."
    maps: np.ndarray
    images: np.ndarray
    masks: np.ndarray
    paths: list
    cls: list
    kinds: list
    chosen: list
    scores: np.ndarray


IMAGES = [                       # class, kind, why it was chosen, score
    ("x", "good", "seeded", .1),
    ("x", "cut", "seeded", .9),
    ("x", "dent", "seeded", .8),
    ("x", "good", "false alarm", .5),
    ("x", "good", "false alarm", .7),
    ("x", "dent", "miss", .2),
    ("y", "good", "seeded", .1),
    ("y", "hole", "seeded", .9),
    ("y", "good", "false alarm", .6),
]


def drawn_samples(scale=1., side=16, thumbnail=8, images=IMAGES):
    rng = np.random.default_rng(0)
    cls, kinds, chosen, scores = zip(*images)
    maps = scale*rng.random((len(images), side, side))
    maps[0] *= .1
    anomalous = np.array([kind != "good" for kind in kinds])
    return Samples(
        maps=maps.astype(np.float16),
        images=rng.integers(0, 255, (len(images), thumbnail, thumbnail, 3), np.uint8),
        masks=anomalous[:, None, None] & np.eye(side, dtype=bool),
        paths=[f"{i}.png" for i in range(len(images))],
        cls=list(cls),
        kinds=list(kinds),
        chosen=list(chosen),
        scores=np.array(scores),
    )


def drawn_records():
    "Two arms that were shown the same images; the second has maps of another range."
    return [record("a", drawn=drawn_samples()), record("b", drawn=drawn_samples(50))]


def rows_of(fig, columns):
    "The axes of a grid as rows, without the row of the scales."
    return [fig.axes[start:start + columns] for start in range(0, len(fig.axes) - columns, columns)]


def test_one_colour_scale_per_arm_over_all_rows():
    records = drawn_records()
    rows = rows_of(heatmap_grid(records), 4)
    assert [ax.get_title() for ax in rows[0]] == ["image", "truth", "a", "b"]
    for column, r in ((2, records[0]), (3, records[1])):
        seeded = chosen_samples(r.samples(), "seeded")
        limits = {row[column].images[0].get_clim() for row in rows}
        assert limits == {shared_scale(seeded.maps)}
        for row, values in zip(rows, seeded.maps):
            drawn = row[column].images[0].get_array()
            np.testing.assert_allclose(drawn, values.astype(np.float32), rtol=1e-6)    # not stretched


def test_grid_draws_the_seeded_images_and_names_them():
    rows = rows_of(heatmap_grid(drawn_records()), 4)
    assert [row[0].get_ylabel() for row in rows] == ["x\ngood", "x\ncut", "x\ndent", "y\ngood", "y\nhole"]
    seeded = chosen_samples(drawn_samples(), "seeded")
    for row, image in zip(rows, seeded.images):
        np.testing.assert_array_equal(row[0].images[0].get_array(), image)


def test_a_small_thumbnail_covers_its_map_and_the_outline_moves_nothing():
    rows = rows_of(heatmap_grid(drawn_records()), 4)
    for image, truth, *maps in rows:
        assert image.images[0].get_extent() == maps[0].images[0].get_extent()
        assert truth.get_xlim() == image.get_xlim() == maps[0].get_xlim()
        assert truth.get_ylim() == image.get_ylim() == maps[0].get_ylim()
    lines = [len(truth.collections) for _, truth, *_ in rows]
    assert lines == [0, 2, 2, 0, 2]         # white and red around a defect, none on a good image


def test_arms_may_have_maps_of_different_sizes():
    records = [record(size=side, drawn=drawn_samples(side=side)) for side in (16, 32)]
    rows = rows_of(heatmap_grid(records, by="size"), 4)
    assert [ax.images[0].get_array().shape[0] for ax in rows[0]] == [8, 8, 16, 32]


def test_grid_of_one_record_one_class_and_few_rows():
    r = drawn_records()[0]
    kinds = [row[0].get_ylabel() for row in rows_of(heatmap_grid(r, cls="y"), 3)]
    assert kinds == ["y\ngood", "y\nhole"]
    kinds = [row[0].get_ylabel() for row in rows_of(heatmap_grid([r], most=2), 3)]
    assert kinds == ["x\ngood", "y\nhole"]
    assert len(rows_of(heatmap_grid(r, cls=["x", "y"]), 3)) == 5


def test_an_arm_is_drawn_by_its_first_record():
    first, second = record("a", 0, drawn=drawn_samples()), record("a", 1)       # the second has no samples
    assert len(rows_of(heatmap_grid([first, second]), 3)) == 5


def test_grid_refuses_records_that_show_different_images():
    records = drawn_records()
    records[1].drawn = replace(records[1].drawn, paths=[f"other/{i}.png" for i in range(len(IMAGES))])
    with pytest.raises(SpecError, match=f"records {records[0].id} and {records[1].id} show different"):
        heatmap_grid(records)


def test_records_may_fail_on_different_images():
    records = drawn_records()
    records[1].drawn = drawn_samples(50, images=[row for row in IMAGES if row[2] == "seeded"])
    records[1].drawn.paths = chosen_samples(records[0].drawn, "seeded").paths
    assert len(rows_of(heatmap_grid(records), 4)) == 5


@pytest.mark.parametrize("draw", [lambda r: heatmap_grid([r]), worst_grid])
def test_missing_samples_raise_what_the_record_raises(draw):
    with pytest.raises(StoreError, match="has no samples"):
        draw(record())


def test_grid_names_what_does_not_fit():
    with pytest.raises(SpecError, match="unknown class .* 'z'"):
        heatmap_grid(drawn_records(), cls="z")
    with pytest.raises(SpecError, match="unknown class .* 'z'"):
        worst_grid(drawn_records()[0], cls=["x", "z"])
    with pytest.raises(DataError, match="no seeded image"):
        heatmap_grid(drawn_records(), most=0)
    with pytest.raises(SpecError, match="several values of size"):
        heatmap_grid([*drawn_records(), record("c", size=256, drawn=drawn_samples())])


def test_spread_takes_turns_and_starts_each_class_elsewhere():
    assert spread_over_classes(list("aaabbbccc"), 3) == [0, 4, 8]
    assert spread_over_classes(list("aaabbbccc"), 5) == [0, 1, 4, 5, 8]
    assert spread_over_classes(list("abbb"), 2) == [0, 2]
    assert spread_over_classes(list("aabb"), 9) == [0, 1, 2, 3]
    assert spread_over_classes([], 3) == []


def titles_of(row):
    return [ax.get_title() for ax in row]


def test_worst_grid_has_a_row_for_each_class_and_one_scale():
    r = drawn_records()[0]
    rows = rows_of(worst_grid(r), 8)
    assert [row[0].get_ylabel() for row in rows] == ["x", "y"]
    assert titles_of(rows[0]) == ["false alarm", "score 0.7 \u2717", "false alarm", "score 0.5 \u2717",
                                  "miss: dent", "score 0.2 \u2717", "", ""]
    assert titles_of(rows[1]) == ["false alarm", "score 0.6", *[""]*6]
    maps = [ax.images[0] for row in rows for ax in row[1::2] if ax.images]
    assert len(maps) == 4
    assert {image.get_clim() for image in maps} == {shared_scale(r.drawn.maps)}
    np.testing.assert_allclose(rows[0][1].images[0].get_array(), r.drawn.maps[4].astype(np.float32))
    np.testing.assert_allclose(rows[0][5].images[0].get_array(), r.drawn.maps[5].astype(np.float32))
    np.testing.assert_array_equal(rows[1][0].images[0].get_array(), r.drawn.images[8])
    assert len(rows[0][4].collections) == 2                    # the outline of what was missed
    assert not rows[1][4].images                               # no miss in this class


def test_classes_with_mistakes_come_first():
    images = [("a", "good", "false alarm", .3), ("a", "cut", "miss", .4),
              ("b", "good", "false alarm", .8), ("b", "cut", "miss", .8)]
    r = record(drawn=drawn_samples(images=images))
    assert [row[0].get_ylabel() for row in rows_of(worst_grid(r), 4)] == ["b", "a"]


@pytest.mark.parametrize("scores, expected", [
    ((.1, .2, .3, .4), [False]*4),                 # good, good, defect, defect
    ((.1, .3, .3, .4), [False, True, True, False]),     # a tie: no threshold parts them
    ((.5, .2, .3, .4), [True, False, True, True]),
])
def test_misjudged_within_a_class_only(scores, expected):
    kinds = ["good", "good", "cut", "dent"]
    images = [("x", kind, "seeded", score) for kind, score in zip(kinds, scores)]
    images += [("y", "good", "seeded", 9.), ("z", "cut", "seeded", 0.)]      # other classes, other levels
    assert misjudged(drawn_samples(images=images)).tolist() == [*expected, False, False]


def test_worst_grid_of_one_class_and_of_a_record_without_failures():
    r = drawn_records()[0]
    assert [len(row) for row in rows_of(worst_grid(r, most=1), 4)] == [4, 4]
    assert titles_of(rows_of(worst_grid(r, cls="y"), 4)[0]) == ["false alarm", "score 0.6", "", ""]
    r.drawn = drawn_samples(images=[row for row in IMAGES if row[2] == "seeded"])
    with pytest.raises(DataError, match=f"record {r.id} has no false alarm"):
        worst_grid(r)


def test_fifteen_classes_fit_in_one_grid():
    images = [(f"c{i}", kind, chosen, i + score) for i in range(15)
              for kind, chosen, score in (("good", "false alarm", .6), ("good", "false alarm", .5),
                                          ("cut", "miss", .2), ("cut", "miss", .3))]
    fig = worst_grid(record(drawn=drawn_samples(images=images)))
    assert len(rows_of(fig, 8)) == 15
    width, height = fig.get_size_inches()
    assert width < 9 and height < 18


def test_scale_of_a_constant_map_and_of_an_outlier():
    low, high = shared_scale(np.ones((2, 4, 4)))
    assert low < high
    values = np.linspace(0, 1, 10_000).reshape(1, 100, 100)
    values[0, 0, 0] = 1e6
    assert shared_scale(values)[1] <= 1
    with pytest.raises(DataError, match="not finite"):
        shared_scale(np.array([[[math.nan]]]))


# ---- colours and files

def test_colours_are_stable_and_distinct():
    assert colours("abc") == colours(list("abc"))
    assert len(set(colours(range(12)).values())) == 12


def test_a_detector_has_its_colour_in_every_figure():
    "Alone, after others, beside arms that are no detectors, and in any order."
    own = colours(["mddnet"])["mddnet"]
    for names in (["patchcore", "mddnet"], ["uniad", "mddnet", "dmad"], ["a", "b", "c", "d", "mddnet"]):
        found = colours(names)
        assert found["mddnet"] == own and len(set(found.values())) == len(names)
    assert arm_numbers(["a", "mddnet", "b", "c"]) == dict(a=0, mddnet=2, b=1, c=3)
    assert set(OWN_NUMBERS) <= set(list_detectors())


def test_ten_arms_have_ten_colours_whatever_detectors_are_among_them():
    for names in ([*OWN_NUMBERS, "a", "b", "c"], ["a", "b", "c", *OWN_NUMBERS], ["uniad", *"abcdefghi"]):
        found = colours(names)
        assert len(set(found.values())) == 10 and list(found) == names


def test_save_keeps_below_the_limit_where_it_can(tmp_path):
    fig = heatmap_grid(record(drawn=drawn_samples(side=64, thumbnail=64)))
    full = save(fig, tmp_path/"new"/"full.png", 10_000).stat().st_size
    small = save(fig, tmp_path/"new"/"small.png", 1).stat().st_size
    assert small < full
    assert (tmp_path/"new"/"small.png").read_bytes()[:4] == b"\x89PNG"
