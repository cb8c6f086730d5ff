"""Tokens after a prompt, greedily: when each is there, and whether it is the right one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fastattn.bench.contenders.runner import Generated, Runner
from fastattn.bench.contenders.source import Kind, token_inputs
from fastattn.bench.parity import Parity
from fastattn.bench.tasks.answers import compared, without_mean
from fastattn.bench.tasks.prompts import prompts
from fastattn.bench.tasks.work import Work
from fastattn.bench.timing import Prepared

__all__ = ["DecodeWork"]

# Two logits closer than this, relative to the largest of their position, may change places.
_TIE = 1e-4


@dataclass(frozen=True)
class _Decoded:
    """What one contender decoded, int64 [batch, new_tokens], and in a lower precision the logits it gives for
    the right tokens, float32 [batch, new_tokens, vocabulary].
    """

    tokens: Tensor
    logits: Tensor | None


class DecodeWork(Work):
    """fp32: the tokens of the untouched model; where its two best logits are within 1e-4 of the scale either
    is right, and the rest of that sequence is not compared. The figure is the part of the tokens that is
    wrong.

    Lower precisions choose other tokens for good reasons, and one of them changes all that follow. They are
    given the right tokens one by one, and their logits are compared, without their mean. Their own tokens
    must be what these logits say for as long as they follow the right ones.
    """

    tolerance = 0.0

    def _inputs(self, model: torch.nn.Module, kind: Kind, device: torch.device) -> Mapping[str, Tensor]:
        if kind == "encoder-decoder":
            return token_inputs(model, self.workload, device)
        return prompts(self.workload, model, device)

    def prepared(self, runner: Runner, precision: str) -> Prepared:
        count = self.workload.new_tokens

        def answer(output: Generated) -> _Decoded:
            tokens = output.tokens.cpu()
            if precision == "fp32":
                return _Decoded(tokens, None)
            right = self._tokens.to(self.inputs["input_ids"].device)
            return _Decoded(tokens, runner.logits(self.inputs, right).float().cpu())

        return Prepared(runner.generate_call(self.inputs, count), answer=answer, parts=_parts)

    def expect(self, runner: Runner) -> None:
        tokens = runner.generate(self.inputs, self.workload.new_tokens).tokens
        self._logits = runner.logits(self.inputs, tokens).float().cpu()
        self._tokens = tokens.cpu()

    def check(self, precision: str, answer: _Decoded, limit: float) -> Parity:
        if answer.tokens.shape != self._tokens.shape:
            raise ValueError(
                f"the decoded tokens have shape {list(answer.tokens.shape)}, the reference's are "
                f"{list(self._tokens.shape)}"
            )
        if precision == "fp32":
            return Parity(self._wrong(answer.tokens), self._tokens.numel(), limit, "parity", "tokens")
        assert answer.logits is not None
        if answer.logits.shape != self._logits.shape:
            raise ValueError(
                f"the logits have shape {list(answer.logits.shape)}, the reference's are "
                f"{list(self._logits.shape)}"
            )
        logits = without_mean(answer.logits)
        figure = compared(precision, {"logits": without_mean(self._logits)}, {"logits": logits}, limit, None)
        # Decoding rounds otherwise than one forward: by no more than the precision may lose.
        wrong = self._not_its_own(answer.tokens, logits, limit)
        if figure.passed and wrong:
            return Parity(wrong, self._tokens.numel(), 0.0, "precision", "tokens")
        return figure

    def _wrong(self, tokens: Tensor) -> int:
        """How many tokens are not the reference's, in sequences that no tie made different."""
        wrong = 0
        for row, right, scores in zip(tokens, self._tokens, self._logits, strict=True):
            at = _first_difference(row, right)
            if at < len(row) and not _is_best(scores[at], int(row[at]), _TIE):
                wrong += int((row[at:] != right[at:]).sum())
        return wrong

    def _not_its_own(self, tokens: Tensor, logits: Tensor, slack: float) -> int:
        """How many tokens are not what the contender's own logits say, in sequences up to the first token
        that is not the reference's: the logits are for what follows the reference's tokens.
        """
        return sum(
            not _is_best(scores[at], int(row[at]), slack)
            for row, right, scores in zip(tokens, self._tokens, logits, strict=True)
            for at in range(min(_first_difference(row, right) + 1, len(row)))
        )


def _first_difference(tokens: Tensor, others: Tensor) -> int:
    """Where two sequences part; their length where they do not."""
    different = (tokens != others).nonzero()
    return int(different[0]) if len(different) else len(tokens)


def _is_best(logits: Tensor, token: int, slack: float) -> bool:
    """Whether a token's logit is the largest, or lower by no more than `slack` of the largest magnitude."""
    if not 0 <= token < len(logits):
        return False
    return bool(logits.max() - logits[token] <= slack * logits.abs().max())


def _parts(output: Generated) -> dict[str, list[float]]:
    if not output.stamps_ms:
        return {}
    gaps = [later - earlier for earlier, later in pairwise(output.stamps_ms)]
    return {"first_token_ms": [output.stamps_ms[0]], "inter_token_ms": gaps}
