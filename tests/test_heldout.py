"Held-out normals: made of training images alone, the same for ever, exact masks, training and test apart."
import os, shutil
import numpy as np
import pytest
from PIL import Image
from mdd_bench.data import datasets
from mdd_bench.data import heldout as module
from mdd_bench.data.catalog import verify
from mdd_bench.data.datasets import dataset_folder
from mdd_bench.data.heldout import (
    KINDS, LEAST_CHANGE, LEAST_PIXELS, PAIRS, draw_defect, held_out, heldout, stream, visible,
)
from mdd_bench.data.images import load_image, load_mask
from mdd_bench.data.layouts import read_catalog
from mdd_bench.data.synthetic import embedded
from mdd_bench.errors import DataError, SpecError

CLASSES = {"plate": 14, "cloth": 4}

# --- a small source

def picture(cls, i):
    "A plate on a ground, or a weave; grain on both."
    rng = np.random.default_rng([len(cls), i, ord(cls[0])])
    y, x = np.mgrid[:72, :96]
    plate = 60*(np.hypot(y - 36, x - 48 - i % 3) < 24)
    weave = 30*np.sin(x/2 + i) + 30*np.sin(y/3)
    shape = plate if cls == "plate" else weave
    grain = 2*rng.standard_normal((72, 96, 3))
    return np.clip(110 + shape[..., None]*[1, .8, .5] + grain, 0, 255).astype(np.uint8)

def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)

def make(root, order=1, classes=CLASSES):
    "A source in MVTec's layout, files written in either order; one JPEG, one grey image, one note."
    for cls in sorted(classes)[::order]:
        for i in range(classes[cls])[::order]:
            image = Image.fromarray(picture(cls, i))
            ending = "jpg" if i == 1 else "png"
            save(root/cls/"train"/"good"/f"{i:03}.{ending}", image.convert("L") if i == 2 else image)
        for kind in ("crack", "good"):
            save(root/cls/"test"/kind/"000.png", Image.fromarray(picture(cls, 99)))
        (root/cls/"train"/"good"/"note.txt").write_text("no image")
    return root

def contents(root):
    "The bytes of every file below a folder."
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}

def images_of(folder):
    "The bytes of every image in a folder."
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".txt"}

def folders_in_cache(tmp_path):
    "The held-out datasets in the cache, finished or not."
    return [p for p in (tmp_path/"cache"/"heldout").iterdir() if p.is_dir()]

@pytest.fixture
def cache(tmp_path, monkeypatch):
    "A function that changes to another cache."
    def use(name): monkeypatch.setenv("MDD_BENCH_CACHE", str(tmp_path/name))
    use("cache")
    return use

@pytest.fixture
def source(tmp_path): return make(tmp_path/"source")

@pytest.fixture
def folder(source, cache): return heldout(source)

# --- the dataset

