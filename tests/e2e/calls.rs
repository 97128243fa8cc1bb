//! Every call of the Task service in the right and in the wrong moment, as a client of the shim makes it.

use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, CreateTaskRequest, DeleteRequest,
    ExecProcessRequest, KillRequest, PauseRequest, PidsRequest, ResizePtyRequest, ResumeRequest,
    ShutdownRequest, StartRequest, StateRequest, StateResponse, StatsRequest, Status, UpdateTaskRequest,
    WaitRequest,
};
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use serde_json::json;
use ttrpc::Code;

use crate::fixture::host;
use crate::shim::{Direct, minute, refusal, spec};

/// Calls to one container of a shim.
struct Calls(Direct);

type Answer<T> = Result<T, ttrpc::Error>;

impl Calls {
    fn id(&self) -> String {
        self.0.id.clone()
    }

    fn state(&self, exec_id: &str) -> Answer<StateResponse> {
        let request = StateRequest { id: self.id(), exec_id: exec_id.into(), ..Default::default() };
        self.0.client.state(minute(), &request)
    }

    fn status(&self, exec_id: &str) -> Status {
        self.state(exec_id).unwrap().status.unwrap()
    }

    fn start(&self, exec_id: &str) -> Answer<u32> {
        let request = StartRequest { id: self.id(), exec_id: exec_id.into(), ..Default::default() };
        Ok(self.0.client.start(minute(), &request)?.pid)
    }

    fn exec(&self, exec_id: &str, program: &[&str], terminal: bool) -> Answer<()> {
        let process = json!({ "args": program, "cwd": "/", "env": ["PATH=/bin"], "terminal": terminal });
        let spec = Any { value: process.to_string().into_bytes(), ..Default::default() };
        let request = ExecProcessRequest {
            id: self.id(),
            exec_id: exec_id.into(),
            terminal,
            spec: MessageField::some(spec),
            ..Default::default()
        };
        self.0.client.exec(minute(), &request).map(drop)
    }

    fn kill(&self, exec_id: &str, signal: u32, all: bool) -> Answer<()> {
        let request =
            KillRequest { id: self.id(), exec_id: exec_id.into(), signal, all, ..Default::default() };
        self.0.client.kill(minute(), &request).map(drop)
    }

    fn wait(&self, exec_id: &str) -> Answer<u32> {
        let request = WaitRequest { id: self.id(), exec_id: exec_id.into(), ..Default::default() };
        Ok(self.0.client.wait(minute(), &request)?.exit_status)
    }

    fn delete(&self, exec_id: &str) -> Answer<u32> {
        let request = DeleteRequest { id: self.id(), exec_id: exec_id.into(), ..Default::default() };
        Ok(self.0.client.delete(minute(), &request)?.exit_status)
    }

    fn resize(&self, exec_id: &str) -> Answer<()> {
        let (width, height) = (100, 40);
        let request =
            ResizePtyRequest { id: self.id(), exec_id: exec_id.into(), width, height, ..Default::default() };
        self.0.client.resize_pty(minute(), &request).map(drop)
    }

    fn close_io(&self, exec_id: &str) -> Answer<()> {
        let request =
            CloseIORequest { id: self.id(), exec_id: exec_id.into(), stdin: true, ..Default::default() };
        self.0.client.close_io(minute(), &request).map(drop)
    }

    fn pause(&self) -> Answer<()> {
        self.0.client.pause(minute(), &PauseRequest { id: self.id(), ..Default::default() }).map(drop)
    }

    fn resume(&self) -> Answer<()> {
        self.0.client.resume(minute(), &ResumeRequest { id: self.id(), ..Default::default() }).map(drop)
    }

    fn update(&self, resources: &str) -> Answer<()> {
        let resources = Any { value: resources.into(), ..Default::default() };
        let request = UpdateTaskRequest {
            id: self.id(),
            resources: MessageField::some(resources),
            ..Default::default()
        };
        self.0.client.update(minute(), &request).map(drop)
    }

    fn pids(&self) -> Answer<usize> {
        let request = PidsRequest { id: self.id(), ..Default::default() };
        Ok(self.0.client.pids(minute(), &request)?.processes.len())
    }

    fn stats(&self) -> Answer<String> {
        let request = StatsRequest { id: self.id(), ..Default::default() };
        Ok(self.0.client.stats(minute(), &request)?.stats.type_url.clone())
    }

