"Several runs at once, sweeps that are killed, what is read ahead, and losses that are fetched together."
import json, os, random, signal, subprocess, sys, threading, time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
import pytest
import torch
from conftest import small_spec, sweep_flags
from tqdm import tqdm
from mdd_bench.data.loading import AHEAD, prefetched
from mdd_bench.errors import TrainingError
from mdd_bench.running import sweep as sweeping
from mdd_bench.running import training
from mdd_bench.running.identity import resolve
from mdd_bench.running.store import Store
from mdd_bench.running.study import load_study

# --- several runs at once

def missing(*seeds, training_ids=None, label=None):
    "Runs to make that no detector knows, and their labels."
    ids = training_ids or [f"training {seed}" for seed in seeds]
    return [(SimpleNamespace(run_id=f"run {seed}", training_id=i, spec=None), label or f"seed {seed}")
            for seed, i in zip(seeds, ids)]

@pytest.fixture
def make(tmp_path, monkeypatch):
    "A function: make runs by a stand-in for `make_record`, `jobs` at once; returns the failures."
    def call(runs, stand_in, jobs=2, keep_model=False):
        monkeypatch.setattr(sweeping, "make_record", stand_in)
        bar = tqdm(total=len(runs), disable=True)
        settings = dict(keep_model=keep_model)
        return sweeping.make_records(runs, Store(tmp_path), True, settings, jobs, bar)
    return call

def test_two_runs_are_made_at_once(make):
    both = threading.Barrier(2, timeout=20)     # passes when two are waiting
    def waits(resolved, store, plain, settings, show): both.wait()
    assert make(missing(0, 1), waits) == []

def test_with_one_job_no_two_runs_are_made_at_once(make):
    under_way, most = [], []
    def counts(resolved, store, plain, settings, show):
        under_way.append(resolved.run_id)
        time.sleep(.02)
        most.append(len(under_way))
        under_way.remove(resolved.run_id)
    assert make(missing(0, 1, 2), counts, jobs=1) == [] and most == [1, 1, 1]

def test_runs_that_share_a_training_are_made_in_order_and_keep_their_model(make):
    made = []
    def notes(resolved, store, plain, settings, show): made.append((resolved.run_id, settings["keep_model"]))
    make(missing(0, 1, 2, training_ids=["a", "b", "a"]), notes, jobs=1)
    assert made == [("run 0", True), ("run 2", True), ("run 1", False)]

def test_a_failed_run_is_returned_and_the_rest_goes_on(make):
    made = []
    def fails(resolved, store, plain, settings, show):
        made.append(resolved.run_id)
        return "failed" if resolved.run_id == "run 1" else None
    assert make(missing(0, 1, 2), fails) == ["failed"] and sorted(made) == ["run 0", "run 1", "run 2"]

def test_an_error_that_is_no_runs_own_stops_the_others(make):
    stopped = []
    def full_disk(resolved, store, plain, settings, show):
        if resolved.run_id == "run 1": raise OSError("no space left")
        try:
            while True:
                time.sleep(.01)
                show(.5, "train")
        except KeyboardInterrupt:
            stopped.append(resolved.run_id)
            raise
    with pytest.raises((OSError, KeyboardInterrupt)): make(missing(0, 1, 2), full_disk)
    assert stopped in ([], ["run 0"])     # stopped on its way, or before it started

def test_after_an_interruption_no_run_is_started(make):
    made = []
    def interrupted(resolved, store, plain, settings, show):
        made.append(resolved.run_id)
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): make(missing(0, 1, 2, 3), interrupted, jobs=1)
    assert made == ["run 0"]

def test_runs_of_one_label_have_a_place_each_in_the_bar():
    progress = sweeping.SweepBar(tqdm(total=2, disable=True), 2)
    progress.show("run 0", "rd4ad, seed 0", .5, "train")
    progress.show("run 1", "rd4ad, seed 0", .25, "train")
    assert progress.bar.n == .75
    progress.finish("run 0", "rd4ad, seed 0", "done")
    assert progress.bar.n == 1.25 and list(progress.running) == ["run 1"]

def test_as_many_runs_as_fit_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert sweeping.jobs_that_fit("cpu") == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "16")
    assert sweeping.jobs_that_fit("cpu") == 1

def test_the_number_of_runs_at_once_can_be_said(tmp_path, monkeypatch):
    asked = []
    def notes(missing, store, plain, settings, jobs, bar):
        asked.append(jobs)
        return []
    monkeypatch.setattr(sweeping, "make_records", notes)
    spec = small_spec()
    study = replace(load_study("benchmark"), base={}, grid={})
    monkeypatch.setattr(type(study), "named_specs", lambda self: [sweeping.NamedSpec("", spec)])
    for jobs in (3, None): sweeping.sweep(study, tmp_path, "cpu", plain=True, jobs=jobs)
    assert asked == [3, sweeping.jobs_that_fit("cpu")] and not Store(tmp_path).has(resolve(spec).run_id, [])

# --- sweeps that are killed

def processes_of(mark):
    "The processes, not yet dead, that were started with a word in their environment."
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            alive = (folder/"stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
            if alive and mark.encode() in (folder/"environ").read_bytes(): found.append(folder.name)
        except OSError: pass
    return found

def start_sweep(out, *flags):
    "A sweep of four runs in a process group of its own; the word that marks all its processes."
    mark = f"mark-{os.urandom(4).hex()}"
    program = [sys.executable, "-c", "from mdd_bench.cli import main; main()"]
    grid = sweep_flags(detector="patchcore,rd4ad", seed="0,1")
    command = [*program, "sweep", "benchmark", *grid, "--out", str(out), *flags]
    env = os.environ | dict(MARK=mark, OMP_NUM_THREADS="1")
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, env=env, start_new_session=True, **quiet), mark

