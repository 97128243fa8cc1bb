//! Bytes a second through a container's `cat`.

use std::io::{Read, Write};
use std::process::Stdio;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::report::{Figure, Limit, Report, Row};
use super::run::{self, MOST_HUNG};
use super::{IMAGE, Plan};
use crate::containerd::{RUNC, VMSHIM, tail};

/// Times each runtime is measured; one stream is long enough to be steady.
const RUNS: usize = 3;

/// `ctr run … cat` with a stream on its standard input.
pub fn cat(plan: &Plan<'_>, report: &mut Report) -> Result<()> {
    let mut hung = 0;
    let mut rate = |runtime: &str| -> Result<Figure> {
        let mut rates = Vec::new();
        while rates.len() < RUNS {
            let id = format!("cat{}-{hung}", rates.len());
            match one(plan, runtime, &id)? {
                Some(rate) => rates.push(rate),
                None => {
                    hung += 1;
                    run::clear(plan, &id);
                    ensure!(hung < MOST_HUNG, "{hung} streams hung: {}", tail(&plan.daemon.log()));
                }
            }
        }
        Figure::of(rates).context("no run")
    };
    let (vmshim, runc) = (rate(VMSHIM)?, rate(RUNC)?);
    report.rows.push(Row {
        name: format!("cat of {} MB", plan.stream_bytes / 1_000_000),
        unit: "MB/s",
        vmshim,
        runc: Some(runc),
        limit: Some(Limit::AtLeast(0.5)),
        hung,
    });
    Ok(())
}

/// MB/s between the first byte that comes back and the last; `None` when no more came.
fn one(plan: &Plan<'_>, runtime: &str, id: &str) -> Result<Option<f64>> {
    let mut ctr = plan.daemon.ctr(["run", "--rm", "--runtime", runtime, IMAGE, id, "cat"]);
    let mut child = ctr.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn()?;
    let (mut stdin, mut stdout) =
        (child.stdin.take().context("stdin")?, child.stdout.take().context("stdout")?);
    let bytes = plan.stream_bytes;
    let writer = thread::spawn(move || -> std::io::Result<()> {
        let block = vec![b'x'; 1 << 20];
        let mut left = bytes;
        while left > 0 {
            let length = usize::try_from(left).unwrap_or(usize::MAX).min(block.len());
            stdin.write_all(&block[..length])?;
            left -= length as u64;
        }
        Ok(())
    });
    let watched = Watched::new(Pid::from_raw(child.id().try_into()?), plan.hang);
    let mut buffer = vec![0; 1 << 20];
    let mut received = stdout.read(&mut buffer)? as u64;
    let started = Instant::now();
    loop {
        let length = stdout.read(&mut buffer)?;
        if length == 0 {
            break;
        }
        received += length as u64;
        watched.is_alive();
    }
    let seconds = started.elapsed().as_secs_f64();
    let hung = watched.end();
    let written = writer.join().is_ok_and(|result| result.is_ok());
    let status = child.wait()?;
    if hung {
        return Ok(None);
    }
    ensure!(
        written && status.success() && received == bytes,
        "{runtime}: {status}: {received} of {bytes} bytes came back"
    );
    let megabytes = Duration::from_micros(bytes).as_secs_f64();
    Ok(Some(megabytes / seconds))
}

/// A process that is killed when it shows no sign of life for too long.
struct Watched {
    alive: Sender<()>,
    watcher: JoinHandle<bool>,
}

impl Watched {
    fn new(pid: Pid, limit: Duration) -> Self {
        let (alive, signs) = channel();
        let watcher = thread::spawn(move || {
            loop {
                match signs.recv_timeout(limit) {
                    Ok(()) => {}
                    Err(RecvTimeoutError::Disconnected) => return false,
                    // An error means that it is gone, which is what was wanted.
                    Err(RecvTimeoutError::Timeout) => return kill(pid, Signal::SIGKILL).is_ok(),
                }
            }
        });
        Self { alive, watcher }
    }

    fn is_alive(&self) {
        // A watcher that has killed the process listens no more.
        let _ = self.alive.send(());
    }

    /// Whether the process was killed.
    fn end(self) -> bool {
        drop(self.alive);
        self.watcher.join().unwrap_or(true)
    }
}
