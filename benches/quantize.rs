//! Values per second of one core, for every kernel that the processor has: `cargo bench --bench quantize`.
//!
//! 64 Ki values at a time (128 KiB of bf16), so that it is the kernels and not the memory that is measured.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use half::{bf16, f16};
use weightcast::quant::{BlockSize, DynamicMap, FourBit, FourBitCode, Kernels, NESTED_BLOCK, NestedStatistics, Source};
use weightcast::types::DType;

const VALUES: usize = 1 << 16;
const COLUMNS: usize = 4096;
const BLOCKS: usize = VALUES / 64;

/// Weights like those of a model: a sum of uniform values, of standard deviation 0.02.
fn weights() -> Vec<f32> {
    let mut state = 1_u32;
    let mut uniform = move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        f32::from(u16::try_from(state >> 16).expect("16 bits")) / 65_536.0 - 0.5
    };
    (0..VALUES).map(|_| (uniform() + uniform() + uniform() + uniform()) * 0.035).collect()
}

fn bytes(dtype: DType) -> Vec<u8> {
    let weights = weights();
    match dtype {
        DType::F16 => weights.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect(),
        DType::BF16 => weights.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect(),
        _ => weights.iter().flat_map(|value| value.to_le_bytes()).collect(),
    }
}

fn kernels() -> Vec<Kernels> {
    [Kernels::avx512(), Kernels::avx2(), Some(Kernels::scalar())].into_iter().flatten().collect()
}

fn four_bit(c: &mut Criterion) {
    let mut group = c.benchmark_group("4bit");
    group.throughput(Throughput::Elements(VALUES as u64));
    for code in [FourBitCode::Nf4, FourBitCode::Fp4] {
        let format = FourBit { code, block: BlockSize::B64 };
        for kernels in kernels() {
            let (mut packed, mut absmax) = (vec![0; VALUES / 2], vec![0.0; BLOCKS]);
            for dtype in [DType::BF16, DType::F16, DType::F32] {
                let bytes = bytes(dtype);
                group.bench_function(format!("quantize/{}/{}/{dtype}", code.name(), kernels.name()), |b| {
                    b.iter(|| {
                        let source = Source::new(dtype, black_box(&bytes)).expect("whole elements");
                        kernels.quantize_4bit(format, source, &mut packed, &mut absmax).expect("lengths fit")
                    });
                });
            }
            let mut out = vec![0.0; VALUES];
            group.bench_function(format!("dequantize/{}/{}/F32", code.name(), kernels.name()), |b| {
                b.iter(|| kernels.dequantize_4bit(format, black_box(&packed), &absmax, &mut out).expect("lengths fit"));
            });
            let mut out = vec![bf16::ZERO; VALUES];
            group.bench_function(format!("dequantize/{}/{}/BF16", code.name(), kernels.name()), |b| {
                b.iter(|| {
                    kernels.dequantize_4bit_bf16(format, black_box(&packed), &absmax, &mut out).expect("lengths fit");
                });
            });
        }
    }
    group.finish();
}

fn int8(c: &mut Criterion) {
    let mut group = c.benchmark_group("int8");
    group.throughput(Throughput::Elements(VALUES as u64));
    let bytes = bytes(DType::BF16);
    for kernels in kernels() {
        let (mut q, mut scb) = (vec![0; VALUES], vec![0.0; VALUES / COLUMNS]);
        group.bench_function(format!("quantize/{}/BF16", kernels.name()), |b| {
            b.iter(|| {
                let source = Source::new(DType::BF16, black_box(&bytes)).expect("whole elements");
                kernels.quantize_int8_rows(source, COLUMNS, &mut q, &mut scb).expect("lengths fit")
            });
        });
        let mut out = vec![0.0; VALUES];
        group.bench_function(format!("dequantize/{}/F32", kernels.name()), |b| {
            b.iter(|| kernels.dequantize_int8_rows(COLUMNS, black_box(&q), &scb, &mut out).expect("lengths fit"));
        });
    }
    group.finish();
}

/// Statistics per second, not values: there is one for 64 values.
fn nested(c: &mut Criterion) {
    let mut group = c.benchmark_group("nested");
    group.throughput(Throughput::Elements(BLOCKS as u64));
    let statistics: Vec<f32> = weights()[..BLOCKS].iter().map(|value| value.abs() + 0.05).collect();
    let map = DynamicMap::standard();
    let (mut codes, mut nested_absmax) = (vec![0; BLOCKS], vec![0.0; BLOCKS / NESTED_BLOCK]);
    for kernels in kernels() {
        group.bench_function(format!("quantize/{}", kernels.name()), |b| {
            b.iter(|| {
                let statistics = black_box(&statistics);
                kernels.nested_quantize(statistics, 0.07, &map, &mut codes, &mut nested_absmax).expect("lengths fit");
            });
        });
    }
    let mut out = vec![0.0; BLOCKS];
    let run =
        NestedStatistics { codes: &codes, first_block: 0, nested_absmax: &nested_absmax, offset: 0.07, map: &map };
    group.bench_function("dequantize", |b| b.iter(|| black_box(&run).dequantize(&mut out).expect("lengths fit")));
    group.finish();
}

fn convert(c: &mut Criterion) {
    let mut group = c.benchmark_group("convert");
    group.throughput(Throughput::Elements(VALUES as u64));
    for kernels in kernels() {
        for (from, to) in [(DType::BF16, DType::F32), (DType::F32, DType::BF16), (DType::F16, DType::BF16)] {
            let bytes = bytes(from);
            let mut out = vec![0; VALUES * if to == DType::F32 { 4 } else { 2 }];
            group.bench_function(format!("{from}-{to}/{}", kernels.name()), |b| {
                b.iter(|| {
                    let source = Source::new(from, black_box(&bytes)).expect("whole elements");
                    kernels.convert(source, to, &mut out).expect("lengths fit");
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, four_bit, int8, nested, convert);
criterion_main!(benches);
