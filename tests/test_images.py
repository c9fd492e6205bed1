"What a viewer shows is what is read; what could be seen in several ways is refused by name."
import shutil, struct
import numpy as np
import pytest
from PIL import Image
from mdd_bench.data.catalog import digest, verify
from mdd_bench.data.images import image_size, load_image, load_mask, mask_oddity, read_image
from mdd_bench.data.layouts import read_catalog
from mdd_bench.data.synthetic import write_embedded
from mdd_bench.errors import DataError, SpecError, TrainingError
from mdd_bench.evaluation.metrics import UndefinedMetric
from mdd_bench.running.identity import resolve
from mdd_bench.running.run import run
from conftest import small_spec

EXIF = 0x0112     # the tag of the orientation
STORED = {        # how a camera stores a picture that a viewer turns as the number says
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}

def turned(path, number, into=None):
    "Store a picture as a camera does that was held in another way."
    exif = Image.Exif()
    exif[EXIF] = number
    stored = np.ascontiguousarray(STORED[number](np.asarray(Image.open(path))))
    Image.fromarray(stored).save(into or path, exif=exif)
    return into or path

@pytest.fixture
def photo(tmp_path):
    "A picture of 12 x 20 random pixels, and its file."
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path/"photo.png")
    return pixels, tmp_path/"photo.png"

# --- orientation

@pytest.mark.parametrize("ending", ["png", "tif"])
@pytest.mark.parametrize("number", STORED)
def test_every_orientation_is_seen_upright(photo, tmp_path, number, ending):
    pixels, path = photo
    path = turned(path, number, tmp_path/f"turned.{ending}")
    assert np.array_equal(load_image(path), pixels) and image_size(path) == (12, 20)
    assert digest(path)[:2] == (20, 12)

