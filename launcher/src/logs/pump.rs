//! Carries the bytes of the ranks' pipes to files, to the console, to events and into tails.
//!
//! Owns: one thread with a runtime of its own, so that a slow disk or a terminal that nobody reads holds up logs only, never
//! the supervision of ranks or a coordinator in the same process.

use std::fs::File;
use std::io::{PipeReader, Write};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::AsyncReadExt;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use super::lines::LineSplitter;
use super::{Console, Stream, Tail};
use crate::events::{Event, EventSink};

/// Bytes read at once: the capacity of a pipe.
const READ_BYTES: usize = 64 * 1024;

/// One stream of one rank.
#[derive(Debug)]
pub(crate) struct Pump {
    pub(crate) reader: PipeReader,
    pub(crate) stream: Stream,
    pub(crate) rank: u32,
    pub(crate) file: Option<File>,
    pub(crate) shown: Option<Shown>,
    pub(crate) events: Option<EventSink>,
    pub(crate) tail: Arc<Mutex<Tail>>,
    /// Dropped when the stream has ended and all of it was handed on.
    pub(crate) done: oneshot::Sender<std::convert::Infallible>,
}

/// The prefix of lines that are shown.
#[derive(Debug)]
pub(crate) struct Shown {
    pub(crate) prefix: String,
}

/// The thread that carries the streams. Dropping it ends the thread as soon as its streams have ended.
#[derive(Debug)]
pub(crate) struct LogThread {
    pumps: mpsc::Sender<Pump>,
}

impl LogThread {
    /// Starts the thread.
    pub(crate) fn start() -> std::io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
        let (pumps, receiver) = mpsc::channel(64);
        // Not joined: a file system that hangs can hold it for ever, and the launcher must end nevertheless. What it has
        // to finish is known from `Pump::done`.
        std::thread::Builder::new()
            .name("rank-logs".to_owned())
            .spawn(move || runtime.block_on(carry_all(receiver)))?;
        Ok(Self { pumps })
    }

    /// Hands a stream to the thread.
    pub(crate) async fn add(&self, pump: Pump) {
        // The thread ends only after this sender, so the channel is open.
        let _ = self.pumps.send(pump).await;
    }
}

async fn carry_all(mut pumps: mpsc::Receiver<Pump>) {
    let console = Arc::new(Mutex::new(Console::default()));
    let mut running = JoinSet::new();
    loop {
        tokio::select! {
            pump = pumps.recv() => match pump {
                Some(pump) => drop(running.spawn(carry(pump, Arc::clone(&console)))),
                None => break,
            },
            Some(_) = running.join_next() => {}
        }
    }
    while running.join_next().await.is_some() {}
}

async fn carry(mut pump: Pump, console: Arc<Mutex<Console>>) {
    let Ok(reader) = tokio::net::unix::pipe::Receiver::from_owned_fd(OwnedFd::from(pump.reader)) else { return };
    let mut reader = reader;
    let mut splitter = LineSplitter::default();
    let mut bytes = vec![0_u8; READ_BYTES];
    let mut text = Vec::new();
    loop {
        // An error of a pipe's read end means the same as its end: nothing more will come.
        let length = reader.read(&mut bytes).await.unwrap_or(0);
        let chunk = bytes.get(..length).unwrap_or_default();
        // A full disk must not stop the rank; what was lost shows as a file that ends early.
        if pump.file.as_mut().is_some_and(|file| file.write_all(chunk).is_err()) {
            pump.file = None;
        }
        text.clear();
        {
            let mut tail = pump.tail.lock().unwrap_or_else(PoisonError::into_inner);
            let mut take = |line: &[u8]| {
                tail.push(line);
                if let Some(shown) = &pump.shown {
                    text.extend_from_slice(shown.prefix.as_bytes());
                    text.extend_from_slice(line);
                    text.push(b'\n');
                }
                if let Some(events) = &pump.events {
                    let line = String::from_utf8_lossy(line).into_owned();
                    events.send(Event::Line { rank: pump.rank, stream: pump.stream, text: line });
                }
            };
            if length == 0 { splitter.finish(&mut take) } else { splitter.push(chunk, &mut take) }
        }
        if !text.is_empty() {
            console.lock().unwrap_or_else(PoisonError::into_inner).write(pump.stream, &text);
        }
        if length == 0 {
            break;
        }
    }
    drop(pump.done);
}
