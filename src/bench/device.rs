//! A CUDA device: its kernels against the processor's bytes and its own copies, loads beside the page-locked copy.

use std::time::Duration;

use super::load::{job, make_model};
use super::{BenchError, Figure, GIGA, LoadBench, float, median_s, timed};
use crate::device::{Arena, CudaSlice, CudaSliceMut, Device, DeviceContext, DeviceSource, Memory, QuantKernels};
use crate::quant::{BlockSize, FourBit, FourBitCode, Kernels, Source};
use crate::types::{DType, as_u64, as_usize};

/// Source bytes of a kernel's run: far more than any cache.
const KERNEL_BYTES: usize = 1 << 30;
/// Values that are compared with the processor's: odd, with a short last block.
const COMPARED: usize = 4_000_001;
/// Bytes of one copy when the bus is measured, and how many there are.
const COPY_BYTES: usize = 256 << 20;
const COPIES: u64 = 8;
/// Columns of a matrix for int8.
const COLUMNS: usize = 4096;
const RUNS: usize = 5;
const DEVICE: Device = Device::Cuda { ordinal: 0 };

/// Little-endian values of which one in some hundred is any bits at all, and the others are as weights.
fn values(count: usize, dtype: DType) -> Vec<u8> {
    let size = as_usize(dtype.size_bytes());
    let mut bytes = Vec::with_capacity(count * size);
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for index in 0..count {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        // Runs of 64 thousand values; the first of each is wild.
        let wild = index % 65_536 < 512;
        let raw = u32::try_from(state >> 32).unwrap_or(0);
        let ordinary = (raw & 0x807f_ffff) | (0x3c00_0000 + (raw >> 8 & 0x0180_0000));
        let word = if wild { raw } else { ordinary };
        match dtype {
            DType::F32 => bytes.extend_from_slice(&word.to_le_bytes()),
            DType::F16 if !wild => bytes.extend_from_slice(&half::f16::from_f32(f32::from_bits(word)).to_le_bytes()),
            _ => bytes.extend_from_slice(&(word >> 16).to_le_bytes()[..2]),
        }
    }
    bytes
}

struct Bench {
    kernels: QuantKernels,
}

impl Bench {
    fn allocate(&self, bytes: usize) -> Result<Memory, BenchError> {
        self.kernels.context().allocate(bytes).map_err(BenchError::of)
    }

    fn upload(&self, bytes: &[u8]) -> Result<Memory, BenchError> {
        let mut memory = self.allocate(bytes.len())?;
        self.kernels.context().copy_from_host(memory.as_slice_mut(), bytes).map_err(BenchError::of)?;
        Ok(memory)
    }

    fn download(&self, memory: &Memory) -> Result<Vec<u8>, BenchError> {
        let mut bytes = vec![0; memory.len()];
        self.kernels.context().copy_to_host(&mut bytes, memory.as_slice()).map_err(BenchError::of)?;
        Ok(bytes)
    }

    /// Quantizes and dequantizes the same values on the device and on the processor; an error where bytes differ.
    fn compare(&mut self, format: FourBit, dtype: DType) -> Result<(), BenchError> {
        let bytes = values(COMPARED, dtype);
        let source = Source::new(dtype, &bytes).map_err(BenchError::of)?;
        let (mut packed, mut absmax) = (vec![0; format.packed_bytes(COMPARED)], vec![0.0; format.blocks(COMPARED)]);
        let cpu = Kernels::detect();
        let expected = cpu.quantize_4bit(format, source, &mut packed, &mut absmax).map_err(BenchError::of)?;
        let from = self.upload(&bytes)?;
        let (mut codes, mut statistics) = (self.allocate(packed.len())?, self.allocate(absmax.len() * 4)?);
        let device_source = DeviceSource { dtype, bytes: view(&from)? };
        let (into, scales) = (view_mut(&mut codes)?, view_mut(&mut statistics)?);
        let found = self.kernels.quantize_4bit(format, device_source, into, scales).map_err(BenchError::of)?;
        let about = format!("{} of blocks of {} from {dtype}", format.code.name(), format.block.get());
        let absmax_bytes: Vec<u8> = absmax.iter().flat_map(|value| value.to_le_bytes()).collect();
        equal(&format!("{about}: statistics"), &self.download(&statistics)?, &absmax_bytes)?;
        equal(&format!("{about}: codes"), &self.download(&codes)?, &packed)?;
        equal(&format!("{about}: count of values that are not finite"), &found.to_le_bytes(), &expected.to_le_bytes())?;
        let mut widened = vec![0.0; COMPARED];
        cpu.dequantize_4bit(format, &packed, &absmax, &mut widened).map_err(BenchError::of)?;
        let mut out = self.allocate(bytes.len())?;
        let to = (dtype, view_mut(&mut out)?);
        self.kernels.dequantize_4bit(format, view(&codes)?, view(&statistics)?, to).map_err(BenchError::of)?;
        equal(&format!("{about}: values"), &same_nan(&self.download(&out)?, dtype), &encode(&widened, dtype))
    }

