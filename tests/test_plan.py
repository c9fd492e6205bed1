"Plans: several sweeps in a file, in order; what two of them need is made once, and what is there stays."
import json, os, re, shutil, signal, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace
import pytest
from conftest import ROOT, SMALL, sweep_flags, text_of
from test_layouts import mvtec, visa
from mdd_bench import cli as command_line
from mdd_bench.errors import FullDiskError, SpecError
from mdd_bench.running import sweep as sweeping
from mdd_bench.running.job import Failure
from mdd_bench.running.plan import injected_parameters, plan_entries, read_plan
from mdd_bench.running.store import Record, Store, copy_record, find_damage
from mdd_bench.running.sweep import Swept, missing_runs

# --- two entries that share a run, and a stand-in that makes runs

TIMES = dict(started="2026-01-01T10:00:00Z", finished="2026-01-01T10:02:00Z")
SETTINGS = dict(device="cpu", workers=0, cache_gb=0)

def entry(out, detector, seed=0, study="benchmark", **fields):
    "An entry of small runs, as a line of YAML."
    parameters = {name: text_of(value) for name, value in SMALL.items()} | dict(detector=detector, seed=seed)
    return "- " + json.dumps(dict(study=study, out=out, parameters=parameters) | fields) + "\n"

TWO = entry("first", "rd4ad,patchcore", why="which is better") + entry("second", "patchcore", "0,1")

@pytest.fixture
def stub(monkeypatch):
    "Runs are made by a stand-in, which notes them as 'folder detector seed'; those in `stub.failing` fail."
    class Stub:
        made, failing = [], set()
        def __call__(self, job, folder, environment, abandoned):
            name = f"{Path(job.out).name} {job.spec.detector} {job.spec.seed}"
            self.made.append(name)
            if name in self.failing: return Failure(job.spec, "it was told to", Path("log"), True)
            spec = dict(detector=job.spec.detector, seed=job.spec.seed, size=64)
            with job.store.claim(job.run_id) as own:
                for file in ("scores.csv", "samples.npz", "run.ipynb"): (own/file).write_text(name)
                if job.settings["keep_model"]: (own/"model.safetensors").write_text(name)
                facts = TIMES | dict(steps=10, training_id=job.training_id)
                job.store.write(Record(job.run_id, spec, dict(exact={}), dict(train_s=60.), facts))
    stub = Stub()
    stub.made = []
    monkeypatch.setattr(sweeping, "make_record", stub)
    return stub

@pytest.fixture
def make(cli, tmp_path):
    "A function: make a plan without notebooks; (exit code, stdout, stderr)."
    def call(text, *flags):
        (tmp_path/"plan.yaml").write_text(text)
        return cli("make", "plan.yaml", "--plain", "--device", "cpu", "--jobs", "1", *flags)
    return call

def results(name): return Store(Path("results")/name)

ALL = ["first rd4ad 0", "first patchcore 0", "second patchcore 1"]

def test_a_run_that_two_entries_need_is_made_once_and_copied(make, stub):
    code, printed, _ = make(TWO)
    assert code == 0 and stub.made == ALL
    first, second = results("first").records(), results("second").records()
    [shared] = {r.id for r in first} & {r.id for r in second}
    assert len(first) == len(second) == 2
    for name in ("record.json", "scores.csv", "samples.npz"):
        texts = [(results(folder).folder(shared)/name).read_text() for folder in ("first", "second")]
        assert texts[0] == texts[1]
    assert not find_damage(results("second").folder(shared))
    assert "first: which is better" in printed and "2 of 2 records in results/second/runs" in printed

def test_what_is_there_is_not_made_again(make, stub):
    make(TWO)
    before = {path: path.stat().st_mtime_ns for path in Path("results").rglob("record.json")}
    assert make(TWO)[0] == 0 and stub.made == ALL
    assert {path: path.stat().st_mtime_ns for path in Path("results").rglob("record.json")} == before

