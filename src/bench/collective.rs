//! Collectives of the TCP backend on loopback, beside one plain TCP stream.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use super::{BenchError, Figure, GIGA, float, limits, median_s};
use crate::comm::tcp::{DEFAULT_DEADLINE, TcpCommunicator, TcpConfig, TcpPort, connect};
use crate::comm::{CommError, Communicator, Group, Scatter};
use crate::device::{Slice, SliceMut};
use crate::types::{Generation, Rank, WorldSize, as_u64};

const BYTES: usize = 256 << 20;
const CHUNK: usize = 1 << 20;
const RUNS: usize = 5;

/// GB/s of broadcast and scatter from rank 0 to the others of `world` ranks (threads of this process).
///
/// # Errors
/// [`BenchError`].
pub fn collective(world: WorldSize) -> Result<Vec<Figure>, BenchError> {
    let socket = median_s(RUNS, || limits::socket(BYTES))?;
    let limit = (float(as_u64(BYTES)) / socket / GIGA, "one plain TCP stream");
    let gigabytes = float(as_u64(BYTES)) / GIGA;
    let broadcast = median_s(RUNS, || run(world, broadcast_all))?;
    let scatter = median_s(RUNS, || run(world, scatter_all))?;
    Ok(vec![
        Figure::new(format!("broadcast to {world} ranks"), gigabytes / broadcast, "GB/s", limit),
        Figure::new(format!("scatter to {world} ranks"), gigabytes / scatter, "GB/s", limit),
    ])
}

fn broadcast_all(comm: &mut TcpCommunicator, buffer: &mut [u8]) -> Result<(), CommError> {
    buffer.chunks_mut(CHUNK).try_for_each(|chunk| comm.broadcast(Rank::ZERO, SliceMut::from(chunk)))
}

fn scatter_all(comm: &mut TcpCommunicator, buffer: &mut [u8]) -> Result<(), CommError> {
    let Group { rank, world } = comm.group();
    let owners = world.count().saturating_sub(1).max(1);
    for (index, chunk) in buffer.chunks_mut(CHUNK).enumerate() {
        let owner = index % owners + 1;
        if rank == Rank::ZERO && world.get() > 1 {
            let parts: Vec<Slice<'_>> =
                (0..world.count()).map(|peer| Slice::from(if peer == owner { &*chunk } else { &[] })).collect();
            comm.scatter(Rank::ZERO, Scatter::Send { parts: &parts })?;
        } else if rank.index() == owner {
            comm.scatter(Rank::ZERO, Scatter::Receive { into: SliceMut::from(chunk) })?;
        }
    }
    Ok(())
}

/// The time from a barrier to a barrier on rank 0.
fn run(
    world: WorldSize,
    work: fn(&mut TcpCommunicator, &mut [u8]) -> Result<(), CommError>,
) -> Result<Duration, BenchError> {
    let ports: Result<Vec<TcpPort>, _> =
        world.ranks().map(|_| TcpPort::bind(IpAddr::V4(Ipv4Addr::LOCALHOST))).collect();
    let ports = ports.map_err(BenchError::of)?;
    let peers: Vec<_> = ports.iter().map(TcpPort::address).collect();
    std::thread::scope(|scope| {
        let ranks: Vec<_> = world
            .ranks()
            .zip(ports)
            .map(|(rank, port)| {
                let config = TcpConfig {
                    group: Group { rank, world },
                    generation: Generation(1),
                    secret: [7; 32],
                    peers: peers.clone(),
                    tls: None,
                    deadline: DEFAULT_DEADLINE,
                    idle_deadline: DEFAULT_DEADLINE,
                };
                scope.spawn(move || -> Result<Duration, CommError> {
                    let mut comm = connect(config, port)?;
                    let mut buffer = vec![1; BYTES];
                    comm.barrier()?;
                    let start = crate::clock::now();
                    work(&mut comm, &mut buffer)?;
                    comm.barrier()?;
                    Ok(start.elapsed())
                })
            })
            .collect();
        let mut first = Duration::ZERO;
        for (rank, handle) in ranks.into_iter().enumerate() {
            let time = handle.join().map_err(|_| BenchError("a rank panicked".into()))?.map_err(BenchError::of)?;
            if rank == 0 {
                first = time;
            }
        }
        Ok(first)
    })
}
