//! One rank's load from start to end: the walk through the plan's pieces (`LD-1`).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use super::encode::Encoder;
use super::jobs::Work;
use super::pipeline::Pipeline;
use super::place::{Keeper, Mover, Route, Scratch, Sink};
use super::report::{LoadReport, Meters, timed};
use super::source::Files;
use super::{LoadError, statistics};
use crate::cache::CacheWriter;
use crate::comm::Communicator;
use crate::device::Device;
use crate::plan::{Input, LoadPlan, Part, Piece, Strategy, f32Bits};
use crate::quant::Kernels;
use crate::state::StateDict;
use crate::store::Store;
use crate::types::{ByteRange, Rank, as_u64, as_usize};

/// Ends a load from outside; a communicator is ended by its own handle.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// Asks the load to end at its next chunk.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether it was asked to end.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// What a load needs besides its plan.
#[derive(Debug)]
pub struct LoadOptions<'a> {
    /// The rank that loads.
    pub rank: Rank,
    /// Where the plan's files are.
    pub store: &'a dyn Store,
    /// Where the entry of the cache is that the plan names.
    pub cache: Option<&'a dyn Store>,
    /// Where the rank's weights go.
    pub device: Device,
    /// The memory that the communicator moves: the host's, or the device's.
    pub comm_device: Device,
    /// The kernels to quantize with.
    pub kernels: Kernels,
    /// Ends the load.
    pub cancel: Cancel,
    /// Gets the bytes kept so far; read by whoever shows progress.
    pub done_bytes: Arc<AtomicU64>,
    /// Gets the load's times and counts.
    pub meters: Arc<Meters>,
}

impl<'a> LoadOptions<'a> {
    /// Host memory, the kernels of this processor, and nobody who ends or watches the load.
    #[must_use]
    pub fn on_host(rank: Rank, store: &'a dyn Store) -> Self {
        Self {
            rank,
            store,
            cache: None,
            device: Device::Host,
            comm_device: Device::Host,
            kernels: Kernels::detect(),
            cancel: Cancel::default(),
            done_bytes: Arc::default(),
            meters: Arc::default(),
        }
    }
}

/// Carries out `plan` on one rank. `comm` is needed unless the strategy is [`Strategy::Full`] or the world is one rank.
///
/// # Errors
/// [`LoadError`]; then the communicator must be aborted by the caller, and the generation is over.
pub fn load(
    plan: &LoadPlan,
    options: &LoadOptions<'_>,
    comm: Option<&mut dyn Communicator>,
) -> Result<(StateDict, LoadReport), LoadError> {
    let start = crate::clock::now();
    let meters = options.meters.as_ref();
    let mut state = timed(&meters.allocate_ns, || StateDict::allocate(plan, options.rank, options.device))?;
    let comm = comm.filter(|_| plan.strategy != Strategy::Full && plan.world.get() > 1);
    carry_out(plan, options, meters, (Keeper::State(&mut state), comm))?;
    timed(&meters.place_ns, || state.flush())?;

    let report = LoadReport {
        rank: options.rank,
        storage_bytes: 0,
        sent_bytes: 0,
        received_bytes: 0,
        weights_bytes: plan.kept_bytes(options.rank),
        quantized_values: meters.quantized_values.load(Ordering::Relaxed),
        non_finite_values: meters.non_finite_values.load(Ordering::Relaxed),
        wall_s: start.elapsed().as_secs_f64(),
        stages: meters.stages(),
        peak_resident_bytes: 0,
        device: state.device().to_string(),
        backend: String::new(),
        owned_digests: if plan.digests { state.owned_digests()? } else { Vec::new() },
    };
    Ok((state, report))
}

/// Carries out `plan`, which is of one rank, and gives the bytes of all components to `sink`: tensor after tensor in the plan's
/// order, each component from its start to its end.
///
/// # Errors
/// [`LoadError`], and what `sink` returns.
pub fn stream<'a>(plan: &'a LoadPlan, options: &'a LoadOptions<'_>, sink: &'a mut Sink<'a>) -> Result<(), LoadError> {
    carry_out(plan, options, &Meters::default(), (Keeper::Sink(sink), None))
}

/// Reads what this rank reads, and walks through the plan's pieces.
fn carry_out<'a>(
    plan: &LoadPlan,
    options: &LoadOptions<'_>,
    meters: &'a Meters,
    (keeper, comm): (Keeper<'a>, Option<&mut dyn Communicator>),
) -> Result<(), LoadError> {
    let reads = plan.reads(options.rank);
    let files = if reads { Files::open(plan, options.rank, options.store, options.cache)? } else { Files::none() };
    let encoder = Encoder { files: &files, meters, kernels: options.kernels };
    let pipeline = Pipeline::new(plan, meters);
    let mover = Mover {
        rank: options.rank,
        comm,
        keeper,
        cache: CacheWriter::new(plan, options.rank, options.cache),
        meters,
        comm_device: options.comm_device,
        scratch: Scratch::default(),
    };
    thread::scope(|scope| {
        // Whatever happens here, the reader's threads end.
        let closing = pipeline.close_at_end();
        let threads =
            if reads { pipeline.start(scope, (plan, options.rank), encoder, &options.cancel)? } else { Vec::new() };
        let walked = walk(plan, options, &pipeline, mover);
        drop(closing);
        for thread in threads {
            // A panic of a reader thread is this thread's panic.
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        }
        walked
    })
}

