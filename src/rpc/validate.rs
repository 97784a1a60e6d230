//! What callers may say: lengths, characters, names of files, addresses. Nothing that comes over the wire is used as a path,
//! shown to people or kept before it has passed here.
//!
//! Owns: the limits of fields. Refuses to know: what follows from a message.

use std::net::SocketAddr;

use tonic::{Code, Status};
use weightcast_proto::v1;

use super::status::{refused, status};
use crate::coordinator::MAX_LINE_BYTES;
use crate::manifest::ShardReceipt;
use crate::membership::Refusal;

/// Identifiers that callers choose.
const MAX_ID_BYTES: usize = 128;
/// Names of hosts (RFC 1035), and of files on the usual file systems.
const MAX_NAME_BYTES: usize = 255;
/// A device or a version in words.
const MAX_WORD_BYTES: usize = 64;
/// NCCL's unique id.
const UNIQUE_ID_BYTES: usize = 128;
/// Losses that a rank reports for the curve that people see.
const MAX_LOSSES: usize = 1024;
/// Lines of ranks in one message.
const MAX_LINES: usize = 1024;
/// What happened, in words; what is longer is cut.
const MAX_REPORT_BYTES: usize = 4096;

fn invalid(message: &str) -> Status {
    refused(Code::InvalidArgument, "invalid", message)
}

/// Text that may stand in a line of a log.
fn text(field: &str, value: &str, limit: usize) -> Result<(), Status> {
    if value.len() > limit {
        return Err(invalid(&format!("{field}: expected at most {limit} bytes, found {}", value.len())));
    }
    match value.chars().find(|character| character.is_control()) {
        Some(found) => Err(invalid(&format!("{field}: expected no control characters, found {found:?}"))),
        None => Ok(()),
    }
}

/// What a rank says of itself when it joins.
pub(super) fn join(join: &v1::JoinRequest) -> Result<(), Status> {
    if join.request_id.is_empty() {
        return Err(invalid("request_id: expected some text, found none"));
    }
    text("request_id", &join.request_id, MAX_ID_BYTES)?;
    text("host", &join.host, MAX_NAME_BYTES)?;
    text("device", &join.device, MAX_WORD_BYTES)?;
    text("nccl_version", &join.nccl_version, MAX_WORD_BYTES)?;
    let found = join.nccl_unique_id.len();
    if found != 0 && found != UNIQUE_ID_BYTES {
        return Err(invalid(&format!("nccl_unique_id: expected none or {UNIQUE_ID_BYTES} bytes, found {found}")));
    }
    text("data_address", &join.data_address, MAX_WORD_BYTES)?;
    // Its peers will connect there.
    let address: Option<SocketAddr> = join.data_address.parse().ok();
    match address {
        Some(address) if address.port() != 0 && !address.ip().is_unspecified() && !address.ip().is_multicast() => {
            Ok(())
        }
        _ => Err(invalid(&format!("data_address: expected the ip:port of one host, found {:?}", join.data_address))),
    }
}

/// How far a rank is.
pub(super) fn progress(progress: Option<&v1::Progress>) -> Result<(), Status> {
    let Some(progress) = progress else { return Ok(()) };
    text("progress.stage", &progress.stage, MAX_WORD_BYTES)?;
    let found = progress.training.as_ref().map_or(0, |training| training.recent_losses.len());
    if found > MAX_LOSSES {
        return Err(invalid(&format!("progress.training.recent_losses: expected at most {MAX_LOSSES}, found {found}")));
    }
    Ok(())
}

/// A rank's receipt: its file is one in the directory of the checkpoint, and nowhere else.
pub(super) fn receipt(json: &str) -> Result<ShardReceipt, Status> {
    let receipt: ShardReceipt =
        serde_json::from_str(json).map_err(|error| invalid(&format!("receipt cannot be read: {error}")))?;
    if let Some(file) = &receipt.file {
        text("receipt: file name", &file.name, MAX_NAME_BYTES)?;
        let is_plain = !matches!(file.name.as_str(), "" | "." | "..") && !file.name.contains(['/', '\\']);
        if !is_plain {
            return Err(invalid(&format!(
                "receipt: file name: expected a name without a directory, found {:?}",
                file.name
            )));
        }
    }
    Ok(receipt)
}

