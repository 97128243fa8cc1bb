//! A pod's life, as the kubelet waits for it.

use std::time::Instant;

use anyhow::{Context, Result};

use super::Plan;
use super::pod::{HANDLERS, Pods, SLEEP};
use super::report::{Figure, Report, Row};

/// What is waited for, in the order in which it comes.
const STEPS: [&str; 6] = [
    "pod with a started container",
    "  RunPodSandbox",
    "  CreateContainer",
    "  StartContainer",
    "second container of a pod",
    "removal of a pod of two",
];

/// Milliseconds of each step.
type Times = [f64; STEPS.len()];

/// Pods of both runtimes in turn.
pub fn lives(plan: &Plan<'_>, report: &mut Report) -> Result<()> {
    let pods = Pods::connect(plan)?;
    let (mut times, mut hung) = ([Vec::new(), Vec::new()], 0);
    for run in 0..=plan.runs {
        for (handler, times) in HANDLERS.iter().zip(&mut times) {
            let life = pods.repeated(&mut hung, || life(&pods, handler))?;
            // The first of each pays for what later ones find in the page cache.
            if run > 0 {
                times.push(life);
            }
        }
    }
    let [ours, theirs] = times;
    for (index, name) in STEPS.iter().enumerate() {
        let figure = |times: &[Times]| Figure::of(times.iter().map(|times| times[index]).collect());
        report.rows.push(Row {
            name: (*name).into(),
            unit: "ms",
            vmshim: figure(&ours).context("no run")?,
            runc: figure(&theirs),
            limit: None,
            hung: if index == 0 { hung } else { 0 },
        });
    }
    Ok(())
}

fn life(pods: &Pods<'_>, handler: &str) -> Result<Times> {
    let started = Instant::now();
    let pod = pods.run(handler)?;
    let ran = Instant::now();
    let first = pod.create("first", SLEEP, &[])?;
    let created = Instant::now();
    pod.start(&first)?;
    let first_started = Instant::now();
    let second = pod.create("second", SLEEP, &[])?;
    pod.start(&second)?;
    let second_started = Instant::now();
    pod.end()?;
    let ended = Instant::now();
    Ok([
        first_started - started,
        ran - started,
        created - ran,
        first_started - created,
        second_started - first_started,
        ended - second_started,
    ]
    .map(|step| step.as_secs_f64() * 1000.0))
}
