"Bad input, as it comes: each gets exit code 2 and one line that names the culprit and the remedy."
import io, json, os, re, shutil
from contextlib import suppress
from pathlib import Path
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies
from PIL import Image
from mdd_bench.data.images import Framing, load_image, load_mask
from mdd_bench.data.layouts import LAYOUTS, read_catalog
from mdd_bench.data.synthetic import write_embedded
from mdd_bench.errors import MddBenchError

TABLE = "path,mask,cls,split,kind\n"

# --- how data are spoiled: a function of the dataset's folder; what is read afterwards is the folder

def first(root, pattern): return sorted(root.glob(pattern))[0]
def training(root): return first(root, "gear/train/good/*.png")
def anomalous(root): return first(root, "gear/test/[!g]*/*.png")
def mask_of(root): return first(root, "gear/ground_truth/*/*.png")

def write_at(where, data):
    "Replaces a file by bytes."
    return lambda root: where(root).write_bytes(data)

def image_at(where, image):
    "Replaces a file by an image, which keeps its size where it is a function of it."
    def spoil(root):
        file = where(root)
        with Image.open(file) as old: size = old.size
        file.unlink()
        made = image(size) if callable(image) else image
        made.save(file.with_suffix(".tif") if made.mode in "FI" else file)
    return spoil

def cut(where, share=.5):
    def spoil(root):
        file = where(root)
        data = file.read_bytes()
        file.write_bytes(data[:int(share*len(data))])
    return spoil

def two_pages(root):
    image, other = Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8), "white")
    image.save(training(root).with_suffix(".tif"), save_all=True, append_images=[other])

def animated(root):
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    frames = [Image.fromarray(pixels), Image.fromarray(255 - pixels)]
    frames[0].save(training(root), save_all=True, append_images=frames[1:])

def removed(pattern):
    def spoil(root):
        for path in root.glob(pattern): shutil.rmtree(path) if path.is_dir() else path.unlink()
    return spoil

def only(*files):
    "A dataset of nothing but these files: (name, text)."
    def spoil(root):
        shutil.rmtree(root)
        for name, text in files:
            (root/name).parent.mkdir(parents=True, exist_ok=True)
            (root/name).write_text(text)
    return spoil

def table(*lines): return only(("table.csv", TABLE + "\n".join(lines)))
def not_utf_8(root):
    table()(root)
    (root/"table.csv").write_bytes(b"path\xff,\xfe\n")
def meta(value): return only(("meta.json", value if isinstance(value, str) else json.dumps(value)))
def entry(**values):
    whole = dict(img_path="a.png", mask_path="", anomaly=0) | values
    return meta(dict(train=dict(a=[whole]), test=dict(a=[])))
def one_photo(size): return Image.fromarray(np.random.default_rng(0).integers(0, 255, size[::-1], np.uint8))

