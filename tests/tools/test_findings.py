"""Findings of the published benchmark, held against figures. Oracle: by hand, on a few made-up rows."""

import json
from random import Random

import pytest
from safetensors.numpy import save_file

import taxonomy
from refimpl.inference.kv_cache.dropped.streaming_llm import StreamingLLM
from refimpl.inference.kv_cache.protocol import tokens_to_keep
from refimpl.inference.kv_cache.quantized.kivi import KIVI
from refimpl.long_context.questions import LENGTH
from tools import docs, findings
from tools.findings import Missing, Orders, Scores

EVERY = (*findings.TASKS, "needle", "needle_64")


def row(method, task, score, *, prefill="whole", seed=0, error=None, **settings):
    axes = {"task": task, "question": "seen", "prefill": prefill}
    return {
        "method": method, "settings": settings, "axes": axes, "seed": seed, "error": error,
        "figures": {} if error else {"score": score},
    }  # fmt: skip


def rows(method, score, tasks=findings.TASKS, **more):
    return [row(method, task, score, **more) for task in tasks]


def full(score=1.0, tasks=findings.TASKS, **more):
    return [r for way in ("whole", "chunks") for r in rows("full cache", score, tasks, prefill=way, **more)]


def answer(rows, says):
    (found,) = [a for a in findings.answers({"rows": rows}) if says in a.finding.says]
    return found


def page(tmp_path, rows, **learnt):
    """What the template makes of these rows."""
    site = docs.Site(docs.ROOT, tmp_path, taxonomy.load(), {})
    site.measured = {}
    site.templates = docs._templates(site)
    found = {"findings": findings.answers({"rows": rows}), "beside": findings.side_by_side({"rows": rows})}
    site.page("page.md", "findings.md.j2", **found, published=findings.read(), learnt=learnt)
    return (tmp_path / "page.md").read_text(encoding="utf-8")


def test_shares_are_of_the_uncompressed_score_read_in_the_same_way():
    """Oracle: by hand: the mean of two seeds over what the full cache scores, whole or in chunks."""
    rows = [
        row("full cache", "needle", 0.8),
        row("full cache", "needle", 0.4, prefill="chunks"),
        row("h2o", "needle", 0.2, compression=4),
        row("h2o", "needle", 0.6, compression=4, seed=1),
        row("h2o", "needle", 0.9, compression=2),
        row("h2o", "needle", 0.3, compression=4, prefill="chunks"),
        row("snapkv", "needle", 0.1, compression=4, prefill="chunks"),
        row("tova", "needle", 0, compression=4, error="E: no"),
    ]
    scores = Scores(rows)
    assert scores.score("h2o", "needle", compression=4) == 0.4
    assert scores.share("h2o", "needle", compression=4) == 0.5
    assert scores.share(["h2o", "snapkv"], "needle", compression=4, prefill="chunks") == pytest.approx(0.5)
    with pytest.raises(Missing, match=r"tova .* on .*needle"):
        scores.share(["h2o", "tova"], "needle", compression=4)


def test_streaming_llm_is_read_in_chunks_as_it_was_for_the_published_figures():
    """Oracle: by hand: 0.1 in chunks, over the full cache's 0.5 in chunks, and not 0.9 whole; InfLLM's and H2O's are those read whole."""
    whole, chunks = {"prefill": "whole", "compression": 4}, {"prefill": "chunks", "compression": 4}
    tasks = [*rows("full cache", 1.0), *rows("full cache", 0.5, prefill="chunks")]
    for method in ("streaming-llm", "infllm", "h2o", "llmlingua2"):
        tasks += rows(method, 0.9, **whole) + rows(method, 0.1, **chunks)
    assert Scores(tasks).share("streaming-llm", "retrieval", compression=4) == pytest.approx(0.2)
    assert Scores(tasks).share("streaming-llm", "retrieval", **whole) == pytest.approx(0.9)
    assert Scores(tasks).share(["infllm", "h2o"], "retrieval", compression=4) == pytest.approx(0.9)
    assert answer(tasks, "shortening the prompt ruins").here.pairs == [(pytest.approx((0.2 + 0.9) / 2), 0.9)]
    beside = {b.method: b.here for b in findings.side_by_side({"rows": tasks}).tasks if b.settings == "compression 4"}
    assert beside["streaming-llm"] == pytest.approx([20.0] * 7)
    assert beside["infllm"] == pytest.approx([90.0] * 7)


