"The field's layouts: a small tree of each, with its real file names and quirks, and what must come out."
import json, shutil
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from mdd_bench.data.catalog import verify
from mdd_bench.data.datasets import inspect_dataset, open_dataset
from mdd_bench.data.heldout import flat_names, heldout
from mdd_bench.data.images import load_mask
from mdd_bench.data.layouts import LAYOUTS, Row, entry_value, for_test, layout, read_catalog, recognise
from mdd_bench.errors import DataError, SpecError
from mdd_bench.running.run import run
from mdd_bench.running.spec import make_spec

SIZE = (24, 20)     # width, height

def draw(path, mode="RGB"):
    "An image of noise that differs from file to file."
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([ord(letter) for letter in path.as_posix()[-24:]])
    Image.fromarray(rng.integers(0, 200, (SIZE[1], SIZE[0], 3), np.uint8)).convert(mode).save(path)

def draw_mask(path, value=255, size=SIZE):
    "A mask with a rectangle of one value; none where the value is 0."
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros(size[::-1], np.uint8)
    pixels[4:9, 5:12] = value
    Image.fromarray(pixels).save(path)

def images(root, *names):
    for name in names: draw(root/name)

def counts(cls, train, test, calibration=0, **kinds):
    "{(class, split, kind): images}; `train`, `test` and `calibration` count good images."
    splits = dict(train=train, test=test, calibration=calibration)
    good = {(cls, split, "good"): n for split, n in splits.items() if n}
    return good | {(cls, "test", kind): n for kind, n in kinds.items()}

# --- one function for each layout: it draws the tree and returns what must be read

def mvtec(root):
    "Numbers begin again in each kind; texts and Windows' own files lie about; grid is grey."
    images(root, "grid/train/good/000.png", "grid/train/good/001.png", "grid/test/good/000.png",
           "grid/test/bent/000.png", "grid/test/broken/000.png")
    draw(root/"grid/train/good/002.png", "L")
    for kind in ("bent", "broken"): draw_mask(root/f"grid/ground_truth/{kind}/000_mask.png")
    (root/"grid/readme.txt").write_text("x")
    (root/"grid/train/good/Thumbs.db").write_bytes(b"x")
    return counts("grid", train=3, test=1, bent=1, broken=1)

def mpdd(root):
    images(root, "tubes/train/good/000.png", "tubes/test/good/000.png", "tubes/test/anomalous/000.png")
    draw_mask(root/"tubes/ground_truth/anomalous/000_mask.png")
    return counts("tubes", train=1, test=1, anomalous=1)

def visa_pytorch(root):
    "VisA after its owners' prepare_data.py: images keep .JPG, masks have no _mask."
    images(root, "candle/train/good/0000.JPG", "candle/test/good/0001.JPG", "candle/test/bad/000.JPG")
    draw_mask(root/"candle/ground_truth/bad/000.png")
    return counts("candle", train=1, test=1, bad=1)

def loco(root):
    "A folder of masks for each image, with values of their own; validation images calibrate."
    images(root, "pushpins/train/good/000.png", "pushpins/validation/good/000.png",
           "pushpins/test/good/000.png", "pushpins/test/logical_anomalies/000.png")
    draw_mask(root/"pushpins/ground_truth/logical_anomalies/000/000.png", 243)
    draw_mask(root/"pushpins/ground_truth/logical_anomalies/000/001.png", 251)
    (root/"pushpins/defects_config.json").write_text("[]")
    return counts("pushpins", train=1, calibration=1, test=1, logical_anomalies=1)

def mvtec_3d(root):
    "Photos beside point clouds, which are no images that Pillow reads; good images have empty masks."
    images(root, "bagel/train/good/rgb/000.png", "bagel/validation/good/rgb/000.png",
           "bagel/test/good/rgb/000.png", "bagel/test/combined/rgb/000.png")
    draw_mask(root/"bagel/test/combined/gt/000.png")
    draw_mask(root/"bagel/test/good/gt/000.png", 0)
    for split in ("train/good", "test/combined"):
        (root/"bagel"/split/"xyz").mkdir()
        (root/"bagel"/split/"xyz/000.tiff").write_bytes(b"a point cloud")
    return counts("bagel", train=1, calibration=1, test=1, combined=1)

