//! Binding the names of a file to those of a skeleton (`MO-1`), as transformers matches them.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

use super::error::{DTypeMismatch, MAX_NAMED_KEYS, ShapeMismatch};
use super::skeleton::Skeleton;
use super::{Architecture, KeyMismatch};
use crate::format::ModelIndex;
use crate::types::Fqn;

/// Which tensor of the files is which tensor of the skeleton.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Binding {
    sources: BTreeMap<Fqn, Fqn>,
    /// Names in the files that are not read: stored buffers, second copies of tied weights, heads that the
    /// architecture does not have.
    pub ignored: Vec<Fqn>,
    /// Optional tensors of the skeleton that the files lack.
    pub absent: Vec<Fqn>,
}

impl Binding {
    /// The name in the files of a tensor of the skeleton; nothing for an optional one that the files lack.
    #[must_use]
    pub fn source(&self, fqn: &Fqn) -> Option<&Fqn> {
        self.sources.get(fqn)
    }

    /// The number of tensors that are read.
    #[must_use]
    pub fn len(&self) -> usize {
        self.sources.len()
    }

    /// Whether nothing is read.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.sources.is_empty()
    }
}

impl Skeleton {
    /// Finds every tensor of the skeleton in the index.
    ///
    /// Handled as transformers does: the base model's prefix, absent or present; tied weights, stored once under either
    /// name or twice; TensorFlow's names of layer norms (`gamma`, `beta`); Mixtral's names in transformers 5; stored buffers,
    /// which are ignored. Fused experts are taken apart before, by [`Skeleton::with_experts_apart`].
    ///
    /// # Errors
    /// [`KeyMismatch`] with everything that is missing, unexpected, or of another shape.
    pub fn bind(&self, index: &ModelIndex) -> Result<Binding, Box<KeyMismatch>> {
        let names = Names::new(self, index);
        let mut binding = Binding::default();
        let mut mismatch = KeyMismatch { architecture: self.architecture.name(), ..KeyMismatch::default() };
        // Names of tied weights are taken second, so that a tensor's own name wins over its alias.
        let mut tied = Vec::new();
        for found in index.tensors.keys() {
            let name = names.of(found);
            if names.tensors.contains(name.as_str()) {
                bind_one(&mut binding, &mut mismatch, name, found);
            } else if let Some(target) = names.aliases.get(name.as_str()) {
                tied.push((Fqn::clone(target), found));
            } else if self.ignores(&name) || self.ignores(found) {
                binding.ignored.push(found.clone());
            } else {
                mismatch.unexpected.push(found);
                mismatch.prequantized = mismatch.prequantized.or_else(|| prequantized(found.as_str()));
            }
        }
        for (target, found) in tied {
            match binding.sources.entry(target) {
                Entry::Occupied(_) => binding.ignored.push(found.clone()),
                Entry::Vacant(free) => _ = free.insert(found.clone()),
            }
        }
        self.check_bound(index, &mut binding, &mut mismatch);
        if mismatch.is_empty() { Ok(binding) } else { Err(Box::new(mismatch)) }
    }

    /// That every tensor is there in its shape, and of numbers that can be parameters; a model of unknown architecture may
    /// have others.
    fn check_bound(&self, index: &ModelIndex, binding: &mut Binding, mismatch: &mut KeyMismatch) {
        for tensor in &self.tensors {
            match binding.sources.get(&tensor.fqn).and_then(|source| index.tensors.get(source)) {
                None if tensor.optional => binding.absent.push(tensor.fqn.clone()),
                None => mismatch.missing.push(&tensor.fqn),
                Some(entry) if entry.shape != tensor.shape => {
                    mismatch.mismatched_count += 1;
                    if mismatch.mismatched.len() < MAX_NAMED_KEYS {
                        let (expected, found) = (tensor.shape.clone(), entry.shape.clone());
                        mismatch.mismatched.push(ShapeMismatch { fqn: tensor.fqn.clone(), expected, found });
                    }
                }
                Some(entry) if self.architecture != Architecture::Generic && !entry.dtype.is_float() => {
                    mismatch.not_float_count += 1;
                    if mismatch.not_float.len() < MAX_NAMED_KEYS {
                        mismatch.not_float.push(DTypeMismatch { fqn: tensor.fqn.clone(), found: entry.dtype });
                    }
                }
                Some(_) => {}
            }
        }
    }

