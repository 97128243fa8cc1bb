//! The files that a VM is made of, opened and looked at before the VMM gets them.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::{Path, PathBuf};

/// Why a VM cannot be made on this host or with these files.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// No usable `/dev/kvm`.
    #[error(
        "/dev/kvm cannot be opened ({0}); the host needs hardware virtualization (VMX or SVM), switched on in its \
         firmware or by its cloud, and the kernel module kvm_intel or kvm_amd"
    )]
    NoKvm(#[source] io::Error),
    /// KVM that can only run guests built for it.
    #[error(
        "/dev/kvm comes from kvm_pvm, which cannot run an ordinary kernel at a usable speed; use a host with \
         hardware virtualization (VMX or SVM)"
    )]
    PvmKvm,
    /// A file that cannot be opened.
    #[error("{what} {} cannot be opened ({source}); check {key} in the configuration", path.display())]
    Open {
        /// What it is for.
        what: &'static str,
        /// The setting that names it.
        key: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A kernel that is none.
    #[error("{} is not an uncompressed 64-bit ELF kernel (vmlinux); check hypervisor.kernel in the configuration", .0.display())]
    NotAKernel(PathBuf),
}

/// Opens `/dev/kvm`, unless it is of the kind that cannot run an ordinary guest.
pub fn kvm() -> Result<File, FileError> {
    if Path::new("/sys/module/kvm_pvm").exists() && !has_hardware_virtualization() {
        return Err(FileError::PvmKvm);
    }
    File::options().read(true).write(true).open("/dev/kvm").map_err(FileError::NoKvm)
}

/// Opens the guest's kernel.
pub fn kernel(path: &Path) -> Result<File, FileError> {
    let mut file = open("the guest kernel", "hypervisor.kernel", path)?;
    // The magic number, and the class of 64-bit files.
    let mut start = [0; 5];
    let is_elf = file.read_exact(&mut start).is_ok() && start == *b"\x7fELF\x02";
    if !is_elf || file.rewind().is_err() {
        return Err(FileError::NotAKernel(path.to_owned()));
    }
    Ok(file)
}

/// Opens the guest's root file system.
pub fn root_image(path: &Path) -> Result<File, FileError> {
    open("the guest's root image", "hypervisor.root_image", path)
}

fn open(what: &'static str, key: &'static str, path: &Path) -> Result<File, FileError> {
    File::open(path).map_err(|source| FileError::Open { what, key, path: path.to_owned(), source })
}

fn has_hardware_virtualization() -> bool {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    cpu_flags(&text).any(|flag| flag == "vmx" || flag == "svm")
}

/// Flags of the first CPU.
fn cpu_flags(cpuinfo: &str) -> impl Iterator<Item = &str> {
    let line = cpuinfo.lines().find(|line| line.starts_with("flags"));
    line.and_then(|line| line.split_once(':')).map_or("", |(_, flags)| flags).split_whitespace()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_words_not_substrings() {
        let info = "processor\t: 0\nflags\t\t: fpu svm_lock vmx\n";
        assert_eq!(cpu_flags(info).collect::<Vec<_>>(), ["fpu", "svm_lock", "vmx"]);
        assert_eq!(cpu_flags("processor: 0\n").count(), 0);
    }

    #[test]
    fn what_is_not_a_kernel_is_refused_with_the_setting_to_check() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vmlinux");
        assert!(kernel(&path).unwrap_err().to_string().contains("check hypervisor.kernel"));
        for content in [&b""[..], b"\x7fELF\x01", b"MZ......"] {
            std::fs::write(&path, content).unwrap();
            assert!(matches!(kernel(&path), Err(FileError::NotAKernel(_))));
        }
        std::fs::write(&path, b"\x7fELF\x02rest").unwrap();
        let mut text = Vec::new();
        kernel(&path).unwrap().read_to_end(&mut text).unwrap();
        assert_eq!(text, b"\x7fELF\x02rest");
    }
}
