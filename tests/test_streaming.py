"Streaming beside exact: bounds that hold and are reached, merging in any order, memory that does not grow, tensors that stay where they are."
import contextlib, pickle, tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from scipy.ndimage import gaussian_filter

from mdd_bench.evaluation import bins as bins_module, curves, metrics
from mdd_bench.evaluation.metrics import KEYS, METRICS, Evaluator

pytestmark = pytest.mark.filterwarnings("ignore::mdd_bench.evaluation.metrics.UndefinedMetric")
MODES = ("exact", "streaming")
KINDS = {
    "few": lambda rng, shape: rng.integers(-2, 3, shape)*.25,
    "constant": lambda rng, shape: np.full(shape, -.7),
    "float16": lambda rng, shape: rng.normal(size=shape).astype(np.float16),
    "negative": lambda rng, shape: rng.normal(size=shape) - 5,
    "cosine": lambda rng, shape: .3 + .1*rng.random(shape),
    "both signs": lambda rng, shape: rng.choice([-1, 1], shape)*(.3 + .1*rng.random(shape)),
    "wide": lambda rng, shape: rng.choice([-1, 1], shape)*10**rng.uniform(-30, 30, shape),
    "denormal": lambda rng, shape: rng.integers(-5000, 5000, shape)*1e-45,
    "zeros": lambda rng, shape: rng.choice([0., -0., 1e-45, -1e-45, 1, -1], shape),
    "any bits": lambda rng, shape: np.nan_to_num(rng.integers(-2**31, 2**31, shape).astype(np.int32).view(np.float32), nan=3e38, posinf=-0., neginf=-3e38),
}
MASKS = {
    "none": lambda rng, shape: np.zeros(shape, bool), "all": lambda rng, shape: np.ones(shape, bool), "pixels": lambda rng, shape: rng.random(shape) < .02,
    "half": lambda rng, shape: rng.random(shape) < .5, "blobs": lambda rng, shape: gaussian_filter(rng.normal(size=shape), (0, 2, 2)) > .2,
    "images": lambda rng, shape: np.broadcast_to(rng.random((shape[0], 1, 1)) < .5, shape),
}


def drawn(seed, kind, masks=None):
    "One to four batches of one to five images, each batch of a size and a kind of mask of its own; a label may miss a mask, or stand without one."
    rng, batches = np.random.default_rng(seed), []
    for _ in range(rng.integers(1, 5)):
        shape = tuple(rng.integers(1, (6, 31, 31)))
        m = MASKS[masks or rng.choice(list(MASKS))](rng, shape)
        maps = np.asarray(KINDS[kind](rng, shape))
        maps = maps if maps.dtype == np.float16 else maps.astype(np.float32)
        batches.append((maps, rng.integers(0, 4, shape[0]), m, np.where(rng.random(shape[0]) < .2, rng.random(shape[0]) < .5, m.any((1, 2)))))
    return batches


def judge(batches, *args, **kw):
    e = Evaluator(*args, **kw)
    for b in batches: e.update(*b)
    return e


def ordinary(n, size, seed=0):
    "Smooth positive maps as a method of cosine distances gives them; blobs on the first half of the images."
    rng = np.random.default_rng(seed)
    blob = gaussian_filter(rng.normal(size=(n, size, size)), (0, size/16, size/16))
    labels = np.arange(n) < n//2
    masks = (blob > 2*blob.std()) & labels[:, None, None]
    noise = gaussian_filter(rng.normal(size=masks.shape), (0, 2, 2))
    maps = gaussian_filter(np.abs(.3 + .06*noise/noise.std() + .08*masks), (0, 1, 1)).astype(np.float32)
    return maps, maps.max((1, 2)), masks, labels


@contextlib.contextmanager
def small(**changes):
    "Tables are joined in so short stretches that small data has many."
    with pytest.MonkeyPatch.context() as m:
        for k, v in (dict(STRETCH=7) | changes).items(): m.setattr(bins_module, k, v)
        yield


results = lambda e: repr((e.compute(), e.bounds()))      # bit for bit; nan is nan
half_width = lambda e: max((high - low)/2 for k, (low, high) in e.bounds().items() if k in METRICS)
kinds, seeds, fewbins, limits, waits = st.sampled_from(list(KINDS)), st.integers(0, 2**32), st.integers(16, 500), st.floats(1e-4, 1), st.sampled_from([0, 1, bins_module.WAITING])
often = settings(deadline=None, max_examples=200)


