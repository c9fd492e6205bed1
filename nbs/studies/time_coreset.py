"""Times one way to choose a coreset of saved features and prints one line of JSON: seconds of each pass, the rows chosen, versions.

python time_coreset.py CONTESTANT features.npy --ratio 0.02 --repeats 3     plain | anomalib | all | 256 | 128

features.npy: float32 [N, D]. anomalib has an environment of its own, so this file imports what its contestant needs, nothing else. The threads are those of
OMP_NUM_THREADS.
"""
import argparse, json, os, time
from importlib.metadata import version
import numpy as np
import torch

def plain(x, ratio):
    "Greedy k-centre as it is written down: each pick meets all rows."
    far, chosen = (x - x[0]).square().sum(1), [0]
    while len(chosen) < int(len(x)*ratio): chosen.append(int(far.argmax())); far = torch.minimum(far, (x - x[chosen[-1]]).square().sum(1))
    return chosen

def anomalib(x, ratio):
    from anomalib.models.components import KCenterGreedy
    return KCenterGreedy(x, ratio).select_coreset_idxs()

def ours(dim):
    def choose(x, ratio):
        from mdd_bench.parts.bank import coreset
        return coreset(x, ratio, dim=dim, generator=torch.Generator().manual_seed(0)).tolist()
    return choose

CONTESTANTS = {"plain": (plain, "torch"), "anomalib": (anomalib, "anomalib"), "all": (ours(None), "mdd_bench"), "256": (ours(256), "mdd_bench"), "128": (ours(128), "mdd_bench")}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contestant", choices=CONTESTANTS); parser.add_argument("file"); parser.add_argument("--ratio", type=float, required=True); parser.add_argument("--repeats", type=int, default=3)
    a = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1)); torch.manual_seed(0); np.random.seed(0)
    choose, package = CONTESTANTS[a.contestant]
    x, seconds = torch.from_numpy(np.load(a.file)), []
    choose(x[:1000], .05)        # imports and first calls are not timed
    for _ in range(a.repeats): start = time.perf_counter(); chosen = choose(x, a.ratio); seconds.append(time.perf_counter() - start)
    print(json.dumps(dict(seconds=seconds, chosen=[int(i) for i in chosen], versions={p: version(p) for p in ("torch", package)})))
