//! What CRI says of a sandbox: the few fields of its `PodSandboxConfig` that a guest is made from.
//!
//! The message has no Rust type here, because some ten fields of it are read and some hundred are not. Its fields are found
//! by their numbers, which CRI's v1 has promised to keep.

use std::collections::{BTreeMap, HashMap};

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, UnknownValueRef};
use vmshim_protocol::agent::{Empty, SetUpPodRequest};

use crate::oci::Limits;
use crate::storage::{IdMap, Mapping};
use crate::task::namespaces_of;

const TYPE: &str = "runtime.v1.PodSandboxConfig";

/// `PodSandboxConfig`.
const HOSTNAME: u32 = 2;
const DNS: u32 = 4;
const ANNOTATIONS: u32 = 7;
const LINUX: u32 = 8;
/// `LinuxPodSandboxConfig`.
const CGROUP_PARENT: u32 = 1;
const SECURITY_CONTEXT: u32 = 2;
const SYSCTLS: u32 = 3;
const RESOURCES: u32 = 5;
/// `LinuxContainerResources`.
const CPU_PERIOD: u32 = 1;
const CPU_QUOTA: u32 = 2;
const MEMORY_LIMIT: u32 = 4;

/// `LinuxSandboxSecurityContext`.
const NAMESPACE_OPTIONS: u32 = 1;
/// `NamespaceOption`.
const USERS: u32 = 5;
/// `UserNamespace`.
const MODE: u32 = 1;
const UIDS: u32 = 2;
const GIDS: u32 = 3;
/// `IDMapping`.
const HOST_ID: u32 = 1;
const CONTAINER_ID: u32 = 2;
const LENGTH: u32 = 3;
/// `NamespaceMode`, where the pod has one of its own. It is the default, which is not sent.
const POD: u64 = 0;
/// `NamespaceMode`, where it has the node's.
const NODE: u64 = 2;

/// `DNSConfig`.
const SERVERS: u32 = 1;
const SEARCHES: u32 = 2;
const OPTIONS: u32 = 3;

/// Why there is no such sandbox.
#[derive(Debug, thiserror::Error)]
pub enum InvalidConfig {
    /// The options are not the message that their type says.
    #[error("the sandbox's options are not a {TYPE}: {0}")]
    Malformed(#[from] protobuf::Error),
    /// Users that are neither the pod's nor everybody's.
    #[error(
        "the users of a pod are its own (POD) or the node's (NODE); mode {0} of its user namespace is neither"
    )]
    UserMode(u64),
    /// Maps without root, or such as the kernel does not take.
    #[error(
        "a pod with users of its own needs uid and gid mappings, 1 to 340 of each, in which its root is somebody"
    )]
    Users,
}

/// A sandbox as it is asked for.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct SandboxConfig {
    /// Empty where the pod shares the host's.
    pub hostname: String,
    /// Empty where the runtime may choose.
    pub cgroup_parent: String,
    /// By their dotted names.
    pub sysctls: HashMap<String, String>,
    /// Of the pod.
    pub annotations: BTreeMap<String, String>,
    /// The sum of those of its containers.
    pub limits: Limits,
    /// Where the pod has a resolver of its own.
    pub dns: Option<Dns>,
    /// Where the pod has users of its own: what their ids are outside of it.
    pub users: Option<IdMap>,
}

/// What is in `resolv.conf`.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Dns {
    servers: Vec<String>,
    searches: Vec<String>,
    options: Vec<String>,
}

impl Dns {
    /// The file's text. A word with white space in it would be another line, and is left out.
    pub fn resolv_conf(&self) -> String {
        let clean = |words: &[String]| {
            let words = words.iter().filter(|word| !word.is_empty() && !word.contains(char::is_whitespace));
            words.cloned().collect::<Vec<_>>()
        };
        let mut text = String::new();
        for (key, words) in [("search", clean(&self.searches)), ("options", clean(&self.options))] {
            if !words.is_empty() {
                text.push_str(&format!("{key} {}\n", words.join(" ")));
            }
        }
        clean(&self.servers).iter().for_each(|server| text.push_str(&format!("nameserver {server}\n")));
        text
    }
}

impl SandboxConfig {
    /// Reads the options of CreateSandbox. None, and types that are not CRI's, ask for nothing.
    ///
    /// # Errors
    /// When the message is cut or garbled, or asks for users that a pod cannot have.
    pub fn from_options(options: Option<&Any>) -> Result<Self, InvalidConfig> {
        let limits = Limits { partial: true, ..Limits::default() };
        let mut config = Self { limits, ..Self::default() };
        let Some(options) = options.filter(|any| any.type_url.rsplit('/').next() == Some(TYPE)) else {
            return Ok(config);
        };
        for_each_field(&options.value, |number, value| {
            match (number, value) {
                (HOSTNAME, UnknownValueRef::LengthDelimited(text)) => config.hostname = string(text),
                (DNS, UnknownValueRef::LengthDelimited(dns)) => config.dns = Some(read_dns(dns)?),
                (ANNOTATIONS, UnknownValueRef::LengthDelimited(entry)) => {
                    config.annotations.extend([read_entry(entry)?]);
                }
                (LINUX, UnknownValueRef::LengthDelimited(linux)) => config.read_linux(linux)?,
                _ => {}
            }
            Ok(())
        })?;
        Ok(config)
    }

