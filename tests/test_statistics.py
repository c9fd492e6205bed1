"What the lesson on statistics tells badly: coverage, exactness of tests, records that cannot be paired."
from dataclasses import dataclass, replace

import matplotlib
matplotlib.use("Agg")
import numpy as np
import pytest
from scipy import stats

from mdd_bench.errors import SpecError, StoreError
from mdd_bench.reporting.effects import critical_difference_diagram, draw_effects
from mdd_bench.reporting.statistics import (ArmPair, Effect, Ranking, _spread, class_values, compare,
                                            compare_pairs, effect, equivalent, friedman, holm, joined,
                                            signed_rank, with_same_test)
from mdd_bench.running.store import Record

CLASSES = ("a", "b", "c", "d", "e", "f")
SPEC = dict(
    data="drawn", classes=None, size=128, setting="unified", backbone="resnet18", weights="random",
    layers=[1, 2, 3], options={}, labelled=0, label_seed=None, epochs=10, protocols=["exact"],
)
TESTED = dict(data_fingerprint="d1", split_hashes=dict(test="t1"))


@dataclass
class Drawn(Record):
    "A record with replicates in memory; None: they were not kept."
    drawn: dict | None = None

    def replicates(self):
        return super().replicates() if self.drawn is None else self.drawn


def record(name, seed, values, resampled, classes=CLASSES, metric="P-AP"):
    "Values [classes] and replicates [classes, R], in points."
    per_class = {cls: {metric: float(value)/100} for cls, value in zip(classes, values)}
    drawn = {cls: {metric: row/100} for cls, row in zip(classes, resampled)}
    spec = SPEC | dict(detector=name, seed=seed)
    return Drawn(f"{name}{seed}", spec, {"exact": dict(per_class=per_class)}, {}, TESTED, None, drawn)


def experiment(rng, gains, seeds=5, classes=CLASSES, common=3., own=1., seed_noise=.5, replicates=200):
    "{arm: records}: images err in common and for each arm, seeds err on their own."
    shape = 1 + replicates, len(classes)
    shared = 50 + rng.normal(0, common, shape)
    arms = {}
    for name, gain in gains.items():
        errors = shared + rng.normal(0, own, shape)
        of_seeds, of_classes = rng.normal(0, seed_noise, (seeds, 1)), (seeds, len(classes))
        values = gain + of_seeds + rng.normal(0, seed_noise, of_classes) + errors[:, None]
        arms[name] = [record(name, s, values[0, s], values[1:, s].T, classes) for s in range(seeds)]
    return arms


@pytest.fixture
def arms():
    return experiment(np.random.default_rng(0), dict(x=0., y=3., z=1.))


def with_replicates(record, change):
    "The record with its replicates changed."
    drawn = {cls: {m: change(values) for m, values in kept.items()} for cls, kept in record.drawn.items()}
    return replace(record, drawn=drawn)


def width(found):
    return found.high - found.low


def changed(records, **fields):
    "The same records with other provenance."
    return [replace(r, provenance=r.provenance | fields) for r in records]


# --- the interval

@pytest.mark.parametrize("seeds,seed_noise", [(5, .5), (3, .3), (10, 1.)])
def test_intervals_hold_the_truth(seeds, seed_noise):
    "95% intervals, 1000 experiments: 93 to 97 percent."
    rng, held = np.random.default_rng(7), 0
    for _ in range(1000):
        drawn = experiment(rng, dict(x=0., y=1.), seeds, seed_noise=seed_noise)
        found = effect(drawn["y"], drawn["x"], "P-AP")
        held += found.low <= 1 <= found.high
    assert 930 <= held <= 970


