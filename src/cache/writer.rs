//! Writing an entry while a load makes it: the readers' bytes pass by here on their way to the ranks.

use std::collections::{BTreeMap, VecDeque};

use super::entry::unfinished;
use super::keeps;
use super::layout::{Layout, layouts};
use crate::checkpoint::table_name;
use crate::plan::{Input, LoadPlan, Strategy};
use crate::store::{NewFile, Store, StoreError, write_small};
use crate::types::{BlockDigests, Rank, as_u64};

/// Writes what one rank makes. It is a convenience: where it fails it says so in the log and ends, and the load goes on.
pub(crate) struct CacheWriter<'a> {
    plan: &'a LoadPlan,
    store: &'a dyn Store,
    /// What tells its unfinished files from those of others.
    writer: String,
    /// Files to come.
    waiting: VecDeque<Layout>,
    open: Option<Open>,
}

struct Open {
    layout: Layout,
    file: Box<dyn NewFile>,
    blocks: BlockDigests,
    /// Where the next byte belongs.
    end: u64,
    offsets: BTreeMap<usize, u32>,
}

impl std::fmt::Debug for CacheWriter<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CacheWriter({} files to come)", self.waiting.len())
    }
}

impl<'a> CacheWriter<'a> {
    /// A writer into the entry at `store`; nothing when the plan does not ask for one, or `rank` makes no whole tensor.
    pub(crate) fn new(plan: &'a LoadPlan, rank: Rank, store: Option<&'a dyn Store>) -> Option<Self> {
        let store = store.filter(|_| plan.cache.as_ref().is_some_and(|cache| cache.writes))?;
        if plan.strategy == Strategy::Full && plan.world.get() > 1 {
            return None;
        }
        let cached = |input: &Input| matches!(input, Input::Stored { parts, .. } if plan.is_cached(parts));
        let mine = plan.tensors.iter().enumerate().filter(|(_, tensor)| {
            keeps(plan, tensor) && (plan.strategy == Strategy::Full || tensor.reader == rank) && !cached(&tensor.input)
        });
        let waiting: VecDeque<Layout> = layouts(plan, mine.map(|(index, _)| index)).into();
        let writer = format!("{}-{:x}", std::process::id(), crate::clock::unix_ns());
        (!waiting.is_empty()).then_some(Self { plan, store, writer, waiting, open: None })
    }

    /// Takes bytes of a component, from `at` on. They come tensor by tensor in the plan's order, each component from its
    /// start to its end.
    pub(crate) fn write(&mut self, (tensor, component): (usize, usize), at: u64, bytes: &[u8]) {
        if let Err(error) = self.take((tensor, component), at, bytes) {
            tracing::warn!(%error, "the cache: what this load makes is not kept");
            self.give_up();
        }
    }

    /// The last file is whole when the load is.
    pub(crate) fn finish(mut self) {
        if let Err(error) = self.close() {
            tracing::warn!(%error, "the cache: what this load makes is not kept");
            self.give_up();
        }
    }

    fn take(&mut self, (tensor, component): (usize, usize), at: u64, bytes: &[u8]) -> Result<(), StoreError> {
        if !self.open.as_ref().is_some_and(|open| open.layout.tensors.contains(&tensor)) {
            if !self.waiting.front().is_some_and(|layout| layout.tensors.contains(&tensor)) {
                return Ok(());
            }
            let Some(next) = self.waiting.pop_front() else { return Ok(()) };
            self.close()?;
            self.open = Some(Open::create(next, self.store, &self.writer)?);
        }
        let Some(open) = &mut self.open else { return Ok(()) };
        match open.layout.place(tensor, component) {
            Some(start) if open.end != start + at => {
                debug_assert!(false, "a load makes bytes in the plan's order");
                self.give_up();
            }
            Some(_) => {
                open.file.write_all_at(open.end, bytes)?;
                open.blocks.update(bytes);
                open.end += as_u64(bytes.len());
            }
            // The nested offset stands in the header.
            None => {
                let bits = <[u8; 4]>::try_from(bytes).map(u32::from_le_bytes).unwrap_or_default();
                open.offsets.insert(tensor, bits);
            }
        }
        Ok(())
    }

    /// Finishes the open file, if its bytes are all there.
    fn close(&mut self) -> Result<(), StoreError> {
        let Some(mut open) = self.open.take() else { return Ok(()) };
        let name = open.layout.name.clone();
        let part = unfinished(&name, &self.writer);
        if open.end != open.layout.header_bytes + open.layout.data_bytes {
            drop(open);
            return self.store.remove(&part);
        }
        for &tensor in &open.layout.tensors {
            // What comes from a file that is quantized already has its offset in the plan.
            if let Some(Input::Stored { nested_offset: Some(bits), .. }) =
                self.plan.tensors.get(tensor).map(|tensor| &tensor.input)
            {
                open.offsets.insert(tensor, bits.0);
            }
        }
        let header = open.layout.header(self.plan, &open.offsets);
        open.file.write_all_at(0, &header)?;
        open.file.finish()?;
        let mut table = BlockDigests::new();
        table.update(&header);
        let table: Vec<u8> =
            table.finish().into_iter().chain(open.blocks.finish()).flat_map(u32::to_le_bytes).collect();
        crate::faults::point("cache.file");
        // The table first: a file is not read without it.
        let table_part = unfinished(&table_name(&name), &self.writer);
        self.store.remove(&table_part)?;
        write_small(self.store, &table_part, &table)?;
        for (from, to) in [(&table_part, &table_name(&name)), (&part, &name)] {
            match self.store.publish(from, to) {
                // Another process has made the same file.
                Err(StoreError::Exists { .. }) => self.store.remove(from)?,
                published => published?,
            }
        }
        Ok(())
    }

    fn give_up(&mut self) {
        self.waiting.clear();
        if let Some(open) = self.open.take() {
            let part = unfinished(&open.layout.name, &self.writer);
            drop(open);
            // What stays is removed when the entry is used again.
            let _ = self.store.remove(&part);
        }
    }
}

impl Open {
    fn create(layout: Layout, store: &dyn Store, writer: &str) -> Result<Self, StoreError> {
        let part = unfinished(&layout.name, writer);
        store.create_dir("")?;
        store.remove(&part)?;
        let file = store.create(&part, layout.header_bytes + layout.data_bytes)?;
        let end = layout.header_bytes;
        Ok(Self { layout, file, blocks: BlockDigests::new(), end, offsets: BTreeMap::new() })
    }
}

impl LoadPlan {
    /// Whether the chunks lie in the cache.
    fn is_cached(&self, parts: &[Vec<crate::plan::StoredChunk>]) -> bool {
        let files = as_u64(self.files.len());
        parts.iter().flatten().any(|chunk| u64::from(chunk.file) >= files)
    }
}
