//! From a process's standard streams to the vsock ports that the guest dials for them.
//!
//! Output is connected while the process is made, standard input when it starts: a client that writes a few bytes and
//! is done must find nobody to take them before it has been told of the task, since it says by CloseIO that it is done.

use std::os::fd::{AsFd, OwnedFd};

use tokio::time::Instant;
use vmshim_protocol::agent as api;
use vmshim_protocol::control::FdRole;

use super::TaskError;
use super::create::blocking;
use super::pod::Pod;
use super::process::Process;
use crate::stdio::Opened;
use crate::vm::{Closed, Port, Vm};

/// Gives the opened streams to the VMM, each on a port of its own, and what is kept to the process. Standard input that
/// is no terminal gets its port and nothing else yet.
///
/// # Errors
/// When the VMM does not take one; then none stays.
pub async fn connect(
    vm: &Vm,
    process: &Process,
    opened: Opened,
    deadline: Instant,
) -> Result<api::Stdio, TaskError> {
    let result = connect_each(vm, process, opened, deadline).await;
    if result.is_err() {
        forget(vm, process, deadline).await;
    }
    result
}

async fn connect_each(
    vm: &Vm,
    process: &Process,
    opened: Opened,
    deadline: Instant,
) -> Result<api::Stdio, TaskError> {
    let terminal = process.streams.terminal;
    let source = opened.stdin.as_ref().map(|fd| (FdRole::StreamSource, fd));
    let sink = opened.stdout.as_ref().map(|fd| (FdRole::StreamSink, fd));
    let errors = opened.stderr.as_ref().map(|fd| (FdRole::StreamSink, fd));
    // A terminal is one stream that carries both directions.
    let first: Vec<_> = source.into_iter().chain(sink).collect();
    let second: Vec<_> = errors.into_iter().collect();
    let (stdout, stderr) = tokio::join!(expect(vm, &first, deadline), expect(vm, &second, deadline));
    let (stdout, stderr, mut failure) = match (stdout, stderr) {
        (Ok(stdout), Ok(stderr)) => (stdout, stderr, None),
        (Ok(one), Err(error)) | (Err(error), Ok(one)) => (one, None, Some(error)),
        (Err(error), Err(_)) => (None, None, Some(error)),
    };
    let number = |stream: &Option<(Port, Closed)>| stream.as_ref().map_or(0, |(port, _)| port.0);
    let owner = &process.streams.owner;
    let mut stdio = api::Stdio {
        stdout: number(&stdout),
        stderr: number(&stderr),
        terminal,
        uid: owner.uid,
        gid: owner.gid,
        ..Default::default()
    };
    process.connect(opened.kept, stdout.into_iter().chain(stderr).collect());
    if failure.is_none() && process.streams.has_late_input() {
        match vm.reserve() {
            Ok((port, closed)) => {
                stdio.stdin = port.0;
                process.reserve_input(port, closed);
            }
            Err(error) => failure = Some(error.into()),
        }
    }
    failure.map_or(Ok(stdio), Err)
}

async fn expect(
    vm: &Vm,
    fds: &[(FdRole, &OwnedFd)],
    deadline: Instant,
) -> Result<Option<(Port, Closed)>, TaskError> {
    if fds.is_empty() {
        return Ok(None);
    }
    let fds: Vec<_> = fds.iter().map(|(role, fd)| (*role, fd.as_fd())).collect();
    Ok(Some(vm.expect(&fds, deadline).await?))
}

/// Opens the standard input of a process that is about to start, where it has one, for the guest to dial.
///
/// # Errors
/// When it cannot be opened, or the VMM does not take it.
pub async fn connect_input(
    pod: &Pod,
    vm: &Vm,
    process: &Process,
    deadline: Instant,
) -> Result<(), TaskError> {
    let Some(port) = process.reserved_input() else { return Ok(()) };
    let (streams, clients) = (process.streams.clone(), pod.streams.clone());
    let (source, writer) = blocking("open stdin", move || streams.open_input(&clients)).await??;
    // Before anybody can be told of the source, so that a CloseIO finds the writer.
    process.keep_input(writer);
    vm.supply(port, &[(FdRole::StreamSource, source.as_fd())], deadline).await?;
    process.input_is_open();
    Ok(())
}

/// Takes back every port of a process.
pub async fn forget(vm: &Vm, process: &Process, deadline: Instant) {
    for port in process.disconnect() {
        vm.forget(port, deadline).await;
    }
}
