"""Detectors and what they are trained on in tests: a few drawn images of two classes, as batches.

Nothing of pytest is imported: `gpu_check.py` uses this too, where pytest may be missing."""
from functools import cache
import torch
from mdd_bench.detectors.detector import list_detectors
from mdd_bench.parts.backbone import Backbone

PYRAMIDS = dict(
    small=("resnet18", [1, 2]),
    coarse=("mobilenetv3_small_050", [2, 3, 4]),
    signed=("mobilenetv3_small_100", None),
    one=("resnet18", [2]),
)
VARIANTS = {name: (name, {}) for name in list_detectors()} | {
    "mddnet, both maps": ("mddnet", dict(prototypes=4, fusion="sum")),
    "mddnet, no memory": ("mddnet", dict(memory="none")),
    "mddnet, cluster": ("mddnet", dict(memory="cluster", prototypes=4, decoder="light")),
    "patchcore, class": ("patchcore", dict(coreset_scope="class", coreset_ratio=.1)),
    "dmad, no labels": ("dmad", {}),
    "bgad, no labels": ("bgad", {}),
    "dmad, normal bank": ("dmad", dict(bank="normal", knowledge="distance")),
}

@cache
def pyramid(key="small"):
    name, layers = PYRAMIDS[key]
    return Backbone(name, "random", layers)

def learns_from_labels(variant): return not variant.endswith("no labels")

# ---- a small dataset: images, masks, batches

def seeded(seed): return torch.Generator().manual_seed(seed)

def images(n, seed=0, cls=0):
    "n images [n, 3, 64, 64] of stripes; each class has its own angle."
    generator, angle = seeded(seed), torch.tensor(.7*cls)
    y, x = torch.meshgrid(torch.arange(64.), torch.arange(64.), indexing="ij")
    along = .5*(x*angle.cos() + y*angle.sin())
    waves = torch.stack([torch.sin(along + 6.28*torch.rand(1, generator=generator)) for _ in range(n)])
    noise = .05*torch.randn(n, 3, 64, 64, generator=generator)
    return (.5 + .3*waves[:, None] + noise).clamp(0, 1)

def labelled_batch(backbone):
    "Three labelled anomalies; the mask of the third is a single pixel."
    x, mask = images(3, seed=20), torch.zeros(3, 64, 64)
    x[:, :, 20:40, 24:44] = .5
    mask[:2, 20:40, 24:44] = 1
    mask[2, 30, 30] = .6
    path = [f"bad{i}.png" for i in range(3)]
    return dict(features=backbone(x), index=torch.arange(3), path=path, mask=mask)

def texture_batch(backbone):
    x = torch.rand(6, 3, 64, 64, generator=seeded(5))
    path = [f"texture {i}" for i in range(6)]
    return dict(features=backbone(x), index=torch.arange(6), path=path, texture=True)

def training_batch(backbone, needs, number, anomalies=True):
    "Eight images of two classes, with what `needs` asks and nothing else."
    clean = torch.cat([images(4, number, cls=0), images(4, number + 10, cls=1)])
    batch = dict(features=backbone(clean), index=torch.arange(8*number, 8*number + 8))
    batch["path"] = [f"{number}{i}.png" for i in range(8)]
    if "pairs" in needs:
        abnormal, mask = clean.clone(), torch.zeros(8, 64, 64, dtype=torch.bool)
        abnormal[:, :, 20:40, 24:44] = .5
        mask[:, 20:40, 24:44] = True
        batch |= dict(image=clean, abnormal=abnormal, features_abnormal=backbone(abnormal), mask=mask)
    if "cls" in needs: batch["cls"] = torch.arange(2).repeat_interleave(4)
    if "labelled" in needs and anomalies: batch["labelled"] = labelled_batch(backbone)
    return batch

def training_batches(backbone, needs, anomalies=True):
    return [training_batch(backbone, needs, number, anomalies) for number in range(2)]

def hook_batches(backbone, needs, anomalies=True):
    "What the hooks see: normal images, then labelled anomalies and textures for those who ask."
    batches = training_batches(backbone, needs, anomalies)
    if "labelled" in needs and anomalies: batches.append(labelled_batch(backbone))
    if "textures" in needs: batches.append(texture_batch(backbone))
    return batches
