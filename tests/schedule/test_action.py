import pytest

from pipetrain.errors import ScheduleError
from pipetrain.schedule import Action, Kind, build


@pytest.mark.parametrize("text", ["2F0", "0R11", "13B7", "2U", "1SEND_F3", "2RECV_F3", "1SEND_B0", "0RECV_B0"])
def test_text_form_parses_back(text: str) -> None:
    assert str(Action.parse(text)) == text


def test_parse_reads_the_parts() -> None:
    assert Action.parse("1SEND_F23") == Action(Kind.SEND_FORWARD, stage=1, microbatch=23)


@pytest.mark.parametrize("text", ["", "F0", "2F", "2U0", "2X0", "-1F0", "2F0 "[:2]])
def test_text_that_is_no_action_is_refused(text: str) -> None:
    with pytest.raises(ScheduleError, match="is no action; expected <stage><kind><micro-batch>, such as 2F0"):
        Action.parse(text)


def test_digest_changes_with_the_order_and_only_with_content() -> None:
    a, b = build("gpipe", 2, 3, recompute="always"), build("gpipe", 2, 3, recompute="always")
    assert a.digest == b.digest
    assert a.digest != build("gpipe", 2, 3, recompute="never").digest
    first = a.actions[0]
    swapped = a.with_actions(((first[1], first[0], *first[2:]), a.actions[1]))
    assert a.digest != swapped.digest
