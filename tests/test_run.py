"One spec, one record: the same bits every time, other bits for another seed, nothing half-made."
import json, os, shutil, signal, subprocess, sys, time
from dataclasses import replace
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from mdd_bench.data.synthetic import write_embedded
from mdd_bench.detectors import detector as registry
from mdd_bench.detectors.detector import Detector, Prediction
from mdd_bench.errors import DataError, SpecError, StoreError, TrainingError
from mdd_bench.evaluation.metrics import UndefinedMetric
from mdd_bench.options import option
from mdd_bench.running.identity import resolve
from mdd_bench.running.provenance import split_hashes
from mdd_bench.running.reuse import predict_maps
from mdd_bench.running.run import run
from mdd_bench.running.runtime import Runtime, read_progress
from mdd_bench.running.samples import seeded_rows
from mdd_bench.running.spec import make_spec
from mdd_bench.running.store import Store, find_damage, load_records
from conftest import SMALL, flags_of, small_spec

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*RANDOM", "ignore::mdd_bench.evaluation.metrics.UndefinedMetric"
)
KEYS = [
    "I-AUROC", "I-AP", "I-F1max", "P-AUROC", "P-AP", "P-F1max", "AUPRO", "mAD",
    "I-FPR95", "P-FPR95", "P-FPR95-good",
]

@pytest.fixture(params=["rd4ad", "mddnet"])
def made(request, kept_run): return kept_run(request.param)

def never(message):
    "A function that fails the test when it is called."
    def fail(*args, **kwargs): pytest.fail(message)
    return fail

def files_of(folder): return {p.name for p in folder.iterdir()}

def assert_same_replicates(a, b):
    a, b = a.replicates(), b.replicates()
    assert a.keys() == b.keys()
    for cls in a:
        for metric in KEYS: assert np.array_equal(a[cls][metric], b[cls][metric], equal_nan=True), metric

def small_data(folder, classes=("gear", "tile")):
    "A folder of small data that a test may change."
    return write_embedded(folder, "smoke", classes=list(classes))

# --- the same bits

def test_same_spec_same_bits(made, tmp_path):
    "Features from the cache or computed, images loaded here or by a worker, decide nothing."
    spec, first, _ = made
    again = run(spec, tmp_path, Runtime("cpu", workers=1, cache_gb=0), keep_model=True)
    assert first.cost["features"] == "cached" and again.cost["features"] == "computed"
    assert again.id == first.id and again.metrics == first.metrics
    for name in ("scores.csv", "history.csv"):
        assert (again.folder/name).read_bytes() == (first.folder/name).read_bytes()
    a, b = (load_file(r.folder/"model.safetensors") for r in (first, again))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def test_samples_and_replicates_are_the_same_bits(made, tmp_path):
    spec, first, _ = made
    again = run(spec, tmp_path, Runtime("cpu"))
    a, b = first.samples(), again.samples()
    assert (a.paths, a.chosen) == (b.paths, b.chosen) and np.array_equal(a.maps, b.maps)
    assert_same_replicates(first, again)

def test_another_seed_other_bits(made, tmp_path):
    spec, first, _ = made
    other = run(replace(spec, seed=1), tmp_path)
    assert other.id != first.id
    assert (other.folder/"scores.csv").read_bytes() != (first.folder/"scores.csv").read_bytes()

def test_a_record_answers_the_second_time(made, monkeypatch):
    spec, first, out = made
    monkeypatch.setattr("mdd_bench.running.run.fit_and_test", never("ran again"))
    answer = run(spec, out)
    assert answer.id == first.id and answer.metrics == first.metrics

# --- the record

def test_the_files_of_a_record(made):
    _, record, _ = made
    files = {"record.json", "history.csv", "scores.csv", "replicates.npz", "samples.npz", "model.safetensors"}
    assert files_of(record.folder) == files

def test_a_record_is_strict_json(made):
    text = (made.record.folder/"record.json").read_text()
    json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))

