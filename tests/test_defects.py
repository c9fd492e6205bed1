"Synthetic defects: a pair differs inside its mask only, and the same sample is damaged the same way whoever draws it."
import hashlib, multiprocessing, pickle
import numpy as np
import pytest
from PIL import Image
from mdd_bench.data.defects import FAMILIES, Defects, blend, crop, perlin, perlin_mask, procedural_texture, recolour, texture_files
from mdd_bench.errors import DataError, SpecError

SHAPES = [(64, 64), (128, 96), (37, 51), (1, 200), (16, 16), (3, 2)]
rng = np.random.default_rng
def image(seed=0, shape=(48, 64)): return rng([99, seed]).random((3, *shape), dtype=np.float32)

def fingerprint(defects, samples):
    "Hash of what is drawn for each (index, epoch): runs in another process, too."
    return {s: hashlib.sha256(b"".join(a.tobytes() for a in defects(image(s[0]), *s))).hexdigest() for s in samples}

@pytest.fixture
def folder(tmp_path):
    "Textures in five formats at several depths, among files that are none."
    for k, name in enumerate(["a.png", "b/c.jpg", "b/d/e.jpeg", "b/f.bmp", "g.TIF"]):
        (tmp_path/"cloth"/name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng(k).integers(0, 256, (20 + 10*k, 40, 3), dtype=np.uint8)).save(tmp_path/"cloth"/name)
    for name in ["readme.txt", "b/._c.jpg", ".hidden/x.png"]:
        (tmp_path/"cloth"/name).parent.mkdir(exist_ok=True); (tmp_path/"cloth"/name).write_bytes(b"no image")
    return tmp_path/"cloth"

# --- noise and masks

@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scales", [(1, 1), (4, 32), (2.5, 0.3)])
def test_noise_has_its_shape_and_range(shape, scales):
    noise = np.stack([perlin(rng(k), shape, scales) for k in range(10)])
    assert noise.shape[1:] == shape and noise.dtype == np.float32 and np.abs(noise).max() <= 1 + 1e-6

def test_noise_is_zero_at_lattice_points_and_smooth_between():
    n = perlin(rng(0), (400, 400), (4, 4))
    assert np.abs(n[[100, 200, 300]][:, [100, 200, 300]]).max() < 0.02     # half a pixel beside the lattice point
    assert np.abs(np.diff(n, axis=0)).max() < 0.05 and n.std() > 0.1

@pytest.mark.parametrize("shape", SHAPES)
def test_masks_are_never_empty(shape):
    masks = [perlin_mask(rng(k), shape) for k in range(200)]
    assert all(m.shape == shape and m.dtype == bool and m.any() for m in masks)
    if min(shape) > 16: assert all(m.mean() < 0.7 for m in masks)

def test_when_every_draw_fails_the_peak_is_taken():
    "With one attempt many draws stay below the threshold."
    masks = [perlin_mask(rng(k), (64, 64), tries=1) for k in range(200)]
    assert all(m.any() for m in masks)
    assert any((m != perlin_mask(rng(k), (64, 64))).any() for k, m in enumerate(masks))

# --- textures

@pytest.mark.parametrize("shape", SHAPES)
def test_procedural_textures_are_images(shape):
    textures = [procedural_texture(rng(k), shape) for k in range(30)]
    assert all(t.shape == (3, *shape) and t.dtype == np.float32 and 0 <= t.min() and t.max() <= 1 for t in textures)

@pytest.mark.parametrize("name", FAMILIES)
def test_families_vary(name):
    fields = [FAMILIES[name](rng(k), (40, 56)) for k in range(20)]
    assert all(0 <= f.min() and f.max() <= 1 and f.std() > 0.01 for f in fields)
    assert len({f.tobytes() for f in fields}) == 20

def test_a_crop_shows_at_least_half_of_each_side():
    ramp = np.broadcast_to(np.arange(100.)[:, None], (3, 100, 80))
    crops = [crop(rng(k), ramp, (50, 20)) for k in range(100)]
    assert all(c.shape == (3, 50, 20) and np.ptp(c) >= 45 for c in crops)
    assert {bool(c[0, 0, 0] < c[0, -1, 0]) for c in crops} == {True, False}       # mirrored at random

def test_recolouring_stays_in_range_and_changes_the_image():
    out = [recolour(rng(k), image()) for k in range(50)]
    assert all(o.dtype == np.float32 and 0 <= o.min() and o.max() <= 1 for o in out)
    assert all((o != image()).any() for o in out)

# --- pairs

def make(kind, folder, **kw):
    return Defects({"folder": folder}.get(kind, kind), images=[image(k) for k in range(6)], **kw)

@pytest.mark.parametrize("kind", ["procedural", "images", "folder"])
def test_a_pair_differs_inside_the_mask_only(kind, folder):
    defects, changed = make(kind, folder), []
    for k in range(60):
        clean = image(k % 6); before = clean.copy()
        abnormal, mask = defects(clean, k % 6, k)
        assert (clean == before).all() and (abnormal[:, ~mask] == clean[:, ~mask]).all() and mask.any()
        assert abnormal.dtype == np.float32 and mask.dtype == bool and abnormal.shape == clean.shape and mask.shape == clean.shape[1:]
        assert 0 <= abnormal.min() and abnormal.max() <= 1
        changed.append((abnormal != clean).any(0)[mask].mean())
    assert min(changed) > 0.9

