"The feature store: one limit, several writers, damage, a disk that fails; and never another record."
import os, signal, subprocess, sys, time
from types import SimpleNamespace
import pytest
import torch
from safetensors.torch import load_file
from mdd_bench.parts.backbone import Backbone
from mdd_bench.parts.feature_cache import (
    MANIFEST, FeatureStore, clean_features, clear_store, open_feature_cache)
from mdd_bench.running.run import run
from mdd_bench.running.runtime import Runtime
from mdd_bench.running.training import store_folder

IMAGES = torch.rand(10, 3, 8, 8, generator=torch.Generator().manual_seed(0))
KILOBYTE = 1e-6                  # of a gigabyte; an image's features take 384 bytes

class Doubling:
    "Stands in for a backbone: its one level is twice the image. It counts the images it saw."
    name, hash, layers = "doubling", "0", [0]
    def __init__(self): self.seen = 0
    def __call__(self, images):
        self.seen += len(images)
        return [(2*images).half().float()]

def open_set(root, identity="ten", limit_gb=KILOBYTE*100, backbone=None):
    "The stored features of the ten images, of which the identity says that they are others."
    def make(): return ({"image": chunk} for chunk in IMAGES.split(4))
    return open_feature_cache(backbone or Doubling(), make, 10, identity, root, limit_gb, data=identity)

def names(root): return sorted(e.about.get("data", "?") for e in FeatureStore(root).entries())

def assert_right(cache):
    index = torch.tensor([9, 0, 4, 2])
    assert torch.equal(cache.features(index, IMAGES[index])[0], clean_features(Doubling(), IMAGES[index])[0])

@pytest.mark.filterwarnings("ignore:.*RANDOM")
def test_features_do_not_depend_on_the_batch():
    "This network has other bits in other batches, unless it always sees the same number of images."
    backbone = Backbone("mobilenetv3_small_100", "random", [1, 2])
    images = torch.rand(9, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    features = clean_features(backbone, images)
    for rows in ([8], [3, 0], [2, 7, 5, 1, 0, 6, 4]):
        for level, some in zip(features, clean_features(backbone, images[rows])):
            assert torch.equal(level[rows], some)

# --- one limit

def test_least_recently_used_goes_and_nothing_in_use(tmp_path):
    "Room for two sets of 4 KB and a manifest each."
    limit = KILOBYTE*15
    for age, name in ((30, "a"), (20, "b")):
        del open_set(tmp_path, name, limit).levels
        entry = next(e for e in FeatureStore(tmp_path).entries() if e.about["data"] == name)
        os.utime(entry.folder/MANIFEST, (time.time() - age,)*2)
    open_set(tmp_path, "a", limit)                    # a use: now b is the older one
    open_set(tmp_path, "c", limit)
    assert names(tmp_path) == ["a", "c"]
    held = open_set(tmp_path, "a", limit), open_set(tmp_path, "c", limit)
    assert len(open_set(tmp_path, "d", limit)) < 10 and {"a", "c"} <= set(names(tmp_path))
    assert sum(e.size for e in FeatureStore(tmp_path).entries()) <= limit*1e9
    assert all(len(cache) == 10 for cache in held)

def test_a_part_of_a_set_is_stored_and_later_all_of_it(tmp_path):
    part = open_set(tmp_path, limit_gb=KILOBYTE*6)
    assert 0 < len(part) < 10 and not part.complete
    assert_right(part)
    stored = len(part)
    del part
    again = Doubling()
    assert len(open_set(tmp_path, limit_gb=KILOBYTE*6, backbone=again)) == stored and again.seen == 0
    assert open_set(tmp_path).complete
    assert open_set(tmp_path/"other", limit_gb=KILOBYTE) is None and not names(tmp_path/"other")

# --- damage

def flip(folder):
    content = bytearray((folder/"00.npy").read_bytes())
    content[-7] ^= 1
    (folder/"00.npy").write_bytes(content)

DAMAGE = {
    "a flipped bit": flip,
    "cut short": lambda folder: os.truncate(folder/"00.npy", 1000),
    "a level gone": lambda folder: (folder/"00.npy").unlink(),
    "no manifest": lambda folder: (folder/MANIFEST).unlink(),
    "no JSON": lambda folder: (folder/MANIFEST).write_text("{"),
    "another JSON": lambda folder: (folder/MANIFEST).write_text('{"about": 1, "files": [1]}'),
    "binary": lambda folder: (folder/MANIFEST).write_bytes(b"\xff\xfe"),
}

@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_entry_is_made_anew(tmp_path, how):
    open_set(tmp_path)
    DAMAGE[how](FeatureStore(tmp_path).entries()[0].folder)
    backbone = Doubling()
    assert_right(open_set(tmp_path, backbone=backbone))
    assert backbone.seen > 0 and names(tmp_path) == ["ten"]

# --- a folder and a disk that fail

def test_a_folder_that_cannot_be_made_is_one_warning(tmp_path):
    (tmp_path/"file").write_text("")
    with pytest.warns(UserWarning, match="going on without") as said:
        assert open_set(tmp_path/"file"/"features") is None
    assert len(said) == 1

def test_a_full_disk_is_one_warning_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*args): raise OSError(28, "No space left on device")
    monkeypatch.setattr("mdd_bench.parts.feature_cache.os.posix_fallocate", full)
    with pytest.warns(UserWarning, match="No space left on device"): assert open_set(tmp_path) is None
    assert not FeatureStore(tmp_path).entries()

