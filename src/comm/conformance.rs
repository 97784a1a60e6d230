//! One suite of tests that every backend passes.
//!
//! Owns: the cases. A backend brings a [`Backend`] and calls [`suite`] in its tests.
//! Refuses to know: how a backend moves bytes. Expected values are computed here from rank and position alone.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Barrier, mpsc};
use std::time::Duration;

use super::{CommError, Communicator, Operation, Scatter};
use crate::clock;
use crate::device::{Device, Slice, SliceMut};
use crate::types::{Rank, WorldSize};

/// Starts one rank; runs on that rank's thread.
pub(crate) type Starter<C> = Box<dyn FnOnce() -> C + Send>;

/// A way to make groups of communicators within this process.
pub(crate) trait Backend {
    /// The communicator.
    type Comm: Communicator;
    /// For the names of threads.
    const NAME: &'static str;
    /// Whether errors name the ranks that are gone or waited for; NCCL does not tell.
    const NAMES_PEERS: bool = true;
    /// One starter for each rank, in order. Calls without progress for `idle` must fail.
    fn starters(&self, world: WorldSize, idle: Duration) -> Vec<Starter<Self::Comm>>;
}

/// Long enough for a loaded machine; a healthy case never waits for it.
const PATIENT: Duration = Duration::from_secs(60);
/// For the cases in which a rank is silent.
const SHORT: Duration = Duration::from_millis(300);
/// How soon a rank must notice an abort or the end of a peer. The aim is 100 ms; the rest is for a loaded machine.
const SOON: Duration = Duration::from_secs(2);

/// Buffer lengths: nothing, one, odd, around the frame of the backends (256 KiB), several frames.
const LENGTHS: [usize; 7] = [0, 1, 3, 4097, 262_144, 262_145, 1_000_003];

/// Makes a test of each case: of those that every backend passes, or of the ones named. Beyond the former there are
/// `reduces_in_the_order_of_ranks`, `names_another_length`, `names_another_call` and `refuses_device_memory`.
macro_rules! suite {
    ($backend:expr) => {
        $crate::comm::conformance::suite!(
            $backend; broadcasts, scatters, streams_to_changing_owners, gathers_uneven_parts, reduces_uneven_parts,
            waits_for_everybody, moves_64_mib, refuses_bad_arguments, notices_the_end_of_a_peer, aborts_a_blocked_call,
            tells_the_peers_of_an_abort, gives_up_on_a_silent_peer
        );
    };
    ($backend:expr; $($case:ident),+) => {
        $(
            #[test]
            fn $case() {
                $crate::comm::conformance::$case(&$backend);
            }
        )+
    };
}
pub(crate) use suite;

/// Runs `body` on every rank, each on its own thread, and gives the results in the order of ranks.
pub(crate) fn run<B: Backend, T: Send>(
    backend: &B,
    world: u32,
    idle: Duration,
    body: impl Fn(&mut B::Comm) -> T + Sync,
) -> Vec<T> {
    let world = WorldSize::new(world).expect("a test has ranks");
    let body = &body;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (backend.starters(world, idle).into_iter().enumerate())
            .map(|(rank, start)| {
                std::thread::Builder::new()
                    .name(format!("{}-{rank}", B::NAME))
                    .spawn_scoped(scope, move || body(&mut start()))
                    .expect("a thread")
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("a rank's assertions hold")).collect()
    })
}

/// The bytes that `rank` contributes to call number `call`: they repeat after 251, a prime, so that a frame in a wrong
/// place shows.
fn data(call: usize, rank: Rank, len: usize) -> Vec<u8> {
    let period: Vec<u8> = (0..=250).collect();
    let phase = (call * 101 + rank.index() * 31) % period.len();
    let mut bytes = period[phase..].to_vec();
    while bytes.len() < len {
        bytes.extend_from_slice(&period);
    }
    bytes.truncate(len);
    bytes
}

fn floats(values: impl Iterator<Item = f32>) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(values.size_hint().0 * size_of::<f32>());
    values.for_each(|value| bytes.extend_from_slice(&value.to_ne_bytes()));
    bytes
}

/// The rank as a small number, exactly.
fn number(rank: Rank) -> f32 {
    f32::from(u16::try_from(rank.0).expect("few ranks"))
}

/// A small value that depends on the index, exactly.
fn small(index: usize) -> f32 {
    f32::from(u16::try_from(index % 1000).expect("below 1000"))
}

fn worlds() -> impl Iterator<Item = u32> {
    1..=5
}

