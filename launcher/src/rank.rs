//! The process of one rank, seen from the launcher: a nanny, a socket to it, and two pipes.
//!
//! Owns: starting the nanny and turning what it says into inputs of the attempt.
//! - Dropping a [`RankProcess`] ends the socket, upon which the nanny kills the rank and all that descends from it.

use std::ffi::OsString;
use std::io::{PipeWriter, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::Stdio;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::mpsc;

use crate::attempt::Input;
use crate::command::{FORBIDDEN_VARIABLE, RankCommand};
use crate::config::Nanny;
use crate::error::LaunchError;
use crate::nanny::protocol::{NOTICE_LIMIT, Notice};

/// The name under which a nanny appears in a list of processes.
const NANNY_NAME: &str = "weightcast-nanny";

/// The launcher's end of a nanny.
#[derive(Debug)]
pub(crate) struct RankProcess {
    control: UnixStream,
}

/// What must be followed after the start, by [`follow`].
#[derive(Debug)]
pub(crate) struct Followed {
    index: usize,
    notices: tokio::net::UnixStream,
    child: Child,
}

/// The streams of a rank.
#[derive(Debug)]
pub(crate) struct Streams {
    pub(crate) stdout: PipeWriter,
    pub(crate) stderr: PipeWriter,
}

/// Starts the nanny of rank `index`, with `variables` beside this process's environment and the command's own.
pub(crate) fn start(
    index: usize,
    nanny: &Nanny,
    command: &RankCommand,
    variables: Vec<(&'static str, OsString)>,
    streams: Streams,
) -> Result<(RankProcess, Followed), LaunchError> {
    let system = |action: &'static str| move |source: std::io::Error| LaunchError::System { action, source };
    let (here, there) = UnixStream::pair().map_err(system("make a socket pair"))?;
    let mut process = Command::new(&nanny.program);
    process.args(&nanny.args).arg(&command.program).args(&command.args);
    process.envs(variables).envs(command.environment.iter().map(|(name, value)| (name, value)));
    process.env_remove(FORBIDDEN_VARIABLE);
    process.stdin(Stdio::from(OwnedFd::from(there))).stdout(streams.stdout).stderr(streams.stderr);
    // Out of the terminal's foreground group: a Ctrl-C is for the launcher, which hands it on.
    process.arg0(NANNY_NAME).process_group(0);
    let child = process.spawn().map_err(system("start a nanny"))?;
    let control = here.try_clone().map_err(system("copy a socket"))?;
    here.set_nonblocking(true).map_err(system("make a socket non-blocking"))?;
    let notices = tokio::net::UnixStream::from_std(here).map_err(system("watch a socket"))?;
    Ok((RankProcess { control }, Followed { index, notices, child }))
}

impl RankProcess {
    /// Asks the nanny to pass a signal on; 9 kills the rank and all that descends from it.
    pub(crate) fn signal(&self, number: u8) {
        // The socket's buffer is never full of single bytes; an error means that the nanny is gone, which `follow` reports.
        let _ = (&self.control).write_all(&[number]);
    }
}

/// Reports what the nanny says, and its end, in this order.
pub(crate) async fn follow(followed: Followed, inputs: mpsc::Sender<Input>) {
    let Followed { index, notices, mut child } = followed;
    let mut reader = BufReader::new(notices);
    loop {
        let mut line = Vec::new();
        match (&mut reader).take(NOTICE_LIMIT).read_until(b'\n', &mut line).await {
            Ok(1..) => {}
            Ok(0) | Err(_) => break,
        }
        let input = match serde_json::from_slice(&line) {
            Ok(Notice::Started { pid, at }) => Input::Started { index, pid, at },
            Ok(Notice::Ended { end, at }) => Input::Ended { index, end, at },
            // Only a nanny that was killed in the middle of a line says what is no notice; its end follows.
            Err(_) => continue,
        };
        if inputs.send(input).await.is_err() {
            return;
        }
    }
    // An error means that somebody else has reaped it: it is gone all the same.
    let _ = child.wait().await;
    let _ = inputs.send(Input::Gone { index }).await;
}