def mvtec_ad_2(root):
    "The hidden tests have no labels."
    images(root, "vial/train/good/000_regular.png", "vial/validation/good/000_regular.png",
           "vial/test_public/good/000_shift_1.png", "vial/test_public/bad/000_overexposed.png",
           "vial/test_private/000_regular.png", "vial/test_private_mixed/000_mixed.png")
    draw_mask(root/"vial/test_public/ground_truth/bad/000_overexposed_mask.png")
    return counts("vial", train=1, calibration=1, test=1, bad=1)

def btad(root):
    "Images and masks end differently from class to class."
    for cls, of_image, of_mask in (("01", "bmp", "png"), ("02", "png", "png"), ("03", "bmp", "bmp")):
        images(root, f"{cls}/train/ok/0000.{of_image}", f"{cls}/test/ok/0001.{of_image}",
               f"{cls}/test/ko/0002.{of_image}")
        draw_mask(root/f"{cls}/ground_truth/ko/0002.{of_mask}")
    return counts("01", train=1, test=1, ko=1) | counts("02", train=1, test=1, ko=1) \
        | counts("03", train=1, test=1, ko=1)

def visa(root):
    "The published tree: masks hold numbers of defects, and a CSV has Windows' line ends."
    names = {"train": "0000", "test": "0836", "anomaly": "000", "two": "001"}
    folders = {4: "Normal", 3: "Anomaly"}
    image = {key: f"candle/Data/Images/{folders[len(name)]}/{name}.JPG" for key, name in names.items()}
    mask = {k: f"candle/Data/Masks/Anomaly/{names[k]}.png" for k in ("anomaly", "two")}
    images(root, *image.values())
    for value, name in enumerate(mask.values(), 1): draw_mask(root/name, value)
    lines = ["object,split,label,image,mask", f"candle,train,normal,{image['train']},",
             f"candle,test,normal,{image['test']},",
             f"candle,test,anomaly,{image['anomaly']},{mask['anomaly']}",
             f"candle,test,anomaly,{image['two']},{mask['two']}"]
    (root/"split_csv").mkdir()
    (root/"split_csv/1cls.csv").write_bytes("\r\n".join(lines).encode())
    (root/"candle/image_anno.csv").write_text(
        f"\ufeffimage,label,mask\n{image['anomaly']},wax melded out,\n"
        f"{image['two']},\"wax melded out,other\",\n")
    return counts("candle", train=1, test=1, combined=1, **{"wax melded out": 1})

def realiad(root):
    "A JSON for each class below two folders of one name; five views; names of bad ones have two underscores."
    def photo(result, kind, view, number, end="jpg"):
        folder = "OK" if result == "OK" else f"NG/{kind}"
        middle = "OK" if result == "OK" else f"NG_{kind}"
        double = "_" if result == "NG" else ""
        return f"{folder}/S{number:04}/audiojack_{double}{number:04}_{middle}_C{view}_20231021130235.{end}"

    def entry(kind, image, mask=None):
        return dict(category="audiojack", anomaly_class=kind, image_path=image, mask_path=mask)

    good = [photo("OK", "OK", view, 1) for view in range(1, 6)]
    bad, mask = photo("NG", "BX", 1, 2), photo("NG", "BX", 1, 2, "png")
    home = root/"realiad_1024"/"audiojack"
    images(home, *good, bad)
    draw_mask(home/mask)
    lists = dict(meta=dict(normal_class="OK", prefix="audiojack/"), train=[entry("OK", n) for n in good[:3]],
                 test=[*(entry("OK", n) for n in good[3:]), entry("BX", bad, mask)])
    (root/"realiad_jsons/realiad_jsons").mkdir(parents=True)
    (root/"realiad_jsons/realiad_jsons/audiojack.json").write_text(json.dumps(lists))
    return counts("audiojack", train=3, test=2, BX=1)

def dagm(root):
    "Upper-case endings, masks beside a text and Windows' own file; the training set has a defect."
    for split in ("Train", "Test"):
        images(root, *(f"Class1/{split}/{number:04}.PNG" for number in (1, 2, 576)))
        draw_mask(root/f"Class1/{split}/Label/0576_label.PNG")
        (root/f"Class1/{split}/Label/Labels.txt").write_text("1\n")
        (root/f"Class1/{split}/Label/Thumbs.db").write_bytes(b"x")
    return counts("Class1", train=2, test=2, defect=1)

