"""Every tensor lies where it should, checked on a pretended GPU where there is none; `make gpu-check` works
where only what a run needs is installed."""
import json, os, subprocess, sys
import numpy as np
import pytest, torch
import gpu_check
import mdd_bench.detectors.uniad as uniad
import tensor_checks
from conftest import ROOT, small_spec
from drawn_batches import VARIANTS
from pretended_gpu import pretended_gpu
from mdd_bench.detectors.detector import list_detectors
from mdd_bench.running.identity import remembered_backbone
from mdd_bench.running.run import run
from mdd_bench.running.runtime import Runtime

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*RANDOM", "ignore:.*pin_memory"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="make gpu-check does it on the real one"),
]
slow = pytest.mark.slow
CUDA = torch.device("cuda")

@pytest.fixture
def gpu():
    "The pretended GPU; backbones that lie on it are forgotten afterwards."
    with pretended_gpu() as pretended: yield pretended
    remembered_backbone.cache_clear()

# --- the pretended GPU itself

def test_the_pretended_gpu_computes(gpu):
    layer = torch.nn.Linear(3, 2).to("cuda")
    x = torch.arange(3.).to("cuda")
    layer(x[None]).square().sum().backward()
    torch.optim.Adam(layer.parameters()).step()
    assert {p.device.type for p in (layer.weight, layer.weight.grad, x.double(), x.new_zeros(2))} == {"cuda"}
    assert x[[2, 0]].tolist() == [2, 0] and x[x > 1].cpu().tolist() == [2] and x.sum().item() == 3
    assert torch.as_tensor(np.ones(2), device="cuda").is_cuda and not x.cpu().is_cuda and not gpu.cpu_indices

@pytest.mark.parametrize("mixed", [
    lambda x: x + torch.ones(3),
    lambda x: torch.cat([x, torch.ones(3)]),
    lambda x: torch.ones(3)[x.long()],
    lambda x: x.numpy(),
    lambda x: torch.rand(3, device="cuda", generator=torch.Generator()),
    lambda x: torch.nn.Linear(3, 1)(x),
])
def test_the_pretended_gpu_refuses_what_a_gpu_refuses(gpu, mixed):
    with pytest.raises((RuntimeError, TypeError), match="cuda"): mixed(torch.ones(3, device="cuda"))

def test_an_index_on_the_cpu_is_noted(gpu):
    assert torch.ones(3, device="cuda")[torch.tensor([1])].is_cuda and gpu.cpu_indices

# --- detectors

variants = [v if v in list_detectors() else pytest.param(v, marks=slow) for v in VARIANTS]

@pytest.mark.parametrize("variant", variants)
def test_a_detector_trains_and_predicts_on_a_gpu_as_on_the_cpu(gpu, monkeypatch, variant):
    monkeypatch.setattr(gpu_check, "STEPS", 2)
    monkeypatch.setattr(uniad, "LAYERS", 1)
    name, options = VARIANTS[variant]
    if name == "bgad": monkeypatch.setitem(VARIANTS, variant, (name, options | dict(couplings=2)))
    row = {}
    gpu_check.agreement(variant, row, CUDA)
    assert row["holds"] and not row["own"], row
    assert not gpu.cpu_indices, "an index is copied to the GPU each time"

@pytest.mark.parametrize("detector", ["mddnet", *(pytest.param(d, marks=slow) for d in list_detectors())])
def test_a_whole_run_on_a_gpu_gives_what_the_cpu_gives(detector, tmp_path):
    "On the CPU features are computed each time; on the GPU they are stored."
    spec = small_spec(detector=detector, size=32)
    record = run(spec, tmp_path/"cpu", Runtime("cpu", cache_gb=0))
    with pretended_gpu() as gpu: on_gpu = run(spec, tmp_path/"gpu", Runtime(CUDA))
    remembered_backbone.cache_clear()
    assert not gpu.cpu_indices and on_gpu.cost["device"] == "pretended"
    assert on_gpu.metrics["exact"]["mean"] == pytest.approx(record.metrics["exact"]["mean"], abs=1e-3)

def test_evaluators_take_tensors_on_a_gpu(gpu, monkeypatch):
    "But for those of inference mode: torch does not tell the pretended GPU what is done to them."
    monkeypatch.delitem(tensor_checks.TENSORS, "of inference")
    few = {name: tensor_checks.SCORES[name] for name in ("negative", "zeros")}
    monkeypatch.setattr(tensor_checks, "SCORES", few)
    row = {}
    gpu_check.evaluators("tensors", row, CUDA)
    assert row["holds"] and row["cases"] > 30, row["failed"]

