"""Times one way to choose a coreset of saved features.

One line of JSON is printed: seconds of each pass, the rows chosen, versions.

python time_coreset.py CONTESTANT features.npy --ratio 0.02 --repeats 3     plain | anomalib | all | 256 | 128

features.npy holds float32 [N, D]. anomalib has an environment of its own, so this file imports what its
contestant needs and nothing else. The number of threads is that of OMP_NUM_THREADS.
"""
import argparse, json, os, time
from importlib.metadata import version
import numpy as np
import torch

def choose_plain(x, ratio):
    "Greedy k-centre as it is written down: each pick is compared with all rows."
    distance, chosen = (x - x[0]).square().sum(1), [0]
    while len(chosen) < int(len(x)*ratio):
        pick = int(distance.argmax())
        chosen.append(pick)
        distance = torch.minimum(distance, (x - x[pick]).square().sum(1))
    return chosen

def choose_anomalib(x, ratio):
    "anomalib's greedy k-centre, on its sparse random projection."
    from anomalib.models.components import KCenterGreedy
    return KCenterGreedy(x, ratio).select_coreset_idxs()

def choose_ours(dim):
    "Our coreset on so many projected numbers; None: on all."
    def choose(x, ratio):
        from mdd_bench.parts.bank import coreset
        return coreset(x, ratio, dim=dim, generator=torch.Generator().manual_seed(0)).tolist()
    return choose

# Each contestant with the package whose version is reported.
CONTESTANTS = {
    "plain": (choose_plain, "torch"),
    "anomalib": (choose_anomalib, "anomalib"),
    "all": (choose_ours(None), "mdd_bench"),
    "256": (choose_ours(256), "mdd_bench"),
    "128": (choose_ours(128), "mdd_bench"),
}

def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("contestant", choices=CONTESTANTS)
    parser.add_argument("file")
    parser.add_argument("--ratio", type=float, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))
    torch.manual_seed(0)
    np.random.seed(0)
    choose, package = CONTESTANTS[args.contestant]
    x = torch.from_numpy(np.load(args.file))
    choose(x[:1000], .05)        # imports and first calls are not timed
    seconds = []
    for _ in range(args.repeats):
        start = time.perf_counter()
        chosen = choose(x, args.ratio)
        seconds.append(time.perf_counter() - start)
    versions = {p: version(p) for p in ("torch", package)}
    print(json.dumps(dict(seconds=seconds, chosen=[int(i) for i in chosen], versions=versions)))

if __name__ == "__main__":
    main()
