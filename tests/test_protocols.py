"""Protocols: mask rules, smoothing and image scores by brute force, pixel rules against slow and obvious
references and against the peers' own code, kinds, batches, labels, and bad input."""
import json, os, subprocess, warnings
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.integrate import trapezoid
from scipy.ndimage import binary_dilation, gaussian_filter, label
from sklearn.metrics import roc_auc_score
from torch.nn.functional import interpolate

from mdd_bench.errors import DataError, SpecError
from mdd_bench.evaluation import curves, metrics as metrics_module, protocols
from mdd_bench.evaluation.metrics import KEYS, Evaluator, UndefinedMetric
from mdd_bench.evaluation.protocols import (
    MASK_RULES, PIXEL_RULES, PROTOCOLS, Protocol, ProtocolEvaluator, evaluate, get_protocol, raw_batch,
    resized, smooth, smooth_tensors,
)

exact = get_protocol("exact")
every_protocol = pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)


# Choices

def test_exact_is_what_it_says():
    assert PROTOCOLS["exact"] is exact
    assert replace(exact, summary="") == Protocol(
        "exact", "", size=None, sigma=4, image_score="detector", mask_rule="at_least_half",
        label_source="folder", pixel_rule="exact", fpr_limit=.3,
    )
    with pytest.raises(FrozenInstanceError): exact.sigma = 2


@pytest.mark.parametrize("choice, message", [
    (dict(mask_rule="above half"), "unknown mask rule 'above half'. Did you mean 'above_half'"),
    (dict(image_score="mean"), "unknown image score 'mean'.*detector, max"),
    (dict(pixel_rule="200 bins"), "unknown pixel rule '200 bins'. Did you mean '50 bins'"),
    (dict(label_source="masks"), "unknown source of labels 'masks'. Did you mean 'mask'"),
])
def test_unknown_choices_are_refused(choice, message):
    with pytest.raises(SpecError, match=message): Protocol("x", "", **choice)


def test_unknown_protocol_is_refused():
    with pytest.raises(SpecError, match="unknown protocol 'exakt'. Did you mean 'exact'"):
        get_protocol("exakt")


# Masks

@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_half_rule_by_brute_force(seed, h0, w0, h, w):
    mask = np.random.default_rng(seed).random((h0, w0)) < .5
    fine = mask.repeat(h, 0).repeat(w, 1)       # every border of either grid lies on this one
    covered = fine.reshape(h, h0, w, w0).sum((1, 3))
    assert (exact.masks(mask, (h, w)) == (2*covered >= h0*w0)).all()


@pytest.mark.parametrize("side", [2, 3, 6, 7, 10])
def test_exactly_half(side):
    pixels = side*side
    for count in range(pixels + 1):
        block = np.random.default_rng(count).permutation(np.arange(pixels) < count).reshape(side, side)
        assert exact.masks(block, (1, 1))[0, 0] == (count >= pixels/2)


@pytest.mark.parametrize("rule", MASK_RULES)
def test_masks_of_any_size_and_no_other_values(rule):
    p, mask = replace(exact, mask_rule=rule), np.array([[1, 0, 0], [0, 1, 1]], bool)
    assert (p.masks(mask, (2, 3)) == mask).all()
    assert p.masks(mask, (8, 6)).dtype == bool
    assert p.masks(np.ones((700, 900), bool), (256, 224)).all()
    assert not p.masks(np.zeros((700, 900), bool), (256, 224)).any()
    assert p.masks(np.array([[1, 0]]), (1, 2)).tolist() == [[True, False]]
    with pytest.raises(ValueError, match="mask: .* 255"): p.masks(np.array([[0, 255]]), (1, 2))


def test_enlarged_mask_repeats_its_pixels():
    mask = np.array([[1, 0, 0], [0, 1, 1]], bool)
    assert (exact.masks(mask, (8, 6)) == mask.repeat(4, 0).repeat(2, 1)).all()


