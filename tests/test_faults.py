"""Faults during a run: memory that runs out, damaged files, and trainings that are stopped anywhere.

A batch that does not fit is cut, and the record says so. Nothing damaged is trusted. A restart gives the
weights of an unbroken run."""
import hashlib, os, pickle, random, signal, sys, time
from copy import deepcopy
from dataclasses import replace
from functools import cache
from multiprocessing import get_context
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from conftest import small_spec
from drawn_batches import VARIANTS, hook_batches, images, learns_from_labels, pyramid, training_batch
from test_store import DAMAGE, IMAGES, Doubling, assert_right, open_set
from mdd_bench.data.images import Framing
from mdd_bench.data.loading import ImageDataset
from mdd_bench.detectors.detector import create_detector, detector_class, list_detectors
from mdd_bench.detectors.mddnet import MDDNet
from mdd_bench.detectors.patchcore import PatchCore
from mdd_bench.detectors.rd4ad import RD4AD
from mdd_bench.errors import TrainingError
from mdd_bench.parts.feature_cache import MANIFEST, FeatureStore
from mdd_bench.reporting.tables import caption, how_it_was_made, per_class, summary, to_markdown
from mdd_bench.running import models
from mdd_bench.running import training as loop
from mdd_bench.running.identity import model_plans, resolve
from mdd_bench.running.models import make_detector
from mdd_bench.running.run import run
from mdd_bench.running.runtime import Runtime
from mdd_bench.running.store import find_damage
from mdd_bench.running.training import (
    AtOnce, StateBefore, TrainingData, add_gradients, backbone_features, is_out_of_memory, is_sealed,
    load_training_data, make_optimizer, save_sealed, seed_all, store_folder, train, train_step)

pytestmark = pytest.mark.filterwarnings("ignore:.*RANDOM", "ignore:out of memory")
TRAINED = [v for v, (name, _) in VARIANTS.items() if detector_class(name).recipe.epochs]
slow = pytest.mark.slow
every_trained_variant = pytest.mark.parametrize("variant", [
    v if v in list_detectors() or v == "mddnet, cluster" else pytest.param(v, marks=slow) for v in TRAINED])

def tensors(detector):
    "All that a detector holds: what is saved, and buffers that are not."
    return detector.state_dict() | dict(detector.named_buffers())

def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

# --- memory: what is recognised

SHORTAGES = {
    "gpu": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB."),
    "cpu": lambda: RuntimeError("CPUAllocator: can't allocate memory: you tried to allocate 64 bytes."),
    "cuda": lambda: RuntimeError("CUDA error: out of memory"),
    "windows": lambda: RuntimeError("CPUAllocator: not enough memory: you tried to allocate 64 bytes."),
    "cublas": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
    "python": lambda: MemoryError(),
    "system": lambda: OSError(12, "Cannot allocate memory"),
}

@pytest.mark.parametrize("name", SHORTAGES)
def test_a_shortage_is_recognised(name): assert is_out_of_memory(SHORTAGES[name]())

@pytest.mark.parametrize("ask", [lambda: torch.empty(10**15), lambda: np.ones(10**15)])
def test_a_real_shortage_is_recognised(ask):
    with pytest.raises((RuntimeError, MemoryError)) as caught: ask()
    assert is_out_of_memory(caught.value)

@pytest.mark.parametrize("error", [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("out of memory"),
    OSError(28, "No space left on device"), TrainingError("out of memory")])
def test_other_errors_are_not_shortages(error): assert not is_out_of_memory(error)

# --- memory: a step

def narrow(detector, most, shortage=SHORTAGES["gpu"], tries=None):
    "Make `losses` fail, after it has computed them, for more than some images; `tries` notes how many came."
    losses = detector.losses
    def failing(batch):
        number = len(batch["features"][0])
        if tries is not None: tries.append(number)
        terms = losses(batch)
        if number > most: raise shortage()
        return terms
    detector.losses = failing

@cache
def prepared(variant):
    "A detector after its first epoch of one step, so that memories are open; not to be changed."
    (name, options), backbone, anomalies = VARIANTS[variant], pyramid(), learns_from_labels(variant)
    seed_all(0)
    detector = create_detector(name, backbone, classes=2, **options)
    batches = hook_batches(backbone, detector.needs, anomalies)
    def call_hook(hook, *args):
        detector.eval()
        with torch.no_grad(): hook(*args, batches)
    call_hook(detector.prepare)
    detector.train()
    batch = training_batch(backbone, detector.needs, 0, anomalies)
    train_step(detector, batch, make_optimizer(detector, detector.recipe), detector.recipe, "float32")
    call_hook(detector.on_epoch, 0)
    return detector.train()

