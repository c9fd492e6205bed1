"Protocols: the mask rule against brute force, the width of the smoothing, image scores, kinds, and bad input."
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.ndimage import gaussian_filter

from mdd_bench.errors import DataError, SpecError
from mdd_bench.evaluation.metrics import Evaluator, UndefinedMetric
from mdd_bench.evaluation.protocols import PROTOCOLS, Protocol, evaluate, get_protocol, score, smooth

exact = get_protocol("exact")


def test_exact_is_what_it_says():
    assert PROTOCOLS["exact"] is exact
    assert exact == Protocol("exact", sigma=4, image_score="detector", mask_rule="half", fpr_limit=.3)
    with pytest.raises(FrozenInstanceError): exact.sigma = 2


def test_unknown_names_are_refused():
    with pytest.raises(SpecError, match="unknown protocol 'exakt'. Did you mean 'exact'"): get_protocol("exakt")
    with pytest.raises(SpecError, match="unknown mask rule 'halve'"): Protocol("x", mask_rule="halve")
    with pytest.raises(SpecError, match="unknown image score 'mean'.*detector, max"): Protocol("x", image_score="mean")


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_half_rule_by_brute_force(seed, h0, w0, h, w):
    mask = np.random.default_rng(seed).random((h0, w0)) < .5
    fine = mask.repeat(h, 0).repeat(w, 1)                         # every border of either grid lies on this one
    covered = fine.reshape(h, h0, w, w0).sum((1, 3))
    assert (exact.masks(mask, (h, w)) == (2*covered >= h0*w0)).all()


@pytest.mark.parametrize("factor", [2, 3, 6, 7, 10])
def test_exactly_half(factor):
    n = factor*factor
    for count in range(n + 1):
        block = np.random.default_rng(count).permutation(np.arange(n) < count).reshape(factor, factor)
        assert exact.masks(block, (1, 1))[0, 0] == (count >= n/2)


def test_sizes_larger_equal_and_not_square():
    mask = np.array([[1, 0, 0], [0, 1, 1]], bool)
    assert (exact.masks(mask, (2, 3)) == mask).all()
    assert (exact.masks(mask, (8, 6)) == mask.repeat(4, 0).repeat(2, 1)).all()
    assert exact.masks(mask, (8, 6)).dtype == bool
    assert exact.masks(np.ones((700, 900), bool), (256, 256)).all() and not exact.masks(np.zeros((700, 900), bool), (256, 256)).any()


def test_mask_keeps_its_place_at_an_odd_factor():
    mask = np.zeros((1000, 900), bool)
    mask[250:500, 300:600] = True
    small = exact.masks(mask, (256, 224))
    assert small[64:128, 75:149].all() and small.sum() == 64*74         # rows exactly; columns 74.67 to 149.33: the first is a third in


def test_mask_values():
    assert exact.masks(np.array([[1, 0]]), (1, 2)).tolist() == [[True, False]]
    with pytest.raises(ValueError, match="mask: .* 255"): exact.masks(np.array([[0, 255]]), (1, 2))


def deviation(m):
    d = np.arange(len(m)) - len(m)//2
    p = m.sum(1)/m.sum()
    return np.sqrt(p @ d**2 - (p @ d)**2)