def test_mask_keeps_its_position_at_an_odd_factor():
    mask = np.zeros((1000, 900), bool)
    mask[250:500, 300:600] = True
    small = exact.masks(mask, (256, 224))
    assert small[64:128, 75:149].all()      # rows exactly; columns 74.67 to 149.33: the first is a third in
    assert small.sum() == 64*74


@pytest.mark.parametrize("radius, want", [
    (2, (8, 0, 0)), (4, (13, 3, 0)), (8, (30, 13, 3)), (16, (81, 52, 28)), (40, (382, 314, 253)),
])
def test_mask_rules_as_measured_with_released_code(radius, want):
    # 8 bits matter: resized as float32, radius 4 gives 15, 3, 0 and radius 40 gives 390, 312, 246
    yy, xx = np.mgrid[:1024, :1024]
    disc = (yy - 510.5)**2 + (xx - 510.5)**2 <= radius**2
    rules = ("touched", "above_half", "wholly")
    assert tuple(MASK_RULES[rule](disc, (256, 256)).sum() for rule in rules) == want


# Smoothing and image scores

def deviation(response):
    "The standard deviation of a response over its rows."
    offset = np.arange(len(response)) - len(response)//2
    share = response.sum(1)/response.sum()
    return np.sqrt(share @ offset**2 - (share @ offset)**2)


@pytest.mark.parametrize("name, size, want", [
    ("exact", 128, 2), ("exact", 256, 4), ("exact", 512, 8), ("ader", 256, 4), ("rd4ad", 256, 4),
    ("simplenet", 288, 4), ("dinomaly", 256, 1.38), ("mvtec_3d", 300, 0),
])
def test_width_of_the_smoothing(name, size, want):
    maps = np.zeros((2, size - 9, size), np.float32)                    # the longer side decides
    maps[0, size//2 - 4, size//2] = 1
    response, other_image = PROTOCOLS[name].smooth(maps)
    assert response.dtype == np.float32
    assert other_image.max() == 0
    assert response.sum() == pytest.approx(1, abs=1e-4)
    assert deviation(response) == pytest.approx(want, rel=.01)
    assert deviation(response.T) == pytest.approx(want, rel=.01)


def test_smoothing_is_per_image_and_mirrored():
    maps = np.random.default_rng(0).normal(size=(3, 20, 30)).astype(np.float32)
    smoothed = smooth(maps, 2)
    for one, m in zip(smoothed, maps):
        assert np.array_equal(one, smooth(m[None], 2)[0])
        assert np.array_equal(one, gaussian_filter(m, 2))
    assert np.allclose(smooth(np.full((1, 20, 30), 3.), 5), 3)
    assert np.array_equal(smooth(maps, 0), maps)
    assert np.array_equal(smooth(torch.from_numpy(maps).requires_grad_(), 2), smoothed)
    with pytest.raises(ValueError, match="maps: .*nan"): smooth(maps*np.nan, 2)


def test_smoothing_with_few_taps_has_zeros_around():
    impulse = np.eye(1, 9, 4)[0]
    kernel = gaussian_filter(impulse, 4, mode="constant", radius=2)
    row = smooth(np.ones((1, 9, 9)), 4, taps=5)[0, 4]
    assert np.allclose(row, np.convolve(np.ones(9), kernel, "same"))


@pytest.mark.parametrize("height, width, sigma, taps", [
    (256, 256, 4, None), (64, 48, 1, None), (5, 40, 4, None), (3, 2, 4, None), (1, 1, 4, None),
    (7, 9, .1, None), (256, 256, 4, 5), (3, 40, 4, 5), (1, 2, 4, 5),
])
def test_smoothing_of_tensors_is_that_of_arrays(height, width, sigma, taps):
    "Also of maps smaller than the kernel; the difference is one rounding of a single number at most."
    maps = np.random.default_rng(0).normal(size=(3, height, width)).astype(np.float32)
    want, got = smooth(maps, sigma, taps), smooth_tensors(torch.from_numpy(maps), sigma, taps).numpy()
    assert got.dtype == want.dtype and got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=2.4e-7*max(1, abs(want).max()))
    assert (got == want).mean() > .9


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    "Tensors on the CPU take the way of those on a GPU."
    for module in curves, metrics_module, protocols: monkeypatch.setattr(module, "on_gpu", torch.is_tensor)


