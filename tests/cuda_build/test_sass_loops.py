"""Loops are found and counted in machine code; on small programs whose counts are known."""

from __future__ import annotations

from cuda_report.sass import main_loop, parse


def program(*lines: str) -> str:
    """cuobjdump's text of a kernel, an instruction every 16 bytes."""
    code = "\n".join(f"        /*{16 * i:04x}*/                   {line} ;    /* 0x0 */"
                     for i, line in enumerate(lines))  # fmt: skip
    return f"\t\tFunction : kernel\n{code}\n"


def counts(*lines: str) -> dict[str, int] | None:
    loop = main_loop(parse(program(*lines))["kernel"])
    return None if loop is None else dict(loop.counts)


def test_the_innermost_loop_with_mma() -> None:
    assert counts(
        "MOV R1, c[0x0][0x28]",
        "LDS R2, [R3]",  # 0x10: outer loop
        "HMMA.16816.F32.BF16 R4, R8, R12, R4",  # 0x20: inner loop
        "LDSM.16.MT88.4 R8, [R3]",
        "@P0 BRA 0x20",
        "@P1 BRA 0x10",
        "FFMA R0, R0, R0, R0",  # 0x60: a loop without mma
        "@P2 BRA 0x60",
        "EXIT",
    ) == {"mma": 1, "ldmatrix": 1, "rest": 1}


def test_the_way_of_a_whole_panel_counts() -> None:
    # Full panel: two copies in line. Last panels: more instructions, far behind the loop, and back.
    assert counts(
        "ISETP.GE.AND P0, PT, R1, R2, PT",  # 0x00: the loop
        "@P0 BRA 0x80",
        "LDGSTS.E.BYPASS.128 [R1], [R2.64]",
        "LDGSTS.E.BYPASS.128 [R1+0x10], [R2.64+0x10]",
        "HMMA.16816.F32 R4, R8, R12, R4",  # 0x40
        "@!P3 BRA 0x70",
        "BRA 0x0",
        "EXIT",
        "@P4 BRA 0x40",  # 0x80: no copy at all
        "ISETP.GE.AND P5, PT, R1, R2, PT",
        "LDGSTS.E.BYPASS.128 [R1], [R2.64], P5",
        "LDGSTS.E.BYPASS.128 [R1+0x10], [R2.64+0x10], P5",
        "BRA 0x40",
    ) == {"mma": 1, "async copy": 2, "rest": 4}


def test_multiply_adds_where_there_is_no_mma() -> None:
    assert counts("FFMA R0, R0, R0, R0", "DFMA R2, R2, R2, R2", "BRA.U UP0, 0x0", "EXIT") == {
        "fma": 2, "rest": 1,
    }  # fmt: skip


def test_no_loop() -> None:
    assert counts("HMMA.16816.F32 R4, R8, R12, R4", "@P0 BRA 0x20", "EXIT", "BRA 0x30") is None


def test_predicates_are_no_opcodes() -> None:
    (_, code) = parse(program("@!PT LDS RZ, [RZ]", "@UP0 UMOV UR1, UR2")).popitem()
    assert [instruction.opcode for instruction in code] == ["LDS", "UMOV"]
    assert [instruction.kind for instruction in code] == ["padding", "rest"]
