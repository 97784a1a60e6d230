//! The streaming strategy: what a rank holds of the plan all the time, and what it reads when it is needed.

use super::{LoadPlan, Strategy, TensorPlan};

impl LoadPlan {
    /// Whether `tensor` is read when it is needed and let go afterwards: with [`Strategy::Streaming`] what belongs to a layer.
    #[must_use]
    pub fn streams(&self, tensor: &TensorPlan) -> bool {
        self.strategy == Strategy::Streaming && tensor.fqn.layer().is_some()
    }

    /// The plan of what a rank loads at the start and keeps: with [`Strategy::Streaming`] what belongs to no layer, which each
    /// rank reads for itself; else all of it.
    #[must_use]
    pub fn resident(&self) -> Self {
        if self.strategy != Strategy::Streaming {
            return self.clone();
        }
        let resident = self.tensors.iter().enumerate().filter(|(_, tensor)| !self.streams(tensor));
        let resident: Vec<usize> = resident.map(|(index, _)| index).collect();
        self.part(&resident)
    }

    /// The plan of the tensors `indices` alone, in this order, of which each rank reads what it keeps. Nothing of them is
    /// written into the cache.
    #[must_use]
    pub fn part(&self, indices: &[usize]) -> Self {
        let tensors = indices.iter().filter_map(|&index| self.tensors.get(index)).cloned().collect();
        let cache = self.cache.clone().map(|cache| super::CachePlan { writes: false, ..cache });
        Self {
            version: self.version,
            model: self.model.clone(),
            config_json: None,
            world: self.world,
            strategy: Strategy::Full,
            placement: self.placement,
            chunking: self.chunking,
            digests: false,
            device: self.device,
            root: self.root.clone(),
            cache,
            files: self.files.clone(),
            versions: self.versions.clone(),
            digest_tables: self.digest_tables.clone(),
            tensors,
            aliases: Vec::new(),
            train: None,
            others: Vec::new(),
        }
    }
}
