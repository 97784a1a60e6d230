//! Two hosts on one machine: what passes between them, what does not, and that nothing is left of them.
#![expect(clippy::disallowed_methods, reason = "tests measure time and look at processes")]

use std::io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use weightcast_test_net::{Host, Net, Weather, is_wanted};

/// Who waits this long hangs.
const PATIENCE: Duration = Duration::from_secs(10);
/// Longer than a packet needs here, shorter than TCP's patience.
const SILENCE: Duration = Duration::from_millis(300);
/// Has the test [`a_host_until_killed`] of another process make a host and wait.
const HOLDS: &str = "WEIGHTCAST_TEST_HOLDS";

fn net(seed: u64) -> (Net, Host, Host) {
    let net = Net::new(seed).unwrap_or_else(|error| panic!("{error}"));
    let [a, b] = ["a", "b.example"].map(|name| net.host(name).unwrap_or_else(|error| panic!("{error}")));
    (net, a, b)
}

/// A connection from the one to the other: both ends.
fn connected(a: &Host, b: &Host) -> (TcpStream, TcpStream) {
    let listener = b.listen(7000).expect("a free port");
    let one = a.connect(SocketAddr::new(b.address().into(), 7000), PATIENCE).expect("somebody listens");
    let (other, from) = listener.accept().expect("somebody connects");
    assert_eq!(from.ip(), a.address());
    for stream in [&one, &other] {
        stream.set_nodelay(true).expect("a setting");
    }
    (one, other)
}

/// What comes within a limit.
fn hears(stream: &mut TcpStream, limit: Duration) -> Option<u8> {
    stream.set_read_timeout(Some(limit)).expect("a limit");
    let mut byte = [0];
    match stream.read_exact(&mut byte) {
        Ok(()) => Some(byte[0]),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => None,
        Err(error) => panic!("{error}"),
    }
}

fn says(stream: &mut TcpStream, byte: u8) {
    stream.write_all(&[byte]).expect("there is room in its buffer");
}

fn output(mut command: Command) -> String {
    let output = command.output().expect("it runs");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).expect("text").trim().to_owned()
}

#[test]
fn bytes_pass_and_are_counted() {
    if !is_wanted() {
        return;
    }
    let (net, a, b) = net(1);
    let (mut one, mut other) = connected(&a, &b);
    let sent: Vec<u8> = (0_u32..1_000_000).map(|index| index.to_le_bytes()[0] ^ index.to_le_bytes()[1]).collect();
    let expected = sent.clone();
    let sender = std::thread::spawn(move || one.write_all(&sent));
    let mut received = Vec::new();
    other.read_to_end(&mut received).expect("all comes");
    sender.join().expect("no panic").expect("all goes");
    assert!(received == expected, "{} bytes came", received.len());
    // A packet has at most 9000 bytes.
    let counts = net.counts();
    assert!(counts.forwarded >= 1_000_000 / 9000 && counts.dropped == 0, "{counts:?}");
}

/// NT-1: a host is not this one, and hosts know each other by name.
#[test]
fn nt_1_a_host_has_its_own_network_and_name() {
    if !is_wanted() {
        return;
    }
    let (_net, a, b) = net(2);
    assert_eq!((a.address(), b.address()), (Ipv4Addr::new(10, 77, 0, 1), Ipv4Addr::new(10, 77, 0, 2)));
    assert_eq!(output(b.command("hostname")), "b");
    for (host, name) in [(&a, "b.example"), (&a, "b"), (&b, "b.example")] {
        let mut command = host.command("getent");
        command.args(["ahostsv4", name]);
        let said = output(command);
        assert!(said.starts_with("10.77.0.2 "), "{name}: {said}");
    }
    let network = |mut command: Command| {
        command.arg("/proc/self/ns/net");
        output(command)
    };
    let all = [Command::new("readlink"), a.command("readlink"), b.command("readlink")].map(network);
    assert!(all[0] != all[1] && all[1] != all[2] && all[0] != all[2], "{all:?}");
    // A command runs where it would have run, and loopback is up.
    let here = std::env::current_dir().expect("a directory");
    assert_eq!(output(a.command("pwd")), here.display().to_string());
    let mut pwd = a.command("pwd");
    pwd.current_dir("/usr");
    assert_eq!(output(pwd), "/usr");
    let refused = a.connect(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 9), PATIENCE).expect_err("nobody listens");
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
}

