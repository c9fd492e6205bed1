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


def metrics_of(maps, scores, masks, labels, **counting):
    evaluator = Evaluator(**counting)
    evaluator.update(maps, scores, masks, labels)
    return evaluator.compute()


def blobs(seed, levels=None, n=6, size=24):
    "Random maps, rounded to about so many `levels`, with random blobs; the last third of the images is good."
    rng = np.random.default_rng(seed)
    masks = gaussian_filter(rng.normal(size=(n, size, size)), (0, 2, 2)) > .25
    labels = np.arange(n) < n - n//3
    masks[~labels] = False
    masks[0, :2, :2] = True
    maps = (gaussian_filter(rng.normal(size=masks.shape), (0, 1, 1)) + .4*masks).astype(np.float32)
    scores = maps.max((1, 2)) + rng.normal(size=n)
    if levels:
        maps, scores = np.round(maps*levels/4).astype(np.float32), np.round(scores)
    return maps, scores, masks, labels


def regions_of(masks):
    "Each 8-connected region: the number of its image, and its pixels, bool [H, W]."
    regions = []
    for i, mask in enumerate(masks):
        components, n = label(mask, np.ones((3, 3)))
        regions += [(i, components == k) for k in range(1, n + 1)]
    return regions


def aupro_reference(maps, masks, limit):
    "Count anew at every threshold, keep every point, integrate segment by segment."
    regions = regions_of(masks)
    points = [(0., 0.)]
    for t in np.unique(maps)[::-1]:
        overlap = np.mean([(maps[i][region] >= t).mean() for i, region in regions])
        points.append(((maps[~masks] >= t).mean(), overlap))
    total = 0.
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x0 >= limit: break
        if x1 > limit:
            x1, y1 = limit, y0 + (y1 - y0)*(limit - x0)/(x1 - x0)
        total += (x1 - x0)*(y0 + y1)/2
    return total/limit


def fpr95_reference(truth, scores):
    fpr, tpr, _ = roc_curve(truth, scores, drop_intermediate=False)
    return fpr[np.argmax(tpr >= .95)]


def f1_reference(truth, scores):
    precision, recall, _ = precision_recall_curve(truth, scores)
    return (2*precision*recall/np.maximum(precision + recall, 1e-300)).max()


REFERENCES = dict(AUROC=roc_auc_score, AP=average_precision_score, F1max=f1_reference, FPR95=fpr95_reference)


@pytest.mark.parametrize("levels", [None, 3, 20])
@pytest.mark.parametrize("seed", range(3))
def test_equals_scikit_learn(seed, levels):
    maps, scores, masks, labels = blobs(seed, levels)
    got = metrics_of(maps, scores, masks, labels)
    assert tuple(got) == KEYS
    for prefix, truth, values in (("I", labels, scores), ("P", masks.ravel(), maps.ravel())):
        for name, reference in REFERENCES.items():
            assert got[f"{prefix}-{name}"] == pytest.approx(reference(truth, values), abs=1e-9), name
    assert got["mAD"] == pytest.approx(np.mean([got[k] for k in METRICS]), abs=1e-12)
    threshold = max(t for t in np.unique(maps) if (maps[masks] >= t).mean() >= .95)
    assert got["P-FPR95-good"] == (maps[~labels] >= threshold).mean()


@pytest.mark.parametrize("limit", [.05, .3, 1.])
@pytest.mark.parametrize("levels", [None, 2, 12])
@pytest.mark.parametrize("seed", range(3))
def test_aupro_equals_the_slow_reference(seed, levels, limit):
    maps, scores, masks, labels = blobs(seed, levels, size=16)
    got = metrics_of(maps, scores, masks, labels, fpr_limit=limit)["AUPRO"]
    assert got == pytest.approx(aupro_reference(maps, masks, limit), abs=1e-9)


def test_anomalib_aupro_fixture():
    one_column = np.tile([0, 0, 0, 1, 0, 0, 0], (1, 400, 1))
    three_columns = np.tile([0, 1, 0, 1, 0, 1, 0], (1, 400, 1))
    maps = (np.arange(2800)/2800).reshape(1, 400, 7)
    with pytest.warns(UndefinedMetric, match="no normal image"):
        for masks in (one_column, three_columns, np.concatenate([one_column, three_columns])):
            n = len(masks)
            got = metrics_of(maps.repeat(n, 0), np.zeros(n), masks, np.ones(n), fpr_limit=1/3)
            assert got["AUPRO"] == pytest.approx(1/6, abs=1e-3)


