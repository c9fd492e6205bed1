"The speed study: parameters of its own, contestants that agree, peers that may be absent."
import json, subprocess, sys
import numpy as np
import pandas as pd
import pytest
from mdd_bench.errors import SpecError
from mdd_bench.running.study import load_study, study_path
from mdd_bench.running.sweep import execute_study, sweep

SMOKE = dict(maps=6, size=48, repeats=1, threads=1, memory="20,40", parts="")
SMALL = dict(data="embedded-v1-smoke", classes="gear,tile", size=64, weights="random", backbone="resnet18")
FIELDS = SMALL | dict(classes=["gear", "tile"])
METRICS = ("I-AUROC", "I-AP", "I-F1max", "P-AUROC", "P-AP", "P-F1max", "AUPRO")
FILES = {"speed.csv", "speed.ipynb", "speed.md", "speed_bars.png", "speed_memory.csv", "speed_memory.png"}

def test_parameters_belong_to_the_study_and_are_typed():
    study = load_study("speed", maps="30", memory="20,40")
    assert study.specs() == []
    expected = dict(maps=30, size=256, repeats=5, threads=2, memory=[20, 40], parts=["training", "ablation"])
    assert {name: study.parameters[name] for name in expected} == expected
    with pytest.raises(SpecError, match="unknown parameter of the study speed 'mapps'. Did you mean 'maps'"):
        load_study("speed", mapps=3)
    with pytest.raises(SpecError, match="maps='many' does not fit"): load_study("speed", maps="many")

def test_there_is_nothing_to_run_and_plain_is_refused(tmp_path, cli):
    assert sweep(load_study("speed"), tmp_path).records == []
    code, out, err = cli("sweep", "speed", "--plain")
    assert code == 2 and "notebook only" in err and not (tmp_path/"results").exists()

@pytest.fixture
def maps_file(tmp_path):
    "Six maps of 32 pixels, three of them with a defect."
    rng, masks = np.random.default_rng(0), np.zeros((6, 32, 32), bool)
    masks[:3, 4:12, 6:20] = True
    maps = (rng.random(masks.shape) + .4*masks).round(2).astype(np.float32)
    file = tmp_path/"maps.npz"
    np.savez(file, maps=maps, scores=maps.max((1, 2)), masks=masks, labels=masks.any((1, 2)))
    return file

def time_metrics(*arguments):
    "What the script reports."
    command = [sys.executable, study_path("time_metrics", ".py"), *arguments]
    process = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)

def test_contestants_agree(maps_file):
    names = ("scikit-learn", "exact", "streaming", "binned")
    reports = {name: time_metrics(name, maps_file, "--repeats", 2) for name in names}
    exact = reports["exact"]["values"]
    for name, report in reports.items():
        assert len(report["seconds"]) == 2 and min(report["seconds"]) > 0 and report["versions"]
        for metric in METRICS:
            if name == "scikit-learn" and metric == "AUPRO": continue      # which it does not have
            assert report["values"][metric] == pytest.approx(exact[metric], abs=1e-9), (name, metric)

def test_memory_is_measured_and_the_values_are_those_of_all_maps(maps_file):
    exact, streaming = (time_metrics(name, maps_file, "--memory", 50) for name in ("exact", "streaming"))
    assert exact["maps"] == 50 and exact["peak_mb"] >= 0
    assert exact["values"] == pytest.approx(streaming["values"], abs=1e-9)

def test_without_peers_the_rest_is_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("MDD_BENCH_PEERS", str(tmp_path/"nowhere"))
    execute_study(load_study("speed", **SMOKE), tmp_path/"out")
    table = (tmp_path/"out"/"speed.md").read_text()
    assert table.count("not installed") >= 2
    assert "| exact | all seven |" in table and "| streaming | all seven |" in table
    assert FILES == {file.name for file in (tmp_path/"out").iterdir()}      # the other parts are left out
    assert str(tmp_path) not in table

@pytest.mark.slow
def test_a_peer_that_answers_is_in_the_table(tmp_path, monkeypatch):
    values = {"P-AUROC": .5, "AUPRO": .5}
    answer = json.dumps(dict(seconds=[.25], values=values, bounds={}, versions={"adeval": "9.9"}))
    peer = tmp_path/"python"
    peer.write_text(f"#!/bin/sh\necho '{answer}'\n")
    peer.chmod(0o755)
    monkeypatch.setenv("MDD_BENCH_PEERS", str(peer))
    execute_study(load_study("speed", **SMOKE), tmp_path/"out")
    table = (tmp_path/"out"/"speed.md").read_text()
    assert "| adeval | P-AUROC, AUPRO | 0.250 (0.250-0.250) |" in table and "adeval 9.9" in table

# --- training and testing, an ablation

def ask(script, *arguments, requests=()):
    "What a script writes: a dictionary for each line."
    command = list(map(str, [sys.executable, study_path(script, ".py"), *arguments]))
    process = subprocess.run(command, input="\n".join(requests), capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return [json.loads(line) for line in process.stdout.splitlines()]

def test_a_contestant_answers_each_request():
    fields = json.dumps(FIELDS | dict(detector="rd4ad", batch=4))
    requests = ("train stored float32", "train computed float32", "test 2", "test 1")
    about, *answers = ask("time_ours", fields, "--images", 5, "--trains", requests=requests)
    assert set(about) == {"mdd_bench", "torch"}
    assert [a["images"] for a in answers] == [5]*4 and min(a["seconds"] for a in answers) > 0

@pytest.mark.slow
def test_an_ablation_finds_the_same_with_and_without_the_store():
    options = dict(bank="normal", coreset_ratio=.05)
    specs = json.dumps([FIELDS | dict(detector="dmad", epochs=1, seed=s, options=options) for s in (0, 1)])
    computed, stored = (ask("time_ablation", specs, "--cache-gb", limit)[0] for limit in (0, 20))
    assert computed["mAD"] == stored["mAD"] and len(set(stored["mAD"])) == 2
    assert len(stored["seconds"]) == 2 and min(stored["seconds"]) > 0

@pytest.mark.slow
def test_all_parts_without_peers(tmp_path, monkeypatch):
    monkeypatch.setenv("MDD_BENCH_PEERS", str(tmp_path/"nowhere"))
    own = dict(parts="training,ablation", batch=2, images=4, rounds=2, training_threads=1, ratio=.05,
               ablation_backbone="resnet18", ablation_ratios=".05", ablation_seeds="0,1")
    execute_study(load_study("speed", **SMOKE | SMALL | own), tmp_path/"out")
    training = (tmp_path/"out"/"speed_training.md").read_text()
    assert training.count("anomalib: not installed") == 5 and "| mddnet, light | 1 |" in training
    passes = pd.read_csv(tmp_path/"out"/"speed_training.csv")
    assert (passes[passes.contestant == "rd4ad"].images == 4).all()
    assert passes[passes.failed.isna()].seconds.min() > 0
    ablation = (tmp_path/"out"/"speed_ablation.md").read_text()
    assert "The mAD of all runs is the same" in ablation
    assert len(pd.read_csv(tmp_path/"out"/"speed_ablation.csv")) == 2

@pytest.mark.slow
def test_an_unknown_part_is_refused(tmp_path):
    with pytest.raises(SpecError, match="unknown part 'trainings'"):
        execute_study(load_study("speed", **SMOKE | dict(parts="trainings")), tmp_path/"out")
