//! Bounds, numbers, order and ends of the store and its readers, without a clock.

use super::*;

const START_NS: u64 = 1_000_000;

fn lines(ranks: u32) -> Lines {
    Lines::new(WorldSize::new(ranks).expect("a world of at least 1"))
}

fn line(rank: u32, number: u64, unix_ns: u64) -> Line {
    Line { rank: Rank(rank), number, stream: LineStream::Stdout, unix_ns, text: format!("{rank}-{number}") }
}

fn everything() -> LineChoice {
    LineChoice::default()
}

fn followed() -> LineChoice {
    LineChoice { follow: true, ..LineChoice::default() }
}

/// Rank and number of all lines that a reader has now.
fn read(reader: &mut LineReader, now: Instant) -> Vec<(u32, u64)> {
    let mut found = Vec::new();
    while let Read::Lines(lines) = reader.next(None, now, 1 << 10) {
        assert!(!lines.is_empty());
        found.extend(lines.into_iter().map(|line| (line.rank.0, line.number)));
    }
    found
}

fn read_all(lines: &Lines, choice: &LineChoice) -> Vec<(u32, u64)> {
    read(&mut lines.read(choice).expect("few readers"), crate::clock::now())
}

/// `LL-1`: of a rank that writes without end the newest 256 KiB stay, and another rank's stay whatever it does.
#[test]
fn ll_1_a_flood_pushes_out_its_own_rank_alone() {
    let lines = lines(2);
    lines.write(Rank(1), LineStream::Stderr, "quiet".to_owned());
    // With its overhead a KiB, so 256 of them stay.
    let text = "x".repeat((1 << 10) - LINE_OVERHEAD_BYTES);
    for _ in 0..10_000 {
        lines.write(Rank(0), LineStream::Stdout, text.clone());
    }
    let found = read_all(&lines, &everything());
    let expected = std::iter::once((1, 1)).chain((10_000 - 256 + 1..=10_000).map(|number| (0, number)));
    assert_eq!(found, expected.collect::<Vec<_>>());
}

/// `LL-1`: all ranks together have 64 MiB; with a hundred thousand that is 671 bytes for each, overhead included.
#[test]
fn ll_1_a_large_world_shares_the_bound() {
    let lines = lines(100_000);
    lines.write(Rank(99_999), LineStream::Stdout, "x".repeat(5000));
    lines.write(Rank(99_999), LineStream::Stdout, "y".repeat(5000));
    lines.write(Rank(100_000), LineStream::Stdout, "no such rank".to_owned());
    let mut reader = lines.read(&everything()).expect("few readers");
    let Read::Lines(found) = reader.next(None, crate::clock::now(), 1 << 20) else { panic!("nothing") };
    assert_eq!(found.iter().map(|line| line.text.clone()).collect::<Vec<_>>(), ["y".repeat(671 - 128)]);
    assert!(matches!(reader.next(None, crate::clock::now(), 1 << 20), Read::Ended));
}

/// `LL-3`: what is sent again is known; what is missing shows in the numbers, also over a change of the launcher.
#[test]
fn ll_3_lines_are_kept_once_and_missing_ones_leave_a_gap() {
    let lines = lines(1);
    lines.receive("a", (1..=3).map(|number| line(0, number, START_NS + number)));
    lines.receive("a", (2..=5).map(|number| line(0, number, START_NS + number)));
    // Of another launcher three lines were lost before it reached us; then it lost two.
    lines.receive("b", [4, 5, 8].map(|number| line(0, number, START_NS + 10 + number)));
    let numbers: Vec<u64> = read_all(&lines, &everything()).into_iter().map(|(_, number)| number).collect();
    assert_eq!(numbers, [1, 2, 3, 4, 5, 5 + 4, 5 + 5, 5 + 8]);
}

#[test]
fn numbers_without_sense_change_nothing_but_themselves() {
    let lines = lines(2);
    lines.receive("a", [line(0, u64::MAX, 1), line(0, u64::MAX, 1), line(0, 0, 1), line(1, 1, 2)]);
    lines.receive("b", [line(0, u64::MAX, u64::MAX), line(7, 1, 1)]);
    assert_eq!(read_all(&lines, &everything()), [(0, u64::MAX), (1, 1), (0, u64::MAX)]);
}

#[test]
fn lines_of_two_launchers_come_in_the_order_of_their_times() {
    let (lines, start) = (lines(2), crate::clock::now());
    let mut reader = lines.read(&followed()).expect("few readers");
    let arrive = |launcher: &str, line: Line, now| lines.store().receive(launcher, line, now);
    arrive("a", line(0, 1, START_NS + 50), start);
    arrive("a", line(0, 2, START_NS + 90), start);
    assert_eq!(read(&mut reader, start + Duration::from_millis(100)), [], "they wait for what was written before");
    arrive("b", line(1, 1, START_NS + 60), start + Duration::from_millis(150));
    let later = start + Duration::from_millis(300);
    assert_eq!(read(&mut reader, later), [(0, 1), (1, 1), (0, 2)]);
    // Too late for its place, and shown nevertheless.
    arrive("b", line(1, 2, START_NS + 70), later);
    assert_eq!(read(&mut reader, later + Duration::from_millis(300)), [(1, 2)]);
    // A clock that is set back does not turn a rank's lines round.
    arrive("a", line(0, 3, START_NS), later);
    arrive("a", line(0, 4, START_NS + 1), later);
    assert_eq!(read(&mut reader, later + Duration::from_millis(300)), [(0, 3), (0, 4)]);
}

