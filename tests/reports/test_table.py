"""The results schema: round trips, refusals that name the place, merging, and the published baselines."""

from __future__ import annotations

import csv
import io
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ivcp_eval import benchmarks
from ivcp_eval.reports import table as results
from ivcp_eval.reports.schema import COLUMN_NAMES, COLUMNS, SAMPLE_COLUMN_NAMES
from ivcp_eval.reports.table import ResultsError, make_row, merge_rows, read_results, write_results
from ivcp_eval.reports.wide import Table

RESULTS = Path(__file__).parents[2] / "results"
PUBLISHED = sorted((RESULTS / "baselines").glob("*.csv"))


def io_csv(rows):
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(rows)
    return stream.getvalue()


def make(**values):
    common = {"model": "tiny", "benchmark": "dev", "metric": "accuracy", "method": "none", "status": "ok"}
    return make_row(**{**common, "score": 80.0, "score_scale": 100, "run_id": "r1", **values})


def single_file(path, rows, without=()):
    """Results as they were written before the runs had a file of their own."""
    names = [column.name for column in COLUMNS if column.name not in without]
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(names)
        cells = {column.name: column.cell for column in COLUMNS}
        writer.writerows([cells[name](row[name]) for name in names] for row in rows)


class TestRoundTrip:
    def test_every_kind_of_value(self, tmp_path):
        rows = [
            make(
                method="ivc_prune",
                method_parameters={"layer": 2, "cosine": 0.1},
                ratio_asked=0.1 + 0.2,
                seed=7,
                ivcp_dirty=False,
                trained_weights=True,
                benchmark_sha256="0f" * 32,
                date="2026-02-03T04:05:06+00:00",
                judge='odd "quoted", name\nwith a line break\r\nand umlauts äöü 中',
                min_pixels=np.int64(3136),
                score=np.float32(0.5),
                prefill_ms_median=math.nan,
            ),
            make(status="failed", reason="out of memory", score=None, run_id="r2"),
        ]
        write_results(tmp_path / "new" / "r.csv", rows)
        back = read_results(tmp_path / "new" / "r.csv")
        assert back == rows
        assert tuple(back[0]) == COLUMN_NAMES
        assert back[0]["method_parameters"] == '{"cosine":0.1,"layer":2}'
        assert back[0]["ratio_asked"] == 0.1 + 0.2
        assert back[0]["ivcp_dirty"] is False
        assert back[0]["prefill_ms_median"] is None
        assert (back[0]["source"], back[0]["preset"]) == ("", "")
        assert (type(back[0]["min_pixels"]), type(back[0]["score"])) == (int, float)

    @settings(max_examples=60, deadline=None, derandomize=True)
    @example(text="\r")
    @example(text='a"\r\n,\n"')
    @given(text=st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\x00"), max_size=40))
    def test_any_answer_survives(self, tmp_path_factory, text):
        path = tmp_path_factory.mktemp("any") / "s.csv"
        results.write_samples(path, [{"index": "1", "prediction": text, "answer": text, "score": 1}])
        back = results.read_samples(path)[0]
        assert (back["prediction"], back["answer"]) == (text, text)

    @pytest.mark.parametrize("text", ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "'=1", "''=1"])
    def test_a_formula_is_none_where_people_open_it(self, tmp_path, text):
        results.write_samples(tmp_path / "s.csv", [{"index": "1", "prediction": text, "category": text, "score": 1}])
        with (tmp_path / "s.csv").open(newline="") as stream:
            shown = next(csv.DictReader(stream))
        assert shown["prediction"] == shown["category"] == f"'{text}"
        assert results.read_samples(tmp_path / "s.csv")[0]["prediction"] == text
        assert io_csv([[f"'{text}"]]).strip() in Table("m", (text,), ()).to_csv()

    @pytest.mark.parametrize("text", ["-3", "+0.5", "-1e-3", "-.5", "-", "'", "it's", "a=b", "12%"])
    def test_numbers_and_words_are_as_they_are(self, tmp_path, text):
        results.write_samples(tmp_path / "s.csv", [{"index": "1", "prediction": text, "score": 1}])
        with (tmp_path / "s.csv").open(newline="") as stream:
            assert next(csv.DictReader(stream))["prediction"] == text

    def test_escape_sequences_reach_no_terminal(self, tmp_path):
        text = "\x1b]0;title\x07 \x9b31m red\u241b1b\u241b"
        results.write_samples(tmp_path / "s.csv", [{"index": "1", "prediction": text, "score": 1}])
        raw = (tmp_path / "s.csv").read_text(encoding="utf-8")
        assert not any((ord(c) < 32 and c not in "\r\n\t") or 127 <= ord(c) < 160 for c in raw)
        assert results.read_samples(tmp_path / "s.csv")[0]["prediction"] == text

    def test_files_written_plainly_are_read_as_before(self, tmp_path):
        results.write_samples(tmp_path / "s.csv", [{"index": "1", "prediction": "PLACE", "score": 1}])
        path = tmp_path / "s.csv"
        path.write_text(path.read_text().replace("PLACE", "=1+1"))
        assert results.read_samples(path)[0]["prediction"] == "=1+1"

    def test_a_runaway_answer(self, tmp_path):
        limit = csv.field_size_limit()
        results.write_samples(tmp_path / "s.csv", [{"index": "1", "prediction": "x" * 300_000}])
        assert len(results.read_samples(tmp_path / "s.csv")[0]["prediction"]) == 300_000
        assert csv.field_size_limit() == limit

    def test_a_missing_sample_score_is_nan(self, tmp_path):
        results.write_samples(tmp_path / "s.csv", [{"index": "1", "score": math.nan}, {"index": "2", "score": True}])
        assert [row["score"] for row in results.read_samples(tmp_path / "s.csv")] == [
            pytest.approx(math.nan, nan_ok=True),
            1.0,
        ]

    def test_what_an_earlier_file_held_too_is_kept_once(self, tmp_path):
        """The values are the same, whatever was read before; so are refusals."""
        names, known = ["index", "cluster", "prediction", "score"], {}
        for file, said in (("a", "yes"), ("b", "no \u241b07 \u0007"), ("c", "yes")):
            rows = [{"index": f"question {i}", "cluster": i // 2, "prediction": said, "score": i / 4} for i in range(4)]
            results.write_samples(tmp_path / f"{file}.csv", rows)
        read = [results.read_sample_columns(tmp_path / f"{file}.csv", names, known) for file in "abc"]
        assert read == [results.read_sample_columns(tmp_path / f"{file}.csv", names) for file in "abc"]
        for first, other in zip(read[0]["index"], read[2]["index"], strict=True):
            assert first is other
        assert set(known["prediction"]) == {"yes"}, "of the last file alone"
        bad = tmp_path / "b.csv"
        bad.write_text(bad.read_text().replace("0.75", "75"))
        with pytest.raises(ResultsError, match=r"column 'score': .*<= 1"):
            results.read_sample_columns(bad, names, known)

    def test_a_byte_order_mark_and_other_column_orders_are_read(self, tmp_path):
        write_results(tmp_path / "r.csv", [make()])
        lines = list(csv.reader((tmp_path / "r.csv").open(newline="")))
        with (tmp_path / "odd.csv").open("w", newline="", encoding="utf-8-sig") as stream:
            csv.writer(stream).writerows([line[::-1] for line in lines])
        (tmp_path / "r.runs.csv").rename(tmp_path / "odd.runs.csv")
        assert read_results(tmp_path / "odd.csv") == [make()]


class TestRefusals:
    @pytest.mark.parametrize(
        ("values", "said"),
        [
            ({"ratio": 0.5}, r"no column 'ratio'"),
            ({"ratio_aksed": 0.5}, r"did you mean 'ratio_asked'"),
            ({"ratio_asked": 1.5}, r"'ratio_asked'.*1\.5.*<= 1"),
            ({"ratio_asked": 0}, r"ratio_asked must be above 0"),
            ({"status": "done"}, r"'status'.*ok, incomplete, skipped, failed"),
            ({"score": None}, r"status is ok, so score"),
            ({"score_scale": None}, r"score_scale"),
            ({"score": math.inf}, r"'score'.*finite"),
            ({"status": "failed"}, r"reason must say why"),
            ({"run_id": ""}, r"run_id .* source"),
            ({"source": "a paper"}, r"run_id .* source"),
            ({"model": ""}, r"'model'.*empty"),
            ({"seed": 1.5}, r"'seed'.*whole number"),
            ({"ivcp_dirty": "maybe"}, r"'ivcp_dirty'.*true or false"),
            ({"method_parameters": "[1]"}, r"'method_parameters'.*JSON object"),
            ({"method_parameters": {"x": math.nan}}, r"'method_parameters'"),
            ({"prompt_sha256": "abc"}, r"'prompt_sha256'.*64 hexadecimal"),
            ({"date": "yesterday"}, r"'date'.*ISO 8601"),
            ({"n_samples": -1}, r"'n_samples'.*>= 0"),
        ],
    )
    def test_a_bad_row(self, values, said):
        with pytest.raises(ResultsError, match=said):
            make(**values)

    def test_a_file_older_than_a_late_column(self, tmp_path):
        late = [column for column in COLUMNS if column.late]
        assert "method_source" in [column.name for column in late]
        single_file(tmp_path / "old.csv", [make()], without={column.name for column in late})
        (row,) = read_results(tmp_path / "old.csv")
        assert {column.name: row[column.name] for column in late} == {
            column.name: "" if column.kind == "text" else None for column in late
        }
        assert row == make()

    def test_a_bad_row_harms_no_file(self, tmp_path):
        write_results(tmp_path / "r.csv", [make()])
        before = (tmp_path / "r.csv").read_bytes()
        with pytest.raises(ResultsError, match=r"r\.csv was not written: row 2: column 'score'"):
            write_results(tmp_path / "r.csv", [make(), {**make(), "score": "good"}])
        assert (tmp_path / "r.csv").read_bytes() == before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["r.csv", "r.runs.csv"]

    def test_missing_and_unknown_columns(self, tmp_path):
        write_results(tmp_path / "r.csv", [make()])
        text = (tmp_path / "r.csv").read_text()
        (tmp_path / "r.csv").write_text(text.replace("ratio_kept_final", "ratio_kept_finl"))
        with pytest.raises(ResultsError, match=r"r\.csv lacks .*'ratio_kept_final'; did you mean 'ratio_kept_finl'"):
            read_results(tmp_path / "r.csv")
        (tmp_path / "r.csv").write_text("\n".join(line + ",mehtod" for line in text.splitlines()))
        with pytest.raises(ResultsError, match=r"unknown column\(s\) 'mehtod'; did you mean 'method'"):
            read_results(tmp_path / "r.csv")
        (tmp_path / "r.csv").write_text("\n".join(line + ",model" for line in text.splitlines()))
        with pytest.raises(ResultsError, match="twice"):
            read_results(tmp_path / "r.csv")

    def test_bad_values_are_named_by_line(self, tmp_path):
        write_results(tmp_path / "r.csv", [make(judge="two\nlines"), make(score=12.5, metric="b"), make(metric="c")])
        text = (tmp_path / "r.csv").read_text()
        (tmp_path / "r.csv").write_text(text.replace("12.5", "many"))
        with pytest.raises(ResultsError, match=r"line 4: column 'score': 'many' is not a finite number"):
            read_results(tmp_path / "r.csv")

    def test_a_cut_off_file(self, tmp_path):
        write_results(tmp_path / "r.csv", [make(), make(metric="b")])
        text = (tmp_path / "r.csv").read_text()
        (tmp_path / "r.csv").write_text(text[:-20])
        with pytest.raises(ResultsError, match=r"line 3: \d+ cells, but the header has"):
            read_results(tmp_path / "r.csv")

    @pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b'model,"unclosed'])
    def test_not_a_results_file(self, tmp_path, content):
        (tmp_path / "r.csv").write_bytes(content)
        with pytest.raises(ResultsError, match=r"r\.csv"):
            read_results(tmp_path / "r.csv")

    def test_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            read_results(tmp_path / "none.csv")

    def test_a_sample_twice(self, tmp_path):
        with pytest.raises(ResultsError, match="'7' occurs twice"):
            results.write_samples(tmp_path / "s.csv", [{"index": 7}, {"index": 7}])
        assert not (tmp_path / "s.csv").exists()

    def test_a_score_out_of_range(self, tmp_path):
        with pytest.raises(ResultsError, match=r"row 1: column 'score': .*<= 1"):
            results.write_samples(tmp_path / "s.csv", [{"index": 7, "score": 100}])


