"""A model of each family of torchvision through the engine: what `scripts/models.py` shows for all of them."""

import pytest
from models import is_equal, measure, page

FAMILIES = [
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "mnasnet0_5",
    "mobilenet_v3_small",
    "regnet_y_400mf",
    "resnet18",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "swin_t",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet")
def test_a_model_of_the_family_is_equal_on_2_and_4_stages(name: str) -> None:
    result = measure(name)
    assert is_equal(result), result


def test_the_page_counts_equal_models_and_says_why_others_are_not() -> None:
    good = {
        "model": "good", "side": 32, "parameters": 5_000_000, "layers": 9, "skips": 2,
        "least_share": {"2": 0.3, "4": 0.2}, "error": {"2": 0.0, "4": 1e-15},
        "loss_error": {"2": 0.0, "4": 0.0}, "same_bits": {"2": True, "4": True},
    }  # fmt: skip
    wrong = good | {"model": "wrong", "error": {"2": 1e-3, "4": 0.0}}
    split = good | {"model": "split", "same_bits": {"2": True, "4": False}}
    small = good | {"model": "small", "least_share": {"2": 0.3, "4": 0.05}}
    nan = good | {"model": "nan", "error": {"2": 0.0, "4": float("nan")}}
    failed = {"model": "failed", "side": 32, "failed": "ConfigError: cannot be captured"}
    text = page([good, wrong, split, small, nan, failed])
    assert "**1 of 6 are equal**" in text
    assert "| good | 5.0 M | 32 | 9 | 2 | 30% / 20% | 0e+00 / 1e-15 | same |" in text
    assert "| failed | 0.0 M | 32 | | | | ConfigError: cannot be captured | |" in text
