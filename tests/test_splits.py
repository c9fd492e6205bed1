"Labelled anomalies: which are drawn, what stays in the test, what a run sees of them, one model or many."
import json, shutil
from dataclasses import replace
import numpy as np
import pytest
import torch
from PIL import Image
from mdd_bench.data.layouts import read_catalog
from mdd_bench.data.synthetic import embedded
from mdd_bench.data.splits import SCHEMES, draw, follow, largest_draw, pools, set_aside, shuffled
from mdd_bench.data.splits import read_manifest, write_manifest
from mdd_bench.detectors import detector as registry
from mdd_bench.detectors.detector import (
    Detector, Prediction, Recipe, labelled_batches, normal_batches, texture_batches,
)
from mdd_bench.errors import DataError, SpecError
from mdd_bench.reporting.tables import how_it_was_made, seen_and_unseen, summary
from mdd_bench.running import models, training
from mdd_bench.running.identity import model_plans, resolve
from mdd_bench.running.reuse import predict_maps
from mdd_bench.running.run import run
from mdd_bench.running.runtime import Runtime
from mdd_bench.running.spec import make_spec
from mdd_bench.running.study import load_study

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*RANDOM", "ignore::mdd_bench.evaluation.metrics.UndefinedMetric"
)

# ---- the data

KINDS = {
    "bolt": {"dent": 6, "rust": 5, "scratch": 4},
    "felt": {"cut": 12},
    "tile": {"chip": 8, "crack": 6},
}

def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.uint8(array)).save(path)

def stripes(rng, angle):
    "An image [64, 64] of one class: stripes of its angle, with noise."
    y, x = np.mgrid[:64, :64]
    phase = .6*(x*np.cos(angle) + y*np.sin(angle)) + rng.uniform(0, 6)
    return 127 + 90*np.sin(phase) + rng.normal(0, 4, (64, 64))

def write_class(folder, cls):
    "A defect is a grey rectangle whose height is its kind's."
    rng, angle = np.random.default_rng([*cls.encode()]), list(KINDS).index(cls)
    for i in range(6): save(folder/f"train/good/{i:03}.png", stripes(rng, angle))
    for i in range(4): save(folder/f"test/good/{i:03}.png", stripes(rng, angle))
    for number, (kind, n) in enumerate(KINDS[cls].items()):
        for i in range(n):
            image, mask = stripes(rng, angle), np.zeros((64, 64))
            top, left = rng.integers(4, 40, 2)
            mask[top:top + 8 + 4*number, left:left + 10] = 255
            image[mask > 0] = 40
            save(folder/f"test/{kind}/{i:03}.png", image.clip(0, 255))
            save(folder/f"ground_truth/{kind}/{i:03}_mask.png", mask)

def write(root, classes=KINDS):
    for c in classes: write_class(root/c, c)
    return root

@pytest.fixture(scope="module")
def folder(tmp_path_factory): return write(tmp_path_factory.mktemp("stripes")/"data")

@pytest.fixture
def copy(folder, tmp_path):
    "The same data in a folder that a test may change."
    shutil.copytree(folder, tmp_path/"data")
    return tmp_path/"data"

@pytest.fixture
def catalog(folder): return read_catalog(folder)

# ---- the smallest detector that learns from labels

def mean_feature(batches): return torch.cat([b["features"][0].mean((2, 3)) for b in batches]).mean(0)
def paths_of(batches): return [path for b in batches for path in b["path"]]
def images_of(batches): return sum(len(b["features"][0]) for b in batches)

