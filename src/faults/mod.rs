//! Steps at which a test may end this process: `tests/kill_walk.rs` visits all of them.
//!
//! Owns: the named points and what happens there. Refuses to know: what the points are for.
//! Only debug builds have it; in a release build [`point`] is nothing.
//!
//! The directive is `trace=FILE` (append a line `ROLE POINT` at each point) or `kill=ROLE:POINT:N:FILE` (at the Nth visit,
//! from 1, write the time in nanoseconds since 1970 into FILE and end this process with SIGKILL) or
//! `hold=ROLE:POINT:N:FILE` (from the Nth visit on the thread that visits stands still for as long as FILE exists).

/// A step was reached.
#[inline]
pub fn point(name: &'static str) {
    #[cfg(debug_assertions)]
    armed::visit(name);
    #[cfg(not(debug_assertions))]
    let _ = name;
}

/// Takes a directive for a process that plays `role`; nothing happens in a release build, or when it makes no sense.
pub fn arm(directive: Option<&str>, role: &str) {
    #[cfg(debug_assertions)]
    armed::arm(directive, role);
    #[cfg(not(debug_assertions))]
    let _ = (directive, role);
}

#[cfg(debug_assertions)]
mod armed {
    use std::fs::{File, OpenOptions};
    use std::io::Write as _;
    use std::path::PathBuf;
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    use rustix::process::Signal;

    enum Directive {
        Trace { role: String, file: File },
        Kill { point: String, nth: u64, visits: AtomicU64, stamp: PathBuf },
        Hold { point: String, nth: u64, visits: AtomicU64, file: PathBuf },
    }

    /// How often a thread that stands still looks whether it may go on.
    const LOOK: std::time::Duration = std::time::Duration::from_millis(5);

    static DIRECTIVE: OnceLock<Directive> = OnceLock::new();

    pub(super) fn arm(directive: Option<&str>, role: &str) {
        if let Some(directive) = directive.and_then(|text| parse(text, role)) {
            // A process plays one role.
            let _ = DIRECTIVE.set(directive);
        }
    }

    fn parse(text: &str, role: &str) -> Option<Directive> {
        let (action, rest) = text.split_once('=')?;
        if action == "trace" {
            let file = OpenOptions::new().append(true).create(true).open(rest).ok()?;
            return Some(Directive::Trace { role: role.to_owned(), file });
        }
        let mut parts = rest.splitn(4, ':');
        let (wanted, point, nth) = (parts.next()?, parts.next()?.to_owned(), parts.next()?.parse().ok()?);
        let (file, visits) = (PathBuf::from(parts.next()?), AtomicU64::new(0));
        match action {
            "kill" if wanted == role => Some(Directive::Kill { point, nth, visits, stamp: file }),
            "hold" if wanted == role => Some(Directive::Hold { point, nth, visits, file }),
            _ => None,
        }
    }

    pub(super) fn visit(name: &'static str) {
        match DIRECTIVE.get() {
            None => {}
            Some(Directive::Trace { role, file }) => {
                // One write, so that lines of several processes do not mix; a lost line is a step not walked.
                let _ = (&*file).write_all(format!("{role} {name}\n").as_bytes());
            }
            Some(Directive::Kill { point, nth, visits, stamp })
                if point == name && visits.fetch_add(1, Ordering::Relaxed) + 1 == *nth =>
            {
                #[expect(clippy::disallowed_methods, reason = "a test's time stamp is no file of data")]
                let _ = std::fs::write(stamp, crate::clock::unix_ns().to_string());
                let _ = rustix::process::kill_process(rustix::process::getpid(), Signal::KILL);
            }
            Some(Directive::Hold { point, nth, visits, file })
                if point == name && visits.fetch_add(1, Ordering::Relaxed) + 1 >= *nth =>
            {
                while file.exists() {
                    std::thread::park_timeout(LOOK);
                }
            }
            Some(Directive::Kill { .. } | Directive::Hold { .. }) => {}
        }
    }
}
