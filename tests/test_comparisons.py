"Accuracy against cost, classes as dots, scores as histograms: what the lesson tells badly."
import itertools, math
from dataclasses import dataclass, field

import matplotlib
matplotlib.use("Agg")
import numpy as np
import pandas as pd
import pytest
from conftest import small_spec
from matplotlib.colors import to_hex

from mdd_bench.errors import DataError, SpecError, StoreError
from mdd_bench.reporting.comparisons import (class_dots, cost_of, easiest_first, markers, pareto,
                                             pareto_front, score_histograms, scores_of_classes)
from mdd_bench.reporting.tables import image_metrics, per_class
from mdd_bench.running.run import run

IDS = itertools.count()
SPEC = dict(
    data="embedded-v1", classes=None, size=128, setting="unified", backbone="resnet18", weights="random",
    layers=[1, 2], options={}, labelled=0, label_seed=None, epochs=1, batch=16, protocols=["exact"],
)


@dataclass
class StandIn:
    id: str
    spec: dict
    metrics: dict
    cost: dict
    provenance: dict = field(default_factory=lambda: dict(data_fingerprint="d1", threads=1))
    table: object = None

    def scores(self):
        if self.table is None:
            raise StoreError(f"record {self.id} has no scores.csv", "run the spec again")
        return self.table


def record(detector="a", seed=0, value=.5, ms=10., values=None, threads=1, table=None, **cost):
    "Every metric of every class is `value`, or values[class]."
    values = values or dict(x=value, y=value)
    def block(number): return {"mAD": number, "I-AUROC": number, "P-FPR95": 1 - number}
    mean = float(np.mean(list(values.values())))
    metrics = dict(exact=dict(mean=block(mean), per_class={cls: block(v) for cls, v in values.items()}))
    costs = dict(ms_per_image=ms, train_s=5., device="cpu", features="cached", bytes_test=2**20,
                 parameters_trained=1_000_000) | cost
    spec = SPEC | dict(detector=detector, seed=seed)
    made = StandIn(f"{next(IDS):012x}", spec, metrics, costs, table=table)
    made.provenance["threads"] = threads
    return made


def names_of(fig):
    "{name: text} of the arms in a figure; broken lines are joined."
    return {text.get_text().replace("\n", " "): text for text in fig.axes[0].texts if text.get_text()}


def points_of(fig):
    "[(cost, percent)] of the markers, in the order of the arms."
    lines = [line for line in fig.axes[0].lines if line.get_marker() not in ("None", None, "")]
    return [(line.get_xdata()[0], line.get_ydata()[0]) for line in lines]


def front_of(fig):
    return {name for name, text in names_of(fig).items() if text.get_weight() == "bold"}


# ---- the front

@pytest.mark.parametrize("costs, values, front", [
    ([1, 2, 3], [5, 4, 6], [0, 2]),
    ([3, 1, 2], [6, 5, 4], [1, 0]),              # by rising cost
    ([1, 1], [5, 6], [1]),                       # the same cost, better
    ([1, 2], [5, 5], [0]),                       # as good, cheaper
    ([1, 1], [5, 5], [0, 1]),                    # neither beats the other
    ([1, 2, 3], [math.nan, 4, 5], [1, 2]),
    ([1], [0], [0]),
    ([], [], []),
])
def test_front(costs, values, front):
    assert pareto_front(costs, values) == front


def test_no_point_beats_the_front_and_some_point_of_it_beats_each_other():
    rng = np.random.default_rng(0)
    costs, values = rng.integers(0, 9, (2, 40))
    front = pareto_front(costs, values)
    def beats(i, j):
        better = costs[i] < costs[j] or values[i] > values[j]
        return costs[i] <= costs[j] and values[i] >= values[j] and better
    for j in range(40):
        assert any(beats(i, j) for i in front) == (j not in front)


# ---- the figure of costs