def one_step(variant, at_once, most=8):
    "A detector, its loss terms and torch's random state after a step; it fails above `most` images."
    detector = deepcopy(prepared(variant))
    batch = training_batch(pyramid(), detector.needs, 1, learns_from_labels(variant))
    seed_all(1)
    if most < 8: narrow(detector, most)
    terms = train_step(detector, batch, make_optimizer(detector, detector.recipe), detector.recipe, "float32",
                       at_once)
    return detector, terms, torch.get_rng_state()

@every_trained_variant
def test_failed_tries_leave_nothing(variant):
    "A step after tries with 8 and 4 images is, bit for bit, the step with 2 images from the beginning."
    begun, halved = AtOnce(8), AtOnce(8)
    begun.images = 2
    a, b = one_step(variant, begun), one_step(variant, halved, most=2)
    assert halved.parts == begun.parts == 4
    assert same(tensors(a[0]), tensors(b[0])) and same(a[1], b[1]) and torch.equal(a[2], b[2])

@every_trained_variant
def test_no_step_changes_a_large_buffer(variant):
    "They are not copied before each step."
    before = prepared(variant)
    after = one_step(variant, AtOnce(8))[0]
    kept = {id(buffer) for buffer, _ in StateBefore(after).buffers}
    old = dict(before.named_buffers())
    left_out = {name: b for name, b in after.named_buffers() if id(b) not in kept}
    assert all(torch.equal(b, old[name]) for name, b in left_out.items())

ALONE = {"rd4ad": {}, "uniad": dict(jitter=0.), "mddnet": dict(memory="none", decoder="light")}

@pytest.mark.parametrize("at_once", [1, 2, 3, 5])
@pytest.mark.parametrize("name", ALONE)
def test_parts_have_the_gradient_of_the_batch(name, at_once):
    "Where losses are means over images, and no image is seen with others: batch norms are not in training."
    seed_all(0)
    detector = create_detector(name, pyramid(), classes=2, **ALONE[name])
    detector.prepare(hook_batches(pyramid(), detector.needs))
    detector.eval()
    batch, found = training_batch(pyramid(), detector.needs, 0), []
    for number in (8, at_once):
        detector.zero_grad()
        terms = add_gradients(detector, batch, "float32", number)
        gradient = torch.cat([w.grad.flatten() for w in detector.parameters()])
        found.append((gradient, torch.stack(list(terms.values()))))
    (whole, terms), (parts, terms_of_parts) = found
    assert (parts - whole).norm() < 1e-5*whole.norm() and whole.norm() > 0
    torch.testing.assert_close(terms_of_parts, terms, rtol=1e-5, atol=1e-6)

@pytest.mark.parametrize("name", SHORTAGES)
def test_what_fits_is_remembered(name):
    detector, tries, at_once = deepcopy(prepared("rd4ad")), [], AtOnce(8)
    narrow(detector, 4, SHORTAGES[name], tries)
    batch, optimizer = training_batch(pyramid(), detector.needs, 0), make_optimizer(detector, detector.recipe)
    with pytest.warns(UserWarning, match="of memory: .* 4 images at once, not 8; the record says so") as said:
        for _ in range(3): train_step(detector, batch, optimizer, detector.recipe, "float32", at_once)
    assert tries == [8, 4, 4, 4, 4, 4, 4] and at_once.parts == 2 and len(said) == 1

def test_a_small_last_batch_is_not_cut_in_vain():
    at_once, tries = AtOnce(16), []
    def work(number):
        tries.append(number)
        if number > 1: raise MemoryError
    at_once.fit(work, 3)
    assert tries == [16, 2, 1]

def test_an_error_of_another_kind_is_not_tried_again():
    tries = []
    def work(number):
        tries.append(number)
        raise ValueError("wrong")
    with pytest.raises(ValueError, match="wrong"): AtOnce(8).fit(work, 8)
    assert tries == [8]

