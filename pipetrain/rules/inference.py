"""Rules about what a trained run is used for. Each function adds a line for every rule that is broken."""

from pipetrain.config import Config
from pipetrain.suggest import one_of

OF_A_RUN = ("generate", "evaluate")  # the actions that need one
WEIGHTS = ("newest", "best")
SPLITS = ("valid", "test")


def check_inference(cfg: Config, problems: list[str]) -> None:
    """Adds what is wrong with the settings by themselves."""
    generate, evaluate = cfg.generate, cfg.evaluate
    if cfg.action in OF_A_RUN and cfg.resume is None:
        problems.append(f"action={cfg.action} needs a trained run: resume=runs/NAME/TIME-ID")
    if cfg.action != "generate" and cfg.input is not None:
        problems.append(f"input={cfg.input} goes with action=generate")
    if cfg.action not in OF_A_RUN and cfg.weights == WEIGHTS[1]:
        problems.append(
            f"weights={cfg.weights} goes with action=generate and evaluate: training goes on from the newest"
        )
    if cfg.weights not in WEIGHTS:
        problems.append(f"weights={cfg.weights}: no such choice. {one_of(cfg.weights, WEIGHTS)}")
    if evaluate.split is not None and evaluate.split not in SPLITS:
        problems.append(f"evaluate.split={evaluate.split}: no such choice. {one_of(evaluate.split, SPLITS)}")
    at_least: list[tuple[str, float | None, int]] = [
        ("generate.beams", generate.beams, 1),
        ("generate.length_penalty", generate.length_penalty, 0),
        ("generate.max_tokens", generate.max_tokens, 1),
        ("generate.temperature", generate.temperature, 0),
        ("generate.top_k", generate.top_k, 1),
        ("generate.batch_size", generate.batch_size, 1),
        ("evaluate.sentences", evaluate.sentences, 1),
    ]
    for key, value, least in at_least:
        if value is not None and not least <= value < float("inf"):
            problems.append(f"{key}={value} must be at least {least} and finite")
    if not 0 < generate.top_p <= 1:
        problems.append(f"generate.top_p={generate.top_p} must be above 0 and at most 1, which is all tokens")
