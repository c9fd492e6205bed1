"Replicates beside the evaluator: counted instead of kept, ties, missing defects, batches, and the file."
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.ndimage import gaussian_filter

from mdd_bench.errors import DataError
from mdd_bench.evaluation import curves, metrics, replicates as replicates_module
from mdd_bench.evaluation.metrics import KEYS, METRICS, Evaluator
from mdd_bench.evaluation.replicates import (STEP, Replicates, read_replicates, resample_counts,
                                             write_replicates)

pytestmark = pytest.mark.filterwarnings("ignore::mdd_bench.evaluation.metrics.UndefinedMetric")
SCORES = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "few": lambda rng, shape: rng.integers(-2, 3, shape)*.25,
    "constant": lambda rng, shape: np.full(shape, -.7),
    "float16": lambda rng, shape: rng.normal(size=shape).astype(np.float16),
    "zeros": lambda rng, shape: rng.choice([0., -0., 1e-45, -1e-45, 1, -1], shape),
    "wide": lambda rng, shape: rng.choice([-1, 1], shape)*10**rng.uniform(-30, 30, shape),
}


def drawn(rng, scores, n=8, size=12):
    "A batch in which a label may miss a mask, or a mask a label."
    shape = n, size, size
    labels = np.arange(n) % 2 == 0
    masks = (gaussian_filter(rng.normal(size=shape), (0, 2, 2)) > .15) & labels[:, None, None]
    maps = SCORES[scores](rng, shape).astype(np.float32)
    labels = np.where(rng.random(n) < .2, ~labels, labels)
    return maps, rng.integers(0, 4, n), masks, labels


def ordinary(n=40, size=64, signal=3., seed=0):
    "Smooth maps that see most of the defects on the first half of the images."
    rng = np.random.default_rng(seed)
    blob = gaussian_filter(rng.normal(size=(n, size, size)), (0, size/16, size/16))
    labels = np.arange(n) < n//2
    masks = (blob > 2*blob.std()) & labels[:, None, None]
    noise = gaussian_filter(rng.normal(size=masks.shape), (0, 2, 2))
    maps = noise/noise.std() + signal*gaussian_filter(masks.astype(float), (0, 1, 1))
    return maps.astype(np.float32), maps.max((1, 2)), masks, labels


def replicates_of(*batches, **options):
    replicates = Replicates(**options)
    for batch in batches: replicates.update(*batch)
    return replicates


def evaluated(batch, drawn):
    "The metrics of the repeated images."
    i = np.repeat(np.arange(len(drawn)), drawn)
    evaluator = Evaluator()
    evaluator.update(*(x[i] for x in batch))
    return evaluator.compute()


def paths_of(n): return [f"cap/test/{i:03}.png" for i in range(n)]


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**32), st.sampled_from(list(SCORES)))
def test_small_images_are_exact(seed, scores):
    "Nothing is approximated where there are no more distinct scores than thresholds."
    rng = np.random.default_rng(seed)
    batch = drawn(rng, scores)
    counts = np.vstack([np.ones(8, int), rng.integers(0, 3, (4, 8))])
    counts[counts.sum(1) == 0] = 1
    got = replicates_of(batch, thresholds=4096).compute(counts)
    assert tuple(got) == KEYS and all(v.dtype == np.float32 and v.shape == (5,) for v in got.values())
    for row, c in enumerate(counts):
        for k, want in evaluated(batch, c).items():
            assert got[k][row] == pytest.approx(want, abs=1e-6, nan_ok=True), (k, scores)


@pytest.mark.parametrize("signal", [.2, 1, 3, 6])
def test_close_on_ordinary_maps(signal):
    batch = ordinary(signal=signal)
    counts = np.vstack([np.ones(40, int), resample_counts(paths_of(40), batch[3], 5)])
    got = replicates_of(batch).compute(counts)
    for row, c in enumerate(counts):
        error = {k: abs(float(got[k][row]) - want) for k, want in evaluated(batch, c).items()}
        assert max(v for k, v in error.items() if k.startswith("I")) < 1e-6
        assert max(error[k] for k in METRICS) < .002 and max(error.values()) < .005, error


