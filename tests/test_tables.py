"Tables as they are printed: golden texts from fixed records, every number found again, LaTeX compiled."
import re, shutil, subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from conftest import ROOT
from mdd_bench.errors import SpecError
from mdd_bench.reporting.arms import comparable
from mdd_bench.reporting.captions import how_it_was_made
from mdd_bench.reporting.formats import FITTED, check_marks, latex_text, to_html, to_latex, turned
from mdd_bench.reporting.tables import (POOLED, caption, costs, image_metrics, page, per_class, per_kind,
                                        pooled, summary, to_markdown, write_table)
from mdd_bench.running.store import load_records

METRICS = ("I-AUROC", "P-AP", "P-FPR95")
NASTY = r"a$b_c% \x{y}~z^&#|<[*"


def fixed(detector, seed, levels, classes=("a$b_c%", "[tile]"), **fields):
    "A record of fixed numbers: the second class is .1 below the first, and a seed adds .01."
    spec = dict(
        data="/data/fabrics", size=128, resize="stretch", setting="unified", detector=detector, options={},
        backbone="resnet18", weights="pretrained", layers=[2, 3], labelled=0, scheme="pooled",
        label_classes=None, label_seed=None, hold_out=None, epochs=10, steps=None, batch=16, seed=seed,
    ) | fields
    per_class = {cls: {m: level + .01*seed - .1*i for m, level in zip(METRICS, levels)}
                 for i, cls in enumerate(classes)}
    mean = {m: float(np.mean([scores[m] for scores in per_class.values()])) for m in METRICS}
    per_kind = {cls: {"cut": scores, "100%_dent": scores} for cls, scores in per_class.items()}
    cost = dict(prepare_s=1, train_s=20.25, test_s=2, ms_per_image=8, parameters_trained=2e6,
                bytes_test_without_backbone=3*2**20, device="cpu", features="cached")
    return SimpleNamespace(
        id=f"{detector}-{seed}", spec=spec, cost=cost,
        metrics={"exact": dict(mean=mean, per_class=per_class, per_kind=per_kind)},
        provenance=dict(data_fingerprint="d1", weights_hash="w1", git_commit="0123456789", steps=100,
                        versions=dict(mdd_bench="0.1.0", torch="2.9.0")),
    )


@pytest.fixture
def records():
    "Three methods; two of them print alike in one metric, the last has one seed and was trained too briefly."
    brief = fixed("ours_v2", 0, (.9, .7, .25), epochs=1)
    brief.provenance["converged_steps"] = 500
    return [*(fixed("alpha", seed, (.8, .6, .3)) for seed in (0, 1)),
            *(fixed("beta", seed, (.85, .6, .2), options=dict(memory=50)) for seed in (0, 1)), brief]


# ---- golden texts

MARKDOWN = """\
| detector | I-AUROC | P-AP | P-FPR95 |
| :--- | ---: | ---: | ---: |
| alpha | 75.5 ± 0.7 | <u>55.5 ± 0.7</u> | 25.5 ± 0.7 |
| beta | <u>80.5 ± 0.7</u> | <u>55.5 ± 0.7</u> | **15.5 ± 0.7** |
| ours_v2 † | **85.0** | **65.0** | <u>20.0</u> |"""

LATEX = r"""\begin{table}
\centering
\caption{Two \texttt{a\_b}.}
\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%
\begin{tabular}{lrrr}
\toprule
detector & I-AUROC & P-AP & P-FPR95 \\
\midrule
alpha & 75.5 $\pm$ 0.7 & \underline{55.5 $\pm$ 0.7} & 25.5 $\pm$ 0.7 \\
beta & \underline{80.5 $\pm$ 0.7} & \underline{55.5 $\pm$ 0.7} & \textbf{15.5 $\pm$ 0.7} \\
ours\_v2 $^\dagger$ & \textbf{85.0} & \textbf{65.0} & \underline{20.0} \\
\bottomrule
\end{tabular}}
\end{table}"""

CAPTION = ("Mean over two classes of `fabrics` in percent, one to two seeds (± sample standard deviation). "
           "ResNet-18 features of strides 8 and 16 at 128 px. Best in bold, second underlined. "
           "† Not converged: trained for fewer steps than it takes, or may take.")