def kolektor(root):
    "Every image has a mask, black for a good one."
    for item in range(1, 6):
        for part in range(2):
            draw(root/f"kos{item:02}/Part{part}.jpg", "L")
            draw_mask(root/f"kos{item:02}/Part{part}_label.bmp", 255 if (item, part) == (2, 1) else 0)
    (held,) = for_test([f"kos{item:02}" for item in range(1, 6)])
    tested = 1 if held == "kos02" else 2
    return counts("kolektor", train=9 - tested, test=tested, defect=1)

def kolektor2(root):
    "The training set has a defect, and a copy that somebody left."
    for number, value in ((10000, 0), (10001, 255)):
        images(root, f"train/{number}.png")
        draw_mask(root/f"train/{number}_GT.png", value)
    for number, value in ((20000, 0), (20001, 255)):
        images(root, f"test/{number}.png")
        draw_mask(root/f"test/{number}_GT.png", value)
    draw_mask(root/"train/10301_GT (copy).png", 0)
    return counts("kolektor2", train=1, test=1, defect=1)

def ader(root):
    "ADer's generators write two slashes; Uni-Medical comes so."
    images(root, "brain/train/good/0.png", "brain/test/good/0.png", "brain/test/Ungood/0.png",
           "brain/validation/good/0.png")
    draw_mask(root/"brain/ground_truth/Ungood/0.png")

    def entry(path, kind="good", mask=""):
        anomaly = int(kind != "good")
        return dict(img_path=path, mask_path=mask, cls_name="brain", specie_name=kind, anomaly=anomaly)

    bad = entry("brain/test/Ungood//0.png", "Ungood", "brain/ground_truth/Ungood/0.png")
    meta = dict(train=dict(brain=[entry("brain/train/good//0.png")]),
                validation=dict(brain=[entry("brain/validation/good//0.png")]),
                test=dict(brain=[entry("brain/test/good//0.png"), bad]))
    (root/"meta.json").write_text(json.dumps(meta))
    return counts("brain", train=1, calibration=1, test=1, Ungood=1)

def uniad(root):
    "A JSON value in each line; names are relative to a folder beside the lists."
    home = root/"mvtec_anomaly_detection"
    images(home, "zipper/train/good/002.png", "zipper/test/good/000.png", "zipper/test/broken_teeth/002.png")
    draw_mask(home/"zipper/ground_truth/broken_teeth/002_mask.png")
    train = [dict(filename="zipper/train/good/002.png", label=0, label_name="good", clsname="zipper")]
    test = [dict(filename="zipper/test/good/000.png", label=0, label_name="good", clsname="zipper"),
            dict(filename="zipper/test/broken_teeth/002.png", label=1, label_name="defective",
                 clsname="zipper", maskname="zipper/ground_truth/broken_teeth/002_mask.png")]
    for name, entries in (("train", train), ("test", test)):
        (root/f"{name}.json").write_text("\n".join(json.dumps(entry) for entry in entries) + "\n")
    return counts("zipper", train=1, test=1, broken_teeth=1)

def plain(root):
    "Names in capitals, kinds below, masks for some only."
    images(root, *(f"OK/{number}.jpg" for number in range(10)), "NG/0.jpg", "NG/dent/1.jpg")
    draw_mask(root/"Masks/0.png")
    draw_mask(root/"Masks/dent/1.png")
    return counts(root.name, train=8, test=2, NG=1, dent=1)

def plain_classes(root):
    "One such folder for each class."
    for cls in ("bolt", "nut"):
        images(root, *(f"{cls}/good/{number}.png" for number in range(3)), f"{cls}/defects/0.png")
        draw_mask(root/cls/"ground_truth/0_mask.png")
    return counts("bolt", train=2, test=1, defects=1) | counts("nut", train=2, test=1, defects=1)

TREES = dict(
    mvtec=[mvtec, mpdd, visa_pytorch, loco], mvtec_3d=[mvtec_3d], mvtec_ad_2=[mvtec_ad_2], btad=[btad],
    visa=[visa], realiad=[realiad], dagm=[dagm], kolektor=[kolektor], kolektor2=[kolektor2], ader=[ader],
    uniad=[uniad], plain=[plain, plain_classes])
EACH = [(name, tree) for name, trees in TREES.items() for tree in trees]

