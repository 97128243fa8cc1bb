//! Runs the benchmark inside the test host; `scripts/bench` is the way to call it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use vmshim_tests::bench::{self, Plan, ROWS, Report};
use vmshim_tests::containerd::Containerd;

const HELP: &str = "\
Usage: bench --containerd DIR --image TAR --pause TAR --load FILE --scratch DIR [--mode NAME] [--runs N]
  [--stream-mib N] [--network-mib N] [--json FILE] [ROW…]
Measures vmshim beside runc. Rows: run exec memory stdio size pods network; all where none is named.
Exit code: 0 when every limit is kept, 1 when one is missed or a measurement failed, 2 on wrong usage.";

/// Ten times what a run takes where time is counted instructions.
const HANG_COUNTED: Duration = Duration::from_secs(5);

/// And where it is the time on the wall, on which a CPU may be emulated.
const HANG: Duration = Duration::from_secs(60);

struct Arguments {
    containerd: PathBuf,
    image: PathBuf,
    pause: PathBuf,
    load: PathBuf,
    scratch: PathBuf,
    mode: String,
    runs: usize,
    stream_mib: u64,
    network_mib: u32,
    json: Option<PathBuf>,
    rows: Vec<String>,
}

fn arguments() -> Result<Arguments> {
    let (mut containerd, mut image, mut pause, mut load) = (None, None, None, None);
    let (mut scratch, mut json) = (None, None);
    let (mut mode, mut runs, mut stream_mib, mut rows) = ("hardware".to_owned(), 10, 256, Vec::new());
    let mut network_mib = 64;
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().with_context(|| format!("{word} needs a value"));
        match word.as_str() {
            "--containerd" => containerd = Some(value()?.into()),
            "--image" => image = Some(value()?.into()),
            "--pause" => pause = Some(value()?.into()),
            "--load" => load = Some(value()?.into()),
            "--scratch" => scratch = Some(value()?.into()),
            "--json" => json = Some(value()?.into()),
            "--mode" => mode = value()?,
            "--runs" => runs = value()?.parse().context("--runs takes a number")?,
            "--stream-mib" => stream_mib = value()?.parse().context("--stream-mib takes a number")?,
            "--network-mib" => network_mib = value()?.parse().context("--network-mib takes a number")?,
            row if ROWS.contains(&row) => rows.push(word),
            other => bail!("{other:?} is neither an option nor a row"),
        }
    }
    if rows.is_empty() {
        rows = ROWS.map(str::to_owned).to_vec();
    }
    Ok(Arguments {
        containerd: containerd.context("--containerd is missing")?,
        image: image.context("--image is missing")?,
        pause: pause.context("--pause is missing")?,
        load: load.context("--load is missing")?,
        scratch: scratch.context("--scratch is missing")?,
        mode,
        runs,
        stream_mib,
        network_mib,
        json,
        rows,
    })
}

fn run(arguments: &Arguments) -> Result<bool> {
    bench::prepare_network(&arguments.scratch)?;
    // On the file system that its volumes are on, too, so that it costs both runtimes the same to read.
    let load = arguments.scratch.join("bench-load");
    fs::copy(&arguments.load, &load)?;
    let daemon = Containerd::start(&arguments.containerd, &arguments.scratch)?;
    daemon.import(&arguments.image, "overlayfs")?;
    for image in [&arguments.image, &arguments.pause] {
        daemon.import_for_pods(image)?;
    }
    let plan = Plan {
        daemon: &daemon,
        runs: arguments.runs,
        hang: if arguments.mode == "icount" { HANG_COUNTED } else { HANG },
        stream_bytes: arguments.stream_mib << 20,
        network_mib: arguments.network_mib,
        load: &load,
        prefix: Path::new("/usr/local"),
    };
    let mut report = Report {
        mode: arguments.mode.clone(),
        containerd: daemon.version()?,
        host_kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned(),
        rows: Vec::new(),
    };
    let measured = bench::measure(&plan, &arguments.rows, &mut report);
    print!("{}", report.table());
    if let Some(path) = &arguments.json {
        fs::write(path, serde_json::to_vec_pretty(&report)?)?;
    }
    measured?;
    Ok(report.rows.iter().all(|row| row.met() != Some(false)))
}

fn main() {
    if std::env::args().any(|word| word == "--help") {
        println!("{HELP}");
        return;
    }
    let arguments = arguments().unwrap_or_else(|error| {
        eprintln!("bench: {error:#}\n{HELP}");
        std::process::exit(2)
    });
    match run(&arguments) {
        Ok(true) => {}
        Ok(false) => std::process::exit(1),
        Err(error) => {
            eprintln!("bench: {error:#}");
            std::process::exit(1)
        }
    }
}