@often
@given(seeds, kinds, fewbins, limits, waits)
def test_bounds_contain_the_exact_value(seed, kind, bins, limit, waiting):
    batches = drawn(seed, kind)
    exact = judge(batches, "exact", limit)
    with small(WAITING=waiting):
        e = judge(batches, "streaming", limit, bins)
        want, got, bounds = exact.compute(), e.compute(), e.bounds()
    np.testing.assert_equal(exact.bounds(), {k: (v, v) for k, v in want.items()})
    assert tuple(bounds) == tuple(got) == KEYS
    for k, (low, high) in bounds.items():
        if np.isnan(want[k]): assert np.isnan([got[k], low, high]).all(), k
        else: assert 0 <= low <= want[k] <= high <= 1 and low <= got[k] <= high, (k, want[k], got[k], low, high)
        if not e.binned(): assert np.isnan(want[k]) or abs(got[k] - want[k]) < 1e-9 and high - low < 1e-6, k


@often
@given(seeds, st.sampled_from(["negative", "cosine", "both signs"]), fewbins, limits)
def test_bounds_are_reached(seed, kind, bins, limit):
    batches = drawn(seed, kind, "blobs")
    with small(WAITING=0):
        e = judge(batches, "streaming", limit, bins)
        bounds, drop = e.bounds(), (1 << e.pixels.level) - 1
    def worst(maps, first):
        "The order within each bin that puts defective pixels first, or last."
        bits = np.abs(maps).view(np.int32)
        return np.where((first > 0) == (maps > 0), bits | drop, bits & ~drop).astype(np.int32).view(np.float32)*np.sign(maps)
    for best in (False, True):
        got = judge([(worst(m, mask == best), s, mask, l) for m, s, mask, l in batches], "exact", limit).compute()
        for k, v in got.items():
            bound = bounds[k][best != ("FPR" in k)]
            if k not in ("P-AP", "mAD") or best: assert v == pytest.approx(bound, abs=1e-9, nan_ok=True), k
            else: assert not v < bound, k                                # one by one is worse still than together


@often
@given(seeds, kinds, limits)
def test_more_bins_lie_within(seed, kind, limit):
    batches, wider = drawn(seed, kind), {}
    with small(WAITING=0):
        for bins in (16, 50, 200, 1000, 2**16):
            finer = judge(batches, "streaming", limit, bins).bounds()
            assert all(np.isnan(a) or a - 1e-11 <= c <= d <= b + 1e-11 for (a, b), (c, d) in zip(wider.values(), finer.values()))
            wider = finer


@often
@given(seeds, kinds, fewbins)
def test_as_many_bins_as_fit_and_no_more(seed, kind, bins):
    batches, e, seen = drawn(seed, kind), Evaluator("streaming", bins=bins), [np.empty(0, np.int32)]*3
    def keys(x):
        bits = np.abs(x).view(np.int32)
        return np.where(x < 0, ~bits, bits)
    with small(WAITING=0):                                 # nothing is kept as it is
        for maps, scores, masks, labels in batches:
            k, bad = keys(maps.astype(np.float32)), labels | masks.any((1, 2))
            seen = [np.append(a, b) for a, b in zip(seen, (k[bad], k[~bad], k[masks]))]
            e.update(maps, scores, masks, labels)
            assert sum(len(t) for t, _ in e.pixels.tables.values()) <= bins
        e.compute()
    kept = lambda level: sum(len(np.unique(x >> level)) for x in seen)
    assert e.pixels.level == next(l for l in range(32) if kept(l) <= bins)
    for x, name in zip(seen, ("anomalous", "good", "defective")):
        for want, got in zip(np.unique(x >> e.pixels.level, return_counts=True), (e.pixels.tables[name][0], e.pixels.tables[name][1][0])): np.testing.assert_array_equal(got, want)


@often
@given(seeds, kinds, fewbins, st.sampled_from(MODES), waits)
def test_merge_in_any_order_grouping_and_split(seed, kind, bins, mode, waiting):
    batches, rng = drawn(seed, kind), np.random.default_rng(seed)
    pieces = [tuple(x[i:i+n] for x in b) for b in batches for n in [rng.integers(1, 4)] for i in range(0, len(b[0]) + 1, n)]   # some of no image
    pieces = [pieces[i] for i in rng.permutation(len(pieces))]
    with small(WAITING=waiting):
        want = results(judge(batches, mode, bins=bins))
        workers = [judge(pieces[i::n], mode, bins=bins) for n in [rng.integers(1, 6)] for i in range(n)]   # some may see nothing
        while len(workers) > 1:
            rng.shuffle(workers)
            a, b = workers.pop(), workers.pop()
            if rng.random() < .3 and b.labels: b.compute()
            workers.append(a.merge(pickle.loads(pickle.dumps(b)) if rng.random() < .3 else b))
        assert results(workers[0]) == want


