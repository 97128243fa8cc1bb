//! Several pairs of queues, the queue by which a driver says how many it uses, and limits of what passes.

use vmshim_protocol::control::RateLimit;

use super::*;

const PAIRS: u8 = 3;
const MANY: u64 = FEATURES | feature::CTRL_VQ | feature::MQ;

/// Which queue the control queue is.
const CONTROL: usize = 6;

/// Where commands and their answers are.
const COMMAND: u64 = 0x60_0000;
const ANSWER: u64 = COMMAND + 0x1000;

/// A command as Linux makes it.
const PIECES: [Piece; 3] = [(COMMAND, 2, 0), (COMMAND + 2, 2, 0), (ANSWER, 1, WRITE)];

const BUFFER: [Piece; 1] = [(DATA + 0x1000, 2000, WRITE)];
const FRAME: [Piece; 1] = [(DATA, 72, 0)];

impl Bench {
    /// A device of [`PAIRS`] pairs, each with a buffer and a frame, and of a driver with these commands to give.
    fn many(commands: &[&[Piece]]) -> Self {
        let (buffer, frame): (&[&[Piece]], &[&[Piece]]) = (&[&BUFFER], &[&FRAME]);
        let rings = [buffer, frame, buffer, frame, buffer, frame, commands];
        let bench = Self::of(PAIRS, Limits::NONE, MANY & !feature::MRG_RXBUF, &rings);
        bench.frame(PLAIN, 60);
        bench
    }

    /// Gives the only command that there is once more. Returns the answer to it.
    fn command(&self, command: [u8; 4]) -> u8 {
        self.memory.write_slice(&command, GuestAddress(COMMAND)).unwrap();
        self.memory.write_obj(0xeeu8, GuestAddress(ANSWER)).unwrap();
        let given = GuestAddress(u64::try_from(CONTROL).unwrap() * RINGS + 128 * 16 + 2);
        let before: u16 = self.memory.read_obj(given).unwrap();
        // The ring's entries are all 0, so each names the first chain.
        self.memory.write_obj(before.wrapping_add(1), given).unwrap();
        self.ring(CONTROL);
        self.memory.read_obj(GuestAddress(ANSWER)).unwrap()
    }

    /// A device that has the control queue to itself.
    fn commanded() -> Self {
        let bench = Self::many(&[&PIECES]);
        bench.memory.write_slice(&[4, 0, 1, 0], GuestAddress(COMMAND)).unwrap();
        bench.ring(CONTROL);
        bench
    }

    fn pairs(&self) -> usize {
        lock(&self.net).active.as_ref().unwrap().pairs.used()
    }
}

#[test]
fn pairs_are_offered_where_there_are_several() {
    let (one, many) = (Net::new(0, 1, Limits::NONE), Net::new(0, PAIRS, Limits::NONE));
    assert_eq!((one.features(), one.queue_sizes()), (FEATURES, &[256, 256][..]));
    assert_eq!((many.features(), many.queue_sizes().len()), (MANY, CONTROL + 1));
    let mut data = [0xee; 4];
    many.read_config(8, &mut data);
    assert_eq!(data, [PAIRS, 0, 0, 0]);
    let needed = [FEATURES, FEATURES | feature::CTRL_VQ, FEATURES | feature::MQ, MANY];
    assert_eq!(needed.map(|features| many.queues_needed(features)), [2, 3, 6, 7]);
}

#[test]
fn a_tap_needs_a_queue_for_each_pair() {
    let mut net = Net::new(0, PAIRS, Limits::NONE);
    for came in [0, 1, 2, 4] {
        let fds = (0..came).map(|_| tempfile::tempfile().unwrap().into()).collect();
        assert!(matches!(net.attach(fds), Err(TapError::Queues { needed: 3, .. })));
    }
    let fds = (0..3).map(|_| tempfile::tempfile().unwrap().into()).collect();
    assert!(matches!(net.attach(fds), Err(TapError::NotTap(_))));
}

