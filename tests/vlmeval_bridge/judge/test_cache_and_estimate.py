"""Verdicts survive kills, full disks and other processes; costs are known before anything is sent."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest

from ivcp_eval.files import DiskFullError
from ivcp_eval.vlmeval_bridge.judge import (
    DEFAULT,
    EXACT_MATCHING,
    Question,
    VerdictCache,
    cache_folder,
    estimate,
    judge_for,
)


def record(key: str, verdict: str = "1.0") -> dict[str, str]:
    return {"key": key, "verdict": verdict, "reply": "größer\nals"}


def test_verdicts_are_found_again(tmp_path: Path):
    VerdictCache(tmp_path, "openai@gpt-4o").add(record("a"))
    again = VerdictCache(tmp_path, "openai@gpt-4o")
    assert (again.get("a"), again.get("b"), len(again)) == ("1.0", None, 1)
    assert VerdictCache(tmp_path, "openai@other").get("a") is None


def test_judge_names_become_file_names(tmp_path: Path):
    cache = VerdictCache(tmp_path, "box:8000@org/model;temperature=None")
    cache.add(record("a"))
    assert [path.name for path in tmp_path.iterdir()] == ["box_8000@org_model_temperature_None.jsonl"]


@pytest.mark.parametrize("cut", range(1, 50, 7))
def test_a_line_cut_short_by_a_kill_costs_one_verdict(tmp_path: Path, cut: int):
    cache = VerdictCache(tmp_path, "j")
    cache.add(record("a"))
    whole = cache.path.read_bytes()
    cache.add(record("b"))
    cache.path.write_bytes(cache.path.read_bytes()[: len(whole) + cut])
    after = VerdictCache(tmp_path, "j")
    assert (after.get("a"), after.get("b")) == ("1.0", None)
    after.add(record("c"))
    final = VerdictCache(tmp_path, "j")
    assert (final.get("a"), final.get("b"), final.get("c")) == ("1.0", None, "1.0")
    assert final.unreadable == 1


def test_an_edited_verdict_does_not_count(tmp_path: Path):
    cache = VerdictCache(tmp_path, "j")
    cache.add(record("a"))
    cache.add(record("b"))
    cache.path.write_text(cache.path.read_text().replace('"verdict": "1.0"', '"verdict": "0.0"', 1))
    after = VerdictCache(tmp_path, "j")
    assert (after.get("a"), after.get("b"), after.unreadable) == (None, "1.0", 1)
    after.add(record("a"))
    assert VerdictCache(tmp_path, "j").get("a") == "1.0"


def test_another_process_is_seen_after_a_refresh(tmp_path: Path):
    one, other = VerdictCache(tmp_path, "j"), VerdictCache(tmp_path, "j")
    one.add(record("a"))
    assert other.get("a") is None
    other.refresh()
    assert other.get("a") == "1.0"
    other.add(record("a", "0.0"))  # asked at the same time: the first verdict stays
    one.refresh()
    assert one.get("a") == VerdictCache(tmp_path, "j").get("a") == "1.0"


def _write(folder: Path, name: str) -> None:
    cache = VerdictCache(folder, "j")
    for i in range(50):
        cache.add(record(f"{name}{i}"))


def test_processes_at_once_do_not_mix_lines(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_write, args=(tmp_path, name)) for name in "abc"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    cache = VerdictCache(tmp_path, "j")
    assert (len(cache), cache.unreadable) == (150, 0)
    assert all(json.loads(line) for line in cache.path.read_text().splitlines())


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cache = VerdictCache(tmp_path, "j")
    cache.add(record("a"))
    before = cache.path.read_bytes()
    cache.path.unlink()
    cache.path.symlink_to("/dev/full")
    with pytest.raises(DiskFullError):
        cache.add(record("b"))
    cache.path.unlink()
    cache.path.write_bytes(before)
    assert VerdictCache(tmp_path, "j").get("a") == "1.0"
    assert cache.get("b") is None


def test_the_cache_is_shared_by_all_runs():
    assert cache_folder(Path("results/runs")) == Path("results/cache/judge")


def test_who_judges():
    assert judge_for("", "none") == judge_for("gpt-4o", "none") == "none"
    assert judge_for("", "required") == DEFAULT
    assert judge_for("", "optional") == EXACT_MATCHING
    assert judge_for("mine", "optional") == judge_for("mine", "required") == "mine"
    assert judge_for(EXACT_MATCHING, "required") == EXACT_MATCHING


def test_costs_are_counted_before_sending():
    one = Question("t/1", "x" * 4000, "q", "r", "p", str, max_tokens=10)
    got = estimate([one] * 100, 20, "gpt-4o-2024-08-06")
    assert (got.calls, got.cached, got.tokens_in, got.tokens_out) == (100, 20, 100_400, 1_000)
    assert got.dollars == pytest.approx(100_400 * 2.5e-6 + 1_000 * 10e-6)
    assert "100 calls (20 more verdicts are cached)" in str(got)
    assert "about $0.26" in str(got)
    unknown = estimate([one], 0, "my-model")
    assert unknown.dollars is None
    assert "price unknown" in str(unknown)
    assert estimate([one], 0, "my-model", (1000.0, 0.0)).dollars == pytest.approx(1.004)
