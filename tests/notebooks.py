"""Keeps the outputs of the lesson notebooks true: executes those whose code changed, cleans them, stamps each with the hash of its code.

python tests/notebooks.py           what is out of date
python tests/notebooks.py --all     everything
"""
import hashlib, json, os, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent

def lessons():
    "Library notebooks, in reading order; study notebooks carry no outputs."
    return sorted(p for p in (ROOT/"nbs").rglob("*.ipynb") if not any(x.startswith((".", "_")) or x == "studies" for x in p.relative_to(ROOT).parts))

def code_hash(path):
    "A hash of all code cells, in order."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return hashlib.sha256("\0".join("".join(c["source"]) for c in cells if c["cell_type"] == "code").encode()).hexdigest()[:16]

def stamp_of(path):
    "The hash of the code that the outputs were made with."
    return json.loads(path.read_text(encoding="utf-8"))["metadata"].get("mdd_bench", {}).get("executed")

def refresh(path):
    "Execute, clean, stamp."
    env = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"), "MPLBACKEND": ""}
    subprocess.run([BIN/"jupyter", "nbconvert", "--log-level", "ERROR", "--to", "notebook", "--execute", "--inplace", path], check=True, env=env)
    stamp(path)

def stamp(path):
    nb = json.loads(path.read_text(encoding="utf-8"))
    nb["metadata"]["mdd_bench"] = {"executed": code_hash(path)}
    path.write_text(json.dumps(nb, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    subprocess.run([BIN/"nbdev_clean", "--fname", path], check=True, cwd=ROOT)

if __name__ == "__main__":
    for p in lessons():
        if "--all" in sys.argv or stamp_of(p) != code_hash(p): print(p.relative_to(ROOT), flush=True); refresh(p)
