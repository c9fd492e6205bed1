"""Makes one run twice, with an empty and with a filled feature store, and measures what it costs.

python time_run.py SPEC FOLDER --passes 7 --batches 4,16,32

SPEC is JSON of a run's fields. The record of the first run is left in FOLDER/runs/<id>, without its model.
One line of JSON is printed: seconds to a finished record cold and warm, training images per second,
milliseconds per test image at each batch size, operations, bytes, peak memory. A process makes one run only,
since its peak memory is that of everything it did. The number of threads is that of OMP_NUM_THREADS.
"""
import argparse, json, os, shutil, tempfile, time
from contextlib import contextmanager
from pathlib import Path
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from mdd_bench.data.catalog import cache_dir
from mdd_bench.running.cost import milliseconds_per_image
from mdd_bench.running.identity import model_plans, resolve
from mdd_bench.running.models import load_fitted
from mdd_bench.running.run import run
from mdd_bench.running.runtime import Runtime
from mdd_bench.running.spec import make_spec
from mdd_bench.running.store import MODEL

@contextmanager
def empty_store():
    "A cache with the data of the usual one and no features, for the length of a `with`."
    usual = cache_dir().resolve()
    before = os.environ.get("MDD_BENCH_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        for path in usual.glob("*"):
            if path.name != "features": (Path(folder)/path.name).symlink_to(path)
        os.environ["MDD_BENCH_CACHE"] = folder
        try: yield Path(folder)
        finally:
            del os.environ["MDD_BENCH_CACHE"]
            if before is not None: os.environ["MDD_BENCH_CACHE"] = before

def finished_run(spec, out, runtime):
    "The record of a run, and the seconds to it."
    start = time.perf_counter()
    record = run(spec, out, runtime, keep_model=True)
    return record, time.perf_counter() - start

@torch.no_grad()
def milliseconds_at(detector, size, device, batch, passes):
    "The median time per image of a prediction for `batch` images, backbone included."
    images = torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    seconds = []
    for _ in range(1 + passes):      # the first is not counted
        start = time.perf_counter()
        detector(images).map.cpu()
        seconds.append(time.perf_counter() - start)
    return 1000*float(np.median(seconds[1:]))/batch

@torch.no_grad()
def operations(detector, size, device):
    "Operations of one prediction as torch counts them: those of matrix products and convolutions."
    image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    detector.requires_grad_(False)      # the counter follows gradients, and there are none to follow
    with FlopCounterMode(display=False) as counter: detector(image)
    return counter.get_total_flops()

def train_images(resolved):
    "How many images training sees; a method that trains nothing sees each once."
    images = len(resolved.dataset.catalog.part(split="train"))
    return images*max(1, resolved.recipe.epochs)

def measure(spec, folder, passes, batches, scratch):
    "Everything that is printed, from two runs below `scratch`; the first record is moved to `folder`."
    runtime, resolved = Runtime(), resolve(spec)       # data and weights are read beforehand
    cold, cold_s = finished_run(spec, scratch/"cold", runtime)
    warm, warm_s = finished_run(spec, scratch/"warm", runtime)
    detector = load_fitted(model_plans(resolved)[0], runtime, warm.folder/MODEL).detector
    where = (detector, spec.size, runtime.device)
    per_image = {1: milliseconds_per_image(*where, passes)}
    per_image |= {batch: milliseconds_at(*where, batch, passes) for batch in batches}
    target = Path(folder)/"runs"/cold.id
    (cold.folder/MODEL).unlink()
    shutil.rmtree(target, ignore_errors=True)
    shutil.move(cold.folder, target)
    of_record = ("parameters_trained", "bytes_test", "bytes_test_without_backbone", "device")
    return dict(
        id=cold.id, cold_s=cold_s, warm_s=warm_s, ms=per_image, operations=operations(*where),
        images_per_second_trained=train_images(resolved)/warm.cost["train_s"],
        peak_memory_mb=cold.cost["peak_memory_mb"], threads=torch.get_num_threads(),
    ) | {name: cold.cost[name] for name in of_record}

def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("spec", type=json.loads)
    parser.add_argument("folder")
    parser.add_argument("--passes", type=int, default=7)
    parser.add_argument("--batches", default="4,16,32")
    args = parser.parse_args()
    spec, batches = make_spec(**args.spec), [int(n) for n in args.batches.split(",")]
    resolve(spec)                    # data that are drawn are drawn into the usual cache
    with empty_store() as cache, tempfile.TemporaryDirectory(dir=cache) as scratch:
        measured = measure(spec, args.folder, args.passes, batches, Path(scratch))
    print(json.dumps(measured))

if __name__ == "__main__":
    main()