DATA = {
    # files that cannot be read
    "empty file": (write_at(training, b""), "unreadable image .*000.png"),
    "text": (
        write_at(training, b"hello"), "unreadable image .*replace or remove the file, or pass --skip-broken"),
    "html": (write_at(training, b"<html>not found</html>"), "unreadable image"),
    "cut in the head": (cut(training, .01), "unreadable image"),
    "cut in the pixels": (cut(training), "unreadable image"),
    "cut mask": (cut(mask_of), "unreadable image .*ground_truth"),
    "png signature alone": (write_at(training, b"\x89PNG\r\n\x1a\n"), "unreadable image"),
    "jpeg signature alone": (write_at(training, b"\xff\xd8\xff\xe0"), "unreadable image"),
    "a pointer of git lfs": (
        write_at(training, b"version https://git-lfs.github.com/spec/v1\n"), "unreadable image"),
    "several pages": (two_pages, "has 2 pages. save the page that is meant"),
    "animated": (animated, "has 2 pages"),
    "floats": (
        image_at(training, lambda size: Image.new("F", size)), "hold floats.*--value-range black,white"),
    "32 bits": (
        image_at(training, lambda size: Image.new("I", size)), "signed or 32-bit numbers.*--value-range"),
    # masks
    "mask of another size": (
        image_at(mask_of, Image.new("L", (8, 8), 255)), "mask .* is 8x8, its image .*256x256"),
    "turned mask": (image_at(mask_of, Image.new("L", (64, 32), 255)), "mask .* is 64x32"),
    "no mask": (removed("gear/ground_truth/*/*"), "no mask for .*--masks optional"),
    "no masks at all": (removed("gear/ground_truth"), "no mask for .*more problems"),
    # folders
    "nothing": (removed("*"), "no product class in"),
    "no folder": (shutil.rmtree, "no folder .*give a dataset's folder, a table.csv, or embedded-v1"),
    "no training": (removed("gear/train"), "class 'gear' .* has no train images. add some, or leave"),
    "no test": (removed("gear/test"), "class 'gear' .* has no test images"),
    "empty training": (removed("gear/train/good/*"), "class 'gear' .* has no train images"),
    # tables
    "table of another form": (only(("table.csv", "a,b\n1,2\n")), "no rows with path, mask.*first line names"),
    "empty table": (only(("table.csv", "")), "has no rows with path"),
    "head alone": (table(), "has no rows with"),
    "no class": (table("a.png,,,train,good"), "line 2: no cls of a.png. fill it in"),
    "no kind": (table("a.png,,a,test,"), "line 2: no kind of a.png"),
    "no path": (table(",,a,train,good"), "line 2: no path of an image"),
    "unknown split": (
        table("a.png,,a,training,good"), "line 2: split 'training' of a.png. known are train, test"),
    "path outside": (
        table("../a.png,,a,train,good"), "line 2 names '../a.png', which is no file in its folder"),
    "absolute path": (table("/etc/passwd,,a,train,good"), "names '/etc/passwd'"),
    "Windows path": (table(r"C:\a.png,,a,train,good"), "which is no file in its folder"),
    "mask outside": (table("a.png,../b.png,a,test,bad"), "names '../b.png'"),
    "class with a slash": (
        table("a.png,,a/b,train,good"), "'a/b' as a class or kind. use the name of a folder"),
    "class above": (table("a.png,,..,train,good"), "'..' as a class or kind"),
    "missing files": (
        table("a.png,,a,train,good", "b.png,,a,test,good"), "none of the 2 images of a is there, .*a.png"),
    "not utf-8": (not_utf_8, "cannot read .*table.csv"),
    "null bytes": (table("a\0b.png,,a,train,good"), "cannot read|which is no file"),
    # lists
    "broken json": (meta("{"), "meta.json is no JSON"),
    "empty json": (meta(""), "meta.json is no JSON"),
    "deep json": (meta("["*100_000), "meta.json is no JSON"),
    "another json": (meta([1, 2]), r"has no dict 'train' in \[1, 2\]"),
    "no test list": (meta(dict(train={})), "has no dict 'test'"),
    "classes as a list": (meta(dict(train=[], test={})), "has no dict 'train'"),
    "entries as text": (meta(dict(train=dict(a="x"), test={})), "has no list 'a'"),
    "an entry that is none": (meta(dict(train=dict(a=[3]), test={})), "has no 'anomaly' in 3"),
    "an entry without image": (meta(dict(train=dict(a=[dict(anomaly=0)]), test={})), "has no 'img_path'"),
    "a list that leads outside": (entry(img_path="../../etc/passwd"), "which is no file in its folder"),
    "a list of missing files": (entry(), "none of the 1 images of a is there"),
    "no images": (meta(dict(train={}, test={})), "no images in .* as layout ader"),
    "uniad without a test": (
        only(("train.json", '{"filename": "a/train/good/0.png", "label": 0}\n')), "cannot read .*test.json"),
    "uniad of another form": (only(("train.json", "[]\n"), ("test.json", "")), r"has no 'label' in \[\]"),
    "realiad without meta": (only(("realiad_jsons/a.json", "{}")), "has no 'meta'"),
    "realiad without lists": (only(("realiad_jsons/readme.txt", "")), "no images in .* as layout realiad"),
    "visa without rows": (only(("split_csv/1cls.csv", "object,split\n")), "has no rows with object"),
    "a point cloud for a photo": (only(("a/train/good/rgb/0.tiff", "xyz")), "unreadable image"),
}
CLASSES = ["gear", "tile"]

