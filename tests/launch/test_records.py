"""What became of each job is on disk as soon as it is known, in lines and as a table."""

import json
import math

import pytest

from nemo_dist_conf.launch.records import Record, Records, markdown_table, text_table

GOOD = Record(0, ["a=1", "b=x"], "dp_shard 2", "completed", 0.12345678, 1.25, "0", ranks=2)
BAD = Record(1, ["a=2"], "", "failed", seconds=0.5, folder="1", reason="rank 1: ValueError: no|way\nmore", ranks=2)


@pytest.fixture
def records(tmp_path):
    return Records(tmp_path / "sweep", read=False)


def read_again(records):
    return Records(records.folder, read=True)


def test_a_record_is_read_as_it_was_written(records):
    records.add(GOOD)
    records.add(BAD)
    assert read_again(records).all() == [GOOD, BAD]


def test_records_of_an_earlier_sweep_are_not_read_without_being_asked_for(records):
    records.add(GOOD)
    assert Records(records.folder, read=False).all() == []


def test_the_last_record_of_a_job_counts_and_jobs_are_in_order(records):
    for record in (BAD, GOOD, Record(1, ["a=2"], "", "completed", 3)):
        records.add(record)
    assert [(record.job, record.status) for record in read_again(records).all()] == [(0, "completed"), (1, "completed")]
    assert len(records.file.read_text().splitlines()) == 3


def test_only_a_completed_job_with_the_same_overrides_is_completed(records):
    records.add(GOOD)
    records.add(BAD)
    again = read_again(records)
    assert again.completed(0, ("a=1", "b=x")) == GOOD
    assert again.completed(0, ["a=1"]) is None
    assert again.completed(1, ["a=2"]) is None
    assert again.completed(2, []) is None


def test_a_line_that_was_cut_off_is_left_out(records):
    records.add(GOOD)
    with records.file.open("a") as file:
        file.write(json.dumps({"job": 1, "overrides": []})[:-3])
    assert read_again(records).all() == [GOOD]


def test_a_record_after_a_line_that_was_cut_off_is_kept(records):
    records.add(GOOD)
    with records.file.open("a") as file:
        file.write('{"job": 1, "overr')
    again = read_again(records)
    again.add(BAD)
    assert read_again(records).all() == [GOOD, BAD]


@pytest.mark.parametrize(
    ("value", "kept"),
    [(True, True), ([1, (2.5, "x")], [1, [2.5, "x"]]), (math.nan, "nan"), ([math.inf], ["inf"]), ({1, 2}, "{1, 2}")],
)
def test_a_value_is_kept_where_json_can_hold_it_and_as_text_elsewhere(records, value, kept):
    records.add(Record(0, [], "", "completed", value))
    line = records.file.read_text()
    assert json.loads(line, parse_constant=pytest.fail)["value"] == kept
    assert read_again(records).all()[0].value == kept


def test_the_table_has_columns_one_below_the_other():
    head, good, bad = text_table([GOOD, BAD]).splitlines()
    assert head.split() == ["job", "overrides", "layout", "status", "value", "seconds", "folder"]
    assert good.split() == ["0", "a=1", "b=x", "dp_shard", "2", "completed", "0.123457", "1.2", "0"]
    assert head.index("status") == good.index("completed") == bad.index("failed")


def test_the_markdown_table_gives_the_reason_in_one_cell(records):
    records.add(GOOD)
    records.add(BAD)
    text = (records.folder / "sweep.md").read_text()
    assert text == markdown_table([GOOD, BAD])
    head, rule, good, bad = text.splitlines()
    assert rule == "|---|---|---|---|---|---|---|---|"
    assert good == "| 0 | a=1 b=x | dp_shard 2 | completed | 0.123457 | 1.2 | 0 |  |"
    assert bad == "| 1 | a=2 |  | failed |  | 0.5 | 1 | rank 1: ValueError: no\\|way |"


@pytest.mark.parametrize("table", [text_table, markdown_table])
def test_a_job_is_one_line_of_the_table_whatever_it_returned(table):
    plain = table([GOOD])
    table_of_long = table([Record(0, ["a='x\ny'"], "", "completed", "first line\nsecond line " + "long " * 100)])
    assert len(table_of_long.splitlines()) == len(plain.splitlines())
    assert "first line second line" in table_of_long
    assert max(map(len, table_of_long.splitlines())) < 200
