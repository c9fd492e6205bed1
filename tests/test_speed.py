"The speed study: parameters of its own, contestants that agree, peers that may be absent."
import json, subprocess, sys
import numpy as np
import pytest
from mdd_bench.errors import SpecError
from mdd_bench.running.sweep import execute_study, load_study, study_path, sweep

SMOKE = dict(maps=6, size=48, repeats=1, threads=1, memory="20,40")
METRICS = ("I-AUROC", "I-AP", "I-F1max", "P-AUROC", "P-AP", "P-F1max", "AUPRO")

def test_parameters_are_the_studys_own_and_typed():
    study = load_study("speed", maps="30", memory="20,40")
    assert study.specs() == [] and study.parameters() | dict(seed=0) == dict(maps=30, size=256, repeats=5, threads=2, memory=[20, 40], seed=0)
    with pytest.raises(SpecError, match="unknown parameter of the study speed 'mapps'. Did you mean 'maps'"): load_study("speed", mapps=3)
    with pytest.raises(SpecError, match="maps='many' does not fit"): load_study("speed", maps="many")

def test_there_is_nothing_to_run_and_plain_is_refused(tmp_path, cli):
    assert sweep(load_study("speed"), tmp_path).records == []
    code, out, err = cli("sweep", "speed", "--plain")
    assert code == 2 and "notebook only" in err and not (tmp_path/"results").exists()

@pytest.fixture
def maps(tmp_path):
    rng = np.random.default_rng(0)
    masks = np.zeros((6, 32, 32), bool)
    masks[:3, 4:12, 6:20] = True
    x = (rng.random(masks.shape) + .4*masks).round(2).astype(np.float32)
    np.savez(tmp_path/"maps.npz", maps=x, scores=x.max((1, 2)), masks=masks, labels=masks.any((1, 2)))
    return tmp_path/"maps.npz"

def timed(*args):
    got = subprocess.run([sys.executable, study_path("time_metrics", ".py"), *map(str, args)], capture_output=True, text=True)
    assert got.returncode == 0, got.stderr
    return json.loads(got.stdout)

def test_contestants_agree(maps):
    said = {c: timed(c, maps, "--repeats", 2) for c in ("scikit-learn", "exact", "streaming", "binned")}
    assert all(len(a["seconds"]) == 2 and min(a["seconds"]) > 0 and a["versions"] for a in said.values())
    for c, a in said.items():
        for k in METRICS: assert c == "scikit-learn" and k == "AUPRO" or a["values"][k] == pytest.approx(said["exact"]["values"][k], abs=1e-9), (c, k)

def test_memory_is_measured_and_the_values_are_those_of_all_maps(maps):
    exact, streaming = (timed(c, maps, "--memory", 50) for c in ("exact", "streaming"))
    assert exact["maps"] == 50 and exact["peak_mb"] >= 0 and exact["values"] == pytest.approx(streaming["values"], abs=1e-9)

def test_without_peers_the_rest_is_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("MDD_BENCH_PEERS", str(tmp_path/"nowhere"))
    execute_study(load_study("speed", **SMOKE), tmp_path/"out")
    table = (tmp_path/"out"/"speed.md").read_text()
    assert table.count("not installed") >= 2 and "| exact | all seven |" in table and "| streaming | all seven |" in table
    assert {"speed.csv", "speed.ipynb", "speed.md", "speed_bars.png", "speed_memory.csv", "speed_memory.png"} <= {p.name for p in (tmp_path/"out").iterdir()}
    assert str(tmp_path) not in table

def test_a_peer_that_answers_is_in_the_table(tmp_path, monkeypatch):
    answer = dict(seconds=[.25], values={"P-AUROC": .5, "AUPRO": .5}, bounds={}, versions={"adeval": "9.9"})
    peer = tmp_path/"python"
    peer.write_text(f"#!/bin/sh\necho '{json.dumps(answer)}'\n")
    peer.chmod(0o755)
    monkeypatch.setenv("MDD_BENCH_PEERS", str(peer))
    execute_study(load_study("speed", **SMOKE), tmp_path/"out")
    table = (tmp_path/"out"/"speed.md").read_text()
    assert "| adeval | P-AUROC, AUPRO | 0.250 (0.250-0.250) |" in table and "adeval 9.9" in table
