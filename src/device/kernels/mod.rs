//! Quantizing and dequantizing in device memory: the kernels of `quantize.cu`, as the PTX that is checked in.
//!
//! Owns: [`QuantKernels`]: loading the module, checking arguments, launching. Refuses to know: what is quantized when.
//!
//! `DK-1`: results have the bytes of `quant`'s scalar reference, NaN, infinities, ties and subnormals included; of a
//! dequantized value that is NaN only that is promised.
//! `DV-3`: a call returns when the device is done with it.
#![expect(unsafe_code, reason = "launching kernels")]

mod module;
#[cfg(test)]
mod tests;

use super::{CudaSlice, CudaSliceMut, Device, DeviceContext, DeviceError, Memory, Slice, SliceMut};
use crate::quant::{DynamicMap, FourBit, FourBitCode, QuantError};
use crate::types::{DType, as_u64, as_usize};

use module::{Argument, Module};

/// The kernels, compiled for compute capability 8.0 and later by `just ptx`.
const PTX: &str = include_str!("quantize.ptx");

/// Values that one thread encodes or decodes, `RUN` of the source.
const RUN: u64 = 8;
/// Values whose largest magnitude one thread finds: half a line of the cache twice over, and a multiple of `RUN`.
const SEGMENT: u64 = 64;
/// Bytes of the table of a 4-bit code: 16 values and 15 thresholds, in f32, padded.
const TABLE_BYTES: usize = 128;

/// The kernels on one device. One thread uses them at a time.
#[derive(Debug)]
pub struct QuantKernels {
    context: DeviceContext,
    module: Module,
    /// The table of each code, the dynamic map, and the count of values that are not finite.
    tables: Memory,
}

/// A run of weights in device memory: a whole number of elements.
#[derive(Clone, Copy, Debug)]
pub struct DeviceSource<'a> {
    /// F16, BF16 or F32.
    pub dtype: DType,
    /// The elements.
    pub bytes: CudaSlice<'a>,
}

/// Statistics as double quantization keeps them, in device memory; see [`crate::quant::NestedStatistics`].
#[derive(Clone, Copy, Debug)]
pub struct DeviceNested<'a> {
    /// One code for each block of the run.
    pub codes: CudaSlice<'a>,
    /// The index in the whole tensor of the first block.
    pub first_block: u64,
    /// f32 statistics from the group of the first code to the group of the last one.
    pub nested_absmax: CudaSlice<'a>,
    /// The mean that was subtracted.
    pub offset: f32,
}

const fn table_offset(code: FourBitCode) -> usize {
    match code {
        FourBitCode::Nf4 => 0,
        FourBitCode::Fp4 => TABLE_BYTES,
    }
}
const MAP_OFFSET: usize = 2 * TABLE_BYTES;
const COUNT_OFFSET: usize = MAP_OFFSET + 1024;

impl QuantKernels {
    /// Loads the kernels onto a CUDA device.
    ///
    /// # Errors
    /// Those of [`DeviceContext::open`]; [`DeviceError::Driver`] when the driver does not take the PTX.
    pub fn load(device: Device) -> Result<Self, DeviceError> {
        let context = DeviceContext::open(device)?;
        let module = Module::load(context.cuda()?, PTX)?;
        let mut host = vec![0_u8; COUNT_OFFSET + 8];
        let mut put = |at: usize, values: &[f32]| {
            for (place, value) in host[at..].as_chunks_mut::<4>().0.iter_mut().zip(values) {
                *place = value.to_le_bytes();
            }
        };
        for code in [FourBitCode::Nf4, FourBitCode::Fp4] {
            put(table_offset(code), code.values());
            put(table_offset(code) + 64, code.thresholds());
        }
        put(MAP_OFFSET, DynamicMap::standard().values());
        let mut tables = context.allocate(host.len())?;
        context.copy_from_host(tables.as_slice_mut(), &host)?;
        Ok(Self { context, module, tables })
    }