class Toy(Detector):
    "Remembers the mean feature of normal and of labelled images, and notes what it was shown."
    recipe, needs = Recipe(epochs=2, batch=4), frozenset({"labelled", "textures"})
    defects = dict(textures="procedural")
    seen = {}

    def __init__(self, backbone, classes=1, **options):
        super().__init__(backbone, classes, **options)
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.register_buffer("mean", torch.zeros(backbone.channels[0]))
        self.register_buffer("bad", torch.zeros(backbone.channels[0]))

    def prepare(self, batches):
        self.mean = mean_feature(normal_batches(batches))
        if list(labelled_batches(batches)): self.bad = mean_feature(labelled_batches(batches))
        Toy.seen = dict(
            normal=paths_of(normal_batches(batches)),
            labelled=paths_of(labelled_batches(batches)),
            textures=images_of(texture_batches(batches)),
            steps=[],
        )

    def losses(self, batch):
        known = batch.get("labelled")
        self.seen["steps"].append(None if known is None else known["index"].tolist())
        if known is not None:
            assert known["mask"].shape[1:] == (64, 64) and 0 < known["mask"].mean() < 1
            assert len(known["features"][0]) == len(known["path"])
        return dict(one=(self.weight - 1)**2)

    def predict(self, features, size):
        def distance(to): return (features[0] - to.view(1, -1, 1, 1)).norm(dim=1, keepdim=True)
        maps = distance(self.mean) - .5*distance(self.bad)
        return Prediction(torch.nn.functional.interpolate(maps, size, mode="bilinear")[:, 0])

@pytest.fixture(scope="module", autouse=True)
def toy():
    registry.register("toy")(Toy)
    yield Toy
    registry._registry.pop("toy")

def toy_spec(folder, **fields):
    defaults = dict(data=str(folder), size=64, weights="procedural", layers=[1], detector="toy")
    return make_spec(**defaults | fields)

# ---- the draw

def test_the_draw_is_what_it_always_was():
    "A seeded shuffle of Python's: the same picks on any machine, or old manifests would mean something else."
    names = [f"{i:03}" for i in range(8)]
    assert shuffled(names[::-1], 0) == ["004", "001", "005", "002", "000", "003", "007", "006"]

@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("seed", range(3))
def test_draws_are_nested_and_leave_one_test_set(catalog, scheme, seed):
    classes = ["bolt", "tile"] if scheme == "from_classes" else None
    drawn = [draw(catalog, scheme, n, seed, hold_out=3, classes=classes if n else None) for n in range(4)]
    manifests = [d.manifest for d in drawn]
    for less, more in zip(manifests, manifests[1:]): assert set(less["files"]) < set(more["files"])
    assert len({m["test_hash"] for m in manifests}) == 1
    assert len({m["labelled_hash"] for m in manifests}) == 4
    none, largest = manifests[0], manifests[3]
    assert set(largest["files"]) | set(largest["held_out"]) == set(none["held_out"])

@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("n", range(4))
def test_a_draw_moves_rows_between_splits_and_loses_none(catalog, scheme, seed, n):
    classes = ["bolt", "tile"] if scheme == "from_classes" and n else None
    drawn = draw(catalog, scheme, n, seed, hold_out=3, classes=classes)
    table, labelled_files = drawn.catalog.table, set(drawn.manifest["files"])
    test = table[table.split == "test"]
    assert len(table) == len(catalog.table)
    assert not labelled_files & set(test.path)
    assert (table[table.split == "train"].kind == "good").all()
    assert set(table[table.split == "labelled"].path) == labelled_files
    assert set(table[table.split == "held out"].path) == set(drawn.manifest["held_out"])
    assert (test[test.kind != "good"].groupby("cls").size() >= 5).all()

def labelled_per_class(split):
    return split.catalog.part(split="labelled").groupby("cls").size().to_dict()

def labelled_per_kind(split):
    "{(class, kind): number of labelled images}."
    return split.catalog.part(split="labelled").groupby(["cls", "kind"]).size().to_dict()

def test_pooled_takes_from_each_class(catalog):
    pooled = draw(catalog, "pooled", 4)
    assert labelled_per_class(pooled) == dict(bolt=4, felt=4, tile=4)

def test_per_kind_takes_from_each_kind(catalog):
    per_kind = draw(catalog, "per_kind", 3)
    assert labelled_per_kind(per_kind) == {(c, kind): 3 for c in KINDS for kind in KINDS[c]}

