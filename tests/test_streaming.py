"Streaming beside exact: bounds that hold and are reached, merging in any order, bounded memory, tensors."
import pickle, tracemalloc, weakref

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

import tensor_checks
from mdd_bench.evaluation import bins as bins_module, curves, metrics
from mdd_bench.evaluation.metrics import KEYS, METRICS, Evaluator
from mdd_bench.reporting.arms import less_is_better
from tensor_checks import MODES, SCORES, TENSORS, drawn, evaluated, ordinary, results, small

pytestmark = pytest.mark.filterwarnings("ignore::mdd_bench.evaluation.metrics.UndefinedMetric")
def half_width(evaluator):
    "Half the widest bounds among the seven metrics."
    return max((high - low)/2 for k, (low, high) in evaluator.bounds().items() if k in METRICS)


some_scores, seeds = st.sampled_from(list(SCORES)), st.integers(0, 2**32)
few_bins, limits = st.integers(16, 500), st.floats(1e-4, 1)
waits = st.sampled_from([0, 1, bins_module.WAITING])
often = settings(deadline=None, max_examples=200)


@often
@given(seeds, some_scores, few_bins, limits, waits)
def test_bounds_contain_the_exact_value(seed, scores, bins, limit, waiting):
    batches = drawn(seed, scores)
    exact = evaluated(batches, "exact", limit)
    with small(WAITING=waiting):
        streaming = evaluated(batches, "streaming", limit, bins)
        want, got, bounds = exact.compute(), streaming.compute(), streaming.bounds()
    np.testing.assert_equal(exact.bounds(), {k: (v, v) for k, v in want.items()})
    assert tuple(bounds) == tuple(got) == KEYS
    for k, (low, high) in bounds.items():
        if np.isnan(want[k]):
            assert np.isnan([got[k], low, high]).all(), k
            continue
        assert 0 <= low <= want[k] <= high <= 1 and low <= got[k] <= high, (k, want[k], got[k], low, high)
        if not streaming.binned(): assert abs(got[k] - want[k]) < 1e-9 and high - low < 1e-6, k


@often
@given(seeds, st.sampled_from(["negative", "cosine", "both signs"]), few_bins, limits)
def test_bounds_are_reached(seed, scores, bins, limit):
    batches = drawn(seed, scores, "blobs")
    with small(WAITING=0):
        streaming = evaluated(batches, "streaming", limit, bins)
        bounds, drop = streaming.bounds(), (1 << streaming.pixels.level) - 1

    def reordered(maps, first):
        "The maps with the pixels `first` at the upper end of their bins and all others at the lower end."
        bits = np.abs(maps).view(np.int32)
        bits = np.where((first > 0) == (maps > 0), bits | drop, bits & ~drop).astype(np.int32)
        return bits.view(np.float32)*np.sign(maps)

    for best in False, True:
        extreme = [(reordered(m, mask == best), s, mask, l) for m, s, mask, l in batches]
        for k, v in evaluated(extreme, "exact", limit).compute().items():
            bound = bounds[k][best != less_is_better(k)]
            if k not in ("P-AP", "mAD") or best: assert v == pytest.approx(bound, abs=1e-9, nan_ok=True), k
            else: assert not v < bound, k                        # one by one is worse still than together


@often
@given(seeds, some_scores, limits)
def test_more_bins_lie_within(seed, scores, limit):
    batches, wider = drawn(seed, scores), {}
    with small(WAITING=0):
        for bins in (16, 50, 200, 1000, 2**16):
            finer = evaluated(batches, "streaming", limit, bins).bounds()
            for (a, b), (c, d) in zip(wider.values(), finer.values()):
                assert np.isnan(a) or a - 1e-11 <= c <= d <= b + 1e-11
            wider = finer


