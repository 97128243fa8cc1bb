//! The first process of the guests in `tests/shared`: uses a shared directory as containers do.
//!
//! It mounts the directory, dials the host's port `AGENT_PORT`, says `ready`, and takes commands, one line each,
//! answered by one line each.

#[path = "shared/scenarios.rs"]
mod scenarios;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount, umount};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, VsockAddr, connect, socket};
use vmshim_protocol::shared::TAG;
use vmshim_protocol::vsock::{AGENT_PORT, HOST_CID};

/// What went wrong, as a sentence for the test.
pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const SHARED: &str = "/shared";

fn main() {
    // As a program that a scenario runs.
    if std::env::args().nth(1).is_some() {
        return;
    }
    if let Err(error) = run() {
        // The only place where anybody may see it.
        let _ = fs::write("/dev/kmsg", format!("<0>shared: {error}"));
        std::process::exit(1);
    }
}

fn run() -> Result<()> {
    for (kind, place) in [("proc", "/proc"), ("devtmpfs", "/dev")] {
        // The kernel may have mounted /dev already.
        let _ = mount(Some(kind), place, Some(kind), MsFlags::empty(), None::<&str>);
    }
    fs::create_dir_all(SHARED)?;
    mount_shared()?;
    let stream = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    connect(stream.as_raw_fd(), &VsockAddr::new(HOST_CID, AGENT_PORT))?;
    let mut replies = File::from(stream);
    let commands = BufReader::new(replies.try_clone()?);
    writeln!(replies, "ready")?;
    let mut held = Vec::new();
    for command in commands.lines() {
        let command = command?;
        let words: Vec<&str> = command.split_whitespace().collect();
        match obey(&words, &mut held) {
            Ok(reply) => writeln!(replies, "{reply}")?,
            Err(error) => writeln!(replies, "error: {error}")?,
        }
    }
    Ok(())
}

fn mount_shared() -> Result<()> {
    Ok(mount(Some(TAG), SHARED, Some("virtiofs"), MsFlags::MS_NODEV, None::<&str>)?)
}

fn path(name: &str) -> PathBuf {
    Path::new(SHARED).join(name)
}

fn obey(words: &[&str], held: &mut Vec<File>) -> Result<String> {
    match *words {
        ["mount"] => mount_shared()?,
        ["umount"] => umount(SHARED)?,
        ["read", name] => return Ok(fs::read_to_string(path(name))?),
        ["write", name, text] => fs::write(path(name), text)?,
        ["readlink", name] => return Ok(fs::read_link(path(name))?.display().to_string()),
        ["size", name] => return Ok(fs::metadata(path(name))?.len().to_string()),
        ["inode", name] => return Ok(fs::metadata(path(name))?.ino().to_string()),
        ["hold", name] => held.push(File::open(path(name))?),
        ["reread"] => {
            let file = held.last_mut().ok_or("nothing is held")?;
            let mut text = vec![0; 64];
            let length = std::os::unix::fs::FileExt::read_at(file, &mut text, 0)?;
            return Ok(String::from_utf8_lossy(&text[..length]).into_owned());
        }
        ["drop"] => held.clear(),
        ["count", name] => return Ok(fs::read_dir(path(name))?.count().to_string()),
        ["scenario", name, directory] => scenarios::run(name, &path(directory))?,
        _ => return Err("unknown command".into()),
    }
    Ok("done".into())
}