    /// The device's context, whose copies are done when they return.
    #[must_use]
    pub const fn context(&self) -> &DeviceContext {
        &self.context
    }

    /// As [`crate::quant::Kernels::quantize_4bit`]: a part of a tensor that starts at a block boundary becomes packed
    /// codes and f32 statistics. Returns the number of values that are not finite.
    ///
    /// # Errors
    /// [`DeviceError::Quant`] when a length does not fit, [`DeviceError::Misaligned`], [`DeviceError::Driver`].
    pub fn quantize_4bit(
        &mut self,
        format: FourBit,
        source: DeviceSource<'_>,
        packed: CudaSliceMut<'_>,
        absmax: CudaSliceMut<'_>,
    ) -> Result<u64, DeviceError> {
        let (element, values) = elements(source.dtype, source.bytes)?;
        expect_len("packed", packed.len(), format.packed_bytes(values))?;
        expect_len("absmax", absmax.len(), format.blocks(values) * 4)?;
        aligned("absmax", absmax.address(), 4)?;
        self.same_device(&[source.bytes.ordinal(), packed.ordinal(), absmax.ordinal()])?;
        let (count, block) = (as_u64(values), u64::from(format.block.get()));
        let not_finite = self.absmax(source.bytes, (element, count), (block, false), &absmax)?;
        let (_, thresholds) = self.table(format.code);
        let ranks = format.code.order().iter().rev().fold(0_u64, |all, code| all << 4 | u64::from(*code));
        self.module.launch(
            "weightcast_quantize_4bit",
            count.div_ceil(RUN),
            &[
                Argument::U64(source.bytes.address()),
                Argument::U32(element),
                Argument::U64(count),
                Argument::U64(block),
                Argument::U64(thresholds),
                Argument::U64(ranks),
                Argument::U64(absmax.address()),
                Argument::U64(packed.address()),
            ],
        )?;
        Ok(not_finite)
    }

