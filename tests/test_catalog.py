"Folders as people have them: endings, mask names, other files, and everything that can be wrong with them."
import json, shutil
import numpy as np
import pytest
from PIL import Image
from mdd_bench.data.catalog import digests, memo_file, verify
from mdd_bench.data.images import Framing, images_in, load_image, load_mask
from mdd_bench.data.layouts import find_mask, masks_of, read_catalog
from mdd_bench.data.loading import TURNS, ImageDataset, batches, turned
from mdd_bench.errors import DataError

def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path

def noise(seed=0, size=12):
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)

def diagonal(size=12):
    return np.eye(size, dtype=np.uint8)*255

@pytest.fixture
def root(tmp_path):
    "Two classes, one defect kind each."
    for c in ("bolt", "nut"):
        for k in range(3): save(tmp_path/c/"train"/"good"/f"{k}.png", noise(k))
        save(tmp_path/c/"test"/"good"/"0.png", noise(9))
        save(tmp_path/c/"test"/"bent"/"0.png", noise(8))
        save(tmp_path/c/"ground_truth"/"bent"/"0_mask.png", diagonal())
    return tmp_path

# ---- files and folders

@pytest.mark.parametrize("ending", [".png", ".PNG", ".jpg", ".JPG", ".jpeg", ".bmp", ".tif", ".TIFF"])
def test_endings(root, ending):
    save(root/"nut"/"train"/"good"/f"extra{ending}", noise(5))
    catalog = verify(read_catalog(root)).catalog
    assert f"nut/train/good/extra{ending}" in set(catalog.table.path)

@pytest.mark.parametrize("name", ["0_mask.png", "0.png", "0.BMP", "0_mask.tif"])
def test_mask_names(root, name):
    (root/"nut/ground_truth/bent/0_mask.png").unlink()
    save(root/"nut/ground_truth/bent"/name, np.eye(12, dtype=np.uint8))
    assert f"nut/ground_truth/bent/{name}" in set(read_catalog(root).table["mask"])

def test_the_mask_with_the_longer_stem_wins_and_then_the_first_by_name(root):
    folder = root/"nut/ground_truth/bent"
    for name in ("0.png", "0_mask.tif", "0_mask.bmp"): save(folder/name, diagonal())
    image = root/"nut/test/bent/0.png"
    masks = masks_of(folder)
    assert find_mask(image, masks) == folder/"0_mask.bmp"
    for name in ("0_mask.bmp", "0_mask.png", "0_mask.tif"): (folder/name).unlink()
    assert find_mask(image, masks_of(folder)) == folder/"0.png"

def test_a_folder_is_listed_once(root, monkeypatch):
    "Once for each image would take a minute for 2000 anomalies."
    for k in range(5):
        save(root/f"nut/test/bent/more{k}.png", noise(k))
        save(root/f"nut/ground_truth/bent/more{k}.png", diagonal())
    listed = []

    def counted(folder):
        listed.append(folder)
        return images_in(folder)

    monkeypatch.setattr("mdd_bench.data.layouts.images_in", counted)
    read_catalog(root)
    assert listed.count(root/"nut/ground_truth/bent") == 1 and len(listed) == len(set(listed))

def test_other_files_are_ignored_and_counted(root):
    for name in ("readme.txt", "nut/license.pdf", "nut/train/good/Thumbs.db", "nut/test/bent/.hidden.png"):
        (root/name).write_bytes(b"x")
    assert read_catalog(root).ignored == {".txt": 1, ".pdf": 1, ".db": 1, ".png": 1}

@pytest.mark.parametrize("hidden", [".ipynb_checkpoints/train/good", ".ipynb_checkpoints/test/bent"])
def test_a_hidden_folder_is_no_class(root, hidden):
    before = read_catalog(root)
    save(root/hidden/"0.png", noise())
    after = read_catalog(root)
    assert after.classes == ["bolt", "nut"] and after.table.equals(before.table)
    with pytest.raises(DataError, match="unknown class"): read_catalog(root, [".ipynb_checkpoints"])

def test_a_hidden_folder_is_no_kind(root):
    before = read_catalog(root)
    save(root/"nut/test/.ipynb_checkpoints/0.png", noise())
    after = read_catalog(root)
    assert after.table.equals(before.table) and not after.ignored

def test_hidden_folders_alone_are_no_dataset(tmp_path):
    save(tmp_path/".ipynb_checkpoints/train/good/0.png", noise())
    with pytest.raises(DataError, match="no product class"): read_catalog(tmp_path)

def test_table(root):
    catalog = read_catalog(root)
    assert list(catalog.table.columns) == ["path", "mask", "cls", "split", "kind"]
    assert catalog.classes == ["bolt", "nut"]
    assert len(catalog.part(cls="nut", split="train")) == 3
    assert catalog.counts().loc["nut"].tolist() == [3, 1, 1, "bent 1"]
    assert list(catalog.counts().columns) == ["train", "test good", "test anomalous", "kinds"]
    assert read_catalog(root, ["nut"]).classes == ["nut"]

