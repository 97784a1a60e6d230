//! The limits of this machine, measured the plainest way.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::Duration;

use super::{BenchError, timed};
use crate::store::{LocalStore, Store};
use crate::types::{as_u64, as_usize};

const CHUNK: usize = 1 << 20;

/// Time to copy `bytes` between buffers larger than the caches, on one thread.
pub(super) fn copy(bytes: usize) -> Duration {
    let source = vec![1_u8; bytes];
    // Touched before, so that no page fault is counted.
    let mut target = vec![2_u8; bytes];
    let time = timed(|| target.copy_from_slice(&source));
    std::hint::black_box(&target);
    time
}

/// Time to read files from the page cache into a reused buffer, on `threads` threads.
pub(super) fn read(store: &LocalStore, names: &[(String, u64)], threads: u64) -> Result<Duration, BenchError> {
    let start = crate::clock::now();
    std::thread::scope(|scope| {
        let work = |thread: u64| {
            let mut buffer = vec![0; CHUNK];
            for (name, len) in names {
                let file = store.open(name).map_err(BenchError::of)?;
                let mut offset = thread * as_u64(CHUNK);
                while offset < *len {
                    let now = as_usize((len - offset).min(as_u64(CHUNK)));
                    let part = buffer.get_mut(..now).unwrap_or_default();
                    file.read_exact_at(offset, part).map_err(BenchError::of)?;
                    offset += threads * as_u64(CHUNK);
                }
            }
            Ok(())
        };
        let readers: Vec<_> = (0..threads).map(|thread| scope.spawn(move || work(thread))).collect();
        readers
            .into_iter()
            .try_for_each(|reader| reader.join().unwrap_or_else(|_| Err(BenchError("a reader panicked".into()))))
    })?;
    Ok(start.elapsed())
}

/// Time to send `bytes` through one loopback TCP stream into a reused buffer.
pub(super) fn socket(bytes: usize) -> Result<Duration, BenchError> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(BenchError::of)?;
    let address = listener.local_addr().map_err(BenchError::of)?;
    std::thread::scope(|scope| {
        let receiver = scope.spawn(move || -> std::io::Result<()> {
            let (mut stream, _) = listener.accept()?;
            let mut buffer = vec![0; CHUNK];
            let mut left = bytes;
            while left > 0 {
                left -= stream.read(&mut buffer)?.min(left);
            }
            Ok(())
        });
        let mut stream = TcpStream::connect(address).map_err(BenchError::of)?;
        let chunk = vec![7; CHUNK];
        let start = crate::clock::now();
        for _ in 0..bytes / CHUNK {
            stream.write_all(&chunk).map_err(BenchError::of)?;
        }
        drop(stream);
        let received = receiver.join().map_err(|_| BenchError("the receiver panicked".into()))?;
        received.map_err(BenchError::of)?;
        Ok(start.elapsed())
    })
}

/// Time for `writers` threads to write and sync `bytes` in all, each into a file of its own: what fio does.
pub(super) fn disk(directory: &Path, writers: u32, bytes: u64) -> Result<Duration, BenchError> {
    let start = crate::clock::now();
    std::thread::scope(|scope| {
        let work = |writer: u32| {
            let len = bytes / u64::from(writers);
            // Not through `store`, whose own ways of writing are what is measured against this.
            #[expect(clippy::disallowed_methods, reason = "the plainest way is the limit")]
            let file = std::fs::File::create(directory.join(format!("limit-{writer}"))).map_err(BenchError::of)?;
            // fio reserves the room by default, too.
            let reserved = rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, len);
            reserved.map_err(BenchError::of)?;
            let chunk = vec![7; CHUNK];
            let mut offset = 0;
            while offset < len {
                let now = as_usize((len - offset).min(as_u64(CHUNK)));
                file.write_all_at(chunk.get(..now).unwrap_or_default(), offset).map_err(BenchError::of)?;
                offset += as_u64(now);
            }
            file.sync_all().map_err(BenchError::of)
        };
        let running: Vec<_> = (0..writers).map(|writer| scope.spawn(move || work(writer))).collect();
        running
            .into_iter()
            .try_for_each(|one| one.join().unwrap_or_else(|_| Err(BenchError("a writer panicked".into()))))
    })?;
    let time = start.elapsed();
    let store = LocalStore::new(directory);
    for writer in 0..writers {
        store.remove(&format!("limit-{writer}")).map_err(BenchError::of)?;
    }
    Ok(time)
}
