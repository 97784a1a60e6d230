//! The rendezvous without sockets and clocks.

use super::*;

fn rules(nnodes_min: u32, nnodes: u32, max_restarts: u32) -> Rules {
    let seconds = Duration::from_secs;
    let (join_timeout, last_call, silence) = (seconds(600), seconds(5), seconds(3));
    Rules { run_id: "j".to_owned(), nnodes_min, nnodes, max_restarts, join_timeout, last_call, silence }
}

fn at(ms: u64) -> Now {
    Now { monotonic: Duration::from_millis(ms), wall_ns: ms * 1_000_000 }
}

fn join(from: ConnectionId, node_rank: Option<u32>, nproc: u32) -> Event {
    let (host, address) = (format!("h{from}"), Some(format!("10.0.0.{from}")));
    let join = Join { run_id: "j".to_owned(), node_rank, nproc, host, address, port: 7000 };
    Event::Message { from, message: ToMeeting::Join(join) }
}

/// Something that happened `age_ms` before it is told, on a node whose clock is as many hours ahead as its code says.
fn cause(age_ms: u64, code: u8) -> Cause {
    let (at_ns, age) = (u64::from(code) * 3_600_000_000_000, Duration::from_millis(age_ms));
    Cause { at_ns, age, code, words: format!("code {code}"), is_request: false, rank: None }
}

fn ending(from: ConnectionId, attempt: u32, cause: Cause) -> Event {
    Event::Message { from, message: ToMeeting::Ending { attempt, cause } }
}

fn finished(from: ConnectionId, attempt: u32, exit_code: u8) -> Event {
    let message = ToMeeting::Finished { attempt, exit_code, cause: None, is_stopped: false, port: 7001 };
    Event::Message { from, message }
}

/// (to, attempt, node rank, first rank, world size) of the starts among effects.
fn starts(effects: &[Effect]) -> Vec<(ConnectionId, u32, u32, u32, u32)> {
    let start = |effect: &Effect| match effect {
        Effect::Send { to, message: ToLauncher::Start(seat) } => {
            Some((*to, seat.attempt, seat.node_rank, seat.first_rank, seat.world_size))
        }
        _ => None,
    };
    effects.iter().filter_map(start).collect()
}

fn ended(effects: &[Effect]) -> Vec<ConnectionId> {
    let end = |effect: &Effect| match effect {
        Effect::Send { to, message: ToLauncher::End { .. } } => Some(*to),
        _ => None,
    };
    effects.iter().filter_map(end).collect()
}

fn over(effects: &[Effect]) -> Vec<(ConnectionId, u8)> {
    let over = |effect: &Effect| match effect {
        Effect::Send { to, message: ToLauncher::Over(over) } => Some((*to, over.exit_code)),
        _ => None,
    };
    effects.iter().filter_map(over).collect()
}

fn started(nodes: u64, max_restarts: u32) -> Meeting {
    let count = u32::try_from(nodes).expect("few nodes");
    let mut meeting = Meeting::new(rules(count, count, max_restarts), at(0));
    (1..=nodes).for_each(|id| drop(meeting.apply(at(0), join(id, None, 1))));
    meeting
}

#[test]
fn places_follow_known_ranks_and_then_the_order_of_coming() {
    let mut meeting = Meeting::new(rules(3, 3, 0), at(0));
    assert_eq!(starts(&meeting.apply(at(1), join(1, None, 4))), []);
    assert_eq!(starts(&meeting.apply(at(2), join(2, Some(0), 2))), []);
    let effects = meeting.apply(at(3), join(3, Some(2), 8));
    assert_eq!(starts(&effects), [(2, 0, 0, 0, 14), (1, 0, 1, 2, 14), (3, 0, 2, 6, 14)]);
    let Some(Effect::Send { message: ToLauncher::Start(seat), .. }) = effects.first() else { panic!("{effects:?}") };
    assert_eq!((seat.master_addr.as_str(), seat.master_port), ("10.0.0.2", 7000));
}

#[test]
fn a_wrong_job_is_refused_and_a_taken_place_may_be_asked_for_again() {
    let mut meeting = Meeting::new(rules(2, 2, 0), at(0));
    meeting.apply(at(0), join(1, Some(0), 1));
    let refusal = |effects: Vec<Effect>| match effects.first() {
        Some(Effect::Send { message: ToLauncher::Refused { may_retry, .. }, .. }) => Some(*may_retry),
        _ => None,
    };
    assert_eq!(refusal(meeting.apply(at(1), join(2, Some(0), 1))), Some(true));
    assert_eq!(refusal(meeting.apply(at(1), join(3, Some(2), 1))), Some(false));
    let mut stranger = join(4, None, 1);
    if let Event::Message { message: ToMeeting::Join(join), .. } = &mut stranger {
        join.run_id = "k".to_owned();
    }
    assert_eq!(refusal(meeting.apply(at(1), stranger)), Some(false));
}