@often
@given(seeds, some_scores, few_bins)
def test_as_many_bins_as_fit_and_no_more(seed, scores, bins):
    evaluator, seen = Evaluator("streaming", bins=bins), [np.empty(0, np.int32)]*3

    def keys(x):
        bits = np.abs(x).view(np.int32)
        return np.where(x < 0, ~bits, bits)

    with small(WAITING=0):                                 # nothing is kept as it is
        for maps, image_scores, masks, labels in drawn(seed, scores):
            k, bad = keys(maps.astype(np.float32)), labels | masks.any((1, 2))
            seen = [np.append(a, b) for a, b in zip(seen, (k[bad], k[~bad], k[masks]))]
            evaluator.update(maps, image_scores, masks, labels)
            assert sum(len(t) for t, _ in evaluator.pixels.tables.values()) <= bins
        evaluator.compute()
    level, tables = evaluator.pixels.level, evaluator.pixels.tables

    def distinct(level): return sum(len(np.unique(x >> level)) for x in seen)

    assert level == next(i for i in range(32) if distinct(i) <= bins)
    for x, name in zip(seen, ("anomalous", "good", "defective")):
        want_keys, want_counts = np.unique(x >> level, return_counts=True)
        got_keys, values = tables[name]
        np.testing.assert_array_equal(got_keys, want_keys)
        np.testing.assert_array_equal(values[0], want_counts)


def pieces_of(batches, rng):
    "The batches cut into smaller ones, in another order; some are of no image."
    pieces = []
    for batch in batches:
        n = rng.integers(1, 4)
        pieces += [tuple(x[i:i + n] for x in batch) for i in range(0, len(batch[0]) + 1, n)]
    return [pieces[i] for i in rng.permutation(len(pieces))]


@often
@given(seeds, some_scores, few_bins, st.sampled_from(MODES), waits)
def test_merge_in_any_order_grouping_and_split(seed, scores, bins, mode, waiting):
    batches, rng = drawn(seed, scores), np.random.default_rng(seed)
    pieces, n = pieces_of(batches, rng), rng.integers(1, 6)
    with small(WAITING=waiting):
        want = results(evaluated(batches, mode, bins=bins))
        workers = [evaluated(pieces[i::n], mode, bins=bins) for i in range(n)]      # some may see nothing
        while len(workers) > 1:
            rng.shuffle(workers)
            a, b = workers.pop(), workers.pop()
            if rng.random() < .3 and b.labels: b.compute()
            workers.append(a.merge(pickle.loads(pickle.dumps(b)) if rng.random() < .3 else b))
        assert results(workers[0]) == want


@pytest.mark.parametrize("mode", MODES)
def test_merge_leaves_the_other_usable(mode):
    def seen(*batches): return evaluated(batches, mode, bins=300)

    first, second, third = ordinary(4, 24, 1), tuple(x[:2] for x in ordinary(4, 40, 2)), ordinary(4, 32, 3)
    a, b, alone = seen(first), seen(second), seen(second)
    assert a.merge(b) is a and results(a) == results(seen(second, first))
    assert results(b) == results(alone)
    after = results(a)
    for e in b, alone: e.update(*third)
    assert results(b) == results(alone) and results(a) == after
    a.update(*third)
    assert results(a) == results(seen(first, second, third)) and results(b) == results(alone)
    empty = seen().merge(b)
    empty.update(*first)
    assert results(empty) == results(seen(second, third, first)) and results(b) == results(alone)
    assert results(b.merge(b)) == results(seen(second, third, second, third))


@pytest.mark.parametrize("mode", MODES)
def test_merge_with_one_that_saw_nothing(mode):
    def seen(*batches): return evaluated(batches, mode, bins=64)

    batch = ordinary(4, 24)
    assert results(seen(batch).merge(seen())) == results(seen().merge(seen(batch))) == results(seen(batch))
    with pytest.raises(ValueError, match="before any image"): seen().merge(seen()).compute()
    with pytest.raises(ValueError, match="before any image"): seen().bounds()


@pytest.mark.parametrize("change", [dict(mode="exact"), dict(fpr_limit=.05), dict(bins=2**19)])
def test_merge_refuses_what_counts_differently(change):
    options = dict(mode="streaming", fpr_limit=.3, bins=2**20)
    changed = options | change
    a, b = evaluated([ordinary(4, 24)], **options), evaluated([ordinary(4, 24)], **changed)
    before = results(a)
    with pytest.raises(ValueError) as caught: a.merge(b)
    for values in options.values(), changed.values(): assert repr(tuple(values)) in str(caught.value)
    assert results(a) == before


@pytest.mark.parametrize("bad", [dict(mode="Exact"), dict(mode=None), dict(bins=15), dict(bins=-2**20),
                                 dict(bins=np.nan), dict(mode="streaming", fpr_limit=0)])