    /// What the agent is asked for the pod's own namespaces.
    pub fn namespaces(&self) -> SetUpPodRequest {
        namespaces_of(self.users.clone().unwrap_or_default(), self.hostname.clone(), self.sysctls.clone())
    }

    fn read_linux(&mut self, linux: &[u8]) -> Result<(), InvalidConfig> {
        for_each_field(linux, |number, value| {
            match (number, value) {
                (CGROUP_PARENT, UnknownValueRef::LengthDelimited(text)) => self.cgroup_parent = string(text),
                (SECURITY_CONTEXT, UnknownValueRef::LengthDelimited(context)) => {
                    self.read_security_context(context)?;
                }
                (SYSCTLS, UnknownValueRef::LengthDelimited(entry)) => {
                    self.sysctls.extend([read_entry(entry)?]);
                }
                (RESOURCES, UnknownValueRef::LengthDelimited(resources)) => self.read_resources(resources)?,
                _ => {}
            }
            Ok(())
        })
    }

    fn read_security_context(&mut self, context: &[u8]) -> Result<(), InvalidConfig> {
        for_each_field(context, |number, value| match (number, value) {
            (NAMESPACE_OPTIONS, UnknownValueRef::LengthDelimited(options)) => {
                for_each_field(options, |number, value| match (number, value) {
                    (USERS, UnknownValueRef::LengthDelimited(users)) => {
                        self.users = read_users(users)?;
                        Ok(())
                    }
                    _ => Ok(()),
                })
            }
            _ => Ok(()),
        })
    }

    fn read_resources(&mut self, resources: &[u8]) -> Result<(), InvalidConfig> {
        for_each_field(resources, |number, value| {
            match (number, value) {
                (CPU_PERIOD, UnknownValueRef::Varint(value)) => self.limits.period = value,
                (CPU_QUOTA, UnknownValueRef::Varint(value)) => self.limits.quota = value.cast_signed(),
                (MEMORY_LIMIT, UnknownValueRef::Varint(value)) => self.limits.memory = value.cast_signed(),
                _ => {}
            }
            Ok(())
        })
    }
}

fn read_users(users: &[u8]) -> Result<Option<IdMap>, InvalidConfig> {
    let (mut mode, mut map) = (POD, IdMap::default());
    for_each_field(users, |number, value| {
        match (number, value) {
            (MODE, UnknownValueRef::Varint(value)) => mode = value,
            (UIDS, UnknownValueRef::LengthDelimited(mapping)) => map.uids.push(read_mapping(mapping)?),
            (GIDS, UnknownValueRef::LengthDelimited(mapping)) => map.gids.push(read_mapping(mapping)?),
            _ => {}
        }
        Ok(())
    })?;
    match mode {
        POD if map.is_valid() && matches!(map.root(), (Some(_), Some(_))) => Ok(Some(map)),
        POD => Err(InvalidConfig::Users),
        NODE => Ok(None),
        mode => Err(InvalidConfig::UserMode(mode)),
    }
}

fn read_mapping(message: &[u8]) -> Result<Mapping, InvalidConfig> {
    let mut mapping = Mapping { container: 0, host: 0, size: 0 };
    for_each_field(message, |number, value| {
        let UnknownValueRef::Varint(value) = value else { return Ok(()) };
        // No id is this; the kernel refuses it.
        let value = u32::try_from(value).unwrap_or(u32::MAX);
        match number {
            HOST_ID => mapping.host = value,
            CONTAINER_ID => mapping.container = value,
            LENGTH => mapping.size = value,
            _ => {}
        }
        Ok(())
    })?;
    Ok(mapping)
}

/// One entry of a map of strings.
fn read_entry(entry: &[u8]) -> Result<(String, String), InvalidConfig> {
    let (mut name, mut setting) = Default::default();
    for_each_field(entry, |number, value| {
        match (number, value) {
            (1, UnknownValueRef::LengthDelimited(text)) => name = string(text),
            (2, UnknownValueRef::LengthDelimited(text)) => setting = string(text),
            _ => {}
        }
        Ok(())
    })?;
    Ok((name, setting))
}

