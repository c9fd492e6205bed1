"Protocols: mask rules, smoothing and image scores by brute force, pixel rules against slow and obvious references and against the peers' own code, kinds, batches, labels, and bad input."
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
from mdd_bench.evaluation.metrics import KEYS, Evaluator, UndefinedMetric
from mdd_bench.evaluation.protocols import MASK_RULES, PIXEL_RULES, PROTOCOLS, ProtocolEvaluator, Protocol, evaluate, fitted, get_protocol, smooth

exact = get_protocol("exact")
every_protocol = pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)


def test_exact_is_what_it_says():
    assert PROTOCOLS["exact"] is exact
    assert replace(exact, summary="") == Protocol("exact", "", size=None, sigma=4, image_score="detector", mask_rule="at_least_half", labels="folder", pixels="exact", fpr_limit=.3)
    with pytest.raises(FrozenInstanceError): exact.sigma = 2


def test_unknown_names_are_refused():
    with pytest.raises(SpecError, match="unknown protocol 'exakt'. Did you mean 'exact'"): get_protocol("exakt")
    with pytest.raises(SpecError, match="unknown mask rule 'above half'. Did you mean 'above_half'"): Protocol("x", "", mask_rule="above half")
    with pytest.raises(SpecError, match="unknown image score 'mean'.*detector, max"): Protocol("x", "", image_score="mean")
    with pytest.raises(SpecError, match="unknown pixel rule '200 bins'. Did you mean '50 bins'"): Protocol("x", "", pixels="200 bins")
    with pytest.raises(SpecError, match="unknown source of labels 'masks'. Did you mean 'mask'"): Protocol("x", "", labels="masks")


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_half_rule_by_brute_force(seed, h0, w0, h, w):
    mask = np.random.default_rng(seed).random((h0, w0)) < .5
    fine = mask.repeat(h, 0).repeat(w, 1)                         # every border of either grid lies on this one
    covered = fine.reshape(h, h0, w, w0).sum((1, 3))
    assert (exact.masks(mask, (h, w)) == (2*covered >= h0*w0)).all()


def test_exactly_half():
    for f, count in [(f, count) for f in (2, 3, 6, 7, 10) for count in range(f*f + 1)]:
        block = np.random.default_rng(count).permutation(np.arange(f*f) < count).reshape(f, f)
        assert exact.masks(block, (1, 1))[0, 0] == (count >= f*f/2)


def test_masks_of_any_size_and_no_other_values():
    mask = np.array([[1, 0, 0], [0, 1, 1]], bool)
    assert (exact.masks(mask, (8, 6)) == mask.repeat(4, 0).repeat(2, 1)).all()
    for rule in MASK_RULES:
        p = replace(exact, mask_rule=rule)
        assert (p.masks(mask, (2, 3)) == mask).all() and p.masks(mask, (8, 6)).dtype == bool
        assert p.masks(np.ones((700, 900), bool), (256, 224)).all() and not p.masks(np.zeros((700, 900), bool), (256, 224)).any()
        assert p.masks(np.array([[1, 0]]), (1, 2)).tolist() == [[True, False]]
        with pytest.raises(ValueError, match="mask: .* 255"): p.masks(np.array([[0, 255]]), (1, 2))


def test_mask_keeps_its_place_at_an_odd_factor():
    mask = np.zeros((1000, 900), bool)
    mask[250:500, 300:600] = True
    small = exact.masks(mask, (256, 224))
    assert small[64:128, 75:149].all() and small.sum() == 64*74         # rows exactly; columns 74.67 to 149.33: the first is a third in


@pytest.mark.parametrize("radius, want", [(2, (8, 0, 0)), (4, (13, 3, 0)), (8, (30, 13, 3)), (16, (81, 52, 28)), (40, (382, 314, 253))])
def test_mask_rules_as_measured_with_released_code(radius, want):
    yy, xx = np.mgrid[:1024, :1024]                               # 8 bits matter: resized as float32, radius 4 gives 15, 3, 0 and radius 40 gives 390, 312, 246
    disc = (yy - 510.5)**2 + (xx - 510.5)**2 <= radius**2
    assert tuple(MASK_RULES[rule](disc, (256, 256)).sum() for rule in ("touched", "above_half", "wholly")) == want