def test_a_record_of_a_later_entry_is_taken_too(make, stub):
    make(TWO, "--only", "second")
    assert make(TWO)[0] == 0
    assert stub.made == ["second patchcore 0", "second patchcore 1", "first rd4ad 0"]

def test_after_a_failure_the_next_entries_are_made_and_it_is_told_at_the_end(make, stub):
    stub.failing = {"first rd4ad 0"}
    code, printed, errors = make(TWO)
    assert code == 1 and stub.made == ALL and "1 of 2 records in results/first/runs" in printed
    assert errors.splitlines()[-1] == "FAILED first: rd4ad, seed 0: it was told to; see log"
    stub.failing = set()
    assert make(TWO)[0] == 0 and stub.made == [*ALL, "first rd4ad 0"]

def test_a_shared_run_that_failed_is_tried_by_the_next_entry(make, stub):
    stub.failing = {"first patchcore 0"}
    code, _, errors = make(TWO)
    assert code == 1 and stub.made == [*ALL[:2], "second patchcore 0", "second patchcore 1"]
    assert errors.count("FAILED") == 1 and len(results("second").records()) == 2

# --- before it begins

def test_a_dry_run_counts_what_is_there_and_what_is_left(make, stub):
    code, printed, _ = make(TWO, "--dry-run")
    assert code == 0 and stub.made == [] and not Path("results").exists()
    assert printed.splitlines() == [
        "first: which is better", "    2 runs, 0 done, 2 to make, 2 of unknown length",
        "second", "    2 runs, 0 done, 1 to copy, 1 to make, 1 of unknown length",
        "in all 3 different runs, 3 to make, 3 of unknown length"]
    make(TWO, "--only", "first")
    assert make(TWO, "--dry-run")[1].splitlines() == [
        "first: which is better", "    2 runs, 2 done, 0 to make",
        "second", "    2 runs, 0 done, 1 to copy, 1 to make: about 60 s with 1 at once",
        "in all 3 different runs, 1 to make: about 60 s with 1 at once"]
    make(TWO)
    assert make(TWO, "--dry-run")[1].splitlines()[-1] == "in all 3 different runs, 0 to make"

def test_a_dry_run_of_chosen_entries_lists_their_runs(make, stub):
    lines = make(TWO, "--dry-run", "--only", "sec*")[1].splitlines()
    assert lines[0] == "second" and len(lines) == 5
    assert re.fullmatch(r"    [0-9a-f]{12}   unknown  patchcore, seed 1", lines[2])

def test_times_of_entries_add_up_and_a_shared_run_counts_once(make, stub):
    "A run of 60 s beside its training, of 6 s a step, in images with a quarter of the pixels."
    before = entry("before", "rd4ad,patchcore")
    make(before)
    lines = make(before + TWO.replace('"64"', '"128"'), "--dry-run")[1].splitlines()
    assert [line.strip() for line in lines if "about" in line] == [
        "2 runs, 0 done, 2 to make: about 8 min with 1 at once",
        "2 runs, 0 done, 1 to copy, 1 to make: about 4 min with 1 at once",
        "in all 5 different runs, 3 to make: about 12 min with 1 at once"]

def test_only_those_that_are_asked_for(make, stub):
    assert make(TWO, "--only", "second")[0] == 0 and not Path("results/first").exists()
    code, _, errors = make(TWO, "--only", "third")
    assert code == 2 and "unknown entry of the plan 'third'. Known: first, second" in errors