def test_points_are_means_and_medians_with_deviation_and_range():
    records = [record("a", seed, value, ms) for seed, (value, ms) in enumerate([(.5, 9), (.6, 10), (.7, 40)])]
    records.append(record("b", 0, .65, 12))
    fig = pareto(records)
    assert points_of(fig) == [pytest.approx((10, 60)), pytest.approx((12, 65))]
    upright, flat = (line.get_xydata().ravel() for line in fig.axes[0].lines[:2])
    assert upright == pytest.approx([10, 50, 10, 70]) and flat == pytest.approx([9, 60, 40, 60])
    assert front_of(fig) == {"a", "b"}
    assert fig.axes[0].get_xlabel() == "ms per image at batch 1"
    assert fig.axes[0].get_ylabel() == "mAD (percent)"


def test_arms_differ_without_colours():
    fig = pareto([record(name, value=.5 + .01*i, ms=10 + i) for i, name in enumerate("abcdefghij")])
    drawn = [line for line in fig.axes[0].lines if line.get_marker() not in ("None", None, "")]
    assert len({line.get_marker() for line in drawn}) == 10
    assert len({to_hex(line.get_color()) for line in drawn}) == 10
    assert set(markers("abcdefghijkl").values()) == set(markers("abcdefghij").values())


@pytest.mark.parametrize("costs, log", [
    ((10, 99), False), ((10, 100), True), ((0, 100), False), ((5, 5), False),
])
def test_a_decade_makes_the_axis_logarithmic_and_a_zero_does_not(costs, log):
    ax = pareto([record("a", ms=costs[0]), record("b", ms=costs[1])]).axes[0]
    assert (ax.get_xscale() == "log") == log == ("(log scale)" in ax.get_xlabel())


@pytest.mark.parametrize("cost, metric, front, best", [
    ("ms_per_image", "mAD", {"fast", "good"}, "best: upper left"),
    ("ms_per_image", "P-FPR95", {"fast", "good"}, "best: lower left"),
    ("images_per_second", "mAD", {"fast", "good"}, "best: upper right"),
])
def test_the_front_knows_what_is_better(cost, metric, front, best):
    arms = dict(fast=(.4, 10), good=(.8, 20), bad=(.6, 30))
    records = [record(name, value=v, ms=ms, images_per_second=1000/ms) for name, (v, ms) in arms.items()]
    fig = pareto(records, cost, metric)
    assert front_of(fig) == front
    assert fig.axes[0].get_title(loc="right") == best


def test_units_of_costs():
    r = record(parameters_trained=2_500_000, bytes_test=3*2**20, other=np.float32(7))
    assert [cost_of(r, name) for name in ("parameters_trained", "bytes_test", "other")] == [2.5, 3, 7]
    assert pareto([r], "other").axes[0].get_xlabel() == "other"


@pytest.mark.parametrize("count, length", [(3, 5), (12, 12), (18, 40)])
def test_names_cover_nothing_and_stay_inside(count, length):
    rng, records = np.random.default_rng(count), []
    for number in range(count):
        name, value, ms = f"{'long name '*4}{number}"[-length:], rng.uniform(.4, .6), rng.uniform(10, 50)
        records += [record(name, seed, value + .01*seed, ms + seed) for seed in (0, 1)]
    fig = pareto(records)
    fig.draw_without_rendering()
    ax, boxes = fig.axes[0], [text.get_window_extent() for text in names_of(fig).values()]
    assert len(boxes) == count
    dots = ax.transData.transform(points_of(fig))
    for number, box in enumerate(boxes):
        assert not box.count_overlaps(boxes[:number])
        assert not any(box.contains(*dot) for dot in dots)
        assert ax.bbox.x0 <= box.x0 and box.x1 <= ax.bbox.x1 and ax.bbox.y0 <= box.y0 and box.y1 <= ax.bbox.y1


def test_arms_at_the_same_place_keep_their_names():
    boxes = [text.get_window_extent() for text in names_of(pareto([record("one"), record("two")])).values()]
    assert len(boxes) == 2 and not boxes[0].count_overlaps(boxes[1:])


def test_a_nan_is_named_and_not_drawn():
    fig = pareto([record("a"), record("b", value=math.nan), record("c", value=.7, ms=20)])
    assert fig.axes[0].get_title(loc="left") == "nan: b"
    assert front_of(fig) == {"a", "c"} and len(points_of(fig)) == 2
    with pytest.raises(SpecError, match="no arm has a mAD"):
        pareto([record("a", value=math.nan)])


