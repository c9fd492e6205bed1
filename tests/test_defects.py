"Synthetic defects: a pair differs inside its mask only, and a sample is damaged alike in every process."
import hashlib, multiprocessing, pickle
import numpy as np
import pytest
from PIL import Image
from mdd_bench.data.defects import (
    FAMILIES, Defects, blend, crop, perlin, perlin_mask, procedural_texture, recolour, texture_files,
)
from mdd_bench.errors import DataError, SpecError

SHAPES = [(64, 64), (128, 96), (37, 51), (1, 200), (16, 16), (3, 2)]
SOURCES = ["procedural", "images", "folder"]
rng = np.random.default_rng

def image(seed=0, shape=(48, 64)): return rng([99, seed]).random((3, *shape), dtype=np.float32)

def is_image(array): return array.dtype == np.float32 and 0 <= array.min() and array.max() <= 1

def fingerprint(defects, samples):
    "Hash of what is drawn for each (index, epoch): runs in another process, too."
    hashes = {}
    for index, epoch in samples:
        abnormal, mask = defects(image(index), index, epoch)
        hashes[index, epoch] = hashlib.sha256(abnormal.tobytes() + mask.tobytes()).hexdigest()
    return hashes

@pytest.fixture
def folder(tmp_path):
    "Textures in five formats at several depths, among files that are none."
    root = tmp_path/"cloth"
    for k, name in enumerate(["a.png", "b/c.jpg", "b/d/e.jpeg", "b/f.bmp", "g.TIF"]):
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng(k).integers(0, 256, (20 + 10*k, 40, 3), dtype=np.uint8)).save(root/name)
    for name in ["readme.txt", "b/._c.jpg", ".hidden/x.png"]:
        (root/name).parent.mkdir(exist_ok=True)
        (root/name).write_bytes(b"no image")
    return root

# --- noise and masks

@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scales", [(1, 1), (4, 32), (2.5, 0.3)])
def test_noise_has_its_shape_and_range(shape, scales):
    noise = np.stack([perlin(rng(k), shape, scales) for k in range(10)])
    assert noise.shape[1:] == shape and noise.dtype == np.float32
    assert np.abs(noise).max() <= 1 + 1e-6

def test_noise_is_zero_at_lattice_points_and_smooth_between():
    noise = perlin(rng(0), (400, 400), (4, 4))
    assert np.abs(noise[[100, 200, 300]][:, [100, 200, 300]]).max() < 0.02     # half a pixel beside the point
    assert np.abs(np.diff(noise, axis=0)).max() < 0.05 and noise.std() > 0.1

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
    assert all(t.shape == (3, *shape) and is_image(t) for t in textures)

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
    recoloured = [recolour(rng(k), image()) for k in range(50)]
    assert all(is_image(r) for r in recoloured)
    assert all((r != image()).any() for r in recoloured)

# --- pairs

def make(source, folder, **settings):
    textures = folder if source == "folder" else source
    return Defects(textures, images=[image(k) for k in range(6)], **settings)

@pytest.mark.parametrize("source", SOURCES)
def test_a_pair_differs_inside_the_mask_only(source, folder):
    defects, changed = make(source, folder), []
    for epoch in range(60):
        index = epoch % 6
        clean, before = image(index), image(index)
        abnormal, mask = defects(clean, index, epoch)
        assert (clean == before).all()
        assert (abnormal[:, ~mask] == clean[:, ~mask]).all() and mask.any()
        assert is_image(abnormal) and abnormal.shape == clean.shape
        assert mask.dtype == bool and mask.shape == clean.shape[1:]
        changed.append((abnormal != clean).any(0)[mask].mean())
    assert min(changed) > 0.9

@pytest.mark.parametrize("source", SOURCES)
def test_a_sample_is_drawn_the_same_everywhere(source, folder):
    defects = make(source, folder, probability=0.8, seed=7)
    samples = [(index, epoch) for index in range(6) for epoch in range(2)]
    here = fingerprint(defects, samples)
    assert fingerprint(pickle.loads(pickle.dumps(defects)), samples[::-1]) == here
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        elsewhere = pool.apply(fingerprint, (defects, samples[::2]))
    assert elsewhere == {sample: here[sample] for sample in samples[::2]}