@pytest.mark.parametrize("text, words", [
    ("base: {size: 64}", "plan.yaml is no list of studies. .*one study: mdd_bench sweep"),
    ("", "is no list of studies"), ("[]", "is no list of studies"), ("[", "is no YAML"),
    ("- benchmark", "entry 1 of plan.yaml is 'benchmark'. begin it with '- study:'"),
    ("- {study: benchmrk, out: a}", "a: unknown study 'benchmrk'. Did you mean 'benchmark'"),
    ("- {study: benchmark}", "entry 1 of plan.yaml has no out"),
    ("- {out: a}", "entry 1 of plan.yaml has no study"),
    ("- {study: benchmark, out: a, parameter: {}}", "unknown field in entry 1 of plan.yaml: 'parameter'"),
    ("- {study: benchmark, out: a, parameters: 3}", "parameters in entry 1 of plan.yaml is 3"),
    ("- {study: benchmark, out: a, parameters: {sise: 1}}", "a: unknown parameter of .* benchmark 'sise'"),
    ("- {study: memory, out: a, parameters: {arms: nosuch}}", "a: unknown arm of the study memory 'nosuch'"),
    ("- {study: benchmark, out: a, parameters: {size: many}}", "a: size='many'"),
    ("- {study: benchmark, out: a, pictures: perhaps}",
     "error: entry 1 of plan.yaml: pictures='perhaps'. give true or false"),
    ("- {study: benchmark, out: ../a}", "out: ../a in entry 1 of plan.yaml. give a folder below"),
    ("- {study: benchmark, out: a}\n- {study: memory, out: ./a}", "two entries of plan.yaml have out: ./a"),
])
def test_a_plan_with_a_mistake_is_refused_before_the_first_run(make, stub, text, words):
    code, _, errors = make(text)
    assert code == 2 and re.search(words, errors) and len(errors.splitlines()) == 1, errors
    assert not Path("results").exists()

@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_jobs_with_a_scheduler_are_refused_once_before_the_plan_is_read(cli, dry_run):
    code, _, errors = cli("make", "nowhere.yaml", "--jobs", "2", "--scheduler", "tcp://nowhere:1", *dry_run)
    assert code == 2 and errors == "error: jobs with a scheduler. its workers decide how many there are\n"

def test_a_plan_that_is_not_there(make, cli):
    code, _, errors = cli("make", "nowhere.yaml")
    assert code == 2 and "cannot read nowhere.yaml" in errors

def test_an_impossible_run_of_the_last_entry_stops_it_before_the_first_run(make, stub):
    third = entry("third", "dmad_released").replace('"epochs": "1"', '"steps": "converged"')
    code, _, errors = make(TWO + third)
    assert code == 2 and stub.made == []
    assert "error: third: steps=converged: it is not known for dmad_released" in errors

def test_a_plan_is_no_study(cli, tmp_path):
    (tmp_path/"plan.yaml").write_text(TWO)
    code, _, errors = cli("sweep", "plan.yaml")
    assert code == 2 and "plan.yaml is a list. make a plan with `mdd_bench make`" in errors

# --- what an entry needs

def test_an_entry_whose_data_are_absent_is_left_out_and_named(make, stub):
    text = entry("other", "patchcore", needs=["nowhere", "plan.yaml"]) + TWO
    code, printed, _ = make(text)
    assert code == 0 and stub.made == ALL and "left out: nowhere is not there" in printed
    lines = make(text, "--dry-run")[1].splitlines()
    assert lines[:2] == ["other", "    left out: nowhere is not there"]
    assert lines[-1].endswith("; left out: 1")
    Path("nowhere").mkdir()
    assert make(text)[0] == 0 and len(results("other").records()) == 1

def test_records_of_an_entry_that_is_left_out_are_taken(make, stub):
    make(entry("other", "patchcore"))
    make(entry("other", "patchcore", needs="nowhere") + TWO)
    assert stub.made == ["other patchcore 0", "first rd4ad 0", "second patchcore 1"]

def test_a_model_that_is_to_be_kept_is_not_taken_from_where_it_was_not(make, stub):
    make(entry("first", "patchcore") + entry("second", "patchcore", keep_model=True))
    assert stub.made == ["first patchcore 0", "second patchcore 0"]
    make(entry("third", "patchcore", keep_model=True) + entry("second", "patchcore", keep_model=True))
    assert len(stub.made) == 2 and list(Path("results/third").rglob("model.safetensors"))

