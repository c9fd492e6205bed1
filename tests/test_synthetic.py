"The embedded benchmark: the same images for ever, exact masks, and nothing half-drawn."
import numpy as np
import pytest
from PIL import Image
from mdd_bench.data import synthetic
from mdd_bench.data.catalog import verify
from mdd_bench.data.layouts import read_catalog
from mdd_bench.data.synthetic import (
    CLASSES, LEAST_PIXELS, SIDE, SIZES, draw, draw_pair, embedded, plan, write_embedded,
)
from mdd_bench.errors import DataError, SpecError

KINDS = [(cls, kind) for cls, product in CLASSES.items() for kind in product.kinds]

@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MDD_BENCH_CACHE", str(tmp_path/"cache"))
    return tmp_path/"cache"/"embedded"

def contents(root):
    "The bytes of every file below a folder."
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}

@pytest.mark.parametrize("cls,kind", KINDS)
def test_the_mask_is_where_the_twin_differs(cls, kind):
    for i in range(3):
        image, twin, mask = draw_pair(cls, kind, i)
        assert image.shape == (SIDE, SIDE, 3) and image.dtype == np.uint8
        assert mask.shape == (SIDE, SIDE) and mask.dtype == bool
        assert ((image != twin).any(-1) == mask).all()
        assert LEAST_PIXELS <= mask.sum() < SIDE*SIDE/5
        assert twin.std() > 5

@pytest.mark.parametrize("cls", CLASSES)
def test_each_image_has_its_own_randomness(cls):
    kind = CLASSES[cls].kinds[0]
    image, mask = draw(cls, kind, 1)
    same_image, same_mask = draw(cls, kind, 1)
    assert (image == same_image).all() and (mask == same_mask).all()
    images = [
        image,
        draw(cls, kind, 2)[0],
        draw(cls, kind, 1, seed=1)[0],
        draw(cls, "good", 1)[0],
        draw(cls, "good", 1, "train")[0],
    ]
    assert len({im.tobytes() for im in images}) == len(images)

def test_good_images_have_empty_masks():
    for split in ("train", "test"):
        _, mask = draw("cap", "good", 0, split)
        assert not mask.any()

def test_every_class_is_described():
    looks = [product.look for product in CLASSES.values()]
    assert looks.count("texture") >= 3 and looks.count("object") >= 3
    assert all(len(set(product.kinds)) == 4 for product in CLASSES.values())

@pytest.mark.parametrize("small,large", [("smoke", "default"), ("default", "large")])
def test_a_larger_size_contains_the_smaller(small, large):
    for cls in CLASSES:
        assert set(plan(small, cls)) < set(plan(large, cls))

def test_the_files_are_the_drawings(tmp_path, cache):
    root = write_embedded(tmp_path/"a", "smoke", classes=["tile", "cap"])
    catalog = verify(read_catalog(root)).catalog
    n = SIZES["smoke"]
    assert catalog.classes == ["cap", "tile"] and not catalog.ignored
    assert len(catalog.part(split="train")) == 2*n["train"]
    assert len(catalog.part(split="test", kind="good")) == 2*n["good"]
    for row in catalog.table.itertuples():
        image, mask = draw(row.cls, row.kind, int(row.path[-7:-4]), row.split)
        assert (np.array(Image.open(root/row.path)) == image).all()
        if row.mask:
            assert (np.array(Image.open(root/row.mask)) == 255*mask).all()

def test_the_same_seed_gives_the_same_bytes(tmp_path):
    def written(name, seed): return contents(write_embedded(tmp_path/name, "smoke", seed, ["connector"]))
    first, second, other = written("first", 3), written("second", 3), written("other", 4)
    assert first == second
    assert first.keys() == other.keys() and all(first[k] != other[k] for k in first)

def test_drawn_once(cache, monkeypatch):
    root = embedded("embedded-v1-smoke")
    assert root.parent == cache and read_catalog(root).classes == sorted(CLASSES)
    monkeypatch.setattr(synthetic, "write_embedded", None)             # not called again
    assert embedded("embedded-v1-smoke") == root

def test_an_interrupted_drawing_leaves_nothing(cache, monkeypatch):
    write_image, written = synthetic.write_image, []
    def interrupted(*args):
        written.append(args)
        if len(written) == 3: raise KeyboardInterrupt
        write_image(*args)
    monkeypatch.setattr(synthetic, "write_image", interrupted)
    with pytest.raises(KeyboardInterrupt): embedded("embedded-v1-smoke")
    assert len(written) == 3
    assert not [p for p in cache.iterdir() if p.suffix != ".lock"]

def test_what_a_killed_process_left_is_drawn_afresh(cache):
    stale = cache/"embedded-v1-smoke-seed0.part"/"old"/"train"/"good"
    stale.mkdir(parents=True)
    (stale/"000.png").write_bytes(b"half")
    assert "old" not in read_catalog(embedded("embedded-v1-smoke")).classes
    assert not stale.exists()

@pytest.mark.parametrize("wrong,culprit", [
    (lambda d: write_embedded(d, "huge"), "huge"),
    (lambda d: write_embedded(d, "smoke", classes=["gaer"]), "Did you mean 'gear'"),
    (lambda d: embedded("embedded-v2"), "embedded-v2"),
    (lambda d: draw("gear", "stain", 0), "tooth"),
    (lambda d: draw("gear", "tooth", 0, "train"), "Known: good"),
    (lambda d: draw("gear", "good", 0, "valid"), "valid"),
])
def test_unknown_names_are_errors(tmp_path, wrong, culprit):
    with pytest.raises(SpecError, match=culprit): wrong(tmp_path/"d")
    assert not (tmp_path/"d").exists()

def test_a_folder_in_use_is_left_alone(tmp_path):
    (tmp_path/"notes.txt").write_text("mine")
    with pytest.raises(DataError, match="not empty"): write_embedded(tmp_path, "smoke")
    assert contents(tmp_path) == {"notes.txt": b"mine"}