# --- make gpu-check

def started(tmp_path, monkeypatch, *arguments):
    "The exit code of the script in this process, and its report if it wrote one."
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path), *arguments])
    code, file = gpu_check.main(), tmp_path/"gpu_check.json"
    return code, json.loads(file.read_text()) if file.is_file() else None

def test_without_a_gpu_it_says_so(tmp_path, monkeypatch, capsys):
    assert started(tmp_path, monkeypatch) == (2, None)
    assert capsys.readouterr().out.startswith("no GPU that torch can use")

NOT_NEEDED = ("IPython", "dask", "distributed", "fastcore", "hypothesis", "matplotlib", "nbdev", "nbformat",
              "papermill", "pytest", "seaborn")

def test_it_needs_no_more_than_a_run_does(tmp_path):
    "In a process where none of the others can be imported, a detector goes through whole runs."
    blocked = f"import sys, runpy; sys.modules.update(dict.fromkeys({NOT_NEEDED}))"
    code = f"{blocked}; runpy.run_path('tests/gpu_check.py', run_name='__main__')"
    sections = ["environment", "runs"]
    arguments = ["--device", "cpu", "--detectors", "patchcore", "--out", tmp_path, "--sections"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code, *arguments, *sections], capture_output=True, text=True,
                          cwd=ROOT, env=environment)
    assert done.returncode == 0 and "everything holds" in done.stdout, done.stdout + done.stderr
    data = json.loads((tmp_path/"gpu_check.json").read_text())
    assert list(data["sections"]) == sections and "## runs" in (tmp_path/"gpu_check.md").read_text()

@slow
def test_all_of_it_holds_on_the_cpu(tmp_path, monkeypatch):
    "The CPU beside itself: no difference at all, everything is repeatable, every measurement is made."
    code, data = started(tmp_path, monkeypatch, "--device", "cpu", "--quick", "--seconds", "2000")
    assert code == 0 and data["failures"] == [] and list(data["sections"]) == list(gpu_check.NOTES)
    assert {row["end"] for row in data["sections"]["agreement"].values()} == {0}
    for name, row in data["sections"]["throughput"].items():
        values = [v for v in gpu_check.flat(row).values() if not isinstance(v, str)]
        assert values and min(values) > 0, name

@slow
@pytest.mark.parametrize("detector", list_detectors())
def test_all_of_it_runs_on_a_gpu(gpu, detector, tmp_path, monkeypatch):
    "On the pretended one, where times mean nothing."
    monkeypatch.setenv("MDD_BENCH_CACHE", str(tmp_path/"cache"))
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device=None: None)
    report = gpu_check.Report(tmp_path, 1000, False)
    todo = gpu_check.sections(report, CUDA, True, [detector])
    for section in ("repeatability", "runs", "throughput"): todo[section](section)
    assert report.failures() == [] and not gpu.cpu_indices
    assert detector in report.rows("throughput") and detector in report.rows("runs")

def test_what_fails_is_named_and_the_rest_goes_on(tmp_path):
    report = gpu_check.Report(tmp_path, 100, False)
    def check(name, row): row["value"] = 1/int(name)
    gpu_check.each(report, "agreement", ["1", "0", "2"], check)
    gpu_check.each(report, "runs", ["late"], check, least=1000)
    assert [row.get("value") for row in report.rows("agreement").values()] == [1, None, .5]
    assert report.failures() == ["agreement, 0: ZeroDivisionError: division by zero",
                                 "runs, late: TimeoutError: not run: out of time"]
    assert "ZeroDivisionError" in (tmp_path/"gpu_check.md").read_text()

def test_after_an_error_that_spoils_the_gpu_a_new_process_goes_on(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(os, "execv", lambda *a: calls.append(a))
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--seconds", "9"])
    def spoiled(name, row): raise RuntimeError("CUDA error: an illegal memory access was encountered")
    gpu_check.each(gpu_check.Report(tmp_path, 100, False), "agreement", ["a"], spoiled)
    assert calls[0][1][-3:] == ["--seconds", "9", "--resume"]
    resumed = gpu_check.Report(tmp_path, 100, True)
    gpu_check.each(resumed, "agreement", ["a", "b"], lambda name, row: row.update(done=name))
    assert resumed.rows("agreement")["b"]["done"] == "b" and len(resumed.failures()) == 1