@pytest.mark.parametrize("kind", ["procedural", "images", "folder"])
def test_a_sample_is_drawn_the_same_everywhere(kind, folder):
    defects = make(kind, folder, probability=0.8, seed=7)
    samples = [(i, e) for i in range(6) for e in range(2)]
    here = fingerprint(defects, samples)
    assert fingerprint(pickle.loads(pickle.dumps(defects)), samples[::-1]) == here
    with multiprocessing.get_context("spawn").Pool(1) as pool: assert pool.apply(fingerprint, (defects, samples[::2])).items() <= here.items()

def test_epoch_index_and_seed_all_count():
    clean = image()
    draws = [Defects(seed=s)(clean, i, e)[0].tobytes() for s in (0, 1) for i in (0, 1) for e in (0, 1)]
    assert len(set(draws)) == 8

def test_probability():
    clean = image()
    for k in range(20):
        abnormal, mask = Defects(probability=0)(clean, k, 0)
        assert (abnormal == clean).all() and not mask.any() and abnormal is not clean and not np.shares_memory(abnormal, clean)
    hits = [Defects(probability=0.5)(clean, k, 1)[1].any() for k in range(400)]
    assert 160 < sum(hits) < 240                                # four deviations
    assert all(Defects()(clean, k, 1)[1].any() for k in range(100))

def test_the_blend_lets_through_what_it_says():
    mask = np.zeros((2, 2), bool); mask[0] = True
    out = blend(np.zeros((3, 2, 2), np.float32), np.ones((3, 2, 2), np.float32), mask, 0.25)
    assert (out[:, 0] == 0.75).all() and (out[:, 1] == 0).all() and out.dtype == np.float32

class Asked:
    "Images that remember which of them were asked for."
    def __init__(self, n): self.n, self.log = n, []
    def __len__(self): return self.n
    def image(self, i): self.log.append(i); return image(i)

def test_an_image_is_never_its_own_texture():
    for index in range(4):
        images = Asked(4); defects = Defects("images", images=images)
        for epoch in range(60): defects(image(index), index, epoch)
        assert set(images.log) == set(range(4)) - {index}

def test_images_may_have_other_sizes():
    defects = Defects("images", images=[image(0, (10, 90)), image(1, (33, 7))])
    assert defects(image(), 0, 0)[0].shape == (3, 48, 64)

# --- folders

def test_the_folder_is_searched_and_named(folder):
    defects = Defects(folder)
    assert [p.name for p in texture_files(folder)] == ["a.png", "c.jpg", "e.jpeg", "f.bmp", "g.TIF"]
    word, name, files, digest = defects.source.split(":")
    assert (word, name, files, len(digest)) == ("folder", "cloth", "5", 12)
    assert Defects(str(folder)).source == defects.source
    assert [Defects().source, make("images", None).source] == ["procedural", "images"]

def test_the_name_of_a_folder_changes_with_its_files_not_its_place(folder, tmp_path):
    before = Defects(folder).source
    moved = folder.rename(tmp_path/"elsewhere"); (tmp_path/"x").mkdir(); moved = moved.rename(tmp_path/"x"/"cloth")
    assert Defects(moved).source == before
    Image.new("RGB", (9, 9)).save(moved/"more.png")
    assert Defects(moved).source != before

def test_textures_come_from_the_folder(folder):
    for p in texture_files(folder): p.unlink()
    Image.new("RGB", (30, 30), (255, 0, 0)).save(folder/"red.png")
    abnormal, mask = Defects(folder)(np.zeros((3, 32, 32), np.float32), 0, 0)
    assert (abnormal[0, mask] >= 0.2 - 1e-6).all() and not abnormal[1:].any()

# --- bad input

def test_unknown_textures_are_refused_with_the_known(tmp_path):
    for bad in ("proceduall", str(tmp_path/"nowhere"), tmp_path/"nowhere", None, 3):
        with pytest.raises(DataError, match="procedural") as e: Defects(bad)
        assert "images" in str(e.value) and "folder" in str(e.value) and str(bad) in str(e.value)

def test_a_folder_without_images_is_named(tmp_path):
    with pytest.raises(DataError, match="no image") as e: Defects(tmp_path)
    assert str(tmp_path) in str(e.value) and "procedural" in str(e.value)

def test_a_broken_texture_is_named(folder):
    for p in texture_files(folder): p.write_bytes(b"no image")
    with pytest.raises(DataError, match="cloth"): Defects(folder)(image(), 0, 0)

@pytest.mark.parametrize("images", [None, [], [image()]])
def test_images_need_another_image(images):
    with pytest.raises(DataError, match="two"): Defects("images", images=images)

@pytest.mark.parametrize("kw", [dict(probability=1.5), dict(probability=-0.1), dict(probability=float("nan")), dict(seed=-1)])
def test_impossible_settings(kw):
    with pytest.raises(SpecError): Defects(**kw)

@pytest.mark.parametrize("bad", [np.zeros((32, 32)), np.zeros((32, 32, 3)), np.zeros((3, 8, 8), np.uint8), np.full((3, 8, 8), 255.), np.full((3, 8, 8), -0.1), np.full((3, 8, 8), np.nan)])
def test_what_is_no_image_is_refused(bad):
    with pytest.raises(DataError, match="float arrays"): Defects()(bad, 0, 0)
