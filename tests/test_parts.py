"Pyramids, decoders and detectors on several architectures; weights that do not fit; losses that fall."
import pytest, torch
from safetensors.torch import save_file
from mdd_bench.detectors.detector import create_detector, full_options, list_detectors
from mdd_bench.errors import SpecError, WeightsError
from mdd_bench.parts.backbone import Backbone, hash_weights
from mdd_bench.parts.decoders import Bottleneck, Decoder

pytestmark = pytest.mark.filterwarnings("ignore:.*RANDOM")
PYRAMIDS = [("resnet18", None, [4, 8, 16], False), ("resnet18", [2, 3, 4], [8, 16, 32], False), ("mobilenetv3_small_100", None, [4, 8, 16], True), ("efficientnet_b0", None, [4, 8, 16], True)]

@pytest.fixture(params=PYRAMIDS, ids=lambda p: f"{p[0]}-{p[2]}")
def pyramid(request):
    name, layers, strides, signed = request.param
    b = Backbone(name, "random", layers)
    assert b.strides == strides and b.signed == [signed]*3
    return b

def test_mirror_has_the_teachers_shapes_and_range(pyramid):
    torch.manual_seed(0)
    f = pyramid(torch.rand(2, 3, 128, 128)); r = Decoder(pyramid)(Bottleneck(pyramid)(f))
    assert [a.shape for a in f] == [a.shape for a in r]
    assert [bool((a < 0).any()) for a in r] == pyramid.signed

@pytest.mark.parametrize("options", [dict(), dict(memory="class", bottleneck="shared"), dict(dist_weight=0), dict(fusion="product"), dict(memory="class", prototypes=1)])
def test_mddnet_options(options):
    b = Backbone("resnet18", "random", [1, 2]); d = create_detector("mddnet", b, classes=2, **options)
    f = b(torch.rand(2, 3, 64, 64)); terms = d.losses(dict(features=f, features_abnormal=f, mask=torch.zeros(2, 64, 64, dtype=torch.bool), cls=torch.tensor([0, 1])))
    assert ("class" in terms) == (d.bank is not None) and ("dist" in terms) == (options.get("dist_weight") != 0)
    assert ("cls" in d.needs) == (options.get("memory") == "class")
    with torch.no_grad(): assert d.eval()(torch.rand(1, 3, 64, 64)).map.shape == (1, 64, 64)

@pytest.mark.parametrize("options", [dict(memory="classy"), dict(bottleneck="none"), dict(fusion="max"), dict(prototype=3), dict(anomaly_probability=2.), dict(prototypes=0), dict(dist_weight=-1.)])
def test_impossible_options(options):
    with pytest.raises(SpecError): create_detector("mddnet", Backbone("resnet18", "random", [1, 2]), **options)

def test_the_registry_lists_what_there_is(): assert {"rd4ad", "mddnet"} <= set(list_detectors()) and list_detectors("rd*") == ["rd4ad"] and full_options("rd4ad", {}) == {}

def test_random_weights_are_loud_and_fixed():
    with pytest.warns(UserWarning, match="RANDOM"): a = Backbone("resnet18", "random")
    torch.manual_seed(5)
    assert Backbone("resnet18", "random").hash == a.hash

@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_from_a_file(tmp_path, suffix):
    b = Backbone("resnet18", "random"); tensors = {k: v + 1 if v.is_floating_point() else v for k, v in b.pyramid.state_dict().items()}
    file = tmp_path/f"w{suffix}"; save_file(tensors, file) if suffix == ".safetensors" else torch.save(tensors, file)
    got = Backbone("resnet18", str(file))
    assert got.hash != b.hash and torch.equal(got.pyramid.state_dict()["conv1.weight"], tensors["conv1.weight"])

def test_weights_under_timms_other_spelling(tmp_path):
    "timm flattens `stages.0` to `stages_0` when it cuts a model to its levels."
    import timm
    whole = timm.create_model("convnext_atto", pretrained=False); torch.save(whole.state_dict(), tmp_path/"w.pth")
    b = Backbone("convnext_atto", str(tmp_path/"w.pth"))
    assert torch.equal(b.pyramid.state_dict()["stages_1.blocks.0.conv_dw.weight"], whole.state_dict()["stages.1.blocks.0.conv_dw.weight"])

@pytest.mark.parametrize("how", ["other network", "not a file", "missing", "code"])
def test_weights_that_do_not_fit(tmp_path, how):
    file = tmp_path/"w.pth"
    if how == "other network": torch.save(Backbone("resnet10t", "random").pyramid.state_dict(), file)
    if how == "not a file": file.write_text("hello")
    if how == "code": torch.save({"a": print}, file)
    with pytest.raises(WeightsError) as e: Backbone("resnet18", str(file))
    assert "w.pth" in str(e.value) and "\n" not in str(e.value)

@pytest.mark.parametrize("layers", [[9], [2, 1], [-1]])
def test_bad_layers(layers):
    with pytest.raises(SpecError, match="strides"): Backbone("resnet18", "random", layers)

def test_real_weights_match_every_key(real_weights):
    b = Backbone("resnet18", str(real_weights))
    assert b.strides == [4, 8, 16] and b.signed == [False]*3
    assert b(torch.rand(1, 3, 64, 64))[0].std() > .01
