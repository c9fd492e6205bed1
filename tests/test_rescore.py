"Protocols after the run: from the kept model and only from the right one; long classes stream."
import json, shutil, weakref
from dataclasses import replace
import numpy as np
import pytest
from safetensors.torch import load_file, save_file
import mdd_bench.running.testing as testing
from mdd_bench.errors import SpecError, StoreError
from mdd_bench.reporting.tables import summary
from mdd_bench.running.reuse import predict_maps
from mdd_bench.running.run import run
from mdd_bench.running.store import Store
from conftest import SMALL, sweep_flags

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*RANDOM", "ignore::mdd_bench.evaluation.metrics.UndefinedMetric")
PEERS = ["mvtec_3d", "ader", "dinomaly", "rd4ad", "simplenet"]

@pytest.fixture
def copy(kept_run, tmp_path):
    "The spec and record of a small run with its model, in a folder that a test may change, and that folder."
    spec, record, out = kept_run("rd4ad")
    elsewhere = shutil.copytree(out, tmp_path/"copy")
    return spec, Store(elsewhere).load(record.id), elsewhere

@pytest.fixture
def no_training(monkeypatch):
    def fail(*args, **kwargs): pytest.fail("trained again")
    monkeypatch.setattr("mdd_bench.running.models.train", fail)

# --- protocols after the run

@pytest.mark.parametrize("detector", ["rd4ad", "mddnet"])
def test_later_protocols_equal_those_of_the_run_itself(detector, kept_run, tmp_path, monkeypatch):
    spec, record, out = kept_run(detector)
    at_once = run(replace(spec, protocols=["exact", *PEERS]), tmp_path/"at once")
    later_out = shutil.copytree(out, tmp_path/"later")

    def fail(*args, **kwargs): pytest.fail("trained again")
    monkeypatch.setattr("mdd_bench.running.models.train", fail)
    later = run(replace(spec, protocols=PEERS), later_out)

    assert later.id == at_once.id == record.id and later.metrics == at_once.metrics
    assert later.scores().equals(at_once.scores()) and later.cost == record.cost
    assert later.spec["protocols"] == list(later.metrics) == ["exact", *PEERS]
    assert later.provenance["scored_later"][0]["protocols"] == PEERS
    assert Store(later_out).load(later.id).metrics == at_once.metrics           # and so it is on disk
    assert len({metrics["mean"]["AUPRO"] for metrics in later.metrics.values()}) == 6

def test_protocols_that_are_there_need_no_model(copy, no_training):
    spec, record, out = copy
    (record.folder/"model.safetensors").unlink()
    assert run(spec, out).metrics == record.metrics

def test_without_a_model_the_record_stays_and_the_remedy_is_named(copy, no_training):
    spec, record, out = copy
    (record.folder/"model.safetensors").unlink()
    before = (record.folder/"record.json").read_bytes()
    with pytest.raises(StoreError, match="exact, not ader, .*--keep-model"):
        run(replace(spec, protocols=["ader"]), out)
    assert (record.folder/"record.json").read_bytes() == before

def test_keep_model_trains_once_more_and_loses_no_protocol(copy):
    spec, record, out = copy
    run(replace(spec, protocols=["rd4ad"]), out)
    (record.folder/"model.safetensors").unlink()
    again = run(replace(spec, protocols=["ader"]), out, keep_model=True)
    assert list(again.metrics) == ["exact", "rd4ad", "ader"]
    assert again.metrics["exact"] == record.metrics["exact"] and (record.folder/"model.safetensors").is_file()

def test_an_unknown_protocol_is_refused_before_anything(kept_run, tmp_path):
    spec = replace(kept_run("rd4ad").spec, protocols=["adr"])
    with pytest.raises(SpecError, match="unknown protocol 'adr'. Did you mean 'ader'"): run(spec, tmp_path)
    assert not (tmp_path/"runs").exists()

def test_tables_do_not_mix_protocols(copy):
    spec, _, out = copy
    two = run(replace(spec, protocols=["exact", "ader"]), out)
    other = run(replace(spec, seed=1), out)
    of_ader = summary([two], protocol="ader")["AUPRO"].iloc[0]
    assert of_ader == two.metrics["ader"]["mean"]["AUPRO"] != summary([two])["AUPRO"].iloc[0]
    with pytest.raises(SpecError, match=f"protocol in record {other.id}"):
        summary([two, other], protocol="ader")

# --- the right model

def change_weights(file):
    changed = {name: t + .1 if t.is_floating_point() else t for name, t in load_file(file).items()}
    save_file(changed, file)

