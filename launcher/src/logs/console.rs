//! Writes to this process's standard output and standard error without ever waiting long for a reader.
//!
//! Owns: the rule LG-2: a reader that takes nothing for [`STALL`] loses lines until it reads again; it is told how many.
//! A slow reader that does read slows the ranks down, as it would without a launcher.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::Stream;

/// How long nothing may move before lines are dropped.
const STALL: Duration = Duration::from_millis(500);
/// A pipe that polls as writable takes this many bytes without blocking (PIPE_BUF).
const PIECE: usize = 4096;

/// The two outputs.
#[derive(Debug, Default)]
pub(crate) struct Console {
    out: Output,
    err: Output,
}

#[derive(Debug, Default)]
struct Output {
    is_stalled: bool,
    is_closed: bool,
    dropped_bytes: u64,
}

impl Console {
    /// Writes bytes that end with the end of a line.
    pub(crate) fn write(&mut self, stream: Stream, bytes: &[u8]) {
        match stream {
            Stream::Stdout => self.out.write(std::io::stdout().as_fd(), bytes),
            Stream::Stderr => self.err.write(std::io::stderr().as_fd(), bytes),
        }
    }
}

impl Output {
    fn write(&mut self, fd: BorrowedFd<'_>, bytes: &[u8]) {
        if self.is_closed {
            return;
        }
        if self.is_stalled && is_writable(fd, Duration::ZERO) {
            self.is_stalled = false;
            let notice =
                format!("\n[launcher] {} bytes were not shown: nobody read\n", std::mem::take(&mut self.dropped_bytes));
            self.put(fd, notice.as_bytes());
        }
        self.put(fd, bytes);
    }

    fn put(&mut self, fd: BorrowedFd<'_>, mut bytes: &[u8]) {
        while !bytes.is_empty() && !self.is_closed {
            if self.is_stalled || !is_writable(fd, STALL) {
                self.is_stalled = true;
                self.dropped_bytes = self.dropped_bytes.saturating_add(u64::try_from(bytes.len()).unwrap_or(u64::MAX));
                return;
            }
            let piece = bytes.get(..PIECE).unwrap_or(bytes);
            match rustix::io::write(fd, piece) {
                Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
                Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
                Err(_) => self.is_closed = true,
            }
        }
    }
}

fn is_writable(fd: BorrowedFd<'_>, timeout: Duration) -> bool {
    let timeout = Timespec { tv_sec: 0, tv_nsec: i64::from(timeout.subsec_nanos()) };
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::OUT)];
    // A hang-up also counts: the write then fails, which closes the output.
    matches!(poll(&mut fds, Some(&timeout)), Ok(1..))
}