def deviation(m):
    d = np.arange(len(m)) - len(m)//2
    p = m.sum(1)/m.sum()
    return np.sqrt(p @ d**2 - (p @ d)**2)


@pytest.mark.parametrize("name, size, want", [("exact", 128, 2), ("exact", 256, 4), ("exact", 512, 8), ("ader", 256, 4), ("rd4ad", 256, 4), ("simplenet", 288, 4), ("dinomaly", 256, 1.38), ("mvtec_official", 300, 0)])
def test_width_of_the_smoothing(name, size, want):
    maps = np.zeros((2, size + 9, size), np.float32)                    # the shorter side decides
    maps[0, size//2 + 4, size//2] = 1
    out = PROTOCOLS[name].smooth(maps)
    assert out.dtype == np.float32 and out[1].max() == 0 and out[0].sum() == pytest.approx(1, abs=1e-4)
    assert deviation(out[0]) == pytest.approx(want, rel=.01) and deviation(out[0].T) == pytest.approx(want, rel=.01)


def test_smoothing_is_per_image_and_mirrored():
    maps = np.random.default_rng(0).normal(size=(3, 20, 30)).astype(np.float32)
    for one, m in zip(smooth(maps, 2), maps): assert np.array_equal(one, smooth(m[None], 2)[0]) and np.array_equal(one, gaussian_filter(m, 2))
    assert np.allclose(smooth(np.full((1, 20, 30), 3.), 5), 3)
    assert np.array_equal(smooth(maps, 0), maps)
    assert np.array_equal(smooth(torch.from_numpy(maps).requires_grad_(), 2), smooth(maps, 2))
    k = gaussian_filter(np.eye(1, 9, 4)[0], 4, mode="constant", radius=2)
    assert np.allclose(smooth(np.ones((1, 9, 9)), 4, taps=5)[0, 4], np.convolve(np.ones(9), k, "same"))      # few taps: zeros around
    with pytest.raises(ValueError, match="maps: .*nan"): smooth(maps*np.nan, 2)


def test_fitted_is_bilinear_and_leaves_the_size_it_finds():
    maps = np.random.default_rng(0).normal(size=(2, 20, 30)).astype(np.float32)
    assert fitted(maps, (20, 30)) is maps
    for size in ((256, 256), (7, 31)): assert np.array_equal(fitted(maps[:, :, ::-1], size), interpolate(torch.from_numpy(maps).flip(2)[:, None], size, mode="bilinear")[:, 0].numpy())


@pytest.mark.parametrize("shape", [(10, 10), (7, 7), (24, 19), (11, 18), (1, 1)])
def test_image_scores_by_loops_and_only_one_takes_the_detectors_own(shape):
    maps = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)
    side = min(16, *shape)
    windows = lambda m: [m[i:i+side, j:j+side].astype(float).mean() for i in range(shape[0] - side + 1) for j in range(shape[1] - side + 1)]
    top = lambda m: np.mean(sorted(m.ravel(), reverse=True)[:4 if shape == (24, 19) else 1])     # of 456 pixels four, of 198 one, never none
    for name, rule in {"max": np.max, "detector": np.max, "top1%": top, "pool16": lambda m: max(windows(m))}.items():
        p, own = replace(exact, image_score=name), np.array([3., 1, 2])
        assert p.image_scores(maps) == pytest.approx([rule(m) for m in maps], abs=1e-6), name
        assert np.array_equal(p.image_scores(maps, own), own if name == "detector" else p.image_scores(maps))


def blobs(seed, levels=None, n=5, size=24):
    "Maps, rounded to about so many levels, and masks; the last image is good."
    rng = np.random.default_rng(seed)
    masks = gaussian_filter(rng.normal(size=(n, size, size)), (0, 2, 2)) > .2
    masks[-1] = False
    maps = (gaussian_filter(rng.normal(size=masks.shape), (0, 1, 1)) + .4*masks).astype(np.float32)
    return np.round(maps*levels/4).astype(np.float32) if levels else maps, masks

