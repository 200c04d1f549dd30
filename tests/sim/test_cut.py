"""Stages' costs against sums by hand."""

from dataclasses import replace

import pytest

from pipetrain.costs import LayerCost, ModelCost, StageCost, ValueCost
from pipetrain.sim.cut import Cut, StageBytes, crossing_bytes


def layer(number: int, **changes: float) -> LayerCost:
    """Seconds and bytes that show which layer they come from."""
    unit = 10**number
    values = {
        "forward_s": 1.0 * unit,
        "backward_s": 2.0 * unit,
        "input_s": 1.2 * unit,
        "weight_s": 1.1 * unit,
        "update_s": 0.5 * unit,
        "parameters": unit,
        "parameter_bytes": 4 * unit,
        "optimizer_bytes": 8 * unit,
        "graph_bytes": 3 * unit,
        "between_bytes": unit,
        "forward_bytes": 5 * unit,
        "backward_bytes": 2 * unit,
    }
    return LayerCost(name=f"layer{number}", **(values | changes))  # type: ignore[arg-type]


# A mini-batch of 7 bytes; layer 0 gives 20 to layer 1, which keeps them, and to layer 3; layer 2 keeps what it makes.
MODEL = ModelCost(
    rows=2,
    layers=tuple(map(layer, range(4))),
    values=(
        ValueCost(-1, 7, (0,), (0,), has_gradient=False),
        ValueCost(0, 20, (1, 3), (1,), has_gradient=True),
        ValueCost(1, 30, (2,), (), has_gradient=True),
        ValueCost(2, 40, (3,), (2,), has_gradient=True),
    ),
)


def test_seconds_are_sums_of_the_layers() -> None:
    cut = Cut(MODEL, (2, 2), (True, False, True, True))
    whole, half = cut.costs(split=False, slowness=[1.0, 2.0]), cut.costs(split=True, slowness=[1.0, 2.0])
    assert whole[0] == StageCost(11.0, 22.0, 0.0, recompute_s=1.0, update_s=5.5, output_bytes=50)
    assert whole[1] == StageCost(2200.0, 4400.0, 0.0, recompute_s=2200.0, update_s=1100.0, output_bytes=0)
    assert (half[0].backward_s, half[0].backward_weight_s) == pytest.approx((13.2, 12.1))


def test_what_goes_over_a_border() -> None:
    """A value that skips layers goes over every border between, whichever of them are cut."""
    assert crossing_bytes(MODEL) == [0, 20, 50, 60, 0]
    far = replace(MODEL, values=(ValueCost(0, 20, (3,), (), has_gradient=True),))
    assert crossing_bytes(far) == [0, 20, 20, 20, 0]


def test_bytes_of_stages() -> None:
    first, second = Cut(MODEL, (2, 2), (True,) * 4).bytes()
    assert first == StageBytes(
        parameters=44,
        optimizer=88,
        inputs=7,
        outputs=50,
        kept=0,
        graph=33 + 7 + 20,
        between=11,
        forward=50,
        building=20,
        backward=max(33 + 20 + 30 - 33, 3 + 2 + 20 - 33),
    )
    assert (second.inputs, second.outputs, second.graph) == (50, 0, 3300 + 40)


def test_layers_that_are_not_recomputed_keep_their_graphs() -> None:
    (stage,) = Cut(MODEL, (4,), (True, False, True, True)).bytes()
    # Layer 1's own graph; what it takes, which its graph keeps; and what it makes, from which layer 2 starts again.
    assert stage.kept == 30 + 20 + 30