def test_a_copy_has_no_model_that_nobody_asked_for(make, stub):
    make(entry("first", "patchcore", keep_model=True) + entry("second", "patchcore"))
    assert stub.made == ["first patchcore 0"] and len(results("second").records()) == 1
    assert [path.parts[1] for path in Path("results").rglob("model.safetensors")] == ["first"]

HIDDEN, SHOWN = entry("hidden", "patchcore", pictures=False), entry("shown", "patchcore")

@pytest.mark.parametrize("text, again, made", [
    (HIDDEN, SHOWN, 2), (HIDDEN + SHOWN, "", 2), (SHOWN, HIDDEN, 1), (SHOWN + HIDDEN, "", 1)])
def test_an_entry_with_pictures_is_not_served_by_a_copy_without_them(make, stub, text, again, made):
    make(text)
    if again: make(text + again)
    assert len(stub.made) == made
    assert [path.parts[1] for path in Path("results").rglob("samples.npz")] == ["shown"]
    assert len(results("hidden").records()) == len(results("shown").records()) == 1

def test_a_protocol_that_the_first_entry_lacks_is_computed_by_the_second(tmp_path, stub):
    other_rules = TWO.replace('"seed": "0,1"', '"seed": "0,1", "protocols": "ader"')
    (tmp_path/"plan.yaml").write_text(other_rules)
    planned = plan_entries(read_plan(tmp_path/"plan.yaml"), [], tmp_path/"results", True, SETTINGS)
    assert [len(missing_runs(p.runs)) for p in planned] == [2, 2]

def test_a_run_that_the_second_entry_makes_more_of_counts_once_for_the_third(tmp_path, stub):
    "The first keeps no model; the second does, and so makes the run again; the third may copy either."
    keeping = [entry(name, "patchcore", keep_model=True) for name in ("second", "third")]
    (tmp_path/"plan.yaml").write_text(entry("first", "patchcore") + "".join(keeping))
    planned = plan_entries(read_plan(tmp_path/"plan.yaml"), [], tmp_path/"results", True, SETTINGS)
    assert [len(missing_runs(p.runs)) for p in planned] == [1, 1, 0]
    [copied] = planned[2].runs
    assert copied.source.parents[1] == (tmp_path/"results"/"second").absolute()

def test_images_that_must_not_be_shown_are_not_kept(make, stub):
    not_to_be_shown = entry("second", "patchcore", pictures=False)
    make(entry("first", "patchcore") + not_to_be_shown)
    kept = {store: {p.name for p in Path(f"results/{store}/runs").glob("[0-9a-f]*/*")}
            for store in ("first", "second")}
    assert kept["first"] - kept["second"] == {"samples.npz", "run.ipynb"} and "scores.csv" in kept["second"]
    assert "1 runs, 1 done, 0 to make" in make(not_to_be_shown, "--dry-run")[1]

SHOWING = ("a/samples.npz", "a/run.ipynb", ".damaged/b/samples.npz", "c.part.ipynb")

@pytest.mark.parametrize("end", [None, SpecError("gone"), FullDiskError("full"), KeyboardInterrupt()])
def test_images_that_must_not_be_shown_go_however_the_sweep_ends(make, monkeypatch, end):
    runs = Path("results/second/runs")
    def sweep(study, folder, **how):
        for name in (*SHOWING, "a/scores.csv", "c.log"):
            (runs/name).parent.mkdir(parents=True, exist_ok=True)
            (runs/name).touch()
        if end: raise end
        spec = SimpleNamespace(detector="patchcore", seed=0)
        return Swept(study, folder, [], [Failure(spec, "it was told to", runs/"c.part.ipynb", True)])
    monkeypatch.setattr(sweeping, "sweep", sweep)
    monkeypatch.setattr(command_line, "end_now", lambda code: None)
    _, _, errors = make(entry("second", "patchcore", pictures=False))
    assert {path.name for path in runs.rglob("*.*") if path.is_file()} == {"scores.csv", "c.log"}
    assert end or errors.endswith("it was told to; see results/second/runs/c.log\n")

