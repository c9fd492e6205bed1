"What the lessons on pairs and selection tell badly: which pair, ties, unequal seeds, who sees which score."
import hashlib, json
from types import SimpleNamespace
import matplotlib
matplotlib.use("Agg")
import numpy as np
import pandas as pd
import pytest
from mdd_bench.errors import SpecError
from mdd_bench.reporting.formats import to_markdown
from mdd_bench.reporting.pairs import HALVES, configuration_names, named_pairs, pair_up, paired_scores
from mdd_bench.reporting.selection import (
    across_seeds, agreement, agreement_interval, agreements, by_class, class_means, deviations,
    draw_selection, half_means, left_out, picked, printed_agreements, rank_correlation, regret,
    regret_of_noise, regrets, regrets_of, with_enough)
from mdd_bench.running.study import load_study

CLASSES = ("a", "b", "c")
SPEC = dict(
    classes=list(CLASSES), size=128, setting="unified", backbone="resnet18", weights="lite0", layers=[2, 3],
    labelled=0, label_seed=None, hold_out=None, epochs=None, steps=500, batch=16, protocols=["exact"],
    revision=1)


def record(half, scores, seed=0, detector="alpha", data="parts", version="", spec=None, **options):
    "A record of one half; `scores` in points, one for each class, or one number for all."
    points = np.broadcast_to(np.asarray(scores, float), len(CLASSES))
    data = f"heldout:{data}" if half == "held-out" else data
    fields = SPEC | dict(detector=detector, data=data, seed=seed, options=options) | (spec or {})
    name = hashlib.sha256(json.dumps([fields, version]).encode()).hexdigest()[:12]
    per_class = {cls: {"mAD": value/100} for cls, value in zip(fields["classes"], points)}
    tested = f"{half}{version}"
    provenance = dict(data_fingerprint=tested, split_hashes=dict(test=tested), weights_hash="w")
    return SimpleNamespace(id=name, spec=fields, metrics={"exact": dict(per_class=per_class)}, cost={},
                           provenance=provenance)


def records_of(heldout, test, seeds=(0,), **fields):
    "Records of configurations with these scores on both halves, the same for all seeds."
    return [record(half, score, seed, width=width, **fields)
            for half, scores in zip(HALVES, (heldout, test))
            for width, score in enumerate(scores) for seed in seeds]


def scores_of(heldout, test, **fields):
    return paired_scores(pair_up(records_of(heldout, test, **fields)).pairs)


# --- which records are a pair

def test_halves_pair_by_the_name_of_their_data_though_fingerprints_and_folders_differ():
    heldout, test = record("held-out", 50, data="/one/disk/parts"), record("test", 60, data="/another/parts")
    pair, = pair_up([test, heldout]).pairs
    assert pair.heldout == [heldout] and pair.test == [test] and pair.detector == "alpha"


@pytest.mark.parametrize("field, value", [
    ("steps", 510), ("revision", 2), ("size", 64), ("layers", [1, 2, 3]), ("batch", 8), ("hold_out", 10),
])
def test_another_setting_is_another_configuration_and_the_error_names_it(field, value):
    halves = [record("held-out", 50), record("test", 60, spec={field: value})]
    with pytest.raises(SpecError, match=f"no pair; the nearest, .* differ in {field}"): pair_up(halves)


def test_another_option_is_another_configuration():
    with pytest.raises(SpecError, match="differ in options.width"):
        pair_up([record("held-out", 50, width=1), record("test", 60, width=2)])


def test_other_data_do_not_pair():
    with pytest.raises(SpecError, match="1 records of held-out data and 1 of test images, and no pair[.]"):
        pair_up([record("held-out", 50, data="parts"), record("test", 60, data="stones")])


def test_no_records_are_no_pair():
    with pytest.raises(SpecError, match="0 records of held-out data"): pair_up([])


def test_records_without_their_other_half_are_handed_back():
    both, lonely = records_of([1, 2], [3, 4]), [record("test", 5, width=9), record("held-out", 5, width=8)]
    pairing = pair_up(both + lonely)
    assert len(pairing.pairs) == 2 and {r.id for r in pairing.alone} == {r.id for r in lonely}