class TestTwoFiles:
    def test_what_and_how_stand_apart(self, tmp_path):
        rows = [make(metric=name, torch_version="2", run_id=run) for run in ("r1", "r2") for name in "ab"]
        write_results(tmp_path / "r.csv", rows)
        with (tmp_path / "r.csv").open(newline="") as stream:
            what = list(csv.DictReader(stream))
        with (tmp_path / "r.runs.csv").open(newline="") as stream:
            how = list(csv.DictReader(stream))
        assert len(what) == 4
        assert len(what[0]) <= 24
        assert [line["run_id"] for line in how] == ["r1", "r2"]
        assert set(what[0]) | set(how[0]) == set(COLUMN_NAMES)
        assert set(what[0]) & set(how[0]) == {"run_id"}
        assert read_results(tmp_path / "r.csv") == rows

    def test_a_single_file_with_all_columns_is_read_as_before(self, tmp_path):
        rows = [make(torch_version="2"), make(metric="b", torch_version="2")]
        single_file(tmp_path / "r.csv", rows)
        assert read_results(tmp_path / "r.csv") == rows

    def test_published_rows_have_no_run_and_stay_one_file(self, tmp_path):
        write_results(tmp_path / "r.csv", [make()])
        published = [make(run_id="", source="a paper")]
        write_results(tmp_path / "r.csv", published)
        assert [path.name for path in tmp_path.iterdir()] == ["r.csv"]
        assert read_results(tmp_path / "r.csv") == published

    def test_rows_of_a_run_agree_on_how_it_was_made(self, tmp_path):
        with pytest.raises(ResultsError, match="rows of run r1 differ in torch_version"):
            write_results(tmp_path / "r.csv", [make(torch_version="1"), make(metric="b", torch_version="2")])
        assert not list(tmp_path.iterdir())

    def test_missing_runs_are_named(self, tmp_path):
        write_results(tmp_path / "r.csv", [make()])
        text = (tmp_path / "r.runs.csv").read_text()
        (tmp_path / "r.runs.csv").write_text(text.replace("r1", "r9"))
        with pytest.raises(ResultsError, match=r"line 2: run 'r1' is not in r\.runs\.csv"):
            read_results(tmp_path / "r.csv")
        (tmp_path / "r.runs.csv").unlink()
        with pytest.raises(FileNotFoundError, match=r"r\.runs\.csv is missing"):
            read_results(tmp_path / "r.csv")

    @pytest.mark.parametrize("killed_at", [1, 2, 3])
    def test_a_kill_between_the_files_leaves_no_row_without_its_run(self, tmp_path, monkeypatch, killed_at):
        path = tmp_path / "r.csv"
        old, new = [make(run_id="old", score=1.0)], [make(run_id="new", score=2.0)]
        write_results(path, old)
        write, writes = results.write_csv, iter(range(1, 9))

        def killed(*arguments):
            if next(writes) == killed_at:
                raise KeyboardInterrupt
            write(*arguments)

        monkeypatch.setattr(results, "write_csv", killed)
        with pytest.raises(KeyboardInterrupt):
            write_results(path, new)
        assert read_results(path) == (old if killed_at <= 2 else new)
        monkeypatch.undo()
        write_results(path, new)
        assert results.runs_file(path).read_text().count("\n") == 2, "runs that no row has are gone"