@pytest.fixture
def root(tmp_path):
    (tmp_path/"data").mkdir()
    return tmp_path/"data"

def test_every_layout_has_a_tree(): assert TREES.keys() == LAYOUTS.keys()

@pytest.mark.parametrize("name, tree", EACH, ids=lambda value: getattr(value, "__name__", value))
def test_a_layout_is_recognised_and_read(root, name, tree):
    expected = tree(root)
    assert recognise(root) == name
    table = read_catalog(root).table
    assert table.groupby(["cls", "split", "kind"]).size().to_dict() == expected
    found = verify(read_catalog(root))                      # every image and every mask is there and fits
    assert not found.warnings
    assert (table["mask"] != "").equals(table.kind != "good")
    assert table[["path", "mask"]].apply(lambda names: ~names.str.contains(r"\\|//|^/|\.\.")).all().all()

@pytest.mark.parametrize("name, tree", EACH, ids=lambda value: getattr(value, "__name__", value))
def test_the_table_of_a_layout_is_the_same_dataset(root, name, tree):
    tree(root)
    first = open_dataset(root)
    first.catalog.table.sample(frac=1, random_state=0).to_csv(root/"table.csv", index=False)
    second = open_dataset(root/"table.csv")
    assert second.catalog.table.equals(first.catalog.table) and second.fingerprint == first.fingerprint

@pytest.mark.parametrize("name, tree", EACH, ids=lambda value: getattr(value, "__name__", value))
def test_a_hidden_folder_changes_no_layout(root, name, tree):
    tree(root)
    before = read_catalog(root).table
    images(root, ".ipynb_checkpoints/train/good/0.png", ".ipynb_checkpoints/good/0.png",
           ".ipynb_checkpoints/bad/0.png")
    assert recognise(root) == name and read_catalog(root).table.equals(before)

def test_anomalies_of_the_training_are_left_out_and_counted(root):
    dagm(root)
    catalog = read_catalog(root)
    assert catalog.left_out == 1 and "Class1/Train/0576.PNG" not in set(catalog.table.path)

def test_several_masks_of_an_image_are_one(root):
    loco(root)
    folder = root/"pushpins/ground_truth/logical_anomalies/000"
    other = np.zeros(SIZE[::-1], np.uint8)
    other[15:18, 2:4] = 9
    Image.fromarray(other).save(folder/"002.png")
    assert load_mask(folder).sum() == 5*7 + 3*2
    before = verify(read_catalog(root)).fingerprint
    (folder/"002.png").unlink()
    assert verify(read_catalog(root)).fingerprint != before

def test_masks_of_one_image_have_one_size(root):
    loco(root)
    draw_mask(root/"pushpins/ground_truth/logical_anomalies/000/001.png", size=(20, 24))
    with pytest.raises(DataError, match="000 have sizes 20x24, 24x20"): verify(read_catalog(root))

def test_the_good_parts_of_an_item_stay_on_one_side(root):
    kolektor(root)
    good = read_catalog(root).table.query("kind == 'good'")
    items = good[good.path.map(lambda path: path[:5]) != "kos02"]
    sides = items.groupby(items.path.str[:5]).split.nunique()
    assert len(sides) == 4 and (sides == 1).all()

def test_another_image_moves_at_most_one_other_to_the_test_or_back():
    names = [f"{i}.png" for i in range(100)]
    before = for_test(names)
    after = for_test([*names, "new.png"])
    assert len(before) == 20 and len(before ^ after) <= 1 and not for_test(["one.png"])
    steps = [(for_test(names[:n]), for_test(names[:n + 1]) - {names[n]}) for n in range(1, 100)]
    assert max(len(fewer ^ more) for fewer, more in steps) == 1

@pytest.mark.filterwarnings("ignore:.*nan for")
def test_a_calibration_image_of_the_dataset_is_scored_and_not_trained_on(root, tmp_path):
    loco(root)
    images(root, *(f"pushpins/train/good/{number:03}.png" for number in range(1, 5)))
    spec = make_spec(data=str(root), detector="patchcore", weights="lite0", size=64, layers=[1, 2])
    record = run(spec, tmp_path/"out")
    assert list(record.calibration().path) == ["pushpins/validation/good/000.png"]
    assert record.provenance["layout"] == "mvtec"

