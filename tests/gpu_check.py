"""All that only a GPU can show: `make gpu-check`, or `python tests/gpu_check.py --out FOLDER`.

    environment    card, driver, versions
    agreement      every detector trains a few steps and predicts on both devices: how far apart are the maps?
    repeatability  the same twice on the GPU: equal to the bit, or which operation prevents it
    evaluators     what tests/test_streaming.py asks of tensors on a GPU
    runs           whole runs on the CPU and, twice, on the GPU
    throughput     images per second, share of the matrix rate, peak memory: wide_resnet50_2 at 256 pixels

Every part has a `try` of its own; `gpu_check.json` and `gpu_check.md` in the folder are written as each ends,
and what is not begun in time is reported as not run. Exit code 0: everything holds; 1: something does not;
2: no such device. `--device cpu --quick` runs all of it at tiny size, to test this script, without pytest."""
import argparse, contextlib, gc, json, math, os, shutil, subprocess, sys, tempfile, time, traceback, warnings
from copy import deepcopy
from functools import cache
from pathlib import Path
from unittest import mock

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")      # before anything uses the GPU
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT/"tests")]

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
import tensor_checks
from drawn_batches import VARIANTS, hook_batches, images, learns_from_labels, pyramid, training_batches
from mdd_bench.data.catalog import cache_dir
from mdd_bench.data.defects import Defects, Textures
from mdd_bench.data.images import Framing
from mdd_bench.data.loading import ImageDataset
from mdd_bench.detectors.detector import create_detector, detector_class, list_detectors
from mdd_bench.parts.backbone import Backbone, default_layers, level_strides
from mdd_bench.parts.feature_cache import open_feature_cache
from mdd_bench.running.run import run
from mdd_bench.running.runtime import Runtime
from mdd_bench.running.spec import make_spec
from mdd_bench.running.training import feed, make_optimizer, seed_all, train_step

# ---- the report

class Report:
    "What was found: {section: {name: row}}, and the time that is left."
    def __init__(self, out: Path, seconds: float, resume: bool):
        self.out, self.seconds = out, seconds
        out.mkdir(parents=True, exist_ok=True)
        self.data = dict(started=time.time(), sections={})
        if resume: self.data = json.loads((out/"gpu_check.json").read_text())

    def left(self):
        "Seconds that are left."
        return self.seconds - (time.time() - self.data["started"])

    def rows(self, section): return self.data["sections"].setdefault(section, {})

    def failures(self):
        "Names of what does not hold, with the reason."
        found = []
        for section, rows in self.data["sections"].items():
            for name, row in rows.items():
                if "error" in row: found.append(f"{section}, {name}: {row['error']}")
                elif row.get("holds") is False: found.append(f"{section}, {name}: does not hold")
        return found

    def write(self):
        "Write both files, by rename."
        self.data["failures"] = self.failures()
        texts = {"gpu_check.json": json.dumps(self.data, indent=1, default=str)}
        texts["gpu_check.md"] = markdown(self.data)
        for name, text in texts.items():
            part = self.out/f"{name}.part"
            part.write_text(text, encoding="utf-8")
            part.replace(self.out/name)

def flat(row, prefix=""):
    "A row with nested dictionaries as one level."
    values = {}
    for name, value in row.items():
        if isinstance(value, dict): values |= flat(value, f"{prefix}{name}: ")
        else: values[prefix + name] = value
    return values

def shown(value):
    "A value as a table has it."
    if isinstance(value, float): return f"{value:.4g}"
    if isinstance(value, (list, tuple)): return "; ".join(map(str, value))
    return "" if value is None else str(value).replace("\n", " ").replace("|", "/")

def table(rows):
    "Rows as Markdown; where there are many measures, these are below each other."
    rows = {name: {k: v for k, v in flat(row).items() if k != "where"} for name, row in rows.items()}
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    cells = [["", *columns]] + [[name, *(shown(row.get(c)) for c in columns)] for name, row in rows.items()]
    if len(columns) > 9: cells = [list(line) for line in zip(*cells)]
    lines = ["| " + " | ".join(line) + " |" for line in cells]
    return "\n".join([lines[0], "|---"*len(cells[0]) + "|", *lines[1:]])

def markdown(data):
    failures = [f"- {line}" for line in data["failures"]] or ["Everything that was run holds."]
    parts = ["# What a GPU shows", "Written by `make gpu-check` (tests/gpu_check.py).", *failures]
    for section, rows in data["sections"].items(): parts += [f"## {section}", NOTES[section], table(rows)]
    return "\n\n".join(parts) + "\n"