    fn compare_int8(&mut self, dtype: DType) -> Result<(), BenchError> {
        let count = COMPARED / COLUMNS * COLUMNS;
        let bytes = values(count, dtype);
        let source = Source::new(dtype, &bytes).map_err(BenchError::of)?;
        let (mut codes, mut scb) = (vec![0; count], vec![0.0; count / COLUMNS]);
        Kernels::detect().quantize_int8_rows(source, COLUMNS, &mut codes, &mut scb).map_err(BenchError::of)?;
        let from = self.upload(&bytes)?;
        let (mut found, mut scales) = (self.allocate(count)?, self.allocate(scb.len() * 4)?);
        let device_source = DeviceSource { dtype, bytes: view(&from)? };
        self.kernels
            .quantize_int8_rows(device_source, COLUMNS, view_mut(&mut found)?, view_mut(&mut scales)?)
            .map_err(BenchError::of)?;
        let scb: Vec<u8> = scb.iter().flat_map(|value| value.to_le_bytes()).collect();
        equal(&format!("int8 from {dtype}: scales"), &self.download(&scales)?, &scb)?;
        equal(&format!("int8 from {dtype}: codes"), &self.download(&found)?, &codes)
    }
}

/// The values narrowed as the processor does it, with one pattern for every NaN.
fn encode(values: &[f32], dtype: DType) -> Vec<u8> {
    let bytes: Vec<u8> = match dtype {
        DType::F16 => values.iter().flat_map(|value| half::f16::from_f32(*value).to_le_bytes()).collect(),
        DType::BF16 => values.iter().flat_map(|value| half::bf16::from_f32(*value).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
    };
    same_nan(&bytes, dtype)
}

fn same_nan(bytes: &[u8], dtype: DType) -> Vec<u8> {
    let quiet = |is_nan: bool, bytes: &[u8]| if is_nan { vec![0xff; bytes.len()] } else { bytes.to_vec() };
    match dtype {
        DType::F16 => {
            bytes.as_chunks().0.iter().flat_map(|b| quiet(half::f16::from_le_bytes(*b).is_nan(), b)).collect()
        }
        DType::BF16 => {
            bytes.as_chunks().0.iter().flat_map(|b| quiet(half::bf16::from_le_bytes(*b).is_nan(), b)).collect()
        }
        _ => bytes.as_chunks().0.iter().flat_map(|b| quiet(f32::from_le_bytes(*b).is_nan(), b)).collect(),
    }
}

fn equal(what: &str, found: &[u8], expected: &[u8]) -> Result<(), BenchError> {
    if found == expected {
        return Ok(());
    }
    let at = found.iter().zip(expected).position(|(found, expected)| found != expected);
    Err(BenchError(format!("{what}: the device's bytes are not the processor's, first at {at:?}")))
}

fn view(memory: &Memory) -> Result<CudaSlice<'_>, BenchError> {
    memory.as_slice().try_into().map_err(BenchError::of)
}

fn view_mut(memory: &mut Memory) -> Result<CudaSliceMut<'_>, BenchError> {
    memory.as_slice_mut().try_into().map_err(BenchError::of)
}

