"""Counting bytes in a compiled program's text, on a program small enough to count by hand."""

from pallas_kernels import aot, bench, hlo

TEXT = """HloModule m

%cut (p0: f32[8,1024], p1: s32[]) -> f32[1024] {
  %p0 = f32[8,1024]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %view = f32[8,1024]{1,0} fusion(%p0), output_to_operand_aliasing={{}: (0, {})}, calls=%same
  %slice = f32[1,1024]{1,0} dynamic-slice(%view, %p1, %zero), dynamic_slice_sizes={1,1024}
  ROOT %flat = f32[1024]{0} bitcast(%slice)
}

%body (state: (s32[], f32[8,1024], f32[1024])) -> (s32[], f32[8,1024], f32[1024]) {
  %state = (s32[], f32[8,1024]{1,0}, f32[1024]{0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %w = f32[8,1024]{1,0} get-tuple-element(%state), index=1
  %row = f32[1024]{0:T(1024)S(1)} fusion(%w, %i), kind=kLoop, calls=%cut
  %mine.3 = f32[1024]{0} custom-call(%row), target="tpu_custom_call", {"bytes_accessed":"5000"}
  ROOT %out = (s32[], f32[8,1024]{1,0}, f32[1024]{0}) tuple(%i, %w, %mine.3)
}

%test (state: (s32[], f32[8,1024], f32[1024])) -> pred[] {
  %state = (s32[], f32[8,1024]{1,0}, f32[1024]{0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %end = s32[] constant(8)
  ROOT %less = pred[] compare(%i, %end), direction=LT
}

ENTRY %main (a: f32[8,1024], b: f32[1024]) -> f32[1024] {
  %a = f32[8,1024]{1,0} parameter(0)
  %b = f32[1024]{0} parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8,1024]{1,0}, f32[1024]{0}) tuple(%zero, %a, %b)
  %loop = (s32[], f32[8,1024]{1,0}, f32[1024]{0}) while(%start), condition=%test, body=%body
  %last = f32[1024]{0} get-tuple-element(%loop), index=2
  %wide = bf16[1024,1024]{1,0} broadcast(%last), dimensions={1}
  ROOT %sum = f32[1024]{0} add(%last, %b)
}
"""


def test_loops_slices_kernels_and_vmem_are_counted_as_what_they_move():
    moved = hlo.moved(TEXT)
    assert moved["fusion"] == 8 * 4 * 1024 + 8 * 4  # a row and the index; its result is in VMEM
    assert moved["mine"] == 8 * 5000
    assert moved["add"] == 3 * 4 * 1024
    assert moved["broadcast"] == 4 * 1024 + 2 * 1024 * 1024
    assert set(moved) - {"compare"} == {"fusion", "mine", "add", "broadcast"}


def test_the_largest_arrays_are_those_that_operations_make():
    assert hlo.largest(TEXT, 1) == ["bf16[1024,1024]"]
    assert "f32[8,1024]" not in hlo.largest(TEXT, 9)


def test_a_row_names_what_sets_the_floor():
    report = aot.Report("decode_b64_window", "v5p", flops=1.0, hbm_bytes=2765e3, vmem_bytes=1 << 20)
    row = bench._row("row_update", report, bench.OPS["row_update"].unavoidable)
    assert row["limit"] == "HBM" and round(row["floor_us"], 6) == 1.0
    assert bench.line(row).startswith("| decode_b64_window | v5p | 1.0 | 0.0 | 2.765 |")
    failed = report._replace(error="E1000: CompileTimeHbmOom")
    assert "exceeds HBM" in bench.line(bench._row("row_update", failed, lambda name: 1))


def test_a_folded_table_has_the_chips_of_a_case_side_by_side():
    report = aot.Report("decode_b64_window", "v5p", flops=1.0, hbm_bytes=2765e3, vmem_bytes=1 << 20)
    failed = report._replace(chip="v5e", error="E1000: CompileTimeHbmOom")
    rows = [bench._row("row_update", r, lambda name: 2765000) for r in (report, failed)]
    head, _, line = bench.fold(rows).splitlines()
    assert head.endswith("| v5p | v5e |")
    assert line.startswith("| row_update: decode_b64_window | 0.0 | 2.765 | 1.00 | 1e-09 |")
    assert line.endswith("| 1.0, 1 µs HBM | exceeds HBM |")


def test_every_operation_names_cases_and_what_they_must_move():
    for op in bench.OPS.values():
        names = op.names()
        assert set(op.representative()) <= set(names) and op.representative()
        assert all(op.unavoidable(name) > 0 for name in names)