# --- notebooks

INJECTED = dict(metadata=dict(tags=["injected-parameters"]), source=["maps = 3\n", "memory = [3]\n"])
MEASURING = "- {study: mine.yaml, out: fast}\n- {study: mine.yaml, out: other, parameters: {maps: 4}}"

def test_a_study_without_runs_is_made_once_for_the_same_parameters(cli, tmp_path, monkeypatch):
    made = []
    def make_tables(swept, folder, **settings): made.append(folder.name)
    monkeypatch.setattr(command_line, "make_tables", make_tables)
    (tmp_path/"mine.yaml").write_text("parameters: {maps: 3, memory: [3]}")
    (tmp_path/"mine.ipynb").write_text("{}")
    (tmp_path/"plan.yaml").write_text(MEASURING)
    for name in ("fast", "other"):
        (tmp_path/"results"/name).mkdir(parents=True)
        (tmp_path/"results"/name/"mine.ipynb").write_text(json.dumps(dict(cells=[INJECTED])))
    lines = cli("make", "plan.yaml", "--dry-run")[1].splitlines()
    assert lines == [
        "fast", "    a notebook that measures: done", "other", "    a notebook that measures: to make",
        "in all 0 different runs, 0 to make; notebooks that measure: 1 to make"]
    code, printed, _ = cli("make", "plan.yaml")
    assert code == 0 and made == ["other"] and printed.split("\n\n")[0].split() == ["fast", "done", "before"]
    lines = cli("make", "plan.yaml", "--plain", "--dry-run")[1].splitlines()
    assert lines[1].endswith("done")
    assert lines[3] == "    left out: it is a notebook only, made without --plain"

@pytest.mark.parametrize("text", [
    "{", "{}", "[]", '{"cells": 3}', '{"cells": [{}]}',
    *(json.dumps(dict(cells=[INJECTED | dict(source=source)]))
      for source in ("maps = ", "maps = float('nan')", "maps += 1", "maps", 3))])
def test_a_notebook_that_cannot_be_read_was_not_executed(tmp_path, text):
    (tmp_path/"mine.ipynb").write_text(text)
    assert injected_parameters(tmp_path/"mine.ipynb") == {}

def test_a_sweep_of_a_study_without_runs_says_that_it_measures(cli, tmp_path):
    (tmp_path/"mine.yaml").write_text("parameters: {maps: 3}")
    code, _, errors = cli("sweep", "mine.yaml")
    assert code == 2 and "mine has parameters but no notebook. write mine.ipynb beside its file" in errors
    assert not Path("results").exists()
    (tmp_path/"mine.ipynb").write_text("{}")
    code, printed, _ = cli("sweep", "mine.yaml", "--dry-run")
    assert code == 0 and printed == "a notebook that measures: to make\n"

@pytest.mark.parametrize("error, code, tables", [
    (SpecError("the notebook failed", "see it"), 1, 2),
    (FullDiskError("the disk is full", "make room"), 2, 1)])
def test_a_failed_notebook_stops_nothing_but_a_full_disk_does(
        cli, tmp_path, stub, monkeypatch, error, code, tables):
    drawn = []
    def fails(swept, folder, **settings):
        drawn.append(folder.name)
        raise error
    monkeypatch.setattr(command_line, "make_tables", fails)
    monkeypatch.setattr(sweeping, "dask_here", sweeping.threads)
    (tmp_path/"plan.yaml").write_text(TWO)
    ended, _, errors = cli("make", "plan.yaml", "--device", "cpu")
    assert ended == code and len(drawn) == tables and error.what in errors.splitlines()[-1]