GREY = np.random.default_rng(1).integers(0, 65536, (12, 20)).astype(np.uint16)
PIXELS = {
    "L": (GREY >> 8).astype(np.uint8), "I;16": GREY, "RGB": np.stack([GREY >> 8, GREY & 255, GREY//257], -1),
    "RGBA": np.stack([GREY >> 8, GREY & 255, GREY//257, 255 - (GREY >> 8)], -1),
}

@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
@pytest.mark.parametrize("mode", PIXELS)
@pytest.mark.parametrize("number", STORED)
def test_every_orientation_of_every_tiff(tmp_path, number, mode, compression):
    "Pillow maps a raw file into memory with the size that it has after the turn."
    pixels = PIXELS[mode] if mode == "I;16" else PIXELS[mode].astype(np.uint8)
    exif = Image.Exif()
    exif[EXIF] = number
    path = tmp_path/"turned.tif"
    stored = np.ascontiguousarray(STORED[number](pixels))
    Image.fromarray(stored).save(path, exif=exif, compression=compression)
    image = read_image(path)
    assert image.mode == mode and np.array_equal(np.asarray(image), pixels)
    assert image_size(path) == (12, 20) and digest(path)[:2] == (20, 12)

def test_a_photo_that_is_turned_has_another_content_and_the_same_as_its_upright_copy(photo, tmp_path):
    upright = digest(photo[1])
    assert digest(turned(photo[1], 6, tmp_path/"turned.png")) == upright
    Image.fromarray(photo[0]).rotate(90, expand=True).save(tmp_path/"without.png")
    assert digest(tmp_path/"without.png")[2] != upright[2]

def test_a_dataset_of_turned_photos_gives_the_numbers_of_the_upright_ones(tmp_path):
    upright = write_embedded(tmp_path/"upright", "smoke", classes=["gear"])
    lying = shutil.copytree(upright, tmp_path/"lying")
    for path in sorted(lying.glob("gear/t*/*/*.png")): turned(path, 6)
    spec = dict(classes="gear", detector="patchcore")
    first = run(small_spec(data=str(upright), **spec), tmp_path/"out")
    second = run(small_spec(data=str(lying), **spec), tmp_path/"out")
    assert first.metrics == second.metrics

# --- masks

def layer(mask, painted=255):
    "White paint on a transparent layer."
    pixels = np.full((*mask.shape, 4), painted, np.uint8)
    pixels[..., 3] = 255*mask
    return Image.fromarray(pixels)

def palette(mask):
    image = Image.fromarray(mask.astype(np.uint8), "P")
    image.putpalette([0, 0, 0, 200, 0, 0])
    return image

MASKS = {
    "black and white": Image.fromarray, "numbers": lambda m: Image.fromarray(2*m.astype(np.uint8)),
    "16 bits": lambda m: Image.fromarray(m.astype(np.uint16)*65535), "palette": palette, "layer": layer,
    "grey layer": lambda m: layer(m).convert("LA"), "colours": lambda m: palette(m).convert("RGB"),
    "CMYK": lambda m: Image.fromarray(255*m.astype(np.uint8)).convert("RGB").convert("CMYK"),
}

@pytest.mark.parametrize("kind", MASKS)
def test_a_mask_is_what_a_person_sees(tmp_path, kind):
    mask = np.zeros((20, 30), bool)
    mask[3:9, 4:20] = True
    path = tmp_path/("mask.tif" if kind == "CMYK" else "mask.png")
    MASKS[kind](mask).save(path)
    assert np.array_equal(load_mask(path), mask) and not mask_oddity(read_image(path))

@pytest.mark.parametrize("quality", [75, 95])
def test_a_mask_as_jpeg_marks_what_is_nearer_to_white(tmp_path, quality):
    mask = np.zeros((64, 64), bool)
    mask[10:31, 12:50] = True
    Image.fromarray(255*mask.astype(np.uint8)).save(tmp_path/"mask.jpg", quality=quality)
    assert np.array_equal(load_mask(tmp_path/"mask.jpg"), mask)

def test_a_colour_that_is_declared_transparent_marks_nothing(tmp_path):
    mask = np.full((8, 8), 255, np.uint8)
    mask[2:4, 2:4] = 128
    Image.fromarray(mask).save(tmp_path/"mask.png", transparency=255)
    assert load_mask(tmp_path/"mask.png").sum() == 4

def test_a_photo_as_jpeg_among_the_masks_may_be_wrong(tmp_path):
    Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (64, 1))).save(tmp_path/"photo.jpg")
    assert "like a photo" in mask_oddity(read_image(tmp_path/"photo.jpg"))

ODD = {
    "marks nothing": np.zeros((20, 20), np.uint8),
    "marks 96% of its image": np.pad(np.zeros((4, 4), np.uint8), 8, constant_values=255),
    "many grey levels": np.pad(np.arange(256, dtype=np.uint8).reshape(16, 16), 8),
}

@pytest.mark.parametrize("words", ODD)
def test_a_mask_that_looks_wrong_is_named_in_a_run(tmp_path, words):
    root = write_embedded(tmp_path/"data", "smoke", classes=["gear"])
    mask = sorted(root.glob("gear/ground_truth/*/*.png"))[0]
    with Image.open(mask) as image: size = image.size
    Image.fromarray(ODD[words]).resize(size, Image.Resampling.NEAREST).save(mask)
    warning = f"look at the masks of gear, 1 may be wrong; for example {mask}: it .*{words}"
    with pytest.warns(UserWarning, match=warning):
        verify(read_catalog(root))

def test_an_image_of_one_level_is_named(tmp_path):
    root = write_embedded(tmp_path/"data", "smoke", classes=["gear"])
    image = sorted(root.glob("gear/train/good/*.png"))[0]
    Image.new("RGB", Image.open(image).size, (7, 7, 7)).save(image)
    warning = "look at the images of gear, 1 may be wrong; .*: it is of a single colour"
    with pytest.warns(UserWarning, match=warning):
        verify(read_catalog(root))

# --- refused by name

def floats(path, pixels):
    Image.fromarray(pixels[..., 0].astype(np.float32)/255).save(path.with_suffix(".tif"))
def numbers(path, pixels):
    Image.fromarray(pixels[..., 0].astype(np.int32)*1000).save(path.with_suffix(".tif"))
def pages(path, pixels):
    image = Image.fromarray(pixels)
    image.save(path.with_suffix(".tif"), save_all=True, append_images=[image])
def moving(path, pixels):
    image = Image.fromarray(pixels)
    image.save(path, save_all=True, append_images=[Image.fromarray(255 - pixels)])
def cut(path, pixels):
    Image.fromarray(pixels).save(path)
    path.write_bytes(path.read_bytes()[:300])
def nothing(path, pixels): path.touch()
def text(path, pixels): path.write_text("no picture")

REFUSED = {
    floats: "holds floats.*say it with --value-range", numbers: "holds floats, signed or 32-bit numbers",
    pages: "has 2 pages. save the page that is meant", moving: "has 2 pages",
    cut: "unreadable image", nothing: "unreadable image", text: "unreadable image",
}

@pytest.mark.parametrize("write", REFUSED, ids=lambda write: write.__name__)
def test_what_cannot_be_read_in_one_way_is_refused_by_name(photo, tmp_path, write):
    write(tmp_path/"x.png", photo[0])
    (path,) = tmp_path.glob("x.*")
    with pytest.raises(DataError, match=REFUSED[write]) as refusal: load_image(path)
    assert str(path) in str(refusal.value)

def write_tiff(path, values, order="<", kind="u2", white=65535):
    "Write a grey TIFF by hand, in either byte order; `white` is 0 where 0 stands for white, None: not told."
    height, width = values.shape
    data = values.astype(order + kind)
    tags = {256: width, 257: height, 258: 8*data.itemsize, 259: 1, 262: int(white != 0), 273: 0, 277: 1,
            278: height, 279: data.nbytes, 339: 3 if kind[0] == "f" else 1}
    if white is None: del tags[262]
    tags[273] = 8 + 2 + len(tags)*12 + 4
    entries = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = struct.pack(order + "2sHIH", b"II" if order == "<" else b"MM", 42, 8, len(tags))
    path.write_bytes(head + entries + bytes(4) + data.tobytes())

@pytest.mark.parametrize("order", "<>")
def test_a_tiff_of_16_bits_in_either_byte_order(tmp_path, order):
    values = np.arange(64).reshape(8, 8)*1000
    write_tiff(tmp_path/"x.tif", values, order)
    assert digest(tmp_path/"x.tif").oddity == ""
    assert np.array_equal(load_image(tmp_path/"x.tif")[..., 0], np.rint(values/257))
    assert load_mask(tmp_path/"x.tif").sum() == 63

@pytest.mark.parametrize("kind", ["u1", "u2"])
def test_a_tiff_that_stores_white_as_0_is_seen_as_a_viewer_shows_it(tmp_path, kind):
    most = 2**(8*int(kind[1])) - 1
    values = np.arange(64).reshape(8, 8)*(most//64)
    write_tiff(tmp_path/"black.tif", values, kind=kind)
    write_tiff(tmp_path/"white.tif", most - values, kind=kind, white=0)
    assert np.array_equal(load_image(tmp_path/"white.tif"), load_image(tmp_path/"black.tif"))
    assert digest(tmp_path/"white.tif") == digest(tmp_path/"black.tif")
    assert np.array_equal(load_mask(tmp_path/"white.tif"), values > 0)

def test_floats_that_store_white_as_0_are_refused_and_what_says_nothing_is_not(tmp_path):
    values = np.arange(64).reshape(8, 8)/64
    write_tiff(tmp_path/"x.tif", values, kind="f4", white=0)
    with pytest.raises(DataError, match="x.tif holds floats, and 0 is white .*save it with 0 as black"):
        load_image(tmp_path/"x.tif")
    write_tiff(tmp_path/"y.tif", values, kind="f4", white=None)
    assert np.array_equal(np.asarray(read_image(tmp_path/"y.tif")), values.astype(np.float32))

def test_the_reason_of_an_unreadable_file_does_not_name_it_twice(tmp_path):
    nothing(tmp_path/"x.png", None)
    with pytest.raises(DataError, match="x.png .cannot identify image file.. replace"):
        read_image(tmp_path/"x.png")

@pytest.mark.parametrize("number", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_turns_nothing(photo, tmp_path, number):
    exif = Image.Exif()
    exif[EXIF] = number
    Image.fromarray(photo[0]).save(tmp_path/"x.png", exif=exif)
    assert load_image(tmp_path/"x.png").shape[:2] == image_size(tmp_path/"x.png") == (12, 20)

@pytest.mark.parametrize("told", ["lots", "nan", "0"])
def test_a_limit_that_is_no_number_is_not_blamed_on_the_image(photo, monkeypatch, told):
    monkeypatch.setenv("MDD_BENCH_MEGAPIXELS", told)
    with pytest.raises(SpecError, match=f"MDD_BENCH_MEGAPIXELS is '{told}'. give a number"):
        read_image(photo[1])

def test_a_large_image_is_read_and_the_limit_can_be_stated(tmp_path, monkeypatch):
    Image.new("1", (20_000, 9_500)).save(tmp_path/"large.png")      # 190 megapixels, more than Pillow allows
    assert digest(tmp_path/"large.png")[:2] == (20_000, 9_500)
    monkeypatch.setenv("MDD_BENCH_MEGAPIXELS", "100")
    with pytest.raises(DataError, match="has 190 megapixels, more than 100. .*MDD_BENCH_MEGAPIXELS"):
        digest(tmp_path/"large.png")

# --- faults of a whole dataset

def test_a_class_without_good_test_images_is_named_before_the_first_run(tmp_path):
    root = write_embedded(tmp_path/"data", "smoke", classes=["gear", "tile"])
    shutil.rmtree(root/"gear"/"test"/"good")
    with pytest.warns(UndefinedMetric, match="gear has no good test images: metrics that need them are nan"):
        resolve(small_spec(data=str(root)))

def test_a_name_that_papermill_takes_for_a_number_says_so(tmp_path):
    write_embedded(tmp_path/"data", "smoke", classes=["gear"])
    (tmp_path/"data"/"gear").rename(tmp_path/"data"/"01")
    with pytest.raises(DataError, match="unknown class '1'. Did you mean '01'. .papermill takes it for"):
        read_catalog(tmp_path/"data", ["1"])

def test_a_batch_norm_with_a_single_value_says_what_to_change(tmp_path):
    spec = small_spec(classes="gear", size=32, batch=1, layers=None)
    with pytest.raises(TrainingError, match="a single value for each channel. use a larger batch"):
        run(spec, tmp_path)
