"""Times one way to compute the metrics of saved maps and prints one line of JSON.

python time_metrics.py CONTESTANT maps.npz --repeats 5     scikit-learn | anomalib | adeval | exact | streaming | binned
python time_metrics.py CONTESTANT maps.npz --memory 2000   exact | streaming: peak memory instead of time

maps.npz: maps float32 [N, H, W], scores [N], masks bool [N, H, W], labels bool [N]. anomalib and adeval have an environment of their own, so
this file imports NumPy and what its contestant needs, nothing else. The threads are those of OMP_NUM_THREADS.
"""
import argparse, json, os, re, time
from importlib.metadata import version
from pathlib import Path
import numpy as np

BATCH = 20      # maps that are handed over together, as at a test
THREADS = int(os.environ.get("OMP_NUM_THREADS") or 1)

# Each contestant prepares the data in the form that it wants, untimed, and returns a pass: () -> (values, a function that gives their bounds).

def scikit_learn(maps, scores, masks, labels):
    from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
    def f1max(truth, score):
        precision, recall, _ = precision_recall_curve(truth, score)
        return (2*precision*recall/np.maximum(precision + recall, 1e-12)).max()
    given, metrics = {"I": (labels, scores), "P": (masks.ravel(), maps.ravel())}, {"AUROC": roc_auc_score, "AP": average_precision_score, "F1max": f1max}
    return lambda: ({f"{part}-{name}": f(*arrays) for part, arrays in given.items() for name, f in metrics.items()}, dict)

def anomalib(maps, scores, masks, labels):
    import cv2, torch
    from anomalib.metrics.aupro import _AUPRO
    torch.set_num_threads(THREADS); cv2.setNumThreads(THREADS)
    maps, masks = torch.from_numpy(maps), torch.from_numpy(masks.astype(np.int64))
    def once():
        metric = _AUPRO()
        for b in batches(len(maps)): metric.update(maps[b], masks[b])
        return {"AUPRO": metric.compute()}, dict
    return once

def adeval(maps, scores, masks, labels):
    "It needs the range of the scores beforehand, and gets the true one for nothing."
    import cv2
    from adeval import EvalAccumulator
    cv2.setNumThreads(THREADS)
    masks, labels = masks.astype(np.uint8), labels.astype(np.uint8)
    ends = [float(f(x)) for x in (scores, maps) for f in (np.min, np.max)]
    def once():
        e = EvalAccumulator(*ends, nstrips=1000)
        for b in batches(len(maps)): e.add_anomap_batch(maps[b], masks[b]); e.add_image(scores[b], labels[b])
        s = e.summary()
        return {"I-AUROC": s["i_auroc"], "I-AP": s["i_aupr"], "P-AUROC": s["p_auroc"], "P-AP": s["p_aupr"], "AUPRO": s["p_aupro"]}, dict
    return once

def ours(*how):
    def prepare(maps, scores, masks, labels):
        from mdd_bench.evaluation.metrics import Evaluator
        def once():
            e = Evaluator(*how)
            for b in batches(len(maps)): e.update(maps[b], scores[b], masks[b], labels[b])
            return e.compute(), e.bounds
        return once
    return prepare

CONTESTANTS = {"scikit-learn": (scikit_learn, ("scikit-learn", "numpy")), "anomalib": (anomalib, ("anomalib", "torch")), "adeval": (adeval, ("adeval", "numpy")),
               "exact": (ours("exact"), ("mdd_bench", "numpy")), "streaming": (ours("streaming"), ("mdd_bench", "numpy")),
               "binned": (ours("streaming", .3, 2**19), ("mdd_bench", "numpy"))}

def batches(n): return [slice(i, i + BATCH) for i in range(0, n, BATCH)]

def seconds(contestant, data, repeats):
    "The median is read from `repeats` passes, after one that is not timed."
    once = CONTESTANTS[contestant][0](**data)
    values, bounds = once()
    times = []
    for _ in range(repeats): start = time.perf_counter(); once(); times.append(time.perf_counter() - start)
    return dict(seconds=times, values=plain(values), bounds={k: list(v) for k, v in bounds().items()})

def resident():
    "What the process holds in memory now, and the most it ever held (VmRSS, VmHWM), in MB. Linux only."
    return [int(re.search(rf"{k}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])*1024/1e6 for k in ("VmRSS", "VmHWM")]

def memory(contestant, data, n):
    "Peak memory of update(), compute() and bounds() above that before the first update, when a batch is there already. Every batch is the first one times another factor per map."
    from mdd_bench.evaluation.metrics import Evaluator
    maps, scores, masks, labels = (data.pop(k)[:BATCH].copy() for k in ("maps", "scores", "masks", "labels"))
    rng, batch, evaluator = np.random.default_rng(0), maps.copy(), Evaluator(contestant)
    try: Path("/proc/self/clear_refs").write_text("5")      # the peak so far, of reading the file, is forgotten
    except OSError: pass
    before, start = resident()[0], time.perf_counter()
    for done in range(0, n, len(batch)):
        factors, k = rng.uniform(1, 1.2, len(batch)).astype(np.float32), n - done
        np.multiply(maps, factors[:, None, None], out=batch)
        evaluator.update(batch[:k], (scores*factors)[:k], masks[:k], labels[:k])
    values, bounds = evaluator.compute(), evaluator.bounds()
    return dict(maps=n, peak_mb=resident()[1] - before, seconds=time.perf_counter() - start, values=plain(values), bounds={k: list(v) for k, v in bounds.items()})

def plain(values): return {k: float(v) for k, v in values.items()}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contestant", choices=CONTESTANTS); parser.add_argument("file")
    parser.add_argument("--repeats", type=int, default=5); parser.add_argument("--memory", type=int, metavar="N")
    a = parser.parse_args()
    with np.load(a.file) as z: data = {k: z[k] for k in ("maps", "scores", "masks", "labels")}
    got = memory(a.contestant, data, a.memory) if a.memory else seconds(a.contestant, data, a.repeats)
    print(json.dumps(dict(contestant=a.contestant, **got, versions={p: version(p) for p in CONTESTANTS[a.contestant][1]})))