def test_another_model_is_noticed(copy, no_training):
    spec, record, out = copy
    change_weights(record.folder/"model.safetensors")
    with pytest.raises(StoreError, match="is not the model of record"):
        run(replace(spec, protocols=["ader"]), out)
    with pytest.raises(StoreError, match="is not the model of record"): next(predict_maps(spec, out))
    assert list(Store(out).load(record.id).metrics) == ["exact"]

def test_a_model_that_gives_other_scores_is_noticed(copy, no_training):
    "Although its hash is the one of the record."
    from mdd_bench.running.store import hash_file
    spec, record, out = copy
    change_weights(record.folder/"model.safetensors")
    content = json.loads((record.folder/"record.json").read_text())
    content["provenance"]["model_hash"] = hash_file(record.folder/"model.safetensors")
    (record.folder/"record.json").write_text(json.dumps(content))
    with pytest.raises(StoreError, match="does not give the scores of its record"):
        run(replace(spec, protocols=["ader"]), out)
    assert list(Store(out).load(record.id).metrics) == ["exact"]

def test_a_model_without_a_hash_is_not_believed(copy, no_training):
    spec, record, out = copy
    content = json.loads((record.folder/"record.json").read_text())
    del content["provenance"]["model_hash"]
    (record.folder/"record.json").write_text(json.dumps(content))
    with pytest.raises(StoreError, match="is not the model of record"):
        run(replace(spec, protocols=["ader"]), out)

# --- what only a test reads

def test_a_run_that_differs_only_in_its_test_takes_the_weights(kept_run, tmp_path, no_training):
    spec, record, out = kept_run("mddnet")
    copy = shutil.copytree(out, tmp_path/"copy")
    product = run(replace(spec, options=dict(fusion="product")), copy)
    assert product.id != record.id and product.metrics != record.metrics
    assert product.provenance["trained_by"] == record.id
    assert product.cost["train_s"] == record.cost["train_s"]
    assert not (product.folder/"model.safetensors").exists()

# --- maps

def test_maps_need_a_kept_model(kept_run, tmp_path):
    spec, record, _ = kept_run("rd4ad")
    with pytest.raises(StoreError, match=f"no model of run {record.id} is kept.*--keep-model"):
        next(predict_maps(spec, tmp_path))

def test_maps_of_a_kept_model_are_those_of_its_record(kept_run):
    spec, record, out = kept_run("mddnet")
    parts, scores = list(predict_maps(spec, out)), record.scores()
    assert [part.cls for part in parts] == SMALL["classes"]
    for part in parts:
        rows = scores[scores.cls == part.cls]
        assert part.paths == rows.path.tolist() and part.kinds == rows.kind.tolist()
        assert part.maps.shape == part.masks.shape == (len(rows), 64, 64) and part.maps.dtype == np.float32
        assert (part.masks.any((1, 2)) <= rows.label.to_numpy(bool)).all()

# --- memory

def test_a_long_class_streams_and_the_record_says_so(kept_run, tmp_path, monkeypatch):
    spec, record, _ = kept_run("rd4ad")
    monkeypatch.setattr(testing, "EXACT_PIXELS", 1000)
    streamed = run(replace(spec, protocols=["exact", "dinomaly"]), tmp_path)
    assert streamed.provenance["classes_streamed"] == SMALL["classes"]
    assert record.provenance["classes_streamed"] == []
    for cls, values in record.metrics["exact"]["per_class"].items():
        assert streamed.metrics["exact"]["per_class"][cls] == pytest.approx(values, abs=1e-6, nan_ok=True)

def test_maps_are_not_held(kept_run, tmp_path, monkeypatch):
    "While a class is tested, no more than the batch in hand and the one before are in memory."
    real, held, most = testing.predictions, [], []

    def watched(*args):
        for batch in real(*args):
            held.append(weakref.ref(batch.maps))
            yield batch
            del batch
            held[:] = [ref for ref in held if ref() is not None]
            most.append(len(held))

    monkeypatch.setattr(testing, "predictions", watched)
    run(replace(kept_run("rd4ad").spec, batch=1), tmp_path)
    assert len(most) == 12 and max(most) <= 2

# --- sweeps

def test_a_sweep_scores_again_without_training(cli, tmp_path):
    args = ["sweep", "benchmark", "--plain", *sweep_flags()]
    assert cli(*args, "--keep-model")[0] == 0
    [first] = Store(tmp_path/"results"/"benchmark").records()
    code, _, err = cli(*args, "-p", "protocols=exact,ader")
    second = Store(tmp_path/"results"/"benchmark").load(first.id)
    assert code == 0 and "done" in err
    assert list(second.metrics) == ["exact", "ader"] and second.cost == first.cost      # not trained again
    assert "1/1" not in cli(*args, "-p", "protocols=ader")[2]