@pytest.mark.parametrize("seed, bolt, tile", [
    (0, "dent", "chip"),
    (1, "rust", "crack"),
    (2, "scratch", "chip"),
    (3, "dent", "crack"),
])
def test_one_kind_rotates(catalog, seed, bolt, tile):
    "And takes nothing from felt, which has a single kind."
    one_kind = draw(catalog, "one_kind", 3, seed)
    assert labelled_per_kind(one_kind) == {("bolt", bolt): 3, ("tile", tile): 3}

def test_from_classes_takes_from_the_named_ones_and_tests_as_pooled_does(catalog):
    some = draw(catalog, "from_classes", 4, classes=["tile"])
    assert labelled_per_class(some) == dict(tile=4)
    assert some.manifest["test_hash"] == draw(catalog, "pooled", 4).manifest["test_hash"]

@pytest.mark.parametrize("scheme", ["pooled", "per_kind", "one_kind"])
def test_neither_the_order_of_files_nor_the_folder_matters(catalog, tmp_path, scheme):
    mixed = replace(catalog, table=catalog.table.sample(frac=1, random_state=3))
    elsewhere = read_catalog(write(tmp_path/"copy", list(KINDS)[::-1]))
    manifest = draw(catalog, scheme, 3, 1).manifest
    assert manifest == draw(mixed, scheme, 3, 1).manifest == draw(elsewhere, scheme, 3, 1).manifest

def keep(catalog, rows): return replace(catalog, table=catalog.table[rows])

def test_what_a_class_can_give_is_limited(catalog):
    with pytest.raises(DataError, match=r"felt \(at most 7\).*at most 7.*--labelled-at-most"):
        draw(catalog, labelled=8)
    with pytest.raises(DataError, match=r"bolt \(at most 3\)"):
        draw(catalog, "per_kind", 4)
    few = keep(catalog, catalog.table.kind.isin(["good", "dent"]))
    with pytest.raises(DataError, match="at most 1"):
        draw(few, labelled=3)
    felt = keep(catalog, catalog.table.cls == "felt")
    with pytest.raises(DataError, match="two kinds"):
        draw(felt, "one_kind", 1)

def test_at_most_takes_what_each_class_can_give(catalog):
    drawn = draw(catalog, labelled=9, at_most=True)
    assert labelled_per_class(drawn) == dict(bolt=9, felt=7, tile=9)

@pytest.mark.parametrize("scheme, largest", [("pooled", 10), ("per_kind", 3), ("one_kind", 5)])
def test_the_largest_draw(catalog, scheme, largest):
    "Bolt has 6, 5 and 4 anomalies of its kinds; five stay."
    bolt = catalog.part(cls="bolt", split="test").query("kind != 'good'")
    bolt_pools = pools(bolt, scheme, 0)
    assert largest_draw(bolt_pools, len(bolt)) == largest
    assert largest_draw(bolt_pools, 5) == largest_draw([], 20) == 0

def test_small_pools_limit_the_draw_unless_they_may_give_all_they_have():
    assert largest_draw([["a"], ["b", "c", "d"]], 12) == 1
    assert largest_draw([["a"], ["b", "c", "d"]], 12, at_most=True) == 3

IMPOSSIBLE = {
    "hold_out": dict(labelled=3, hold_out=2),
    "'poold'": dict(scheme="poold", labelled=1),
    "label_classes": dict(scheme="from_classes", labelled=1),
    "'blt'": dict(scheme="from_classes", labelled=1, classes=["blt"]),
    "with from_classes": dict(labelled=1, classes=["bolt"]),
}

@pytest.mark.parametrize("culprit, request_", IMPOSSIBLE.items())
def test_impossible_requests(catalog, culprit, request_):
    with pytest.raises(SpecError, match=culprit): draw(catalog, **request_)

