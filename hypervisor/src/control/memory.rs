//! Requests that are answered when the guest has the memory it was asked to have.

use vmshim_protocol::control::{Failure, FailureKind, Response};

/// Requests that wait at a time. A shim whose callers have gone forgets them; the oldest are let go.
const MOST_AWAITED: usize = 64;

/// Those that wait.
#[derive(Debug, Default)]
pub struct Awaited(Vec<Wait>);

#[derive(Debug)]
struct Wait {
    id: u64,
    bytes: u64,
}

impl Awaited {
    /// Adds the request of that id, which waits for so much.
    pub fn add(&mut self, id: u64, growth_mib: u32) {
        if self.0.len() == MOST_AWAITED {
            self.0.remove(0);
        }
        self.0.push(Wait { id, bytes: bytes(growth_mib) });
    }

    /// Takes out those to be answered now that the guest shall have `wanted` bytes and has `has`.
    pub fn answers(&mut self, wanted: u64, has: u64) -> Vec<(u64, Result<Response, Failure>)> {
        let answered = self.0.extract_if(.., |wait| wait.bytes <= has || wait.bytes > wanted);
        answered
            .map(|wait| (wait.id, if wait.bytes <= has { Ok(Response::Done) } else { Err(less()) }))
            .collect()
    }
}

fn less() -> Failure {
    let message = "Less memory is asked of the guest by now.".to_owned();
    Failure { kind: FailureKind::FailedPrecondition, message }
}

/// Bytes of so many MiB.
pub fn bytes(mib: u32) -> u64 {
    u64::from(mib) << 20
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answers(awaited: &mut Awaited, wanted: u32, has: u32) -> Vec<(u64, bool)> {
        let answers = awaited.answers(bytes(wanted), bytes(has));
        answers.into_iter().map(|(id, result)| (id, result.is_ok())).collect()
    }

    #[test]
    fn each_is_answered_once_and_when_it_is_time() {
        let mut awaited = Awaited::default();
        awaited.add(1, 100);
        awaited.add(2, 300);
        assert_eq!(answers(&mut awaited, 300, 99), []);
        assert_eq!(answers(&mut awaited, 300, 100), [(1, true)]);
        assert_eq!(answers(&mut awaited, 200, 150), [(2, false)]);
        assert_eq!(answers(&mut awaited, 300, 300), []);
    }

    #[test]
    fn what_nobody_waits_for_any_more_is_let_go() {
        let mut awaited = Awaited::default();
        (0..=64).for_each(|id| awaited.add(id, 1));
        let answered = answers(&mut awaited, 1, 1);
        assert_eq!((answered.len(), answered[0]), (64, (1, true)));
    }
}