def test_bad_arguments_are_named(bad):
    name = list(bad)[-1]
    with pytest.raises(ValueError, match=f"^{name}: .*{bad[name]}"): Evaluator(**bad)


def test_error_on_ordinary_maps():
    batch, widths = ordinary(30, 128), []
    want = evaluated([batch]).compute()
    with small(WAITING=0, STRETCH=2**17):                                   # nothing is kept as it is
        for bins in (2**k for k in range(10, 20)):
            streaming = evaluated([batch], "streaming", bins=bins)
            widths.append(half_width(streaming))
            if bins == 2**17:
                got = streaming.compute()
                assert max(abs(got[k] - want[k]) for k in METRICS) < 2e-6 and widths[-1] < 8e-5
    assert widths[0] < .02 and (np.diff(widths) < 0).all() and not streaming.binned() and widths[-1] < 1e-9


@pytest.mark.slow
def test_error_on_a_real_size():
    batch = ordinary(100, 256)
    want = evaluated([batch]).compute()
    assert evaluated([batch], "streaming").compute() == want        # 6.5 million pixels wait
    with small(WAITING=1, STRETCH=2**17):
        for bins, width in (2**20, 1e-5), (2**22, 1e-6):
            streaming = evaluated([batch], "streaming", bins=bins)
            got = streaming.compute()
            assert max(abs(got[k] - want[k]) for k in METRICS) < 1e-6
            assert 0 < half_width(streaming) < width and streaming.binned()


@pytest.mark.parametrize("side", [3, 5, 7])
def test_bounds_contain_the_exact_value_of_millions_of_pixels(side):
    "Shares of a region are not round in binary: their sum drifts in exact mode, and is rounded in streaming."
    columns, rows = np.arange(2000) % (side + 1) < side, np.arange(2000) % 2 == 0
    masks = np.broadcast_to(columns & rows[:, None], (1, 2000, 2000))
    maps = np.random.default_rng(0).integers(0, 1000, masks.shape)
    exact, streaming = (evaluated([(maps, [1], masks, [1])], mode) for mode in MODES)
    low, high = streaming.bounds()["AUPRO"]
    assert low <= exact.compute()["AUPRO"] <= high


def peak(updates, mode):
    "The most memory that updates, workers' results and computing take."
    (maps, *rest), rng = ordinary(4, 32), np.random.default_rng(0)
    with small(STRETCH=64):
        evaluator = Evaluator(mode, bins=512)
        tracemalloc.start()
        try:
            for i in range(updates):
                batch = maps + rng.normal(size=maps.shape).astype(np.float32), *rest
                if 2*i < updates: evaluator.update(*batch)
                else: evaluator.merge(evaluated([batch], mode, bins=512))
            evaluator.compute()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()


def test_memory_does_not_grow():
    growth = {mode: peak(160, mode) - peak(40, mode) for mode in MODES}      # 480 images more, of 4 kB each
    assert growth["streaming"] < 48_000 and growth["exact"] > 480*4096


@settings(often, max_examples=60)
@given(seeds, some_scores, st.sampled_from(MODES), waits, st.integers(1, 3000))
def test_runs_of_any_length_count_as_one(seed, scores, mode, waiting, run):
    batches = drawn(seed, scores)
    with small(WAITING=waiting), pytest.MonkeyPatch.context() as patch:
        want = results(evaluated(batches, mode, bins=100))
        patch.setattr(curves, "RUN", run)
        evaluator = evaluated(batches, mode, bins=100)
        evaluator.sort()
        assert results(evaluated([], mode, bins=100).merge(evaluator)) == want


def test_keys_lie_on_the_host_but_for_one_run(monkeypatch):
    "On a GPU a group holds fewer than `RUN` keys between two batches, and nothing holds a map."
    for module in curves, metrics: monkeypatch.setattr(module, "on_gpu", torch.is_tensor)
    monkeypatch.setattr(curves, "RUN", 5000)
    evaluator, refs = Evaluator(), []
    for seed in range(12):
        maps, *rest = ordinary(4, 32, seed)
        maps = torch.from_numpy(maps)
        refs.append(weakref.ref(maps))
        evaluator.update(maps, *rest)
        del maps
        for group in evaluator.pixels.anomalous, evaluator.pixels.good:
            assert group.waiting == sum(map(len, group.parts)) < 5000
            assert all(isinstance(run, np.ndarray) and run.dtype == np.int32 for run in group.runs)
    assert not any(ref() is not None for ref in refs)
    runs = evaluator.pixels.anomalous.sort() + evaluator.pixels.good.sort()
    assert sum(map(len, runs)) == 12*4*32*32


