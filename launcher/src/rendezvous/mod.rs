//! The agreement of the launchers of several nodes: who starts which ranks, that all end together, and what the job ends with.
//!
//! Owns: one thread with a runtime of its own, so that neither a busy embedding program nor slow logs delay a beat. The
//! launcher whose address is the endpoint serves the meeting; every launcher, that one too, takes part over TCP.
//! Refuses to know: the processes of ranks.
//!
//! Beats every 200 ms in both directions; 3 s of silence mean loss. With 32 busy processes on two processors, two nodes lived
//! through 60 s without a false alarm; a stopped launcher was noticed after 3.0 to 3.1 s.

mod client;
mod meeting;
mod messages;
mod server;
mod wire;

use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

pub(crate) use client::News;
pub(crate) use meeting::Rules;
pub(crate) use messages::{Cause, Join, Over, Seat, ToLauncher, ToMeeting};

use crate::error::LaunchError;
use crate::layout::Endpoint;

/// How often each side says that it is there.
const BEAT: Duration = Duration::from_millis(200);
/// How often the rendezvous looks who is silent.
const TICK: Duration = Duration::from_millis(100);
/// torchrun's time for all nodes to come.
const JOIN_TIMEOUT: Duration = Duration::from_secs(600);
/// torchrun's 30 s are long for a node that is on its way already.
const LAST_CALL: Duration = Duration::from_secs(5);
/// Noticed within 3.5 s in all: beat, tick and the way of the message come on top.
const SILENCE: Duration = Duration::from_secs(3);
/// How long the end may take to be told to all, after the job is over.
const FAREWELL: Duration = Duration::from_secs(3);

/// How the nodes of a job meet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gathering {
    /// A file whose content every node must know.
    pub token_file: Option<PathBuf>,
    /// Whether strangers may take part when there is no token and the address is not a loopback one.
    pub is_insecure: bool,
    /// How long all nodes may take to come.
    pub join_timeout: Duration,
    /// How long to wait for more nodes when enough have come.
    pub last_call: Duration,
    /// How long a node may be silent.
    pub silence: Duration,
    /// The address of this node as the others see it.
    pub local_addr: Option<String>,
}

impl Default for Gathering {
    fn default() -> Self {
        Self {
            token_file: None,
            is_insecure: false,
            join_timeout: JOIN_TIMEOUT,
            last_call: LAST_CALL,
            silence: SILENCE,
            local_addr: None,
        }
    }
}

/// What a member needs to take part.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    pub(crate) endpoint: Endpoint,
    pub(crate) join: Join,
    pub(crate) rules: Rules,
    pub(crate) token: Option<Vec<u8>>,
    pub(crate) is_insecure: bool,
}

/// This launcher's part in the rendezvous. Dropping it leaves, which ends the job on all nodes if it is not over.
#[derive(Debug)]
pub(crate) struct Member {
    endpoint: String,
    words: mpsc::Sender<ToMeeting>,
    news: mpsc::Receiver<News>,
    ended: oneshot::Receiver<std::convert::Infallible>,
}

impl Member {
    /// Starts the thread that takes part.
    pub(crate) fn start(part: Part) -> Result<Self, LaunchError> {
        let system = |action: &'static str| move |source| LaunchError::System { action, source };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(system("start a runtime"))?;
        let endpoint = part.endpoint.to_string();
        let (words, heard) = mpsc::channel(16);
        let (told, news) = mpsc::channel(64);
        let (guard, ended) = oneshot::channel();
        let body = move || {
            runtime.block_on(client::take_part(part, heard, told));
            // A name that is still being resolved must not hold the thread.
            runtime.shutdown_background();
            drop(guard);
        };
        // Joined by `leave`, through the guard and with a deadline.
        std::thread::Builder::new().name("rendezvous".to_owned()).spawn(body).map_err(system("start a thread"))?;
        Ok(Self { endpoint, words, news, ended })
    }

    /// Where the nodes meet.
    pub(crate) fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Says something to the rendezvous. If it is lost, the news say so.
    pub(crate) async fn say(&self, message: ToMeeting) {
        let _ = self.words.send(message).await;
    }

    /// What the rendezvous says next; `None` when it has nothing more to say. Cancel safe.
    pub(crate) async fn hear(&mut self) -> Option<News> {
        self.news.recv().await
    }

    /// Leaves; when this launcher serves, after everybody has been told of the end.
    pub(crate) async fn leave(self) {
        drop((self.words, self.news));
        let _ = tokio::time::timeout(FAREWELL, self.ended).await;
    }
}