@every_protocol
def test_maps_on_a_gpu_stay_there_and_give_the_same_numbers(protocol, as_on_a_gpu):
    maps, *rest = case()
    arrays, tensors = ProtocolEvaluator(protocol), ProtocolEvaluator(protocol)
    of_arrays, of_tensors = arrays.update(maps, *rest), tensors.update(torch.from_numpy(maps), *rest)
    for a, t in zip(of_arrays, of_tensors, strict=True):
        assert torch.is_tensor(t.maps) and t.maps.dtype == torch.float32
        assert isinstance(t.scores, np.ndarray) and t.scores.dtype == np.float64
        np.testing.assert_allclose(t.maps.numpy(), a.maps, rtol=0, atol=5e-7)
        np.testing.assert_allclose(t.scores, a.scores, rtol=0, atol=1e-6)
        # whatever scores they are given, the metrics are the same to the last bit
        same = [protocol.evaluator() for _ in range(2)]
        for evaluator, m in zip(same, (t.maps, t.maps.numpy())):
            evaluator.update(m, t.scores, t.masks, t.labels)
        assert repr(same[0].curves()) == repr(same[1].curves())
    want, got = arrays.result(), tensors.result()
    assert got.metrics == pytest.approx(want.metrics, abs=1e-4, nan_ok=True)
    assert got.per_kind.keys() == want.per_kind.keys()


def test_resized_is_bilinear_and_leaves_the_size_it_finds():
    maps = np.random.default_rng(0).normal(size=(2, 20, 30)).astype(np.float32)
    assert resized(maps, (20, 30)) is maps
    mirrored = torch.from_numpy(maps).flip(2)[:, None]
    for size in ((256, 256), (7, 31)):
        want = interpolate(mirrored, size, mode="bilinear")[:, 0].numpy()
        assert np.array_equal(resized(maps[:, :, ::-1], size), want)


@pytest.mark.parametrize("shape, top_pixels", [
    ((10, 10), 1), ((7, 7), 1), ((24, 19), 4), ((11, 18), 1), ((1, 1), 1),
])
def test_image_scores_by_loops_and_only_one_takes_the_detectors_own(shape, top_pixels):
    maps, own = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32), np.array([3., 1, 2])
    side = min(16, *shape)
    corners = [(i, j) for i in range(shape[0] - side + 1) for j in range(shape[1] - side + 1)]

    def top_mean(m): return np.mean(sorted(m.ravel(), reverse=True)[:top_pixels])   # a hundredth, never none
    def best_window(m): return max(m[i:i+side, j:j+side].astype(float).mean() for i, j in corners)

    references = {"max": np.max, "detector": np.max, "top1%": top_mean, "pool16": best_window}
    for name, reference in references.items():
        p = replace(exact, image_score=name)
        without_own = p.image_scores(maps)
        assert without_own == pytest.approx([reference(m) for m in maps], abs=1e-6), name
        assert np.array_equal(p.image_scores(maps, own), own if name == "detector" else without_own)


# Pixel rules

def blobs(seed, levels=None, n=5, size=24):
    "Maps, rounded to about so many levels, and masks; the last image is good."
    rng = np.random.default_rng(seed)
    masks = gaussian_filter(rng.normal(size=(n, size, size)), (0, 2, 2)) > .2
    masks[-1] = False
    maps = (gaussian_filter(rng.normal(size=masks.shape), (0, 1, 1)) + .4*masks).astype(np.float32)
    if levels: maps = np.round(maps*levels/4).astype(np.float32)
    return maps, masks


def counted(rule, maps, masks, limit=.3):
    evaluator = PIXEL_RULES[rule](fpr_limit=limit)
    evaluator.update(maps, maps.max((1, 2)), masks, masks.any((1, 2)))
    return evaluator.compute()