def counted(rule, maps, masks, limit=.3):
    e = PIXEL_RULES[rule](fpr_limit=limit)
    e.update(maps, maps.max((1, 2)), masks, masks.any((1, 2)))
    return e.compute()

def overlap(found, masks):
    return np.mean([found[i][c == k].mean() for i, m in enumerate(masks) for c, n in [label(m, np.ones((3, 3)))] for k in range(1, n + 1)])

def up_to(x, y, limit):
    keep = x <= limit
    return trapezoid(np.append(y[keep], np.interp(limit, x, y)), np.append(x[keep], limit))/limit

def linear(maps, masks, limit, grown=lambda found: found):
    low, high, points = float(maps.min()), float(maps.max()), []
    for j in range(200):
        found = maps > np.float32(low + j*(high - low)/200)                             # thresholds are float32, as the maps are
        if found[~masks].mean() < limit: points.append((found[~masks].mean(), overlap(grown(found), masks)))
    x, y = np.array(points[::-1]).T
    return {"AUPRO": trapezoid(y, x/x.max())}

def dilated(maps, masks, limit): return linear(maps, masks, limit, lambda found: np.stack([binary_dilation(f, np.ones((5, 5))) for f in found]))

def per_image(maps, masks, limit): return {"AUPRO": np.mean([linear(m[None], mask[None], limit)["AUPRO"] for m, mask in zip(maps, masks) if mask.any()])}

def quantiles(maps, masks, limit):
    normal, points = np.sort(maps[~masks]), [(1., 1.)]
    for at in np.linspace(0, len(normal) - 1, 100).astype(int): points.append(((len(normal) - 1 - at)/len(normal), overlap(maps > normal[at], masks)))
    return {"AUPRO": up_to(*np.array(points[::-1]).T, limit)}

def bins50(maps, masks, limit):
    low, high, points = float(maps.min()), float(maps.max()), []
    for edge in np.linspace(1, 0, 51):
        found = maps >= np.float32(low + edge*(high - low))
        points.append((found[~masks].mean(), found[masks].mean(), masks[found].mean() if found.any() else 1, overlap(found, masks)))
    fpr, recall, precision, pro = np.array(points).T
    unit, f1 = (maps.astype(float) - low)/(high - low), lambda found: 2*(found & masks).sum()/(found.sum() + masks.sum())
    return {"P-AUROC": trapezoid(recall, fpr), "P-AP": trapezoid(precision, recall), "AUPRO": up_to(np.append(0, fpr), np.append(0, pro), limit) - fpr[0]*pro[0]/2/limit, "P-F1max": max(f1(unit > j/20) for j in range(21))}

REFERENCES = {"quantiles": quantiles, "linear": linear, "per image": per_image, "dilated": dilated, "50 bins": bins50}


@pytest.mark.parametrize("levels, steep, limit", [(None, 0, .3), (None, 3, .3), (None, 0, 1.), (None, 1, .05), (20, 0, .3), (20, .5, 1.)])
@pytest.mark.parametrize("rule", REFERENCES)
def test_pixel_rules_equal_the_slow_references(rule, levels, steep, limit):
    for seed in range(3):
        maps, masks = blobs(seed, levels)
        if steep: maps = np.exp(steep*maps).astype(np.float32)
        got, want, plain = counted(rule, maps, masks, limit), REFERENCES[rule](maps, masks, limit), counted("exact", maps, masks, limit)
        assert {k: got[k] for k in want} == pytest.approx(want, abs=1e-9)
        assert all(got[k] == plain[k] for k in KEYS if k not in (*want, "mAD"))                 # what a habit does not define stays exact


@pytest.mark.parametrize("rule", [r for r in PIXEL_RULES if r != "per image"])
def test_defects_below_every_normal_pixel_are_not_found(rule):
    maps, masks = np.arange(800, dtype=np.float32).reshape(2, 20, 20), np.zeros((2, 20, 20), bool)
    masks[0, 0, :9] = True
    assert counted(rule, maps, masks)["AUPRO"] == 0


