"""Checks in a traced forward decide at run time as they do in plain Python, or are refused with their line."""

import importlib.util
from pathlib import Path

import pytest
import torch
from captured import Captured, captured
from torch import Tensor, nn

from pipetrain.errors import ConfigError

# A file as users have it: pytest would rewrite the asserts of this one.
MODULE = """
from torch import nn

class Net(nn.Module):
    limit, sizes, strict, lenient = 3, (2, 4), True, False

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x):
        s, t = x.shape[0], x.shape[1]
        flag = True
{lines}
        return self.b(self.a(x))
"""
ROWS = range(1, 7)


def net(path: Path, lines: str) -> Captured:
    path.write_text(MODULE.format(lines="\n".join(f"        {line}" for line in lines.splitlines())))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return captured(module.Net)


def refuses(forward: nn.Module | Captured, rows: int) -> bool:
    x = torch.zeros(rows, 5, dtype=torch.float64)
    try:
        forward.run(x) if isinstance(forward, Captured) else forward(x)
    except (ValueError, AssertionError):
        return True
    return False


CONDITIONS = {  # as a check that raises; the number of rows for which it does
    "-1 < s < 1": "",
    "1 < s < 4": "23",
    "s < 4 > 2": "123",
    "0 < 2 < s": "3456",
    "1 < s < self.limit": "2",
    "1 < s < t < 9": "234",
    "not 1 < s < 4": "1456",
    "not not 1 < s < 4": "23",
    "not (s < 3)": "3456",
    "s < 2 or s > 4": "156",
    "s != 2 and s != 4": "1356",
    "s > 2 and self.strict": "3456",
    "self.strict and s > 2": "3456",
    "self.lenient and s > 2": "",
    "s > 2 and self.lenient": "",
    "s < 2 or self.lenient": "1",
    "s < 2 or s == 3 and t == 5": "13",
    "not (s == 2 or s == 4)": "1356",
    "not (s < 2 and t == 5)": "23456",
    "x.shape[0] != 2 and x.shape[0] != 4": "1356",
    "x.size(0) == 2 or x.size(1) != 5": "2",
    "x.dim() != 2 or s % 2": "135",
    "s in (1, 2)": "12",
    "s not in (1, 2)": "3456",
    "s not in self.sizes": "1356",
    "not s in self.sizes": "1356",
    "bool(s > 3)": "456",
    "not bool(s > 3)": "123",
    "x.shape[0] * x.shape[1] > 15": "456",
    "x.sum() > 1": "",
    "(s > 2) == (t > 2)": "3456",
    "(n := s * 2) > 8": "56",
    "not flag or s > 4": "56",
}


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize(
    "form",
    [
        "if {}: raise ValueError(f'{{s}}')",
        "assert not ({}), 'no'",
        "if not ({}):\n    y = s\nelse:\n    raise ValueError",
    ],
)
def test_a_check_decides_at_run_time_as_in_plain_python(tmp_path: Path, condition: str, form: str) -> None:
    model = net(tmp_path / "users_net.py", form.format(condition))
    assert model.names == ["a", "b"]
    raised = {rows for rows in ROWS if refuses(model.plain, rows)}
    assert raised == set(map(int, CONDITIONS[condition]))
    assert {rows for rows in ROWS if refuses(model, rows)} == raised


@pytest.mark.parametrize(
    "lines",
    [
        "if s > 2:\n    text = f'{s}'\n    raise ValueError(text)",
        "for k in (3, 4, 5, 6):\n    if s == k: raise ValueError",
        "for k in (3, 4, 5, 6):\n    if s != k and k != s: t = k\n    else: raise ValueError",
        "if s: t = 1\nelse: raise ValueError\nif s > 2: raise ValueError",
        "if (s\n    > 2\n    and t > 4):\n    raise ValueError",
        "assert s < 3 and t == 5",
        "assert s",
    ],
)
def test_checks_of_other_forms(tmp_path: Path, lines: str) -> None:
    model = net(tmp_path / "users_net.py", lines)
    raised = {rows for rows in ROWS if refuses(model.plain, rows)}
    assert raised in ({3, 4, 5, 6}, set())
    assert {rows for rows in ROWS if refuses(model, rows)} == raised


@pytest.mark.parametrize(
    "lines",
    [
        "if s > 2: x = x * 2",
        "x = x * 2 if s > 2 else x",
        "while s > 2: s = s - 1",
        "assert (s if s > 2 else 1) < 4",
        "if (s, t) == (3, 5): raise ValueError",
        "if any(s == k for k in (1, 2)): raise ValueError",
        "assert all(s != k for k in (1, 2))",
        "x = x[: min(s, 4)]",
        "x = x[: max(4, s)]",
        "if s in {1, 2}: raise ValueError",
        "x = x * {1: 2}.get(s, 1)",
        "if x.ndim in {2, 3}: x = x * 2",
        "y = not s",
        "y = 0 < s < 3",
        "if x.dim() > 2 and x.shape[2] == 1: raise ValueError",  # the second may fail where the first is False
        "if s > 2:\n    if self.lenient: return x\n    raise ValueError",
        "for k in (1, 2):\n    if s == k: break\nelse: raise ValueError",
        "if s == 1: x = x * 2\nelif s == 2: x = x * 3\nelse: raise ValueError",
        "for k in range(4):\n    if len(x) == k: raise ValueError",
        "if bool(s > 2) == True: raise ValueError",
        "bool = lambda n: n\nif bool(not s): raise ValueError",
    ],
)
def test_other_decisions_are_refused_with_their_line(tmp_path: Path, lines: str) -> None:
    with pytest.raises(
        ConfigError, match=r"because of .*users_net.py:\d+, `.*known only when the model runs"
    ) as caught:
        net(tmp_path / "users_net.py", lines)
    assert any(line.strip() in str(caught.value) for line in lines.splitlines())


def test_a_module_that_decides_is_kept_whole_where_it_is_no_root() -> None:
    class Deciding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) if x.shape[0] in {1, 2} else x * 2

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.deciding, self.b = nn.Linear(5, 5), Deciding(), nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.deciding(self.a(x)))  # type: ignore[no-any-return]

    model = captured(Net)
    assert model.names == ["a", "deciding", "b"]
    for rows in ROWS:
        x = torch.randn(rows, 5, dtype=torch.float64)
        torch.testing.assert_close(model.run(x), model.plain(x))
