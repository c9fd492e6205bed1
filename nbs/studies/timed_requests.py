"""Answers requests for timed passes, so that processes of different environments can take turns.

A contestant gives functions that do some work and return for how many images. It is sent lines of words, a
function's name and its arguments, and answers each with a line of JSON: images and seconds. Before that it
says in a line what it is. It stays on as many cores as it has threads, so that nothing that it does beside
torch is free.
"""
import json, os, sys, time
import torch

def stay_on_cores():
    "Use as many threads as OMP_NUM_THREADS says, on as many cores where the system allows it."
    threads = int(os.environ.get("OMP_NUM_THREADS") or 1)
    torch.set_num_threads(threads)
    if not hasattr(os, "sched_setaffinity"): return
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[:threads])

def answer(about, functions):
    "Say what this is, then answer requests until there are no more."
    channel = os.fdopen(os.dup(1), "w")     # what libraries print goes elsewhere
    os.dup2(2, 1)
    print(json.dumps(about), file=channel, flush=True)
    for line in sys.stdin:
        name, *arguments = line.split()
        start = time.perf_counter()
        images = functions[name](*arguments)
        seconds = time.perf_counter() - start
        print(json.dumps(dict(images=images, seconds=seconds)), file=channel, flush=True)
