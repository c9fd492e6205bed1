"""RD4AD under other schedules, for `mdd_bench sweep benchmark -p detector=schedules.py:Adam2,...`."""
from dataclasses import replace
from mdd_bench.detectors.rd4ad import RD4AD

class Adam2(RD4AD):
    "Adam at 0.002."
    recipe = replace(RD4AD.recipe, lr=2e-3)

class Adam1(RD4AD):
    "Adam at 0.001."
    recipe = replace(RD4AD.recipe, lr=1e-3)

class AdamW2(RD4AD):
    "AdamW at 0.002 with decay 1e-4 and clipping at 1."
    recipe = replace(RD4AD.recipe, optimizer="adamw", lr=2e-3, weight_decay=1e-4, clip=1.)

class Cosine5(RD4AD):
    "Adam at 0.005, a warm-up of 5%, then half a cosine."
    recipe = replace(RD4AD.recipe, drops=(), warmup=.05, cosine=True)

class Cosine2(RD4AD):
    "Adam at 0.002, a warm-up of 5%, then half a cosine."
    recipe = replace(RD4AD.recipe, lr=2e-3, drops=(), warmup=.05, cosine=True)

class Clipped5(RD4AD):
    "The recipe with a warm-up of 5% and gradients clipped at 1."
    recipe = replace(RD4AD.recipe, warmup=.05, clip=1.)
