"Clusters of look-alike images, prototypes of what is normal: few images, zero embeddings, dead prototypes."
import pytest, torch
import torch.nn.functional as F
from mdd_bench.parts.backbone import Backbone
from mdd_bench.parts.clustering import Groups, choose_groups, spherical_kmeans
from mdd_bench.parts.memory import PrototypeMemory, class_logits, init_prototypes, memory_losses, revive

def seeded(seed=0): return torch.Generator().manual_seed(seed)

# ---- clustering

def bundles(k, each, dim=16, noise=.05):
    "k groups of `each` unit vectors that point nearly the same way."
    directions = torch.eye(dim)[:k].repeat_interleave(each, 0)
    return F.normalize(directions + noise*torch.randn(k*each, dim, generator=seeded()), dim=-1)

def centred(x): return F.normalize(x - x.mean(0), dim=-1)

def test_kmeans_is_deterministic_and_takes_any_length():
    x = bundles(3, 20)[torch.randperm(60, generator=seeded(1))]
    centres = spherical_kmeans(x, 3)
    torch.rand(5)                                                          # torch's own state does not matter
    assert torch.equal(centres, spherical_kmeans(x, 3))
    lengths = torch.linspace(.1, 9, 60)[:, None]
    assert torch.allclose(centres, spherical_kmeans(x*lengths, 3), atol=1e-4)
    assert torch.allclose(centres.norm(dim=-1), torch.ones(3))
    assert sorted(torch.bincount((x @ centres.T).argmax(1)).tolist()) == [20, 20, 20]

@pytest.mark.parametrize("vectors,k", [(2, 5), ("one, 30 times", 4), (1, 1)])
def test_kmeans_of_fewer_vectors_than_centres(vectors, k):
    x = bundles(3, 20)[torch.randperm(60, generator=seeded(1))]
    x = x[:1].expand(30, -1) if vectors == "one, 30 times" else x[:vectors]
    centres = spherical_kmeans(x, k)
    assert centres.shape == (k, 16)
    assert torch.isfinite(centres).all()
    assert (centres @ F.normalize(x, dim=-1).T).amax(1).min() > .999       # each is one of the vectors

def test_kmeans_of_vectors_without_a_direction():
    assert torch.isfinite(spherical_kmeans(torch.zeros(5, 4), 3)).all()

def test_the_number_of_groups():
    assert choose_groups(centred(bundles(3, 20))) == 3
    assert choose_groups(centred(bundles(5, 12))) == 5
    assert choose_groups(centred(torch.randn(80, 64, generator=seeded()))) == 1
    assert choose_groups(centred(bundles(1, 1).expand(30, -1))) == 1
    assert all(choose_groups(bundles(1, n)) == 1 for n in (1, 2, 3))

def test_identical_images_are_one_group():
    backbone = Backbone("resnet18", "procedural", [1, 2])
    image = torch.rand(1, 3, 64, 64, generator=seeded())
    others = torch.rand(3, 3, 64, 64, generator=seeded(1))
    groups = Groups(backbone.channels)
    batches = [dict(features=backbone(image.expand(n, -1, -1, -1))) for n in (8, 8, 3)]
    assert groups.fit(batches) == 1
    assert torch.isfinite(groups.centres).all()
    assert groups(backbone(others)).tolist() == [0]*3

# ---- prototypes

def embedding(images, dim=8, side=4): return torch.randn(images, dim, side, side, generator=seeded())
def as_rows(z): return z.flatten(2).transpose(1, 2).flatten(0, 1)
def unit(x): return F.normalize(x.detach(), dim=-1)

def make_memory(groups, prototypes, dim=8):
    torch.manual_seed(0)
    return PrototypeMemory(groups, prototypes, dim)

