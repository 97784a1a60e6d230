//! The conformance suite over loopback, and what is particular to sockets.

use std::net::Ipv4Addr;
use std::time::Duration;

use super::*;
use crate::comm::Refusal;
use crate::comm::conformance::{self, Backend, Starter};
use crate::types::WorldSize;

struct Tcp;

pub(super) fn configs(world: WorldSize, idle: Duration) -> Vec<(TcpConfig, TcpPort)> {
    let loopback = IpAddr::from(Ipv4Addr::LOCALHOST);
    let ports: Vec<TcpPort> = world.ranks().map(|_| TcpPort::bind(loopback).expect("a free port")).collect();
    let peers: Vec<SocketAddr> = ports.iter().map(TcpPort::address).collect();
    let config = |rank| TcpConfig {
        group: Group { rank, world },
        generation: Generation(7),
        secret: [42; 32],
        peers: peers.clone(),
        tls: None,
        deadline: Duration::from_secs(20),
        idle_deadline: idle,
    };
    world.ranks().map(config).zip(ports).collect()
}

impl Backend for Tcp {
    type Comm = TcpCommunicator;
    const NAME: &'static str = "tcp";

    fn starters(&self, world: WorldSize, idle: Duration) -> Vec<Starter<TcpCommunicator>> {
        let start = |(config, port)| -> Starter<TcpCommunicator> {
            Box::new(move || connect(config, port).expect("all ranks connect"))
        };
        configs(world, idle).into_iter().map(start).collect()
    }
}

conformance::suite!(Tcp);
conformance::suite!(Tcp; reduces_in_the_order_of_ranks, names_another_length, names_another_call, refuses_device_memory);

/// Runs each rank's work on its own thread; a rank that fails to connect gives that error.
fn with_configs<T: Send>(
    configs: Vec<(TcpConfig, TcpPort)>,
    work: impl Fn(Result<TcpCommunicator, CommError>) -> T + Sync,
) -> Vec<T> {
    let work = &work;
    std::thread::scope(|scope| {
        let start = |(config, port)| scope.spawn(move || work(connect(config, port)));
        let threads: Vec<_> = configs.into_iter().map(start).collect();
        threads.into_iter().map(|thread| thread.join().expect("a rank's assertions hold")).collect()
    })
}

fn world(ranks: u32) -> WorldSize {
    WorldSize::new(ranks).expect("a test has ranks")
}

const PATIENT: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(300);

/// The refusals of two ranks, of which rank 1 was changed.
fn refusals(change: impl FnOnce(&mut TcpConfig)) -> Vec<Refusal> {
    let mut configs = configs(world(2), PATIENT);
    change(&mut configs[1].0);
    let errors = with_configs(configs, |result| {
        // The other side may give up first and close, so only those that say why are compared.
        match result.expect_err("the ranks differ") {
            CommError::Refused { refusal, .. } => Some(refusal),
            CommError::PeerLost { .. } | CommError::Aborted { .. } => None,
            other => panic!("{other}"),
        }
    });
    errors.into_iter().flatten().collect()
}

#[test]
fn another_secret_is_refused() {
    let found = refusals(|config| config.secret[31] ^= 1);
    assert!(!found.is_empty() && found.iter().all(|refusal| *refusal == Refusal::Secret), "{found:?}");
}

#[test]
fn another_generation_is_refused() {
    let found = refusals(|config| config.generation = Generation(6));
    let (old, new) = (Generation(6), Generation(7));
    let either = [Refusal::Generation { ours: old, theirs: new }, Refusal::Generation { ours: new, theirs: old }];
    assert!(!found.is_empty() && found.iter().all(|refusal| either.contains(refusal)), "{found:?}");
}

#[test]
fn a_peer_at_the_wrong_address_is_refused() {
    let mut configs = configs(world(3), PATIENT);
    configs[0].0.peers.swap(1, 2);
    let errors = with_configs(configs, |result| result.map(drop).expect_err("rank 0 looks in the wrong place"));
    let expected = Refusal::WrongPeer { expected: Rank(1), found: Rank(2) };
    assert!(matches!(&errors[0], CommError::Refused { refusal, .. } if *refusal == expected), "{}", errors[0]);
}