def test_a_labelled_anomaly_needs_a_mask(catalog):
    table = catalog.table.copy()
    table.loc[table.kind != "good", "mask"] = ""
    with pytest.raises(DataError, match="add the masks of .* anomalies that have no mask"):
        draw(replace(catalog, table=table), labelled=1)

# ---- the manifest

@pytest.fixture
def drawn(catalog): return draw(catalog, "per_kind", 1, 5, hold_out=2)

@pytest.fixture
def file(drawn, tmp_path):
    write_manifest(drawn.manifest, tmp_path/"m.json")
    return tmp_path/"m.json"

def flip_pixel(path):
    with Image.open(path) as image: pixels = np.array(image)
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(path)

def test_a_manifest_gives_the_same_split(catalog, drawn, file):
    followed = follow(catalog, read_manifest(file))
    assert followed.catalog.table.equals(drawn.catalog.table) and followed.manifest == drawn.manifest

def test_a_changed_image_is_named(copy, drawn, file):
    name = next(iter(drawn.manifest["files"]))
    flip_pixel(copy/name)
    with pytest.raises(DataError, match=f"image {name}"): follow(read_catalog(copy), read_manifest(file))

def test_a_changed_mask_is_named(copy, drawn, file):
    name = next(iter(drawn.manifest["files"]))
    mask = read_catalog(copy).part(path=name)["mask"].item()
    flip_pixel(copy/mask)
    with pytest.raises(DataError, match=f"mask of {name}"): follow(read_catalog(copy), read_manifest(file))

def test_a_missing_image_is_named(copy, drawn, file):
    name = next(iter(drawn.manifest["files"]))
    (copy/name).unlink()
    with pytest.raises(DataError, match=name): follow(read_catalog(copy), read_manifest(file))

def test_other_test_images_are_refused(copy, drawn, file):
    tested = drawn.catalog.part(split="test").path.iloc[-1]
    (copy/tested).unlink()
    with pytest.raises(DataError, match="test images"): follow(read_catalog(copy), read_manifest(file))

def test_what_is_no_manifest(folder, tmp_path):
    (tmp_path/"bad.json").write_text('{"files": {}}')
    (tmp_path/"list.json").write_text("[]")
    for bad in (tmp_path/"bad.json", tmp_path/"list.json", tmp_path/"gone.json", folder):
        with pytest.raises(DataError, match="mdd_bench labels"): read_manifest(bad)

# ---- the calibration split

def calibration_paths(catalog): return set(catalog.part(split="calibration").path)

@pytest.mark.parametrize("share, n", [(1e-6, 1), (.2, 1), (.3, 2), (.5, 3), (.99, 5)])
def test_a_share_of_each_class_is_set_aside(catalog, share, n):
    "Of six normals: at least one, and one stays."
    counts = set_aside(catalog, share).counts()
    assert counts.calibration.tolist() == [n]*3 and counts.train.tolist() == [6 - n]*3
    assert counts.drop(columns=["calibration", "train"]).equals(catalog.counts().drop(columns="train"))

def test_only_training_normals_are_set_aside(catalog):
    table = set_aside(catalog, .5).table
    moved = table.split != catalog.table.split
    assert (table.split[moved] == "calibration").all() and (catalog.table.split[moved] == "train").all()
    assert (table.kind[moved] == "good").all()
    assert table.drop(columns="split").equals(catalog.table.drop(columns="split"))

def test_the_first_of_the_shuffled_normals_are_set_aside(catalog):
    expected = set()
    for c in KINDS: expected |= set(shuffled(catalog.part(cls=c, split="train").path, 0)[:2])
    assert calibration_paths(set_aside(catalog, .3)) == expected

def test_all_runs_on_a_dataset_set_the_same_images_aside(catalog, tmp_path):
    "Whatever the order of files, the folder, the other classes; and a larger share contains a smaller one."
    mixed = replace(catalog, table=catalog.table.sample(frac=1, random_state=3))
    elsewhere = read_catalog(write(tmp_path/"copy", list(KINDS)[::-1]))
    paths = calibration_paths(set_aside(catalog, .3))
    assert paths == calibration_paths(set_aside(mixed, .3)) == calibration_paths(set_aside(elsewhere, .3))
    tile = keep(catalog, catalog.table.cls == "tile")
    assert calibration_paths(set_aside(tile, .3)) == {p for p in paths if p.startswith("tile/")}
    assert paths < calibration_paths(set_aside(catalog, .5))

