"""The communication pass: inserts sends and receives into a compute-only schedule.

All messages of a step get one global order: that of the nominal timeline, each message directly behind the action that
produces it. A rank's list is that order, filtered. Every dependency points forward in it, so no set of ranks can wait
for each other, not even if sends and receives blocked and each rank had a single communication stream (NCCL's case).

A receive stands where its message starts on the nominal timeline, usually one compute action before the one that needs
it: the receiving rank has posted it before it computes, and the transfer runs beside the computation.
"""

from pipetrain.schedule.action import INPUT_GRADIENTS, Action, Kind, Schedule
from pipetrain.schedule.timeline import Span, timeline

_ENDS = {
    Kind.FORWARD: (Kind.SEND_FORWARD, Kind.RECEIVE_FORWARD),
    Kind.BACKWARD: (Kind.SEND_BACKWARD, Kind.RECEIVE_BACKWARD),
    Kind.BACKWARD_INPUT: (Kind.SEND_BACKWARD, Kind.RECEIVE_BACKWARD),
}


def add_messages(schedule: Schedule) -> Schedule:
    """Inserts SEND and RECV actions wherever a stage hands a result to one on another rank."""
    rows: list[list[Action]] = [[] for _ in schedule.actions]
    for span in sorted(timeline(schedule), key=_message_order):
        action = span.action
        rows[schedule.placement[action.stage]].append(action)
        for send, receive in _messages_of(schedule, action):
            rows[schedule.placement[send.stage]].append(send)
            rows[schedule.placement[receive.stage]].append(receive)
    return schedule.with_actions(tuple(map(tuple, rows)))


def _message_order(span: Span) -> tuple[float, int, int]:
    """Ties follow the flow of the data, so that a receive is posted before the receiver's own action of that moment."""
    action = span.action
    if action.kind is Kind.FORWARD:
        return span.end_s, 0, action.stage
    if action.kind in INPUT_GRADIENTS:
        return span.end_s, 0, -action.stage
    return span.end_s, 2 if action.kind is Kind.UPDATE else 1, action.stage


def _messages_of(schedule: Schedule, action: Action) -> list[tuple[Action, Action]]:
    if action.kind not in _ENDS:
        return []
    send, receive = _ENDS[action.kind]
    s, m, step = action.stage, action.microbatch, action.step
    return [
        (Action.message(send, s, to, m, step), Action.message(receive, to, s, m, step))
        for to in schedule.destinations(action.kind, s)
        if schedule.placement[s] != schedule.placement[to]
    ]
