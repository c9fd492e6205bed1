"Folders as people have them: endings, mask names, other files, and everything that can be wrong with them."
import shutil
import numpy as np
import pytest
from PIL import Image
from mdd_bench.data.catalog import digests, read_catalog, verify
from mdd_bench.data.loading import ImageDataset, batches, load_image, load_mask
from mdd_bench.errors import DataError

def save(path, array): path.parent.mkdir(parents=True, exist_ok=True); Image.fromarray(array).save(path); return path
def noise(seed=0, size=12): return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)

@pytest.fixture
def root(tmp_path):
    "Two classes, one defect kind each."
    for c in ("bolt", "nut"):
        for k in range(3): save(tmp_path/c/"train"/"good"/f"{k}.png", noise(k))
        save(tmp_path/c/"test"/"good"/"0.png", noise(9)); save(tmp_path/c/"test"/"bent"/"0.png", noise(8))
        save(tmp_path/c/"ground_truth"/"bent"/"0_mask.png", np.eye(12, dtype=np.uint8)*255)
    return tmp_path

@pytest.mark.parametrize("ending", [".png", ".PNG", ".jpg", ".JPG", ".jpeg", ".bmp", ".tif", ".TIFF"])
def test_endings(root, ending):
    save(root/"nut"/"train"/"good"/f"extra{ending}", noise(5))
    assert f"nut/train/good/extra{ending}" in set(verify(read_catalog(root))[0].table.path)

@pytest.mark.parametrize("name", ["0_mask.png", "0.png", "0.BMP", "0_mask.tif"])
def test_mask_names(root, name):
    (root/"nut/ground_truth/bent/0_mask.png").unlink(); save(root/"nut/ground_truth/bent"/name, np.eye(12, dtype=np.uint8))
    t = read_catalog(root).table
    assert f"nut/ground_truth/bent/{name}" in set(t["mask"])

def test_other_files_are_ignored_and_counted(root):
    for p in ("readme.txt", "nut/license.pdf", "nut/train/good/Thumbs.db", "nut/test/bent/.hidden.png"): (root/p).write_bytes(b"x")
    assert read_catalog(root).ignored == 4

def test_table(root):
    c = read_catalog(root)
    assert list(c.table.columns) == ["path", "mask", "cls", "split", "kind"] and c.classes == ["bolt", "nut"]
    assert len(c.part(cls="nut", split="train")) == 3 and c.counts().loc["nut"].tolist() == [3, 1, 1, "bent 1"]
    assert read_catalog(root, ["nut"]).classes == ["nut"]

def test_fingerprint_follows_content_only(root, tmp_path_factory):
    first = verify(read_catalog(root))[1]
    moved = tmp_path_factory.mktemp("elsewhere")/"copy"; shutil.copytree(root, moved)
    assert verify(read_catalog(moved))[1] == first
    assert verify(read_catalog(root, ["nut"]))[1] != first
    (moved/"nut/train/good/0.png").rename(moved/"nut/train/good/7.png")
    assert verify(read_catalog(moved))[1] != first

def test_digests_are_remembered(root, monkeypatch):
    paths = ["nut/train/good/0.png"]; first = digests(root, paths, "raise")
    monkeypatch.setattr("mdd_bench.data.catalog.digest", lambda p: pytest.fail("read again"))
    assert digests(root, paths, "raise") == first

def break_it(root, how):
    if how == "no folder": return root/"nowhere"
    if how == "no class": return root/"nut"/"train"
    if how == "one class": return root/"nut"
    if how == "no train": shutil.rmtree(root/"nut"/"train")
    if how == "no mask": (root/"nut/ground_truth/bent/0_mask.png").unlink()
    if how == "mask size": save(root/"nut/ground_truth/bent/0_mask.png", np.eye(11, dtype=np.uint8))
    if how == "unreadable": (root/"nut/test/good/0.png").write_bytes(b"no picture")
    if how == "truncated": p = root/"nut/test/good/0.png"; p.write_bytes(p.read_bytes()[:200])
    return root

@pytest.mark.parametrize("how,culprit", [("no folder", "nowhere"), ("no class", "no product class"), ("one class", "--classes nut"), ("no train", "train/good"), ("no mask", "test/bent/0.png"),
                                         ("mask size", "11x11"), ("unreadable", "test/good/0.png"), ("truncated", "test/good/0.png")])
def test_bad_folders(root, how, culprit):
    with pytest.raises(DataError, match=culprit) as e: verify(read_catalog(break_it(root, how)))
    assert "\n" not in str(e.value) and e.value.remedy

def test_skip_broken_leaves_out_and_says_so(root):
    break_it(root, "truncated")
    catalog, _ = verify(read_catalog(root), skip_broken=True)
    assert "nut/test/good/0.png" not in set(catalog.table.path) and len(catalog.table) == 9

def test_unknown_class(root):
    with pytest.raises(DataError, match="Did you mean 'nut'"): read_catalog(root, ["nutt"])

def test_image_modes(tmp_path):
    for name, array in dict(grey=noise()[..., 0], rgba=np.dstack([noise(), noise()[..., 0]]), grey16=noise()[..., 0].astype(np.uint16)*257).items():
        image = load_image(save(tmp_path/f"{name}.png", array))
        assert image.shape == (12, 12, 3) and image.dtype == np.uint8
    assert np.array_equal(load_image(tmp_path/"grey16.png"), load_image(tmp_path/"grey.png"))

def test_masks_of_several_values_and_channels(tmp_path):
    flat = np.zeros((5, 5), np.uint8); flat[1, 2], flat[3, 3] = 1, 7
    assert load_mask(save(tmp_path/"a.png", flat)).sum() == 2
    assert load_mask(save(tmp_path/"b.png", np.dstack([flat*0, flat, flat*0]))).sum() == 2

def test_single_last_image_is_dropped_in_training_only(root):
    table = read_catalog(root).part(split="train")
    rows = ImageDataset(root, table, 16, ["bolt", "nut"])
    assert sum(len(b["path"]) for b in batches(rows, 5, epoch=0)) == 5 and sum(len(b["path"]) for b in batches(rows, 5)) == 6