class TestMerge:
    def test_a_cell_is_replaced_in_place(self):
        old = [make(), make(metric="b"), make(benchmark="other", run_id="o")]
        rows = merge_rows(old, [make(score=81.0, run_id="r2"), make(metric="c", run_id="r2")])
        assert [(row["benchmark"], row["metric"], row["score"]) for row in rows] == [
            ("dev", "accuracy", 81.0),
            ("dev", "c", 80.0),
            ("other", "accuracy", 80.0),
        ]

    @pytest.mark.parametrize(
        "unlike",
        [
            {"method": "fastv"},
            {"ratio_asked": 0.5},
            {"seed": 1},
            {"judge": "x"},
            {"max_pixels": 9},
            {"method_parameters": "{}"},
            {"limit": 4},
            {"generation": {"repetition_penalty": 1.05}},
            {"max_new_tokens": 7},
            {"dtype": "bfloat16"},
            {"attention": "eager"},
            {"device": "cuda"},
            {"video": "nframe=4"},
        ],
    )
    def test_another_question_is_another_row(self, unlike):
        assert len(merge_rows([make()], [make(run_id="r2", **unlike)])) == 2

    def test_where_a_server_ran_is_no_other_question(self):
        served = {"served": '{"base_url": "http://localhost:1/v1", "model": "m"}'}
        old, new = make(device="m at localhost:1", **served), make(device="m at localhost:2", run_id="r2", **served)
        assert merge_rows([old], [new]) == [new]

    def test_a_smaller_run_never_replaces_the_whole_one(self, tmp_path):
        results.update_results(tmp_path / "r.csv", [make(n_samples=300)])
        results.update_results(tmp_path / "r.csv", [make(n_samples=4, limit=4, score=25.0, run_id="r4")])
        rows = results.update_results(tmp_path / "r.csv", [make(n_samples=4, limit=4, score=50.0, run_id="r5")])
        assert [(row["limit"], row["score"]) for row in rows] == [(None, 80.0), (4, 50.0)]

    @pytest.mark.parametrize("run", ["r1", "r2"])
    def test_a_finished_row_outlives_a_failure(self, run):
        failed = make(status="failed", reason="killed", score=None, run_id=run, metric="score")
        assert merge_rows([make()], [failed]) == [make()]
        assert merge_rows([failed], [make()]) == [make()]

    def test_a_run_stands_once(self):
        """A column that was not noted at first must not leave the same run in the file twice."""
        noted = make(generation={"do_sample": False})
        assert merge_rows([make()], [noted]) == [noted]

    def test_update(self, tmp_path):
        results.update_results(tmp_path / "new" / "r.csv", [make()])
        results.update_results(tmp_path / "new" / "r.csv", [make(score=70.0), make(metric="b")])
        assert [row["score"] for row in read_results(tmp_path / "new" / "r.csv")] == [70.0, 80.0]

    def test_updates_of_several_processes_are_all_kept(self, tmp_path):
        code = "import sys; from ivcp_eval.reports.table import make_row, update_results\n"
        code += (
            "for i in range(8):\n    update_results(sys.argv[1], [make_row(model='m', benchmark=f'{sys.argv[2]}{i}',"
        )
        code += "metric='a', method='none', status='ok', score=1, score_scale=1, run_id=f'{sys.argv[2]}{i}')])"
        path = tmp_path / "r.csv"
        processes = [subprocess.Popen([sys.executable, "-c", code, str(path), name]) for name in "abc"]
        assert [process.wait() for process in processes] == [0, 0, 0]
        assert {row["benchmark"] for row in read_results(path)} == {f"{name}{i}" for name in "abc" for i in range(8)}