def test_an_almost_full_disk_holds_a_part(tmp_path, monkeypatch):
    usage = SimpleNamespace(total=10**9, used=0, free=7000)
    monkeypatch.setattr("mdd_bench.parts.feature_cache.shutil.disk_usage", lambda path: usage)
    cache = open_set(tmp_path)
    assert 0 < len(cache) < 10
    assert_right(cache)

def test_a_failure_while_computing_leaves_nothing(tmp_path):
    class Failing(Doubling):
        def __call__(self, images):
            if self.seen > 4: raise KeyboardInterrupt
            return super().__call__(images)
    with pytest.raises(KeyboardInterrupt): open_set(tmp_path, backbone=Failing())
    assert not FeatureStore(tmp_path).entries()

# --- several processes

PROCESS = """
import sys, time
sys.path.insert(0, {tests!r})
from test_store import *
class Slow(Doubling):
    def __call__(self, images):
        time.sleep(.3)
        return super().__call__(images)
backbone = Slow()
print("ready", flush=True)
cache = open_set({root!r}, sys.argv[1], float(sys.argv[2])*KILOBYTE, backbone)
assert_right(cache)
print(backbone.seen, len(cache), flush=True)
sys.stdin.readline()
"""

@pytest.fixture
def start(tmp_path):
    "A function: a process that opens a set slowly, tells, and holds it until it is given a line."
    code = PROCESS.format(tests=os.path.dirname(__file__), root=str(tmp_path/"store"))
    started = []
    def begin(identity, kilobytes=100):
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(subprocess.Popen([sys.executable, "-c", code, identity, str(kilobytes)], **pipes))
        return started[-1]
    yield begin
    for process in started: process.kill(), process.wait()

def answer(process):
    "How many images the process computed, and how many it found or stored."
    return [int(word) for word in process.stdout.readline().split()]

def test_processes_share_one_store(start, tmp_path):
    """Two want the same set: one computes it. A third wants another one and gets what room there is left.

    Nothing of theirs goes while they live; what a killed writer left goes when the next one comes."""
    root, processes = tmp_path/"store", [start("same", 15), start("same", 15), start("other", 15)]
    for process in processes: process.stdout.readline()
    answers = [answer(process) for process in processes]
    assert sorted(seen > 1 for seen, _ in answers[:2]) == [False, True] or sum(s for s, _ in answers[:2]) < 24
    assert all(stored == 10 for _, stored in answers)
    assert names(root) == ["other", "same"] and clear_store(FeatureStore(root)) == (0, 2)
    for process in processes: process.communicate("\n")
    writer = start("killed")
    writer.stdout.readline()
    while not list(root.glob("*.part")): time.sleep(.01)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    open_set(root, "next")
    assert not list(root.glob("*.part")) and names(root) == ["next", "other", "same"]

# --- the record

def test_store_on_off_or_partial_same_record(kept_run, tmp_path, monkeypatch):
    "Bit for bit: metrics, scores, loss terms, weights; the partial store holds some of the training images."
    spec, first, _ = kept_run("rd4ad")
    total = sum(e.size for e in FeatureStore(store_folder()).entries())
    monkeypatch.setenv("MDD_BENCH_CACHE", str(tmp_path/"cache"))
    gigabytes = 250e3/1e9
    partly = run(spec, tmp_path/"partly", Runtime("cpu", cache_gb=gigabytes), keep_model=True)
    off = run(spec, tmp_path/"off", Runtime("cpu", cache_gb=0), keep_model=True)
    sources = [record.cost["features"] for record in (first, partly, off)]
    assert sources == ["cached", "partly cached", "computed"] and total > gigabytes*1e9
    for other in (partly, off):
        assert other.metrics == first.metrics
        for name in ("scores.csv", "history.csv"):
            assert (other.folder/name).read_bytes() == (first.folder/name).read_bytes()
        a, b = (load_file(r.folder/"model.safetensors") for r in (first, other))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