@pytest.mark.parametrize("change", [lambda m: np.exp(5*m), lambda m: m**3, lambda m: 100*m - 7])
def test_order_alone_counts(change):
    maps, scores, masks, labels = ordinary(signal=2.)
    maps = maps.astype(np.float16).astype(np.float32)        # apart enough to stay in order
    counts = resample_counts(paths_of(40), labels, 10)
    want = replicates_of((maps, scores, masks, labels)).compute(counts)
    changed = change(maps.astype(float)).astype(np.float32)
    assert len(np.unique(changed)) == len(np.unique(maps))
    got = replicates_of((changed, scores, masks, labels)).compute(counts)
    for k in KEYS: np.testing.assert_array_equal(got[k], want[k])


def test_batches_and_computing_twice_change_nothing():
    batch = ordinary()
    counts = resample_counts(paths_of(40), batch[3], 10)
    whole = replicates_of(batch)
    want = whole.compute(counts)
    pieces = [tuple(x[i:i + 7] for x in batch) for i in range(0, 40, 7)]
    tensors = [tuple(torch.from_numpy(x) for x in piece) for piece in pieces]
    others = replicates_of(*pieces), replicates_of(*tensors)
    for got in whole.compute(counts), *(r.compute(counts) for r in others):
        for k in KEYS: np.testing.assert_array_equal(got[k], want[k])


@pytest.mark.parametrize("scores", SCORES)
def test_maps_on_a_gpu_count_as_arrays(scores, monkeypatch):
    "On the CPU, with tensors that take the way of those on a GPU."
    maps, *rest = drawn(np.random.default_rng(0), scores)
    counts = resample_counts(paths_of(8), rest[-1], 20)
    want = replicates_of((maps, *rest)).compute(counts)
    for module in curves, metrics, replicates_module: monkeypatch.setattr(module, "on_gpu", torch.is_tensor)
    replicates = replicates_of((torch.from_numpy(maps), *rest))
    assert all(isinstance(x, np.ndarray) for image in replicates.pixels.waiting for x in image)
    got = replicates.compute(counts)
    for k in KEYS: np.testing.assert_array_equal(got[k], want[k])


def test_images_of_several_sizes():
    small, large = ordinary(10, 32, seed=1), ordinary(10, 48, seed=2)
    got = replicates_of(small, large).compute(np.ones((1, 20), int))
    evaluator = Evaluator()
    for batch in small, large: evaluator.update(*batch)
    for k, want in evaluator.compute().items(): assert abs(got[k][0] - want) < .005, k


@pytest.mark.parametrize("order", ["anomalous first", "good first"])
def test_later_images_are_counted_at_the_thresholds_of_the_first(order):
    batch = ordinary(signal=2.)
    if order == "good first": batch = tuple(x[::-1] for x in batch)
    replicates = Replicates(buffer=8*64*64)
    for i in range(40):
        replicates.update(*(x[i:i + 1] for x in batch))
        assert len(replicates.pixels.waiting) < 4*8          # good images alone wait four times as long
    counts = resample_counts(paths_of(40), batch[3], 5)
    got = replicates.compute(counts)
    for row, c in enumerate(counts):
        for k, want in evaluated(batch, c).items(): assert abs(got[k][row] - want) < .005, k


def test_undefined_metrics_are_nan():
    maps, scores, masks, labels = ordinary(8, 32)
    masks[0, 5:9, 5:9], masks[1:4] = True, False             # one image carries all defective pixels
    counts = np.ones((3, 8), int)
    counts[1, 0], counts[1, 1] = 0, 2                        # anomalous images, but no defective pixel
    counts[2, 4:] = 0                                        # no good image
    with warnings.catch_warnings():
        warnings.simplefilter("error")                       # of divisions by zero, for example
        got = replicates_of((maps, scores, masks, labels)).compute(counts)
    nan = {k: np.isnan(v).tolist() for k, v in got.items()}
    pixel = {k for k in KEYS if k.startswith("P") or k in ("AUPRO", "mAD")}
    assert {k for k in KEYS if nan[k][1]} == pixel
    assert {k for k in KEYS if nan[k][2]} == {"I-AUROC", "I-FPR95", "mAD", "P-FPR95-good"}
    assert not any(v[0] for v in nan.values())


