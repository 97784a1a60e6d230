//! What one line of JSONL says.
//!
//! Owns: the fields of a record and what is wrong with a line. Refuses to know: files, tokens.

use serde_json::Value;

use super::{DataConfig, LineProblem};
use crate::types::as_u64;

/// One document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Record {
    /// A text that is learned whole.
    Text(String),
    /// A prompt, and what is learned after it.
    Pair { prompt: String, completion: String },
}

impl Record {
    /// Bytes of text.
    pub(super) fn len_bytes(&self) -> usize {
        match self {
            Self::Text(text) => text.len(),
            Self::Pair { prompt, completion } => prompt.len() + completion.len(),
        }
    }

    /// The record of a line; none when the line is blank.
    pub(super) fn parse(config: &DataConfig, line: &[u8]) -> Result<Option<Self>, LineProblem> {
        let text =
            std::str::from_utf8(line).map_err(|error| LineProblem::NotUtf8 { at: as_u64(error.valid_up_to()) })?;
        if text.trim().is_empty() {
            return Ok(None);
        }
        let value: Value =
            serde_json::from_str(text).map_err(|error| LineProblem::NotJson { message: error.to_string() })?;
        let Value::Object(mut fields) = value else { return Err(LineProblem::NotAnObject { found: name_of(&value) }) };
        let DataConfig { text_field, prompt_field, completion_field, .. } = config;
        let is_text = fields.contains_key(text_field);
        let is_pair = fields.contains_key(prompt_field) && fields.contains_key(completion_field);
        let mut take = |field: &str| match fields.remove(field) {
            Some(Value::String(text)) => Ok(text),
            other => Err(LineProblem::NotAString {
                field: field.to_owned(),
                found: other.as_ref().map_or("nothing", name_of),
            }),
        };
        match (is_text, is_pair) {
            (true, false) => Ok(Some(Self::Text(take(text_field)?))),
            (false, true) => {
                let (prompt, completion) = (take(prompt_field)?, take(completion_field)?);
                if completion.is_empty() {
                    return Err(LineProblem::EmptyCompletion { field: completion_field.clone() });
                }
                Ok(Some(Self::Pair { prompt, completion }))
            }
            (true, true) => Err(LineProblem::Ambiguous {
                fields: format!("{text_field:?}, {prompt_field:?} and {completion_field:?}"),
            }),
            (false, false) => {
                let expected = format!("{text_field:?}, or {prompt_field:?} and {completion_field:?}");
                if fields.contains_key("messages") {
                    return Err(LineProblem::Messages { expected });
                }
                Err(LineProblem::NoField { expected, found: names(&fields) })
            }
        }
    }
}

/// The names of fields, for a message.
fn names(fields: &serde_json::Map<String, Value>) -> String {
    const MOST: usize = 8;
    if fields.is_empty() {
        return "no field".to_owned();
    }
    let mut names: Vec<String> = fields.keys().take(MOST).map(|name| format!("{name:?}")).collect();
    if fields.len() > MOST {
        names.push(format!("{} more", fields.len() - MOST));
    }
    names.join(", ")
}

/// What a JSON value is, in words.
const fn name_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Option<Record>, LineProblem> {
        Record::parse(&DataConfig::new(vec!["a.jsonl".into()], 8), line.as_bytes())
    }

    #[test]
    fn records() {
        assert_eq!(parse(r#"{"text": "a", "id": 3}"#), Ok(Some(Record::Text("a".to_owned()))));
        let pair = Record::Pair { prompt: "a".to_owned(), completion: "b\u{e9}".to_owned() };
        assert_eq!(parse("{\"completion\": \"b\\u00e9\", \"prompt\": \"a\"}\r"), Ok(Some(pair)));
        assert_eq!(parse(" \t"), Ok(None));
    }

    #[test]
    fn each_kind_of_bad_line() {
        let check = |line: &str, expected: &str| assert_eq!(parse(line).expect_err("bad").to_string(), expected);
        check(r#"{"text": 3}"#, "expected a string in \"text\", found a number");
        check(r#"{"prompt": "a", "completion": null}"#, "expected a string in \"completion\", found null");
        check(r#"{"prompt": "a", "completion": ""}"#, "expected text in \"completion\", found an empty string");
        check(r#"["a"]"#, "expected a JSON object, found an array");
        check(r#"{"prompt": "a"}"#, "expected \"text\", or \"prompt\" and \"completion\", found \"prompt\"");
        check("{}", "expected \"text\", or \"prompt\" and \"completion\", found no field");
        check(
            r#"{"text": "a", "prompt": "b", "completion": "c"}"#,
            "expected a text or a prompt with completion, found \"text\", \"prompt\" and \"completion\"",
        );
        check(
            r#"{"messages": [{"role": "user", "content": "a"}]}"#,
            "expected \"text\", or \"prompt\" and \"completion\", found a chat in \"messages\", which is not supported",
        );
        let message = parse("{\"text\": \"a\"").expect_err("bad").to_string();
        assert!(message.starts_with("expected a JSON object, found EOF"), "{message}");
        let config = DataConfig::new(vec!["a.jsonl".into()], 8);
        let not_text = Record::parse(&config, b"{\"text\": \"\xff\"}").expect_err("bad");
        assert_eq!(not_text.to_string(), "expected UTF-8, found another byte at 10 of the line");
    }
}