def test_the_published_rows_hold_what_the_paper_found():
    """Oracle: by hand from the published scores: Griffin 4.0 and 9.0 of 67.0 in retrieval, Mamba and RWKV 1.2 and 4.0."""
    told = {a.finding.says: a.published for a in findings.answers({"rows": []})}
    assert sorted(orders.answer for orders in told.values()) == ["no figures"] + ["yes"] * (len(told) - 1)
    assert all(len(orders.pairs) <= 1 for orders in told.values())
    assert told["Hybrids find needles that purely linear-time models lose."].text == "–"
    for says, above, below in (
        ("retrieval; some attention", (4.0 + 9.0) / 2 / 67.0, (1.2 + 4.0) / 2 / 67.0),
        ("spares few-shot learning and hurts questions", (63.5 + 64.4) / 2 / 69.1, (19.4 + 27.5) / 2 / 36.8),
        ("can raise code completion", (58.0 + 59.4) / 2 / 54.1, 1.0),
        ("helps linear-time models with code", (53.8 + 60.6) / 2 / 54.1, (47.5 + 44.3) / 2 / 54.1),
        ("Short answers flatter", 1.0, 0.708),
        ("loses a long needle", 0.91, 0.708),
    ):
        (found,) = [orders.pairs for name, orders in told.items() if says in name]
        assert found == [(pytest.approx(above), pytest.approx(below))]


def test_what_was_not_measured_has_no_answer_and_what_was_has_one():
    assert {a.here.answer for a in findings.answers({"rows": []})} == {"no figures"}
    rows = full(tasks=("needle", "needle_64"))
    rows += [row("h2o", "needle", 0.9, compression=4), row("h2o", "needle_64", 0.5, compression=4)]
    assert answer(rows, "Short answers").here == Orders([(0.9, 0.5)])
    rows[-1] = row("h2o", "needle_64", 0.95, compression=4)
    assert answer(rows, "Short answers").here.answer == "no"


def test_every_finding_can_be_found_and_can_fail():
    """Oracle: limiting case: where scores are drawn without regard to the method, each order holds in some draws and not in others."""
    draw, told = Random(0), {finding.says: set() for finding in findings.FINDINGS}
    settings = [("kivi", {"bits": bits}) for bits in (2, 4)] + [(m, {}) for m in ("mamba", "rwkv", "griffin")]
    settings += [(m, {"compression": c}) for m in (*findings.AS_THEY_COME, "infllm", "llmlingua2") for c in (4, 8)]
    for _ in range(40):
        found = full(0.5, EVERY)
        for method, own in settings:
            found += [row(method, t, draw.random(), prefill=way, **own) for t in EVERY for way in ("whole", "chunks")]
        for finding in findings.FINDINGS:
            told[finding.says].add(Orders([finding.here(Scores(found))]).answer)
    assert all(answers == {"yes", "no"} for answers in told.values()), told


def test_an_order_holds_in_all_seeds_or_in_none_or_is_undecided():
    """Oracle: by hand: 0.501 against 0.500 on average, above in two of three seeds, is no yes; means with half the range."""
    rows = []
    for seed, (short, long) in enumerate(((0.52, 0.48), (0.503, 0.5), (0.48, 0.52))):
        rows += full(tasks=("needle", "needle_64"), seed=seed)
        rows += [row("h2o", "needle", short, seed=seed, compression=4)]
        rows += [row("h2o", "needle_64", long, seed=seed, compression=4)]
    here = answer(rows, "Short answers").here
    assert (here.answer, here.held, len(here.pairs)) == ("undecided", 2, 3)
    assert here.text == "0.501 ±0.02, 0.5 ±0.02"
    assert Orders([(0.6, 0.5), (0.7, 0.5)]).answer == "yes"
    assert Orders([(0.5, 0.6), (0.5, 0.5)]).answer == "no"
    assert Orders([(0.6, 0.5), (0.5, 0.5)]).answer == "undecided"


