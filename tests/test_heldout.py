"Held-out normals: made of training images alone, the same for ever, exact masks, nothing trained on that is tested on."
import os, shutil
import numpy as np
import pytest
from PIL import Image
from mdd_bench.data import heldout as module
from mdd_bench.data.catalog import read_catalog, verify
from mdd_bench.data.heldout import KINDS, LEAST_CHANGE, LEAST_PIXELS, PAIRS, damaged, dataset_folder, held_out, heldout, stream, visible
from mdd_bench.data.loading import load_image, load_mask
from mdd_bench.data.synthetic import embedded
from mdd_bench.errors import DataError, SpecError

CLASSES = {"plate": 14, "cloth": 4}

def picture(cls, i):
    "A plate on a ground, or a weave; grain on both."
    rng, (y, x) = np.random.default_rng([len(cls), i, ord(cls[0])]), np.mgrid[:72, :96]
    shape = 60*(np.hypot(y - 36, x - 48 - i % 3) < 24) if cls == "plate" else 30*np.sin(x/2 + i) + 30*np.sin(y/3)
    return np.clip(110 + shape[..., None]*[1, .8, .5] + 2*rng.standard_normal((72, 96, 3)), 0, 255).astype(np.uint8)

def make(root, order=1, classes=CLASSES):
    "A source in MVTec's layout, files written in either order; one JPEG, one grey image, one note."
    for c in sorted(classes)[::order]:
        for i in range(classes[c])[::order]:
            path = root/c/"train"/"good"/(f"{i:03}.jpg" if i == 1 else f"{i:03}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(picture(c, i))
            (image.convert("L") if i == 2 else image).save(path)
        for path in (root/c/"test"/"crack"/"000.png", root/c/"test"/"good"/"000.png"): path.parent.mkdir(parents=True); Image.fromarray(picture(c, 99)).save(path)
        (root/c/"train"/"good"/"note.txt").write_text("no image")
    return root

def contents(root): return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}

@pytest.fixture
def cache(tmp_path, monkeypatch):
    def use(name): monkeypatch.setenv("MDD_BENCH_CACHE", str(tmp_path/name)); return tmp_path/name
    use("cache")
    return use

@pytest.fixture
def source(tmp_path): return make(tmp_path/"source")

@pytest.fixture
def folder(source, cache): return heldout(source)

