//! The kernels against the scalar reference: on a device where there is one, and on the processor everywhere, where their
//! source is compiled as C++ and its threads run one after the other.
#![expect(clippy::disallowed_methods, reason = "a test reads its data and compiles a file")]

use std::ffi::c_void;
use std::path::Path;
use std::process::Command;

use half::{bf16, f16};
use libloading::Library;
use sha2::{Digest as _, Sha256};

use super::{PTX, RUN, SEGMENT};
use crate::quant::{BlockSize, DynamicMap, FourBit, FourBitCode, Kernels, NestedStatistics, Source};
use crate::types::{DType, as_u64, as_usize};

const SOURCE: &str = include_str!("quantize.cu");

/// The PTX is that of the source: `just ptx` writes the source's digest into its first line.
#[test]
fn the_ptx_is_that_of_the_source() {
    let digest: String = Sha256::digest(SOURCE).iter().map(|byte| format!("{byte:02x}")).collect();
    let first = PTX.lines().next().expect("a line");
    assert_eq!(first, format!("// source sha256: {digest}"), "run `just ptx`");
    assert!(PTX.contains("\n.target sm_80\n"), "for devices of compute capability 8.0 and later");
    assert!(PTX.contains("\n.version 9.0\n"), "newer PTX is not taken by drivers of the 580 branch");
    for forbidden in ["fma.rn", ".ftz", "div.full", "div.approx", "rcp.approx"] {
        let used = PTX.lines().filter(|line| !line.starts_with("//")).any(|line| line.contains(forbidden));
        assert!(!used, "{forbidden} rounds otherwise than the processor");
    }
}

/// The kernels as C functions; nothing, with the reason printed, where there is no C++ compiler.
fn compiled(directory: &Path) -> Option<Library> {
    let source = directory.join("quantize.cpp");
    std::fs::write(&source, SOURCE).expect("a new file");
    let library = directory.join("kernels.so");
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    let flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-shared", "-fPIC", "-o"];
    let run = Command::new(&compiler).args(flags).arg(&library).arg(&source).output();
    let output = match run {
        Ok(output) => output,
        Err(error) => {
            println!("skipped: the kernels need a C++ compiler to run on the processor: {compiler}: {error}");
            return None;
        }
    };
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    // SAFETY: The library was just made from our source, and has no initializers.
    Some(unsafe { Library::new(&library) }.expect("it was just made"))
}

/// Calls a kernel once for every thread.
macro_rules! launch {
    ($library:expr, $threads:expr, $name:literal ( $($type:ty = $value:expr),* $(,)? )) => {{
        // SAFETY: The source has these functions with these arguments; the buffers have the lengths that they name.
        unsafe {
            let set = $library.get::<unsafe extern "C" fn(u64)>(b"weightcast_set_thread\0").expect("in the source");
            let kernel = $library.get::<unsafe extern "C" fn($($type),*)>($name).expect("in the source");
            // Some threads more than needed, as the last block of a launch has.
            for thread in 0..$threads + 3 {
                set(thread);
                kernel($($value),*);
            }
        }
    }};
}

/// A small deterministic generator (xorshift).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        u32::try_from(self.0 >> 32).expect("32 bits")
    }

    /// Per run of 32 values one kind: any bits, subnormals, ties of a block whose statistic is 1, tiny, ordinary, stray
    /// NaN and infinities.
    fn values(&mut self, count: usize) -> Vec<f32> {
        let mut kind = 0;
        (0..count)
            .map(|index| {
                if index % 32 == 0 {
                    kind = self.next() % 9;
                }
                let raw = self.next();
                #[expect(clippy::cast_precision_loss, reason = "any value will do")]
                let uniform = raw as f32 / 2_147_483_648.0 - 1.0;
                match kind {
                    0 => f32::from_bits(raw),
                    1 => f32::from_bits(raw & 0x807f_ffff),
                    2 => f32::from_bits(raw & 0x8000_0000),
                    3 | 4 => {
                        let code = if kind == 3 { FourBitCode::Nf4 } else { FourBitCode::Fp4 };
                        let threshold = code.thresholds()[as_usize(u64::from(raw >> 8)) % 15];
                        [1.0, threshold, threshold.next_up(), threshold.next_down()][as_usize(u64::from(raw & 3))]
                    }
                    5 if raw.is_multiple_of(40) => {
                        [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][(raw / 40 % 3) as usize]
                    }
                    6 => uniform * 3e-38,
                    7 => uniform * 1e-6,
                    _ => uniform * 0.1,
                }
            })
            .collect()
    }
}