#[test]
fn a_pair_passes_frames_only_while_it_is_in_use() {
    let bench = Bench::commanded();
    bench.others[0].send(&[7; 72]).unwrap();
    (0..6).for_each(|queue| bench.ring(queue));
    assert_eq!((bench.sent().map(|frame| frame.len()), received(&bench.others[0])), (Some(72), None));
    assert_eq!((bench.pairs(), bench.used_of(2)), (1, vec![]));

    assert_eq!(bench.command([4, 0, 2, 0]), 0);
    assert_eq!((bench.pairs(), bench.used_of(2)), (2, vec![(0, 72)]));
    assert_eq!(received(&bench.others[0]).map(|frame| frame.len()), Some(72));
    assert_eq!(received(&bench.others[1]), None);

    assert_eq!(bench.command([4, 0, 1, 0]), 0);
    assert_eq!(bench.pairs(), 1);
}

#[test]
fn impossible_commands_are_refused() {
    let bench = Bench::commanded();
    let refused = [[4, 0, 0, 0], [4, 0, 4, 0], [4, 0, 255, 255], [4, 1, 2, 0], [0, 0, 2, 0], [5, 0, 2, 0]];
    for command in refused {
        assert_eq!((bench.command(command), bench.pairs()), (1, 1), "{command:?}");
    }
    assert_eq!(bench.command([4, 0, 3, 0]), 0);
    assert_eq!((bench.pairs(), bench.statistics().errors), (3, 6));
}

#[test]
fn commands_of_another_shape_are_refused() {
    let shapes: [(&[Piece], u8); 9] = [
        (&[(COMMAND, 4, 0), (ANSWER, 1, WRITE)], 0),
        (&[(COMMAND, 1, 0), (COMMAND + 1, 3, 0), (ANSWER, 9, WRITE)], 0),
        (&[(COMMAND, 3, 0), (ANSWER, 1, WRITE)], 1),
        (&[(COMMAND, 5, 0), (ANSWER, 1, WRITE)], 1),
        (&[(RAM - 2, 4, 0), (ANSWER, 1, WRITE)], 1),
        (&[(ANSWER, 1, WRITE)], 1),
        (&[(COMMAND, 4, 0)], 0xee),
        (&[(COMMAND, 4, 0), (ANSWER, 0, WRITE)], 0xee),
        (&[(COMMAND, 1 << 31, 0), (ANSWER, 1, WRITE)], 1),
    ];
    for (pieces, expected) in shapes {
        let bench = Bench::many(&[pieces]);
        bench.memory.write_slice(&[4, 0, 2, 0], GuestAddress(COMMAND)).unwrap();
        bench.memory.write_obj(0xeeu8, GuestAddress(ANSWER)).unwrap();
        bench.ring(CONTROL);
        let answer: u8 = bench.memory.read_obj(GuestAddress(ANSWER)).unwrap();
        assert_eq!((answer, bench.pairs()), (expected, if expected == 0 { 2 } else { 1 }), "{pieces:?}");
    }
}

/// Each change takes a lock that the whole host's network has.
#[test]
fn a_driver_that_keeps_changing_its_mind_is_refused() {
    let bench = Bench::commanded();
    let answers: Vec<u8> = (0..20).map(|round| bench.command([4, 0, 1 + (round + 1) % 2, 0])).collect();
    let granted = answers.iter().filter(|answer| **answer == 0).count();
    // What comes in while this runs may be one more or two; to ask for what is so already is no change.
    assert!(answers[..8] == [0; 8] && granted < 19, "{answers:?}");
}

#[test]
fn a_reset_leaves_one_pair_in_use() {
    let bench = Bench::commanded();
    assert_eq!(bench.command([4, 0, 3, 0]), 0);
    lock(&bench.net).reset();
    for host in [&bench.host].into_iter().chain(&bench.others) {
        host.send(&[7; 72]).unwrap();
    }
    assert_eq!(bench.event_loop.turn(EpollTimeout::ZERO).unwrap(), 0);
}

#[test]
fn a_driver_without_several_pairs_has_its_control_queue_behind_the_first() {
    let chains: [&[&[Piece]]; 3] = [&[&BUFFER], &[&FRAME], &[&PIECES]];
    let bench = Bench::of(PAIRS, Limits::NONE, FEATURES | feature::CTRL_VQ, &chains);
    bench.frame(PLAIN, 60);
    bench.memory.write_slice(&[4, 0, 2, 0], GuestAddress(COMMAND)).unwrap();
    (0..7).for_each(|queue| bench.ring(queue));
    assert_eq!((bench.used_of(2), bench.pairs()), (vec![(0, 1)], 1));
    assert_eq!(bench.memory.read_obj::<u8>(GuestAddress(ANSWER)).unwrap(), 1);
    assert_eq!(bench.sent().unwrap().len(), 72);
}