def test_a_layout_of_ones_own_comes_first(root):
    mvtec(root)

    @layout("mine", "grid/readme.txt", "whatever")
    def mine(folder): yield Row("grid/train/good/000.png", "", "grid", "train", "good")

    try: assert recognise(root) == "mine" and len(read_catalog(root).table) == 1
    finally: del LAYOUTS["mine"]

def test_a_layout_can_be_named(root):
    mvtec(root)
    uniad(root)
    assert read_catalog(root).layout == "uniad"
    assert read_catalog(root, layout="mvtec").classes == ["grid"]
    with pytest.raises(SpecError, match="unknown layout 'mvtek'. Did you mean 'mvtec'"):
        read_catalog(root, layout="mvtek")

@pytest.mark.parametrize("name, tree", EACH, ids=lambda value: getattr(value, "__name__", value))
def test_data_to_choose_options_on_are_made_of_any_layout(root, name, tree, monkeypatch, tmp_path):
    monkeypatch.setenv("MDD_BENCH_CACHE", str(tmp_path/"cache"))
    tree(root)
    train = read_catalog(root).part(split="train")
    if (train.groupby("cls").size() < 4).any():
        with pytest.raises(DataError, match="training images"): heldout(root)
        return
    made = read_catalog(heldout(root)).table
    normal = made[(made.kind == "good")].groupby("cls").size()
    assert normal.to_dict() == train.groupby("cls").size().to_dict()

def test_the_remedy_for_too_few_training_images_fits_any_layout(root, monkeypatch, tmp_path):
    monkeypatch.setenv("MDD_BENCH_CACHE", str(tmp_path/"cache"))
    btad(root)
    with pytest.raises(DataError, match="class '01' has 1 different training images") as error: heldout(root)
    assert "normal training images of 01, as the dataset's layout has them" in error.value.remedy
    assert "train/good" not in str(error.value)

def test_files_of_one_name_in_different_folders_are_told_apart(root, monkeypatch, tmp_path):
    monkeypatch.setenv("MDD_BENCH_CACHE", str(tmp_path/"cache"))
    rows = [("washer", f"{side}/{number}.png") for side in "ab" for number in range(4)]
    images(root, *(path for _, path in rows))
    table = pd.DataFrame([Row(path, "", cls, "train", "good") for cls, path in rows])
    table.to_csv(root/"table.csv", index=False)
    made = read_catalog(heldout(root/"table.csv")).table
    assert (made.kind == "good").sum() == 8

# --- what must not be taken for something else

ONE_CLASS = [(mvtec_ad_2, "vial"), (btad, "01"), (visa_pytorch, "candle"), (mvtec, "grid")]

@pytest.mark.parametrize("tree, cls", ONE_CLASS)
def test_the_folder_of_one_class_is_no_dataset(root, tree, cls):
    "Its test images would be trained on."
    tree(root)
    with pytest.raises(DataError, match=f"looks like a single class: give its parent and --classes {cls}"):
        read_catalog(root/cls)

def test_a_folder_of_raw_images_beside_the_classes_changes_nothing(root):
    mvtec(root)
    before = read_catalog(root).table
    images(root, "raw/ok/0.png", "raw/ng/0.png")
    assert read_catalog(root).table.equals(before)

def test_the_folder_of_a_plain_dataset_may_be_this_one(root, monkeypatch):
    plain(root)
    monkeypatch.chdir(root)
    assert read_catalog(".").classes == ["data"]

def test_heldout_data_follow_the_classes_of_a_table(root, monkeypatch, tmp_path):
    monkeypatch.setenv("MDD_BENCH_CACHE", str(tmp_path/"cache"))
    names = [f"{number}.png" for number in range(8)]
    images(root, *names)

    def made(classes):
        rows = [Row(name, "", cls, "train", "good") for name, cls in zip(names, classes)]
        pd.DataFrame(rows).to_csv(root/"table.csv", index=False)
        return read_catalog(heldout(root/"table.csv")).classes

    assert made(["one"]*8) == ["one"] and made(["one"]*4 + ["two"]*4) == ["one", "two"]

def test_heldout_names_that_collide_are_refused(root):
    names = ["a/b_0.png", "a_b/0.png", "c/0.png", "d/1.png"]
    images(root, *names)
    rows = [Row(name, "", "one", "train", "good") for name in names]
    pd.DataFrame(rows).to_csv(root/"table.csv", index=False)
    with pytest.raises(DataError, match="have one name without folders"): heldout(root/"table.csv")

