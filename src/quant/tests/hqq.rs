//! HQQ against the vectors of hqq (tests/data/golden and tests/data/quant), its packing, and parts against the whole.

use serde_json::Value;

use super::{Random, all_kernels, bits, data, floats, le_bytes, rule, safetensors, sha256, ulps};
use crate::quant::affine::{
    AffineGroups, CodeBits, ErrorSum, GroupAxis, HqqRule, HqqSolver, HqqStop, Offset, quantize_hqq,
};
use crate::quant::pack::HqqPacking;
use crate::quant::{Kernels, QuantError};

fn width(bits: u8) -> CodeBits {
    CodeBits::new(bits).expect("a width")
}

fn codes_of(solver: &HqqSolver<'_>) -> Vec<u8> {
    let mut codes = vec![0; solver.len()];
    solver.codes(&mut codes).expect("lengths fit");
    codes
}

fn packing(bits: CodeBits, axis: GroupAxis, group: usize, values: usize) -> HqqPacking {
    let (rows, columns) = match axis {
        GroupAxis::Runs => (values / group, group),
        GroupAxis::Columns => (group, values / group),
    };
    HqqPacking::new(bits, rows, columns).expect("whole parts")
}

fn pack(packing: HqqPacking, codes: &[u8]) -> Vec<u8> {
    let mut packed = vec![0xff; packing.packed_bytes()];
    packing.pack(codes, &mut packed).expect("lengths fit");
    packed
}

fn unpack(packing: HqqPacking, packed: &[u8]) -> Vec<u8> {
    let mut codes = vec![0; packing.codes()];
    packing.unpack(packed, 0, &mut codes).expect("lengths fit");
    codes
}

#[test]
fn golden_codes_and_packed_arrays_of_every_width() {
    let golden: Value = serde_json::from_slice(&data("golden/golden_hqq.json")).expect("golden vectors");
    let weights = rule(65_536);
    for bits in [8, 4, 3, 2, 1] {
        let case = &golden["cases"][bits.to_string()];
        let width = width(bits);
        let solver =
            quantize_hqq(Kernels::detect(), HqqRule::new(width, 64), GroupAxis::Runs, &weights).expect("whole groups");
        let codes = codes_of(&solver);
        assert_eq!(sha256(&codes), case["codes_sha256_u8"], "{bits} bits");
        let packed = pack(packing(width, GroupAxis::Runs, 64, codes.len()), &codes);
        assert_eq!(sha256(&packed), case["packed_sha256"], "{bits} bits");
        for (key, values) in [("scale_first4", solver.scale()), ("zero_first4", solver.zero().to_vec())] {
            let hex: Vec<String> = values[..4].iter().map(|value| format!("{:08x}", value.to_bits())).collect();
            assert_eq!(serde_json::json!(hex), case[key], "{bits} bits {key}");
        }
    }
}

/// The weights of a case of make_hqq.py.
fn weights_of(name: &str) -> Vec<f32> {
    if name.starts_with("special") {
        let mut weights = rule(8 * 64);
        let (scaled, rest) = weights.split_at_mut(128);
        scaled[..64].iter_mut().for_each(|weight| *weight /= 1024.0);
        scaled[64..].iter_mut().for_each(|weight| *weight /= 256.0);
        rest[..64].fill(0.25);
        rest[64..128].fill(0.0);
        rest[128..192].iter_mut().for_each(|weight| *weight += 1.0);
        return weights;
    }
    let factor = match name {
        _ if name.starts_with("large-b2") => 64.0,
        _ if name.starts_with("large-b4") => 256.0,
        _ => 1.0,
    };
    rule(64 * 96).into_iter().map(|weight| weight * factor).collect()
}

/// Bits, group and axis from a name such as `large-b2-g64-axis1`.
fn parse(name: &str) -> (HqqRule, GroupAxis) {
    let field = |mark: &str| name.rsplit('-').find_map(|part| part.strip_prefix(mark)?.parse::<usize>().ok());
    let width = width(u8::try_from(field("b").expect("bits")).expect("few bits"));
    let mut rule = HqqRule::new(width, field("g").expect("a group"));
    rule.round_zero &= !name.starts_with("large");
    (rule, if field("axis") == Some(1) { GroupAxis::Runs } else { GroupAxis::Columns })
}

