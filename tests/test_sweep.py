"Several runs at once, sweeps that are killed, what is read ahead, and losses that are fetched together."
import json, os, random, re, signal, subprocess, sys, threading, time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
import pytest
import torch
from conftest import sweep_flags
from tqdm import tqdm
from mdd_bench.data.loading import AHEAD, prefetched
from mdd_bench.errors import SpecError, TrainingError
from mdd_bench.running import cluster, training
from mdd_bench.running import sweep as sweeping
from mdd_bench.running.cluster import threads
from mdd_bench.running.forecast import Forecast, earlier_records, seconds_for
from mdd_bench.running.inventory import inventory, prune
from mdd_bench.running.job import Failure
from mdd_bench.running.locks import SILENCE, Holder, Lock, take_away
from mdd_bench.running.store import Record, Store
from mdd_bench.running.study import Study, load_study, parameter_cell, typed_parameter
from mdd_bench.running.sweep import Queue, Underway, in_order
from stub_runs import Progress, log_of, planned

# --- several runs at once

@pytest.fixture
def make(tmp_path, monkeypatch):
    "A function: make stub runs by a stand-in for `make_record`, `jobs` at once; (failures, what was said)."
    def call(groups, stand_in, jobs=2):
        monkeypatch.setattr(sweeping, "make_record", stand_in)
        Store(tmp_path).locks.mkdir(parents=True, exist_ok=True)
        progress = Progress()
        with threads([{}]*jobs) as crew: failures = Queue(groups, crew, progress).run_all()
        return failures, progress.said
    return call

@pytest.fixture
def runs(tmp_path):
    "A function: stub runs with these numbers, each in a group of its own."
    return lambda *numbers: [[planned(tmp_path, number)] for number in numbers]

def failure(job, final=False): return Failure(job.spec, "a reason", Path("log"), final)

def test_two_runs_are_made_at_once(make, runs):
    both = threading.Barrier(2, timeout=20)     # passes when two are waiting
    def waits(job, folder, environment, abandoned): both.wait()
    failures, said = make(runs(0, 1), waits)
    assert failures == [] and sorted(said) == [("run0", "done"), ("run1", "done")]

def test_with_one_job_no_two_runs_are_made_at_once(make, runs):
    under_way, most = [], []
    def counts(job, folder, environment, abandoned):
        under_way.append(job.run_id)
        time.sleep(.02)
        most.append(len(under_way))
        under_way.remove(job.run_id)
    assert make(runs(0, 1, 2), counts, jobs=1)[0] == [] and most == [1, 1, 1]

def test_runs_that_share_a_training_are_made_in_order_and_keep_their_model(make, tmp_path):
    made = []
    def notes(job, folder, environment, abandoned): made.append((job.run_id, job.settings["keep_model"]))
    missing = [planned(tmp_path, number, training) for number, training in enumerate("aba")]
    make(sweeping.by_training(missing), notes, jobs=1)
    assert made == [("run0", True), ("run2", True), ("run1", False)]

@pytest.mark.parametrize("stage, order", [("features", [2, 1]), ("train", [1, 2])])
def test_runs_on_other_features_come_first_while_these_are_computed(tmp_path, stage, order):
    (first,), *waiting = [[planned(tmp_path, number, features=name)] for number, name in enumerate("aab")]
    running = {"its future": Underway(first, [], 0, None)}
    place = first.job.store.folder(first.job.run_id)
    place.mkdir(parents=True)
    (place/"progress").write_text(f"{stage} 1 2")
    assert [group[0].job.run_id for group in in_order(waiting, running)] == [f"run{n}" for n in order]

def test_a_failed_run_is_tried_once_more_after_the_others(make, runs):
    made = []
    def fails_once(job, folder, environment, abandoned):
        made.append(job.run_id)
        return failure(job) if made.count(job.run_id) == 1 and job.run_id == "run0" else None
    failures, said = make(runs(0, 1, 2), fails_once, jobs=1)
    assert failures == [] and made == ["run0", "run1", "run2", "run0"]
    assert said[0] == ("run0", "failed, and will be tried again (a reason)")
    assert said[1:] == [("run1", "done"), ("run2", "done"), ("run0", "done")]