@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return write_embedded(tmp_path_factory.mktemp("sound")/"data", "smoke", classes=CLASSES)

@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("command", ["run", "datasets"])
@pytest.mark.parametrize("name", DATA)
def test_bad_data_are_one_line(cli, sound, tmp_path, name, command):
    spoil, words = DATA[name]
    root = tmp_path/"data"
    shutil.copytree(sound, root)
    spoil(root)
    data = root/"table.csv" if (root/"table.csv").is_file() else root
    flags = ["--weights", "lite0", "--size", 64] if command == "run" else []
    code, out, err = cli(command, *(["--data"]*(command == "run")), data, *flags)
    said = (out + err).replace("\nPROBLEM: ", "\nerror: ")
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 2 and lines and "Traceback" not in said
    assert any(re.search(words.split(".*more")[0], line) for line in lines), lines

FLAGS = {
    "unknown data": (["run", "--data", "embedded-v9"], "unknown benchmark 'embedded-v9'|embedded-v9"),
    "heldout of nothing": (["run", "--data", "heldout:"], "after heldout: comes a dataset folder"),
    "heldout of heldout": (["run", "--data", "heldout:heldout:x"], "after heldout: comes"),
    "unknown class": (
        ["run", "--data", "ROOT", "--classes", "geer"], "unknown class 'geer'. Did you mean 'gear'"),
    "unknown layout": (
        ["run", "--data", "ROOT", "--layout", "visaa"], "unknown layout 'visaa'. Did you mean 'visa'"),
    "layout that is not it": (
        ["datasets", "ROOT", "--layout", "btad"], "no images in .* as layout btad has them"),
    "unknown resize": (["run", "--data", "ROOT", "--resize", "squash"], "unknown resize 'squash'"),
    "unknown masks": (["datasets", "ROOT", "--masks", "some"], "unknown masks 'some'"),
    "range of one": (["datasets", "ROOT", "--value-range", "1"], "value_range='1'"),
    "range upside down": (["run", "--data", "ROOT", "--value-range", "255,0"], "value_range='255,0'"),
    "range of words": (["run", "--data", "ROOT", "--value-range", "low,high"], "value_range='low,high'"),
    "table elsewhere": (
        ["datasets", "ROOT", "--csv", "/tmp/elsewhere.csv"], "its paths are relative to its folder"),
    "table of another kind": (["datasets", "ROOT", "--csv", "ROOT/table.xlsx"], "give .*table.csv"),
    "layout of a drawn one": (
        ["run", "--data", "embedded-v1-smoke", "--layout", "visa"], "layout visa with embedded"),
    "a file for a folder": (["datasets", "ROOT/gear/train/good/000.png"], "is a file. give the folder"),
    "sheet over an image": (
        ["datasets", "ROOT", "--sheet", "ROOT/gear/train/good/000.png"], "a file of the dataset"),
    "sheet of another kind": (["datasets", "ROOT", "--sheet", "sheet.pdf"], "give a file that ends in .png"),
    "size too small": (["run", "--data", "ROOT", "--size", "3"], "size=.*at least 16"),
    "backbone that needs another size": (
        ["run", "--size", "64", "--backbone", "vit_tiny_patch16_224", "--weights", "random"],
        "vit_tiny_patch16_224"),
    "weights that are no weights": (["run", "--data", "ROOT", "--weights", "ROOT/gear/train/good/000.png"],
                                    "000.png"),
    "manifest that is none": (["labels", "ROOT", "--manifest", "ROOT/gear/train/good/000.png"],
                              "cannot read the manifest"),
    "too many labels": (
        ["labels", "ROOT", "--labelled", "500"], "500 anomalies per class cannot leave the test"),
}