def overlap(found, masks):
    shares = []
    for i, mask in enumerate(masks):
        components, n = label(mask, np.ones((3, 3)))
        shares += [found[i][components == k].mean() for k in range(1, n + 1)]
    return np.mean(shares)


def area_up_to(x, y, limit):
    below = x <= limit
    return trapezoid(np.append(y[below], np.interp(limit, x, y)), np.append(x[below], limit))/limit


def linear(maps, masks, limit, grown=lambda found: found):
    low, high, points = float(maps.min()), float(maps.max()), []
    for j in range(200):
        found = maps > np.float32(low + j*(high - low)/200)     # thresholds are float32, as the maps are
        fpr = found[~masks].mean()
        if fpr < limit: points.append((fpr, overlap(grown(found), masks)))
    x, y = np.array(points[::-1]).T
    return {"AUPRO": trapezoid(y, x/x.max())}


def dilated(maps, masks, limit):
    def grown(found): return np.stack([binary_dilation(one, np.ones((5, 5))) for one in found])
    return linear(maps, masks, limit, grown)


def per_image(maps, masks, limit):
    images = [(m[None], mask[None]) for m, mask in zip(maps, masks) if mask.any()]
    return {"AUPRO": np.mean([linear(m, mask, limit)["AUPRO"] for m, mask in images])}


def quantiles(maps, masks, limit):
    normal, points = np.sort(maps[~masks]), [(1., 1.)]
    for rank in np.linspace(0, len(normal) - 1, 100).astype(int):
        fpr = (len(normal) - 1 - rank)/len(normal)
        points.append((fpr, overlap(maps > normal[rank], masks)))
    return {"AUPRO": area_up_to(*np.array(points[::-1]).T, limit)}


def fifty_bins(maps, masks, limit):
    low, high, points = float(maps.min()), float(maps.max()), []
    for edge in np.linspace(1, 0, 51):
        found = maps >= np.float32(low + edge*(high - low))
        precision = masks[found].mean() if found.any() else 1
        points.append((found[~masks].mean(), found[masks].mean(), precision, overlap(found, masks)))
    fpr, recall, precision, pro = np.array(points).T
    unit = (maps.astype(float) - low)/(high - low)
    f1 = [2*((unit > j/20) & masks).sum()/((unit > j/20).sum() + masks.sum()) for j in range(21)]
    whole_area = area_up_to(np.append(0, fpr), np.append(0, pro), limit)
    return {
        "P-AUROC": trapezoid(recall, fpr),
        "P-AP": trapezoid(precision, recall),
        "AUPRO": whole_area - fpr[0]*pro[0]/2/limit,
        "P-F1max": max(f1),
    }


REFERENCES = {
    "quantiles": quantiles,
    "linear": linear,
    "per image": per_image,
    "dilated": dilated,
    "50 bins": fifty_bins,
}


@pytest.mark.parametrize("levels, steep, limit", [
    (None, 0, .3), (None, 3, .3), (None, 0, 1.), (None, 1, .05), (20, 0, .3), (20, .5, 1.),
])
@pytest.mark.parametrize("rule", REFERENCES)
def test_pixel_rules_equal_the_slow_references(rule, levels, steep, limit):
    for seed in range(3):
        maps, masks = blobs(seed, levels)
        if steep: maps = np.exp(steep*maps).astype(np.float32)
        got, plain = counted(rule, maps, masks, limit), counted("exact", maps, masks, limit)
        want = REFERENCES[rule](maps, masks, limit)
        assert {k: got[k] for k in want} == pytest.approx(want, abs=1e-9)
        undefined_by_rule = [k for k in KEYS if k not in (*want, "mAD")]
        assert all(got[k] == plain[k] for k in undefined_by_rule)       # these stay exact


@pytest.mark.parametrize("rule", [r for r in PIXEL_RULES if r != "per image"])
def test_defects_below_every_normal_pixel_are_not_found(rule):
    maps, masks = np.arange(800, dtype=np.float32).reshape(2, 20, 20), np.zeros((2, 20, 20), bool)
    masks[0, 0, :9] = True
    assert counted(rule, maps, masks)["AUPRO"] == 0