def test_heldout_names_that_collide_are_named():
    names = ["a/b_c.png", "a/x.png", "a_b/c.png", "d/x.png"]
    with pytest.raises(DataError, match="^a/b_c.png and a_b/c.png have one name"): flat_names(names)

def test_a_plain_class_without_bad_images_is_one_of_several(root):
    plain_classes(root)
    shutil.rmtree(root/"nut/defects")
    assert read_catalog(root).classes == ["bolt", "nut"]

def test_good_images_of_a_plain_dataset_may_lie_in_folders(root):
    plain(root)
    images(root, *(f"OK/2024-01/{number}.jpg" for number in range(10, 20)))
    assert (read_catalog(root).table.kind == "good").sum() == 20

@pytest.mark.parametrize("more, named", [
    ("defect/0.png", "NG, defect"), ("good/0.png", "OK, good"), ("ground_truth/0.png", "Masks, ground_truth"),
])
def test_two_folders_of_one_sort_in_a_plain_dataset_are_refused(root, more, named):
    plain(root)
    images(root, more)
    assert recognise(root) == "plain"
    first = named.split(",")[0]
    problem = f"data has several folders of one sort: {named}. move all that counts into {first} "
    with pytest.raises(DataError, match=problem): read_catalog(root)

def test_a_mask_that_two_kinds_find_in_one_folder_is_refused(root):
    images(root, *(f"good/{number}.png" for number in range(3)), "bad/bent/000.png", "bad/crack/000.png")
    draw_mask(root/"masks/000.png")
    problem = "2 images name the mask .*masks/000.png, such as bad/bent/000.png and bad/crack/000.png. give"
    with pytest.raises(DataError, match=problem): verify(read_catalog(root))
    for kind in ("bent", "crack"): draw_mask(root/f"masks/{kind}/000.png")
    assert not verify(read_catalog(root)).warnings

@pytest.mark.parametrize("kind, wrong", [("dent", True), ("good", False)])
def test_a_table_may_share_a_mask_among_good_images_alone(root, kind, wrong):
    images(root, *(f"{n}.png" for n in range(4)))
    draw_mask(root/"black.png", value=0)
    table_of_lines(root, *(f"{n}.png,{'black.png' if n > 1 else ''},a,{'test' if n > 1 else 'train'},"
                           f"{kind if n > 1 else 'good'}" for n in range(4)))
    words = " ".join(problem.what for problem in inspect_dataset(root/"table.csv").problems)
    assert ("2 images name the mask" in words) == wrong

# --- images that nothing reads

UNREAD = [
    (mvtec, "grid/train/bent/0.png"), (mvtec, "grid/ground_truth/bent/7_mask.png"), (mvtec, "raw/ok/0.png"),
    (plain, "new/0.png"), (btad, "01/test/unsure/0.bmp"), (dagm, "Class1/Val/0.PNG"),
    (kolektor, "other/0.jpg"),
    (mvtec_ad_2, "vial/test_hidden/0.png"), (mvtec_3d, "bagel/test/combined/photo/0.png"),
]

@pytest.mark.parametrize("tree, name", UNREAD)
def test_an_image_without_a_place_in_its_layout_is_named(root, tree, name):
    tree(root)
    draw(root/name)
    (root/"notes.txt").write_text("no image")
    warning = f"^1 images in {root} are not read: layout .* has no place for them; for example {root/name}$"
    with pytest.warns(UserWarning, match=warning): found = verify(read_catalog(root))
    assert found.catalog.unread == [name]

def test_an_image_beside_a_list_or_a_table_is_left_out_on_purpose(root):
    mvtec(root)
    read_catalog(root).table.to_csv(root/"table.csv", index=False)
    draw(root/"grid/train/good/999.png")
    assert not verify(read_catalog(root/"table.csv")).warnings
    uniad(root)
    assert recognise(root) == "uniad" and not verify(read_catalog(root)).warnings

# --- lists and what they say

def test_a_table_of_a_spreadsheet(root):
    mvtec(root)
    read_catalog(root).table.to_csv(root/"table.csv", index=False, sep=";", encoding="utf-8-sig")
    assert read_catalog(root/"table.csv").table.equals(read_catalog(root).table)

