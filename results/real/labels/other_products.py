"""Means over the products on whose test images nothing was chosen, from the records beside this file: writes
`other_products.md`. DMAD's weight of labels was chosen on bottle, capsules and rope (lesson 26b), so a mean with
these three is optimistic."""
from pathlib import Path
import pandas as pd
from mdd_bench.running.store import load_records

HERE = Path(__file__).parent
PRODUCTS = ["commutator", "cookie", "magnetic_tile", "transistor"]
METRICS = ["I-AUROC", "P-AP", "AUPRO", "mAD"]

rows = []
for record in load_records(HERE):
    per_class = record.metrics["exact"]["per_class"]
    means = {name: 100*sum(per_class[c][name] for c in PRODUCTS)/len(PRODUCTS) for name in METRICS}
    rows.append(dict(detector=record.spec["detector"], labelled=record.spec["labelled"]) | means)
grouped = pd.DataFrame(rows).groupby(["detector", "labelled"])
lines = [f"Means over {', '.join(PRODUCTS)}; percent, mean and deviation over the seeds of [labels.md](labels.md). Written by "
         "`python other_products.py`.", "", f"| detector | labelled | seeds | {' | '.join(METRICS)} |",
         "| :--- | ---: | ---: |" + " ---: |"*len(METRICS)]
for (detector, labelled), of_arm in grouped:
    numbers = [f"{of_arm[name].mean():.1f} ± {of_arm[name].std():.1f}" for name in METRICS]
    lines.append(f"| {detector} | {labelled} | {len(of_arm)} | {' | '.join(numbers)} |")
(HERE/"other_products.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