def test_what_only_the_order_decides():
    maps, masks = blobs(0, size=32)
    steep_maps = np.exp(8*maps).astype(np.float32)
    aupro = {rule: counted(rule, maps, masks)["AUPRO"] for rule in PIXEL_RULES}
    steep = {rule: counted(rule, steep_maps, masks)["AUPRO"] for rule in PIXEL_RULES}
    for rule in ("exact", "quantiles"): assert steep[rule] == pytest.approx(aupro[rule], abs=1e-6)
    for rule in ("linear", "per image", "dilated", "50 bins"): assert steep[rule] < aupro[rule] - .1, rule
    assert aupro["dilated"] > aupro["linear"] + .05


ASK_PEERS = '''
import json, sys, warnings
warnings.simplefilter("ignore")
import adeval, numpy as np, torch
from anomalib.metrics.aupro import _AUPRO
def ask(maps, masks):
    aupro = _AUPRO(fpr_limit=.3)
    aupro.update(torch.from_numpy(maps), torch.from_numpy(masks).int())
    of_adeval = adeval.auroc_aupr_aupro(maps, masks.astype(np.uint8), nstrips=50)
    return [*map(float, of_adeval), float(aupro.compute())]
data = np.load(sys.argv[1])
print(json.dumps([ask(*pair) for pair in zip(data["maps"], data["masks"])]))
'''


def unit_range(maps):
    """From 0 to 1: there, adeval's float32 edges are those of our float64; elsewhere its last may lie beyond
    the highest score."""
    return ((maps - maps.min())/(maps.max() - maps.min())).astype(np.float32)


@pytest.mark.slow
def test_equals_adeval_and_anomalib(tmp_path):
    default = Path(__file__).resolve().parents[1]/".venv-peers"/"bin"/"python"
    python = Path(os.environ.get("MDD_BENCH_PEERS") or default)
    if not python.exists():
        pytest.skip(f"the peers are not there (`make peers`, or set MDD_BENCH_PEERS; looked for {python})")
    cases = []
    for seed in range(4):
        maps, masks = blobs(seed, size=48)
        cases += [(unit_range(m), masks) for m in (maps, np.exp(maps), np.exp(3*maps))]
    np.savez(tmp_path/"cases.npz", maps=[maps for maps, _ in cases], masks=[masks for _, masks in cases])
    command = [python, "-c", ASK_PEERS, tmp_path/"cases.npz"]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    if answer.returncode: pytest.skip(f"the peers at {python} do not run: {answer.stderr[-200:]}")
    for (maps, masks), want in zip(cases, json.loads(answer.stdout), strict=True):
        bins = counted("50 bins", maps, masks)
        assert [bins[k] for k in ("P-AUROC", "P-AP", "AUPRO")] == pytest.approx(want[:3], abs=1e-6)
        assert counted("exact", maps, masks)["AUPRO"] == pytest.approx(want[3], abs=1e-5)


# A class under a protocol

def case(size=40, seed=0):
    "Raw maps, own scores, masks at sizes of their own, labels, kinds."
    rng = np.random.default_rng(seed)
    kinds = ["hole", "good", "scratch", "good", "hole", "scratch", "good"]
    labels = np.array([kind != "good" for kind in kinds])
    masks = []
    for i, kind in enumerate(kinds):
        if kind == "good": masks.append(np.zeros((64, 70), bool))
        else: masks.append(gaussian_filter(rng.normal(size=(2*size + 7*i, 90)), 8) > .03)
    maps = rng.normal(size=(len(kinds), size, size)).astype(np.float32)
    return maps, rng.normal(size=len(kinds)), masks, labels, kinds


def taken(part, index):
    if part is None: return None
    return part[index] if isinstance(part, np.ndarray) else [part[i] for i in index]


def some(batch, index):
    "The images of a batch at these positions."
    return tuple(taken(part, index) for part in batch)