NOTES = dict(
    environment="",
    agreement="""CPU beside the device, in float32 without TF32, from the same prepared detector with the same
noise, dropout off. Differences of maps are the largest, as a share of the range of the CPU's: `start` before
five training steps and the hooks, `end` after them. `own`: what `prepare` on the device gives otherwise.""",
    repeatability="Prepared, trained five steps, finished and used twice on the device, from one seed.",
    evaluators="Tensors on the device give what arrays give, bit for bit.",
    runs="""One spec on the CPU and twice on the device, where features are computed anew and then stored.
Differences of the means over classes; not judged where a method draws its noise on the device.""",
    throughput="""Training steps with the features on the device already; then as a run trains, with features
read from a cache, and computed. The share of the matrix rate is the operations of a step (by torch's counter)
over its time, by what one large product of the same precision reaches.""",
)

STICKY = ("CUDA error", "device-side assert", "illegal memory access")     # after these nothing runs any more

def first_line(error): return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"

def each(report, section, names, check, least=15):
    "Call check(name, row), which fills the row, for all names that have no row yet."
    rows = report.rows(section)
    for name in names:
        if name in rows: continue
        rows[name] = row = {}
        start = time.time()
        print(f"{time.time() - report.data['started']:6.0f} s  {section}, {name}", flush=True)
        try:
            if report.left() < least: raise TimeoutError("not run: out of time")
            check(name, row)
        except Exception as e:
            row["error"] = first_line(e)
            row["where"] = traceback.format_exc(limit=-4)
        if "holds" in row: row["holds"] = bool(row["holds"])
        row["seconds"] = round(time.time() - start, 1)
        report.write()
        if any(word in row.get("error", "") for word in STICKY): start_again(report)
        gc.collect()
        if torch.cuda.is_available(): torch.cuda.empty_cache()

def start_again(report):
    "Go on in a new process: an error of this kind spoils the GPU for the present one."
    arguments = [a for a in sys.argv[1:] if a != "--resume"]
    os.execv(sys.executable, [sys.executable, __file__, *arguments, "--resume"])

# ---- environment

def or_why_not(found, *arguments):
    "What a function returns, or its error as text."
    try: return found(*arguments)
    except Exception as e: return first_line(e)

def nvidia_smi(asked):
    "What the driver's own tool says."
    command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()

def environment(name, row, device):
    import sklearn, timm
    row |= dict(python=sys.version.split()[0], threads=torch.get_num_threads(), cores=os.cpu_count())
    row |= {module.__name__: module.__version__ for module in (torch, timm, np, sklearn)}
    if device.type != "cuda": return
    row |= dict(cuda=torch.version.cuda, cudnn=or_why_not(torch.backends.cudnn.version))
    asked = "driver_version", "clocks.max.sm", "power.limit"
    row |= {name: or_why_not(nvidia_smi, name) for name in asked}
    card = torch.cuda.get_device_properties(device)
    row |= dict(card=card.name, memory_gib=card.total_memory/2**30, processors=card.multi_processor_count)
    row["tf32 in convolutions"] = torch.backends.cudnn.allow_tf32
    row["tf32 in products"] = torch.backends.cuda.matmul.allow_tf32

# ---- a detector, trained a few steps on drawn batches

STEPS = 5

@contextlib.contextmanager
def tf32(allowed):
    "Inside, convolutions and matrix products may, or may not, be computed in TF32."
    flags = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [f.allow_tf32 for f in flags]
    for f in flags: f.allow_tf32 = allowed
    try: yield
    finally:
        for f, value in zip(flags, before): f.allow_tf32 = value

def moved(value, device):
    "A batch on a device; `index` stays, as in the training loop."
    if isinstance(value, dict): return {k: v if k == "index" else moved(v, device) for k, v in value.items()}
    if isinstance(value, list): return [moved(v, device) for v in value]
    return value.to(device) if torch.is_tensor(value) else value

@cache
def drawn_data(variant):
    "The batches of a variant's training and those of its hooks, on the CPU; features are the CPU's."
    (name, options), backbone, anomalies = VARIANTS[variant], pyramid(), learns_from_labels(variant)
    needs = create_detector(name, backbone, classes=2, **options).needs
    return training_batches(backbone, needs, anomalies), hook_batches(backbone, needs, anomalies)