DETAILS = """\
<details>
<summary>How this was made</summary>

- Data `fabrics`, fingerprint d1
- Protocol `exact`; F1max uses the best threshold on the test set
- The same in all rows: size 128; resize stretch; setting unified; backbone resnet18; weights pretrained; \
layers 2,3; labelled 0; batch 16; weights_hash w1
- Not converged: ours_v2 (100 of 500 steps)
- Versions: mdd_bench 0.1.0; torch 2.9.0; commits 0123456
- Not verified against published numbers: alpha, beta, ours_v2

| detector | trained | seeds | options | records |
| :--- | :--- | :--- | :--- | :--- |
| alpha | 10 epochs (100 steps) | 0, 1 | - | alpha-0 alpha-1 |
| beta | 10 epochs (100 steps) | 0, 1 | memory=50 | beta-0 beta-1 |
| ours_v2 | 1 epoch (100 steps) | 0 | - | ours_v2-0 |

</details>"""

TURNED = """\
| P-AP | alpha | beta | ours_v2 † |
| :--- | ---: | ---: | ---: |
| a$b_c% | <u>60.5 ± 0.7</u> | <u>60.5 ± 0.7</u> | **70.0** |
| [tile] | <u>50.5 ± 0.7</u> | <u>50.5 ± 0.7</u> | **60.0** |
| mean | <u>55.5 ± 0.7</u> | <u>55.5 ± 0.7</u> | **65.0** |"""

CSV = """\
detector,I-AUROC,I-AUROC std,n,records
alpha,0.755,0.0071,2,alpha-0 alpha-1
beta,0.805,0.0071,2,beta-0 beta-1
ours_v2,0.85,,1,ours_v2-0
"""


def test_markdown(records):
    assert to_markdown(summary(records, metrics=METRICS)) == MARKDOWN


def test_latex(records):
    assert to_latex(summary(records, metrics=METRICS), "Two `a_b`.") == LATEX


def test_csv(records, tmp_path):
    _, path, _ = write_table(tmp_path, "t", summary(records, metrics=METRICS[:1]).round(4))
    assert path.read_text(encoding="utf-8") == CSV


def test_caption_and_details(records):
    assert caption(records) == CAPTION
    assert how_it_was_made(records) == DETAILS


def test_classes_as_rows(records):
    assert to_markdown(turned(per_class(records))) == TURNED


def test_a_page_has_caption_table_and_details(records, tmp_path):
    table = summary(records, metrics=METRICS)
    expected = f"{CAPTION}\n\n{MARKDOWN}\n\n{DETAILS}"
    assert page(table, caption(records)) == expected
    markdown, _, latex = write_table(tmp_path, "t", table, caption(records))
    assert markdown.read_text(encoding="utf-8") == expected + "\n"
    assert latex.read_text(encoding="utf-8") == to_latex(table, caption(records)) + "\n"


def test_costs_are_printed_in_their_units(records):
    rows = to_markdown(costs(records)).splitlines()
    assert rows[2] == "| alpha | 21.2 | 2 | 8 | 2 | 3 | cpu |"


# ---- captions

@pytest.mark.parametrize("changes, by, text", [
    (dict(setting="separate"), "detector", "in percent, one seed, one model for each class. ResNet-18"),
    (dict(backbone="vit_small", layers=[3]), "detector", "`vit_small` features of level 3 at 128 px."),
    (dict(weights="weights/mine.pth"), "detector", "of strides 8 and 16 (weights `mine.pth`) at 128 px."),
    (dict(resize="crop"), "detector", "from images cropped to 128 px."),
])
def test_what_all_rows_share_is_told_once(changes, by, text):
    assert text in caption([fixed(name, 0, (.8, .6, .3), **changes) for name in ("a", "b")], by=by)


def test_what_rows_differ_in_is_a_column_and_not_in_the_caption():
    pair = [fixed("a", 0, (.8, .6, .3), size=size) for size in (128, 256)]
    assert "px" not in caption(pair, by="size")
    assert to_markdown(summary(pair, "size", metrics=METRICS)).startswith("| size |")
    own = [fixed("a", 0, (.8, .6, .3)), fixed("b", 0, (.8, .6, .3), backbone="resnet50")]
    own[1].provenance["weights_hash"] = "w2"
    assert "Images at 128 px." in caption(own) and "ResNet" not in caption(own)
    assert "| b | resnet50 | w2 | b-0 |" in how_it_was_made(own)


