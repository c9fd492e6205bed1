"""Makes the runs of an ablation one after another in one process, with or without a feature store.

python time_ablation.py SPECS --cache-gb 4

SPECS is JSON: a list of fields of runs. The store is empty at the beginning; it and the records are deleted
at the end. One line of JSON is printed: the seconds of each run, from reading its data to its record, and its
mAD.
The number of threads is that of OMP_NUM_THREADS.
"""
import argparse, json, time
from pathlib import Path
from time_run import empty_store
from mdd_bench.running.identity import resolve
from mdd_bench.running.run import run
from mdd_bench.running.runtime import Runtime
from mdd_bench.running.spec import make_spec

def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("specs", type=json.loads)
    parser.add_argument("--cache-gb", type=float, required=True)
    args = parser.parse_args()
    specs, runtime = [make_spec(**fields) for fields in args.specs], Runtime(cache_gb=args.cache_gb)
    resolve(specs[0])                # data that are drawn are drawn into the usual cache
    seconds, found = [], []
    with empty_store() as cache:
        for i, spec in enumerate(specs):
            start = time.perf_counter()
            record = run(spec, Path(cache)/"out"/str(i), runtime)
            seconds.append(time.perf_counter() - start)
            found.append(record.metrics["exact"]["mean"]["mAD"])
    print(json.dumps(dict(seconds=seconds, mAD=found)))

if __name__ == "__main__":
    main()
