"""Means of the records beside this file, over all products and over those on whose test images nothing was
chosen: writes `other_products.md`. DMAD's weight of labels was chosen on bottle, capsules and rope (lesson 26b),
so a mean with these three is optimistic."""
from pathlib import Path
import pandas as pd
from mdd_bench.running.store import load_records

HERE = Path(__file__).parent
PRODUCTS = ["commutator", "cookie", "magnetic_tile", "transistor"]
FEATURES = {"tf_efficientnet_lite0": "lite0", "resnet18": "ResNet-18"}
METRICS = ["I-AUROC", "P-AP", "AUPRO", "mAD"]

def arm_of(record):
    "What tells rows apart: features, detector, labelled anomalies."
    spec = record.spec
    strides = ", ".join(str(2**(layer + 1)) for layer in spec["layers"])      # both networks halve at each level
    ratio = spec["options"].get("coreset_ratio") if spec["detector"] == "patchcore" else None
    length = f", {spec['steps']} steps" if spec["steps"] else ""
    detector = spec["detector"] + (f", {ratio:.0%}" if ratio else "") + length
    return dict(features=f"{FEATURES[spec['backbone']]}, strides {strides}", detector=detector, labelled=spec["labelled"])

def means_of(record):
    "The mean mAD over all products, and the metrics' means over the others, in percent."
    per_class = record.metrics["exact"]["per_class"]
    means = {name: 100*sum(per_class[c][name] for c in PRODUCTS)/len(PRODUCTS) for name in METRICS}
    return {"all seven: mAD": 100*record.metrics["exact"]["mean"]["mAD"]} | means

def cell(values):
    "Mean and deviation; of a single seed the mean alone."
    return f"{values.mean():.1f}" + (f" ± {values.std():.1f}" if len(values) > 1 else "")

def page(folder):
    "The page for the records of a folder, in Markdown."
    rows = pd.DataFrame(arm_of(record) | means_of(record) for record in load_records(folder))
    columns = ["all seven: mAD", *METRICS]
    lines = [
        f"Means over all seven products, then over {', '.join(PRODUCTS)}; percent, mean and deviation over seeds. The "
        "rows have the same test images for each seed. DMAD was trained for 880 steps. Written by "
        "`python other_products.py`.", "",
        f"| features | detector | labelled | seeds | {' | '.join(columns)} |",
        "| :--- | :--- | ---: | ---: |" + " ---: |"*len(columns),
    ]
    for (features, detector, labelled), of_arm in rows.groupby(["features", "detector", "labelled"], sort=True):
        numbers = " | ".join(cell(of_arm[name]) for name in columns)
        lines.append(f"| {features} | {detector} | {labelled} | {len(of_arm)} | {numbers} |")
    return "\n".join(lines) + "\n"

if __name__ == "__main__":
    (HERE/"other_products.md").write_text(page(HERE), encoding="utf-8")