def test_what_only_the_order_decides():
    maps, masks = blobs(0, size=32)
    a, b = ({r: counted(r, m, masks)["AUPRO"] for r in PIXEL_RULES} for m in (maps, np.exp(8*maps).astype(np.float32)))
    for rule in ("exact", "quantiles"): assert b[rule] == pytest.approx(a[rule], abs=1e-6)
    for rule in ("linear", "per image", "dilated", "50 bins"): assert b[rule] < a[rule] - .1, rule
    assert a["dilated"] > a["linear"] + .05


ASK_PEERS = '''
import json, sys, warnings
warnings.simplefilter("ignore")
import adeval, numpy as np, torch
from anomalib.metrics.aupro import _AUPRO
def ask(maps, masks):
    aupro = _AUPRO(fpr_limit=.3)
    aupro.update(torch.from_numpy(maps), torch.from_numpy(masks).int())
    return [*map(float, adeval.auroc_aupr_aupro(maps, masks.astype(np.uint8), nstrips=50)), float(aupro.compute())]
data = np.load(sys.argv[1])
print(json.dumps([ask(*pair) for pair in zip(data["maps"], data["masks"])]))
'''


@pytest.mark.slow
def test_equals_adeval_and_anomalib(tmp_path):
    python = Path(os.environ.get("MDD_BENCH_PEERS") or Path(__file__).resolve().parents[1]/".venv-peers"/"bin"/"python")
    if not python.exists(): pytest.skip(f"the peers are not there (`make peers`, or set MDD_BENCH_PEERS; looked for {python})")
    unit = lambda m: ((m - m.min())/(m.max() - m.min())).astype(np.float32)     # from 0 to 1 adeval's float32 edges are those of our float64; elsewhere its last may lie beyond the highest score
    cases = [(unit(m), masks) for seed in range(4) for maps, masks in [blobs(seed, size=48)] for m in (maps, np.exp(maps), np.exp(3*maps))]
    np.savez(tmp_path/"cases.npz", maps=[m for m, _ in cases], masks=[m for _, m in cases])
    said = subprocess.run([python, "-c", ASK_PEERS, tmp_path/"cases.npz"], capture_output=True, text=True, cwd=tmp_path)
    if said.returncode: pytest.skip(f"the peers at {python} do not run: {said.stderr[-200:]}")
    for (maps, masks), want in zip(cases, json.loads(said.stdout), strict=True):
        bins = counted("50 bins", maps, masks)
        assert [bins[k] for k in ("P-AUROC", "P-AP", "AUPRO")] == pytest.approx(want[:3], abs=1e-6)
        assert counted("exact", maps, masks)["AUPRO"] == pytest.approx(want[3], abs=1e-5)


def case(size=40, seed=0):
    rng = np.random.default_rng(seed)
    kinds = ["hole", "good", "scratch", "good", "hole", "scratch", "good"]
    labels = np.array([k != "good" for k in kinds])
    masks = [np.zeros((64, 70), bool) if k == "good" else gaussian_filter(rng.normal(size=(2*size + 7*i, 90)), 8) > .03 for i, k in enumerate(kinds)]
    return rng.normal(size=(len(kinds), size, size)).astype(np.float32), rng.normal(size=len(kinds)), masks, labels, kinds

def some(batch, pick): return tuple(x if x is None else x[pick] if isinstance(x, np.ndarray) else [x[i] for i in pick] for x in batch)

def same(a, b):
    assert a["metrics"] == b["metrics"] and a["per_kind"] == b["per_kind"] and np.array_equal(a["scores"], b["scores"])


@every_protocol
def test_a_plain_case_gives_numbers_and_no_warning(protocol):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got, further = evaluate(protocol, *case()), evaluate(replace(protocol, fpr_limit=1), *case())
    assert further["metrics"]["AUPRO"] > got["metrics"]["AUPRO"] and further["metrics"]["P-AUROC"] == got["metrics"]["P-AUROC"]
    assert tuple(got["metrics"]) == KEYS and list(got["per_kind"]) == ["hole", "scratch"] and got["scores"].shape == (7,)
    assert all(0 <= v <= 1 for m in (got["metrics"], *got["per_kind"].values()) for v in m.values())
    assert PROTOCOLS[protocol.name] is protocol and len(protocol.summary) > 20


