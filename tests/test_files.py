"""Files that others read while they are written again."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from trainer import files

TEXTS = [letter * (1 + 5000 * number) for number, letter in enumerate("abcdef")]


def test_several_writers_and_readers_at_once_see_one_whole_text_or_another(tmp_path: Path):
    path = tmp_path / "file.json"
    files.write(path, TEXTS[0])

    def write(number: int) -> None:
        files.write(path, TEXTS[number % len(TEXTS)])

    with ThreadPoolExecutor(8) as pool:
        writers = [pool.submit(write, number) for number in range(100)]
        while not all(writer.done() for writer in writers):
            assert path.read_text() in TEXTS
    assert [writer.exception() for writer in writers] == [None] * 100
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_death_left_is_taken_by_the_next_write(tmp_path: Path):
    (tmp_path / "file.partial").write_text("half of something longer")
    files.write(tmp_path / "file", "whole")
    assert {found.name: found.read_text() for found in tmp_path.iterdir()} == {"file": "whole"}
