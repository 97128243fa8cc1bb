//! From `ctr`'s start to its end.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::report::{Figure, Limit, Report, Row};
use super::{IMAGE, Plan};
use crate::containerd::{RUNC, VMSHIM, tail};
use crate::timeline::Timeline;

/// Runs given up in a row before the benchmark gives up.
pub const MOST_HUNG: usize = 5;

/// Phases of one run, in milliseconds.
type Phases = Vec<(&'static str, Option<f64>)>;

/// Cold `ctr run --rm … true` of both runtimes in turn, with the phases of ours.
pub fn cold_run(plan: &Plan<'_>, report: &mut Report) -> Result<()> {
    let (mut ours, mut theirs, mut hung) = (Vec::new(), Vec::new(), 0);
    let mut phases: Vec<Phases> = Vec::new();
    for run in 0..=plan.runs {
        let runc =
            timed(plan, "runc", &["run", "--rm", "--runtime", RUNC, IMAGE, &format!("r{run}"), "true"])?;
        let log_length = plan.daemon.log().len();
        let elapsed = loop {
            let id = format!("v{run}-{hung}");
            match timed(plan, "vmshim", &["run", "--rm", "--runtime", VMSHIM, IMAGE, &id, "true"])? {
                Some(elapsed) => break elapsed,
                None => {
                    hung += 1;
                    clear(plan, &id);
                    ensure!(hung < MOST_HUNG, "{hung} runs hung: {}", tail(&plan.daemon.log()));
                }
            }
        };
        // The first run of each pays for what later ones find in the page cache.
        if run == 0 {
            continue;
        }
        theirs.push(runc.context("runc hung")?);
        ours.push(elapsed);
        phases.extend(Timeline::last_in(&plan.daemon.log()[log_length..]).map(|timeline| timeline.phases()));
    }
    report.rows.push(Row {
        name: "ctr run --rm true".into(),
        unit: "ms",
        vmshim: Figure::of(ours).context("no run")?,
        runc: Figure::of(theirs),
        limit: Some(Limit::AtMost(1.6)),
        hung,
    });
    report.rows.extend(phase_rows(&phases));
    Ok(())
}

fn phase_rows(runs: &[Phases]) -> Vec<Row> {
    let Some(first) = runs.first() else { return Vec::new() };
    let figures = first.iter().enumerate().filter_map(|(index, (name, _))| {
        let values = runs.iter().filter_map(|run| run.get(index)?.1).collect();
        Figure::of(values).map(|vmshim| (*name, vmshim))
    });
    figures
        .map(|(name, vmshim)| Row {
            name: format!("  {name}"),
            unit: "ms",
            vmshim,
            runc: None,
            limit: None,
            hung: 0,
        })
        .collect()
}

/// Starts a container that sleeps, again where it hangs; returns its id and how often it hung.
pub fn sleeper(plan: &Plan<'_>, runtime: &str, name: &str) -> Result<(String, usize)> {
    for hung in 0..MOST_HUNG {
        let id = format!("{name}-{hung}");
        if timed(plan, name, &["run", "--detach", "--runtime", runtime, IMAGE, &id, "sleep", "100000"])?
            .is_some()
        {
            return Ok((id, hung));
        }
        clear(plan, &id);
    }
    bail!("{MOST_HUNG} runs hung: {}", tail(&plan.daemon.log()))
}

/// `ctr task exec … true` in a running container of each runtime.
pub fn exec(plan: &Plan<'_>, report: &mut Report) -> Result<()> {
    let (vmshim, hung) = exec_in(plan, VMSHIM, "exec-vmshim")?;
    let (runc, _) = exec_in(plan, RUNC, "exec-runc")?;
    report.rows.push(Row {
        name: "ctr task exec true".into(),
        unit: "ms",
        vmshim,
        runc: Some(runc),
        limit: None,
        hung,
    });
    Ok(())
}

fn exec_in(plan: &Plan<'_>, runtime: &str, name: &str) -> Result<(Figure, usize)> {
    let (mut id, mut hung) = sleeper(plan, runtime, name)?;
    let mut values = Vec::new();
    while values.len() <= plan.runs {
        let exec = format!("e{}", values.len());
        match timed(plan, &id, &["task", "exec", "--exec-id", &exec, &id, "true"])? {
            Some(elapsed) => values.push(elapsed),
            None => {
                clear(plan, &id);
                hung += 1;
                ensure!(hung < MOST_HUNG, "{hung} runs hung: {}", tail(&plan.daemon.log()));
                id = sleeper(plan, runtime, &format!("{name}-again{hung}"))?.0;
            }
        }
    }
    clear(plan, &id);
    // The first pays for what later ones find in the page cache.
    let figure = Figure::of(values.split_off(1)).context("no run")?;
    Ok((figure, hung))
}

/// Milliseconds of one call of `ctr`; `None` when it hung.
fn timed(plan: &Plan<'_>, what: &str, arguments: &[&str]) -> Result<Option<f64>> {
    let mut command = plan.daemon.ctr(arguments);
    let started = Instant::now();
    let Some((success, errors)) = bounded(&mut command, plan.hang)? else { return Ok(None) };
    let elapsed = started.elapsed();
    ensure!(success, "{what}: {errors}");
    Ok(Some(elapsed.as_secs_f64() * 1000.0))
}

/// Runs a command that prints nothing of interest; `None` when it had to be killed.
fn bounded(command: &mut Command, limit: Duration) -> Result<Option<(bool, String)>> {
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    let pid = Pid::from_raw(child.id().try_into()?);
    let (done, waiting) = std::sync::mpsc::channel();
    let waiter = std::thread::spawn(move || done.send(finish(child)));
    let outcome = waiting.recv_timeout(limit);
    if outcome.is_err() {
        kill(pid, Signal::SIGKILL)?;
    }
    if waiter.join().is_err() {
        bail!("the thread that waits for ctr failed");
    }
    match outcome {
        Ok(result) => result.map(Some),
        Err(_) => Ok(None),
    }
}

fn finish(child: Child) -> Result<(bool, String)> {
    let output = child.wait_with_output()?;
    Ok((output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned()))
}

/// Removes a container in whatever state it is.
pub fn clear(plan: &Plan<'_>, id: &str) {
    // Either may be gone already; what is left shows in the next run.
    let _ = plan.daemon.ctr(["task", "rm", "--force", id]).output();
    let _ = plan.daemon.ctr(["container", "rm", id]).output();
}