def test_a_record_that_comes_twice_counts_once():
    both = records_of([1, 2], [3, 4])
    assert [len(pair.test) for pair in pair_up(both + both).pairs] == [1, 1]


def test_a_seed_that_occurs_twice_is_refused():
    both = records_of([1, 2], [3, 4])
    again = record("test", 4, width=1, spec=dict(label_seed=1))      # another draw of labels, the same seed
    with pytest.raises(SpecError, match="seed 0 occurs twice"): pair_up([*both, again])


def test_halves_of_several_versions_of_the_images_are_refused():
    both = records_of([1, 2], [3, 4])
    newer = [record(half, 5, width=7, version="new") for half in HALVES]
    with pytest.raises(SpecError, match="not tested alike"): pair_up(both + newer)


def test_pairs_of_several_datasets_or_sets_of_classes_are_refused():
    both = records_of([1, 2], [3, 4])
    stones = records_of([1, 2], [3, 4], data="stones")
    fewer = records_of([1, 2], [3, 4], spec=dict(classes=["a", "b", "d"]))
    for more in (stones, fewer):
        with pytest.raises(SpecError, match="pairs of several datasets or classes"): pair_up(both + more)


# --- names

def test_a_name_has_what_tells_apart_and_no_more():
    widths = pair_up(records_of([1, 2], [3, 4])).pairs
    assert configuration_names(widths) == ["width 0", "width 1"]
    assert configuration_names(widths[:1]) == ["the only one"]


def test_settings_that_follow_others_are_left_out_of_a_name():
    arms = [dict(memory="none", rows=None, fusion="sum"), dict(memory="class", rows=32, fusion="sum"),
            dict(memory="class", rows=32, fusion="tr")]
    pairs = pair_up([record(half, 5, **arm) for half in HALVES for arm in arms]).pairs
    assert configuration_names(pairs) == ["memory none, fusion sum", "memory class, fusion sum",
                                          "memory class, fusion tr"]


def test_each_detector_has_names_of_its_own():
    both = records_of([1, 2], [3, 4]) + records_of([1], [2], detector="beta")
    assert list(named_pairs(pair_up(both).pairs)) == [("alpha", "width 0"), ("alpha", "width 1"),
                                                      ("beta", "the only one")]


# --- scores

def test_scores_are_points_and_means_are_over_seeds_and_classes():
    tested = [record("test", [10, 20, 30], 0), record("test", [20, 30, 70], 1)]
    both = [record("held-out", [10, 20, 60]), *tested]
    scores = paired_scores(pair_up(both).pairs)
    assert half_means(scores).iloc[0].to_dict() == pytest.approx({"held-out": 30, "test": 30})
    assert class_means(scores, "test").iloc[0].tolist() == pytest.approx([15, 25, 50])


def test_unequal_seeds_are_averaged_as_far_as_they_go():
    both = records_of([1, 2, 3, 4], [1, 2, 3, 4]) + [record("test", 10, seed=1, width=0)]
    scores = paired_scores(pair_up(both).pairs)
    assert half_means(scores)["test"].tolist() == pytest.approx([5.5, 2, 3, 4])


@pytest.mark.parametrize("half", HALVES)
def test_a_nan_is_refused_with_its_class_and_record(half):
    both = records_of([1, 2], [3, 4])
    broken = next(r for r in both if r.spec["data"].startswith("heldout:") == (half == "held-out"))
    broken.metrics["exact"]["per_class"]["b"]["mAD"] = float("nan")
    with pytest.raises(SpecError, match=f"mAD of class b in record {broken.id} is nan"):
        paired_scores(pair_up(both).pairs)


def test_an_unknown_metric_or_protocol_is_refused():
    pairs = pair_up(records_of([1, 2], [3, 4])).pairs
    with pytest.raises(SpecError, match="unknown metric"): paired_scores(pairs, "mAP")
    with pytest.raises(SpecError, match="unknown protocol"): paired_scores(pairs, protocol="other")
    with pytest.raises(SpecError, match="I-FPR95: less of it is better"): paired_scores(pairs, "I-FPR95")


