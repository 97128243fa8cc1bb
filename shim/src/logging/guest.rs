//! Lines of the guest's log, `<syslog level digit> <text>`.

use log::Level;

/// Splits a line into level and text; a line in another form is passed on whole as information.
pub fn parse_guest_line(line: &str) -> (Level, &str) {
    let Some((digit, text)) = line.split_once(' ') else {
        return (Level::Info, line);
    };
    let level = match digit {
        "0" | "1" | "2" | "3" => Level::Error,
        "4" => Level::Warn,
        "5" | "6" => Level::Info,
        "7" => Level::Debug,
        _ => return (Level::Info, line),
    };
    (level, text)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn levels_follow_syslog() {
        assert_eq!(parse_guest_line("3 disk on fire"), (Level::Error, "disk on fire"));
        assert_eq!(parse_guest_line("6 "), (Level::Info, ""));
        assert_eq!(parse_guest_line("9 x"), (Level::Info, "9 x"));
        assert_eq!(parse_guest_line("plain"), (Level::Info, "plain"));
    }

    proptest! {
        #[test]
        fn text_is_a_suffix_of_the_line(line in any::<String>()) {
            let (_, text) = parse_guest_line(&line);
            prop_assert!(line.ends_with(text));
        }
    }
}
