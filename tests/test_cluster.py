"Sweeps on a Dask cluster of worker processes: who makes what, and what happens when one of them is killed."
import json, os, re, signal, socket, subprocess, sys, threading, time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
import pytest
from conftest import ROOT, sweep_flags
import stub_runs
from mdd_bench.errors import SpecError, StoreError
from mdd_bench.running import cluster
from mdd_bench.running import sweep as sweeping
from mdd_bench.running.cluster import dask_at, dask_here
from mdd_bench.running.store import Store
from mdd_bench.running.sweep import Queue
from stub_runs import Progress, log_of, planned

pytest.importorskip("distributed")
TESTS = Path(__file__).parent

def waited(condition, seconds=60):
    "Whether a condition comes true in time."
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline: time.sleep(.02)
    return condition()

def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]

def dask(*arguments, folder):
    "Start a program of Dask."
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    command = [sys.executable, "-m", "dask", *map(str, arguments), "--no-dashboard"]
    log = open(folder/f"{arguments[0]}.log", "a")
    how = dict(env=os.environ | dict(PYTHONPATH=path), cwd=folder, stdout=log, stderr=log)
    return subprocess.Popen(command, **how)

class Cluster:
    "A scheduler on this machine, and workers with one thread each."
    def __init__(self, folder):
        self.folder, self.workers = folder, []
        self.port = free_port()
        self.address = f"tcp://127.0.0.1:{self.port}"
        self.scheduler = dask("scheduler", "--host", "127.0.0.1", "--port", self.port, folder=folder)

    def add_worker(self, *flags):
        one = "--nthreads", 1, "--no-nanny", "--local-directory", self.folder, *flags
        self.workers.append(dask("worker", self.address, *one, folder=self.folder))

    def count(self):
        from distributed import Client
        with Client(self.address, timeout=30) as client: return len(client.nthreads())

    def have(self, number):
        "Add workers or take some away, until there are so many."
        self.workers = [worker for worker in self.workers if worker.poll() is None]
        while len(self.workers) < number: self.add_worker()
        while len(self.workers) > number:
            worker = self.workers.pop()
            worker.kill()
            worker.wait()
        assert waited(lambda: self.count() == number)

    def close(self):
        for process in [*self.workers, self.scheduler]:
            process.kill()
            process.wait()

@pytest.fixture(scope="module")
def dask_cluster(tmp_path_factory):
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    yield made
    made.close()

@pytest.fixture(autouse=True)
def stubs(monkeypatch, request):
    "Runs are stubs, but in a test of real ones."
    if "real" not in request.node.name: monkeypatch.setattr(sweeping, "make_record", stub_runs.make_record)

@contextmanager
def on(dask_cluster, out, numbers):
    "A sweep of stub runs under way in a thread; yields what it says, and what will have failed in the end."
    Store(out).locks.mkdir(parents=True, exist_ok=True)
    progress, failures = Progress(), []
    def work():
        with dask_at(dask_cluster.address, out, []) as crew:
            groups = [[planned(out, number)] for number in numbers]
            failures.extend(Queue(groups, crew, progress).run_all())
    thread = threading.Thread(target=work)
    thread.start()
    yield progress.said, failures
    thread.join()

def begun(out): return [(run, pid) for word, run, *pid in log_of(out) if word == "begin"]

def test_workers_share_the_runs(dask_cluster, tmp_path):
    dask_cluster.have(2)
    with on(dask_cluster, tmp_path, range(5)) as (said, failures):
        assert waited(lambda: len(begun(tmp_path)) == 2)
        (tmp_path/"go").touch()
    assert failures == [] and sorted(said) == [(f"run{n}", "done") for n in range(5)]
    assert len({pid for _, (pid,) in begun(tmp_path)[:2]}) == 2 and len(Store(tmp_path).records()) == 5
    assert not list(tmp_path.glob("runs/.sign-*"))