# --- the order

def test_coefficients_of_known_orders():
    assert agreement(scores_of([1, 2, 3, 4], [10, 20, 30, 99])) == pytest.approx(1)
    assert agreement(scores_of([1, 2, 3, 4], [4, 3, 2, 1]), "Kendall") == pytest.approx(-1)
    one_swap = scores_of([1, 2, 3, 4], [10, 30, 20, 40])
    assert agreement(one_swap) == pytest.approx(.8) and agreement(one_swap, "Kendall") == pytest.approx(4/6)


def test_ties_count_for_neither_order():
    assert rank_correlation([1, 1, 2, 3], [1, 2, 3, 4], "Kendall") == pytest.approx(5/np.sqrt(5*6))
    assert np.isnan(rank_correlation([1, 1, 1, 1], [1, 2, 3, 4]))
    with pytest.raises(SpecError, match="unknown coefficient"): rank_correlation([1, 2], [1, 2], "Pearson")


def test_several_detectors_are_not_one_order():
    both = records_of([1, 2, 3, 4], [1, 2, 3, 4]) + records_of([5, 6, 7, 8], [8, 7, 6, 5], detector="beta")
    scores = paired_scores(pair_up(both).pairs)
    for ask in (agreement, agreement_interval, regrets_of, by_class):
        with pytest.raises(SpecError, match="several detectors: alpha, beta"): ask(scores)
    assert agreement(scores.loc[["alpha"]]) == pytest.approx(1)
    assert agreement(scores.loc[["beta"]]) == pytest.approx(-1)


@pytest.mark.parametrize("count", [1, 3])
def test_few_configurations_have_no_order_and_keep_their_row(count):
    both = records_of([1, 2, 3, 4], [1, 2, 3, 4]) + records_of([1]*count, [2]*count, detector="beta")
    scores = paired_scores(pair_up(both).pairs)
    with pytest.raises(SpecError, match=f"{count} configurations of beta"): agreement(scores.loc[["beta"]])
    table = agreements(scores)
    assert table.configurations.tolist() == [4, count]
    assert table.loc["beta"].drop("configurations").isna().all()
    assert f"| beta | {count} | - | - | - |" in to_markdown(printed_agreements(table))
    assert list(regrets(scores).index) == list(left_out(scores).index) == with_enough(scores) == ["alpha"]


def test_a_table_without_any_order_is_all_dashes():
    scores = scores_of([1, 2], [3, 4])
    table = agreements(scores)
    assert "| alpha | 2 | - | - | - | - | - | - | - | - |" in to_markdown(printed_agreements(table))
    with pytest.raises(SpecError, match="no detector has 4 configurations"): regrets(scores)


# --- the intervals

def test_an_interval_of_a_perfect_order_ends_at_one_and_repeats_itself():
    scores = scores_of([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6])
    assert agreement_interval(scores, draws=50) == pytest.approx((1, 1))
    noisy = scores_of([1, 2, 3, 4, 5, 6], [2, 1, 5, 3, 6, 4])
    low, high = agreement_interval(noisy, draws=200)
    assert low < agreement(noisy) < high and (low, high) == agreement_interval(noisy, draws=200)
    with pytest.raises(SpecError, match="unknown what to draw"): agreement_interval(noisy, "seeds")


def test_classes_are_drawn_for_both_halves_alike():
    "Each class has an order of its own, the same on both halves: whatever is drawn, the orders agree."
    per_class = np.random.default_rng(0).normal(0, 5, (6, 3))
    both = [record(half, 50 + per_class[width], width=width) for half in HALVES for width in range(6)]
    scores = paired_scores(pair_up(both).pairs)
    assert agreement_interval(scores, "classes", draws=100) == pytest.approx((1, 1))


# --- seeds

