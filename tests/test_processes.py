"Processes forked from a warm one: what they return and print, and that they end with their parents."
import os, signal, subprocess, sys, textwrap, time
from pathlib import Path
import pytest
from mdd_bench.running import processes
from mdd_bench.running.processes import WarmProcess, threads_of_a_run

@pytest.fixture(scope="module")
def warm():
    process = WarmProcess(["json"])
    yield process
    process.close()

@pytest.fixture
def start(warm):
    "A function: start a child that executes some code."
    return lambda code: warm.start("builtins:exec", textwrap.dedent(code))

def printed_by(child):
    "What a child prints until its end."
    child.wait()
    return child.printed()

def waited(condition, seconds=10):
    "Whether a condition comes true in time."
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline: time.sleep(.02)
    return condition()

def works(pid):
    "Whether a process is neither gone nor dead and waiting to be buried."
    try: return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError: return False

# --- what a child returns and prints

@pytest.mark.parametrize("code, exit_code, printed", [
    ("print('hello')", 0, "hello\n"),
    ("import sys; print('bad', file=sys.stderr); sys.exit(3)", 3, "bad\n"),
    ("import sys; sys.exit('a reason')", 1, "a reason\n"),
    ("import os; os.abort()", -signal.SIGABRT, ""),
    ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
])
def test_its_exit_code_and_its_output(start, code, exit_code, printed):
    child = start(code)
    assert child.wait() == exit_code == child.poll() == child.returncode
    assert child.printed() == printed

def test_an_error_is_printed(start):
    child = start("raise ValueError('too large')")
    assert child.wait() == 1
    assert child.printed().startswith("Traceback") and child.printed().endswith("ValueError: too large\n")

def test_what_a_child_changes_stays_its_own(start):
    start("import json; json.changed = True").wait()
    child = start("import sys; print('json' in sys.modules, hasattr(sys.modules['json'], 'changed'))")
    assert printed_by(child) == "True False\n"