fn walk(
    plan: &LoadPlan,
    options: &LoadOptions<'_>,
    pipeline: &Pipeline<'_>,
    mut mover: Mover<'_, '_, '_>,
) -> Result<(), LoadError> {
    for (index, tensor) in plan.tensors.iter().enumerate() {
        if options.cancel.is_cancelled() {
            return Err(LoadError::Cancelled);
        }
        let route = Route::new(plan, index, tensor);
        let alone = plan.strategy == Strategy::Full;
        let reader = alone || tensor.reader == options.rank;
        match (&tensor.input, reader) {
            (Input::Elements { .. }, true) => send_encoded(plan, options, pipeline, &mut mover, &route)?,
            (Input::Stored { .. }, true) => send_stored(plan, pipeline, &mut mover, &route)?,
            (_, false) => {
                for piece in moving_pieces(plan, &route) {
                    mover.receive(&route, piece, tensor.reader)?;
                }
            }
        }
        if let Input::Stored { nested_offset: Some(f32Bits(bits)), .. } = tensor.input {
            place_offset(&mut mover, &route, bits)?;
        }
        options.done_bytes.store(mover.meters.done_bytes.load(Ordering::Relaxed), Ordering::Relaxed);
    }
    if let Some(cache) = mover.cache.take() {
        cache.finish();
    }
    Ok(())
}

/// The pieces that take a collective; a stored tensor's nested offset is in the plan already.
fn moving_pieces(plan: &LoadPlan, route: &Route<'_>) -> Vec<Piece> {
    let stored = matches!(route.tensor.input, Input::Stored { .. });
    let components = route.tensor.components();
    let part = |piece: &Piece| components.get(piece.component).map(|component| component.part);
    let mut pieces = route.tensor.pieces(plan.chunking.chunk_bytes);
    pieces.retain(|piece| {
        let in_plan = stored && part(piece) == Some(Part::NestedOffset);
        !(in_plan || piece.range.is_empty())
    });
    pieces
}

/// A reader's end for a tensor that it encodes.
fn send_encoded(
    plan: &LoadPlan,
    options: &LoadOptions<'_>,
    pipeline: &Pipeline<'_>,
    mover: &mut Mover<'_, '_, '_>,
    route: &Route<'_>,
) -> Result<(), LoadError> {
    let alone = plan.strategy == Strategy::Full;
    let mut collected = Vec::new();
    let spans = super::jobs::jobs_of(plan, options.rank, route.index);
    // Alone and with only a part of the tensor encoded, its statistics start at that part.
    let mut first_element = None;
    for _ in 0..spans {
        let mut chunk = pipeline.next()?;
        let Work::Encode(span) = chunk.job.work else { return Err(out_of_order(route)) };
        if chunk.job.tensor != route.index {
            return Err(out_of_order(route));
        }
        first_element.get_or_insert_with(|| span.elements.start());
        let piece = Piece { component: 0, range: span.weight };
        if !piece.range.is_empty() {
            mover.deliver(route, piece, &mut chunk.encoded.weight)?;
        }
        collected.extend_from_slice(&chunk.encoded.statistics);
        pipeline.recycle(chunk.encoded);
    }
    let statistics = timed(&mover.meters.encode_ns, || statistics::finish(route.tensor, &collected, options.kernels))?;
    for (component, mut bytes) in statistics {
        let start = if alone { statistics_start(route, component, first_element.unwrap_or(0)) } else { 0 };
        let chunk_bytes = as_usize(plan.chunking.chunk_bytes.max(1));
        let mut at = start;
        for part in bytes.chunks_mut(chunk_bytes) {
            let range = ByteRange::with_len(at, as_u64(part.len())).unwrap_or_default();
            mover.deliver(route, Piece { component, range }, part)?;
            at = range.end();
        }
    }
    Ok(())
}

/// Where in a component the statistics of elements from `first_element` on start.
fn statistics_start(route: &Route<'_>, component: usize, first_element: u64) -> u64 {
    let tensor = route.tensor;
    let (Some(whole), Some(from)) =
        (tensor.components().into_iter().nth(component), ByteRange::new(first_element, tensor.elements()))
    else {
        return 0;
    };
    tensor.encoding.part_range(whole.part, from, tensor.row_elements(), crate::plan::Claim::Kept).start()
}

/// A reader's end for a tensor that is stored in its final form.
fn send_stored(
    plan: &LoadPlan,
    pipeline: &Pipeline<'_>,
    mover: &mut Mover<'_, '_, '_>,
    route: &Route<'_>,
) -> Result<(), LoadError> {
    for _ in 0..super::jobs::jobs_of(plan, mover.rank, route.index) {
        let mut chunk = pipeline.next()?;
        let Work::Copy { component, range } = chunk.job.work else { return Err(out_of_order(route)) };
        if chunk.job.tensor != route.index {
            return Err(out_of_order(route));
        }
        mover.deliver(route, Piece { component, range }, &mut chunk.encoded.weight)?;
        pipeline.recycle(chunk.encoded);
    }
    Ok(())
}

fn place_offset(mover: &mut Mover<'_, '_, '_>, route: &Route<'_>, bits: u32) -> Result<(), LoadError> {
    let component = route.tensor.components().iter().position(|component| component.part == Part::NestedOffset);
    if let Some(component) = component {
        mover.keeper.write((route.index, component), 0, &bits.to_le_bytes())?;
    }
    Ok(())
}

fn out_of_order(route: &Route<'_>) -> LoadError {
    LoadError::Plan { fqn: route.tensor.fqn.clone(), what: "the reader's chunks are out of order" }
}
