//! Waiting for the network, which is set up while the guest boots.

use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::watch;
use tokio::time::Instant;
use vmshim_protocol::agent::SetUpPodRequest;

use super::{NetworkError, Nics, Servers, prepare};
use crate::state::Journal;
use crate::vm::Vm;

type Outcome = Result<Servers, Arc<NetworkError>>;

/// What becomes of a pod's network. Clones are of the same network.
#[derive(Clone)]
pub struct Ready(watch::Receiver<Option<Outcome>>);

impl Ready {
    /// Begins to give the guest the interfaces of the network namespace at `path`, which `nics` are for, after the
    /// pod's own namespaces where it has such in which they belong.
    pub fn begin(
        path: PathBuf,
        nics: Nics,
        namespaces: Option<SetUpPodRequest>,
        journal: Arc<Journal>,
        vm: Arc<Vm>,
        deadline: Instant,
    ) -> Self {
        let (sender, receiver) = watch::channel(None);
        tokio::spawn(async move {
            let prepared = tokio::task::spawn_blocking(move || prepare(&path, nics, &journal)).await;
            let outcome = match prepared.unwrap_or(Err(NetworkError::Internal)) {
                Ok(prepared) => prepared.apply(&vm, namespaces.as_ref(), deadline).await,
                Err(error) => Err(error),
            };
            match &outcome {
                Ok(_) => log::debug!("the guest's network is set up"),
                Err(error) => log::error!("the pod has no network: {error}"),
            }
            sender.send_replace(Some(outcome.map_err(Arc::new)));
        });
        Self(receiver)
    }

    /// Waits until the network is set up.
    ///
    /// # Errors
    /// Why it is not.
    pub async fn wait(&self) -> Result<(), Arc<NetworkError>> {
        let mut receiver = self.0.clone();
        match receiver.wait_for(Option::is_some).await {
            Ok(outcome) => outcome.clone().map_or(Ok(()), |outcome| outcome.map(drop)),
            Err(_) => Err(Arc::new(NetworkError::Internal)),
        }
    }

    /// The servers of the host in the namespace; none before the network is set up.
    pub fn servers(&self) -> Servers {
        self.0.borrow().clone().and_then(Result::ok).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_lost_outcome_is_an_error() {
        let (sender, receiver) = watch::channel(None);
        drop(sender);
        assert!(Ready(receiver).wait().await.is_err());
    }
}