@pytest.mark.parametrize("with_own", [True, False])
def test_exact_is_smoothing_masks_and_the_evaluator(with_own):
    maps, own, masks, labels, kinds = case()
    got = evaluate(exact, maps, own if with_own else None, [m if l else None for m, l in zip(masks, labels)], labels, kinds)
    m = np.stack([gaussian_filter(x, 4*40/256) for x in maps])
    e, scores = Evaluator(), own if with_own else m.max((1, 2))
    e.update(m, scores, np.stack([exact.masks(x, (40, 40)) for x in masks]), labels)
    assert got["metrics"] == e.compute() and np.array_equal(got["scores"], scores)
    same(got, evaluate(exact, maps, own if with_own else None, masks, labels, kinds))           # None and a mask of zeros are the same for a good image


@every_protocol
@pytest.mark.parametrize("with_own", [True, False])
def test_each_kind_is_judged_beside_the_good_images(protocol, with_own):
    maps, own, *rest = batch = case()
    batch = (maps, own if with_own else None, *rest)
    for kind, metrics in evaluate(protocol, *batch)["per_kind"].items():
        assert metrics == evaluate(protocol, *some(batch, [i for i, k in enumerate(batch[4]) if k in ("good", kind)]))["metrics"]


@pytest.mark.parametrize("protocol, mode", [*((p, "exact") for p in PROTOCOLS.values()), (exact, "streaming")], ids=[*PROTOCOLS, "exact, streaming"])
def test_batches_lists_tensors_and_one_update_are_the_same(protocol, mode):
    batch, judge = case(), ProtocolEvaluator(protocol, mode)
    for pick in ([0], [1, 2, 3], [4, 5, 6]):
        judge.update(*some(batch, pick))
        if pick == [1, 2, 3]: same(judge.result(), evaluate(protocol, *some(batch, range(4)), mode=mode))     # asking changes nothing
    same(judge.result(), evaluate(protocol, *batch, mode=mode))
    maps, own, masks, labels, kinds = batch
    same(judge.result(), evaluate(protocol, maps, own.tolist(), masks, labels.tolist(), kinds, mode))
    same(judge.result(), evaluate(protocol, torch.from_numpy(maps), torch.from_numpy(own), [*map(torch.from_numpy, masks)], torch.from_numpy(labels), kinds, mode))


@every_protocol
def test_labels_come_from_the_folder_unless_the_protocol_takes_the_mask(protocol):
    maps, own, masks, labels, kinds = case()
    masks[0] = np.zeros((2000, 2000), bool)
    masks[0][999, 999] = True                                                                   # vanishes when it is shrunk
    maps[0] += 9; own[0] = 9
    got = evaluate(protocol, maps, own, masks, labels, kinds)
    folder, mask = (roc_auc_score(truth, got["scores"]) for truth in (labels, labels & (np.arange(7) > 0)))
    assert folder > mask and got["metrics"]["I-AUROC"] == pytest.approx(mask if protocol.name == "ader" else folder, abs=1e-12)


def test_mvtec_official_compares_at_the_size_of_each_image():
    p, (maps, own, masks, labels, kinds) = PROTOCOLS["mvtec_official"], case()
    assert len({m.shape for m in masks}) == 5
    large = [interpolate(torch.from_numpy(x)[None, None], m.shape, mode="bilinear")[0, 0].numpy() for x, m in zip(maps, masks)]
    got = evaluate(p, maps, own, masks, labels, kinds)
    assert np.array_equal(got["scores"], [x.max() for x in large])                             # in the order of the images
    assert got["metrics"]["P-AUROC"] == pytest.approx(roc_auc_score(np.concatenate([m.ravel() for m in masks]), np.concatenate([x.ravel() for x in large])), abs=1e-9)
    with pytest.raises(ValueError, match="mvtec_official compares at the size of the image: give good images a mask of zeros"): evaluate(p, maps, own, [masks[0], None, *masks[2:]], labels, kinds)


