//! Coverage (`FM-3`): every byte of every component is in exactly one chunk, and chunks lie in their files, apart.

use std::collections::HashSet;

use super::Manifest;
use crate::error::{Classify, Kind};
use crate::plan::Part;
use crate::types::{ByteRange, Fqn};

/// What is wrong with the chunks of a checkpoint.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CoverageError {
    /// Bytes of a component are in no chunk, or in two.
    #[error("tensor {name}: expected a chunk at byte {expected}, found one at {found}")]
    Gap {
        /// The component's name.
        name: String,
        /// The next byte that must come.
        expected: u64,
        /// Where the next chunk starts, or the end of the component.
        found: u64,
    },
    /// A tensor's components are not those of its encoding.
    #[error("tensor {fqn}: its parts are not those of {encoding} for shape {shape}")]
    Parts {
        /// The tensor.
        fqn: Fqn,
        /// Its encoding.
        encoding: String,
        /// Its shape.
        shape: String,
    },
    /// A tensor stands twice.
    #[error("tensor {fqn} stands twice")]
    Twice {
        /// The tensor.
        fqn: Fqn,
    },
    /// A chunk names a file that is not listed, or lies outside of it.
    #[error("tensor {name}: chunk {range} of file {file} lies outside the file ({file_bytes} bytes)")]
    Outside {
        /// The component's name.
        name: String,
        /// The bytes.
        range: ByteRange,
        /// The index of the file.
        file: u32,
        /// The file's length; 0 when it is not listed.
        file_bytes: u64,
    },
    /// Two chunks share bytes of a file.
    #[error("file {file}: chunks {first} and {second} overlap")]
    Overlap {
        /// The file.
        file: String,
        /// One chunk.
        first: ByteRange,
        /// The other.
        second: ByteRange,
    },
    /// A digest is of another number of bytes than its chunk.
    #[error("tensor {name}: the digest of chunk {range} is of {digest_bytes} bytes")]
    DigestLength {
        /// The component's name.
        name: String,
        /// The chunk.
        range: ByteRange,
        /// What the digest says.
        digest_bytes: u64,
    },
}

impl Classify for CoverageError {
    fn kind(&self) -> Kind {
        Kind::Corrupt
    }
}

impl Manifest {
    /// Checks `FM-3`.
    ///
    /// # Errors
    /// [`CoverageError`] with the first fault found.
    pub fn check_coverage(&self) -> Result<(), CoverageError> {
        let mut names = HashSet::new();
        let mut by_file: Vec<Vec<ByteRange>> = vec![Vec::new(); self.files.len()];
        for tensor in &self.tensors {
            if !names.insert(&tensor.fqn) {
                return Err(CoverageError::Twice { fqn: tensor.fqn.clone() });
            }
            let wrong_parts = || CoverageError::Parts {
                fqn: tensor.fqn.clone(),
                encoding: tensor.encoding.name(),
                shape: tensor.shape.to_string(),
            };
            let expected = tensor.encoding.components(&tensor.shape).map_err(|_| wrong_parts())?;
            let stored: Vec<_> = expected.iter().filter(|component| component.part != Part::NestedOffset).collect();
            let same = stored.len() == tensor.parts.len()
                && stored.iter().zip(&tensor.parts).all(|(component, part)| {
                    component.part == part.part && component.dtype == part.dtype && component.shape == part.shape
                });
            if !same || (stored.len() != expected.len()) != tensor.nested_offset.is_some() {
                return Err(wrong_parts());
            }
            for (component, part) in stored.iter().zip(&tensor.parts) {
                self.check_part(part, component.bytes, &mut by_file)?;
            }
        }
        self.check_files(by_file)
    }

    fn check_part(
        &self,
        part: &super::SavedPart,
        bytes: u64,
        by_file: &mut [Vec<ByteRange>],
    ) -> Result<(), CoverageError> {
        let mut next = 0;
        for chunk in &part.chunks {
            let name = || part.name.clone();
            let file =
                usize::try_from(chunk.file).ok().and_then(|file| self.files.get(file).zip(by_file.get_mut(file)));
            let file_bytes = file.as_ref().map_or(0, |(file, _)| file.bytes);
            match file {
                // An empty chunk shares no byte, and would hide that its neighbours do.
                Some((file, _)) if chunk.range.end() <= file.bytes && chunk.range.is_empty() => {}
                Some((file, ranges)) if chunk.range.end() <= file.bytes => ranges.push(chunk.range),
                _ => {
                    let (range, file) = (chunk.range, chunk.file);
                    return Err(CoverageError::Outside { name: name(), range, file, file_bytes });
                }
            }
            if chunk.at != next {
                return Err(CoverageError::Gap { name: name(), expected: next, found: chunk.at });
            }
            if chunk.digest.bytes() != chunk.range.len() {
                let digest_bytes = chunk.digest.bytes();
                return Err(CoverageError::DigestLength { name: name(), range: chunk.range, digest_bytes });
            }
            next = next.saturating_add(chunk.range.len());
        }
        if next == bytes {
            Ok(())
        } else {
            Err(CoverageError::Gap { name: part.name.clone(), expected: next, found: bytes })
        }
    }