class TestPublished:
    def test_there_are_some(self):
        assert {path.stem for path in PUBLISHED} >= {"ivc_prune_paper", "internvl25_report", "angelslim_qwen25"}

    @pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
    def test_every_row_has_a_source_and_its_own_key(self, path):
        rows = read_results(path)
        assert all(row["source"] and "trust" in row["source"] for row in rows if "third-party m" not in row["source"])
        assert all(row["n_samples"] is None and not row["predictions"] for row in rows)
        assert len({results.row_key(row) for row in rows}) == len(rows)

    @pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
    def test_the_file_is_what_would_be_written(self, path, tmp_path):
        write_results(tmp_path / "again.csv", read_results(path))
        assert (tmp_path / "again.csv").read_bytes() == path.read_bytes()

    @pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
    def test_metrics_are_named_as_in_datasets(self, path):
        rows = [row for row in read_results(path) if row["benchmark"] in benchmarks.names()]
        assert rows, "no row is about a benchmark that is declared here"
        for row in rows:
            declared = [metric.name for metric in benchmarks.load(row["benchmark"]).metrics]
            assert row["metric"] in (*declared, "unstated"), f"{row['benchmark']} declares {declared}"

    def test_the_papers_headline(self):
        rows = read_results(RESULTS / "baselines" / "ivc_prune_paper.csv")
        found = {
            (row["model"], row["benchmark"]): row["score"]
            for row in rows
            if row["method"] == "ivc_prune" and row["metric"] == "retained_percent"
        }
        assert found["qwen25", "average_8_grounding"] == 99.6
        assert found["llava15", "average_9_vqa"] == 101.3
        assert len(found) == 7

    def test_angelslims_averages_follow_from_its_rows(self):
        rows = read_results(RESULTS / "baselines" / "angelslim_qwen25.csv")
        full = {row["benchmark"]: row["score"] for row in rows if row["method"] == "none"}
        assert len(full) == 11
        checked = 0
        for average in (row for row in rows if row["metric"] == "retained_percent"):
            own = [r for r in rows if (r["method"], r["ratio_asked"]) == (average["method"], average["ratio_asked"])]
            shares = [100 * r["score"] / full[r["benchmark"]] for r in own if r is not average]
            assert len(shares) == 11
            assert np.mean(shares) == pytest.approx(average["score"], abs=0.02)
            checked += 1
        assert checked == 18


class TestReadme:
    def test_is_current(self):
        text = (RESULTS / "README.md").read_text(encoding="utf-8")
        assert results.render_readme(text) == text, "run `ivcp docs`"
        for name in (*COLUMN_NAMES, *SAMPLE_COLUMN_NAMES):
            assert f"| `{name}` |" in text

    def test_restores_a_stale_one(self):
        text = (RESULTS / "README.md").read_text(encoding="utf-8")
        assert "| `ratio_kv_cache` |" in results.render_readme(text.replace("ratio_kv_cache", "ratio_cache"))

    def test_names_what_a_readme_lacks(self):
        with pytest.raises(ResultsError, match="needs the two lines"):
            results.render_readme("nothing")

    def test_every_file_of_the_folder_is_described(self):
        text = (RESULTS / "README.md").read_text(encoding="utf-8")
        assert all(f"baselines/{path.name}" in text for path in PUBLISHED)


def test_importing_is_light():
    code = "import sys, ivcp_eval.reports.table;"
    code += "print([m for m in ('torch', 'pandas', 'numpy', 'vlmeval') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