@pytest.mark.parametrize("other, cost, message", [
    (dict(threads=8), "ms_per_image", r"not measured under one condition: cpu, 1 thread .*cpu, 8 threads"),
    (dict(device="gpu"), "peak_memory_mb", "gpu, 1 thread"),
    (dict(device="gpu"), "train_s", "gpu"),
    (dict(features="computed"), "train_s", "features computed"),
])
def test_unlike_conditions_are_refused_with_a_record_of_each(other, cost, message):
    records = [record("a", peak_memory_mb=9), record("b", peak_memory_mb=9, **other)]
    with pytest.raises(SpecError, match=message) as refused:
        pareto(records, cost)
    assert all(r.id in str(refused.value) for r in records)
    assert "bytes_test" in str(refused.value)


def test_what_no_machine_changes_may_come_from_several():
    records = [record("a"), record("b", threads=8, device="gpu")]
    for cost in ("parameters_trained", "bytes_test"): pareto(records, cost)
    pareto([record("a"), record("b", features="computed")], "ms_per_image")


@pytest.mark.parametrize("cost, message", [
    ("ms_per_imag", "Did you mean 'ms_per_image'"),
    ("device", "has 'cpu' for device"),
    ("broken", "has nan for broken"),
    ("unknown_memory", "has None for unknown_memory"),
])
def test_what_is_no_number_is_refused_by_record(cost, message):
    r = record(broken=math.nan, unknown_memory=None)
    with pytest.raises(SpecError, match=message) as refused:
        pareto([r], cost)
    assert r.id in str(refused.value)


def test_pareto_and_dots_refuse_mixtures():
    larger = record("b")
    larger.spec["size"] = 256
    for draw in (pareto, lambda records: class_dots(records, "mAD")):
        with pytest.raises(SpecError, match="several values of size"):
            draw([record("a"), larger])
        with pytest.raises(SpecError, match="seed 0 occurs 2 times"):
            draw([record("a"), record("a")])


# ---- classes as dots

def arms_of_classes(**more):
    values = dict(a=dict(x=.5, y=.9, z=.7), b=dict(x=.6, y=.8, z=.75)) | more
    return [record(name, seed, values={cls: v + .02*seed for cls, v in of.items()})
            for name, of in values.items() for seed in (0, 1)]


def test_rows_are_classes_from_easy_to_hard_and_the_mean():
    fig = class_dots(arms_of_classes(), "mAD")
    ax = fig.axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["y", "z", "x", "mean"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]                                    # the first row is above
    large = [line for line in ax.lines if line.get_markersize() == 5]
    assert large[0].get_xdata() == pytest.approx([91, 71, 51, 71])
    assert large[1].get_xdata() == pytest.approx([81, 76, 61, 217/3 + .3333], abs=.01)
    seeds = [line.get_xdata() for line in ax.lines if line.get_marker() == "."]
    assert seeds[1] == pytest.approx([92, 72, 52, 72]) and len(seeds) == 4
    assert len({line.get_marker() for line in large}) == 2
    assert (large[0].get_ydata() < large[1].get_ydata()).all()                    # within a row, side by side
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["a", "b"]


def test_a_rate_has_its_lowest_class_first():
    assert easiest_first(per_class(arms_of_classes(), metric="P-FPR95")) == ["y", "z", "x"]


def test_a_nan_class_is_last_and_written():
    fig = class_dots(arms_of_classes(b=dict(x=.6, y=math.nan, z=.75)), "mAD")
    assert [label.get_text() for label in fig.axes[0].get_yticklabels()] == ["z", "x", "y", "mean"]
    assert [text.get_text() for text in fig.axes[0].texts] == ["nan", "nan"]      # of the class and the mean


@pytest.mark.parametrize("metric, value, marked", [
    ("I-AUROC", .5, True), ("I-AUROC", .9, False), ("mAD", .5, False),
])
def test_chance_is_marked_where_it_is_in_sight(metric, value, marked):
    lines = class_dots([record(value=value), record("b", value=value + .05)], metric).axes[0].lines
    assert any(line.get_linestyle() == ":" for line in lines) == marked


