"The efficiency study: every cost is measured, in a process of its own, and once."
import json, subprocess, sys
import pandas as pd
import pytest
from conftest import SMALL
from mdd_bench.errors import SpecError
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

def time_run(folder, **fields):
    "What the script reports."
    spec = json.dumps(SMALL | fields)
    command = [sys.executable, study_path("time_run", ".py"), spec, folder, "--passes", "1", "--batches", "2"]
    process = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])

def test_a_run_is_measured_cold_and_warm(tmp_path):
    "The record is that of the first run; the operations are those of both decoders, if both make the map."
    one, both = (time_run(tmp_path, detector="mddnet", options=dict(fusion=f)) for f in ("tr", "sum"))
    record = Store(tmp_path).load(one["id"])
    assert record.cost["parameters_trained"] == one["parameters_trained"] == both["parameters_trained"]
    assert not (record.folder/"model.safetensors").exists()
    assert 0 < one["operations"] < both["operations"] < 2*one["operations"]
    assert min(one["cold_s"], one["warm_s"], *one["ms"].values()) > 0 and set(one["ms"]) == {"1", "2"}
    assert one["bytes_test"] > one["bytes_test_without_backbone"] > 4*one["parameters_trained"]

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
@pytest.mark.parametrize("wrong, message", [
    (dict(detector="rdd"), "unknown detector 'rdd'"),
    (dict(passes=0), "passes=0. give at least 1"),
])
def test_bad_parameters_stop_it(wrong, message, tmp_path):
    with pytest.raises(SpecError, match=message):
        execute_study(load_study("efficiency", **SMOKE | wrong), tmp_path/"out")
