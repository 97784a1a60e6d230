//! The pieces in which a tensor moves: the one order that reader and receivers share (`PL-3`).

use serde::{Deserialize, Serialize};

use super::{Encoding, Input, LoadPlan, Part, TensorPlan};
use crate::format::Encoding as SourceEncoding;
use crate::types::ByteRange;

/// The sizes that bound the bytes in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chunking {
    /// Bytes of a source chunk at most (at least one row where rows cannot be cut).
    pub chunk_bytes: u64,
    /// Threads that read and quantize at a reader.
    pub reader_threads: u32,
    /// Chunks that are done and wait to be sent, at most.
    pub queue_chunks: u32,
}

/// Elements that are read together and give one piece of [`Part::Weight`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SourceSpan {
    /// Which elements of the tensor.
    pub elements: ByteRange,
    /// Which bytes of [`Part::Weight`] they become.
    pub weight: ByteRange,
}

/// A range of one component that moves in one collective.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Index into the tensor's components.
    pub component: usize,
    /// The bytes of the component.
    pub range: ByteRange,
}

impl TensorPlan {
    /// The source spans of the tensor, in order; together all elements, none twice.
    pub fn spans(&self, chunk_bytes: u64) -> impl Iterator<Item = SourceSpan> {
        let elements = self.elements();
        let step = self.span_elements(chunk_bytes);
        let row = self.row_elements();
        let encoding = self.encoding;
        (0..elements.div_ceil(step)).map(move |index| {
            let end = (index + 1).saturating_mul(step).min(elements);
            let elements = ByteRange::new(index * step, end).unwrap_or_default();
            SourceSpan { elements, weight: encoding.part_range(Part::Weight, elements, row, super::Claim::Kept) }
        })
    }

    /// Elements per span: whole blocks, and whole rows where a row cannot be cut.
    fn span_elements(&self, chunk_bytes: u64) -> u64 {
        let (element_bytes, whole_rows) = match &self.input {
            Input::Elements { dtype, encoding, .. } => {
                (dtype.size_bytes(), self.encoding == Encoding::Int8 || *encoding != SourceEncoding::Plain)
            }
            Input::Stored { .. } => (1, false),
        };
        let wanted = (chunk_bytes / element_bytes).max(1);
        let granule = match self.encoding {
            _ if whole_rows => self.row_elements().max(1),
            Encoding::FourBit { block, .. } => u64::from(block.get()),
            Encoding::Mlx { rule, .. } => crate::types::as_u64(rule.group()),
            Encoding::Plain { .. } | Encoding::Int8 => 1,
        };
        // Rows of blocks must also be whole blocks; the row granule says how many rows that takes.
        let granule = if whole_rows { granule * self.encoding.row_granule(self.row_elements()) } else { granule };
        (wanted / granule).max(1) * granule
    }

    /// All pieces of the tensor in the order in which they move: the weight as its spans come, then the statistics.
    #[must_use]
    pub fn pieces(&self, chunk_bytes: u64) -> Vec<Piece> {
        let mut pieces = Vec::new();
        let stored = matches!(self.input, Input::Stored { .. });
        for (component, whole) in self.components().into_iter().enumerate() {
            if whole.part == Part::Weight && !stored {
                pieces.extend(self.spans(chunk_bytes).map(|span| Piece { component, range: span.weight }));
            } else {
                let count = whole.bytes.div_ceil(chunk_bytes.max(1));
                pieces.extend((0..count).map(|index| {
                    let start = index * chunk_bytes;
                    let range = ByteRange::new(start, (start + chunk_bytes).min(whole.bytes)).unwrap_or_default();
                    Piece { component, range }
                }));
            }
        }
        pieces
    }
}

impl LoadPlan {
    /// The most bytes that a reader has in flight: source and result of each thread, and the queue of results.
    #[must_use]
    pub fn window_bytes(&self) -> u64 {
        let span = |tensor: &TensorPlan| {
            let elements = tensor.span_elements(self.chunking.chunk_bytes).min(tensor.elements());
            let element_bytes = match &tensor.input {
                Input::Elements { dtype, .. } => dtype.size_bytes(),
                Input::Stored { .. } => 1,
            };
            // The source and, beside it, its packed form with statistics, at most as large as the source in f32.
            elements * element_bytes + elements * 4
        };
        let largest = self.tensors.iter().map(span).max().unwrap_or(0);
        let statistics = self.tensors.iter().map(statistics_bytes).max().unwrap_or(0);
        let buffers = u64::from(self.chunking.reader_threads) + u64::from(self.chunking.queue_chunks);
        largest * buffers + statistics
    }
}

/// The f32 statistics of one tensor, which a reader collects before it can send them.
fn statistics_bytes(tensor: &TensorPlan) -> u64 {
    match tensor.encoding {
        Encoding::Plain { .. } => 0,
        Encoding::FourBit { block, .. } => tensor.elements().div_ceil(u64::from(block.get())) * 5,
        Encoding::Int8 => tensor.shape.rows() * 4,
        // A scale and a bias as computed, and once more as written.
        Encoding::Mlx { rule, .. } => tensor.elements() / crate::types::as_u64(rule.group()) * 16,
    }
}