@pytest.mark.parametrize("command, ended", [("sweep", 2), ("make", 1)])
def test_runs_that_failed_are_named_where_the_notebook_fails_too(
        cli, tmp_path, stub, monkeypatch, command, ended):
    def fails(swept, folder, **settings): raise SpecError("the notebook failed", "see it")
    monkeypatch.setattr(command_line, "make_tables", fails)
    monkeypatch.setattr(sweeping, "dask_here", sweeping.threads)
    stub.failing = {"first rd4ad 0", "benchmark rd4ad 0"}
    (tmp_path/"plan.yaml").write_text(TWO)
    what = ["plan.yaml", "--only", "first"] if command == "make" else ["benchmark", *sweep_flags()]
    code, _, errors = cli(command, *what, "--device", "cpu")
    *_, run, notebook = errors.splitlines()
    assert code == ended and "the notebook failed" in notebook
    assert re.fullmatch("FAILED (first: )?rd4ad, seed 0: it was told to; see log", run)

def test_what_failed_is_named_where_the_disk_is_full_later(cli, tmp_path, stub, monkeypatch):
    def fails(swept, folder, **settings): raise FullDiskError("the disk is full", "make room")
    monkeypatch.setattr(command_line, "make_tables", fails)
    monkeypatch.setattr(sweeping, "dask_here", sweeping.threads)
    stub.failing = {"first rd4ad 0"}
    (tmp_path/"plan.yaml").write_text(TWO)
    code, _, errors = cli("make", "plan.yaml", "--device", "cpu")
    assert code == 2 and "FAILED first: rd4ad, seed 0: it was told to" in errors.splitlines()[-2]

# --- a copy of a record

def test_a_copy_replaces_what_an_interrupted_run_has_left_and_no_record(tmp_path):
    here, there = Store(tmp_path/"here"), Store(tmp_path/"there")
    with there.claim("a") as own:
        (own/"scores.csv").write_text("theirs")
        there.write(Record("a", {}, {}, {}, dict(of="there")))
    here.folder("a").mkdir(parents=True)
    (here.folder("a")/"checkpoint.pt").touch()
    copy_record(there.folder("a"), here)
    assert {path.name for path in here.folder("a").iterdir()} == {"record.json", "scores.csv"}
    here.write(Record("a", {}, {}, {}, dict(of="here")))
    copy_record(there.folder("a"), here)
    assert here.load("a").provenance["of"] == "here"

def test_a_copy_that_breaks_off_leaves_no_record(tmp_path, monkeypatch):
    here, there = Store(tmp_path/"here"), Store(tmp_path/"there")
    with there.claim("a") as own:
        (own/"scores.csv").write_text("theirs")
        there.write(Record("a", {}, {}, {}, {}))
    def breaks(source, target): raise OSError("no space left")
    monkeypatch.setattr(shutil, "copy2", breaks)
    with pytest.raises(OSError): copy_record(there.folder("a"), here)
    assert not here.folder("a").exists()

# --- real runs

def records_in(out): return sorted(out.rglob("record.json"))