@pytest.mark.parametrize("seed", range(3))
def test_setting_aside_and_labelling_do_not_disturb_each_other(catalog, seed):
    plain = draw(catalog, labelled=2, hold_out=3, seed=seed)
    calibrated = draw(set_aside(catalog, .3), labelled=2, hold_out=3, seed=seed)
    assert calibrated.manifest == plain.manifest
    assert calibrated.catalog.table.equals(set_aside(plain.catalog, .3).table)
    followed = follow(set_aside(catalog, .3), plain.manifest)
    assert followed.catalog.table.equals(calibrated.catalog.table)

def test_the_column_is_there_only_where_images_are_set_aside(catalog):
    assert "calibration" not in catalog.counts()
    columns = ["train", "calibration", "test good", "test anomalous", "kinds"]
    assert list(set_aside(catalog, .3).counts().columns) == columns

@pytest.mark.parametrize("share", [0, 1, -.1, 1.5, float("nan")])
def test_impossible_shares(catalog, share):
    with pytest.raises(SpecError, match="share") as e: set_aside(catalog, share)
    assert "above 0 and below 1" in e.value.remedy

@pytest.mark.parametrize("n", [0, 1])
def test_a_class_with_too_few_normals_is_named(catalog, n):
    training = catalog.part(cls="felt", split="train").path
    with pytest.raises(DataError, match=f"class felt has {n} "):
        set_aside(keep(catalog, ~catalog.table.path.isin(training[n:])), .5)

def test_of_two_normals_one_stays(catalog):
    training = catalog.part(cls="felt", split="train").path
    two = set_aside(keep(catalog, ~catalog.table.path.isin(training[2:])), .9).counts()
    assert two.loc["felt", ["train", "calibration"]].tolist() == [1, 1]

# ---- the run

@pytest.fixture(scope="module")
def labelled_run(folder, tmp_path_factory):
    "The record of one run with labels, and what its detector was shown."
    record = run(toy_spec(folder, labelled=3, hold_out=5, label_seed=2), tmp_path_factory.mktemp("labelled"))
    return record, Toy.seen

def test_a_run_shows_the_labelled_images_and_tests_the_others(labelled_run):
    record, seen = labelled_run
    manifest = json.loads((record.folder/"manifest.json").read_text())
    assert sorted(seen["labelled"]) == sorted(manifest["files"]) and len(seen["labelled"]) == 9
    assert seen["textures"] == 47 and len(seen["normal"]) == 18
    tested = set(record.scores().path)
    assert not tested & {*manifest["files"], *manifest["held_out"]}
    assert len(tested) == 12 + (15 + 12 + 14) - 15

def test_each_step_gets_a_batch_of_labelled_images(labelled_run):
    steps = labelled_run[1]["steps"]
    assert len(steps) == 2*5
    assert all(len(step) == 4 == len(set(step)) for step in steps)
    assert len({tuple(step) for step in steps}) > 1

def test_a_record_describes_its_labels(labelled_run):
    record, _ = labelled_run
    assert record.provenance["test_counts"] == dict(bolt=[4, 10], felt=[4, 7], tile=[4, 9])
    assert record.provenance["labels"]["images"] == dict(bolt=3, felt=3, tile=3)
    assert record.spec["label_seed"] == 2 and record.spec["hold_out"] == 5
    assert record.provenance["defect_textures"] == "procedural"
    assert "felt 4 + 7" in how_it_was_made([record])

