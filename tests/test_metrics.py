"Metrics against scikit-learn, against slow and obvious references, on the peers' fixtures, and on bad input."
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.ndimage import gaussian_filter, label
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from mdd_bench.evaluation.metrics import METRICS, Evaluator, UndefinedMetric, mean_over_classes

KEYS = (*METRICS, "mAD", "I-FPR95", "P-FPR95", "P-FPR95-good")


def judged(maps, scores, masks, labels, **kw):
    e = Evaluator(**kw)
    e.update(maps, scores, masks, labels)
    return e.compute()


def blobs(seed, levels=None, n=6, size=24):
    "Random maps, rounded to about so many `levels`, with random blobs; the last third of the images are good."
    rng = np.random.default_rng(seed)
    masks = gaussian_filter(rng.normal(size=(n, size, size)), (0, 2, 2)) > .25
    labels = np.arange(n) < n - n//3
    masks[~labels] = False
    masks[0, :2, :2] = True
    maps = (gaussian_filter(rng.normal(size=masks.shape), (0, 1, 1)) + .4*masks).astype(np.float32)
    scores = maps.max((1, 2)) + rng.normal(size=n)
    if levels: maps, scores = np.round(maps*levels/4).astype(np.float32), np.round(scores)
    return maps, scores, masks, labels


def aupro_reference(maps, masks, limit):
    "Count anew at every threshold, keep every point, integrate segment by segment."
    regions = [(i, c == k) for i, m in enumerate(masks) for c, n in [label(m, np.ones((3, 3)))] for k in range(1, n + 1)]
    points = [(0., 0.)]
    for t in np.unique(maps)[::-1]: points.append(((maps[~masks] >= t).mean(), np.mean([(maps[i][r] >= t).mean() for i, r in regions])))
    total = 0.
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x0 >= limit: break
        if x1 > limit: x1, y1 = limit, y0 + (y1 - y0)*(limit - x0)/(x1 - x0)
        total += (x1 - x0)*(y0 + y1)/2
    return total/limit


def fpr95_reference(truth, s):
    fpr, tpr, _ = roc_curve(truth, s, drop_intermediate=False)
    return fpr[np.argmax(tpr >= .95)]


def f1_reference(truth, s):
    p, r, _ = precision_recall_curve(truth, s)
    return (2*p*r/np.maximum(p + r, 1e-300)).max()


@pytest.mark.parametrize("levels", [None, 3, 20])
@pytest.mark.parametrize("seed", range(3))
def test_equals_scikit_learn(seed, levels):
    maps, scores, masks, labels = blobs(seed, levels)
    got = judged(maps, scores, masks, labels)
    assert tuple(got) == KEYS
    for prefix, truth, s in (("I", labels, scores), ("P", masks.ravel(), maps.ravel())):
        want = dict(AUROC=roc_auc_score(truth, s), AP=average_precision_score(truth, s), F1max=f1_reference(truth, s), FPR95=fpr95_reference(truth, s))
        for k, v in want.items(): assert got[f"{prefix}-{k}"] == pytest.approx(v, abs=1e-9), k
    assert got["mAD"] == pytest.approx(np.mean([got[k] for k in METRICS]), abs=1e-12)
    threshold = max(t for t in np.unique(maps) if (maps[masks] >= t).mean() >= .95)
    assert got["P-FPR95-good"] == (maps[~labels] >= threshold).mean()


@pytest.mark.parametrize("limit", [.05, .3, 1.])
@pytest.mark.parametrize("levels", [None, 2, 12])
@pytest.mark.parametrize("seed", range(3))
def test_aupro_equals_the_slow_reference(seed, levels, limit):
    maps, scores, masks, labels = blobs(seed, levels, size=16)
    assert judged(maps, scores, masks, labels, fpr_limit=limit)["AUPRO"] == pytest.approx(aupro_reference(maps, masks, limit), abs=1e-9)


def test_anomalib_aupro_fixture():
    one = np.tile([0, 0, 0, 1, 0, 0, 0], (1, 400, 1))
    two = np.tile([0, 1, 0, 1, 0, 1, 0], (1, 400, 1))
    maps = (np.arange(2800)/2800).reshape(1, 400, 7)
    with pytest.warns(UndefinedMetric, match="no normal image"):
        for m in (one, two, np.concatenate([one, two])):
            n = len(m)
            assert judged(maps.repeat(n, 0), np.zeros(n), m, np.ones(n), fpr_limit=1/3)["AUPRO"] == pytest.approx(1/6, abs=1e-3)


