//! Which tensors are in which file, and where: known before a byte is read, because the sizes of an encoding follow from
//! shapes (`PL-1`).

use std::ops::Range;

use serde_json::{Map, Value, json};

use super::is_stored;
use crate::format::safetensors::build_header;
use crate::manifest::{extras, part_name};
use crate::plan::{LoadPlan, TensorPlan};
use crate::types::{DType, Fqn, Shape, as_u64};

/// One file of weights.
#[derive(Debug)]
pub(super) struct OutputFile {
    pub(super) name: String,
    /// Of the plan's tensors.
    pub(super) tensors: Range<usize>,
    /// In the order in which they lie.
    entries: Vec<Entry>,
}

/// One tensor of a file.
#[derive(Debug)]
struct Entry {
    name: String,
    dtype: DType,
    shape: Shape,
    bytes: u64,
    /// From the end of the header.
    offset: u64,
    /// The plan's tensor, from the file's first.
    tensor: usize,
    content: Content,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    Component(usize),
    Extra(usize),
}

/// As many files as it takes to have at most `max_file_bytes` in each that has more than one of the plan's tensors.
pub(super) fn layout(plan: &LoadPlan, max_file_bytes: u64) -> Vec<OutputFile> {
    let mut groups: Vec<Range<usize>> = Vec::new();
    let mut room = 0_u64;
    for (index, tensor) in plan.tensors.iter().enumerate() {
        let need: u64 = entries(0, tensor).iter().map(|entry| entry.bytes).sum();
        match groups.last_mut() {
            Some(group) if need <= room => group.end = index + 1,
            _ => {
                groups.push(index..index + 1);
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
    (1..).zip(groups).map(|(number, tensors)| OutputFile::new(name(number), &plan.tensors, tensors)).collect()
}

impl OutputFile {
    fn new(name: String, all: &[TensorPlan], tensors: Range<usize>) -> Self {
        let of_file = all.get(tensors.clone()).unwrap_or_default();
        let mut entries: Vec<Entry> =
            of_file.iter().enumerate().flat_map(|(index, tensor)| entries(index, tensor)).collect();
        // The widest elements first, so that every tensor is aligned to its element.
        entries.sort_by_key(|entry| std::cmp::Reverse(entry.dtype.size_bytes()));
        let mut end = 0;
        for entry in &mut entries {
            entry.offset = end;
            end += entry.bytes;
        }
        Self { name, tensors, entries }
    }

    /// The safetensors header, with its length.
    pub(super) fn header(&self) -> Vec<u8> {
        let tensors: Vec<_> = self
            .entries
            .iter()
            .map(|entry| (Fqn::from(entry.name.as_str()), entry.dtype, entry.shape.clone()))
            .collect();
        build_header(&tensors, &[("format", "pt")]).expect("the plan's sizes were checked")
    }

    /// Bytes of all its tensors.
    pub(super) fn data_bytes(&self) -> u64 {
        self.entries.iter().map(|entry| entry.bytes).sum()
    }

    /// Where a component of a tensor starts; nothing for one that is no tensor in the file.
    pub(super) fn place(&self, tensor: usize, component: usize) -> Option<u64> {
        self.find(tensor, Content::Component(component))
    }

    /// Where a small tensor beside a tensor starts.
    pub(super) fn extra_place(&self, tensor: usize, number: usize) -> Option<u64> {
        self.find(tensor, Content::Extra(number))
    }

    fn find(&self, tensor: usize, content: Content) -> Option<u64> {
        self.entries.iter().find(|entry| entry.tensor == tensor && entry.content == content).map(|entry| entry.offset)
    }
}

/// What a tensor becomes, not yet placed.
fn entries(index: usize, tensor: &TensorPlan) -> Vec<Entry> {
    let components = tensor.components().into_iter().enumerate().filter(|(_, component)| is_stored(component.part));
    let components = components.map(|(number, component)| Entry {
        name: part_name(&tensor.fqn, &tensor.encoding, component.part),
        dtype: component.dtype,
        shape: component.shape,
        bytes: component.bytes,
        offset: 0,
        tensor: index,
        content: Content::Component(number),
    });
    let extras = extras(&tensor.fqn, &tensor.encoding, &tensor.shape, None).into_iter().enumerate();
    let extras = extras.map(|(number, extra)| {
        let extra = extra.padded();
        Entry {
            bytes: as_u64(extra.bytes.len()),
            name: extra.name,
            dtype: extra.dtype,
            shape: extra.shape,
            offset: 0,
            tensor: index,
            content: Content::Extra(number),
        }
    });
    components.chain(extras).collect()
}

/// `model.safetensors.index.json`, where there are several files.
pub(super) fn index_json(files: &[OutputFile]) -> Option<Value> {
    if files.len() < 2 {
        return None;
    }
    let names = files.iter().flat_map(|file| file.entries.iter().map(move |entry| (&entry.name, &file.name)));
    let mut weight_map: Vec<_> = names.collect();
    weight_map.sort_unstable();
    let weight_map: Map<String, Value> =
        weight_map.into_iter().map(|(name, file)| (name.clone(), json!(file))).collect();
    let total: u64 = files.iter().map(OutputFile::data_bytes).sum();
    Some(json!({"metadata": {"total_size": total}, "weight_map": weight_map}))
}
