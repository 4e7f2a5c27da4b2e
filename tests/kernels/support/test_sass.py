"""Loops and asynchronous products are read from machine code."""

import pytest

from millrace.kernels.support.sass import local_accesses_in_loops, overwritten_operands, parse


def program(*lines):
    """Instructions as `nvdisasm -c` prints them; a line that ends in a colon is a label."""
    text = [
        line if line.endswith(":") else f"        /*{16 * i:04x}*/                   {line} ;"
        for i, line in enumerate(lines)
    ]
    return parse("\n".join(text))


def test_local_memory_counts_inside_loops_only():
    found = program(
        "STL [R1], R2",
        ".L_x_0:",
        "LDL R3, [R1]",
        "STL.64 [R1+0x8], R4",
        "LDG.E R9, desc[UR4][R2.64]",
        "@P0 BRA `(.L_x_0)",
        "LDL R4, [R1]",
        ".L_x_1:",
        "BRA `(.L_x_1)",
    )
    assert local_accesses_in_loops(found) == 2


PRODUCT = "HGMMA.64x64x16.F32.BF16 R24, R104, gdesc[UR28], R24, gsb0"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"


@pytest.mark.parametrize(
    ("write", "seen"),
    [
        ("MOV R104, R2", True),
        ("MOV R107, R2", True),
        ("MOV R108, R2", False),
        ("LDS.128 R104, [R9]", True),
        ("LDS.128 R101, [R9]", True),  # R101 to R104
        ("IMAD.WIDE R54, R2, R3, R4", True),  # R54 and R55: the last accumulators
        ("IMAD.WIDE R56, R2, R3, R4", False),
        ("SHFL.BFLY PT, R105, R2, 0x1, 0x1f", True),
        ("STS.128 [R104], R24", False),  # reads only
        ("FADD R2, R104, R105", False),
    ],
)
def test_registers_of_a_product_in_flight(write, seen):
    assert bool(overwritten_operands(program(PRODUCT, write, WAIT, "EXIT"))) is seen
    assert overwritten_operands(program(PRODUCT, WAIT, write, "EXIT")) == []


def test_a_wait_may_leave_the_youngest_groups():
    other = "HGMMA.64x64x16.F32.BF16 R56, R108, gdesc[UR28], R56, gsb0"
    one_left = "WARPGROUP.DEPBAR.LE gsb0, 0x1"
    assert overwritten_operands(program(PRODUCT, other, one_left, "MOV R104, R2", "EXIT")) == []
    assert overwritten_operands(program(PRODUCT, other, one_left, "MOV R108, R2", "EXIT"))


def test_what_a_loop_leaves_in_flight_meets_its_beginning():
    body = ("MOV R104, R2", PRODUCT, "@P0 BRA `(.L_x_0)", WAIT, "EXIT")
    assert overwritten_operands(program(".L_x_0:", *body)) == ["MOV R104, R2"]
    assert overwritten_operands(program(".L_x_0:", WAIT, *body)) == []


def test_the_path_beside_a_branch_counts_too():
    lines = (PRODUCT, "@P0 BRA `(.L_x_0)", WAIT, ".L_x_0:", "MOV R104, R2", "EXIT")
    assert overwritten_operands(program(*lines)) == ["MOV R104, R2"]
    straight = (PRODUCT, WAIT, "@P0 BRA `(.L_x_0)", "MOV R9, R2", ".L_x_0:", "MOV R104, R2", "EXIT")
    assert overwritten_operands(program(*straight)) == []


def test_products_that_are_never_waited_for_come_to_an_end():
    assert overwritten_operands(program(".L_x_0:", PRODUCT, "@P0 BRA `(.L_x_0)", "EXIT")) == []