    fn check_files(&self, by_file: Vec<Vec<ByteRange>>) -> Result<(), CoverageError> {
        for (file, mut ranges) in self.files.iter().zip(by_file) {
            ranges.sort();
            for pair in ranges.windows(2) {
                if let [first, second] = *pair
                    && first.intersect(second).is_some()
                {
                    return Err(CoverageError::Overlap { file: file.name.clone(), first, second });
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::{MANIFEST_VERSION, SavedChunk, SavedPart, SavedTensor, ShardFile, TrainerState};
    use crate::plan::{Encoding, Placement};
    use crate::types::{Attempt, DType, DigestTable, Generation, Rank, Shape, Step, TensorDigest, WorldSize};

    fn chunk(file: u32, start: u64, len: u64, at: u64) -> SavedChunk {
        let range = ByteRange::with_len(start, len).expect("small");
        SavedChunk { file, range, at, digest: TensorDigest::unknown(len) }
    }

    /// A plain tensor of `bytes` bytes.
    fn tensor(fqn: &str, bytes: u64, chunks: &[SavedChunk]) -> SavedTensor {
        let (dtype, shape, chunks) = (DType::U8, Shape::from([bytes]), chunks.to_vec());
        let part = SavedPart { part: Part::Weight, name: fqn.to_owned(), dtype, shape: shape.clone(), chunks };
        SavedTensor {
            fqn: fqn.into(),
            shape,
            encoding: Encoding::Plain { dtype },
            sharded: false,
            nested_offset: None,
            digest: TensorDigest::unknown(bytes),
            parts: vec![part],
        }
    }

    /// Two files of 100 bytes.
    fn manifest(tensors: Vec<SavedTensor>) -> Manifest {
        let digest_table = DigestTable { bytes: 4, crc32c: 0 };
        let file = |rank: u32| ShardFile { name: format!("file-{rank}"), rank: Rank(rank), bytes: 100, digest_table };
        Manifest {
            weightcast_manifest: MANIFEST_VERSION,
            step: Step(0),
            attempt: Attempt(1),
            generation: Generation(1),
            world: WorldSize::new(2).expect("not zero"),
            placement: Placement::Shard,
            model: "m".to_owned(),
            config_json: None,
            trainer: TrainerState::default(),
            files: vec![file(0), file(1)],
            tensors,
            aliases: Vec::new(),
        }
    }

    #[test]
    fn fm_3_every_byte_is_in_one_chunk() {
        let good = || tensor("a", 30, &[chunk(0, 0, 10, 0), chunk(1, 80, 20, 10)]);
        let check = |tensors: Vec<SavedTensor>, expected: &str| {
            let found = manifest(tensors).check_coverage();
            let message = found.map_or_else(|error| error.to_string(), |()| "fine".to_owned());
            assert!(message.contains(expected), "expected {expected}: {message}");
        };
        check(vec![good(), tensor("b", 5, &[chunk(0, 10, 5, 0)])], "fine");
        check(vec![good(), good()], "tensor a stands twice");
        check(vec![tensor("a", 30, &[chunk(0, 0, 10, 0)])], "tensor a: expected a chunk at byte 10, found one at 30");
        check(vec![tensor("a", 20, &[chunk(0, 0, 10, 0), chunk(0, 10, 10, 9)])], "expected a chunk at byte 10");
        check(vec![tensor("a", 20, &[chunk(0, 90, 20, 0)])], "tensor a");
        check(vec![tensor("a", 20, &[chunk(2, 0, 20, 0)])], "tensor a");
        let mut wrong = good();
        wrong.parts[0].chunks[0].digest = TensorDigest::unknown(9);
        check(vec![wrong], "the digest of chunk 0..10 is of 9 bytes");
        let mut wrong = good();
        wrong.encoding = Encoding::Int8;
        check(vec![wrong], "its parts are not those of int8");
        let other = |start: u64| tensor("b", 5, &[chunk(0, start, 5, 0)]);
        check(vec![good(), other(9)], "file file-0: chunks 0..10 and 9..14 overlap");
        // What happened: between two chunks that overlap an empty one hid it.
        let empty = tensor("e", 0, &[chunk(0, 3, 0, 0)]);
        check(vec![good(), empty, other(4)], "file file-0: chunks 0..10 and 4..9 overlap");
    }
}
