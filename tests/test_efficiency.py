"The efficiency study: every cost is measured, in a process of its own, and once."
import importlib, json, subprocess, sys
import numpy as np
import pandas as pd
import pytest
from conftest import SMALL
from torch import nn
from mdd_bench.data.catalog import cache_dir
from mdd_bench.errors import SpecError
from mdd_bench.running.run import run
from mdd_bench.running.spec import make_spec
from mdd_bench.running.store import Store
from mdd_bench.running.study import load_study, study_path
from mdd_bench.running.sweep import execute_study, sweep

SMOKE = dict(data="embedded-v1-smoke", classes="gear,tile", size=64, weights="lite0", epochs=1, passes=1,
             batches="2")
FILES = {"efficiency.csv", "efficiency.ipynb", "efficiency.md", "efficiency.png", "points", "runs"}

def test_parameters_are_the_studys_own_and_typed(tmp_path):
    study = load_study("efficiency", detector="rd4ad,mdd*", weights="lite0")
    expected = dict(detector=["rd4ad", "mdd*"], weights=["lite0"], size=128, batches=[4, 16, 32])
    assert study.specs() == [] and {name: study.parameters[name] for name in expected} == expected
    assert sweep(load_study("efficiency"), tmp_path).records == []

def test_a_run_is_measured_cold_and_warm(tmp_path):
    "The record is that of the first run; its model does not stay."
    spec = json.dumps(SMALL | dict(detector="rd4ad"))
    options = ("--passes", "1", "--batches", "2")
    command = [sys.executable, study_path("time_run", ".py"), spec, tmp_path, *options]
    process = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    measured = json.loads(process.stdout.splitlines()[-1])
    record = Store(tmp_path).load(measured["id"])
    assert record.cost["parameters_trained"] == measured["parameters_trained"]
    assert not (record.folder/"model.safetensors").exists() and record.cost["features"] == "cached"
    times = measured["cold_s"], measured["warm_s"], measured["images_per_second_trained"]
    assert min(*times, *measured["ms"].values()) > 0 and set(measured["ms"]) == {"1", "2"}
    assert measured["bytes_test"] > measured["bytes_test_without_backbone"] > 4*measured["parameters_trained"]

@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(study_path("efficiency").parent)
    return importlib.import_module("time_run")

def test_a_multiplication_and_an_addition_are_two_operations(script):
    "An 8 x 8 image, 3 x 3 x 3 weights, 4 channels out; what works element by element is not counted."
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
    assert script.operations(network, 8, "cpu") == 2*64*27*4

def test_an_empty_store_has_the_data_and_no_features(script, tmp_path, monkeypatch):
    monkeypatch.setenv("MDD_BENCH_CACHE", str(tmp_path))
    for name in ("embedded", "features"): (tmp_path/name).mkdir()
    with script.empty_store() as cache:
        assert cache_dir() == cache and [path.name for path in cache.iterdir()] == ["embedded"]
    assert cache_dir() == tmp_path and not cache.exists() and (tmp_path/"embedded").is_dir()

@pytest.mark.slow
def test_a_point_is_measured_once(tmp_path):
    "A sweep that was stopped goes on: what stands in a point's file is in the table, not a new measurement."
    out = tmp_path/"out"
    execute_study(load_study("efficiency", **SMOKE, detector="patchcore"), out)
    assert {path.name for path in out.iterdir()} == FILES
    point, = (out/"points").glob("*.json")
    point.write_text(json.dumps(json.loads(point.read_text()) | dict(cold_s=1234.)))
    execute_study(load_study("efficiency", **SMOKE, detector="patchcore"), out)
    table, md = pd.read_csv(out/"efficiency.csv"), (out/"efficiency.md").read_text()
    assert table.cold_s.tolist() == [1234.] and table.operations.min() > 0
    assert "Pareto front, from fast to good: patchcore (lite0)." in md and str(tmp_path) not in md

@pytest.mark.slow
def test_accuracy_can_be_that_of_whole_trainings(tmp_path):
    "The longest of them where none has converged; a point without any has no mAD."
    spec = {name: SMOKE[name] for name in ("data", "classes", "size", "weights")} | dict(detector="rd4ad")
    short, longer = (run(make_spec(**spec, epochs=epochs), tmp_path/"whole") for epochs in (2, 3))
    chosen = dict(detector="patchcore,rd4ad", scores=str(tmp_path/"whole"))
    execute_study(load_study("efficiency", **SMOKE, **chosen), tmp_path/"out")
    table = pd.read_csv(tmp_path/"out"/"efficiency.csv").set_index("detector")
    assert short.metrics["exact"]["mean"]["mAD"] != longer.metrics["exact"]["mean"]["mAD"]
    assert table.mAD["rd4ad"] == pytest.approx(longer.metrics["exact"]["mean"]["mAD"])
    assert np.isnan(table.mAD["patchcore"]) and table.seeds.to_dict() == dict(patchcore=0, rd4ad=1)
    study = load_study("efficiency", **SMOKE, **chosen | dict(detector="patchcore"))
    with pytest.raises(SpecError, match="no record there is of these detectors"):
        execute_study(study, tmp_path/"none")

@pytest.mark.slow
@pytest.mark.parametrize("wrong, message", [
    (dict(detector="rdd"), "unknown detector 'rdd'"),
    (dict(passes=0), "passes=0. give at least 1"),
])
def test_bad_parameters_stop_it(wrong, message, tmp_path):
    with pytest.raises(SpecError, match=message):
        execute_study(load_study("efficiency", **SMOKE | wrong), tmp_path/"out")