def assert_same(a, b):
    assert a.metrics == b.metrics
    assert a.per_kind == b.per_kind
    assert np.array_equal(a.scores, b.scores)


@every_protocol
def test_a_plain_case_gives_numbers_and_no_warning(protocol):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got, whole_curve = evaluate(protocol, *case()), evaluate(replace(protocol, fpr_limit=1), *case())
    assert whole_curve.metrics["AUPRO"] > got.metrics["AUPRO"]
    assert whole_curve.metrics["P-AUROC"] == got.metrics["P-AUROC"]
    assert tuple(got.metrics) == KEYS
    assert list(got.per_kind) == ["hole", "scratch"]
    assert got.scores.shape == (7,)
    for metrics in (got.metrics, *got.per_kind.values()):
        assert all(0 <= v <= 1 for v in metrics.values())
    assert PROTOCOLS[protocol.name] is protocol
    assert len(protocol.summary) > 20


@pytest.mark.parametrize("with_own", [True, False])
def test_exact_is_smoothing_masks_and_the_evaluator(with_own):
    maps, own, masks, labels, kinds = case()
    own_scores = own if with_own else None
    masks_or_none = [mask if anomalous else None for mask, anomalous in zip(masks, labels)]
    got = evaluate(exact, maps, own_scores, masks_or_none, labels, kinds)
    smoothed = np.stack([gaussian_filter(m, 4*40/256) for m in maps])
    scores = own if with_own else smoothed.max((1, 2))
    evaluator = Evaluator()
    evaluator.update(smoothed, scores, np.stack([exact.masks(mask, (40, 40)) for mask in masks]), labels)
    assert got.metrics == evaluator.compute()
    assert np.array_equal(got.scores, scores)
    # None and a mask of zeros are the same for a good image
    assert_same(got, evaluate(exact, maps, own_scores, masks, labels, kinds))


@every_protocol
@pytest.mark.parametrize("with_own", [True, False])
def test_each_kind_is_evaluated_beside_the_good_images(protocol, with_own):
    maps, own, masks, labels, kinds = case()
    batch = maps, own if with_own else None, masks, labels, kinds
    for kind, metrics in evaluate(protocol, *batch).per_kind.items():
        index = [i for i, other in enumerate(kinds) if other in ("good", kind)]
        assert metrics == evaluate(protocol, *some(batch, index)).metrics


protocols_and_modes = pytest.mark.parametrize(
    "protocol, mode",
    [*((p, "exact") for p in PROTOCOLS.values()), (exact, "streaming")],
    ids=[*PROTOCOLS, "exact, streaming"],
)


@protocols_and_modes
def test_batches_and_one_update_are_the_same(protocol, mode):
    batch, evaluator = case(), ProtocolEvaluator(protocol, mode)
    evaluator.update(*some(batch, [0]))
    evaluator.update(*some(batch, [1, 2, 3]))
    assert_same(evaluator.result(), evaluate(protocol, *some(batch, range(4)), mode=mode))
    evaluator.update(*some(batch, [4, 5, 6]))
    assert_same(evaluator.result(), evaluate(protocol, *batch, mode=mode))      # asking has changed nothing


@protocols_and_modes
def test_lists_and_tensors_and_arrays_are_the_same(protocol, mode):
    maps, own, masks, labels, kinds = batch = case()
    want = evaluate(protocol, *batch, mode=mode)
    assert_same(want, evaluate(protocol, maps, own.tolist(), masks, labels.tolist(), kinds, mode))
    tensors = [torch.from_numpy(x) for x in (maps, own, labels)]
    mask_tensors = [torch.from_numpy(mask) for mask in masks]
    assert_same(want, evaluate(protocol, tensors[0], tensors[1], mask_tensors, tensors[2], kinds, mode))