#[test]
fn isolation_stops_bytes_and_healing_lets_them_go_on() {
    if !is_wanted() {
        return;
    }
    let (net, a, b) = net(3);
    let (mut one, mut other) = connected(&a, &b);
    says(&mut one, 1);
    assert_eq!(hears(&mut other, PATIENCE), Some(1));
    for host in [&a, &b] {
        net.isolate(host);
        let before = net.counts();
        says(&mut one, 2);
        says(&mut other, 3);
        assert_eq!((hears(&mut other, SILENCE), hears(&mut one, SILENCE)), (None, None));
        let during = net.counts();
        assert_eq!(during.forwarded, before.forwarded);
        assert!(during.dropped >= before.dropped + 2, "{before:?} {during:?}");
        net.heal();
        assert_eq!((hears(&mut other, PATIENCE), hears(&mut one, PATIENCE)), (Some(2), Some(3)));
    }
    net.cut(&a, &b);
    let refused = a.connect(SocketAddr::new(b.address().into(), 7001), SILENCE).expect_err("nothing comes back");
    assert_eq!(refused.kind(), ErrorKind::TimedOut);
}

#[test]
fn one_way_is_one_way() {
    if !is_wanted() {
        return;
    }
    let (net, a, b) = net(4);
    let (mut one, mut other) = connected(&a, &b);
    net.cut_one_way(&a, &b);
    says(&mut one, 1);
    says(&mut other, 2);
    assert_eq!((hears(&mut one, PATIENCE), hears(&mut other, SILENCE)), (Some(2), None));
    net.heal();
    assert_eq!(hears(&mut other, PATIENCE), Some(1));
}

/// Twenty round trips of 30 to 50 ms each way, and then a tenth of the packets lost: all comes, later.
#[test]
fn weather_delays_and_loses() {
    if !is_wanted() {
        return;
    }
    let (net, a, b) = net(5);
    let (mut one, mut other) = connected(&a, &b);
    let (delay, jitter) = (Duration::from_millis(40), Duration::from_millis(10));
    let round_trip = |one: &mut TcpStream, other: &mut TcpStream, byte: u8| {
        let start = Instant::now();
        says(one, byte);
        assert_eq!(hears(other, PATIENCE), Some(byte));
        says(other, byte);
        assert_eq!(hears(one, PATIENCE), Some(byte));
        start.elapsed()
    };
    net.set_weather(Weather { delay, jitter, lost_per_mille: 0 });
    let trips: Vec<Duration> = (0..20).map(|byte| round_trip(&mut one, &mut other, byte)).collect();
    assert!(trips.iter().all(|trip| *trip >= (delay - jitter) * 2), "{trips:?}");
    assert_eq!(net.counts().dropped, 0);
    net.set_weather(Weather { delay: Duration::ZERO, jitter: Duration::ZERO, lost_per_mille: 100 });
    for byte in 0..20 {
        round_trip(&mut one, &mut other, byte);
    }
    // NT-3: of the first forty packets of this seed some are lost, always.
    assert!(net.counts().dropped > 0);
    net.heal();
    assert!(round_trip(&mut one, &mut other, 1) < delay);
}

/// Processes in this network namespace.
fn processes(network: &str) -> Vec<String> {
    let entries = std::fs::read_dir("/proc").expect("/proc");
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let are_there = |path: &std::path::PathBuf| {
        std::fs::read_link(path.join("ns/net")).is_ok_and(|found| found.display().to_string() == network)
    };
    paths.filter(are_there).map(|path| path.display().to_string()).collect()
}

fn network_of(host: &Host) -> String {
    let mut command = host.command("readlink");
    command.arg("/proc/self/ns/net");
    output(command)
}

#[test]
fn nt_1_a_host_that_goes_leaves_nothing() {
    if !is_wanted() {
        return;
    }
    let (net, a, b) = net(6);
    let network = network_of(&a);
    assert_eq!(processes(&network).len(), 1);
    drop(a);
    assert_eq!(processes(&network), Vec::<String>::new());
    drop(net);
    assert_eq!(output(b.command("hostname")), "b", "a host outlives its net");
}

/// Not a test of its own: what [`nt_1_a_killed_test_leaves_nothing`] kills.
#[test]
fn a_host_until_killed() {
    if std::env::var_os(HOLDS).is_none() || !is_wanted() {
        return;
    }
    let (_net, a, _b) = net(8);
    println!("holds {}", network_of(&a));
    std::thread::park_timeout(PATIENCE * 2);
}

#[test]
fn nt_1_a_killed_test_leaves_nothing() {
    if !is_wanted() {
        return;
    }
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.args(["--exact", "a_host_until_killed", "--nocapture"]).env(HOLDS, "1").stdout(Stdio::piped());
    let mut child = command.spawn().expect("it starts");
    let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    // The harness says the test's name before, on the same line.
    let network = lines.map_while(Result::ok).find_map(|line| Some(line.split_once("holds ")?.1.to_owned()));
    let network = network.expect("it makes a host");
    assert_eq!(processes(&network).len(), 1);
    child.kill().expect("it lives");
    child.wait().expect("it ends");
    let start = Instant::now();
    while !processes(&network).is_empty() {
        assert!(start.elapsed() < PATIENCE, "{:?}", processes(&network));
        std::thread::park_timeout(Duration::from_millis(5));
    }
}
