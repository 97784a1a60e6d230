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
    pub fn spans(&self, chunk_bytes: u64) -> impl Iterator<Item = SourceSpan> + '_ {
        let elements = self.elements();
        let step = self.span_elements(chunk_bytes);
        (0..elements.div_ceil(step)).map(move |index| {
            let end = (index + 1).saturating_mul(step).min(elements);
            self.span(ByteRange::new(index * step, end).unwrap_or_default())
        })
    }

    /// Whether it is made of all its elements at once: by its encoding, or because they are packed where they come from.
    pub(super) fn is_made_at_once(&self) -> bool {
        let packed = matches!(self.input, Input::Elements { encoding: SourceEncoding::Packed(_), .. });
        self.encoding.is_made_at_once() || packed
    }

    /// The span of `elements`, which are whole blocks, or all elements where the encoding is made at once.
    #[must_use]
    pub fn span(&self, elements: ByteRange) -> SourceSpan {
        let weight = if self.encoding.is_made_at_once() {
            let whole = self.components().into_iter().find(|component| component.part == Part::Weight);
            ByteRange::new(0, whole.map_or(0, |whole| whole.bytes)).unwrap_or_default()
        } else {
            self.encoding.part_range(Part::Weight, elements, self.row_elements(), super::Claim::Kept)
        };
        SourceSpan { elements, weight }
    }

    /// Elements per span: whole blocks, and whole rows where a row cannot be cut.
    fn span_elements(&self, chunk_bytes: u64) -> u64 {
        let (element_bytes, whole_rows) = match &self.input {
            Input::Elements { dtype, encoding, .. } => {
                let rows = matches!(self.encoding, Encoding::Int8 | Encoding::Ggml { .. });
                (dtype.size_bytes(), rows || *encoding != SourceEncoding::Plain)
            }
            Input::Stored { .. } => (1, false),
        };
        if self.is_made_at_once() {
            return self.elements().max(1);
        }
        let wanted = (chunk_bytes / element_bytes).max(1);
        let granule = match self.encoding {
            _ if whole_rows => self.row_elements().max(1),
            Encoding::FourBit { block, .. } => u64::from(block.get()),
            Encoding::Mlx { rule, .. } => crate::types::as_u64(rule.group()),
            _ => 1,
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
        let (mut thread, mut queued) = (0, 0);
        for tensor in &self.tensors {
            let (at_work, done) = tensor.in_flight(self.chunking.chunk_bytes);
            (thread, queued) = (at_work.max(thread), done.max(queued));
        }
        let statistics = self.tensors.iter().map(statistics_bytes).max().unwrap_or(0);
        let (threads, chunks) = (u64::from(self.chunking.reader_threads), u64::from(self.chunking.queue_chunks));
        thread * threads + queued * chunks + statistics
    }
}

impl TensorPlan {
    /// The most bytes that a thread has of one chunk, and that a result in the queue has.
    fn in_flight(&self, chunk_bytes: u64) -> (u64, u64) {
        let (element_bytes, stored) = match &self.input {
            Input::Elements { dtype, .. } => (dtype.size_bytes(), false),
            Input::Stored { .. } => (1, true),
        };
        if self.is_made_at_once() && !stored {
            let all: u64 = self.components().iter().map(|component| component.bytes).sum();
            // The source, twice in f32, and the codes.
            return (self.elements().saturating_mul(element_bytes + 9) + all, all);
        }
        let span = if stored { chunk_bytes } else { self.span_elements(chunk_bytes) };
        let elements = span.min(self.elements());
        // The source and, beside it, its packed form with statistics, at most as large as the source in f32.
        let bytes = elements * element_bytes + elements * 4;
        (bytes, bytes)
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
        Encoding::Hqq { group, .. } => tensor.elements() / u64::from(group.max(1)) * 16,
        Encoding::Ggml { .. } | Encoding::Gptq { .. } | Encoding::Awq { .. } | Encoding::Fp8 { .. } => 0,
    }
}
