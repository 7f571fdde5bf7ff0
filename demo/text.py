"""The demo text encoder while it is trained: the host's CLIP class over the few tokens the captions use."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ..training.attention import attention

LENGTH = 77
START, END = 49406, 49407  # of CLIP's vocabulary; the end is also the padding
DROP = 0.1  # captions replaced by the empty one, for classifier-free guidance
BEHIND = 12  # captions end before this token
STRANGERS = 0.2  # captions that also get words the model does not know

Tokenizer = Callable[[str], list[int]]
"""Text to the token numbers between start and end."""


class Vocabulary:
    """Numbers the tokens of the captions 0, 1, ...; the number after the last stands for every other token."""

    def __init__(self, texts: list[str], tokenize: Tokenizer) -> None:
        self.tokenize = tokenize
        self.content = {text: tokenize(text) for text in texts}
        self.tokens = sorted({START, END}.union(*self.content.values()))
        self._number = {token: number for number, token in enumerate(self.tokens)}

    @property
    def unknown(self) -> int:
        return len(self.tokens)

    def numbers(self, words: Iterable[str]) -> list[int]:
        """The number of each word, all of them words of one token."""
        return [self._number[self.tokenize(word)[0]] for word in words]

    def rows(self, texts: list[str], rng: np.random.Generator | None = None) -> torch.Tensor:
        """Numbers of the tokens of each text, (n, 77). With `rng`, some captions are dropped and some get strangers."""
        out = np.full((len(texts), LENGTH), self._number[END])
        for row, text in zip(out, texts, strict=True):
            content = [self._number[token] for token in self.content[text]]
            if rng is not None:
                content = [] if rng.random() < DROP else content
                if rng.random() < STRANGERS:
                    before, after = rng.integers(0, 4), rng.integers(0, 7)
                    content = [self.unknown] * before + content + [self.unknown] * after
            row[0] = self._number[START]
            row[1 : 1 + len(content)] = content
        return torch.from_numpy(out)

    def shrink(self, encoder: nn.Module) -> None:
        """Replace the token table of a CLIP text model by one with a row per known token and one for all others."""
        table = encoder.get_input_embeddings()
        small = nn.Embedding(len(self.tokens) + 1, table.embedding_dim, dtype=table.weight.dtype)
        encoder.set_input_embeddings(small)


@torch.no_grad()
def stress(encoder: nn.Module, vocabulary: Vocabulary, words: Iterable[str], norm: float) -> None:
    """Lengthen the vectors of `words` in the token table, in place, to `norm`, and turn them square to each other.

    A text encoder that learned from pictures alone tells words apart as far as pictures did; of words that meant
    nothing there, little is left behind its last layer, and little gradient comes back. The vectors become the
    nearest set at right angles (Loewdin's), so that each word stays as like itself as it can.
    """
    table = encoder.get_input_embeddings().weight
    rows = vocabulary.numbers(words)
    u, _, v = torch.linalg.svd(table[rows].float(), full_matrices=False)
    table[rows] = (norm * (u @ v)).to(table.dtype)


def encode(encoder: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Hidden states after the last layer and its norm, (n, 77, c).

    The host's own forward adds in place, which autograd cannot follow; this walks its layers without doing so.
    """
    text = encoder.text_model
    x = text.embeddings.token_embedding(rows) + text.embeddings.position_embedding.weight
    for layer in text.encoder.layers:
        x = x + layer.self_attn(layer.layer_norm1(x), None, _causal)
        x = x + layer.mlp(layer.layer_norm2(x))
    return text.final_layer_norm(x)


def read_back(hidden: torch.Tensor, rows: torch.Tensor, words: list[int]) -> torch.Tensor:
    """How badly it is told from the hidden states behind a caption which of `words` is in it (cross entropy).

    The demo's stand-in for CLIP's contrastive training: pictures alone teach a text encoder to forget what they do not
    show, and cross-attention looks at the padding, whose states must then carry every word. Captions without any of
    the words do not count. Shapes: hidden (n, 77, c), rows (n, 77).
    """
    said = (rows[..., None] == torch.tensor(words)).any(1)
    random = torch.Generator().manual_seed(1)
    heads = torch.linalg.qr(torch.randn(hidden.shape[-1], len(words), generator=random))[0].to(hidden.device)
    logits = hidden[:, BEHIND:].float().mean(1) @ heads
    having = said.any(1)
    return functional.cross_entropy(logits[having], said[having].int().argmax(1).to(hidden.device))


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, mask: None) -> torch.Tensor:
    """Attention to the tokens up to one's own. Shapes: (n, length, c) each -> (n, length, c)."""
    length = q.shape[1]
    future = torch.full((length, length), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
    return attention(None, q, k, v, heads, mask=future)
