//! How fast files are.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::Instant;

use nix::libc;

use crate::Result;

const MIB: usize = 1 << 20;

#[repr(align(4096))]
struct Aligned([u8; MIB]);

/// Measures one thing; the answer is a figure with its unit.
pub fn run(what: &str, directory: &Path) -> Result<String> {
    // As in a container, whose root or mount point is the directory: nothing above it is looked up.
    std::env::set_current_dir(directory)?;
    let here = Path::new("");
    let result = match what {
        "write" => write(here),
        "read" => read(here),
        "random-read" => random(here, false),
        "random-write" => random(here, true),
        "create" => create(here),
        "stat" => stat(here),
        "open" => open(here),
        "cached-read" => cached(here),
        _ => Err(format!("nothing to measure called {what}").into()),
    };
    std::env::set_current_dir("/")?;
    result
}

fn drop_caches() -> Result<()> {
    Ok(fs::write("/proc/sys/vm/drop_caches", "3")?)
}

fn rate(count: usize, start: Instant, unit: &str) -> String {
    format!("{:.0} {unit}/s", count as f64 / start.elapsed().as_secs_f64())
}

const FILE_MIB: usize = 16;

fn write(dir: &Path) -> Result<String> {
    let data = Box::new(Aligned([7; MIB]));
    let mut file = File::create(dir.join("big"))?;
    let start = Instant::now();
    for _ in 0..FILE_MIB {
        file.write_all(&data.0)?;
    }
    Ok(rate(FILE_MIB, start, "MiB"))
}

fn read(dir: &Path) -> Result<String> {
    drop_caches()?;
    let mut data = Box::new(Aligned([0; MIB]));
    let mut file = File::open(dir.join("big"))?;
    let start = Instant::now();
    for _ in 0..FILE_MIB {
        file.read_exact(&mut data.0)?;
    }
    Ok(rate(FILE_MIB, start, "MiB"))
}

fn cached(dir: &Path) -> Result<String> {
    let mut data = Box::new(Aligned([0; MIB]));
    let file = File::open(dir.join("big"))?;
    let start = Instant::now();
    for i in 0..FILE_MIB {
        file.read_exact_at(&mut data.0, (i % 4 * MIB) as u64)?;
    }
    Ok(rate(FILE_MIB, start, "MiB"))
}

/// 4 KiB at a time past the guest's cache, so that each is a request.
fn random(dir: &Path, write: bool) -> Result<String> {
    const COUNT: usize = 200;
    let file =
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(dir.join("big"))?;
    let mut data = Box::new(Aligned([1; MIB]));
    let mut position = 1usize;
    let start = Instant::now();
    for _ in 0..COUNT {
        position = position.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let offset = (position >> 33) % (FILE_MIB * 256) * 4096;
        if write {
            file.write_all_at(&data.0[..4096], offset as u64)?;
        } else {
            file.read_exact_at(&mut data.0[..4096], offset as u64)?;
        }
    }
    Ok(rate(COUNT, start, "requests"))
}

const FILES: usize = 60;

fn create(dir: &Path) -> Result<String> {
    let small = dir.join("small");
    fs::create_dir(&small)?;
    let start = Instant::now();
    for i in 0..FILES {
        fs::write(small.join(i.to_string()), "some text")?;
    }
    Ok(rate(FILES, start, "files"))
}

fn stat(dir: &Path) -> Result<String> {
    drop_caches()?;
    let start = Instant::now();
    for _ in 0..4 {
        for i in 0..FILES {
            fs::metadata(dir.join("small").join(i.to_string()))?;
        }
    }
    Ok(rate(4 * FILES, start, "stats"))
}

fn open(dir: &Path) -> Result<String> {
    let start = Instant::now();
    for i in 0..FILES {
        fs::read(dir.join("small").join(i.to_string()))?;
    }
    Ok(rate(FILES, start, "open-read-closes"))
}
