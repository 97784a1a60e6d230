//! The conformance suite against the mock library, and its faults.
#![expect(unsafe_code, reason = "asking the mock for a fault is a call of a C library")]

use std::path::PathBuf;

use super::*;
use crate::comm::conformance::{self, Backend, Starter};
use crate::error::{Classify as _, Kind};
use crate::types::WorldSize;

const PATIENT: Duration = Duration::from_secs(30);
const SHORT: Duration = Duration::from_millis(300);

/// Where cargo puts the library of the crate `weightcast-mock-nccl`: beside the test's own binary, or one level up.
fn mock_path() -> PathBuf {
    let own = std::env::current_exe().expect("a test has a binary");
    let mut found = own.ancestors().skip(1).take(2).map(|folder| folder.join("libweightcast_mock_nccl.so"));
    found.find(|path| path.exists()).expect("the mock library was built: it is a dev-dependency")
}

fn mock() -> NcclLibrary {
    NcclLibrary::load(Some(&mock_path())).expect("the mock has all functions")
}

struct Nccl {
    fault: Fault,
}

/// The kind, rank and call of a fault, as the mock numbers them.
#[derive(Clone, Copy)]
struct Fault {
    kind: i32,
    rank: u32,
    call: u64,
}

const HEALTHY: Fault = Fault { kind: 0, rank: 0, call: 0 };

impl Backend for Nccl {
    type Comm = NcclCommunicator;
    const NAME: &'static str = "nccl";
    const NAMES_PEERS: bool = false;

    fn starters(&self, world: WorldSize, idle: Duration) -> Vec<Starter<NcclCommunicator>> {
        let start = |config: NcclConfig| -> Starter<NcclCommunicator> {
            Box::new(move || connect(config).expect("all ranks connect"))
        };
        configs(world, idle, self.fault).into_iter().map(start).collect()
    }
}

fn configs(world: WorldSize, idle_deadline: Duration, fault: Fault) -> Vec<NcclConfig> {
    let library = mock();
    let unique_id = id_with(&library, fault);
    let config = |rank| NcclConfig {
        group: Group { rank, world },
        library: library.clone(),
        unique_id,
        device: Device::Host,
        deadline: PATIENT,
        idle_deadline,
    };
    world.ranks().map(config).collect()
}

fn id_with(library: &NcclLibrary, fault: Fault) -> NcclUniqueId {
    let mut id = library.unique_id().expect("loopback");
    // SAFETY: The library is loaded already; the function has this type in the mock and writes into one id.
    let result = unsafe {
        let mock = libloading::Library::new(mock_path()).expect("loaded before");
        let inject: libloading::Symbol<'_, unsafe extern "C" fn(*mut NcclUniqueId, i32, u32, u64) -> i32> =
            mock.get(b"weightcast_mock_nccl_fault\0").expect("the mock has it");
        inject(&raw mut id, fault.kind, fault.rank, fault.call)
    };
    assert_eq!(result, SUCCESS);
    id
}

conformance::suite!(Nccl { fault: HEALTHY });
conformance::suite!(Nccl { fault: HEALTHY }; refuses_device_memory);

/// The outcome of barriers on each rank until the first error, ten at most.
fn barriers(fault: Fault, idle: Duration) -> Vec<Result<u32, (u32, CommError)>> {
    conformance::run(&Nccl { fault }, 2, idle, |comm| {
        for done in 0..10 {
            comm.barrier().map_err(|error| (done, error))?;
        }
        Ok(10)
    })
}

#[test]
fn the_mock_is_probed() {
    let path = mock_path();
    let info = probe(Some(&path)).expect("a healthy library");
    let version = NcclVersion { major: 2, minor: 23, patch: 4 };
    assert_eq!(info, NcclInfo { library: path.display().to_string(), version });
}

#[test]
fn a_healthy_group_counts_to_ten() {
    let found: Vec<_> = barriers(HEALTHY, PATIENT).into_iter().map(Result::ok).collect();
    assert_eq!(found, [Some(10), Some(10)]);
}

