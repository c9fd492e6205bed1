"What the lessons on tables and plots tell badly: mixtures that must be refused, ties, nans, scales."
import itertools
import math
from types import SimpleNamespace

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from mdd_bench.errors import DataError, SpecError
from mdd_bench.reporting.plots import bars, colours, curve, heatmap_grid, loss_curves, save, shared_scale, transfer_map
from mdd_bench.reporting.tables import (TABLE_METRICS, arms, caption, comparable, costs, marks, per_class, scores_frame, seen_and_unseen, settings, summary,
                                        to_markdown, transfer, write_table)

KEYS = (*TABLE_METRICS, "I-FPR95", "P-FPR95", "P-FPR95-good")
IDS = itertools.count()


def record(detector="a", seed=0, value=.5, terms=("dist",), provenance=None, protocols=("exact",), values=None, **spec):
    "A stand-in: every metric of every class is `value`, or values[class]."
    values = values or {"x": value, "y": value}
    block = dict(mean={k: float(np.mean(list(values.values()))) for k in KEYS}, per_class={c: dict.fromkeys(KEYS, v) for c, v in values.items()}, per_kind={})
    step = np.arange(40)
    history = pd.DataFrame({"epoch": step//20, "step": step, **{t: np.exp(-step/10) for t in terms}}).assign(loss=len(terms)*np.exp(-step/10))
    full = dict(data="embedded-v1", size=128, backbone="resnet18", weights="pretrained", layers=[1, 2, 3], detector=detector, options={}, seed=seed,
                epochs=10, batch=16, classes=None, protocols=list(protocols)) | spec
    return SimpleNamespace(id=f"{next(IDS):012x}", spec=full, metrics={p: block for p in protocols}, cost={},
                           provenance=dict(data_fingerprint="d1", weights_hash="w1") | (provenance or {}),
                           history=lambda: history if terms else history[:0])


def cells(markdown):  # {arm: {column: cell}}
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in markdown.splitlines()]
    return {row[0]: dict(zip(lines[0][1:], row[1:])) for row in lines[2:]}


# ---- means and deviations

def test_mean_and_sample_deviation_by_hand():
    values = [.80, .83, .89]
    table = summary([record("a", s, v) for s, v in enumerate(values)])
    mean = sum(values)/3
    assert table.loc["a", "P-AP"] == pytest.approx(mean)
    assert table.loc["a", "P-AP std"] == pytest.approx(math.sqrt(sum((v - mean)**2 for v in values)/2))
    assert table.loc["a", "n"] == 3


def test_one_seed_has_no_deviation():
    table = summary([record("a"), record("b")])
    assert table["mAD std"].isna().all()
    assert "±" not in to_markdown(table)


def test_a_nan_is_not_averaged_away():
    table = summary([record("a", 0, .5), record("a", 1, float("nan"))])
    assert math.isnan(table.loc["a", "P-AP"]) and math.isnan(table.loc["a", "P-AP std"])
    assert cells(to_markdown(table))["a"]["P-AP"] == "-"


def test_a_null_from_json_is_a_nan():
    r = record("a")
    r.metrics["exact"]["mean"]["P-AP"] = None
    assert math.isnan(summary([r]).loc["a", "P-AP"])


def test_arms_keep_the_order_of_the_records():
    assert list(summary([record("z"), record("a"), record("m")]).index) == ["z", "a", "m"]


def test_per_class_and_its_mean():
    records = [record("a", s, values={"x": .2 + .1*s, "y": .6}) for s in range(2)]
    table = per_class(records, metric="AUPRO")
    assert table.loc["a", ["x", "y", "mean"]].tolist() == pytest.approx([.25, .6, .425])
    assert table.loc["a", "x std"] == pytest.approx(.1/math.sqrt(2))
    assert table.loc["a", "records"].split() == [r.id for r in records]


def test_scores_frame_has_a_row_per_record():
    records = [record("a", s, options=dict(m=m)) for m in (1, 2) for s in (0, 1)]
    frame = scores_frame(records, by=["detector", "options.m"])
    assert frame["id"].tolist() == [r.id for r in records]
    assert frame[["options.m", "seed"]].values.tolist() == [[1, 0], [1, 1], [2, 0], [2, 1]]


def test_an_option_that_only_some_arms_have():
    table = summary([record("a", options=dict(m=1)), record("b")], by=["detector", "options.m"])
    assert list(table.index) == [("a", 1), ("b", "-")]


@pytest.mark.parametrize("call", [lambda r: summary(r, protocol="exakt"), lambda r: summary(r, metrics=("P-AUC",)), lambda r: summary(r, by="detectr")])
def test_unknown_names_are_refused_with_a_hint(call):
    with pytest.raises(SpecError, match="Did you mean"): call([record()])


# ---- what may stand in one table

@pytest.mark.parametrize("field, value", [("size", 256), ("data", "mvtec"), ("classes", ["x"]), ("weights", "random"), ("setting", "separate")])
def test_mixed_settings_are_refused_by_name(field, value):
    with pytest.raises(SpecError, match=rf"several values of {field}: .*{value[-1] if isinstance(value, list) else value}"):
        summary([record("a"), record("b", **{field: value})])


@pytest.mark.parametrize("field", ["data_fingerprint", "weights_hash"])
def test_the_same_name_for_other_bytes_is_refused(field):
    with pytest.raises(SpecError, match=field): summary([record("a"), record("b", provenance={field: "other"})])


def test_fingerprints_follow_the_data_and_hashes_the_backbone():
    comparable([record(data="m"), record(data="v", provenance=dict(data_fingerprint="d2"))], by="data")
    comparable([record(backbone="r"), record(backbone="w", provenance=dict(weights_hash="w2"))], by="backbone")
    with pytest.raises(SpecError, match="data_fingerprint"): comparable([record(data="m"), record(data="m", seed=1, provenance=dict(data_fingerprint="d2"))], by="data")


def test_random_weights_may_be_drawn_anew():
    comparable([record(seed=s, weights="random", provenance=dict(weights_hash=str(s))) for s in range(2)])


@pytest.mark.parametrize("field, value", [("epochs", 20), ("batch", 8), ("options", dict(m=1)), ("backbone", "resnet50"), ("layers", [2, 3])])
def test_a_detector_has_its_own_recipe_but_only_one(field, value):
    comparable([record("a"), record("b", **{field: value})])
    with pytest.raises(SpecError, match=field): comparable([record("a"), record("a", 1, **{field: value})])


def test_the_same_dataset_elsewhere_is_the_same_dataset():
    table = summary([record("a", 0, data="/home/one/mvtec"), record("a", 1, data="/mnt/two/mvtec/")], by="data")
    assert list(table.index) == ["mvtec"] and table["n"].tolist() == [2]


def test_a_seed_counts_once():
    first, second = record("a", 3), record("a", 3)
    with pytest.raises(SpecError, match=f"seed 3 .*{first.id} {second.id}"): arms([first, second])


def test_no_records():
    with pytest.raises(SpecError, match="no records"): summary([])


def test_protocols_are_not_settings():
    comparable([record("a"), record("b", protocols=("exact", "ader"))])
    with pytest.raises(SpecError, match="protocol in record"): summary([record("a"), record("b", protocols=("ader",))])


# ---- arms by name

def ablation():
    "Two named arms that differ in all that a method brings; three seeds each."
    both = [record("a", s, .8 + .01*s, options=dict(branches="both", fusion="gate", scale=2), epochs=20, batch=8, revision=3) for s in range(3)]
    one = [record("b", s, .7 + .01*s, options=dict(branches="one", fusion=None), epochs=5, batch=16, revision=1) for s in range(3)]
    return [*one, *both], {r.id: "both + L_dist" for r in both} | {r.id: "one" for r in one}


def test_named_arms_are_the_index_and_keep_the_order_of_the_records():
    records, names = ablation()
    table = summary(records, by=names)
    assert table.index.names == ["arm"] and list(table.index) == ["one", "both + L_dist"]        # not the order of the dict
    assert table["P-AP"].tolist() == pytest.approx([.71, .81]) and table["P-AP std"].tolist() == pytest.approx([.01, .01])
    assert list(arms(records, names)) == [("one",), ("both + L_dist",)]
    assert scores_frame(records, by=names)["arm"].tolist() == ["one"]*3 + ["both + L_dist"]*3
    assert per_class(records, by=names).index.tolist() == ["one", "both + L_dist"]
    assert to_markdown(table).startswith("| arm |")
    assert "Epochs 5 (one); 20 (both + L_dist)" in caption(records, by=names)


def test_one_detector_may_have_several_named_arms():
    records = [record("a", options=dict(m=m)) for m in (1, None)]
    names = dict(zip((r.id for r in records), ("with", "without")))
    with pytest.raises(SpecError, match="options.m"): summary(records)
    assert list(summary(records, by=names).index) == ["with", "without"]
    assert summary(records, by=names | {"elsewhere": "unused"})["n"].tolist() == [1, 1]


def test_every_record_must_have_a_name():
    records, names = ablation()
    del names[records[4].id]
    for call in (comparable, summary, bars, loss_curves):
        with pytest.raises(SpecError, match=f"record {records[4].id} has no name.*Add it"): call(records, by=names)


@pytest.mark.parametrize("field, spec", [("detector", dict(detector="b")), ("options.m", dict(options=dict(m=2))), ("options.m", dict(options={})), ("revision", dict(revision=2)),
                                         ("epochs", dict(epochs=3)), ("batch", dict(batch=2))])
def test_a_mixture_within_a_named_arm_is_refused_by_field(field, spec):
    pair = [record(**(dict(detector="a", seed=s, options=dict(m=1), revision=1) | (spec if s else {}))) for s in range(2)]
    with pytest.raises(SpecError, match=rf'several values of {field} within the arm "same"'): comparable(pair, {r.id: "same" for r in pair})
    comparable(pair, {r.id: r.id for r in pair})                                                # under two names they may stand together


@pytest.mark.parametrize("field, value", [("size", 256), ("data", "mvtec"), ("setting", "separate"), ("weights", "random")])
def test_names_excuse_nothing_that_no_method_brings(field, value):
    pair = [record("a"), record("b", **{field: value})]
    with pytest.raises(SpecError, match=rf"several values of {field}: .*{value}"): comparable(pair, {r.id: r.spec["detector"] for r in pair})


def test_a_seed_counts_once_within_a_name():
    pair = [record("a", 3), record("a", 3)]
    with pytest.raises(SpecError, match="seed 3 occurs 2 times for same"): arms(pair, {r.id: "same" for r in pair})
    assert len(arms(pair, {pair[0].id: "one", pair[1].id: "two"})) == 2


def test_names_and_a_field_together():
    records = [record("a", s, options=dict(kind=kind, m=m)) for kind in "xy" for m in (1, 2) for s in (0, 1)]
    names = {r.id: "arm " + r.spec["options"]["kind"] for r in records}
    assert list(summary(records, by=[names, "options.m"]).index) == [("arm x", 1), ("arm x", 2), ("arm y", 1), ("arm y", 2)]
    with pytest.raises(SpecError, match="options.m within"): summary(records, by=names)


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
def test_marks(values, lower, expected): assert marks(values, lower) == expected


def test_markdown_marks_each_metric_in_its_direction():
    shown = cells(to_markdown(summary([record("a", value=.1), record("b", value=.2), record("c", value=.3)], metrics=("P-AP", "P-FPR95-good"))))
    assert [shown[d]["P-AP"] for d in "abc"] == ["10.0", "<u>20.0</u>", "**30.0**"]
    assert [shown[d]["P-FPR95-good"] for d in "abc"] == ["**10.0**", "<u>20.0</u>", "30.0"]


def test_per_class_table_of_a_rate_prefers_the_lower():
    records = [record("a", value=.1), record("b", value=.2)]
    assert cells(to_markdown(per_class(records, metric="I-FPR95")))["a"]["x"] == "**10.0**"
    assert cells(to_markdown(per_class(records, metric="I-AUROC")))["b"]["x"] == "**20.0**"


def test_markdown_cell_and_alignment():
    text = to_markdown(summary([record("a", 0, .86), record("a", 1, .87), record("b|c", 0, .5)], metrics=("P-AP",)))
    assert "**86.5 ± 0.7**" in text and r"b\|c" in text
    assert text.splitlines()[1] == "| :--- | ---: |"


# ---- captions and files

def test_caption_says_what_the_numbers_are_of():
    text = caption([record("a", 0, data="/home/me/mvtec"), record("a", 1, data="/home/me/mvtec"), record("b", 0, data="/home/me/mvtec", epochs=0)])
    for part in ("Data mvtec: 2 classes", "size 128 px", "Backbone resnet18", "weights pretrained", "10 (a); 0 (b)", "batch 16", "0, 1 (a); 0 (b)",
                 "`exact`", "F1max uses the best threshold on the test set", "fingerprint d1"): assert part in text
    assert "/home" not in text and "RANDOM" not in text


@pytest.mark.parametrize("weights", [("random",), ("pretrained", "random")])
def test_caption_shouts_when_any_weights_are_random(weights):
    text = caption([record(weights=w) for w in weights], by="weights")
    assert text.startswith("**RANDOM backbone weights: no comparison with published numbers.**")


def test_costs_are_medians_as_recorded():
    cost = lambda s, device="cpu": dict(prepare_s=1, train_s=s, test_s=2, ms_per_image=8, parameters_trained=2e6, bytes_test_without_backbone=3*2**20, device=device)
    rs = [record("a", s) for s in range(3)] + [record("b", 0)]
    for r, c in zip(rs, (cost(10), cost(90), cost(20), cost(5, "gpu"))): r.cost = c
    table = costs(rs)
    assert table.loc["a"].tolist() == [21, 2, 8, 2, 3, "cpu", 3] and table.loc["b", "training, s"] == 6 and table.loc["b", "device"] == "gpu"
    assert list(costs(rs, {r.id: r.id for r in rs}).index) == [r.id for r in rs]
    with pytest.raises(SpecError): costs([record("a"), record("b", size=256)])


def test_caption_names_the_detectors_that_nobody_has_compared_with_their_paper():
    assert caption([record("a"), record("b", provenance=dict(verified="table 2")), record("c")]).endswith(" Not verified against published numbers: a, c.")
    assert "verified" not in caption([record("b", provenance=dict(verified="table 2"))])


def test_caption_names_the_labels():
    drawn = dict(labels=dict(test_hash="t"), test_counts=dict(x=[4, 7], y=[3, 5]))
    says = caption([record(labelled=5, scheme="pooled", label_seed=0, hold_out=10, provenance=drawn)])
    assert "Labelled anomalies: 5, scheme pooled, label seeds 0; those of N = 10 are in no arm's test. Test images, good + anomalous: x 4 + 7, y 3 + 5." in says
    assert "Labelled" not in caption([record(labelled=0)])

def labelled(n, seed, label_seed, test, kinds=None, **values):
    return record(seed=seed, labelled=n, label_seed=label_seed, provenance=dict(labels=dict(test_hash=test, kinds=kinds or {})), **values)

def test_within_a_label_seed_all_arms_share_the_test_images():
    fair = [labelled(n, s, s, f"t{s}") for n in (0, 5) for s in (0, 1)]
    assert summary(fair, "labelled")["n"].tolist() == [2, 2]
    with pytest.raises(SpecError, match="different images"): summary(fair[:3] + [labelled(5, 1, 1, "t0")], "labelled")
    many = [labelled(n, s, d, f"t{d}") for n in (0, 5) for s in (0, 1) for d in (0, 1)]                 # both seeds are averaged over
    assert summary(many, "labelled")["n"].tolist() == [4, 4]
    with pytest.raises(SpecError, match="label seed 1 occurs 2 times"): summary(many + [labelled(5, 0, 1, "t1")], "labelled")

def test_seen_and_unseen_kinds_are_averaged_in_classes_that_have_both():
    r = labelled(5, 0, 0, "t", kinds=dict(x=["a"], y=["c"]))
    m = lambda v: dict.fromkeys(KEYS, v)
    r.metrics["exact"]["per_kind"] = dict(x=dict(a=m(.9), b=m(.5), d=m(.7)), y=dict(c=m(.3)), z=dict(e=m(.1)))
    row = seen_and_unseen([r], "labelled", ["P-AP"]).iloc[0]
    assert row["P-AP seen"] == pytest.approx(.9) and row["P-AP unseen"] == pytest.approx(.6)
    r.provenance["labels"]["kinds"] = dict(y=["c"])
    with pytest.raises(SpecError, match="one_kind"): seen_and_unseen([r], "labelled", ["P-AP"])

def test_transfer_is_the_gain_over_no_labels():
    of = lambda source, **v: record(labelled=5*bool(source), label_classes=source, label_seed=0, hold_out=5, values=v, provenance=dict(labels=dict(test_hash="t")))
    records = [of(None, x=.5, y=.4, z=.3), of("x", x=.8, y=.5, z=.2), of("y+z", x=.6, y=.4, z=.4)]
    t = transfer(records, "P-AP")
    assert t.loc["x", "none"] == .5 and t.loc["x", "x"] == pytest.approx(.3) and t.loc["mean of other classes", "x"] == pytest.approx(0) and t.loc["mean of other classes", "y+z"] == pytest.approx(.1)
    figure = transfer_map(t)
    assert sum(isinstance(p, plt.Rectangle) for p in figure.axes[1].patches) == 3 and "+30.0" in [x.get_text() for x in figure.axes[1].texts]
    with pytest.raises(SpecError, match="labelled=0"): transfer(records[1:], "P-AP")


def test_csv_keeps_every_digit_and_every_record(tmp_path):
    records = [record(d, s, v) for d, s, v in (("a", 0, 1/3), ("a", 1, 1/7), ("b", 0, 2/3))]
    table = summary(records)
    md, csv = write_table(tmp_path/"new", "main", table, "A caption.")
    back = pd.read_csv(csv, index_col=0, dtype=str, keep_default_na=False)   # text, so that no parser rounds
    for column in [*TABLE_METRICS, *(f"{m} std" for m in TABLE_METRICS)]:
        np.testing.assert_array_equal([float(v or "nan") for v in back[column]], table[column])
    assert [ids.split() for ids in back["records"]] == [[records[0].id, records[1].id], [records[2].id]]
    assert back["n"].tolist() == ["2", "1"]
    assert md.read_text(encoding="utf-8").startswith("A caption.\n\n| detector |")


@pytest.mark.parametrize("name", ["../out", "a/b"])
def test_a_table_stays_in_its_folder(tmp_path, name):
    with pytest.raises(SpecError, match="plain file name"): write_table(tmp_path, name, summary([record()]))


def test_settings_are_flat():
    assert settings(record(options=dict(m=1)))["options.m"] == 1 and "protocols" not in settings(record())


# ---- figures

@pytest.fixture(autouse=True)
def no_figure_stays_open():
    yield
    assert plt.get_fignums() == []


def test_bars_show_means_and_every_seed():
    records = [record(d, s, v + .02*s) for d, v in (("a", .6), ("b", .7)) for s in range(3)]
    ax = bars(records, metrics=("I-AUROC", "P-AP")).axes[0]
    assert [b.get_height() for b in ax.patches] == pytest.approx([62, 62, 72, 72])
    dots = [line.get_ydata() for line in ax.lines if line.get_marker() == "o"]
    assert sorted(np.concatenate(dots)) == pytest.approx(sorted([60, 62, 64, 70, 72, 74]*2))
    assert ax.get_ylim() == (0, 100)
    assert sum(line.get_linestyle() == ":" for line in ax.lines) == 1        # chance is drawn at the AUROC only


def test_a_cut_axis_says_so_and_hides_no_bar():
    records = [record("a", value=.9), record("b", value=.8)]
    assert "cut at 70" in bars(records, low=70).axes[0].get_ylabel()
    with pytest.raises(SpecError, match="axis starts at 85"): bars(records, low=85)


def test_bars_name_a_nan():
    texts = [t.get_text() for t in bars([record("a", value=math.nan), record("b")]).axes[0].texts]
    assert texts == ["nan"]*4


def test_bars_of_two_fields_and_a_shared_palette():
    records = [record("a", s, options=dict(m=m)) for m in (1, 2) for s in (0, 1)]
    palette = {"a, 1": (1, 0, 0), "a, 2": (0, 0, 1)}
    ax = bars(records, by=["detector", "options.m"], metrics=("P-AP",), palette=palette).axes[0]
    assert [b.get_facecolor()[:3] for b in ax.patches] == [(1, 0, 0), (0, 0, 1)]


def test_plots_refuse_the_mixtures_that_tables_refuse():
    for draw in (bars, loss_curves):
        with pytest.raises(SpecError, match="size"): draw([record("a"), record("b", size=256)])


def boxes(fig):  # of the legend, the axes, the figure, in pixels
    fig.draw_without_rendering()
    return fig.legends[0].get_window_extent(), fig.axes[0].get_window_extent(), fig.bbox


@pytest.mark.parametrize("n", [1, 6, 10, 14])
def test_the_legend_of_many_long_names_is_neither_cut_nor_over_the_bars(n):
    records = [record("a", s, .5 + .01*i, options=dict(i=i)) for i in range(n) for s in range(2)]
    legend, axes, figure = boxes(bars(records, by={r.id: f"{r.spec['options']['i']:02d} WWW branches + memory" for r in records}))
    assert legend.x0 >= axes.x1 and legend.x1 <= figure.x1 and legend.y0 >= figure.y0 and legend.y1 <= figure.y1
    assert axes.width > .4*figure.width and axes.height > .6*figure.height


def memories(x=(1, 8, 32, 128), seeds=3, values=lambda k, s: .5 + .001*k + .01*s**2):
    return [record("a", s, values(k, s), options=dict(memory="class", k=k)) for k in x for s in range(seeds)]


def levels(seeds=3): return [record("a", s, v + .01*s, options=dict(memory=m, k=k)) for m, v, k in (("none", .4, None), ("shared", .6, 50)) for s in range(seeds)]
def plain(ax): return [line for line in ax.lines if line.get_linestyle() == "-"]
def dashed(ax): return [line for line in ax.lines if line.get_linestyle() == "--"]
def dots(ax): return sorted((x, y) for line in ax.lines if line.get_marker() == "o" for x, y in line.get_xydata())


def test_curve_shows_mean_band_and_seeds_by_hand():
    values = {(1, 0): .50, (1, 1): .53, (1, 2): .59, (2, 0): .7, (2, 1): .7, (2, 2): .7}
    fig = curve(memories((2, 1), values=lambda k, s: values[k, s]), "options.k")
    ax, = fig.axes
    assert plain(ax)[0].get_xydata().ravel() == pytest.approx([1, 54, 2, 70])                    # by rising x, whatever the order of the records
    std = 100*math.sqrt((.04**2 + .01**2 + .05**2)/2)
    edge = ax.collections[0].get_paths()[0].vertices
    assert (edge[edge[:, 0] == 1, 1].min(), edge[edge[:, 0] == 1, 1].max()) == pytest.approx((54 - std, 54 + std))
    assert edge[edge[:, 0] == 2, 1] == pytest.approx(70)
    assert np.array(dots(ax)) == pytest.approx(np.array(sorted((k, 100*v) for (k, _), v in values.items())))
    assert ax.get_ylabel() == "mAD (percent)" and ax.get_xlabel() == "k" and ax.get_ylim()[0] > 40
    assert not fig.legends                                                                       # one line needs no name


def test_one_seed_has_no_band():
    ax = curve(memories(seeds=1) + levels(seeds=1), "options.k", by="options.memory", levels=("none", "shared")).axes[0]
    assert len(ax.collections) == len(ax.patches) == 0 and len(dots(ax)) == 4 and len(dashed(ax)) == 2


def test_levels_lie_at_their_means_and_lines_keep_their_points():
    fig = curve(levels() + memories(), "options.k", ("mAD", "P-AP"), by="options.memory", levels=["none", "shared"])
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["none", "shared", "class"]
    assert [ax.get_ylabel() for ax in fig.axes] == ["mAD (percent)", "P-AP (percent)"]
    for ax in fig.axes:
        assert [line.get_ydata()[0] for line in dashed(ax)] == pytest.approx([41, 61])
        assert [(p.get_y(), p.get_y() + p.get_height()) for p in ax.patches] == [pytest.approx((40, 42)), pytest.approx((60, 62))]
        assert list(next(line for line in plain(ax) if len(line.get_xdata()) == 4).get_xdata()) == [1, 8, 32, 128]
    legend, axes, figure = boxes(fig)
    assert legend.x1 <= figure.x1 and legend.x0 >= axes.x1


@pytest.mark.parametrize("x, scale", [((1, 8), "linear"), ((1, 9), "log"), ((1, 8, 32, 128), "log"), ((0, 1, 100), "linear"), ((.5, 2, 8), "log")])
def test_axis_doubles_above_a_factor_of_eight(x, scale):
    ax = curve(memories(x), "options.k").axes[0]
    assert ax.get_xscale() == scale and ("log" in ax.get_xlabel()) == (scale == "log")
    if scale == "log":
        assert ax.xaxis.get_transform().base == 2 and list(ax.get_xticks()) == list(x) and not len(ax.get_xticks(minor=True))
        assert [t.get_text() for t in ax.get_xticklabels()] == [f"{v:g}" for v in x]


def test_curves_of_named_arms():
    records = [record("a", s, options=dict(memory=m, k=k, fusion=f)) for m, f in (("class", "gate"), ("none", None)) for k in ((1, 2, 4) if f else (None,)) for s in (0, 1)]
    names = {r.id: "class + gate" if r.spec["options"]["fusion"] else "no memory" for r in records}
    fig = curve(records, "options.k", "mAD", by=names, levels=("no memory",))
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["class + gate", "no memory"] and len(dashed(fig.axes[0])) == 1
    assert len(dashed(curve(records, "options.k", by=names, levels="no memory").axes[0])) == 1
    with pytest.raises(SpecError, match="options.memory within the arm"): curve(records, "options.k", by={i: "same" for i in names}, levels=("same",))


@pytest.mark.parametrize("value", [None, "many", True, [1, 2], math.nan])
def test_an_x_that_is_no_number_is_refused_by_record(value):
    bad = record("a", options=dict(memory="class", k=value))
    with pytest.raises(SpecError, match=f"record {bad.id} has .* for options.k"): curve([*memories((2, 4)), bad], "options.k")


def test_an_x_that_is_missing_is_refused_by_record():
    bad = record("a", options=dict(memory="class"))
    with pytest.raises(SpecError, match=f"record {bad.id} has None for options.k.*levels"): curve([*memories(), bad], "options.k")


@pytest.mark.parametrize("change, message", [(dict(x="options.kk"), "Did you mean 'options.k'"), (dict(levels=("non",)), "Did you mean 'none'"), (dict(metrics="mADD"), "Did you mean 'mAD'"),
                                             (dict(levels=("none", "shared", "class")), "'class' is to be a level"), (dict(by=None, levels=()), "options.memory"), (dict(protocol="exakt"), "protocol")])
def test_curve_names_what_does_not_fit(change, message):
    with pytest.raises(SpecError, match=message): curve(**(dict(records=levels() + memories(), x="options.k", by="options.memory", levels=("none", "shared")) | change))


def test_curve_refuses_mixtures_repeated_seeds_and_nothing_to_draw():
    with pytest.raises(SpecError, match="size"): curve([*memories(), record("a", options=dict(memory="class", k=4), size=256)], "options.k")
    with pytest.raises(SpecError, match="seed 0 occurs 2 times"): curve(memories() + memories(), "options.k")
    with pytest.raises(SpecError, match="all arms are levels"): curve(levels(), "options.k", by="options.memory", levels=("none", "shared"))


def test_curve_names_a_nan():
    records = memories(values=lambda k, s: math.nan if (k, s) == (8, 1) else .5) + [record("a", 0, math.nan, options=dict(memory="none", k=None))]
    ax = curve(records, "options.k", by="options.memory", levels=("none",)).axes[0]
    assert [t.get_text() for t in ax.texts] == ["nan", "nan"] and ax.texts[0].get_position()[0] == 8
    assert np.isnan(plain(ax)[0].get_ydata()).tolist() == [False, True, False, False] and not dashed(ax)


def test_loss_curves_have_a_panel_per_term_and_a_sum():
    fig = loss_curves([record("a"), record("b", terms=("dist", "identity")), record("c", terms=())])
    assert [ax.get_title() for ax in fig.axes] == ["dist", "identity", "sum"]
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["a", "b"]
    assert [len(ax.lines) for ax in fig.axes] == [4, 2, 4]                    # what was logged, and its median
    assert len({ax.get_xlim() for ax in fig.axes}) == 1


def test_loss_curves_of_one_record_and_of_none():
    assert [ax.get_title() for ax in loss_curves(record()).axes] == ["dist"]
    with pytest.raises(SpecError, match="none of these"): loss_curves(record(terms=()))


def test_negative_losses_stay_in_view():
    r = record()
    frame = r.history().assign(dist=lambda f: -f["dist"])
    r.history = lambda: frame
    low, high = loss_curves(r).axes[0].get_ylim()
    assert low <= -1 and high >= frame["dist"].max()


def grid(n=3, side=16, **kwargs):
    rng = np.random.default_rng(0)
    maps = {"a": rng.random((n, side, side)), "b": (50*rng.random((n, 8, 8))).astype(np.float16)}
    maps["a"][0] *= .1
    masks = [None, *(np.eye(side, dtype=bool) for _ in range(n - 1))]
    return maps, heatmap_grid(np.zeros((n, side, side, 3), np.uint8), **({"masks": masks, "maps": maps} | kwargs))


def test_one_colour_scale_per_arm_over_all_rows():
    maps, fig = grid()
    for column, arm in ((2, "a"), (3, "b")):
        limits = {fig.axes[4*row + column].images[0].get_clim() for row in range(3)}
        assert limits == {shared_scale(maps[arm])}
        assert fig.axes[column].get_title() == arm
    np.testing.assert_allclose(fig.axes[2].images[0].get_array(), maps["a"][0], rtol=1e-6)  # drawn as they are, not stretched


def test_the_contour_does_not_move_the_picture():
    _, fig = grid()
    assert fig.axes[5].get_xlim() == fig.axes[4].get_xlim() and fig.axes[5].get_ylim() == fig.axes[4].get_ylim()
    assert len(fig.axes[1].collections) == 0 and len(fig.axes[5].collections) == 2


def test_without_masks_there_is_no_column_of_the_truth():
    _, fig = grid(masks=None, titles=["r0", "r1", "r2"])
    assert [ax.get_title() for ax in fig.axes[:3]] == ["image", "a", "b"]
    assert [fig.axes[3*row].get_ylabel() for row in range(3)] == ["r0", "r1", "r2"]


@pytest.mark.parametrize("kwargs, culprit", [(dict(titles=["one"]), "titles"), (dict(masks=[None]), "masks"), (dict(maps={"a": np.zeros((2, 4, 4))}), "maps of a"), (dict(maps={}), "no map")])
def test_unequal_counts_are_refused(kwargs, culprit):
    with pytest.raises(DataError, match=culprit): grid(**kwargs)


def test_scale_of_a_constant_map_and_of_an_outlier():
    low, high = shared_scale(np.ones((2, 4, 4)))
    assert low < high
    values = np.linspace(0, 1, 10_000).reshape(1, 100, 100)
    values[0, 0, 0] = 1e6
    assert shared_scale(values)[1] <= 1
    with pytest.raises(DataError, match="not finite"): shared_scale(np.array([[[math.nan]]]))


def test_colours_are_stable_and_distinct():
    assert colours("abc") == colours(list("abc")) and len(set(colours(range(12)).values())) == 12


def test_save_keeps_below_the_limit_where_it_can(tmp_path):
    _, fig = grid(side=64)
    full, small = (save(fig, tmp_path/"new"/f"{limit}.png", limit).stat().st_size for limit in (10_000, 1))
    assert small < full
    assert (tmp_path/"new"/"1.png").read_bytes()[:4] == b"\x89PNG"