def test_the_run_of_a_worker_that_is_killed_goes_elsewhere(dask_cluster, tmp_path):
    dask_cluster.have(2)
    with on(dask_cluster, tmp_path, range(2)) as (said, failures):
        assert waited(lambda: len(begun(tmp_path)) == 2)
        killed_run, (pid,) = begun(tmp_path)[0]
        os.kill(int(pid), signal.SIGKILL)
        (tmp_path/"go").touch()
    assert failures == [] and sorted(said) == [("run0", "done"), ("run1", "done")]
    maker = {run: pid for word, run, *pid in log_of(tmp_path) if word == "end"}
    assert maker[killed_run] != [pid]

def test_a_worker_that_joins_later_gets_work(dask_cluster, tmp_path):
    dask_cluster.have(1)
    with on(dask_cluster, tmp_path, range(2)) as (_, failures):
        assert waited(lambda: len(begun(tmp_path)) == 1)
        dask_cluster.have(2)
        joined = waited(lambda: len(begun(tmp_path)) == 2)
        (tmp_path/"go").touch()
    assert joined and failures == [] and len({pid for _, (pid,) in begun(tmp_path)}) == 2

def test_a_sweep_that_is_killed_ends_its_runs_on_the_workers(dask_cluster, tmp_path):
    dask_cluster.have(1)
    code = f"""
from pathlib import Path
import stub_runs
from mdd_bench.running import sweep
from mdd_bench.running.cluster import dask_at
out = Path({str(tmp_path)!r})
sweep.make_record = stub_runs.make_record
with dask_at({dask_cluster.address!r}, out, []) as crew:
    (out/"runs"/".locks").mkdir()
    sweep.Queue([[stub_runs.planned(out, 0)]], crew, stub_runs.Progress()).run_all()
"""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    sweep = subprocess.Popen([sys.executable, "-c", code], env=os.environ | dict(PYTHONPATH=path))
    assert waited(lambda: begun(tmp_path))
    sweep.kill()
    sweep.wait()
    assert waited(lambda: ["abandoned", "run0"] in log_of(tmp_path), 20) and Store(tmp_path).records() == []

def test_a_worker_with_another_version_is_refused_before_the_first_run(dask_cluster, tmp_path, monkeypatch):
    dask_cluster.have(1)
    monkeypatch.setattr(cluster, "LOADED", "0123456789ab")
    with pytest.raises(SpecError, match="the worker on .* has another version of mdd_bench"):
        with dask_at(dask_cluster.address, tmp_path, []): pass

def test_a_worker_with_another_version_that_joins_later_is_sent_away(dask_cluster, tmp_path, recwarn):
    dask_cluster.have(1)
    preload = tmp_path/"other.py"
    preload.write_text("from mdd_bench.running import cluster\ncluster.LOADED = '0123456789ab'\n")
    with on(dask_cluster, tmp_path, range(3)) as (said, failures):
        assert waited(lambda: len(begun(tmp_path)) == 1)
        dask_cluster.add_worker("--preload", preload)
        other = dask_cluster.workers[-1]
        left = waited(lambda: other.poll() is not None)
        (tmp_path/"go").touch()
    assert left and failures == [] and sorted(said) == [(f"run{n}", "done") for n in range(3)]
    assert len({pid for _, (pid,) in begun(tmp_path)}) == 1
    assert any("another version of mdd_bench" in str(w.message) for w in recwarn)

def test_a_worker_that_does_not_see_the_data_is_refused(dask_cluster, tmp_path):
    dask_cluster.have(1)
    with pytest.raises(StoreError, match="the worker on .* does not see nowhere"):
        with dask_at(dask_cluster.address, tmp_path, ["nowhere"]): pass

def test_a_worker_that_cannot_write_is_refused(tmp_path, monkeypatch):
    def refuses(dir): raise OSError(30, "Read-only file system")
    with cluster.meeting(tmp_path, []) as met:
        monkeypatch.setattr(cluster.tempfile, "TemporaryFile", refuses)
        with pytest.raises(StoreError, match="cannot write to .*Read-only"): cluster.refuse_worker(met)