@pytest.mark.slow
def test_memory_of_exact_scores():
    "Four bytes a pixel, eight more a defective one, and at most 200 more while the metrics are read."
    evaluator = Evaluator()
    tracemalloc.start()
    try:
        for seed in range(20):
            maps, scores, masks, labels = ordinary(40, 256, seed)
            evaluator.update(maps, scores, masks, labels)
        del maps, scores, masks, labels
        evaluator.sort()
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        evaluator.compute()
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    pixels, defective = 800*256**2, sum(map(len, evaluator.pixels.defective))
    stated = 4*pixels + 8*defective
    assert stated <= held < 1.01*stated + 10**6
    assert most - held < 200*defective


@pytest.mark.parametrize("regions", [5, 8, 16, 17, 64])
@pytest.mark.parametrize("scores", ["constant", "distinct"])
@pytest.mark.parametrize("how", ["at once", "one by one", "merged"])
def test_too_many_regions_are_refused(monkeypatch, regions, scores, how):
    "2**20 regions in reality; with a unit this large, four."
    monkeypatch.setattr(bins_module, "UNIT", 2**60)

    def batch(n):
        maps, masks = np.arange(2.*n).reshape(n, 1, 2), np.arange(2*n).reshape(n, 1, 2) % 2
        return maps if scores == "distinct" else 0*maps, np.arange(n), masks, np.ones(n)

    four = evaluated([batch(4)], "streaming").compute()
    assert four["AUPRO"] == evaluated([batch(4)]).compute()["AUPRO"]
    evaluator, taken, piece = Evaluator("streaming"), 0, batch(regions if how == "at once" else 1)
    with pytest.raises(ValueError, match="regions.*mode='exact'"):
        while taken < regions:
            if how == "merged": evaluator.merge(evaluated([piece], "streaming"))
            else: evaluator.update(*piece)
            evaluator.compute()
            taken += 1
    try: after = results(evaluator)
    except ValueError: return                       # refused from then on, or as if it had not been given
    assert after == results(evaluated([piece]*taken, "streaming"))


@pytest.mark.parametrize("mode", MODES)
def test_a_mask_on_an_image_called_good(mode):
    "Its pixels are those of an anomalous image, defective where masked; the image itself counts as good."
    maps, scores, masks, labels = ordinary(8, 24)
    called = labels.copy()
    called[0] = False

    def values(masks, labels): return evaluated([(maps, scores, masks, labels)], mode, bins=64).compute()

    got, want, image = values(masks, called), values(masks, labels), values(0*masks, called)
    assert [got[k] for k in KEYS if k[0] not in "Im"] == [want[k] for k in KEYS if k[0] not in "Im"]
    assert [got[k] for k in KEYS if k[0] == "I"] == [image[k] for k in KEYS if k[0] == "I"]


no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")

@pytest.fixture(params=["cpu", "cpu, sorted by torch", pytest.param("cuda", marks=no_gpu)])
def device(request, monkeypatch):
    "Where tensors lie. On the CPU they may take the way of those on a GPU."
    if "sorted" in request.param:
        for module in curves, metrics: monkeypatch.setattr(module, "on_gpu", torch.is_tensor)
    return request.param[:4].strip(",")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tensor", TENSORS)
def test_tensors_count_as_arrays(device, tensor, mode):
    tensor_checks.tensors_count_as_arrays(device, tensor, mode)


@settings(often, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seeds, some_scores, st.sampled_from(MODES), waits)
def test_tensors_of_any_scores(device, seed, scores, mode, waiting):
    tensor_checks.tensors_of_any_scores(device, seed, scores, mode, waiting)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype, bad, shown", tensor_checks.BAD_SCORES)
def test_tensors_with_a_bad_score_are_named_and_not_kept(device, dtype, bad, shown, mode):
    tensor_checks.a_bad_score_is_named_and_not_kept(device, dtype, bad, shown, mode)