def test_a_run_that_fails_twice_is_returned_and_the_rest_of_its_group_goes_on(make, tmp_path):
    made = []
    def fails(job, folder, environment, abandoned):
        made.append(job.run_id)
        return failure(job) if job.run_id == "run0" else None
    groups = sweeping.by_training([planned(tmp_path, number, "same") for number in range(2)])
    failures, said = make(groups, fails)
    assert [f.reason for f in failures] == ["a reason"] and made == ["run0", "run0", "run1"]
    assert said[1:] == [("run0", "failed"), ("run1", "done")]

def test_an_error_that_is_no_runs_own_stops_the_others(make, runs):
    stopped = []
    def full_disk(job, folder, environment, abandoned):
        if job.run_id == "run1": raise OSError("no space left")
        while not abandoned(): time.sleep(.01)
        stopped.append(job.run_id)
    with pytest.raises(OSError, match="no space left"): make(runs(0, 1, 2), full_disk)
    assert stopped == ["run0"]

def test_an_impossible_run_is_not_tried_again(make, runs):
    def impossible(job, folder, environment, abandoned): return failure(job, final=True)
    assert make(runs(0), impossible)[1] == [("run0", "failed")]

def test_an_error_in_a_worker_is_a_failure_of_its_run_and_kept(make, runs):
    def broken(job, folder, environment, abandoned): raise RuntimeError("gone")
    failures, _ = make(runs(0), broken)
    assert [f.reason for f in failures] == ["RuntimeError: gone"]
    assert "Traceback" in failures[0].details.read_text()

def test_a_run_that_another_sweep_has_made_meanwhile_is_not_made_again(make, runs, tmp_path):
    made = []
    def makes_two(job, folder, environment, abandoned):
        made.append(job.run_id)
        for run_id in ("run0", "run1"):
            with job.store.claim(run_id): job.store.write(Record(run_id, {}, {}, {}, {}))
    _, said = make(runs(0, 1), makes_two, jobs=1)
    assert made == ["run0"] and said == [("run0", "done"), ("run1", "made by another sweep")]

def test_it_waits_for_a_run_that_another_sweep_makes(make, runs, tmp_path):
    lock = Lock(tmp_path/"runs"/".locks"/"run0.sweep.lock")
    lock.path.parent.mkdir(parents=True)
    assert lock.acquire()
    threading.Timer(1, lock.release).start()
    started = time.process_time(), time.monotonic()
    failures, said = make(runs(0), lambda *arguments: None)
    assert said == [("run0", "done")] and time.monotonic() - started[1] > .9
    assert time.process_time() - started[0] < .5     # it does not spin

def test_a_run_that_cannot_be_handed_to_the_crew_is_free_for_another_sweep(tmp_path, runs):
    "Its lock is released, so that nobody waits for it for ever."
    Store(tmp_path).locks.mkdir(parents=True)
    with threads([{}]) as crew:
        crew.executor.shutdown()
        with pytest.raises(RuntimeError, match="after shutdown") as caught:
            Queue(runs(0), crew, Progress()).run_all()
    lock = Lock(Store(tmp_path).locks/"run0.sweep.lock")
    assert lock.acquire() and caught.tb     # while the error, and so the queue, is alive
    lock.release()

def test_after_an_interruption_no_run_is_started(make, runs):
    made = []
    def interrupted(job, folder, environment, abandoned):
        made.append(job.run_id)
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): make(runs(0, 1, 2, 3), interrupted, jobs=1)
    assert made == ["run0"]

def test_each_gpu_is_given_to_one_run_at_a_time(tmp_path, monkeypatch):
    used, most = [], []
    def notes(job, folder, environment, abandoned):
        used.append(environment["CUDA_VISIBLE_DEVICES"])
        most.append(sorted(used))
        time.sleep(.05)
        used.remove(environment["CUDA_VISIBLE_DEVICES"])
    monkeypatch.setattr(sweeping, "make_record", notes)
    Store(tmp_path).locks.mkdir(parents=True)
    places = [dict(CUDA_VISIBLE_DEVICES=number) for number in "01"]
    groups = [[planned(tmp_path, number)] for number in range(5)]
    with threads(places) as crew: Queue(groups, crew, Progress()).run_all()
    assert len(most) == 5 and all(at_once in (["0"], ["1"], ["0", "1"]) for at_once in most)