#[test]
fn another_world_is_refused() {
    let found = refusals(|config| {
        config.group.world = world(3);
        config.peers.push(config.peers[0]);
    });
    assert!(found.iter().any(|refusal| matches!(refusal, Refusal::World { .. })), "{found:?}");
}

/// A port scanner, a health probe and a silent connection do not keep the ranks from each other.
#[test]
fn strangers_are_ignored() {
    use std::io::Write as _;
    let configs = configs(world(2), PATIENT);
    let address = configs[1].1.address();
    let mut probe = std::net::TcpStream::connect(address).expect("listening");
    let request = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n and more than the 64 bytes that a rank would send first";
    probe.write_all(request).expect("accepted by the kernel");
    let _silent = std::net::TcpStream::connect(address).expect("listening");
    drop(std::net::TcpStream::connect(address).expect("listening"));
    with_configs(configs, |result| result.expect("connected").barrier().expect("both are there"));
}

/// Killed processes leave without a goodbye; also the ranks that have no link to it learn who it was.
#[test]
fn a_killed_rank_is_named() {
    let ready = std::sync::Barrier::new(4);
    let errors = with_configs(configs(world(4), PATIENT), |result| {
        let mut comm = result.expect("connected");
        ready.wait();
        if comm.group().rank == Rank(2) {
            comm.mesh.shared.vanish();
            ready.wait();
            return None;
        }
        ready.wait();
        Some(comm.broadcast(Rank(3), SliceMut::from(&mut vec![0; 100][..])).and_then(|()| comm.barrier()))
    });
    for error in errors.into_iter().flatten() {
        let error = error.expect_err("rank 2 is gone");
        assert!(matches!(error, CommError::PeerLost { rank: Rank(2), .. }), "{error}");
    }
}

/// A proxy between rank 0 and rank 1 flips one bit of the payload: after 64 + 32 bytes of handshake and, with the
/// barrier of connecting, two headers of 48 bytes.
#[test]
fn a_flipped_bit_is_named() {
    use std::io::{Read as _, Write as _};
    const FLIPPED: usize = 64 + 32 + 48 + 48 + 1000;
    let mut configs = configs(world(2), PATIENT);
    let proxy = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    let target = std::mem::replace(&mut configs[0].0.peers[1], proxy.local_addr().expect("bound"));
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let (mut dialer, _) = proxy.accept().expect("rank 0 dials");
            let mut acceptor = std::net::TcpStream::connect(target).expect("rank 1 listens");
            let (mut back_in, mut back_out) = (acceptor.try_clone().expect("open"), dialer.try_clone().expect("open"));
            std::thread::scope(|scope| {
                scope.spawn(move || {
                    std::io::copy(&mut back_in, &mut back_out).ok();
                    back_out.shutdown(std::net::Shutdown::Both).ok();
                });
                let (mut seen, mut buffer) = (0, [0; 512]);
                while let Ok(count @ 1..) = dialer.read(&mut buffer) {
                    if (seen..seen + count).contains(&FLIPPED) {
                        buffer[FLIPPED - seen] ^= 0x10;
                    }
                    seen += count;
                    if acceptor.write_all(&buffer[..count]).is_err() {
                        break;
                    }
                }
                acceptor.shutdown(std::net::Shutdown::Both).ok();
            });
        });
        let errors = with_configs(configs, |result| {
            let mut comm = result.expect("the handshake is intact");
            let mut buffer = [3; 5000];
            comm.broadcast(Rank::ZERO, SliceMut::from(&mut buffer[..])).and_then(|()| comm.barrier())
        });
        match &errors[1] {
            Err(error @ CommError::Corrupt { rank: Rank(0), what: "checksum of a payload", .. }) => {
                assert_eq!(crate::error::Classify::kind(error), crate::error::Kind::Corrupt);
            }
            other => panic!("{other:?}"),
        }
        assert!(matches!(&errors[0], Err(CommError::Aborted { rank: Rank(1), .. })), "{:?}", errors[0]);
    });
}

