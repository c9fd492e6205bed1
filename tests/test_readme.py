"The front door: short, with links that lead somewhere, numbers from the results, and Python that runs."
import re, sys
from types import SimpleNamespace
import pytest
from conftest import ROOT

README = (ROOT/"README.md").read_text(encoding="utf-8")

def blocks(language):
    "The code blocks of the README in one language."
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)

def test_it_is_short():
    assert len(README.splitlines()) <= 150

def test_its_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert len(links) > 10
    assert not [link for link in links if not (ROOT/link).exists()]

def test_its_table_is_the_one_of_the_results():
    written = (ROOT/"results"/"embedded-v1"/"benchmark"/"benchmark.md").read_text(encoding="utf-8")
    _, table, *_ = written.split("\n\n")
    assert table.strip() in README

def test_its_python_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, _ = blocks("python")
    exec(code, {})
    printed = capsys.readouterr().out
    assert "| patchcore |" in printed and "| rd4ad † |" in printed and "Not verified" in printed

def test_its_slurm_script_sweeps_on_the_workers_of_a_cluster(tmp_path, monkeypatch):
    "With Dask's own processes in place of SLURM's jobs, and smaller runs."
    distributed = pytest.importorskip("distributed")
    class SLURMCluster(distributed.LocalCluster):
        def __init__(self, cores, memory, walltime, job_extra_directives):
            super().__init__(n_workers=0, threads_per_worker=cores, memory_limit=0, dashboard_address=None)
        def scale(self, n=0, jobs=0): super().scale(2 if jobs else n)     # closing scales to none
    monkeypatch.setitem(sys.modules, "dask_jobqueue", SimpleNamespace(SLURMCluster=SLURMCluster))
    monkeypatch.chdir(tmp_path)
    _, code = blocks("python")
    small = 'data="embedded-v1-smoke", weights="lite0", size=64, detector="patchcore", seed="0,1"'
    changed = code.replace('data="mydata", weights="pretrained", seed="0,1,2"', small)
    assert changed != code
    variables = {}
    exec(changed, variables)
    assert len(variables["swept"].records) == 2 and variables["swept"].failures == []
    assert len(list((tmp_path/"results"/"mine"/"benchmark"/"runs").glob("*/run.ipynb"))) == 2