fn limited(bytes_per_second: u64) -> Throttle {
    let number = |number| std::num::NonZeroU64::new(number).unwrap();
    let limit = RateLimit { bytes_per_second: number(bytes_per_second), burst_bytes: number(100) };
    Throttle::new(Some(limit)).unwrap()
}

/// The limit is reached with the second frame of 60 bytes; the third passes a second later.
#[test]
fn frames_beyond_a_limit_wait_for_the_timer() {
    let buffers: Vec<[Piece; 1]> = (0..100).map(|at| [(DATA + 0x1000 + at * 2048, 1000, WRITE)]).collect();
    let buffers: Vec<&[Piece]> = buffers.iter().map(|chain| &chain[..]).collect();
    let frames: [&[Piece]; 3] = [&FRAME, &FRAME, &FRAME];
    let limits = Limits { receive: limited(20), send: limited(20) };
    let bench = Bench::of(1, limits, FEATURES, &[&buffers, &frames]);
    bench.frame(PLAIN, 60);
    (0..3).for_each(|_| assert_eq!(bench.host.send(&[7; 72]).unwrap(), 72));
    bench.settle();
    bench.ring(1);
    assert_eq!((bench.used_of(0).len(), bench.used_of(1).len()), (2, 2));
    while bench.used_of(0).len() < 3 || bench.used_of(1).len() < 3 {
        bench.event_loop.turn(EpollTimeout::from(10_000u16)).unwrap();
    }
    assert_eq!((bench.statistics().read_bytes, bench.statistics().written_bytes), (180, 180));
}

/// Otherwise what the first pair sends could use up all there is each time.
#[test]
fn each_pair_has_its_turn_under_a_limit() {
    let (frames, none): (Vec<&[Piece]>, &[&[Piece]]) = (vec![&FRAME; 100], &[]);
    let limits = Limits { receive: Throttle::none(), send: limited(6000) };
    let bench = Bench::of(PAIRS, limits, MANY, &[none, &frames, none, &frames, none, &frames, &[&PIECES]]);
    bench.frame(PLAIN, 60);
    bench.memory.write_slice(&[4, 0, 3, 0], GuestAddress(COMMAND)).unwrap();
    bench.ring(CONTROL);
    assert_eq!(bench.pairs(), 3);
    while [1, 3, 5].iter().any(|queue| bench.used_of(*queue).is_empty()) {
        bench.event_loop.turn(EpollTimeout::from(10_000u16)).unwrap();
    }
    assert!(bench.used_of(1).len() < 100, "the first pair has sent all that it had");
}

#[test]
fn a_reset_lets_go_of_the_timers() {
    let limits = Limits { receive: limited(20), send: limited(20) };
    let bench = Bench::of(1, limits, FEATURES, &[&[&BUFFER], &[&FRAME, &FRAME, &FRAME]]);
    bench.frame(PLAIN, 60);
    bench.ring(1);
    assert_eq!(bench.used_of(1).len(), 2);
    lock(&bench.net).reset();
    assert_eq!(bench.event_loop.turn(EpollTimeout::from(1500u16)).unwrap(), 0);
}

proptest! {
    #[test]
    fn any_command_leaves_a_pair_in_use_and_no_more_than_there_are(
        pieces in prop::collection::vec((COMMAND - 8..RAM + 64, 0u32..12, 0u16..8), 1..12),
        commands in prop::collection::vec(any::<[u8; 4]>(), 0..12),
        near in prop::collection::vec(0u8..6, 0..12),
        bytes: [u8; 16],
    ) {
        let bench = Bench::many(&[&pieces]);
        bench.memory.write_slice(&bytes, GuestAddress(COMMAND - 8)).unwrap();
        bench.ring(CONTROL);
        prop_assert!((1..=3).contains(&bench.pairs()));
        let bench = Bench::commanded();
        for command in commands.into_iter().chain(near.into_iter().map(|count| [4, 0, count, 0])) {
            let before = bench.pairs();
            let answer = bench.command(command);
            let expected = if answer == 0 { usize::from(command[2]) } else { before };
            prop_assert!(answer <= 1 && bench.pairs() == expected);
            prop_assert!((1..=3).contains(&bench.pairs()));
        }
        (0..7).for_each(|queue| bench.ring(queue));
    }
}
