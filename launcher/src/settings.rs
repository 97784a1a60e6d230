//! Reads one setting: its flag, or else its twin in the environment, by the same parser.
//!
//! Owns: the rule `--a-b` = `PET_A_B`, and the error that names the one that was wrong.

use std::time::Duration;

use crate::environment::Environment;
use crate::error::LaunchError;

/// The text of a setting, and where it stood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Setting {
    /// The flag or the variable.
    pub(crate) origin: String,
    /// Its text.
    pub(crate) text: String,
}

impl Setting {
    /// The setting of `flag`: as given on the command line, or else in its twin.
    pub(crate) fn find(flag: &str, given: Option<&str>, environment: &Environment) -> Option<Self> {
        if let Some(text) = given {
            return Some(Self { origin: flag.to_owned(), text: text.to_owned() });
        }
        let twin = twin(flag);
        environment.get(&twin).map(|text| Self { text: text.to_owned(), origin: twin.clone() })
    }

    /// Parses the text; an error says what is expected.
    pub(crate) fn parse<T>(
        self,
        expected: &'static str,
        parse: impl FnOnce(&str) -> Option<T>,
    ) -> Result<T, LaunchError> {
        match parse(self.text.trim()) {
            Some(value) => Ok(value),
            None => Err(LaunchError::BadValue { origin: self.origin, expected, found: self.text }),
        }
    }
}

/// The twin of a flag: `--nproc-per-node` is `PET_NPROC_PER_NODE`.
fn twin(flag: &str) -> String {
    format!("PET_{}", flag.trim_start_matches('-').replace('-', "_").to_ascii_uppercase())
}

/// Whether a switch is on: given, or its twin is a word for yes.
pub(crate) fn is_on(flag: &str, given: bool, environment: &Environment) -> Result<bool, LaunchError> {
    let Some(setting) = Setting::find(flag, None, environment) else { return Ok(given) };
    if given {
        return Ok(true);
    }
    setting.parse("1 or 0", |text| match text.to_ascii_lowercase().as_str() {
        "1" | "true" | "yes" | "on" => Some(true),
        "0" | "false" | "no" | "off" => Some(false),
        _ => None,
    })
}

/// Seconds, with or without a fraction; at most a year.
pub(crate) fn seconds(text: &str) -> Option<Duration> {
    const YEAR_S: f64 = 366.0 * 86_400.0;
    text.parse::<f64>().ok().filter(|s| (0.0..=YEAR_S).contains(s)).map(Duration::from_secs_f64)
}
