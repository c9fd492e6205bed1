"How images of any shape and range become squares, and what of their maps is tested."
from dataclasses import replace
import re, shutil, struct, zlib
import numpy as np
import pytest
import torch
from conftest import small_spec
from PIL import Image
from mdd_bench.data.datasets import inspect_dataset
from mdd_bench.data.images import Framing, image_oddity, load_image, shown_part, squared
from mdd_bench.data.synthetic import write_embedded
from mdd_bench.errors import DataError, SpecError
from mdd_bench.evaluation.protocols import PROTOCOLS, ProtocolEvaluator
from mdd_bench.evaluation.replicates import Replicates
from mdd_bench.running.identity import model_plans, resolve
from mdd_bench.running.run import run
from mdd_bench.running.testing import BatchPrediction, ClassTest, calibration_scores

SHAPES = [(40, 24), (24, 40), (31, 64), (64, 31), (7, 90), (32, 32)]

def gradient(shape):
    "An image whose red grows downwards and whose green grows to the right."
    y, x = np.mgrid[:shape[0], :shape[1]]
    return np.stack([200*y/shape[0], 200*x/shape[1], 0*x], -1).astype(np.uint8)

# --- squares

@pytest.mark.parametrize("shape", SHAPES)
def test_a_padded_image_keeps_its_shape_and_says_where_it_is(tmp_path, shape):
    Image.fromarray(gradient(shape)).save(tmp_path/"x.png")
    framing = Framing(64, "pad")
    seen = load_image(tmp_path/"x.png", framing)
    rows, columns = shown_part(shape, framing)
    inside = seen[rows, columns].astype(int)
    assert inside.shape[0]/inside.shape[1] == pytest.approx(shape[0]/shape[1], rel=.15)
    assert max(inside.shape[:2]) == 64
    assert inside[0, :, 0].max() < 20 and inside[-1, :, 0].min() > 150       # all of it is there
    assert inside[:, 0, 1].max() < 20 and inside[:, -1, 1].min() > 150

@pytest.mark.parametrize("shape", SHAPES)
def test_a_crop_is_the_square_in_the_middle(tmp_path, shape):
    Image.fromarray(gradient(shape)).save(tmp_path/"x.png")
    side, framing = min(shape), Framing(min(shape), "crop")
    top, left = (shape[0] - side)//2, (shape[1] - side)//2
    cut = gradient(shape)[top:top + side, left:left + side]
    assert np.array_equal(load_image(tmp_path/"x.png", framing), cut)
    assert shown_part(shape, framing) == (slice(0, side), slice(0, side))

def test_masks_go_the_way_of_their_images():
    mask = np.ones((10, 30), bool)
    assert squared(mask, "stretch", "constant") is mask
    assert squared(mask, "crop", "constant").shape == (10, 10)
    padded = squared(mask, "pad", "constant")
    assert padded.shape == (30, 30) and padded[10:20].all() and padded.sum() == 300

def test_a_way_that_does_not_exist_is_refused():
    with pytest.raises(SpecError, match="unknown resize 'shrink'"): Framing(64, "shrink")

# --- the test of a run