def test_dots_name_an_unknown_metric():
    with pytest.raises(SpecError, match="Did you mean 'mAD'"):
        class_dots([record()], "mADD")


# ---- scores as histograms

def scores(**classes):
    "A table of scores: for each class (good scores, anomalous scores)."
    rows = []
    for cls, (good, bad) in classes.items():
        rows += [dict(cls=cls, label=0, score=score) for score in good]
        rows += [dict(cls=cls, label=1, score=score) for score in bad]
    return pd.DataFrame(rows)


SHIFTED = scores(felt=([1, 2], [3, 4, 5]), tile=([11, 12], [13, 14, 15]))


def beside(fig):
    return [ax.texts[0].get_text() for ax in fig.axes]


def test_a_panel_for_each_class_and_one_for_all():
    fig = score_histograms(record(table=SHIFTED))
    assert [ax.get_ylabel() for ax in fig.axes] == ["felt", "tile", "all together"]
    pooled = 100*image_metrics(SHIFTED.label, SHIFTED.score)["I-AUROC"]
    assert pooled == 75
    assert beside(fig) == ["AUROC 100.0\n2 + 3 images", "AUROC 100.0\n2 + 3 images",
                           "AUROC 75.0 (mean of classes 100.0)\n4 + 6 images"]
    assert len({ax.get_xlim() for ax in fig.axes}) == 1
    assert fig.axes[0].get_xlim()[0] <= 1 and fig.axes[0].get_xlim()[1] >= 15


def test_good_images_stand_above_the_line_and_anomalous_ones_below_as_shares():
    ax = score_histograms(record(table=SHIFTED), "felt", bins=4).axes[0]
    good, anomalous = (patch.get_data().values for patch in ax.patches)
    assert good == pytest.approx([.5, .5, 0, 0]) and anomalous == pytest.approx([0, 0, -1/3, -2/3])


def test_one_class_has_no_pooled_panel_and_classes_can_be_chosen():
    r = record(table=SHIFTED)
    assert beside(score_histograms(r, "tile")) == ["AUROC 100.0\n2 + 3 images"]
    assert [ax.get_ylabel() for ax in score_histograms(r, ["tile"]).axes] == ["tile"]


def test_equal_scores_are_drawn():
    assert beside(score_histograms(record(table=scores(x=([1, 1], [1])))))[0].startswith("AUROC 50.0")


@pytest.mark.parametrize("table, message", [
    (scores(x=([1], [2]), y=([1], [])), "class y of record .* has no anomalous test image. Leave it out"),
    (scores(x=([1], [2]), y=([], [2])), "class y of record .* has no good test image"),
    (scores(x=([1], [2]), y=([math.nan, 1], [math.nan])), "class y of record .* has 2 scores that are nan"),
])
def test_classes_that_have_no_auroc_are_refused_by_name(table, message):
    r = record(table=table)
    with pytest.raises(DataError, match=message):
        score_histograms(r)
    assert list(scores_of_classes(r, "x")) == ["x"]


def test_missing_scores_and_unknown_classes_are_refused():
    with pytest.raises(StoreError, match="has no scores.csv"):
        score_histograms(record())
    with pytest.raises(SpecError, match="Did you mean 'felt'"):
        score_histograms(record(table=SHIFTED), "fel")


def test_pictures_of_a_real_record(tmp_path):
    "The AUROC beside a panel is that of the record."
    made = run(small_spec(), tmp_path)
    of_classes = made.metrics["exact"]["per_class"].values()
    for text, of_class in zip(beside(score_histograms(made)), of_classes):
        assert text.startswith(f"AUROC {100*of_class['I-AUROC']:.1f}\n")
    assert len(class_dots([made]).axes[0].get_yticklabels()) == 3
    for cost in ("ms_per_image", "bytes_test", "train_s", "images_per_second", "peak_memory_mb"):
        assert front_of(pareto([made], cost)) == {"rd4ad"}
    (made.folder/"scores.csv").unlink()
    with pytest.raises(StoreError, match=f"record {made.id} has no scores.csv"):
        score_histograms(made)