def test_one_image_that_does_not_fit_is_one_line():
    detector = deepcopy(prepared("rd4ad"))
    narrow(detector, 0)
    batch, optimizer = training_batch(pyramid(), detector.needs, 0), make_optimizer(detector, detector.recipe)
    weights = {name: w.clone() for name, w in detector.named_parameters()}
    line = r"^out of memory with one image at a time \(2.00 GiB could not be had\)\. use a smaller --size, "
    with pytest.raises(TrainingError, match=line):
        train_step(detector, batch, optimizer, detector.recipe, "float32")
    assert same(weights, dict(detector.named_parameters()))

def test_one_image_that_a_batch_norm_cannot_take_is_one_line():
    "At this size the narrowest place of the network has one position."
    backbone = pyramid("coarse")
    detector = create_detector("rd4ad", backbone).train()
    narrow(detector, 1)
    batch = dict(features=backbone(images(4)), path=list("abcd"))
    line = "out of memory for more images at once, and one image .* a batch norm .* use a smaller --size"
    with pytest.raises(TrainingError, match=line):
        train_step(detector, batch, make_optimizer(detector, detector.recipe), detector.recipe, "float32")

def test_features_of_defects_are_computed_in_parts_too():
    def backbone(part):
        if len(part) > 3: raise MemoryError
        return [2*part, part.mean((2, 3))]
    at_once, whole = AtOnce(10), torch.rand(10, 3, 4, 4)
    features = backbone_features(backbone, whole, at_once)
    assert at_once.images == 3 and torch.equal(features[0], 2*whole)
    assert torch.equal(features[1], whole.mean((2, 3)))

class Hungry(torch.nn.Module):
    "A detector whose losses really take memory: 64 MB for each image."
    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(()))

    def losses(self, batch):
        x = batch["features"][0]
        self.taken = torch.empty(len(x), 2**26, dtype=torch.uint8, device=x.device)
        terms = dict(size=(self.gain*x).square().mean())
        del self.taken
        return terms

def hungry_parts(device="cpu"):
    "Into how many parts two steps with eight images are cut."
    detector, at_once, recipe = Hungry().to(device), AtOnce(8), RD4AD.recipe
    optimizer = torch.optim.Adam(detector.parameters())
    batch = dict(features=[torch.ones(8, 1, device=device)], path=list("abcdefgh"))
    for _ in range(2): train_step(detector, batch, optimizer, recipe, "float32", at_once)
    return at_once.parts

def hungry_child(pipe):
    "Called in a process of its own, which may take little more than it has: room for five images."
    import resource
    taken = int(open("/proc/self/statm").read().split()[0])*resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 5*2**26 + 2**25,)*2)
    pipe.send(hungry_parts())

@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process as Linux does")
def test_a_process_with_little_memory_cuts_its_batches():
    ours, theirs = get_context("fork").Pipe()
    child = get_context("fork").Process(target=hungry_child, args=(theirs,), daemon=True)
    child.start()
    assert ours.poll(60) and ours.recv() == 2
    child.join()

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_with_little_memory_cuts_its_batches():
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 5*2**26 + 2**25)/total)
    try: assert hungry_parts("cuda") == 2
    finally: torch.cuda.set_per_process_memory_fraction(1.)

# --- memory: a run

def refuse(monkeypatch, cls, method, most):
    "Let a method of a detector's class run out of memory above some images."
    plain = getattr(cls, method)
    def failing(self, batch, *args):
        features = batch["features"] if isinstance(batch, dict) else batch
        if len(features[0]) > most: raise SHORTAGES["gpu"]()
        return plain(self, batch, *args)
    monkeypatch.setattr(cls, method, failing)

def printed(record): return to_markdown(summary([record])) + caption([record])

@pytest.mark.parametrize("setting", ["unified", "separate"])
def test_a_run_with_cut_batches_says_so(tmp_path, monkeypatch, setting):
    spec = small_spec(setting=setting, batch=4)
    whole = run(spec, tmp_path/"whole")
    assert "batch_split" not in whole.provenance and "‡" not in printed(whole)
    refuse(monkeypatch, RD4AD, "losses", 2)
    with pytest.warns(UserWarning, match="2 images at once, not 4"): record = run(spec, tmp_path/"cut")
    of_models = record.provenance["models"].values() if setting == "separate" else [record.provenance]
    assert [facts["batch_split"] for facts in of_models] == [2]*len(of_models)
    assert record.id == whole.id and len(record.history()) == len(whole.history())
    assert np.isfinite(record.history().loss).all()
    assert record.history().loss[0] == pytest.approx(whole.history().loss[0], rel=.05)
    for table in (summary([record]), per_class([record])): assert "| rd4ad † ‡ |" in to_markdown(table)
    assert "‡ Memory ran out, and batches were cut." in caption([record])
    assert "Batches cut: rd4ad (2 parts)" in how_it_was_made([record])