    fn shutdown(&self) -> Answer<()> {
        self.0.client.shutdown(minute(), &ShutdownRequest { id: self.id(), ..Default::default() }).map(drop)
    }

    /// Everything that can be asked of a process, which is not there.
    fn all_not_found(&self, exec_id: &str) {
        let answers = [
            self.state(exec_id).map(drop),
            self.start(exec_id).map(drop),
            self.kill(exec_id, 9, false),
            self.wait(exec_id).map(drop),
            self.delete(exec_id).map(drop),
            self.resize(exec_id),
            self.close_io(exec_id),
        ];
        for (number, answer) in answers.into_iter().enumerate() {
            assert_eq!(refusal(answer).0, Code::NOT_FOUND, "call {number}");
        }
    }

    fn nothing_found(&self) {
        self.all_not_found("");
        let answers = [
            self.pause(),
            self.resume(),
            self.update("{}"),
            self.pids().map(drop),
            self.stats().map(drop),
            self.exec("e", &["true"], false),
        ];
        for (number, answer) in answers.into_iter().enumerate() {
            assert_eq!(refusal(answer).0, Code::NOT_FOUND, "call {number}");
        }
    }
}

/// What is wrong with the moment, in one sentence.
fn too_early_or_late<T: std::fmt::Debug>(answer: Answer<T>, sentence: &str) {
    assert_eq!(refusal(answer), (Code::FAILED_PRECONDITION, sentence.to_owned()));
}

fn invalid<T: std::fmt::Debug>(answer: Answer<T>) {
    let (code, text) = refusal(answer);
    assert_eq!(code, Code::INVALID_ARGUMENT, "{text}");
}

#[test]
fn every_call_answers_as_runc_does_in_any_phase() {
    let host = host();
    let config = spec(&host, &["sleep", "100000"]).to_string();
    let calls = Calls(Direct::start(&host, Some(&config)));
    calls.nothing_found();
    calls.0.create(Vec::new()).unwrap();
    created(&calls);
    let pid = calls.start("").unwrap();
    running(&calls, pid);
    execs(&calls);
    paused(&calls);
    calls.kill("", 9, false).unwrap();
    assert_eq!(calls.wait("").unwrap(), 137);
    stopped(&calls);
    assert_eq!(calls.delete("").unwrap(), 137);
    calls.nothing_found();
    calls.0.give_up(&host);
    host.assert_nothing_left();
}

fn created(calls: &Calls) {
    let state = calls.state("").unwrap();
    assert_eq!((state.status.unwrap(), &state.id), (Status::CREATED, &calls.id()));
    assert!(state.pid != 0 && !state.bundle.is_empty() && state.exited_at.is_none());
    let again = CreateTaskRequest { id: calls.id(), bundle: state.bundle.clone(), ..Default::default() };
    assert_eq!(refusal(calls.0.client.create(minute(), &again)).0, Code::ALREADY_EXISTS);
    let connect = ConnectRequest { id: calls.id(), ..Default::default() };
    let connected = calls.0.client.connect(minute(), &connect).unwrap();
    assert_eq!(connected.task_pid, state.pid);
    assert!(connected.shim_pid != 0 && connected.shim_pid != state.pid);
    too_early_or_late(calls.pause(), "cannot pause a created process");
    too_early_or_late(calls.resume(), "cannot resume a created process");
    // An exec may come before the container's own program.
    calls.exec("early", &["true"], false).unwrap();
    calls.start("early").unwrap();
    assert_eq!(calls.wait("early").unwrap(), 0);
    assert_eq!(calls.delete("early").unwrap(), 0);
}

