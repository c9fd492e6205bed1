"""Times one way to compute the metrics of saved maps and prints one line of JSON.

python time_metrics.py CONTESTANT maps.npz --repeats 5
    seconds of scikit-learn | anomalib | adeval | exact | streaming | binned
python time_metrics.py CONTESTANT maps.npz --memory 2000
    peak memory of exact | streaming

maps.npz holds maps float32 [N, H, W], scores [N], masks bool [N, H, W] and labels bool [N]. anomalib and
adeval have an environment of their own, so this file imports NumPy and what its contestant needs, and nothing
else. The number of threads is that of OMP_NUM_THREADS.
"""
import argparse, json, os, re, time
from importlib.metadata import version
from pathlib import Path
import numpy as np

BATCH = 20      # maps that are handed over together, as in a test
THREADS = int(os.environ.get("OMP_NUM_THREADS") or 1)

def batches(n):
    "Slices of at most `BATCH` maps."
    return [slice(start, start + BATCH) for start in range(0, n, BATCH)]

# Each contestant prepares the data in the form that it needs, untimed, and returns the pass that is timed:
# a function without arguments that returns the values and a function that gives their bounds.

def scikit_learn(maps, scores, masks, labels):
    "All metrics but AUPRO, which scikit-learn does not have."
    from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
    def f1max(truth, score):
        precision, recall, _ = precision_recall_curve(truth, score)
        return (2*precision*recall/np.maximum(precision + recall, 1e-12)).max()
    levels = {"I": (labels, scores), "P": (masks.ravel(), maps.ravel())}
    metrics = {"AUROC": roc_auc_score, "AP": average_precision_score, "F1max": f1max}
    def once():
        values = {}
        for level, (truth, score) in levels.items():
            for name, metric in metrics.items(): values[f"{level}-{name}"] = metric(truth, score)
        return values, dict
    return once

def anomalib(maps, scores, masks, labels):
    "AUPRO, which is the usual complement to scikit-learn."
    import cv2, torch
    from anomalib.metrics.aupro import _AUPRO
    torch.set_num_threads(THREADS)
    cv2.setNumThreads(THREADS)
    maps, masks = torch.from_numpy(maps), torch.from_numpy(masks.astype(np.int64))
    def once():
        metric = _AUPRO()
        for batch in batches(len(maps)): metric.update(maps[batch], masks[batch])
        return {"AUPRO": metric.compute()}, dict
    return once

def adeval(maps, scores, masks, labels):
    "adeval needs the range of the scores beforehand, and gets the true one without its time being counted."
    import cv2
    from adeval import EvalAccumulator
    cv2.setNumThreads(THREADS)
    masks, labels = masks.astype(np.uint8), labels.astype(np.uint8)
    ranges = [float(limit(x)) for x in (scores, maps) for limit in (np.min, np.max)]
    names = {"I-AUROC": "i_auroc", "I-AP": "i_aupr",
             "P-AUROC": "p_auroc", "P-AP": "p_aupr", "AUPRO": "p_aupro"}
    def once():
        accumulator = EvalAccumulator(*ranges, nstrips=1000)
        for batch in batches(len(maps)):
            accumulator.add_anomap_batch(maps[batch], masks[batch])
            accumulator.add_image(scores[batch], labels[batch])
        summary = accumulator.summary()
        return {ours: summary[theirs] for ours, theirs in names.items()}, dict
    return once

def ours(*options):
    "A contestant that uses our `Evaluator` with these options."
    def prepare(maps, scores, masks, labels):
        from mdd_bench.evaluation.metrics import Evaluator
        def once():
            evaluator = Evaluator(*options)
            for batch in batches(len(maps)):
                evaluator.update(maps[batch], scores[batch], masks[batch], labels[batch])
            return evaluator.compute(), evaluator.bounds
        return once
    return prepare

# Each contestant with the packages whose versions are reported.
CONTESTANTS = {
    "scikit-learn": (scikit_learn, ("scikit-learn", "numpy")),
    "anomalib": (anomalib, ("anomalib", "torch")),
    "adeval": (adeval, ("adeval", "numpy")),
    "exact": (ours("exact"), ("mdd_bench", "numpy")),
    "streaming": (ours("streaming"), ("mdd_bench", "numpy")),
    "binned": (ours("streaming", .3, 2**19), ("mdd_bench", "numpy")),
}

def as_json(values, bounds):
    "Values as numbers and bounds as lists."
    values = {name: float(value) for name, value in values.items()}
    bounds = {name: list(pair) for name, pair in bounds.items()}
    return dict(values=values, bounds=bounds)

def measure_seconds(contestant, data, repeats):
    "Seconds of `repeats` passes, after one that is not timed, and the results of that one."
    prepare, _ = CONTESTANTS[contestant]
    once = prepare(**data)
    values, bounds = once()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - start)
    return dict(seconds=seconds) | as_json(values, bounds())

def megabytes(field):
    "A field of the process's status in MB: VmRSS is the memory held now, VmHWM the most ever held (Linux)."
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1])*1024/1e6

def forget_peak():
    "Forget the peak so far, which was that of reading the file, where the system allows it."
    try: Path("/proc/self/clear_refs").write_text("5")
    except OSError: pass

def measure_memory(contestant, data, n):
    """Peak memory of update(), compute() and bounds() above that before the first update.

    A batch of maps is already in memory then. Every batch is the first one times another factor per map, so
    that the n maps are never all in memory.
    """
    from mdd_bench.evaluation.metrics import Evaluator
    maps, scores, masks, labels = (data.pop(k)[:BATCH].copy() for k in ("maps", "scores", "masks", "labels"))
    rng, batch = np.random.default_rng(0), maps.copy()
    evaluator = Evaluator(contestant)
    forget_peak()
    before, start = megabytes("VmRSS"), time.perf_counter()
    for done in range(0, n, len(batch)):
        factors = rng.uniform(1, 1.2, len(batch)).astype(np.float32)
        np.multiply(maps, factors[:, None, None], out=batch)
        count = n - done
        evaluator.update(batch[:count], (scores*factors)[:count], masks[:count], labels[:count])
    values, bounds = evaluator.compute(), evaluator.bounds()
    peak = megabytes("VmHWM") - before
    return dict(maps=n, peak_mb=peak, seconds=time.perf_counter() - start) | as_json(values, bounds)

def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("contestant", choices=CONTESTANTS)
    parser.add_argument("file")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", type=int, metavar="N")
    args = parser.parse_args()
    with np.load(args.file) as z: data = {k: z[k] for k in ("maps", "scores", "masks", "labels")}
    if args.memory: measured = measure_memory(args.contestant, data, args.memory)
    else: measured = measure_seconds(args.contestant, data, args.repeats)
    versions = {package: version(package) for package in CONTESTANTS[args.contestant][1]}
    print(json.dumps(dict(contestant=args.contestant) | measured | dict(versions=versions)))

if __name__ == "__main__":
    main()
