"""Schedules from files: what torch writes can be read, and what is wrong is shown."""

from pathlib import Path

import pytest

from pipetrain.errors import ScheduleError
from pipetrain.schedule import SCHEDULES, build, generate, grid, read_csv, write_csv

TWO_RANKS = "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n"


def in_file(folder: Path, text: str) -> str:
    path = folder / "mine.csv"
    path.write_text(text)
    return str(path)


def test_a_file_is_a_schedule(tmp_path: Path) -> None:
    schedule = build(in_file(tmp_path, TWO_RANKS), 2, 2, recompute="never")
    assert grid(schedule).splitlines() == [
        "stage 0 | F0 F1 .  .  B0 -  .  B1 -",
        "stage 1 | .  F0 B0 -  F1 B1 -  .  .",
    ]


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_is_written_is_read_back(name: str) -> None:
    schedule = generate(name, 3, 4, SCHEDULES[name].usual)
    again = read_csv(name, write_csv(schedule))
    assert (again.placement, again.num_microbatches) == (schedule.placement, schedule.num_microbatches)
    assert [set(row) for row in again.actions] == [set(row) for row in schedule.actions]
    assert write_csv(again) == write_csv(schedule)


def test_what_torch_has_lowered_is_read_without_its_messages() -> None:
    lowered = "0UNSHARD,0F0,0SEND_F0,,0RECV_B0,0B0,0REDUCE_GRAD,0RESHARD\n1RECV_F0,1F0,1B0,1SEND_B0\n"
    assert write_csv(read_csv("lowered", lowered)) == "0F0,0B0\n1F0,1B0\n"


def test_recomputes_of_a_file_stay_where_they_are(tmp_path: Path) -> None:
    text = "0F0,0R0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n"
    name = in_file(tmp_path, text)
    row = [str(a) for a in build(name, 2, 2, recompute="never").compute().actions[0]]
    assert row == ["0F0", "0R0", "0F1", "0B0", "0B1", "0U"]
    row = [str(a) for a in build(name, 2, 2, recompute="always").compute().actions[0]]
    assert row == ["0F0", "0R0", "0F1", "0B0", "0R1", "0B1", "0U"]
    assert write_csv(read_csv(name, text)) == text


def test_stages_live_where_their_actions_stand() -> None:
    assert read_csv("v", "0F0,3F0,3B0,0B0\n1F0,2F0,2B0,1B0\n").placement == (0, 1, 1, 0)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("0F0,0X0\n", "line 1, place 2: '0X0' is no action"),
        ("0F0,1F0\n1B0,0B0\n", "1B0 stands on line 2, but stage 1 is on line 1; a stage lives on one rank"),
        ("0F0,0B0\n2F0,2B0\n", "stages must be numbered from 0 without a gap"),
        ("", "stages must be numbered from 0"),
        ("0F0,0B0\n\n1F0,1B0\n", "every line must have one"),
    ],
)
def test_a_file_that_is_no_schedule_is_refused(text: str, rule: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        read_csv("mine.csv", text)
    assert rule in str(caught.value)


@pytest.mark.parametrize(
    ("text", "rule", "arrow"),
    [
        (TWO_RANKS.replace(",1B1", ""), "1B1 is missing", "rank 1 | 1F0 1B0 1F1 1U"),
        (TWO_RANKS.replace("0F1,", "0F1,0F1,"), "0F1 stands 2 times", "-->0F1<--"),
        (TWO_RANKS.replace("1F0,1B0", "1B0,1F0"), "1B0 stands before its forward", "-->1B0<--"),
        ("0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n", "deadlock, waiting for ever: rank 0 at 0B0, rank 1 at 1F1", "-->1F1<--"),
        (TWO_RANKS.replace("0B0,0B1", "0B1,0B0"), "1B0 is out of order", "-->1B0<--"),
    ],
)
def test_a_schedule_that_is_not_sound_is_shown_with_an_arrow(tmp_path: Path, text: str, rule: str, arrow: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        build(in_file(tmp_path, text), 2, 2, recompute="always")
    assert rule in str(caught.value)
    assert arrow in str(caught.value)


def test_a_file_for_other_numbers_is_refused(tmp_path: Path) -> None:
    name = in_file(tmp_path, TWO_RANKS)
    with pytest.raises(ScheduleError, match="is for 2 ranks and 2 micro-batches, not for 4 and 8"):
        build(name, 4, 8, recompute="never")
    with pytest.raises(ScheduleError, match="cannot be read"):
        build(str(tmp_path / "none.csv"), 2, 2, recompute="never")
