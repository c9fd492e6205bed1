"""Applies the rule of plan.md to the records beside this file and writes answers.md: `python decide.py`.

A question compares arms at one length. An arm is a detector or options that differ from those answered before.
"""
from pathlib import Path
import pandas as pd
from mdd_bench.reporting.lengths import pooled_deviation
from mdd_bench.running.store import load_records

HERE = Path(__file__).parent
STEPS = 1725
METRICS = ["mAD", "I-AUROC", "P-AP", "AUPRO", "P-FPR95-good"]
UNDECIDED = dict(
    branches="both", decoder="mirror", memory="none", bottleneck="separate", dist_weight=.1,
    anomaly_probability=1., textures="procedural", fusion="tr", scale="raw")
MEMORY = dict(memory="class", memory_at="restoration", read="concat", prototypes=32)

def scores_of(records, detector: str, steps: int, options: dict) -> pd.DataFrame:
    "A row for each seed of the arm, with its metrics in percent."
    rows = {}
    for record in records:
        spec = record.spec
        same = {name: spec["options"].get(name) for name in options} == options
        if same and (spec["detector"], spec["steps"]) == (detector, steps):
            rows[spec["seed"]] = {name: 100*record.metrics["exact"]["mean"][name] for name in METRICS}
    return pd.DataFrame(rows).T.sort_index()

def answer(scores: pd.DataFrame, reference: str) -> str:
    "The arm that the rule chooses; `scores` has a row for each arm and a column for each seed."
    means = scores.dropna().mean(axis=1)    # an arm that lost the race has one seed, and no say
    best = means.idxmax()
    return best if means[best] > means[reference] + pooled_deviation(scores) else reference

def question(records, title: str, arms: dict, reference: str, steps=STEPS, base=None) -> str:
    "The table of one question in Markdown, with its answer; the reference stands where no arm is clearly above."
    tables = {}
    for name, arm in arms.items():
        arm = dict(detector=arm) if isinstance(arm, str) else dict(detector="mddnet") | (base or {}) | arm
        table = scores_of(records, arm.pop("detector"), steps, arm)
        if len(table): tables[name] = table
    if reference not in tables or len(tables) < 2: return f"## {title}\n\nNot run yet.\n"
    seeds = pd.DataFrame({name: table.mAD for name, table in tables.items()}).T
    means = pd.DataFrame({name: table.mean() for name, table in tables.items()}).T
    lines = [f"## {title} ({steps} steps)", ""]
    lines.append("| arm | " + " | ".join([*METRICS, *(f"mAD, seed {seed}" for seed in seeds)]) + " |")
    lines.append("| :--- | " + " | ".join(["---:"]*(len(METRICS) + len(seeds.columns))) + " |")
    for name in tables:
        numbers = [f"{number:.1f}".replace("nan", "-") for number in (*means.loc[name], *seeds.loc[name])]
        lines.append(f"| {name} | " + " | ".join(numbers) + " |")
    if seeds.count(axis=1).max() < 2: return "\n".join([*lines, "", "One seed only: no answer yet.", ""])
    spread, chosen = pooled_deviation(seeds), answer(seeds, reference)
    lines += ["", f"Deviation over seeds, pooled: {spread:.2f}; compared with `{reference}`. Chosen: **{chosen}**.", ""]
    return "\n".join(lines)

MAPS = {
    "TR": dict(fusion="tr", scale="raw"), "RI": dict(fusion="ri", scale="raw"),
    "TR + RI": dict(fusion="sum", scale="raw"), "TR x RI": dict(fusion="product", scale="raw"),
    "TR normal": dict(fusion="tr", scale="normal"), "RI normal": dict(fusion="ri", scale="normal"),
    "TR + RI normal": dict(fusion="sum", scale="normal"),
}

READS = {"none": {}, "concat": MEMORY, "replace": MEMORY | dict(read="replace")}   # with 32 prototypes

# with class-aware memory, and one seed only where an arm fell behind in the race
CHOSEN = UNDECIDED | MEMORY | dict(scale="normal")
WEIGHTS = {"0.1": {}, "none": dict(dist_weight=0.), "1": dict(dist_weight=1.)}
NUMBERS = {"class 32": {}, "class 8": dict(prototypes=8), "class 128": dict(prototypes=128)}
PLACES = {"before the restoration decoder": {},
          "before both": dict(memory_at="both", bottleneck="shared")}
INPUTS = {"every image abnormal, drawn textures": {}, "half of them": dict(anomaly_probability=.5),
          "textures from images": dict(textures="images")}

LIGHT = dict(decoder="light", scale="normal")
LIGHTS = {"light": {}, "two depthwise paths": dict(detector="lights.py:Deep"),
          "one dense path": dict(detector="lights.py:Dense"),
          "dense bottleneck too": dict(detector="lights.py:Whole")}

def questions(records) -> list[str]:
    "All questions, in the order of the plan."
    schedules = {"Adam .005 (recipe)": "rd4ad", "Adam .002": "schedules.py:Adam2", "Adam .001": "schedules.py:Adam1",
                 "AdamW .002": "schedules.py:AdamW2"}
    curved = {"recipe": "rd4ad", "Adam .005, cosine": "schedules.py:Cosine5",
              "Adam .002, cosine": "schedules.py:Cosine2", "recipe, warm-up, clipping": "schedules.py:Clipped5"}
    return [
        question(records, "Schedule of RD4AD", schedules, "Adam .005 (recipe)", 1150),
        question(records, "More schedules of RD4AD", curved, "recipe"),
        question(records, "Fusion and scale", MAPS, "TR + RI", base=UNDECIDED),
        question(records, "Class-aware memory: read", READS, "concat", base=UNDECIDED | dict(scale="normal")),
        question(records, "Light decoder, without memory", dict(mirror={}, light=dict(decoder="light")), "mirror",
                 base=UNDECIDED | dict(scale="normal")),
        question(records, "Stronger light decoders, without memory", LIGHTS, "light", base=UNDECIDED | LIGHT),
        question(records, "Weight of L_dist", WEIGHTS, "0.1", base=CHOSEN),
        question(records, "Number of prototypes", NUMBERS, "class 32", base=CHOSEN),
        question(records, "Place of the memory", PLACES, "before the restoration decoder", base=CHOSEN),
        question(records, "Bottleneck", dict(separate={}, shared=dict(bottleneck="shared")), "separate", base=CHOSEN),
        question(records, "Defects and textures", INPUTS, "every image abnormal, drawn textures", base=CHOSEN),
        question(records, "No labels", {"class": {}, "cluster": dict(memory="cluster")}, "class", base=CHOSEN),
    ]

if __name__ == "__main__":
    found = load_records(HERE) + load_records(HERE.parent/"lengths")
    head = "# Answers\n\nWritten by `decide.py`; percent, means over eight classes and two seeds. The rule is in [plan.md](plan.md).\n"
    (HERE/"answers.md").write_text("\n".join([head, *questions(found)]), encoding="utf-8")
