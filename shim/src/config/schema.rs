//! Every setting, declared once.

use std::path::PathBuf;

use toml::de::DeValue;

use super::annotations::LeftToPods;
use super::value::{LogLevel, Setting};

/// Why one key of a section could not be set.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum KeyError {
    /// The section has no such key.
    Unknown,
    /// The value does not fit; the text completes "`key` …".
    Value(String),
}

/// One key as `configuration.toml.example` shows it.
#[cfg(test)]
pub(super) struct Entry {
    pub(super) key: &'static str,
    pub(super) docs: &'static [&'static str],
    pub(super) range: Option<String>,
    pub(super) default: String,
}

/// Declares the sections and keys: each section becomes a struct, and all of them become [`Config`].
macro_rules! settings {
    ($(
        $(#[doc = $section_doc:literal])+
        [$section:ident] $Section:ident {
            $( $(#[doc = $doc:literal])+ $key:ident: $kind:ty = $default:expr $(, in $range:expr)?; )+
        }
    )+) => {
        $(
            $(#[doc = $section_doc])+
            #[derive(Debug, Clone, PartialEq, Eq)]
            pub struct $Section { $( $(#[doc = $doc])+ pub $key: $kind, )+ }

            impl Default for $Section {
                fn default() -> Self {
                    Self { $( $key: $default.into(), )+ }
                }
            }

            impl $Section {
                const KEYS: &[&str] = &[$(stringify!($key)),+];

                fn set(&mut self, key: &str, value: &DeValue<'_>) -> Result<(), KeyError> {
                    match key {
                        $( stringify!($key) => {
                            let value = <$kind as Setting>::read(value).map_err(KeyError::Value)?;
                            $( if !$range.contains(&value) {
                                let range = $range;
                                let text = format!("must be from {} to {}", range.start(), range.end());
                                return Err(KeyError::Value(text));
                            } )?
                            self.$key = value;
                        } )+
                        _ => return Err(KeyError::Unknown),
                    }
                    Ok(())
                }

                #[cfg(test)]
                fn entries() -> Vec<Entry> {
                    let defaults = Self::default();
                    vec![$( Entry {
                        key: stringify!($key),
                        docs: &[$($doc),+],
                        range: [$( format!("From {} to {}.", $range.start(), $range.end()) )?].into_iter().next(),
                        default: defaults.$key.show(),
                    } ),+]
                }
            }
        )+

        /// All settings.
        #[derive(Debug, Clone, Default, PartialEq, Eq)]
        pub struct Config { $( $(#[doc = $section_doc])+ pub $section: $Section, )+ }

        impl Config {
            /// Names of the sections.
            pub(super) const SECTIONS: &[&str] = &[$(stringify!($section)),+];

            /// Keys of a section; none where there is no such section.
            pub(super) fn keys(section: &str) -> &'static [&'static str] {
                match section {
                    $( stringify!($section) => $Section::KEYS, )+
                    _ => &[],
                }
            }

            /// Sets one key.
            pub(super) fn set(&mut self, section: &str, key: &str, value: &DeValue<'_>) -> Result<(), KeyError> {
                match section {
                    $( stringify!($section) => self.$section.set(key, value), )+
                    _ => Err(KeyError::Unknown),
                }
            }

            /// Sections with their documentation and keys, for the example.
            #[cfg(test)]
            pub(super) fn sections() -> Vec<(&'static str, &'static [&'static str], Vec<Entry>)> {
                vec![$( (stringify!($section), &[$($section_doc),+][..], $Section::entries()) ),+]
            }
        }
    };
}

settings! {
    /// The virtual machine monitor and the machine it makes.
    [hypervisor] Hypervisor {
        /// The VMM's binary.
        path: PathBuf = "/usr/local/libexec/vmshim/vmshim-vmm";
        /// The guest kernel, an uncompressed x86-64 ELF file.
        kernel: PathBuf = "/usr/local/share/vmshim/vmlinux";
        /// The guest's root file system, which holds the agent: an erofs image of whole pages.
        root_image: PathBuf = "/usr/local/share/vmshim/agent.erofs";
        /// Appended to the guest's kernel command line.
        kernel_params: String = "";
        /// vCPUs of a pod that has no CPU limit.
        default_vcpus: u8 = 1u8, in 1..=64u8;
        /// The most vCPUs that a pod gets, whatever its limit.
        max_vcpus: u8 = 32u8, in 1..=64u8;
        /// vCPUs beyond its limit that a pod with a CPU limit can get while it runs, when limits are raised or containers
        /// come that were not known of. Each costs such a pod some 0.2 MiB from the start.
        vcpu_growth: u8 = 3u8, in 0..=63u8;
        /// Memory of a pod that has no memory limit, in MiB. The host gives pages only as the guest touches them,
        /// but the guest's kernel spends 1.6 % of this on bookkeeping at boot.
        default_memory_mib: u32 = 512u32, in 64..=4_194_304u32;
        /// The least memory that a pod gets, in MiB, whatever its limit.
        min_memory_mib: u32 = 128u32, in 64..=4_194_304u32;
        /// The most memory that a pod gets, in MiB, whatever its limit, which gives it no more than the host has either.
        max_memory_mib: u32 = 262_144u32, in 64..=4_194_304u32;
        /// By how much a pod's memory can grow while it runs, in MiB, when limits are raised or containers come that were
        /// not known of; in steps of 128. What is not used of it costs nothing but addresses. 0 keeps a pod's size.
        memory_growth_mib: u32 = 16_384u32, in 0..=1_048_576u32;
        /// Added to a pod's memory limit for the guest's kernel and agent, in MiB.
        overhead_memory_mib: u32 = 64u32, in 0..=65_536u32;
        /// Empty disk slots made in every machine. Each block-based root file system takes one.
        disk_slots: u8 = 8u8, in 1..=13u8;
        /// Network interfaces that a pod with a network namespace can have. With the disk slots there can be 14.
        nic_slots: u8 = 2u8, in 1..=8u8;
        /// What each network interface of a pod may receive in a second, in KiB; 0 for the maximum.
        receive_kib_per_second: u32 = 0u32, in 0..=1_073_741_824u32;
        /// The most that it may be, whatever a pod asks for; 0 for no limit.
        max_receive_kib_per_second: u32 = 0u32, in 0..=1_073_741_824u32;
        /// What each network interface of a pod may send in a second, in KiB; 0 for the maximum.
        send_kib_per_second: u32 = 0u32, in 0..=1_073_741_824u32;
        /// The most that it may be, whatever a pod asks for; 0 for no limit.
        max_send_kib_per_second: u32 = 0u32, in 0..=1_073_741_824u32;
        /// What may pass at once, in KiB, where there is a limit and less has passed before.
        network_burst_kib: u32 = 256u32, in 64..=1_048_576u32;
        /// How long the guest may take from power-on until its agent calls, in seconds.
        boot_timeout_seconds: u32 = 30u32, in 1..=3_600u32;
        /// The host user id that the VMM runs as once it is jailed. Nothing else on the host should have it.
        uid: u32 = 1_990_000_000u32, in 1..=4_294_967_294u32;
        /// The host group id that the VMM runs as once it is jailed. Nothing else on the host should have it.
        gid: u32 = 1_990_000_000u32, in 1..=4_294_967_294u32;
    }

    /// The shim.
    [runtime] Runtime {
        /// Where each pod's state and shared directory live while it does. Best on a tmpfs.
        state_dir: PathBuf = "/run/vmshim";
        /// Lines below this level are not logged: "error", "warn", "info" or "debug". The daemon's debug flag overrides it.
        log_level: LogLevel = LogLevel::Info;
        /// How long a call to the guest may take where the caller sets no deadline, in seconds.
        request_timeout_seconds: u32 = 60u32, in 1..=3_600u32;
        /// Whether containers of the host's network (hostNetwork: true, ctr run --net-host) can reach the host's TCP and
        /// UDP servers and what is beyond, and listen for TCP connections on the host, by sockets that the shim opens
        /// for them. Otherwise they have loopback only.
        host_network: bool = true;
        /// Settings that a pod may change for itself, each by an annotation: "hypervisor.default_vcpus" by
        /// io.vmshim.hypervisor.default_vcpus. Ranges and maxima hold for pods, too. It can have, besides that one,
        /// hypervisor.boot_timeout_seconds, .default_memory_mib, .kernel_params, .nic_slots, .overhead_memory_mib,
        /// .receive_kib_per_second and .send_kib_per_second.
        left_to_pods: LeftToPods = LeftToPods::default();
    }
}