def test_with_computed_features_the_bits_are_the_same(folder, tmp_path):
    spec = toy_spec(folder, labelled=2)
    cached = run(spec, tmp_path/"cached")
    computed = run(spec, tmp_path/"computed", Runtime(cache_gb=0))
    assert (cached.cost["features"], computed.cost["features"]) == ("cached", "computed")
    assert cached.metrics == computed.metrics and cached.scores().equals(computed.scores())

def test_the_identity_is_what_was_drawn(folder, tmp_path):
    spec = toy_spec(folder, labelled=3, hold_out=5)
    write_manifest(resolve(spec).dataset.manifest, tmp_path/"m.json")
    from_file = toy_spec(folder, manifest=str(tmp_path/"m.json"))
    same, other = replace(spec, label_seed=0), replace(spec, label_seed=1)
    assert resolve(from_file).identity == resolve(spec).identity == resolve(same).identity
    assert resolve(other).run_id != resolve(spec).run_id
    record = run(from_file, tmp_path)
    assert record.spec["label_seed"] == 0 and record.spec["labelled"] == 3 and record.spec["manifest"] is None
    assert run(spec, tmp_path).folder == record.folder

def test_the_order_of_classes_is_no_part_of_the_identity(folder):
    backwards = toy_spec(folder, classes="tile,bolt,felt")
    assert resolve(backwards).run_id == resolve(toy_spec(folder)).run_id

def test_what_is_held_out_decides_no_weight(folder):
    specs = [toy_spec(folder), toy_spec(folder, hold_out=5), toy_spec(folder, hold_out=5, label_seed=1)]
    resolved = [resolve(spec) for spec in specs]
    assert len({r.run_id for r in resolved}) == 3
    assert len({r.training_id for r in resolved}) == 1

def test_what_is_labelled_decides_weights(folder):
    draws = [dict(labelled=0), dict(labelled=2), dict(labelled=2, label_seed=1)]
    resolved = [resolve(toy_spec(folder, hold_out=5, **labels)) for labels in draws]
    assert len({r.training_id for r in resolved}) == 3

def test_a_scheme_without_labels_is_no_part_of_the_identity(folder):
    plain = resolve(toy_spec(folder)).identity
    assert resolve(toy_spec(folder, scheme="per_kind", label_seed=4)).identity == plain
    assert "labelled" not in plain and "test" not in plain

def fit_alone(resolved, folder):
    "The fitted detector of a run; nothing is tested, and nothing comes from the cache."
    [plan] = model_plans(resolved)
    return models.fit(plan, Runtime("cpu", cache_gb=0), folder).detector

def test_without_labels_no_anomalous_image_is_opened_in_training(copy, tmp_path, toy):
    resolved = resolve(toy_spec(copy, hold_out=3))
    for c in KINDS:
        for kind in KINDS[c]: shutil.rmtree(copy/c/"test"/kind)
        shutil.rmtree(copy/c/"ground_truth")
    detector = fit_alone(resolved, tmp_path)
    assert toy.seen["labelled"] == [] and set(toy.seen["steps"]) == {None} and detector.mean.abs().sum() > 0

@pytest.mark.parametrize("detector", ["dmad", "bgad"])
def test_detectors_that_learn_from_labels_need_none(copy, tmp_path, detector):
    "Every anomalous image is gone before the training begins."
    resolved = resolve(toy_spec(copy, hold_out=3, detector=detector, epochs=1))
    for c in KINDS:
        shutil.rmtree(copy/c/"test")
        shutil.rmtree(copy/c/"ground_truth")
    fitted = fit_alone(resolved, tmp_path)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert fitted(images).map.isfinite().all()

def test_the_order_of_classes_does_not_change_the_result(folder, tmp_path):
    backwards = write(tmp_path/"copy", list(KINDS)[::-1])
    a = run(toy_spec(folder, labelled=2), tmp_path/"a")
    b = run(toy_spec(backwards, labelled=2, classes="tile,felt,bolt"), tmp_path/"b")
    assert a.id == b.id and a.metrics == b.metrics

