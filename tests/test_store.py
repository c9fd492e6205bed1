"The feature store: one limit, several writers, damage, a disk that fails; and never another record."
import os, time
from multiprocessing import get_context
from types import SimpleNamespace
import pytest
import torch
from safetensors.torch import load_file
from mdd_bench.data.catalog import cache_dir
from mdd_bench.data.synthetic import write_embedded
from mdd_bench.parts import feature_cache
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

@pytest.mark.filterwarnings("ignore:.*no room for all")
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

def test_each_entry_is_looked_at_a_few_times_however_many_there_are(tmp_path, monkeypatch):
    looked = []
    read_entry = feature_cache.read_entry
    def counting(folder):
        looked.append(folder.name)
        return read_entry(folder)
    for number in range(12): del open_set(tmp_path, f"set {number}").levels
    monkeypatch.setattr(feature_cache, "read_entry", counting)
    open_set(tmp_path, "set 0")
    assert max(map(looked.count, set(looked))) <= 4

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
        for name in ("a", "b"): assert open_set(tmp_path/"file"/"features", name) is None
    assert len(said) == 1

def test_a_full_disk_is_one_warning_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*args): raise OSError(28, "No space left on device")
    monkeypatch.setattr("mdd_bench.parts.feature_cache.os.posix_fallocate", full)
    with pytest.warns(UserWarning, match="No space left on device"): assert open_set(tmp_path) is None
    assert not FeatureStore(tmp_path).entries()

def test_an_almost_full_disk_holds_a_part(tmp_path, monkeypatch):
    usage = SimpleNamespace(total=10**9, used=0, free=7000)
    monkeypatch.setattr("mdd_bench.parts.feature_cache.shutil.disk_usage", lambda path: usage)
    with pytest.warns(UserWarning, match="no room for all"): cache = open_set(tmp_path)
    assert 0 < len(cache) < 10
    assert_right(cache)

def test_a_failure_while_computing_leaves_nothing(tmp_path):
    class Failing(Doubling):
        def __call__(self, images):
            if self.seen > 4: raise KeyboardInterrupt
            return super().__call__(images)
    with pytest.raises(KeyboardInterrupt): open_set(tmp_path, backbone=Failing())
    assert not FeatureStore(tmp_path).entries()

def test_a_writer_that_is_done_leaves_the_next_one_alone(tmp_path, monkeypatch):
    "Another process may set the new entry aside and begin it anew at once."
    opened, begun = feature_cache.FeatureCache, []

    def opened_late(folder, *rest):
        begun.append(folder.with_name(folder.name + feature_cache.UNFINISHED))
        begun[0].mkdir()
        return opened(folder, *rest)

    monkeypatch.setattr(feature_cache, "FeatureCache", opened_late)
    assert_right(open_set(tmp_path))
    assert begun[0].is_dir()

def test_commands_go_on_without_a_cache_folder(cli, tmp_path, monkeypatch):
    "Digests are computed again, and the store is empty."
    data = write_embedded(tmp_path/"data", "smoke", classes=["gear"])
    (tmp_path/"file").write_text("")
    monkeypatch.setenv("MDD_BENCH_CACHE", str(tmp_path/"file"/"cache"))
    for command in (["datasets", data], ["cache"], ["cache", "--clear"]):
        code, _, problems = cli(*command)
        assert (code, problems) == (0, "")

def test_a_user_without_a_home_has_a_folder_that_cannot_be_made(monkeypatch):
    def homeless(path): raise RuntimeError("Could not determine home directory.")
    monkeypatch.setattr("mdd_bench.data.catalog.Path.expanduser", homeless)
    with pytest.raises(OSError): (cache_dir()/"features").mkdir(parents=True)

def test_cache_lists_and_clears(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("MDD_BENCH_CACHE", str(tmp_path))
    held, _ = open_set(store_folder(), "held"), open_set(store_folder(), "idle")
    del _
    code, listed, _ = cli("cache")
    assert code == 0 and "held" in listed and "idle" in listed and "10 of 10" in listed
    code, cleared, _ = cli("cache", "--clear")
    assert code == 0 and "1 in use were kept" in cleared and names(store_folder()) == ["held"]
    assert_right(held)

# --- several processes

class Slow(Doubling):
    def __call__(self, images):
        time.sleep(.1)
        return super().__call__(images)

def open_slowly(root, identity, pipe):
    "Open a set, tell how many images were computed and are stored, and hold it until something is sent."
    backbone = Slow()
    cache = open_set(root, identity, KILOBYTE*15, backbone)
    assert_right(cache)
    pipe.send((backbone.seen, len(cache)))
    pipe.recv()

@pytest.fixture
def start(tmp_path):
    "A function: a process that runs `open_slowly`, and the pipe to it."
    started, forking = [], get_context("fork")     # a fresh process would import torch for seconds
    def begin(identity):
        ours, theirs = forking.Pipe()
        process = forking.Process(target=open_slowly, args=(tmp_path/"store", identity, theirs), daemon=True)
        process.start()
        started.append(process)
        return process, ours
    yield begin
    for process in started:
        process.kill()
        process.join()

def test_processes_share_one_store(start, tmp_path):
    """Of two that want the same set one computes it, while a third writes another one under the same limit.

    Nothing of theirs goes while they live; what a killed writer left goes when the next one comes."""
    root = tmp_path/"store"
    started = [start(identity) for identity in ("same", "same", "other")]
    answers = [pipe.recv() for _, pipe in started]
    assert sorted(seen >= 12 for seen, _ in answers) == [False, True, True]
    assert all(stored == 10 for _, stored in answers)
    assert names(root) == ["other", "same"] and clear_store(FeatureStore(root)) == (0, 2)
    for process, _ in started:
        process.kill()
        process.join()
    writer, _ = start("killed")
    while not list(root.glob("*.part")): time.sleep(.01)
    writer.kill()
    writer.join()
    open_set(root, "next", KILOBYTE*15)
    assert not list(root.glob("*.part")) and "next" in names(root) and len(names(root)) == 2
    removed, kept = clear_store(FeatureStore(root))
    assert removed > 8000 and kept == 0

# --- the record

def test_store_on_off_or_partial_same_record(kept_run, tmp_path, monkeypatch):
    "Bit for bit: metrics, scores, loss terms, weights; the partial store holds some of the training images."
    spec, first, _ = kept_run("rd4ad")
    total = sum(e.size for e in FeatureStore(store_folder()).entries())
    monkeypatch.setenv("MDD_BENCH_CACHE", str(tmp_path/"cache"))
    gigabytes = 90e3/1e9
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
