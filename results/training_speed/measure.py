"""What changed in the speed of training: every trained detector before and after, and the steps of MDD-Net.

python results/training_speed/measure.py OTHER --rounds 3

OTHER is a checkout of an earlier commit (git worktree add ../before 212dfa6). Both checkouts make the same runs in
turns, each in a process of its own whose threads are those of OMP_NUM_THREADS. Beside this file it writes
training.csv, with the seconds of every run and of its parts, and training.md, with medians over the rounds.
"""
import argparse, json, os, subprocess, sys, tempfile
from pathlib import Path
import numpy as np
import pandas as pd

HERE = Path(__file__).resolve().parent
DATA = dict(data="embedded-v1", size=128, backbone="resnet18", weights="procedural", seed=0)
ARMS = {
    "rd4ad": dict(detector="rd4ad"),
    "mddnet, mirror": dict(detector="mddnet", options=dict(decoder="mirror")),
    "mddnet, light": dict(detector="mddnet", options=dict(decoder="light")),
    "simplenet": dict(detector="simplenet"),
    "uniad": dict(detector="uniad"),
    "dmad": dict(detector="dmad"),
    "bgad": dict(detector="bgad"),
}

ONE_RUN = '''
import json, sys, time, warnings
warnings.simplefilter("ignore")
import torch
from mdd_bench.parts.backbone import Backbone
from mdd_bench.running import training
from mdd_bench.running.identity import model_plans, resolve
from mdd_bench.running.models import make_detector
from mdd_bench.running.runtime import Runtime
from mdd_bench.running.spec import make_spec

spent = {}
def timed(owner, name, part):
    plain = getattr(owner, name)
    def call(*args, **kwargs):
        start = time.perf_counter()
        try: return plain(*args, **kwargs)
        finally: spent[part] = spent.get(part, 0) + time.perf_counter() - start
    setattr(owner, name, call)

fields, epochs = json.loads(sys.argv[1]), int(sys.argv[2])
spec = make_spec(**fields, epochs=epochs)
plan, runtime = model_plans(resolve(spec))[0], Runtime("cpu")
detector = make_detector(plan, runtime)
data = training.load_training_data(detector, plan, runtime)
timed(Backbone, "forward", "backbone")
timed(type(detector), "losses", "losses")
timed(torch.Tensor, "backward", "backward")
for optimizer in (torch.optim.Adam, torch.optim.AdamW): timed(optimizer, "step", "optimizer")
timed(training, "train_step", "all of the step")
ends = []
plain_hook = detector.on_epoch
def on_epoch(*args):
    ends.append((time.perf_counter(), dict(spent)))
    plain_hook(*args)
detector.on_epoch = on_epoch
training.train(detector, data, plan.resolved.recipe, runtime)
(first, before), (last, after) = ends[0], ends[-1]
parts = {part: after[part] - before.get(part, 0) for part in after}
print(json.dumps(dict(seconds=last - first, images=(len(ends) - 1)*len(data.images), **parts)))
'''

def one_run(checkout, fields, epochs, cache):
    "The seconds of all epochs but the first."
    environment = os.environ | dict(PYTHONPATH=str(checkout), MDD_BENCH_CACHE=str(cache))
    command = [sys.executable, "-c", ONE_RUN, json.dumps(fields), str(epochs)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cache)
    if done.returncode: raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    args = parser.parse_args()
    checkouts = dict(before=args.other.resolve(), after=HERE.parents[1])
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for side in checkouts: Path(folder, side).mkdir()
        for round in range(args.rounds):
            for arm, fields in ARMS.items():
                for side, checkout in checkouts.items():
                    result = one_run(checkout, DATA | fields, args.epochs, Path(folder, side))
                    rows.append(dict(arm=arm, side=side, round=round, **result))
                    print(rows[-1], flush=True)
                pd.DataFrame(rows).to_csv(HERE/"training.csv", index=False)
    write_report(pd.DataFrame(rows))

PARTS = {
    "backbone": "backbone, images with defects",
    "losses": "forward pass",
    "backward": "backward pass",
    "optimizer": "optimizer",
    "waiting": "waiting for the next batch, and the rest",
}

def rates(table):
    "Median images per second of every arm on both sides, and their ratio."
    rate = table.assign(rate=table.images/table.seconds).groupby(["arm", "side"], sort=False).rate.median()
    return rate.unstack("side").assign(ratio=lambda r: r.after/r.before)

def parts_of_a_step(table, arm):
    "Median milliseconds of each part of a step of 16 images, on both sides."
    own = table[table.arm == arm].fillna(0)
    known = own.backbone + own.losses + own.backward + own.optimizer
    own = own.assign(waiting=own.seconds - known)
    per_step = own[list(PARTS)].mul(16000/own.images, axis=0).assign(side=own.side)
    return per_step.groupby("side").median().T[["before", "after"]].rename(index=PARTS)

def markdown(name, table, digits):
    "A table in Markdown."
    lines = [" | ".join([name, *table]), " | ".join([":---", *["---:"]*len(table.columns)])]
    lines += [" | ".join([head, *(f"{v:.{digits}f}" for v in row)]) for head, row in zip(table.index, table.to_numpy())]
    return "\n".join(f"| {line} |" for line in lines)

def write_report(table):
    "Write training.md."
    rounds = table["round"].nunique()
    about = (f"{DATA['data']}, {DATA['size']} px, {DATA['backbone']} with {DATA['weights']} weights, stored features; "
             f"one epoch of 144 images after one that is not timed; OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS')}, "
             f"medians of {rounds} rounds in which both sides take turns. Before: commit 212dfa6.")
    of_runs = table.groupby(["arm", "side"]).seconds
    spread = ((of_runs.max() - of_runs.min())/of_runs.median()).max()
    about += f" The machine is noisy: the rounds of one row differ by up to {100*spread:.0f}%."
    texts = ["# Training before and after", about, markdown("images/s", rates(table), 2)]
    for arm in ("mddnet, mirror", "mddnet, light"):
        texts += [f"Milliseconds of a step of 16 images, {arm}:", markdown("part", parts_of_a_step(table, arm), 0)]
    (HERE/"training.md").write_text("\n\n".join(texts) + "\n", encoding="utf-8")

if __name__ == "__main__":
    main()
