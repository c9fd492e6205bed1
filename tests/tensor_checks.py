"""Drawn maps, and what evaluators must do with tensors of any device: plain functions that raise.

Nothing of pytest is imported: `gpu_check.py` uses this too, where pytest may be missing."""
import re
from unittest import mock
import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from mdd_bench.evaluation import bins as bins_module
from mdd_bench.evaluation.metrics import Evaluator

MODES = ("exact", "streaming")


def any_bits(rng, shape):
    "Any finite float32 there is."
    bits = rng.integers(-2**31, 2**31, shape).astype(np.int32)
    return np.nan_to_num(bits.view(np.float32), nan=3e38, posinf=-0., neginf=-3e38)


SCORES = {
    "few": lambda rng, shape: rng.integers(-2, 3, shape)*.25,
    "constant": lambda rng, shape: np.full(shape, -.7),
    "float16": lambda rng, shape: rng.normal(size=shape).astype(np.float16),
    "negative": lambda rng, shape: rng.normal(size=shape) - 5,
    "cosine": lambda rng, shape: .3 + .1*rng.random(shape),
    "both signs": lambda rng, shape: rng.choice([-1, 1], shape)*(.3 + .1*rng.random(shape)),
    "wide": lambda rng, shape: rng.choice([-1, 1], shape)*10**rng.uniform(-30, 30, shape),
    "denormal": lambda rng, shape: rng.integers(-5000, 5000, shape)*1e-45,
    "zeros": lambda rng, shape: rng.choice([0., -0., 1e-45, -1e-45, 1, -1], shape),
    "any bits": any_bits,
}
MASKS = {
    "none": lambda rng, shape: np.zeros(shape, bool),
    "all": lambda rng, shape: np.ones(shape, bool),
    "pixels": lambda rng, shape: rng.random(shape) < .02,
    "half": lambda rng, shape: rng.random(shape) < .5,
    "blobs": lambda rng, shape: gaussian_filter(rng.normal(size=shape), (0, 2, 2)) > .2,
    "images": lambda rng, shape: np.broadcast_to(rng.random((shape[0], 1, 1)) < .5, shape),
}


def drawn(seed, scores, masks=None):
    """One to four batches of one to five images, each batch of a size and with masks of its own.

    A label may miss a mask, or stand without one."""
    rng, batches = np.random.default_rng(seed), []
    for _ in range(rng.integers(1, 5)):
        shape = tuple(rng.integers(1, (6, 31, 31)))
        mask = MASKS[masks or rng.choice(list(MASKS))](rng, shape)
        maps = np.asarray(SCORES[scores](rng, shape))
        maps = maps if maps.dtype == np.float16 else maps.astype(np.float32)
        image_scores = rng.integers(0, 4, shape[0])
        changed = rng.random(shape[0]) < .2
        labels = np.where(changed, rng.random(shape[0]) < .5, mask.any((1, 2)))
        batches.append((maps, image_scores, mask, labels))
    return batches


def evaluated(batches, *args, **options):
    "An evaluator that has seen the batches."
    evaluator = Evaluator(*args, **options)
    for batch in batches: evaluator.update(*batch)
    return evaluator


def ordinary(n, size, seed=0):
    "Smooth positive maps as a method of cosine distances gives them; blobs on the first half of the images."
    rng = np.random.default_rng(seed)
    blob = gaussian_filter(rng.normal(size=(n, size, size)), (0, size/16, size/16))
    labels = np.arange(n) < n//2
    masks = (blob > 2*blob.std()) & labels[:, None, None]
    noise = gaussian_filter(rng.normal(size=masks.shape), (0, 2, 2))
    maps = gaussian_filter(np.abs(.3 + .06*noise/noise.std() + .08*masks), (0, 1, 1)).astype(np.float32)
    return maps, maps.max((1, 2)), masks, labels


def small(**changes):
    "Inside, tables are joined in so short stretches that small data has many."
    return mock.patch.multiple(bins_module, **dict(STRETCH=7) | changes)


def results(evaluator):
    "Values and bounds as text: bit for bit, and nan is nan."
    return repr((evaluator.compute(), evaluator.bounds()))


TENSORS = {
    "float32": torch.Tensor.float, "float64": torch.Tensor.double, "float16": torch.Tensor.half,
    "bfloat16": torch.Tensor.bfloat16, "int32": torch.Tensor.int,
    "with a gradient": lambda x: x.clone().requires_grad_(),
    "transposed": lambda x: x.mT.contiguous().mT,
    "strided": lambda x: x.repeat_interleave(2, 0)[::2],
    "of inference": torch.inference_mode()(torch.clone),
}


def tensors_count_as_arrays(device, tensor, mode):
    "Tensors of one of the `TENSORS`, alone, beside arrays and merged with them, give what arrays give."
    batches = []
    for maps, *rest in drawn(3, "negative") + drawn(1, "zeros"):
        batches.append((TENSORS[tensor](torch.from_numpy(maps.astype(np.float32)).to(device)), *rest))
    arrays = [(maps.detach().float().cpu().numpy(), *rest) for maps, *rest in batches]
    all_tensors = [[torch.as_tensor(x, device=device) for x in batch] for batch in batches]

    def seen(batches): return evaluated(batches, mode, bins=300)

    with small(WAITING=1):
        want = results(seen(arrays))
        assert results(seen(all_tensors)) == want
        assert results(seen(batches[::2] + arrays[1::2])) == want
        assert results(seen(arrays[1::2]).merge(seen(batches[::2]))) == want


def tensors_of_any_scores(device, seed, scores, mode, waiting):
    "Maps as tensors give what they give as arrays."
    arrays = drawn(seed, scores)
    tensors = [(torch.from_numpy(maps).to(device), *rest) for maps, *rest in arrays]
    with small(WAITING=waiting):
        assert results(evaluated(tensors, mode, bins=100)) == results(evaluated(arrays, mode, bins=100))


BAD_SCORES = [("float32", np.nan, "nan"), ("float16", -np.inf, "-inf"), ("bfloat16", np.nan, "nan"),
              ("float64", 1e300, "inf")]     # dtype, value, and how it is shown


def a_bad_score_is_named_and_not_kept(device, dtype, bad, shown, mode):
    "A tensor with a score that is not finite is refused, and the evaluator stays as it was."
    batch, evaluator = ordinary(4, 24), evaluated([ordinary(4, 32)], mode, bins=100)
    maps, before = torch.from_numpy(batch[0]).to(device, getattr(torch, dtype)), results(evaluator)
    maps[1, 2, 3] = bad
    try: evaluator.update(maps, *batch[1:])
    except ValueError as e: message = str(e)
    else: message = "no error"
    assert re.match(rf"maps: 1 of .*{shown} at \(1, 2, 3\)", message), message
    assert results(evaluator) == before