/// The kernels of device 0: bytes against the processor's, then GB/s of bf16 beside a copy on the device.
///
/// # Errors
/// [`BenchError`], also when a byte differs.
pub fn quantize_on_device() -> Result<Vec<Figure>, BenchError> {
    let mut bench = Bench { kernels: QuantKernels::load(DEVICE).map_err(BenchError::of)? };
    let compared = float(as_u64(compare_all(&mut bench)?));
    let mut figures =
        vec![Figure::new("values equal to the processor's", compared, "values", (compared, "all compared"))];
    figures.extend(rates(&mut bench)?);
    Ok(figures)
}

/// The number of values that were compared.
fn compare_all(bench: &mut Bench) -> Result<usize, BenchError> {
    let mut compared = 0;
    for dtype in [DType::BF16, DType::F16, DType::F32] {
        for code in [FourBitCode::Nf4, FourBitCode::Fp4] {
            for size in [32, 64, 4096] {
                let block = BlockSize::new(size).map_err(BenchError::of)?;
                bench.compare(FourBit { code, block }, dtype)?;
                compared += COMPARED;
            }
        }
        bench.compare_int8(dtype)?;
        compared += COMPARED / COLUMNS * COLUMNS;
    }
    Ok(compared)
}

fn rates(bench: &mut Bench) -> Result<Vec<Figure>, BenchError> {
    let count = KERNEL_BYTES / 2;
    let pattern = values(1 << 20, DType::BF16);
    let mut source = bench.allocate(KERNEL_BYTES)?;
    for start in (0..KERNEL_BYTES).step_by(pattern.len()) {
        let into = source.as_slice_mut().range(start..start + pattern.len()).map_err(BenchError::of)?;
        bench.kernels.context().copy_from_host(into, &pattern).map_err(BenchError::of)?;
    }
    let mut out = bench.allocate(KERNEL_BYTES)?;
    let mut codes = bench.allocate(count)?;
    let mut statistics = bench.allocate(count / 32 * 4)?;
    let copied = run(|| bench.kernels.context().copy(out.as_slice_mut(), source.as_slice()).map_err(BenchError::of))?;
    let limit = (float(as_u64(KERNEL_BYTES)) / copied / GIGA, "copying the bf16 values on the device");
    let mut figures = Vec::new();
    let mut add = |name: String, seconds: f64| {
        figures.push(Figure::new(name, float(as_u64(KERNEL_BYTES)) / seconds / GIGA, "GB/s", limit));
    };
    for code in [FourBitCode::Nf4, FourBitCode::Fp4] {
        let format = FourBit { code, block: BlockSize::B64 };
        let (packed, blocks) = (format.packed_bytes(count), format.blocks(count) * 4);
        add(
            format!("quantize {} on {DEVICE}", code.name()),
            run(|| {
                let from = DeviceSource { dtype: DType::BF16, bytes: view(&source)? };
                let into = codes
                    .as_slice_mut()
                    .range(0..packed)
                    .map_err(BenchError::of)?
                    .try_into()
                    .map_err(BenchError::of)?;
                let absmax = statistics
                    .as_slice_mut()
                    .range(0..blocks)
                    .map_err(BenchError::of)?
                    .try_into()
                    .map_err(BenchError::of)?;
                bench.kernels.quantize_4bit(format, from, into, absmax).map(drop).map_err(BenchError::of)
            })?,
        );
        add(
            format!("dequantize {} on {DEVICE}", code.name()),
            run(|| {
                let from =
                    codes.as_slice().range(0..packed).map_err(BenchError::of)?.try_into().map_err(BenchError::of)?;
                let absmax = statistics
                    .as_slice()
                    .range(0..blocks)
                    .map_err(BenchError::of)?
                    .try_into()
                    .map_err(BenchError::of)?;
                let to = (DType::BF16, view_mut(&mut out)?);
                bench.kernels.dequantize_4bit(format, from, absmax, to).map_err(BenchError::of)
            })?,
        );
    }
    let rows = count / COLUMNS * 4;
    add(
        format!("quantize int8 on {DEVICE}"),
        run(|| {
            let from = DeviceSource { dtype: DType::BF16, bytes: view(&source)? };
            let scb =
                statistics.as_slice_mut().range(0..rows).map_err(BenchError::of)?.try_into().map_err(BenchError::of)?;
            bench
                .kernels
                .quantize_int8_rows(from, COLUMNS, view_mut(&mut codes)?, scb)
                .map(drop)
                .map_err(BenchError::of)
        })?,
    );
    add(
        format!("dequantize int8 on {DEVICE}"),
        run(|| {
            let scb =
                statistics.as_slice().range(0..rows).map_err(BenchError::of)?.try_into().map_err(BenchError::of)?;
            let to = (DType::BF16, view_mut(&mut out)?);
            bench.kernels.dequantize_int8_rows(COLUMNS, view(&codes)?, scb, to).map_err(BenchError::of)
        })?,
    );
    Ok(figures)
}