@pytest.mark.parametrize("scores, labels, want", [
    ([.1, .5, .9, 1], [0, 1, 1, 1], 1), ([.1, .5, .9, .1], [0, 1, 1, 1], 6/7), ([-.5, 0, .5, 1, 2], [0, 0, 1, 1, 1], 1), ([-.5, 0, .5, 1, 2], [0, 1, 0, 1, 1], 6/7),
    ([2.3, 1.6, 2.6, 7.9, 3.3], [0, 0, 0, 1, 1], 1)])
def test_anomalib_f1max_fixtures(scores, labels, want):
    masks = np.array(labels, bool)[:, None, None]
    got = judged(np.array(scores)[:, None, None], scores, masks, labels)
    assert got["I-F1max"] == pytest.approx(want, abs=1e-12) and got["P-F1max"] == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("offset, factor", [(-4000, 1), (0, 1e4), (0, 1e-30)])
def test_logits_of_any_scale(offset, factor):
    maps, scores, masks, labels = blobs(0, levels=12)
    assert judged(maps*np.float32(factor) + np.float32(offset), scores*factor + offset, masks, labels) == judged(maps, scores, masks, labels)


examples = settings(deadline=None, max_examples=15)


@examples
@given(st.integers(0, 10**6), st.sampled_from([None, 3, 20]), st.sampled_from(["ranks", "times 8", "negative ranks", "over 1024"]))
def test_only_the_order_counts(seed, levels, transform):
    maps, scores, masks, labels = blobs(seed, levels, size=12)
    def strictly(x):
        ranks = np.unique(x, return_inverse=True)[1].reshape(x.shape)
        return {"ranks": ranks, "times 8": 8*x, "negative ranks": ranks - 10**5, "over 1024": x/1024}[transform]
    assert judged(strictly(maps), strictly(scores), masks, labels) == judged(maps, scores, masks, labels)


@examples
@given(st.integers(0, 10**6), st.sampled_from([None, 3]))
def test_permutation_of_images(seed, levels):
    batch = blobs(seed, levels, size=12)
    order = np.random.default_rng(seed).permutation(len(batch[0]))
    assert judged(*(x[order] for x in batch)) == pytest.approx(judged(*batch), abs=1e-12)


@examples
@given(st.integers(0, 10**6), st.integers(1, 8), st.floats(.01, 1))
def test_values_are_shares(seed, levels, limit):
    rng = np.random.default_rng(seed)
    n = rng.integers(2, 6)
    labels = np.arange(n) < rng.integers(1, n)
    masks = (rng.random((n, 6, 7)) < rng.random())*labels[:, None, None] > 0
    masks[0, 0, 0], masks[0, 5, 6] = True, False
    got = judged(rng.integers(0, levels, masks.shape), rng.integers(0, levels, n), masks, labels, fpr_limit=limit)
    assert all(0 <= v <= 1 for v in got.values()), got


def one(mask, m, **kw):
    "An image with this mask and map, beside a good one with a map of zeros."
    mask, m = np.asarray(mask), np.asarray(m, np.float32)
    return judged(np.stack([m, 0*m]), [1, 0], np.stack([mask, 0*mask]), [1, 0], **kw)


def test_pixels_that_touch_diagonally_are_one_region():
    mask = np.zeros((8, 8), int)
    mask[0, 0] = mask[1, 1] = mask[5, 5] = 1
    m = np.zeros((8, 8))
    m[0, 0] = m[1, 1] = 1                                  # 8-connected: one of two regions; 4-connected: two of three
    got = one(mask, m)["AUPRO"]
    assert got == pytest.approx(aupro_reference(np.stack([m, 0*m]), np.stack([mask, 0*mask]) > 0, .3), abs=1e-12)
    assert got == pytest.approx(.5 + .5*.15, abs=1e-12)    # half at once, the rest on the diagonal