fn encode(values: &[f32], dtype: DType) -> Vec<u8> {
    let half = |narrow: fn(f32) -> u16| values.iter().flat_map(|value| narrow(*value).to_le_bytes()).collect();
    match dtype {
        DType::F16 => half(|value| f16::from_f32(value).to_bits()),
        DType::BF16 => half(|value| bf16::from_f32(value).to_bits()),
        _ => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
    }
}

const DTYPES: [(DType, u32); 3] = [(DType::F16, 0), (DType::BF16, 1), (DType::F32, 2)];

/// Encoded values with one pattern for every NaN (`DK-1`).
fn same_nan(bytes: &[u8], dtype: DType) -> Vec<u32> {
    let (infinity, canonical) = match dtype {
        DType::F16 => (0x7c00, 0x7e00),
        DType::BF16 => (0x7f80, 0x7fc0),
        _ => (0x7f80_0000, 0x7fc0_0000),
    };
    let size = as_usize(dtype.size_bytes());
    let word = |chunk: &[u8]| chunk.iter().rev().fold(0_u32, |word, byte| word << 8 | u32::from(*byte));
    let magnitude = (1_u32 << (size * 8 - 1)) - 1;
    let unify = |word: u32| if word & magnitude > infinity { canonical } else { word };
    bytes.chunks_exact(size).map(|chunk| unify(word(chunk))).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn check_4bit(library: &Library, random: &mut Random, format: FourBit, count: usize) {
    let values = random.values(count);
    let reference = Kernels::scalar();
    let (block, count_u64) = (u64::from(format.block.get()), as_u64(count));
    for (dtype, element) in DTYPES {
        let bytes = encode(&values, dtype);
        let source = Source::new(dtype, &bytes).expect("whole elements");
        let (mut packed, mut absmax) = (vec![0; format.packed_bytes(count)], vec![0.0; format.blocks(count)]);
        let not_finite = reference.quantize_4bit(format, source, &mut packed, &mut absmax).expect("lengths fit");

        let (mut found, mut statistics, mut bad) = (vec![0xee_u8; packed.len()], vec![0.0_f32; absmax.len()], 0_u64);
        let from = bytes.as_ptr().cast::<c_void>();
        let threads = count_u64.div_ceil(block) * block.div_ceil(SEGMENT);
        launch!(library, threads, b"weightcast_absmax\0"(
            *const c_void = from, u32 = element, u64 = count_u64, u64 = block, u64 = SEGMENT, u32 = 0, u32 = 1,
            *mut f32 = statistics.as_mut_ptr(), *mut u64 = &raw mut bad,
        ));
        let about = format!("{format:?} {dtype} {count}");
        assert_eq!((bad, bits(&statistics)), (not_finite, bits(&absmax)), "{about}");
        let order = format.code.order().iter().rev().fold(0_u64, |all, code| all << 4 | u64::from(*code));
        launch!(library, count_u64.div_ceil(RUN), b"weightcast_quantize_4bit\0"(
            *const c_void = from, u32 = element, u64 = count_u64, u64 = block,
            *const f32 = format.code.thresholds().as_ptr(), u64 = order, *const f32 = absmax.as_ptr(),
            *mut u8 = found.as_mut_ptr(),
        ));
        assert!(found == packed, "{about}");

        let mut widened = vec![0.0; count];
        reference.dequantize_4bit(format, &packed, &absmax, &mut widened).expect("lengths fit");
        let mut out = vec![0xee_u8; bytes.len()];
        launch!(library, count_u64.div_ceil(RUN), b"weightcast_dequantize_4bit\0"(
            *const u8 = packed.as_ptr(), *const f32 = absmax.as_ptr(), u64 = count_u64, u64 = block,
            *const f32 = format.code.values().as_ptr(), *mut c_void = out.as_mut_ptr().cast(), u32 = element,
        ));
        assert!(same_nan(&out, dtype) == same_nan(&encode(&widened, dtype), dtype), "{about}");
    }
}

fn check_int8(library: &Library, random: &mut Random, (rows, columns): (usize, usize)) {
    let count = rows * columns;
    let mut values = random.values(count);
    values[..columns].fill(0.0);
    let reference = Kernels::scalar();
    let (count_u64, columns_u64) = (as_u64(count), as_u64(columns));
    for (dtype, element) in DTYPES {
        let bytes = encode(&values, dtype);
        let source = Source::new(dtype, &bytes).expect("whole elements");
        let (mut codes, mut scb) = (vec![0; count], vec![0.0; rows]);
        let not_finite = reference.quantize_int8_rows(source, columns, &mut codes, &mut scb).expect("lengths fit");
        let (mut found, mut scales, mut bad) = (vec![0xee_u8; count], vec![0.0_f32; rows], 0_u64);
        let from = bytes.as_ptr().cast::<c_void>();
        launch!(library, as_u64(rows) * columns_u64.div_ceil(SEGMENT), b"weightcast_absmax\0"(
            *const c_void = from, u32 = element, u64 = count_u64, u64 = columns_u64, u64 = SEGMENT, u32 = 1, u32 = 0,
            *mut f32 = scales.as_mut_ptr(), *mut u64 = &raw mut bad,
        ));
        let about = format!("{rows} x {columns} {dtype}");
        assert_eq!((bad, bits(&scales)), (not_finite, bits(&scb)), "{about}");
        launch!(library, count_u64.div_ceil(RUN), b"weightcast_quantize_int8\0"(
            *const c_void = from, u32 = element, u64 = count_u64, u64 = columns_u64, *const f32 = scb.as_ptr(),
            *mut u8 = found.as_mut_ptr(),
        ));
        assert!(found == codes, "{about}");
        let mut widened = vec![0.0; count];
        reference.dequantize_int8_rows(columns, &codes, &scb, &mut widened).expect("lengths fit");
        let mut out = vec![0xee_u8; bytes.len()];
        launch!(library, count_u64.div_ceil(RUN), b"weightcast_dequantize_int8\0"(
            *const u8 = codes.as_ptr(), *const f32 = scb.as_ptr(), u64 = count_u64, u64 = columns_u64,
            *mut c_void = out.as_mut_ptr().cast(), u32 = element,
        ));
        assert!(same_nan(&out, dtype) == same_nan(&encode(&widened, dtype), dtype), "{about}");
    }
}

/// DK-1: every kernel on random blocks with everything in them that rounds or compares unusually, at every block size and
/// with short last blocks.
#[test]
fn dk_1_kernels_on_the_processor_equal_the_reference() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let Some(library) = compiled(directory.path()) else { return };
    let mut random = Random(0x5eed_0001);
    for code in [FourBitCode::Nf4, FourBitCode::Fp4] {
        for size in [32, 64, 128, 256, 512, 1024, 2048, 4096] {
            let format = FourBit { code, block: BlockSize::new(size).expect("allowed") };
            for count in [1, 31, 64, 4096, 9001] {
                check_4bit(&library, &mut random, format, count);
            }
        }
    }
    for shape in [(1, 1), (3, 7), (5, 64), (9, 100), (4, 1030)] {
        check_int8(&library, &mut random, shape);
    }
}

