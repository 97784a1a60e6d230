//! Borrowed views of bytes on a device: what collectives and copies take.
//!
//! Owns: [`Slice`] and [`SliceMut`], cutting them.
//! Refuses to know: who allocated the bytes.
//!
//! `DV-2`: two `SliceMut` never name the same byte: they are made from exclusive borrows and cut into disjoint parts.

use std::marker::PhantomData;
use std::ops::Range;

use super::Device;

/// Bytes on some device, to be read.
#[derive(Clone, Copy, Debug)]
pub enum Slice<'a> {
    /// Bytes of this process.
    Host(&'a [u8]),
    /// Bytes of a CUDA device.
    Cuda(CudaSlice<'a>),
}

/// Bytes on some device, to be written.
#[derive(Debug)]
pub enum SliceMut<'a> {
    /// Bytes of this process.
    Host(&'a mut [u8]),
    /// Bytes of a CUDA device.
    Cuda(CudaSliceMut<'a>),
}

/// A range of a CUDA allocation, borrowed for `'a`.
#[derive(Clone, Copy, Debug)]
pub struct CudaSlice<'a> {
    address: u64,
    bytes: usize,
    ordinal: u32,
    owner: PhantomData<&'a u8>,
}

/// A range of a CUDA allocation, borrowed exclusively for `'a`.
#[derive(Debug)]
pub struct CudaSliceMut<'a> {
    address: u64,
    bytes: usize,
    ordinal: u32,
    owner: PhantomData<&'a mut u8>,
}

impl CudaSlice<'_> {
    /// A view of device memory that the caller keeps alive for `'a`.
    pub(super) const fn new(address: u64, bytes: usize, ordinal: u32) -> Self {
        Self { address, bytes, ordinal, owner: PhantomData }
    }

    /// The device address of the first byte.
    #[must_use]
    pub const fn address(&self) -> u64 {
        self.address
    }

    /// The number of bytes.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.bytes
    }

    /// Whether there is no byte in it.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// The device's index.
    #[must_use]
    pub const fn ordinal(&self) -> u32 {
        self.ordinal
    }

    fn range(self, range: &Range<usize>) -> Self {
        let offset = crate::types::as_u64(range.start);
        Self { address: self.address + offset, bytes: range.len(), ..self }
    }
}

impl CudaSliceMut<'_> {
    /// A view of device memory that the caller keeps alive, and to itself, for `'a`.
    pub(super) const fn new(address: u64, bytes: usize, ordinal: u32) -> Self {
        Self { address, bytes, ordinal, owner: PhantomData }
    }

    /// The device address of the first byte.
    #[must_use]
    pub const fn address(&self) -> u64 {
        self.address
    }

    /// The number of bytes.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.bytes
    }

    /// Whether there is no byte in it.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// The device's index.
    #[must_use]
    pub const fn ordinal(&self) -> u32 {
        self.ordinal
    }

    /// A view of no real memory, for tests of those who refuse device memory.
    #[cfg(test)]
    pub(crate) const fn for_tests(address: u64, bytes: usize, ordinal: u32) -> Self {
        Self::new(address, bytes, ordinal)
    }

    fn view(&self) -> CudaSlice<'_> {
        CudaSlice::new(self.address, self.bytes, self.ordinal)
    }

    fn range(self, range: &Range<usize>) -> Self {
        let offset = crate::types::as_u64(range.start);
        Self { address: self.address + offset, bytes: range.len(), ..self }
    }
}

/// A range that does not lie within the view it was applied to.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("bytes {start}..{end} of a view of {len} bytes")]
pub struct OutOfRange {
    /// The first byte asked for.
    pub start: usize,
    /// One past the last byte asked for.
    pub end: usize,
    /// The bytes that there are.
    pub len: usize,
}

fn check_range(range: &Range<usize>, len: usize) -> Result<(), OutOfRange> {
    if range.start <= range.end && range.end <= len {
        Ok(())
    } else {
        Err(OutOfRange { start: range.start, end: range.end, len })
    }
}

impl<'a> Slice<'a> {
    /// The number of bytes.
    #[must_use]
    pub const fn len(&self) -> usize {
        match self {
            Self::Host(bytes) => bytes.len(),
            Self::Cuda(slice) => slice.len(),
        }
    }

    /// Whether there is no byte in it.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where the bytes lie.
    #[must_use]
    pub const fn device(&self) -> Device {
        match self {
            Self::Host(_) => Device::Host,
            Self::Cuda(slice) => Device::Cuda { ordinal: slice.ordinal },
        }
    }

    /// The bytes, when they are the host's.
    #[must_use]
    pub const fn as_host(&self) -> Option<&'a [u8]> {
        match self {
            Self::Host(bytes) => Some(bytes),
            Self::Cuda(_) => None,
        }
    }

    /// The bytes `range` of this view.
    ///
    /// # Errors
    /// [`OutOfRange`] when the view does not contain them.
    pub fn range(self, range: Range<usize>) -> Result<Self, OutOfRange> {
        check_range(&range, self.len())?;
        Ok(match self {
            Self::Host(bytes) => Self::Host(&bytes[range]),
            Self::Cuda(slice) => Self::Cuda(slice.range(&range)),
        })
    }

    /// The first `mid` bytes and the rest.
    ///
    /// # Errors
    /// [`OutOfRange`] when there are fewer than `mid` bytes.
    pub fn split_at(self, mid: usize) -> Result<(Self, Self), OutOfRange> {
        Ok((self.range(0..mid)?, self.range(mid..self.len())?))
    }
}

