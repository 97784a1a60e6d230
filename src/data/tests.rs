//! Reading, masks and packing, against the Python tokenizers library, by hand, and over random documents.
#![expect(clippy::disallowed_methods, reason = "the tests write the files that they read")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use proptest::prelude::*;

use super::pack::Sequences;
use super::*;
use crate::types::{as_u64, as_usize};

const EOS: u32 = 1;
const X: u32 = IGNORED;

fn test_data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

fn tokenizer() -> Tokenizer {
    Tokenizer::open(&test_data("tiny-llama")).expect("a tokenizer")
}

/// A configuration over one file with this content.
struct Fixture {
    directory: tempfile::TempDir,
    config: DataConfig,
}

impl Fixture {
    fn new(name: &str, content: impl AsRef<[u8]>, sequence_length: u32) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join(name);
        std::fs::write(&path, content).expect("written");
        Self { directory, config: DataConfig::new(vec![path], sequence_length) }
    }

    fn with(mut self, change: impl FnOnce(&mut DataConfig)) -> Self {
        change(&mut self.config);
        self
    }

    fn load(&self) -> Result<Dataset, DataError> {
        Dataset::load(&self.config, &tokenizer())
    }

    fn dataset(&self) -> Dataset {
        self.load().expect("data")
    }

    /// The error's message without the temporary directory.
    fn message(&self) -> String {
        let message = self.load().expect_err("an error").to_string();
        message.replace(&format!("{}/", self.directory.path().display()), "")
    }
}

/// All sequences of a part, one by one.
fn rows(dataset: &Dataset, split: Split) -> Vec<Batch> {
    (0..dataset.sequences(split)).map(|index| dataset.batch(split, &[index])).collect()
}

// ---- the tokenizer

#[derive(serde::Deserialize)]
struct Expected {
    record: usize,
    prompt_tokens: usize,
    ids: Vec<u32>,
}

/// Ids and the end of the prompt equal those of the Python library (tests/data/data/README.md), through the whole path.
#[test]
fn ids_equal_python_tokenizers() {
    let text = include_str!("../../tests/data/data/token_ids.json");
    let vectors: Vec<Expected> = serde_json::from_str(text).expect("the vectors");
    assert_eq!(vectors.len(), 6);
    let mut config = DataConfig::new(vec![test_data("devils-dictionary.jsonl")], 512);
    config.packing = false;
    let dataset = Dataset::load(&config, &tokenizer()).expect("data");
    for Expected { record, prompt_tokens, ids } in vectors {
        let row = dataset.batch(Split::Train, &[as_u64(record)]);
        let whole: Vec<u32> = ids.iter().copied().chain([EOS]).collect();
        assert_eq!(row.ids, whole, "record {record}");
        let targets: Vec<u32> = (1..=whole.len())
            .map(|next| if next < prompt_tokens { X } else { *whole.get(next).unwrap_or(&X) })
            .collect();
        assert_eq!(row.targets, targets, "record {record}");
    }
    // The Python library gives 101,642 ids in 915 records; an end token for each is ours.
    let packed = DataConfig::new(vec![test_data("devils-dictionary.jsonl")], 512);
    let counts = Dataset::load(&packed, &tokenizer()).expect("data").counts().train;
    assert_eq!((counts.records, counts.tokens, counts.sequences), (915, 101_642 + 915, 201));
}

#[test]
fn special_tokens_come_from_the_models_files() {
    let tokenizer = tokenizer();
    assert_eq!((tokenizer.eos(), tokenizer.bos(), tokenizer.adds_bos()), (Some(1), Some(0), false));
    assert_eq!(tokenizer.vocabulary_len(), 2048);
    let text = "caf\u{e9} na\u{ef}ve \u{2014} \u{1f600} end";
    let python = [68, 66, 71, 129, 104, 295, 66, 129, 109, 321, 222, 160, 224, 244, 222, 174, 255, 248, 224, 882];
    assert_eq!(tokenizer.encode(text).expect("ids"), python);
    assert_eq!(tokenizer.decode(&python).expect("text"), text);
}