pub(crate) fn broadcasts<B: Backend>(backend: &B) {
    for world in worlds() {
        run(backend, world, PATIENT, |comm| {
            let group = comm.group();
            let mut call = 0;
            for root in group.world.ranks() {
                for len in LENGTHS {
                    call += 1;
                    let mut buffer = if group.rank == root { data(call, root, len) } else { vec![0xee; len] };
                    comm.broadcast(root, SliceMut::from(&mut buffer[..])).expect("broadcast");
                    assert!(
                        buffer == data(call, root, len),
                        "rank {} of {world}, root {root}, {len} bytes",
                        group.rank
                    );
                }
            }
        });
    }
}

pub(crate) fn scatters<B: Backend>(backend: &B) {
    for world in worlds() {
        run(backend, world, PATIENT, |comm| {
            let group = comm.group();
            for root in group.world.ranks() {
                for (call, len) in LENGTHS.into_iter().enumerate() {
                    // Each rank's part has another length; the last rank's is empty, so that it does not call.
                    let part_len = |rank: Rank| if rank == root || rank.0 == 3 { 0 } else { len + rank.index() };
                    if group.rank == root {
                        let parts: Vec<Vec<u8>> = group.world.ranks().map(|r| data(call, r, part_len(r))).collect();
                        let parts: Vec<Slice<'_>> = parts.iter().map(|part| Slice::from(&part[..])).collect();
                        comm.scatter(root, Scatter::Send { parts: &parts }).expect("send");
                    } else if part_len(group.rank) > 0 {
                        let mut into = vec![0xee; part_len(group.rank)];
                        comm.scatter(root, Scatter::Receive { into: SliceMut::from(&mut into[..]) }).expect("receive");
                        assert!(into == data(call, group.rank, into.len()), "rank {}, root {root}", group.rank);
                    }
                }
            }
        });
    }
}

/// The loader's hot path: the root sends chunk after chunk, each to one owner, who alone takes part.
pub(crate) fn streams_to_changing_owners<B: Backend>(backend: &B) {
    const CHUNKS: usize = 60;
    let len = |chunk: usize| 1 + chunk * 9973;
    let owner = |chunk: usize| Rank(u32::try_from(1 + chunk * chunk % 3).expect("small"));
    run(backend, 4, PATIENT, |comm| {
        for chunk in 0..CHUNKS {
            if comm.group().rank == Rank::ZERO {
                let bytes = data(chunk, Rank::ZERO, len(chunk));
                let mut parts = [Slice::from(&[][..]); 4];
                parts[owner(chunk).index()] = Slice::from(&bytes[..]);
                comm.scatter(Rank::ZERO, Scatter::Send { parts: &parts }).expect("send");
            } else if comm.group().rank == owner(chunk) {
                let mut into = vec![0; len(chunk)];
                comm.scatter(Rank::ZERO, Scatter::Receive { into: SliceMut::from(&mut into[..]) }).expect("receive");
                assert!(into == data(chunk, Rank::ZERO, len(chunk)), "chunk {chunk}");
            }
        }
    });
}

pub(crate) fn gathers_uneven_parts<B: Backend>(backend: &B) {
    for world in worlds() {
        run(backend, world, PATIENT, |comm| {
            let group = comm.group();
            for (call, len) in LENGTHS.into_iter().enumerate() {
                // Even parts; parts that grow with the rank; everything on the last rank.
                let shapes: [fn(usize, usize, usize) -> usize; 3] = [
                    |len, _, _| len,
                    |len, rank, _| len * rank / 2,
                    |len, rank, world| if rank + 1 == world { len } else { 0 },
                ];
                for shape in shapes {
                    let counts: Vec<usize> =
                        (0..group.world.count()).map(|rank| shape(len, rank, group.world.count())).collect();
                    let parts: Vec<Vec<u8>> =
                        group.world.ranks().map(|rank| data(call, rank, counts[rank.index()])).collect();
                    let expected = parts.concat();
                    let send = data(call, group.rank, counts[group.rank.index()]);
                    let mut recv = vec![0xee; expected.len()];
                    comm.all_gather(Slice::from(&send[..]), SliceMut::from(&mut recv[..]), &counts)
                        .expect("all_gather");
                    assert!(recv == expected, "rank {} of {world}, counts {counts:?}", group.rank);
                }
            }
        });
    }
}

