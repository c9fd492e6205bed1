"""The bank: greedy picks by the plain algorithm, projections and batches, nearest neighbours by brute force,
the study that times them."""
import json
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from mdd_bench.errors import SpecError
from mdd_bench.parts import memory
from mdd_bench.parts.bank import coreset, how_many, k_centres, nearest, project, take
from mdd_bench.running.study import load_study
from mdd_bench.running.sweep import execute_study

def noise(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))

def plain(x, k):
    """Greedy k-centre as it is written down, in double precision, from the row farthest from the mean;
    ties to the lowest row."""
    x = x.double().numpy()
    chosen = [int(((x - x.mean(0))**2).sum(1).argmax())]
    far = ((x - x[chosen[0]])**2).sum(1)
    while len(chosen) < k:
        chosen.append(int(far.argmax()))
        far = np.minimum(far, ((x - x[chosen[-1]])**2).sum(1))
    return chosen

SETS = dict(
    noise=noise(700, 20),
    clusters=torch.cat([noise(300, 8, s)*.05*s + 3*noise(1, 8, 40 + s) for s in range(1, 4)]),
    line=noise(400, 1),
    shifted=noise(500, 5) + 50,
    few=noise(7, 3),
)

@pytest.mark.parametrize("block", [1, 2, 17, 1024])
@pytest.mark.parametrize("name", SETS)
def test_the_picks_are_the_plain_algorithms(name, block):
    x = SETS[name] - SETS[name].mean(0)
    k = min(len(x), 30 if name == "line" else 150)
    assert k_centres(x, k, block).tolist() == plain(x, k)

@pytest.mark.parametrize("block", [1, 3, 10, 1024])
def test_ties_go_to_the_lowest_row(block):
    "A lattice: nearly all distances are equal, and exact."
    x = torch.cartesian_prod(*[torch.arange(-2., 3.)]*3)
    assert k_centres(x, 60, block).tolist() == plain(x, 60)

def test_half_precision_rows_are_chosen_as_they_are():
    x = noise(600, 12).half()
    assert k_centres(x, 100).tolist() == plain(x.float(), 100)

def test_no_row_twice_and_none_that_is_covered():
    assert len(k_centres(torch.full((40, 4), 3.), 10)) == 1
    assert len(k_centres(torch.zeros(40, 4), 10)) == 1
    doubled = noise(30, 4).repeat(3, 1)
    assert sorted(x % 30 for x in k_centres(doubled, 90).tolist()) == list(range(30))
    assert sorted(k_centres(noise(50, 3), 50).tolist()) == list(range(50))
    assert sorted(k_centres(noise(50, 3), 80).tolist()) == list(range(50))

def test_the_order_of_the_rows_does_not_matter():
    x = noise(900, 10)
    order = torch.randperm(900, generator=torch.Generator().manual_seed(1))
    assert order[k_centres(x[order], 120)].tolist() == k_centres(x, 120).tolist()