/// A model directory with the tokenizer and these other files.
fn model(files: &[(&str, &str)]) -> (tempfile::TempDir, Result<Tokenizer, DataError>) {
    let directory = tempfile::tempdir().expect("a directory");
    std::fs::copy(test_data("tiny-llama/tokenizer.json"), directory.path().join("tokenizer.json")).expect("copied");
    for (name, text) in files {
        std::fs::write(directory.path().join(name), text).expect("written");
    }
    let tokenizer = Tokenizer::open(directory.path());
    (directory, tokenizer)
}

#[test]
fn the_files_are_asked_in_order() {
    let config =
        ("tokenizer_config.json", r#"{"eos_token": {"content": "</s>"}, "bos_token": null, "add_bos_token": true}"#);
    let generation = ("generation_config.json", r#"{"eos_token_id": [7, 8], "bos_token_id": 9}"#);
    let found = |files: &[(&str, &str)]| {
        let tokenizer = model(files).1.expect("a tokenizer");
        (tokenizer.eos(), tokenizer.bos(), tokenizer.adds_bos())
    };
    assert_eq!(found(&[config, generation]), (Some(1), Some(9), true));
    assert_eq!(found(&[generation, ("config.json", r#"{"eos_token_id": 3}"#)]), (Some(7), Some(9), false));
    assert_eq!(found(&[("config.json", r#"{"eos_token_id": 3}"#)]), (Some(3), None, false));
    assert_eq!(found(&[]), (None, None, false));
}

/// A tokenizer that begins a text with its first token does so here; truncation and padding saved with it do not apply.
#[test]
fn a_tokenizer_with_a_template_adds_bos() {
    let text = std::fs::read_to_string(test_data("tiny-llama/tokenizer.json")).expect("a file");
    let mut json: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    json["post_processor"]["single"] =
        serde_json::json!([{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]);
    json["post_processor"]["special_tokens"] = serde_json::json!({"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}});
    json["truncation"] =
        serde_json::json!({"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0});
    let text = json.to_string();
    let (directory, tokenizer) = model(&[("tokenizer.json", &text), ("config.json", r#"{"bos_token_id": 0}"#)]);
    let tokenizer = tokenizer.expect("a tokenizer");
    assert!(tokenizer.adds_bos());
    assert_eq!(tokenizer.encode("ABASEMENT").expect("ids"), [34, 35, 34, 52, 38, 46, 1982, 53]);
    let fixture = Fixture::new("a.jsonl", r#"{"text": "AB"}"#, 8);
    let first = |add_bos, append_eos| {
        let config = DataConfig { add_bos, append_eos, ..fixture.config.clone() };
        Dataset::load(&config, &tokenizer).map(|dataset| dataset.batch(Split::Train, &[0]).ids)
    };
    assert_eq!(first(AddBos::Auto, false).expect("data"), [0, 34, 35]);
    assert_eq!(first(AddBos::Never, false).expect("data"), [34, 35]);
    let message = first(AddBos::Auto, true).expect_err("no end").to_string();
    assert!(message.starts_with("data.append-eos needs the end-of-sequence token, and none of "), "{message}");
    drop(directory);
}

#[test]
fn a_model_without_a_tokenizer_is_refused() {
    let directory = tempfile::tempdir().expect("a directory");
    let message = || Tokenizer::open(directory.path()).expect_err("none").to_string();
    assert!(message().contains("expected a tokenizer.json beside the model, found no tokenizer"), "{}", message());
    std::fs::write(directory.path().join("vocab.json"), "{}").expect("written");
    assert!(message().contains("found only vocab.json"), "{}", message());
    std::fs::write(directory.path().join("tokenizer.json"), "{}").expect("written");
    assert!(message().contains("tokenizer.json: expected a tokenizer of the tokenizers library"), "{}", message());
    let unknown = model(&[("tokenizer_config.json", r#"{"eos_token": "<end>"}"#)]).1.expect_err("unknown").to_string();
    assert!(unknown.ends_with(r#"expected a token of the vocabulary in "eos_token", found "<end>""#), "{unknown}");
}

// ---- reading

#[test]
fn a_bad_line_is_named_and_fatal() {
    let good = "{\"text\": \"AB\"}\n";
    let check = |line: &[u8], expected: &str| {
        let content = [good.as_bytes(), b"\r\n", line, b"\n", good.as_bytes()].concat();
        assert_eq!(Fixture::new("a.jsonl", content, 8).message(), format!("a.jsonl, line 3 (byte 17): {expected}"));
    };
    check(br#"{"text": 5}"#, "expected a string in \"text\", found a number");
    check(b"{\"text\": \"\xff\"}", "expected UTF-8, found another byte at 10 of the line");
    check(b"[]", "expected a JSON object, found an array");
    check(b"{\"text\": \"a\"", "expected a JSON object, found EOF while parsing an object at line 1 column 12");
}

#[test]
fn bad_lines_are_skipped_and_counted_by_choice() {
    let content = "\u{feff}{\"text\": \"AB\"}\r\n{\"text\": 5}\r\n\r\n{\"text\": \"\"}\r\n{\"text\": \"BA\"}";
    let fixture = Fixture::new("a.jsonl", content, 8).with(|config| config.on_bad_line = OnBadLine::Skip);
    let dataset = fixture.dataset();
    assert_eq!(dataset.batch(Split::Train, &[0]).ids, [34, 35, EOS, 35, 34, EOS]);
    let counts = dataset.counts().train;
    assert_eq!((counts.records, counts.empty_records, counts.bad_lines), (3, 1, 1));
    assert_eq!(dataset.bad_lines().len(), 1);
    assert_eq!((dataset.bad_lines()[0].line, dataset.bad_lines()[0].offset_bytes), (2, 19));
    let said = counts.to_string();
    assert_eq!(said, "3 records, 1 sequences, 6 tokens, 4 of them learned, 1 bad lines skipped, 1 empty records");
    let none = Fixture::new("a.jsonl", "{}\n", 8).with(|config| config.on_bad_line = OnBadLine::Skip).message();
    assert_eq!(none, "training data: expected at least one token to learn, found none in 0 records (1 bad lines)");
}

#[test]
fn files_that_cannot_be_used_are_named() {
    assert_eq!(Fixture::new("a.jsonl", "", 8).message(), "a.jsonl: expected text, found an empty file");
    let parquet = "a.parquet: expected .jsonl or .txt, found .parquet; say format = \"jsonl\" or \"text\"";
    assert_eq!(Fixture::new("a.parquet", "PAR1", 8).message(), parquet);
    assert_eq!(Fixture::new("a.txt", b"ab\xff", 8).message(), "a.txt: expected UTF-8, found another byte at 2");
    let missing = Fixture::new("a.txt", "a", 8).with(|config| config.train[0].set_file_name("b.txt")).message();
    assert!(missing.starts_with("cannot open b.txt: No such file"), "{missing}");
}

/// A text file is one document: the mark is dropped, its line ends are line feeds, and it is cut where sequences end.
#[test]
fn a_text_file_is_one_document() {
    for packing in [true, false] {
        let fixture = Fixture::new("a.txt", "\u{feff}AB\r\nBA", 4).with(|config| config.packing = packing);
        let dataset = fixture.dataset();
        let newline = tokenizer().encode("\n").expect("ids")[0];
        let rows = rows(&dataset, Split::Train);
        assert_eq!(rows[0].ids, [34, 35, newline, 35], "packing {packing}");
        assert_eq!(rows[0].targets, [35, newline, 35, 34]);
        assert_eq!((&rows[1].ids[..], &rows[1].targets[..]), (&[34, EOS][..], &[EOS, X][..]));
        let counts = dataset.counts().train;
        assert_eq!((counts.tokens, counts.targets, counts.truncated_records), (6, 5, 0));
    }
}

// ---- the held-out part

#[test]
fn held_out_records_are_never_trained_on() {
    let whole = DataConfig::new(vec![test_data("devils-dictionary.jsonl")], 64);
    let config = DataConfig { evaluation_fraction: Some(0.1), packing: false, ..whole };
    let dataset = Dataset::load(&config, &tokenizer()).expect("data");
    let counts = dataset.counts();
    assert_eq!(counts.train.records + counts.evaluation.records, 915);
    // A tenth of 915 by hash: 91.5 expected, standard deviation 9.1.
    assert!((55..130).contains(&counts.evaluation.records), "{counts:?}");
    let texts = |split| rows(&dataset, split).into_iter().map(|row| row.ids).collect::<BTreeSet<_>>();
    let (train, evaluation) = (texts(Split::Train), texts(Split::Evaluation));
    assert!(!evaluation.is_empty());
    assert_eq!(train.intersection(&evaluation).count(), 0);
}

#[test]
fn copies_of_a_record_stay_together() {
    let content: String = (0..40)
        .flat_map(|i| [format!("{{\"text\": \"{i}\"}}\n"), format!("{{\"text\": \"{i}\", \"n\": 2}}\n")])
        .collect();
    let fixture = Fixture::new("a.jsonl", content, 8)
        .with(|config| (config.evaluation_fraction, config.packing) = (Some(0.5), false));
    let dataset = fixture.dataset();
    for split in [Split::Train, Split::Evaluation] {
        let rows = rows(&dataset, split);
        assert!(rows.len() >= 20, "about half of 80: {}", rows.len());
        assert!(rows.chunks(2).all(|pair| pair[0] == pair[1]));
    }
}

/// Of a text the end is held out: a third of nine tokens.
#[test]
fn the_end_of_a_text_is_held_out() {
    let fixture = Fixture::new("a.txt", "ABASEMENTA", 8).with(|config| config.evaluation_fraction = Some(0.34));
    let dataset = fixture.dataset();
    let ids = tokenizer().encode("ABASEMENTA").expect("ids");
    assert_eq!(ids.len(), 9);
    assert_eq!(dataset.batch(Split::Train, &[0]).ids, ids[..6]);
    assert_eq!(dataset.batch(Split::Train, &[0]).targets[5], X, "the next token is held out");
    assert_eq!(dataset.batch(Split::Evaluation, &[0]).ids, [&ids[6..], &[EOS]].concat());
}

#[test]
fn evaluation_files_are_a_part_of_their_own() {
    let fixture = Fixture::new("a.jsonl", r#"{"text": "AB"}"#, 8);
    let path = fixture.directory.path().join("b.jsonl");
    std::fs::write(&path, r#"{"text": "BA"}"#).expect("written");
    let dataset = fixture.with(|config| config.evaluation = vec![path]).dataset();
    assert_eq!(dataset.batch(Split::Train, &[0]).ids, [34, 35, EOS]);
    assert_eq!(dataset.batch(Split::Evaluation, &[0]).ids, [35, 34, EOS]);
}

// ---- packing

/// By hand: a text of 3, a pair of 2 + 3 and a text of 2 tokens, in sequences of 4.
#[test]
fn packing_by_hand() {
    let mut sequences = Sequences::new(4, true);
    sequences.push(&[10, 11, 12], 0);
    sequences.push(&[20, 21, 22, 23, 24], 2);
    sequences.push(&[30, 31], 0);
    assert_eq!(sequences.len(), 3);
    let batch = sequences.batch(&[0, 1, 2], 99, true);
    assert_eq!((batch.batch, batch.sequence), (3, 4));
    assert_eq!(batch.ids, [10, 11, 12, 20, /**/ 21, 22, 23, 24, /**/ 30, 31, 99, 99]);
    assert_eq!(batch.targets, [11, 12, X, X, /**/ 22, 23, 24, X, /**/ 31, X, X, X]);
    assert_eq!(batch.starts, [0, 0, 0, 3, /**/ 0, 0, 0, 0, /**/ 0, 0, 2, 3]);
    assert_eq!((sequences.counts.tokens, sequences.counts.targets), (10, batch.target_count()));
    let together = sequences.batch(&[0], 99, false);
    assert_eq!(together.starts, [0; 4]);
    assert_eq!(together.targets, batch.targets[..4]);
}

/// By hand: records of 3, of 6 (two are cut off, one of them is still a target), one whose prompt fills the sequence, and
/// one with nothing after its only token.
#[test]
fn one_record_a_sequence_by_hand() {
    let mut sequences = Sequences::new(4, false);
    sequences.push(&[10, 11, 12], 0);
    sequences.push(&[20, 21, 22, 23, 24, 25], 3);
    sequences.push(&[30, 31, 32, 33, 34, 35], 5);
    sequences.push(&[40], 0);
    let batch = sequences.batch(&[1, 0], 99, true);
    assert_eq!(sequences.len(), 2);
    assert_eq!(batch.ids, [20, 21, 22, 23, /**/ 10, 11, 12, 99]);
    assert_eq!(batch.targets, [X, X, 23, 24, /**/ 11, 12, X, X]);
    assert_eq!(batch.starts, [0, 0, 0, 0, /**/ 0, 0, 0, 3]);
    let counts = sequences.counts;
    assert_eq!((counts.truncated_records, counts.truncated_tokens, counts.unlearnable_records), (2, 4, 2));
    assert_eq!((counts.tokens, counts.targets), (7, batch.target_count()));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// PK-1 and PK-2 over documents of any lengths, each token an id of its own.
    #[test]
    fn pk_no_token_is_lost_and_targets_follow(
        documents in prop::collection::vec((1_usize..20, 0_usize..20), 1..20),
        length in 2_u32..12,
    ) {
        let mut sequences = Sequences::new(length, true);
        let (mut next_id, mut of_document) = (0_u32, Vec::new());
        for (document, &(len, masked)) in documents.iter().enumerate() {
            let end = next_id + u32::try_from(len).expect("small");
            let tokens: Vec<u32> = (next_id..end).collect();
            of_document.extend((0..len).map(|position| (document, position >= masked)));
            next_id = end;
            sequences.push(&tokens, masked);
        }
        let rows: Vec<Batch> = (0..sequences.len()).map(|index| sequences.batch(&[index], 0, true)).collect();
        let ids: Vec<u32> = rows.iter().flat_map(|row| row.ids.clone()).collect();
        prop_assert_eq!(&ids, &(0..next_id).collect::<Vec<_>>());
        let targets: Vec<u32> = rows.iter().flat_map(|row| row.targets.clone()).collect();
        for (id, &target) in (0..next_id).zip(&targets) {
            let own = of_document[as_usize(u64::from(id))];
            let follows = of_document.get(as_usize(u64::from(id) + 1));
            let expected = if follows.is_some_and(|next| next.0 == own.0 && next.1) { id + 1 } else { IGNORED };
            prop_assert_eq!(target, expected, "after {}", id);
        }
        prop_assert_eq!(sequences.counts.targets, as_u64(targets.iter().filter(|&&target| target != IGNORED).count()));
        for row in &rows {
            prop_assert!(row.sequence <= as_usize(u64::from(length)));
            for (position, &start) in row.starts.iter().enumerate() {
                let start = as_usize(u64::from(start));
                let document = |at: usize| of_document[as_usize(u64::from(row.ids[at]))].0;
                prop_assert!(start <= position && document(start) == document(position));
                prop_assert!(start == 0 || document(start - 1) != document(start));
            }
        }
    }
}

// ---- identity

#[test]
fn da_1_the_digest_tells_data_apart() {
    let digest = |content: &str, change: fn(&mut DataConfig)| {
        Fixture::new("a.jsonl", content, 8).with(change).dataset().digest()
    };
    let text = "{\"text\": \"ABAB\"}\n{\"text\": \"BA\"}\n";
    let first = digest(text, |_| {});
    assert_eq!(first, digest(text, |config| config.shuffle = false), "the order is not the data");
    let others = [
        digest("{\"text\": \"ABAB\"}\n{\"text\": \"AB\"}\n", |_| {}),
        digest("{\"text\": \"BA\"}\n{\"text\": \"ABAB\"}\n", |_| {}),
        digest("{\"prompt\": \"AB\", \"completion\": \"AB\"}\n{\"text\": \"BA\"}\n", |_| {}),
        digest(text, |config| config.sequence_length = 9),
        digest(text, |config| config.packing = false),
        digest(text, |config| config.document_attention = false),
        digest(text, |config| config.append_eos = false),
    ];
    let all: BTreeSet<&String> = others.iter().chain([&first]).collect();
    assert_eq!(all.len(), 8);
    assert!(first.starts_with("sha256:") && first.len() == 71, "{first}");
}

#[test]
fn the_order_follows_the_configuration() {
    let fixture = Fixture::new("a.txt", "ABASEMENT".repeat(40), 4);
    let dataset = fixture.dataset();
    let order = dataset.order(3);
    assert_eq!(order.len(), dataset.sequences(Split::Train));
    let epoch: Vec<u64> = (0..order.len()).map(|cursor| order.sample(cursor).1).collect();
    assert_ne!(epoch, (0..order.len()).collect::<Vec<_>>());
    let sequential = fixture.with(|config| config.shuffle = false).dataset().order(3);
    assert_eq!(sequential.sample(2), (0, 2));
    assert_eq!(dataset.largest_id(), *tokenizer().encode("ABASEMENT").expect("ids").iter().max().expect("ids"));
}