    /// As [`crate::quant::Kernels::dequantize_4bit`], rounded once more to `dtype` (F16, BF16 or F32). The length of `out`
    /// gives the number of values.
    ///
    /// # Errors
    /// As [`Self::quantize_4bit`].
    pub fn dequantize_4bit(
        &mut self,
        format: FourBit,
        packed: CudaSlice<'_>,
        absmax: CudaSlice<'_>,
        (dtype, out): (DType, CudaSliceMut<'_>),
    ) -> Result<(), DeviceError> {
        let (element, values) = elements(dtype, out_view(&out))?;
        expect_len("packed", packed.len(), format.packed_bytes(values))?;
        expect_len("absmax", absmax.len(), format.blocks(values) * 4)?;
        aligned("absmax", absmax.address(), 4)?;
        self.same_device(&[packed.ordinal(), absmax.ordinal(), out.ordinal()])?;
        let (code_values, _) = self.table(format.code);
        self.module.launch(
            "weightcast_dequantize_4bit",
            as_u64(values).div_ceil(RUN),
            &[
                Argument::U64(packed.address()),
                Argument::U64(absmax.address()),
                Argument::U64(as_u64(values)),
                Argument::U64(u64::from(format.block.get())),
                Argument::U64(code_values),
                Argument::U64(out.address()),
                Argument::U32(element),
            ],
        )
    }

    /// As [`crate::quant::NestedStatistics::dequantize`] with the standard map: f32 statistics, one for each code.
    ///
    /// # Errors
    /// As [`Self::quantize_4bit`].
    pub fn dequantize_nested(&mut self, from: DeviceNested<'_>, out: CudaSliceMut<'_>) -> Result<(), DeviceError> {
        let DeviceNested { codes, first_block, nested_absmax, offset } = from;
        let phase = first_block % 256;
        let groups = if codes.is_empty() { 0 } else { (as_usize(phase) + codes.len()).div_ceil(256) };
        expect_len("out", out.len(), codes.len() * 4)?;
        expect_len("nested_absmax", nested_absmax.len(), groups * 4)?;
        aligned("out", out.address(), 4)?;
        aligned("nested_absmax", nested_absmax.address(), 4)?;
        self.same_device(&[codes.ordinal(), nested_absmax.ordinal(), out.ordinal()])?;
        let map = self.tables_address() + as_u64(MAP_OFFSET);
        self.module.launch(
            "weightcast_dequantize_nested",
            as_u64(codes.len()),
            &[
                Argument::U64(codes.address()),
                Argument::U64(as_u64(codes.len())),
                Argument::U64(phase),
                Argument::U64(nested_absmax.address()),
                Argument::F32(offset),
                Argument::U64(map),
                Argument::U64(out.address()),
            ],
        )
    }

    /// As [`crate::quant::Kernels::quantize_int8_rows`]: whole rows of `columns` elements. Returns the number of elements
    /// that are not finite as f16.
    ///
    /// # Errors
    /// As [`Self::quantize_4bit`].
    pub fn quantize_int8_rows(
        &mut self,
        source: DeviceSource<'_>,
        columns: usize,
        codes: CudaSliceMut<'_>,
        scb: CudaSliceMut<'_>,
    ) -> Result<u64, DeviceError> {
        let (element, values) = elements(source.dtype, source.bytes)?;
        let rows = rows(values, columns)?;
        expect_len("q", codes.len(), values)?;
        expect_len("scb", scb.len(), rows * 4)?;
        aligned("scb", scb.address(), 4)?;
        self.same_device(&[source.bytes.ordinal(), codes.ordinal(), scb.ordinal()])?;
        let (count, columns) = (as_u64(values), as_u64(columns));
        let not_finite = self.absmax(source.bytes, (element, count), (columns, true), &scb)?;
        self.module.launch(
            "weightcast_quantize_int8",
            count.div_ceil(RUN),
            &[
                Argument::U64(source.bytes.address()),
                Argument::U32(element),
                Argument::U64(count),
                Argument::U64(columns),
                Argument::U64(scb.address()),
                Argument::U64(codes.address()),
            ],
        )?;
        Ok(not_finite)
    }

    /// As [`crate::quant::Kernels::dequantize_int8_rows`], rounded once more to `dtype`.
    ///
    /// # Errors
    /// As [`Self::quantize_4bit`].
    pub fn dequantize_int8_rows(
        &mut self,
        columns: usize,
        codes: CudaSlice<'_>,
        scb: CudaSlice<'_>,
        (dtype, out): (DType, CudaSliceMut<'_>),
    ) -> Result<(), DeviceError> {
        let (element, values) = elements(dtype, out_view(&out))?;
        let rows = rows(values, columns)?;
        expect_len("q", codes.len(), values)?;
        expect_len("scb", scb.len(), rows * 4)?;
        aligned("scb", scb.address(), 4)?;
        self.same_device(&[codes.ordinal(), scb.ordinal(), out.ordinal()])?;
        self.module.launch(
            "weightcast_dequantize_int8",
            as_u64(values).div_ceil(RUN),
            &[
                Argument::U64(codes.address()),
                Argument::U64(scb.address()),
                Argument::U64(as_u64(values)),
                Argument::U64(as_u64(columns)),
                Argument::U64(out.address()),
                Argument::U32(element),
            ],
        )
    }

    /// The largest magnitude of each group of values, and how many values are not finite.
    fn absmax(
        &mut self,
        source: CudaSlice<'_>,
        (element, count): (u32, u64),
        (group, int8): (u64, bool),
        absmax: &CudaSliceMut<'_>,
    ) -> Result<u64, DeviceError> {
        let counter = self.tables_address() + as_u64(COUNT_OFFSET);
        self.module.zero(absmax.address(), absmax.len())?;
        self.module.zero(counter, 8)?;
        self.module.launch(
            "weightcast_absmax",
            count.div_ceil(group.max(1)) * group.div_ceil(SEGMENT),
            &[
                Argument::U64(source.address()),
                Argument::U32(element),
                Argument::U64(count),
                Argument::U64(group),
                Argument::U64(SEGMENT),
                Argument::U32(u32::from(int8)),
                Argument::U32(u32::from(!int8)),
                Argument::U64(absmax.address()),
                Argument::U64(counter),
            ],
        )?;
        let mut not_finite = [0_u8; 8];
        let place = self.tables.as_slice().range(COUNT_OFFSET..COUNT_OFFSET + 8)?;
        self.context.copy_to_host(&mut not_finite, place)?;
        Ok(u64::from_le_bytes(not_finite))
    }

    fn tables_address(&self) -> u64 {
        match self.tables.as_slice() {
            Slice::Cuda(tables) => tables.address(),
            Slice::Host(_) => 0,
        }
    }

    /// The addresses of a code's values and of its thresholds.
    fn table(&self, code: FourBitCode) -> (u64, u64) {
        let values = self.tables_address() + as_u64(table_offset(code));
        (values, values + 64)
    }

    fn same_device(&self, ordinals: &[u32]) -> Result<(), DeviceError> {
        let expected = self.context.device();
        let found = ordinals.iter().map(|&ordinal| Device::Cuda { ordinal }).find(|found| *found != expected);
        found.map_or(Ok(()), |found| Err(DeviceError::WrongDevice { expected, found }))
    }
}

impl<'a> TryFrom<Slice<'a>> for CudaSlice<'a> {
    type Error = DeviceError;

    fn try_from(slice: Slice<'a>) -> Result<Self, DeviceError> {
        match slice {
            Slice::Cuda(view) => Ok(view),
            Slice::Host(_) => Err(on_the_host()),
        }
    }
}

impl<'a> TryFrom<SliceMut<'a>> for CudaSliceMut<'a> {
    type Error = DeviceError;