def test_a_group_with_fewer_positions_than_prototypes():
    memory, z = make_memory(3, 40), embedding(1, side=2)
    before = memory.items.detach().clone()
    init_prototypes(memory, z, torch.tensor([1]))
    assert torch.isfinite(memory.items).all()
    for without_image in (0, 2): assert torch.equal(memory.items[without_image], before[without_image])
    cosines = unit(memory.items[1]) @ unit(as_rows(z)).T
    assert cosines.amax(1).min() > .999                                    # each prototype is a position,
    assert cosines.amax(0).min() > .999                                    # and each position has a prototype

def test_many_positions_are_thinned_over_all_of_them():
    "The last image's positions are as good as the first's."
    images = [torch.eye(8)[i].view(8, 1, 1).expand(8, 30, 30) for i in range(5)]
    z = torch.stack(images) + .01*embedding(5, side=30)
    memory = make_memory(1, 5)
    init_prototypes(memory, z, torch.zeros(5, dtype=torch.long), most=50)
    assert sorted(memory.items[0].detach().argmax(1).tolist()) == list(range(5))

def test_revival_moves_the_dead_only():
    memory, z = make_memory(2, 6), as_rows(embedding(4))
    memory.used[0, :3], memory.used[1] = 2, 1
    before = memory.items.detach().clone()
    assert revive(memory, {0: z, 1: z}) == 3
    assert torch.equal(memory.items[0, :3], before[0, :3])
    assert torch.equal(memory.items[1], before[1])
    assert torch.isfinite(memory.items).all()
    assert memory.used.sum() == 0
    now = unit(memory.items[0])
    assert (now[3:] @ unit(z).T).amax(1).min() > .9999                     # each is an embedding,
    assert (now @ now.T - 2*torch.eye(6)).max() < .999                     # and no two are one
    worst_served = (unit(z) @ unit(before[0, :3]).T).amax(1).argmin()
    assert torch.allclose(now[3], unit(z[worst_served]))                   # the one served worst comes first

def test_revival_of_a_wholly_unused_group():
    memory, z = make_memory(1, 3), as_rows(embedding(1))
    assert revive(memory, {0: z}) == 3
    assert torch.isfinite(memory.items).all()
    assert (torch.pdist(memory.items[0].detach()) > 1e-3).all()

def test_revival_with_fewer_embeddings_than_dead():
    "Three embeddings give three prototypes: a copy would be dead again at once, and revived in every epoch."
    memory = make_memory(1, 8)
    memory.used[0, 0] = 1
    revived = revive(memory, {0: as_rows(embedding(1))[:3]})
    assert torch.isfinite(memory.items).all()
    assert revived <= 3
    assert (torch.pdist(unit(memory.items[0])) > 1e-3).all()

def test_revival_never_takes_an_embedding_without_a_direction():
    "After a ReLU a position may be all zero; its cosine, 0, is the smallest, yet it is no direction."
    memory = make_memory(1, 4)
    memory.items.data.abs_()
    memory.used[0, :3] = 1
    z = as_rows(embedding(1)).abs() + .1
    z[5] = 0
    revive(memory, {0: z})
    assert (memory.items.detach().norm(dim=-1) > .5).all()

@pytest.mark.parametrize("prototypes", [1, 2, 5])
def test_one_image_and_few_prototypes_give_finite_terms(prototypes):
    memory, z = make_memory(2, prototypes), embedding(1)
    terms = memory_losses(memory, memory.similarity(z), torch.tensor([1]))
    sum(terms.values()).backward()
    assert all(torch.isfinite(term) for term in terms.values())
    assert torch.isfinite(memory.items.grad).all()
    assert class_logits(memory.similarity(z)).shape == (1, 2)
    distances = torch.cdist(unit(as_rows(z)), unit(memory.items[1])).square().sort(1).values
    nearest, second = distances[:, 0], distances[:, min(1, prototypes - 1)]
    assert terms["compact"].item() == pytest.approx(nearest.mean().item(), abs=1e-4)
    separate = (nearest - second + 1).clamp(min=0).mean().item()
    assert terms["separate"].item() == pytest.approx(separate, abs=1e-4)