@pytest.mark.parametrize("mode", MODES)
def test_merge_leaves_the_other_usable(mode):
    mine, yours, more = ordinary(4, 24, 1), tuple(x[:2] for x in ordinary(4, 40, 2)), ordinary(4, 32, 3)
    a, b, alone = (judge([x], mode, bins=300) for x in (mine, yours, yours))
    assert a.merge(b) is a and results(a) == results(judge([yours, mine], mode, bins=300))
    assert results(b) == results(alone)
    after = results(a)
    for e in (b, alone): e.update(*more)
    assert results(b) == results(alone) and results(a) == after
    a.update(*more)
    assert results(a) == results(judge([mine, yours, more], mode, bins=300)) and results(b) == results(alone)
    empty = Evaluator(mode, bins=300).merge(b)
    empty.update(*mine)
    assert results(empty) == results(judge([yours, more, mine], mode, bins=300)) and results(b) == results(alone)
    assert results(b.merge(b)) == results(judge([yours, more]*2, mode, bins=300))


@pytest.mark.parametrize("mode", MODES)
def test_merge_with_one_that_saw_nothing(mode):
    batch, new = ordinary(4, 24), lambda: Evaluator(mode, bins=64)
    want = results(judge([batch], mode, bins=64))
    assert results(judge([batch], mode, bins=64).merge(new())) == results(new().merge(judge([batch], mode, bins=64))) == want
    with pytest.raises(ValueError, match="before any image"): new().merge(new()).compute()
    with pytest.raises(ValueError, match="before any image"): new().bounds()


@pytest.mark.parametrize("change", [dict(mode="exact"), dict(fpr_limit=.05), dict(bins=2**19)])
def test_merge_refuses_what_counts_differently(change):
    kw = dict(mode="streaming", fpr_limit=.3, bins=2**20)
    a, b = judge([ordinary(4, 24)], **kw), judge([ordinary(4, 24)], **kw | change)
    before, said = results(a), [repr(tuple(x.values())) for x in (kw, kw | change)]
    with pytest.raises(ValueError) as caught: a.merge(b)
    assert all(x in str(caught.value) for x in said) and results(a) == before


@pytest.mark.parametrize("bad", [dict(mode="Exact"), dict(mode=None), dict(bins=15), dict(bins=-2**20), dict(bins=np.nan), dict(mode="streaming", fpr_limit=0)])
def test_bad_arguments_are_named(bad):
    name = list(bad)[-1]
    with pytest.raises(ValueError, match=f"^{name}: .*{bad[name]}"): Evaluator(**bad)


def test_error_on_ordinary_maps():
    batch, widths = ordinary(30, 128), []
    want = judge([batch]).compute()
    with small(WAITING=0, STRETCH=2**17):                                   # nothing is kept as it is
        for bins in (2**k for k in range(10, 20)):
            e = judge([batch], "streaming", bins=bins)
            widths.append(half_width(e))
            if bins == 2**17: assert max(abs(e.compute()[k] - want[k]) for k in METRICS) < 2e-6 and widths[-1] < 8e-5
    assert widths[0] < .02 and (np.diff(widths) < 0).all() and not e.binned() and widths[-1] < 1e-9


@pytest.mark.slow
def test_error_on_a_real_size():
    batch = ordinary(100, 256)
    want = judge([batch]).compute()
    assert judge([batch], "streaming").compute() == want                    # 6.5 million pixels wait, and lose nothing
    with small(WAITING=1, STRETCH=2**17):
        for bins, width in (2**20, 1e-5), (2**22, 1e-6):
            e = judge([batch], "streaming", bins=bins)
            assert max(abs(e.compute()[k] - want[k]) for k in METRICS) < 1e-6 and 0 < half_width(e) < width and e.binned()


@pytest.mark.parametrize("side", [3, 5, 7])
def test_bounds_contain_the_exact_value_of_millions_of_pixels(side):
    "Shares of a region are no round numbers in binary: their sum drifts in exact mode, and is rounded once in streaming mode."
    masks = np.broadcast_to((np.arange(2000) % (side + 1) < side) & (np.arange(2000) % 2 == 0)[:, None], (1, 2000, 2000))
    maps = np.random.default_rng(0).integers(0, 1000, masks.shape)
    exact, streaming = (judge([(maps, [1], masks, [1])], mode) for mode in MODES)
    low, high = streaming.bounds()["AUPRO"]
    assert low <= exact.compute()["AUPRO"] <= high


def peak(updates, mode):
    "The most memory that updates, workers' results and computing take."
    (maps, *rest), rng = ordinary(4, 32), np.random.default_rng(0)
    with small(STRETCH=64):
        e = Evaluator(mode, bins=512)
        tracemalloc.start()
        try:
            for i in range(updates):
                one = maps + rng.normal(size=maps.shape).astype(np.float32), *rest
                e.update(*one) if 2*i < updates else e.merge(judge([one], mode, bins=512))
            e.compute()
            return tracemalloc.get_traced_memory()[1]
        finally: tracemalloc.stop()