def test_a_record_is_a_line_for_each_part_with_metrics_to_a_millionth(made):
    text = (made.record.folder/"record.json").read_text()
    assert [line.split('"')[1] for line in text.splitlines()[1:-1]] == [
        "id", "spec", "metrics", "cost", "provenance"]
    metrics = made.record.metrics["exact"]
    assert json.loads(text)["metrics"]["exact"]["mean"] == metrics["mean"]
    values = [value for of in metrics["per_class"].values() for value in of.values()]
    assert len(values) and all(value == round(value, 6) for value in values)

def test_a_record_holds_every_metric(made):
    "Of each class and each kind of defect; the mean is the mean over classes."
    metrics = made.record.metrics["exact"]
    assert list(metrics["mean"]) == KEYS
    assert list(metrics["per_class"]) == list(metrics["per_kind"]) == made.record.spec["classes"]
    for cls in made.record.spec["classes"]:
        assert list(metrics["per_class"][cls]) == KEYS and len(metrics["per_kind"][cls]) == 4
        assert all(list(values) == KEYS for values in metrics["per_kind"][cls].values())
    for key in KEYS:
        by_hand = np.mean([values[key] for values in metrics["per_class"].values()])
        assert metrics["mean"][key] == pytest.approx(by_hand, abs=1e-6)

def test_a_record_has_a_score_for_every_test_image(made):
    scores = made.record.scores()
    tested = resolve(made.spec).dataset.catalog.part(split="test")
    assert list(scores.columns)[:5] == ["path", "cls", "kind", "label", "score"]
    assert scores.path.tolist() == tested.path.tolist() and scores.kind.tolist() == tested.kind.tolist()
    assert (scores.label == (scores.kind != "good")).all() and np.isfinite(scores.score).all()

def test_a_record_says_what_it_cost(made):
    cost = made.record.cost
    seconds = {"prepare_s", "train_s", "test_s", "replicates_s"}
    others = {"images_per_second", "ms_per_image", "parameters_trained", "bytes_test",
              "bytes_test_without_backbone", "peak_memory_mb", "device", "features"}
    assert cost.keys() == seconds | others
    assert all(cost[name] > 0 for name in [*seconds, "images_per_second", "ms_per_image", "peak_memory_mb"])
    assert cost["bytes_test"] > cost["bytes_test_without_backbone"] > 4*cost["parameters_trained"] > 0

def test_a_record_says_where_its_numbers_come_from(made):
    provenance = made.record.provenance
    known = {"seed", "git_commit", "versions", "threads", "data_fingerprint", "split_hashes", "test_counts",
             "weights_hash", "training_id", "verified", "altered", "started", "finished", "model_hash",
             "defect_textures", "classes_streamed"}
    assert known <= provenance.keys()
    assert provenance["test_counts"] == dict(gear=[2, 4], tile=[2, 4])
    assert provenance["altered"] == dict(images_skipped=0, files_ignored=0, masks_unknown=0)
    assert provenance["training_id"] == resolve(made.spec).training_id

def test_the_history_has_every_step(made):
    "Eight images, in batches of the recipe's size, once."
    history = made.record.history()
    assert len(history) == 1 and np.isfinite(history.loss).all()
    terms = history.drop(columns=["epoch", "step", "loss"])
    assert history.loss.to_numpy() == pytest.approx(terms.sum(axis=1).to_numpy())

def test_a_record_without_its_files_names_them(made, tmp_path):
    "As in a clone, where version control keeps records and scores."
    copy = shutil.copytree(made.out, tmp_path/"copy")
    record = Store(copy).load(made.record.id)
    for name in ("scores.csv", "samples.npz", "replicates.npz"): (record.folder/name).unlink()
    for read in (record.scores, record.samples, record.replicates, record.calibration):
        with pytest.raises(StoreError, match=f"record {record.id} has no .*run the spec again"): read()
    (record.folder/"history.csv").unlink()
    assert record.history().empty

def test_records_are_found_below_a_folder(made, tmp_path):
    shutil.copytree(made.out, tmp_path/"a"/"study")
    assert [r.id for r in load_records(tmp_path)] == [made.record.id]
    with pytest.raises(StoreError, match="no records below"): load_records(tmp_path/"a"/"study"/"runs"/"x")

# --- samples