fn read_dns(message: &[u8]) -> Result<Dns, InvalidConfig> {
    let mut dns = Dns::default();
    for_each_field(message, |number, value| {
        match (number, value) {
            (SERVERS, UnknownValueRef::LengthDelimited(text)) => dns.servers.push(string(text)),
            (SEARCHES, UnknownValueRef::LengthDelimited(text)) => dns.searches.push(string(text)),
            (OPTIONS, UnknownValueRef::LengthDelimited(text)) => dns.options.push(string(text)),
            _ => {}
        }
        Ok(())
    })?;
    Ok(dns)
}

fn for_each_field(
    message: &[u8],
    mut each: impl FnMut(u32, UnknownValueRef<'_>) -> Result<(), InvalidConfig>,
) -> Result<(), InvalidConfig> {
    // A message without fields keeps all that it is given.
    let message = Empty::parse_from_bytes(message)?;
    message.special_fields.unknown_fields().iter().try_for_each(|(number, value)| each(number, value))
}

fn string(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::protobuf::UnknownFields;
    use proptest::prelude::*;

    use super::*;

    fn message(fields: &[(u32, &[u8])], numbers: &[(u32, u64)]) -> Vec<u8> {
        let mut message = Empty::default();
        let unknown: &mut UnknownFields = message.special_fields.mut_unknown_fields();
        fields.iter().for_each(|(number, bytes)| unknown.add_length_delimited(*number, bytes.to_vec()));
        numbers.iter().for_each(|(number, value)| unknown.add_varint(*number, *value));
        message.write_to_bytes().unwrap()
    }

    fn options(value: Vec<u8>) -> Any {
        Any { type_url: "type.googleapis.com/runtime.v1.PodSandboxConfig".into(), value, ..Any::default() }
    }

    #[test]
    fn a_pod_is_read_by_field_numbers() {
        let resources = message(&[], &[(1, 100_000), (2, 150_000), (3, 2), (4, 1 << 30)]);
        let sysctl = message(&[(1, b"net.core.somaxconn"), (2, b"1")], &[]);
        let linux = message(&[(1, b"/pods/x"), (2, b""), (3, &sysctl), (5, &resources)], &[]);
        let pod = message(&[(1, b""), (2, b"web"), (8, &linux), (99, b"new")], &[]);
        let config = SandboxConfig::from_options(Some(&options(pod))).unwrap();
        assert_eq!((config.hostname.as_str(), config.cgroup_parent.as_str()), ("web", "/pods/x"));
        assert_eq!(config.sysctls["net.core.somaxconn"], "1");
        let limits = Limits { quota: 150_000, period: 100_000, memory: 1 << 30, partial: true };
        assert_eq!(config.limits, limits);
    }

    #[test]
    fn users_are_the_pods_where_it_says_so() {
        let mapping = message(&[], &[(1, 1000), (3, 65536)]);
        let users = |mapping: &[u8], mode: &[(u32, u64)]| {
            let users = message(&[(2, mapping), (3, mapping)], mode);
            let context = message(&[(1, &message(&[(5, &users)], &[(1, 2)]))], &[]);
            let pod = message(&[(8, &message(&[(2, &context)], &[]))], &[]);
            SandboxConfig::from_options(Some(&options(pod))).map(|config| config.users)
        };
        let expected = vec![Mapping { container: 0, host: 1000, size: 65536 }];
        let pods = Some(IdMap { uids: expected.clone(), gids: expected });
        assert_eq!(users(&mapping, &[]).unwrap(), pods);
        assert_eq!(users(&mapping, &[(1, 2)]).unwrap(), None);
        for mode in [1, 3, 9] {
            let error = users(&mapping, &[(1, mode)]).unwrap_err().to_string();
            assert!(error.contains(&format!("mode {mode}")), "{error}");
        }
        let without_root = message(&[], &[(1, 1000), (2, 1), (3, 65536)]);
        assert!(matches!(users(&without_root, &[]), Err(InvalidConfig::Users)));
    }

    #[test]
    fn a_resolver_is_written_line_by_line() {
        let dns = message(
            &[(1, b"10.0.0.10"), (2, b"svc.local"), (2, b"a\nnameserver 6.6.6.6"), (3, b"ndots:5")],
            &[],
        );
        let config = SandboxConfig::from_options(Some(&options(message(&[(4, &dns)], &[])))).unwrap();
        let expected = "search svc.local\noptions ndots:5\nnameserver 10.0.0.10\n";
        assert_eq!(config.dns.unwrap().resolv_conf(), expected);
    }

    #[test]
    fn other_types_ask_for_nothing() {
        let other = Any { type_url: "x".into(), value: vec![0xff], ..Any::default() };
        assert_eq!(SandboxConfig::from_options(Some(&other)).unwrap().hostname, "");
        assert!(SandboxConfig::from_options(None).unwrap().limits.partial);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = SandboxConfig::from_options(Some(&options(bytes)));
        }
    }
}
