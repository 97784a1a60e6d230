//! Hosts for tests: network namespaces whose packets pass through the test, which drops and delays them.
//!
//! Owns: [`Net`], its [`Host`]s and the weather between them. Refuses to know: what runs there.
//!
//! - `NT-1`: a host is a user, network, mount and host-name namespace of its own, with loopback and one TUN device. It needs
//!   no rights but that of making user namespaces. A process that does nothing holds it and ends when the [`Host`] goes,
//!   or when the test's process does, however that ends.
//! - `NT-2`: the TUN devices' other ends are in this process, and a thread of [`Net`] carries every packet from one to the
//!   other. So cutting, delaying and losing need nothing of the kernel: no netem, no filter.
//! - `NT-3`: who is dropped follows from the rules and from the seed; when follows from the clock.
//! - Hosts know each other by name: all have the same `/etc/hosts`, which grows with the net.
//!
//! ```no_run
//! let net = weightcast_test_net::Net::new(7)?;
//! let (a, b) = (net.host("a")?, net.host("b")?);
//! let mut ping = a.command("ping").arg(b.address().to_string()).spawn().expect("it starts");
//! net.isolate(&b);
//! net.heal();
//! # ping.wait().expect("it ends");
//! # Ok::<(), weightcast_test_net::NetError>(())
//! ```

mod namespace;
mod rules;
mod switch;

use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use namespace::Namespace;
pub use rules::{Random, Weather};
pub use switch::Counts;
use switch::Switch;

/// Set to 1 where no namespaces can be made.
const NO_NAMESPACES: &str = "WEIGHTCAST_NO_NAMESPACES";
/// The net of all hosts; each [`Net`] has its own, because nothing connects them.
const PREFIX: [u8; 3] = [10, 77, 0];
/// Addresses end in 1 to this.
const HOSTS_LIMIT: usize = 250;

/// A host or the net could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetError {
    /// The kernel or its settings refuse.
    #[error(
        "host {host}: cannot {action}: {source}; these tests need user namespaces and /dev/net/tun: allow them, or set \
         {NO_NAMESPACES}=1 to skip the tests"
    )]
    NotPermitted {
        /// The host.
        host: String,
        /// What was tried.
        action: &'static str,
        /// The system's error.
        source: std::io::Error,
    },
    /// Loopback, address or names could not be set up.
    #[error("host {host}: setting up its network (with ip and mount): {said}")]
    SetUp {
        /// The host.
        host: String,
        /// What the tools said.
        said: String,
    },
    /// The net has as many hosts as it can have.
    #[error("host {host}: expected at most {HOSTS_LIMIT} hosts")]
    Full {
        /// The host.
        host: String,
    },
    /// Anything else that the system refuses.
    #[error("cannot {action}: {source}")]
    System {
        /// What was tried.
        action: &'static str,
        /// The system's error.
        source: std::io::Error,
    },
}

/// Whether tests on namespaces are to run here; says so on stderr when they are not.
#[must_use]
#[expect(clippy::disallowed_methods, clippy::print_stderr, reason = "tests are told by their environment, and say it")]
pub fn is_wanted() -> bool {
    let is_refused = std::env::var_os(NO_NAMESPACES).is_some_and(|value| value == "1");
    if is_refused {
        eprintln!("skipped: {NO_NAMESPACES}=1");
    }
    !is_refused
}

/// A net of hosts.
#[derive(Debug)]
pub struct Net {
    switch: Switch,
    names: tempfile::NamedTempFile,
}

impl Net {
    /// A net without hosts, on which every packet passes. Losses and delays follow from `seed`, which the caller prints.
    ///
    /// # Errors
    /// [`NetError::System`].
    pub fn new(seed: u64) -> Result<Self, NetError> {
        let failed = |source| NetError::System { action: "write the hosts' names", source };
        let mut names = tempfile::NamedTempFile::new().map_err(failed)?;
        names.write_all(b"127.0.0.1 localhost\n::1 localhost\n").map_err(failed)?;
        Ok(Self { switch: Switch::start(seed)?, names })
    }

    /// Makes a host. Its name is known to all hosts, and is its host name; names with points are known without them too.
    ///
    /// # Errors
    /// [`NetError`].
    pub fn host(&self, name: &str) -> Result<Host, NetError> {
        let index = self.switch.hosts();
        let last = u8::try_from(index + 1).ok().filter(|_| index < HOSTS_LIMIT);
        let last = last.ok_or_else(|| NetError::Full { host: name.to_owned() })?;
        let address = Ipv4Addr::new(PREFIX[0], PREFIX[1], PREFIX[2], last);
        let short = name.split('.').next().unwrap_or(name);
        let failed = |source| NetError::System { action: "write the hosts' names", source };
        // Written in place: the hosts have mounted this very file.
        writeln!(self.names.as_file(), "{address} {name} {short}").map_err(failed)?;
        let (namespace, device) = Namespace::open(short, address, self.names.path())?;
        self.switch.plug(address, device)?;
        Ok(Host { name: name.to_owned(), address, namespace: Arc::new(namespace) })
    }

    /// Drops all packets between two hosts.
    pub fn cut(&self, one: &Host, other: &Host) {
        self.cut_one_way(one, other);
        self.cut_one_way(other, one);
    }

    /// Drops the packets from one host to another; what goes back passes.
    pub fn cut_one_way(&self, from: &Host, to: &Host) {
        self.switch.change(|rules| rules.cut(from.address, to.address));
    }

    /// Drops all packets from and to a host.
    pub fn isolate(&self, host: &Host) {
        self.switch.change(|rules| rules.isolate(host.address));
    }

    /// Delays and loses packets on every link.
    pub fn set_weather(&self, weather: Weather) {
        self.switch.change(|rules| rules.set_weather(Some(weather)));
    }

    /// Everything passes again, at once.
    pub fn heal(&self) {
        self.switch.change(rules::Rules::heal);
    }

    /// Packets so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.switch.counts()
    }
}

/// A host. Clones are the same host, which is there until the last of them goes.
#[derive(Clone, Debug)]
pub struct Host {
    name: String,
    address: Ipv4Addr,
    namespace: Arc<Namespace>,
}

impl Host {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its address on the net.
    #[must_use]
    pub const fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// A program that will run on this host.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        self.adopt(Command::new(program))
    }

    /// The same command, to run on this host.
    #[must_use]
    pub fn adopt(&self, mut command: Command) -> Command {
        self.namespace.enter(&mut command);
        command
    }

    /// Listens on this host, in this process.
    ///
    /// # Errors
    /// The system's.
    pub fn listen(&self, port: u16) -> std::io::Result<TcpListener> {
        let socket = self.namespace.socket()?;
        rustix::net::bind(&socket, &SocketAddr::new(self.address.into(), port))?;
        rustix::net::listen(&socket, 16)?;
        Ok(socket.into())
    }

    /// Connects from this host, in this process.
    ///
    /// # Errors
    /// The system's, or that it took longer than `limit`.
    pub fn connect(&self, address: SocketAddr, limit: Duration) -> std::io::Result<TcpStream> {
        let socket = self.namespace.socket()?;
        namespace::connect(&socket, address, limit)?;
        Ok(socket.into())
    }
}