def test_epoch_index_and_seed_all_count():
    clean, cases = image(), [(seed, index, epoch) for seed in (0, 1) for index in (0, 1) for epoch in (0, 1)]
    drawn = {Defects(seed=seed)(clean, index, epoch)[0].tobytes() for seed, index, epoch in cases}
    assert len(drawn) == 8

def test_probability():
    clean = image()
    for index in range(20):
        abnormal, mask = Defects(probability=0)(clean, index, 0)
        assert (abnormal == clean).all() and not mask.any()
        assert abnormal is not clean and not np.shares_memory(abnormal, clean)
    hits = [Defects(probability=0.5)(clean, index, 1)[1].any() for index in range(400)]
    assert 160 < sum(hits) < 240                                # four deviations
    assert all(Defects()(clean, index, 1)[1].any() for index in range(100))

def test_the_blend_lets_through_as_much_as_asked():
    mask = np.zeros((2, 2), bool)
    mask[0] = True
    black, white = np.zeros((3, 2, 2), np.float32), np.ones((3, 2, 2), np.float32)
    blended = blend(black, white, mask, 0.25)
    assert (blended[:, 0] == 0.75).all() and (blended[:, 1] == 0).all() and blended.dtype == np.float32

class LoggedImages:
    "Images that remember which of them were read."
    def __init__(self, n): self.n, self.log = n, []
    def __len__(self): return self.n

    def image(self, i):
        self.log.append(i)
        return image(i)

def test_an_image_is_never_its_own_texture():
    for index in range(4):
        images = LoggedImages(4)
        defects = Defects("images", images=images)
        for epoch in range(60): defects(image(index), index, epoch)
        assert set(images.log) == set(range(4)) - {index}

def test_images_may_have_other_sizes():
    defects = Defects("images", images=[image(0, (10, 90)), image(1, (33, 7))])
    abnormal, _ = defects(image(), 0, 0)
    assert abnormal.shape == (3, 48, 64)

# --- folders

def test_the_folder_is_searched_and_named(folder):
    defects = Defects(folder)
    assert [p.name for p in texture_files(folder)] == ["a.png", "c.jpg", "e.jpeg", "f.bmp", "g.TIF"]
    prefix, name, files, digest = defects.source.split(":")
    assert (prefix, name, files, len(digest)) == ("folder", "cloth", "5", 12)
    assert Defects(str(folder)).source == defects.source
    assert [Defects().source, make("images", None).source] == ["procedural", "images"]

def test_the_name_of_a_folder_changes_with_its_files_not_its_position(folder, tmp_path):
    before = Defects(folder).source
    (tmp_path/"x").mkdir()
    moved = folder.rename(tmp_path/"x"/"cloth")
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
        message = str(e.value)
        assert "images" in message and "folder" in message and str(bad) in message

def test_a_folder_without_images_is_named(tmp_path):
    with pytest.raises(DataError, match="no image") as e: Defects(tmp_path)
    assert str(tmp_path) in str(e.value) and "procedural" in str(e.value)

def test_a_broken_texture_is_named(folder):
    for p in texture_files(folder): p.write_bytes(b"no image")
    with pytest.raises(DataError, match="cloth"): Defects(folder)(image(), 0, 0)

@pytest.mark.parametrize("images", [None, [], [image()]])
def test_images_need_another_image(images):
    with pytest.raises(DataError, match="two"): Defects("images", images=images)

@pytest.mark.parametrize("settings", [
    dict(probability=1.5),
    dict(probability=-0.1),
    dict(probability=float("nan")),
    dict(seed=-1),
])
def test_impossible_settings(settings):
    with pytest.raises(SpecError): Defects(**settings)

@pytest.mark.parametrize("bad", [
    np.zeros((32, 32)),
    np.zeros((32, 32, 3)),
    np.zeros((3, 8, 8), np.uint8),
    np.full((3, 8, 8), 255.),
    np.full((3, 8, 8), -0.1),
    np.full((3, 8, 8), np.nan),
])
def test_what_is_no_image_is_refused(bad):
    with pytest.raises(DataError, match="float arrays"): Defects()(bad, 0, 0)
