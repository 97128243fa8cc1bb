//! One line in logrus' text format, as containerd's own shims write it.

use std::fmt::Write;
use std::time::{SystemTime, UNIX_EPOCH};

use log::Level;

/// Formats fields that every line carries.
pub(super) fn fields(pairs: &[(&str, &str)]) -> String {
    let mut text = String::new();
    for (key, value) in pairs {
        let _ = write!(text, " {key}={}", quote(value));
    }
    text
}

/// Formats a whole line.
pub(super) fn format(time: SystemTime, level: Level, message: &str, fields: &str) -> String {
    let level = match level {
        Level::Error => "error",
        Level::Warn => "warning",
        Level::Info => "info",
        Level::Debug => "debug",
        Level::Trace => "trace",
    };
    format!("time=\"{}\" level={level} msg={}{fields}\n", timestamp(time), quote(message))
}

/// Replaces control characters, so that hostile text can neither end a line nor drive a terminal.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// Cuts `text` to at most `limit` bytes at a character's edge.
pub(super) fn truncate(text: &mut String, limit: usize) {
    if text.len() > limit {
        let edge = (0..=limit).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        text.truncate(edge);
    }
}

fn quote(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._/@^+".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        return text.to_owned();
    }
    let mut quoted = String::with_capacity(text.len() + 2);
    quoted.push('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            '\n' => quoted.push_str("\\n"),
            '\t' => quoted.push_str("\\t"),
            '\r' => quoted.push_str("\\r"),
            c if c.is_control() => {
                let _ = write!(quoted, "\\u{:04x}", u32::from(c));
            }
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

/// RFC 3339 with nanoseconds, in UTC.
fn timestamp(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let (year, month, day) = civil(days);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:09}Z",
        second / 3600,
        second / 60 % 60,
        second % 60,
        since.subsec_nanos()
    )
}

/// Year, month and day of a count of days since 1970-01-01 in the Gregorian calendar.
fn civil(days: u64) -> (u64, u64, u64) {
    // Years are counted from March, so that the leap day is the last of its year.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn line_looks_as_logrus_writes_it() {
        let time = UNIX_EPOCH + Duration::new(1_709_210_096, 7);
        let text = format(time, Level::Warn, "a \"b\"\nc", &fields(&[("id", "x-1"), ("runtime", "io.c v2")]));
        assert_eq!(
            text,
            "time=\"2024-02-29T12:34:56.000000007Z\" level=warning msg=\"a \\\"b\\\"\\nc\" id=x-1 runtime=\"io.c v2\"\n"
        );
    }

    #[test]
    fn dates_across_centuries() {
        assert_eq!(civil(0), (1970, 1, 1));
        assert_eq!(civil(11_016), (2000, 2, 29));
        assert_eq!(civil(11_017), (2000, 3, 1));
        assert_eq!(civil(47_540), (2100, 2, 28));
        assert_eq!(civil(47_541), (2100, 3, 1));
    }

    #[test]
    fn truncation_respects_characters() {
        let mut text = "aé".to_owned();
        truncate(&mut text, 2);
        assert_eq!(text, "a");
    }

    proptest! {
        #[test]
        fn a_message_never_breaks_its_line(message in any::<String>()) {
            let text = format(UNIX_EPOCH, Level::Info, &message, "");
            prop_assert!(!text[..text.len() - 1].chars().any(char::is_control));
        }
    }
}