def test_real_runs_are_made_on_the_workers(dask_cluster, tmp_path, cli):
    dask_cluster.have(1)
    grid = sweep_flags(detector="patchcore", seed="0,1")
    flags = "sweep", "benchmark", *grid, "--out", tmp_path, "--scheduler", dask_cluster.address
    code, printed, _ = cli(*flags)
    assert code == 0 and "2 records" in printed
    assert len(list(tmp_path.glob("benchmark/runs/*/run.ipynb"))) == 2

def test_a_cluster_in_this_process_ends_what_is_cancelled(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        Store(tmp_path).locks.mkdir(parents=True)
        with dask_here([{}, {}]) as crew:
            queue = Queue([[planned(tmp_path, number)] for number in range(3)], crew, Progress())
            def interrupt(running):
                if len(log_of(tmp_path)) == 2: raise KeyboardInterrupt
            queue.progress.show = interrupt
            queue.run_all()
    assert waited(lambda: sorted(words[0] for words in log_of(tmp_path)) == ["abandoned"]*2 + ["begin"]*2, 10)

def test_a_worker_without_the_package_is_refused(monkeypatch, tmp_path):
    class Client:
        def __enter__(self): return self
        def __exit__(self, *args): pass
        def run(self, *args): raise ModuleNotFoundError("No module named 'mdd_bench.running.cluster'")
    monkeypatch.setattr(cluster, "client_of", lambda address: Client())
    with pytest.raises(SpecError, match="lacks this mdd_bench"):
        with dask_at("tcp://here:1", tmp_path, []): pass

def test_a_scheduler_that_does_not_answer_has_no_places_and_one_that_is_gone_is_an_error():
    def silent(): raise OSError("no answer")
    assert cluster.places_at(SimpleNamespace(status="connecting", nthreads=silent), "a") == []
    with pytest.raises(SpecError, match="the scheduler at a is gone"):
        cluster.places_at(SimpleNamespace(status="closed"), "a")

def test_a_dry_run_counts_the_places_of_the_cluster(dask_cluster, tmp_path, cli):
    dask_cluster.have(1)
    flags = sweep_flags(detector="patchcore"), "--out", tmp_path, "--scheduler", dask_cluster.address
    code, printed, _ = cli("sweep", "benchmark", *flags[0], *flags[1:], "--dry-run")
    assert code == 0 and "1 runs, 0 done, 1 to make" in printed and not list(tmp_path.iterdir())
    assert cli("sweep", "benchmark", *flags[0], *flags[1:], "--jobs", 2)[0] == 2

def test_without_distributed_it_says_so(monkeypatch):
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SpecError, match="distributed is not installed.*--plain"):
        with dask_here([{}]): pass

def test_the_slurm_script_of_the_lesson_makes_real_runs(tmp_path, monkeypatch):
    "With Dask's own processes in place of SLURM's jobs, and smaller runs."
    distributed = pytest.importorskip("distributed")
    class SLURMCluster(distributed.LocalCluster):
        def __init__(self, cores, memory, walltime, job_extra_directives):
            super().__init__(n_workers=0, threads_per_worker=cores, memory_limit=0, dashboard_address=None)
        def scale(self, n=0, jobs=0): super().scale(2 if jobs else n)     # closing scales to none
    monkeypatch.setitem(sys.modules, "dask_jobqueue", SimpleNamespace(SLURMCluster=SLURMCluster))
    monkeypatch.chdir(tmp_path)
    lesson = json.loads((ROOT/"nbs"/"running"/"59_sweep.ipynb").read_text(encoding="utf-8"))
    code, = re.findall(r"```python\n(.*?)```", "".join(lesson["cells"][-1]["source"]), re.DOTALL)
    small = 'data="embedded-v1-smoke", weights="lite0", size=64, detector="patchcore", seed="0,1"'
    changed = code.replace('data="mydata", weights="pretrained", epochs="none", seed="0,1,2"', small)
    assert changed != code
    variables = {}
    exec(changed, variables)
    assert len(variables["swept"].records) == 2 and variables["swept"].failures == []
    assert len(list((tmp_path/"results"/"mine"/"benchmark"/"runs").glob("*/run.ipynb"))) == 2