@every_protocol
def test_update_returns_what_was_counted(protocol):
    batch, evaluator, plain = case(), ProtocolEvaluator(protocol), protocol.evaluator()
    for index in ([0, 1, 2, 3], [4, 5, 6]):
        parts = evaluator.update(*some(batch, index))
        positions = np.concatenate([part.index for part in parts])
        assert sorted(positions) == list(range(len(index)))
        for part in parts:
            assert part.maps.dtype == np.float32 and part.scores.dtype == np.float64
            assert part.masks.dtype == part.labels.dtype == bool
            assert part.maps.shape == part.masks.shape == (len(part.index), *part.maps.shape[1:])
            plain.update(part.maps, part.scores, part.masks, part.labels)
        by_position = np.concatenate([part.scores for part in parts])[np.argsort(positions)]
        assert np.array_equal(by_position, evaluator.scores[-1])
    # the order of the images differs, and with it the order of sums
    assert plain.compute() == pytest.approx(evaluator.result().metrics, abs=1e-12)


def test_update_returns_one_part_for_each_size():
    maps, own, masks, labels, kinds = batch = case()
    same_size, = ProtocolEvaluator(exact).update(*batch)
    assert same_size.index.tolist() == list(range(7))
    assert np.array_equal(same_size.maps, exact.smooth(maps))
    assert np.array_equal(same_size.masks, np.stack([exact.masks(mask, (40, 40)) for mask in masks]))
    parts = ProtocolEvaluator(PROTOCOLS["mvtec_3d"]).update(*batch)
    assert [part.index.tolist() for part in parts] == [[0], [1, 3, 6], [2], [4], [5]]
    for part in parts:
        for i, mask in zip(part.index, part.masks): assert np.array_equal(mask, masks[i])
        assert np.array_equal(part.labels, labels[part.index])


def test_labels_of_the_mask_are_returned_where_the_protocol_takes_them():
    maps, own, masks, labels, kinds = case()
    masks[0] = np.zeros((2000, 2000), bool)
    masks[0][999, 999] = True
    for name, want in (("ader", False), ("rd4ad", False), ("simplenet", True)):
        part, = ProtocolEvaluator(PROTOCOLS[name]).update(maps, own, masks, labels, kinds)
        assert part.labels[0] == want and not part.masks[0].any()
        assert part.labels[1:].tolist() == labels[1:].tolist()


@every_protocol
def test_labels_come_from_the_folder_unless_the_protocol_takes_the_mask(protocol):
    maps, own, masks, labels, kinds = case()
    masks[0] = np.zeros((2000, 2000), bool)
    masks[0][999, 999] = True                                       # vanishes when it is shrunk
    maps[0] += 9
    own[0] = 9
    got = evaluate(protocol, maps, own, masks, labels, kinds)
    labels_of_masks = labels & (np.arange(7) > 0)
    by_folder, by_mask = (roc_auc_score(truth, got.scores) for truth in (labels, labels_of_masks))
    assert by_folder > by_mask
    want = by_mask if protocol.name in ("ader", "rd4ad") else by_folder
    assert got.metrics["I-AUROC"] == pytest.approx(want, abs=1e-12)


def test_mvtec_3d_compares_at_the_size_of_each_image():
    p, (maps, own, masks, labels, kinds) = PROTOCOLS["mvtec_3d"], case()
    assert len({mask.shape for mask in masks}) == 5
    large_maps = []
    for m, mask in zip(maps, masks):
        large = interpolate(torch.from_numpy(m)[None, None], mask.shape, mode="bilinear")
        large_maps.append(large[0, 0].numpy())
    got = evaluate(p, maps, own, masks, labels, kinds)
    assert np.array_equal(got.scores, [m.max() for m in large_maps])       # in the order of the images
    truth, pixels = (np.concatenate([x.ravel() for x in images]) for images in (masks, large_maps))
    assert got.metrics["P-AUROC"] == pytest.approx(roc_auc_score(truth, pixels), abs=1e-9)
    message = "mvtec_3d compares at the size of the image: give good images a mask of zeros"
    with pytest.raises(ValueError, match=message):
        evaluate(p, maps, own, [masks[0], None, *masks[2:]], labels, kinds)


