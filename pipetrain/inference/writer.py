"""From beginnings of texts to whole ones, by chance."""

from collections.abc import Sequence
from itertools import groupby

import torch

from pipetrain.config import Config, TextConfig
from pipetrain.data.text import TokenFolder
from pipetrain.data.tokenizer import BYTES, WORDS, Tokenizer, WordTokenizer, load_tokenizer, read_model
from pipetrain.inference.gathered import Found, Gathered
from pipetrain.inference.incremental import Incremental
from pipetrain.inference.lines import escaped, unescaped
from pipetrain.inference.sample import Sampling, sample
from pipetrain.seeds import derive_seed


class Writer:
    """Goes on with texts."""

    def __init__(self, found: Found, gathered: Gathered, tokens: TokenFolder) -> None:
        cfg = found.cfg
        assert isinstance(cfg.data, TextConfig)
        self._cfg, self._device = cfg, found.device
        self._tokenizer = _tokenizer(cfg, tokens, str(found.run.tokenizer))
        self._model = Incremental(gathered.recipe, gathered.modules, cfg.data.seq_len, gathered.precision)
        self._sampling = Sampling(cfg.generate.temperature, cfg.generate.top_k, cfg.generate.top_p)
        self._done = 0

    def __call__(self, lines: Sequence[str]) -> list[str]:
        r"""Each text with what becomes of it, as one line: a new line in it is `\n`, and a backslash `\\`.

        A text begins behind the end of a line. Where the vocabulary has none, an empty line stays empty.
        """
        encoded = [self._tokenizer.encode_lines(unescaped(line).encode()).tolist() for line in lines]
        start = [] if self._tokenizer.line_end is None else [self._tokenizer.line_end]
        prompts = [ids or start for ids in encoded]
        seeds = [derive_seed(self._cfg.seed, "generate", self._done + number) for number in range(len(lines))]
        self._done += len(lines)
        written = [""] * len(lines)
        order = sorted((i for i in range(len(lines)) if prompts[i]), key=lambda i: len(prompts[i]))
        for _, group in groupby(order, key=lambda i: len(prompts[i])):
            places = list(group)
            for first in range(0, len(places), self._cfg.generate.batch_size):
                some = places[first : first + self._cfg.generate.batch_size]
                ids = torch.tensor([prompts[i] for i in some], device=self._device)
                number = self._cfg.generate.max_tokens
                texts = sample(self._model, ids, [seeds[i] for i in some], number, self._sampling).tolist()
                for place, text in zip(some, texts, strict=True):
                    written[place] = escaped(self._tokenizer.decode(text if encoded[place] else text[1:]))
        return written


def _tokenizer(cfg: Config, tokens: TokenFolder, model: str) -> Tokenizer:
    assert isinstance(cfg.data, TextConfig)
    if cfg.data.tokenizer == WORDS:
        return WordTokenizer(read_model(model), model)
    return load_tokenizer(BYTES if tokens.tokenizer == BYTES else model)
