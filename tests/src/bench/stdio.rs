//! Bytes a second through a container's `cat`.

use std::io::{Read, Write};
use std::process::Stdio;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::report::{Figure, Limit, Report, Row};
use super::{IMAGE, Plan};
use crate::containerd::{RUNC, VMSHIM};

/// Times each runtime is measured; one stream is long enough to be steady.
const RUNS: usize = 3;

/// `ctr run … cat` with a stream on its standard input.
pub fn cat(plan: &Plan<'_>, report: &mut Report) -> Result<()> {
    let rate = |runtime: &str| -> Result<Figure> {
        let rates = (0..RUNS).map(|run| one(plan, runtime, run)).collect::<Result<Vec<_>>>()?;
        Figure::of(rates).context("no run")
    };
    let (vmshim, runc) = (rate(VMSHIM)?, rate(RUNC)?);
    report.rows.push(Row {
        name: format!("cat of {} MB", plan.stream_bytes / 1_000_000),
        unit: "MB/s",
        vmshim,
        runc: Some(runc),
        limit: Some(Limit::AtLeast(0.5)),
        hung: 0,
    });
    Ok(())
}

/// MB/s between the first byte that comes back and the last.
fn one(plan: &Plan<'_>, runtime: &str, run: usize) -> Result<f64> {
    let id = format!("cat{run}");
    let mut ctr = plan.daemon.ctr(["run", "--rm", "--runtime", runtime, IMAGE, &id, "cat"]);
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
    let mut buffer = vec![0; 1 << 20];
    let mut received = stdout.read(&mut buffer)? as u64;
    let started = Instant::now();
    loop {
        let length = stdout.read(&mut buffer)?;
        if length == 0 {
            break;
        }
        received += length as u64;
    }
    let seconds = started.elapsed().as_secs_f64();
    ensure!(writer.join().is_ok_and(|result| result.is_ok()), "not all could be written");
    ensure!(child.wait()?.success() && received == bytes, "{received} of {bytes} bytes came back");
    let megabytes = std::time::Duration::from_micros(bytes).as_secs_f64();
    Ok(megabytes / seconds)
}