fn running(calls: &Calls, pid: u32) {
    let state = calls.state("").unwrap();
    assert_eq!((state.status.unwrap(), state.pid), (Status::RUNNING, pid));
    too_early_or_late(calls.start(""), "cannot start a running process");
    too_early_or_late(calls.resume(), "cannot resume a running process");
    too_early_or_late(calls.delete(""), "cannot delete a running process");
    invalid(calls.kill("", 65, false));
    invalid(calls.update("no resources"));
    // Such CPUs as only the host can have, which kubelets choose.
    calls
        .update(r#"{"cpu":{"cpus":"60-61","shares":512},"hugepageLimits":[{"pageSize":"1GB","limit":0}]}"#)
        .unwrap();
    calls.update(r#"{"cpu":{"cpus":"0","mems":"0"}}"#).unwrap();
    assert_eq!(calls.pids().unwrap(), 1);
    assert_eq!(calls.stats().unwrap(), "io.containerd.cgroups.v2.Metrics");
    calls.resize("").unwrap();
    let checkpoint = CheckpointTaskRequest { id: calls.id(), ..Default::default() };
    let (code, text) = refusal(calls.0.client.checkpoint(minute(), &checkpoint));
    assert_eq!((code, text.as_str()), (Code::UNIMPLEMENTED, "checkpoint is not supported by this runtime"));
    // Only a shim without containers ends.
    calls.shutdown().unwrap();
    assert_eq!(calls.status(""), Status::RUNNING);
}

fn execs(calls: &Calls) {
    calls.all_not_found("none");
    invalid(calls.exec("", &["true"], false));
    invalid(calls.exec("e", &[], false));
    calls.exec("e", &["sleep", "100000"], false).unwrap();
    assert_eq!(refusal(calls.exec("e", &["true"], false)).0, Code::ALREADY_EXISTS);
    let state = calls.state("e").unwrap();
    assert_eq!((state.status.unwrap(), state.pid, state.id.as_str()), (Status::CREATED, 0, "e"));
    too_early_or_late(calls.kill("e", 9, false), "cannot signal a created process");
    assert_ne!(calls.start("e").unwrap(), 0);
    too_early_or_late(calls.start("e"), "cannot start a running process");
    too_early_or_late(calls.delete("e"), "cannot delete a running process");
    assert_eq!(calls.pids().unwrap(), 2);
    calls.close_io("e").unwrap();
    calls.close_io("e").unwrap();
    // All of an exec is the exec.
    calls.kill("e", 9, true).unwrap();
    assert_eq!((calls.wait("e").unwrap(), calls.wait("e").unwrap()), (137, 137));
    assert_eq!(calls.status(""), Status::RUNNING);
    assert_eq!(refusal(calls.kill("e", 9, false)).0, Code::NOT_FOUND);
    calls.resize("e").unwrap();
    assert_eq!(calls.delete("e").unwrap(), 137);
    // Its terminal's size is known before the terminal is there.
    calls.exec("tty", &["sh", "-c", "test \"$(stty size)\" = '40 100'"], true).unwrap();
    calls.resize("tty").unwrap();
    calls.start("tty").unwrap();
    assert_eq!(calls.wait("tty").unwrap(), 0);
    calls.delete("tty").unwrap();
    calls.exec("missing", &["no-such-program"], false).unwrap();
    let (_, text) = refusal(calls.start("missing"));
    assert!(text.contains("no-such-program") && !text.contains('\n'), "{text}");
    assert_eq!(calls.wait("missing").unwrap(), 255);
    calls.delete("missing").unwrap();
}

fn paused(calls: &Calls) {
    calls.exec("frozen", &["sleep", "100000"], false).unwrap();
    calls.start("frozen").unwrap();
    calls.pause().unwrap();
    assert_eq!((calls.status(""), calls.status("frozen")), (Status::PAUSED, Status::PAUSED));
    too_early_or_late(calls.pause(), "cannot pause a paused process");
    too_early_or_late(calls.exec("late", &["true"], false), "cannot exec in a paused process");
    assert_eq!(calls.pids().unwrap(), 2);
    calls.resume().unwrap();
    assert_eq!((calls.status(""), calls.status("frozen")), (Status::RUNNING, Status::RUNNING));
}

fn stopped(calls: &Calls) {
    let state = calls.state("").unwrap();
    assert_eq!((state.status.unwrap(), state.exit_status), (Status::STOPPED, 137));
    assert!(state.exited_at.is_some());
    assert_eq!(calls.wait("").unwrap(), 137);
    // The kernel takes every process along with the first.
    assert_eq!(calls.wait("frozen").unwrap(), 137);
    calls.delete("frozen").unwrap();
    assert_eq!(refusal(calls.kill("", 9, false)).0, Code::NOT_FOUND);
    assert_eq!(refusal(calls.stats()).0, Code::NOT_FOUND);
    for (answer, verb) in [
        (calls.start("").map(drop), "start"),
        (calls.pause(), "pause"),
        (calls.update("{}"), "update"),
        (calls.exec("late", &["true"], false), "exec in"),
    ] {
        too_early_or_late(answer, &format!("cannot {verb} a stopped process"));
    }
    calls.close_io("").unwrap();
    calls.resize("").unwrap();
    calls.shutdown().unwrap();
    assert_eq!(calls.status(""), Status::STOPPED);
}