def test_layout_and_counts(folder):
    catalog = verify(read_catalog(folder)).catalog               # also: every defect has a mask of its size
    assert catalog.classes == sorted(CLASSES) and not catalog.ignored
    for cls, n in CLASSES.items():
        out = max(2, n//5)
        assert len(catalog.part(cls=cls, split="train")) == n - out
        assert len(catalog.part(cls=cls, split="test", kind="good")) == out
        bad = catalog.part(cls=cls, split="test").query("kind != 'good'")
        assert len(bad) == 2*out and set(bad.kind) == set(KINDS)

def test_every_training_image_is_used_once(source, folder):
    for cls in CLASSES:
        original = images_of(source/cls/"train"/"good")
        train, good = images_of(folder/cls/"train"/"good"), images_of(folder/cls/"test"/"good")
        assert train | good == original
        assert not train.keys() & good.keys() and not set(train.values()) & set(good.values())

def test_test_images_are_never_opened(source, folder, cache, tmp_path, monkeypatch):
    cache("second")
    for p in source.rglob("test/*/*"): p.write_bytes(b"not an image")
    opened, real_open = set(), Image.open
    def logged(path, *args, **kwargs):
        opened.add(str(path))
        return real_open(path, *args, **kwargs)
    monkeypatch.setattr(Image, "open", logged)
    poisoned = heldout(source)
    assert poisoned.name == folder.name and contents(poisoned) == contents(folder)
    assert opened and not [p for p in opened if f"{os.sep}test{os.sep}" in p and p.startswith(str(source))]
    for cls in CLASSES: shutil.rmtree(source/cls/"test")
    cache("third")
    assert contents(heldout(source)) == contents(folder)

def test_same_bytes_elsewhere_and_in_any_order(folder, cache, tmp_path, monkeypatch):
    cache("second")
    real_listdir, calls = os.listdir, []
    def backwards(*args):
        calls.append(args)
        return sorted(real_listdir(*args), reverse=True)
    monkeypatch.setattr(os, "listdir", backwards)
    second = heldout(make(tmp_path/"elsewhere"/"source", order=-1))
    assert calls and second != folder
    assert second.name == folder.name and contents(second) == contents(folder)

def test_a_class_does_not_depend_on_the_others(folder, cache, tmp_path):
    plates_only = heldout(make(tmp_path/"alone", classes={"plate": CLASSES["plate"]}))
    assert contents(plates_only/"plate") == contents(folder/"plate")

def test_another_seed_is_another_dataset(source, folder):
    other = heldout(source, seed=1)
    assert other != folder and contents(other) != contents(folder)

@pytest.mark.parametrize("cls", CLASSES)
def test_masks_are_exact(source, folder, cls):
    names = sorted(images_of(source/cls/"train"/"good"))
    damaged = [p for p in (folder/cls/"test").glob("*/*.png") if p.parent.name != "good"]
    assert damaged
    for p in damaged:
        clean = load_image(folder/cls/"test"/"good"/names[int(p.stem[:3])])
        image = load_image(p)
        mask = load_mask(folder/cls/"ground_truth"/p.parent.name/f"{p.stem}_mask.png")
        assert ((image != clean).any(-1) == mask).all()
        assert LEAST_PIXELS <= mask.sum() < mask.size/8
        assert (np.abs(image.astype(int) - clean).max(-1)[mask] > LEAST_CHANGE).all()
        assert visible(clean, image)

# --- the defects

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(64, 64), (300, 200), (40, 160)])
def test_each_kind_at_any_size(kind, shape):
    coarse = np.random.default_rng(0).integers(0, 256, (shape[0]//4, shape[1]//4, 1), dtype=np.uint8)
    image = coarse.repeat(4, 0).repeat(4, 1).repeat(3, 2)
    before = image.copy()
    for k in range(5):
        defect = draw_defect(stream(k), image, kind)
        assert defect.image.shape == image.shape and defect.image.dtype == np.uint8
        assert defect.mask.shape == shape and defect.kind == kind
        assert (image == before).all() and (defect.image[~defect.mask] == image[~defect.mask]).all()
        assert .0003 < defect.mask.mean() < .125
        assert (defect.image == defect.image[..., :1]).all()                  # grey stays grey

def test_every_kind_spans_small_and_large():
    image = picture("cloth", 0)
    for kind in KINDS:
        shares = [draw_defect(stream(k), image, kind).mask.mean() for k in range(40)]
        assert max(shares) > 3*min(shares)

@pytest.mark.parametrize("level", [0, 90, 255])
@pytest.mark.parametrize("kind", ["moved", "warp"])
def test_what_cannot_show_becomes_a_stain(kind, level):
    image = np.full((48, 48, 3), level, np.uint8)
    defect = draw_defect(stream(kind), image, kind)
    assert defect.kind == "stain" and defect.mask.sum() >= LEAST_PIXELS
    assert np.abs(defect.image.astype(int) - image).max() >= 60

def test_the_stain_instead_of_another_kind_keeps_its_own_name(tmp_path, cache):
    for i in range(4):
        save(tmp_path/"s"/"blank"/"train"/"good"/f"{i}.png", Image.new("RGB", (64, 64), (90 + i,)*3))
    catalog = verify(read_catalog(heldout(tmp_path/"s"))).catalog
    bad = catalog.part(split="test").query("kind != 'good'")
    assert len(bad) == 4 and set(bad.kind) == {"scratch", "stain"}
    assert sum("_moved" in p or "_warp" in p for p in bad.path) == 2

def test_images_without_room_are_refused():
    with pytest.raises(DataError, match="2x3"):
        draw_defect(stream(0), np.zeros((3, 2, 3), np.uint8), "stain")
    with pytest.raises(SpecError, match="stain"):
        draw_defect(stream(0), np.zeros((64, 64, 3), np.uint8), "stian")

# --- which images, which kinds

def test_pairs_are_balanced():
    for n in range(2, 30):
        counts = [sum(kind in PAIRS[i % 6] for i in range(n)) for kind in KINDS]
        assert max(counts) - min(counts) <= 1

def test_each_name_is_held_out_at_random_on_its_own():
    names = [f"{i}.png" for i in range(50)]
    chosen = held_out(names, "a")
    assert chosen == held_out(names[::-1], "a") and len(chosen) == 10
    assert set(chosen[:9]) <= set(held_out(names + ["new.png"], "a"))
    assert set(chosen) != set(held_out(names, "b"))

def test_a_small_class_is_refused_by_name(tmp_path, cache):
    small = make(tmp_path/"s", classes={"plate": 6, "cloth": 3})
    with pytest.raises(DataError, match="'cloth' has 3 .* add normal training images of cl"): heldout(small)
    assert not folders_in_cache(tmp_path)                     # nothing half-drawn stays

# --- the source

def test_copies_count_once(tmp_path, cache):
    root = make(tmp_path/"s", classes={"plate": 5})
    good = root/"plate"/"train"/"good"
    for n in range(20): shutil.copyfile(good/"000.png", good/f"copy{n}.png")
    images = [p.read_bytes() for p in heldout(root).glob("plate/*/good/*")]
    assert len(images) == len(set(images)) == 5

def test_a_broken_image_is_refused(tmp_path, cache):
    root = make(tmp_path/"s")
    (root/"plate"/"train"/"good"/"000.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match="000.png"): heldout(root)

def test_an_empty_source_is_refused(tmp_path, cache):
    (tmp_path/"s").mkdir()
    with pytest.raises(DataError, match="train/good"): heldout(tmp_path/"s")

def test_a_changed_training_image_gives_another_folder(source, folder):
    path = source/"plate"/"train"/"good"/"000.png"
    pixels = np.array(Image.open(path))
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(path)
    assert heldout(source) != folder and folder.is_dir()

def test_a_changed_test_image_does_not(source, folder):
    (source/"plate"/"test"/"crack"/"000.png").unlink()
    def times(): return {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    before = times()
    assert heldout(source) == folder and before == times()       # found, not drawn again

def test_what_was_interrupted_is_drawn_again(source, cache, monkeypatch, tmp_path):
    def broken(*args): raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(module, "draw_defect", broken)
        with pytest.raises(KeyboardInterrupt): heldout(source)
    assert not folders_in_cache(tmp_path)
    assert verify(read_catalog(heldout(source))).catalog.classes == sorted(CLASSES)

# --- from a run's data to a folder

def test_data_becomes_a_folder(source, folder, monkeypatch):
    def patched(name): return source if name == "embedded-v1-smoke" else embedded(name)
    monkeypatch.setattr(datasets, "embedded", patched)
    assert dataset_folder(str(source)) == source and dataset_folder(source) == source
    assert dataset_folder("embedded-v1-smoke") == source
    assert dataset_folder(f"heldout:{source}") == folder == dataset_folder("heldout:embedded-v1-smoke")
    monkeypatch.setenv("HOME", str(source.parent))
    assert dataset_folder("~/source") == source and dataset_folder("heldout:~/source") == folder

@pytest.mark.parametrize("data,error", [
    ("heldout:", SpecError),
    ("heldout:heldout:embedded-v1", SpecError),
    ("embedded-v0", SpecError),
    ("heldout:embedded-v0", SpecError),
    ("heldout:nowhere", DataError),
])
def test_data_that_does_not_exist(data, error, cache):
    with pytest.raises(error) as e: dataset_folder(data)
    assert e.value.remedy

@pytest.mark.parametrize("name", ["../../up", "a/b", "..", "ü x"])
def test_names_do_not_become_paths(source, cache, tmp_path, name):
    assert heldout(source, name).parent == tmp_path/"cache"/"heldout"