/// The median time of a call that has ended when it returns, after one that warms up.
fn run(mut call: impl FnMut() -> Result<(), BenchError>) -> Result<f64, BenchError> {
    call()?;
    median_s(RUNS, || {
        let mut result = Ok(());
        let time = timed(|| result = call());
        result.map(|()| time)
    })
}

/// Seconds for `COPIES` copies of page-locked memory to the device.
fn pinned_copies() -> Result<Duration, BenchError> {
    let context = DeviceContext::open(DEVICE).map_err(BenchError::of)?;
    let mut staging = context.staging(COPY_BYTES).map_err(BenchError::of)?;
    staging.fill(7);
    let mut memory = context.allocate(COPY_BYTES).map_err(BenchError::of)?;
    let mut result = Ok(());
    let time = timed(|| {
        for _ in 0..COPIES {
            result = context.copy_from_host(memory.as_slice_mut(), &staging);
        }
    });
    result.map(|()| time).map_err(BenchError::of)
}

/// GB/s of a generated model onto device 0 in NF4 with double quantization and as it is, and of the arena alone, beside
/// copies of page-locked memory.
///
/// # Errors
/// [`BenchError`].
pub fn load_to_device(bench: &LoadBench) -> Result<Vec<Figure>, BenchError> {
    let bytes = make_model(bench)?.index.total_bytes();
    let moved = float(as_u64(COPY_BYTES) * COPIES);
    let pinned = moved / median_s(RUNS, pinned_copies)? / GIGA;
    let limit = (pinned, "copying page-locked memory to the device");
    let source = vec![7_u8; COPY_BYTES];
    let arena = median_s(RUNS, || {
        let mut arena = Arena::allocate(DEVICE, COPY_BYTES).map_err(BenchError::of)?;
        let mut result = Ok(());
        let time = timed(|| {
            for _ in 0..COPIES {
                result = arena.write(0, &source).and_then(|()| arena.flush());
            }
        });
        result.map(|()| time).map_err(BenchError::of)
    })?;
    let mut figures = vec![
        Figure::new("page-locked copy", pinned, "GB/s", (pinned, "itself")),
        Figure::new("arena from pageable memory", moved / arena / GIGA, "GB/s", limit),
    ];
    for (name, flags) in
        [("nf4-double", &["--quantize", "nf4", "--double", "--device", "cuda"][..]), ("bf16", &["--device", "cuda"])]
    {
        let (mut walls, mut setups) = (Vec::new(), Vec::new());
        for _ in 0..RUNS {
            let reports = job(bench, flags)?;
            walls.push(reports.iter().map(|report| report.wall_s).fold(0.0, f64::max));
            setups.push(reports.iter().map(|report| report.stages.allocate_s).fold(0.0, f64::max));
        }
        let (wall, setup) = (middle(&mut walls), middle(&mut setups));
        let rate = |seconds: f64| float(bytes) / seconds / GIGA;
        figures.push(Figure::new(format!("load {name} to the device"), rate(wall), "GB/s of source", limit));
        figures.push(Figure::new(format!("load {name}, memory there"), rate(wall - setup), "GB/s of source", limit));
        figures.push(Figure::new(format!("load {name}: getting memory"), setup, "s", (wall, "the whole load")));
    }
    Ok(figures)
}

fn middle(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or(f64::NAN)
}