# ---- contents

def test_fingerprint_follows_content_only(root, tmp_path_factory):
    first = verify(read_catalog(root)).fingerprint
    moved = tmp_path_factory.mktemp("elsewhere")/"copy"
    shutil.copytree(root, moved)
    assert verify(read_catalog(moved)).fingerprint == first
    assert verify(read_catalog(root, ["nut"])).fingerprint != first
    (moved/"nut/train/good/0.png").rename(moved/"nut/train/good/7.png")
    assert verify(read_catalog(moved)).fingerprint != first

def test_digests_are_remembered(root, monkeypatch):
    paths = ["nut/train/good/0.png"]
    first = digests(root, paths)
    monkeypatch.setattr("mdd_bench.data.catalog.digest", lambda p: pytest.fail("read a second time"))
    assert digests(root, paths) == first

@pytest.mark.parametrize("damage", [[1, 2], None, 3, [1]*9])
def test_damaged_digests_are_computed_again(root, damage):
    paths = ["nut/train/good/0.png", "nut/train/good/1.png"]
    first = digests(root, paths)
    memo = json.loads(memo_file(root).read_text())
    memo_file(root).write_text(json.dumps(memo | {next(iter(memo)): damage}))
    assert digests(root, paths) == first
    assert json.loads(memo_file(root).read_text()) == memo          # mended

def damage(root, how):
    "Damages the dataset in one way; returns the folder to read."
    image, mask = root/"nut/test/good/0.png", root/"nut/ground_truth/bent/0_mask.png"
    match how:
        case "no folder": return root/"nowhere"
        case "no class": return root/"nut"/"train"
        case "one class": return root/"nut"
        case "no train": shutil.rmtree(root/"nut"/"train")
        case "no mask": mask.unlink()
        case "mask size": save(mask, diagonal(11))
        case "unreadable": image.write_bytes(b"no picture")
        case "truncated": image.write_bytes(image.read_bytes()[:200])
        case _: raise ValueError(how)
    return root

CULPRITS = {
    "no folder": "nowhere",
    "no class": "no product class",
    "one class": "--classes nut",
    "no train": "no train images",
    "no mask": "test/bent/0.png",
    "mask size": "11x11",
    "unreadable": "test/good/0.png",
    "truncated": "test/good/0.png",
}

@pytest.mark.parametrize("how, culprit", CULPRITS.items())
def test_bad_folders(root, how, culprit):
    folder = damage(root, how)
    with pytest.raises(DataError, match=culprit) as e: verify(read_catalog(folder))
    assert "\n" not in str(e.value) and e.value.remedy

def test_skip_broken_leaves_out_what_cannot_be_read(root):
    damage(root, "truncated")
    catalog = verify(read_catalog(root), skip_broken=True).catalog
    assert "nut/test/good/0.png" not in set(catalog.table.path) and len(catalog.table) == 9

def test_unknown_class(root):
    with pytest.raises(DataError, match="Did you mean 'nut'"): read_catalog(root, ["nutt"])

# ---- loading

def test_image_modes(tmp_path):
    grey = noise()[..., 0]
    arrays = {
        "grey": grey,
        "rgba": np.dstack([noise(), grey]),
        "grey16": grey.astype(np.uint16)*257,
    }
    images = {name: load_image(save(tmp_path/f"{name}.png", array)) for name, array in arrays.items()}
    for image in images.values():
        assert image.shape == (12, 12, 3) and image.dtype == np.uint8
    assert np.array_equal(images["grey16"], images["grey"])

def test_masks_of_several_values_and_channels(tmp_path):
    flat = np.zeros((5, 5), np.uint8)
    flat[1, 2], flat[3, 3] = 1, 7
    one_channel = np.dstack([flat*0, flat, flat*0])
    assert load_mask(save(tmp_path/"a.png", flat)).sum() == 2
    assert load_mask(save(tmp_path/"b.png", one_channel)).sum() == 2

def test_single_last_image_is_dropped_in_training_only(root):
    rows = ImageDataset(root, read_catalog(root).part(split="train"), Framing(16), ["bolt", "nut"])
    assert sum(len(b["path"]) for b in batches(rows, 5, epoch=0)) == 5
    assert sum(len(b["path"]) for b in batches(rows, 5)) == 6

def test_a_drawn_defect_turns_with_its_image(root):
    def dot(image, i, epoch):
        mask = np.zeros(image.shape[1:], bool)
        mask[2, 5] = True
        return np.where(mask, 0, image), mask

    table = read_catalog(root).part(split="train")
    rows = ImageDataset(root, table, Framing(16), ["bolt", "nut"], defects=dot, turns=TURNS)
    upright = rows[0]
    for turn in range(TURNS):
        item = rows[turn*len(table)]
        assert all(item[key].equal(turned(upright[key], turn)) for key in ("image", "abnormal", "mask"))