#[test]
fn an_asynchronous_error_is_told_in_the_librarys_words() {
    let found = barriers(Fault { kind: 1, rank: 1, call: 3 }, SHORT);
    match &found[1] {
        Err((3, error @ CommError::Nccl { code: 6, detail, name, .. })) => {
            assert!(detail.contains("mock fault") && name.contains("remote process"), "{error}");
            assert_eq!(error.kind(), Kind::Unavailable);
        }
        other => panic!("{other:?}"),
    }
    assert!(matches!(found[0], Err((3, _))), "the other rank notices: {:?}", found[0]);
}

#[test]
fn an_operation_that_never_ends_is_given_up() {
    let found = barriers(Fault { kind: 2, rank: 0, call: 2 }, SHORT);
    match &found[0] {
        Err((2, CommError::Deadline { operation: Operation::Barrier, waited, .. })) => assert!(*waited >= SHORT),
        other => panic!("{other:?}"),
    }
    assert!(matches!(found[1], Err((2, _))), "{:?}", found[1]);
}

#[test]
fn an_operation_that_never_ends_can_be_aborted() {
    conformance::run(&Nccl { fault: Fault { kind: 2, rank: 0, call: 0 } }, 1, PATIENT, |comm| {
        let handle = comm.abort_handle();
        let error = std::thread::scope(|scope| {
            scope.spawn(move || handle.abort("enough"));
            comm.barrier().expect_err("it never ends by itself")
        });
        assert!(matches!(&error, CommError::Aborted { reason, .. } if reason == "enough"), "{error}");
    });
}

#[test]
fn a_call_that_fails_at_once_is_told() {
    let found = barriers(Fault { kind: 3, rank: 1, call: 0 }, SHORT);
    assert!(matches!(&found[1], Err((0, CommError::Nccl { code: 2, call: "ncclAllReduce", .. }))), "{:?}", found[1]);
}

#[test]
fn a_rank_whose_connections_break_is_noticed() {
    let found = barriers(Fault { kind: 4, rank: 1, call: 5 }, SHORT);
    assert!(matches!(&found[0], Err((5, CommError::Nccl { code: 6, .. }))), "{:?}", found[0]);
    assert!(matches!(&found[1], Err((5, CommError::Deadline { .. }))), "{:?}", found[1]);
}

#[test]
fn connecting_has_a_deadline() {
    let world = WorldSize::new(2).expect("two");
    let mut configs = configs(world, PATIENT, Fault { kind: 5, rank: 1, call: 0 });
    configs.iter_mut().for_each(|config| config.deadline = SHORT);
    std::thread::scope(|scope| {
        for config in configs {
            scope.spawn(move || match connect(config) {
                Err(CommError::Deadline { operation: Operation::Connect, .. }) => {}
                other => panic!("{other:?}"),
            });
        }
    });
}

/// NC-3 and NC-4: aborts that race with calls, with each other and with the end of the communicator free it once.
#[test]
fn nc_3_aborts_race_with_everything() {
    for round in 0..30_u64 {
        conformance::run(&Nccl { fault: HEALTHY }, 2, PATIENT, |comm| {
            let handles = [comm.abort_handle(), comm.abort_handle()];
            std::thread::scope(|scope| {
                for handle in handles {
                    scope.spawn(move || {
                        (0..round * 5).for_each(|_| std::thread::yield_now());
                        handle.abort("race");
                    });
                }
                let error = std::iter::repeat_with(|| comm.barrier()).find_map(Result::err);
                let error = error.expect("the abort comes");
                assert!(matches!(error, CommError::Aborted { .. } | CommError::Nccl { code: 6, .. }), "{error}");
            });
        });
    }
}

#[test]
fn connecting_can_be_aborted() {
    let world = WorldSize::new(2).expect("two");
    let config = configs(world, PATIENT, HEALTHY).remove(0);
    let connecting = start(config).expect("it begins without the other rank");
    let handle = connecting.abort_handle();
    std::thread::scope(|scope| {
        scope.spawn(move || handle.abort("the generation is over"));
        match connecting.finish() {
            Err(CommError::Aborted { operation: Operation::Connect, reason, .. }) => {
                assert_eq!(reason, "the generation is over");
            }
            other => panic!("{other:?}"),
        }
    });
}