/// An identifier that a caller sends back.
pub(super) fn id(field: &str, value: &str) -> Result<(), Status> {
    text(field, value, MAX_ID_BYTES)
}

/// Ranks that somebody names, in a world of so many.
pub(super) fn ranks(ranks: &[u32], world: usize) -> Result<(), Status> {
    let world = u32::try_from(world).unwrap_or(u32::MAX);
    match ranks.iter().find(|rank| **rank >= world) {
        Some(rank) => Err(status(&Refusal::NoSuchRank { rank: *rank, world })),
        None => Ok(()),
    }
}

/// What ranks have written. It may have control characters: whoever shows it escapes them.
pub(super) fn lines(report: &v1::ReportLinesRequest, world: usize) -> Result<(), Status> {
    if report.launcher_id.is_empty() {
        return Err(invalid("launcher_id: expected some text, found none"));
    }
    id("launcher_id", &report.launcher_id)?;
    let found = report.lines.len();
    if found > MAX_LINES {
        return Err(invalid(&format!("lines: expected at most {MAX_LINES}, found {found}")));
    }
    for line in &report.lines {
        ranks(&[line.rank], world)?;
        let found = line.text.len();
        if found > MAX_LINE_BYTES {
            return Err(invalid(&format!("lines.text: expected at most {MAX_LINE_BYTES} bytes, found {found}")));
        }
        if line.number == 0 {
            return Err(invalid("lines.number: expected 1 or more, found 0"));
        }
        if line.stream() == v1::LogStream::Unspecified {
            return Err(invalid("lines.stream: expected stdout or stderr, found neither"));
        }
    }
    Ok(())
}