@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    "A dataset whose images are twice as wide as high; the squares of the embedded one are cut."
    root = write_embedded(tmp_path_factory.mktemp("wide")/"data", "smoke", classes=["gear"])
    for file in root.rglob("*.png"):
        with Image.open(file) as image:
            half = image.crop((0, image.height//4, image.width, 3*image.height//4))
        half.save(file)
    return root

def class_test(root, **fields):
    spec = small_spec(data=str(root), classes=["gear"], detector="patchcore", **fields)
    plan, = model_plans(resolve(spec))
    return ClassTest(plan, "gear", ["exact", "mvtec_3d"])

@pytest.mark.filterwarnings("ignore:look at", "ignore:.*nan for")
@pytest.mark.parametrize("scored", [False, True])
def test_what_pad_adds_is_not_tested(wide, scored):
    "Whatever a detector says beyond the image changes no number; the same within it changes them."
    def metrics(beyond, within):
        test = class_test(wide, resize="pad")
        n = len(test.table)
        maps = torch.rand((n, 64, 64), generator=torch.Generator().manual_seed(0))
        maps[:, :16], maps[:, 48:] = beyond, beyond
        maps[0, 20:24, 20:24] += within
        own = maps.amax((1, 2)).numpy() if scored else None
        test.update(BatchPrediction(list(range(n)), maps, own, {}))
        counts = np.ones((1, n), int)
        values = {name: e.result().metrics for name, e in test.evaluators.items()}
        return values, {k: v.tolist() for k, v in test.replicates.compute(counts).items()}

    plain, others, changed = metrics(0, 0), metrics(99, 0), metrics(0, 99)
    assert repr(plain) == repr(others) and repr(plain) != repr(changed)

@pytest.mark.filterwarnings("ignore:look at", "ignore:.*nan for")
@pytest.mark.parametrize("wide_images", [0, 1])
def test_own_scores_are_left_out_in_a_class_with_a_padded_test_image(tmp_path, monkeypatch, wide_images):
    "In another class they stay, and calibration images are scored as the test is."
    root = write_embedded(tmp_path/"data", "smoke", classes=["gear", "tile"])
    for file in sorted(root.glob("gear/test/good/*.png"))[:wide_images]:
        with Image.open(file) as image: image.crop((0, 0, image.width, image.height//2)).save(file)
    spec = small_spec(data=str(root), classes=["gear", "tile"], detector="patchcore", calibration=.5)
    plan, = model_plans(resolve(replace(spec, resize="pad")))

    def batches(n):
        "A batch for each image; a map is 0, a detector's own score 1 and more."
        return [BatchPrediction([i], torch.zeros(1, 64, 64), np.array([1. + i]), {}) for i in range(n)]

    def predicted(detector, plan, images, runtime): return batches(len(images))

    monkeypatch.setattr("mdd_bench.running.testing.predict_class", predicted)
    calibrated = calibration_scores(None, plan, "exact", None).groupby("cls").score.min()
    for cls, padded in dict(gear=wide_images > 0, tile=False).items():
        test = ClassTest(plan, cls, ["exact"])
        for batch in batches(len(test.table)): test.update(batch)
        scores = test.evaluators["exact"].result().scores
        assert scores.tolist() == [0 if padded else 1 + i for i in range(len(test.table))]
        assert calibrated[cls] == (0 if padded else 1)

def test_images_of_several_shapes_in_one_batch_keep_their_order(wide, tmp_path):
    root = tmp_path/"data"
    shutil.copytree(wide, root)
    tall = sorted((root/"gear/test/good").glob("*.png"))[0]
    with Image.open(tall) as image: image.transpose(Image.Transpose.ROTATE_90).save(tall)
    test = class_test(root, resize="pad")
    n = len(test.table)
    maps = torch.arange(n)[:, None, None].expand(n, 64, 64).float()
    test.update(BatchPrediction(list(range(n)), maps, None, {}))
    assert test.order == list(range(n))
    assert test.evaluators["exact"].result().scores.tolist() == list(range(n))

@pytest.mark.parametrize("resize", ["pad", "crop"])
def test_a_run_of_another_shape(wide, tmp_path, resize):
    record = run(small_spec(data=str(wide), classes=["gear"], detector="patchcore", resize=resize), tmp_path)
    stretched = run(small_spec(data=str(wide), classes=["gear"], detector="patchcore"), tmp_path)
    assert record.id != stretched.id and record.spec["resize"] == resize
    assert record.metrics != stretched.metrics and 0 < record.metrics["exact"]["mean"]["mAD"] <= 1

def test_a_crop_that_cuts_defects_off_says_so(tmp_path):
    root = write_embedded(tmp_path/"data", "smoke", classes=["gear"])
    image = sorted((root/"gear/test").glob("[!g]*/*.png"))[0]
    mask = root/"gear/ground_truth"/image.parent.name/f"{image.stem}_mask.png"
    with Image.open(image) as picture: picture.resize((256, 64)).save(image)
    edge = np.zeros((64, 256), np.uint8)
    edge[10:20, :20] = 255
    Image.fromarray(edge).save(mask)
    with pytest.warns(UserWarning, match="--resize crop cuts the defect off 1 test images of gear"):
        resolve(small_spec(data=str(root), classes=["gear"], resize="crop"))

def test_a_padded_map_is_smoothed_as_its_square(wide):
    "Wide and square images of one class must be smoothed alike."
    maps = np.random.default_rng(0).random((1, 64, 64)).astype(np.float32)
    exact = PROTOCOLS["exact"]
    whole, middle = exact.smooth(maps), exact.smooth(maps[:, 16:48])
    assert np.abs(whole[:, 28:36] - middle[:, 12:20]).max() < 1e-5

# --- values

@pytest.mark.parametrize("white, stated, dark", [
    (4080, None, True), (65535, None, False), (4080, (0, 4095), False), (65535, (0, 1), True),
])
def test_images_of_16_bits_that_are_black_or_white_are_named(tmp_path, white, stated, dark):
    root = write_embedded(tmp_path/"drawn", "smoke", classes=["gear"])
    deep = stored_as(root, tmp_path/"deep", lambda grey: grey.clip(1).astype(np.uint16)*(white//255))
    found = " ".join(inspect_dataset(deep, value_range=stated).warnings)
    assert bool(re.search("10 images of gear are nearly black or white; .*--value-range", found)) == dark

def test_a_range_does_not_reach_colours_of_16_bits(tmp_path):
    data = np.full((4, 4, 3), 4000, ">u2")
    write_png_16(tmp_path/"x.png", data)
    assert load_image(tmp_path/"x.png").max() == 4000 >> 8
    with pytest.raises(DataError, match="16 bits for each colour.*leave --value-range out"):
        load_image(tmp_path/"x.png", Framing(4, value_range=(0, 4095)))

def test_colours_of_16_bits_are_named_before_a_run(tmp_path):
    root = write_embedded(tmp_path/"drawn", "smoke", classes=["gear"])
    image = sorted(root.glob("gear/train/good/*.png"))[0]
    write_png_16(image, np.tile(3900 + np.arange(256), (256, 3, 1)).swapaxes(1, 2).astype(">u2"))
    found = " ".join(inspect_dataset(root).warnings)
    assert "nearly black" in found
    assert "values from 15 to 16: of 16 bits for each colour the upper 8 are read: save them with 8" in found
    assert "value-range" not in found           # it would be refused
    problem, = inspect_dataset(root, value_range=(0, 4095)).problems
    assert "1 images of gear have 16 bits for each colour" in problem.what and str(image) in problem.what

@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_dark_images_of_8_bits_are_named_whatever_their_transparency(tmp_path, mode):
    "A range does not reach them, so none is advised."
    root = write_embedded(tmp_path/"drawn", "smoke", classes=["gear"])
    for file in root.glob("gear/t*/*/*.png"):
        with Image.open(file) as image: dark = image.point(lambda value: value//10).convert(mode)
        if mode in ("LA", "RGBA"): dark.putalpha(image.convert("L"))
        dark.save(file)
    found = " ".join(inspect_dataset(root).warnings)
    warning = "10 images of gear are nearly black or white; .*png has values from .*: look at the images"
    assert re.search(warning, found)
    assert "value-range" not in found

def test_an_image_of_one_colour_is_named_whatever_its_transparency(tmp_path):
    image = Image.new("RGBA", (8, 8), (9, 200, 9))
    image.putalpha(Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)))
    assert image_oddity(image) == "it is of a single colour"

@pytest.mark.parametrize("mode", ["1", "P", "CMYK"])
def test_numbers_that_are_no_brightness_are_not_called_dark(tmp_path, mode):
    root = write_embedded(tmp_path/"drawn", "smoke", classes=["gear"])
    for file in root.glob("gear/t*/*/*.png"):
        with Image.open(file) as image:
            few = image.convert("L").quantize(4) if mode == "P" else image.convert(mode)
        file.unlink()
        few.save(file.with_suffix(".tif"))
    assert "black" not in " ".join(inspect_dataset(root).warnings)

def write_png_16(path, pixels):
    "A colour PNG of 16 bits by hand: Pillow writes none."
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)

def stored_as(root, target, convert):
    "A copy of a dataset whose images are converted arrays in TIFF."
    shutil.copytree(root, target)
    for file in target.glob("gear/t*/*/*.png"):
        with Image.open(file) as image: values = convert(np.asarray(image.convert("L")))
        Image.fromarray(values).save(file.with_suffix(".tif"))
        file.unlink()
    return target

KINDS = {
    "floats": ("0,1", lambda grey: grey.astype(np.float32)/255),
    "hounsfield": ("-1000,3000", lambda grey: (grey.astype(np.int32)*4000//255) - 1000),
    "12 of 16 bits": ("0,4080", lambda grey: grey.astype(np.uint16)*16),
}

@pytest.mark.parametrize("kind", KINDS)
def test_a_stated_range_gives_the_numbers_of_8_bits(tmp_path, kind):
    stated, convert = KINDS[kind]
    root = write_embedded(tmp_path/"drawn", "smoke", classes=["gear"])
    fields = dict(classes=["gear"], detector="patchcore")
    grey = stored_as(root, tmp_path/"grey", lambda grey: grey)
    deep = stored_as(root, tmp_path/"deep", convert)
    first = run(small_spec(data=str(grey), **fields), tmp_path/"out")
    second = run(small_spec(data=str(deep), value_range=stated, **fields), tmp_path/"out")
    difference = first.metrics["exact"]["mean"]["mAD"] - second.metrics["exact"]["mean"]["mAD"]
    assert abs(difference) < (.02 if kind == "hounsfield" else 1e-9)
    assert second.spec["value_range"] == [float(end) for end in stated.split(",")]
    if kind == "12 of 16 bits": return          # read without a range too, and dark
    lowest, highest = ("-[0-9]*", "[12][0-9]*") if kind == "hounsfield" else ("0[.0-9]*", "[01][.0-9]*")
    with pytest.raises(DataError, match=f"of gear hold floats, .* {lowest} to {highest}; .*--value-range"):
        resolve(small_spec(data=str(deep), **fields))

def test_what_is_no_number_is_black(tmp_path):
    values = np.full((8, 8), .5, np.float32)
    values[0, 0], values[0, 1], values[0, 2] = np.nan, np.inf, -np.inf
    Image.fromarray(values).save(tmp_path/"x.tif")
    pixels = load_image(tmp_path/"x.tif", Framing(8, value_range=(0, 1)))[..., 0]
    assert pixels[0, :3].tolist() == [0, 255, 0] and pixels[1, 1] == 128

def test_drawn_defects_have_8_bits_and_a_range_does_not_reach_them(tmp_path):
    with pytest.raises(SpecError, match="value_range with heldout:"):
        resolve(small_spec(data="heldout:embedded-v1-smoke", value_range="0,4095"))

# --- images whose mask is not known

def drawn_class(seed=0, n=12):
    "Maps that find most of their defects, with masks."
    rng = np.random.default_rng(seed)
    masks = np.zeros((n, 32, 32), bool)
    masks[n//2:, 4:12, 6:14] = True
    maps = rng.random((n, 32, 32)).astype(np.float32) + .4*masks
    labels = np.arange(n) >= n//2
    kinds = ["good" if not label else "dent" if i % 2 else "hole" for i, label in enumerate(labels)]
    return maps, None, list(masks), labels, kinds

@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=lambda protocol: protocol.name)
def test_an_image_without_a_mask_counts_for_image_metrics_only(protocol):
    maps, own, masks, labels, kinds = drawn_class()
    located = np.ones(len(maps), bool)
    located[[-1, -4]] = False
    blank = [mask if known else np.zeros_like(mask) for mask, known in zip(masks, located)]
    whole, some, left = (ProtocolEvaluator(protocol) for _ in range(3))
    whole.update(maps, own, masks, labels, kinds)
    some.update(maps, own, blank, labels, kinds, located)
    kept = np.flatnonzero(located)
    left.update(maps[kept], own, [masks[i] for i in kept], labels[kept], [kinds[i] for i in kept])
    of_all, of_some, of_left = (e.result().metrics for e in (whole, some, left))
    for name, value in of_some.items():
        if name == "mAD": continue
        assert value == (of_all if name.startswith("I-") else of_left)[name], name

def test_replicates_leave_unknown_pixels_out_too():
    maps, _, masks, labels, _ = drawn_class()
    located = np.ones(len(maps), bool)
    located[-1] = False
    some, left, scores = Replicates(), Replicates(), np.random.default_rng(1).random(len(maps))
    some.update(maps, scores, np.stack(masks)*located[:, None, None], labels, located)
    left.update(maps[:-1], scores[:-1], np.stack(masks[:-1]), labels[:-1])
    drawn = np.random.default_rng(0).integers(0, 3, (20, len(maps)))
    first, second = some.compute(drawn), left.compute(drawn[:, :-1])
    for name in ("P-AUROC", "P-AP", "AUPRO", "P-FPR95"): assert np.array_equal(first[name], second[name])
    assert not np.array_equal(first["I-AUROC"], second["I-AUROC"])

def test_a_run_with_a_mask_that_is_not_there(tmp_path):
    root = write_embedded(tmp_path/"data", "smoke", classes=["gear"])
    fields = dict(classes=["gear"], detector="patchcore")
    whole = run(small_spec(data=str(root), **fields), tmp_path/"out")
    sorted(root.rglob("*_mask.png"))[0].unlink()
    with pytest.raises(DataError, match="no mask for"): resolve(small_spec(data=str(root), **fields))
    with pytest.warns(UserWarning, match="1 of 4 anomalous images of gear have no mask"):
        record = run(small_spec(data=str(root), masks="optional", **fields), tmp_path/"out")
    assert record.id != whole.id and record.provenance["altered"]["masks_unknown"] == 1
    before, after = (r.metrics["exact"]["mean"] for r in (whole, record))
    assert before["I-AUROC"] == after["I-AUROC"] and before["P-AP"] != after["P-AP"]
    assert not np.isnan(after["mAD"])

@pytest.mark.filterwarnings("ignore:.*have no mask", "ignore:.*nan")
@pytest.mark.parametrize("good", [True, False])
def test_without_any_mask_the_image_metrics_are_left(tmp_path, good):
    root = write_embedded(tmp_path/"data", "smoke", classes=["gear"])
    for mask in root.rglob("*_mask.png"): mask.unlink()
    if not good: shutil.rmtree(root/"gear/test/good")
    protocols = list(PROTOCOLS)
    how = dict(data=str(root), masks="optional", classes=["gear"], protocols=protocols)
    spec = small_spec(detector="patchcore", **how)
    record = run(spec, tmp_path/"out")
    for name in protocols:
        mean = record.metrics[name]["mean"]
        assert np.isnan(mean["I-AUROC"]) != good and np.isnan(mean["AUPRO"]) and np.isnan(mean["mAD"])