def test_layout_and_counts(folder):
    catalog, _ = verify(read_catalog(folder))               # also: every defect has a mask of its image's size
    assert catalog.classes == sorted(CLASSES) and catalog.ignored == 0
    for c, n in CLASSES.items():
        out = max(2, n//5)
        assert len(catalog.part(cls=c, split="train")) == n - out and len(catalog.part(cls=c, split="test", kind="good")) == out
        bad = catalog.part(cls=c, split="test").query("kind != 'good'")
        assert len(bad) == 2*out and set(bad.kind) == set(KINDS)

def test_every_training_image_is_in_one_place(source, folder):
    for c in CLASSES:
        original, train, good = ({p.name: p.read_bytes() for p in (root/c/part/"good").iterdir() if p.suffix != ".txt"} for root, part in ((source, "train"), (folder, "train"), (folder, "test")))
        assert train | good == original and not train.keys() & good.keys() and not set(train.values()) & set(good.values())

def test_test_images_are_never_opened(source, folder, cache, tmp_path, monkeypatch):
    cache("second")
    for p in source.rglob("test/*/*"): p.write_bytes(b"not an image")
    opened, real = set(), Image.open
    monkeypatch.setattr(Image, "open", lambda p, *a, **k: opened.add(str(p)) or real(p, *a, **k))
    poisoned = heldout(source)
    assert poisoned.name == folder.name and contents(poisoned) == contents(folder)
    assert opened and not [p for p in opened if f"{os.sep}test{os.sep}" in p and p.startswith(str(source))]
    for c in CLASSES: shutil.rmtree(source/c/"test")
    cache("third")
    assert contents(heldout(source)) == contents(folder)

def test_same_bytes_elsewhere_and_in_any_order(folder, cache, tmp_path, monkeypatch):
    cache("second")
    real, calls = os.listdir, []
    monkeypatch.setattr(os, "listdir", lambda *a: calls.append(a) or sorted(real(*a), reverse=True))
    again = heldout(make(tmp_path/"elsewhere"/"source", order=-1))
    assert calls and again != folder and again.name == folder.name and contents(again) == contents(folder)

def test_a_class_does_not_depend_on_the_others(folder, cache, tmp_path):
    alone = heldout(make(tmp_path/"alone", classes={"plate": CLASSES["plate"]}))
    assert contents(alone/"plate") == contents(folder/"plate")

def test_another_seed_is_another_dataset(source, folder):
    other = heldout(source, seed=1)
    assert other != folder and contents(other) != contents(folder)

def test_masks_are_exact(source, folder):
    for c in CLASSES:
        names = sorted(p.name for p in (source/c/"train"/"good").iterdir() if p.suffix != ".txt")
        for p in (folder/c/"test").glob("*/*.png"):
            if p.parent.name == "good": continue
            clean, image, mask = load_image(folder/c/"test"/"good"/names[int(p.stem[:3])]), load_image(p), load_mask(folder/c/"ground_truth"/p.parent.name/f"{p.stem}_mask.png")
            assert ((image != clean).any(-1) == mask).all() and LEAST_PIXELS <= mask.sum() < mask.size/8
            assert (np.abs(image.astype(int) - clean).max(-1)[mask] > LEAST_CHANGE).all() and visible(clean, image)

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(64, 64), (300, 200), (40, 160)])
def test_each_kind_at_any_size(kind, shape):
    image = np.random.default_rng(0).integers(0, 256, (shape[0]//4, shape[1]//4, 1), dtype=np.uint8).repeat(4, 0).repeat(4, 1).repeat(3, 2)
    before = image.copy()
    for k in range(5):
        out, mask, drawn = damaged(stream(k), image, kind)
        assert out.shape == image.shape and out.dtype == np.uint8 and mask.shape == shape and drawn == kind
        assert (image == before).all() and (out[~mask] == image[~mask]).all() and .0003 < mask.mean() < .125
        assert (out == out[..., :1]).all()                  # grey stays grey

def test_every_kind_spans_small_and_large():
    image = picture("cloth", 0)
    for kind in KINDS:
        shares = [damaged(stream(k), image, kind)[1].mean() for k in range(40)]
        assert max(shares) > 3*min(shares)

@pytest.mark.parametrize("level", [0, 90, 255])
@pytest.mark.parametrize("kind", ["moved", "warp"])
def test_what_cannot_show_becomes_a_stain(kind, level):
    image = np.full((48, 48, 3), level, np.uint8)
    out, mask, drawn = damaged(stream(kind), image, kind)
    assert drawn == "stain" and mask.sum() >= LEAST_PIXELS and np.abs(out.astype(int) - image).max() >= 60

def test_the_stain_in_place_of_another_kind_keeps_its_own_name(tmp_path, cache):
    for i in range(4): (tmp_path/"s"/"blank"/"train"/"good").mkdir(parents=True, exist_ok=True); Image.new("RGB", (64, 64), (90 + i,)*3).save(tmp_path/"s"/"blank"/"train"/"good"/f"{i}.png")
    catalog, _ = verify(read_catalog(heldout(tmp_path/"s")))
    bad = catalog.part(split="test").query("kind != 'good'")
    assert len(bad) == 4 and set(bad.kind) == {"scratch", "stain"} and sum("_moved" in p or "_warp" in p for p in bad.path) == 2

def test_images_without_room_are_refused():
    with pytest.raises(DataError, match="2x3"): damaged(stream(0), np.zeros((3, 2, 3), np.uint8), "stain")
    with pytest.raises(SpecError, match="stain"): damaged(stream(0), np.zeros((64, 64, 3), np.uint8), "stian")

def test_pairs_are_balanced():
    for n in range(2, 30):
        counts = [sum(k in PAIRS[i % 6] for i in range(n)) for k in KINDS]
        assert max(counts) - min(counts) <= 1

def test_lots_are_drawn_per_name():
    names = [f"{i}.png" for i in range(50)]
    assert held_out(names, "a") == held_out(names[::-1], "a") and len(held_out(names, "a")) == 10
    assert set(held_out(names, "a")[:9]) <= set(held_out(names + ["new.png"], "a")) and set(held_out(names, "a")) != set(held_out(names, "b"))

def test_a_small_class_is_refused_by_name(tmp_path, cache):
    with pytest.raises(DataError, match="'cloth' has 3 .* add images"): heldout(make(tmp_path/"s", classes={"plate": 6, "cloth": 3}))
    assert not [p for p in (tmp_path/"cache"/"heldout").iterdir() if p.is_dir()]                     # nothing half-drawn stays

def test_copies_count_once(tmp_path, cache):
    root = make(tmp_path/"s", classes={"plate": 5})
    for n in range(20): shutil.copyfile(root/"plate"/"train"/"good"/"000.png", root/"plate"/"train"/"good"/f"copy{n}.png")
    images = [p.read_bytes() for p in heldout(root).glob("plate/*/good/*")]
    assert len(images) == len(set(images)) == 5

@pytest.mark.parametrize("content,word", [(b"not an image", "000.png"), (None, "train/good")])
def test_bad_sources_are_refused(tmp_path, cache, content, word):
    root = make(tmp_path/"s")
    if content: (root/"plate"/"train"/"good"/"000.png").write_bytes(content)
    else: shutil.rmtree(root); root.mkdir()
    with pytest.raises(DataError, match=word): heldout(root)

def test_a_changed_training_image_gives_another_folder(source, folder):
    path = source/"plate"/"train"/"good"/"000.png"
    pixels = np.array(Image.open(path)); pixels[0, 0, 0] ^= 1; Image.fromarray(pixels).save(path)
    assert heldout(source) != folder and folder.is_dir()

def test_a_changed_test_image_does_not(source, folder):
    (source/"plate"/"test"/"crack"/"000.png").unlink()
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert heldout(source) == folder and before == {p: p.stat().st_mtime_ns for p in folder.rglob("*")}       # found, not drawn again

def test_what_was_interrupted_is_drawn_again(source, cache, monkeypatch, tmp_path):
    def broken(*a): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(module, "damaged", broken)
        with pytest.raises(KeyboardInterrupt): heldout(source)
    assert not [p for p in (tmp_path/"cache"/"heldout").iterdir() if p.is_dir()]
    assert verify(read_catalog(heldout(source)))[0].classes == sorted(CLASSES)

def test_data_becomes_a_folder(source, folder, monkeypatch):
    monkeypatch.setattr(module, "embedded", lambda name: source if name == "embedded-v1-smoke" else embedded(name))
    assert dataset_folder(str(source)) == source and dataset_folder(source) == source
    assert dataset_folder("embedded-v1-smoke") == source
    assert dataset_folder(f"heldout:{source}") == folder == dataset_folder("heldout:embedded-v1-smoke")
    monkeypatch.setenv("HOME", str(source.parent))
    assert dataset_folder("~/source") == source and dataset_folder("heldout:~/source") == folder

@pytest.mark.parametrize("data,error", [("heldout:", SpecError), ("heldout:heldout:embedded-v1", SpecError), ("embedded-v0", SpecError), ("heldout:embedded-v0", SpecError), ("heldout:nowhere", DataError)])
def test_data_that_does_not_exist(data, error, cache):
    with pytest.raises(error) as e: dataset_folder(data)
    assert e.value.remedy

@pytest.mark.parametrize("name", ["../../up", "a/b", "..", "ü x"])
def test_names_do_not_become_paths(source, cache, tmp_path, name):
    assert heldout(source, name).parent == tmp_path/"cache"/"heldout"
