"""Alignment terms of the training loss: REPA or iREPA, and HASTE's attention."""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from millrace.engine.config import Alignment, Config
from millrace.engine.losses.haste import QueriesKeys, attention_loss
from millrace.engine.losses.loss_term import LossInputs, LossTerm
from millrace.engine.losses.repa import normalise_over_space, repa_loss, rows_of_block
from millrace.engine.model.layout import Layout
from millrace.engine.model.routing import RoutedSpan


class AlignmentTerms(LossTerm):
    """The terms of `alignment`; the teacher's features come with the batch."""

    def __init__(self, config: Alignment) -> None:
        self.config, self.names = config, alignment_terms(config)

    @classmethod
    def build(cls, config: Config, device: torch.device) -> Self | None:
        return cls(config.alignment) if config.alignment.active else None

    def __call__(self, inputs: LossInputs) -> dict[str, Tensor]:
        outputs, batch, span = inputs.outputs, inputs.batch, inputs.span
        ours, theirs = (outputs.projected, outputs.attention), (batch.teacher.tokens, batch.teacher.attention)
        return alignment_losses(self.config, *ours, *theirs, batch.layout, span)


def alignment_terms(config: Alignment) -> tuple[str, ...]:
    """Names of the terms: `repa` or `irepa`, and `attention`, as far as they are on."""
    features = () if config.kind == "none" else (config.kind,)
    return (*features, "attention") if config.attention.weight > 0 else features


def alignment_losses(
    config: Alignment,
    projected: Tensor | None,
    attention: Sequence[QueriesKeys],
    teacher: Tensor,
    teacher_attention: Sequence[QueriesKeys],
    layout: Layout,
    span: RoutedSpan | None,
) -> dict[str, Tensor]:
    """Each term (B,) FP32 by name, weighted.

    Args:
        projected: (K, D) from the `AlignmentHead`; None for kind none.
        attention: queries and keys of `config.attention.blocks`, from the denoiser.
        teacher: (T, D) features of the clean pictures.
        teacher_attention: of the teacher's layers, one for each block.
        layout: of the batch.
        span: its route.
    """
    terms = {}
    if config.kind != "none":
        target = normalise_over_space(teacher, layout, config) if config.kind == "irepa" else teacher
        rows = rows_of_block(config.block, layout, span)
        terms[config.kind] = config.weight * repa_loss(projected, target, rows)
    if config.attention.weight > 0:
        seen = [rows_of_block(block, layout, span) for block in config.attention.blocks]
        loss = attention_loss(attention, teacher_attention, seen, config.attention.heads)
        terms["attention"] = config.attention.weight * loss
    return terms