@pytest.mark.parametrize("scores, labels, want", [
    ([.1, .5, .9, 1], [0, 1, 1, 1], 1),
    ([.1, .5, .9, .1], [0, 1, 1, 1], 6/7),
    ([-.5, 0, .5, 1, 2], [0, 0, 1, 1, 1], 1),
    ([-.5, 0, .5, 1, 2], [0, 1, 0, 1, 1], 6/7),
    ([2.3, 1.6, 2.6, 7.9, 3.3], [0, 0, 0, 1, 1], 1),
])
def test_anomalib_f1max_fixtures(scores, labels, want):
    masks = np.array(labels, bool)[:, None, None]
    got = metrics_of(np.array(scores)[:, None, None], scores, masks, labels)
    assert got["I-F1max"] == pytest.approx(want, abs=1e-12)
    assert got["P-F1max"] == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("offset, factor", [(-4000, 1), (0, 1e4), (0, 1e-30)])
def test_logits_of_any_scale(offset, factor):
    maps, scores, masks, labels = blobs(0, levels=12)
    scaled = maps*np.float32(factor) + np.float32(offset)
    got = metrics_of(scaled, scores*factor + offset, masks, labels)
    assert got == metrics_of(maps, scores, masks, labels)


examples = settings(deadline=None, max_examples=15)


def ranks(x):
    return np.unique(x, return_inverse=True)[1].reshape(x.shape)


RISING = {
    "ranks": ranks,
    "times 8": lambda x: 8*x,
    "negative ranks": lambda x: ranks(x) - 10**5,
    "over 1024": lambda x: x/1024,
}


@examples
@given(st.integers(0, 10**6), st.sampled_from([None, 3, 20]), st.sampled_from(list(RISING)))
def test_only_the_order_counts(seed, levels, transform):
    maps, scores, masks, labels = blobs(seed, levels, size=12)
    rising = RISING[transform]
    got = metrics_of(rising(maps), rising(scores), masks, labels)
    assert got == metrics_of(maps, scores, masks, labels)


@examples
@given(st.integers(0, 10**6), st.sampled_from([None, 3]))
def test_permutation_of_images(seed, levels):
    batch = blobs(seed, levels, size=12)
    order = np.random.default_rng(seed).permutation(len(batch[0]))
    permuted = [part[order] for part in batch]
    assert metrics_of(*permuted) == pytest.approx(metrics_of(*batch), abs=1e-12)


@examples
@given(st.integers(0, 10**6), st.integers(1, 8), st.floats(.01, 1))
def test_values_are_shares(seed, levels, limit):
    rng = np.random.default_rng(seed)
    n = rng.integers(2, 6)
    labels = np.arange(n) < rng.integers(1, n)
    masks = (rng.random((n, 6, 7)) < rng.random())*labels[:, None, None] > 0
    masks[0, 0, 0], masks[0, 5, 6] = True, False
    maps = rng.integers(0, levels, masks.shape)
    got = metrics_of(maps, rng.integers(0, levels, n), masks, labels, fpr_limit=limit)
    assert all(0 <= v <= 1 for v in got.values()), got


def beside_a_good_image(mask, anomaly_map, **counting):
    "The metrics of an image with this mask and map, beside a good one with a map of zeros."
    mask, anomaly_map = np.asarray(mask), np.asarray(anomaly_map, np.float32)
    maps, masks = np.stack([anomaly_map, 0*anomaly_map]), np.stack([mask, 0*mask])
    return metrics_of(maps, [1, 0], masks, [1, 0], **counting)


def test_pixels_that_touch_diagonally_are_one_region():
    mask = np.zeros((8, 8), int)
    mask[0, 0] = mask[1, 1] = mask[5, 5] = 1
    anomaly_map = np.zeros((8, 8))
    anomaly_map[0, 0] = anomaly_map[1, 1] = 1   # 8-connected: one of two regions; 4-connected: two of three
    got = beside_a_good_image(mask, anomaly_map)["AUPRO"]
    maps, masks = np.stack([anomaly_map, 0*anomaly_map]), np.stack([mask, 0*mask]) > 0
    assert got == pytest.approx(aupro_reference(maps, masks, .3), abs=1e-12)
    assert got == pytest.approx(.5 + .5*.15, abs=1e-12)    # half at once, the rest on the diagonal