def test_one_seed_covers_its_own_models_and_no_other():
    rng, of_models, of_method = np.random.default_rng(8), 0, 0
    for _ in range(500):
        drawn = experiment(rng, dict(x=0., y=0.), 1, seed_noise=0.)
        trained = rng.normal(0, 2, 2)
        x, y = (record(n, 0, class_values(drawn[n], "P-AP")[0] + shift,
                       [100*drawn[n][0].drawn[cls]["P-AP"] + shift for cls in CLASSES])
                for n, shift in zip("xy", trained))
        found = effect([y], [x], "P-AP")
        of_models += found.low <= trained[1] - trained[0] <= found.high
        of_method += found.low <= 0 <= found.high
    assert 455 <= of_models <= 490 and of_method < 300


def test_other_levels_cover_what_they_say():
    rng, held = np.random.default_rng(9), 0
    for _ in range(500):
        drawn = experiment(rng, dict(x=0., y=1.))
        found = effect(drawn["y"], drawn["x"], "P-AP", level=.8)
        held += found.low <= 1 <= found.high
    assert 370 <= held <= 430


def test_the_interval_is_about_the_stated_difference(arms):
    "Replicates that are all shifted, as a bootstrap shifts AP, change nothing."
    found = effect(arms["y"], arms["x"], "P-AP")
    shifted = [with_replicates(r, lambda values: values + .05) for r in arms["y"]]
    again = effect(shifted, arms["x"], "P-AP")
    assert again.difference == found.difference
    assert (again.low, again.high) == pytest.approx((found.low, found.high))
    values = [class_values(arms[name], "P-AP").mean() for name in "yx"]
    assert found.difference == pytest.approx(values[0] - values[1])


def test_it_is_the_same_every_time_and_turns_its_sign(arms):
    there, back = effect(arms["y"], arms["x"], "P-AP"), effect(arms["x"], arms["y"], "P-AP")
    assert there == effect(arms["y"], arms["x"], "P-AP")
    turned = -there.difference, -there.high, -there.low
    assert (back.difference, back.low, back.high) == pytest.approx(turned)


def test_pairs_of_images_make_it_narrow(arms):
    order = np.random.default_rng(0).permutation(200)
    other = [with_replicates(r, lambda values: values[order]) for r in arms["y"]]
    assert width(effect(other, arms["x"], "P-AP")) > 2*width(effect(arms["y"], arms["x"], "P-AP"))


def test_pairs_of_seeds_make_it_narrow():
    "What a seed does to both arms cancels, in whatever order the records come; other seeds do not pair."
    seeds, flat = np.random.default_rng(1).normal(0, 3, 5), np.random.default_rng(2).normal(0, .1, (6, 200))
    x, y, w = ([record(n, s + first, [seeds[s]]*6, seeds[s] + flat) for s in range(5)]
               for n, first in (("x", 0), ("y", 0), ("w", 10)))
    assert width(effect(y, x, "P-AP")) == pytest.approx(0, abs=1e-9)
    assert width(effect(y[::-1], x, "P-AP")) == pytest.approx(0, abs=1e-9)
    assert width(effect(w, x, "P-AP")) > 3


def test_the_seeds_part_has_the_variance_of_a_mean():
    "S - 1 draws of S seeds: s^2/S, seen here without any error of images."
    values = np.array([0., 1, 2, 3, 4, 5, 6, 7, 8, 9])
    x = [record("x", s, [v]*6, np.full((6, 200), v)) for s, v in enumerate(values)]
    y = [record("y", s, [0]*6, np.zeros((6, 200))) for s in range(10)]
    expected = 2*1.96*values.std(ddof=1)/np.sqrt(10)
    assert width(effect(x, y, "P-AP")) == pytest.approx(expected, rel=.08)


def test_equal_arms_differ_by_zero(arms):
    found = effect(arms["x"], arms["x"], "P-AP")
    assert (found.difference, found.low, found.high) == (0, 0, 0)
    table = compare(dict(x=arms["x"], same=arms["x"]), "x", ["P-AP"])
    row = table.iloc[0]
    assert (row.p, row["smallest p"], row.classes) == (1, 1, 0) and not row["can decide"]