@pytest.mark.parametrize("setting", ["unified", "separate"])
def test_a_record_from_the_weights_of_a_cut_training_says_so(tmp_path, monkeypatch, setting):
    refuse(monkeypatch, MDDNet, "losses", 2)
    spec = small_spec(detector="mddnet", batch=4, setting=setting)
    trained = run(spec, tmp_path, keep_model=True)
    other = run(replace(spec, options=dict(fusion="ri")), tmp_path)
    assert other.provenance["trained_by"] == trained.id and "‡" in to_markdown(summary([other]))

def test_a_test_in_parts_gives_the_same_numbers(tmp_path, monkeypatch):
    spec = small_spec()
    whole = run(spec, tmp_path/"whole")
    refuse(monkeypatch, RD4AD, "predict", 1)
    with pytest.warns(UserWarning, match="1 images at once"): record = run(spec, tmp_path/"cut")
    a, b = whole.scores(), record.scores()
    assert a.path.tolist() == b.path.tolist() and np.allclose(a.score, b.score, rtol=1e-4)
    assert record.provenance["test_split"] == 6 and "batch_split" not in record.provenance
    assert "test_split" not in whole.provenance and "‡" not in printed(record)

def test_a_bank_that_does_not_fit_is_one_line(cli, tmp_path, monkeypatch):
    "Nothing can be cut there. No record is left, and the exit code is that of an error that was expected."
    monkeypatch.setattr(PatchCore, "prepare", lambda self, batches: torch.empty(10**15))
    flags = ["--data", "embedded-v1-smoke", "--classes", "gear", "--size", 64, "--weights", "lite0"]
    code, _, said = cli("run", *flags, "--layers", "1,2", "--detector", "patchcore", "--out", tmp_path/"out")
    assert code == 2 and "Traceback" not in said
    assert "out of memory (4000000000000000 bytes could not be had). use a smaller --size" in said
    assert not list(tmp_path.glob("out/runs/*/record.json"))

# --- a tiny training

class Pair:
    "Stands in for a backbone: two levels, which are means over squares of the image."
    name, hash, layers, channels, strides = "pair", "0", [0, 1], [3, 3], [4, 8]
    def __call__(self, images):
        return [torch.nn.functional.avg_pool2d(images, stride).half().float() for stride in self.strides]

@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "Ten images of 16 x 16 pixels."
    root, rng = tmp_path_factory.mktemp("tiny"), np.random.default_rng(0)
    for k in range(10): Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(root/f"{k}.png")
    table = pd.DataFrame(dict(path=[f"{k}.png" for k in range(10)], cls="a"))
    return TrainingData(ImageDataset(root, table, Framing(16), ["a"]))

EPOCHS, STEPS = 3, 3     # of each training, and of each epoch

class Stopped(Exception): pass

def train_tiny(tiny, folder=None, stop=None, save_every=0., save_last=False):
    "A SimpleNet, whose every step draws noise; stopped before a step (counted anew from each start)."
    seed_all(0)
    detector = create_detector("simplenet", Pair(), hidden=8)
    recipe = replace(detector.recipe, epochs=EPOCHS, batch=4, drops=(.5,))
    left = [stop]
    def progress(stage, done, total):
        if left[0] == 0: raise Stopped
        if left[0] is not None: left[0] -= 1
    train(detector, tiny, recipe, Runtime("cpu", progress=progress), 0, "float32", folder, "tiny", save_every,
          save_last)
    return detector

