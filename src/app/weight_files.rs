//! safetensors files that are written tensor by tensor, in one file or several, with the index that transformers reads.
//!
//! Refuses to know: where the bytes come from. At most one tensor is in memory.

use serde_json::{Map, Value, json};

use crate::format::safetensors::build_header;
use crate::store::{Store, StoreError};
use crate::types::{DType, Fqn, Shape, as_u64};

/// What transformers and PEFT write into every header.
const METADATA: [(&str, &str); 1] = [("format", "pt")];

/// A tensor that is to be written.
pub(super) type OutputTensor = (Fqn, DType, Shape);

/// Files and what is in them.
#[derive(Debug)]
pub(super) struct WeightFiles(Vec<(String, Vec<OutputTensor>)>);

fn bytes((_, dtype, shape): &OutputTensor) -> u64 {
    shape.bytes(*dtype).expect("the tensor is in a file already, and its element at most twice as wide here")
}

impl WeightFiles {
    /// One file of all `tensors`.
    pub(super) fn one(name: &str, tensors: Vec<OutputTensor>) -> Self {
        let mut files = Self(vec![(name.to_owned(), tensors)]);
        files.align();
        files
    }

    /// As many files as it takes to have at most `max_file_bytes` of tensors in each that has more than one.
    pub(super) fn sharded(tensors: Vec<OutputTensor>, max_file_bytes: u64) -> Self {
        let mut groups: Vec<Vec<OutputTensor>> = Vec::new();
        let mut room = 0_u64;
        for tensor in tensors {
            let need = bytes(&tensor);
            match groups.last_mut() {
                Some(group) if need <= room => group.push(tensor),
                _ => {
                    groups.push(vec![tensor]);
                    room = max_file_bytes;
                }
            }
            room = room.saturating_sub(need);
        }
        let count = groups.len();
        let name = |number: usize| match count {
            1 => "model.safetensors".to_owned(),
            _ => format!("model-{number:05}-of-{count:05}.safetensors"),
        };
        let mut files = Self((1..).map(name).zip(groups).collect());
        files.align();
        files
    }

    /// The widest elements first, so that every tensor is aligned to its element.
    fn align(&mut self) {
        for (_, tensors) in &mut self.0 {
            tensors.sort_by_key(|(_, dtype, _)| std::cmp::Reverse(dtype.size_bytes()));
        }
    }

    /// The number of files.
    pub(super) const fn count(&self) -> usize {
        self.0.len()
    }

    /// The bytes of all tensors.
    pub(super) fn total_bytes(&self) -> u64 {
        self.0.iter().flat_map(|(_, tensors)| tensors).map(bytes).sum()
    }

    /// Writes all files; `produce` fills an empty buffer with a tensor's bytes.
    pub(super) fn write<E: From<StoreError>>(
        &self,
        store: &dyn Store,
        mut produce: impl FnMut(&OutputTensor, &mut Vec<u8>) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut buffer = Vec::new();
        for (name, tensors) in &self.0 {
            let header = build_header(tensors, &METADATA).expect("as for `bytes`");
            let data_bytes: u64 = tensors.iter().map(bytes).sum();
            let mut file = store.create(name, as_u64(header.len()) + data_bytes)?;
            file.write_all_at(0, &header)?;
            let mut offset = as_u64(header.len());
            for tensor in tensors {
                buffer.clear();
                produce(tensor, &mut buffer)?;
                assert_eq!(as_u64(buffer.len()), bytes(tensor), "{}: a tensor has the bytes of its shape", tensor.0);
                file.write_all_at(offset, &buffer)?;
                offset += as_u64(buffer.len());
            }
            file.finish()?;
        }
        Ok(())
    }

    /// `model.safetensors.index.json`, where there are several files.
    pub(super) fn index_json(&self) -> Option<String> {
        if self.count() < 2 {
            return None;
        }
        let names = self.0.iter().flat_map(|(file, tensors)| tensors.iter().map(move |tensor| (&tensor.0, file)));
        let mut weight_map: Vec<(&Fqn, &String)> = names.collect();
        weight_map.sort_unstable();
        let weight_map: Map<String, Value> =
            weight_map.into_iter().map(|(fqn, file)| (fqn.to_string(), json!(file))).collect();
        let elements = |(_, _, shape): &OutputTensor| shape.elements().unwrap_or(u64::MAX);
        let parameters: u64 = self.0.iter().flat_map(|(_, tensors)| tensors).map(elements).sum();
        let metadata = json!({"total_parameters": parameters, "total_size": self.total_bytes()});
        let mut text = serde_json::to_string_pretty(&json!({"metadata": metadata, "weight_map": weight_map}))
            .expect("a value always becomes text");
        text.push('\n');
        Some(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 3 tensors of 8, 8 and 40 bytes with room for 16: two files, the large one alone.
    #[test]
    fn files_are_cut_and_indexed() {
        let tensor = |name: &str, dtype, size: u64| (Fqn::from(name), dtype, Shape::from([size]));
        let tensors = vec![tensor("b", DType::BF16, 4), tensor("a", DType::F32, 2), tensor("c", DType::F32, 10)];
        let files = WeightFiles::sharded(tensors.clone(), 16);
        assert_eq!((files.count(), files.total_bytes()), (2, 56));
        // The f32 tensor comes before the bf16 one.
        assert_eq!(files.0[0].1[0].0.as_str(), "a");
        let index: Value = serde_json::from_str(&files.index_json().expect("two files")).expect("JSON");
        assert_eq!(index["metadata"], json!({"total_parameters": 16, "total_size": 56}));
        assert_eq!(index["weight_map"]["b"], "model-00001-of-00002.safetensors");
        assert_eq!(index["weight_map"]["c"], "model-00002-of-00002.safetensors");
        let one = WeightFiles::sharded(tensors, 1000);
        assert_eq!((one.0[0].0.as_str(), one.index_json()), ("model.safetensors", None));
    }
}
