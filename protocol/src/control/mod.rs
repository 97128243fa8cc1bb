//! What the shim says to the VMM, and the VMM to the shim.
//!
//! One message is one packet of a `SOCK_SEQPACKET` Unix socket: a JSON document of at most [`MAX_MESSAGE`] bytes with
//! at most [`MAX_FDS`] file descriptors (`SCM_RIGHTS`). The VMM opens no path: kernel, disks, directories and sockets
//! all come this way, and each descriptor's [`FdRole`] stands in the message in the descriptors' order.
//!
//! The shim sends [`Request`]s; the VMM answers each with a [`Message::Reply`] of the same id, in the order they came (but
//! for [`Command::AwaitMemory`]), and sends [`Message::Event`]s between them. The VMM is treated as hostile by the shim, since a guest may have
//! taken it: what it sends is bounded and parsed, never trusted. When the shim's end closes, the VMM exits.

mod socket;

pub use socket::{ControlSocket, MAX_FDS, MAX_MESSAGE, SocketError};

use std::num::NonZeroU64;

use serde::{Deserialize, Serialize};

/// A command with the id its reply will carry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Chosen by the shim, unique among its unanswered requests.
    pub id: u64,
    /// What to do.
    pub command: Command,
    /// What each descriptor sent along is for, in the descriptors' order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fds: Vec<FdRole>,
}

/// What the shim can ask of the VMM.
///
/// Life of a VM: `Configure`, `Boot`, then any of the others. `AttachDisk`, `AttachNic` and `Expect` are also accepted
/// between `Configure` and `Boot`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Command {
    /// Describes the machine. Descriptors: `Kvm`, `Kernel`, `RootImage`, and where wanted `SharedDirectory` (a
    /// directory, the root of the virtio-fs device) and `VsockListener` (a listening Unix stream socket on which the
    /// hybrid vsock protocol is served to host programs).
    Configure(MachineConfig),
    /// Builds the machine and runs it.
    Boot {
        /// How long the guest may take to dial its first vsock port before the VMM gives it up as
        /// [`Outcome::BootTimedOut`], in milliseconds.
        deadline_ms: u32,
    },
    /// Stops the vCPUs; answered when none runs.
    Pause,
    /// Lets the vCPUs run again.
    Resume,
    /// Ends the VM at once, without asking the guest. The reply is followed by [`Event::Exited`].
    Stop,
    /// Asks for [`Response::Status`].
    Status,
    /// Asks for [`Response::Statistics`].
    Statistics,
    /// Puts a disk (descriptor: `Disk`, a regular file or a block device) into an empty virtio-blk slot. The guest
    /// sees a capacity change. Up to [`MAX_DISK_PIECES`] descriptors make one read-only disk: the whole sectors of
    /// each follow those of the one before.
    AttachDisk {
        /// From 0 to [`MachineConfig::disk_slots`] - 1. The guest reads it as the device's serial, `slot<N>`.
        slot: u8,
        /// Writes fail. A disk attached before `Boot` is also advertised as read-only.
        read_only: bool,
    },
    /// Takes a disk out of its slot; requests under way are finished first. The guest sees a capacity of 0.
    DetachDisk {
        /// The slot to empty.
        slot: u8,
    },
    /// Connects an idle virtio-net slot to a tap (descriptors: as many `Tap` as an interface of the machine has queue
    /// pairs, see [`nic::queue_pairs`]; without packet information and with the virtio header). Where there are several
    /// they are the queues of one tap, of which all but the first are detached (`TUNSETQUEUE`). The guest sees the link
    /// come up. The tap stays in the slot for the life of the VM.
    ///
    /// [`nic::queue_pairs`]: crate::nic::queue_pairs
    AttachNic {
        /// From 0 to [`MachineConfig::nic_slots`] - 1. The guest knows the device by [`nic::slot_mac`].
        ///
        /// [`nic::slot_mac`]: crate::nic::slot_mac
        slot: u8,
    },
    /// Connects the guest's next connection to host port `port` to the descriptors sent along: `StreamSocket` (both
    /// directions), or `StreamSource` (read by the VMM, towards the guest) and `StreamSink` (written by the VMM) or
    /// one of the two. They may be sockets, pipes, FIFOs, terminals or regular files. The port is used once.
    Expect {
        /// The host port the guest will dial.
        port: u32,
    },
    /// Asks the guest to have that much memory beyond [`MachineConfig::memory_mib`], more or less than before. Answered at
    /// once: a guest takes its time, and gives back only what it can empty. Before a guest is first asked for more than
    /// nothing, the device by which it gets any is an empty slot, at which it has to look again.
    ResizeMemory {
        /// In MiB, rounded up to what the device can tell apart; at most [`MachineConfig::growth_mib`].
        growth_mib: u32,
    },
    /// Answered, whatever comes in between, as soon as the guest's kernel has taken up that much memory beyond
    /// [`MachineConfig::memory_mib`]; refused when less is asked of it.
    AwaitMemory {
        /// In MiB, at most that of the last [`Command::ResizeMemory`].
        growth_mib: u32,
    },
    /// Takes an [`Command::Expect`] back, and resets the connection where it has been made.
    Forget {
        /// The host port.
        port: u32,
    },
}