def test_a_caption_stays_short_for_many_arms():
    arms = [fixed("a", 0, (.8, .6, .3), options=dict(width=i, depth=2*i), epochs=i) for i in range(1, 14)]
    for i, record in enumerate(arms): record.id = f"a-{i}"
    names = {record.id: f"arm {record.id}" for record in arms}
    assert len(caption(arms, by=names)) < 250
    assert all(record.id in how_it_was_made(arms, by=names) for record in arms)


def test_seeds_in_another_order_are_the_same_seeds():
    records = [fixed(name, seed, (.8, .6, .3)) for name, seed in (("a", 0), ("a", 1), ("b", 1), ("b", 0))]
    assert "seeds 0, 1" in how_it_was_made(records)


def test_runs_of_one_seed_are_not_called_seeds():
    records = [fixed("a", seed, (.8, .6, .3), label_seed=label) for seed in (0, 1) for label in (0, 1)]
    assert "four runs (±" in caption(records)


# ---- every number is found again

NUMBER = re.compile(r"[\d.]+(?: ± [\d.]+)?")


def recomputed(records, metric, cls=None):
    "`mean ± std` of the records' own numbers, by hand."
    scores = [r.metrics["exact"]["per_class"][cls] if cls else r.metrics["exact"]["mean"] for r in records]
    values = np.array([block[metric] for block in scores])
    text = f"{100*values.mean():.1f}"
    return text + (f" ± {100*values.std(ddof=1):.1f}" if len(values) > 1 else "")


def cells(markdown):
    "The rows of a Markdown table, without its head."
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in markdown.splitlines()[2:]]


def test_every_number_is_found_again_in_its_records(records):
    table = summary(records, metrics=METRICS)
    by_id = {record.id: record for record in records}
    for (_, *texts), ids in zip(cells(to_markdown(table)), table["records"], strict=True):
        of_row = [by_id[id] for id in ids.split()]
        for text, metric in zip(texts, METRICS, strict=True):
            assert NUMBER.search(text).group() == recomputed(of_row, metric)


def test_every_number_of_the_classes_is_found_again(records):
    table = per_class(records, metric="P-AP")
    by_id = {record.id: record for record in records}
    rows = cells(to_markdown(turned(table)))
    for name, *texts in rows:
        for text, ids in zip(texts, table["records"], strict=True):
            of_arm = [by_id[id] for id in ids.split()]
            assert NUMBER.search(text).group() == recomputed(of_arm, "P-AP", None if name == "mean" else name)
    assert len(rows) == 3


def test_kinds_are_found_again(records):
    table = per_kind(records, metric="P-AP")
    assert [name for name in table if "," in name and "std" not in name][1] == "a$b_c%, 100%_dent"
    assert table.loc["alpha", "[tile], cut"] == pytest.approx((.5 + .51)/2)


# ---- all classes pooled

RECORDS = ROOT/"results"/"embedded-v1"/"benchmark"


def test_pooled_metrics_are_those_of_the_scores():
    records = load_records(RECORDS)
    for record in records:
        for cls, scores in record.scores().groupby("cls"):
            own = record.metrics["exact"]["per_class"][cls]
            assert image_metrics(scores.label, scores.score) == pytest.approx({m: own[m] for m in POOLED})
    table = pooled(records)
    of_arm = [r.scores() for r in records if r.spec["detector"] == "patchcore"]
    ranks = [(frame.score.rank()[frame.label == 1].sum(), frame.label.sum(), len(frame)) for frame in of_arm]
    by_hand = [(total - n*(n + 1)/2)/(n*(whole - n)) for total, n, whole in ranks]     # Mann and Whitney's U
    assert table.loc["patchcore", "I-AUROC pooled"] == pytest.approx(np.mean(by_hand))
    assert table["I-AUROC"].tolist() == summary(records)["I-AUROC"].tolist()
    assert "I-AUROC pooled" in to_markdown(table)


