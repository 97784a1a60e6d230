//! Takes part in the rendezvous: finds it, or serves it, joins, and carries words and beats.
//!
//! Owns: the rule who serves. Node 0 serves when the endpoint is its own address; a node of unknown rank serves when it can
//! bind the endpoint's address, which works on the one host that has it, for the one launcher that comes first.
//! - RV-3: an endpoint that cannot be found or reached is tried again until the time to join is over, and what is waited for
//!   is said; there is no fall-back to another address.
//! - RV-4: without a token, only loopback addresses are served or joined, unless that was allowed.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use tokio::net::{TcpListener, TcpSocket, TcpStream, lookup_host};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

use super::messages::{ToLauncher, ToMeeting};
use super::wire::{Side, WireError, shake_hands};
use super::{BEAT, FAREWELL, Part, server};
use crate::clock;

/// How long one attempt to connect may take.
const CONNECT: Duration = Duration::from_secs(3);
/// Between two attempts: at least this, and as much again by chance, so that nodes do not come in step.
const PAUSE_MS: u64 = 100;
/// After this long without a word of the rendezvous, a port of node 0's own that it cannot bind is somebody else's. Until
/// then it may be that of a launcher that is about to end.
const TAKEN: Duration = Duration::from_millis(600);
/// Something is said about what is waited for after the first failure, and then this often.
const REMINDER: Duration = Duration::from_secs(15);

/// What a launcher learns.
#[derive(Debug)]
pub(crate) enum News {
    /// For people.
    Note(String),
    /// A message that is no beat.
    Message(ToLauncher),
    /// Refused, for good.
    Refused(String),
    /// Not found in time, or lost.
    Lost(String),
}

/// Takes part until the job is over, the rendezvous is lost, or the launcher leaves.
pub(super) async fn take_part(part: Part, mut words: mpsc::Receiver<ToMeeting>, news: mpsc::Sender<News>) {
    let mut served = JoinSet::new();
    let outcome = join_and_talk(part, &mut served, &mut words, &news).await;
    if let Err(last) = outcome {
        let _ = news.send(last).await;
    }
    // A job that is over lets the server end by itself, when all have heard of it; a launcher that leaves takes it away.
    let _ = timeout(FAREWELL, async { while served.join_next().await.is_some() {} }).await;
}

async fn join_and_talk(
    mut part: Part,
    served: &mut JoinSet<()>,
    words: &mut mpsc::Receiver<ToMeeting>,
    news: &mpsc::Sender<News>,
) -> Result<(), News> {
    let deadline = clock::now().monotonic.saturating_add(part.rules.join_timeout);
    let mut next_reminder = Duration::ZERO;
    let taken_deadline = clock::now().monotonic.saturating_add(TAKEN);
    loop {
        let mut is_taken = false;
        let failure = match find(&mut part, served, &mut is_taken).await {
            Ok(stream) => match talk(&part, stream, words, news).await {
                Talk::Ended => return Ok(()),
                Talk::Lost(text) => return Err(News::Lost(text)),
                Talk::Stranger(text) => text,
                Talk::NotYet(text) => {
                    is_taken = false;
                    text
                }
            },
            Err(Find::Forbidden(text)) => return Err(News::Refused(text)),
            Err(Find::NotYet(text)) => text,
        };
        let now = clock::now().monotonic;
        if is_taken && now >= taken_deadline {
            let text =
                format!("its port is taken, and not by the rendezvous of this job ({failure}): give another port");
            return Err(News::Refused(text));
        }
        if now >= deadline {
            return Err(News::Lost(format!("{failure}, until the time to join was over")));
        }
        if now >= next_reminder {
            next_reminder = now + REMINDER;
            let _ = news.send(News::Note(format!("waiting for the rendezvous at {}: {failure}", part.endpoint))).await;
        }
        let pause = sleep(Duration::from_millis(PAUSE_MS + random_below(PAUSE_MS)));
        // The launcher may leave while it waits.
        tokio::select! {
            () = pause => {}
            () = news.closed() => return Ok(()),
        }
    }
}

enum Find {
    NotYet(String),
    Forbidden(String),
}

/// Serves the rendezvous if that is this launcher's task, and connects to it. Sets `is_taken` when it is node 0's task, and
/// somebody has the port.
async fn find(part: &mut Part, served: &mut JoinSet<()>, is_taken: &mut bool) -> Result<TcpStream, Find> {
    let (host, port) = (part.endpoint.host.clone(), part.endpoint.port);
    if served.is_empty() && part.join.node_rank == Some(0) && !is_loopback_name(&host) {
        // Its own name need not be known yet, and may be that of a service in front of it.
        for any in [IpAddr::V6(Ipv6Addr::UNSPECIFIED), IpAddr::V4(Ipv4Addr::UNSPECIFIED)] {
            if serve(part, served, SocketAddr::new(any, port), is_taken)? {
                break;
            }
        }
    }
    if !served.is_empty() && !is_loopback_name(&host) {
        let here = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
        return connect(here).await.map_err(|error| Find::NotYet(error.to_string()));
    }
    let addresses = lookup_host((host.as_str(), port)).await;
    let addresses: Vec<_> =
        addresses.map_err(|error| Find::NotYet(format!("cannot resolve {host}: {error}")))?.collect();
    let may_serve = part.join.node_rank.is_none_or(|rank| rank == 0);
    let mut failure = format!("{host} has no address");
    for address in addresses {
        if served.is_empty() && may_serve {
            serve(part, served, address, is_taken)?;
        }
        permit(part, address.ip())?;
        match connect(address).await {
            Ok(stream) => return Ok(stream),
            Err(error) => failure = format!("cannot connect to {address}: {error}"),
        }
    }
    Err(Find::NotYet(failure))
}

