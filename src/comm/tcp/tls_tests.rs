//! The conformance suite over TLS, who is refused there, and strangers in any number.

use std::time::Duration;

use super::tests::configs;
use super::*;
use crate::comm::conformance::{self, Backend, Starter};
use crate::tls::tests::write_certificates;
use crate::types::WorldSize;

const PATIENT: Duration = Duration::from_secs(60);

struct TcpTls;

fn certificates() -> Tls {
    let directory = tempfile::tempdir().expect("a directory");
    Tls::open(write_certificates(directory.path())).expect("good files")
}

fn encrypted(world: WorldSize, idle: Duration) -> Vec<(TcpConfig, TcpPort)> {
    let tls = certificates();
    let mut configs = configs(world, idle);
    configs.iter_mut().for_each(|(config, _)| config.tls = Some(tls.clone()));
    configs
}

impl Backend for TcpTls {
    type Comm = TcpCommunicator;
    const NAME: &'static str = "tcp-tls";

    fn starters(&self, world: WorldSize, idle: Duration) -> Vec<Starter<TcpCommunicator>> {
        let start = |(config, port)| -> Starter<TcpCommunicator> {
            Box::new(move || connect(config, port).expect("all ranks connect"))
        };
        encrypted(world, idle).into_iter().map(start).collect()
    }
}

conformance::suite!(TcpTls);
conformance::suite!(TcpTls; reduces_in_the_order_of_ranks, names_another_length, names_another_call, refuses_device_memory);

fn world(ranks: u32) -> WorldSize {
    WorldSize::new(ranks).expect("a test has ranks")
}

/// The errors of two ranks that do not find each other.
fn errors(configs: Vec<(TcpConfig, TcpPort)>) -> Vec<CommError> {
    std::thread::scope(|scope| {
        let start = |(config, port)| scope.spawn(move || connect(config, port).map(drop));
        let threads: Vec<_> = configs.into_iter().map(start).collect();
        let ended = threads.into_iter().map(|thread| thread.join().expect("no panic"));
        ended.map(|result| result.expect_err("they do not belong together")).collect()
    })
}

/// Another authority's certificate: one side does not believe it, and the other hears of it.
#[test]
fn a_peer_of_another_authority_is_refused() {
    let mut configs = encrypted(world(2), PATIENT);
    configs[1].0.tls = Some(certificates());
    let found: Vec<String> = errors(configs).iter().map(|error| crate::error::chain(error)).collect();
    let says = |error: &String| error.contains("not signed by");
    assert!(found.iter().any(says), "{found:?}");
}

/// The secret is asked for in TLS as without.
#[test]
fn another_secret_is_refused() {
    let mut configs = encrypted(world(2), PATIENT);
    configs[1].0.secret[0] ^= 1;
    let found = errors(configs);
    let is_it = |error: &CommError| matches!(error, CommError::Refused { refusal: crate::comm::Refusal::Secret, .. });
    assert!(found.iter().any(is_it), "{found:?}");
}

/// A rank without certificates does not get in, and hears at least that it lost the peer.
#[test]
fn a_peer_that_speaks_plainly_is_refused() {
    let mut configs = encrypted(world(2), PATIENT);
    configs[0].0.tls = None;
    configs.iter_mut().for_each(|(config, _)| config.deadline = Duration::from_secs(2));
    for error in errors(configs) {
        assert!(!matches!(error, CommError::BadArgument { .. }), "{error}");
    }
}

/// 500 connections that say nothing, more than there is room for, come before the peer and do not delay it by the 10 s that
/// they have.
#[test]
fn a_crowd_of_silent_strangers_does_not_delay_a_peer() {
    for configs in [configs(world(2), PATIENT), encrypted(world(2), PATIENT)] {
        let address = configs[1].1.address();
        let crowd: Vec<_> = (0..500).map(|_| std::net::TcpStream::connect(address).expect("listening")).collect();
        let start = crate::clock::now();
        std::thread::scope(|scope| {
            for (config, port) in configs {
                scope.spawn(move || connect(config, port).expect("connected").barrier().expect("both are there"));
            }
        });
        assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
        drop(crowd);
    }
}
