"""From sentences to their translations, by beam search over batches of similar length."""

from collections.abc import Sequence

import sentencepiece
import torch
from torch.nn.utils.rnn import pad_sequence

from pipetrain.config import Config, TranslationConfig
from pipetrain.data.translation.batches import BEGIN, END, PADDING, is_said, prefix
from pipetrain.data.translation.prepare import BOTH, FROM, INTO, PairFolder
from pipetrain.errors import ConfigError
from pipetrain.inference.beam import Search, beam_search
from pipetrain.inference.gathered import Found, Gathered
from pipetrain.inference.incremental import Incremental
from pipetrain.suggest import one_of


class Translator:
    """Translates into one language."""

    def __init__(self, found: Found, gathered: Gathered, pairs: PairFolder, tokenizer: str, into: str) -> None:
        """
        Args:
            tokenizer: the path of the run's.
            into: the language, see `target`.
        """
        cfg = found.cfg
        assert isinstance(cfg.data, TranslationConfig)
        self._processor = sentencepiece.SentencePieceProcessor(model_file=tokenizer)
        says = is_said(cfg.data.direction, len(pairs.counts))
        self._prefix = [prefix(self._processor, into)] if says else []
        self._batch_size, self._device = cfg.generate.batch_size, found.device
        self._longest = cfg.data.max_tokens - len(self._prefix) - 1
        self._model = Incremental(gathered.recipe, gathered.modules, precision=gathered.precision)
        symbols = [i for i in range(self._processor.get_piece_size()) if self._processor.is_control(i) and i != END]
        self._search = Search(
            beams=cfg.generate.beams,
            length_penalty=cfg.generate.length_penalty,
            max_tokens=cfg.data.max_tokens,
            begin=BEGIN,
            end=END,
            never=(PADDING, *symbols),
        )
        self.cut = 0

    def __call__(self, sentences: Sequence[str]) -> list[str]:
        """One translation for each sentence, in their order; of an empty one it is empty.

        Sentences longer than the model can take are cut, and counted in `cut`.
        """
        sources = self._processor.encode([sentence.strip() for sentence in sentences])
        self.cut += sum(len(source) > self._longest for source in sources)
        order = sorted((i for i, source in enumerate(sources) if source), key=lambda i: -len(sources[i]))
        translations = [""] * len(sentences)
        for first in range(0, len(order), self._batch_size):
            places = order[first : first + self._batch_size]
            ids = [torch.tensor([*self._prefix, *sources[i][: self._longest], END]) for i in places]
            batch = pad_sequence(ids, batch_first=True, padding_value=PADDING).to(self._device)
            for place, hypothesis in zip(places, beam_search(self._model, self._search, batch), strict=True):
                text = self._processor.decode(hypothesis.tokens)
                # What it spells in bytes may be the end of a line.
                translations[place] = text.replace("\n", " ").replace("\r", " ").strip()
        return translations


def target(direction: str, pairs: PairFolder, into: str | None) -> str:
    """The language to translate into.

    Args:
        into: None is the only one that there is.

    Raises:
        ConfigError: if the model does not translate into it.
    """
    languages = {INTO: (pairs.pivot,), FROM: tuple(pairs.counts), BOTH: (*pairs.counts, pairs.pivot)}[direction]
    if into is None and len(languages) > 1:
        raise ConfigError(
            f"this run translates into {len(languages)} languages; say into which one: generate.into={languages[0]}"
        )
    if into is not None and into not in languages:
        raise ConfigError(f"generate.into={into}: this run does not translate into it. {one_of(into, languages)}")
    return languages[0] if into is None else into


def settings_of(cfg: Config) -> str:
    """How is searched, for tables."""
    generate = cfg.generate
    return f"beams {generate.beams}, length penalty {generate.length_penalty:g}" if generate.beams > 1 else "greedy"