def test_memory_does_not_grow():
    growth = {mode: peak(160, mode) - peak(40, mode) for mode in MODES}      # 480 images more, of 4 kB each
    assert growth["streaming"] < 48_000 and growth["exact"] > 480*4096


@pytest.mark.parametrize("regions", [5, 8, 16, 17, 64])
@pytest.mark.parametrize("kind", ["constant", "distinct"])
@pytest.mark.parametrize("how", ["at once", "one by one", "merged"])
def test_too_many_regions_are_refused(monkeypatch, regions, kind, how):
    "2**20 regions in reality; with a unit this large, four."
    monkeypatch.setattr(bins_module, "UNIT", 2**60)
    def batch(n):
        maps = np.arange(2.*n).reshape(n, 1, 2)
        return maps if kind == "distinct" else 0*maps, np.arange(n), np.arange(2*n).reshape(n, 1, 2) % 2, np.ones(n)
    assert judge([batch(4)], "streaming").compute()["AUPRO"] == judge([batch(4)]).compute()["AUPRO"]
    e, taken, piece = Evaluator("streaming"), 0, batch(regions if how == "at once" else 1)
    with pytest.raises(ValueError, match="regions.*mode='exact'"):
        while taken < regions:
            if how == "merged": e.merge(judge([piece], "streaming"))
            else: e.update(*piece)
            e.compute()
            taken += 1
    try: after = results(e)
    except ValueError: return                                                      # refused from then on, or as if it had not been given
    assert after == results(judge([piece]*taken, "streaming"))


@pytest.mark.parametrize("mode", MODES)
def test_a_mask_on_an_image_called_good(mode):
    "Its pixels are those of an anomalous image: defective where the mask says so, and no others of a good one; the image itself counts as good."
    maps, scores, masks, labels = ordinary(8, 24)
    called = labels.copy()
    called[0] = False
    got, want = (judge([(maps, scores, masks, l)], mode, bins=64) for l in (called, labels))
    for k, v in want.compute().items(): assert got.compute()[k] == v or k[0] in "Im", k
    image = judge([(maps, scores, 0*masks, called)], mode, bins=64).compute()
    assert [got.compute()[k] for k in KEYS if k[0] == "I"] == [image[k] for k in KEYS if k[0] == "I"]


@pytest.fixture(params=["cpu", "cpu, sorted by torch", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"))])
def device(request, monkeypatch):
    "Where tensors lie. On the CPU they may take the way of those on a GPU."
    if "sorted" in request.param:
        for module in (curves, metrics): monkeypatch.setattr(module, "on_gpu", torch.is_tensor)
    return request.param[:4].strip(",")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", [torch.Tensor.float, torch.Tensor.double, torch.Tensor.half, torch.Tensor.bfloat16, torch.Tensor.int, lambda x: x.clone().requires_grad_(),
                                    lambda x: x.mT.contiguous().mT, lambda x: x.repeat_interleave(2, 0)[::2], torch.inference_mode()(torch.clone)])
def test_tensors_count_as_arrays(device, change, mode):
    batches = [(change(torch.from_numpy(m.astype(np.float32)).to(device)), *b) for m, *b in drawn(3, "negative") + drawn(1, "zeros")]
    arrays, kw = [(m.detach().float().cpu().numpy(), *b) for m, *b in batches], dict(mode=mode, bins=300)
    with small(WAITING=1):
        want = results(judge(arrays, **kw))
        assert results(judge([[torch.as_tensor(x, device=device) for x in b] for b in batches], **kw)) == want
        assert results(judge(batches[::2] + arrays[1::2], **kw)) == results(judge(arrays[1::2], **kw).merge(judge(batches[::2], **kw))) == want


@settings(often, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seeds, kinds, st.sampled_from(MODES), waits)
def test_tensors_of_any_scores(device, seed, kind, mode, waiting):
    arrays = drawn(seed, kind)
    tensors = [(torch.from_numpy(b[0]).to(device), *b[1:]) for b in arrays]
    with small(WAITING=waiting): assert results(judge(tensors, mode, bins=100)) == results(judge(arrays, mode, bins=100))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype, bad, said", [("float32", np.nan, "nan"), ("float16", -np.inf, "-inf"), ("bfloat16", np.nan, "nan"), ("float64", 1e300, "inf")])
def test_tensors_with_a_bad_score_are_named_and_not_kept(device, dtype, bad, said, mode):
    batch, e = ordinary(4, 24), judge([ordinary(4, 32)], mode, bins=100)
    maps, before = torch.from_numpy(batch[0]).to(device, getattr(torch, dtype)), results(e)
    maps[1, 2, 3] = bad
    with pytest.raises(ValueError, match=rf"^maps: 1 of .*{said} at \(1, 2, 3\)"): e.update(maps, *batch[1:])
    assert results(e) == before