def test_different_numbers_of_seeds(arms):
    found = effect(arms["y"][:1], arms["x"], "P-AP")
    assert found.seeds == (1, 5) and found.low < found.difference < found.high
    assert "1 seed," in str(found)


def test_ten_seeds_and_more_stand_in_the_order_of_their_numbers(arms):
    numbers = (10, 9, 2, 0, 11)
    x = [replace(r, spec=r.spec | dict(seed=number)) for r, number in zip(arms["x"], numbers)]
    assert [r.spec["seed"] for r in with_same_test(x, x)[0]] == sorted(numbers)
    unlabelled = replace(x[0], spec=x[0].spec | dict(label_seed=3))
    assert with_same_test([x[0], unlabelled], x)[0] == [unlabelled, x[0]]


def test_one_class(arms):
    found = effect(arms["y"], arms["x"], "P-AP", classes=["c"])
    assert found.classes == ("c",) and str(found).endswith("(95% interval, 5 seeds, 1 class)")
    values = [class_values(arms[name], "P-AP")[:, 2].mean() for name in "yx"]
    assert found.difference == pytest.approx(values[0] - values[1])
    assert width(found) > width(effect(arms["y"], arms["x"], "P-AP"))
    row = compare(arms, "x", ["P-AP"], classes=["c"]).loc["y", "P-AP"]
    assert (row.p, row["smallest p"]) == (1, 1)


def test_classes_are_named_not_numbered(arms):
    "A record may list its classes in another order."
    turned = []
    for r in arms["y"]:
        per_class = dict(reversed(r.metrics["exact"]["per_class"].items()))
        turned.append(replace(r, metrics={"exact": dict(per_class=per_class)}))
    for args in (arms["x"], turned), (turned, arms["x"]):
        plain = [arms["y"] if records is turned else records for records in args]
        assert effect(*args, "P-AP").difference == pytest.approx(effect(*plain, "P-AP").difference)
    ranked = friedman(arms | dict(y=turned), "P-AP", classes=None)
    assert ranked.ranks.equals(friedman(arms, "P-AP").ranks)


# --- what is refused

@pytest.mark.parametrize("fields", [dict(data_fingerprint="d2"), dict(split_hashes=dict(test="t2"))])
def test_other_test_images_are_refused(arms, fields):
    other = changed(arms["y"], **fields)
    for wrong in (lambda: effect(other, arms["x"], "P-AP"), lambda: friedman(arms | dict(y=other), "P-AP"),
                  lambda: compare(arms | dict(y=other), "x", ["P-AP"]),
                  lambda: effect(arms["y"][:2] + other[2:], arms["x"], "P-AP")):
        with pytest.raises(SpecError, match="not tested alike.*y2 y3"): wrong()


def test_other_first_protocols_are_refused(arms):
    other = [replace(r, spec=r.spec | dict(protocols=["fast", "exact"])) for r in arms["y"]]
    with pytest.raises(SpecError, match="protocol fast.*first protocol"): effect(other, arms["x"], "P-AP")


def test_records_that_do_not_say_their_test_are_refused(arms):
    silent = [replace(r, provenance={}) for r in arms["y"]]
    with pytest.raises(SpecError, match="y0 y1 y2 y3 and 6 more do not say"): effect(silent, silent, "P-AP")


def test_an_arm_is_one_setting_with_each_seed_once(arms):
    with pytest.raises(SpecError, match="seed 0 occurs 2 times"):
        effect(arms["y"] + arms["y"], arms["x"], "P-AP")
    with pytest.raises(SpecError, match="several values of detector"):
        effect(arms["y"][:2] + arms["z"][2:], arms["x"], "P-AP")
    with pytest.raises(SpecError, match="no records"): effect([], arms["x"], "P-AP")
    with pytest.raises(SpecError, match="no records"): effect([], [], "P-AP")
    with pytest.raises(SpecError, match="no records"): compare(arms | dict(y=[]), "x", ["P-AP"])


