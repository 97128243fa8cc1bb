//! The first process of the guests in `tests/machine`: does what the test says.
//!
//! The kernel parameter `guest=` says what to do first; by default it dials the host's port `AGENT_PORT` and then takes
//! commands, one line each, answered by one line each.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use nix::libc;
use nix::mount::{MsFlags, mount};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, VsockAddr, connect, socket};
use vmshim_protocol::power::{POWER_OFF, POWER_PORT};
use vmshim_protocol::vsock::{AGENT_PORT, HOST_CID};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() {
    if let Err(error) = run() {
        say(&format!("guest: {error}"));
    }
}

/// To the kernel's log, and loud enough for the console.
fn say(line: &str) {
    // In one piece: each write is an entry of its own.
    let entry = format!("<0>{line}\n");
    let written =
        OpenOptions::new().write(true).open("/dev/kmsg").and_then(|mut log| log.write_all(entry.as_bytes()));
    written.unwrap_or_else(|error| println!("{line} ({error})"));
}

fn run() -> Result<()> {
    for (kind, place) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        // The kernel may have mounted /dev already.
        let _ = mount(Some(kind), place, Some(kind), MsFlags::empty(), None::<&str>);
    }
    say("guest: init runs");
    let parameters = fs::read_to_string("/proc/cmdline")?;
    match parameters.split_whitespace().find_map(|word| word.strip_prefix("guest=")) {
        None => serve(),
        Some("hang") => loop {
            std::thread::park();
        },
        Some("power-off") => power_off(),
        Some("restart") => restart(),
        // The kernel panics when its first process ends.
        Some("die") => Ok(()),
        Some(other) => Err(format!("unknown parameter guest={other}").into()),
    }
}

fn serve() -> Result<()> {
    let stream = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    connect(stream.as_raw_fd(), &VsockAddr::new(HOST_CID, AGENT_PORT))?;
    let mut replies = File::from(stream);
    let commands = BufReader::new(replies.try_clone()?);
    writeln!(replies, "ready")?;
    for command in commands.lines() {
        let command = command?;
        let words: Vec<&str> = command.split_whitespace().collect();
        match obey(&words) {
            Ok(reply) => writeln!(replies, "{reply}")?,
            Err(error) => writeln!(replies, "error: {error}")?,
        }
    }
    power_off()
}

fn obey(words: &[&str]) -> Result<String> {
    match *words {
        ["power-off"] => power_off().map(|()| String::new()),
        ["restart"] => restart().map(|()| String::new()),
        ["die"] => std::process::exit(0),
        ["online"] => online(),
        ["memory"] => memory(),
        ["touch", mib] => touch(mib.parse()?),
        ["keep", mib] => keep(mib.parse()?),
        ["size", slot] => Ok(fs::read_to_string(disk(slot)?.0.join("size"))?.trim().to_owned()),
        ["read-only", slot] => Ok(fs::read_to_string(disk(slot)?.0.join("ro"))?.trim().to_owned()),
        ["write", slot, offset, length, byte] => {
            let data = vec![byte.parse()?; length.parse()?];
            let file = open(slot)?;
            file.write_all_at(&data, offset.parse()?)?;
            file.sync_all()?;
            Ok("done".into())
        }
        ["read", slot, offset, length] => read(slot, offset.parse()?, length.parse()?),
        ["discard", slot, offset, length] => {
            let range: [u64; 2] = [offset.parse()?, length.parse()?];
            // SAFETY: BLKDISCARD reads two u64 from the address given.
            let code = unsafe { libc::ioctl(open(slot)?.as_raw_fd(), 0x1277, range.as_ptr()) };
            if code == -1 { Err(io::Error::last_os_error().into()) } else { Ok("done".into()) }
        }
        ["mount-shared"] => {
            fs::create_dir_all("/shared")?;
            mount(
                Some(vmshim_protocol::shared::TAG),
                "/shared",
                Some("virtiofs"),
                MsFlags::empty(),
                None::<&str>,
            )?;
            Ok("done".into())
        }
        ["rebind", driver] => rebind(driver),
        ["look-again"] => look_again(),
        ["cat", path] => Ok(fs::read_to_string(path)?.trim().to_owned()),
        ["echo", text, path] => {
            fs::write(path, text)?;
            Ok("done".into())
        }
        ["random", length] => {
            let mut data = vec![0; length.parse()?];
            File::open("/dev/hwrng")?.read_exact(&mut data)?;
            Ok(format!("{}", data.iter().any(|&byte| byte != 0)))
        }
        ["uptime"] => Ok(fs::read_to_string("/proc/uptime")?.trim().to_owned()),
        ["clocksource"] => {
            let path = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
            Ok(fs::read_to_string(path)?.trim().to_owned())
        }
        ["kernel-log"] => kernel_log(),
        _ => Err("unknown command".into()),
    }
}

