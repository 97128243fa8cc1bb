//! Topics and type names of the events.

use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused, TaskResumed,
    TaskStart,
};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::topics;

/// A message that is published as an event.
pub trait TaskEvent: Message {
    /// Where it is published.
    fn topic(&self) -> &'static str;

    /// What it is. containerd knows its own types without a host's name before them.
    fn type_url(&self) -> &'static str;
}

macro_rules! events {
    ($($message:ident => $topic:expr;)+) => { $(
        impl TaskEvent for $message {
            fn topic(&self) -> &'static str {
                $topic
            }

            fn type_url(&self) -> &'static str {
                concat!("containerd.events.", stringify!($message))
            }
        }
    )+ };
}

events! {
    TaskCreate => topics::TASK_CREATE_EVENT_TOPIC;
    TaskStart => topics::TASK_START_EVENT_TOPIC;
    TaskExecAdded => topics::TASK_EXEC_ADDED_EVENT_TOPIC;
    TaskExecStarted => topics::TASK_EXEC_STARTED_EVENT_TOPIC;
    TaskExit => topics::TASK_EXIT_EVENT_TOPIC;
    TaskDelete => topics::TASK_DELETE_EVENT_TOPIC;
    TaskOOM => topics::TASK_OOM_EVENT_TOPIC;
    TaskPaused => topics::TASK_PAUSED_EVENT_TOPIC;
    TaskResumed => topics::TASK_RESUMED_EVENT_TOPIC;
}
