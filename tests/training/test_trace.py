"""Traced steps: the spans of all ranks beside their simulation, as JSON and as a picture."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from runs import run, settings

from pipetrain.costs import StageCost
from pipetrain.schedule import Kind, Span, build, timeline
from pipetrain.sim.simulate import simulate
from pipetrain.training.trace import mean_costs


@pytest.mark.parametrize(("schedule", "ranks"), [("gpipe", 3), ("zb_v", 2)])
def test_a_traced_step_has_every_action_of_every_rank(tmp_path: Path, schedule: str, ranks: int) -> None:
    run(tmp_path, "run", ranks, settings(schedule=schedule, trace_every=4))
    assert sorted(p.name for p in (tmp_path / "run" / "trace").iterdir()) == ["step_4.json", "step_4.svg"]
    events = json.loads((tmp_path / "run" / "trace" / "step_4.json").read_text())["traceEvents"]
    planned = build(schedule, ranks, 4, recompute="always").compute()
    for process in (0, 1):
        ran = [e for e in events if e["ph"] == "X" and e["pid"] == process]
        assert sorted(e["name"] for e in ran) == sorted(map(str, planned))
        for rank, row in enumerate(planned.actions):
            mine = sorted((e for e in ran if e["tid"] == rank), key=lambda e: (e["ts"], e["ts"] + e["dur"]))
            assert [e["name"] for e in mine if "U" not in e["name"]] == [
                str(a) for a in row if a.kind is not Kind.UPDATE
            ]
    picture = ElementTree.parse(tmp_path / "run" / "trace" / "step_4.svg").getroot()
    titles = [e.text or "" for e in picture.iter() if e.get("class") == "title"]
    assert titles[0].startswith(f"step 4, {schedule}, measured: ")
    assert titles[1].startswith("simulated with the measured means: ")


def test_costs_measured_from_a_simulation_are_its_costs() -> None:
    for name in ("1f1b", "zb_h1"):
        schedule = build(name, 3, 5, recompute="always")
        weight_s = 0.5 if schedule.is_split else 0.0
        costs = [StageCost(1.0 + s, 2.0 + s, weight_s, 0.25, 3.0) for s in range(3)]
        assert mean_costs(simulate(schedule, costs), 3) == costs


def test_a_kind_that_did_not_run_costs_nothing() -> None:
    schedule = build("gpipe", 1, 2, recompute="never")
    spans = [Span(s.action, s.start_s, s.end_s) for s in timeline(schedule)]
    assert mean_costs(spans, 1) == [StageCost(1.0, 2.0)]