def test_unknown_names(arms):
    with pytest.raises(SpecError, match="class of record y0 'g'.*Known: a, b"):
        effect(arms["y"], arms["x"], "P-AP", classes=["g"])
    with pytest.raises(SpecError, match="unknown metric 'P-PA'"): effect(arms["y"], arms["x"], "P-PA")
    with pytest.raises(SpecError, match="unknown baseline 'q'"): compare(arms, "q", ["P-AP"])
    with pytest.raises(SpecError, match="nothing to compare"):
        compare(dict(x=arms["x"]), "x", ["P-AP"])
    with pytest.raises(SpecError, match="no classes"): effect(arms["y"], arms["x"], "P-AP", classes=[])


def test_replicates_that_were_not_kept(arms, tmp_path):
    "As in the records of the repository: version control has no replicates."
    bare = [replace(r, drawn=None, folder=tmp_path) for r in arms["y"]]
    with pytest.raises(StoreError, match="has no replicates.npz.*run the spec again"):
        effect(bare, arms["x"], "P-AP")
    assert friedman(arms | dict(y=bare), "P-AP").classes == 6      # needs none


def test_too_few_replicates():
    few = experiment(np.random.default_rng(0), dict(x=0., y=0.), replicates=38)
    with pytest.raises(SpecError, match="38 usable replicates are too few.*at least 39"):
        effect(few["y"], few["x"], "P-AP")
    assert width(effect(few["y"], few["x"], "P-AP", level=.9)) > 0
    enough = experiment(np.random.default_rng(0), dict(x=0., y=0.), replicates=39)
    assert width(effect(enough["y"], enough["x"], "P-AP")) > 0
    with pytest.raises(SpecError, match="different numbers of replicates"):
        effect(few["y"], enough["x"], "P-AP")
    with pytest.raises(SpecError, match="y0 38, y1 39"):
        effect([few["y"][0], enough["y"][1]], enough["x"], "P-AP")


def test_a_class_with_nan_must_be_left_out_by_name(arms):
    arms["y"][1].metrics["exact"]["per_class"]["b"]["P-AP"] = float("nan")
    with pytest.raises(SpecError, match="class b in record y1 is nan.*a, c, d, e, f"):
        effect(arms["y"], arms["x"], "P-AP")
    with pytest.raises(SpecError, match="class b"): friedman(arms, "P-AP")
    assert effect(arms["y"], arms["x"], "P-AP", classes=list("acdef")).classes == tuple("acdef")


def test_replicates_with_nan_are_left_out_in_both_arms(arms):
    found = effect(arms["y"], arms["x"], "P-AP")
    arms["y"][1].drawn["b"]["P-AP"][:10] = np.nan
    some = effect(arms["y"], arms["x"], "P-AP")
    assert np.isfinite([some.low, some.high]).all() and width(some) == pytest.approx(width(found), rel=.2)
    arms["y"][1].drawn["b"]["P-AP"][:] = np.nan
    with pytest.raises(SpecError, match="0 usable replicates"): effect(arms["y"], arms["x"], "P-AP")


# --- margins

def drawn_effect(low, high):
    return Effect((low + high)/2, low, high, (3, 3), CLASSES, "P-AP", .95)


@pytest.mark.parametrize("low,high,said", [
    (-.5, .9, "equivalent"), (-.5, 1., "undecided"), (-3, 3, "undecided"), (.5, 3, "undecided"),
    (1.1, 3, "different"), (-3, -1.1, "different"), (.2, .9, "equivalent")])
def test_within_a_point(low, high, said):
    assert equivalent(drawn_effect(low, high), 1) == said


@pytest.mark.parametrize("margin", [0, -1, float("nan")])
def test_a_margin_is_above_zero(margin):
    with pytest.raises(SpecError, match="not above 0"): equivalent(drawn_effect(0, 1), margin)