@every_protocol
def test_no_good_and_no_anomalous_image_are_nan_and_said(protocol):
    batch = case()
    with pytest.warns(UndefinedMetric, match="no normal image"): got = evaluate(protocol, *some(batch, np.flatnonzero(batch[3])))["metrics"]
    assert {k for k, v in got.items() if np.isnan(v)} == {"I-AUROC", "mAD", "I-FPR95", "P-FPR95-good"}
    with pytest.warns(UndefinedMetric, match="no anomalous image"): got = evaluate(protocol, *some(batch, np.flatnonzero(~batch[3])))
    assert np.isnan(list(got["metrics"].values())).all() and got["per_kind"] == {}


ODD = {
    "constant maps": lambda maps, masks: (0*maps + 3, masks), "maps of one pixel": lambda maps, masks: (maps[:, :1, :1], masks),
    "one pixel": lambda maps, masks: (maps[:, :1, :1], [m[:1, :1] | m.any() for m in masks]),
    "no defect left": lambda maps, masks: (maps, [0*m for m in masks]), "nothing normal on anomalous images": lambda maps, masks: (maps, [m | m.any() for m in masks])}


@every_protocol
@pytest.mark.parametrize("change", ODD.values(), ids=ODD)
def test_odd_cases_give_shares_or_say_why_not(protocol, change):
    maps, own, masks, labels, kinds = case()
    maps, masks = change(maps, masks)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        got = evaluate(protocol, maps, own, masks, labels, kinds)
    numbers = np.array([list(m.values()) for m in (got["metrics"], *got["per_kind"].values())])
    assert {w.category for w in said} == ({UndefinedMetric} if np.isnan(numbers).any() else set())
    assert ((0 <= numbers) & (numbers <= 1) | np.isnan(numbers)).all()


def test_bad_input_is_named():
    maps, own, masks, labels, kinds = case()
    for p in PROTOCOLS.values():
        with pytest.raises(DataError, match="image 2 is anomalous and has no mask"): evaluate(p, maps, own, [*masks[:2], None, *masks[3:]], labels, kinds)
        with pytest.raises(ValueError, match="7, 6, 7, 7 images"): evaluate(p, maps, own, masks[1:], labels, kinds)
        with pytest.raises(ValueError, match="7, 7, 7, 6 images"): evaluate(p, maps, own, masks, labels, kinds[1:])
        with pytest.raises(ValueError, match=r"own_scores: shape \(6,\) for 7 maps"): evaluate(p, maps, own[1:], masks, labels, kinds)
        with pytest.raises(ValueError, match="maps: shape"): evaluate(p, maps[0], own, masks, labels, kinds)
        with pytest.raises(ValueError, match="maps: .*nan"): evaluate(p, maps*np.nan, own, masks, labels, kinds)
        with pytest.raises(ValueError, match="labels: .* 2"): evaluate(p, maps, own, masks, labels*2, kinds)
        with pytest.raises(ValueError, match=r"mask: shape \(80, 90, 3\), expected \[H, W\]"): evaluate(p, maps, own, [np.stack([masks[0]]*3, 2), *masks[1:]], labels, kinds)
        judge = ProtocolEvaluator(p)
        with pytest.raises(ValueError, match="mask: .* 255"): judge.update(maps, own, [*masks[:5], masks[5]*255, masks[6]], labels, kinds)
        assert not judge.kinds and not judge.scores                     # nothing is kept
        with pytest.raises(ValueError, match="kinds: image 0 is 'good'"): evaluate(p, maps, own, masks, labels, ["good", *kinds[1:]])
    with pytest.raises(ValueError, match="own_scores: .*nan"): evaluate(exact, maps, own*np.nan, masks, labels, kinds)
    with pytest.raises(ValueError, match="mode: 'stream'"): evaluate(exact, maps, own, masks, labels, kinds, mode="stream")