# --- the plan and the bar

def stub_bar(tmp_path, seconds):
    "A bar of stub runs that are expected to take these times."
    missing = [replace(planned(tmp_path, number), seconds=s) for number, s in enumerate(seconds)]
    return missing, sweeping.SweepBar(tqdm(total=1, disable=True), missing)

def test_runs_count_by_their_expected_time(tmp_path):
    missing, progress = stub_bar(tmp_path, [30, None, 10])     # the unknown one is taken for 20
    progress.end(missing[2], "failed")
    assert progress.bar.n == 0
    progress.show([missing[0]])
    assert progress.bar.n == pytest.approx(10/60)
    (missing[0].job.store.folder("run0")).mkdir(parents=True)
    (missing[0].job.store.folder("run0")/"progress").write_text("train 1 2")
    progress.show([missing[0]])
    assert progress.bar.n == pytest.approx((10 + 30*.45)/60)

def test_without_forecasts_runs_count_alike(tmp_path):
    missing, progress = stub_bar(tmp_path, [None, None])
    progress.end(missing[0], "failed")
    progress.show([])
    assert progress.bar.n == .5

def test_a_plan_says_what_is_done_and_how_long_the_rest_takes(tmp_path):
    runs = [replace(planned(tmp_path, n), seconds=s, done=done)
            for n, (s, done) in enumerate([(100, True), (100, False), (None, False)])]
    lines = sweeping.describe_plan(runs, at_once=2)
    assert [line.split()[:2] for line in lines[:3]] == [["run0", "done"], ["run1", "2"], ["run2", "unknown"]]
    assert lines[3] == "3 runs, 1 done, 2 to make: about 2 min with 2 at once, 1 of unknown length"

def test_of_runs_that_share_a_training_the_first_missing_one_trains(tmp_path):
    "The one that is done has not kept its model."
    runs = [planned(tmp_path, number, training) for number, training in enumerate("aaab")]
    runs = [replace(run, steps=10, done=number == 0) for number, run in enumerate(runs)]
    sweeping.expect(runs, SimpleNamespace(seconds=lambda resolved, steps: 5. + steps))
    assert [run.seconds for run in runs] == [None, 15, 5, 15]
    assert sweeping.expected_seconds(runs, at_once=2) == 17.5

def test_a_forecast_grows_with_the_pixels():
    record = Record("r", dict(detector="rd4ad", size=64), {}, dict(train_s=60.), kept().provenance)
    def run_of(size):
        spec = SimpleNamespace(detector="rd4ad", size=size, setting="unified")
        data, backbone = SimpleNamespace(fingerprint="f"), SimpleNamespace(name="b")
        return SimpleNamespace(spec=spec, dataset=data, backbone=backbone)
    assert [Forecast([record]).seconds(run_of(size), 100) for size in (64, 128)] == [120, 480]

def test_as_many_runs_as_fit_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert cluster.places_here("cpu") == [{}, {}] and cluster.places_here("cpu", jobs=3) == [{}]*3
    monkeypatch.setenv("OMP_NUM_THREADS", "16")
    assert cluster.places_here("cpu") == [{}]

@pytest.mark.parametrize("visible, jobs, expected", [
    (None, None, ["0", "1", "2"]), ("4,5", None, ["4", "5"]), ("4,5", 3, ["4", "5", "4"]), (None, 1, ["0"])])