def test_a_region_never_spans_two_images():
    masks = np.zeros((3, 1, 2), bool)
    masks[:2] = True
    maps = np.array([[[1., 1.]], [[0., 0.]], [[.5, .5]]])
    got = metrics_of(maps, [1, 1, 0], masks, [1, 1, 0])
    assert got["AUPRO"] == pytest.approx(.5, abs=1e-12)


def test_single_pixel_regions_count_like_pixels():
    mask = np.zeros((9, 9), int)
    mask[::3, ::3] = 1
    anomaly_map = np.random.default_rng(0).normal(size=(9, 9)).round(1)
    got = beside_a_good_image(mask, anomaly_map, fpr_limit=1)
    assert got["AUPRO"] == pytest.approx(got["P-AUROC"], abs=1e-12)


def test_one_region_per_image_of_one_size_is_recall():
    maps, _, _, labels = blobs(3)
    masks = np.zeros(maps.shape, bool)
    masks[labels, 4:9, 5:11] = True
    got = metrics_of(maps, np.arange(6), masks, labels, fpr_limit=1)
    assert got["AUPRO"] == pytest.approx(got["P-AUROC"], abs=1e-12)


def test_perfect_and_constant_and_inverted_maps():
    _, _, masks, labels = blobs(0)
    perfect = metrics_of(masks, labels, masks, labels)
    assert [perfect[k] for k in KEYS] == pytest.approx([1]*8 + [0]*3, abs=1e-12)
    constant = metrics_of(0.*masks, 0*labels, masks, labels)
    assert constant["AUPRO"] == pytest.approx(.15, abs=1e-12)
    assert constant["P-AUROC"] == constant["I-AUROC"] == .5
    assert constant["P-FPR95"] == 1
    assert metrics_of(~masks, ~labels, masks, labels)["AUPRO"] == pytest.approx(0, abs=1e-12)


def test_minus_zero_ties_with_zero():
    maps = np.array([[[-0.]], [[0.]]], np.float32)
    got = metrics_of(maps, [-0., 0.], [[[1]], [[0]]], [1, 0])
    assert got["P-AUROC"] == got["I-AUROC"] == .5


def test_smallest_and_largest_numbers_keep_their_order():
    big, small = np.finfo(np.float32).max, np.float32(1e-45)
    scores = np.array([-big, -1, -small, 0, small, 1, big], np.float32)
    for k in range(1, 7):
        labels = np.arange(7) >= k
        got = metrics_of(scores[:, None, None], scores, labels[:, None, None], labels)
        assert got["P-AUROC"] == 1


def test_batches_and_one_update_are_the_same():
    batch = blobs(4, 12)
    evaluator = Evaluator()
    for images in ([0], [1, 2], [3, 4, 5]): evaluator.update(*(part[images] for part in batch))
    assert evaluator.compute() == metrics_of(*batch)
    assert evaluator.compute() == metrics_of(*batch)        # computing changes nothing
    evaluator.update(*(part[:1] for part in batch))
    assert evaluator.compute() == metrics_of(*(np.concatenate([part, part[:1]]) for part in batch))


def test_what_was_given_may_change_afterwards():
    batch = tuple(part.copy() for part in blobs(4))
    before, evaluator = metrics_of(*batch), Evaluator()
    evaluator.update(*batch)
    for part in batch: part[:] = 0
    assert evaluator.compute() == before


def test_tensors_are_taken_as_they_are():
    batch = blobs(5)
    maps, *others = [torch.from_numpy(part) for part in batch]
    assert metrics_of(maps.requires_grad_(), *others) == metrics_of(*batch)


def test_images_of_different_sizes():
    small, large = blobs(6, 12, size=16), blobs(7, 12, size=24)
    evaluator = Evaluator()
    evaluator.update(*small)
    evaluator.update(*large)
    got = evaluator.compute()
    truth, pixels = (np.concatenate([small[i].ravel(), large[i].ravel()]) for i in (2, 0))
    assert got["P-AUROC"] == pytest.approx(roc_auc_score(truth, pixels), abs=1e-9)

    def padded(x, fill): return np.pad(x, ((0, 0), (0, 8), (0, 8)), constant_values=fill)
    masks = np.concatenate([padded(small[2], False), large[2]])
    maps = np.concatenate([padded(small[0], 0), large[0]])
    outside = np.concatenate([padded(np.zeros(small[2].shape, bool), True), np.zeros(large[2].shape, bool)])
    regions, normal = regions_of(masks), ~masks & ~outside
    x, y = [0], [0]
    for t in np.unique(maps)[::-1]:
        x.append((maps[normal] >= t).mean())
        y.append(np.mean([(maps[i][region] >= t).mean() for i, region in regions]))
    x, y = np.array(x), np.array(y)
    below = x < .3
    x, y = np.append(x[below], .3), np.append(y[below], np.interp(.3, x, y))
    assert got["AUPRO"] == pytest.approx(np.diff(x) @ (y[1:] + y[:-1])/2/.3, abs=1e-9)


