//! How a VM ended, in words.

use vmshim_protocol::control::{MAX_CONSOLE_LINE, MAX_CONSOLE_LINES, Outcome};

use crate::logging::printable;

/// Console lines quoted in an error.
const QUOTED_LINES: usize = 3;

/// The end of a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct End {
    /// Whether it was meant to end.
    pub orderly: bool,
    reason: String,
    console: Vec<String>,
}

impl End {
    /// From what the VMM says, which is bounded here once more.
    pub fn from_outcome(outcome: Outcome, console: Vec<String>) -> Self {
        let (orderly, reason) = match outcome {
            Outcome::PoweredOff => (true, "the guest powered off".to_owned()),
            Outcome::Stopped => (true, "the VM was stopped".to_owned()),
            Outcome::Panicked => (false, "the guest's kernel panicked".to_owned()),
            Outcome::TripleFault => (false, "the guest crashed with a triple fault".to_owned()),
            Outcome::BootTimedOut => (
                false,
                "the guest's agent did not call within hypervisor.boot_timeout_seconds; check the kernel and the \
                 root image"
                    .to_owned(),
            ),
            Outcome::Failed { message } => (false, format!("the VMM failed: {}", clip(&message))),
        };
        let skipped = console.len().saturating_sub(MAX_CONSOLE_LINES);
        let console =
            console.iter().skip(skipped).filter(|line| says_something(line)).map(|line| clip(line)).collect();
        Self { orderly, reason, console }
    }

    /// The VMM ended without a word.
    pub fn died(status: &str, last_words: &str) -> Self {
        let mut reason = format!("the VMM {status}");
        if !last_words.is_empty() {
            reason.push_str(": ");
            reason.push_str(&clip(last_words));
        }
        Self { orderly: false, reason, console: Vec::new() }
    }

    /// Nobody knows any more.
    pub fn lost() -> Self {
        Self { orderly: false, reason: "the VM is gone".to_owned(), console: Vec::new() }
    }

    /// The VM never came to be.
    pub fn refused(reason: String) -> Self {
        Self { orderly: false, reason, console: Vec::new() }
    }

    /// One sentence, with the last lines of the console where the end was not orderly.
    pub fn sentence(&self) -> String {
        let tail = &self.console[self.console.len().saturating_sub(QUOTED_LINES)..];
        if self.orderly || tail.is_empty() {
            return self.reason.clone();
        }
        format!("{}; the console's last lines: {}", self.reason, tail.join(" | "))
    }

    /// All console lines there are.
    pub fn console(&self) -> &[String] {
        &self.console
    }
}

/// A panicking kernel sets itself off by a line with nothing but its time.
fn says_something(line: &str) -> bool {
    let is_time = |letter: char| letter.is_ascii_digit() || "[]. ".contains(letter);
    !line.chars().all(is_time)
}

fn clip(text: &str) -> String {
    let printable = printable(text);
    let edge = (0..=MAX_CONSOLE_LINE.min(printable.len())).rev().find(|at| printable.is_char_boundary(*at));
    printable[..edge.unwrap_or(0)].to_owned()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_crash_quotes_the_console_and_an_orderly_end_does_not() {
        let console: Vec<String> = (0..5).map(|line| format!("line {line}")).collect();
        let crash = End::from_outcome(Outcome::Panicked, console.clone());
        assert_eq!(
            crash.sentence(),
            "the guest's kernel panicked; the console's last lines: line 2 | line 3 | line 4"
        );
        assert_eq!(crash.console().len(), 5);
        let spaced = ["agent: no", "[    4.706376] ", "", "[ 1.0] panic"].map(String::from).to_vec();
        assert_eq!(End::from_outcome(Outcome::Panicked, spaced).console(), ["agent: no", "[ 1.0] panic"]);
        assert_eq!(End::from_outcome(Outcome::PoweredOff, console).sentence(), "the guest powered off");
        assert_eq!(End::died("was killed by SIGKILL", "").sentence(), "the VMM was killed by SIGKILL");
    }

    proptest! {
        #[test]
        fn whatever_the_vmm_says_is_bounded(lines in proptest::collection::vec(".{0,600}", 0..60), message in ".{0,600}") {
            let end = End::from_outcome(Outcome::Failed { message }, lines);
            prop_assert!(end.console().len() <= MAX_CONSOLE_LINES);
            prop_assert!(end.sentence().len() <= (QUOTED_LINES + 1) * MAX_CONSOLE_LINE + 100);
            prop_assert!(!end.sentence().chars().any(char::is_control));
        }
    }
}