def seeded(test_of_seeds, heldout=(1, 2, 3, 4)):
    "Scores of four configurations: one list of test scores for each seed; held-out data with seeds 0 and 1."
    both = [record("held-out", score, seed, width=w) for w, score in enumerate(heldout) for seed in (0, 1)]
    both += [record("test", score, seed, width=w) for seed, of in test_of_seeds.items()
             for w, score in enumerate(of) if score is not None]
    return paired_scores(pair_up(both).pairs)


def test_the_ceiling_is_one_test_seed_against_another():
    scores = seeded({0: [1, 2, 3, 4], 1: [10, 30, 20, 40]})
    assert across_seeds(scores, "test") == pytest.approx(.8)
    assert across_seeds(scores, "held-out") == pytest.approx((1 + .8)/2)
    assert across_seeds(scores, "test", kind="Kendall") == pytest.approx(4/6)


def test_a_single_seed_has_no_ceiling():
    scores = scores_of([1, 2, 3, 4], [1, 2, 3, 4])
    assert np.isnan(across_seeds(scores, "test")) and np.isnan(across_seeds(scores, "held-out"))
    assert np.isnan(regret_of_noise(scores)) and np.isnan(deviations(scores)[1])


def test_seeds_are_compared_on_configurations_that_have_both():
    fewer = seeded({0: [1, 2, 3, 4], 1: [4, 3, 2, None]})
    assert np.isnan(across_seeds(fewer, "test")) and np.isnan(regret_of_noise(fewer))
    assert across_seeds(fewer, "held-out") == pytest.approx(1)         # seed 1 there with seed 0 of the test
    more = paired_scores(pair_up(
        [record("held-out", w, 0, width=w) for w in range(5)]
        + [record("test", w, 0, width=w) for w in range(5)]
        + [record("test", -w, 1, width=w) for w in range(4)]).pairs)
    assert across_seeds(more, "test") == pytest.approx(-1)


def test_the_deviations_are_of_configurations_and_of_seeds():
    between, over_seeds = deviations(seeded({0: [10, 20, 30, 40], 1: [12, 22, 32, 42]}))
    assert between == pytest.approx(np.std([11, 21, 31, 41], ddof=1)) and over_seeds == pytest.approx(2**.5)


# --- regret

def test_the_regret_of_a_known_choice():
    row = regrets_of(scores_of([1, 9, 3, 4], [50, 60, 70, 56]), "width 0")
    assert row["chosen"] == "width 1" and row["oracle"] == "width 2"
    names = ["chosen, score", "oracle, score", "regret", "default", "random", "worst"]
    assert [row[name] for name in names] == pytest.approx([60, 70, 10, 20, 11, 20])


def test_choices_that_tie_cost_their_mean():
    scores = scores_of([9, 9, 3, 4], [50, 60, 70, 56])
    assert picked(pd.Series([9., 9., 3.])).tolist() == [True, True, False]
    row = regrets_of(scores)
    assert row["regret"] == pytest.approx(15) and row["chosen"] == "width 0 or width 1"
    assert np.isnan(row["default"])


def test_the_best_choice_costs_nothing_even_where_it_ties():
    assert regret(pd.Series([1., 5., 5.]), pd.Series([1., 8., 8.])) == 0


def test_noise_costs_what_one_test_seed_would_have_cost_on_the_other():
    scores = seeded({0: [1, 2, 3, 9], 1: [5, 2, 3, 4]})
    assert regret_of_noise(scores) == pytest.approx(((5 - 4) + (9 - 1))/2)
    assert regret_of_noise(seeded({0: [1, 2, 3, 4], 1: [2, 3, 4, 5]})) == 0


def test_seeds_of_another_detector_take_no_configuration_away():
    "A table of two detectors has a column for each seed that either of them has."
    records = records_of([1, 2, 3, 4], [1, 2, 3, 9], seeds=(0, 1))
    more = records_of([1, 2, 3, 4], [1, 2, 3, 9], seeds=(0, 1, 2), detector="beta")
    scores = paired_scores(pair_up(records + more).pairs)
    assert regret_of_noise(scores.loc[["alpha"]]) == regret_of_noise(scores.loc[["beta"]]) == 0
    assert across_seeds(scores.loc[["alpha"]], "test") == 1


