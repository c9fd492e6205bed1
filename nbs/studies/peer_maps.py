"""Trains one of anomalib's models on given images, with given backbone weights, and saves its raw anomaly maps.

python peer_maps.py rd4ad in.npz out.npz --backbone resnet18 --layers 1,2,3 --seed 0 --epochs 100 --batch 16 --lr 0.005 --drops 0.8
python peer_maps.py patchcore in.npz out.npz --backbone resnet18 --layers 2,3 --seed 0 --batch 16 --ratio 0.01

in.npz: train and test uint8 [N, 3, S, S], mean and std [3], and the tensors of the backbone as `backbone.<timm's name>`. out.npz: maps float32 [N, S, S], not
smoothed, and PatchCore's image scores [N]. One line of JSON tells the rest. The model, its loss, its optimizer and its coreset are anomalib's own; the order of
the steps, the learning rates and what is not smoothed are said here. anomalib has an environment of its own, so this file imports nothing of ours.
"""
import argparse, json, os, time
from importlib.metadata import version
from types import SimpleNamespace
import numpy as np
import torch

def in_batches(images, a, rows):
    "Normalised batches [B, 3, S, S] of the uint8 images with these numbers."
    mean, std = (torch.from_numpy(x).to(a.device).view(1, 3, 1, 1) for x in (a.mean, a.std))
    for i in range(0, len(rows), a.batch): yield (torch.from_numpy(images[rows[i:i + a.batch]]).to(a.device).float()/255 - mean)/std

def put(extractor, tensors):
    "The given weights into anomalib's feature extractor; a tensor that is missing, left over or of another shape is an error."
    extractor.feature_extractor.load_state_dict(tensors, strict=True)

def rd4ad(images, tensors, a):
    "Reverse distillation: (model, steps, what it keeps, what else there is to say)."
    from anomalib.models.image.reverse_distillation.anomaly_map import AnomalyMapGenerationMode
    from anomalib.models.image.reverse_distillation.lightning_model import ReverseDistillation
    from anomalib.models.image.reverse_distillation.loss import ReverseDistillationLoss
    from anomalib.models.image.reverse_distillation.torch_model import ReverseDistillationModel
    model = ReverseDistillationModel(a.backbone, images.shape[-2:], a.layers, AnomalyMapGenerationMode.ADD, pre_trained=False)
    put(model.encoder, tensors)
    model.to(a.device)
    loss, optimizer, steps = ReverseDistillationLoss(), ReverseDistillation.configure_optimizers(SimpleNamespace(model=model)), 0
    for epoch in range(a.epochs):
        for g in optimizer.param_groups: g["lr"] = a.lr*.1**sum(epoch >= f*a.epochs for f in a.drops)
        rows = torch.randperm(len(images)).numpy()
        if len(rows) > 1 and len(rows) % a.batch == 1: rows = rows[:-1]      # batch norm cannot be trained on one image; ours leaves it out as well
        model.train()
        for x in in_batches(images, a, rows):
            optimizer.zero_grad(set_to_none=True); loss(*model(x)).backward(); optimizer.step(); steps += 1
    model.anomaly_map_generator.kernel_size = 1         # a Gaussian of one tap changes nothing
    return model, steps, f"{sum(p.numel() for p in model.parameters() if p.grad is not None):,} weights", dict(betas=list(optimizer.param_groups[0]["betas"]))

def patchcore(images, tensors, a):
    "PatchCore, one pass and its coreset: the same four."
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel
    model = PatchcoreModel(a.layers, a.backbone, pre_trained=False)
    put(model.feature_extractor, tensors)
    model.to(a.device).train()
    with torch.no_grad():
        for x in in_batches(images, a, np.arange(len(images))): model(x)
        model.subsample_embedding(a.ratio)
    model.anomaly_map_generator.blur = torch.nn.Identity()
    return model, 0, f"{len(model.memory_bank):,} patches", {}

@torch.no_grad()
def predict(model, images, a):
    "Maps [N, S, S] and the model's image scores [N]."
    found = [model.eval()(x) for x in in_batches(images, a, np.arange(len(images)))]
    return torch.cat([p.anomaly_map[:, 0] for p in found]).float().cpu().numpy(), torch.cat([p.pred_score for p in found]).float().cpu().numpy()

DETECTORS = dict(rd4ad=rd4ad, patchcore=patchcore)

def as_list(kind): return lambda text: [kind(x) for x in text.split(",") if x]

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("detector", choices=DETECTORS); parser.add_argument("given"); parser.add_argument("target")
    parser.add_argument("--backbone", default="resnet18"); parser.add_argument("--layers", type=as_list(int), required=True, help="indices of timm's feature levels, 'a,b,c'")
    parser.add_argument("--seed", type=int, default=0); parser.add_argument("--epochs", type=int, default=0); parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=.005); parser.add_argument("--drops", type=as_list(float), default=[], help="fractions of the training after which lr is divided by ten")
    parser.add_argument("--ratio", type=float, default=.01, help="share of the patches that PatchCore keeps"); parser.add_argument("--device", default="cpu")
    a = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))
    with np.load(a.given) as z:
        train, test, a.mean, a.std = (z[k] for k in ("train", "test", "mean", "std"))
        tensors = {k.removeprefix("backbone."): torch.from_numpy(z[k]) for k in z.files if k.startswith("backbone.")}
    import anomalib.models                                  # takes seconds, which are not the training's
    np.random.seed(a.seed); torch.manual_seed(a.seed)       # PatchCore's projection is drawn by NumPy
    start = time.perf_counter(); model, steps, keeps, says = DETECTORS[a.detector](train, tensors, a)
    trained = time.perf_counter(); maps, scores = predict(model, test, a)
    tested = time.perf_counter()
    np.savez(a.target, maps=maps, **(dict(scores=scores) if a.detector == "patchcore" else {}))
    print(json.dumps(dict(train_s=trained - start, test_s=tested - trained, steps=steps, keeps=keeps, **says, versions={p: version(p) for p in ("anomalib", "torch", "timm")})))