/// By arithmetic: 1,000,003 bytes are 4 frames of at most 262,144 with 48 bytes of header each; connecting is one empty
/// frame each way.
#[test]
fn bytes_are_counted() {
    let traffic = with_configs(configs(world(2), PATIENT), |result| {
        let mut comm = result.expect("connected");
        let mut buffer = vec![1; 1_000_003];
        comm.broadcast(Rank::ZERO, SliceMut::from(&mut buffer[..])).expect("broadcast");
        comm.counters().traffic()
    });
    let (large, wire, empty) = (1_000_003, 1_000_003 + 4 * 48 + 48, 48);
    let found = |t: &crate::comm::Traffic| {
        [t.payload_sent_bytes, t.wire_sent_bytes, t.payload_received_bytes, t.wire_received_bytes]
    };
    assert_eq!(found(&traffic[0]), [large, wire, 0, empty]);
    assert_eq!(found(&traffic[1]), [0, empty, large, wire]);
}

/// One owner that does not take its part yet does not keep another one from its own. 64 MiB are more than the sockets hold.
#[test]
fn a_slow_owner_does_not_hold_up_the_others() {
    const LEN: usize = 64 << 20;
    let order = std::sync::Barrier::new(2);
    with_configs(configs(world(3), PATIENT), |result| {
        let mut comm = result.expect("connected");
        let rank = comm.group().rank;
        if rank == Rank::ZERO {
            let part = vec![5; LEN];
            let parts = [Slice::from(&[][..]), Slice::from(&part[..]), Slice::from(&part[..])];
            comm.scatter(rank, Scatter::Send { parts: &parts }).expect("both owners come in the end");
            return;
        }
        let mut into = vec![0; LEN];
        if rank == Rank(1) {
            order.wait();
        }
        comm.scatter(Rank::ZERO, Scatter::Receive { into: SliceMut::from(&mut into[..]) }).expect("our part");
        if rank == Rank(2) {
            order.wait();
        }
        assert!(into.iter().all(|&byte| byte == 5));
    });
}

/// A sender whose receiver stops taking bytes gives up, and says for whom it waited.
#[test]
fn a_receiver_that_stops_is_named() {
    let done = std::sync::Barrier::new(2);
    with_configs(configs(world(2), SHORT), |result| {
        let mut comm = result.expect("connected");
        if comm.group().rank == Rank(1) {
            done.wait();
            return;
        }
        let part = vec![5; 64 << 20];
        let error = comm.scatter(Rank::ZERO, Scatter::Send { parts: &[Slice::from(&[][..]), Slice::from(&part[..])] });
        match error {
            Err(CommError::Deadline { operation: Operation::Scatter, waiting_for, .. }) => {
                assert_eq!(waiting_for, [Rank(1)]);
            }
            other => panic!("{other:?}"),
        }
        done.wait();
    });
}

/// A rank that is not there yet when the others connect is waited for, up to the deadline.
#[test]
fn connecting_has_a_deadline() {
    let mut configs = configs(world(2), PATIENT);
    let (_, silent_port) = configs.pop().expect("two ranks");
    configs[0].0.deadline = SHORT;
    let errors = with_configs(configs, |result| result.map(drop).expect_err("rank 1 never comes"));
    match &errors[0] {
        CommError::Deadline { operation: Operation::Connect, waiting_for, .. } => assert_eq!(waiting_for, &[Rank(1)]),
        other => panic!("{other}"),
    }
    drop(silent_port);
}

/// A rank whose process ended before anybody dialed it is gone at once: its port was bound before it was published.
#[test]
fn a_port_that_is_gone_is_a_lost_peer() {
    let mut configs = configs(world(2), PATIENT);
    drop(configs.pop());
    let errors = with_configs(configs, |result| result.map(drop).expect_err("rank 1 is gone"));
    assert!(matches!(errors[0], CommError::PeerLost { rank: Rank(1), .. }), "{}", errors[0]);
}

/// A cancelled generation does not wait for a rank that will not come.
#[test]
fn connecting_can_be_aborted() {
    let mut configs = configs(world(2), PATIENT);
    let (_, silent_port) = configs.pop().expect("two ranks");
    configs[0].0.deadline = PATIENT;
    let handle = configs[0].1.abort_handle();
    std::thread::scope(|scope| {
        scope.spawn(move || handle.abort("the generation is over"));
        let errors = with_configs(configs, |result| result.map(drop).expect_err("rank 1 never comes"));
        match &errors[0] {
            CommError::Aborted { operation: Operation::Connect, rank: Rank(0), reason } => {
                assert_eq!(reason, "the generation is over");
            }
            other => panic!("{other}"),
        }
    });
    drop(silent_port);
}