/// Values are small integers, so that sums are exact: rank r holds (r + 1) * i, the sum is i * n * (n + 1) / 2.
pub(crate) fn reduces_uneven_parts<B: Backend>(backend: &B) {
    for world in worlds() {
        run(backend, world, PATIENT, |comm| {
            let group = comm.group();
            let factor = group.world.ranks().map(|rank| number(rank) + 1.0).sum::<f32>();
            for elements in [0, 1, 3, 65_537, 200_003] {
                let mut buffer = floats((0..elements).map(|index| small(index) * (number(group.rank) + 1.0)));
                comm.all_reduce(SliceMut::from(&mut buffer[..])).expect("all_reduce");
                let expected = floats((0..elements).map(|index| small(index) * factor));
                assert!(buffer == expected, "all_reduce of {elements} on rank {} of {world}", group.rank);

                let counts: Vec<usize> = (0..group.world.count()).map(|rank| elements * (rank % 3)).collect();
                let total = counts.iter().sum();
                let start: usize = counts[..group.rank.index()].iter().sum();
                let own = counts[group.rank.index()];
                let send = floats((0..total).map(|index| small(index) * (number(group.rank) + 1.0)));
                let mut recv = vec![0xee; own * 4];
                comm.reduce_scatter(Slice::from(&send[..]), SliceMut::from(&mut recv[..]), &counts).expect("reduce");
                let expected = floats((start..start + own).map(|index| small(index) * factor));
                assert!(recv == expected, "reduce_scatter of {counts:?} on rank {} of {world}", group.rank);
            }
        });
    }
}

/// CM-4. In `f32`, 1e8 - 1e8 + 1 is 1 from left to right and 0 in any other order, for neighbours of 1e8 are 8 apart.
pub(crate) fn reduces_in_the_order_of_ranks<B: Backend>(backend: &B) {
    run(backend, 3, PATIENT, |comm| {
        let value = [1.0e8_f32, -1.0e8, 1.0][comm.group().rank.index()];
        let mut buffer = floats(std::iter::repeat_n(value, 1000));
        comm.all_reduce(SliceMut::from(&mut buffer[..])).expect("all_reduce");
        assert!(buffer == floats(std::iter::repeat_n(1.0, 1000)), "rank {}", comm.group().rank);
    });
}

pub(crate) fn waits_for_everybody<B: Backend>(backend: &B) {
    for world in worlds() {
        let arrived = AtomicUsize::new(0);
        run(backend, world, PATIENT, |comm| {
            for round in 1..=20 {
                arrived.fetch_add(1, Ordering::SeqCst);
                comm.barrier().expect("barrier");
                let seen = arrived.load(Ordering::SeqCst);
                assert!(seen >= round * comm.group().world.count(), "left round {round} when {seen} had arrived");
                comm.barrier().expect("barrier");
            }
        });
        assert_eq!(arrived.into_inner(), 20 * usize::try_from(world).expect("small"));
    }
}

pub(crate) fn moves_64_mib<B: Backend>(backend: &B) {
    const LEN: usize = 64 << 20;
    let expected = data(0, Rank(1), LEN);
    run(backend, 3, PATIENT, |comm| {
        let root = Rank(1);
        let mut buffer = if comm.group().rank == root { expected.clone() } else { vec![0; LEN] };
        comm.broadcast(root, SliceMut::from(&mut buffer[..])).expect("broadcast");
        assert!(buffer == expected, "broadcast to rank {}", comm.group().rank);

        let counts = [LEN / 4, LEN / 2, LEN / 4];
        let start: usize = counts[..comm.group().rank.index()].iter().sum();
        let own = &expected[start..start + counts[comm.group().rank.index()]];
        buffer.fill(0);
        comm.all_gather(Slice::from(own), SliceMut::from(&mut buffer[..]), &counts).expect("all_gather");
        assert!(buffer == expected, "all_gather on rank {}", comm.group().rank);
    });
}

