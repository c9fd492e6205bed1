"Protocols after the run: from the kept model and only from the right one; long classes stream."
import json, shutil, weakref
from dataclasses import replace
import pytest
from safetensors.torch import load_file, save_file
import mdd_bench.running.run as running
from mdd_bench.errors import SpecError, StoreError
from mdd_bench.reporting.tables import summary
from mdd_bench.running.run import run
from mdd_bench.running.spec import make_spec
from mdd_bench.running.store import Store
from conftest import SMALL

pytestmark = pytest.mark.filterwarnings("ignore:.*RANDOM", "ignore::mdd_bench.evaluation.metrics.UndefinedMetric")
PEERS = ["mvtec_3d", "ader", "dinomaly", "rd4ad", "simplenet"]

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A spec, its record with the model and the record's folder of results."
    spec, out = make_spec(**SMALL, detector="rd4ad"), tmp_path_factory.mktemp("kept")
    return spec, run(spec, out, keep_model=True), out

def copied(out, tmp_path): return shutil.copytree(out, tmp_path/"copy")

@pytest.fixture
def no_training(monkeypatch): monkeypatch.setattr("mdd_bench.running.run.train", lambda *a, **k: pytest.fail("trained again"))

@pytest.mark.parametrize("detector", ["rd4ad", "mddnet"])
def test_later_protocols_equal_those_of_the_run_itself(detector, tmp_path, monkeypatch):
    spec = make_spec(**SMALL, detector=detector)
    at_once = run(replace(spec, protocols=["exact", *PEERS]), tmp_path/"at once")
    run(spec, tmp_path/"later", keep_model=True)
    monkeypatch.setattr("mdd_bench.running.run.train", lambda *a, **k: pytest.fail("trained again"))
    later = run(replace(spec, protocols=PEERS), tmp_path/"later")
    assert later.id == at_once.id and later.metrics == at_once.metrics and later.spec["protocols"] == ["exact", *PEERS]
    assert later.scores().equals(at_once.scores()) and later.provenance["scored_later"][0]["protocols"] == PEERS
    assert Store(tmp_path/"later").load(later.id).metrics == at_once.metrics               # and so it is on disk
    assert len({later.metrics[name]["mean"]["AUPRO"] for name in later.metrics}) == 6

def test_without_a_model_the_record_stays_and_the_remedy_is_named(made, tmp_path, no_training):
    spec, record, out = made
    out = copied(out, tmp_path)
    model = out/"runs"/record.id/"model.safetensors"
    model.unlink()
    before = (model.parent/"record.json").read_bytes()
    with pytest.raises(StoreError, match="exact, not ader, .*--keep-model"): run(replace(spec, protocols=["ader"]), out)
    assert (model.parent/"record.json").read_bytes() == before and run(spec, out).metrics == record.metrics

def test_keep_model_trains_once_more_and_loses_no_protocol(made, tmp_path):
    spec, record, out = made
    out = copied(out, tmp_path)
    run(replace(spec, protocols=["rd4ad"]), out)
    (out/"runs"/record.id/"model.safetensors").unlink()
    again = run(replace(spec, protocols=["ader"]), out, keep_model=True)
    assert list(again.metrics) == ["exact", "rd4ad", "ader"] and again.metrics["exact"] == record.metrics["exact"]

def test_another_model_is_noticed(made, tmp_path, no_training):
    spec, record, out = made
    file = copied(out, tmp_path)/"runs"/record.id/"model.safetensors"
    save_file({k: v + .1 if v.is_floating_point() else v for k, v in load_file(file).items()}, file)
    with pytest.raises(StoreError, match="is not the model of record"): run(replace(spec, protocols=["ader"]), tmp_path/"copy")
    path = file.parent/"record.json"; d = json.loads(path.read_text()); del d["provenance"]["model_hash"]; path.write_text(json.dumps(d))      # as records once were
    with pytest.raises(StoreError, match="does not give the scores of its record"): run(replace(spec, protocols=["ader"]), tmp_path/"copy")
    assert list(Store(tmp_path/"copy").load(record.id).metrics) == ["exact"]

def test_an_unknown_protocol_is_refused_before_anything(made, tmp_path):
    with pytest.raises(SpecError, match="unknown protocol 'adr'. Did you mean 'ader'"): run(replace(made[0], protocols=["adr"]), tmp_path)
    assert not (tmp_path/"runs").exists()

def test_tables_do_not_mix_protocols(made, tmp_path):
    spec, record, out = made
    out = copied(out, tmp_path)
    two = run(replace(spec, protocols=["exact", "ader"]), out)
    other = run(replace(spec, seed=1), out)
    assert summary([two], protocol="ader")["AUPRO"].iloc[0] == two.metrics["ader"]["mean"]["AUPRO"] != summary([two])["AUPRO"].iloc[0]
    with pytest.raises(SpecError, match=f"protocol in record {other.id}"): summary([two, other], protocol="ader")

def test_a_long_class_streams_and_the_record_says_so(made, tmp_path, monkeypatch):
    spec, record, _ = made
    monkeypatch.setattr("mdd_bench.running.run.EXACT_PIXELS", 1000)
    streamed = run(replace(spec, protocols=["exact", "dinomaly"]), tmp_path)
    assert streamed.provenance["classes_streamed"] == SMALL["classes"] and record.provenance["classes_streamed"] == []
    for cls, values in record.metrics["exact"]["per_class"].items():
        assert streamed.metrics["exact"]["per_class"][cls] == pytest.approx(values, abs=1e-6, nan_ok=True)

def test_maps_are_not_held(made, tmp_path, monkeypatch):
    held, real = [], running.predictions
    def watched(*args):
        for b in real(*args):
            held.append(weakref.ref(b["maps"])); yield b
            del b
            held[:] = [r for r in held if r() is not None]
            assert len(held) <= 2                               # the batch in hand, and the one before
    monkeypatch.setattr(running, "predictions", watched)
    run(replace(made[0], batch=2), tmp_path)

def test_a_sweep_scores_again_without_training(tmp_path, cli):
    args = ["sweep", "benchmark", "--plain", "-p", "detector=rd4ad", "-p", "seed=0", *(x for k, v in SMALL.items() for x in ("-p", f"{k}={','.join(map(str, v)) if isinstance(v, list) else v}"))]
    assert cli(*args, "--keep-model")[0] == 0
    first = Store(tmp_path/"results"/"benchmark").records()[0]
    code, out, err = cli(*args, "-p", "protocols=exact,ader")
    second = Store(tmp_path/"results"/"benchmark").load(first.id)
    assert code == 0 and "done" in err and list(second.metrics) == ["exact", "ader"] and second.cost == first.cost      # not trained again
    assert "1/1" not in cli(*args, "-p", "protocols=ader")[2]