@pytest.mark.parametrize("name", FLAGS)
def test_bad_flags_are_one_line(cli, sound, name):
    args, words = FLAGS[name]
    code, out, err = cli(*(arg.replace("ROOT", str(sound)) for arg in args))
    assert code == 2 and re.search("error: .*(" + words + ")", err), err
    assert err.strip().count("\n") == 0, err

def test_there_are_enough(): assert len(DATA) + len(FLAGS) >= 60

@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, "geteuid") else True, reason="root may read everything")
def test_a_folder_that_may_not_be_read(cli, sound, tmp_path):
    shutil.copytree(sound, tmp_path/"data")
    (tmp_path/"data/gear/train/good").chmod(0)
    try: code, _, err = cli("datasets", tmp_path/"data")
    finally: (tmp_path/"data/gear/train/good").chmod(0o700)
    assert code == 2 and "cannot read" in err and "Permission denied" in err

def test_broken_images_can_be_left_out_and_are_counted(cli, sound, tmp_path):
    root = tmp_path/"data"
    shutil.copytree(sound, root)
    cut(training)(root)
    cut(mask_of)(root)
    code, out, _ = cli("datasets", root, "--skip-broken")
    assert code == 0 and "left out: 2 images or masks that cannot be read" in out
    assert cli("datasets", root)[0] == 2

def test_everything_in_json(cli, sound, tmp_path):
    code, out, err = cli("datasets", sound, "--json")
    values = json.loads(out)
    assert code == 0 and not err and values["layout"] == "mvtec" and list(values["classes"]) == CLASSES
    assert values["problems"] == [] and values["images"] > 10
    root = tmp_path/"data"
    shutil.copytree(sound, root)
    cut(training)(root)
    code, out, _ = cli("datasets", root, "--json")
    assert code == 2 and "unreadable image" in json.loads(out)["problems"][0]["what"]

def test_the_table_is_written_to_be_edited(cli, sound, tmp_path):
    root = tmp_path/"data"
    shutil.copytree(sound, root)
    code, out, _ = cli("datasets", root, "--csv", root/"table.csv")
    assert code == 0 and str(root/"table.csv") in out
    code, _, err = cli("datasets", root, "--csv", root/"table.csv")
    assert code == 2 and "is there already" in err
    lines = (root/"table.csv").read_text().splitlines()
    (root/"table.csv").write_text("\n".join(line for line in lines if "train/good/000" not in line))
    code, out, _ = cli("datasets", root/"table.csv")
    assert code == 0 and "layout csv" in out
    assert len(read_catalog(root/"table.csv").table) == len(read_catalog(root).table) - 2

def test_a_sheet_is_a_picture_of_every_class_and_kind(cli, sound, tmp_path):
    code, out, _ = cli("datasets", sound, "--sheet", tmp_path/"new"/"sheet.png")
    with Image.open(tmp_path/"new"/"sheet.png") as sheet: width, height = sheet.size
    assert code == 0 and "sheet.png" in out and height == 2*(128 + 14 + 4) + 4 and width > 300

def test_without_a_folder_the_layouts_are_listed(cli):
    code, out, _ = cli("datasets")
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == [*LAYOUTS, "csv"]

# --- an answer or a clear error, never a traceback

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))

def seeds():
    "Small images of many kinds, to be damaged."
    pixels = np.random.default_rng(0).integers(0, 255, (9, 7, 3), np.uint8)
    image, found = Image.fromarray(pixels), []
    kinds = dict(RGB="PNG JPEG BMP TIFF", L="PNG JPEG", P="PNG BMP", RGBA="PNG TIFF", CMYK="JPEG", F="TIFF")
    for mode, formats in kinds.items():
        for name in formats.split():
            data = io.BytesIO()
            image.convert(mode).save(data, name)
            found.append(data.getvalue())
    return found