def test_every_gpu_is_a_place_and_those_that_are_hidden_are_none(monkeypatch, visible, jobs, expected):
    monkeypatch.setattr(cluster, "choose_device", lambda name: torch.device(name or "cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    if visible: monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    else: monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [place["CUDA_VISIBLE_DEVICES"] for place in cluster.places_here(None, jobs)] == expected
    assert cluster.places_here("cuda:1") == [{}]

# --- locks

@pytest.fixture
def elsewhere(tmp_path):
    "A function: the word of a process on another host, so many seconds old, beside a lock; returns its file."
    def leave(age, path=tmp_path/"a.lock"):
        holder = Holder(path.with_suffix(".holder"))
        holder.me = holder.me | dict(host="another")
        assert holder.leave()
        os.utime(holder.path, (time.time() - age,)*2)
        return path
    return leave

@pytest.mark.parametrize("age, free", [(0, False), (SILENCE/2, False), (SILENCE + 5, True)])
def test_a_holder_elsewhere_is_believed_until_it_is_silent(elsewhere, age, free):
    assert Lock(elsewhere(age)).acquire() == free

def test_of_two_who_find_a_dead_holder_one_takes_the_lock(elsewhere):
    path = elsewhere(SILENCE + 5)
    slow, fast = Lock(path), Lock(path)
    seen = slow.holder.read()
    assert fast.acquire() and not take_away(path.with_suffix(".holder"), seen)
    assert fast.holder.read() == fast.holder.me and not slow.acquire()

def test_one_who_wakes_up_late_leaves_the_word_of_the_new_holder(elsewhere, tmp_path):
    late = Holder(tmp_path/"a.holder")
    lock = Lock(tmp_path/"a.lock")
    assert lock.acquire()
    os.utime(lock.holder.path, (0, 0))
    late.touch()
    late.remove()
    assert lock.holder.path.stat().st_mtime == 0 and lock.holder.read() == lock.holder.me

def test_a_holder_that_cannot_open_its_file_leaves_that_of_another(tmp_path, monkeypatch):
    first, second = Holder(tmp_path/"run.holder"), Holder(tmp_path/"run.holder")
    first.leave()
    def refuses(*args): raise OSError(24, "Too many open files")
    monkeypatch.setattr("builtins.open", refuses)
    with pytest.raises(OSError, match="Too many"): second.leave()
    assert first.read() == first.me

def test_a_lock_that_a_dead_process_of_this_machine_left_is_free(tmp_path):
    Holder(tmp_path/"a.holder").leave()
    lock = Lock(tmp_path/"a.lock")
    assert lock.acquire() and not Lock(tmp_path/"a.lock").acquire()
    lock.release()
    assert not lock.holder.path.exists() and Lock(tmp_path/"a.lock").acquire()

# --- forecasts

def kept(steps=100, minutes=2, train_s=60., **changes):
    "A record of a run."
    spec = dict(detector="rd4ad", size=64, backbone="b", setting="unified")
    times = dict(started="2026-01-01T10:00:00Z", finished=f"2026-01-01T10:{minutes:02}:00Z")
    provenance = times | dict(steps=steps, data_fingerprint="f") | changes
    return Record("r", spec, {}, dict(train_s=train_s), provenance)

@pytest.mark.parametrize("record, steps, seconds", [
    (kept(), 200, 180), (kept(), 0, 60), (kept(steps=None), 500, 60), (kept(train_s=600.), 50, 420),
    (kept(models=dict(a=dict(steps=60), b=dict(steps=40))), 200, 180)])
def test_the_time_of_a_run_with_other_steps(record, steps, seconds):
    assert seconds_for(record, steps) == seconds

def test_records_without_their_times_are_left_out(tmp_path):
    store = Store(tmp_path/"study")
    odd = kept()
    del odd.provenance["started"]
    for run_id, record in (("a", kept()), ("b", odd)):
        with store.claim(run_id): store.write(replace(record, id=run_id))
    with store.claim("c") as folder: (folder/"record.json").write_text("{")
    assert [r.id for r in earlier_records(tmp_path/"other")] == ["a"]

# --- what a results folder holds

def results_of(tmp_path):
    "A results folder with a complete record, a damaged one, a log, and a folder of somebody else."
    store, ids = Store(tmp_path/"study"), ("a"*12, "b"*12)
    for run_id in ids:
        with store.claim(run_id): store.write(replace(kept(), id=run_id))
    (store.folder(ids[1])/"record.json").write_text("{")
    (store.runs/f"{'c'*12}.log").write_text("starting\nMemoryError: too much\nend")
    other = tmp_path/"elsewhere"/"runs"/"exp1"
    other.mkdir(parents=True)
    (other/"best.pt").touch()
    return store, ids

def test_results_are_listed_and_only_what_is_broken_is_pruned(tmp_path, cli):
    store, (sound, damaged) = results_of(tmp_path)
    code, printed, _ = cli("results", tmp_path)
    states = [line.split()[0] for line in printed.splitlines()[:3]]
    assert code == 0 and states == ["complete", "damaged", "failed"] and "MemoryError: too much" in printed
    assert cli("results", tmp_path, "--prune", "--yes")[0] == 0
    assert store.has(sound) and not store.folder(damaged).exists() and not list(store.runs.glob("*.log"))
    assert (tmp_path/"elsewhere"/"runs"/"exp1"/"best.pt").exists()

def test_what_has_changed_since_the_list_is_not_deleted(tmp_path):
    store, (sound, damaged) = results_of(tmp_path)
    items = inventory(tmp_path)
    store.folder(damaged).joinpath("record.json").unlink()
    (store.folder(damaged)/"checkpoint.pt").touch()          # somebody makes it anew
    prune(items)
    assert (store.folder(damaged)/"checkpoint.pt").exists()

# --- what a sweep finds

TWINS = """
base: {data: embedded-v1-smoke, size: 64, weights: lite0, layers: [1, 2], detector: patchcore}
arms: {default: {}, five: {neighbours: 5}, written out: {neighbours: 9}}
"""

def test_two_arms_that_are_one_run_are_refused(tmp_path, cli):
    (tmp_path/"twins.yaml").write_text(TWINS)
    code, _, printed = cli("sweep", "twins.yaml", "--dry-run")
    assert code == 2
    assert re.search("the arms 'default' and 'written out' are the same run, [0-9a-f]{12}. remove", printed)
    with pytest.raises(SpecError, match="'default' and 'written out'"): load_study("twins.yaml").names()
    assert list(load_study("twins.yaml", arms="default,five").names().values()) == ["default", "five"]

def test_an_axis_without_values_is_refused():
    with pytest.raises(SpecError, match="seed of the study labels has no"): load_study("labels", seed=[])

@pytest.mark.parametrize("value, default, typed", [
    ("3", None, 3), ("a.png", None, "a.png"), ("none", None, None), (None, None, None), ("3,b", [], [3, "b"]),
    ("3", [None], [3])])
def test_a_parameter_whose_default_has_no_type_takes_any_value(value, default, typed):
    assert typed_parameter("x", value, default) == typed

def test_a_parameter_whose_default_has_a_strange_type_is_refused():
    with pytest.raises(SpecError, match="x='3' does not fit"): typed_parameter("x", "3", {1, 2})

STRANGE = 'C:\\new\\"w".pth\n'

def test_a_parameter_cell_holds_the_values_whatever_they_contain():
    cell, values = parameter_cell(Study("mine", base=dict(weights=STRANGE, data="a'b"))), {}
    exec(cell, values)
    assert values["weights"] == STRANGE and values["data"] == "a'b" and values["backbone"] is None
    assert 'data = "a\'b"' in cell

def test_a_folder_that_cannot_be_made_is_an_error_before_the_first_run(tmp_path, cli):
    (tmp_path/"file").touch()
    code, _, printed = cli("sweep", "benchmark", *sweep_flags(), "--plain", "--out", tmp_path/"file")
    assert code == 2 and "cannot make the folder" in printed and "choose another --out" in printed

def test_a_file_that_was_cut_short_is_noticed_and_the_run_is_made_anew(tmp_path, cli):
    sweep = "sweep", "benchmark", *sweep_flags(), "--plain", "--out", tmp_path
    assert cli(*sweep)[0] == 0
    record, = tmp_path.glob("benchmark/runs/*/record.json")
    history = record.parent/"history.csv"
    whole = history.read_text()
    history.write_text(whole[:len(whole)//2])
    assert cli(*sweep)[0] == 0 and len(history.read_text()) == len(whole)
    kept, = tmp_path.glob("benchmark/runs/.damaged/*/history.csv")
    assert kept.read_text() == whole[:len(whole)//2]

def test_a_study_of_ones_own_has_tables(tmp_path, cli):
    (tmp_path/"mine.yaml").write_text("base: {epochs: 1}\ngrid: {detector: patchcore, size: [64, 96]}")
    small = sweep_flags()
    del small[small.index("size=64") - 1:small.index("size=64") + 1]
    del small[small.index("detector=rd4ad") - 1:small.index("detector=rd4ad") + 1]
    code, printed, _ = cli("sweep", tmp_path/"mine.yaml", *small, "--out", tmp_path)
    assert code == 0 and "| patchcore | 96 |" in printed
    files = {path.name for path in (tmp_path/"mine").iterdir()}
    names = {f"mine_{table}.{ending}" for table in ("exact", "cost") for ending in ("csv", "md", "tex")}
    assert files == {"runs"} | names
    cost = (tmp_path/"mine"/"mine_cost.md").read_text()
    assert cost.startswith("What the runs on ") and "- Measured on " in cost and "| ms per image |" in cost

@pytest.mark.parametrize("text, words", [
    ("base: [1]", "base in.*is .1."), ("a: {}", "unknown field"), ("{", "is no YAML"), ("", "has no fields"),
    ("base: {sise: 1}", "unknown field of a run.*'sise'"), ("base: {options: 3}", "options"),
    ("grid: {detector: [nobody]}", "unknown detector"), ("grid: {size: []}", "size in the grid.* no values"),
    ("grid: {options: [{a: 1}]}", "write them as arms"), ("grid: {seed: [0, many]}", "seed='many'"),
    ("arms: {a: 3}", "the arm a in .* is 3")])
def test_a_study_file_with_a_mistake_is_refused(tmp_path, cli, text, words):
    (tmp_path/"mine.yaml").write_text(text)
    code, _, printed = cli("sweep", tmp_path/"mine.yaml", "--out", tmp_path)
    assert code == 2 and re.search(words, printed) and "\n" not in printed.strip()

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
    def hear_ctrl_c(): signal.signal(signal.SIGINT, signal.SIG_DFL)     # which a background job ignores
    how = dict(env=env, start_new_session=True, preexec_fn=hear_ctrl_c)
    return subprocess.Popen(command, **how, **quiet), mark

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
    files = {path for path in out.glob("benchmark/runs/**/*") if ".locks" not in path.parts}
    names = {path.name for path in files} - records
    kept = {".locks", "record.json", "scores.csv", "history.csv", "samples.npz", "replicates.npz"}
    assert names <= kept | {"run.ipynb"} and gone(mark)

@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_sweep_that_is_killed_leaves_nobody_behind_and_goes_on(tmp_path, number):
    process, mark = start_sweep(tmp_path, "--plain")
    while not records_in(tmp_path): time.sleep(.01)
    os.killpg(process.pid, number)
    process.communicate()
    assert gone(mark) and 1 <= len(records_in(tmp_path)) < 4
    check_that_it_goes_on(tmp_path, "--plain")

@pytest.mark.parametrize("flags", [["--plain"], []])
def test_ctrl_c_ends_a_sweep_within_seconds(tmp_path, flags):
    process, mark = start_sweep(tmp_path, *flags)
    while not records_in(tmp_path): time.sleep(.01)
    os.killpg(process.pid, signal.SIGINT)
    _, printed = process.communicate(timeout=5)
    assert process.returncode == 130 and "Traceback" not in printed, printed
    assert printed.strip().splitlines()[-1] == "stopped; what is done is kept, start again to go on"
    assert gone(mark) and len(records_in(tmp_path)) < 4

def start_stub_sweep(out, runs):
    "A sweep of stub runs, and the word that marks its processes."
    mark = f"mark-{os.urandom(4).hex()}"
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    command = [sys.executable, Path(__file__).parent/"stub_runs.py", out, str(runs)]
    env = os.environ | dict(MARK=mark, PYTHONPATH=path)
    return subprocess.Popen(command, env=env, start_new_session=True), mark

def check_stub_records(out, runs):
    "Every record is there, whole, and nothing else is left but locks and the log."
    records = Store(out).records()
    assert sorted(r.id for r in records) == sorted(f"run{n}" for n in range(runs))
    assert all(len((r.folder/"history.csv").read_text().splitlines()) == 1000 for r in records)
    assert {path.name for r in records for path in r.folder.iterdir()} == {"history.csv", "record.json"}
    assert {path.name for path in (out/"runs").iterdir()} == {r.id for r in records} | {".locks"}

def test_two_sweeps_on_one_folder_share_the_runs(tmp_path):
    sweeps = [start_stub_sweep(tmp_path, 12)[0] for _ in range(2)]
    assert [sweep.wait() for sweep in sweeps] == [0, 0]
    check_stub_records(tmp_path, 12)
    assert sorted(run for _, run in log_of(tmp_path)) == sorted(f"run{n}" for n in range(12))     # each once

@pytest.mark.slow
def test_a_stub_sweep_that_is_killed_ten_times_loses_nothing(tmp_path):
    moments, runs = random.Random(0), 100
    for _ in range(10):
        sweep, mark = start_stub_sweep(tmp_path, runs)
        begun = len(log_of(tmp_path))
        while len(log_of(tmp_path)) < begun + 2: time.sleep(.01)
        time.sleep(moments.uniform(0, 1))
        before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/record.json")}
        os.killpg(sweep.pid, signal.SIGKILL)
        sweep.wait()
        assert gone(mark)
    assert len(before) < runs
    sweep, mark = start_stub_sweep(tmp_path, runs)
    assert sweep.wait() == 0 and gone(mark)
    check_stub_records(tmp_path, runs)
    assert all(path.stat().st_mtime_ns == time_of for path, time_of in before.items())
    made = [run for _, run in log_of(tmp_path)]
    killed = len(made) - runs      # runs that were begun once more
    assert set(made) == {f"run{n}" for n in range(runs)} and 1 <= killed <= 20

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

# --- a disk that is full

@pytest.fixture
def small_disk(tmp_path):
    "A folder on a disk of eight megabytes."
    folder = tmp_path/"disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True)
    if mounted.returncode: pytest.skip("no disk can be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)

def fill(folder):
    "Leave no room on the disk of a folder; the file that takes it."
    with suppress(OSError), (folder/"filler").open("wb", buffering=0) as file:
        while True: file.write(bytes(4096))
    return folder/"filler"

@pytest.mark.skipif(sys.platform != "linux", reason="tmpfs is Linux's")
@pytest.mark.parametrize("flags", [["--plain"], pytest.param([], marks=pytest.mark.slow)])
def test_a_full_disk_ends_a_sweep_with_one_line_and_it_goes_on_when_there_is_room(small_disk, flags):
    out = small_disk/"out"
    process, mark = start_sweep(out, *flags)
    while not records_in(out): time.sleep(.01)
    filler = fill(small_disk)
    _, printed = process.communicate()
    errors = [line for line in printed.splitlines() if "error" in line.lower()]
    assert process.returncode == 2 and "Traceback" not in printed, printed
    assert len(errors) == 1 and "No space left on device. make room" in errors[0], printed
    assert gone(mark) and 1 <= len(records_in(out)) < 4
    filler.unlink()
    check_that_it_goes_on(out, *flags)

@pytest.mark.skipif(sys.platform != "linux", reason="tmpfs is Linux's")
def test_a_results_folder_that_is_read_only_is_one_line_before_the_first_run(small_disk, cli):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    code, _, printed = cli("sweep", "benchmark", *sweep_flags(), "--plain", "--out", small_disk/"out")
    (line,) = [line for line in printed.splitlines() if "error" in line]
    assert code == 2 and str(small_disk) in line and "Read-only file system" in line

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