def test_a_task_on_which_the_uncompressed_model_scores_nothing_has_no_share():
    """Oracle: by hand: in seed 1 the order has no figures; the other task's share does not stand for it."""
    rows = full(tasks=("few_shot", "retrieval")) + full(tasks=("few_shot",), seed=1) + full(0.0, ("retrieval",), seed=1)
    for seed in (0, 1):
        for method, way in (("streaming-llm", "chunks"), ("infllm", "whole")):
            rows += [row(method, "few_shot", 0.9, prefill=way, seed=seed, compression=4)]
            rows += [row(method, "retrieval", 0.2, prefill=way, seed=seed, compression=4)]
    assert answer(rows, "hurts retrieval").here.pairs == [(0.9, 0.2)]
    with pytest.raises(Missing, match="scores 0 on retrieval"):
        Scores([r for r in rows if r["seed"] == 1]).share("infllm", ["few_shot", "retrieval"], compression=4)


def test_reading_whole_is_held_against_chunks_by_the_same_methods():
    """Oracle: by hand: means over the four that drop tokens as they come, StreamingLLM whole too; a method that failed leaves no figures."""
    found = full()
    for method, whole, chunks in (("h2o", 0.6, 0.5), ("streaming-llm", 0.9, 0.1), ("scissorhands", 0.3, 0.2)):
        found += rows(method, whole, compression=4) + rows(method, chunks, prefill="chunks", compression=4)
    found += rows("tova", 0.2, compression=4)
    tova = rows("tova", 0.0, prefill="chunks", compression=4)
    here = answer(found + tova, "A prompt that is read uncompressed").here
    assert here.pairs == [(pytest.approx(2.0 / 4), pytest.approx(0.8 / 4))]
    failed = [r | {"error": "E: no", "figures": {}} for r in tova]
    assert answer(found + failed, "A prompt that is read uncompressed").here.answer == "no figures"


def test_the_worst_task_of_the_best_method_counts():
    """Oracle: by hand: KIVI's worst is 0.8; of those that drop, H2O's worst is 0.7 and the others' 0.1."""
    rows = full()
    for method, worst, settings in (
        ("kivi", 0.8, {"bits": 4}),
        ("h2o", 0.7, {"compression": 4}),
        ("streaming-llm", 0.1, {"compression": 4, "prefill": "chunks"}),
        ("infllm", 0.1, {"compression": 4}),
        ("llmlingua2", 0.1, {"compression": 4}),
    ):
        rows += [row(method, task, worst if task == "retrieval" else 0.9, **settings) for task in findings.TASKS]
    assert answer(rows, "Quantization keeps every task").here == Orders([(0.8, 0.7)])


def test_published_and_measured_stand_side_by_side():
    """Oracle: by hand: KIVI at 4 bits kept 66.5 of 67.0 in retrieval there, and half here; without all tasks there is no mean."""
    rows = [row("full cache", "retrieval", 0.8), row("kivi", "retrieval", 0.4, bits=4)]
    first = findings.side_by_side({"rows": rows}).tasks[0]
    at = findings.read()["tasks"].index("retrieval")
    assert (first.method, first.settings) == ("kivi", "bits 4")
    assert (first.published[at], first.here[at]) == (pytest.approx(100 * 66.5 / 67.0), 50.0)
    assert [v for i, v in enumerate(first.here) if i != at] == [None] * 6


def test_means_are_over_fifteen_datasets():
    """Oracle: by hand: three single-document, …, one of retrieval, two of code; H2O at 8 times keeps 43.4 of 45.2 with Llama-3."""
    found = findings.side_by_side({"rows": [*full(), *rows("h2o", 0.5, compression=8), *rows("mamba", 0.3)]})
    h2o = next(b for b in found.tasks if (b.method, b.settings) == ("h2o", "compression 8"))
    whole, kept = (36.8, 34.9, 26.8, 69.1, 67.0, 54.1), (33.7, 35.0, 22.2, 69.1, 65.5, 52.7)
    there, left = ((3 * sum(s[:4]) + s[4] + 2 * s[5]) / 15 for s in (whole, kept))
    assert (round(there, 1), round(left, 1)) == (45.2, 43.4)
    assert (h2o.published[-1], h2o.here[-1]) == (pytest.approx(100 * left / there), pytest.approx(50.0))
    assert next(b for b in found.tasks if b.method == "mamba").settings == "Mamba-2.8B"
    means = {(b.method, b.settings): b.published for b in found.means}
    assert means["h2o", "compression 2"] == pytest.approx([100 * 44.6 / 43.5, 100 * 37.1 / 38.7], abs=0.3)
    assert means["streaming-llm", "compression 8"] == pytest.approx([100 * 30.6 / 43.5, 100 * 15.3 / 38.7], abs=0.3)
    orders = [[(r["method"], r["settings"]) for r in own] for own in findings.read()["other_models"].values()]
    assert all(own == orders[0] for own in orders)


