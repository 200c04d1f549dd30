"""Spans as a picture (SVG) and as a trace for Chrome or Perfetto: the same drawing for simulated and measured ones."""

import json
from collections.abc import Mapping, Sequence

from pipetrain.schedule.action import Kind
from pipetrain.schedule.timeline import Span, numbers

_COLOURS = {
    Kind.FORWARD: "#7aa6d6",
    Kind.RECOMPUTE: "#c3c9d1",
    Kind.BACKWARD: "#6fb58a",
    Kind.BACKWARD_INPUT: "#5fb3ad",
    Kind.BACKWARD_WEIGHT: "#e3a85c",
    Kind.UPDATE: "#8d6fb0",
}
_NAMES = {
    Kind.FORWARD: "forward",
    Kind.RECOMPUTE: "recompute",
    Kind.BACKWARD: "backward",
    Kind.BACKWARD_INPUT: "backward, input",
    Kind.BACKWARD_WEIGHT: "backward, weights",
    Kind.UPDATE: "update",
}
_LEFT, _RIGHT, _ROW, _TITLE, _LEGEND = 64, 12, 24, 26, 30  # pixels
_LEAST_TEXT = 13  # pixels that a box must be wide to hold its number


def svg(panels: Mapping[str, Sequence[Span]], placement: Sequence[int], width: int = 1000) -> str:
    """One panel below the other, on one time scale: a row for each rank, a box for each action with its micro-batch,
    numbered through all mini-batches.

    Where a rank has several stages, later ones are darker.

    Args:
        panels: spans by title.
        placement: the rank of each stage.
        width: of the picture, in pixels.
    """
    num_ranks = max(placement) + 1
    longest = max((span.end_s for spans in panels.values() for span in spans), default=0.0) or 1.0
    scale = (width - _LEFT - _RIGHT) / longest
    panel_height = _TITLE + num_ranks * _ROW
    body: list[str] = []
    for number, (title, spans) in enumerate(panels.items()):
        top = number * panel_height
        body.append(f'<text x="{_LEFT}" y="{top + 17}" class="title">{_escaped(title)}</text>')
        for rank in range(num_ranks):
            y = top + _TITLE + rank * _ROW
            body.append(f'<text x="{_LEFT - 8}" y="{y + 16}" text-anchor="end">rank {rank}</text>')
            body.append(
                f'<rect x="{_LEFT}" y="{y + 1}" width="{longest * scale:.1f}" height="{_ROW - 2}" fill="#f4f4f4"/>'
            )
        body += [_box(span, number, top + _TITLE, placement, scale) for span, number in _numbered(spans)]
    kinds = [kind for kind in _COLOURS if any(s.action.kind is kind for spans in panels.values() for s in spans)]
    height = len(panels) * panel_height + _LEGEND
    for place, kind in enumerate(kinds):
        x, y = _LEFT + place * 140, height - 18
        body.append(f'<rect x="{x}" y="{y}" width="12" height="12" fill="{_COLOURS[kind]}"/>')
        body.append(f'<text x="{x + 17}" y="{y + 11}">{_NAMES[kind]}</text>')
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
            'font-size="12">',
            "<style>.title { font-weight: bold } .number { font-size: 10px; text-anchor: middle }</style>",
            f'<rect width="{width}" height="{height}" fill="white"/>',
            *body,
            "</svg>\n",
        ]
    )


def _numbered(spans: Sequence[Span]) -> list[tuple[Span, int]]:
    number_of = numbers(spans)
    return [(span, number_of[span.action]) for span in spans]


def _box(span: Span, number: int, top: int, placement: Sequence[int], scale: float) -> str:
    action = span.action
    rank = placement[action.stage]
    before = sum(home == rank for home in placement[: action.stage])
    x, y, wide = _LEFT + span.start_s * scale, top + rank * _ROW + 1, max(span.seconds * scale, 0.5)
    box = (
        f'<rect x="{x:.1f}" y="{y}" width="{wide:.1f}" height="{_ROW - 2}" fill="{_COLOURS[action.kind]}" '
        f'stroke="white" stroke-width="0.5"><title>{action}: {span.seconds:.4g}</title></rect>'
    )
    if before:
        box += (
            f'<rect x="{x:.1f}" y="{y}" width="{wide:.1f}" height="{_ROW - 2}" fill="black" '
            f'fill-opacity="{min(0.25 * before, 0.6):.2f}" pointer-events="none"/>'
        )
    if wide >= _LEAST_TEXT and action.microbatch >= 0:
        colour = "white" if before else "black"
        box += f'<text x="{x + wide / 2:.1f}" y="{y + 15}" class="number" fill="{colour}">{number}</text>'
    return box


def chrome_trace(panels: Mapping[str, Sequence[Span]], placement: Sequence[int]) -> str:
    """The same as JSON for chrome://tracing or ui.perfetto.dev: a process for each panel, a thread for each rank."""
    events: list[dict[str, object]] = []
    for process, (title, spans) in enumerate(panels.items()):
        events.append({"name": "process_name", "ph": "M", "pid": process, "args": {"name": title}})
        for rank in sorted(set(placement)):
            named = {"name": f"rank {rank}"}
            events.append({"name": "thread_name", "ph": "M", "pid": process, "tid": rank, "args": named})
        events += [
            {
                "name": str(span.action),
                "cat": _NAMES[span.action.kind],
                "ph": "X",
                "pid": process,
                "tid": placement[span.action.stage],
                "ts": span.start_s * 1e6,
                "dur": span.seconds * 1e6,
                "args": {"stage": span.action.stage, "micro-batch": span.action.microbatch},
            }
            for span in spans
        ]
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