    fn try_from(slice: SliceMut<'a>) -> Result<Self, DeviceError> {
        match slice {
            SliceMut::Cuda(view) => Ok(view),
            SliceMut::Host(_) => Err(on_the_host()),
        }
    }
}

const fn on_the_host() -> DeviceError {
    DeviceError::WrongDevice { expected: Device::Cuda { ordinal: 0 }, found: Device::Host }
}

/// The kernels' number of an element type, and how many elements there are.
fn elements(dtype: DType, bytes: CudaSlice<'_>) -> Result<(u32, usize), DeviceError> {
    let number = match dtype {
        DType::F16 => 0,
        DType::BF16 => 1,
        DType::F32 => 2,
        found => return Err(QuantError::DType { found }.into()),
    };
    let size = as_usize(dtype.size_bytes());
    if !bytes.len().is_multiple_of(size) {
        return Err(QuantError::RaggedBytes { dtype, found: bytes.len() }.into());
    }
    aligned("elements", bytes.address(), dtype.size_bytes())?;
    Ok((number, bytes.len() / size))
}

fn out_view<'a>(out: &'a CudaSliceMut<'_>) -> CudaSlice<'a> {
    CudaSlice::new(out.address(), out.len(), out.ordinal())
}

fn rows(values: usize, columns: usize) -> Result<usize, DeviceError> {
    match values.checked_div(columns) {
        Some(rows) if rows * columns == values => Ok(rows),
        _ => Err(QuantError::Columns { columns, values }.into()),
    }
}

/// Lengths are in bytes here.
fn expect_len(what: &'static str, found: usize, expected: usize) -> Result<(), DeviceError> {
    if found == expected { Ok(()) } else { Err(QuantError::Length { what, expected, found }.into()) }
}

fn aligned(what: &'static str, address: u64, bytes: u64) -> Result<(), DeviceError> {
    if address.is_multiple_of(bytes) { Ok(()) } else { Err(DeviceError::Misaligned { what, bytes }) }
}