@pytest.mark.parametrize("only", ["good", "anomalous"])
def test_a_class_of_one_label(only):
    batch = ordinary(8, 32)
    some = slice(4, 8) if only == "good" else slice(0, 4)
    batch = tuple(x[some] for x in batch)
    counts = resample_counts(paths_of(4), batch[3], 3)
    got = replicates_of(batch).compute(counts)
    want = evaluated(batch, np.ones(4, int))
    assert [k for k in KEYS if np.isnan(got[k]).all()] == [k for k in KEYS if np.isnan(want[k])]


def test_wrong_input_is_refused():
    batch = ordinary(8, 32)
    replicates = replicates_of(batch)
    for counts in np.ones((3, 7), int), np.ones(8, int):
        with pytest.raises(ValueError, match="counts"): replicates.compute(counts)
    with pytest.raises(ValueError, match="0 images"): Replicates().compute(np.ones((3, 0), int))
    maps, scores, masks, labels = batch
    with pytest.raises(ValueError, match="masks"): replicates.update(maps, scores, masks*255, labels)
    assert replicates.compute(np.ones((1, 8), int))["AUPRO"][0] > 0        # nothing was added


def test_resamples_follow_the_paths_alone():
    labels = np.arange(30) % 3 == 0
    paths, order = paths_of(30), np.random.default_rng(0).permutation(30)
    counts = resample_counts(paths, labels, 50)
    assert (resample_counts([paths[i] for i in order], labels[order], 50) == counts[:, order]).all()
    assert (counts[:, labels].sum(1) == 10).all() and (counts[:, ~labels].sum(1) == 20).all()
    assert (resample_counts([p + "x" for p in paths], labels, 50) != counts).any()
    assert len(np.unique(counts, axis=0)) == 50
    assert abs(counts.var() - .93) < .15                     # of a multinomial count, 1 - 1/n


def test_resamples_stay_the_same_for_good():
    "Records made in other years are paired with ours: these draws must never change."
    counts = resample_counts(paths_of(8), [1, 1, 1, 0, 0, 0, 0, 0], 3)
    assert counts.tolist() == [[2, 0, 1, 0, 0, 1, 3, 1], [0, 2, 1, 0, 2, 3, 0, 0], [1, 0, 2, 1, 0, 1, 1, 2]]


def test_file_keeps_any_name(tmp_path):
    batch = ordinary(8, 32)
    values = replicates_of(batch).compute(resample_counts(paths_of(8), batch[3], 20))
    file = tmp_path/"replicates.npz"
    names = ["cap", "../up", "a/b", "file", "名", ""]
    write_replicates(file, dict.fromkeys(names, values))
    assert list(tmp_path.iterdir()) == [file]
    got = read_replicates(file)
    assert list(got) == names and all(tuple(metrics) == KEYS for metrics in got.values())
    for k in KEYS: np.testing.assert_allclose(got["../up"][k], values[k], rtol=0, atol=STEP/2)
    before = file.read_bytes()
    write_replicates(file, got)
    assert file.read_bytes() == before


@pytest.mark.parametrize("damage", "missing, empty, cut, text, other arrays, a pickle, a folder".split(", "))
def test_an_unreadable_file_is_named(tmp_path, damage):
    file = tmp_path/"replicates.npz"
    write_replicates(file, {"cap": {"AUPRO": np.ones(200)}})
    if damage == "missing": file.unlink()
    elif damage == "empty": file.write_bytes(b"")
    elif damage == "cut": file.write_bytes(file.read_bytes()[:200])
    elif damage == "text": file.write_text("not a file of arrays")
    elif damage == "other arrays": np.savez(file, values=np.ones(3))
    elif damage == "a pickle": np.savez(file, values=np.ones(1), classes=np.array([{}]), metrics=np.ones(1))
    else:
        file.unlink()
        file.mkdir()
    with pytest.raises(DataError, match="replicates.npz") as caught: read_replicates(file)
    assert caught.value.remedy