/// What a descriptor that travels with a [`Request`] is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FdRole {
    /// `/dev/kvm`.
    Kvm,
    /// An uncompressed x86-64 ELF kernel.
    Kernel,
    /// The guest's root file system, an erofs image or a cpio archive.
    RootImage,
    /// The directory served by virtio-fs.
    SharedDirectory,
    /// A listening Unix socket for the hybrid vsock protocol.
    VsockListener,
    /// A regular file or block device.
    Disk,
    /// A queue of a tap of `/dev/net/tun`.
    Tap,
    /// Both directions of a stream.
    StreamSocket,
    /// Read by the VMM and sent to the guest; end of file becomes a half-close.
    StreamSource,
    /// Takes what the guest sends; closed when the guest half-closes.
    StreamSink,
}

/// The machine to build. Every number is checked by the VMM against its own limits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// Names the VM in log lines; no meaning otherwise.
    pub id: String,
    /// vCPUs made. The guest boots with one and its agent brings the others up, or as many of them as it is told to.
    pub vcpus: u8,
    /// Guest RAM in MiB.
    pub memory_mib: u32,
    /// By how much it can grow, in MiB; a multiple of [`GROWTH_STEP_MIB`].
    #[serde(default)]
    pub growth_mib: u32,
    /// Appended to the kernel command line that the VMM builds.
    #[serde(default)]
    pub kernel_params: String,
    /// virtio-blk devices made, empty until `AttachDisk`.
    pub disk_slots: u8,
    /// virtio-net devices made, without a link until `AttachNic`.
    #[serde(default)]
    pub nic_slots: u8,
    /// The most that each of them takes to the guest.
    #[serde(default)]
    pub receive_limit: Option<RateLimit>,
    /// The most that each of them takes from the guest.
    #[serde(default)]
    pub send_limit: Option<RateLimit>,
    /// The host user id and group id that the VMM runs as once it is jailed.
    pub uid: u32,
    /// See `uid`.
    pub gid: u32,
}

/// A limit of bytes that pass in a second. Frames count with their Ethernet headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimit {
    /// What passes in a second.
    pub bytes_per_second: NonZeroU64,
    /// What may pass at once where nothing has passed before.
    pub burst_bytes: NonZeroU64,
}

/// What the VMM sends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Message {
    /// The answer to one [`Request`].
    Reply {
        /// The request's id.
        id: u64,
        /// What came of it.
        result: Result<Response, Failure>,
    },
    /// Something that happened by itself.
    Event(Event),
}

/// The answer to a [`Command`] that succeeded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Response {
    /// Done.
    Done,
    /// Answers [`Command::Status`].
    Status(State),
    /// Answers [`Command::Statistics`].
    Statistics(Statistics),
}