#[test]
fn a_failure_ends_the_other_nodes_at_once_and_the_earliest_is_the_cause() {
    let mut meeting = started(3, 0);
    assert_eq!(ended(&meeting.apply(at(10), ending(2, 0, cause(1, 1)))), [1, 3]);
    // Node 3 failed a millisecond earlier and was heard of later. Its clock is days ahead.
    assert!(ended(&meeting.apply(at(11), ending(3, 0, cause(3, 137)))).is_empty());
    assert_eq!(over(&meeting.apply(at(12), finished(1, 0, 143))), []);
    assert_eq!(over(&meeting.apply(at(13), finished(2, 0, 1))), []);
    assert_eq!(over(&meeting.apply(at(14), finished(3, 0, 137))), [(1, 137), (2, 137), (3, 137)]);
    assert!(meeting.is_over());
    assert_eq!(over(&meeting.apply(at(15), join(9, None, 1))), [(9, 137)]);
}

#[test]
fn success_needs_all_nodes() {
    let mut meeting = started(2, 3);
    assert_eq!(over(&meeting.apply(at(10), finished(1, 0, 0))), []);
    assert_eq!(over(&meeting.apply(at(20), finished(2, 0, 0))), [(1, 0), (2, 0)]);
}

#[test]
fn a_silent_node_is_lost_after_three_seconds_and_not_before() {
    let mut meeting = started(2, 0);
    let beat = |from| Event::Message { from, message: ToMeeting::Beat };
    for ms in (100..=3000).step_by(100) {
        assert_eq!(meeting.apply(at(ms), beat(1)), []);
        assert_eq!(meeting.apply(at(ms), Event::Tick), [], "{ms}");
    }
    meeting.apply(at(3100), beat(1));
    assert_eq!(ended(&meeting.apply(at(3100), Event::Tick)), [1]);
    let effects = meeting.apply(at(3200), finished(1, 0, 143));
    assert_eq!(over(&effects), [(1, 69)]);
}

#[test]
fn a_pause_of_our_own_is_nobodys_silence() {
    let mut meeting = started(2, 0);
    meeting.apply(at(100), Event::Tick);
    assert_eq!(meeting.apply(at(60_000), Event::Tick), []);
    assert_eq!(meeting.apply(at(60_100), Event::Tick), []);
}

#[test]
fn a_lost_node_may_come_back_for_the_next_attempt() {
    let mut meeting = Meeting::new(rules(2, 2, 1), at(0));
    meeting.apply(at(0), join(1, Some(0), 1));
    meeting.apply(at(0), join(2, Some(1), 1));
    assert_eq!(ended(&meeting.apply(at(10), Event::Closed { from: 2 })), [1]);
    assert_eq!(starts(&meeting.apply(at(20), finished(1, 0, 143))), []);
    assert_eq!(starts(&meeting.apply(at(9000), join(5, Some(1), 1))), [(1, 1, 0, 0, 2), (5, 1, 1, 1, 2)]);
    // The attempts are used up.
    meeting.apply(at(9001), ending(5, 1, cause(1, 7)));
    meeting.apply(at(9002), finished(5, 1, 7));
    assert_eq!(over(&meeting.apply(at(9003), finished(1, 1, 143))), [(1, 7), (5, 7)]);
}

#[test]
fn final_codes_and_stopped_nodes_are_not_started_again() {
    let mut meeting = started(2, 9);
    meeting.apply(at(1), ending(1, 0, cause(1, 93)));
    meeting.apply(at(2), finished(1, 0, 93));
    assert_eq!(over(&meeting.apply(at(3), finished(2, 0, 143))), [(1, 93), (2, 93)]);
    let mut meeting = started(2, 9);
    let message = ToMeeting::Finished { attempt: 0, exit_code: 143, cause: None, is_stopped: true, port: 1 };
    meeting.apply(at(1), Event::Message { from: 1, message });
    assert_eq!(over(&meeting.apply(at(3), finished(2, 0, 0))), [(1, 143), (2, 143)]);
}

#[test]
fn an_elastic_job_starts_with_enough_nodes_after_the_last_call() {
    let mut meeting = Meeting::new(rules(1, 4, 0), at(0));
    meeting.apply(at(100), join(1, None, 2));
    meeting.apply(at(200), join(2, None, 2));
    assert_eq!(starts(&meeting.apply(at(300), Event::Tick)), []);
    // Beats keep them from being silent while the last call runs.
    for ms in (500..5200).step_by(500) {
        for from in [1, 2] {
            meeting.apply(at(ms), Event::Message { from, message: ToMeeting::Beat });
        }
        assert_eq!(starts(&meeting.apply(at(ms), Event::Tick)), [], "{ms}");
    }
    assert_eq!(starts(&meeting.apply(at(5200), Event::Tick)), [(1, 0, 0, 0, 4), (2, 0, 1, 2, 4)]);
}

#[test]
fn nodes_that_do_not_come_end_the_job() {
    let mut meeting = Meeting::new(rules(2, 2, 0), at(0));
    meeting.apply(at(599_900), join(1, None, 1));
    assert_eq!(over(&meeting.apply(at(600_001), Event::Tick)), [(1, 69)]);
}