def test_labels_for_a_detector_that_learns_from_none_are_refused(folder):
    with pytest.raises(SpecError, match="rd4ad does not learn.*toy"):
        resolve(toy_spec(folder, detector="rd4ad", labelled=1))
    assert resolve(toy_spec(folder, detector="rd4ad", hold_out=1)).dataset.manifest["files"] == {}

def test_an_empty_mask_is_named(copy, tmp_path):
    spec = toy_spec(copy, labelled=1)
    name = next(iter(resolve(spec).dataset.manifest["files"]))
    mask = copy/read_catalog(copy).part(path=name)["mask"].item()
    save(mask, np.zeros((64, 64)))
    with pytest.raises(DataError, match=f"{mask.name} is empty"): run(spec, tmp_path/"out")

# ---- tables of such runs

def test_a_table_compares_arms_on_one_test_set(folder, tmp_path):
    spec = toy_spec(folder, hold_out=4, epochs=1)
    records = [run(replace(spec, labelled=n, seed=seed), tmp_path) for n in (0, 4) for seed in (0, 1)]
    assert summary(records, "labelled")["n"].tolist() == [2, 2]
    other_test = run(replace(spec, labelled=2, hold_out=3), tmp_path)
    with pytest.raises(SpecError, match="hold_out"): summary([*records, other_test], "labelled")
    records[3].provenance["labels"]["test_hash"] = "other"
    with pytest.raises(SpecError, match="different images"): summary(records, "labelled")

def test_a_table_tells_seen_kinds_from_unseen_ones(folder, tmp_path):
    spec = toy_spec(folder, hold_out=4, epochs=1, scheme="one_kind")
    records = [run(replace(spec, labelled=n), tmp_path) for n in (0, 4)]
    assert list(seen_and_unseen(records).columns[:2]) == ["I-AUROC seen", "I-AUROC unseen"]

# ---- studies of labels

def test_an_axis_of_labels_has_one_point_for_a_detector_that_learns_from_none():
    study = load_study("labels", detector="toy,rd4ad", labelled="0,1,5", seed=0)
    arms = [(spec.detector, spec.labelled) for spec in study.specs()]
    assert arms == [("toy", 0), ("toy", 1), ("toy", 5), ("rd4ad", 0)]

@pytest.mark.parametrize("parameters, hold_out", [
    (dict(), 10),
    (dict(labelled="0,2"), 2),
    (dict(labelled="0,2", hold_out=4), 4),
    (dict(labelled="0,2", hold_out="none"), 2),
])
def test_the_largest_arm_decides_what_is_held_out(parameters, hold_out):
    "Along an axis of labelled anomalies, unless another number is given."
    study = load_study("labels", detector="dmad", seed=0, **parameters)
    assert {spec.hold_out for spec in study.specs()} == {hold_out}

def test_a_study_without_labels_holds_nothing_out():
    assert {spec.hold_out for spec in load_study("benchmark", detector="dmad").specs()} == {None}

def test_the_study_of_kinds_can_be_drawn_on_its_own_data():
    "And leaves images of the labelled kind to test."
    spec = next(s for s in load_study("kinds", seed=0).specs() if s.labelled)
    split = draw(read_catalog(embedded(spec.data)), spec.scheme, spec.labelled, 0, spec.hold_out)
    labelled_kinds = split.catalog.part(split="labelled")[["cls", "kind"]].drop_duplicates()
    tested = split.catalog.part(split="test").merge(labelled_kinds)
    assert set(tested.cls) == set(split.catalog.classes)

# ---- one model, or one for each class

SEPARATE = dict(setting="separate", labelled=2, hold_out=3)

@pytest.fixture(scope="module")
def separate_run(folder, tmp_path_factory):
    "The record of one model per class, all kept, and its folder of records."
    out = tmp_path_factory.mktemp("separate")
    return run(toy_spec(folder, **SEPARATE), out, keep_model=True), out