/// DK-1 for every f16, and for every f32 whose upper half is any and whose lower half rounds up, down and ties: through a
/// block whose codes are exact.
#[test]
fn dk_1_conversions_equal_the_reference() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let Some(library) = compiled(directory.path()) else { return };
    // Rows of one column: the scale of a row is the magnitude of its value as f16.
    let all: Vec<f32> = (0..=u16::MAX)
        .flat_map(|half| {
            let upper = u32::from(half) << 16;
            [0, 1, 0x0fff, 0x1000, 0x1001, 0x2000, 0x3000, 0x7fff, 0x8000, 0x8001, 0xffff].map(|low| upper | low)
        })
        .map(f32::from_bits)
        .collect();
    let every_half: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    for (dtype, element, bytes) in
        [(DType::F32, 2, encode(&all, DType::F32)), (DType::F16, 0, every_half.clone()), (DType::BF16, 1, every_half)]
    {
        let rows = bytes.len() / as_usize(dtype.size_bytes());
        let source = Source::new(dtype, &bytes).expect("whole elements");
        let (mut codes, mut scb) = (vec![0; rows], vec![0.0; rows]);
        Kernels::scalar().quantize_int8_rows(source, 1, &mut codes, &mut scb).expect("lengths fit");
        let (mut scales, mut bad) = (vec![0.0_f32; rows], 0_u64);
        launch!(library, as_u64(rows), b"weightcast_absmax\0"(
            *const c_void = bytes.as_ptr().cast(), u32 = element, u64 = as_u64(rows), u64 = 1, u64 = SEGMENT, u32 = 1,
            u32 = 0, *mut f32 = scales.as_mut_ptr(), *mut u64 = &raw mut bad,
        ));
        assert!(bits(&scales) == bits(&scb), "{dtype}");
    }
    // The other way: values of a block of statistic `v` with the code of 1 are `v`, narrowed.
    let format = FourBit { code: FourBitCode::Nf4, block: BlockSize::new(32).expect("allowed") };
    let packed = vec![0xff_u8; all.len() * 16];
    let mut widened = vec![0.0; all.len() * 32];
    Kernels::scalar().dequantize_4bit(format, &packed, &all, &mut widened).expect("lengths fit");
    for (dtype, element) in DTYPES {
        let mut out = vec![0xee_u8; widened.len() * as_usize(dtype.size_bytes())];
        launch!(library, as_u64(widened.len()).div_ceil(RUN), b"weightcast_dequantize_4bit\0"(
            *const u8 = packed.as_ptr(), *const f32 = all.as_ptr(), u64 = as_u64(widened.len()), u64 = 32,
            *const f32 = format.code.values().as_ptr(), *mut c_void = out.as_mut_ptr().cast(), u32 = element,
        ));
        assert!(same_nan(&out, dtype) == same_nan(&encode(&widened, dtype), dtype), "{dtype}");
    }
}