/// What happened, as people may read it: without control characters but line ends, and of bounded length.
pub(super) fn report(message: &str) -> String {
    let mut end = message.len().min(MAX_REPORT_BYTES);
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    let printable = |character: char| !character.is_control() || matches!(character, '\n' | '\t');
    let cut = message.get(..end).unwrap_or_default();
    cut.chars().map(|character| if printable(character) { character } else { '\u{fffd}' }).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use prost::Message as _;

    use super::*;

    fn good() -> v1::JoinRequest {
        v1::JoinRequest {
            request_id: "1".to_owned(),
            host: "node".to_owned(),
            data_address: "10.0.0.1:4000".to_owned(),
            device: "cpu".to_owned(),
            ..v1::JoinRequest::default()
        }
    }

    fn refusal(change: impl FnOnce(&mut v1::JoinRequest)) -> String {
        let mut request = good();
        change(&mut request);
        let status = join(&request).expect_err("changed");
        assert_eq!(status.code(), Code::InvalidArgument);
        status.message().to_owned()
    }

    #[test]
    fn what_is_wrong_with_a_join_is_said() {
        join(&good()).expect("good");
        assert!(refusal(|join| join.host = "a\nb".to_owned()).contains("host: expected no control characters"));
        assert!(refusal(|join| join.host = "h".repeat(256)).contains("at most 255 bytes, found 256"));
        assert!(refusal(|join| join.request_id.clear()).contains("request_id"));
        assert!(refusal(|join| join.nccl_unique_id = vec![0; 5]).contains("none or 128 bytes, found 5"));
        for address in ["", "host:1", "10.0.0.1:0", "0.0.0.0:1", "224.0.0.1:1", "[::]:1", "../../x"] {
            assert!(refusal(|join| join.data_address = address.to_owned()).contains("data_address"), "{address}");
        }
    }

    #[test]
    fn what_is_wrong_with_lines_is_said() {
        let good = v1::LogLine {
            rank: 1,
            number: 1,
            stream: v1::LogStream::Stderr.into(),
            unix_ns: 0,
            text: "\u{1b}[31mred\u{1b}[m".to_owned(),
        };
        let check = |launcher: &str, line: v1::LogLine, count: usize| {
            let request = v1::ReportLinesRequest { launcher_id: launcher.to_owned(), lines: vec![line; count] };
            lines(&request, 2).map_err(|status| status.message().to_owned()).err().unwrap_or_default()
        };
        assert_eq!(check("a", good.clone(), 1024), "");
        assert!(check("", good.clone(), 1).contains("launcher_id"));
        assert!(check("a\n", good.clone(), 1).contains("launcher_id: expected no control characters"));
        assert!(check("a", good.clone(), 1025).contains("at most 1024, found 1025"));
        assert!(check("a", v1::LogLine { rank: 2, ..good.clone() }, 1).contains("rank 2"));
        assert!(check("a", v1::LogLine { number: 0, ..good.clone() }, 1).contains("lines.number"));
        assert!(check("a", v1::LogLine { stream: 7, ..good.clone() }, 1).contains("lines.stream"));
        let text = "x".repeat(8193);
        assert!(check("a", v1::LogLine { text, ..good }, 1).contains("at most 8192 bytes, found 8193"));
    }

    #[test]
    fn a_receipt_names_no_other_directory() {
        let json = |name: &str| {
            serde_json::json!({
                "rank": 0,
                "file": {"name": name, "rank": 0, "bytes": 1, "digest_table": {"bytes": 4, "crc32c": 0}},
                "chunks": [], "nested_offsets": [],
            })
            .to_string()
        };
        for name in ["../manifest.json", "/etc/passwd", "..", "", "a/b", "a\\b", "a\u{0}b"] {
            let status = receipt(&json(name)).expect_err("not a plain name");
            assert_eq!(status.code(), Code::InvalidArgument, "{name}");
            assert!(status.message().contains("file name"), "{name}: {}", status.message());
        }
        assert!(receipt(&json("rank-00000.safetensors")).is_ok());
        assert!(receipt("[").expect_err("no JSON").message().contains("receipt cannot be read"));
    }

    #[test]
    fn reports_are_cut_and_cleaned() {
        assert_eq!(report("a\u{1b}[2J\nb"), "a\u{fffd}[2J\nb");
        assert_eq!(report(&"é".repeat(3000)).len(), 4096);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        /// Any bytes: decoding and checking say what is wrong, or take it, and never panic.
        #[test]
        fn any_bytes_are_taken_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..256)) {
            if let Ok(request) = v1::JoinRequest::decode(&*bytes) {
                let _ = join(&request);
            }
            if let Ok(request) = v1::RenewRequest::decode(&*bytes) {
                let _ = progress(request.progress.as_ref());
            }
            let _ = v1::ReportLinesRequest::decode(&*bytes).map(|request| lines(&request, 4));
            let _ = v1::ReportSavedRequest::decode(&*bytes).map(|request| receipt(&request.receipt_json));
            let _ = receipt(&String::from_utf8_lossy(&bytes));
            prop_assert!(report(&String::from_utf8_lossy(&bytes)).len() <= 3 * MAX_REPORT_BYTES);
        }

        /// A good message with some bytes changed, cut or added.
        #[test]
        fn a_damaged_join_is_taken_or_refused(
            flips in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
            cut in any::<prop::sample::Index>(),
        ) {
            let mut bytes = good().encode_to_vec();
            for (at, value) in flips {
                let at = at.index(bytes.len());
                bytes[at] ^= value;
            }
            bytes.truncate(cut.index(bytes.len() + 1));
            match v1::JoinRequest::decode(&*bytes) {
                Ok(request) => {
                    if let Err(status) = join(&request) {
                        prop_assert!(status.message().contains("expected"), "{}", status.message());
                    }
                }
                Err(error) => prop_assert!(!error.to_string().is_empty()),
            }
        }
    }
}