@FUZZ
@given(data=strategies.sampled_from(seeds()), at=strategies.floats(0, 1), new=strategies.binary(max_size=40),
       end=strategies.floats(0, 1))
def test_a_damaged_image_is_read_or_refused(tmp_path_factory, data, at, new, end):
    place = int(at*len(data))
    file = tmp_path_factory.getbasetemp()/"fuzzed.png"
    file.write_bytes((data[:place] + new + data[place + len(new):])[:max(1, int(end*len(data)*2))])
    for read in (load_mask, load_image, lambda path: load_image(path, Framing(8, "pad", (0, 1)))):
        try: assert read(file).ndim in (2, 3)
        except MddBenchError as e: assert str(file) in str(e) and "\n" not in str(e)

TEXT = strategies.text(max_size=12)
VALUE = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers() | strategies.floats() | TEXT,
    lambda inner: strategies.lists(inner, max_size=3) | strategies.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8)
ENTRY = strategies.fixed_dictionaries({}, optional={name: VALUE for name in (
    "img_path", "mask_path", "anomaly", "specie_name", "filename", "label", "clsname", "maskname", "category",
    "anomaly_class", "image_path")})
CLASSES_OF = strategies.dictionaries(TEXT, strategies.lists(ENTRY, max_size=3) | VALUE, max_size=2)
LISTS = VALUE | ENTRY | strategies.fixed_dictionaries(dict(train=CLASSES_OF, test=CLASSES_OF)) \
    | strategies.fixed_dictionaries(dict(meta=VALUE | strategies.just(dict(prefix="a/")),
                                         train=strategies.lists(ENTRY), test=strategies.lists(ENTRY)))

def answered(path):
    "Whether a dataset is read; an error must be ours and one line."
    try: return len(read_catalog(path).table) > 0
    except MddBenchError as e: assert "\n" not in e.what.splitlines()[0]
    return False

@FUZZ
@given(value=LISTS, name=strategies.sampled_from(["meta.json", "train.json", "realiad_jsons/a.json"]))
def test_any_json_is_read_or_refused(tmp_path_factory, value, name):
    root = tmp_path_factory.mktemp("lists")
    for file in (name, name.replace("train", "test")):
        (root/file).parent.mkdir(exist_ok=True)
        with suppress(UnicodeEncodeError): (root/file).write_text(json.dumps(value), encoding="utf-8")
    answered(root)

@FUZZ
@given(rows=strategies.lists(strategies.lists(TEXT, max_size=6), max_size=4), head=strategies.booleans())
def test_any_table_is_read_or_refused(tmp_path_factory, rows, head):
    root = tmp_path_factory.mktemp("tables")
    text = TABLE*head + "\n".join(",".join(row) for row in rows)
    (root/"table.csv").write_text(text, encoding="utf-8", errors="replace")
    (root/"split_csv").mkdir()
    (root/"split_csv/1cls.csv").write_text("object,split,label,image,mask\n"*head + text, errors="replace")
    answered(root/"table.csv")
    answered(root)

NAME = strategies.sampled_from(["train", "test", "good", "ok", "bad", "rgb", "Train", "Label", "a", "01",
                                "gt", "ground_truth", "test_public", "kos01", ".hidden", "masks"])
FILE = strategies.sampled_from(["0.png", "0_mask.png", "Part0_label.bmp", "Part0.jpg", "1_GT.png", "1.png",
                                "Thumbs.db", ".0.png", "a.json", "meta.json", "train.json"])

@FUZZ
@given(paths=strategies.lists(strategies.tuples(strategies.lists(NAME, max_size=4), FILE), max_size=8))
def test_any_tree_is_read_or_refused(tmp_path_factory, paths):
    root = tmp_path_factory.mktemp("trees")
    for folders, name in paths:
        folder = root/Path(*folders)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder/name).is_dir(): Image.new("L", (4, 4)).save(folder/name, "PNG")
    answered(root)
