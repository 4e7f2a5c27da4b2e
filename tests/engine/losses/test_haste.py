"""HASTE's attention term against the cross-entropy written out row by row in FP64."""

import pytest
import torch

from millrace.engine.losses.haste import attention_loss
from millrace.engine.losses.repa import rows_of_block
from millrace.engine.model.layout import LayoutCache
from millrace.engine.model.routing import Tread

UNIFORM, MIXED = [(4, 4)] * 3, [(4, 4), (2, 6), (3, 5)]
INDEX = torch.tensor([11, 5, 900])
BLOCKS, HEADS = (1, 4), 3
"""The first lies inside the route 1..3, the second does not."""


def make_case(grids, routed, dtype=torch.float64):
    layout = LayoutCache((8, 8), 10_000.0).layout(grids, torch.tensor([0, 3, 4, 8], dtype=torch.int32), 4)
    span = Tread(1, 3, 0.5).draw(layout, 42, INDEX) if routed else None
    rows = [rows_of_block(block, layout, span) for block in BLOCKS]
    total = sum(layout.lengths)
    students = [
        tuple(torch.randn(total if r.index is None else len(r.index), 4, 6, dtype=dtype) for _ in "qk")
        for r in rows
    ]
    teachers = [tuple(torch.randn(total, 5, 9, dtype=dtype) for _ in "qk") for _ in BLOCKS]
    return layout, rows, students, teachers


def by_hand(layout, rows, students, teachers):
    losses = [0.0] * len(layout.grids)
    for seen, (q, k), (teacher_q, teacher_k) in zip(rows, students, teachers, strict=True):
        kept = list(range(len(teacher_q))) if seen.index is None else seen.index.tolist()
        start = 0
        for b, length in enumerate(layout.lengths):
            mine = [n for n, i in enumerate(kept) if start <= i < start + length]
            theirs = [kept[n] for n in mine]
            for head in range(HEADS):
                for n, i in zip(mine, theirs, strict=True):
                    student = torch.stack([q[n, head] @ k[m, head] / 6**0.5 for m in mine])
                    teacher = torch.stack([teacher_q[i, head] @ teacher_k[j, head] / 3 for j in theirs])
                    probability = torch.exp(teacher) / torch.exp(teacher).sum()
                    entropy = -(probability * (student - torch.exp(student).sum().log())).sum()
                    losses[b] = losses[b] + entropy / (len(mine) * HEADS * len(rows))
            start += length
    return torch.stack(losses)


@pytest.mark.parametrize("routed", [False, True], ids=["dense", "routed"])
@pytest.mark.parametrize("grids", [UNIFORM, MIXED], ids=["uniform", "mixed"])
def test_cross_entropy_of_the_rows_that_each_block_sees(grids, routed):
    layout, rows, students, teachers = make_case(grids, routed)
    inputs = [x.requires_grad_() for pair in students for x in pair]
    loss = attention_loss(students, teachers, rows, HEADS)
    expected = by_hand(layout, rows, students, teachers)
    assert loss.shape == (3,)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    weights = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    found = torch.autograd.grad(loss @ weights, inputs)
    wanted = torch.autograd.grad(expected @ weights, inputs)
    for gradient, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, want, rtol=1e-10, atol=1e-12)
        assert torch.equal(gradient[:, HEADS:], torch.zeros_like(gradient[:, HEADS:]))


def test_lowest_where_the_student_attends_as_the_teacher():
    """Cross-entropy then is the teacher's entropy, and its gradient is zero."""
    _, rows, students, _ = make_case(UNIFORM, routed=False)
    inputs = [x.requires_grad_() for pair in students for x in pair]
    same = [tuple(x.detach().clone() for x in pair) for pair in students]
    loss = attention_loss(students, same, rows, HEADS)
    for gradient in torch.autograd.grad(loss.sum(), inputs):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)
    other = [tuple(2 * x for x in pair) for pair in same]
    assert (attention_loss(other, same, rows, HEADS) > loss).all()


def test_teacher_gets_no_gradient_and_16_bit_is_scored_in_fp32():
    layout, rows, students, teachers = make_case(MIXED, routed=True, dtype=torch.bfloat16)
    students = [tuple(x.requires_grad_() for x in pair) for pair in students]
    teachers = [tuple(x.requires_grad_() for x in pair) for pair in teachers]
    loss = attention_loss(students, teachers, rows, HEADS)
    assert loss.dtype == torch.float32
    loss.sum().backward()
    assert all(x.grad.dtype == torch.bfloat16 for pair in students for x in pair)
    assert all(x.grad is None for pair in teachers for x in pair)
    wide = [[tuple(x.detach().double() for x in pair) for pair in side] for side in (students, teachers)]
    torch.testing.assert_close(loss.double(), by_hand(layout, rows, *wide), rtol=1e-5, atol=1e-5)


def test_maps_are_not_kept_for_backward():
    """What autograd saves grows with the tokens, not with their square."""
    _, rows, students, teachers = make_case([(16, 16)] * 3, routed=False, dtype=torch.float32)
    students = [tuple(x.requires_grad_() for x in pair) for pair in students]
    largest = 0

    def note(tensor):
        nonlocal largest
        largest = max(largest, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        attention_loss(students, teachers, rows, HEADS)
    assert largest < 256 * 256
