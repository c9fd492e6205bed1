"""Trains and tests one of anomalib's models whenever it is asked to, and answers with the seconds.

python time_peer.py rd4ad|patchcore given.npz --layers 1,2,3 --images 32

given.npz is what peer_maps.py is given, and the models are made as there. The requests (timed_requests.py):
  train                an epoch of at most so many images, which are in memory
  test BATCH           maps of at most so many test images, which are in memory
  fit_and_test BATCH   a new model: fitted to all training images, then maps of all test images
"""
import argparse
from importlib.metadata import version
import numpy as np
import torch
from peer_maps import FITS, batches, fractions, integers, make_rd4ad, predict, train_epoch
from timed_requests import answer, stay_on_cores

class Peer:
    "anomalib's model with what it is trained and tested on."
    def __init__(self, args, train, test, tensors):
        self.args, self.train_images, self.test_images, self.tensors = args, train, test, tensors
        if args.detector == "rd4ad": self.training = make_rd4ad(train.shape[-2:], tensors, args)

    def warm_up(self):
        "A step, or a coreset of two images: first calls are not timed."
        if self.args.detector == "rd4ad": train_epoch(self.training, self.train_images[:2], self.args)
        else: FITS["patchcore"](self.train_images[:2], self.tensors, self.args)

    def train(self):
        images = self.train_images[:self.args.images]
        train_epoch(self.training, images, self.args)
        return len(images)

    @torch.no_grad()
    def test(self, batch):
        "Predict maps, without their scores."
        model = self.training.model.eval()
        images = self.test_images[:self.args.images]
        self.args.batch = int(batch)
        for part in batches(images, self.args, np.arange(len(images))): model(part).anomaly_map.numpy()
        return len(images)

    def fit_and_test(self, batch):
        self.args.batch = int(batch)
        fitted = FITS[self.args.detector](self.train_images, self.tensors, self.args)
        predict(fitted.model, self.test_images, self.args)
        return len(self.train_images) + len(self.test_images)

def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("detector", choices=FITS)
    parser.add_argument("given")
    parser.add_argument("--images", type=int, required=True)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--layers", type=integers, required=True)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--ratio", type=float, default=.01)
    parser.set_defaults(device="cpu", epochs=1, lr=.005, drops=fractions(""))
    args = parser.parse_args()
    stay_on_cores()
    np.random.seed(0)
    torch.manual_seed(0)
    with np.load(args.given) as z:
        train, test, args.mean, args.std = (z[k] for k in ("train", "test", "mean", "std"))
        names = [name for name in z.files if name.startswith("backbone.")]
        tensors = {name.removeprefix("backbone."): torch.from_numpy(z[name]) for name in names}
    peer = Peer(args, train, test, tensors)
    peer.warm_up()
    about = {package: version(package) for package in ("anomalib", "torch", "timm")}
    answer(about, dict(train=peer.train, test=peer.test, fit_and_test=peer.fit_and_test))

if __name__ == "__main__":
    main()
