"""Benchmarks of multi-class anomaly detection: one model for all product classes.

The public names are loaded when they are first used, so that `import mdd_bench` costs nothing.
"""
__version__ = "0.1.0"

_HOMES = {
    "Evaluator": "evaluation.metrics",
    "Runtime": "running.runtime",
    "create_detector": "detectors.detector",
    "list_detectors": "detectors.detector",
    "load_records": "running.store",
    "make_spec": "running.spec",
    "run": "running.run",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name):
    "A public name from its module."
    from importlib import import_module
    if name not in _HOMES: raise AttributeError(f"mdd_bench has no {name!r}; it has {', '.join(_HOMES)}")
    return getattr(import_module(f"mdd_bench.{_HOMES[name]}"), name)


def __dir__():
    return sorted({*globals(), *_HOMES})