    /// Whether a stored name is of no use: a buffer (older versions of transformers stored one per layer), or a part of a
    /// head that the architecture does not have.
    fn ignores(&self, name: &Fqn) -> bool {
        let name = name.as_str();
        let buffer = self.buffers.iter().any(|buffer| buffer.fqn.as_str() == name);
        let old_buffer = self.architecture != Architecture::Generic
            && (name.ends_with(".rotary_emb.inv_freq") || name.ends_with("embeddings.position_ids"));
        let causal_mask = self.architecture == Architecture::Gpt2
            && (name.ends_with(".attn.bias") || name.ends_with(".attn.masked_bias"));
        buffer || old_buffer || causal_mask || self.dropped.iter().any(|head| name.starts_with(head))
    }
}

/// Two names of the file may be one name of the skeleton, with and without the prefix; the second one is unexpected.
fn bind_one(binding: &mut Binding, mismatch: &mut KeyMismatch, name: Fqn, found: &Fqn) {
    match binding.sources.entry(name) {
        Entry::Occupied(_) => mismatch.unexpected.push(found),
        Entry::Vacant(free) => _ = free.insert(found.clone()),
    }
}

/// How the names of the files become those of the skeleton.
struct Names<'a> {
    tensors: BTreeSet<&'a str>,
    aliases: BTreeMap<&'a str, &'a Fqn>,
    prefix: &'a str,
    prefix_rule: PrefixRule,
    /// The name that transformers 5 gives to a layer's experts, and the one in published files, where they differ.
    experts: Option<(&'static str, &'static str)>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum PrefixRule {
    Keep,
    Add,
    Strip,
}

impl<'a> Names<'a> {
    fn new(skeleton: &'a Skeleton, index: &ModelIndex) -> Self {
        let prefix = skeleton.base_prefix;
        let tensors: BTreeSet<&str> = skeleton.tensors.iter().map(|tensor| tensor.fqn.as_str()).collect();
        let expected = tensors.iter().any(|name| name.starts_with(prefix));
        let found = index.tensors.keys().any(|name| name.as_str().starts_with(prefix));
        let prefix_rule = match (expected, found) {
            (true, false) => PrefixRule::Add,
            (false, true) => PrefixRule::Strip,
            _ => PrefixRule::Keep,
        };
        let aliases = skeleton.aliases.iter().map(|alias| (alias.alias.as_str(), &alias.target)).collect();
        let mixtral = skeleton.architecture == Architecture::Mixtral;
        let experts = mixtral.then_some((".mlp.", ".block_sparse_moe."));
        Self { tensors, aliases, prefix, prefix_rule, experts }
    }

    fn of(&self, found: &Fqn) -> Fqn {
        let mut name = found.as_str().to_owned();
        for (old, new) in [(".LayerNorm.gamma", ".LayerNorm.weight"), (".LayerNorm.beta", ".LayerNorm.bias")] {
            if let Some(stem) = name.strip_suffix(old)
                && !self.tensors.contains(name.as_str())
            {
                name = format!("{stem}{new}");
            }
        }
        if let Some((new, published)) = self.experts {
            name = name.replacen(new, published, 1);
        }
        let known = self.tensors.contains(name.as_str()) || self.aliases.contains_key(name.as_str());
        match self.prefix_rule {
            PrefixRule::Add if !known => format!("{}{name}", self.prefix).into(),
            PrefixRule::Strip => name.strip_prefix(self.prefix).unwrap_or(&name).into(),
            _ => name.into(),
        }
    }
}

/// The format of weights that are quantized already, by the names of their statistics.
fn prequantized(name: &str) -> Option<&'static str> {
    let formats = [
        (".weight.absmax", "bitsandbytes (4-bit)"),
        (".SCB", "bitsandbytes (int8)"),
        (".qweight", "GPTQ or AWQ"),
        (".W_q", "HQQ"),
    ];
    formats.into_iter().find(|(suffix, _)| name.ends_with(suffix)).map(|(_, format)| format)
}