def test_equivalence_errs_rarely():
    "Arms that are exactly a margin apart are called equivalent in about 2.5 of 100 experiments."
    rng, wrong = np.random.default_rng(5), 0
    for _ in range(500):
        drawn = experiment(rng, dict(x=0., y=2.))
        wrong += equivalent(effect(drawn["y"], drawn["x"], "P-AP"), 2) == "equivalent"
    assert wrong <= 25


# --- over classes

@pytest.mark.parametrize("n", range(1, 16))
def test_signed_ranks_are_those_of_scipy(n):
    for seed in range(5):
        x = np.random.default_rng([n, seed]).normal(.5, 1, n)
        assert signed_rank(x).p == pytest.approx(stats.wilcoxon(x, method="exact").pvalue)


def test_ties_are_counted_exactly():
    "By trying all signs."
    x = np.array([1, 1, 2, 2, -2, 3, 0, 5])
    ranks = stats.rankdata(abs(x[x != 0]))
    signs = np.array(np.meshgrid(*[[0, 1]]*7)).reshape(7, -1)
    sums, seen = ranks @ signs, ranks @ (x[x != 0] > 0)
    expected = 2*min((sums <= seen).mean(), (sums >= seen).mean())
    assert signed_rank(x).p == pytest.approx(expected) and signed_rank(x).classes == 7


def test_no_p_is_below_the_smallest():
    for n in range(1, 12):
        test = signed_rank(np.arange(1, n + 1))
        assert test.p == test.smallest == 2.**(1 - n) == signed_rank([2]*n).p
        assert signed_rank(-np.arange(1, n + 1)).p == test.p
    assert signed_rank([1e-13, 2, 2 + 1e-13]) == signed_rank([0, 2, 2])
    assert signed_rank([0, 0]) == signed_rank([]) == (1, 1, 0)
    with pytest.raises(ValueError, match="nan"): signed_rank([1, np.nan])


def test_holm_by_hand():
    "The largest of 4p1, 3p2, 2p3, p4 so far, at most 1, in the order given."
    assert holm([.01, .04, .03, .005]) == pytest.approx([.03, .06, .06, .02])
    assert holm([.9, .6]) == pytest.approx([1, 1]) and holm([.2]) == pytest.approx([.2])
    assert holm([.02, .02]) == pytest.approx([.04, .04])


def test_seeds_are_averaged_before_the_test(arms):
    "Ten times as many seeds with the same means change no p."
    more = {n: [replace(r, id=f"{r.id}-{i}", spec=r.spec | dict(seed=10*i + r.spec["seed"]))
                for i in range(10) for r in records] for n, records in arms.items()}
    assert compare(more, "x", ["P-AP"]).p.tolist() == compare(arms, "x", ["P-AP"]).p.tolist()


def test_a_comparison_says_what_it_cannot_decide(arms):
    table = compare(arms, "x", ["P-AP"])
    assert list(table.index) == [("y", "P-AP"), ("z", "P-AP")]
    assert table["smallest p"].tolist() == [2**-5]*2 and table["smallest Holm p"].tolist() == [2**-4]*2
    assert not table["can decide"].any()
    assert compare(arms, "x", ["P-AP"], level=.9)["can decide"].all()
    assert compare(dict(x=arms["x"], y=arms["y"]), "x", ["P-AP"])["can decide"].all()
    assert np.allclose(table["Holm p"], holm(table.p)) and (table["Holm p"] >= table["smallest p"]).all()
    found = effect(arms["y"], arms["x"], "P-AP")
    assert tuple(table.loc[("y", "P-AP"), ["difference", "low", "high"]]) == found[:3]


def test_the_smallest_holm_p_is_that_of_every_row_at_its_smallest(arms):
    "A pair of two classes can decide little, and must not take from one of six what it can."
    pairs = dict(y=ArmPair(arms["y"], arms["x"]), z=ArmPair(arms["z"], arms["y"], ("a", "b")))
    table = compare_pairs(pairs, ["P-AP"])
    assert table["smallest p"].tolist() == [2**-5, 2**-1]
    assert table["smallest Holm p"].tolist() == [2**-4, 2**-1]
    assert (table["Holm p"] >= table["smallest Holm p"]).all()
    three = compare_pairs(pairs | dict(w=ArmPair(arms["x"], arms["z"], ("a", "b"))), ["P-AP"])
    assert three["smallest Holm p"].tolist() == [3*2**-5, 1, 1]