def test_greedy_is_within_twice_the_best():
    "Nine tight clusters, nine centres: the best radius is that of a cluster."
    clusters = [20*noise(1, 6, s) + .1*noise(60, 6, 100 + s) for s in range(9)]
    x = torch.cat(clusters)
    picks = k_centres(x, 9)
    assert len({i//60 for i in picks.tolist()}) == 9
    best = max((cluster - cluster.mean(0)).norm(dim=1).max() for cluster in clusters)
    assert nearest(x, x[picks]).distance.max() <= 2*best

def test_how_many_rows():
    cases = {(100, .29): 29, (100, .1): 10, (3, .1): 1, (199, .01): 1, (50, 1.): 50}
    assert {case: how_many(*case) for case in cases} == cases
    assert len(coreset(noise(100, 4), .29)) == 29

@pytest.mark.parametrize("ratio", [0, -1, 1.5, float("nan")])
def test_a_ratio_that_is_none_is_refused(ratio):
    with pytest.raises(SpecError, match="coreset ratio"):
        coreset(noise(10, 3), ratio)

@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_features_that_half_precision_cannot_hold_are_refused(bad):
    x = noise(50, 3)
    x[20, 1] = bad
    with pytest.raises(SpecError, match="not finite"):
        coreset(x, .1)

def test_a_projection_keeps_distances():
    x = noise(300, 512)
    small = project([x], 256, torch.Generator().manual_seed(0))
    assert small.shape == (300, 256)
    assert small.dtype == torch.float16
    ratio = torch.cdist(small.float(), small.float())/torch.cdist(x, x)
    pairs = ~torch.eye(300, dtype=torch.bool)
    assert (ratio[pairs] - 1).abs().max() < .25
    assert project([x], None).shape == (300, 512)
    assert project([x[:, :100]], 256).shape == (300, 100)

def test_a_projection_is_drawn_from_the_generator():
    x = noise(300, 512)
    first, second, other = (project([x], 256, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)

def test_features_may_come_in_batches_and_are_read_once():
    x = noise(1000, 30)
    read = []
    def batches():
        for part in x.split(170):
            read.append(len(part))
            yield part
    small = project(batches(), None)
    assert sum(read) == 1000
    assert torch.allclose(small.float(), x - x[:170].mean(0), atol=4e-3)
    picks = k_centres(small, 50)
    assert torch.equal(take(batches(), picks), x[picks.sort().values])
    assert set(coreset(batches(), .05).tolist()) == set(picks.tolist())

class LargestTensor(TorchDispatchMode):
    "Watches what torch makes: bytes of the largest tensor seen."
    most = 0
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if torch.is_tensor(tensor):
                self.most = max(self.most, tensor.untyped_storage().nbytes())
        return result

def test_memory_is_bounded():
    "Neither a square of the rows nor a whole copy in single precision is ever there."
    x = noise(400_000, 64).half()
    with LargestTensor() as watched:
        k_centres(x, 300)
    assert watched.most <= max(x.nbytes, 2**26), watched.most          # the rows themselves

@pytest.mark.parametrize("k", [1, 3, 20, 60])
def test_nearest_neighbours_by_brute_force(k):
    rows, bank = noise(90, 7), noise(40, 7, 1)
    distance, index = nearest(rows, bank, k)
    differences = rows.double().numpy()[:, None] - bank.double().numpy()
    true = np.sqrt((differences**2).sum(2))
    assert distance.shape == index.shape == (90, min(k, 40))
    assert np.allclose(distance, np.sort(true, 1)[:, :k], atol=1e-4)
    assert np.allclose(np.take_along_axis(true, index.numpy(), 1), distance, atol=1e-4)

def test_neighbours_by_name_and_by_position():
    neighbours = nearest(noise(9, 7), noise(40, 7, 1), 2)
    distance, index = neighbours
    assert distance is neighbours.distance is neighbours[0]
    assert index is neighbours.index is neighbours[1]

def test_a_row_of_the_bank_is_its_own_neighbour_at_zero():
    bank = noise(500, 64) + 100
    distance, index = nearest(bank, bank)
    assert distance.max() == 0
    assert index[:, 0].tolist() == list(range(500))

def test_nearest_in_blocks_is_the_same():
    rows, bank = noise(3000, 16), noise(9000, 16, 1)           # several blocks
    whole = nearest(rows, bank, 2)
    parts = [nearest(part, bank, 2) for part in rows.split(500)]
    assert torch.equal(whole.index, torch.cat([part.index for part in parts]))
    assert torch.equal(whole.distance, torch.cat([part.distance for part in parts]))

def test_the_memory_module_has_them_too():
    assert memory.coreset is coreset
    assert memory.nearest is nearest

SMOKE = dict(rows=1000, dim=16, ratio=.02, repeats=1, threads=1)

@pytest.mark.slow
def test_the_study_without_peers(tmp_path, monkeypatch):
    monkeypatch.setenv("MDD_BENCH_PEERS", str(tmp_path/"nowhere"))
    execute_study(load_study("coreset", **SMOKE), tmp_path/"out")
    text = (tmp_path/"out"/"coreset.md").read_text()
    assert "| anomalib | not installed |" in text
    assert "times faster than plain greedy" in text
    assert text.count("| 20 |") == 4
    assert str(tmp_path) not in text
    files = {file.name for file in (tmp_path/"out").iterdir()}
    assert {"coreset.csv", "coreset.ipynb", "coreset.md", "coreset.png"} <= files

@pytest.mark.slow
def test_the_study_with_a_peer(tmp_path, monkeypatch):
    answer = json.dumps(dict(seconds=[9.], chosen=[0, 1, 2], versions={"anomalib": "9.9"}))
    peer = tmp_path/"python"
    peer.write_text(f"#!/bin/sh\necho '{answer}'\n")
    peer.chmod(0o755)
    monkeypatch.setenv("MDD_BENCH_PEERS", str(peer))
    execute_study(load_study("coreset", **SMOKE), tmp_path/"out")
    text = (tmp_path/"out"/"coreset.md").read_text()
    assert "| anomalib | 3 | 9.00 (9.00-9.00) | 1 |" in text
    assert "anomalib 9.9" in text

def test_bad_parameters_of_the_study():
    with pytest.raises(SpecError, match="does not fit"):
        load_study("coreset", rows="many")
