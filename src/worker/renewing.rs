//! The lease: renewed for as long as the process lives, whatever the data thread is doing.
//!
//! Owns: a connection of its own, so that a renewal never waits behind another call, and its end where it gets stuck: after lost
//! packets a new connection comes through sooner than an old one's next attempt.
//! Refuses to know: what a rank does that has lost its lease.

use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval, timeout};
use weightcast_proto::v1;

use super::calls::connect;
use super::proc_stat::peak_resident_bytes;
use super::session::Session;
use super::{WorkerConfig, WorkerError};
use crate::rpc::{Clients, is_stale, rank_figures, request, training_progress};
use crate::tasks::Tasks;

/// How long a renewal may take: two fit into a lease of 3 s, with a connection made anew between them.
const RENEWAL_DEADLINE: Duration = Duration::from_millis(1200);

impl Session {
    /// Renews the lease for as long as the process lives.
    pub(super) fn start_renewing(&self, tasks: &mut Tasks) {
        let (config, member) = (self.config.clone(), self.member.subscribe());
        let (watched, stage, every) = (self.watched.subscribe(), self.stage.subscribe(), self.renew_interval);
        let (fenced, mut clients) = (self.fenced.clone(), Some(self.clients.clone()));
        tasks.spawn("renew", async move {
            let mut ticks = interval(every);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                ticks.tick().await;
                let (member_id, watched) = (member.borrow().clone(), watched.borrow().clone());
                let progress = v1::Progress {
                    stage: (*stage.borrow()).to_owned(),
                    done_bytes: watched.done_bytes.load(Ordering::Relaxed),
                    total_bytes: watched.total_bytes.load(Ordering::Relaxed),
                    peak_resident_bytes: peak_resident_bytes(),
                    figures: Some(rank_figures(&watched.figures.now(watched.control.tally()))),
                    training: watched.control.progress().filter(|_| config.rank.0 == 0).as_ref().map(training_progress),
                };
                let renew = v1::RenewRequest { member_id: member_id.clone(), progress: Some(progress) };
                let renewed = timeout(RENEWAL_DEADLINE, renew_once(&mut clients, &config, renew)).await;
                match renewed {
                    Ok(Ok(Renewed::Yes)) => {}
                    Ok(Ok(Renewed::NoMember)) => drop(fenced.send_replace(member_id)),
                    // A lost renewal is made good by the next one, on another connection.
                    Ok(Err(_)) | Err(_) => clients = None,
                }
            }
        });
    }
}

enum Renewed {
    Yes,
    NoMember,
}

async fn renew_once(
    clients: &mut Option<Clients>,
    config: &WorkerConfig,
    message: v1::RenewRequest,
) -> Result<Renewed, WorkerError> {
    let clients = match clients {
        Some(clients) => clients,
        None => clients.insert(connect(config).await?),
    };
    match clients.worker.renew(request(&config.token, message)?).await {
        Ok(_) => Ok(Renewed::Yes),
        Err(status) if is_stale(&status) => Ok(Renewed::NoMember),
        Err(status) => Err(super::calls::refused(config, "renew")(status)),
    }
}
