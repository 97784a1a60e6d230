//! The reader's threads: each takes a job, reads and encodes it while it is in cache, and puts it into the ordered queue.
//!
//! `LD-2`: a thread holds one source chunk and one result; the queue holds a bounded number of results; their buffers are
//! used again, because fresh memory costs more than the copy into it.

use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError};
use std::thread::{self, ScopedJoinHandle};

use super::LoadError;
use super::encode::{Encoded, Encoder};
use super::jobs::{Job, Work, jobs};
use super::ordered::OrderedQueue;
use super::report::Meters;
use super::run::Cancel;
use crate::plan::{Input, LoadPlan};
use crate::types::{Rank, as_usize};

/// The result of one job.
#[derive(Debug)]
pub(super) struct Chunk {
    pub(super) job: Job,
    pub(super) encoded: Encoded,
}

/// The queue between a reader's threads and the thread that sends.
#[derive(Debug)]
pub(super) struct Pipeline<'m> {
    meters: &'m Meters,
    queue: OrderedQueue<Chunk, LoadError>,
    spare: Mutex<Vec<Encoded>>,
}

impl<'m> Pipeline<'m> {
    pub(super) fn new(plan: &LoadPlan, meters: &'m Meters) -> Self {
        let capacity = u64::from(plan.chunking.queue_chunks);
        Self { meters, queue: OrderedQueue::new(capacity), spare: Mutex::new(Vec::new()) }
    }

    /// Starts the reader's threads within `scope`. They end when all jobs are done, one fails, or the queue is closed.
    pub(super) fn start<'scope, 'env>(
        &'env self,
        scope: &'scope thread::Scope<'scope, 'env>,
        (plan, rank): (&'env LoadPlan, Rank),
        encoder: Encoder<'env>,
        cancel: &'env Cancel,
    ) -> Result<Vec<ScopedJoinHandle<'scope, ()>>, LoadError> {
        self.meters.queue_capacity.store(u64::from(plan.chunking.queue_chunks), Ordering::Relaxed);
        let tickets = std::sync::Arc::new(Mutex::new(jobs(plan, rank).enumerate()));
        let count = plan.chunking.reader_threads.max(1);
        let mut threads = Vec::new();
        for index in 0..count {
            let tickets = tickets.clone();
            let work = move || {
                // A thread that panics ends the others and the consumer, who would wait for its ticket.
                let panicking = self.close_at_end();
                let mut scratch = Vec::new();
                loop {
                    // Taking a ticket and putting its result are in the same order for the oldest ticket, so the
                    // consumer never waits for a job that nobody has.
                    let Some((ticket, job)) = tickets.lock().unwrap_or_else(PoisonError::into_inner).next() else {
                        // The others are still at work.
                        return std::mem::forget(panicking);
                    };
                    if cancel.is_cancelled() {
                        return self.queue.close(Some(LoadError::Cancelled));
                    }
                    let result = self.carry_out(plan, job, &encoder, &mut scratch);
                    let put = match result {
                        Ok(encoded) => {
                            let put = self.queue.put(crate::types::as_u64(ticket), Chunk { job, encoded });
                            self.meter_queue();
                            put
                        }
                        Err(error) => return self.queue.close(Some(error)),
                    };
                    if put.is_err() {
                        return;
                    }
                }
            };
            let thread =
                thread::Builder::new().name(format!("reader-{index}")).spawn_scoped(scope, work).map_err(|source| {
                    LoadError::Open(crate::store::StoreError::Io {
                        operation: crate::store::Operation::Open,
                        path: "a reader thread".to_owned(),
                        source,
                    })
                })?;
            threads.push(thread);
        }
        Ok(threads)
    }

    fn carry_out(
        &self,
        plan: &LoadPlan,
        job: Job,
        encoder: &Encoder<'_>,
        scratch: &mut Vec<u8>,
    ) -> Result<Encoded, LoadError> {
        let tensor = plan.tensors.get(job.tensor).expect("jobs are made from the plan's tensors");
        let mut encoded = self.spare.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default();
        match job.work {
            Work::Encode(span) => encoder.encode(tensor, span, scratch, &mut encoded)?,
            Work::Copy { component, range } => {
                let Input::Stored { parts, .. } = &tensor.input else {
                    return Err(LoadError::Plan { fqn: tensor.fqn.clone(), what: "elements are to be copied" });
                };
                let chunks = parts.get(component).map_or(&[][..], Vec::as_slice);
                encoded.statistics.clear();
                encoded.weight.resize(as_usize(range.len()), 0);
                encoder.files.read_stored(&tensor.fqn, chunks, range, &mut encoded.weight, encoder.meters)?;
            }
        }
        Ok(encoded)
    }

    /// The next result in order.
    pub(super) fn next(&self) -> Result<Chunk, LoadError> {
        let taken = self.queue.take().map_err(|failure| failure.unwrap_or(LoadError::Cancelled));
        self.meter_queue();
        taken
    }

    fn meter_queue(&self) {
        self.meters.queue_used.store(self.queue.len(), Ordering::Relaxed);
    }

    /// Gives the buffers of a result back.
    pub(super) fn recycle(&self, encoded: Encoded) {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner).push(encoded);
    }

    /// Ends the threads when the guard is dropped.
    pub(super) const fn close_at_end(&self) -> Closing<'_, 'm> {
        Closing(self)
    }
}

/// See [`Pipeline::close_at_end`].
#[derive(Debug)]
pub(super) struct Closing<'a, 'm>(&'a Pipeline<'m>);

impl Drop for Closing<'_, '_> {
    fn drop(&mut self) {
        self.0.queue.close(None);
    }
}
