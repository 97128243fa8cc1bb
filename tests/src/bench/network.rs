//! TCP from one pod to another of the same runtime, over a bridge of the host's.

use anyhow::{Context, Result};

use super::Plan;
use super::pod::{HANDLERS, LOAD, Pods, SLEEP};
use super::report::{Figure, Report, Row};

/// Times each pair of pods is measured; one stream is long enough to be steady.
const RUNS: usize = 3;

/// Round trips of each time.
const ROUND_TRIPS: &str = "100";

const PORT: &str = "7000";

/// Throughput of one stream, and what one byte takes there and back.
pub fn between_pods(plan: &Plan<'_>, report: &mut Report) -> Result<()> {
    let pods = Pods::connect(plan)?;
    let mut hung = 0;
    let mut talk = |handler| pods.repeated(&mut hung, || talk(&pods, plan.network_mib, handler));
    let [ours, theirs] = [talk(HANDLERS[0])?, talk(HANDLERS[1])?];
    report.rows.push(Row {
        name: format!("TCP from pod to pod, {} MiB", plan.network_mib),
        unit: "MB/s",
        vmshim: ours.throughput,
        runc: Some(theirs.throughput),
        limit: None,
        hung,
    });
    report.rows.push(Row {
        name: "TCP round trip between pods".into(),
        unit: "µs",
        vmshim: ours.round_trip,
        runc: Some(theirs.round_trip),
        limit: None,
        hung: 0,
    });
    Ok(())
}

struct Talk {
    throughput: Figure,
    round_trip: Figure,
}

fn talk(pods: &Pods<'_>, mib: u32, handler: &str) -> Result<Talk> {
    let (served, calling) = (pods.run(handler)?, pods.run(handler)?);
    let server = served.loaded("server", &[LOAD, "serve", PORT], &[])?;
    let client = calling.loaded("client", SLEEP, &[])?;
    let address = format!("{}:{PORT}", served.address(&server)?);
    let measure = |load: &[&str]| {
        let times = (0..RUNS).map(|_| calling.measure(&client, load)).collect::<Result<Vec<_>>>()?;
        Figure::of(times.concat()).context("no run")
    };
    let round_trip = measure(&["round-trip", &address, ROUND_TRIPS])?;
    let throughput = measure(&["throughput", &address, &mib.to_string()])?;
    calling.end()?;
    served.end()?;
    Ok(Talk { throughput, round_trip })
}