def test_the_folder_of_a_table_names_it(root):
    table_of_lines(root, "a.png,,a,train,good")
    with pytest.raises(DataError, match="if .*table.csv lists its images, give that file"): read_catalog(root)

def spoiled(root, name, change):
    "A list of a tree, changed as text."
    (root/name).write_text(change((root/name).read_text()))

def test_an_anomaly_that_a_list_calls_good_is_still_one(root):
    ader(root)
    spoiled(root, "meta.json", lambda text: text.replace('"specie_name": "Ungood"', '"specie_name": "good"'))
    assert set(read_catalog(root).table.kind) == {"good", "anomaly"}

def test_a_label_is_0_or_1(root):
    ader(root)
    spoiled(root, "meta.json", lambda text: text.replace('"anomaly": 1', '"anomaly": "0"'))
    with pytest.raises(DataError, match="has anomaly '0' in .* it must be 0 or 1"): read_catalog(root)

def test_the_class_of_uniad_is_that_of_the_folder_where_none_is_named(root):
    uniad(root)
    for name in ("train.json", "test.json"):
        spoiled(root, name, lambda text: text.replace(', "clsname": "zipper"', ""))
    assert read_catalog(root).classes == ["zipper"]

def test_ader_over_loco_takes_all_masks_of_an_image(root):
    loco(root)
    masks = root/"pushpins/ground_truth/logical_anomalies/000"
    other = np.zeros(SIZE[::-1], np.uint8)
    other[15:18, 2:4] = 9
    Image.fromarray(other).save(masks/"001.png")
    bad = dict(img_path="pushpins/test/logical_anomalies/000.png", anomaly=1, specie_name="logical_anomalies",
               mask_path="pushpins/ground_truth/logical_anomalies/000/000.png")
    normal = [dict(img_path=f"pushpins/{split}/good/000.png", anomaly=0) for split in ("train", "test")]
    meta = dict(train=dict(pushpins=normal[:1]), test=dict(pushpins=[normal[1], bad]))
    (root/"meta.json").write_text(json.dumps(meta))
    found = verify(read_catalog(root))
    mask, = found.catalog.part(kind="logical_anomalies")["mask"]
    assert found.catalog.layout == "ader"
    assert found.seen[mask].marked == pytest.approx((5*7 + 3*2)/(24*20))

def test_a_list_of_which_only_a_part_is_there(root):
    "Real-IAD comes in an archive for each class."
    realiad(root)
    source = root/"realiad_jsons/realiad_jsons/audiojack.json"
    (source.parent/"toy.json").write_text(source.read_text().replace("audiojack", "toy"))
    problems = inspect_dataset(root).problems
    assert [problem.what[:40] for problem in problems] == ["none of the 6 images of toy is there, fo"]
    assert len(open_dataset(root, classes=["audiojack"]).catalog.table) == 6

def test_a_label_file_that_is_broken_is_a_problem_like_others(root):
    kolektor2(root)
    (root/"test/20000_GT.png").write_bytes(b"")
    (root/"train/10000_GT.png").unlink()
    words = sorted(str(problem) for problem in inspect_dataset(root).problems)
    assert any("unreadable image" in line and "20000_GT" in line for line in words)
    assert any("cannot read" in line and "10000_GT" in line for line in words)      # of the training set too
    assert read_catalog(root).left_out == 1

def test_a_list_is_named_as_it_is_called(root):
    "Whatever words are in its path."
    source = root/"object shots"/"meta.json"
    with pytest.raises(DataError) as e: entry_value({}, "anomaly", source)
    assert e.value.what == f"{source} has no 'anomaly' in {{}}"
    with pytest.raises(DataError) as e: entry_value(dict(train=[]), "train", source, dict)
    assert e.value.what == f"{source} has no dict 'train' in {{'train': []}}"

def table_of_lines(root, *lines):
    (root/"table.csv").write_text("path,mask,cls,split,kind\n" + "\n".join(lines))
    return root/"table.csv"

def test_all_wrong_lines_of_a_table_are_named(root):
    table = table_of_lines(root, "a.png,,a,train,good", "b.png,,a,tests,good", "c.png,,,test,good",
                           "d.png,,a,test,OK", "e.png,,a,calibration,bent")
    with pytest.raises(DataError) as e: read_catalog(table)
    for words in ("line 3: split 'tests'", "line 4: no cls", "line 5: kind 'OK'", "line 6: kind 'bent'"):
        assert words in e.value.what