impl<'a> SliceMut<'a> {
    /// The number of bytes.
    #[must_use]
    pub const fn len(&self) -> usize {
        match self {
            Self::Host(bytes) => bytes.len(),
            Self::Cuda(slice) => slice.len(),
        }
    }

    /// Whether there is no byte in it.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where the bytes lie.
    #[must_use]
    pub const fn device(&self) -> Device {
        match self {
            Self::Host(_) => Device::Host,
            Self::Cuda(slice) => Device::Cuda { ordinal: slice.ordinal },
        }
    }

    /// The bytes, when they are the host's.
    #[must_use]
    pub const fn as_host_mut(&mut self) -> Option<&mut [u8]> {
        match self {
            Self::Host(bytes) => Some(bytes),
            Self::Cuda(_) => None,
        }
    }

    /// The same bytes, to be read.
    #[must_use]
    pub fn as_slice(&self) -> Slice<'_> {
        match self {
            Self::Host(bytes) => Slice::Host(bytes),
            Self::Cuda(slice) => Slice::Cuda(slice.view()),
        }
    }

    /// The same bytes for a shorter time, so that the view can be used again afterwards.
    #[must_use]
    pub const fn reborrow(&mut self) -> SliceMut<'_> {
        match self {
            Self::Host(bytes) => SliceMut::Host(bytes),
            Self::Cuda(slice) => SliceMut::Cuda(CudaSliceMut::new(slice.address, slice.bytes, slice.ordinal)),
        }
    }

    /// The bytes `range` of this view.
    ///
    /// # Errors
    /// [`OutOfRange`] when the view does not contain them.
    pub fn range(self, range: Range<usize>) -> Result<Self, OutOfRange> {
        check_range(&range, self.len())?;
        Ok(match self {
            Self::Host(bytes) => Self::Host(&mut bytes[range]),
            Self::Cuda(slice) => Self::Cuda(slice.range(&range)),
        })
    }

    /// The first `mid` bytes and the rest, to be written independently (`DV-2`).
    ///
    /// # Errors
    /// [`OutOfRange`] when there are fewer than `mid` bytes.
    pub fn split_at(self, mid: usize) -> Result<(Self, Self), OutOfRange> {
        check_range(&(0..mid), self.len())?;
        Ok(match self {
            Self::Host(bytes) => {
                let (left, right) = bytes.split_at_mut(mid);
                (Self::Host(left), Self::Host(right))
            }
            Self::Cuda(slice) => {
                let CudaSliceMut { address, bytes, ordinal, owner } = slice;
                let right =
                    CudaSliceMut { address: address + crate::types::as_u64(mid), bytes: bytes - mid, ordinal, owner };
                (Self::Cuda(CudaSliceMut { address, bytes: mid, ordinal, owner }), Self::Cuda(right))
            }
        })
    }
}

impl<'a> From<&'a [u8]> for Slice<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        Self::Host(bytes)
    }
}

impl<'a> From<&'a mut [u8]> for SliceMut<'a> {
    fn from(bytes: &'a mut [u8]) -> Self {
        Self::Host(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_view_is_cut_where_asked() {
        let mut bytes = [1, 2, 3, 4, 5];
        let (left, right) = Slice::from(&bytes[..]).split_at(2).expect("within");
        assert_eq!((left.as_host(), right.as_host()), (Some(&[1, 2][..]), Some(&[3, 4, 5][..])));
        let (mut left, mut right) = SliceMut::from(&mut bytes[..]).split_at(4).expect("within");
        left.as_host_mut().expect("host")[0] = 9;
        right.as_host_mut().expect("host")[0] = 8;
        assert_eq!(bytes, [9, 2, 3, 4, 8]);
    }

    #[test]
    fn a_cut_outside_is_an_error() {
        let bytes = [0_u8; 3];
        let found = Slice::from(&bytes[..]).range(2..4).expect_err("outside");
        assert_eq!(found, OutOfRange { start: 2, end: 4, len: 3 });
        assert!(Slice::from(&bytes[..]).split_at(4).is_err());
    }

    /// DV-2, by arithmetic: the two parts of a device range meet and do not overlap.
    #[test]
    fn dv_2_parts_of_device_memory_are_disjoint() {
        let whole = CudaSliceMut::for_tests(0x1000, 10, 3);
        let (left, right) = SliceMut::Cuda(whole).split_at(4).expect("within");
        let (SliceMut::Cuda(left), SliceMut::Cuda(right)) = (left, right) else { panic!("still on the device") };
        assert_eq!((left.address(), left.len()), (0x1000, 4));
        assert_eq!((right.address(), right.len(), right.ordinal()), (0x1004, 6, 3));
    }
}
