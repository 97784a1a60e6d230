//! `weightcast logs`: what the ranks of a running job have written.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::io::Write as _;

use clap::Args;
use serde_json::json;
use weightcast_proto::v1;

use super::args::JobFlags;
use super::job::{block_on, connect};
use super::output::fail;
use crate::rpc::lasting_request;

/// `weightcast logs`
#[derive(Clone, Debug, PartialEq, Eq, Args)]
pub struct LogsFlags {
    /// Lines of this rank alone; may be given several times
    #[arg(long = "rank", value_name = "N", value_delimiter = ',')]
    pub ranks: Vec<u32>,
    /// At most so many of the newest lines, of all chosen ranks together; by default all that are kept
    #[arg(long, value_name = "LINES")]
    pub tail: Option<u32>,
    /// Go on with what they write, until the job ends
    #[arg(long, short)]
    pub follow: bool,
    /// Which job.
    #[command(flatten)]
    pub job: JobFlags,
}

pub(super) fn run(flags: &LogsFlags) -> u8 {
    let LogsFlags { ranks, tail, follow, job } = flags;
    let mut numbers = Numbers { is_cut: tail.is_some(), next: HashMap::new() };
    let ended = block_on(async {
        let (mut clients, token) = connect(job).await?;
        let message = v1::FollowLogsRequest { ranks: ranks.clone(), tail_lines: *tail, follow: *follow };
        let mut answers = clients.job.follow_logs(lasting_request(&token, message)?).await?.into_inner();
        while let Some(answer) = answers.message().await? {
            let mut text = String::new();
            for line in &answer.lines {
                let missing = numbers.missing_before(line.rank, line.number);
                show(line, missing, job.json, &mut text);
            }
            let mut stdout = std::io::stdout().lock();
            // Nobody reads any more: there is no use in going on.
            if answer.ended || stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).is_err() {
                break;
            }
        }
        Ok(())
    });
    match ended {
        Ok(()) => 0,
        Err(error) => fail(&error),
    }
}

/// Of each rank the number that its next line should have.
struct Numbers {
    /// Whether the first lines are left out because somebody asked for the last ones.
    is_cut: bool,
    next: HashMap<u32, u64>,
}

impl Numbers {
    /// How many lines of `rank` are missing before this one.
    fn missing_before(&mut self, rank: u32, number: u64) -> u64 {
        let first = if self.is_cut { number } else { 1 };
        let next = self.next.entry(rank).or_insert(first);
        let missing = number.saturating_sub(*next);
        *next = number.saturating_add(1).max(*next);
        missing
    }
}

fn show(line: &v1::LogLine, missing: u64, as_json: bool, text: &mut String) {
    let rank = line.rank;
    if as_json {
        if missing > 0 {
            push_line(text, &json!({"rank": rank, "missing_lines": missing}).to_string());
        }
        let stream = line.stream().as_str_name().trim_start_matches("LOG_STREAM_").to_ascii_lowercase();
        let value = json!({"rank": rank, "stream": stream, "unix_ns": line.unix_ns, "text": line.text}).to_string();
        // JSON escapes the first 32 control characters; others can stand only within its strings, where this is their escape.
        push_line(text, &escaped(&value, |character| format!("\\u{:04x}", u32::from(character))));
        return;
    }
    if missing > 0 {
        push_line(text, &format!("[{rank}] ({missing} lines are missing here)"));
    }
    let shown = escaped(&line.text, |character| format!("\\x{:02x}", u32::from(character)));
    push_line(text, &format!("[{rank}] {shown}"));
}

fn push_line(text: &mut String, line: &str) {
    // Writing to a string does not fail.
    let _ = writeln!(text, "{line}");
}

/// Without control characters but tabs: a rank's line must not command the terminal that shows it.
fn escaped(text: &str, escape: impl Fn(char) -> String) -> String {
    let mut shown = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_control() && character != '\t' {
            shown.push_str(&escape(character));
        } else {
            shown.push(character);
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(number: u64, text: &str) -> v1::LogLine {
        let stream = v1::LogStream::Stderr.into();
        v1::LogLine { rank: 3, number, stream, unix_ns: 5, text: text.to_owned() }
    }

    fn shown(line: &v1::LogLine, missing: u64, as_json: bool) -> String {
        let mut text = String::new();
        show(line, missing, as_json, &mut text);
        text
    }

    #[test]
    fn control_characters_do_not_reach_a_terminal() {
        let evil = line(1, "a\tb\u{1b}[2J\u{7f}\u{9b}31mé\\");
        assert_eq!(shown(&evil, 0, false), "[3] a\tb\\x1b[2J\\x7f\\x9b31mé\\\n");
        let as_json = shown(&evil, 0, true);
        assert!(!as_json.trim_end().chars().any(char::is_control), "{as_json:?}");
        let value: serde_json::Value = serde_json::from_str(&as_json).expect("JSON");
        assert_eq!(value, json!({"rank": 3, "stream": "stderr", "unix_ns": 5, "text": evil.text}));
    }

    #[test]
    fn missing_lines_are_told_by_their_numbers() {
        let mut numbers = Numbers { is_cut: false, next: HashMap::new() };
        let rank_0 = [1, 2, 5, 5, 6].map(|number| numbers.missing_before(0, number));
        assert_eq!(rank_0, [0, 0, 2, 0, 0]);
        assert_eq!(numbers.missing_before(1, 8), 7, "those before the first that is kept");
        let mut tail = Numbers { is_cut: true, next: HashMap::new() };
        assert_eq!([8, 9, 11].map(|number| tail.missing_before(1, number)), [0, 0, 1]);
        assert_eq!(shown(&line(9, "x"), 7, false), "[3] (7 lines are missing here)\n[3] x\n");
        assert!(shown(&line(9, "x"), 7, true).starts_with("{\"rank\":3,\"missing_lines\":7}\n{"));
    }
}