def test_a_region_never_spans_two_images():
    masks, maps = np.ones((2, 1, 2), bool), np.array([[[1., 1.]], [[0., 0.]]])
    masks = np.pad(masks, ((0, 1), (0, 0), (0, 0)))
    assert judged(np.concatenate([maps, [[[.5, .5]]]]), [1, 1, 0], masks, [1, 1, 0])["AUPRO"] == pytest.approx(.5, abs=1e-12)


def test_single_pixel_regions_count_like_pixels():
    mask = np.zeros((9, 9), int)
    mask[::3, ::3] = 1
    m = np.random.default_rng(0).normal(size=(9, 9)).round(1)
    got = one(mask, m, fpr_limit=1)
    assert got["AUPRO"] == pytest.approx(got["P-AUROC"], abs=1e-12)


def test_one_region_per_image_of_one_size_is_recall():
    maps, _, _, labels = blobs(3)
    masks = np.zeros(maps.shape, bool)
    masks[labels, 4:9, 5:11] = True
    got = judged(maps, np.arange(6), masks, labels, fpr_limit=1)
    assert got["AUPRO"] == pytest.approx(got["P-AUROC"], abs=1e-12)


def test_perfect_and_constant_and_inverted_maps():
    _, _, masks, labels = blobs(0)
    perfect = judged(masks, labels, masks, labels)
    assert [perfect[k] for k in KEYS] == pytest.approx([1]*8 + [0]*3, abs=1e-12)
    constant = judged(0.*masks, 0*labels, masks, labels)
    assert constant["AUPRO"] == pytest.approx(.15, abs=1e-12) and constant["P-AUROC"] == constant["I-AUROC"] == .5 and constant["P-FPR95"] == 1
    assert judged(~masks, ~labels, masks, labels)["AUPRO"] == pytest.approx(0, abs=1e-12)


def test_minus_zero_ties_with_zero():
    maps = np.array([[[-0.]], [[0.]]], np.float32)
    assert judged(maps, [-0., 0.], [[[1]], [[0]]], [1, 0])["P-AUROC"] == judged(maps, [-0., 0.], [[[1]], [[0]]], [1, 0])["I-AUROC"] == .5


def test_smallest_and_largest_numbers_keep_their_order():
    big, small = np.finfo(np.float32).max, np.float32(1e-45)
    s = np.array([-big, -1, -small, 0, small, 1, big], np.float32)
    for k in range(1, 7): assert judged(s[:, None, None], s, (np.arange(7) >= k)[:, None, None], np.arange(7) >= k)["P-AUROC"] == 1


def test_batches_and_one_update_are_the_same():
    batch = blobs(4, 12)
    e = Evaluator()
    for part in ([0], [1, 2], [3, 4, 5]): e.update(*(x[part] for x in batch))
    assert e.compute() == judged(*batch) == e.compute()        # computing changes nothing
    e.update(*(x[:1] for x in batch))
    assert e.compute() == judged(*(np.concatenate([x, x[:1]]) for x in batch))


def test_what_was_given_may_change_afterwards():
    batch = tuple(x.copy() for x in blobs(4))
    before, e = judged(*batch), Evaluator()
    e.update(*batch)
    for x in batch: x[:] = 0
    assert e.compute() == before


def test_tensors_are_taken_as_they_are():
    batch = blobs(5)
    tensors = [torch.from_numpy(x) for x in batch]
    assert judged(tensors[0].requires_grad_(), *tensors[1:]) == judged(*batch)


def test_images_of_different_sizes():
    a, b = blobs(6, 12, size=16), blobs(7, 12, size=24)
    e = Evaluator()
    for x in (a, b): e.update(*x)
    got, pixels = e.compute(), [np.concatenate([a[i].ravel(), b[i].ravel()]) for i in (2, 0)]
    assert got["P-AUROC"] == pytest.approx(roc_auc_score(*pixels), abs=1e-9)
    pad = lambda x, fill: np.pad(x, ((0, 0), (0, 8), (0, 8)), constant_values=fill)
    masks = np.concatenate([pad(a[2], False), b[2]])
    outside = np.concatenate([pad(np.zeros(a[2].shape, bool), True), np.zeros(b[2].shape, bool)])
    maps = np.concatenate([pad(a[0], 0), b[0]])
    recall = lambda t: np.mean([(m[c == k] >= t).mean() for m, x in zip(maps, masks) for c, n in [label(x, np.ones((3, 3)))] for k in range(1, n + 1)])
    x, y = zip((0, 0), *(((maps[~masks & ~outside] >= t).mean(), recall(t)) for t in np.unique(maps)[::-1]))
    keep = np.array(x) < .3
    x, y = np.append(np.array(x)[keep], .3), np.append(np.array(y)[keep], np.interp(.3, x, y))
    assert got["AUPRO"] == pytest.approx(np.diff(x) @ (y[1:] + y[:-1])/2/.3, abs=1e-9)


