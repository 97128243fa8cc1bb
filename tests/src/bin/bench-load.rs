//! What the benchmark runs in a pod; see `vmshim_tests::load`.

use anyhow::{Context, Result, bail};
use vmshim_tests::load::network;

const HELP: &str = "\
Usage: bench-load serve PORT | throughput ADDRESS MIB | round-trip ADDRESS COUNT
Prints a figure a line: MB/s, or microseconds.";

fn run(words: &[&str]) -> Result<Vec<f64>> {
    let mib = |text: &str| anyhow::Ok(u64::from(text.parse::<u32>().context("MIB is a number")?) << 20);
    match *words {
        ["serve", port] => network::serve(port.parse()?).map(|()| Vec::new()),
        ["throughput", server, size] => Ok(vec![network::throughput(server.parse()?, mib(size)?)?]),
        ["round-trip", server, count] => Ok(vec![network::round_trip(server.parse()?, count.parse()?)?]),
        _ => bail!("wrong usage\n{HELP}"),
    }
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match run(&words) {
        Ok(figures) => figures.iter().for_each(|figure| println!("{figure}")),
        Err(error) => {
            eprintln!("bench-load: {error:#}");
            std::process::exit(1)
        }
    }
}