/// `LL-2`: a reader that takes nothing for a while finds lines gone, and nobody has waited for it.
#[test]
fn ll_2_a_slow_reader_loses_lines_and_sees_how_many() {
    let (lines, start) = (lines(1), crate::clock::now());
    let (mut slow, mut quick) = (lines.read(&followed()).expect("room"), lines.read(&followed()).expect("room"));
    let text = "x".repeat((1 << 10) - LINE_OVERHEAD_BYTES);
    let mut seen = 0;
    for number in 1..=2000 {
        let now = start + Duration::from_millis(number);
        lines.store().receive("a", Line { text: text.clone(), ..line(0, number, START_NS + number) }, now);
        if number == 1 {
            assert_eq!(read(&mut slow, now + Duration::from_millis(300)), [(0, 1)]);
        }
        seen += read(&mut quick, now).len();
    }
    let end = start + Duration::from_secs(3);
    assert_eq!(seen + read(&mut quick, end).len(), 2000);
    assert_eq!(read(&mut slow, end), (2000 - 256 + 1..=2000).map(|number| (0, number)).collect::<Vec<_>>());
}

/// `LL-1`: lines that wait for others are bounded too; in a flood they go as they come.
#[test]
fn ll_1_a_reader_holds_back_half_a_megabyte_at_most() {
    let (lines, start) = (lines(8), crate::clock::now());
    let mut reader = lines.read(&followed()).expect("room");
    let text = "x".repeat((1 << 10) - LINE_OVERHEAD_BYTES);
    for (rank, number) in (0..8).flat_map(|rank| (1..=128).map(move |number| (rank, number))) {
        lines.store().receive("a", Line { text: text.clone(), ..line(rank, number, START_NS) }, start);
    }
    // All arrived at once: a MiB. Three times a quarter is more than half of it, and the last quarter waits.
    assert_eq!(read(&mut reader, start).len(), 3 * 256);
    assert_eq!(read(&mut reader, start + Duration::from_millis(300)).len(), 256);
}

#[test]
fn a_choice_of_ranks_and_of_the_newest_lines() {
    let lines = lines(3);
    for number in 1..=4 {
        for rank in 0..3 {
            lines.receive("a", [line(rank, number, START_NS + 10 * number + u64::from(rank))]);
        }
    }
    let choice = |ranks: &[u32], tail| LineChoice {
        ranks: ranks.iter().copied().map(Rank).collect(),
        tail: Some(tail),
        follow: false,
    };
    assert_eq!(read_all(&lines, &choice(&[], 4)), [(2, 3), (0, 4), (1, 4), (2, 4)]);
    assert_eq!(read_all(&lines, &choice(&[0, 2], 3)), [(2, 3), (0, 4), (2, 4)]);
    assert_eq!(read_all(&lines, &choice(&[1], 100)), [(1, 1), (1, 2), (1, 3), (1, 4)]);
    assert_eq!(read_all(&lines, &choice(&[], 0)), []);
}

/// Who follows ends with the job, but not before the last lines can be there.
#[test]
fn readers_end_when_nothing_more_will_come() {
    let (lines, over) = (lines(1), crate::clock::now());
    let source = lines.source();
    let mut reader = lines.read(&followed()).expect("room");
    let mut next = |over, now| reader.next(over, now, 1 << 10);
    assert!(matches!(next(None, over), Read::Nothing));
    assert!(matches!(next(Some(over), over), Read::Nothing), "a launcher may have more");
    lines.store().receive("a", line(0, 1, START_NS), over);
    drop(source);
    assert!(matches!(next(Some(over), over), Read::Lines(_)), "nothing to wait for any longer");
    assert!(matches!(next(Some(over), over), Read::Ended));

    let source = lines.source();
    assert!(matches!(next(Some(over), over), Read::Nothing));
    assert!(matches!(next(Some(over), over + LAST_LINES), Read::Ended), "one that is stuck is not waited for");
    lines.close();
    assert!(matches!(next(None, over), Read::Ended), "said by the launcher itself");
    drop(source);
}

#[tokio::test]
async fn readers_are_few_and_the_end_waits_for_them() {
    let lines = lines(1);
    let readers: Vec<LineReader> = (0..MAX_READERS).map(|_| lines.read(&followed()).expect("room")).collect();
    assert_eq!(lines.read(&followed()).map(drop), Err(TooManyReaders));
    let start = crate::clock::now();
    lines.farewell(Duration::from_millis(30)).await;
    assert!(start.elapsed() >= Duration::from_millis(30), "they are there still");
    drop(readers);
    assert!(lines.read(&everything()).is_ok());
    lines.farewell(Duration::from_secs(3600)).await;
}