/// Why a [`Command`] failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Whose fault it is.
    pub kind: FailureKind,
    /// One sentence for the user.
    pub message: String,
}

/// Classes of [`Failure`], as far as the shim treats them differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// A value or a descriptor in the request is wrong.
    InvalidArgument,
    /// The VM is in the wrong state for the command.
    FailedPrecondition,
    /// The host refused something: no KVM, no memory.
    Host,
}

/// Where a VM is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Waiting for `Configure`.
    New,
    /// Waiting for `Boot`.
    Configured,
    /// vCPUs run; the guest has not dialled yet.
    Booting,
    /// The guest has dialled a vsock port.
    Running,
    /// vCPUs are stopped.
    Paused,
}

/// What the VMM counts. Times are nanoseconds of `CLOCK_MONOTONIC`, 0 where it has not happened.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Statistics {
    /// The process reached `main`.
    pub started_ns: u64,
    /// The first `KVM_RUN`.
    pub first_instruction_ns: u64,
    /// The guest's first vsock connection.
    pub first_dial_ns: u64,
    /// Memory that the guest has beyond [`MachineConfig::memory_mib`], in bytes.
    pub grown_bytes: u64,
    /// Exits of all vCPUs to the VMM.
    pub vcpu_exits: u64,
    /// Bytes and requests by device, in the devices' order on the bus.
    pub devices: Vec<DeviceStatistics>,
}

/// What one device counts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStatistics {
    /// Such as `blk0`, `vsock`, `fs`.
    pub name: String,
    /// Requests completed, or packets moved.
    pub requests: u64,
    /// Bytes from the device to the guest.
    pub read_bytes: u64,
    /// Bytes from the guest to the device.
    pub written_bytes: u64,
    /// Requests refused as malformed.
    pub errors: u64,
}

/// What the VMM tells unasked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// The stream of an [`Command::Expect`] is over in both directions, all that the guest sent has been written to
    /// its sink, and its descriptors are closed.
    StreamClosed {
        /// The host port.
        port: u32,
    },
    /// Last message before the VMM exits.
    Exited {
        /// Why.
        outcome: Outcome,
        /// The last lines of the guest's console, oldest first, at most [`MAX_CONSOLE_LINES`] of at most
        /// [`MAX_CONSOLE_LINE`] bytes.
        console: Vec<String>,
    },
}

/// What [`MachineConfig::growth_mib`] is a multiple of: Linux takes memory in blocks of 128 MiB.
pub const GROWTH_STEP_MIB: u32 = 128;

/// Descriptors that one disk can be put together from. A guest's kernel names no more than 255 parts of a disk.
pub const MAX_DISK_PIECES: usize = 240;

/// Console lines kept for [`Event::Exited`].
pub const MAX_CONSOLE_LINES: usize = 40;

/// Bytes kept of one console line.
pub const MAX_CONSOLE_LINE: usize = 256;

/// How a VM ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The guest powered off in order.
    PoweredOff,
    /// The guest's kernel panicked, or reset the machine by itself.
    Panicked,
    /// The guest caused a triple fault.
    TripleFault,
    /// The guest did not dial within the deadline of [`Command::Boot`].
    BootTimedOut,
    /// [`Command::Stop`], or the shim's end of the control socket closed.
    Stopped,
    /// The VMM or KVM failed.
    Failed {
        /// One sentence.
        message: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_reads_back_as_written() {
        let request = Request {
            id: 7,
            command: Command::Expect { port: 0x1_0001 },
            fds: vec![FdRole::StreamSource, FdRole::StreamSink],
        };
        let text = serde_json::to_string(&request).unwrap();
        assert_eq!(serde_json::from_str::<Request>(&text).unwrap(), request);
    }

    #[test]
    fn unknown_command_and_field_are_refused() {
        assert!(serde_json::from_str::<Request>(r#"{"id":1,"command":"reboot"}"#).is_err());
        assert!(serde_json::from_str::<Request>(r#"{"id":1,"command":"pause","path":"/etc"}"#).is_err());
    }
}
