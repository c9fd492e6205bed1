"""Runs without images, which the workers of a cluster can import. They wait for a file and write a record.

As a program, `python stub_runs.py OUT RUNS` sweeps others in processes of their own, without torch."""
import os, sys, time
from pathlib import Path
from types import SimpleNamespace
from mdd_bench.running.job import Abandoned, Failure, Job
from mdd_bench.running.store import Record, Store

def note(out, *words):
    "Add a line to the log, in one write."
    with open(Path(out)/"log.txt", "a") as log: log.write(" ".join(map(str, words)) + "\n")

def log_of(out):
    "The lines of the log, as lists of words."
    file = Path(out)/"log.txt"
    return [line.split() for line in file.read_text().splitlines()] if file.is_file() else []

def planned(out, number, training=None, features=None):
    "A stub run as a sweep plans it; its backbone is known by the name of its features."
    from mdd_bench.running.sweep import Planned
    settings = dict(device="cpu", workers=0, cache_gb=0, keep_model=False)
    ids = f"run{number}", training or f"training{number}"
    job = Job(SimpleNamespace(protocols=[], size=64), *ids, f"stub {number}", str(out), True, settings)
    backbone = SimpleNamespace(hash=features, layers=[1])
    resolved = SimpleNamespace(dataset=SimpleNamespace(fingerprint="0"), backbone=backbone)
    return Planned(job, resolved, False, 0, None)

class Progress:
    "Stands in for the bar of a sweep, and remembers what it was told."
    def __init__(self): self.said = []
    def show(self, running): pass
    def say(self, planned, word): self.said.append((planned.job.run_id, word))
    def end(self, planned, word): self.say(planned, word)

def make_record(job, folder, environment, abandoned):
    "Wait until the file `go` is there; returns a failure for each line with this run in the file `fail`."
    out = Path(job.out)
    note(out, "begin", job.run_id, os.getpid())
    while not (out/"go").exists():
        if abandoned():
            note(out, "abandoned", job.run_id)
            raise Abandoned
        time.sleep(.02)
    fail = (out/"fail").read_text().split() if (out/"fail").is_file() else []
    tries = sum(words[:2] == ["begin", job.run_id] for words in log_of(out))
    if tries <= fail.count(job.run_id): return Failure(job.spec, "told to", out/"fail", False)
    with job.store.claim(job.run_id): job.store.write(Record(job.run_id, {}, {}, {}, {}))
    note(out, "end", job.run_id, os.getpid())
    return None

# --- as a program

def slow_run(out, run_id):
    "Called in a process of its own: write a record and its files little by little."
    store = Store(out)
    if store.has(run_id): return 0
    with store.claim(run_id) as folder:
        if store.has(run_id): return 0
        note(out, "train", run_id)
        (folder/"history.csv").write_text("")
        for i in range(10):
            with open(folder/"history.csv", "a") as file: file.write(f"0,{i},0.5\n"*100)
            time.sleep(.02)
        (folder/"checkpoint.pt").write_text("half")
        time.sleep(.05)
        (folder/"checkpoint.pt").unlink()
        store.write(Record(run_id, {}, {}, {}, {}))
    return 0

def main(out, runs):
    "Sweep stub runs on two threads."
    from mdd_bench.running import job, sweep
    from mdd_bench.running.cluster import threads
    from mdd_bench.running.processes import warm_process
    warm_process.modules = ["stub_runs"]
    job.work_of = lambda job: ("stub_runs:slow_run", job.out, job.run_id)
    Store(out).locks.mkdir(parents=True, exist_ok=True)
    groups = [[planned(out, number)] for number in range(runs)]
    missing = [group for group in groups if not group[0].job.is_done()]
    with threads([{}, {}]) as crew: failures = sweep.Queue(missing, crew, Progress()).run_all()
    sys.exit(1 if failures else 0)

if __name__ == "__main__": main(Path(sys.argv[1]), int(sys.argv[2]))