class Brightness(Detector):
    "Nothing to train: how strong the features are."
    gain: float = option(1., least=0, help="of the maps")

    def __init__(self, backbone, classes=1, **options):
        super().__init__(backbone, classes, **options)
        self.register_buffer("seen", torch.zeros(()))       # something that a kept model holds

    def prepare(self, batches): self.seen += sum(len(b["path"]) for b in batches)

    def predict(self, features, size):
        strength = self.gain*features[0].norm(dim=1, keepdim=True)
        return Prediction(torch.nn.functional.interpolate(strength, size, mode="bilinear")[:, 0])

@pytest.fixture(scope="module", autouse=True)
def brightness():
    registry.register("brightness")(Brightness)
    yield
    registry._registry.pop("brightness")

@pytest.fixture(scope="module")
def more_data(tmp_path_factory):
    "Two classes with eight good and eight defective test images each."
    root = small_data(tmp_path_factory.mktemp("more")/"data")
    for path in sorted(root.glob("*/test/*/*.png")):
        copies = 3 if path.parent.name == "good" else 1
        for k in range(1, copies + 1): add_variant(root, path, k)
    return root

def add_variant(root, path, k):
    "A darker copy of a test image, with its mask."
    with Image.open(path) as image: pixels = np.asarray(image)
    name = f"{int(path.stem) + 10*k:03}"
    Image.fromarray((pixels*(1 - .2*k)).astype(np.uint8)).save(path.with_name(f"{name}.png"))
    cls, kind = path.parents[2].name, path.parent.name
    if kind == "good": return
    masks = root/cls/"ground_truth"/kind
    shutil.copyfile(masks/f"{path.stem}_mask.png", masks/f"{name}_mask.png")

@pytest.fixture(scope="module")
def bright(more_data, tmp_path_factory):
    "The record of a run on them, and its spec and results folder."
    spec, out = small_spec(data=str(more_data), detector="brightness"), tmp_path_factory.mktemp("bright")
    return spec, run(spec, out, Runtime("cpu"), keep_model=True), out

def rows_of(samples, reason, cls):
    return [i for i in range(len(samples)) if samples.chosen[i] == reason and samples.cls[i] == cls]

def paths_of(samples, reason, cls): return [samples.paths[i] for i in rows_of(samples, reason, cls)]

@pytest.mark.parametrize("cls", SMALL["classes"])
def test_samples_hold_the_worst_images(bright, cls):
    _, record, _ = bright
    samples, scores = record.samples(), record.scores().query("cls == @cls")
    assert len(scores) == 16
    good = scores[scores.label == 0].sort_values("score", ascending=False)
    defective = scores[scores.label == 1].sort_values("score")
    assert paths_of(samples, "false alarm", cls) == good.path.tolist()[:2]
    assert paths_of(samples, "miss", cls) == defective.path.tolist()[:2]

@pytest.mark.parametrize("cls", SMALL["classes"])
def test_samples_hold_images_that_the_data_choose(bright, cls):
    spec, record, _ = bright
    table = resolve(spec).dataset.catalog.part(cls=cls, split="test")
    assert paths_of(record.samples(), "seeded", cls) == table.path.iloc[seeded_rows(table)].tolist()

def test_the_seeded_images_are_those_of_every_detector(kept_run):
    def seeded(detector):
        samples = kept_run(detector).record.samples()
        return [path for cls in SMALL["classes"] for path in paths_of(samples, "seeded", cls)]
    assert len(seeded("rd4ad")) == 8 and seeded("rd4ad") == seeded("mddnet")

def test_seeded_rows_are_a_good_image_and_one_of_each_kind(bright):
    table = resolve(bright[0]).dataset.catalog.part(cls="gear", split="test")
    rows = seeded_rows(table)
    assert rows == seeded_rows(table) and table.kind[rows[0]] == "good"
    assert len(set(table.kind[rows])) == len(rows) == 4

def test_samples_know_their_images(bright):
    "Kind and score are those of the scores file."
    _, record, _ = bright
    samples, scores = record.samples(), record.scores().set_index("path")
    assert samples.scores.tolist() == pytest.approx(scores.score[samples.paths].tolist(), rel=1e-6)
    assert samples.kinds == scores.kind[samples.paths].tolist()
    assert samples.cls == scores.cls[samples.paths].tolist()
    assert not any(os.path.isabs(path) for path in samples.paths)

