//! The signals that ask this rank to end, SIGTERM and SIGHUP: its host is being taken away, or its launcher's connection.
//!
//! Owns: hearing it, telling the coordinator, and the word whether that was done. Refuses to know: what is saved before the end.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use super::calls::{connect, drain};
use super::proc_stat::ignores_hangup;
use super::{WorkerConfig, WorkerError};
use crate::tasks::Tasks;

/// A launcher that lost a rank sends this signal to the others too; then the session ends meanwhile.
const CULPRIT_FIRST: Duration = Duration::from_millis(200);

/// See the module. Clones share it.
#[derive(Clone, Default)]
pub(super) struct Leaving(Arc<Shared>);

#[derive(Default)]
struct Shared {
    asked: watch::Sender<Asked>,
    member: Mutex<Option<watch::Receiver<String>>>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Asked {
    #[default]
    No,
    Yes,
    /// And the coordinator knows, if it can be reached.
    Told,
}

impl Leaving {
    /// On a signal asks the coordinator for an orderly end: of the job when all ranks are asked, else of this rank.
    pub(super) fn on_signals(config: &WorkerConfig, tasks: &mut Tasks) -> Result<Self, WorkerError> {
        let mut terminate = signal(SignalKind::terminate())
            .map_err(|source| WorkerError::System { what: "handling SIGTERM", source })?;
        // A terminal or a connection that is closed takes the launcher away; who runs under nohup stays.
        let mut hangup = match ignores_hangup() {
            true => None,
            false => Some(
                signal(SignalKind::hangup())
                    .map_err(|source| WorkerError::System { what: "handling SIGHUP", source })?,
            ),
        };
        let leaving = Self::default();
        let (own, config) = (leaving.clone(), config.clone());
        tasks.spawn("leave", async move {
            loop {
                let hung_up = async {
                    match &mut hangup {
                        Some(hangup) => drop(hangup.recv().await),
                        None => std::future::pending().await,
                    }
                };
                tokio::select! {
                    _ = terminate.recv() => {}
                    () = hung_up => {}
                }
                tokio::time::sleep(CULPRIT_FIRST).await;
                own.0.asked.send_replace(Asked::Yes);
                own.tell(&config).await;
                own.0.asked.send_replace(Asked::Told);
            }
        });
        Ok(leaving)
    }

    /// Whether this rank was asked to end.
    pub(super) fn is_asked(&self) -> bool {
        *self.0.asked.borrow() != Asked::No
    }

    /// Returns when this rank was asked to end and the coordinator was told, as far as it can be reached.
    pub(super) async fn left(&self) {
        // The sender is ours.
        let _ = self.0.asked.subscribe().wait_for(|asked| *asked == Asked::Told).await;
    }

    /// The member that this rank is from now on.
    pub(super) fn member_is(&self, member: watch::Receiver<String>) {
        *self.0.member.lock().unwrap_or_else(PoisonError::into_inner) = Some(member);
    }

    /// Tells the coordinator. It hears it again from a rank that finds it again.
    pub(super) async fn tell(&self, config: &WorkerConfig) {
        let member = self.0.member.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(member) = member.map(|member| member.borrow().clone()) else { return };
        let told = match connect(config).await {
            Ok(mut clients) => drain(&mut clients, config, &member).await,
            Err(error) => Err(error.to_string()),
        };
        if let Err(reason) = told {
            tracing::warn!(reason, "the coordinator did not take the request to end");
        }
    }
}