@pytest.mark.parametrize("keep, missing, undefined", [
    ("good", "no anomalous image, no anomalous pixel", set(KEYS)),
    ("anomalous", "no normal image, no pixel of a good image", {"I-AUROC", "mAD", "I-FPR95", "P-FPR95-good"})])
def test_undefined_is_nan_and_said(keep, missing, undefined):
    maps, scores, masks, labels = blobs(0)
    pick = ~labels if keep == "good" else labels
    with pytest.warns(UndefinedMetric, match=missing) as caught: got = judged(maps[pick], scores[pick], masks[pick], labels[pick])
    assert {k for k, v in got.items() if np.isnan(v)} == undefined
    assert all(k in str(caught[0].message) for k in undefined) and len(caught) == 1


def test_no_normal_pixel_and_empty_masks():
    full, empty = np.ones((2, 3, 3)), np.zeros((2, 3, 3))
    with pytest.warns(UndefinedMetric, match="no normal pixel"): got = judged(full, [1, 0], full, [1, 0])
    assert np.isnan([got["P-AUROC"], got["AUPRO"], got["mAD"], got["P-FPR95"]]).all() and got["P-AP"] == 1
    with pytest.warns(UndefinedMetric, match="no anomalous pixel: nan for P-AUROC"): got = judged(full, [1, 0], empty, [1, 0])
    assert got["I-AUROC"] == 1 and np.isnan(got["AUPRO"])


def test_defined_metrics_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        judged(*blobs(0))


@pytest.mark.parametrize("name, change, said", [
    ("maps", lambda x: np.where(x == x.max(), np.nan, x), "nan"), ("maps", lambda x: np.where(x == x.max(), -np.inf, x), "-inf"), ("maps", lambda x: x.astype(float)*1e300, "inf"),
    ("maps", lambda x: x[0], r"\(24, 24\)"), ("scores", lambda x: x*np.nan, "nan"), ("scores", lambda x: x[:-1], r"\(5,\)"), ("scores", lambda x: x[:, None], r"\(6, 1\)"),
    ("masks", lambda x: x*255, "255"), ("masks", lambda x: x*.5, "0.5"), ("masks", lambda x: x[:, 1:], r"\(6, 23, 24\)"), ("masks", lambda x: x*np.nan, "nan"),
    ("labels", lambda x: x*2 - 1, "-1"), ("labels", lambda x: x[1:], r"\(5,\)")])
def test_bad_input_is_named_and_not_kept(name, change, said):
    batch = dict(zip(("maps", "scores", "masks", "labels"), blobs(0)))
    e = Evaluator()
    with np.errstate(invalid="ignore"), pytest.raises(ValueError, match=f"^{name}: .*{said}"): e.update(**batch | {name: change(batch[name])})
    with pytest.raises(ValueError, match="before any image"): e.compute()


@pytest.mark.parametrize("limit", [0, -1, 1.5, np.nan])
def test_bad_limit(limit):
    with pytest.raises(ValueError, match="fpr_limit"): Evaluator(fpr_limit=limit)


def test_mean_over_classes():
    a, b = judged(*blobs(0)), judged(*blobs(1))
    mean = mean_over_classes({"a": a, "b": b})
    assert tuple(mean) == KEYS and all(mean[k] == pytest.approx((a[k] + b[k])/2) for k in KEYS)
    assert np.isnan(mean_over_classes({"a": a, "b": b | {"AUPRO": np.nan}})["AUPRO"])
    with pytest.raises(ValueError, match="none"): mean_over_classes({})
    with pytest.raises(ValueError, match="a, b"): mean_over_classes({"a": a, "b": {"AUPRO": 1.}})
