"""What a TSV file may say: never code, never a path outside its folder, and one clear sentence where it is broken."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from ivcp_eval.vlmeval_bridge.reading import tsv
from tests.vlmeval_bridge.conftest import Laboratory
from tests.vlmeval_bridge.files import MCQ, SHORT, Files, files
from tests.vlmeval_bridge.miniatures import miniatures, picture
from tests.vlmeval_bridge.test_matrix import NAMES

__all__ = ["files"]
ROW = {"index": "r1", "question": "Which?", "A": "x", "B": "y", "answer": "A"}


def evil(folder: Path) -> str:
    return f"__import__('pathlib').Path({str(folder / 'ran')!r}).touch()"


def long(text: str) -> str:
    return text + " " * 100 if len(text) < 100 else text


CODE = {
    "image": "[{0}, 'x' * 100]",
    "image_path": "[{0}]",
    "index": "{0}",
    "answer": "[{0}]",
    "choices": "[{0}]",
    "category": "{0}",
}


@pytest.mark.parametrize("column", CODE)
@pytest.mark.parametrize("place", ["own", "MMStar", "OCRBench", "undeclared"])
def test_a_cell_is_never_run(files: Files, column: str, place: str):
    from ivcp_eval.vlmeval_bridge import evaluate as bridge

    cell = CODE[column].format(evil(files.root))
    benchmark = files.put(place, [ROW, {**ROW, "index": "r2", column: cell}], SHORT if place == "own" else "")
    with pytest.raises(ValueError, match=rf"{place}.tsv, row 2, column {column}: .*__import__"):
        bridge.build(benchmark, None)
    assert not (files.root / "ran").exists()


@pytest.mark.parametrize(
    "cell",
    [
        "[run_command('touch {0}')]",
        "run_command('touch {0}')",
        "[run_command(c) for c in ['touch {0}']]",
        "[load(b'{0}')]",
        "(f := run_command)(['touch', '{0}'])",
        "[9**9**9]",
        "2 ** 99999999",
        "[1 << 99999999999]",
        "['x' * 99999999999]",
        '"%999999999d" % 1',
        'f"{1:>999999999}"',
    ],
)
@pytest.mark.parametrize("place", ["own", "OCRBench", "DocVQA_VAL"])
def test_names_of_vlmevalkit_are_not_called(files: Files, cell: str, place: str):
    """Its `run_command` and `load`, which unpickles, are in reach of its `eval`; and no cell takes forever."""
    from ivcp_eval.vlmeval_bridge import evaluate as bridge

    row = {**ROW, "answer": cell.replace("{0}", str(files.root / "ran"))}
    with pytest.raises(ValueError, match=rf"{place}.tsv, row 1, column answer: VLMEvalKit would run the cell"):
        bridge.build(files.put(place, [row], SHORT if place == "own" else ""), None)


@pytest.mark.parametrize("name", [".", "a/", "a/.", "...", "x" * 300 + ".png"])
def test_a_path_ends_in_a_file_name(files: Files, name: str):
    from ivcp_eval.vlmeval_bridge import evaluate as bridge

    with pytest.raises(ValueError, match=r"own\.tsv, row 1, column image_path: a file name of 1 to 200 bytes"):
        bridge.build(files.put("own", [{**ROW, "image_path": name}], MCQ), None)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"image_path": "p.png"}, {"image_path": "p.png"}),
        ({"image_path": "a/p.png"}, {"image_path": "a/./p.png"}),
        ({"index": "a_0"}, {"index": "a", "image": str([picture(1), picture(2)])}),
    ],
)
def test_two_pictures_of_one_name_are_refused(files: Files, first: dict, second: dict):
    """The second would be answered about the first."""
    from ivcp_eval.vlmeval_bridge import evaluate as bridge

    rows = [{**ROW, "image": picture(7), **first}, {**ROW, "index": "r2", "image": picture(8), **second}]
    with pytest.raises(ValueError, match=r"own.tsv: .* name the same file for different pictures"):
        bridge.build(files.put("own", rows, MCQ), None)
    rows[1]["image"] = rows[0]["image"]
    if "image_path" in first:
        assert len(bridge.build(files.put("own", rows, MCQ), None).data) == 2


@pytest.mark.parametrize("place", ["own", "undeclared"])
def test_an_edited_file_does_not_show_old_pictures(files: Files, place: str):
    from ivcp_eval.vlmeval_bridge import evaluate as bridge

    shown = []
    for seed in (1, 2):
        dataset = bridge.build(files.put(place, [{**ROW, "image": picture(seed)}], MCQ if place == "own" else ""), None)
        shown.append(Path(dataset.dump_image(dataset.data.iloc[0])[0]).read_bytes())
    assert shown[0] != shown[1]


@pytest.mark.parametrize("path", ["../out.png", "a/../../out.png", "/tmp/out.png", "..\\out.png", "C:\\out.png"])
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("place", ["own", "MMStar", "undeclared"])
def test_pictures_stay_in_their_folder(files: Files, path: str, several: bool, place: str):
    from ivcp_eval.vlmeval_bridge import evaluate as bridge

    row = {**ROW, "image_path": str([path]) if several else path}
    with pytest.raises(ValueError, match=rf"{place}.tsv, row 1, column image_path: .*relative and without"):
        bridge.build(files.put(place, [row], MCQ if place == "own" else ""), None)


@pytest.mark.parametrize(
    "index",
    ["../r", "a/b", "a\\b", "/tmp/r", "f(x)", "2**99999999", "[x for x in y]", "", "a\x07", "..", ".", "x" * 300],
)
def test_an_index_names_one_file(files: Files, index: str):
    from ivcp_eval.vlmeval_bridge import evaluate as bridge

    with pytest.raises(ValueError, match=r"own.tsv, row 1, column index: "):
        bridge.build(files.put("own", [{**ROW, "index": index}], MCQ), None)


@pytest.mark.parametrize("name", NAMES)
def test_stock_files_pass_as_they_are(name: str, tmp_path: Path):
    path = tmp_path / f"{name}.tsv"
    miniatures()[name].write(path)
    table = tsv.read(path)
    pd.testing.assert_frame_equal(table, pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False))


@pytest.mark.parametrize(
    "text",
    [
        "Item(s)",
        "f(x) = 2",
        "(a) left",
        "sin(x)",
        "['Table (1)', \"it's\"]",
        "[2007, 2008]",
        "2 - 3",
        "a (b",
        "[see]",
        "2 ** 3",
        "x**2 * 3",
        "3 * 4",
        "* * *",
    ],
)
def test_answers_with_brackets_are_answers(files: Files, text: str):
    benchmark = files.put("own", [{"index": "1", "question": "Q", "answer": text}], SHORT)
    assert files.score(benchmark, {"1": "nothing"}).metrics["accuracy"][0] == 0
    first = {"['Table (1)', \"it's\"]": "it's", "[2007, 2008]": "2008"}.get(text, text)
    assert files.score(benchmark, {"1": first}).metrics["accuracy"][0] == 100


def gif() -> str:
    buffer = io.BytesIO()
    Image.new("P", (1, 1)).save(buffer, "GIF")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize("cell", [gif(), str([gif()])])
def test_a_tiny_picture_is_a_picture(files: Files, laboratory: Laboratory, cell: str):
    assert len(cell) <= tsv.REFERENCE
    rows = [ROW, {**ROW, "index": "r2", "image": cell}, {**ROW, "index": "r3", "image": "r1"}]
    for benchmark in (files.put("own", rows, MCQ), files.put("MMStar", rows)):
        assert len(files.prompts(laboratory, benchmark)) == 3


@pytest.mark.parametrize(
    ("cell", "says"),
    [("r9", "neither a picture nor the index"), ("[1, 2]", "a list of quoted texts"), ("[oops", "neither a picture")],
)
def test_a_picture_that_is_none(files: Files, cell: str, says: str):
    from ivcp_eval.vlmeval_bridge import evaluate as bridge

    rows = [ROW, {**ROW, "index": "r2", "image": cell}]
    with pytest.raises(ValueError, match=rf"row 2, column image: .*{says}"):
        bridge.build(files.put("own", rows, MCQ), None)


HEAD = "index\timage\tquestion\tanswer\n"


def line(i: int, question: str = "Q") -> str:
    return f"{i}\t{picture(i)}\t{question}\tred\n"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (HEAD + line(1) + line(2, '"Q') + line(3), "quotation mark that is never closed"),
        (HEAD + line(1) + line(2, '"Q') + line(3, '"Q') + line(4), "row 2, column question: the cell holds whole rows"),
        (HEAD + line(1, "caf\xe9"), "byte 0xe9 is not UTF-8"),
        (HEAD + line(1) + line(2, "a\0b"), "a NUL byte at position"),
        (HEAD + line(1) + line(2)[:-5], "1 rows have no answer, e.g. the row with index '2'"),
        (HEAD + line(1) + line(2, "a\tb"), "not a TSV file"),
        (HEAD + line(1, "a\tb"), "more cells than"),
        (HEAD, "no rows"),
        ("", "the file is empty"),
    ],
)
def test_a_broken_file_is_said_in_one_sentence(files: Files, content: str, says: str):
    from ivcp_eval.vlmeval_bridge import evaluate as bridge

    (files.root / "own.tsv").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=says) as raised:
        bridge.build(files.declare("own", SHORT), None)
    assert "own.tsv" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_cells_of_several_lines_and_quotes_are_read(files: Files):
    rows = [{"index": "1", "question": 'Say "hi"\nor\tnot?', "answer": '5" pipe'}]
    benchmark = files.put("own", rows, SHORT)
    assert files.score(benchmark, {"1": '5" pipe'}).metrics["accuracy"][0] == 100


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('1\tPIC\t"What\tred"\tx', "row 2: a cell that begins with a quotation mark holds the cells after it, and 1"),
        ('1\tPIC\t"Stop" is where?\tred\tx', "line 3: a cell begins with a quotation mark and goes on behind"),
    ],
)
def test_a_quotation_mark_that_is_text_moves_no_cell(tmp_path: Path, row: str, said: str):
    picture = "A" * 100
    whole = f'0\t{picture}\t"She said ""stop"""\tred\tx'
    path = tmp_path / "own.tsv"
    head = "index\timage\tquestion\tanswer\tcategory"
    path.write_text("\n".join([head, whole, row.replace("PIC", picture)]) + "\n")
    with pytest.raises(tsv.BadTable, match=re.escape(said)):
        tsv.read(path)
    path.write_text("\n".join([head, whole]) + "\n")
    assert list(tsv.read(path)["question"]) == ['She said "stop"']