def test_it_works_where_and_as_the_asker_does(start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MDD_BENCH_TEST", "new")
    monkeypatch.setenv("OMP_NUM_THREADS", "4,2")
    asked = "os.getcwd(), os.environ['MDD_BENCH_TEST'], os.environ['OMP_NUM_THREADS']"
    assert printed_by(start(f"import os; print({asked})")) == f"{tmp_path} new 4\n"

@pytest.mark.parametrize("said, threads", [(None, 1), ("", 1), ("1", 1), ("2", 2), ("4,2", 4)])
def test_the_threads_of_a_run_are_those_of_the_environment(monkeypatch, said, threads):
    if said is None: monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else: monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert threads_of_a_run() == threads

def test_what_is_prepared_is_there_for_all_children(warm):
    "And a preparation that fails harms nobody."
    ahead = "builtins:exec", "import json; json.prepared = 3"
    shows = "builtins:exec", "import json; print(getattr(json, 'prepared', None))"
    assert printed_by(warm.start(*shows, preparation=ahead)) == printed_by(warm.start(*shows)) == "3\n"
    assert printed_by(warm.start(*shows, preparation=("nothing:at_all",))) == "3\n"

def test_the_backbone_of_a_sweep_is_built_once():
    "The copies of a process that has built it ahead do not build it again."
    code = """
        import sys
        sys.path.insert(0, TESTS)
        import torch
        from conftest import small_spec
        from mdd_bench.running import identity
        threads = torch.get_num_threads()
        identity.build_ahead(small_spec())
        built = identity.remembered_backbone.cache_info()
        identity.load_backbone(small_spec(), identity.detector_class("rd4ad").recipe)
        again = identity.remembered_backbone.cache_info()
        assert (built.misses, again.misses, again.hits) == (1, 1, 1) and torch.get_num_threads() == threads
        """
    program = f"TESTS = {str(Path(__file__).parent)!r}\n" + textwrap.dedent(code)
    subprocess.run([sys.executable, "-c", program], check=True)

def test_a_childs_garbage_collector_leaves_alone_what_is_shared(warm):
    code = "import gc; print(len(gc.get_objects()), gc.get_freeze_count())"
    child = warm.start("builtins:exec", code)
    assert child.wait() == 0
    own, frozen = map(int, child.printed().split())
    assert own < 1000 < frozen

def test_memory_is_a_childs_own(start):
    greedy = """
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
        bytearray(2**32)
        """
    child = start(greedy)
    assert child.wait() == 1 and child.printed().endswith("MemoryError\n")
    assert start("print('the next one')").wait() == 0

def test_several_threads_may_ask(warm):
    from concurrent.futures import ThreadPoolExecutor
    def code_of(i): return warm.start("sys:exit", i).wait()
    with ThreadPoolExecutor(4) as pool: assert list(pool.map(code_of, range(12))) == list(range(12))

# --- the end

SPAWNS = "import subprocess; print(subprocess.Popen(['sleep', '60']).pid, flush=True); {}"

@pytest.mark.parametrize("then, kill", [("time.sleep(60)", True), ("pass", False)])
def test_what_a_child_started_ends_with_it(start, then, kill):
    child = start("import time; " + SPAWNS.format(then))
    assert waited(child.printed)
    pid = int(child.printed())
    assert works(pid) or not kill
    if kill: child.kill()
    child.wait()
    assert waited(lambda: not works(pid))

def test_a_child_can_be_killed_at_once(start):
    for _ in range(20):
        child = start("import time; time.sleep(60)")
        child.kill()
        assert child.wait() == -signal.SIGKILL

def test_children_end_with_a_warm_process_that_is_killed_and_the_next_one_is_new():
    warm = WarmProcess([])
    child = warm.start("time:sleep", 60)
    warm.process.kill()
    assert waited(lambda: not works(child.pid)) and child.wait() == -signal.SIGKILL
    assert warm.start("sys:exit", 5).wait() == 5
    assert child.poll() == -signal.SIGKILL
    warm.close()

def test_closing_ends_children():
    warm = WarmProcess([])
    child = warm.start("time:sleep", 60)
    warm.close()
    assert waited(lambda: not works(child.pid)) and child.poll() == -signal.SIGKILL

@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_all_end_with_the_asker(number):
    "However it ends; a closed terminal is SIGHUP."
    code = """
        import time
        from mdd_bench.running.processes import WarmProcess
        warm = WarmProcess([])
        child = warm.start("time:sleep", 60)
        print(warm.process.pid, child.pid, flush=True)
        time.sleep(60)
        """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as asker:
        pids = [int(pid) for pid in asker.stdout.readline().split()]
        assert all(works(pid) for pid in pids)
        asker.send_signal(number)
    assert waited(lambda: not any(works(pid) for pid in pids))

@pytest.fixture
def imported(tmp_path, monkeypatch):
    "A function: a warm process that has imported a module with this code."
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    opened = []
    def make(code):
        (tmp_path/"drawn_module.py").write_text(textwrap.dedent(code))
        opened.append(WarmProcess(["drawn_module"]))
        return opened[-1]
    yield make
    for warm in opened: warm.close()

def test_where_no_process_can_be_started_it_says_so_and_goes_on(imported):
    warm = imported("""
        import os
        original = os.fork
        def refuses():
            os.fork = original
            raise BlockingIOError(11, "no room")
        os.fork = refuses
        """)
    with pytest.raises(processes.TrainingError, match="no room.*--jobs"): warm.start("sys:exit", 4)
    process = warm.process
    assert warm.start("sys:exit", 4).wait() == 4 and warm.process is process

def test_a_warm_process_that_dies_at_once_is_an_error_with_a_remedy(imported):
    warm = imported("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(processes.TrainingError, match="--jobs"): warm.start("sys:exit", 4)

def test_a_module_that_cannot_be_imported_stops_nobody(imported):
    assert imported("raise ValueError('broken')").start("sys:exit", 4).wait() == 4

def test_without_fork_it_says_so(monkeypatch):
    monkeypatch.delattr(os, "fork")
    with pytest.raises(processes.SpecError, match="cannot copy a process"): WarmProcess([]).open()

def test_what_is_imported_leaves_the_gpu_alone():
    "A process that has used CUDA cannot be copied."
    code = """
        import torch
        def used(*args): raise AssertionError("CUDA was asked")
        torch._C._cuda_getDeviceCount = torch.cuda.device_count = torch.cuda.is_available = used
        import importlib
        from mdd_bench.running.processes import PRELOADED
        for name in PRELOADED: importlib.import_module(name)
        """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