def test_the_error_of_images_is_that_of_all_seeds_of_a_test():
    "The mean of three independent errors of deviation 1 has the deviation 0.58, whichever seeds are drawn."
    errors = np.random.default_rng(0).normal(size=(3, 4000))
    errors -= errors.mean(1, keepdims=True)
    one_test, three_tests = np.zeros(3, int), np.arange(3)
    spread = _spread(errors, np.zeros((3, 4000)), one_test, one_test, True)
    assert spread.std() == pytest.approx(errors.mean(0).std(), rel=1e-9) and .55 < spread.std() < .61
    alone = _spread(errors, np.zeros((3, 4000)), three_tests, three_tests, True)
    assert .97 < alone.std() < 1.03


def test_pairs_have_their_own_baselines_and_classes(arms):
    pairs = dict(y=ArmPair(arms["y"], arms["x"]), z=ArmPair(arms["z"], arms["y"], ("a", "b")))
    table = compare_pairs(pairs, ["P-AP"])
    for name, base, classes in (("y", "x", None), ("z", "y", ["a", "b"])):
        again = effect(arms[name], arms[base], "P-AP", classes)
        assert tuple(table.loc[(name, "P-AP"), ["difference", "low", "high"]]) == again[:3]
    assert table["of classes"].tolist() == [6, 2]
    without = compare_pairs(pairs, ["P-AP"], intervals=False)
    assert without[["low", "high"]].isna().all(axis=None)
    assert without["difference"].tolist() == table["difference"].tolist() and without.p.equals(table.p)


# --- label seeds, which leave other images for the test

def of_label_seeds(records):
    "The records as if each seed had a test of its own."
    return [replace(r, spec=r.spec | dict(label_seed=r.spec["seed"]),
                    provenance=TESTED | dict(split_hashes=dict(test=f"t{r.spec['seed']}"))) for r in records]


def test_seeds_with_tests_of_their_own_are_paired_by_seed(arms):
    x, y = of_label_seeds(arms["x"]), of_label_seeds(arms["y"])
    found, one_test = effect(y[::-1], x, "P-AP"), effect(arms["y"], arms["x"], "P-AP")
    assert found.difference == pytest.approx(one_test.difference)
    assert found.low < found.difference < found.high
    with pytest.raises(SpecError, match="arms of different seeds"): effect(y[1:], x, "P-AP")
    with pytest.raises(SpecError, match="arms of different seeds"): friedman(dict(x=x, y=y, z=y[1:]), "P-AP")
    other = [y[0], replace(y[1], provenance=x[2].provenance), *y[2:]]
    with pytest.raises(SpecError, match="not tested alike"): effect(other, x, "P-AP")
    assert effect(arms["y"][1:], arms["x"], "P-AP").seeds == (4, 5)


def test_errors_of_images_are_not_averaged_over_label_seeds():
    "One trained model for all seeds, so that the images are all there is."
    flat, noise = np.zeros((6, 200)), np.random.default_rng(3).normal(0, 1, (5, 200))
    x = [record("x", s, [0]*6, flat) for s in range(5)]
    y = [record("y", s, [0]*6, np.tile(noise[s], (6, 1))) for s in range(5)]
    alone = width(effect(y[:1], x[:1], "P-AP"))
    assert width(effect(y, x, "P-AP")) < .7*alone
    assert width(effect(of_label_seeds(y), of_label_seeds(x), "P-AP")) == pytest.approx(alone, rel=.15)


# --- ranks

TEN = tuple(f"class{i}" for i in range(10))