def test_the_maps_of_samples_are_those_of_the_test(bright):
    spec, record, out = bright
    samples, maps = record.samples(), {}
    for part in predict_maps(spec, out, Runtime("cpu")): maps |= dict(zip(part.paths, part.maps))
    assert len(maps) == 32 and samples.maps.dtype == np.float16
    for path, kept in zip(samples.paths, samples.maps):
        assert np.array_equal(kept, maps[path].astype(np.float16))

def test_the_masks_of_samples_are_those_of_the_files(bright, more_data):
    "A pixel of the map is defective when at least half of it is."
    samples = bright[1].samples()
    assert samples.masks.dtype == bool and samples.masks.shape == samples.maps.shape
    for path, kind, mask in zip(samples.paths, samples.kinds, samples.masks):
        if kind == "good":
            assert not mask.any()
            continue
        cls, _, _, name = path.split("/")
        file = more_data/cls/"ground_truth"/kind/name.replace(".png", "_mask.png")
        with Image.open(file) as image: fine = np.asarray(image.convert("L")) > 0
        share = fine.reshape(64, 4, 64, 4).mean((1, 3))
        assert np.array_equal(mask, share >= .5)

def test_the_thumbnails_of_samples_show_their_images(bright, more_data):
    samples = bright[1].samples()
    assert samples.images.shape == (len(samples), 64, 64, 3) and samples.images.dtype == np.uint8
    for path, thumbnail in zip(samples.paths, samples.images):
        with Image.open(more_data/path) as image: fine = np.asarray(image.convert("RGB"), float)
        coarse = fine.reshape(64, 4, 64, 4, 3).mean((1, 3))
        assert np.abs(coarse - thumbnail).mean() < 6

# --- replicates

def test_replicates_have_every_class_and_metric(made):
    replicates = made.record.replicates()
    assert list(replicates) == SMALL["classes"]
    for values in replicates.values():
        assert list(values) == KEYS and {v.shape for v in values.values()} == {(200,)}

TOLERANCES = {"I-AUROC": .05, "P-AUROC": .05, "AUPRO": .1, "mAD": .1}

@pytest.mark.parametrize("metric, tolerance", TOLERANCES.items())
def test_replicates_scatter_around_the_metric(bright, metric, tolerance):
    record = bright[1]
    for cls, values in record.replicates().items():
        value = record.metrics["exact"]["per_class"][cls][metric]
        assert values[metric].mean() == pytest.approx(value, abs=tolerance)
        assert values[metric].min() < value < values[metric].max()

def test_two_runs_on_one_test_set_are_resampled_alike(bright, tmp_path):
    "Metrics do not see a factor: twice the maps are the same numbers only where the same images were drawn."
    spec, record, _ = bright
    doubled = run(replace(spec, options=dict(gain=2), batch=3), tmp_path, Runtime("cpu"))
    assert doubled.id != record.id and (doubled.scores().score > 1.5*record.scores().score).all()
    assert_same_replicates(record, doubled)

def test_images_of_one_class_are_drawn_on_their_own(bright, tmp_path):
    "A run on fewer classes has the same draws, so that studies with different classes stay paired."
    spec, record, _ = bright
    alone = run(replace(spec, classes=["tile"]), tmp_path, Runtime("cpu"))
    assert list(alone.replicates()) == ["tile"]
    assert np.array_equal(alone.replicates()["tile"]["I-AUROC"], record.replicates()["tile"]["I-AUROC"])

# --- calibration

CALIBRATION = dict(calibration=.5, detector="rd4ad", batch=1)

@pytest.fixture(scope="module")
def calibrated(more_data, tmp_path_factory):
    "The spec and record of a run that sets half of its four training images of a class aside."
    root = tmp_path_factory.mktemp("calibrated")
    data = shutil.copytree(more_data, root/"data")
    spec = small_spec(data=str(data), **CALIBRATION)
    set_aside = resolve(spec).dataset.catalog.part(split="calibration")
    for row in set_aside.itertuples():      # a test image that is one of them shows what its score should be
        shutil.copyfile(data/row.path, data/row.cls/"test"/"good"/f"same{row.Index}.png")
    return spec, run(spec, root/"out", Runtime("cpu")), set_aside

