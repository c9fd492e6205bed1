"""Keeps the notebooks true to the code, for `make notebooks`.

The parameter cells of the study notebooks are written from the declarations of the library. The lesson
notebooks whose code changed are executed, cleaned and stamped with the hash of their code.

python tests/notebooks.py           what is out of date
python tests/notebooks.py --all     everything
"""
import hashlib, json, os, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
STUDIES = ROOT/"nbs"/"studies"
RUN_SMOKE = dict(data="embedded-v1-smoke", size=64, weights="lite0", epochs=1)


def lessons():
    "Library notebooks, in reading order; study notebooks carry no outputs."
    def skipped(path):
        return any(part.startswith((".", "_")) or part == "studies" for part in path.relative_to(ROOT).parts)
    return sorted(path for path in (ROOT/"nbs").rglob("*.ipynb") if not skipped(path))


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def write(path, notebook):
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def source(cell):
    return "".join(cell["source"])


def code_hash(path):
    "A hash of all code cells, in order."
    cells = [source(c) for c in read(path)["cells"] if c["cell_type"] == "code"]
    return hashlib.sha256("\0".join(cells).encode()).hexdigest()[:16]


def stamp_of(path):
    "The hash of the code that the outputs were made with."
    return read(path)["metadata"].get("mdd_bench", {}).get("executed")


def clean(path):
    subprocess.run([BIN/"nbdev_clean", "--fname", path], check=True, cwd=ROOT)


def refresh(path):
    "Execute, stamp, clean."
    env = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"), "MPLBACKEND": ""}
    options = ["--log-level", "ERROR", "--to", "notebook", "--execute", "--inplace"]
    subprocess.run([BIN/"jupyter", "nbconvert", *options, path], check=True, env=env)
    notebook = read(path)
    notebook["metadata"]["mdd_bench"] = {"executed": code_hash(path)}
    write(path, notebook)
    clean(path)


def studies_with_runs():
    "{notebook: the parameter cell that it should have} of the studies that make runs, and of `run.ipynb`."
    from mdd_bench.running.study import Study, list_studies, load_study, parameter_cell
    studies = [load_study(name) for name in list_studies()]
    studies = [s for s in studies if not s.parameters] + [Study("run", smoke=RUN_SMOKE)]
    return {STUDIES/f"{study.name}.ipynb": parameter_cell(study) for study in studies}


def parameters(notebook):
    "The cell that papermill calls the parameters."
    return next(c for c in notebook["cells"] if "parameters" in c["metadata"].get("tags", []))


def write_parameters(path, text):
    "Bring the parameter cell of a study's notebook up to date."
    notebook = read(path)
    cell = parameters(notebook)
    if source(cell) == text: return
    cell["source"] = text.splitlines(keepends=True)
    write(path, notebook)


if __name__ == "__main__":
    for path, text in studies_with_runs().items(): write_parameters(path, text)
    for path in lessons():
        if "--all" in sys.argv or stamp_of(path) != code_hash(path):
            print(path.relative_to(ROOT), flush=True)
            refresh(path)