@pytest.mark.slow
def test_a_plan_that_is_killed_goes_on(tmp_path):
    (tmp_path/"plan.yaml").write_text(TWO)
    program = [sys.executable, "-c", "from mdd_bench.cli import main; main()"]
    command = [*program, "make", "plan.yaml", "--plain", "--jobs", "1"]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    how = dict(cwd=tmp_path, start_new_session=True, **quiet)
    process = subprocess.Popen(command, **how)
    while not records_in(tmp_path): time.sleep(.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = {file: file.stat().st_mtime_ns for file in records_in(tmp_path)}
    again = subprocess.run(command, **how)
    assert again.returncode == 0, again.stderr
    assert len(before) < 4 == len(records_in(tmp_path))
    assert all(file.stat().st_mtime_ns == time_of for file, time_of in before.items())
    for file in records_in(tmp_path): assert find_damage(file.parent) is None
    records = [json.loads(file.read_text()) for file in records_in(tmp_path)]
    made = {(record["id"], record["provenance"]["finished"]) for record in records}
    assert len(made) == 3      # of four records one is a copy

@pytest.mark.slow
def test_the_pages_of_a_plan(shell, tmp_path):
    second = entry("second", "patchcore", pictures=False)
    (tmp_path/"plan.yaml").write_text(entry("first", "patchcore") + second)
    code, printed, errors = shell("make", "plan.yaml")
    assert code == 0, errors
    first, second = [set(os.listdir(tmp_path/"results"/name)) for name in ("first", "second")]
    assert first - second == {"benchmark_maps.png", "worst"} and "benchmark.md" in second
    assert not list(tmp_path.glob("results/second/runs/*/samples.npz"))

# --- make

def gnu_make(folder, *arguments):
    "The checkout's Makefile, at work in another folder and in this environment."
    if not shutil.which("make"): pytest.skip("there is no make")
    options = ["-C", folder, "-f", ROOT/"Makefile", "-o", ".venv/.demo", f"BIN={Path(sys.executable).parent}"]
    command = ["make", *options, f"PATH={Path(sys.executable).parent}:{os.environ['PATH']}", *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr

def test_the_plan_of_the_results_is_one():
    entries = read_plan(ROOT/"results"/"plan.yaml")
    assert len(entries) > 15
    for e in entries:
        if e.out.startswith("real/"): assert "real" in e.needs and not e.pictures
        assert ("resnet18.pth" in e.needs) == ("resnet18.pth" in str(e.parameters))

def test_make_results_links_the_real_images_and_makes_the_plan(tmp_path):
    (tmp_path/"results").mkdir()
    real = entry("real", "patchcore", needs=["real", "resnet18.pth"])
    (tmp_path/"results"/"plan.yaml").write_text(TWO + real)
    code, printed, errors = gnu_make(tmp_path, "results", "FLAGS=--dry-run")
    assert code == 0 and "left out: real, resnet18.pth is not there" in printed, errors
    mvtec(tmp_path/"images")
    code, printed, errors = gnu_make(tmp_path, "results", "FLAGS=--dry-run", "REAL=images")
    assert code == 0 and "left out: resnet18.pth is not there" in printed, errors
    assert (tmp_path/"real").resolve() == tmp_path/"images"
    code, _, errors = gnu_make(tmp_path, "results", "FLAGS=--dry-run", "REAL=nowhere")
    assert code == 2 and "nowhere" in errors and (tmp_path/"real").resolve() == tmp_path/"images"

SMALL_FLAGS = "-p weights=random -p backbone=resnet18 -p size=64 -p detector=patchcore --out out"

@pytest.mark.parametrize("name, tree", [
    ("mvtec", mvtec), pytest.param("visa", visa, marks=pytest.mark.slow)])
@pytest.mark.parametrize("flags", ["--plain", pytest.param("", marks=pytest.mark.slow)])
def test_make_mvtec_and_make_visa_sweep_a_folder_in_that_layout(tmp_path, name, tree, flags):
    tree(tmp_path/"tree")
    code, printed, errors = gnu_make(tmp_path, name, f"{name.upper()}=tree", f"FLAGS={SMALL_FLAGS} {flags}")
    assert code == 0, errors
    [record] = Store(tmp_path/"out"/"benchmark").records()
    assert list(record.metrics) == ["exact", "ader"] and record.provenance["layout"] == name
    assert (tmp_path/"out"/"benchmark"/"benchmark_ader.md").is_file() == (not flags)

@pytest.mark.parametrize("name, licence", [("mvtec", "CC BY-NC-SA 4.0"), ("visa", "CC BY 4.0")])
def test_without_agreement_to_the_licence_nothing_is_fetched(tmp_path, name, licence):
    code, printed, errors = gnu_make(tmp_path, name)
    assert code == 2 and f"is under {licence}" in errors and "with make: ACCEPT_LICENCE=1" in printed
    assert not list(tmp_path.iterdir())

def test_our_own_plan_is_a_plan():
    "And it keeps no pictures of images that must not be shown."
    entries = read_plan(ROOT/"results"/"plan.yaml")
    assert len(entries) > 20
    assert not [entry.out for entry in entries if entry.needs and "real" in entry.needs and entry.pictures]
