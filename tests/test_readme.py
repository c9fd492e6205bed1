"The front door: short, with links that lead somewhere, numbers from the results, and Python that runs."
import re
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
    _, table = written.split("\n\n")
    assert table.strip() in README

def test_its_python_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    [code] = blocks("python")
    exec(code, {})
    printed = capsys.readouterr().out
    assert "| patchcore |" in printed and "| rd4ad † |" in printed and "Not verified" in printed