/// Every case of hqq 0.2.8 with torch 2.15: packed codes, scales and zeros to the bit. The cases `large` reach the power in
/// `shrink`, which torch computes within 1 ulp and we correctly rounded: their zeros need not be equal, and here are.
#[test]
fn every_case_of_hqq() {
    let vectors = safetensors(&["quant/hqq.safetensors"]);
    let mut cases = 0;
    for (key, expected_packed) in &vectors {
        let Some(name) = key.strip_suffix(".packed") else { continue };
        let (rule, axis) = parse(name);
        let weights = weights_of(name);
        let solver = if name.starts_with("plain") {
            plain(rule, axis, &weights)
        } else {
            quantize_hqq(Kernels::detect(), rule, axis, &weights).expect("whole groups")
        };
        let codes = codes_of(&solver);
        let packing = packing(rule.bits, axis, rule.group, codes.len());
        let expected_codes = unpack(packing, expected_packed);
        let different = codes.iter().zip(&expected_codes).filter(|(a, b)| a != b).count();
        assert_eq!(different, 0, "{name}: codes");
        assert_eq!(&pack(packing, &codes), expected_packed, "{name}: packed");
        let (scale, zero) = (floats(&vectors[&format!("{name}.scale")]), floats(&vectors[&format!("{name}.zero")]));
        assert_eq!(bits(&solver.scale()), bits(&scale), "{name}: scale");
        assert_eq!(bits(solver.zero()), bits(&zero), "{name}: zero");
        if let Some(expected) = vectors.get(&format!("{name}.dequantized")) {
            let groups = AffineGroups::new(axis, rule.group, &scale, Offset::Zero(&zero)).expect("lengths fit");
            let mut out = vec![0.0; codes.len()];
            groups.dequantize(0, &codes, &mut out).expect("lengths fit");
            assert_eq!(le_bytes(&out), *expected, "{name}: dequantized");
        }
        cases += 1;
    }
    assert_eq!(cases, 32);
}

/// `optimize=False`: the solver before its first iteration.
fn plain(rule: HqqRule, axis: GroupAxis, weights: &[f32]) -> HqqSolver<'_> {
    let groups = weights.len() / rule.group;
    match axis {
        GroupAxis::Runs => HqqSolver::runs(rule, weights).expect("whole groups"),
        GroupAxis::Columns => HqqSolver::columns(rule, weights, groups, 0..groups, groups).expect("whole groups"),
    }
}

/// AF-2: any cut into parts, driven by merged sums in any order, gives the bits of the whole.
#[test]
fn parts_concatenate_to_the_whole() {
    let weights: Vec<f32> = rule(64 * 96).into_iter().map(|weight| weight * 64.0).collect();
    let seed = 7;
    let mut random = Random(seed);
    for axis in [GroupAxis::Runs, GroupAxis::Columns] {
        let rule = HqqRule::new(CodeBits::B3, 64);
        let whole = quantize_hqq(Kernels::detect(), rule, axis, &weights).expect("whole groups");
        for parts in [1, 2, 3, 5, 7] {
            let mut edges: Vec<usize> = (1..parts).map(|_| random.below(97)).chain([0, 96]).collect();
            edges.sort_unstable();
            let solver = |pair: &[usize]| match axis {
                GroupAxis::Runs => HqqSolver::runs(rule, &weights[pair[0] * 64..pair[1] * 64]),
                GroupAxis::Columns => HqqSolver::columns(rule, &weights[pair[0]..], 96, pair[0]..pair[1], 96),
            };
            let mut solvers: Vec<_> = edges.windows(2).map(|pair| solver(pair).expect("inside")).collect();
            let mut stop = HqqStop::new();
            loop {
                let sums: Vec<_> = solvers.iter_mut().map(|solver| solver.step(Kernels::scalar())).collect();
                let exchanged = sums.into_iter().rev().map(|sum| ErrorSum::from_le_bytes(sum.to_le_bytes()));
                if !stop.goes_on(exchanged.fold(ErrorSum::default(), ErrorSum::merge)) {
                    break;
                }
            }
            assert!(stop.iterations() > 2, "the case is not trivial");
            let zero: Vec<f32> = solvers.iter().flat_map(|solver| solver.zero().to_vec()).collect();
            assert_eq!(bits(&zero), bits(whole.zero()), "seed {seed}, {axis:?}, {edges:?}");
        }
    }
}

/// QU-1: one iteration of every kernel has the bits of the scalar one, what is not finite and short runs included.
#[test]
fn every_kernel_steps_alike() {
    for (bits, group) in [(8, 12), (4, 64), (1, 17)] {
        let mut weights = rule(u32::from(bits) * 12 * 17 * 64);
        weights.iter_mut().step_by(997).for_each(|weight| *weight *= 100.0);
        (weights[100], weights[5000], weights[9000]) = (f32::NAN, f32::INFINITY, f32::NEG_INFINITY);
        let start = HqqSolver::runs(HqqRule::new(width(bits), group), &weights).expect("whole groups");
        let mut scalar = start.clone();
        let expected = scalar.step(Kernels::scalar());
        for kernels in all_kernels() {
            let mut solver = start.clone();
            assert_eq!(solver.step(kernels), expected, "{}", kernels.name());
            let same = solver.zero().iter().zip(scalar.zero()).all(|(a, b)| ulps(*a, *b) == 0);
            assert!(same, "{} {bits} {group}", kernels.name());
        }
    }
}