def gone(mark, seconds=10):
    "Whether all processes of a sweep are gone in time."
    deadline = time.monotonic() + seconds
    while processes_of(mark) and time.monotonic() < deadline: time.sleep(.05)
    return not processes_of(mark)

def records_in(out): return sorted(out.glob("benchmark/runs/*/record.json"))

def check_that_it_goes_on(out, *flags):
    "The same sweep again: what was recorded is as it was, the rest is made, and nothing else is left."
    before = {file: file.stat().st_mtime_ns for file in records_in(out)}
    process, mark = start_sweep(out, *flags)
    _, printed = process.communicate()
    assert process.returncode == 0, printed
    assert len(records_in(out)) == 4 and all(json.loads(file.read_text()) for file in records_in(out))
    assert all(file.stat().st_mtime_ns == time_of for file, time_of in before.items())
    records = {file.parent.name for file in records_in(out)}
    names = {path.name for path in out.glob("benchmark/runs/**/*")} - records
    kept = {".lock", "record.json", "scores.csv", "history.csv", "samples.npz", "replicates.npz", "run.ipynb"}
    assert names <= kept and gone(mark)

@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_sweep_that_is_killed_leaves_nobody_behind_and_goes_on(tmp_path, number):
    process, mark = start_sweep(tmp_path, "--plain")
    while not records_in(tmp_path): time.sleep(.01)
    os.killpg(process.pid, number)
    process.communicate()
    assert gone(mark) and 1 <= len(records_in(tmp_path)) < 4
    check_that_it_goes_on(tmp_path, "--plain")

def test_ctrl_c_ends_a_sweep_within_seconds(tmp_path):
    process, mark = start_sweep(tmp_path, "--plain")
    while not records_in(tmp_path): time.sleep(.01)
    os.killpg(process.pid, signal.SIGINT)
    _, printed = process.communicate(timeout=5)
    assert process.returncode == 130 and "Traceback" not in printed
    assert printed.strip().splitlines()[-1] == "stopped; what is done is kept, start again to go on"
    assert gone(mark) and len(records_in(tmp_path)) < 4

@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_a_sweep_of_notebooks_that_is_killed_at_any_moment_goes_on(tmp_path, seed):
    process, mark = start_sweep(tmp_path)
    time.sleep(random.Random(seed).uniform(1, 20))
    try: os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError: pass      # it was done
    process.communicate()
    assert gone(mark)
    check_that_it_goes_on(tmp_path)

# --- what is read ahead

def test_items_come_in_order_and_are_made_ahead():
    made = []
    def items():
        for i in range(6):
            made.append(i)
            yield i
    ahead = prefetched(items())
    assert next(ahead) == 0
    deadline = time.monotonic() + 10
    while len(made) < 1 + AHEAD and time.monotonic() < deadline: time.sleep(.001)
    assert made[:1 + AHEAD] == list(range(1 + AHEAD)) and list(ahead) == [1, 2, 3, 4, 5]

def test_an_error_in_making_an_item_comes_in_its_turn():
    def items():
        yield 0
        raise ValueError("the second one")
    ahead = prefetched(items())
    assert next(ahead) == 0
    with pytest.raises(ValueError, match="the second one"): next(ahead)

def test_the_thread_ends_with_the_consumer():
    before = threading.active_count()
    ahead = prefetched(iter(range(100)))
    next(ahead)
    ahead.close()
    assert threading.active_count() == before

@pytest.mark.parametrize("workers, thread", [(0, True), (2, False)])
def test_workers_are_not_started_from_a_thread(monkeypatch, workers, thread):
    "A process that is forked from a thread beside others may hang."
    detector = SimpleNamespace(needs=set())
    readers = []
    def loaded(*args):
        readers.append(threading.current_thread() is not threading.main_thread())
        yield dict(index=torch.tensor([0]), features=[])
    monkeypatch.setattr(training, "loaded_batches", loaded)
    cache = SimpleNamespace(complete=True)
    runtime = SimpleNamespace(workers=workers, device=torch.device("cpu"))
    images = SimpleNamespace(defects=None)
    batches = training.feed(detector, images, 1, runtime, cache)
    with pytest.raises(KeyError): list(batches)     # there is no class to take out
    assert readers == [thread]

# --- losses that are fetched together

def test_a_loss_that_is_not_finite_names_its_own_step():
    recorded = []
    losses = training.LossTerms(lambda epoch, step, terms: recorded.append(step))
    bad = training.FETCHED//2
    with pytest.raises(TrainingError, match=f"'a' is nan at epoch 0, step {bad}"):
        for step in range(training.FETCHED):
            losses.add(0, step, dict(a=torch.tensor(float("nan") if step >= bad else 1.)))
    assert recorded == list(range(bad))

def test_all_losses_are_recorded_in_order():
    recorded = []
    losses = training.LossTerms(lambda *row: recorded.append(row))
    steps = training.FETCHED + 3
    for step in range(steps): losses.add(0, step, dict(a=torch.tensor(float(step)), b=torch.tensor(2.)))
    losses.fetch()
    assert recorded == [(0, step, dict(a=float(step), b=2.)) for step in range(steps)]

def test_bfloat16_where_it_is_imitated_is_a_warning(monkeypatch, recwarn):
    for able, warnings in ((True, 0), (False, 1)):
        monkeypatch.setattr(training, "has_bfloat16", lambda device, able=able: able)
        training.warn_of_imitation("bfloat16", torch.device("cpu"))
        training.warn_of_imitation("float32", torch.device("cpu"))
        assert len(recwarn) == warnings
    assert "several times faster" in str(recwarn[0].message)