def test_separate_models_are_those_of_single_classes(folder, tmp_path, separate_run):
    separate, _ = separate_run
    single = {c: run(toy_spec(folder, classes=c, labelled=2, hold_out=3), tmp_path) for c in KINDS}
    per_class = {c: record.metrics["exact"]["per_class"][c] for c, record in single.items()}
    assert separate.metrics["exact"]["per_class"] == per_class
    sizes = [record.cost["bytes_test_without_backbone"] for record in single.values()]
    assert separate.cost["bytes_test_without_backbone"] == sum(sizes)

def test_separate_models_differ_from_one_model(folder, tmp_path, separate_run):
    unified = run(toy_spec(folder, labelled=2, hold_out=3), tmp_path)
    assert separate_run[0].metrics != unified.metrics

def test_the_record_of_separate_models(separate_run):
    record, _ = separate_run
    assert not (record.folder/"models").exists() and set(record.history().cls) == set(KINDS)
    assert record.cost["parameters_trained"] == 3
    assert record.cost["bytes_test"] > record.cost["bytes_test_without_backbone"]

def test_kept_separate_models_are_tested_on_other_images(folder, separate_run):
    first, out = separate_run
    other_test = run(toy_spec(folder, **SEPARATE | dict(hold_out=4)), out)
    assert other_test.provenance["trained_by"] == first.id != other_test.id
    assert other_test.cost["train_s"] == first.cost["train_s"]

def test_kept_separate_models_are_tested_under_other_protocols(folder, separate_run):
    first, out = separate_run
    both = run(toy_spec(folder, **SEPARATE, protocols=["exact", "ader"]), out)
    assert both.id == first.id and list(both.metrics) == ["exact", "ader"]
    assert [maps.cls for maps in predict_maps(toy_spec(folder, **SEPARATE), out)] == list(KINDS)

def test_separate_models_that_are_done_are_not_trained_again(folder, tmp_path, monkeypatch):
    spec = toy_spec(folder, setting="separate", detector="rd4ad", epochs=1)
    trained, steps = [], []

    def stop_at_the_third(*args, **kwargs):
        trained.append(args)
        if len(trained) == 3: raise KeyboardInterrupt
        return training.train(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(models, "train", stop_at_the_third)
        with pytest.raises(KeyboardInterrupt): run(spec, tmp_path/"broken")

    plain_step = training.train_step

    def counted_step(*args):
        steps.append(args)
        return plain_step(*args)

    monkeypatch.setattr(training, "train_step", counted_step)
    continued = run(spec, tmp_path/"broken")
    assert len(steps) == 1
    assert continued.metrics == run(spec, tmp_path/"whole").metrics

# ---- the command line

def test_the_command_draws_and_writes(cli, folder, tmp_path):
    code, out, _ = cli("labels", folder, "--labelled", 2, "--hold-out", 4, "--out", tmp_path/"m.json")
    assert code == 0 and "labelled" in out and read_manifest(tmp_path/"m.json")["hold_out"] == 4

def test_the_command_writes_no_manifest_without_labels(cli, folder, tmp_path):
    code, out, err = cli("labels", folder, "--out", tmp_path/"m.json")
    assert code == 2 and not out and not (tmp_path/"m.json").exists()
    assert "m.json: no anomaly is labelled or held out. give --labelled or --hold-out" in err

def test_the_command_checks_a_manifest(cli, folder, file):
    code, out, _ = cli("labels", folder, "--manifest", file)
    assert code == 0 and read_manifest(file)["test_hash"] in out

def test_the_command_refuses_what_a_class_cannot_give(cli, folder):
    code, _, err = cli("labels", folder, "--labelled", 8)
    assert code == 2 and "--labelled-at-most" in err and err.count("\n") == 1
    assert cli("labels", folder, "--labelled", 8, "--labelled-at-most")[0] == 0

def test_a_manifest_and_a_number_of_labels_exclude_each_other(cli, folder, file):
    code, _, err = cli("run", "--data", folder, "--manifest", file, "--labelled", 2)
    assert code == 2 and "manifest" in err