/// Arguments that contradict each other are refused before a byte moves, and the communicator stays usable.
pub(crate) fn refuses_bad_arguments<B: Backend>(backend: &B) {
    run(backend, 2, PATIENT, |comm| {
        let own = comm.group().rank;
        let mut eight = [0_u8; 8];
        let bad = |result: Result<(), CommError>, what: &str| match result {
            Err(CommError::BadArgument { detail, .. }) => assert!(detail.contains(what), "{detail}"),
            other => panic!("{what}: {other:?}"),
        };
        bad(comm.broadcast(Rank(2), SliceMut::from(&mut eight[..])), "root 2 in a world of 2");
        bad(comm.scatter(own, Scatter::Send { parts: &[] }), "expected 2 parts, one for each rank, found 0");
        let parts = [Slice::from(&[1][..]); 2];
        bad(comm.scatter(own, Scatter::Send { parts: &parts }), "found 1 bytes");
        bad(comm.scatter(own, Scatter::Receive { into: SliceMut::from(&mut eight[..]) }), "receives");
        bad(comm.all_gather(Slice::from(&[][..]), SliceMut::from(&mut eight[..]), &[8]), "expected 2 counts");
        bad(comm.all_gather(Slice::from(&[][..]), SliceMut::from(&mut eight[..]), &[usize::MAX, 2]), "overflow");
        bad(comm.all_gather(Slice::from(&[0; 9][..]), SliceMut::from(&mut eight[..]), &[4, 4]), "expected 4 bytes");
        bad(comm.reduce_scatter(Slice::from(&[0; 8][..]), SliceMut::from(&mut eight[..]), &[2, 2]), "16 bytes");
        bad(comm.all_reduce(SliceMut::from(&mut eight[..7])), "buffer has 7");
        comm.barrier().expect("still usable");
    });
}

/// Returns when every rank has left a first barrier, so that a failure after it does not reach anybody inside of it.
fn everybody_is_there(comm: &mut impl Communicator, ready: &Barrier) {
    comm.barrier().expect("everybody is there");
    ready.wait();
}

/// Does the work and says how long it took.
fn timed<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let begin = clock::now();
    let value = work();
    (value, begin.elapsed())
}

/// Whether the error says that `peer` is gone; of NCCL, which does not say who it is, that somebody is (ncclRemoteError).
fn is_gone<B: Backend>(error: &CommError, peer: Rank) -> bool {
    match error {
        CommError::PeerLost { rank, .. } => *rank == peer,
        CommError::Nccl { code, .. } => !B::NAMES_PEERS && *code == 6,
        _ => false,
    }
}

pub(crate) fn notices_the_end_of_a_peer<B: Backend>(backend: &B) {
    for world in [2, 3, 5] {
        let ready = Barrier::new(usize::try_from(world).expect("small"));
        run(backend, world, PATIENT, |comm| {
            everybody_is_there(comm, &ready);
            if comm.group().rank == Rank(1) {
                return;
            }
            let (result, took) = timed(|| comm.barrier().and_then(|()| comm.barrier()));
            let error = result.expect_err("rank 1 is gone");
            assert!(is_gone::<B>(&error, Rank(1)), "{error}");
            assert!(took < SOON, "noticed after {took:?}");
            let again = comm.barrier().expect_err("closed");
            assert_eq!(again.to_string(), error.to_string());
        });
    }
}

pub(crate) fn aborts_a_blocked_call<B: Backend>(backend: &B) {
    type Call<C> = fn(&mut C) -> Result<(), CommError>;
    let calls: [Call<B::Comm>; 4] = [
        |comm| comm.barrier(),
        |comm| comm.all_reduce(SliceMut::from(&mut vec![0; 1 << 20][..])),
        |comm| comm.broadcast(Rank(1), SliceMut::from(&mut [0; 100][..])),
        |comm| comm.scatter(Rank(1), Scatter::Receive { into: SliceMut::from(&mut [0; 100][..]) }),
    ];
    // Once on the way into the call, once when the call has long been blocked.
    for (call, delay) in calls.into_iter().flat_map(|call| [(call, Duration::ZERO), (call, Duration::from_millis(20))])
    {
        let (ready, done) = (Barrier::new(2), Barrier::new(2));
        run(backend, 2, PATIENT, |comm| {
            everybody_is_there(comm, &ready);
            if comm.group().rank == Rank(1) {
                // This rank is silent until rank 0 has come back.
                done.wait();
                return;
            }
            let handle = comm.abort_handle();
            let (result, took) = std::thread::scope(|scope| {
                scope.spawn(move || {
                    let (_nobody_sends, nothing) = mpsc::sync_channel::<()>(1);
                    nothing.recv_timeout(delay).expect_err("nobody sends");
                    handle.abort("the test says so");
                });
                timed(|| call(comm))
            });
            let error = result.expect_err("aborted");
            assert!(
                matches!(&error, CommError::Aborted { rank: Rank(0), reason, .. } if reason == "the test says so"),
                "{error}"
            );
            assert!(took < SOON, "returned after {took:?}");
            assert!(matches!(comm.barrier(), Err(CommError::Aborted { .. })), "later calls too");
            done.wait();
        });
    }
}

