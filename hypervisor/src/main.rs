//! The VMM's process: `vmshim-vmm --control-fd N`.

use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::process::ExitCode;

use anyhow::{Context, bail};
use vmshim_hypervisor::{clock, control, jail, process};
use vmshim_protocol::control::ControlSocket;

const HELP: &str = "\
The virtual machine monitor of vmshim. The shim starts it; it is not meant to be run by hand.

Usage: vmshim-vmm --control-fd N

Options:
  --control-fd N  descriptor of a connected SOCK_SEQPACKET socket on which the shim gives its orders
  --help          print this help
  --version       print the version
";

/// Wrong arguments.
const USAGE: u8 = 2;

enum Invocation {
    Help,
    Version,
    Serve(RawFd),
}

fn main() -> ExitCode {
    let started_ns = clock::monotonic_ns();
    let invocation = match parse(std::env::args().skip(1)) {
        Ok(invocation) => invocation,
        Err(error) => {
            eprintln!("vmshim-vmm: {error:#}; see vmshim-vmm --help");
            return ExitCode::from(USAGE);
        }
    };
    match invocation {
        Invocation::Help => print!("{HELP}"),
        Invocation::Version => println!("vmshim-vmm {}", env!("CARGO_PKG_VERSION")),
        Invocation::Serve(fd) => {
            let Err(error) = serve(fd, started_ns);
            eprintln!("vmshim-vmm: {error:#}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

fn parse(arguments: impl Iterator<Item = String>) -> anyhow::Result<Invocation> {
    let arguments: Vec<String> = arguments.collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--help"] => Ok(Invocation::Help),
        ["--version"] => Ok(Invocation::Version),
        ["--control-fd", number] => {
            let fd = number.parse().ok().filter(|fd| *fd > 2);
            Ok(Invocation::Serve(fd.context("--control-fd needs the number of a descriptor above 2")?))
        }
        [] => bail!("--control-fd is missing"),
        [first, ..] => bail!("unexpected arguments from {first:?} on"),
    }
}

fn serve(fd: RawFd, started_ns: u64) -> anyhow::Result<std::convert::Infallible> {
    // SAFETY: asks about a number, whatever it is.
    if unsafe { nix::libc::fcntl(fd, nix::libc::F_SETFD, nix::libc::FD_CLOEXEC) } == -1 {
        bail!("descriptor {fd} is not open");
    }
    // SAFETY: it is open, and nothing else in this process knows it.
    let socket = ControlSocket::from_fd(unsafe { OwnedFd::from_raw_fd(fd) });
    jail::close_strangers(&socket)?;
    process::keep_small();
    control::serve(socket, started_ns).context("cannot serve the control socket")
}