/// By hand: of `[group 2, 3 columns]`, elements 2 to 4 are the last of row 0 and the first two of row 1.
#[test]
fn a_range_of_elements_crosses_groups() {
    let (scale, zero) = ([1.0, 10.0, 100.0], [0.0, 1.0, 2.0]);
    let codes = [3, 4, 5];
    let mut out = [0.0; 3];
    let columns = AffineGroups::new(GroupAxis::Columns, 2, &scale, Offset::Zero(&zero)).expect("lengths fit");
    columns.dequantize(2, &codes, &mut out).expect("inside");
    assert_eq!(out, [100.0, 4.0, 40.0]);
    let runs = AffineGroups::new(GroupAxis::Runs, 2, &scale, Offset::Bias(&zero)).expect("lengths fit");
    runs.dequantize(3, &codes, &mut out).expect("inside");
    assert_eq!(out, [31.0, 402.0, 502.0]);
    assert!(matches!(runs.dequantize(4, &codes, &mut out), Err(QuantError::Range { bound: 6, .. })));
    assert!(matches!(runs.dequantize(usize::MAX, &codes, &mut out), Err(QuantError::Range { .. })));
}

/// PK-1 on sub-ranges, PK-2 on what does not fit.
#[test]
fn ranges_unpack_and_sizes_are_checked() {
    for bits in [8, 6, 5, 4, 3, 2, 1] {
        let width = width(bits);
        let (rows, columns) = (16, 7);
        let packing = HqqPacking::new(width, rows, columns).expect("whole parts");
        let mut random = Random(u64::from(bits));
        let codes: Vec<u8> = (0..rows * columns).map(|_| random.next().to_le_bytes()[0] & width.max_code()).collect();
        let packed = pack(packing, &codes);
        for _ in 0..50 {
            let start = random.below(codes.len() + 1);
            let count = random.below(codes.len() - start + 1);
            let mut part = vec![0xff; count];
            packing.unpack(&packed, start, &mut part).expect("inside");
            assert_eq!(part, codes[start..start + count], "{bits} bits, {count} from {start}");
        }
        assert!(matches!(packing.unpack(&packed, 112, &mut [0]), Err(QuantError::Range { .. })));
        assert!(matches!(packing.unpack(&packed[1..], 0, &mut [0]), Err(QuantError::Length { .. })));
        assert!(matches!(packing.pack(&codes[1..], &mut packed.clone()), Err(QuantError::Length { .. })));
    }
    assert_eq!(HqqPacking::new(CodeBits::B2, 6, 8), Err(QuantError::Parts { what: "rows", expected: 4, found: 6 }));
    assert!(HqqPacking::new(CodeBits::B8, usize::MAX, 8).is_err());
    assert_eq!(HqqPacking::new(CodeBits::B3, 0, 0).expect("empty").packed_bytes(), 0);
}

/// What is not finite, groups that are cut, and columns outside are no panic.
#[test]
fn bad_input_is_an_error_or_some_code() {
    let rule = HqqRule::new(CodeBits::B4, 8);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX] {
        let mut weights = [0.5; 16];
        weights[3] = bad;
        weights[9] = 0.25;
        let solver = quantize_hqq(Kernels::detect(), rule, GroupAxis::Runs, &weights).expect("whole groups");
        assert!(codes_of(&solver).iter().all(|code| *code <= 15));
    }
    assert_eq!(
        HqqSolver::runs(rule, &[0.0; 9]).expect_err("a cut group"),
        QuantError::GroupSize { found: 8, values: 9 }
    );
    assert!(HqqSolver::runs(HqqRule::new(CodeBits::B4, 0), &[]).is_err());
    let columns = |stride, range, total| HqqSolver::columns(rule, &[0.0; 16], stride, range, total).map(|_| ());
    assert_eq!(columns(2, 0..2, 2), Ok(()));
    assert_eq!(columns(2, 1..3, 4), Ok(()));
    assert!(columns(2, 1..3, 2).is_err());
    assert!(columns(3, 0..2, 3).is_err());
    assert!(columns(usize::MAX, 0..2, usize::MAX).is_err());
    assert!(columns(0, 0..0, 0).is_ok());
}
