"""MDD-Net with other light decoders, for `mdd_bench sweep benchmark -p detector=lights.py:Deep,lights.py:Dense,lights.py:Whole`."""
from torch import nn
from mdd_bench.detectors.mddnet import MDDNet
from mdd_bench.parts.decoders import PAIRS, Decoder, LightBottleneck, conv_norm, init_convolutions, resample

class OtherBlock(nn.Module):
    "Enlarge, then `number` residual paths: [B,c_in,H,W] to [B,c_out,H*scale,W*scale]."
    def __init__(self, c_in, c_out, scale, relu, number, dense):
        super().__init__()
        self.enter = nn.Sequential(resample(c_in, c_out, scale, 1), nn.BatchNorm2d(c_out))
        groups = 1 if dense else c_out
        paths = [[*conv_norm(c_out, c_out, 3, 1, groups), nn.ReLU(), *conv_norm(c_out, c_out)] for _ in range(number)]
        self.paths = nn.ModuleList(nn.Sequential(*path) for path in paths)
        self.between, self.last = nn.ReLU(), nn.ReLU() if relu else nn.Identity()

    def forward(self, x):
        x = self.enter(x)
        for path in self.paths[:-1]: x = self.between(x + path(x))
        return self.last(x + self.paths[-1](x))

class OtherDecoder(nn.Module):
    "An embedding to features, with one `OtherBlock` per level."
    number, dense = 1, False

    def __init__(self, backbone):
        super().__init__()
        channels = [*backbone.channels, 2*backbone.channels[-1]]
        strides = [*backbone.strides, 2*backbone.strides[-1]]
        self.stages = nn.ModuleList()
        for level in reversed(range(len(backbone.channels))):
            scale, rectified = strides[level + 1]//strides[level], not backbone.signed[level]
            shape = channels[level + 1], channels[level], scale
            self.stages.append(OtherBlock(*shape, rectified, self.number, self.dense))
        init_convolutions(self)

    forward = Decoder.forward

class DeepDecoder(OtherDecoder): number = 2
class DenseDecoder(OtherDecoder): dense = True

def dense_fusion_path(channels, strides, level):
    "A level to the last level's width and resolution, with dense convolutions."
    layers = []
    for k in range(level, len(channels) - 1):
        layers += [*conv_norm(channels[k], channels[k + 1], 3, strides[k + 1]//strides[k]), nn.ReLU()]
    return nn.Sequential(*layers)

class DenseBottleneck(LightBottleneck):
    "The light bottleneck with a dense path in its block and dense convolutions before it."
    def __init__(self, backbone):
        super().__init__(backbone)
        channels, strides = backbone.channels, backbone.strides
        self.fuse = nn.ModuleList(dense_fusion_path(channels, strides, i) for i in range(len(channels)))
        self.embed[-1] = OtherBlock(len(channels)*channels[-1], self.dim, 1, True, 1, True)
        init_convolutions(self)

class Other(MDDNet):
    "MDD-Net whose light decoder is another one."
    bottleneck_type, replacement = LightBottleneck, None

    def __init__(self, backbone, classes=1, **options):
        before, PAIRS["light"] = PAIRS["light"], (self.bottleneck_type, self.replacement)
        try: super().__init__(backbone, classes, **options)
        finally: PAIRS["light"] = before

class Deep(Other):
    "Two depthwise paths at each level."
    replacement = DeepDecoder

class Dense(Other):
    "One path with a dense 3x3 convolution at each level."
    replacement = DenseDecoder

class Whole(Other):
    "Dense convolutions in the bottleneck too."
    bottleneck_type, replacement = DenseBottleneck, DenseDecoder