def call_hook(hook, variant, device, *args):
    batches = moved(drawn_data(variant)[1], device)
    with torch.no_grad(): hook(*args, batches)

def seed(strict, epoch=0):
    "As a run does; `strict`: an operation that is not deterministic raises instead of warning."
    seed_all(0, epoch)
    torch.use_deterministic_algorithms(True, warn_only=not strict)

def prepared(variant, device, strict=False):
    "A detector after `prepare`, untrained."
    name, options = VARIANTS[variant]
    drawn_data(variant)                  # before the seed: it draws numbers too
    seed(strict)
    detector = create_detector(name, pyramid(), classes=2, **options).to(device).eval()
    call_hook(detector.prepare, variant, device)
    return detector

def train(detector, variant, device, strict=False, gently=False):
    "Take the steps, with the hooks; returns the loss terms of each step."
    terms, recipe = [], detector.recipe
    batches = moved(drawn_data(variant)[0], device)
    optimizer = make_optimizer(detector, recipe) if recipe.epochs else None
    if optimizer and gently:
        for group in optimizer.param_groups: group |= dict(lr=group["lr"]/100, eps=1e-3)
    for step in range(STEPS if optimizer else 0):
        if step in (0, 2): seed(strict, 1 + step)
        detector.train()
        losses = train_step(detector, batches[step % 2], optimizer, recipe, "float32")
        terms.append({name: loss.item() for name, loss in losses.items()})
        detector.eval()
        if step in (1, STEPS - 1): call_hook(detector.on_epoch, variant, device, step//2)
    call_hook(detector.finish, variant, device)
    return terms

@cache
def test_features():
    with torch.no_grad(): return pyramid()(torch.cat([images(2, 5, cls=0), images(2, 6, cls=1)]))

@torch.no_grad()
def maps_of(detector, device):
    return detector.predict(moved(test_features(), device), (64, 64)).map.float().cpu()

def apart(a, b):
    "The largest difference of maps, as a share of the range of the first."
    return ((a - b).abs().max()/(a.max() - a.min()).clamp_min(1e-12)).item()

# ---- agreement

# Rounding, to about 1e-7 on both devices but in another order, decides the sign of Adam's steps where
# gradients are nearly zero: five steps of rd4ad by its recipe bring maps apart by 6%. So learning rates are a
# hundredth here, and eps is 1e-3 instead of 1e-8: steps then follow the gradients, which are compared too.
#
# By how much of their range maps may differ before training; then, by detector, after it, by how much of
# their length gradients may, and why. `--floor` measures on the CPU alone how far features that differ by
# 1e-7 bring a training apart; the tolerances are about a hundred times that, or more.
START = 2e-4
TOLERANCES = {
    "bgad": (1e-3, .05, "long sums of squares, through eight couplings a level"),
    "dmad": (1e-3, .05, "of two rows of a bank that are equally near, rounding chooses one"),
    "dmad_released": (1e-3, .05, "of two rows of a bank that are equally near, rounding chooses one"),
    "mddnet": (.05, .5, "L_dist has a corner where both decoders agree, and rounding chooses the side"),
    "patchcore": (1e-3, .05, "the nearest row is found by differences of large squares"),
    "rd4ad": (1e-3, .05, "batch normalisation over few positions, ten convolutions deep"),
    "simplenet": (1e-3, .05, "batch normalisation, and a hinge with a corner"),
    "uniad": (1e-3, .05, "softmax and normalisation, eight layers deep"),
}

@contextlib.contextmanager
def noise_of_the_cpu():
    "Inside, noise is drawn on the CPU and moved, so that it is the same on every device."
    def randn_like(x): return torch.randn(x.shape).to(x)
    with mock.patch("torch.randn_like", randn_like): yield

def without_dropout(detector):
    for part in detector.modules():
        if isinstance(part, nn.Dropout): part.p = 0.
        if isinstance(part, nn.MultiheadAttention): part.dropout = 0.
    return detector

def loss_difference(a, b):
    "The largest difference of a loss term, relative to the larger of the term and 0.001."
    pairs = [(x[name], y[name]) for x, y in zip(a, b) for name in x]
    return max((abs(x - y)/max(abs(x), 1e-3) for x, y in pairs), default=0.)

def gradient_difference(a, b):
    "The length of the difference of the last step's gradients, as a share of their length."
    pairs = [(p.grad, q.grad.cpu()) for p, q in zip(a.parameters(), b.parameters()) if p.grad is not None]
    squares = [((g - h).double().square().sum().item(), g.double().square().sum().item()) for g, h in pairs]
    difference, length = map(sum, zip(*squares)) if squares else (0, 1)
    return math.sqrt(difference/length)

def shared_rows(a, b):
    "The share of a bank's rows that another bank has too, but for rounding."
    a, b = a.cpu().double(), b.cpu().double()
    if not len(a) or not len(b): return float(len(a) == len(b))
    return (torch.cdist(a, b).amin(1) <= 1e-4*b.norm(dim=1).max()).double().mean().item()

def own_preparation(reference, variant, device):
    "What `prepare` on the device itself gives, beside the CPU's."
    own, found = prepared(variant, device), {}
    state = own.state_dict()
    for name, tensor in reference.state_dict().items():
        other = state[name].cpu()
        if name.endswith(("bank", ".rows", "representation.normal", "representation.abnormal")):
            share = shared_rows(other, tensor)
            if share < 1: found[f"shared rows of {name}"] = share
        elif other.shape != tensor.shape: found[name] = f"{list(other.shape)}, CPU {list(tensor.shape)}"
        elif not torch.allclose(other.float(), tensor.float(), rtol=1e-3, atol=1e-4):
            found[f"difference of {name}"] = (other.float() - tensor.float()).abs().max().item()
    return found

def agreement(variant, row, device):
    with tf32(False), noise_of_the_cpu():
        if variant == "backbone": return backbone_agreement(row, device)
        cpu = without_dropout(prepared(variant, "cpu"))
        twin = deepcopy(cpu, {id(cpu.backbone): cpu.backbone}).to(device)
        tolerance, of_gradients, reason = TOLERANCES[variant.partition(",")[0]]
        row["start"] = apart(maps_of(cpu, "cpu"), maps_of(twin, device))
        row["own"] = own_preparation(cpu, variant, device)
        terms = [train(d, variant, where, gently=True) for d, where in ((cpu, "cpu"), (twin, device))]
        row["losses"] = loss_difference(*terms)
        a, b = maps_of(cpu, "cpu"), maps_of(twin, device)
        row |= dict(end=apart(a, b), absolute=(a - b).abs().max().item(), tolerance=tolerance)
        row |= {"gradients": gradient_difference(cpu, twin), "tolerance of gradients": of_gradients}
        kept = row["start"] <= START, row["end"] <= tolerance, row["gradients"] <= of_gradients
        row |= dict(holds=all(kept), why=reason)

def backbone_agreement(row, device):
    "Features of the backbone, without and with what torch allows by default in convolutions."
    x, cpu = images(4, 5), pyramid()
    gpu, reference = deepcopy(cpu).to(device), cpu(x)
    features = gpu(x.to(device))
    difference, size = compare_levels(reference, features)
    row |= dict(absolute=difference, end=difference/size, tolerance=2e-3, holds=difference <= 2e-3*size)
    row["why"] = "rounding to half precision: 5e-4 of a value where it falls the other way"
    equal = [(a == b.cpu()).float().mean().item() for a, b in zip(reference, features)]
    row["equal values"] = sum(equal)/len(equal)
    row["equal twice"] = all(torch.equal(a, b) for a, b in zip(features, gpu(x.to(device))))
    with tf32(True): row["difference with TF32"] = compare_levels(reference, gpu(x.to(device)))[0]/size

def compare_levels(a, b):
    "The largest difference, and the largest value, of two pyramids."
    difference = max((x - y.cpu()).abs().max().item() for x, y in zip(a, b))
    return difference, max(x.abs().max().item() for x in a)

def floor(variant, row):
    "How far features that differ by 1e-7 of their value bring a training apart, on the CPU alone."
    with noise_of_the_cpu():
        first = without_dropout(prepared(variant, "cpu"))
        second = deepcopy(first, {id(first.backbone): first.backbone})
        train(first, variant, "cpu", gently=True)
        for batch in (*drawn_data(variant)[0], *drawn_data(variant)[1]): nudge(batch)
        train(second, variant, "cpu", gently=True)
        row["end"] = apart(maps_of(first, "cpu"), maps_of(second, "cpu"))
        row["gradients"] = gradient_difference(first, second)

def nudge(batch):
    "Change all features of a batch in place."
    for name, value in batch.items():
        if name == "labelled": nudge(value)
        if name.startswith("features"):
            for level in value: level.mul_(1 + 1e-7*torch.randn(level.shape))

# ---- repeatability

def whole(variant, device, strict=False):
    "Maps and weights of a detector that is prepared, trained and finished from the seed."
    detector = prepared(variant, device, strict)
    train(detector, variant, device, strict)
    return maps_of(detector, device), {k: v.cpu() for k, v in detector.state_dict().items()}

def same_weights(a, b): return all(torch.equal(a[name], b[name]) for name in a)

def strict_pass(variant, device):
    "The message of the first operation that is refused as not deterministic; 'passes' if there is none."
    try: whole(variant, device, strict=True)
    except RuntimeError as e:
        if "determinis" not in str(e): raise
        return str(e).partition(",")[0]
    finally: torch.use_deterministic_algorithms(True, warn_only=True)
    return "passes"

@contextlib.contextmanager
def all_warnings():
    "Inside, torch's C++ warns every time; gives the list of warnings."
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield caught
    finally: torch.set_warn_always(False)

def repeatability(variant, row, device):
    with all_warnings() as caught: maps, weights = whole(variant, device)
    maps_again, weights_again = whole(variant, device)
    warned = {str(w.message).partition(",")[0][:160] for w in caught if "determinis" in str(w.message)}
    row |= dict(maps=torch.equal(maps, maps_again), weights=same_weights(weights, weights_again))
    row |= dict(warned=sorted(warned), strict=strict_pass(variant, device))
    row["holds"] = row["maps"] and row["weights"]
    if row["holds"] or row["strict"] != "passes": return
    row["equal without warn_only"] = same_weights(*(whole(variant, device, strict=True)[1] for _ in range(2)))

# ---- evaluators

def evaluator_cases(device):
    "Yields (name, function, arguments): what test_streaming asks of tensors, on a few draws of its data."
    for mode in tensor_checks.MODES:
        for kind in tensor_checks.TENSORS:
            yield f"{kind}, {mode}", tensor_checks.tensors_count_as_arrays, (device, kind, mode)
        for bad in tensor_checks.BAD_SCORES:
            yield (f"bad {bad[0]}, {mode}", tensor_checks.a_bad_score_is_named_and_not_kept,
                   (device, *bad, mode))
        for scores in tensor_checks.SCORES:
            for number, waiting in ((0, 0), (1, 8), (2, 1)):
                yield (f"{scores}, {mode}", tensor_checks.tensors_of_any_scores,
                       (device, number, scores, mode, waiting))

def evaluators(name, row, device):
    cases, failed = list(evaluator_cases(device)), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case, check, arguments in cases:
            try: check(*arguments)
            except Exception as e: failed.append(f"{case}: {type(e).__name__} {str(e)[:80]}")
    row |= dict(cases=len(cases), failed=failed, holds=not failed)

# ---- whole runs

SMALL = dict(data="embedded-v1-smoke", classes=["gear", "tile"], size=64, weights="procedural", layers=[1, 2],
             epochs=2)
# draw noise on the device: other noise than the CPU's
NOISY = ("dmad", "dmad_released", "simplenet", "uniad")

def run_on(device, detector, precision="float32"):
    "The mean metrics, image scores and cost of a small run."
    with tempfile.TemporaryDirectory() as folder:
        record = run(make_spec(detector=detector, precision=precision, **SMALL), folder, Runtime(device))
        return record.metrics["exact"]["mean"], record.scores().score.to_numpy(), record.cost

def forget_features():
    "Remove all stored features."
    shutil.rmtree(Path(os.environ["MDD_BENCH_CACHE"])/"features", ignore_errors=True)

def runs(detector, row, device):
    with tf32(False):
        forget_features()
        cpu, cpu_scores, _ = run_on("cpu", detector)
        forget_features()
        gpu, scores, cost = run_on(device, detector)
        again, again_scores, _ = run_on(device, detector)
        half = run_on(device, detector, "bfloat16")[0] if detector_class(detector).recipe.epochs else gpu
    row["largest difference"] = max(abs(cpu[k] - gpu[k]) for k in cpu)
    score_range = max(np.ptp(cpu_scores), 1e-12)
    row["largest difference of a score"] = float(np.abs(cpu_scores - scores).max()/score_range)
    row |= {f"{name}: {k}": m[k] for k in ("P-AUROC", "mAD") for name, m in (("CPU", cpu), ("device", gpu))}
    row |= {"P-AUROC in bfloat16": half["P-AUROC"], "ms_per_image": cost["ms_per_image"]}
    row["equal twice"] = again == gpu and bool((again_scores == scores).all())
    row["judged"] = detector not in NOISY
    close = abs(cpu["P-AUROC"] - gpu["P-AUROC"]) <= .02
    row["holds"] = row["equal twice"] and math.isfinite(half["mAD"]) and (close or not row["judged"])

# ---- throughput

class Sizes:
    "What throughput is measured at."
    def __init__(self, quick):
        self.backbone, self.size, self.batch = ("resnet18", 32, 2) if quick else ("wide_resnet50_2", 256, 16)
        self.images, self.product, self.seconds = (4, 256, 0.) if quick else (64, 8192, .5)

class DrawnImages(ImageDataset):
    "Images in memory, in the place of files."
    def __init__(self, number, size):
        self.pictures = np.random.default_rng(0).random((number, 3, size, size), dtype=np.float32)
        self.framing, self.size, self.rows = Framing(size), size, number
        self.paths = [f"{i}.png" for i in range(number)]
        self.cls = [i % 2 for i in range(number)]
        self.masks, self.images, self.defects, self.epoch = None, True, None, 0

    def image(self, i): return self.pictures[i]

@cache
def big_backbone(name, strides, device):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layers = default_layers(level_strides(name), strides)
        return Backbone(name, "random", layers).to(device)

def wait(device):
    if device.type == "cuda": torch.cuda.synchronize(device)

def seconds_each(action, device, least, warm=3, most=50):
    "Seconds of one call, over so many calls as take the least time, after some that do not count."
    for _ in range(warm if least else 1): action()
    wait(device)
    start, calls = time.perf_counter(), 0
    while not calls or calls < most and time.perf_counter() - start < least:
        action()
        wait(device)
        calls += 1
    return (time.perf_counter() - start)/calls

# The precision of the steps, and whether TF32 may be used.
MODES = {"float32": ("float32", False), "TF32": ("float32", True), "bfloat16": ("bfloat16", True)}

@cache
def matrix_rate(mode, n, device, least):
    "Operations per second of one large product: what a step is compared with."
    precision, allowed = MODES[mode]
    a, b = (torch.randn(n, n, device=device).to(getattr(torch, precision)) for _ in range(2))
    with tf32(allowed): return 2*n**3/seconds_each(lambda: a @ b, device, least)

def matrix(name, row, device, sizes):
    for mode in MODES: row[f"{mode}, TFLOP/s"] = matrix_rate(mode, sizes.product, device, sizes.seconds)/1e12

def labelled_anomalies(detector, sizes, device):
    "A batch of labelled anomalies with a square defect each."
    x = torch.rand(sizes.batch, 3, sizes.size, sizes.size, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(sizes.batch, sizes.size, sizes.size)
    mask[:, sizes.size//4:sizes.size//2, sizes.size//4:sizes.size//2] = 1
    path, index = [f"bad{i}.png" for i in range(sizes.batch)], torch.arange(sizes.batch)
    return dict(features=detector.backbone(x.to(device)), index=index, path=path, mask=mask.to(device))

class Workbench:
    "A detector with all that its training needs, at full size."
    def __init__(self, name, device, sizes):
        self.device, self.sizes, self.runtime = device, sizes, Runtime(device)
        self.recipe = detector_class(name).recipe
        backbone = big_backbone(sizes.backbone, self.recipe.strides, device)
        seed_all(0)
        self.detector = create_detector(name, backbone, classes=2).to(device)
        self.images, self.labelled = DrawnImages(sizes.images, sizes.size), None
        if "labelled" in self.detector.needs: self.labelled = labelled_anomalies(self.detector, sizes, device)
        hook = self.hook_batches()
        with torch.no_grad(): self.detector.eval().prepare(hook)
        self.features = hook[0]["features"]
        self.optimizer = make_optimizer(self.detector, self.recipe) if self.recipe.epochs else None
        self.batch = next(iter(self.batches(None, 0)))

    def hook_batches(self):
        "What `prepare` sees. Normal images get defects from here on, where the detector asks for pairs."
        needs, batch, feed_all = self.detector.needs, self.sizes.batch, []
        feed_all += feed(self.detector, self.images, batch, self.runtime)
        if self.labelled is not None: feed_all.append(self.labelled)
        if self.detector.defects is None: return feed_all
        defects = Defects(**self.detector.defects, seed=0, images=self.images)
        if "pairs" in needs: self.images.defects = defects
        if "textures" not in needs: return feed_all
        textures = Textures(defects, self.sizes.size, number=batch)
        return feed_all + list(feed(self.detector, textures, batch, self.runtime))

    def batches(self, features, epoch):
        "The batches of an epoch as a run trains; `features`: a cache, or None."
        batch = self.sizes.batch
        for b in feed(self.detector, self.images, batch, self.runtime, features, 0, epoch):
            if self.labelled is not None: b["labelled"] = self.labelled
            yield b

    def step(self, batch, precision):
        "One training step."
        self.detector.train()
        return train_step(self.detector, batch, self.optimizer, self.recipe, precision)

    def epoch(self, features, precision):
        "Train on all images once."
        for batch in self.batches(features, 1): self.step(batch, precision)

    @torch.no_grad()
    def predict(self):
        "Maps of a batch from its features, on the CPU."
        return self.detector.eval().predict(self.features, (self.sizes.size,)*2).map.float().cpu()

    @torch.no_grad()
    def test(self, images):
        "Maps of images, on the CPU."
        return self.detector.eval()(images).map.float().cpu()

def operations(action):
    "Floating-point operations of products and convolutions in one call, by torch's counter; nan if it fails."
    try:
        with FlopCounterMode(display=False) as counter: action()
    except Exception as e:
        print(f"        operations were not counted: {type(e).__name__} {e}", flush=True)
        return math.nan
    return counter.get_total_flops()

def parts(row, report, actions, least=5):
    "Do named measurements, which fill the row; one that fails or finds no time is named, the others go on."
    failed = []
    for name, action in actions.items():
        try:
            if report.left() < least: raise TimeoutError("out of time")
            row |= action()
        except Exception as e: failed.append(f"{name}: {first_line(e)}")
    if failed: row["error"] = "; ".join(failed)

def measure_steps(bench, mode):
    "Images per second of steps with the features on the device, the share of the matrix rate, and memory."
    precision, allowed = MODES[mode]
    sizes, device = bench.sizes, bench.device
    if device.type == "cuda": torch.cuda.reset_peak_memory_stats(device)
    with tf32(allowed):
        count = operations(lambda: bench.step(bench.batch, precision))
        seconds = seconds_each(lambda: bench.step(bench.batch, precision), device, sizes.seconds)
    rate = matrix_rate(mode, sizes.product, device, sizes.seconds)
    found = {"images/s": sizes.batch/seconds, "GFLOP per image": count/sizes.batch/1e9}
    found["share of the matrix rate"] = count/seconds/rate
    if device.type == "cuda": found["peak memory, MiB"] = torch.cuda.max_memory_allocated(device)/2**20
    return {f"step, {mode}": found}

def measure_epochs(bench, folder, stored, precision):
    "Images per second as a run trains."
    sizes, backbone, features = bench.sizes, bench.detector.backbone, None
    if stored:
        clean = DrawnImages(sizes.images, sizes.size)
        def make(): return torch.utils.data.DataLoader(clean, batch_size=sizes.batch)
        features = open_feature_cache(backbone, make, len(clean), "gpu check", folder, 50, bench.device)
    def epoch(): bench.epoch(features, precision)
    seconds = seconds_each(epoch, bench.device, sizes.seconds, warm=1, most=3)
    return {f"as a run, {'stored' if stored else 'computed'}, {precision}, images/s": sizes.images/seconds}

def measure_tests(bench):
    "Images per second of predictions, from features on the device and from images there."
    sizes, device = bench.sizes, bench.device
    pictures = torch.from_numpy(bench.images.pictures[:sizes.batch]).to(device)
    if device.type == "cuda": torch.cuda.reset_peak_memory_stats(device)
    from_features = seconds_each(bench.predict, device, sizes.seconds)
    from_images = seconds_each(lambda: bench.test(pictures), device, sizes.seconds)
    found = {"features, images/s": sizes.batch/from_features, "images, images/s": sizes.batch/from_images}
    if device.type == "cuda": found["peak memory, MiB"] = torch.cuda.max_memory_allocated(device)/2**20
    return dict(test=found)

def throughput(name, row, device, sizes, report):
    if name == "matrix product": return matrix(name, row, device, sizes)
    if name == "backbone": return backbone_throughput(row, device, sizes)
    bench, actions = Workbench(name, device, sizes), {}
    with tempfile.TemporaryDirectory() as folder:
        if bench.optimizer:
            actions |= {f"step, {mode}": lambda m=mode: measure_steps(bench, m) for mode in MODES}
            for p in ("float32", "bfloat16"):
                actions[f"stored, {p}"] = lambda p=p: measure_epochs(bench, folder, True, p)
                actions[f"computed, {p}"] = lambda p=p: measure_epochs(bench, folder, False, p)
        parts(row, report, {"test": lambda: measure_tests(bench)} | actions)

def backbone_throughput(row, device, sizes):
    "The frozen pyramid with strides 4, 8, 16."
    backbone = big_backbone(sizes.backbone, (4, 8, 16), device)
    x = torch.rand(sizes.batch, 3, sizes.size, sizes.size, device=device)
    count = operations(lambda: backbone(x))
    for mode in ("float32", "TF32"):
        with tf32(MODES[mode][1]): seconds = seconds_each(lambda: backbone(x), device, sizes.seconds)
        rate = matrix_rate(mode, sizes.product, device, sizes.seconds)
        row[f"forward, {mode}, images/s"] = sizes.batch/seconds
        row[f"forward, {mode}, share of the matrix rate"] = count/seconds/rate

# ---- all of it

def chosen(names, patterns): return [n for n in names if not patterns or n.partition(",")[0] in patterns]

def sections(report, device, quick, only):
    "{section: function that runs it}."
    variants, detectors, sizes = chosen(VARIANTS, only), chosen(list_detectors(), only), Sizes(quick)
    measured = ["matrix product", "backbone", *detectors]
    return dict(
        environment=lambda s: each(report, s, ["this machine"], lambda n, r: environment(n, r, device), 0),
        agreement=lambda s: each(report, s, ["backbone", *variants], lambda n, r: agreement(n, r, device)),
        repeatability=lambda s: each(report, s, variants, lambda n, r: repeatability(n, r, device)),
        evaluators=lambda s: each(report, s, ["tensors"], lambda n, r: evaluators(n, r, device)),
        runs=lambda s: each(report, s, detectors, lambda n, r: runs(n, r, device)),
        throughput=lambda s: each(report, s, measured, lambda n, r: throughput(n, r, device, sizes, report)),
    )

@contextlib.contextmanager
def own_cache():
    "Inside, features are stored apart; drawn datasets are kept where they always are."
    drawn = cache_dir()/"embedded"
    drawn.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, MDD_BENCH_CACHE=cache):
        (Path(cache)/"embedded").symlink_to(drawn)
        yield

def parse():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results/gpu"), help="folder of the two reports")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu to test this script")
    parser.add_argument("--quick", action="store_true", help="throughput at tiny size")
    parser.add_argument("--seconds", type=float, default=450, help="what is not begun by then is not run")
    parser.add_argument("--sections", nargs="+", choices=list(NOTES), default=list(NOTES))
    parser.add_argument("--detectors", nargs="+", default=[], help="only these")
    parser.add_argument("--floor", action="store_true", help="print how far rounding brings trainings apart")
    parser.add_argument("--resume", action="store_true", help="go on with the report that is there")
    return parser.parse_args()

def main():
    arguments = parse()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        print("no GPU that torch can use: nothing was checked (--device cpu --quick tests this script)")
        return 2
    warnings.filterwarnings("ignore", message=".*RANDOM")
    if arguments.floor: return print_floor(arguments.detectors)
    if arguments.device.startswith("cuda"): torch.set_num_threads(min(8, os.cpu_count()))
    report = Report(arguments.out, arguments.seconds, arguments.resume)
    device = torch.device(arguments.device)
    todo = sections(report, device, arguments.quick, arguments.detectors)
    with own_cache():
        for section in arguments.sections: todo[section](section)
    report.write()
    print(*report.failures() or ["everything holds"], sep="\n")
    print(f"written: {arguments.out/'gpu_check.md'}, {arguments.out/'gpu_check.json'}")
    return 1 if report.failures() else 0

def print_floor(only):
    for variant in chosen(VARIANTS, only):
        row = {}
        floor(variant, row)
        print(f"{variant:24s} maps {row['end']:.1e}, gradients {row['gradients']:.1e}", flush=True)
    return 0

if __name__ == "__main__": sys.exit(main())