/// Binds and serves; `false` when the address is not here, or taken, which means that somebody else serves.
fn serve(part: &mut Part, served: &mut JoinSet<()>, address: SocketAddr, is_taken: &mut bool) -> Result<bool, Find> {
    let bind = || {
        let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        // A job that follows another on the same port must not wait for the old connections to be forgotten.
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(1024)
    };
    let listener: TcpListener = match bind() {
        Ok(listener) => listener,
        Err(error) => {
            *is_taken |= part.join.node_rank == Some(0) && error.kind() == std::io::ErrorKind::AddrInUse;
            return Ok(false);
        }
    };
    permit(part, address.ip())?;
    // Rank 0 may be here, and is then reached by the name that all nodes know.
    part.join.address.get_or_insert_with(|| part.endpoint.host.clone());
    served.spawn(server::serve(listener, part.rules.clone(), part.token.clone().unwrap_or_default()));
    Ok(true)
}

fn permit(part: &Part, address: IpAddr) -> Result<(), Find> {
    if part.token.is_some() || part.is_insecure || address.to_canonical().is_loopback() {
        return Ok(());
    }
    let text =
        format!("{address} is open to others: give --rdzv-token-file, or --rdzv-insecure on a network you trust");
    Err(Find::Forbidden(text))
}

fn is_loopback_name(host: &str) -> bool {
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

async fn connect(address: SocketAddr) -> std::io::Result<TcpStream> {
    let stream = timeout(CONNECT, TcpStream::connect(address)).await.map_err(|_| std::io::ErrorKind::TimedOut)??;
    stream.set_nodelay(true)?;
    Ok(stream)
}

enum Talk {
    /// The job is over, or the launcher has left.
    Ended,
    /// It had begun.
    Lost(String),
    /// Whoever answers does not speak as a rendezvous of this job does.
    Stranger(String),
    /// Refused, or lost before anything began; to be tried again.
    NotYet(String),
}

async fn talk(
    part: &Part,
    stream: TcpStream,
    words: &mut mpsc::Receiver<ToMeeting>,
    news: &mpsc::Sender<News>,
) -> Talk {
    let (reader, writer) = stream.into_split();
    let token = part.token.as_deref().unwrap_or_default();
    let hands = timeout(CONNECT, shake_hands(reader, writer, Side::Launcher, token)).await;
    let (mut reader, mut writer) = match hands {
        Ok(Ok(channels)) => channels,
        Ok(Err(error)) => return Talk::Stranger(crate::chain(&error)),
        Err(_) => return Talk::Stranger("it does not answer".to_owned()),
    };
    let mut is_member = false;
    let reading = async {
        loop {
            // Not cancel safe, but a silence ends the connection.
            let message = match timeout(part.rules.silence, reader.receive()).await {
                Ok(Ok(message)) => message,
                Ok(Err(error @ WireError::Forged)) => {
                    let _ = news.send(News::Refused(error.to_string())).await;
                    return Talk::Ended;
                }
                Ok(Err(error)) => return lost(is_member, crate::chain(&error)),
                Err(_) => return lost(is_member, format!("silent for {:.1} s", part.rules.silence.as_secs_f64())),
            };
            is_member |= matches!(message, ToLauncher::Start(_));
            match message {
                ToLauncher::Beat => {}
                ToLauncher::Refused { reason, may_retry: true } => return Talk::NotYet(reason),
                ToLauncher::Refused { reason, may_retry: false } => {
                    let _ = news.send(News::Refused(reason)).await;
                    return Talk::Ended;
                }
                over @ ToLauncher::Over(_) => {
                    let _ = news.send(News::Message(over)).await;
                    return Talk::Ended;
                }
                message => drop(news.send(News::Message(message)).await),
            }
        }
    };
    let writing = async {
        let mut beats = interval(BEAT);
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut result = writer.send(&ToMeeting::Join(part.join.clone())).await;
        while result.is_ok() {
            result = tokio::select! {
                word = words.recv() => match word {
                    Some(word) => writer.send(&word).await,
                    // The launcher has left. Closing says so to the others.
                    None => return,
                },
                _ = beats.tick() => writer.send(&ToMeeting::Beat).await,
            };
        }
        // The reader learns the same, and better.
        std::future::pending::<()>().await;
    };
    tokio::select! {
        talk = reading => talk,
        () = writing => Talk::Ended,
    }
}

fn lost(is_member: bool, text: String) -> Talk {
    if is_member { Talk::Lost(text) } else { Talk::NotYet(text) }
}

fn random_below(bound: u64) -> u64 {
    let mut bytes = [0_u8; 8];
    // Without randomness, nodes come in step, which is slower and no more.
    let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    u64::from_ne_bytes(bytes).checked_rem(bound).unwrap_or(0)
}