#[test]
fn dk_1_nested_statistics_equal_the_reference() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let Some(library) = compiled(directory.path()) else { return };
    let mut random = Random(0x5eed_0002);
    let map = DynamicMap::standard();
    for (count, first_block) in [(1, 0), (256, 0), (700, 3), (513, 255), (1000, 1_000_000)] {
        let codes: Vec<u8> = (0..count).map(|_| random.next().to_le_bytes()[0]).collect();
        let phase = first_block % 256;
        let groups = (as_usize(phase) + count).div_ceil(256);
        let nested_absmax = random.values(groups);
        let offset = 0.012_345;
        let mut expected = vec![0.0; count];
        let statistics =
            NestedStatistics { codes: &codes, first_block, nested_absmax: &nested_absmax, offset, map: &map };
        statistics.dequantize(&mut expected).expect("lengths fit");
        let mut found = vec![0.0_f32; count];
        launch!(library, as_u64(count), b"weightcast_dequantize_nested\0"(
            *const u8 = codes.as_ptr(), u64 = as_u64(count), u64 = phase, *const f32 = nested_absmax.as_ptr(),
            f32 = offset, *const f32 = map.values().as_ptr(), *mut f32 = found.as_mut_ptr(),
        ));
        let unify = |values: &[f32]| same_nan(&encode(values, DType::F32), DType::F32);
        assert!(unify(&found) == unify(&expected), "{count} from {first_block}");
    }
}