def test_friedman_is_that_of_scipy():
    drawn = experiment(np.random.default_rng(0), dict(x=0., y=3., z=1., w=2.), classes=TEN)
    found = friedman(drawn, "P-AP")
    values = [class_values(records, "P-AP").mean(0) for records in drawn.values()]
    assert found.p == pytest.approx(stats.friedmanchisquare(*values).pvalue)
    assert found.ranks.sum() == pytest.approx(10) and found.classes == 10
    assert found.critical_difference == pytest.approx(2.569*np.sqrt(4*5/60), rel=1e-3)     # Demšar, table 5
    assert found.p >= found.smallest


def test_agreement_of_all_classes_is_the_smallest_p():
    flat = np.zeros((10, 200))
    alike = {n: [record(n, 0, np.arange(10) + 20*i, flat, TEN)] for i, n in enumerate("xyz")}
    found = friedman(alike, "P-AP")
    assert found.p == pytest.approx(found.smallest) and found.ranks.to_dict() == dict(z=1, y=2, x=3)
    less = {n: [record(n, 0, np.arange(10) + 20*i, flat, TEN, "I-FPR95")] for i, n in enumerate("xyz")}
    assert friedman(less, "I-FPR95").ranks.to_dict() == dict(x=1, y=2, z=3)
    assert friedman({n: alike["x"] for n in "xyz"}, "P-AP").p == 1


def test_too_few_to_rank(arms):
    two = dict(x=arms["x"], y=arms["y"])
    with pytest.raises(SpecError, match="2 arms cannot be ranked"): friedman(two, "P-AP")
    with pytest.raises(SpecError, match="one class"): friedman(arms, "P-AP", classes=["a"])
    few = friedman(arms, "P-AP", classes=["a", "b"])
    assert few.smallest > .05
    with pytest.raises(SpecError, match="2 classes cannot tell 3 arms apart.*3 classes could"):
        critical_difference_diagram(few)
    critical_difference_diagram(friedman(arms, "P-AP", classes=["a", "b", "c"]))


def ranking(*ranks, distance=1., p=.001):
    import pandas as pd
    return Ranking(pd.Series(ranks, [f"m{i}" for i in range(len(ranks))]), p, 1e-9, 12, distance, "P-AP", .95)


@pytest.mark.parametrize("ranks,groups", [
    ((1, 2.5, 4), []),
    ((1, 1.5, 4), [(0, 1)]),
    ((1, 1.8, 2.6, 4.5), [(0, 1), (1, 2)]),
    ((1, 1.5, 1.9, 4.5), [(0, 2)]),
    ((1., 1., 3), [(0, 1)])])
def test_groups_that_cannot_be_told_apart(ranks, groups):
    assert joined(ranking(*ranks)) == groups
    assert joined(ranking(*ranks, p=.2)) == [(0, len(ranks) - 1)]


# --- pictures

def test_a_diagram_names_every_arm_at_its_rank():
    drawn = ranking(1., 1.8, 2.6, 4.5, 5.1)
    ax = critical_difference_diagram(drawn).axes[0]
    assert [t.get_text() for t in ax.texts][:5] == ["m0 1.00", "m1 1.80", "m2 2.60", "m3 4.50", "m4 5.10"]
    thick = [line.get_xdata() for line in ax.lines if line.get_linewidth() == 3]
    assert np.allclose(thick, [[.96, 1.84], [1.76, 2.64], [4.46, 5.14]])
    assert "smallest attainable" in ax.get_title()


def test_effects_are_drawn_where_they_are(arms):
    table = compare(arms, "x", ["P-AP"])
    ax = draw_effects(table, margin=1).axes[0]
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    assert [float(dot.get_xdata()[0]) for dot in dots] == pytest.approx(table.difference.tolist())
    hollow = [dot.get_markerfacecolor() == "white" for dot in dots]
    assert hollow == [not (row.low > 0 or row.high < 0) for _, row in table.iterrows()]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["y, P-AP", "z, P-AP"]
