//! Serves the rendezvous: the sockets around `meeting`.
//!
//! Owns: accepting, one task per connection, beats. Refuses to know: what a message means.

use std::collections::HashMap;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc::{self, error::TrySendError};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::meeting::{ConnectionId, Effect, Event, Meeting, Rules};
use super::messages::{ToLauncher, ToMeeting};
use super::wire::{Side, WireError, shake_hands};
use super::{BEAT, TICK};
use crate::clock;

/// How long a stranger may take to say who it is.
const INTRODUCTION: Duration = Duration::from_secs(5);
/// How long a launcher may take to close after it was told to.
const LINGER: Duration = Duration::from_secs(2);
/// No job has more launchers; connections beyond it are not accepted.
const CONNECTIONS_LIMIT: usize = 16 * 1024;
/// Messages that wait for one launcher.
const OUTBOX: usize = 64;

/// Serves until the job is over and everybody has been told. Every task it starts ends with it.
pub(super) async fn serve(listener: TcpListener, rules: Rules, token: Vec<u8>) {
    let (inbox_sender, mut inbox) = mpsc::channel(256);
    let (mut tasks, mut connections) = (JoinSet::new(), HashMap::<ConnectionId, Connection>::new());
    let mut meeting = Meeting::new(rules, clock::now());
    let (mut ticks, mut beats, mut last_id) = (interval(TICK), interval(BEAT), 0);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while !meeting.is_over() {
        // Messages come before ticks: what has arrived is heard before anyone is called silent. All branches are cancel safe.
        let event = tokio::select! {
            biased;
            Some(event) = inbox.recv() => event,
            Some(_) = tasks.join_next() => continue,
            Ok((stream, peer)) = listener.accept(), if tasks.len() < CONNECTIONS_LIMIT => {
                last_id += 1;
                let (outbox, queue) = mpsc::channel(OUTBOX);
                let peer = Peer { id: last_id, address: peer.ip().to_canonical().to_string() };
                let task = tasks.spawn(attend(peer, stream, token.clone(), inbox_sender.clone(), queue));
                connections.insert(last_id, Connection { outbox, task });
                continue;
            }
            _ = beats.tick() => {
                // A full queue means that the launcher has enough to read.
                connections.values().for_each(|connection| drop(connection.outbox.try_send(ToLauncher::Beat)));
                continue;
            }
            _ = ticks.tick() => Event::Tick,
        };
        if let Event::Closed { from } = &event {
            connections.remove(from);
        }
        let mut events = vec![event];
        while let Some(event) = events.pop() {
            for effect in meeting.apply(clock::now(), event) {
                events.extend(perform(effect, &mut connections));
            }
        }
    }
    connections.clear();
    drop(inbox);
    let all_closed = async { while tasks.join_next().await.is_some() {} };
    let _ = timeout(LINGER, all_closed).await;
}

/// Performs an effect; a launcher that does not read is as good as gone.
fn perform(effect: Effect, connections: &mut HashMap<ConnectionId, Connection>) -> Option<Event> {
    match effect {
        Effect::Send { to, message } => match connections.get(&to)?.outbox.try_send(message) {
            Ok(()) | Err(TrySendError::Closed(_)) => None,
            Err(TrySendError::Full(_)) => {
                connections.remove(&to);
                Some(Event::Closed { from: to })
            }
        },
        // The connection's task sends what is queued, then closes.
        Effect::Close { to } => {
            connections.remove(&to);
            None
        }
        Effect::Cut { to } => {
            if let Some(connection) = connections.remove(&to) {
                connection.task.abort();
            }
            None
        }
    }
}

struct Connection {
    outbox: mpsc::Sender<ToLauncher>,
    task: AbortHandle,
}

struct Peer {
    id: ConnectionId,
    address: String,
}

/// The life of one connection.
async fn attend(
    peer: Peer,
    stream: TcpStream,
    token: Vec<u8>,
    inbox: mpsc::Sender<Event>,
    queue: mpsc::Receiver<ToLauncher>,
) {
    let from = peer.id;
    // The result says nothing that the end of the connection does not.
    let _ = converse(peer, stream, &token, &inbox, queue).await;
    let _ = inbox.send(Event::Closed { from }).await;
}

async fn converse(
    peer: Peer,
    stream: TcpStream,
    token: &[u8],
    inbox: &mpsc::Sender<Event>,
    mut queue: mpsc::Receiver<ToLauncher>,
) -> Result<(), WireError> {
    let _ = stream.set_nodelay(true);
    let (reader, writer) = stream.into_split();
    let late = |_| WireError::Connection(std::io::ErrorKind::TimedOut.into());
    let introduction = async {
        let (mut reader, writer) = shake_hands(reader, writer, Side::Meeting, token).await?;
        let first = reader.receive::<ToMeeting>().await;
        Ok::<_, WireError>((reader, writer, first))
    };
    let (mut reader, mut writer, first) = timeout(INTRODUCTION, introduction).await.map_err(late)??;
    let mut first = match first {
        Ok(message) => message,
        Err(error) => {
            // A frame that the other side cannot verify tells it that the tokens differ.
            let _ = timeout(INTRODUCTION, writer.send(&ToLauncher::Beat)).await;
            return Err(error);
        }
    };
    if let ToMeeting::Join(join) = &mut first {
        join.address.get_or_insert(peer.address);
    }
    let from = peer.id;
    let reading = async {
        let mut message = first;
        while inbox.send(Event::Message { from, message }).await.is_ok() {
            message = reader.receive().await?;
        }
        Ok::<_, WireError>(())
    };
    let writing = async {
        while let Some(message) = queue.recv().await {
            writer.send(&message).await?;
        }
        writer.finish().await
    };
    tokio::pin!(reading, writing);
    tokio::select! {
        result = &mut reading => result,
        result = &mut writing => {
            // Closing with something unread would reset the connection and lose what was just sent.
            let _ = timeout(LINGER, reading).await;
            result
        }
    }
}