@pytest.mark.parametrize("size", [128, 256, 512])
def test_sigma_grows_with_the_map(size):
    maps = np.zeros((2, size + 1, size + 9), np.float32)
    maps[0, size//2, size//2] = 1
    out = exact.smooth(maps)
    assert out.dtype == np.float32 and out[1].max() == 0 and out[0].sum() == pytest.approx(1, abs=1e-4)
    assert deviation(out[0, :, :size + 1]) == pytest.approx(4*(size + 1)/256, rel=.01)


def test_smoothing_is_per_image_and_mirrored():
    maps = np.random.default_rng(0).normal(size=(3, 20, 30)).astype(np.float32)
    for one, m in zip(smooth(maps, 2), maps): assert np.array_equal(one, smooth(m[None], 2)[0]) and np.array_equal(one, gaussian_filter(m, 2))
    assert np.allclose(smooth(np.full((1, 20, 30), 3.), 5), 3)
    assert np.array_equal(smooth(maps, 0), maps)
    assert np.array_equal(smooth(torch.from_numpy(maps).requires_grad_(), 2), smooth(maps, 2))
    with pytest.raises(ValueError, match="maps: .*nan"): smooth(maps*np.nan, 2)


def case(size=40, seed=0):
    rng = np.random.default_rng(seed)
    kinds = ["hole", "good", "scratch", "good", "hole", "scratch", "good"]
    labels = np.array([k != "good" for k in kinds])
    masks = [None if k == "good" else gaussian_filter(rng.normal(size=(2*size + 7*i, 90)), 8) > .03 for i, k in enumerate(kinds)]
    maps = rng.normal(size=(len(kinds), size, size)).astype(np.float32)
    return maps, rng.normal(size=len(kinds)), masks, labels, kinds


def test_image_scores():
    maps, own, *_ = case()
    smoothed = exact.smooth(maps)
    assert (exact.image_scores(smoothed, own) == own).all()
    assert (exact.image_scores(smoothed) == smoothed.max((1, 2))).all()
    assert (replace(exact, image_score="max").image_scores(smoothed, own) == smoothed.max((1, 2))).all()
    with pytest.raises(ValueError, match="own_scores: .*inf"): exact.image_scores(smoothed, own*np.inf)


@pytest.mark.parametrize("with_own", [True, False])
def test_score_is_smoothing_masks_and_the_evaluator(with_own):
    maps, own, masks, labels, _ = case()
    metrics, scores = score(exact, maps, own if with_own else None, masks, labels)
    m = np.stack([gaussian_filter(x, 4*40/256) for x in maps])
    small = [np.zeros((40, 40), bool) if x is None else exact.masks(x, (40, 40)) for x in masks]
    e = Evaluator()
    e.update(m, own if with_own else m.max((1, 2)), small, labels)
    assert metrics == e.compute() and np.array_equal(scores, own if with_own else m.max((1, 2)))


def test_the_limit_is_passed_on():
    maps, own, masks, labels, _ = case()
    at = lambda limit: score(replace(exact, fpr_limit=limit), maps, own, masks, labels)[0]
    assert at(1)["AUPRO"] > at(.3)["AUPRO"] and at(1)["P-AUROC"] == at(.3)["P-AUROC"]


@pytest.mark.parametrize("with_own", [True, False])
def test_each_kind_is_judged_beside_the_good_images(with_own):
    maps, own, masks, labels, kinds = case()
    own = own if with_own else None
    got = evaluate(exact, maps, own, masks, labels, kinds)
    assert got["metrics"] == score(exact, maps, own, masks, labels)[0] and list(got["per_kind"]) == ["hole", "scratch"]
    assert np.array_equal(got["scores"], score(exact, maps, own, masks, labels)[1])
    for kind, metrics in got["per_kind"].items():
        pick = [i for i, k in enumerate(kinds) if k in ("good", kind)]
        assert metrics == score(exact, maps[pick], own if own is None else own[pick], [masks[i] for i in pick], labels[pick])[0]


def test_tensors_are_taken_as_they_are():
    maps, own, masks, labels, kinds = case()
    a, b = evaluate(exact, torch.from_numpy(maps), torch.from_numpy(own), masks, torch.from_numpy(labels), kinds), evaluate(exact, maps, own, masks, labels, kinds)
    assert a["metrics"] == b["metrics"] and a["per_kind"] == b["per_kind"]


def test_labels_come_from_the_folder():
    maps, own, masks, labels, kinds = case()
    masks[0] = np.zeros((2000, 2000), bool)
    masks[0][999, 999] = True                                            # vanishes under the half rule
    assert not exact.masks(masks[0], (40, 40)).any()
    e = Evaluator()
    e.update(maps, own, np.zeros(maps.shape), np.zeros(len(maps)) + labels)
    with pytest.warns(UndefinedMetric): want = e.compute()["I-AUROC"]
    assert score(exact, maps, own, masks, labels)[0]["I-AUROC"] == want


def test_no_good_image_is_nan_and_said():
    maps, own, masks, labels, kinds = case()
    pick = np.flatnonzero(labels)
    with pytest.warns(UndefinedMetric, match="no normal image"): got = evaluate(exact, maps[pick], own[pick], [masks[i] for i in pick], labels[pick], [kinds[i] for i in pick])
    assert np.isnan(got["metrics"]["mAD"]) and not np.isnan(got["metrics"]["AUPRO"])


def test_bad_input_is_named():
    maps, own, masks, labels, kinds = case()
    with pytest.raises(DataError, match="image 2 is anomalous and has no mask"): score(exact, maps, own, [*masks[:2], None, *masks[3:]], labels)
    with pytest.raises(ValueError, match="7, 6, 7 images"): score(exact, maps, own, masks[1:], labels)
    with pytest.raises(ValueError, match="scores: shape"): evaluate(exact, maps, own[1:], masks, labels, kinds)
    with pytest.raises(ValueError, match="maps: shape"): score(exact, maps[0], own, masks, labels)
    with pytest.raises(ValueError, match="maps: .*nan"): score(exact, maps*np.nan, own, masks, labels)
    with pytest.raises(ValueError, match="labels: .* 2"): score(exact, maps, own, masks, labels*2)
    with pytest.raises(ValueError, match="kinds: shape"): evaluate(exact, maps, own, masks, labels, kinds[1:])
    with pytest.raises(ValueError, match="kinds: image 0 is 'good'"): evaluate(exact, maps, own, masks, labels, ["good", *kinds[1:]])
