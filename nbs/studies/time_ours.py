"""Trains and tests one of our detectors whenever it is asked to, and answers with the seconds.

python time_ours.py SPEC --images 32

SPEC is JSON of a run's fields. The requests (timed_requests.py):
  train stored|computed float32|bfloat16
      an epoch of at most so many images, with features that are stored or computed
  test BATCH
      maps of at most so many test images, which are in memory
  fit_and_test BATCH
      a new detector: its hooks and all its epochs, then maps of all test images
"""
import argparse, json
from functools import cached_property
from importlib.metadata import version
import numpy as np
import torch
from time_run import empty_store
from timed_requests import answer, stay_on_cores
from mdd_bench.data.images import Framing, load_image
from mdd_bench.running.identity import model_plans, resolve
from mdd_bench.running.models import make_detector
from mdd_bench.running.runtime import Runtime
from mdd_bench.running.spec import make_spec
from mdd_bench.running.training import (
    LossTerms, feed, load_training_data, make_optimizer, seed_all, train, train_epoch, train_step)

def ignore(epoch, step, terms): "Do nothing with the loss terms of a step."

class Ours:
    "A detector with what it is trained and tested on."
    def __init__(self, spec, images):
        self.plan, self.images = model_plans(resolve(spec))[0], images
        self.recipe = self.plan.resolved.recipe
        self.runtimes = dict(stored=Runtime("cpu"), computed=Runtime("cpu", cache_gb=0))
        self.detector = make_detector(self.plan, self.runtimes["computed"])
        self.data = {}

    def training_data(self, features):
        "The first training images, with features that are stored or computed; loaded once."
        if features not in self.data:
            data = load_training_data(self.detector, self.plan, self.runtimes[features])
            for name in ("paths", "cls"): setattr(data.images, name, getattr(data.images, name)[:self.images])
            self.data[features] = data
        return self.data[features]

    @cached_property
    def optimizer(self): return make_optimizer(self.detector, self.recipe)

    @cached_property
    def test_images(self):
        "All test images, uint8 [N, 3, S, S]."
        catalog, size = self.plan.dataset.catalog, self.plan.resolved.spec.size
        paths = catalog.part(split="test").path
        images = np.stack([load_image(catalog.root/path, Framing(size)).transpose(2, 0, 1) for path in paths])
        return torch.from_numpy(images)

    def warm_up(self, *features):
        "Features of two images, and a step on each kind of features: first calls are not timed."
        self.detector.backbone(self.test_images[:2].float()/255)
        for name in features:
            data, runtime = self.training_data(name), self.runtimes[name]
            batch = next(feed(self.detector, data.images, self.recipe.batch, runtime, data.cache, 0, 0))
            train_step(self.detector.train(), batch, self.optimizer, self.recipe, "float32")

    def train(self, features, precision):
        "An epoch, as a run takes it."
        data, losses = self.training_data(features), LossTerms(ignore)
        self.detector.train()
        train_epoch(self.detector, data, self.optimizer, self.recipe, 0, 0, precision,
                    self.runtimes[features], losses)
        return len(data.images)

    @torch.no_grad()
    def maps(self, images, batch):
        "Predict the maps of images in memory, in float32 and on the processor; returns how many."
        self.detector.eval()
        for part in images.split(int(batch)): self.detector(part.float()/255).map.numpy()
        return len(images)

    def test(self, batch): return self.maps(self.test_images[:self.images], batch)

    def fit_and_test(self, batch):
        "Fit a new detector to all training images, which are decoded, and predict all test images."
        self.detector = make_detector(self.plan, self.runtimes["computed"])
        data = load_training_data(self.detector, self.plan, self.runtimes["computed"])
        train(self.detector, data, self.recipe, self.runtimes["computed"])
        return len(data.images) + self.maps(self.test_images, batch)

def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("spec", type=json.loads)
    parser.add_argument("--images", type=int, required=True)
    parser.add_argument("--trains", action="store_true", help="whether it will be asked to train")
    args = parser.parse_args()
    stay_on_cores()
    seed_all(0)
    spec = make_spec(**args.spec)
    resolve(spec)                    # data that are drawn are drawn into the usual cache
    with empty_store():
        ours = Ours(spec, args.images)
        ours.warm_up(*(["stored", "computed"] if args.trains else []))
        about = {package: version(package) for package in ("mdd_bench", "torch")}
        answer(about, dict(train=ours.train, test=ours.test, fit_and_test=ours.fit_and_test))

if __name__ == "__main__":
    main()
