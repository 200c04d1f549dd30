"""Measures beam search beside a plain one: the same model written down in a page of PyTorch, with keys and values kept.

    .venv/bin/python scripts/bench_beam.py RUN    a run with model=seq2seq and data=translation

Translates the first sentences of the test split, in batches of similar length, with both in turns; prints medians and
writes bench/beam.json. Both find the same translations. Run it on an idle machine.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor

from pipetrain import config
from pipetrain.inference.beam import Search, beam_search
from pipetrain.inference.gathered import find, gather
from pipetrain.inference.incremental import Incremental
from pipetrain.paths import RunPaths
from pipetrain.training.checkpoint import find_usable, read_manifest
from pipetrain.training.vocabulary import kept

ROUNDS, SENTENCES, BATCH, BEAMS, PENALTY = 5, 1000, 64, 4, 0.6
PAD, BEGIN, END = 0, 2, 3
OUTPUT = Path("bench")
Weights = dict[str, Tensor]
Cache = dict[str, tuple[Tensor, Tensor]]


class Plain:
    """T(L, H, A) with pre-norm, from its weights alone."""

    def __init__(self, weights: Weights, layers: int, heads: int, position: Tensor) -> None:
        self.weights, self.layers, self.heads, self.position = weights, layers, heads, position

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def heads_of(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def keys_and_values(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        key, value = self.linear(f"{name}.key_value", x).chunk(2, -1)
        return self.heads_of(key), self.heads_of(value)

    def attention(self, name: str, x: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        mixed = F.scaled_dot_product_attention(self.heads_of(self.linear(f"{name}.query", x)), key, value, mask)
        return self.linear(f"{name}.output", mixed.transpose(1, 2).flatten(2))

    def feed_forward(self, name: str, x: Tensor) -> Tensor:
        inner = F.relu(self.linear(f"{name}.part.0", self.norm(f"{name}.norm", x)))
        return x + self.linear(f"{name}.part.2", inner)

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        x = self.weights["encoder.embedding.embedding.token.weight"][source] + self.position[: source.shape[1]]
        mask = (source != PAD)[:, None, None]
        for i in range(self.layers):
            name = f"encoder.blocks.{i}"
            y = self.norm(f"{name}.attention.norm", x)
            own = f"{name}.attention.part"
            x = self.feed_forward(f"{name}.ffn", x + self.attention(own, y, *self.keys_and_values(own, y), mask))
        return self.norm(f"encoder.blocks.{self.layers - 1}.norm", x), mask

    def decode(self, ids: Tensor, place: int, cache: Cache, memory: Tensor, mask: Tensor) -> Tensor:
        """log p of the next token, from the last one and what is kept of those before."""
        x = self.weights["decoder.embedding.token.weight"][ids] + self.position[place]
        for i in range(self.layers):
            name = f"decoder.blocks.{i}"
            own, to_source = f"{name}.attention", f"{name}.source_attention"
            y = self.norm(f"{own}.norm", x)
            new = self.keys_and_values(f"{own}.part", y)
            if own in cache:
                new = torch.cat([cache[own][0], new[0]], 2), torch.cat([cache[own][1], new[1]], 2)
            cache[own] = new
            x = x + self.attention(f"{own}.part", y, *new, None)
            if to_source not in cache:
                cache[to_source] = self.keys_and_values(f"{to_source}.part", memory)
            y = self.norm(f"{to_source}.norm", x)
            x = x + self.attention(f"{to_source}.part", y, *cache[to_source], mask)
            x = self.feed_forward(f"{name}.ffn", x)
        return self.linear("head.output", self.norm("head.norm", x))[:, -1].log_softmax(-1)

    @torch.inference_mode()
    def beam_search(self, source: Tensor, longest: int, never: list[int]) -> list[list[int]]:
        """As it is usually written: each source K times, until all are done; what is done goes on unheeded."""
        rows = len(source)
        memory, mask = self.encode(source)
        memory, mask = memory.repeat_interleave(BEAMS, 0), mask.repeat_interleave(BEAMS, 0)
        cache: Cache = {}
        scores = torch.full((rows, BEAMS), -math.inf)
        scores[:, 0] = 0
        tokens = torch.full((rows * BEAMS, 1), BEGIN)
        best: list[tuple[float, list[int]]] = [(-math.inf, [])] * rows
        done = [False] * rows
        first = torch.arange(rows)[:, None] * BEAMS
        for length in range(1, longest + 1):
            log_p = self.decode(tokens[:, -1:], length - 1, cache, memory, mask)
            log_p[:, never] = -math.inf
            total = (scores.view(-1, 1) + log_p).view(rows, -1)
            top, index = total.topk(2 * BEAMS)
            parents, words = index // log_p.shape[1], index % log_p.shape[1]
            penalty, last = ((5 + length) / 6) ** PENALTY, length == longest
            kept_rows, kept_words, kept_scores = [], [], []
            for row, (its, parent, word) in enumerate(zip(top.tolist(), parents.tolist(), words.tolist(), strict=True)):
                live = []
                for place, (score, p, w) in enumerate(zip(its, parent, word, strict=True)):
                    if (w == END or last) and place < BEAMS and not done[row] and score / penalty > best[row][0]:
                        ended = [*tokens[row * BEAMS + p, 1:].tolist(), *([] if w == END else [w])]
                        best[row] = score / penalty, ended
                    if w != END:
                        live.append((score, p, w))
                live = live[:BEAMS]
                done[row] |= best[row][0] >= live[0][0] / ((5 + longest) / 6) ** PENALTY
                kept_rows.append([p for _, p, _ in live])
                kept_words.append([w for _, _, w in live])
                kept_scores.append([score for score, _, _ in live])
            if all(done):
                break
            order = (first + torch.tensor(kept_rows)).flatten()
            cache = {name: (key[order], value[order]) for name, (key, value) in cache.items()}
            tokens = torch.cat([tokens[order], torch.tensor(kept_words).view(-1, 1)], 1)
            scores = torch.tensor(kept_scores)
        return [found for _, found in best]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    options = parser.parse_args()
    run = RunPaths(options.run.absolute())
    cfg = config.from_json(json.dumps(read_manifest(find_usable(run.checkpoints)[0]).config))
    cfg.action, cfg.resume = "generate", str(run.root)
    assert isinstance(cfg.model, config.Seq2SeqConfig)
    assert isinstance(cfg.data, config.TranslationConfig)
    found = find(cfg, run, print)
    pairs = kept(cfg, run, found.manifest.tokenizer)
    gathered = gather(found, pairs)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(run.tokenizer))
    never = [PAD, *(i for i in range(processor.get_piece_size()) if processor.is_control(i) and i != END)]
    batches = _batches(pairs)
    weights = {
        f"{recipe.name}.{name}": tensor
        for recipe, module in zip(gathered.recipe.layers, gathered.modules, strict=True)
        for name, tensor in module.state_dict().items()
    }
    position = gathered.modules[0].embedding.position
    plain = Plain(weights, cfg.model.layers, cfg.model.heads, position)
    model = Incremental(gathered.recipe, gathered.modules)
    search = Search(BEAMS, PENALTY, cfg.data.max_tokens, BEGIN, END, tuple(never))
    contestants: dict[str, Callable[[Tensor], list[list[int]]]] = {
        "pipetrain": lambda batch: [hypothesis.tokens for hypothesis in beam_search(model, search, batch)],
        "plain": lambda batch: plain.beam_search(batch, search.max_tokens, never),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    answers: dict[str, Any] = {}
    for number in range(ROUNDS):
        for name in list(contestants)[:: 1 if number % 2 == 0 else -1]:
            start = time.perf_counter()
            answers[name] = [line for batch in batches for line in contestants[name](batch)]
            seconds[name].append(time.perf_counter() - start)
    ratio = statistics.median(a / b for a, b in zip(seconds["pipetrain"], seconds["plain"], strict=True))
    same = sum(a == b for a, b in zip(answers["pipetrain"], answers["plain"], strict=True))
    result = {"seconds": seconds, "ratio": ratio, "wanted": 1.5, "same": same, "sentences": sum(map(len, batches))}
    medians = ", ".join(f"{name} {statistics.median(its):.2f} s" for name, its in seconds.items())
    print(f"{result['sentences']} sentences, {BEAMS} beams: {medians}; ratio {ratio:.2f}; {same} are the same")
    OUTPUT.mkdir(exist_ok=True)
    (OUTPUT / "beam.json").write_text(json.dumps(result, indent=2))


def _batches(pairs: Any) -> list[Tensor]:
    """Sources of the test split, of all languages in turn, long ones first."""
    sides = [pairs.side(language, "test", pivot=False) for language in pairs.counts]
    longest = max(len(side.lengths) for side in sides)
    every = [side[i].tolist() for i in range(longest) for side in sides if i < len(side.lengths)][:SENTENCES]
    every.sort(key=len, reverse=True)
    batches = []
    for start in range(0, len(every), BATCH):
        some = [[*ids, END] for ids in every[start : start + BATCH]]
        batches.append(torch.tensor([[*ids, *[PAD] * (len(some[0]) - len(ids))] for ids in some]))
    return batches


if __name__ == "__main__":
    main()