def test_calibration_holds_exactly_the_images_that_were_set_aside(calibrated):
    _, record, set_aside = calibrated
    table = record.calibration()
    assert list(table.columns) == ["path", "cls", "score"] and len(table) == 4
    assert table.path.tolist() == set_aside.path.tolist() and table.cls.tolist() == set_aside.cls.tolist()

def test_calibration_images_are_scored_like_test_images(calibrated):
    _, record, set_aside = calibrated
    scores, calibration = record.scores().set_index("path").score, record.calibration().score
    same = [f"{row.cls}/test/good/same{row.Index}.png" for row in set_aside.itertuples()]
    assert scores[same].to_numpy() == pytest.approx(calibration.to_numpy(), rel=1e-4)
    assert calibration.nunique() == len(calibration)

def test_calibration_images_are_kept_out_of_training(calibrated):
    spec, record, set_aside = calibrated
    assert len(record.history()) == 4                                   # eight images less four, one a step
    table = resolve(replace(spec, calibration=None)).dataset.catalog.table
    trained = table[(table.split != "train") | ~table.path.isin(set_aside.path)]
    expected, everything = split_hashes(trained), split_hashes(table)
    assert record.provenance["split_hashes"] == expected
    assert expected["train"] != everything["train"] and expected["test"] == everything["test"]

def test_calibration_images_are_not_tested(calibrated):
    _, record, set_aside = calibrated
    assert not set(record.scores().path) & set(set_aside.path)

def test_a_run_with_calibration_is_another_run(calibrated):
    spec, record, _ = calibrated
    plain, other = replace(spec, calibration=None), replace(spec, calibration=.25)
    assert len({record.id, resolve(plain).run_id, resolve(other).run_id}) == 3
    assert record.spec["calibration"] == .5

def test_a_run_without_calibration_has_none(made):
    assert made.record.spec["calibration"] is None
    with pytest.raises(StoreError, match="has no calibration.csv"): made.record.calibration()

def test_every_model_of_a_separate_run_scores_its_calibration_images(calibrated, tmp_path):
    spec, record, set_aside = calibrated
    separate = run(replace(spec, setting="separate"), tmp_path, Runtime("cpu"))
    assert separate.calibration().path.tolist() == set_aside.path.tolist()
    assert separate.calibration().score.tolist() != record.calibration().score.tolist()

# --- what cannot be run

def test_a_loss_that_explodes_stops_the_run_and_leaves_nothing(tmp_path, monkeypatch):
    from mdd_bench.detectors.rd4ad import RD4AD
    losses = RD4AD.losses
    def exploding(self, batch): return {name: term*float("nan") for name, term in losses(self, batch).items()}
    monkeypatch.setattr(RD4AD, "losses", exploding)
    with pytest.raises(TrainingError, match="'distillation' is nan at epoch 0, step 0"):
        run(small_spec(), tmp_path)
    assert [path.name for path in (tmp_path/"runs").iterdir()] == [".locks"]

def test_a_size_that_does_not_fit_leaves_nothing(tmp_path):
    with pytest.raises(SpecError, match="multiple of 16"): run(small_spec(size=72), tmp_path)
    assert [path.name for path in (tmp_path/"runs").iterdir()] == [".locks"]

def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(SpecError, match="no device 'cuda:99'"): Runtime("cuda:99")

def test_a_class_without_good_test_images_is_nan_and_the_record_keeps_it(tmp_path):
    root = small_data(tmp_path/"d")
    shutil.rmtree(root/"gear"/"test"/"good")
    with pytest.warns(UndefinedMetric): record = run(small_spec(data=str(root)), tmp_path/"out")
    for exact in (record.metrics["exact"], Store(tmp_path/"out").load(record.id).metrics["exact"]):
        assert np.isnan(exact["per_class"]["gear"]["I-AUROC"]) and np.isnan(exact["mean"]["I-AUROC"])
        assert 0 <= exact["per_class"]["tile"]["I-AUROC"] <= 1
    assert np.isnan(record.replicates()["gear"]["I-AUROC"]).all()
    assert not rows_of(record.samples(), "false alarm", "gear")