/// Brings up all CPUs and says how many there are.
fn online() -> Result<String> {
    for entry in fs::read_dir("/sys/devices/system/cpu")? {
        let switch = entry?.path().join("online");
        if switch.exists() && fs::read_to_string(&switch)?.trim() == "0" {
            fs::write(switch, "1")?;
        }
    }
    Ok(fs::read_to_string("/proc/cpuinfo")?
        .lines()
        .filter(|line| line.starts_with("processor"))
        .count()
        .to_string())
}

/// Resets the devices of a driver and starts them again; says how many.
fn rebind(driver: &str) -> Result<String> {
    let driver = PathBuf::from("/sys/bus/virtio/drivers").join(driver);
    let mut count = 0;
    for entry in fs::read_dir(&driver)? {
        let name = entry?.file_name().into_string().map_err(|_| "odd name")?;
        if name.starts_with("virtio") {
            fs::write(driver.join("unbind"), &name)?;
            fs::write(driver.join("bind"), &name)?;
            count += 1;
        }
    }
    Ok(count.to_string())
}

/// Starts the devices in slots that were empty at boot; says how many.
fn look_again() -> Result<String> {
    let mut count = 0;
    for entry in fs::read_dir("/sys/bus/platform/devices")? {
        let name = entry?.file_name().into_string().map_err(|_| "odd name")?;
        if name.starts_with("virtio-mmio.")
            && fs::write("/sys/bus/platform/drivers/virtio-mmio/bind", name).is_ok()
        {
            count += 1;
        }
    }
    Ok(count.to_string())
}

/// Uses memory for a moment.
fn touch(mib: usize) -> Result<String> {
    let memory = vec![1u8; mib << 20];
    let sum: usize = memory.chunks(4096).map(|page| usize::from(page[0])).sum();
    Ok((sum >> 8).to_string())
}

/// Uses memory for good.
fn keep(mib: usize) -> Result<String> {
    let memory = vec![1u8; mib << 20].leak();
    Ok((memory.len() >> 20).to_string())
}

/// KiB that the kernel has.
fn memory() -> Result<String> {
    let info = fs::read_to_string("/proc/meminfo")?;
    let total = info.lines().next().and_then(|line| line.split_whitespace().nth(1));
    Ok(total.ok_or("no total")?.to_owned())
}

/// The disk whose serial number is `slot`: its directory in sysfs, and its name.
fn disk(slot: &str) -> Result<(PathBuf, String)> {
    for entry in fs::read_dir("/sys/block")? {
        let entry = entry?;
        if fs::read_to_string(entry.path().join("serial")).is_ok_and(|serial| serial.trim() == slot) {
            let name = entry.file_name().into_string().map_err(|_| "odd name")?;
            return Ok((entry.path(), name));
        }
    }
    Err(format!("no disk {slot}").into())
}

/// Past the page cache, so that every access is a request.
fn open(slot: &str) -> Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let path = format!("/dev/{}", disk(slot)?.1);
    Ok(OpenOptions::new().read(true).write(true).custom_flags(libc::O_SYNC).open(path)?)
}

/// The first byte and whether all are the same.
fn read(slot: &str, offset: u64, length: usize) -> Result<String> {
    let file = File::open(format!("/dev/{}", disk(slot)?.1))?;
    // What is cached of the disk may be older than the disk.
    // SAFETY: BLKFLSBUF takes no argument.
    if unsafe { libc::ioctl(file.as_raw_fd(), 0x1261, 0) } == -1 {
        return Err(io::Error::last_os_error().into());
    }
    let mut data = vec![0; length];
    file.read_exact_at(&mut data, offset)?;
    let first = data.first().copied().unwrap_or(0);
    Ok(if data.iter().all(|&byte| byte == first) { first.to_string() } else { "mixed".into() })
}

/// What the kernel has said so far, on one line.
fn kernel_log() -> Result<String> {
    let mut log = OpenOptions::new().read(true).open("/dev/kmsg").map(OwnedFd::from)?;
    let flags = nix::fcntl::OFlag::O_NONBLOCK;
    nix::fcntl::fcntl(&log, nix::fcntl::FcntlArg::F_SETFL(flags))?;
    let mut lines = Vec::new();
    let mut buffer = [0; 8192];
    while let Ok(length) = nix::unistd::read(&mut log, &mut buffer) {
        let text = String::from_utf8_lossy(&buffer[..length]);
        let time = text.split(',').nth(2).unwrap_or_default().to_owned();
        let message =
            text.split(';').nth(1).unwrap_or_default().lines().next().unwrap_or_default().to_owned();
        lines.push(format!("{time} {message}"));
    }
    Ok(lines.join("|"))
}

fn power_off() -> Result<()> {
    // SAFETY: touches no memory.
    if unsafe { libc::ioperm(POWER_PORT.into(), 1, 1) } == -1 {
        return Err(io::Error::last_os_error().into());
    }
    // SAFETY: the machine ends at this instruction.
    unsafe { std::arch::asm!("out dx, al", in("dx") POWER_PORT, in("al") POWER_OFF) };
    Err("the machine goes on".into())
}

fn restart() -> Result<()> {
    nix::sys::reboot::reboot(nix::sys::reboot::RebootMode::RB_AUTOBOOT)?;
    Ok(())
}