def test_an_unknown_default_is_refused():
    scores = scores_of([1, 2, 3, 4], [1, 2, 3, 4])
    for ask in (regrets_of, by_class):
        with pytest.raises(SpecError, match="unknown configuration"): ask(scores, "width 12")


def test_a_table_of_regrets_takes_the_defaults_of_each_detector():
    both = records_of([1, 2, 3, 4], [4, 3, 2, 1]) + records_of([1, 2, 3, 4], [1, 2, 3, 4], detector="beta")
    table = regrets(paired_scores(pair_up(both).pairs), dict(beta="width 2"))
    assert table.regret.tolist() == pytest.approx([3, 0])
    assert np.isnan(table.default["alpha"]) and table.default["beta"] == pytest.approx(1)


# --- one class left out

def left_out_of(heldout, test):
    "`by_class` of scores [configurations, classes]."
    both = [record(half, row, width=width) for half, rows in zip(HALVES, (heldout, test))
            for width, row in enumerate(rows)]
    return by_class(paired_scores(pair_up(both).pairs))


HELD = np.array([[9, 1, 1], [1, 9, 1], [1, 1, 9], [0, 0, 0]], float)
TEST = np.array([[70, 50, 50], [50, 70, 60], [60, 40, 70], [0, 0, 0]], float)


def test_the_class_that_is_left_out_does_not_choose():
    table = left_out_of(HELD, TEST)
    changed = HELD.copy()
    changed[:, 0] = [5, 7, 100, 3]                 # the held-out data of class a say something else
    other = left_out_of(changed, TEST)
    assert table.loc["a", "held-out, others"] == other.loc["a", "held-out, others"] == pytest.approx(15)
    assert table.loc["a", "held-out, itself"] == 0 and other.loc["a", "held-out, itself"] == pytest.approx(10)


def test_the_test_of_the_class_that_is_left_out_only_judges():
    table, changed = left_out_of(HELD, TEST), TEST.copy()
    changed[:, 0] = [0, 0, 0, 50]
    assert table.loc["a", "test of others"] == pytest.approx(20)       # b and c together prefer the second
    assert left_out_of(HELD, changed).loc["a", "test of others"] == pytest.approx(50)


def test_the_last_row_is_the_mean_over_classes():
    table = left_out_of(HELD, TEST)
    assert list(table.index) == [*CLASSES, "mean"]
    assert table.loc["mean"].drop("default").tolist() == pytest.approx(
        table.iloc[:-1].drop(columns="default").mean().tolist())


def test_one_class_cannot_be_left_out():
    both = records_of([1, 2, 3, 4], [1, 2, 3, 4], spec=dict(classes=["a"]))
    scores = paired_scores(pair_up(both).pairs)
    with pytest.raises(SpecError, match="a is the only class"): by_class(scores)


# --- the picture and the study

def test_the_picture_has_a_dot_for_each_configuration_and_ranks_of_its_own_detector():
    both = records_of([1, 2, 3, 4, 4], [1, 2, 3, 4, 5]) + records_of([50, 60], [8, 7], detector="beta")
    left, right = draw_selection(paired_scores(pair_up(both).pairs)).axes
    assert [len(line.get_xdata()) for line in left.lines] == [5, 2]
    line, dots = right.lines                                           # beta has too few for ranks
    assert list(dots.get_xdata()) == pytest.approx([0, .25, .5, .875, .875])
    assert list(dots.get_ydata()) == pytest.approx([0, .25, .5, .75, 1])


def test_the_study_takes_other_detectors_whose_options_are_not_its_arms():
    specs = load_study("selection", detector="rd4ad", steps="2,3").specs()
    assert {spec.data for spec in specs} == {"heldout:embedded-v1", "embedded-v1"}
    assert {spec.steps for spec in specs} == {2, 3} and all(spec.options == {} for spec in specs)
    assert load_study("selection", arms="0.1").specs()[0].options == {"coreset_ratio": .1}
