//! `start`: joins the shim of the group, or becomes it.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use containerd_shim_protos::protobuf::well_known_types::any::Any;

use super::args::Invocation;
use super::dialect::{MAX_STDIN, Request, StdinError};
use super::process::{Side, split};
use super::{grouping, socket};
use crate::ids::{InvalidName, Name};

/// Everything that the serving process inherits from `start`.
#[derive(Debug)]
pub struct Serving {
    /// Bound, listening, mode 0600.
    pub listener: UnixListener,
    /// Where it is bound.
    pub socket: PathBuf,
    /// containerd namespace.
    pub namespace: Name,
    /// The group: the pod, or the one container.
    pub group: Name,
    /// The bundle of the group's first container.
    pub bundle: PathBuf,
    /// What may be runtime options.
    pub options: Vec<Any>,
    /// Where events go.
    pub ttrpc_address: Option<String>,
    /// Whether the daemon wants debug output.
    pub debug: bool,
}

/// Why nothing could be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The command line names no usable container.
    #[error(transparent)]
    Name(#[from] InvalidName),
    /// Standard input is not understood.
    #[error(transparent)]
    Stdin(#[from] StdinError),
    /// The socket cannot be made.
    #[error("the socket {} cannot be made: {source}", path.display())]
    Socket {
        /// Where it should be.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The reply cannot be encoded.
    #[error("the reply to containerd cannot be encoded")]
    Reply(#[source] protobuf::Error),
    /// The system refused something.
    #[error("the shim cannot be started: {0}")]
    Io(#[from] io::Error),
}

/// Runs `start`. Comes back with nothing in the process that containerd called, once the address is printed, and
/// with [`Serving`] in the new one.
///
/// # Errors
/// Nothing is left behind.
pub fn start(invocation: &Invocation) -> Result<Option<Serving>, StartError> {
    let bundle = std::env::current_dir()?;
    let namespace = Name::new(&invocation.namespace)?;
    let id = Name::new(&invocation.id)?;
    let mut stdin = Vec::new();
    io::stdin().take(MAX_STDIN).read_to_end(&mut stdin)?;
    let request = Request::parse(&stdin, id.as_str(), namespace.as_str())?;

    let group = Name::new(&grouping::group_id(&bundle, id.as_str()))?;
    let directory = request.socket_dir.as_deref().unwrap_or(socket::DEFAULT_DIR);
    let containerd = match &request.grpc_address {
        Some(address) if invocation.address.is_empty() => address,
        _ => &invocation.address,
    };
    let path = socket::path(directory, containerd, namespace.as_str(), group.as_str());
    let address = format!("unix://{}", path.display());
    let reply = request.reply(&address, is_sandboxer(&bundle)).map_err(StartError::Reply)?;
    let bound = socket::bind(&path).map_err(|source| StartError::Socket { path: path.clone(), source })?;
    // containerd 1.6 and 1.7 find the shim again by this file.
    std::fs::write(bundle.join("address"), &address)?;

    if let socket::Bound::Ours(listener) = bound {
        match split() {
            Ok(Side::Parent) => {}
            Ok(Side::Server) => {
                let ttrpc_address = request.ttrpc_address.or_else(|| std::env::var("TTRPC_ADDRESS").ok());
                return Ok(Some(Serving {
                    listener,
                    socket: path,
                    namespace,
                    group,
                    bundle,
                    options: request.options,
                    ttrpc_address: ttrpc_address.filter(|address| !address.is_empty()),
                    debug: invocation.debug || request.debug,
                }));
            }
            Err(error) => {
                let _ = std::fs::remove_file(&path);
                return Err(error.into());
            }
        }
    }
    io::stdout().write_all(&reply)?;
    Ok(None)
}

/// Whether containerd's sandbox controller calls, which runs `start` in a directory of its own.
fn is_sandboxer(bundle: &Path) -> bool {
    bundle.components().any(|part| part.as_os_str() == "io.containerd.sandbox.controller.v1.shim")
}