@pytest.mark.parametrize("keep, missing, undefined", [
    ("good", "no anomalous image, no anomalous pixel", set(KEYS)),
    ("anomalous", "no normal image, no pixel of a good image", {"I-AUROC", "mAD", "I-FPR95", "P-FPR95-good"}),
])
def test_undefined_is_nan_and_a_warning_says_so(keep, missing, undefined):
    maps, scores, masks, labels = blobs(0)
    kept = ~labels if keep == "good" else labels
    with pytest.warns(UndefinedMetric, match=missing) as caught:
        got = metrics_of(maps[kept], scores[kept], masks[kept], labels[kept])
    assert {k for k, v in got.items() if np.isnan(v)} == undefined
    assert len(caught) == 1
    assert all(k in str(caught[0].message) for k in undefined)


def test_no_normal_pixel_and_empty_masks():
    full, empty = np.ones((2, 3, 3)), np.zeros((2, 3, 3))
    with pytest.warns(UndefinedMetric, match="no normal pixel"):
        got = metrics_of(full, [1, 0], full, [1, 0])
    assert np.isnan([got["P-AUROC"], got["AUPRO"], got["mAD"], got["P-FPR95"]]).all()
    assert got["P-AP"] == 1
    with pytest.warns(UndefinedMetric, match="no anomalous pixel: nan for P-AUROC"):
        got = metrics_of(full, [1, 0], empty, [1, 0])
    assert got["I-AUROC"] == 1 and np.isnan(got["AUPRO"])


def test_defined_metrics_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics_of(*blobs(0))


def highest_as(value):
    "The change that puts `value` in the position of the highest number."
    return lambda x: np.where(x == x.max(), value, x)


@pytest.mark.parametrize("name, change, message", [
    ("maps", highest_as(np.nan), "nan"),
    ("maps", highest_as(-np.inf), "-inf"),
    ("maps", lambda x: x.astype(float)*1e300, "inf"),
    ("maps", lambda x: x[0], r"\(24, 24\)"),
    ("scores", lambda x: x*np.nan, "nan"),
    ("scores", lambda x: x[:-1], r"\(5,\)"),
    ("scores", lambda x: x[:, None], r"\(6, 1\)"),
    ("masks", lambda x: x*255, "255"),
    ("masks", lambda x: x*.5, "0.5"),
    ("masks", lambda x: x[:, 1:], r"\(6, 23, 24\)"),
    ("masks", lambda x: x*np.nan, "nan"),
    ("labels", lambda x: x*2 - 1, "-1"),
    ("labels", lambda x: x[1:], r"\(5,\)"),
])
def test_bad_input_is_named_and_not_kept(name, change, message):
    batch = dict(zip(("maps", "scores", "masks", "labels"), blobs(0)))
    evaluator = Evaluator()
    with np.errstate(invalid="ignore"), pytest.raises(ValueError, match=f"^{name}: .*{message}"):
        evaluator.update(**batch | {name: change(batch[name])})
    with pytest.raises(ValueError, match="before any image"): evaluator.compute()


@pytest.mark.parametrize("limit", [0, -1, 1.5, np.nan])
def test_bad_limit(limit):
    with pytest.raises(ValueError, match="fpr_limit"): Evaluator(fpr_limit=limit)


def test_mean_over_classes():
    a, b = metrics_of(*blobs(0)), metrics_of(*blobs(1))
    mean = mean_over_classes({"a": a, "b": b})
    assert tuple(mean) == KEYS
    assert all(mean[k] == pytest.approx((a[k] + b[k])/2) for k in KEYS)
    assert np.isnan(mean_over_classes({"a": a, "b": b | {"AUPRO": np.nan}})["AUPRO"])
    with pytest.raises(ValueError, match="none"): mean_over_classes({})
    with pytest.raises(ValueError, match="a, b"): mean_over_classes({"a": a, "b": {"AUPRO": 1.}})