@every_protocol
def test_no_good_and_no_anomalous_image_are_nan_and_a_warning_says_so(protocol):
    batch = case()
    labels = batch[3]
    with pytest.warns(UndefinedMetric, match="no normal image"):
        metrics = evaluate(protocol, *some(batch, np.flatnonzero(labels))).metrics
    assert {k for k, v in metrics.items() if np.isnan(v)} == {"I-AUROC", "mAD", "I-FPR95", "P-FPR95-good"}
    with pytest.warns(UndefinedMetric, match="no anomalous image"):
        got = evaluate(protocol, *some(batch, np.flatnonzero(~labels)))
    assert np.isnan(list(got.metrics.values())).all()
    assert got.per_kind == {}


ODD = {
    "constant maps": lambda maps, masks: (0*maps + 3, masks),
    "maps of one pixel": lambda maps, masks: (maps[:, :1, :1], masks),
    "one pixel": lambda maps, masks: (maps[:, :1, :1], [m[:1, :1] | m.any() for m in masks]),
    "no defect left": lambda maps, masks: (maps, [0*m for m in masks]),
    "nothing normal on anomalous images": lambda maps, masks: (maps, [m | m.any() for m in masks]),
}


@every_protocol
@pytest.mark.parametrize("change", ODD.values(), ids=ODD)
def test_odd_cases_give_shares_or_warn(protocol, change):
    maps, own, masks, labels, kinds = case()
    maps, masks = change(maps, masks)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = evaluate(protocol, maps, own, masks, labels, kinds)
    numbers = np.array([list(metrics.values()) for metrics in (got.metrics, *got.per_kind.values())])
    assert {w.category for w in caught} == ({UndefinedMetric} if np.isnan(numbers).any() else set())
    assert ((0 <= numbers) & (numbers <= 1) | np.isnan(numbers)).all()


# Bad input

NAMES = ("maps", "own_scores", "masks", "labels", "kinds")


def with_item(items, i, item): return [*items[:i], item, *items[i+1:]]


@every_protocol
@pytest.mark.parametrize("name, change, error, message", [
    ("masks", lambda x: with_item(x, 2, None), DataError, "image 2 is anomalous and has no mask"),
    ("masks", lambda x: x[1:], ValueError, "7, 6, 7, 7 images"),
    ("kinds", lambda x: x[1:], ValueError, "7, 7, 7, 6 images"),
    ("own_scores", lambda x: x[1:], ValueError, r"own_scores: shape \(6,\) for 7 maps"),
    ("maps", lambda x: x[0], ValueError, "maps: shape"),
    ("maps", lambda x: x*np.nan, ValueError, "maps: .*nan"),
    ("labels", lambda x: x*2, ValueError, "labels: .* 2"),
    ("masks", lambda x: with_item(x, 0, np.stack([x[0]]*3, 2)), ValueError,
     r"mask: shape \(80, 90, 3\), expected \[H, W\]"),
    ("masks", lambda x: with_item(x, 5, x[5]*255), ValueError, "mask: .* 255"),
    ("kinds", lambda x: with_item(x, 0, "good"), ValueError, "kinds: image 0 is 'good'"),
])
def test_bad_input_is_named_and_not_kept(protocol, name, change, error, message):
    batch = dict(zip(NAMES, case()))
    evaluator = ProtocolEvaluator(protocol)
    with pytest.raises(error, match=message): evaluator.update(**batch | {name: change(batch[name])})
    assert not evaluator.by_kind.evaluators and not evaluator.scores


def test_a_wrong_number_of_known_masks_is_named():
    maps, own, masks, labels, kinds = case()
    with pytest.raises(ValueError, match="maps, masks, labels, kinds, located: 7, 7, 7, 7, 6 images"):
        raw_batch(maps, own, masks, labels, kinds, [True]*6)


def test_bad_own_scores_and_mode():
    maps, own, masks, labels, kinds = case()
    with pytest.raises(ValueError, match="own_scores: .*nan"):
        evaluate(exact, maps, own*np.nan, masks, labels, kinds)
    with pytest.raises(ValueError, match="mode: 'stream'"):
        evaluate(exact, maps, own, masks, labels, kinds, mode="stream")