def test_a_table_that_contradicts_itself(root):
    images(root, "a.png", "b.png", "c.png")
    draw_mask(root/"m.png")
    table = table_of_lines(root, "a.png,,a,train,good", "b.png,m.png,a,test,good", "c.png,m.png,a,test,bent",
                           "c.png,m.png,a,test,bent")
    found = inspect_dataset(table)
    assert [problem.what.split("/")[-1] for problem in found.problems] \
        == ["c.png stands in the table more than once", "b.png is good, and its mask m.png marks something"]

def test_a_class_without_images_is_said(root):
    mvtec(root)
    (root/"screw/train/good").mkdir(parents=True)
    with pytest.warns(UserWarning, match="screw has no images: this class is left out"): read_catalog(root)

def test_a_file_that_was_read_as_an_image_is_read_again_as_a_mask(root):
    images(root, "a.png", "b.png")
    draw_mask(root/"m.png")
    inspect_dataset(table_of_lines(root, "a.png,,a,train,good", "m.png,,a,test,good"))
    found = inspect_dataset(table_of_lines(root, "a.png,,a,train,good", "b.png,m.png,a,test,bent"))
    assert found.seen["m.png"].marked > 0

def test_the_size_of_an_image_is_part_of_the_fingerprint(root):
    pixels = np.arange(24*20, dtype=np.uint16).astype(np.uint8)
    hashes = set()
    for shape in ((24, 20), (20, 24)):
        Image.fromarray(pixels.reshape(shape)).save(root/"a.png")
        Image.fromarray(pixels.reshape(shape)).save(root/"b.png")
        found = inspect_dataset(table_of_lines(root, "a.png,,a,train,good", "b.png,,a,test,good"))
        hashes.add(found.fingerprint)
    assert len(hashes) == 2

# --- masks that are not there

def test_labels_are_drawn_from_anomalies_with_a_mask(root):
    from mdd_bench.data.splits import draw
    rows = [Row(f"{i}.png", f"m{i}.png" if i % 2 else "", "a", "test", "bent") for i in range(14)]
    images(root, "t.png", *(row.path for row in rows))
    for row in rows:
        if row.mask: draw_mask(root/row.mask)
    lines = ["t.png,,a,train,good"] + [",".join(row) for row in rows]
    catalog = inspect_dataset(table_of_lines(root, *lines), masks="optional").catalog
    for seed in range(5):
        assert (draw(catalog, labelled=4, seed=seed).catalog.part(split="labelled")["mask"] != "").all()

def test_a_missing_mask_is_an_error_unless_it_is_optional(root):
    mvtec(root)
    (root/"grid/ground_truth/bent/000_mask.png").unlink()
    with pytest.raises(DataError, match="no mask for .*bent/000.png.*--masks optional"): open_dataset(root)
    with pytest.warns(UserWarning, match="1 of 2 anomalous images of grid have no mask"):
        dataset = open_dataset(root, masks="optional")
    assert len(dataset.catalog.table) == 6
    with pytest.raises(SpecError, match="unknown masks 'maybe'"): open_dataset(root, masks="maybe")

def test_all_problems_are_found_at_once(root):
    mvtec(root)
    (root/"grid/ground_truth/bent/000_mask.png").unlink()
    draw_mask(root/"grid/ground_truth/broken/000_mask.png", size=(8, 8))
    (root/"grid/train/good/000.png").write_bytes(b"")
    shutil.copyfile(root/"grid/train/good/001.png", root/"grid/test/good/000.png")
    images(root, "bolt/test/good/0.png")
    found = inspect_dataset(root)
    words = ["unreadable image", "class 'bolt' .* has no train images",
             "mask .* is 8x8, its image .* is 24x20", "no mask for"]
    assert len(found.problems) == len(words)
    for problem, part in zip(found.problems, words):
        with pytest.raises(DataError, match=part): raise problem
    assert found.warnings[0].startswith("1 test images of grid are training images too")
    with pytest.warns(UserWarning, match="are training images too"):
        with pytest.raises(DataError, match="3 more problems: mdd_bench datasets shows them all"):
            open_dataset(root)