def test_needles_are_scores():
    """Oracle: by hand: 91.0 of 100 there, and here what was found, whatever the full cache finds."""
    rows = [*full(0.5, ("needle_64",)), row("kivi", "needle_64", 0.25, bits=2)]
    first, *_, last = findings.side_by_side({"rows": rows}).needle
    assert (first.method, first.published, first.here) == ("kivi", [100, 91.0], [None, 25.0])
    assert (last.method, last.published, last.here) == ("LagKV", [None, 96.6], [None, None])


def test_a_reason_is_told_only_where_the_answer_is_no(tmp_path):
    """Oracle: by hand: code completion with both methods at 0.5 of the full cache's, and then at twice of it."""
    (why,) = [f.why for f in findings.FINDINGS if "can raise code completion" in f.says]
    for score, told in ((0.25, "**no**, in 0 of 1 seed: "), (1.0, "yes, in 1 of 1 seed |")):
        rows = full(0.5, ("code_completion",))
        rows += [row("streaming-llm", "code_completion", score, prefill="chunks", compression=8)]
        rows += [row("infllm", "code_completion", score, compression=8)]
        text = page(tmp_path, rows)
        assert told in text
        assert (why in text) == (score < 0.5)


def test_the_page_has_tables_of_even_rows_and_tells_what_is_missing(tmp_path):
    """Oracle: Markdown's rule: each row of a table has as many cells as its head."""
    text = page(tmp_path, [])
    lines = text.splitlines()
    heads = [i for i, line in enumerate(lines) if line.strip().startswith("|---")]
    assert len(heads) == 4
    for head in heads:
        table = [lines[head - 1]]
        table += lines[head : next(i for i in range(head, len(lines)) if not lines[i].strip().startswith("|"))]
        assert len(table) > 3
        assert {line.count("|") for line in table} == {table[0].count("|")}
    assert "no figures" in text
    assert "in 0 of 0" not in text


def test_caveats_tell_numbers_that_the_code_has():
    """Oracle: the arena's length, the budgets that are made of it, the residual of KIVI and StreamingLLM's first tokens."""
    told = "\n".join(findings.read()["caveats"])
    least, most = (tokens_to_keep(LENGTH, times) for times in (8, 2))
    assert f"{LENGTH} tokens at most, and so budgets are {least} to {most} tokens" in told
    assert f"The {KIVI().residual_length} most recent tokens" in told
    assert f"the {StreamingLLM().sinks} of its own paper" in told


def test_only_llama_completes_code_better_with_less():
    """Oracle: by hand from the published rows: what a caveat says of Mistral and LongChat."""
    published = findings.read()
    at = published["tasks"].index("code_completion")
    for rows, raised in ((published["rows"], True), *((own, False) for own in published["other_models"].values())):
        scores = {r["method"]: r["scores"][at] for r in rows if r["settings"] in ({}, {"compression": 8})}
        assert (scores["streaming-llm"] + scores["infllm"] > 2 * scores["full cache"]) == raised


def test_what_models_had_learnt_is_read_from_their_logs(tmp_path):
    """Oracle: logs written here."""
    logs = [[{"step": step, "needle": share} for step, share in ((1, 0.0), (2, last))] for last in (1.0, 0.25)]
    (tmp_path / "training.json").write_text(json.dumps({"log": logs[0]}))
    save_file({}, tmp_path / "mamba.safetensors", {"log": json.dumps(logs[1])})
    weights = {name: tmp_path / f"{name}.safetensors" for name in ("mamba", "not-trained")}
    found = findings.learnt(weights, tmp_path / "training.json")
    assert found == {"the testbed's (full cache)": {"step": 2, "needle": 1.0}, "mamba": {"step": 2, "needle": 0.25}}


def test_the_page_says_what_models_had_learnt_only_if_a_mixer_is_among_them(tmp_path):
    """Oracle: by hand."""
    logs = {"full cache": {"step": 2600, "multi_doc_qa": 1.0}}
    assert "had learnt" not in page(tmp_path, [], **logs)
    told = page(tmp_path, [], **logs, mamba={"multi_doc_qa": 0.25})
    assert "| model | multi doc qa |\n|---|--:|\n| full cache | 1.00 |\n| [Mamba](" in told