def test_pooled_metrics_exist_for_the_first_protocol_only():
    record = load_records(RECORDS)[0]
    record.metrics["ader"] = record.metrics["exact"]
    with pytest.raises(SpecError, match=f"{record.id} keeps the scores of protocol exact, not of ader"):
        pooled([record], protocol="ader")
    assert np.isnan(image_metrics(np.array([0, 1]), np.array([.1, np.nan]))["I-AP"])


# ---- mixtures

def test_records_that_do_not_belong_together_are_named(records):
    stranger = fixed("gamma", 0, (.8, .6, .3), size=256)
    with pytest.raises(SpecError, match=r"size: 128 \(records alpha-0, alpha-1, beta-0 and 2 more\); "
                                        r"256 \(records gamma-0\)"):
        summary([*records, stranger])
    other = fixed("gamma", 0, (.8, .6, .3))
    other.provenance["data_fingerprint"] = "d2"
    for call in (comparable, caption, how_it_was_made, per_class, costs):
        with pytest.raises(SpecError, match=r"data_fingerprint: d1 .*; d2 \(records gamma-0\)"):
            call([*records, other])


# ---- check marks

def test_check_marks_stand_for_parts(records):
    parts = {"beta": ["memory"], "ours_v2": ["memory", "gate"]}
    table = check_marks(summary(records, metrics=METRICS[:1]), parts)
    rows = cells(to_markdown(table))
    assert [row[:3] for row in rows] == [["alpha", "", ""], ["beta", "✓", ""], ["ours_v2 †", "✓", "✓"]]
    assert r"beta & $\checkmark$ &  & \underline{80.5 $\pm$ 0.7} \\" in to_latex(table)
    with pytest.raises(SpecError, match="Did you mean 'beta'"):
        check_marks(summary(records, metrics=METRICS), {"betta": ["memory"]})


# ---- HTML and LaTeX for real

def test_html_marks_and_escapes(records):
    records = [*records, fixed("<script>", 0, (.1, .1, .9))]
    html = to_html(summary(records, metrics=METRICS), "Less & <more>.")
    assert "<script>" not in html and "&lt;script&gt;" in html and "Less &amp; &lt;more&gt;." in html
    assert html == to_html(summary(records, metrics=METRICS), "Less & <more>.")
    assert re.search(r"font-weight: bold", html) and re.search(r"text-decoration: underline", html)


def every_table(records):
    "A table of each kind, with names that LaTeX would stumble over."
    nasty = fixed(NASTY, 0, (.7, .5, .4))
    records = [*records, nasty]
    parts = {"beta": ["a_memory"], NASTY: ["100%"]}
    main = summary(records, metrics=METRICS)
    return [(main, caption(records)), (turned(per_class(records)), NASTY), (check_marks(main, parts), ""),
            (per_kind(records), "**RANDOM `a_b`.**"), (costs(records), "Costs.")]


def test_latex_has_no_bare_special_character(records):
    for table, text in every_table(records):
        latex = to_latex(table, text).replace(FITTED, "")
        bare = re.sub(r"\\[&%$#_{}]|\$\\(pm|checkmark)\$|\$\^\\d?dagger\$", "", latex)
        assert not re.search(r"[%$#_~^|<>]", bare), bare
        assert not re.search(r"^[\[*]", latex, re.MULTILINE)
    assert latex_text("`a_b` **c `d_e`**") == r"\texttt{a\_b} \textbf{c \texttt{d\_e}}"


DOCUMENT = r"""\documentclass{article}
\usepackage[T1]{fontenc}
\usepackage{booktabs,graphicx,amssymb}
\begin{document}
%s
\end{document}
"""


@pytest.mark.skipif(not (shutil.which("pdflatex") or shutil.which("tectonic")), reason="no TeX is installed")
def test_latex_compiles(records, tmp_path):
    tables = [to_latex(table, text) for table, text in every_table(records)]
    (tmp_path/"paper.tex").write_text(DOCUMENT % "\n\n".join(tables), encoding="utf-8")
    pdflatex = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error"]
    program = pdflatex if shutil.which("pdflatex") else ["tectonic"]
    done = subprocess.run([*program, "paper.tex"], cwd=tmp_path, capture_output=True, encoding="latin-1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Overfull" not in done.stdout
    assert Path(tmp_path/"paper.pdf").stat().st_size > 10_000
