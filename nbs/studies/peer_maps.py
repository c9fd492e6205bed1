"""Trains one of anomalib's models with given backbone weights and saves its raw anomaly maps.

python peer_maps.py rd4ad in.npz out.npz --layers 1,2,3 --epochs 100 --lr 0.005 --drops 0.8
python peer_maps.py patchcore in.npz out.npz --layers 2,3 --ratio 0.01

in.npz holds train and test images, uint8 [N, 3, S, S], mean and std [3], and the tensors of the backbone as
`backbone.<timm's name>`. out.npz receives maps, float32 [N, S, S], not smoothed, and PatchCore's image
scores [N]. Seconds, steps and versions are printed as one line of JSON.

The model, its loss, its optimizer and its coreset are anomalib's own. The order of the steps, the learning
rates and the missing smoothing are decided here. anomalib has an environment of its own, so this file imports
nothing of mdd_bench.
"""
import argparse, importlib, json, os, time
from importlib.metadata import version
from types import SimpleNamespace
from typing import NamedTuple
import numpy as np
import torch

class Fitted(NamedTuple):
    "A trained model and what is reported about it."
    model: torch.nn.Module
    steps: int      # of the optimizer
    keeps: str      # what the test needs: trained weights, or patches in the memory bank
    details: dict   # further entries of the report

def batches(images, args, order):
    "Yields normalised batches [B, 3, S, S] of the uint8 images, in this order."
    mean, std = (torch.from_numpy(x).to(args.device).view(1, 3, 1, 1) for x in (args.mean, args.std))
    for start in range(0, len(order), args.batch):
        pixels = torch.from_numpy(images[order[start:start + args.batch]])
        yield (pixels.to(args.device).float()/255 - mean)/std

def load_backbone(extractor, tensors):
    "Load the given weights into anomalib's feature extractor; a missing or unfit tensor is an error."
    extractor.feature_extractor.load_state_dict(tensors, strict=True)

def learning_rate(args, epoch):
    "The rate of an epoch: divided by ten at each drop."
    drops = sum(epoch >= fraction*args.epochs for fraction in args.drops)
    return args.lr*.1**drops

class Training(NamedTuple):
    "What a step of reverse distillation needs."
    model: torch.nn.Module
    loss: torch.nn.Module
    optimizer: torch.optim.Optimizer

def make_rd4ad(size, tensors, args):
    "anomalib's reverse distillation for images of `size` (H, W), ready to train; returns `Training`."
    from anomalib.models.image.reverse_distillation.anomaly_map import AnomalyMapGenerationMode
    from anomalib.models.image.reverse_distillation.lightning_model import ReverseDistillation
    from anomalib.models.image.reverse_distillation.loss import ReverseDistillationLoss
    from anomalib.models.image.reverse_distillation.torch_model import ReverseDistillationModel
    mode = AnomalyMapGenerationMode.ADD
    model = ReverseDistillationModel(args.backbone, size, args.layers, mode, pre_trained=False)
    load_backbone(model.encoder, tensors)
    model.to(args.device)
    optimizer = ReverseDistillation.configure_optimizers(SimpleNamespace(model=model))
    model.anomaly_map_generator.kernel_size = 1         # a Gaussian of one tap changes nothing
    return Training(model, ReverseDistillationLoss(), optimizer)

def train_epoch(training, images, args):
    "Take the steps of one epoch, in an order that torch draws; returns how many."
    model, loss, optimizer = training
    order = torch.randperm(len(images)).numpy()
    # Batch norm cannot be trained on one image; our loader leaves such a last batch out as well.
    if len(order) > 1 and len(order) % args.batch == 1: order = order[:-1]
    model.train()
    steps = 0
    for batch in batches(images, args, order):
        optimizer.zero_grad(set_to_none=True)
        loss(*model(batch)).backward()
        optimizer.step()
        steps += 1
    return steps

def fit_rd4ad(images, tensors, args):
    "Train anomalib's reverse distillation; returns `Fitted`."
    training = make_rd4ad(images.shape[-2:], tensors, args)
    model, _, optimizer = training
    steps = 0
    for epoch in range(args.epochs):
        for group in optimizer.param_groups: group["lr"] = learning_rate(args, epoch)
        steps += train_epoch(training, images, args)
    trained = sum(p.numel() for p in model.parameters() if p.grad is not None)
    return Fitted(model, steps, f"{trained:,} weights", dict(betas=list(optimizer.param_groups[0]["betas"])))

def fit_patchcore(images, tensors, args):
    "Fill anomalib's PatchCore in one pass and choose its coreset; returns `Fitted`."
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel
    model = PatchcoreModel(args.layers, args.backbone, pre_trained=False)
    load_backbone(model.feature_extractor, tensors)
    model.to(args.device).train()
    with torch.no_grad():
        for batch in batches(images, args, np.arange(len(images))): model(batch)
        model.subsample_embedding(args.ratio)
    model.anomaly_map_generator.blur = torch.nn.Identity()
    return Fitted(model, 0, f"{len(model.memory_bank):,} patches", {})

FITS = dict(rd4ad=fit_rd4ad, patchcore=fit_patchcore)

@torch.no_grad()
def predict(model, images, args):
    "Returns maps [N, S, S] and the model's image scores [N]."
    model.eval()
    predictions = [model(batch) for batch in batches(images, args, np.arange(len(images)))]
    maps = torch.cat([p.anomaly_map[:, 0] for p in predictions])
    scores = torch.cat([p.pred_score for p in predictions])
    return maps.float().cpu().numpy(), scores.float().cpu().numpy()

def integers(text): return [int(x) for x in text.split(",") if x]

def fractions(text): return [float(x) for x in text.split(",") if x]

def arguments():
    "The arguments of the command line."
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("detector", choices=FITS)
    parser.add_argument("given")
    parser.add_argument("target")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--layers", type=integers, required=True,
                        help="indices of timm's feature levels, 'a,b,c'")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=.005)
    parser.add_argument("--drops", type=fractions, default=[],
                        help="fractions of the training after which lr is divided by ten")
    parser.add_argument("--ratio", type=float, default=.01, help="share of the patches that PatchCore keeps")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()

def main():
    args = arguments()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))
    with np.load(args.given) as z:
        train, test, args.mean, args.std = (z[k] for k in ("train", "test", "mean", "std"))
        names = [name for name in z.files if name.startswith("backbone.")]
        tensors = {name.removeprefix("backbone."): torch.from_numpy(z[name]) for name in names}
    importlib.import_module("anomalib.models")      # takes seconds that do not belong to the training
    np.random.seed(args.seed)           # PatchCore's projection is drawn by NumPy
    torch.manual_seed(args.seed)
    start = time.perf_counter()
    fitted = FITS[args.detector](train, tensors, args)
    fit_end = time.perf_counter()
    maps, scores = predict(fitted.model, test, args)
    test_end = time.perf_counter()
    saved = dict(maps=maps, scores=scores) if args.detector == "patchcore" else dict(maps=maps)
    np.savez(args.target, **saved)
    report = dict(train_s=fit_end - start, test_s=test_end - fit_end, steps=fitted.steps, keeps=fitted.keeps)
    versions = {package: version(package) for package in ("anomalib", "torch", "timm")}
    print(json.dumps(report | fitted.details | dict(versions=versions)))

if __name__ == "__main__":
    main()