@pytest.fixture(scope="module")
def unbroken(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    return train_tiny(tiny, folder), (folder/"history.csv").read_bytes()

def resume_until_done(tiny, folder, rng):
    "Start and stop at random steps, with and without checkpoints, until an attempt ends."
    for attempt in range(100):
        stop = rng.randrange(1, EPOCHS*STEPS) if attempt == 0 or rng.random() < .3 else None
        every = 0. if rng.random() < .8 else 1e9
        try: return train_tiny(tiny, folder, stop, every, save_last=rng.random() < .5)
        except Stopped: pass
    raise AssertionError("never done")

# --- resume

def test_200_random_resume_points(tiny, unbroken, tmp_path):
    whole, history = unbroken
    rng = random.Random(0)
    for number in range(200):
        folder = tmp_path/str(number)
        folder.mkdir()
        detector = resume_until_done(tiny, folder, rng)
        assert same(tensors(detector), tensors(whole)), number
        assert (folder/"history.csv").read_bytes() == history, number

def test_the_random_resume_points_are_many(tiny, tmp_path, monkeypatch):
    "The test above would pass if nothing was ever stopped or no checkpoint was ever found."
    found, plain = [], loop.load_checkpoint
    def noting(*args):
        found.append(plain(*args))
        return found[-1]
    monkeypatch.setattr(loop, "load_checkpoint", noting)
    rng = random.Random(0)
    for number in range(20):
        (tmp_path/str(number)).mkdir()
        resume_until_done(tiny, tmp_path/str(number), rng)
    assert len(found) > 40 and set(found) >= {0, 1, 2}

def test_a_training_that_is_stopped_after_its_last_epoch(tiny, unbroken, tmp_path):
    "The models of a separate run are saved at their end, and a restart finds them done."
    train_tiny(tiny, tmp_path, save_last=True)
    again = train_tiny(tiny, tmp_path, stop=0)     # a single step would stop it
    assert same(tensors(again), tensors(unbroken[0]))

def test_what_finish_draws_does_not_depend_on_the_restart(tiny, tmp_path):
    drawn = []
    class Drawing(detector_class("simplenet")):
        def finish(self, batches): drawn.append(torch.rand(1).item())
    for save_last in (True, False):
        detector = Drawing(Pair(), hidden=8)
        train(detector, tiny, replace(detector.recipe, epochs=2, batch=4), Runtime("cpu"), folder=tmp_path,
              save_last=save_last)
    assert drawn[0] == drawn[1]

def test_a_cut_training_goes_on_in_parts(tiny, tmp_path, monkeypatch):
    "The restart has memory enough; the step sizes are those before it, and so are the weights."
    cls = detector_class("simplenet")
    with monkeypatch.context() as patch:
        refuse(patch, cls, "losses", 2)
        whole = train_tiny(tiny)
        with pytest.raises(Stopped): train_tiny(tiny, tmp_path, stop=7)
    seed_all(0)
    detector = create_detector("simplenet", Pair(), hidden=8)
    recipe = replace(detector.recipe, epochs=EPOCHS, batch=4, drops=(.5,))
    assert train(detector, tiny, recipe, Runtime("cpu"), folder=tmp_path, training="tiny") == 2
    assert same(tensors(detector), tensors(whole))

LABELLED = dict(data="embedded-v1", classes=["gear"], batch=12, labelled=3)

def train_variant(variant, folder, progress=None):
    "A detector that was trained through all of the real loop, on the embedded data."
    name, options = VARIANTS[variant]
    labels = LABELLED if "labelled" in detector_class(name).needs and learns_from_labels(variant) else {}
    spec = small_spec(**dict(detector=name, options=options, epochs=3, batch=4) | labels)
    [plan] = model_plans(resolve(spec))
    runtime = Runtime("cpu", progress=progress) if progress else Runtime("cpu")
    detector = make_detector(plan, runtime)
    data = load_training_data(detector, plan, runtime)
    assert bool(data.labelled) == bool(labels)
    train(detector, data, plan.resolved.recipe, runtime, folder=folder, save_every=0)
    return detector.eval()

@every_trained_variant
def test_every_detector_resumes_to_the_same_bits(variant, tmp_path):
    "Stopped in the second epoch and again in the third; buffers, history and predictions included."
    folders = [tmp_path/name for name in ("whole", "broken")]
    for folder in folders: folder.mkdir()
    whole, started = train_variant(variant, folders[0]), []
    def stopping(last):
        def progress(stage, done, total):
            started.append(done)
            if done == last: raise Stopped
        return progress
    steps = len((folders[0]/"history.csv").read_text().splitlines()) - 1
    for last in (steps//3 + 1, steps - 1):
        with pytest.raises(Stopped): train_variant(variant, folders[1], stopping(last))
    resumed = train_variant(variant, folders[1])
    assert started.count(1) == 1 and started[steps//3 + 1] == steps//3 + 1     # it went on after an epoch
    assert same(tensors(resumed), tensors(whole))
    assert (folders[1]/"history.csv").read_bytes() == (folders[0]/"history.csv").read_bytes()
    with torch.no_grad(): a, b = resumed(images(2)), whole(images(2))
    assert torch.equal(a.map, b.map) and resumed.facts() == whole.facts()

# --- real kills

def saving_often(monkeypatch):
    "Let runs save after every epoch."
    def saving(*args, **settings): return loop.train(*args, **settings, save_every=0)
    monkeypatch.setattr(models, "train", saving)

@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    spec = small_spec(epochs=12, batch=4)
    return spec, run(spec, tmp_path_factory.mktemp("whole"), keep_model=True)

def kill_at(spec, out, lines):
    "Run in a process of its own, and kill it when the history has some lines; whether it was at work."
    child = get_context("fork").Process(target=run, args=(spec, out, None, True), daemon=True)
    child.start()
    def length():
        paths = list(out.glob("runs/*/history.csv"))
        return len(paths[0].read_text().splitlines()) if paths else 0
    while child.is_alive() and length() < lines: time.sleep(.001)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    return child.exitcode == -signal.SIGKILL

@pytest.mark.parametrize("seed", range(5))
def test_a_killed_run_goes_on_to_the_same_record(whole_run, tmp_path, monkeypatch, seed):
    "Killed twice at random moments, and not asked whether it liked to be."
    spec, whole = whole_run
    saving_often(monkeypatch)
    rng = random.Random(seed)
    moments = sorted(rng.sample(range(2, len(whole.history())), 2))
    killed = [kill_at(spec, tmp_path, lines) for lines in moments]
    assert all(killed) and list(tmp_path.glob("runs/*/checkpoint.pt"))
    assert not list(tmp_path.glob("runs/*/record.json"))
    again = run(spec, tmp_path, keep_model=True)
    assert again.metrics == whole.metrics and again.history().equals(whole.history())
    assert same(load_file(again.folder/"model.safetensors"), load_file(whole.folder/"model.safetensors"))
    assert {p.name for p in again.folder.iterdir()} == {p.name for p in whole.folder.iterdir()}

# --- damaged checkpoints

class Trap:
    "Pickled, it is a call that makes a folder."
    def __init__(self, folder): self.folder = folder
    def __reduce__(self): return os.mkdir, (str(self.folder),)

def sealed_bytes(path, content):
    "Write bytes with their hash."
    path.write_bytes(content + hashlib.sha256(content).digest())

def flipped(path, share):
    content = bytearray(path.read_bytes())
    content[int(share*(len(content) - 1))] ^= 16
    path.write_bytes(content)

def altered(path, **changes):
    "Write a checkpoint anew, with other content; None takes a key out."
    content = torch.load(path, weights_only=True) | changes
    save_sealed(path, {name: value for name, value in content.items() if value is not None})

def other_architecture(path):
    wide = create_detector("simplenet", Pair(), hidden=16)
    altered(path, detector=wide.state_dict(), optimizer=make_optimizer(wide, wide.recipe).state_dict())

def one_group(path):
    content = torch.load(path, weights_only=True)["optimizer"]
    altered(path, optimizer=content | dict(param_groups=content["param_groups"][:1]))

CHECKPOINTS = {
    "empty": (lambda p: p.write_bytes(b""), "does not have its hash"),
    "one byte": (lambda p: p.write_bytes(b"x"), "does not have its hash"),
    "zeros": (lambda p: p.write_bytes(bytes(p.stat().st_size)), "does not have its hash"),
    "cut short": (lambda p: os.truncate(p, p.stat().st_size//2), "does not have its hash"),
    "a byte short": (lambda p: os.truncate(p, p.stat().st_size - 1), "does not have its hash"),
    "a byte more": (lambda p: p.write_bytes(p.read_bytes() + b"x"), "does not have its hash"),
    "first byte": (lambda p: flipped(p, 0), "does not have its hash"),
    "a byte in the middle": (lambda p: flipped(p, .5), "does not have its hash"),
    "a byte of the hash": (lambda p: flipped(p, 1), "does not have its hash"),
    "only a hash": (lambda p: sealed_bytes(p, b""), "not a checkpoint"),
    "text": (lambda p: sealed_bytes(p, b"hello"), "not a checkpoint"),
    "a list": (lambda p: save_sealed(p, [1, 2]), "not a checkpoint"),
    "no epoch": (lambda p: altered(p, epoch=None), "not a checkpoint"),
    "no detector": (lambda p: altered(p, detector=None), "not a checkpoint"),
    "no optimizer": (lambda p: altered(p, optimizer=None), "not a checkpoint"),
    "no training": (lambda p: altered(p, training=None), "not a checkpoint"),
    "no number at once": (lambda p: altered(p, at_once=None), "not a checkpoint"),
    "no number of epochs": (lambda p: altered(p, epoch="two"), "invalid literal"),
    "another training": (lambda p: altered(p, training="other"), "of another training"),
    "another architecture": (other_architecture, "of another detector"),
    "another optimizer": (one_group, "parameter groups"),
    "a trap, bare": (lambda p: sealed_bytes(p, pickle.dumps(Trap(p.parent/"trapped"), 2)), "checkpoint"),
    "a trap, saved": (lambda p: save_sealed(p, Trap(p.parent/"trapped")), "not a checkpoint"),
    "a trap, inside": (lambda p: altered(p, epoch=Trap(p.parent/"trapped")), "not a checkpoint"),
}

@pytest.mark.parametrize("how", CHECKPOINTS)
def test_a_damaged_checkpoint_is_set_aside(tiny, unbroken, tmp_path, how):
    "A warning names the file and the reason, no code in it runs, and the training gives the same as ever."
    damage, reason = CHECKPOINTS[how]
    with pytest.raises(Stopped): train_tiny(tiny, tmp_path, stop=2*STEPS + 1)
    path = tmp_path/"checkpoint.pt"
    damage(path)
    content = path.read_bytes()
    with pytest.warns(UserWarning, match=f"{path}: .*{reason}.* renamed to checkpoint.damaged.pt"):
        detector = train_tiny(tiny, tmp_path)
    assert same(tensors(detector), tensors(unbroken[0]))
    assert (tmp_path/"history.csv").read_bytes() == unbroken[1]
    assert (tmp_path/"checkpoint.damaged.pt").read_bytes() == content and not (tmp_path/"trapped").exists()

def test_the_trap_is_one(tmp_path):
    pickle.loads(pickle.dumps(Trap(tmp_path/"trapped")))
    assert (tmp_path/"trapped").is_dir()

def test_every_flipped_bit_is_noticed(tmp_path):
    path, rng = tmp_path/"x.pt", random.Random(0)
    save_sealed(path, dict(epoch=1, weights=torch.rand(100)))
    sound = path.read_bytes()
    for _ in range(300):
        content = bytearray(sound)
        content[rng.randrange(len(sound))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        assert not is_sealed(path)
    path.write_bytes(sound)
    assert is_sealed(path) and torch.load(path, weights_only=True)["epoch"] == 1

def test_damaged_checkpoints_do_not_pile_up(tiny, tmp_path):
    for _ in range(3):
        (tmp_path/"checkpoint.pt").write_bytes(b"damaged")
        with pytest.warns(UserWarning, match="set|renamed"):
            with pytest.raises(Stopped): train_tiny(tiny, tmp_path, stop=1)
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint.damaged.pt", "history.csv"}

def test_a_shortage_while_loading_is_no_damage(tiny, unbroken, tmp_path, monkeypatch):
    with pytest.raises(Stopped): train_tiny(tiny, tmp_path, stop=7)
    def short(*args, **settings): raise SHORTAGES["cpu"]()
    with monkeypatch.context() as patch:
        patch.setattr(loop.torch, "load", short)
        with pytest.raises(TrainingError, match="out of memory"): train_tiny(tiny, tmp_path)
    assert (tmp_path/"checkpoint.pt").is_file()
    assert same(tensors(train_tiny(tiny, tmp_path)), tensors(unbroken[0]))

def test_a_run_leaves_no_damaged_checkpoint(whole_run, tmp_path, monkeypatch):
    "Once the record is there, nobody needs it."
    spec, whole = whole_run
    saving_often(monkeypatch)
    assert kill_at(spec, tmp_path, 10)
    [path] = tmp_path.glob("runs/*/checkpoint.pt")
    flipped(path, .5)
    with pytest.warns(UserWarning, match="renamed to checkpoint.damaged.pt"):
        again = run(spec, tmp_path, keep_model=True)
    assert again.metrics == whole.metrics and not list(again.folder.glob("checkpoint*"))

def test_a_checkpoint_of_another_spec_is_not_used(tmp_path, monkeypatch):
    "Copied into the folder of a run by hand, with a right hash and the right shapes."
    saving_often(monkeypatch)
    def stop_at_the_third_step(stage, done, total):
        if (stage, done) == ("train", 3): raise Stopped
    spec = small_spec(epochs=3)
    whole = run(replace(spec, seed=1), tmp_path/"whole")
    with pytest.raises(Stopped): run(spec, tmp_path/"first", Runtime("cpu", progress=stop_at_the_third_step))
    [path] = (tmp_path/"first").glob("runs/*/checkpoint.pt")
    folder = tmp_path/"second"/"runs"/whole.id
    folder.mkdir(parents=True)
    path.rename(folder/"checkpoint.pt")
    with pytest.warns(UserWarning, match="of another training"):
        record = run(replace(spec, seed=1), tmp_path/"second")
    assert record.metrics == whole.metrics

# --- a damaged history

@pytest.mark.parametrize("damage", [b"\0"*40, b"0,1,nonsense,3,4\n", b"0,1", b"\xff\xfe,,\n"])
def test_a_damaged_history_costs_its_lines_only(tiny, unbroken, tmp_path, damage):
    with pytest.raises(Stopped): train_tiny(tiny, tmp_path, stop=STEPS + 1)
    with (tmp_path/"history.csv").open("ab") as file: file.write(damage)
    with pytest.warns(UserWarning, match="history.csv: lines that are not numbers were dropped"):
        detector = train_tiny(tiny, tmp_path)
    assert same(tensors(detector), tensors(unbroken[0]))
    assert (tmp_path/"history.csv").read_bytes() == unbroken[1]

def test_a_restart_that_is_killed_keeps_the_history(tiny, tmp_path, monkeypatch):
    "It is written anew beside the old one."
    with pytest.raises(Stopped): train_tiny(tiny, tmp_path, stop=STEPS + 1)
    before = (tmp_path/"history.csv").read_bytes()
    def killed(self, row): raise Stopped
    monkeypatch.setattr(loop.History, "write", killed)
    with pytest.raises(Stopped): train_tiny(tiny, tmp_path)
    assert (tmp_path/"history.csv").read_bytes() == before

# --- damaged features

@pytest.mark.parametrize("how", ["a flipped bit", *(pytest.param(d, marks=slow) for d in list(DAMAGE)[1:])])
def test_damaged_features_give_the_same_record(kept_run, tmp_path, monkeypatch, how):
    spec, first, _ = kept_run("rd4ad")
    monkeypatch.setenv("MDD_BENCH_CACHE", str(tmp_path/"cache"))
    run(spec, tmp_path/"one")
    entries = FeatureStore(store_folder()).entries()
    for entry in entries: DAMAGE[how](entry.folder)
    again = run(spec, tmp_path/"two", keep_model=True)
    assert again.metrics == first.metrics and again.cost["features"] == "cached"
    assert (again.folder/"scores.csv").read_bytes() == (first.folder/"scores.csv").read_bytes()
    assert same(load_file(again.folder/"model.safetensors"), load_file(first.folder/"model.safetensors"))
    assert len(entries) == len(FeatureStore(store_folder()).entries()) and find_damage(again.folder) is None

def test_no_flipped_bit_of_a_manifest_gives_other_features(tmp_path):
    "Whichever it is, the features are right: from the store, or made anew."
    open_set(tmp_path)
    sound, computed = (FeatureStore(tmp_path).entries()[0].folder/MANIFEST).read_bytes(), 0
    for position in range(len(sound)):
        content = bytearray(sound)
        content[position] ^= 1 << position % 8
        (FeatureStore(tmp_path).entries()[0].folder/MANIFEST).write_bytes(content)
        backbone = Doubling()
        assert_right(open_set(tmp_path, backbone=backbone))
        computed += backbone.seen >= len(IMAGES)
    assert 0 < computed < len(sound)