pub(crate) fn tells_the_peers_of_an_abort<B: Backend>(backend: &B) {
    for world in [2, 4] {
        let ranks = usize::try_from(world).expect("small");
        let (ready, done) = (Barrier::new(ranks), Barrier::new(ranks));
        run(backend, world, PATIENT, |comm| {
            everybody_is_there(comm, &ready);
            if comm.group().rank == Rank::ZERO {
                // Outside of any call, as when the coordinator cancels the generation while this rank computes.
                comm.abort_handle().abort("the generation is over");
                done.wait();
                return;
            }
            let (error, took) = timed(|| comm.barrier().expect_err("rank 0 aborted"));
            let told = matches!(error, CommError::Aborted { rank: Rank(0), .. });
            assert!(told || is_gone::<B>(&error, Rank(0)), "{error}");
            assert!(took < SOON, "noticed after {took:?}");
            done.wait();
        });
    }
}

pub(crate) fn gives_up_on_a_silent_peer<B: Backend>(backend: &B) {
    let (ready, done) = (Barrier::new(2), Barrier::new(2));
    run(backend, 2, SHORT, |comm| {
        everybody_is_there(comm, &ready);
        if comm.group().rank == Rank(1) {
            done.wait();
            return;
        }
        let (error, took) = timed(|| comm.barrier().expect_err("rank 1 is silent"));
        match error {
            CommError::Deadline { operation, waiting_for, waited } => {
                let known = if B::NAMES_PEERS { &[Rank(1)][..] } else { &[] };
                assert_eq!((operation, &waiting_for[..]), (Operation::Barrier, known));
                assert!(waited >= SHORT && took >= waited, "waited {waited:?}");
            }
            other => panic!("{other}"),
        }
        assert!(took < SHORT + SOON, "gave up after {took:?}");
        done.wait();
    });
}

/// CM-1: one rank expects another length than the root sends.
pub(crate) fn names_another_length<B: Backend>(backend: &B) {
    let errors = run(backend, 2, SHORT, |comm| {
        comm.barrier().expect("everybody is there");
        if comm.group().rank == Rank::ZERO {
            let parts = [Slice::from(&[][..]), Slice::from(&[7; 100][..])];
            let sent = comm.scatter(Rank::ZERO, Scatter::Send { parts: &parts });
            return sent.and_then(|()| comm.barrier());
        }
        comm.scatter(Rank::ZERO, Scatter::Receive { into: SliceMut::from(&mut [0; 99][..]) })
    });
    match &errors[1] {
        Err(CommError::Mismatch { rank: Rank(0), expected, found }) => {
            assert_eq!((expected.bytes, found.bytes), (99, 100));
            assert_eq!((expected.operation, found.operation), (Operation::Scatter, Operation::Scatter));
        }
        other => panic!("{other:?}"),
    }
    assert!(errors[0].is_err(), "the sender hears of it in its next call: {:?}", errors[0]);
}

/// CM-1: one rank is in another call than its peer.
pub(crate) fn names_another_call<B: Backend>(backend: &B) {
    let errors = run(backend, 2, SHORT, |comm| {
        comm.barrier().expect("everybody is there");
        let mut buffer = [0; 64];
        if comm.group().rank == Rank::ZERO {
            let sent = comm.broadcast(Rank::ZERO, SliceMut::from(&mut buffer[..]));
            return sent.and_then(|()| comm.barrier());
        }
        comm.scatter(Rank::ZERO, Scatter::Receive { into: SliceMut::from(&mut buffer[..]) })
    });
    match &errors[1] {
        Err(CommError::Mismatch { rank: Rank(0), expected, found }) => {
            assert_eq!((expected.operation, found.operation), (Operation::Scatter, Operation::Broadcast));
            assert_eq!((expected.bytes, found.bytes), (64, 64));
        }
        other => panic!("{other:?}"),
    }
    assert!(errors[0].is_err(), "the sender hears of it in its next call: {:?}", errors[0]);
}

/// Backends that move host memory only say so.
pub(crate) fn refuses_device_memory<B: Backend>(backend: &B) {
    run(backend, 2, PATIENT, |comm| {
        let view = crate::device::CudaSliceMut::for_tests(0x1000, 16, 1);
        match comm.broadcast(Rank::ZERO, SliceMut::Cuda(view)) {
            Err(CommError::WrongDevice { expected: Device::Host, found: Device::Cuda { ordinal: 1 }, .. }) => {}
            other => panic!("{other:?}"),
        }
        comm.barrier().expect("still usable");
    });
}