def test_a_class_without_test_images_is_refused(tmp_path):
    root = small_data(tmp_path/"d")
    shutil.rmtree(root/"gear"/"test")
    with pytest.raises(DataError, match="'gear'.*no test images"): resolve(small_spec(data=str(root)))

def test_skipped_images_are_recorded(tmp_path):
    root = small_data(tmp_path/"d")
    (root/"gear"/"train"/"good"/"001.png").write_bytes(b"x")
    record = run(small_spec(data=str(root), skip_broken=True), tmp_path/"out")
    assert record.provenance["altered"]["images_skipped"] == 1

# --- runs that are stopped

@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    "A run that nobody stopped."
    spec = small_spec(epochs=20)
    return spec, run(spec, tmp_path_factory.mktemp("unbroken"))

def stop_in_training(spec, out, number):
    "Start the command, stop it by a signal once it trains: (exit code, stderr)."
    def listen(): signal.signal(signal.SIGINT, signal.SIG_DFL)       # a shell's background jobs ignore it
    program = [sys.executable, "-c", "from mdd_bench.cli import main; main()"]
    child = subprocess.Popen(
        [*program, "run", *flags_of(spec), "--out", str(out)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=listen,
    )
    while not list(out.glob("runs/*/history.csv")) and child.poll() is None: time.sleep(.02)
    child.send_signal(number)
    _, printed = child.communicate()
    return child.returncode, printed

@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_is_run_again(unbroken, tmp_path, number):
    "It leaves no record, and the next attempt makes the record of an unbroken run."
    spec, whole = unbroken
    code, printed = stop_in_training(spec, tmp_path, number)
    assert code != 0 and not list(tmp_path.glob("runs/*/record.json"))
    if number == signal.SIGINT:
        assert code == 130 and "Traceback" not in printed, printed
        assert printed.strip().splitlines()[-1] == "stopped; what is done is kept, start again to go on"
        assert [path.name for path in (tmp_path/"runs").iterdir()] == [".locks"]
    again = run(spec, tmp_path)
    assert again.metrics == whole.metrics
    assert again.history().equals(whole.history()) and len(again.history()) == 20

# --- real images

def test_real_images(real, real_weights, tmp_path):
    "Two real classes, real weights, at a size that takes seconds: far from chance after four epochs."
    spec = make_spec(
        data=str(real), classes="cookie,hazelnut_toy", backbone="resnet18", weights=str(real_weights),
        detector="rd4ad", size=64, epochs=4, batch=8,
    )
    record = run(spec, tmp_path)
    assert record.metrics["exact"]["mean"]["I-AUROC"] > .6
    assert record.spec["classes"] == ["cookie", "hazelnut_toy"]

def test_a_record_stays_sound_while_it_is_made_again(tmp_path, monkeypatch):
    record = run(small_spec(), tmp_path)
    history = (record.folder/"history.csv").read_bytes()
    def fails(resolved, runtime, folder, *others):
        (folder/"history.csv").write_text("epoch,step")
        (folder/"checkpoint.pt").touch()
        raise ValueError("stopped")
    monkeypatch.setattr("mdd_bench.running.run.fit_and_test", fails)
    with pytest.raises(ValueError, match="stopped"): run(small_spec(), tmp_path, keep_model=True)
    assert find_damage(record.folder) is None and (record.folder/"history.csv").read_bytes() == history
    assert read_progress(record.folder) == (0, "starting") and list(record.folder.glob("again/checkpoint.pt"))
    monkeypatch.undo()
    (record.folder/"again"/"checkpoint.pt").unlink()
    again = run(small_spec(), tmp_path, keep_model=True)
    assert again.metrics == record.metrics and find_damage(record.folder) is None
    assert (record.folder/"model.safetensors").is_file() and not (record.folder/"again").exists()
